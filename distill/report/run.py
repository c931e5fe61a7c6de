"""`genssd report`: one page of one run or several: trees, texts, scores, curves and accuracy.

The page is one HTML file that fetches nothing. It holds a piece of compressed data for every prompt, which the browser
reads when the prompt is shown, so that a page of many prompts opens at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genssd.distill.pages.frame import GENERATOR, read_file, render_frame
from genssd.distill.report.config import ReportConfig
from genssd.distill.report.evaluations import list_differing, read_evaluation
from genssd.distill.report.found import FoundRun, find_runs
from genssd.distill.report.packing import pack
from genssd.distill.report.searches import Search, StudentReader
from genssd.distill.report.trainings import read_training
from genssd.distill.runs.effects import check_effects
from genssd.distill.runs.engines import load_engine
from genssd.distill.runs.journal import count_lines
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.writing import write_bytes
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.criterion import PoolCriterion
from genssd.engine.criteria.criterion_names import resolve

PACKAGE = "genssd.distill.report"
FOLDER = "page"
"""Folder of the page's own files."""
DATA_PLACE = "<!--data-->"
"""Mark in the page's frame where the data is written, piece by piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSummary:
    """What a page shows."""

    path: Path
    bytes: int
    searches: int
    prompts: int
    """Number of prompts that are shown with their trees and texts."""
    trainings: int
    evaluations: int
    faults: tuple[str, ...]
    """What could not be read, by file and line; the page lists it."""
    unfinished: tuple[str, ...]
    """Runs that are at work or were interrupted: the page shows what they have."""


def run_report(config: ReportConfig, report: Progress = SILENT) -> ReportSummary:
    """Write the page. Raises GenssdError on a directory without a run, and on a file that is not ours to replace."""
    check_effects(config)
    path = Path(config.output)
    _check_output(path)
    _check_criteria(config.criteria)
    runs = find_runs(config.run)
    builder = _Builder(config, runs, report)
    size = 0

    def count(pieces: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal size
        for piece in pieces:
            size += len(piece)
            yield piece

    write_bytes(path, count(builder.render()))
    return ReportSummary(
        path=path,
        bytes=size,
        searches=len(builder.searches),
        prompts=builder.shown,
        trainings=sum(run.command == "train" for run in runs),
        evaluations=sum(run.command == "evaluate" for run in runs),
        faults=tuple(builder.faults),
        unfinished=tuple(run.name for run in runs if not run.is_finished),
    )


def _check_criteria(names: Sequence[str]) -> None:
    """Raise InputError on a criterion that cannot be made, or that cannot judge a single round."""
    for name in names:
        criterion = resolve(name)
        if isinstance(criterion, PoolCriterion) and criterion.pool == "data":
            raise InputError(f"{name} is fitted over all of the data; a round has only its candidates")


def _check_output(path: Path) -> None:
    """Raise InputError where the page would replace something that is no page of ours."""
    if path.is_dir():
        raise InputError(f"output {path} is a directory; name a file, such as {path / 'report.html'}")
    if not path.exists():
        return
    try:
        with path.open("rb") as stream:
            head = stream.read(1024)
    except OSError as error:
        raise InputError(f"output {path} cannot be read: {error.strerror}") from None
    if f'name="generator" content="{GENERATOR}"'.encode() not in head:
        raise InputError(f"output {path} is no page of genssd; choose another name, or remove it")


class _Builder:
    """The page while it is written."""

    def __init__(self, config: ReportConfig, runs: Sequence[FoundRun], report: Progress) -> None:
        self._config = config
        self._runs = runs
        self._report = report
        self.faults: list[str] = []
        self.searches: list[Search] = []
        self.shown = 0
        """Number of prompts with trees."""

    def render(self) -> Iterator[bytes]:
        """Yield the page in pieces: one for every prompt, then the overview."""
        title = ", ".join(self._config.run)
        frame = render_frame(
            title=f"genssd: {title}",
            body=Markup(read_file(PACKAGE, FOLDER, "body.html")),
            style=read_file(PACKAGE, FOLDER, "page.css"),
            script=_read_scripts(),
            data=DATA_PLACE,
        )
        head, tail = frame.split(DATA_PLACE)
        yield head.encode()
        lists: list[list[Any]] = []
        student = self._load_student()
        for found in self._runs:
            if found.command in ("select", "generate"):
                search = Search.of(found, self._config.criteria, student, self.faults)
                number = len(self.searches)
                entries: list[Any] = []
                self.searches.append(search)
                lists.append(entries)
                yield from self._render_search(search, number, entries)
        for number, entries in enumerate(lists):
            yield pack(f"list-{number}", entries).encode()
        yield pack("overview", self._make_overview(title)).encode()
        yield tail.encode()

    def _render_search(self, search: Search, number: int, entries: list[Any]) -> Iterator[bytes]:
        """Yield the trees of a search, and add the lines of its list."""
        total = count_lines(search.journal)
        self._report.begin(f"reading {search.found.name}", unit="prompts", total=total)
        for count, shown in enumerate(search.read(number, self._config.prompts), start=1):
            if shown is not None:
                entry, piece = shown
                yield piece.encode()
                entries.append(entry)
                self.shown += 1
            self._report(count, total)

    def _make_overview(self, title: str) -> dict[str, Any]:
        trainings = [read_training(run, self.faults) for run in self._runs if run.command == "train"]
        evaluations = [read_evaluation(run, self.faults) for run in self._runs if run.command == "evaluate"]
        differing, num_differing = list_differing(evaluations) if len(evaluations) > 1 else ([], 0)
        overview = {
            "title": title,
            "searches": [search.as_json() for search in self.searches],
            "trainings": trainings,
            "evaluations": [evaluation.as_json(evaluations[0]) for evaluation in evaluations],
            "differing": differing,
            "num_differing": num_differing,
            "faults": self.faults,
        }
        return json.loads(json.dumps(overview))  # type: ignore[no-any-return]

    def _load_student(self) -> StudentReader | None:
        name = self._config.student
        if name is None:
            return None
        engine = load_engine(self._config, student=name, report=self._report)
        return StudentReader(
            fingerprint=engine.fingerprints["student"],
            tokenizer=engine.tokenizer("student").fingerprint,
            local_logprob=engine.local_logprob,
            activations=engine.mean_activations,
            score=lambda prompt, responses: engine.score([list(prompt)] * len(responses), responses),
        )


def _read_scripts() -> str:
    """Return the page's scripts, in the order of their names, as one."""
    folder = files(PACKAGE).joinpath(FOLDER)
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".js"))
    return "\n".join(read_file(PACKAGE, FOLDER, name) for name in names)
