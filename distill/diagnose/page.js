const pair = document.getElementById("pair");

/** Return the style of a cosine: that of _style_cosine in page.py. */
function styleOf(value) {
  if (typeof value === "string") return "background: var(--faint); color: var(--soft)";
  const colour = value >= 0 ? "cool" : "heat";
  return `background: color-mix(in srgb, var(--${colour}) ${Math.round(65 * Math.min(Math.abs(value), 1))}%, transparent)`;
}

pair?.addEventListener("change", () => {
  for (const node of document.querySelectorAll("span[data-values]")) node.style.cssText = styleOf(JSON.parse(node.dataset.values)[pair.value]);
});
