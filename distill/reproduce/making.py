"""Makes the training rows of an arm with the project's own functions, and counts the tokens that they took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.run import run_diagnose
from genssd.distill.diagnose.weighted_rows import WEIGHTED_ROWS_FILE
from genssd.distill.reproduce.arms import Arm
from genssd.distill.reproduce.config import Sizes
from genssd.distill.reproduce.pools import Pool, open_pool_of, pick_rows
from genssd.distill.reproduce.sources import (
    Distracted,
    Picked,
    Prefixed,
    Probed,
    Refreshed,
    Refused,
    Searched,
    Single,
)
from genssd.distill.reproduce.worlds import Pair, ProblemFiles, Task
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.rounds.run import run_distill
from genssd.distill.runs.journal import read_number
from genssd.distill.runs.progress import Progress
from genssd.distill.score.leaf import run_leaf
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.score.prefix import run_prefix
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.select.config import Calibrate, SelectConfig, SelectSettings
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.config import TrainSettings
from genssd.engine.models.sampling import Sampling

PROBED = 12
"""Maximum number of problems that a diagnosis looks at: every node takes many completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Training rows of an arm, and what they cost."""

    path: Path
    """File of rows that `genssd train` reads."""
    teacher_tokens: int
    """Number of tokens that the teacher sampled for them, dropped ones included."""
    student_tokens: int = 0
    """Number of tokens that the student sampled for them."""
    student: Path | None = None
    """Student that is trained already; None: it is trained on the rows."""
    train_tokens: int = 0
    """Number of completion tokens that such a student was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What all arms of one world and one seed have in common."""

    task: Task
    sizes: Sizes
    candidates: int
    pair: Pair
    files: ProblemFiles
    directory: Path
    """Directory of the world in the seed; each arm has one of its own in it."""
    seed: int
    threads: int | None
    report: Progress
    criteria: tuple[str, ...]
    """Criteria of all arms that pick from the teacher's pool, which is scored once."""

    @property
    def models(self) -> dict[str, Any]:
        """Names of the two models, as configs have them."""
        return {"teacher": str(self.pair.teacher), "student": str(self.pair.student)}

    @property
    def engine(self) -> dict[str, Any]:
        """Fields of configs that say how an engine computes."""
        return {"dtype": self.task.dtype, "threads": self.threads, "memory_bytes": self.task.memory_bytes}

    def make_train_settings(self, arm: Arm, tokens: float) -> dict[str, Any]:
        """Return the fields of a training: those of all arms, and those in which the arm differs.

        tokens: number of training tokens, as a multiple of those of most arms.
        """
        settings: dict[str, Any] = {
            "per_device_train_batch_size": self.sizes.batch_size,
            "learning_rate": self.sizes.learning_rate,
            "max_train_tokens": max(1, round(self.sizes.train_tokens * tokens)),
            "warmup_steps": 0.05,
            "adam_beta2": 0.98,
            "seed": self.seed,
            "threads": self.threads,
            **arm.train,
        }
        if arm.train.get("kd_ratio") or "key_attention" in arm.train:
            settings["teacher_model_name_or_path"] = str(self.pair.teacher)
        return settings


def make_rows(arm: Arm, place: Place) -> Rows:
    """Return the training rows of an arm. What an interrupted call has finished is not done again."""
    source, directory = arm.source, place.directory / Path(arm.name).name
    match source:
        case Single():
            limit = place.sizes.problems * (place.candidates if source.several else 1)
            return _generate(place, directory / "rows", {"limit": limit}, teacher=place.models["teacher"])
        case Refused():
            options = {"method": "rsd", "sampling": Sampling(temperature=0.7, top_k=20, top_p=0.95)}
            return _generate(place, directory / "rows", {"limit": place.sizes.problems, **options})
        case Picked():
            pool = _open_pool(place, source.writer, source.responses or place.candidates)
            path = pick_rows(pool, source.criterion, source.pick, directory / "rows.jsonl")
            of_teacher = source.writer == "teacher"
            return Rows(
                path=path,
                teacher_tokens=pool.tokens if of_teacher else 0,
                student_tokens=0 if of_teacher else pool.tokens,
            )
        case Searched():
            return _search(place, source, directory / "rows")
        case Refreshed():
            return _refresh(place, arm, source.rounds, directory / "rounds")
        case Prefixed():
            return _shorten(place, directory)
        case Distracted():
            first = _generate(place, directory / "rows", {"limit": place.sizes.problems})
            leaf = LeafConfig(
                **place.models, data=(str(first.path),), output_dir=str(directory / "leaf"), resume=True,
                threads=place.threads,
            )  # fmt: skip
            run_leaf(leaf, place.report.within(arm.name))
            return Rows(path=directory / "leaf" / "counterfactuals.jsonl", teacher_tokens=first.teacher_tokens)
        case Probed():
            return _probe(place, source, directory / f"nodes-{source.rule}")
    raise AssertionError(f"{arm.name} trains nothing")


