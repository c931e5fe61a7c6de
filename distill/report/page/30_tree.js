/* The tree of a search: a row of boxes for every round, and lines from the branches that were kept to their candidates. */
const NARROWEST = 0.14;  // smallest width of a box, as a part of the widest possible one

const VERDICTS = {
  kept: "kept", forced: "kept, although worse than the threshold", beaten: "dropped: others of its round are better",
  threshold: "dropped: worse than the threshold", duplicate: "dropped: the same tokens as a sibling",
  loop: "dropped: it ends in a repetition", empty: "dropped: the stop string has left nothing", written: "written; nobody chose",
};
const ENDINGS = { chunk: "goes on", finished: "ends the response", stopped: "ends at a stop string", length: "cut off" };
const DECISIONS = { resampled: "sampled again", shortened: "sampled again, shorter", forced: "the best was kept although none is acceptable", asked: "the next teacher was asked", pruned: "the branches end here" };

/** Return the element of a tree. onChoose: function that takes the place of a chosen box. */
function drawTree(tree, search, criterion, onChoose) {
  const judged = tree.criteria[criterion];
  const picked = new Set(judged?.picked ?? []);
  const root = make("div", { className: "tree", role: "group" });
  root.setAttribute("aria-label", "Candidates by round. Arrow keys go from one to the next, Enter shows the text of its branch.");
  let above = [];
  tree.parts.forEach((row, number) => {
    const context = { tree, search, criterion, judged, picked, row, number };
    const { element, spans } = drawRound(context, onChoose);
    if (number && row.attempt === 0) root.append(drawLines(tree, above, spans));
    root.append(element);
    if (row.boxes.some((place) => tree.boxes[place].isKept)) above = spans;
  });
  root.addEventListener("keydown", (event) => moveInTree(event, root));
  root.querySelector("button.box")?.setAttribute("tabindex", "0");
  return root;
}

/** Return the row of a round, and the centre of every box in parts of the row's width. */
function drawRound({ tree, search, criterion, judged, picked, row, number }, onChoose) {
  const differs = judged?.differs[number] ?? false;
  const weights = row.boxes.map((place) => Math.max(NARROWEST, tree.boxes[place].likelihood));
  const total = weights.reduce((a, b) => a + b, 0) || 1;
  const spans = [];
  let left = 0;
  const boxes = row.boxes.map((place, i) => {
    spans.push({ place, centre: (left + weights[i] / 2) / total });
    left += weights[i];
    return drawBox(tree, search, criterion, place, picked.has(place), differs, weights[i], onChoose);
  });
  const name = row.attempt ? `${row.round + 1}, attempt ${row.attempt + 1}` : `${row.round + 1}`;
  const notes = [DECISIONS[row.decision], differs && (judged.exact[number] ? "differs" : "differs, given this text")].filter(Boolean);
  const element = make("div", { className: `round${differs ? " differs" : ""}`, data: { round: number } },
    make("span", { className: "number", title: `round ${name}` }, name), make("div", { className: "boxes" }, ...boxes));
  if (notes.length) element.append(make("span", { className: "decision" }, notes.join("; ")));
  return { element, spans };
}

function drawBox(tree, search, criterion, place, isPicked, differs, weight, onChoose) {
  const box = tree.boxes[place];
  const value = valueOf(tree, criterion, place);
  const marks = [box.isKept ? (tree.best.has(place) ? "best" : "kept") : "pruned", isPicked && differs ? "picked" : "", box.verdict].filter(Boolean);
  const text = visible(box.text.trim().replace(/\s+/g, " ")).slice(0, 160) || "(empty)";
  const button = make("button", { type: "button", className: `box ${marks.join(" ")}`, tabIndex: -1, data: { place }, style: { flexGrow: 100 * weight } },
    make("span", { className: "snippet", dir: "auto" }, text), make("span", { className: "value" }, format(value)));
  button.setAttribute("aria-label", `round ${box.round + 1}, candidate ${box.trace.at(-1) + 1}: ${VERDICTS[box.verdict]}${isPicked && differs ? `; ${criterion} would keep it` : ""}; ${criterion ?? "score"} ${format(value)}; ${text}`);
  button.addEventListener("click", () => onChoose(place));
  setTip(button, () => describeBox(tree, search, criterion, place, isPicked));
  return button;
}

