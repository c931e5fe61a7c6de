"""Counts of the tokens that an engine has processed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Usage:
    """Numbers of tokens that an engine has processed since it was made."""

    sampled_tokens: int = 0
    """Number of tokens sampled by the writing model, those of pruned candidates included."""
    scored_tokens: int = 0
    """Number of candidate tokens scored by the student."""
    prefill_tokens: int = 0
    """Number of prompt tokens computed, over both models; a prompt that is computed again after a suspension counts
    again. The responses whose nodes are read (see nodes.py) count as well."""
    forced_tokens: int = 0
    """Number of tokens put in place of sampled ones, each computed once (see nodes.py)."""
    window_tokens: int = 0
    """Number of tokens that the student computed for criteria with windows of their own, prompts included."""
