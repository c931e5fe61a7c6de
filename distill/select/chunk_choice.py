"""How long the chunks of a run of `genssd select` are, where the user gives no `chunk.tokens`.

The first of several teachers writes plain responses to the first problems. Their text is cut as the search would cut
it, with every number of tokens of CHOICES; the largest one that cuts the median response into STEPS chunks or more is
taken, and the smallest one where none does. The draws depend on the seed and the prompts alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from genssd.distill.data.problems import ProblemRow
from genssd.distill.pool.pool import Pool, Stopped
from genssd.distill.runs.progress import Progress
from genssd.distill.runs.run import Run
from genssd.distill.select.config import SelectConfig
from genssd.engine.common.amounts import format_count
from genssd.engine.common.quoting import quote
from genssd.engine.decoding.chunk import Chunk, ChunkEnd
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.text_stream import TextStream

SETTING = "chunk.tokens"
"""Name of the setting that is chosen."""
STEPS = 8
"""Number of chunks in a response that the choice aims at: how often the student chooses."""
CHOICES = (256, 192, 128, 96, 64, 48, 32, 24, 16)
"""Numbers of tokens among which is chosen, the largest first."""
SAMPLES = 8
"""Maximum number of plain responses."""
LONGEST_SAMPLE = 2 * STEPS * CHOICES[0]
"""Number of tokens at which a plain response is cut off: with so many the largest choice has enough chunks."""

logger = logging.getLogger("genssd.select")


def choose_chunk(
    config: SelectConfig, run: Run, pool: Pool, problems: Sequence[ProblemRow], report: Progress
) -> SelectConfig:
    """Return the config with a number of tokens of its chunks: the given one, that of an earlier part of the run, or
    one that is chosen from plain responses of the teacher and logged.

    The settings of the run record it.
    """
    if config.chunk.tokens is not None:
        return config
    tokens = run.chosen(SETTING)
    if tokens is None:
        tokens = _choose(config, pool, problems, report)
        run.choose(SETTING, tokens)
    else:
        logger.info("%s, as this run was begun", describe_chunk(dataclasses.replace(config.chunk, tokens=tokens)))
    return dataclasses.replace(config, chunk=dataclasses.replace(config.chunk, tokens=tokens))


def list_choices(options: SearchOptions) -> list[int]:
    """Return the numbers of tokens that the other options leave, the largest first."""
    most = options.chunk.limit or CHOICES[0]
    least = options.min_chunk_tokens + 1 if options.on_unlearnable == "shorten" else 1
    return [tokens for tokens in CHOICES if least <= tokens <= most] or [max(least, min(most, CHOICES[-1]))]


def describe_chunk(chunk: Chunk) -> str:
    """Return what a chunk is under a rule whose number of tokens is known, as a sentence."""
    if chunk.until is None:
        return f"the student chooses after every {format_count(chunk.least, 'token')}"
    end = "line break" if chunk.until == "\n" else quote(chunk.until)
    return (
        f"the student chooses between chunks of at least {format_count(chunk.least, 'token')}, which end with the next "
        f"{end}, at {chunk.longest} tokens at the latest"
    )


def count_chunks(token_ids: Sequence[int], tokenizer: Tokenizer, chunk: Chunk) -> int:
    """Return into how many chunks a rule cuts a response. tokenizer: of the ids."""
    count, end, text = 0, ChunkEnd(chunk), TextStream(tokenizer)
    num_open = 0
    for token_id in token_ids:
        num_open += 1
        if end.reached(text.push(token_id) if chunk.until is not None else ""):
            count, end, text, num_open = count + 1, ChunkEnd(chunk), TextStream(tokenizer), 0
    return count + (num_open > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainResponse:
    """A response of the teacher alone."""

    num_tokens: int
    chunks: tuple[int, ...]
    """Number of chunks with every choice of tokens, in the order of the choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainWork:
    """A plain response of the first teacher to every problem; a `Work`, whose items are places of problems."""

    problems: Sequence[ProblemRow]
    options: SearchOptions

    @property
    def items(self) -> Sequence[int]:
        """All problems."""
        return range(len(self.problems))

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens of one response."""
        return min(self.options.max_tokens, LONGEST_SAMPLE)

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, PlainResponse | str]]:
        """Yield a response to every problem, or why it failed; see `Work`."""
        teacher = engine.teachers[0]
        tokenizer = teacher.tokenizer("teacher")
        rules = [dataclasses.replace(self.options.chunk, tokens=tokens) for tokens in list_choices(self.options)]
        for outcome in teacher.iter_generate(
            [problem.prompt for problem in self.problems],
            sampling=self.options.sampling,
            max_tokens=self.most_tokens,
            stop=self.options.stop,
            include_stop=self.options.include_stop,
            seed=self.options.seed,
            labels=[problem.where for problem in self.problems],
            feed=feed,
        ):
            if outcome.error is not None:
                yield outcome.index, outcome.error
                continue
            (completion,) = outcome.completions
            counts = tuple(count_chunks(completion.token_ids, tokenizer, rule) for rule in rules)
            yield outcome.index, PlainResponse(num_tokens=len(completion.token_ids), chunks=counts)


def _choose(config: SelectConfig, pool: Pool, problems: Sequence[ProblemRow], report: Progress) -> int:
    """Return the number of tokens that plain responses of the teacher suggest, and log it."""
    report.begin("choosing the length of chunks", engine=pool.models, work="writing")
    responses = []
    for _, outcome in pool.run(PlainWork(problems=problems[:SAMPLES], options=config)):
        assert not isinstance(outcome, Stopped), "nothing limits the sampling"
        if isinstance(outcome, PlainResponse):
            responses.append(outcome)
    tokens = choose_tokens(list_choices(config), [one.chunks for one in responses])
    rule = describe_chunk(dataclasses.replace(config.chunk, tokens=tokens))
    if not responses:
        logger.info("%s, for want of a plain response of the teacher; --chunk.tokens gives another number", rule)
        return tokens
    lengths = median(one.num_tokens for one in responses)
    logger.info(
        "%s: chosen from %s of the teacher (median %g tokens) for about %d choices in each; --chunk.tokens gives "
        "another number",
        rule, format_count(len(responses), "plain response"), lengths, STEPS,
    )  # fmt: skip
    return tokens


def choose_tokens(choices: Sequence[int], chunks: Sequence[Sequence[int]]) -> int:
    """Return the first of the choices with which the median response has STEPS chunks; the last one where none has.

    chunks: for every response, its number of chunks with each of the choices. Without a response: 64, or what is next.
    """
    if not chunks:
        return min(choices, key=lambda tokens: abs(tokens - Chunk().least))
    for place, tokens in enumerate(choices):
        if median(counts[place] for counts in chunks) >= STEPS:
            return tokens
    return choices[-1]
