"""A threshold from data: the criterion value that a given fraction of the teacher's plain chunks reaches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from genssd.distill.data.problems import ProblemRow, ProblemSet
from genssd.distill.pool.pool import Lost, Pool, Stopped
from genssd.distill.runs.journal import read_json
from genssd.distill.select.config import SelectSettings
from genssd.distill.select.unfit import leave_out_unfit
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.criterion import AnyCriterion, PoolCriterion
from genssd.engine.criteria.criterion_calls import is_higher_better
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget
from genssd.engine.search.search_options import SearchOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold, and the sampled chunks that it comes from."""

    criterion: str
    fraction: float
    """Fraction of the chunks whose value is no worse than the threshold."""
    threshold: float
    prompts: int
    chunks: int
    thresholds: dict[str, float | None]
    """Threshold for each of some other fractions; None where it is infinite."""
    bad_rows: tuple[str, ...]
    """Messages that name the rows that could not be used, and why."""

    def as_json(self) -> dict[str, object]:
        """Return the content of calibration.json."""
        return {
            "criterion": self.criterion,
            "share": self.fraction,
            "threshold": self.threshold,
            "prompts": self.prompts,
            "chunks": self.chunks,
            "shares": self.thresholds,
            "bad_rows": list(self.bad_rows),
        }

    @staticmethod
    def read(path: Path) -> Calibration:
        """Return the calibration in a file that `as_json` made. Raises InputError naming a file that holds none."""
        fields = read_json(path)
        try:
            return Calibration(
                criterion=str(fields["criterion"]),
                fraction=float(fields["share"]),
                threshold=float(fields["threshold"]),
                prompts=int(fields["prompts"]),
                chunks=int(fields["chunks"]),
                thresholds=dict(fields["shares"]),
                bad_rows=tuple(fields["bad_rows"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no calibration of this version of genssd: {error!r}") from None

    def __str__(self) -> str:
        return (
            f"{self.threshold:.6g}, which {self.fraction:.0%} of the teacher's "
            f"{format_count(self.chunks, 'plain chunk')} of "
            f"{format_count(self.prompts, 'prompt')} reach"
        )


def check_calibration(settings: SelectSettings) -> None:
    """Raise InputError on a criterion that has no threshold, where one is to be computed."""
    if settings.calibrate.data is not None:
        _check_criterion(settings.criterion)


def _check_criterion(criterion: str | AnyCriterion) -> None:
    if isinstance(resolve(criterion), PoolCriterion):
        raise InputError(
            f"{criterion} judges candidates against each other: its values have no threshold that holds for all prompts"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationWork:
    """Plain samples of the first teacher, one for every problem; a `Work`, whose items are places of problems."""

    problems: Sequence[ProblemRow]
    options: SearchOptions

    @property
    def items(self) -> Sequence[int]:
        """All problems."""
        return range(len(self.problems))

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens of one response."""
        return self.options.max_tokens

    def run(
        self, engine: Engine, feed: Feed | None, budget: Budget
    ) -> Iterator[tuple[int, list[float] | str | Stopped]]:
        """Yield the criterion's values of every response's chunks, or why the prompt failed; see `Work`."""
        selections = engine.teachers[0].iter_select_expand(
            [problem.prompt for problem in self.problems],
            self.options,
            candidates=1,
            beam=1,
            threshold=None,
            on_unlearnable="stop",
            drop_teacher_after=None,
            selection_temperature=0.0,
            prompt_budget=Budget(),
            total_budget=budget,
            teacher_topk=0,
            loop_guard=False,
            answers=[problem.answer for problem in self.problems],
            labels=[problem.where for problem in self.problems],
            feed=feed,
        )
        for selection in selections:
            yield selection.index, selection.error or [record.score for record in selection.tree]


def calibrate(pool: Pool, data: ProblemSet, options: SearchOptions, *, fraction: float) -> Calibration:
    """Sample one plain response per prompt and return the threshold that `fraction` of its chunks reach.

    Of several teachers the first one writes them.

    The prompts should be others than those of the run, to which the threshold would be fitted too well. Rows that
    cannot be used are left out, and named in the result. Raises InputError when none can be used.
    """
    criterion = options.criterion
    _check_criterion(criterion)
    models = pool.models.teachers[0]
    usable = leave_out_unfit(data, models, ("teacher", "student"), resolve(criterion), str(criterion)).data
    values: list[float] = []
    failures: dict[int, str] = {}
    for place, outcome in pool.run(CalibrationWork(problems=usable.problems, options=options)):
        assert not isinstance(outcome, Stopped), "nothing limits the calibration"
        if isinstance(outcome, list):
            values += outcome
        else:
            problem = usable.problems[place]
            error = outcome.reason if isinstance(outcome, Lost) else outcome
            failures[problem.index] = f"{problem.where}: {error}"
    if not values:
        listed = "".join(f"\n  {message}" for message in usable.list_bad_rows(failures)[:10])
        count = format_count(len(usable.problems), "prompt")
        raise InputError(f"calibration: {count}, none of which can be run:{listed}")
    values.sort(reverse=is_higher_better(resolve(criterion)))
    threshold = worst_of_best(values, fraction)
    if not math.isfinite(threshold):
        raise InputError(f"calibration: {criterion} is infinite at the share {fraction}; lower calibrate.share")
    others = {f"{other:g}": worst_of_best(values, other) for other in (0.5, 0.75, 0.9, 0.95, 0.99)}
    return Calibration(
        criterion=str(criterion),
        fraction=fraction,
        threshold=threshold,
        prompts=len(usable.problems) - len(failures),
        chunks=len(values),
        thresholds={other: value if math.isfinite(value) else None for other, value in others.items()},
        bad_rows=usable.list_bad_rows(failures),
    )


def worst_of_best(values: Sequence[float], fraction: float) -> float:
    """Return the worst value among the best `fraction` of the values, which are sorted best first."""
    return values[min(len(values), max(1, math.ceil(fraction * len(values) - 1e-9))) - 1]
