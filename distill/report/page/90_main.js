/* Start: read the overview and the lists, fill the choices, listen to the keys. */
function fillChoice(id, options, chosen) {
  byId(id).replaceChildren(...options.map(([value, text]) => make("option", { value, selected: value === chosen }, text)));
}

/** Fill the choices that depend on the run. */
function fillChoices() {
  const search = state.overview.searches[state.run];
  const entries = state.lists[state.run];
  const values = (name) => [["", "all"], ...[...new Set(entries.map((entry) => entry[name]))].sort().map((value) => [value, value])];
  fillChoice("status", values("status"), "");
  const teachers = values("teacher");
  fillChoice("teacher", [teachers[0], ...teachers.slice(1).map(([value]) => [value, value.split("/").slice(-2).join("/")])], "");
  const names = Object.keys(search.figures.criteria);
  if (!names.includes(state.criterion)) state.criterion = search.criterion ?? names[0] ?? null;
  fillChoice("criterion", names.length ? names.map((name) => [name, name === search.criterion ? `${name} (the run)` : name]) : [["", "nobody chose"]], state.criterion);
  const others = state.lists.map((_, i) => i).filter((i) => i !== state.run && commonPrompts(state.run, i));
  if (!others.includes(state.beside)) state.beside = null;
  fillChoice("beside", [["", "none"], ...others.map((i) => [String(i), `${state.names[i]} (${count(commonPrompts(state.run, i), "prompt")})`])], state.beside === null ? "" : String(state.beside));
  byId("only-common").disabled = state.beside === null;
}

function listenToTools() {
  const on = (id, act) => byId(id).addEventListener("change", act);
  on("run", () => {
    const before = state.run;
    state.run = Number(byId("run").value);
    if (state.beside === state.run) state.beside = before;
    fillChoices();
    updateList();
  });
  on("beside", () => { state.beside = byId("beside").value === "" ? null : Number(byId("beside").value); byId("only-common").disabled = state.beside === null; updateList(); });
  on("criterion", () => { state.criterion = byId("criterion").value; updateList(); });
  on("colour", showPrompt);
  for (const id of ["status", "correct", "teacher", "only-differing", "only-common", "order"]) on(id, updateList);
  for (const id of ["search", "score-low", "score-high", "tokens-low", "tokens-high"]) byId(id).addEventListener("input", updateList);
  on("in-responses", () => { if (byId("in-responses").checked) readTexts(); else updateList(); });
  for (const id of ["tools", "filters"]) byId(id).addEventListener("submit", (event) => event.preventDefault());
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  byId("list").addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by) { event.preventDefault(); step(by); }
  });
}

const KEYS = {
  j: () => step(1), k: () => step(-1), n: () => goToDifference(1), p: () => goToDifference(-1), c: nextCriterion,
  "/": () => { byId("more").open = true; byId("search").focus(); }, "?": () => byId("help").showModal(), b: () => byId("detail").querySelectorAll("button.back").forEach((button) => button.click()),
};

function nextCriterion() {
  const choice = byId("criterion");
  choice.selectedIndex = (choice.selectedIndex + 1) % choice.options.length;
  choice.dispatchEvent(new Event("change"));
}

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && event.target.matches("input")) event.target.blur();
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea") || byId("help").open) return;
    const act = KEYS[event.key];
    if (act && state.lists.length) { event.preventDefault(); act(); }
  });
}

async function start() {
  if (!("DecompressionStream" in window)) return;  // the sentence in the page says what is needed
  const overview = await readPiece("overview");
  state.overview = overview;
  state.lists = await Promise.all(overview.searches.map((_, i) => readPiece(`list-${i}`)));
  state.names = shorten(overview.searches.map((s) => s.name));
  byId("title").textContent = overview.title;
  drawSummary(overview);
  drawFaults(overview.faults);
  listenForTips();
  const shown = state.lists.findIndex((entries) => entries.length);
  if (shown >= 0) {
    state.run = shown;
    byId("prompts").hidden = false;
    fillChoice("run", state.names.map((name, i) => [String(i), name]), String(shown));
    fillChoices();
    listenToTools();
    listenToKeys();
    byId("more").open = innerWidth > 830;
    updateList();
  } else if (overview.searches.length) byId("summary").append(make("p", { className: "note" }, "No prompt is finished yet."));
  drawScoreSection(overview.searches.filter((s) => s.figures.prompts));
  drawCriteria(overview.searches);
  drawTrainings(overview.trainings);
  drawEvaluations(overview.evaluations, overview.differing, overview.num_differing);
  for (const link of document.querySelectorAll("nav a")) link.hidden = document.querySelector(link.getAttribute("href")).hidden;
  byId("loading").remove();
  document.documentElement.dataset.ready = "yes";
}
start();
