"""Flags of every command that its parser takes."""

from __future__ import annotations

FLAGS: dict[str, list[str]] = {
    "demo": ["--threads", "1"],
    "select": ["--teacher", "t", "--student", "s", "--data", "d", "--criterion", "0.5*rsr + ppl(norm='byte')",
               "--calibrate.data", "c", "--chunk.tokens", "9"],
    "score": ["--student", "s", "--data", "d", "--criteria", "lark", "ppl", "--pick.weigh"],
    "reselect": ["--run", "r", "--criterion", "lalp(steps=2)"],
    "export": ["--run", "r"],
    "generate": ["--teacher", "http://host:8000/v1", "--teacher-tokenizer", "t", "--student", "s", "--data", "d"],
    "prefix": ["--student", "s", "--data", "d"],
    "leaf": ["--student", "s", "--teacher", "t", "--data", "d"],
    "train": ["--model-name-or-path", "s", "--data", "d", "--teacher-model-name-or-path", "t", "--kd-ratio", "0.5",
              "--key-attention.weight", "1", "--lmbda", "0.5"],
    "evaluate": ["--model", "m", "--data", "d", "--samples", "2", "--sampling.top-k", "3"],
    "distill": ["--teacher", "t", "--student", "s", "--data", "d", "--train.learning-rate", "1e-4"],
    "diagnose": ["--student", "s", "--teacher", "t", "--data", "d"],
    "report": ["r"],
    "reproduce": ["small", "--arms", "gen-ssd", "--seeds", "2"],
    "tune": ["--student", "s"],
    "doctor": ["--student", "s", "--data", "d"],
    "env": [],
}  # fmt: skip
"""Flags of every command, with models and files that are not there."""