function valueOf(tree, criterion, place) {
  const values = tree.criteria[criterion]?.values;
  return values ? values[place] : tree.boxes[place].score;
}

/** Return the lines from the kept boxes of one row to the boxes of the next, as a strip between them. */
function drawLines(tree, above, below) {
  const strip = makeSvg("svg", { class: "lines", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" });
  const from = new Map(above.map(({ place, centre }) => [place, 100 * centre]));
  const draw = (isBold) => {
    for (const { place, centre } of below) {
      const start = from.get(tree.boxes[place].parent);
      if (start === undefined || tree.best.has(place) !== isBold) continue;
      const x = 100 * centre;
      strip.append(makeSvg("path", { d: `M${start} 0 C${start} 12 ${x} 8 ${x} 20`, class: isBold ? "bold" : "thin" }));
    }
  };
  draw(false);
  draw(true);
  return strip;
}

/** Return the content of a box's tooltip: what became of it, why, and its numbers. */
function describeBox(tree, search, criterion, place, isPicked) {
  const box = tree.boxes[place];
  const pairs = [];
  if (search.teachers.length > 1) pairs.push(["written by", search.teachers[box.writer]]);
  if (search.criterion) pairs.push([`${search.criterion} (the run)`, format(box.score, 4)]);
  for (const [name, judged] of Object.entries(tree.criteria)) {
    if (name !== search.criterion) pairs.push([name, `${format(judged.values[place], 4)}${judged.picked.includes(place) !== box.isKept ? (box.isKept ? ", not kept by it" : ", kept by it") : ""}`]);
  }
  if (box.studentMean !== null) pairs.push(["student's perplexity", format(Math.exp(box.studentMean))]);
  if (box.teacherMean !== null) pairs.push(["teacher's perplexity", format(Math.exp(box.teacherMean))]);
  if (box.draw !== null) pairs.push(["probability of the draw", percent(box.draw)]);
  pairs.push(["tokens", `${whole(box.lengths.length)}, ${ENDINGS[box.ending] ?? box.ending}`]);
  const notes = [explain(tree, search, place)];
  if (isPicked && criterion !== search.criterion) notes.push(`${criterion} would keep it here.`);
  return tipLines(VERDICTS[box.verdict], pairs, ...notes, visible(box.text.trim()).slice(0, 400));
}

/** Return why the run kept or dropped a box, in a sentence. */
function explain(tree, search, place) {
  const box = tree.boxes[place];
  const rivals = tree.boxes.filter((b) => b.round === box.round && b.attempt === box.attempt && b.place !== place && b.score !== null && !["duplicate", "loop", "empty"].includes(b.verdict));
  const sign = search.higher_is_better[search.criterion] ? -1 : 1;
  const best = (boxes) => boxes.map((b) => b.score).sort((a, b) => sign * (a - b))[0];
  if (box.verdict === "kept" && box.draw !== null) return "It was drawn among the acceptable candidates of its round.";
  if (box.verdict === "kept" && rivals.length) return `Its ${search.criterion} is ${format(box.score, 4)}, the best of the others is ${format(best(rivals), 4)}.`;
  if (box.verdict === "beaten") return `Its ${search.criterion} is ${format(box.score, 4)}; kept was ${format(best(rivals.filter((b) => b.isKept)), 4)}.`;
  if (["threshold", "forced"].includes(box.verdict)) return `The threshold is ${search.threshold === null ? "that of the calibration" : format(search.threshold, 4)}.`;
  return "";
}

/** Move the focus between boxes with the arrow keys. */
function moveInTree(event, root) {
  const here = document.activeElement?.closest("button.box");
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!here || !steps) return;
  event.preventDefault();
  const rows = [...root.querySelectorAll(".round")];
  const row = rows.indexOf(here.closest(".round"));
  const target = rows[row + steps[0]];
  if (!target) return;
  const boxes = [...target.querySelectorAll("button.box")];
  const kept = Math.max(0, boxes.findIndex((b) => b.classList.contains("best")));
  const next = boxes[steps[0] ? kept : boxes.indexOf(here) + steps[1]];
  if (!next) return;
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}
