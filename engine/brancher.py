"""What one call gives its branches of the engine: an expander over the models, and the student's eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from genssd.engine.branch import Branch, ModelState, PromptIds
from genssd.engine.candidate import Window
from genssd.engine.chunk import Chunk
from genssd.engine.errors import CapacityError, InputError
from genssd.engine.expander import Expander, Expansion, Promises, Usage
from genssd.engine.reverse_speculation import ReverseSpeculation, ReverseSpeculator
from genssd.engine.runner import ModelRunner, Role
from genssd.engine.sampling import Sampling
from genssd.engine.text import Tokenizer
from genssd.engine.windows import local_logprob
from genssd.kernels.logprob import TopK


class EngineBrancher:
    """The `Brancher` of branches that an engine makes; holds the expander of one call."""

    def __init__(
        self,
        runners: Mapping[Role, ModelRunner],
        tokenizers: Mapping[Role, Tokenizer],
        sampling: Sampling,
        writer: Role,
        *,
        scored: bool,
        rsd: ReverseSpeculation | None,
        topk: int,
        max_batch: int,
        usage: Usage,
        promises: Promises,
    ) -> None:
        self._runners = runners
        self._tokenizer = tokenizers[writer]
        self._usage = usage
        writers: list[Role] = [writer] if rsd is None else [writer, "student"]
        self.expander = (Expander if rsd is None else partial(ReverseSpeculator, rsd))(
            runners[writer],
            runners["student"] if scored else None,
            self._tokenizer,
            # a student that writes, too, may end as its own config says
            eos_token_ids=frozenset().union(*(tokenizers[role].end_token_ids for role in writers)),
            # embeddings are often padded: what the tokenizer does not know is never drawn
            vocabulary=self._tokenizer.largest_id + 1,
            sampling=sampling,
            max_batch=max_batch,
            usage=usage,
            promises=promises,
            topk=topk,
        )

    def expand(self, branch: Branch, n: int, chunk: Chunk) -> list[Branch]:
        roles: list[Role] = ["teacher", "student"] if branch.prompt.student else ["teacher"]
        room = response_limit(self._runners, branch.prompt, 1 << 62, roles) - branch.length
        if room < 1:
            raise CapacityError("the branch has reached the last position of a model")
        expansion = Expansion(branch, n, chunk, room, "the branch")
        check_fits(self.expander, expansion)
        if not self.expander.fits([expansion]):
            raise CapacityError(
                "the candidates do not fit into the key-value cache beside the branches that are held; drop some"
            )
        self.expander.submit(expansion)
        try:
            while not self.expander.step():
                pass
        except BaseException:
            self.expander.cancel(expansion)
            raise
        return expansion.kids

    def drop_paths(self, branch: Branch) -> None:
        states: dict[Role, ModelState] = {"teacher": branch.teacher, "student": branch.student}
        for role, state in states.items():
            if state.path is not None:
                self._runners[role].tree.drop(state.path)
                state.path = None

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode_plain(text)

    def teacher_topk(self, branch: Branch) -> TopK | None:
        return self.expander.teacher_topk(branch)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return self._tokenizer.pieces(token_ids)

    def local_logprob(self, prompt: PromptIds, ids: Sequence[int], windows: Sequence[Window]) -> list[Tensor]:
        runner = self._runners["student"]
        positions = runner.decoder.config.max_position_embeddings
        longest = len(prompt.student) + max((end - context for context, _, end in windows), default=0) - 1
        if longest >= positions:  # no lack of cache, which would be waited for
            raise InputError(f"the criterion reads {longest} tokens at once; the student has {positions} positions")
        return counted_logprob(runner, self._usage, prompt.student, ids, windows)


def counted_logprob(
    runner: ModelRunner, usage: Usage, prompt_ids: Sequence[int], ids: Sequence[int], windows: Sequence[Window]
) -> list[Tensor]:
    """`local_logprob`, with what it computes added to the usage."""
    found = local_logprob(runner, prompt_ids, ids, windows)
    # the last token of a window is predicted, not read
    usage.window_tokens += len(prompt_ids) + sum(end - context - 1 for context, _, end in windows)
    return found


def response_limit(
    runners: Mapping[Role, ModelRunner], prompt: PromptIds, max_tokens: int, roles: Sequence[Role]
) -> int:
    """max_tokens, or what the positions of the models leave."""
    used = {"teacher": len(prompt.teacher), "student": len(prompt.student)}
    room = [runners[role].decoder.config.max_position_embeddings - used[role] for role in roles]
    return min(max_tokens, *room)


def check_fits(expander: Expander, expansion: Expansion) -> None:
    """Raise CapacityError when an expansion would not fit into an otherwise empty cache."""
    missing = expander.missing_pages(expansion)
    if missing:
        raise CapacityError(
            f"{expansion.label}: {expansion.n} candidates of up to {expansion.longest} tokens need {missing} pages "
            "more than the key-value cache has; raise memory_bytes or memory_utilization, or ask for fewer or shorter "
            "ones"
        )
