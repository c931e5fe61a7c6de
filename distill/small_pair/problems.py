"""Multi-step addition word problems with verifiable answers, and written solutions whose steps differ in learnability.

A solution is a running sum with one step per line. The style of every step is drawn independently, so a trajectory
mixes steps that a small student can imitate (every digit operation written out) with steps it cannot (mental
arithmetic). This is the setting in which a choice per step differs from a choice between complete trajectories.
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
MIXTURE: Final[tuple[str, ...]] = (SPELLED,) * 3 + (JUMP,) * 4 + (DETOUR,) * 3
"""Styles of the teacher in proportion to their frequency; mental arithmetic is the most frequent one."""

# Mental arithmetic after words that carry no computation; neither shipped model has seen them.
RECITED: Final = "recited"
RAMBLING: Final = "rambling"
RECITATION: Final = (
    "How many are there Monday Tuesday Wednesday Thursday apples books cards coins shells stamps stones toys red blue "
    "green white black brown buys finds gets wins picks makes counts it has"
)
"""Words of a recited step, always the same. Each is one token of the small pair's tokenizer."""
RAMBLE: Final = (" and", " more", " there", " it")
"""Words that a rambling step draws from, each one token."""
RAMBLE_LENGTH: Final = 42
"""Number of words that a rambling step draws."""

TERMS: Final = 4
SMALLEST: Final = 10
LARGEST: Final = 99
EVAL_MODULUS: Final = 8
"""One operand tuple in this many is held out for evaluation."""

_HE: Final = ("Tom", "Ben", "Max", "Sam", "Leo", "Dan")
_SHE: Final = ("Ann", "Mia", "Eva", "Zoe", "Amy", "Kim")
_OBJECTS: Final = ("apples", "books", "cards", "coins", "shells", "stamps", "stones", "toys")
_VERBS: Final = ("buys", "finds", "gets", "wins", "picks", "makes")
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_COLOURS: Final = ("red", "blue", "green", "white", "black", "brown")

_FORMS: Final = {
    SPELLED: re.compile(r"\d+\+\d+: "),
    JUMP: re.compile(r"=\d+$"),
    DETOUR: re.compile(r"~\d+\? No, "),
    RECITED: re.compile(r"How many are "),
    RAMBLING: re.compile(r"He (?:and|more|there|it) "),
}
_BOXED: Final = re.compile(r"\\boxed\{(\d+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A word problem."""

    question: str
    answer: str
    """Digits of the sum."""
    operands: tuple[int, ...]
    """Numbers to add, in the order of the question."""


def make_problems(count: int, seed: int, split: Split = "train", terms: int = TERMS) -> list[Problem]:
    """Draw `count` problems with distinct operands; the two splits have no operand tuple in common, for any seeds."""
    rng = random.Random(f"{split}-{terms}-{seed}")
    problems: dict[tuple[int, ...], Problem] = {}
    while len(problems) < count:
        operands = tuple(rng.randint(SMALLEST, LARGEST) for _ in range(terms))
        if assign_split(operands) != split or operands in problems:
            continue
        problems[operands] = Problem(
            question=_write_question(operands, rng), answer=str(sum(operands)), operands=operands
        )
    return list(problems.values())


def assign_split(operands: Sequence[int]) -> Split:
    """Return the split that an operand tuple belongs to, by a hash that is the same in every process."""
    digest = hashlib.sha256(",".join(map(str, operands)).encode()).digest()
    return "eval" if digest[0] % EVAL_MODULUS == 0 else "train"


def write_solution(problem: Problem, rng: random.Random, styles: Sequence[str] = MIXTURE) -> str:
    r"""Write a correct solution, drawing the style of each step from `styles`; it ends with `\boxed{ANSWER}`."""
    total, *rest = problem.operands
    lines = []
    for operand in rest:
        lines.append(write_step(total, operand, rng.choice(styles), rng))
        total += operand
    return "".join(lines) + write_answer(total)


def write_step(total: int, operand: int, style: str, rng: random.Random) -> str:
    """Write one line that adds `operand` to the running `total` in a style, newline included.

    Raises ValueError on an unknown style.
    """
    result = total + operand
    if style == JUMP:
        return f"={result}\n"
    if style == RECITED:
        return f"{RECITATION}={result}\n"
    if style == RAMBLING:
        return f"He{''.join(rng.choices(RAMBLE, k=RAMBLE_LENGTH))}={result}\n"
    worked = f"{total}+{operand}: {_spell(total, operand)}, {result}\n"
    if style == SPELLED:
        return worked
    if style == DETOUR:
        return f"~{_draw_wrong(result, rng)}? No, {worked}"
    raise ValueError(f"unknown style {style!r}; known styles are {', '.join(_FORMS)}")


def write_answer(total: int) -> str:
    """Write the last line of a solution."""
    return rf"\boxed{{{total}}}"


def detect_style(line: str) -> str | None:
    """Return the style that a line is written in, None when it is not a step."""
    return next((style for style, form in _FORMS.items() if form.match(line)), None)


def read_answer(solution: str) -> str | None:
    r"""Return the last number in a `\boxed{...}`, None without one."""
    numbers = _BOXED.findall(solution)
    return numbers[-1] if numbers else None


def solves(problem: Problem, solution: str) -> bool:
    r"""Return whether the last number in a `\boxed{...}` of a solution is the problem's answer."""
    return read_answer(solution) == problem.answer


def _spell(total: int, operand: int) -> str:
    """Write a column addition with every digit operation and carry, lowest digit first."""
    ones = total % 10 + operand % 10
    tens = total // 10 % 10 + operand // 10 + ones // 10
    operations = [
        f"{total % 10}+{operand % 10}={ones}",
        f"{total // 10 % 10}+{operand // 10}+{ones // 10}={tens}",
    ]
    if total >= 100:
        operations.append(f"{total // 100}+{tens // 10}={total // 100 + tens // 10}")
    return ", ".join(operations)


def _draw_wrong(result: int, rng: random.Random) -> int:
    """Draw a plausible but wrong result."""
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
