/* Charts, each with the numbers that it is made of as a table below it. */
const HUES = ["#1f78b4", "#e8590c", "#2b8a3e", "#9c36b5", "#c2255c", "#846a00", "#0b7285", "#6c757d"];

/** Return a figure: a drawing with a caption, and a table of its numbers that opens. */
function figure(caption, drawing, head, rows) {
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", caption);
  const table = make("table", {}, make("tr", {}, ...head.map((t) => make("th", { scope: "col" }, t))), ...rows.map((row) => make("tr", {}, ...row.map((t) => make("td", {}, `${t}`)))));
  return make("figure", {}, make("figcaption", {}, caption), drawing, make("details", { className: "numbers" }, make("summary", {}, "numbers"), make("div", { className: "scroll" }, table)));
}

/** Return some round numbers between two. */
function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
  const values = [];
  for (let value = Math.ceil(low / size) * size; value <= high + size / 1e6; value += size) values.push(Math.abs(value) < size / 1e6 ? 0 : value);
  return values;
}

/** Return a drawing with axes, and the functions that place numbers in it. */
function plot({ width = 460, height = 230, x, y, yLabel = "", xLabel = "", hasY = true }) {
  const [left, right, top, bottom] = [52, 10, 18, 34];
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot" });
  const toX = (v) => left + ((v - x[0]) / (x[1] - x[0] || 1)) * (width - left - right);
  const toY = (v) => height - bottom - ((v - y[0]) / (y[1] - y[0] || 1)) * (height - top - bottom);
  for (const value of hasY ? ticks(y[0], y[1], 5) : []) svg.append(makeSvg("line", { x1: left, x2: width - right, y1: toY(value), y2: toY(value), class: "grid" }), makeSvg("text", { x: left - 6, y: toY(value) + 4, "text-anchor": "end" }, format(value, 4)));
  for (const value of ticks(x[0], x[1], 6)) svg.append(makeSvg("text", { x: toX(value), y: height - bottom + 16, "text-anchor": "middle" }, format(value, 4)));
  svg.append(makeSvg("text", { x: width - right, y: height - 3, "text-anchor": "end" }, xLabel), makeSvg("text", { x: left, y: 11 }, yLabel));
  return { svg, toX, toY };
}

function legendItem(name, colour) {
  return make("span", { className: "item" }, make("span", { className: "dot", style: { background: colour } }), ` ${name}`);
}

function legend(items) {
  return make("p", { className: "legend" }, ...items.flatMap(([name, colour]) => [legendItem(name, colour), " "]));
}

/** Return the distribution of one criterion's scores, kept against dropped. */
function drawScores(name, scores, isOwn) {
  const { edges, kept, dropped, medians, counts } = scores;
  const parts = [kept, dropped].map((bars, i) => bars.map((n) => n / Math.max(1, counts[i])));
  const high = Math.max(...parts.flat(), 0.01);
  const { svg, toX, toY } = plot({ x: [edges[0], edges.at(-1)], y: [0, high], xLabel: name, yLabel: "fraction of each group" });
  parts.forEach((bars, i) => {
    let d = `M${toX(edges[0])} ${toY(0)}`;
    bars.forEach((value, j) => { d += `L${toX(edges[j])} ${toY(value)}L${toX(edges[j + 1])} ${toY(value)}`; });
    svg.append(makeSvg("path", { d: `${d}L${toX(edges.at(-1))} ${toY(0)}Z`, class: i ? "dropped" : "kept" }));
  });
  const caption = `${name}${isOwn ? " (the run's criterion)" : ""}: ${whole(counts[0])} kept, median ${format(medians[0])}; ${whole(counts[1])} dropped, median ${format(medians[1])}`;
  return figure(caption, svg, ["from", "to", "kept", "dropped"], kept.map((n, j) => [format(edges[j]), format(edges[j + 1]), n, dropped[j]]));
}

