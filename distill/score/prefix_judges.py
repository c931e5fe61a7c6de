"""The judges of `genssd prefix`: whether the student can finish a solution from a prefix of it, and what it replied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.data.traces import Trace
from genssd.engine.calls.generation import Completion
from genssd.engine.common.amounts import format_count
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

QUESTION = """Here is a problem and the beginning of a solution.

Problem:
{problem}

Beginning of the solution:
{prefix}

Could you finish the solution correctly from here, without further help? Answer [ENOUGH] if the beginning suffices, \
else [NOT_ENOUGH]."""

ENOUGH, NOT_ENOUGH = "[ENOUGH]", "[NOT_ENOUGH]"
"""Marks of the judge's verdict; the second does not contain the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A judge's verdict on one prefix."""

    is_sufficient: bool
    reply: str | None = None
    """Text that the student wrote when it was asked; None where it was not asked."""

    @property
    def lacks_mark(self) -> bool:
        """Whether the student was asked and gave no verdict, which counts as not sufficient."""
        return self.reply is not None and ENOUGH not in self.reply and NOT_ENOUGH not in self.reply


Prefix = tuple[Trace, tuple[int, ...]]
"""A trace and the first tokens of its response."""

PrefixJudge = Callable[[Sequence[Prefix]], Sequence[Judgement]]
"""A function from prefixes of traces to the verdict on each of them."""


def continue_prefixes(
    engine: Engine, prefixes: Sequence[Prefix], *, sampling: Sampling, max_tokens: int, seed: int
) -> list[Completion]:
    """Return what the student writes after each prompt and prefix."""
    generated = engine.iter_generate(
        [(*trace.prompt_ids, *ids) for trace, ids in prefixes],
        model="student",
        sampling=sampling,
        max_tokens=max_tokens,
        seed=seed,
        labels=[trace.where for trace, _ in prefixes],
    )
    written = {outcome.index: outcome.completions[0] for outcome in generated}
    return [written[i] for i in range(len(prefixes))]


def make_asking_judge(engine: Engine, judge_tokens: int) -> PrefixJudge:
    """Return the judge that asks the student, greedily. A prefix that is too long to ask about is not sufficient."""
    tokenizer = engine.tokenizer("student")

    def judge(prefixes: Sequence[Prefix]) -> list[Judgement]:
        prompts = []
        for trace, ids in prefixes:
            text = QUESTION.format(problem=trace.question.strip(), prefix=tokenizer.decode(ids).strip())
            prompt = [{"role": "user", "content": text}] if tokenizer.hf.chat_template else f"{text}\n"
            prompts.append(tokenizer.encode_prompt(prompt))
        longest = engine.max_sequence_length("student") - judge_tokens
        short = [i for i, ids in enumerate(prompts) if len(ids) <= longest]
        replies = engine.iter_generate(
            [prompts[i] for i in short],
            model="student",
            sampling=Sampling(temperature=0.0),
            max_tokens=judge_tokens,
            labels=[prefixes[i][0].where for i in short],
        )
        texts = {short[outcome.index]: outcome.completions[0].text for outcome in replies}
        return [Judgement(is_sufficient=ENOUGH in texts.get(i, ""), reply=texts.get(i)) for i in range(len(prompts))]

    return judge


def make_solving_judge(engine: Engine, max_tokens: int, seed: int) -> PrefixJudge:
    """Return the judge that lets the student continue, greedily, and checks the answer."""
    answer_judge = AnswerJudge(engine.tokenizer("student"))

    def judge(prefixes: Sequence[Prefix]) -> list[Judgement]:
        continued = continue_prefixes(
            engine, prefixes, sampling=Sampling(temperature=0.0), max_tokens=max_tokens, seed=seed
        )
        return [
            Judgement(
                is_sufficient=answer_judge.judge(trace.prompt_ids, (*ids, *reply.token_ids), trace.answer).is_correct
            )
            for (trace, ids), reply in zip(prefixes, continued, strict=True)
        ]

    return judge


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyCounts:
    """How many replies the judge gave over some traces; counted as the fields say."""

    replies: int = 0
    """Number of the judge's replies, where it was asked."""
    unmarked: int = 0
    """Number of the replies without a verdict; each counts as not sufficient."""
    unmarked_whole: int = 0
    """Number of traces that are left whole because none of the replies about them has a verdict."""


def count_replies(rows: Sequence[Mapping[str, Any]]) -> ReplyCounts:
    """Return the counts of the judge's replies over rows of the journal."""
    replies = unmarked = unmarked_whole = 0
    for row in rows:
        lacking = [
            Judgement(is_sufficient=False, reply=judged["reply"]).lacks_mark
            for judged in row.get("judgements", [])
            if judged["reply"] is not None
        ]
        replies += len(lacking)
        unmarked += sum(lacking)
        unmarked_whole += bool(lacking) and all(lacking) and row["kept_steps"] == row["steps"]
    return ReplyCounts(replies=replies, unmarked=unmarked, unmarked_whole=unmarked_whole)


def warn_of_unmarked(counts: ReplyCounts) -> str | None:
    """Return a warning when more than half of the judge's replies have no verdict."""
    if 2 * counts.unmarked <= counts.replies:
        return None
    return (
        f"warning: neither {ENOUGH} nor {NOT_ENOUGH} in {counts.unmarked} of {format_count(counts.replies, 'reply')} "
        "of "
        "the judge: the student does not answer as it is asked; read its replies in prefixes.jsonl (judgements), raise "
        "--judge-tokens where they are cut off, or take --judge solves"
    )
