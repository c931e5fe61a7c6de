/* The text of a branch, coloured token by token. A part becomes tokens when it comes into view. */
const PART_TOKENS = 400;  // tokens that are drawn together
const FULL = { student: 600, teacher: 600, gap: 400, entropy: 400, rank: 100 };  // hundredths (of rank: the rank) of the strongest colour

/** Return the tokens of a branch: text, values in hundredths, box. path: places of its boxes. */
function tokensOf(tree, path) {
  const tokens = [];
  for (const place of path) {
    const box = tree.boxes[place];
    if (box.provisional && place !== path.at(-1)) continue;  // the next box has its tokens as well
    let start = 0;
    box.lengths.forEach((length, i) => {
      tokens.push({
        text: box.text.slice(start, start + length), place, first: i === 0,
        student: box.student?.[i] ?? null, entropy: box.entropy?.[i] ?? null, rank: box.rank?.[i] ?? null, teacher: box.teacher?.[i] ?? null,
      });
      start += length;
    });
  }
  return tokens;
}

/** Return strength in [0, 1] and sign of a token's colour; null where its value is not stored. */
function strengthOf(token, by) {
  if (by === "gap") {
    if (token.student === null || token.teacher === null) return null;
    const gap = token.student - token.teacher;
    return { strength: Math.min(1, Math.abs(gap) / FULL.gap), isCool: gap < 0 };
  }
  const value = token[by];
  if (value === null) return null;
  const strength = by === "rank" ? Math.log(value) / Math.log(FULL.rank) : value / FULL[by];
  return { strength: Math.max(0, Math.min(1, strength)), isCool: false };
}

function colourToken(node, token, by) {
  const colour = strengthOf(token, by);
  if (!colour || colour.strength < 0.02) node.style.background = "";
  else node.style.background = `color-mix(in srgb, var(--${colour.isCool ? "cool" : "heat"}) ${Math.round(72 * colour.strength)}%, transparent)`;
}

function describeToken(token) {
  const known = token.student !== null;
  const pairs = [];
  if (known) pairs.push(["student's surprisal", `${format(token.student / 100)} nats (p ${chance(token.student)})`], ["student's rank", whole(token.rank)], ["student's entropy", `${format(token.entropy / 100)} nats`]);
  if (token.teacher !== null) pairs.push(["teacher's surprisal", `${format(token.teacher / 100)} nats (p ${chance(token.teacher)})`]);
  return tipLines(`“${visible(token.text).replaceAll("\n", "↵")}”`, pairs, ...(known ? [] : ["The student's numbers are not stored."]));
}

/** Return the element of one token. A line break keeps its place behind a mark that carries the colour. */
function drawToken(token, by) {
  const text = visible(token.text);
  const shown = text.trim() === "" && text.includes("\n") ? text.replace("\n", "↵\n") : text || "∅";
  const node = make("span", { className: `token${token.first ? " first" : ""}` }, shown);
  colourToken(node, token, by);
  setTip(node, () => describeToken(token));
  return node;
}

const fillers = new WeakMap();  // part of a text -> function that draws its tokens
addEventListener("beforeprint", () => document.querySelectorAll(".part").forEach((part) => fillers.get(part)?.()));

/** Return the element of a branch's text. */
function drawText(tree, path, by) {
  const tokens = tokensOf(tree, path);
  const root = make("div", { className: "text", tabIndex: 0, dir: "auto", role: "group" });
  root.setAttribute("aria-label", "Text of the branch. Left and right go from token to token and read its numbers.");
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { fillPart(entry.target, tokens, by); observer.unobserve(entry.target); }
  }, { rootMargin: "400px" });
  for (let start = 0; start < tokens.length; start += PART_TOKENS) {
    const part = make("span", { className: "part", data: { start } }, visible(tokens.slice(start, start + PART_TOKENS).map((t) => t.text).join("")));
    root.append(part);
    fillers.set(part, () => fillPart(part, tokens, by));
    if (start === 0) fillPart(part, tokens, by);
    else observer.observe(part);
  }
  if (!tokens.length) root.append(make("em", {}, "no tokens"));
  listenForTokens(root, tokens, by);
  return root;
}

function fillPart(part, tokens, by) {
  if (part.dataset.filled) return;
  part.dataset.filled = "yes";
  const start = Number(part.dataset.start);
  part.replaceChildren(...tokens.slice(start, start + PART_TOKENS).map((token) => drawToken(token, by)));
}

