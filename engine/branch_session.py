"""What a branch asks of the engine call that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from genssd.engine.candidate import ActivationMeans, Window
from genssd.engine.chunk import Chunk
from genssd.engine.prompt_ids import PromptIds
from genssd.engine.runner import ModelRunner
from genssd.engine.stops import StopStrings
from genssd.kernels.logprob import TopK

if TYPE_CHECKING:
    from genssd.engine.branch import Branch


class BranchSession(Protocol):
    """The operations of the engine that a branch needs."""

    stops: StopStrings
    """Texts at which responses end."""

    def expand(self, branches: Sequence[Branch], n: int, chunk: Chunk) -> list[list[Branch]]: ...

    def finish_reading(self, branch: Branch) -> None: ...

    def bound_reading(self, branch: Branch, num_tokens: int) -> int: ...

    def free_pages(self, branch: Branch) -> None: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def chunk_topk(self, branch: Branch) -> TopK | None: ...

    def pieces(self, token_ids: Sequence[int]) -> list[str]: ...

    def uses(self, runner: ModelRunner) -> bool: ...

    def local_logprob(self, prompt: PromptIds, ids: Sequence[int], windows: Sequence[Window]) -> list[Tensor]: ...

    def activations(self, prompt: PromptIds, ids: Sequence[int], start: int) -> ActivationMeans: ...
