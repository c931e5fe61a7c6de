"""Reasoning distillation with the student in the loop.

The teacher samples candidate continuations, the student scores each by its own log-probabilities, and only what the
student can learn is expanded. `Engine.select_expand` is that search; the rest of the package feeds it and trains on
what it keeps. Importing this module loads neither torch nor a kernel.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # importing typing takes longer than everything else here
if TYPE_CHECKING:
    from genssd.engine.branch import Branch as Branch
    from genssd.engine.candidate import Candidate as Candidate
    from genssd.engine.candidate import Criterion as Criterion
    from genssd.engine.chat_options import ChatOptions as ChatOptions
    from genssd.engine.chunk import Chunk as Chunk
    from genssd.engine.criteria.likelihood import Perplexity as Perplexity
    from genssd.engine.criterion_names import register_criterion as register_criterion
    from genssd.engine.engine import Engine as Engine
    from genssd.engine.errors import GenssdError as GenssdError
    from genssd.engine.loops import LoopGuard as LoopGuard
    from genssd.engine.sampling import Sampling as Sampling
    from genssd.engine.search_options import SearchOptions as SearchOptions
    from genssd.engine.selection import Selection as Selection
    from genssd.kernels.logprob import TokenStats as TokenStats

    __version__: str

_HOME = {
    "Branch": "genssd.engine.branch",
    "ChatOptions": "genssd.engine.chat_options",
    "Chunk": "genssd.engine.chunk",
    "Candidate": "genssd.engine.candidate",
    "Criterion": "genssd.engine.candidate",
    "Engine": "genssd.engine.engine",
    "GenssdError": "genssd.engine.errors",
    "LoopGuard": "genssd.engine.loops",
    "Perplexity": "genssd.engine.criteria.likelihood",
    "Sampling": "genssd.engine.sampling",
    "SearchOptions": "genssd.engine.search_options",
    "Selection": "genssd.engine.selection",
    "TokenStats": "genssd.kernels.logprob",
    "register_criterion": "genssd.engine.criterion_names",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("genssd")
    if name not in _HOME:
        raise AttributeError(f"module 'genssd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
