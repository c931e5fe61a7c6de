/* The tooltip: one element, filled by whoever is under the pointer or has the focus. */
const tipOf = new WeakMap();  // element -> function that returns the tooltip's content

function setTip(node, describe) { tipOf.set(node, describe); }

function showTip(node, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(...tipOf.get(node)());
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
}

function hideTip() { byId("tip").hidden = true; }

function findTipped(target) {
  for (let node = target; node && node !== document; node = node.parentNode) if (tipOf.has(node)) return node;
  return null;
}

function listenForTips() {
  document.addEventListener("mousemove", (event) => {
    const node = findTipped(event.target);
    if (node) showTip(node, event.clientX, event.clientY);
    else hideTip();
  });
  document.addEventListener("focusin", (event) => {
    const node = findTipped(event.target);
    if (!node || !event.target.matches(":focus-visible")) return;
    const box = node.getBoundingClientRect();
    showTip(node, box.left, box.bottom - 14);
  });
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, true);
}

/** Return lines of a tooltip: pairs of a name and a value as a table, texts as paragraphs. */
function tipLines(title, pairs, ...notes) {
  const table = make("table", {}, ...pairs.map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", {}, value))));
  return [make("strong", {}, title), table, ...notes.map((note) => make("p", {}, note))];
}
