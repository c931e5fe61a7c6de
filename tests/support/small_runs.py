"""A small run of every command that writes to an output directory, over the random pair of the fixture `tiny_pair`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import TinyPair

from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.run import run_diagnose
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.reproduce import run as reproduce_run
from genssd.distill.reproduce import small as small_task
from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.rounds.run import run_distill
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.leaf import run_leaf
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.score.prefix import run_prefix
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.score.run import run_score
from genssd.distill.select.config import SelectConfig, SelectSettings
from genssd.distill.select.export import run_export
from genssd.distill.select.export_config import ExportConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.checkpoints import list_checkpoints
from genssd.distill.train.config import TrainConfig, TrainSettings
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk

PROMPTS = 3
VARYING = {"seconds", "tokens_per_second", "checksum"}
"""Keys of results that differ from run to run: times, and the checksums of lines that hold them."""
JOURNALS = {
    "select": "selections.jsonl",
    "generate": "responses.jsonl",
    "score": "features.jsonl",
    "prefix": "prefixes.jsonl",
    "leaf": "journal.jsonl",
    "evaluate": "evaluation.jsonl",
    "diagnose": "questions.jsonl",
    "distill": "rounds.jsonl",
    "reproduce": "results.jsonl",
}
UNORDERED = ("selections.jsonl", "decisions.jsonl", "responses.jsonl", *JOURNALS.values())
"""Files whose lines are in the order in which work was finished."""


@dataclass(frozen=True, slots=True)
class SmallRun:
    """One command with its options."""

    command: str
    config: Any
    start: Callable[[Any], object]

    @property
    def can_resume(self) -> bool:
        return self.command in ("train", "reselect") or hasattr(self.config, "resume")

    def run(self, output_dir: Path, *, resume: bool = False) -> None:
        """Run the command in a directory, or go on there."""
        changes: dict[str, Any] = {"output_dir": str(output_dir)}
        if resume and self.command == "train":
            changes["resume_from_checkpoint"] = "last" if list_checkpoints(output_dir) else None
        elif resume and hasattr(self.config, "resume"):
            changes["resume"] = True
        self.start(dataclasses.replace(self.config, **changes))


def make_small_runs(pair: TinyPair, directory: Path) -> dict[str, SmallRun]:
    """Return a small run of every command by its name; the files that they read are written to the directory."""
    problems = [{"question": f"{i}+{i}?", "answer": str(2 * i), "hint": "add"} for i in range(PROMPTS)]
    traces = [{"question": f"{i}+{i}?", "answer": str(2 * i), "response": f"It is\n{2 * i}"} for i in range(PROMPTS)]
    data, rows = _write(directory / "problems.jsonl", problems), _write(directory / "traces.jsonl", traces)
    models = {"teacher": str(pair.teacher), "student": str(pair.student)}
    small = {"memory_bytes": 1 << 22}
    search = {"candidates": 2, "chunk": Chunk(tokens=3, until=None), "max_tokens": 4, **small}
    training = {"per_device_train_batch_size": 2, "save_steps": 1, "save_total_limit": 1, "logging_steps": 1}
    engine = pair.engine
    select = SelectConfig(**models, data=data, teacher_topk=2, teacher_states="bfloat16", **search)
    run_select(dataclasses.replace(select, output_dir=str(directory / "selection")), engine)
    configs: list[tuple[str, Any, Callable[[Any], object]]] = [
        ("select", select, lambda c: run_select(c, engine)),
        (
            "generate",
            GenerateConfig(**models, data=data, max_tokens=4, teacher_states="float32", **small),
            lambda c: run_generate(c, engine),
        ),
        ("score", ScoreConfig(student=models["student"], data=(rows,), **small), lambda c: run_score(c, engine)),
        ("reselect", ReselectConfig(run=str(directory / "selection"), **small), run_reselect),
        (
            "export",
            ExportConfig(run=str(directory / "selection"), statuses=("finished", "length")),
            run_export,
        ),
        (
            "prefix",
            PrefixConfig(student=models["student"], data=(rows,), judge="solves", batch=1, max_tokens=4, **small),
            lambda c: run_prefix(c, engine),
        ),
        ("leaf", LeafConfig(**models, data=(rows,)), run_leaf),
        (
            "train",
            TrainConfig(
                model_name_or_path=models["student"], data=(rows,), eval_data=(rows,), eval_steps=1,
                allow_eval_overlap=True, **training,
            ),
            run_train,
        ),
        ("evaluate", EvaluateConfig(model=models["student"], data=data, max_tokens=4, **small), _Evaluation(pair)),
        (
            "diagnose",
            DiagnoseConfig(
                student=models["student"], contexts=("hint",), data=data, max_tokens=3, rollouts=1, completions=2,
                budget=6, top_k=2, **small,
            ),
            lambda c: run_diagnose(c, lambda model, role: engine),
        ),
        (
            "distill",
            DistillConfig(
                **models, data=data, rounds=1, require_correct=False, eval_data=data, allow_eval_overlap=True,
                select=SelectSettings(**search), train=TrainSettings(statuses=("finished", "length"), **training),
            ),
            lambda c: list(run_distill(c)),
        ),
        (
            "reproduce",
            ReproduceConfig(
                task="small", arms=("cold-start",), seeds=1, problems=2, eval_problems=2, candidates=2, train_tokens=20,
                batch_size=2, threads=1,
            ),
            _reproduce,
        ),
    ]  # fmt: skip
    return {command: SmallRun(command, config, start) for command, config, start in configs}


@dataclass(frozen=True, slots=True)
class _Evaluation:
    pair: TinyPair

    def __call__(self, config: EvaluateConfig) -> object:
        return run_evaluate(config, self.pair.engine)


def _reproduce(config: ReproduceConfig) -> None:
    """Compare an arm with its control, without plots, over few problems; raise the error of an arm that failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce_run, "draw_plot", lambda results: b"image")
        patch.setattr(small_task, "exclude_pools", frozenset)
        patch.setattr(small_task, "CALIBRATION", 2)
        failures = reproduce_run.run_reproduce(config).failures
    if failures:
        raise InputError(failures[0])


def _write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_results(output_dir: Path) -> dict[str, Any]:
    """Return what a run has written, by file, without what differs from run to run: times, places, how it was run.

    A model card (README.md) has all of these.
    """
    results: dict[str, Any] = {}
    for path in sorted(output_dir.rglob("*")):
        name = str(path.relative_to(output_dir))
        if not path.is_file() or path.name in (".lock", "run.json", "README.md") or _are_speeds(path):
            continue
        content = path.read_bytes().replace(str(output_dir).encode(), b"OUTPUT")
        if path.suffix == ".jsonl":
            lines = [_strip(json.loads(line)) for line in content.splitlines()]
            results[name] = sorted(lines, key=json.dumps) if path.name in UNORDERED else lines
        elif path.name == "summary.json":
            results[name] = _strip(json.loads(content))
        elif name == "results.json":
            comparison = json.loads(content)
            results[name] = {**comparison, "arms": [_strip(arm) for arm in comparison["arms"]]}
        elif path.name == "trainer_state.json":
            results[name] = json.loads(content)
        else:
            results[name] = content
    return results


def _are_speeds(path: Path) -> bool:
    """Return whether a file holds the metrics of a command that writes responses: how fast it was, part by part."""
    record = path.parent / "run.json"
    return path.name == "metrics.jsonl" and json.loads(record.read_text())["command"] in ("select", "generate")


def _strip(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in VARYING and key != "config"}
