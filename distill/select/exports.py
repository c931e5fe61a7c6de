"""Preference pairs and stepwise rows from the rounds of a finished search, by the choices of one criterion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from genssd.distill.answers.thoughts import ThoughtReader
from genssd.distill.data.written_rows import add_opening
from genssd.distill.select.decisions import LoggedCandidate
from genssd.distill.select.judging import JudgedRound, Trace
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.text_stream import REPLACEMENT


class _Texts:
    """The texts of one prompt's chunks, which join to the text of the response.

    A chunk's tokens by themselves decode to another text where a chunk ends within a character, or where the tokenizer
    drops the space at the beginning of a text.
    """

    def __init__(self, selection: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self.prompt = str(tokenizer.hf.decode(list(selection["student_prompt_ids"])))
        """Prompt as the student reads it."""
        opening = ThoughtReader(tokenizer).read_opening(selection["student_prompt_ids"])
        self.opening = add_opening(selection["prompt"], opening, "")
        """What the prompt ends in to open a thought, where another template may not do it."""
        self._tokenizer = tokenizer
        self._heads: dict[Trace, str] = {(): ""}

    def read_before(self, d: LoggedCandidate) -> str:
        """Return the response before a candidate, without the bytes of a character that the candidate completes."""
        return self._read_head(d.trace[:-1], d.candidate.history_ids)

    def read_link(self, d: LoggedCandidate) -> str:
        """Return the text of a chunk that others follow; bytes of an incomplete character belong to the next one."""
        before = self.read_before(d)
        return self._read_head(d.trace, (*d.candidate.history_ids, *d.candidate.token_ids))[len(before) :]

    def read_last(self, d: LoggedCandidate) -> str:
        """Return the text of a chunk at the end of a chain."""
        text = self._tokenizer.decode((*d.candidate.history_ids, *d.candidate.token_ids))
        return text[len(self.read_before(d)) :]

    def _read_head(self, trace: Trace, token_ids: Sequence[int]) -> str:
        if trace not in self._heads:
            self._heads[trace] = self._tokenizer.decode(token_ids).rstrip(REPLACEMENT)
        return self._heads[trace]


def make_pairs(
    selection: Mapping[str, Any], rounds: Sequence[JudgedRound], labels: Mapping[str, Any], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yield a pair of each chosen candidate and the rejected sibling whose value is furthest from its own.

    selection: the prompt's line of selections.jsonl. labels: fields that every row gets.
    """
    texts = _Texts(selection, tokenizer)
    for judged in rounds:
        for d in judged.decided:
            score = judged.scores[d.trace]
            if d.trace not in judged.chosen or score is None:
                continue
            siblings = [
                (other, value)
                for other in judged.decided
                if other.trace[:-1] == d.trace[:-1]
                and other.trace in judged.rejected
                and (value := judged.scores[other.trace]) is not None
            ]
            if siblings:
                last, last_score = max(siblings, key=lambda pair: abs(pair[1] - score))
                yield {
                    "prompt": texts.prompt + texts.read_before(d),
                    "chosen": texts.read_last(d),
                    "rejected": texts.read_last(last),
                    "student_prompt_ids": [*selection["student_prompt_ids"], *d.candidate.history_ids],
                    # the teacher divides the text otherwise where the student read its bytes
                    **(
                        {"teacher_prompt_ids": [*selection["prompt_ids"], *d.candidate.history_ids]}
                        if d.candidate.spans is None
                        else {}
                    ),
                    "chosen_token_ids": list(d.candidate.token_ids),
                    "rejected_token_ids": list(last.candidate.token_ids),
                    "tokenizer": selection["tokenizer"],
                    # by these another student's chat template renders the pair
                    "problem_prompt": selection["prompt"],
                    "response_so_far": texts.opening + texts.read_before(d),
                    "chosen_finished": d.candidate.finished,
                    "rejected_finished": last.candidate.finished,
                    "chosen_score": score,
                    "rejected_score": last_score,
                    "round": len(d.trace) - 1,
                    "exact": judged.is_exact,
                    **labels,
                }


def make_steps(
    selection: Mapping[str, Any], rounds: Sequence[JudgedRound], labels: Mapping[str, Any], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yield the chain of chunks up to every candidate after which the run wrote nothing, with a label for each chunk:
    whether the criterion chooses it among its siblings, given the chunks before it.

    selection: the prompt's line of selections.jsonl. labels: fields that every row gets.
    """
    by_trace = {d.trace: (d, judged) for judged in rounds for d in judged.decided}
    continued = {trace[:-1] for trace in by_trace}
    texts = _Texts(selection, tokenizer)
    for judged in rounds:
        for d in judged.decided:
            if d.trace in continued or d.trace not in judged.chosen | judged.rejected:
                continue
            chain = [by_trace[d.trace[:depth]] for depth in range(1, len(d.trace) + 1)]
            yield {
                "prompt": texts.prompt,
                "completions": [*(texts.read_link(link) for link, _ in chain[:-1]), texts.read_last(d)],
                "labels": [link.trace in link_round.chosen for link, link_round in chain],
                "final": d.candidate.final,
                "exact": judged.is_exact,
                **labels,
            }
