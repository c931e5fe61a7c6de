"""Counts of the tokens that an engine has processed, and of the pages that its caches hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse:
    """How much of an engine's caches is held, over both models."""

    held_pages: int
    """Number of pages that hold tokens."""
    pages: int
    """Number of all pages."""
    held_bytes: int
    """Number of bytes of the held pages."""
    bytes: int
    """Number of bytes of all pages."""


@dataclass(slots=True)
class Usage:
    """Numbers of tokens that an engine has processed since it was made."""

    sampled_tokens: int = 0
    """Number of tokens sampled by the writing model, those of pruned candidates included."""
    discarded_tokens: int = 0
    """Number of tokens that a server wrote after the end of a chunk; they are no part of any candidate."""
    served_from_text: int = 0
    """Number of completions that a server returned without token ids, and whose ids its text leaves no doubt about."""
    scored_tokens: int = 0
    """Number of candidate tokens scored by the student."""
    drifted_responses: int = 0
    """Number of responses whose tokens of a student with another tokenizer, read chunk by chunk, are not those of the
    whole text; each was scored again."""
    prefill_tokens: int = 0
    """Number of prompt tokens computed, over both models; a prompt that is computed again after a suspension counts
    again. The responses whose nodes are read (see nodes.py) count as well."""
    forced_tokens: int = 0
    """Number of tokens put in place of sampled ones, each computed once (see nodes.py)."""
    window_tokens: int = 0
    """Number of tokens that the student computed for criteria with windows of their own, prompts included."""
    computed_tokens: int = 0
    """Number of tokens that the models have computed, both models and all kinds of tokens together."""
    judged_candidates: int = 0
    """Number of candidates of searches that the student has judged."""
    kept_candidates: int = 0
    """Number of these that were kept; the others were pruned."""
    kept_tokens: int = 0
    """Number of tokens in the kept candidates, as the teacher counts them."""
    planned_prompts: int = 0
    """Number of prompts that calls have been asked to write responses to; a fork of `iter_force` counts as a prompt."""
    finished_prompts: int = 0
    """Number of the planned prompts whose responses are complete."""
    planned_tokens: int = 0
    """Largest number of tokens that the planned prompts may take to sample. When a prompt ends, the tokens that it was
    allowed and did not sample are subtracted, so that `planned_tokens - sampled_tokens` are still to come at most."""

    def plan(self, limits: Iterable[int]) -> None:
        """Count prompts that are going to be written to. limits: the most tokens that may be sampled for each."""
        for limit in limits:
            self.planned_prompts += 1
            self.planned_tokens += limit

    def finish(self, limit: int, sampled: int) -> None:
        """Count a planned prompt as complete. limit: as given to `plan`. sampled: number of tokens sampled for it."""
        self.finished_prompts += 1
        self.planned_tokens -= limit - sampled
