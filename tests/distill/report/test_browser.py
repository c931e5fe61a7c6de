"""The page in a real browser: it opens, expands, filters and switches, asks for nothing, and reports no error.

Skipped where no Chromium is installed (Debian: apt-get install chromium); `make browser` runs these tests alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Page, find_browser, open_page
from support.pages import list_trees, read_page
from support.report_runs import HOSTILE, QUESTIONS, Runs
from support.small_runs import make_small_runs
from support.tiny_pair import TinyPair

from genssd.distill.report.config import ReportConfig
from genssd.distill.report.found import OWN_PAGES
from genssd.distill.report.run import run_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("profile")) as page:
        page.resize(1400, 900)
        yield page


@pytest.fixture(scope="module")
def pages(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of two searches and rounds, and one of a run without a tokenizer, of generate, and of nothing yet."""
    base = tmp_path_factory.mktemp("pages")
    nothing = Path(shutil.copytree(runs.select, base / "nothing"))
    for name in ("selections.jsonl", "summary.json"):
        (nothing / name).unlink()
    choices = {"all": [runs.select, runs.beam, runs.distill], "written": [runs.generate], "nothing": [nothing]}
    for name, chosen in choices.items():
        run_report(ReportConfig(run=tuple(map(str, chosen)), output=str(base / f"{name}.html")))
    return {name: base / f"{name}.html" for name in choices}


@pytest.fixture
def page(browser: Page, pages: dict[str, Path]) -> Iterator[Page]:
    """The page of the searches, opened anew; afterwards nothing may have been fetched, and no error reported."""
    browser.problems.clear()
    browser.requests.clear()
    browser.open(pages["all"])
    browser.wait("document.querySelector('.tree')")
    yield browser
    assert browser.problems == []
    assert browser.requests == [pages["all"].resolve().as_uri()]