def _generate(place: Place, directory: Path, options: Mapping[str, Any], teacher: str | None = None) -> Rows:
    config = GenerateConfig(
        **{**place.models, "sampling": place.task.sampling, **options},
        data=str(place.files.train), output_dir=str(directory), max_tokens=place.task.max_tokens,
        seed=place.seed, resume=True, **place.engine,
    )  # fmt: skip
    summary = run_generate(config, report=place.report.within(directory.parent.name))
    return Rows(
        path=summary.path,
        teacher_tokens=summary.tokens_sampled - summary.substituted,
        student_tokens=summary.substituted,
    )


def _open_pool(place: Place, writer: Literal["teacher", "student"], responses: int) -> Pool:
    """Return the pool of responses of a writer, which is made for the first arm that asks for it."""
    config = GenerateConfig(
        teacher=place.models[writer], student=place.models["student"], data=str(place.files.train),
        limit=place.sizes.problems, n=responses, sampling=place.task.sampling, max_tokens=place.task.max_tokens,
        output_dir=str(place.directory / f"pool-{writer}-{responses}" / "rows"), seed=place.seed, resume=True,
        **place.engine,
    )  # fmt: skip
    criteria = place.criteria if writer == "teacher" else ("random",)
    return open_pool_of(config, place.models["student"], criteria, place.report)


def _make_search(place: Place, source: Searched) -> dict[str, Any]:
    """Return the fields of a search."""
    return {
        "criterion": source.criterion,
        "candidates": max(1, round(place.candidates * source.factor)),
        "chunk": place.task.chunks[source.chunk],
        "sampling": place.task.sampling,
        "max_tokens": place.task.max_tokens,
        "seed": place.seed,
        **place.engine,
        **source.options,
    }


def _search(place: Place, source: Searched, directory: Path) -> Rows:
    calibrate = Calibrate()
    if source.share is not None:
        calibrate = Calibrate(data=str(place.files.calibration), share=source.share)
    config = SelectConfig(
        **place.models, **_make_search(place, source), calibrate=calibrate, data=str(place.files.train),
        limit=place.sizes.problems, output_dir=str(directory), resume=True,
    )  # fmt: skip
    summary = run_select(config, report=place.report.within(directory.parent.name))
    return Rows(path=summary.path, teacher_tokens=summary.tokens_sampled)


def _refresh(place: Place, arm: Arm, rounds: int, directory: Path) -> Rows:
    """Return the student of several rounds, each with its part of a seed's problems and of the training tokens."""
    training = place.make_train_settings(arm, arm.tokens / rounds)
    config = DistillConfig(
        **place.models, data=str(place.files.train), output_dir=str(directory), rounds=rounds,
        prompts_per_round=max(1, place.sizes.problems // rounds), require_correct=False,
        select=SelectSettings(**_make_search(place, Searched())), train=TrainSettings(**training), resume=True,
    )  # fmt: skip
    last = [summary.student for summary in run_distill(config, place.report.within(arm.name))][-1]
    each = [directory / f"round-{number}" for number in range(1, rounds + 1)]
    return Rows(
        path=each[-1] / "kept.jsonl",
        teacher_tokens=round(sum(read_number(one / "select" / "summary.json", "tokens_sampled") for one in each)),
        student=Path(last),
        train_tokens=round(sum(read_number(one / "train" / "summary.json", "tokens") for one in each)),
    )


def _shorten(place: Place, directory: Path) -> Rows:
    first = _generate(place, directory / "rows", {"limit": place.sizes.problems})
    config = PrefixConfig(
        student=place.models["student"], data=(str(first.path),), output_dir=str(directory / "prefix"),
        judge="solves", max_tokens=place.task.max_tokens, seed=place.seed, resume=True, **place.engine,
    )  # fmt: skip
    run_prefix(config, report=place.report.within(directory.name))
    return Rows(path=directory / "prefix" / "aligned.jsonl", teacher_tokens=first.teacher_tokens)


def _probe(place: Place, source: Probed, directory: Path) -> Rows:
    config = DiagnoseConfig(
        student=place.models["student"], teacher=(place.models["teacher"],), data=str(place.files.train),
        limit=min(PROBED, place.sizes.problems), output_dir=str(place.directory / "diagnosis"), resume=True,
        rollouts=2, completions=8, budget=256, top_k=3, teacher_top_k=1, losses=("reverse_kl",),
        node_weights=source.rule, max_tokens=place.task.max_tokens, seed=place.seed, **place.engine,
    )  # fmt: skip
    costs = run_diagnose(config, report=place.report.within(directory.parent.name)).diagnosis.costs
    path = place.directory / "diagnosis" / WEIGHTED_ROWS_FILE
    return Rows(path=path, teacher_tokens=0, student_tokens=costs.sampled_tokens)
