"""Calls of criteria, whose code may be a user's own: what it raises or returns wrongly becomes one line that names it.

The exception of the user's code is the cause of ours, so that Python shows both. Errors of genssd that it lets through
stay what they are: a criterion that finds no room in the cache is asked again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import GenssdError, InputError
from genssd.engine.common.quoting import quote
from genssd.engine.criteria.criterion import AnyCriterion, Criterion, PoolCriterion, RatioCriterion
from genssd.engine.criteria.imported_criteria import describe_failure

if TYPE_CHECKING:
    from genssd.engine.criteria.candidate import Candidate

OWN_PACKAGE = "genssd."
"""Beginning of the names of our own modules, whose exceptions are mistakes of ours."""
OUT_OF_MEMORY = "OutOfMemoryError"
"""Name of torch's exception where a device has no memory left; this file does not import torch."""


def call_score(criterion: Criterion, candidate: Candidate) -> float:
    """Return a candidate's value, which may be NaN. Raises InputError where the criterion raises or gives no number."""
    with _naming(criterion, "score"):
        value = criterion.score(candidate)
    return _read_number(value, criterion, "score")


def call_features(criterion: PoolCriterion, candidate: Candidate) -> tuple[float, ...]:
    """Return a candidate's numbers. Raises InputError where the criterion raises or gives others than it declares."""
    with _naming(criterion, "features"):
        values = criterion.features(candidate)
        count = criterion.num_features
    return _read_numbers(values, criterion, "features", count)


def call_score_pool(criterion: PoolCriterion, features: Sequence[tuple[float, ...]]) -> list[float]:
    """Return the values of a pool. Raises InputError where the criterion raises or gives no number for each."""
    with _naming(criterion, "score_pool"):
        values = criterion.score_pool(features)
    return list(_read_numbers(values, criterion, "score_pool", len(features)))


def call_ratio(criterion: RatioCriterion, candidate: Candidate) -> tuple[float, float]:
    """Return what a response adds to a ratio. Raises InputError where the criterion raises or gives no two numbers."""
    with _naming(criterion, "ratio"):
        values = criterion.ratio(candidate)
    numerator, denominator = _read_numbers(values, criterion, "ratio", 2)
    return numerator, denominator


def is_higher_better(criterion: AnyCriterion) -> bool:
    """Return whether a larger value suits the student better. Raises InputError where the criterion does not say."""
    with _naming(criterion, "higher_is_better"):
        answer: object = criterion.higher_is_better()
    if not isinstance(answer, bool):
        raise _make_value_error(criterion, "higher_is_better", answer, "True or False")
    return answer


def evaluate(criterion: AnyCriterion, candidates: Sequence[Candidate]) -> list[float]:
    """Return the values of candidates that compete with each other."""
    if isinstance(criterion, PoolCriterion):
        return call_score_pool(criterion, [call_features(criterion, candidate) for candidate in candidates])
    return [call_score(criterion, candidate) for candidate in candidates]


def evaluate_distinct(criterion: AnyCriterion, candidates: Sequence[Candidate]) -> list[float]:
    """Return the values of the candidates of one prompt's round; in a pool, equal candidates count once.

    A candidate without a token, as a stop string may leave it, is not evaluated: its value is the worst one.
    """
    written = [candidate for candidate in candidates if candidate.token_ids]
    if len(written) < len(candidates):
        values = iter(evaluate_distinct(criterion, written) if written else ())
        worst = -math.inf if is_higher_better(criterion) else math.inf
        return [next(values) if candidate.token_ids else worst for candidate in candidates]
    if not isinstance(criterion, PoolCriterion):
        return evaluate(criterion, candidates)
    keys = [_make_key(candidate) for candidate in candidates]
    distinct = dict(zip(reversed(keys), reversed(candidates), strict=True))
    value_of = dict(zip(distinct, evaluate(criterion, list(distinct.values())), strict=True))
    return [value_of[key] for key in keys]


def _make_key(candidate: Candidate) -> tuple[object, ...]:
    """Return what makes a candidate another one than its competitors of the same prompt.

    Where the student reads by bytes, it may read different tokens of the teacher as the same ones of its own.
    """
    written = [candidate.history_teacher_logprob, candidate.teacher_logprob]
    return (
        candidate.history_ids,
        candidate.token_ids,
        candidate.spans,
        *(None if logprob is None else tuple(logprob.tolist()) for logprob in written),
    )


@contextmanager
def _naming(criterion: object, method: str) -> Iterator[None]:
    """Turn what a user's criterion raises into InputError that names the criterion and the place."""
    try:
        yield
    except (GenssdError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if type(criterion).__module__.startswith(OWN_PACKAGE) or type(error).__name__ == OUT_OF_MEMORY:
            raise
        where = describe_failure(error, _find_file(criterion))
        raise InputError(f"the criterion {_name(criterion)} failed in {method}(): {where}") from error


def _name(criterion: object) -> str:
    return f"{type(criterion).__module__}:{type(criterion).__qualname__}"


def _find_file(criterion: object) -> str | None:
    """Return the file of a criterion's class; None where it is in none."""
    try:
        return inspect.getfile(type(criterion))
    except (TypeError, OSError):
        return None


def _read_numbers(values: Any, criterion: object, method: str, count: int) -> tuple[float, ...]:
    """Return the numbers that a criterion gave. Raises InputError unless there are so many."""
    expected = f"a list of {format_count(count, 'number')}"
    try:
        parts = None if isinstance(values, str | bytes) else list(values)
    except TypeError:
        parts = None
    if parts is None or len(parts) != count:
        raise _make_value_error(criterion, method, values, expected)
    return tuple(_read_number(part, criterion, method) for part in parts)


def _read_number(value: Any, criterion: object, method: str) -> float:
    """Return a number of Python, numpy or a tensor of one element as float."""
    number: Callable[[], Any] | None = getattr(value, "item", None)
    try:
        plain = value if number is None else number()
    except (ValueError, RuntimeError):  # a tensor or an array of several elements
        plain = None
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise _make_value_error(criterion, method, value, "a number")
    try:
        return float(plain)
    except OverflowError:
        return math.inf if plain > 0 else -math.inf


def _make_value_error(criterion: object, method: str, value: Any, expected: str) -> InputError:
    shape = getattr(value, "shape", None)
    shown = quote(value) if shape is None else f"a {type(value).__name__} of the shape {list(shape)}"
    return InputError(f"the criterion {_name(criterion)} must return {expected} from {method}(), not {shown}")