/** Let the arrow keys go through the tokens, whose numbers are read aloud. */
function listenForTokens(root, tokens, by) {
  const live = make("span", { className: "unseen" });
  live.setAttribute("aria-live", "polite");
  let at = -1;
  root.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    at = Math.max(0, Math.min(tokens.length - 1, at + step));
    const node = findToken(root, tokens, at, by);
    root.querySelector(".token.current")?.classList.remove("current");
    node.classList.add("current");
    node.scrollIntoView({ block: "nearest" });
    const box = node.getBoundingClientRect();
    showTip(node, box.left, box.bottom - 14);
    const t = tokens[at];
    live.textContent = `${visible(t.text)}: ${t.student === null ? "" : `surprisal ${format(t.student / 100)}, rank ${t.rank}, entropy ${format(t.entropy / 100)}; `}${t.teacher === null ? "" : `teacher's surprisal ${format(t.teacher / 100)}`}`;
  });
  root.append(live);
}

function findToken(root, tokens, at, by) {
  const part = root.querySelectorAll(".part")[Math.floor(at / PART_TOKENS)];
  fillPart(part, tokens, by);
  return part.children[at % PART_TOKENS];
}

/** Return the key of the colours. */
function drawKey(by) {
  const names = { student: "student's surprisal, nats", teacher: "teacher's surprisal, nats", gap: "student's less teacher's surprisal, nats", entropy: "student's entropy, nats", rank: "student's rank" };
  const steps = by === "rank" ? [1, 3, 10, 30, 100] : by === "gap" ? [-400, -200, 0, 200, 400] : [0, 150, 300, 450, 600].map((v) => (v * FULL[by]) / 600);
  const swatches = steps.map((value) => {
    const node = make("span", { className: "swatch" }, by === "rank" ? `${value}` : `${value / 100}`);
    colourToken(node, by === "gap" ? { student: Math.max(0, value), teacher: Math.max(0, -value) } : { [by]: value }, by);
    return node;
  });
  return make("p", { className: "key" }, `${names[by]}: `, ...swatches, " and more");
}

const MOST_PLACES = 12;  // places of disagreement that are listed
const LEAST_GAP = 100;  // hundredths of a nat
const AROUND = 7;  // tokens before and after

/** Return the table of the places at which teacher and student disagree most, each coloured by either of them. */
function drawDisagreements(tree, path, onGo) {
  const tokens = tokensOf(tree, path);
  const places = tokens.map((t, i) => [t.student === null || t.teacher === null ? 0 : t.student - t.teacher, i])
    .filter(([gap]) => Math.abs(gap) >= LEAST_GAP).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
  if (!places.length) return make("p", { className: "note" }, tokens.some((t) => t.student !== null && t.teacher !== null) ? "Teacher and student differ by less than a nat at every token." : "The numbers of teacher and student are not both stored for the same tokens, so that they cannot be compared.");
  const shown = places.slice(0, MOST_PLACES).map(([, i]) => i).sort((a, b) => a - b);
  const rows = shown.map((i) => make("tr", {}, make("td", {}, make("button", { type: "button", className: "go", onclick: () => onGo(i) }, `${i + 1}`)),
    ...["teacher", "student"].map((by) => make("td", { className: "around" }, ...drawAround(tokens, i, by))),
    make("td", {}, chance(tokens[i].teacher)), make("td", {}, chance(tokens[i].student)), make("td", {}, whole(tokens[i].rank))));
  const head = make("tr", {}, ...["token", "teacher", "student", "p, teacher", "p, student", "rank"].map((t) => make("th", { scope: "col" }, t)));
  return make("div", { className: "scroll" }, make("table", { className: "disagreements" }, make("thead", {}, head), make("tbody", {}, ...rows)),
    make("p", { className: "note" }, `${count(places.length, "token")} of ${whole(tokens.length)} at which they differ by a nat or more; the largest differences are listed, coloured by the surprisal of either. What either would have written instead is not stored.`));
}

function drawAround(tokens, at, by) {
  const start = Math.max(0, at - AROUND);
  return tokens.slice(start, at + AROUND + 1).map((token, i) => {
    const node = drawToken(token, by);
    node.textContent = visible(token.text).replaceAll("\n", "↵");
    if (start + i === at) node.classList.add("here");
    return node;
  });
}
