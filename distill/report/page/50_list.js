/* The list of prompts: filters, search, order, and which prompt is shown. */
const state = { overview: null, lists: [], run: 0, beside: null, criterion: null, shown: [], at: 0, branch: {}, texts: new Map() };

const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));

/** Return the function that tells whether an entry of the list passes the filters. */
function readFilters() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const inResponses = byId("in-responses").checked;
  const ranges = [["score", number("score-low"), number("score-high")], ["tokens", number("tokens-low"), number("tokens-high")]];
  const others = state.beside === null ? null : new Set(state.lists[state.beside].map((entry) => entry.key));
  return (entry, i) => {
    if (byId("status").value && entry.status !== byId("status").value) return false;
    if (byId("correct").value && verdictOf(entry) !== byId("correct").value) return false;
    if (byId("teacher").value && entry.teacher !== byId("teacher").value) return false;
    if (byId("only-differing").checked && !entry.differing[state.criterion]) return false;
    if (others && byId("only-common").checked && !others.has(entry.key)) return false;
    for (const [name, low, high] of ranges) {
      if ((low !== null || high !== null) && entry[name] === null) return false;
      if ((low !== null && entry[name] < low) || (high !== null && entry[name] > high)) return false;
    }
    const text = `${entry.question} ${entry.answer ?? ""} ${inResponses ? state.texts.get(`${state.run}-${i}`) ?? "" : ""}`.toLowerCase();
    return words.every((word) => text.includes(word));
  };
}

const verdictOf = (entry) => (entry.correct === true ? "right" : entry.correct === false ? "wrong" : "unknown");

/** Return the places of the entries that are shown, in their order. */
function choosePrompts() {
  const entries = state.lists[state.run] ?? [];
  const passes = readFilters();
  const places = entries.map((_, i) => i).filter((i) => passes(entries[i], i));
  const order = byId("order").value;
  const key = { score: (e) => e.score ?? Infinity, tokens: (e) => -e.tokens, sampled: (e) => -e.sampled, differing: (e) => -(e.differing[state.criterion] ?? 0) }[order];
  return key ? places.sort((a, b) => key(entries[a]) - key(entries[b])) : places;
}

/** Read the texts of all responses of the run, for the search in them. */
async function readTexts() {
  const run = state.run;
  for (let i = 0; i < state.lists[run].length; i += 1) {
    const key = `${run}-${i}`;
    if (!state.texts.has(key)) {
      const tree = await readPiece(`tree-${run}-${i}`);
      state.texts.set(key, tokensOf(tree, tree.responses[0].path).map((token) => token.text).join(""));
    }
    if (state.run !== run || !byId("in-responses").checked) return;
    if (i % 50 === 49) { byId("count").textContent = `reading responses: ${i + 1} of ${state.lists[run].length}`; await new Promise((done) => setTimeout(done)); }
  }
  updateList();
}

function updateList() {
  const before = state.shown[state.at];
  state.shown = choosePrompts();
  state.at = Math.max(0, state.shown.indexOf(before));
  const entries = state.lists[state.run];
  const cut = state.overview.searches[state.run].figures.prompts - entries.length;
  byId("count").textContent = `${whole(state.shown.length)} of ${count(entries.length, "prompt")}${cut > 0 ? ` (${whole(cut)} more are counted, and not shown: --prompts)` : ""}`;
  byId("list").replaceChildren(...state.shown.map((place, i) => drawEntry(entries[place], i)));
  showPrompt();
}

function drawEntry(entry, i) {
  const verdict = verdictOf(entry);
  const differing = entry.differing[state.criterion];
  const facts = [`${whole(entry.tokens)} of ${whole(entry.sampled)} tokens`, entry.score === null ? "" : format(entry.score), entry.status === "finished" ? "" : entry.status, differing ? `${count(differing, "round")} differ${differing === 1 ? "s" : ""}` : ""];
  const node = make("div", { className: `entry ${verdict}`, role: "option", id: `entry-${i}`, onclick: () => { state.at = i; showPrompt(); } },
    make("span", { className: "mark", title: `answer: ${verdict}` }, { right: "✓", wrong: "✗", unknown: "·" }[verdict]),
    make("span", { className: "question", dir: "auto" }, visible(entry.question).slice(0, 140)), make("span", { className: "facts" }, facts.filter(Boolean).join(" · ")));
  node.setAttribute("aria-label", `line ${entry.line}, answer ${verdict}, ${entry.status}: ${visible(entry.question).slice(0, 140)}`);
  return node;
}

function markEntry() {
  for (const node of byId("list").querySelectorAll("[aria-selected=true]")) node.setAttribute("aria-selected", "false");
  const node = byId(`entry-${state.at}`);
  if (!node) return;
  node.setAttribute("aria-selected", "true");
  byId("list").setAttribute("aria-activedescendant", node.id);
  const list = byId("list");
  if (node.offsetTop < list.scrollTop || node.offsetTop + node.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = node.offsetTop - list.clientHeight / 3;
}

function step(by) {
  const next = state.at + by;
  if (next < 0 || next >= state.shown.length) return;
  state.at = next;
  showPrompt();
}