def choose(page: Page, name: str, value: str) -> None:
    """Choose an option, or fill a field, as a user does."""
    page.run(
        f"(() => {{ const node = byId({name!r}); node.value = {value!r};"
        "for (const kind of ['input', 'change']) node.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


def tick(page: Page, name: str) -> None:
    page.run(f"byId({name!r}).click()")


def shown(page: Page) -> list[int]:
    """Places of the prompts in the list."""
    return list(page.run("state.shown"))


def wait_for_prompt(page: Page) -> None:
    page.wait("byId('detail').dataset.place === String(state.shown[state.at]) && document.querySelector('.tree')")


def data(pages: dict[str, Path], run: int = 0) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return list_trees(read_page(pages["all"]), run)


def test_it_opens_with_the_tree_and_the_text_of_the_first_prompt(page: Page, pages: dict[str, Path]) -> None:
    entry, tree = data(pages)[0]
    assert page.run("document.querySelectorAll('.entry').length") == 3
    boxes = page.run("[...document.querySelectorAll('.box')].map((b) => [Number(b.dataset.place), b.className])")
    assert sorted(place for place, _ in boxes) == list(range(len(tree["boxes"])))
    best = {place for place, classes in boxes if "best" in classes.split()}
    assert best == set(tree["responses"][0]["path"])
    pruned = {place for place, classes in boxes if "pruned" in classes.split()}
    assert pruned == {i for i, b in enumerate(tree["boxes"]) if b["verdict"] not in ("kept", "forced")}
    assert page.run("document.querySelectorAll('.text .token').length") == entry["tokens"]
    assert page.run("document.querySelectorAll('#scores figure').length") > 3
    assert page.run("document.querySelectorAll('#training .curve').length") > 0
    assert page.run("document.querySelectorAll('#accuracy .interval').length") == 2
    assert page.run("document.querySelector('nav a[hidden]')") is None
    assert page.run("document.scrollingElement.scrollWidth <= innerWidth")


def test_what_data_says_is_shown_as_text(page: Page) -> None:
    (place,) = [
        i for i, question in enumerate(page.run("state.lists[0].map((e) => e.question)")) if question == HOSTILE
    ]
    page.run(f"(() => {{ state.at = {place}; return showPrompt(); }})()")
    wait_for_prompt(page)
    asked = page.run("document.querySelector('.asked').textContent")
    assert asked == HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\u2066", "⟨U+2066⟩")
    assert page.run("document.querySelectorAll('#detail img, #list img, #detail script').length") == 0


def test_a_box_shows_why_and_opens_the_text_of_its_branch(page: Page, pages: dict[str, Path]) -> None:
    _, tree = data(pages)[0]
    page.hover(".box.pruned")
    page.wait("!byId('tip').hidden")
    assert "dropped" in page.run("byId('tip').textContent")
    assert "ppl (the run)" in page.run("byId('tip').textContent")
    place = page.run("Number(document.querySelector('.box.pruned').dataset.place)")
    page.run("document.querySelector('.box.pruned').click()")
    trace = tree["boxes"][place]["trace"]
    length = sum(len(box["lengths"]) for box in tree["boxes"] if box["trace"] == trace[: len(box["trace"])])
    assert page.run("document.querySelectorAll('.text .token').length") == length
    assert "dropped" in page.run("document.querySelector('.reading h4').textContent")
    page.press("b")
    assert page.run("document.querySelector('.reading h4').textContent").startswith("Response")


def test_a_token_has_its_colour_and_its_numbers(page: Page, pages: dict[str, Path]) -> None:
    _, tree = data(pages)[0]
    box = tree["boxes"][tree["responses"][0]["path"][0]]
    page.hover(".text .token")
    page.wait("!byId('tip').hidden")
    tip = page.run("byId('tip').textContent")
    assert f"student's rank{box['rank'][0]}" in tip
    assert "student's entropy" in tip
    assert "teacher's surprisal" in tip
    for by, full in (("student", 600), ("teacher", 600), ("entropy", 400)):
        choose(page, "colour", by)
        wait_for_prompt(page)
        got = page.run("document.querySelector('.text .token').style.background")
        strength = round(72 * min(1.0, box[by][0] / full))
        assert (f" {strength}%" in got) or (strength < 2 and got == "")


def test_the_disagreements_are_listed_beside_each_other(page: Page, pages: dict[str, Path]) -> None:
    _, tree = data(pages)[0]
    boxes = [tree["boxes"][place] for place in tree["responses"][0]["path"]]
    gaps = [s - t for box in boxes for s, t in zip(box["student"], box["teacher"], strict=True)]
    far = sorted((i for i, gap in enumerate(gaps) if abs(gap) >= 100), key=lambda i: -abs(gaps[i]))[:12]
    assert far
    page.run("document.querySelector('.disagree').open = true")
    page.wait("document.querySelector('.disagreements')")
    listed = page.run("[...document.querySelectorAll('.disagreements .go')].map((b) => Number(b.textContent) - 1)")
    assert listed == sorted(far)
    assert page.run("document.querySelectorAll('.disagreements tbody tr:first-child .around').length") == 2


def test_the_criterion_switches(page: Page, pages: dict[str, Path]) -> None:
    assert page.run("document.querySelectorAll('.box.picked').length") == 0
    for criterion in ("length", "teacher_logprob"):
        choose(page, "criterion", criterion)
        wait_for_prompt(page)
        page.wait(f"document.querySelector('#detail .facts').textContent.includes({criterion!r})")
        place = page.run("state.shown[state.at]")
        judged = data(pages)[place][1]["criteria"][criterion]
        assert page.run("document.querySelectorAll('.round.differs').length") == sum(judged["differs"])
        counts = page.run("state.lists[0].map((e) => e.differing[state.criterion])")
        tick(page, "only-differing")
        assert sorted(shown(page)) == [i for i, count in enumerate(counts) if count]
        tick(page, "only-differing")
        wait_for_prompt(page)
    choose(page, "criterion", "ppl")
    before = page.run("byId('criterion').value")
    page.press("c")
    assert page.run("byId('criterion').value") != before
    page.press("n")
    assert page.run("document.querySelectorAll('.round.visited').length") <= 1


def test_filters_and_search(page: Page, pages: dict[str, Path]) -> None:
    entries = [entry for entry, _ in data(pages)]
    everything = list(range(len(entries)))
    choose(page, "search", "img onerror")
    assert shown(page) == [i for i in everything if entries[i]["question"] == HOSTILE]
    choose(page, "search", "no such words")
    assert shown(page) == []
    page.wait("byId('detail').textContent === 'No prompt passes the filters.'")
    choose(page, "search", "")
    assert shown(page) == everything
    for status in {entry["status"] for entry in entries}:
        choose(page, "status", status)
        assert shown(page) == [i for i in everything if entries[i]["status"] == status]
    choose(page, "status", "")
    choose(page, "correct", "wrong")
    assert shown(page) == [i for i in everything if entries[i]["correct"] is False] != []
    choose(page, "correct", "right")
    assert shown(page) == [i for i in everything if entries[i]["correct"] is True]
    choose(page, "correct", "")
    scores = sorted(entry["score"] for entry in entries)
    choose(page, "score-low", str(scores[1]))
    assert shown(page) == [i for i in everything if entries[i]["score"] >= scores[1]]
    choose(page, "score-high", str(scores[1]))
    assert [entries[i]["score"] for i in shown(page)] == [scores[1]]
    choose(page, "score-low", "")
    choose(page, "score-high", "")
    choose(page, "tokens-low", "1000")
    assert shown(page) == []
    choose(page, "tokens-low", "")
    choose(page, "teacher", entries[0]["teacher"])
    assert shown(page) == everything
    choose(page, "order", "score")
    assert [entries[i]["score"] for i in shown(page)] == scores
    wait_for_prompt(page)


def test_the_search_reads_responses_where_it_is_asked_to(page: Page, pages: dict[str, Path]) -> None:
    _, tree = data(pages)[0]
    text = "".join(tree["boxes"][place]["text"] for place in tree["responses"][0]["path"])
    (word, *_) = sorted((w for w in text.split() if "'" not in w and "\\" not in w), key=len, reverse=True)
    choose(page, "search", word.lower())
    assert 0 not in shown(page)
    tick(page, "in-responses")
    page.wait("state.shown.includes(0)")
    wait_for_prompt(page)


def test_two_runs_side_by_side(page: Page, pages: dict[str, Path]) -> None:
    choose(page, "beside", "1")
    page.wait("document.querySelectorAll('.columns.two .column .tree').length === 2")
    keys = [[entry["key"] for entry, _ in data(pages, run)] for run in (0, 1)]
    place = page.run("state.shown[state.at]")
    trees = [data(pages, 0)[place][1], data(pages, 1)[keys[1].index(keys[0][place])][1]]
    got = page.run("[...document.querySelectorAll('.column')].map((c) => c.querySelectorAll('.box').length)")
    assert got == [len(tree["boxes"]) for tree in trees]
    tick(page, "only-common")
    assert len(shown(page)) == 3
    choose(page, "run", "1")
    wait_for_prompt(page)
    assert page.run("state.beside") == 0
    page.wait("document.querySelectorAll('.columns.two .column .tree').length === 2")


def test_the_keyboard_is_enough(page: Page) -> None:
    page.press("j")
    wait_for_prompt(page)
    assert page.run("state.at") == 1
    page.press("k")
    wait_for_prompt(page)
    assert page.run("state.at") == 0
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.press("Escape")
    page.press("?")
    assert page.run("byId('help').open")
    page.press("Escape")
    assert not page.run("byId('help').open")
    page.run("document.querySelector('.box').focus()")
    page.press("ArrowRight")
    assert page.run("document.activeElement === document.querySelectorAll('.round:first-child .box')[1]")
    label = page.run("document.activeElement.getAttribute('aria-label')")
    page.press("Enter")
    assert page.run("document.querySelector('.reading h4').textContent").startswith("Branch to round 1, candidate 2")
    assert label.startswith("round 1, candidate 2: ")
    page.run("document.querySelector('.text').focus()")
    page.press("ArrowRight")
    assert "rank" in page.run("document.querySelector('.text [aria-live]').textContent")


def test_everything_has_a_name_for_a_screen_reader(page: Page) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "combobox", "searchbox", "spinbutton", "checkbox", "listbox", "option", "image"}
    seen = [node for node in nodes if not node.get("ignored") and node["role"]["value"] in roles]
    assert {"button", "combobox", "listbox", "option", "searchbox"} <= {node["role"]["value"] for node in seen}
    assert [node["role"]["value"] for node in seen if not node.get("name", {}).get("value")] == []