/** Return the tokens of a run as one bar: kept, and dropped by reason. */
function drawTokens(name, figures) {
  const bestKept = figures.tokens_kept;
  const kept = ["kept", "forced", "written"].reduce((sum, verdict) => sum + (figures.tokens[verdict] ?? 0), 0);
  const parts = [["kept in the best responses", bestKept, "var(--good)"], ["kept in other branches", kept - bestKept, "var(--cool)"],
    ...["beaten", "threshold", "duplicate", "loop", "empty"].map((v, i) => [v, figures.tokens[v] ?? 0, ["var(--pruned)", "var(--heat)", "#b197fc", "#f06595", "var(--pruned)"][i]])].filter(([, n]) => n > 0);
  const total = figures.tokens_sampled || 1;
  const svg = makeSvg("svg", { viewBox: "0 0 460 26", class: "bar", preserveAspectRatio: "none" });
  let left = 0;
  for (const [, n, colour] of parts) {
    svg.append(makeSvg("rect", { x: left, width: (460 * n) / total, y: 0, height: 26, style: `fill:${colour}` }));
    left += (460 * n) / total;
  }
  const node = figure(`${name}: ${whole(bestKept)} tokens kept of ${whole(figures.tokens_sampled)} sampled (${percent(bestKept / total)})`, svg, ["tokens", "number", "part"], parts.map(([part, n]) => [part, whole(n), percent(n / total)]));
  node.querySelector("svg").after(legend(parts.map(([part, n, colour]) => [`${part} ${percent(n / total, 0)}`, colour])));
  return node;
}

/** Return the curves of one metric of all trainings that have it. */
function drawCurves(metric, trainings) {
  const lines = trainings.map((t, i) => [t.name, t.curves[metric], HUES[i % HUES.length]]).filter(([, points]) => points);
  const all = lines.flatMap(([, points]) => points);
  const range = (i) => [Math.min(...all.map((p) => p[i])), Math.max(...all.map((p) => p[i]))];
  const y = range(1);
  y[1] += 0.08 * (y[1] - y[0]); // the name of the axis stands above the curves
  const { svg, toX, toY } = plot({ x: range(0), y: y[0] === y[1] ? [y[0] - 0.5, y[1] + 0.5] : y, xLabel: "step", yLabel: metric });
  const few = lines.every(([, points]) => points.length < 30);
  for (const [, points, colour] of lines) {
    svg.append(makeSvg("path", { d: points.map(([a, b], i) => `${i ? "L" : "M"}${toX(a)} ${toY(b)}`).join(""), class: "curve", style: `stroke:${colour}` }));
    if (few) for (const [a, b] of points) svg.append(makeSvg("circle", { cx: toX(a), cy: toY(b), r: 2.4, style: `fill:${colour}` }));
  }
  const node = figure(`${metric} over optimizer steps`, svg, ["run", "step", metric], lines.flatMap(([name, points]) => points.map(([a, b]) => [name, a, format(b, 4)])));
  node.querySelector("svg").after(legend(lines.map(([name, , colour]) => [name, colour])));
  return node;
}

/** Return the accuracies with their 95 % intervals. items: name and estimate of each. */
function drawIntervals(caption, items) {
  const height = 44 + 26 * items.length;
  const { svg, toX } = plot({ width: 620, height, x: [0, 1], y: [0, 1], hasY: false });
  items.forEach(([name, e], i) => {
    const y = 28 + 26 * i;
    svg.append(makeSvg("line", { x1: toX(e.low), x2: toX(e.high), y1: y, y2: y, class: "interval" }), makeSvg("circle", { cx: toX(e.value), cy: y, r: 4, class: "point" }));
    const isRight = e.high > 0.6;
    svg.append(makeSvg("text", { x: isRight ? toX(e.low) - 8 : toX(e.high) + 8, y: y + 4, "text-anchor": isRight ? "end" : "start" }, name));
  });
  return figure(caption, svg, ["", "accuracy", "95 % interval"], items.map(([name, e]) => [name, percent(e.value), `${percent(e.low)} to ${percent(e.high)}`]));
}
