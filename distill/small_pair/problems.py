"""Multi-step addition word problems with verifiable answers, and written solutions whose steps differ in learnability.

A solution is a running sum with one step per line. The style of every step is drawn anew, so a trajectory mixes steps
that a small student can imitate (every digit operation written out) with steps it cannot (mental arithmetic): exactly
the setting in which choosing step by step differs from choosing between whole trajectories.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Split: TypeAlias = Literal["train", "eval"]

SPELLED: Final = "spelled"
JUMP: Final = "jump"
DETOUR: Final = "detour"
STYLES: Final[tuple[str, ...]] = (SPELLED, JUMP, DETOUR)
# How often the teacher writes in each style: mental arithmetic is its favourite, by a margin.
MIXTURE: Final[tuple[str, ...]] = (SPELLED,) * 3 + (JUMP,) * 4 + (DETOUR,) * 3

TERMS: Final = 4
SMALLEST: Final = 10
LARGEST: Final = 99
EVAL_SHARE: Final = 8  # one operand tuple in this many is held out for evaluation

_HE: Final = ("Tom", "Ben", "Max", "Sam", "Leo", "Dan")
_SHE: Final = ("Ann", "Mia", "Eva", "Zoe", "Amy", "Kim")
_OBJECTS: Final = ("apples", "books", "cards", "coins", "shells", "stamps", "stones", "toys")
_VERBS: Final = ("buys", "finds", "gets", "wins", "picks", "makes")
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_COLOURS: Final = ("red", "blue", "green", "white", "black", "brown")

_FORMS: Final = {SPELLED: re.compile(r"\d+\+\d+: "), JUMP: re.compile(r"=\d+$"), DETOUR: re.compile(r"~\d+\? No, ")}
_BOXED: Final = re.compile(r"\\boxed\{(\d+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A word problem: its text, the numbers to add in order of mention, and the answer as digits."""

    question: str
    answer: str
    operands: tuple[int, ...]


def make_problems(count: int, seed: int, split: Split = "train", terms: int = TERMS) -> list[Problem]:
    """Draw `count` problems with distinct operands; the two splits share no operand tuple, whatever the seeds."""
    rng = random.Random(f"{split}-{terms}-{seed}")
    problems: dict[tuple[int, ...], Problem] = {}
    while len(problems) < count:
        operands = tuple(rng.randint(SMALLEST, LARGEST) for _ in range(terms))
        if split_of(operands) != split or operands in problems:
            continue
        problems[operands] = Problem(
            question=_write_question(operands, rng), answer=str(sum(operands)), operands=operands
        )
    return list(problems.values())


def split_of(operands: Sequence[int]) -> Split:
    """The split an operand tuple belongs to, by a hash that is the same in every process."""
    digest = hashlib.sha256(",".join(map(str, operands)).encode()).digest()
    return "eval" if digest[0] % EVAL_SHARE == 0 else "train"


def write_solution(problem: Problem, rng: random.Random, styles: Sequence[str] = MIXTURE) -> str:
    r"""Write a correct solution, drawing the style of each step from `styles`; it ends with `\boxed{ANSWER}`."""
    total, *rest = problem.operands
    lines = []
    for operand in rest:
        lines.append(write_step(total, operand, rng.choice(styles), rng))
        total += operand
    return "".join(lines) + write_answer(total)


def write_step(total: int, operand: int, style: str, rng: random.Random) -> str:
    """One line that adds `operand` to the running `total` in a style, newline included."""
    result = total + operand
    if style == JUMP:
        return f"={result}\n"
    worked = f"{total}+{operand}: {_spell(total, operand)}, {result}\n"
    if style == SPELLED:
        return worked
    if style == DETOUR:
        return f"~{_wrong(result, rng)}? No, {worked}"
    raise ValueError(f"unknown style {style!r}; known styles are {', '.join(STYLES)}")


def write_answer(total: int) -> str:
    """The last line of a solution."""
    return rf"\boxed{{{total}}}"


def style_of(line: str) -> str | None:
    """The style a step line is written in, or None when the line is not a step."""
    return next((style for style, form in _FORMS.items() if form.match(line)), None)


def read_answer(solution: str) -> str | None:
    r"""The content of the last `\boxed{...}` when it is a number, else None."""
    found = _BOXED.findall(solution)
    return found[-1] if found else None


def is_correct(problem: Problem, solution: str) -> bool:
    """Whether a solution states the right answer."""
    return read_answer(solution) == problem.answer


def _spell(total: int, operand: int) -> str:
    """Column addition with every digit operation and carry written out, lowest digit first."""
    ones = total % 10 + operand % 10
    tens = total // 10 % 10 + operand // 10 + ones // 10
    operations = [
        f"{total % 10}+{operand % 10}={ones}",
        f"{total // 10 % 10}+{operand // 10}+{ones // 10}={tens}",
    ]
    if total >= 100:
        operations.append(f"{total // 100}+{tens // 10}={total // 100 + tens // 10}")
    return ", ".join(operations)


def _wrong(result: int, rng: random.Random) -> int:
    """A plausible but wrong result."""
    return result + rng.choice((-20, -10, -2, -1, 1, 2, 10, 20))


def _write_question(operands: tuple[int, ...], rng: random.Random) -> str:
    template = rng.choice((_write_collecting, _write_selling, _write_counting))
    return template(operands, rng)


def _write_collecting(operands: tuple[int, ...], rng: random.Random) -> str:
    she = rng.random() < 0.5
    name = rng.choice(_SHE if she else _HE)
    things = rng.choice(_OBJECTS)
    first, *rest = operands
    verbs = rng.sample(_VERBS, len(rest))
    gains = [f"{verb} {number}" for verb, number in zip(verbs, rest, strict=True)]
    return (
        f"{name} has {first} {things}. {'She' if she else 'He'} {_enumerate(gains)} more. "
        f"How many {things} does {name} have?"
    )


def _write_selling(operands: tuple[int, ...], rng: random.Random) -> str:
    things = rng.choice(_OBJECTS)
    sales = [f"{number} on {day}" for number, day in zip(operands, _DAYS, strict=False)]
    return f"A shop sells {things}: {_enumerate(sales)}. How many {things} does it sell?"


def _write_counting(operands: tuple[int, ...], rng: random.Random) -> str:
    name = rng.choice(_HE + _SHE)
    things = rng.choice(_OBJECTS)
    colours = rng.sample(_COLOURS, len(operands))
    counts = [f"{number} {colour}" for number, colour in zip(operands, colours, strict=True)]
    return f"{name} counts {_enumerate(counts)} {things}. How many {things} are there?"


def _enumerate(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