CONTRAST = """
(() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const mix = (layers) => {
    context.clearRect(0, 0, 1, 1);
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
  };
  const toLinear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => { const [r, g, b] = rgb.map(toLinear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const faint = [];
  for (const node of document.querySelectorAll("main *")) {
    const hasText = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!hasText || !node.checkVisibility({visibilityProperty: true}) || node.matches("option, .unseen")) continue;
    const layers = [];
    for (let n = node; n; n = n.parentElement) layers.unshift(getComputedStyle(n).backgroundColor);
    const under = light(mix(layers)), over = light(mix([...layers, getComputedStyle(node).color]));
    const ratio = (Math.max(under, over) + 0.05) / (Math.min(under, over) + 0.05);
    if (ratio < 4.5) faint.push([ratio.toFixed(2), node.className || node.tagName, node.textContent.slice(0, 20)]);
  }
  return faint;
})()
"""
"""Texts whose contrast to what is under them is below 4.5, the limit of WCAG 2.1 (1.4.3, level AA)."""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read(page: Page, dark: bool) -> None:
    page.resize(1400, 900, dark=dark)
    try:
        assert page.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 22, 26)" if dark else "rgb(251, 251, 249)"
        )
        assert page.run(CONTRAST) == []
    finally:
        page.resize(1400, 900)


