/* Data of the page: compressed pieces, which are read when they are shown, and small helpers for elements. */
const byId = (id) => document.getElementById(id);

/** Return an element; properties are set on it, children are appended (texts never as HTML). */
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(node.dataset, value);
    else if (name === "style") Object.assign(node.style, value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function makeSvg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i += 1) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

async function readPiece(id) {
  const bytes = decodeBase64(byId(id).textContent);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const KEPT_TREES = 12;  // trees that stay in memory
const trees = new Map();

/** Return the tree of a prompt, prepared: boxes know their children, their parent and their statistics. */
async function readTree(run, place) {
  const id = `tree-${run}-${place}`;
  if (!trees.has(id)) {
    trees.set(id, readPiece(id).then(prepareTree));
    if (trees.size > KEPT_TREES) trees.delete(trees.keys().next().value);
  }
  return trees.get(id);
}

function prepareTree(tree) {
  const places = new Map(tree.boxes.map((box, i) => [box.trace.join(), i]));
  tree.boxes.forEach((box, i) => {
    box.place = i;
    box.round = box.trace.length - 1;
    box.parent = places.get(box.trace.slice(0, -1).join()) ?? null;
    box.isKept = ["kept", "forced", "written"].includes(box.verdict);
    box.studentMean = mean(box.student);
    box.teacherMean = mean(box.teacher);
    const fit = box.studentMean ?? box.teacherMean;
    box.likelihood = box.draw ?? (fit === null ? 1 : Math.exp(-fit));
  });
  tree.best = new Set(tree.responses[0].path);
  tree.parts = divideIntoRounds(tree);
  return tree;
}

/** Return the rounds with the places of their boxes: every attempt is a row of its own. */
function divideIntoRounds(tree) {
  const rows = tree.rounds.map(([round, attempt, tokens, decision]) => ({ round, attempt, tokens, decision, boxes: [] }));
  const byKey = new Map(rows.map((row) => [`${row.round},${row.attempt}`, row]));
  tree.boxes.forEach((box) => byKey.get(`${box.round},${box.attempt}`)?.boxes.push(box.place));
  return rows;
}

/** Return the mean of hundredths as a number of nats; null where there are none. */
function mean(values) {
  const known = (values ?? []).filter((v) => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length / 100 : null;
}

/** Return the places of the boxes from the root to a box. */
function pathTo(tree, place) {
  const path = [];
  for (let at = place; at !== null && at !== undefined; at = tree.boxes[at].parent) path.unshift(at);
  return path;
}

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

/** Return a text in which characters that cannot be seen, or turn the direction of others, are named. */
const visible = (text) => text.replace(HIDDEN, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

/** Return a number with some significant digits. */
function format(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const rounded = Number(value.toPrecision(digits));
  return Math.abs(rounded) >= 1000 ? rounded.toLocaleString("en") : `${rounded}`;
}

const whole = (value) => value.toLocaleString("en");
const count = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`);
const interval = (e) => (e ? `${percent(e.value)} [${(100 * e.low).toFixed(1)}, ${(100 * e.high).toFixed(1)}]` : "–");
const chance = (hundredths) => (hundredths === null ? "–" : percent(Math.exp(-hundredths / 100), hundredths > 460 ? 2 : 1));

/** Return the names of runs without the folders that they share. */
function shorten(names) {
  const parts = names.map((name) => name.split("/"));
  let shared = 0;
  while (parts.every((p) => p.length > shared + 1 && p[shared] === parts[0][shared])) shared += 1;
  return parts.map((p) => p.slice(names.length > 1 ? shared : -1).join("/"));
}
