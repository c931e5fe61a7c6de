"""A session: one call on an engine, with the expander that its branches share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from genssd.engine.calls.rereading import finish_reading
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError, InputError, ServerError
from genssd.engine.common.model_choices import Role
from genssd.engine.criteria.candidate import ActivationMeans, Window
from genssd.engine.decoding.any_expander import AnyExpander
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.candidate_scoring import CandidateScorer
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.drawing import Drawing, WriterDrawing, chunk_topk
from genssd.engine.decoding.expander import Expander
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.decoding.reverse_speculation import ReverseSpeculativeDrawing
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.decoding.student_writing import StudentChunkReader
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.sampling import Sampling
from genssd.engine.readers.prompt_ids import PromptIds
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.token_map import TokenMap
from genssd.engine.served.expander import ServedExpander, served_topk
from genssd.engine.setup.resources import Resources
from genssd.engine.texts.stops import StopStrings
from genssd.kernels.logprob import TopK

UNLIMITED = 1 << 62
TOKENS_PER_TOKEN = 2
"""Number of tokens of the student that are reserved for each of a teacher with another tokenizer: enough for ordinary
text. Candidates that need more are scored one by one (candidate_scoring.py)."""


class Session:
    """The `BranchSession` of an engine's branches. Raises InputError when a model that it needs is not loaded.

    writer: the model that writes. scored: whether the student scores complete candidates; where it writes them itself,
    the teacher reads them. rsd: rules by which the student judges every single token of the teacher instead. num_topk:
    how many of the writer's most likely tokens are kept along committed chunks. greedy_first: whether the first
    candidate of an expansion takes the most likely tokens. stops: texts at which responses end.
    """

    def __init__(
        self,
        resources: Resources,
        sampling: Sampling,
        writer: Role,
        *,
        scored: bool = True,
        rsd: ReverseSpeculation | None = None,
        num_topk: int = 0,
        greedy_first: bool = False,
        stops: StopStrings = StopStrings(),
    ) -> None:
        self.stops = stops
        student = resources.runner("student") if scored or rsd is not None else None
        self._resources = resources
        self._tokenizer = resources.tokenizer(writer)
        self._num_topk = num_topk
        self._reader: Reader = TokenMap() if writer == "student" else resources.reader
        # criteria see the tokens of the model that reads the candidates
        self._judged_tokenizer = resources.tokenizer("student") if scored and student is not None else self._tokenizer
        self._served = resources.served_as(writer)
        if self._served is not None and rsd is None:
            if num_topk:
                self._served.check_topk(num_topk)
            scores = None if student is None else CandidateScorer(student, self._reader, resources.usage)
            self.expander: AnyExpander = ServedExpander(
                self._served,
                scores,
                sampling,
                num_topk=num_topk,
                greedy_first=greedy_first,
                usage=resources.usage,
                reservations=resources.reservations,
            )
            return
        self._writer = resources.runner(writer)
        is_read_by_teacher = scored and writer == "student"
        if is_read_by_teacher:
            _check_same_tokens(resources, "a student that writes beside the teacher")
        # the hidden states of a student that writes are kept: the statistics of its tokens come from them
        num_kept = int(is_read_by_teacher) or num_topk
        # a student that writes as well ends a response by the tokens of its own config
        writers: set[Role] = {writer} if rsd is None else {writer, "student"}
        self.expander = Expander(
            self._make_drawing(student, sampling, rsd, num_topk=num_kept, greedy_first=greedy_first),
            None if student is None or rsd is not None else self._make_scorer(student),
            self._tokenizer,
            end_token_ids=frozenset().union(*(resources.tokenizers[role].end_token_ids for role in writers)),
            max_num_seqs=resources.max_num_seqs,
            usage=resources.usage,
            reservations=resources.reservations,
        )

    def _make_drawing(
        self,
        student: ModelRunner | None,
        sampling: Sampling,
        rsd: ReverseSpeculation | None,
        *,
        num_topk: int,
        greedy_first: bool,
    ) -> Drawing:
        """Return what draws the tokens: the writer alone, or with the student's say. num_topk: kept at each position.

        Raises InputError under rsd where the tokens of the two models are not the same.
        """
        # embeddings are often padded: an id that the tokenizer does not know is never drawn
        vocabulary = self._tokenizer.largest_id + 1
        if rsd is None:
            return WriterDrawing(
                self._writer, sampling, vocabulary=vocabulary, num_topk=num_topk, greedy_first=greedy_first
            )
        assert student is not None
        _check_same_tokens(self._resources, "rsd")
        return ReverseSpeculativeDrawing(rsd, self._writer, student, sampling, vocabulary=vocabulary)

    def _make_scorer(self, student: ModelRunner) -> CandidateScorer | StudentChunkReader:
        """Return what reads complete candidates: the student, or where it writes them itself, the teacher."""
        if student is self._writer:
            return StudentChunkReader(self._resources.runner("teacher"), student, self._resources.usage)
        return CandidateScorer(student, self._reader, self._resources.usage)

    def expand(self, branches: Sequence[Branch], n: int, chunk: Chunk) -> list[list[Branch]]:
        """Sample n candidates of each branch in one batch.

        Raises CapacityError if they do not fit, InputError on a token that the student does not have, ServerError where
        a server does not write them; no page is taken then.
        """
        expansions = [
            Expansion(branch, n, chunk, self._max_new(branch), "the branch" if len(branches) == 1 else f"branch {i}")
            for i, branch in enumerate(branches)
        ]
        misfit = self.expander.pages.find_misfit(expansions)
        if misfit is not None:
            raise CapacityError(f"{expansions[0].label if len(branches) == 1 else 'the branches'}: {misfit}")
        if not self.expander.pages.fits(expansions, collecting=True):
            raise CapacityError(
                f"the candidates need {self.expander.pages.describe_need(expansions)} beside the branches that are "
                "held; drop some, or raise memory_bytes or memory_utilization"
            )
        try:
            self.expander.submit(expansions)
            unfinished = set(expansions)
            while unfinished:
                unfinished.difference_update(self.expander.step())
            for expansion in expansions:
                error = expansion.failed or expansion.unreadable
                if error is not None:
                    kind = ServerError if expansion.failed is not None else InputError
                    raise kind(f"{expansion.label}: {error}")
        except BaseException:
            for expansion in expansions:
                self.expander.cancel(expansion)
            raise
        return [expansion.children for expansion in expansions]

    def _max_new(self, branch: Branch) -> int:
        """Return the maximum number of tokens in a candidate of a branch. Raises CapacityError where there is none."""
        roles: list[Role] = ["teacher", "student"] if branch.prompt.student else ["teacher"]
        limit = UNLIMITED if branch.max_tokens is None else branch.max_tokens
        max_new = self._resources.response_limit(branch.prompt, limit, roles) - branch.length
        if max_new < 1:
            raise CapacityError("the branch has reached the last position of a model")
        return max_new

    def finish_reading(self, branch: Branch) -> None:
        """Have the student read the end of an ended response, and check its tokens (see rereading.py)."""
        finish_reading(self._resources, self._reader, branch)

    def bound_reading(self, branch: Branch, num_tokens: int) -> int:
        """Return how many tokens of the student are reserved for the next tokens that are written to a branch."""
        if not self._reader.reads_bytes:
            return num_tokens
        num_held = len(branch.history_readings[-1].held) if branch.history_readings else 0
        return TOKENS_PER_TOKEN * num_tokens + num_held

    def uses(self, runner: ModelRunner) -> bool:
        """Return whether the candidates of the session take pages of a model's cache."""
        return runner in self.expander.runners

    def free_pages(self, branch: Branch) -> None:
        """Drop the paths of a branch in both caches."""
        for role, runner in self._resources.runners.items():
            state = branch.state(role)
            if state.path is not None:
                runner.tree.drop(state.path)
                state.path = None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of some tokens, without special tokens."""
        return self._tokenizer.decode(token_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids, as criteria see them, of a text in which the names of special tokens are characters."""
        return self._judged_tokenizer.encode_plain(text)

    def chunk_topk(self, branch: Branch) -> TopK | None:
        """Return the writer's most likely tokens along a branch's chunk; None where they are not kept."""
        if self._served is not None:
            return served_topk(branch)
        return chunk_topk(self._writer, branch, self._num_topk)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text that each token of a candidate completes."""
        return self._judged_tokenizer.pieces(token_ids)

    def local_logprob(self, prompt: PromptIds, ids: Sequence[int], windows: Sequence[Window]) -> list[Tensor]:
        """Return the student's log-probabilities of windows of a response (see windows.py), float32."""
        positions = self._resources.runners["student"].decoder.config.max_position_embeddings
        longest = len(prompt.student) + max((end - context for context, _, end in windows), default=0) - 1
        if longest >= positions:  # not a CapacityError, after which the search would wait for room
            raise InputError(
                f"the criterion reads {format_count(longest, 'token')} at once; the student has {positions} positions"
            )
        return self._resources.local_logprob("student", prompt.student, ids, windows)

    def activations(self, prompt: PromptIds, ids: Sequence[int], start: int) -> ActivationMeans:
        """Return the student's activations over the prompt and over ids[start:] (see activations.py)."""
        return self._resources.mean_activations("student", prompt.student, ids, start)


def _check_same_tokens(resources: Resources, method: str) -> None:
    """Raise InputError, which names the method, where an id of the teacher is not the student's: both write."""
    if not resources.reader.is_identity:
        raise InputError(f"{method} needs models whose tokens are the same: {resources.reader.describe()}")
