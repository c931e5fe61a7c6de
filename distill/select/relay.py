"""Relay: the student writes until it errs, and the teacher takes over there.

An error is found by the student's own entropy, while it writes, or by the verdict on the answer of its whole attempt,
which is then rewound to the first place where it was unsure. The rules are ours; the teacher and the student of
2607.26057, 2607.29078 and 2605.31159 take turns in rollouts, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from genssd.distill.select.turns import Span, Turn, Writing, make_completion
from genssd.distill.select.two_writer_options import Relay
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.rewinding import rewind
from genssd.engine.texts.stops import StopSearch
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.text_stream import open_stream

WHOLE = Chunk(tokens=1 << 30, until=None)
"""Chunk that ends with the response."""


def find_error(entropy: Sequence[float], options: Relay, *, is_complete: bool) -> int | None:
    """Return the first token of the first window whose mean entropy reaches the threshold; None without one.

    entropy: of the distribution that each of the student's tokens was drawn from, in nats. is_complete: whether no
    tokens follow, so that fewer than a window are one.
    """
    window = min(options.window, len(entropy)) if is_complete else options.window
    if not window:
        return None
    sums = [0.0, *accumulate(entropy)]
    limit = options.threshold * window
    return next((end - window for end in range(window, len(sums)) if sums[end] - sums[end - window] >= limit), None)


def write_in_relay(root: Branch, options: Relay, tokenizer: Tokenizer, is_wrong: Callable[[Branch], bool]) -> Writing:
    """Write a response after a root. is_wrong: the verdict on an ended branch; asked where the answer tells errors."""
    student_chunk = options.chunk if options.error == "entropy" else WHOLE
    teacher_chunk = options.chunk if options.teacher == "chunk" else WHOLE
    branch, spans, num_sampled, num_takeovers = root, list[Span](), 0, 0
    start = 0  # of the student's attempt: what comes before it stays
    entropy: list[float] = []  # of the attempt
    children: list[Branch] = []
    try:
        while branch.ended is None:
            children = yield Turn(branch=branch, writer="student", n=1, chunk=student_chunk, sampling=options.student)
            num_sampled += len(children[0].chunk)
            entropy += children[0].stats.entropy.tolist()
            branch, children = _move_on(branch, children[0]), []
            if num_takeovers == options.takeovers:
                continue
            if options.error == "answer" and not is_wrong(branch):
                break
            place = find_error(entropy, options, is_complete=branch.ended is not None)
            if place is None:
                continue
            place = _leave_beginnings(branch, start, place, tokenizer)
            if place:
                spans.append(Span(place, "student"))
            branch = rewind(branch, start + place)  # the other one has no pages once nothing refers to it
            children = yield Turn(branch=branch, writer="teacher", n=1, chunk=teacher_chunk)
            num_sampled += len(children[0].chunk)
            spans.append(Span(len(children[0].chunk), "teacher"))
            branch, children = _move_on(branch, children[0]), []
            num_takeovers, start, entropy = num_takeovers + 1, len(branch.history), []
        if entropy:
            spans.append(Span(len(entropy), "student"))
        return make_completion(branch, spans, num_sampled, tokenizer)
    finally:
        for held in (branch, *children):
            held.drop()


def _leave_beginnings(branch: Branch, start: int, place: int, tokenizer: Tokenizer) -> int:
    """Return the last place of an attempt, up to `place`, that is not inside the beginning of a stop string.

    What the student has written of a string would stay in the response when the teacher completes it. start: number of
    tokens before the attempt.
    """
    stops = branch.session.stops
    if not stops.texts or not place:
        return place
    search = StopSearch(stops, open_stream(tokenizer), branch.history[:start])
    closed = 0
    for offset, token in enumerate(branch.history[start : start + place], start=1):
        search.find(token)
        if not search.is_open:
            closed = offset
    return closed


def _move_on(parent: Branch, child: Branch) -> Branch:
    """Commit the only candidate of a branch, and return it."""
    child.commit()
    parent.drop()
    return child
