/* One prompt: question, facts, tree, text of the chosen branch, and where teacher and student disagree. */
let drawing = 0;  // number of the last drawing, so that one that is overtaken is dropped

async function showPrompt() {
  markEntry();
  const mine = (drawing += 1);
  const place = state.shown[state.at];
  const detail = byId("detail");
  if (place === undefined) {
    detail.replaceChildren(make("p", { className: "note" }, "No prompt passes the filters."));
    return;
  }
  const entry = state.lists[state.run][place];
  const columns = [[state.run, place]];
  if (state.beside !== null) columns.push([state.beside, state.lists[state.beside].findIndex((other) => other.key === entry.key)]);
  const parts = await Promise.all(columns.map(([run, at]) => (at < 0 ? null : readTree(run, at))));
  if (mine !== drawing) return;
  const shown = columns.map(([run, at], i) => (parts[i] ? drawRun(parts[i], run, at, columns.length > 1) : drawMissing(run)));
  detail.replaceChildren(drawQuestion(entry), make("div", { className: columns.length > 1 ? "columns two" : "columns" }, ...shown));
  detail.dataset.place = place;
  readAhead(mine);
}

/** Read the tree of the next prompt while there is nothing else to do. */
function readAhead(mine) {
  const next = state.shown[state.at + 1];
  if (next !== undefined) (window.requestIdleCallback ?? setTimeout)(() => { if (mine === drawing) readTree(state.run, next); });
}

function drawQuestion(entry) {
  const verdict = verdictOf(entry);
  return make("header", {}, make("h3", {}, `Line ${entry.line}`), make("p", { className: "asked", dir: "auto" }, visible(entry.question)),
    entry.answer === null ? "" : make("p", { className: "answer" }, "reference answer ", make("b", { dir: "auto" }, visible(String(entry.answer))), make("span", { className: `chip ${verdict}` }, verdict === "unknown" ? entry.undecided ?? "not judged" : verdict)));
}

function drawMissing(run) {
  return make("div", { className: "column" }, make("p", { className: "note" }, `${state.names[run]} has no such prompt among those that are shown.`));
}

/** Return the column of one run: its tree, and the text of a branch that follows what is chosen in the tree. */
function drawRun(tree, run, place, isNamed) {
  const search = state.overview.searches[run];
  const criterion = state.criterion in tree.criteria ? state.criterion : search.criterion;
  const reading = make("div", { className: "reading" });
  const show = (path, title) => { reading.replaceChildren(...drawBranch(tree, path, title)); markPath(element, path); };
  const element = drawTree(tree, search, criterion, (chosen) => show(pathTo(tree, chosen), titleOf(tree, chosen)));
  const kept = () => show(tree.responses[0].path, titleOfResponse(tree, 0));
  kept();
  const others = tree.responses.slice(1).map((_, i) => make("button", { type: "button", onclick: () => show(tree.responses[i + 1].path, titleOfResponse(tree, i + 1)) }, `response ${i + 2}`));
  const choice = make("p", { className: "choice" }, make("button", { type: "button", className: "back", onclick: kept }, others.length ? "response 1" : "the kept response"), ...others);
  const title = isNamed ? [make("h4", {}, state.names[run])] : [];
  return make("div", { className: "column", data: { run } }, ...title, drawFacts(tree, search, criterion), make("div", { className: "halves" },
    make("div", { className: "half" }, element, drawTreeKey(tree, search, criterion)), make("div", { className: "half" }, choice, reading)));
}

function drawFacts(tree, search, criterion) {
  const counts = {};
  for (const box of tree.boxes) counts[box.verdict] = (counts[box.verdict] ?? 0) + 1;
  const judged = tree.criteria[criterion];
  const differing = judged ? judged.differs.filter(Boolean).length : 0;
  const texts = [Object.entries(counts).map(([name, n]) => `${n} ${name}`).join(", ")];
  if (judged && criterion !== search.criterion) texts.push(`${criterion} would keep others in ${differing} of ${count(tree.parts.length, "round")}`);
  return make("p", { className: "facts" }, texts.join(" · "));
}

function drawTreeKey(tree, search, criterion) {
  const drawn = tree.boxes.some((box) => box.draw !== null);
  const width = drawn ? "the probability of the draw" : tree.boxes.some((box) => box.studentMean !== null) ? "the student's probability per token (geometric mean)" : "the teacher's probability per token: the student's is not stored";
  const value = criterion ? `The number is ${criterion} (${search.higher_is_better[criterion] ? "higher" : "lower"} is better). ` : "";
  return make("p", { className: "note key" }, make("span", { className: "sample best" }), " kept ", make("span", { className: "sample pruned" }), " pruned ", make("span", { className: "sample picked" }), ` kept by the chosen criterion, and not by the run. Width: ${width}. ${value}`);
}

function titleOf(tree, place) {
  const box = tree.boxes[place];
  return `Branch to round ${box.round + 1}, candidate ${box.trace.at(-1) + 1}: ${VERDICTS[box.verdict]}`;
}

function titleOfResponse(tree, i) {
  const r = tree.responses[i];
  const verdict = r.correct === true ? "right" : r.correct === false ? "wrong" : r.undecided ? `not judged: ${r.undecided}` : "no verdict";
  return `Response${tree.responses.length > 1 ? ` ${i + 1}` : ""}: ${r.status}${r.cut_by ? ` (${r.cut_by})` : ""}, ${verdict}, ${count(r.tokens, "token")}`;
}

function drawBranch(tree, path, title) {
  const by = byId("colour").value;
  const text = drawText(tree, path, by);
  const tokens = tokensOf(tree, path);
  const go = (i) => {
    const node = findToken(text, tokens, i, by);
    text.querySelector(".token.current")?.classList.remove("current");
    node.classList.add("current");
    node.scrollIntoView({ block: "center" });
  };
  const details = make("details", { className: "disagree" }, make("summary", {}, "Where teacher and student disagree"));
  details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) details.append(drawDisagreements(tree, path, go)); });
  return [make("h4", {}, title), drawKey(by), text, details];
}

function markPath(element, path) {
  const places = new Set(path.map(String));
  element.querySelectorAll("button.box").forEach((box) => box.classList.toggle("chosen", places.has(box.dataset.place)));
}

/** Go to the next or the previous round in which the criterion differs. */
function goToDifference(by) {
  const rounds = [...byId("detail").querySelectorAll(".column:first-child .round.differs")];
  if (!rounds.length) return;
  const at = rounds.findIndex((round) => round.classList.contains("visited"));
  const next = rounds[(at + by + rounds.length) % rounds.length] ?? rounds[0];
  rounds[at]?.classList.remove("visited");
  next.classList.add("visited");
  next.scrollIntoView({ block: "center" });
}
