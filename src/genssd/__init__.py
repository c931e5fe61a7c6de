"""Reasoning distillation with the student in the loop.

The teacher samples candidate continuations, the student scores each by its own log-probabilities, and only what the
student can learn is expanded. `Engine.select_expand` is that search; the rest of the package feeds it and trains on
what it keeps. Importing this module loads neither torch nor a kernel.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # importing typing takes longer than everything else here
if TYPE_CHECKING:
    from genssd.distill.select.turns import TwoWriterCompletion as TwoWriterCompletion
    from genssd.distill.select.turns import WrittenChunk as WrittenChunk
    from genssd.distill.select.two_writer_options import Alternation as Alternation
    from genssd.distill.select.two_writer_options import Relay as Relay
    from genssd.distill.select.two_writers import generate_two_writers as generate_two_writers
    from genssd.distill.select.two_writers import iter_two_writers as iter_two_writers
    from genssd.engine.calls.generation import Completion as Completion
    from genssd.engine.calls.generation import Generation as Generation
    from genssd.engine.calls.nodes import Fork as Fork
    from genssd.engine.calls.nodes import NodeReader as NodeReader
    from genssd.engine.common.errors import CapacityError as CapacityError
    from genssd.engine.common.errors import CheckpointError as CheckpointError
    from genssd.engine.common.errors import GenssdError as GenssdError
    from genssd.engine.common.errors import InputError as InputError
    from genssd.engine.common.errors import NumericsError as NumericsError
    from genssd.engine.common.errors import ServerError as ServerError
    from genssd.engine.common.errors import WorkerError as WorkerError
    from genssd.engine.common.model_choices import Role as Role
    from genssd.engine.common.outcomes import Decision as Decision
    from genssd.engine.common.outcomes import Ending as Ending
    from genssd.engine.common.outcomes import Status as Status
    from genssd.engine.common.outcomes import Verdict as Verdict
    from genssd.engine.common.usage import CacheUse as CacheUse
    from genssd.engine.common.usage import Usage as Usage
    from genssd.engine.criteria.by_step import AslecCasl as AslecCasl
    from genssd.engine.criteria.by_step import AslecDrop as AslecDrop
    from genssd.engine.criteria.by_step import LocalNaturalness as LocalNaturalness
    from genssd.engine.criteria.candidate import ActivationMeans as ActivationMeans
    from genssd.engine.criteria.candidate import Candidate as Candidate
    from genssd.engine.criteria.candidate import Window as Window
    from genssd.engine.criteria.controls import Length as Length
    from genssd.engine.criteria.controls import Random as Random
    from genssd.engine.criteria.criterion import AnyCriterion as AnyCriterion
    from genssd.engine.criteria.criterion import Criterion as Criterion
    from genssd.engine.criteria.criterion import PoolCriterion as PoolCriterion
    from genssd.engine.criteria.criterion import RatioCriterion as RatioCriterion
    from genssd.engine.criteria.criterion_names import register_criterion as register_criterion
    from genssd.engine.criteria.criterion_names import registered_criteria as registered_criteria
    from genssd.engine.criteria.criterion_names import resolve as resolve
    from genssd.engine.criteria.grounding import GroundedActions as GroundedActions
    from genssd.engine.criteria.grounding import TargetedObservationRatio as TargetedObservationRatio
    from genssd.engine.criteria.learning_cost import LearningCost as LearningCost
    from genssd.engine.criteria.learning_gain import Lark as Lark
    from genssd.engine.criteria.likelihood import Perplexity as Perplexity
    from genssd.engine.criteria.likelihood import RankSurprisal as RankSurprisal
    from genssd.engine.criteria.likelihood import RsdAccept as RsdAccept
    from genssd.engine.criteria.likelihood import SurprisalBand as SurprisalBand
    from genssd.engine.criteria.progress import AnswerProgress as AnswerProgress
    from genssd.engine.criteria.reference_answer import RationaleDifficulty as RationaleDifficulty
    from genssd.engine.criteria.teacher import TeacherLogprob as TeacherLogprob
    from genssd.engine.criteria.teacher import TeacherStudentGap as TeacherStudentGap
    from genssd.engine.criteria.verdict import CorrectThenAligned as CorrectThenAligned
    from genssd.engine.criteria.weighted_rank import WeightedRank as WeightedRank
    from genssd.engine.decoding.branch import Branch as Branch
    from genssd.engine.decoding.chunk import Chunk as Chunk
    from genssd.engine.decoding.feed import Feed as Feed
    from genssd.engine.decoding.rewinding import rewind as rewind
    from genssd.engine.decoding.speculation_rules import ReverseSpeculation as ReverseSpeculation
    from genssd.engine.engine import Engine as Engine
    from genssd.engine.models.launches import LaunchRecord as LaunchRecord
    from genssd.engine.models.sampling import Sampling as Sampling
    from genssd.engine.readers.pair_prompts import PairPrompt as PairPrompt
    from genssd.engine.readers.prompt_ids import PromptIds as PromptIds
    from genssd.engine.readers.reading import ByteSpans as ByteSpans
    from genssd.engine.readers.reading import Reader as Reader
    from genssd.engine.readers.reading import Reading as Reading
    from genssd.engine.readers.thinking_pair import ThinkingPair as ThinkingPair
    from genssd.engine.readers.token_map import TokenMap as TokenMap
    from genssd.engine.search.budget import Budget as Budget
    from genssd.engine.search.budget import BudgetName as BudgetName
    from genssd.engine.search.search_options import SearchChanges as SearchChanges
    from genssd.engine.search.search_options import SearchOptions as SearchOptions
    from genssd.engine.search.search_options import Unlearnable as Unlearnable
    from genssd.engine.search.selection import CandidateRecord as CandidateRecord
    from genssd.engine.search.selection import ChunkScore as ChunkScore
    from genssd.engine.search.selection import RoundRecord as RoundRecord
    from genssd.engine.search.selection import Selection as Selection
    from genssd.engine.search.selection import TeacherUse as TeacherUse
    from genssd.engine.search.selection import Trajectory as Trajectory
    from genssd.engine.served.options import ServerOptions as ServerOptions
    from genssd.engine.served.record import ServerRecord as ServerRecord
    from genssd.engine.texts.chat import Messages as Messages
    from genssd.engine.texts.chat_options import ChatOptions as ChatOptions
    from genssd.engine.texts.loops import LoopGuard as LoopGuard
    from genssd.engine.texts.text import Prompt as Prompt
    from genssd.engine.texts.text import Tokenizer as Tokenizer
    from genssd.engine.texts.thinking import PromptEnd as PromptEnd
    from genssd.engine.texts.thinking import ThinkingMode as ThinkingMode
    from genssd.engine.texts.thoughts import ThoughtTags as ThoughtTags
    from genssd.kernels.logprob import TokenStats as TokenStats
    from genssd.kernels.logprob import TopK as TopK

    __version__: str

_NAMES = {
    "genssd.distill.select.two_writer_options": ("Alternation", "Relay"),
    "genssd.distill.select.turns": (
        "TwoWriterCompletion",
        "WrittenChunk",
    ),
    "genssd.distill.select.two_writers": (
        "generate_two_writers",
        "iter_two_writers",
    ),
    "genssd.engine.decoding.branch": ("Branch",),
    "genssd.engine.search.budget": (
        "Budget",
        "BudgetName",
    ),
    "genssd.engine.criteria.candidate": (
        "ActivationMeans",
        "Candidate",
        "Window",
    ),
    "genssd.engine.texts.chat": ("Messages",),
    "genssd.engine.texts.chat_options": ("ChatOptions",),
    "genssd.engine.decoding.chunk": ("Chunk",),
    "genssd.engine.criteria.by_step": (
        "AslecCasl",
        "AslecDrop",
        "LocalNaturalness",
    ),
    "genssd.engine.criteria.controls": (
        "Length",
        "Random",
    ),
    "genssd.engine.criteria.grounding": (
        "GroundedActions",
        "TargetedObservationRatio",
    ),
    "genssd.engine.criteria.learning_cost": ("LearningCost",),
    "genssd.engine.criteria.learning_gain": ("Lark",),
    "genssd.engine.criteria.likelihood": (
        "Perplexity",
        "RankSurprisal",
        "RsdAccept",
        "SurprisalBand",
    ),
    "genssd.engine.criteria.progress": ("AnswerProgress",),
    "genssd.engine.criteria.reference_answer": ("RationaleDifficulty",),
    "genssd.engine.criteria.teacher": (
        "TeacherLogprob",
        "TeacherStudentGap",
    ),
    "genssd.engine.criteria.verdict": ("CorrectThenAligned",),
    "genssd.engine.criteria.criterion": (
        "AnyCriterion",
        "Criterion",
        "PoolCriterion",
        "RatioCriterion",
    ),
    "genssd.engine.criteria.weighted_rank": ("WeightedRank",),
    "genssd.engine.criteria.criterion_names": (
        "register_criterion",
        "registered_criteria",
        "resolve",
    ),
    "genssd.engine.engine": ("Engine",),
    "genssd.engine.common.errors": (
        "CapacityError",
        "CheckpointError",
        "GenssdError",
        "InputError",
        "NumericsError",
        "ServerError",
        "WorkerError",
    ),
    "genssd.engine.decoding.feed": ("Feed",),
    "genssd.engine.calls.generation": (
        "Completion",
        "Generation",
    ),
    "genssd.engine.models.launches": ("LaunchRecord",),
    "genssd.engine.texts.loops": ("LoopGuard",),
    "genssd.engine.calls.nodes": (
        "Fork",
        "NodeReader",
    ),
    "genssd.engine.common.outcomes": (
        "Decision",
        "Ending",
        "Status",
        "Verdict",
    ),
    "genssd.engine.readers.pair_prompts": ("PairPrompt",),
    "genssd.engine.readers.prompt_ids": ("PromptIds",),
    "genssd.engine.readers.reading": ("ByteSpans", "Reader", "Reading"),
    "genssd.engine.decoding.speculation_rules": ("ReverseSpeculation",),
    "genssd.engine.common.model_choices": ("Role",),
    "genssd.engine.decoding.rewinding": ("rewind",),
    "genssd.engine.models.sampling": ("Sampling",),
    "genssd.engine.search.search_options": (
        "SearchChanges",
        "SearchOptions",
        "Unlearnable",
    ),
    "genssd.engine.search.selection": (
        "CandidateRecord",
        "ChunkScore",
        "RoundRecord",
        "Selection",
        "TeacherUse",
        "Trajectory",
    ),
    "genssd.engine.served.options": ("ServerOptions",),
    "genssd.engine.served.record": ("ServerRecord",),
    "genssd.engine.texts.text": (
        "Prompt",
        "Tokenizer",
    ),
    "genssd.engine.texts.thinking": (
        "PromptEnd",
        "ThinkingMode",
    ),
    "genssd.engine.readers.thinking_pair": ("ThinkingPair",),
    "genssd.engine.texts.thoughts": ("ThoughtTags",),
    "genssd.engine.readers.token_map": ("TokenMap",),
    "genssd.engine.common.usage": (
        "CacheUse",
        "Usage",
    ),
    "genssd.kernels.logprob": (
        "TokenStats",
        "TopK",
    ),
}
"""Public names by the module that they are imported from when they are first used."""
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("genssd")
    if name not in _HOME:
        raise AttributeError(f"module 'genssd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
