"""Alternating writers: at every node both models offer candidates, and a criterion chooses whose chunk is kept.

TESSY (2604.14164) lets the student write tokens of style and the teacher those of capability. Its program cuts what
either writes, five tokens of the student and ten of the teacher at a time, where a trained classifier sees the first
token of the other kind. What decides here is our reading: no classifier is trained, and a criterion compares chunks of
both at every node. Criteria see the same two models whoever wrote a chunk: `ppl` asks the student, and
`teacher_logprob` the teacher about the student's chunks as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from genssd.distill.select.turns import Span, Turn, Writing, make_completion
from genssd.distill.select.two_writer_options import Alternation
from genssd.engine.decoding.branch import Branch
from genssd.engine.search.judging import Judge, JudgedCandidate
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.texts.text import Tokenizer


def make_judge(options: Alternation) -> Judge:
    """Return what judges the candidates of a node. Raises InputError on a criterion that cannot judge chunks."""
    candidates = options.student_candidates + options.teacher_candidates
    return Judge.from_options(SearchOptions(criterion=options.criterion, chunk=options.chunk, candidates=candidates))


def write_alternately(root: Branch, options: Alternation, judge: Judge, tokenizer: Tokenizer, label: str) -> Writing:
    """Write a response after a root, node by node. label: name of the prompt in messages.

    A candidate that ends in a repetition is kept only where all do.
    """
    branch, spans, num_sampled = root, list[Span](), 0
    candidates: list[Branch] = []
    try:
        while branch.ended is None:
            # the student first: what both write alike, and what the criterion values alike, counts as the student's
            candidates = yield Turn(
                branch=branch, writer="student", n=options.student_candidates, chunk=options.chunk,
                sampling=options.student,
            )  # fmt: skip
            candidates += yield Turn(branch=branch, writer="teacher", n=options.teacher_candidates, chunk=options.chunk)
            num_sampled += sum(len(child.chunk) for child in candidates)
            judged = judge.judge_round(candidates, label)
            judge.reject_unfit(judged)
            winner = judge.choose(_find_acceptable(judged), 1)[0]
            spans.append(_describe_choice(winner, judged, options, judge))
            winner.branch.commit()
            for other in (branch, *candidates):
                if other is not winner.branch:
                    other.drop()
            branch, candidates = winner.branch, []
        return make_completion(branch, spans, num_sampled, tokenizer)
    finally:
        for held in (branch, *candidates):
            held.drop()


def _find_acceptable(judged: Sequence[JudgedCandidate]) -> list[JudgedCandidate]:
    """Return the candidates to choose among: those that end in no repetition, or all where every one does."""
    kept = [one for one in judged if one.verdict == "kept"]
    return kept or [one for one in judged if one.verdict != "duplicate"]


def _describe_choice(
    winner: JudgedCandidate, judged: Sequence[JudgedCandidate], options: Alternation, judge: Judge
) -> Span:
    """Return who wrote the chosen chunk, its value, and the best value of the other model."""
    by_student = list(judged[: options.student_candidates])
    is_students = any(one is winner for one in by_student)
    others = judged[options.student_candidates :] if is_students else by_student
    return Span(
        tokens=len(winner.branch.chunk),
        writer="student" if is_students else "teacher",
        score=winner.score,
        runner_up=min((one.score for one in others), key=judge.sort_key),
    )
