/* The parts of the page over all prompts. */
function drawTable(head, rows) {
  return make("div", { className: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...head.map((t) => make("th", { scope: "col" }, t)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((t, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, t instanceof Node ? t : `${t}`)))))));
}

function fillSection(id, ...nodes) {
  byId(id).hidden = false;
  byId(id).querySelector(".content").replaceChildren(...nodes);
}

function drawSummary({ searches, trainings, evaluations }) {
  const rows = searches.map((s, i) => [state.names[i], s.command, `${whole(s.figures.prompts)}${s.is_finished ? "" : " so far"}`, s.criterion ?? "–",
    whole(s.figures.tokens_kept), whole(s.figures.tokens_sampled), interval(s.figures.accuracy), listCounts(s.figures.statuses)]);
  const section = byId("summary");
  if (rows.length) section.append(drawTable(["run", "command", "prompts", "criterion", "tokens kept", "tokens sampled", "right answers, 95 % interval", "best responses"], rows));
  for (const text of writeNotes(searches, [...searches, ...trainings, ...evaluations])) section.append(make("p", { className: "note" }, text));
}

const listCounts = (counts) => Object.entries(counts).map(([name, n]) => `${whole(n)} ${name}`).join(", ") || "none";

/** Return sentences on what a reader has to know: what is missing, and why. */
function writeNotes(searches, runs) {
  const open = runs.filter((run) => !run.is_finished).map((run) => run.name);
  const notes = open.length ? [`At work, or interrupted: ${open.join(", ")}. The page shows what they had when it was made.`] : [];
  searches.forEach((s, i) => {
    if (s.text_fault) notes.push(`${state.names[i]}: ${s.text_fault}`);
    if (!s.has_student) notes.push(`${state.names[i]}: genssd generate stores nothing of the student, so that its surprisal, rank and entropy are not shown; genssd report --student DIR computes them.`);
    for (const [name, reason] of Object.entries(s.left_out)) notes.push(`${state.names[i]}: the criterion ${name} is left out: ${reason}`);
  });
  if (searches.length > 1 && !searches.some((_, a) => searches.some((_, b) => a < b && commonPrompts(a, b)))) notes.push("The runs have no prompt in common, so that none can be shown side by side.");
  return notes;
}

function commonPrompts(a, b) {
  const keys = new Set(state.lists[a].map((entry) => entry.key));
  return state.lists[b].filter((entry) => keys.has(entry.key)).length;
}

function drawFaults(faults) {
  if (!faults.length) return;
  byId("faults").hidden = false;
  byId("faults").append(make("details", { open: faults.length < 6 }, make("summary", {}, `${count(faults.length, "line")} could not be read`), make("ul", {}, ...faults.slice(0, 200).map((fault) => make("li", {}, visible(fault))))));
}

function drawScoreSection(searches) {
  if (!searches.length) return;
  const tokens = searches.map((s, i) => drawTokens(state.names[i], s.figures));
  const scores = searches.flatMap((s, i) => Object.entries(s.figures.criteria).filter(([name, c]) => c.scores && (c.scores.counts[1] || name === s.criterion))
    .sort(([a], [b]) => (b === s.criterion) - (a === s.criterion))
    .map(([name, c]) => [i, drawScores(name, c.scores, name === s.criterion)]));
  const nodes = [make("p", { className: "note" }, "Kept: the candidates that became part of a response. Dropped: all others. The bars at the ends hold the 2.5 % of the scores on either side as well. ", legendItem("kept", "var(--good)"), " ", legendItem("dropped", "var(--pruned)"))];
  searches.forEach((_, i) => {
    const own = scores.filter(([run]) => run === i).map(([, node]) => node);
    if (searches.length > 1) nodes.push(make("h3", {}, state.names[i]));
    nodes.push(tokens[i], make("div", { className: "figures" }, ...own));
  });
  fillSection("scores", ...nodes);
}

function drawCriteria(searches) {
  const rows = searches.flatMap((s, i) => Object.entries(s.figures.criteria).filter(([name, c]) => name !== s.criterion && c.contested)
    .map(([name, c]) => [state.names[i], name, whole(s.figures.rounds), whole(c.contested), `${whole(c.differing)} (${percent(c.differing / Math.max(1, c.contested), 0)})`, `${whole(c.prompts_differing)} of ${whole(s.figures.prompts)}`]));
  if (!rows.length) return;
  fillSection("criteria", make("p", { className: "note" }, "Every recorded round, judged again by another criterion, which keeps as many candidates as the run did. Up to the first round in which it differs, a search by it would have had the same candidates; after that its choices hold given the recorded text, and what the teacher would have written instead is not known. The switch above the prompts marks these rounds in the trees."),
    drawTable(["run", "criterion", "rounds", "with a choice", "differing", "prompts with a difference"], rows));
}

function drawTrainings(trainings) {
  if (!trainings.length) return;
  const names = shorten(trainings.map((t) => t.name));
  const named = trainings.map((t, i) => ({ ...t, name: names[i] }));
  const isLoss = (metric) => metric === "cross_entropy" && named.every((t) => JSON.stringify(t.curves[metric]) === JSON.stringify(t.curves.loss));
  const metrics = [...new Set(named.flatMap((t) => Object.keys(t.curves)))].filter((metric) => !isLoss(metric));
  fillSection("training", metrics.length ? make("div", { className: "figures" }, ...metrics.map((metric) => drawCurves(metric, named))) : make("p", { className: "note" }, "No step has been logged yet."));
}

function drawEvaluations(evaluations, differing, total) {
  if (!evaluations.length) return;
  const names = shorten(evaluations.map((e) => e.name));
  const rows = evaluations.map((e, i) => [names[i], `${whole(e.problems)}${e.is_finished ? "" : " so far"}`, interval(e.accuracy), e.avg_at_k ? `${interval(e.avg_at_k)} (k = ${e.samples})` : "–",
    e.difference ? `${interval(e.difference)} over ${whole(e.common)}` : "–", format(e.mean_tokens), whole(e.cut_off)]);
  const items = evaluations.flatMap((e, i) => [[names[i], e.accuracy], [`${names[i]}, avg@${e.samples}`, e.avg_at_k]]).filter(([, estimate]) => estimate);
  const nodes = [drawTable(["model", "problems", "greedy accuracy, 95 % interval", "avg@k", `less ${names[0]}, same problems`, "tokens per response", "cut off"], rows)];
  if (items.length) nodes.push(drawIntervals("Accuracy with 95 % intervals", items));
  if (differing.length) nodes.push(drawDiffering(names, differing, total));
  fillSection("accuracy", ...nodes);
}

/** Return the problems on which the models differ: the first ones of `total`, the others are only counted. */
function drawDiffering(names, differing, total) {
  const shown = differing.length < total ? ` (the first ${whole(differing.length)} are listed)` : "";
  const details = make("details", {}, make("summary", {}, `${count(total, "problem")} on which the models differ${shown}`));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    details.append(...differing.map((p) => make("div", { className: "problem" }, make("p", { className: "asked", dir: "auto" }, visible(p.question)), make("p", { className: "answer" }, "reference answer ", make("b", {}, visible(String(p.answer)))),
      ...p.of.map((result, i) => (result ? make("div", {}, make("h4", {}, `${names[i]} `, make("span", { className: `chip ${result[0] ? "right" : "wrong"}` }, result[0] ? "right" : "wrong")), make("div", { className: "text plain", dir: "auto" }, visible(result[1]))) : "")))));
  });
  return details;
}