def test_a_narrow_window_and_paper(page: Page) -> None:
    try:
        page.resize(400, 800)
        assert page.run("document.scrollingElement.scrollWidth") <= 400
        page.resize(800, 1000, media="print")
        assert page.run("getComputedStyle(byId('list')).display") == "none"
        assert page.run("getComputedStyle(document.querySelector('.tree')).maxHeight") == "none"
    finally:
        page.resize(1400, 900)


@pytest.mark.parametrize("command", ["score", "diagnose"])
def test_the_pages_of_other_commands_have_the_same_frame(
    browser: Page, tiny_pair: TinyPair, tmp_path: Path, command: str
) -> None:
    make_small_runs(tiny_pair, tmp_path)[command].run(tmp_path / "run")
    browser.problems.clear()
    browser.requests.clear()
    path = tmp_path / "run" / OWN_PAGES[command]
    browser.call("Page.navigate", url=path.as_uri())
    browser.wait("document.readyState === 'complete' && document.querySelector('main > #theme')")
    assert browser.run("document.querySelector('h1').getBoundingClientRect().width") > 0
    for colours, paper in (("light", "rgb(251, 251, 249)"), ("dark", "rgb(20, 22, 26)")):
        browser.run("document.querySelector('#theme').click()")
        assert browser.run("document.documentElement.dataset.theme") == colours
        assert browser.run("getComputedStyle(document.body).backgroundColor") == paper
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:image/png")] == [path.as_uri()]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("written", "genssd report --student DIR computes them"), ("nothing", "No prompt is finished yet.")],
)
def test_what_is_missing_is_said(browser: Page, pages: dict[str, Path], name: str, sentence: str) -> None:
    browser.problems.clear()
    browser.open(pages[name])
    assert sentence in browser.run("byId('summary').textContent")
    assert browser.problems == []
    if name == "written":
        browser.wait("document.querySelector('.tree')")
        assert browser.run("document.querySelectorAll('.box').length") == 2
        assert len(QUESTIONS) == browser.run("document.querySelectorAll('.entry').length")
