"""Criteria by name: registered, with options, combined, or imported from a user's own module."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genssd.engine.candidate import (
    AnyCriterion,
    Candidate,
    Criterion,
    PoolCriterion,
    needs_answer,
    needs_teacher,
    needs_verdict,
    not_in_search,
)
from genssd.engine.criteria.by_step import AslecCasl, AslecDrop, LocalNaturalness
from genssd.engine.criteria.controls import Length, Random
from genssd.engine.criteria.grounding import GroundedActions, TargetedObservationRatio
from genssd.engine.criteria.learning_cost import LearningCost
from genssd.engine.criteria.learning_gain import Lark
from genssd.engine.criteria.likelihood import Perplexity, RankSurprisal, RsdAccept, SurprisalBand
from genssd.engine.criteria.progress import AnswerProgress
from genssd.engine.criteria.reference_answer import RationaleDifficulty
from genssd.engine.criteria.teacher import TeacherLogprob, TeacherStudentGap
from genssd.engine.criteria.verdict import CorrectThenAligned
from genssd.engine.criterion_calls import call_features, call_score, call_score_pool, is_higher_better
from genssd.engine.errors import InputError
from genssd.engine.imported_criteria import describe_failure, import_object
from genssd.engine.options_check import check_value

_MAKERS: dict[str, Callable[..., AnyCriterion]] = {
    "ppl": Perplexity,
    "lalp": LocalNaturalness,
    "rsr": RankSurprisal,
    "aslec_drop": AslecDrop,
    "aslec_casl": AslecCasl,
    "lark": Lark,
    "divergence": TeacherStudentGap,
    "rsd_accept": RsdAccept,
    "rationale_difficulty": RationaleDifficulty,
    "scas": LearningCost,
    "progress": AnswerProgress,
    "brts": CorrectThenAligned,
    "tor": TargetedObservationRatio,
    "egs": GroundedActions,
    "surprisal_band": SurprisalBand,
    "length": Length,
    "teacher_logprob": TeacherLogprob,
    "random": Random,
}


def register_criterion(name: str, maker: Callable[..., AnyCriterion]) -> None:
    """Make a criterion available by name. Raises InputError when the name is taken or no identifier."""
    if not check_value("name", name, str).isidentifier():
        raise InputError(f"{name!r} cannot name a criterion: take letters, digits and underscores")
    check_value("maker", maker, Callable[..., Any])
    if name in _MAKERS:
        raise InputError(f"a criterion named {name!r} is already registered")
    _MAKERS[name] = maker


def registered_criteria() -> list[str]:
    """Return the names of all registered criteria, sorted."""
    return sorted(_MAKERS)


def resolve(criterion: str | AnyCriterion) -> AnyCriterion:
    """Return the criterion of a name, or the object itself.

    A name is a registered one ("rsr"), one with options ("ppl(scope='trajectory', norm='byte')"), an import path
    ("package.module:Name", with or without options), or a weighted sum of these ("0.7*rsr + 0.3*lalp"), which adds the
    candidates' ranks under each. Raises InputError on anything else, naming the part that is wrong.
    """
    if not isinstance(criterion, str):
        if isinstance(criterion, type) or not isinstance(criterion, Criterion | PoolCriterion):
            raise InputError(
                f"{criterion!r} is no criterion: it needs score(candidate) and higher_is_better(), or the methods of a "
                "PoolCriterion"
            )
        return criterion
    terms = [_term(term.strip(), criterion) for term in _split(criterion, "+")]
    if len(terms) == 1 and terms[0][0] is None:
        return terms[0][1]
    return WeightedRank(parts=tuple((1.0 if weight is None else weight, part) for weight, part in terms))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedRank:
    """Weighted sum of the candidates' ranks under several criteria; lower is better.

    0 is the rank of a prompt's best candidate; equal candidates have the mean of their ranks.
    """

    parts: tuple[tuple[float, AnyCriterion], ...]
    """Weight and criterion of each summand."""

    def __post_init__(self) -> None:
        if any(isinstance(part, PoolCriterion) and part.pool == "data" for _, part in self.parts):
            raise InputError("a criterion that is fitted over all of the data cannot be ranked within a prompt")

    @property
    def pool(self) -> Literal["prompt", "data"]:
        return "prompt"

    @property
    def needs_answer(self) -> bool:
        """Whether the prompts need reference answers."""
        return any(needs_answer(part) for _, part in self.parts)

    @property
    def needs_teacher(self) -> bool:
        """Whether the criterion reads the log-probabilities of the writing model."""
        return any(needs_teacher(part) for _, part in self.parts)

    @property
    def needs_verdict(self) -> bool:
        """Whether the criterion reads whether a response is correct."""
        return any(needs_verdict(part) for _, part in self.parts)

    @property
    def not_in_search(self) -> str | None:
        """Why the search cannot use the criterion; None where it can."""
        return next(filter(None, (not_in_search(part) for _, part in self.parts)), None)

    @property
    def num_features(self) -> int:
        return sum(_width(part) for _, part in self.parts)

    def features(self, candidate: Candidate) -> tuple[float, ...]:
        values: list[float] = []
        for _, part in self.parts:
            values += (
                call_features(part, candidate) if isinstance(part, PoolCriterion) else (call_score(part, candidate),)
            )
        return tuple(values)

    def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
        totals = [0.0] * len(features)
        unread = list(features)
        for weight, part in self.parts:
            columns, unread = [row[: _width(part)] for row in unread], [row[_width(part) :] for row in unread]
            values = call_score_pool(part, columns) if isinstance(part, PoolCriterion) else [row[0] for row in columns]
            sign = -1.0 if is_higher_better(part) else 1.0
            for i, rank in enumerate(_mean_ranks([sign * value for value in values])):
                totals[i] += weight * rank if values[i] == values[i] else math.nan  # NaN is the caller's to report
        return totals

    def higher_is_better(self) -> bool:
        return False


def _width(part: AnyCriterion) -> int:
    return part.num_features if isinstance(part, PoolCriterion) else 1


def _mean_ranks(keys: Sequence[float]) -> list[float]:
    """Return the rank of each key, 0 for the smallest; equal keys have the mean of their ranks."""
    return [sum(k < key for k in keys) + (sum(k == key for k in keys) - 1) / 2 for key in keys]


def _split(text: str, separator: str) -> list[str]:
    """Split a text at the separators outside of parentheses and quotes."""
    parts, depth, quote, current = [], 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(current)
            current = ""
            continue
        current += character
    return [*parts, current]


def _term(term: str, full_name: str) -> tuple[float | None, AnyCriterion]:
    """Return weight and criterion of one summand; the weight of a criterion without one is None."""
    weight, star, name = term.partition("*")
    if star and "(" not in weight:
        try:
            factor = float(weight)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise InputError(f"criterion {full_name!r}: {weight.strip()!r} is no weight")
        return factor, _named(name.strip(), full_name)
    return None, _named(term, full_name)


def _named(text: str, full_name: str) -> AnyCriterion:
    """Return the criterion of a name with or without options. full_name: what the user wrote, for messages."""
    name, bracket, _ = text.partition("(")
    options = _options(text, full_name) if bracket else {}
    try:
        return _made(name, options)
    except InputError as error:
        raise InputError(f"criterion {full_name!r}: {error}") from error.__cause__


def _made(name: str, options: dict[str, Any]) -> AnyCriterion:
    """Return the criterion of a name or import path, made with options. Raises InputError without the full name."""
    maker: Any = import_object(name) if ":" in name else _MAKERS.get(name)
    if maker is None:
        raise InputError(f"unknown criterion {name!r}; registered: {', '.join(registered_criteria())}")
    if not callable(maker):
        if options:
            raise InputError(f"{name} is an object already and takes no options")
        return resolve(maker)
    _check_option_names(name, maker, options)
    try:
        made = maker(**options)
    except InputError:
        raise
    except Exception as error:  # the constructor of a user's own class
        raise InputError(describe_failure(error)) from error
    return resolve(made)


def _check_option_names(name: str, maker: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise InputError on an option that a criterion does not have, and on one that it needs."""
    try:
        parameters = inspect.signature(maker).parameters.values()
    except ValueError:  # a function in C without a signature
        return
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [option for option in options if option not in known]
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        has = f"it has: {', '.join(known)}" if known else "it has none"
        raise InputError(f"{name} has no option {unknown[0]}; {has}")
    missing = [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in options]
    if missing:
        raise InputError(f"{name} needs the option {missing[0]}: {name}({missing[0]}=...)")


def _options(text: str, full_name: str) -> dict[str, Any]:
    """Return the keyword arguments of a call written as text; values are literals."""
    try:
        call = ast.parse("f" + text[text.index("(") :], mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError
        names = [keyword.arg for keyword in call.keywords]
        if None in names or len(set(names)) < len(names):
            raise SyntaxError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise InputError(f"criterion {full_name!r}: options are written as name(option=value, other='text')") from None
