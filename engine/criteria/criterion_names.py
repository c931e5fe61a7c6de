"""Criteria by name: registered, with options, combined, or imported from a user's own module.

The criteria of genssd are registered by the place of their class, and imported when one is made: the names of criteria
are options of commands, which are read before torch is imported.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.engine.common.closest import suggest
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_value
from genssd.engine.criteria.criterion import AnyCriterion, Criterion, PoolCriterion
from genssd.engine.criteria.imported_criteria import describe_failure, import_object
from genssd.engine.criteria.weighted_rank import WeightedRank

OPTION_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
"""Kinds of parameters that can be options, which are given by name."""


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A criterion of genssd that has not been imported yet."""

    place: str
    """File under engine/criteria and class, with a colon between them."""
    options: tuple[str, ...] = ()
    """Names of the options."""

    def load(self) -> Callable[..., AnyCriterion]:
        """Import the class."""
        maker: Callable[..., AnyCriterion] = import_object(f"genssd.engine.criteria.{self.place}")
        return maker


_MAKERS: dict[str, BuiltIn | Callable[..., AnyCriterion]] = {
    "ppl": BuiltIn("likelihood:Perplexity", ("scope", "window", "norm", "reduce")),
    "lalp": BuiltIn("by_step:LocalNaturalness", ("steps", "share")),
    "rsr": BuiltIn("likelihood:RankSurprisal", ("r_max", "scope", "eps")),
    "aslec_drop": BuiltIn("by_step:AslecDrop", ("skip_tokens",)),
    "aslec_casl": BuiltIn("by_step:AslecCasl", ("gamma",)),
    "lark": BuiltIn("learning_gain:Lark"),
    "divergence": BuiltIn("teacher:TeacherStudentGap"),
    "rsd_accept": BuiltIn("likelihood:RsdAccept", ("probability", "top")),
    "rationale_difficulty": BuiltIn("reference_answer:RationaleDifficulty", ("before_answer", "last_steps")),
    "scas": BuiltIn("learning_cost:LearningCost", ("prompt_weight",)),
    "progress": BuiltIn("progress:AnswerProgress", ("reduce", "segments", "before_answer", "last_steps")),
    "brts": BuiltIn("verdict:CorrectThenAligned", ("top",)),
    "tor": BuiltIn("grounding:TargetedObservationRatio"),
    "egs": BuiltIn("grounding:GroundedActions"),
    "surprisal_band": BuiltIn("likelihood:SurprisalBand", ("low", "high")),
    "length": BuiltIn("controls:Length", ("scope", "longest")),
    "teacher_logprob": BuiltIn("teacher:TeacherLogprob"),
    "random": BuiltIn("controls:Random"),
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


def list_usages() -> list[str]:
    """Return every registered criterion with the names of its options, as help texts list them, sorted by name."""
    usages = []
    for name in registered_criteria():
        maker = _MAKERS[name]
        options = maker.options if isinstance(maker, BuiltIn) else _list_options(maker) or ()
        usages.append(f"{name}({', '.join(options)})" if options else name)
    return usages


def check_criterion(criterion: str) -> None:
    """Raise InputError on a name of a criterion or of an option that is not known, without importing any criterion.

    Import paths, and the values of options, are left to `resolve`.
    """
    for term in _iter_terms(criterion):
        maker = None if ":" in term.name else _find_maker(term, criterion)
        if isinstance(maker, BuiltIn):
            _check_option_names(term, maker.options, criterion)


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
    terms = list(_iter_terms(criterion))
    if len(terms) == 1 and terms[0].weight is None:
        return _make(terms[0], criterion)
    parts = tuple((1.0 if term.weight is None else term.weight, _make(term, criterion)) for term in terms)
    return WeightedRank(parts=parts)


@dataclass(frozen=True, slots=True)
class _Term:
    """One summand of what a user wrote."""

    weight: float | None
    """None where none is written."""
    name: str
    """Registered name or import path."""
    options: dict[str, Any]


def _iter_terms(text: str) -> Iterator[_Term]:
    """Yield the summands of a text. Raises InputError on weights and options that cannot be read."""
    for part in _split(text, "+"):
        term, factor = part.strip(), None
        weight, star, rest = term.partition("*")
        if star and "(" not in weight:
            try:
                factor = float(weight)
            except ValueError:
                factor = math.nan
            if not math.isfinite(factor):
                raise InputError(f"criterion {text!r}: {weight.strip()!r} is no weight")
            term = rest.strip()
        name, bracket, _ = term.partition("(")
        yield _Term(factor, name, _read_options(term, text) if bracket else {})


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


def _find_maker(term: _Term, full_name: str) -> BuiltIn | Callable[..., AnyCriterion]:
    """Return what makes the criterion of a registered name. full_name: what the user wrote, for messages."""
    maker = _MAKERS.get(term.name)
    if maker is None:
        names = registered_criteria()
        raise _refuse(
            full_name, f"unknown criterion {term.name!r}; registered: {', '.join(names)}{suggest(term.name, names)}"
        )
    return maker


def _make(term: _Term, full_name: str) -> AnyCriterion:
    """Return the criterion of a name or import path, made with options."""
    try:
        maker: Any = import_object(term.name) if ":" in term.name else _find_maker(term, full_name)
    except InputError as error:
        raise _refuse(full_name, error) from error.__cause__
    maker = maker.load() if isinstance(maker, BuiltIn) else maker
    try:
        if not callable(maker):
            if term.options:
                raise InputError(f"{term.name} is an object already and takes no options")
            return resolve(maker)
        _check_option_names(term, _list_options(maker), full_name)
        _check_needed_options(term, maker)
        return resolve(_call(maker, term.options))
    except InputError as error:
        raise _refuse(full_name, error) from error.__cause__


def _call(maker: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Return what a maker makes. Raises InputError naming the place where the constructor of a user's class raises."""
    try:
        return maker(**options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(describe_failure(error)) from error


def _refuse(full_name: str, reason: object) -> InputError:
    """Return the error that names what the user wrote, unless the reason names it already."""
    start = f"criterion {full_name!r}: "
    text = str(reason)
    return InputError(text if text.startswith(start) else f"{start}{text}")


def _read_parameters(maker: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Return the parameters of a callable; None of a function in C without a signature."""
    try:
        return list(inspect.signature(maker).parameters.values())
    except ValueError:
        return None


def _list_options(maker: Callable[..., Any]) -> tuple[str, ...] | None:
    """Return the names of the options of a criterion; None where it takes any."""
    parameters = _read_parameters(maker)
    if parameters is None or any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters if p.kind in OPTION_KINDS)


def _check_option_names(term: _Term, known: Sequence[str] | None, full_name: str) -> None:
    """Raise InputError on an option that a criterion does not have. known: None allows any."""
    if known is None:
        return
    for option in term.options:
        if option not in known:
            has = f"it has: {', '.join(known)}{suggest(option, known)}" if known else "it has none"
            raise _refuse(full_name, f"{term.name} has no option {option}; {has}")


def _check_needed_options(term: _Term, maker: Callable[..., Any]) -> None:
    """Raise InputError on an option that a criterion needs and that is not given."""
    for p in _read_parameters(maker) or ():
        if p.kind in OPTION_KINDS and p.default is p.empty and p.name not in term.options:
            raise InputError(f"{term.name} needs the option {p.name}: {term.name}({p.name}=...)")


def _read_options(text: str, full_name: str) -> dict[str, Any]:
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
