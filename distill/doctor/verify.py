"""`genssd doctor --verify`: the engine against transformers, on the user's own checkpoints and prompts.

Of every model the engine writes responses greedily, over its cache, and scores them in one pass. transformers computes
the same tokens from the same files, in float32, in one pass without a cache, and, where the engine computes in another
data type, in that one as well. The engine may be as far from float32 as transformers itself is in its data type, and a
little more; in float32 the two may differ by FLOAT32_LIMIT.

Shapes:  T tokens of a response   V vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genssd.distill.doctor.findings import Finding, Piece
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.model_files import ModelFiles
from genssd.distill.runs.engine_options import EngineOptions
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.amounts import format_bytes, format_count
from genssd.engine.common.errors import GenssdError
from genssd.engine.common.model_choices import Role
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.models.transformers_loading import load_model
from genssd.engine.setup.memory import available_bytes, choose_device, choose_dtype, count_weight_bytes
from genssd.kernels.tuned import name_of

MAX_TOKENS = 32
"""Number of tokens of a response that are compared at most."""
MAX_PROMPTS = 4
"""Number of prompts that are compared at most."""
FLOAT32_LIMIT = 2e-3
"""Largest difference of a log-probability in float32, in nats: both sum the same products in another order."""
MARGIN = 3.0
"""How many times as far from float32 as transformers in its own data type the engine may be."""
FLOOR = {torch.float32: FLOAT32_LIMIT, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Difference in nats that is always allowed, by data type."""
CACHE_BYTES = 1 << 26
"""Size of the cache of the comparison."""
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSequence:
    """A prompt and the engine's response to it, with the engine's log-probability of every token, [T]."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    written: torch.Tensor
    """Log-probabilities by which the tokens were written, one by one over the cache."""
    scored: torch.Tensor
    """Log-probabilities of the same tokens read at once."""


def verify(inputs: Inputs, *, seconds: float) -> list[Finding]:
    """Compare the engine with transformers on every model. seconds: no further prompt is begun after this time."""
    deadline = time.monotonic() + seconds
    share = seconds / max(1, len(inputs.models))
    findings = []
    for model in inputs.models.values():
        findings.append(_verify_model(inputs, model, min(deadline, time.monotonic() + share)))
    return findings


def _verify_model(inputs: Inputs, model: ModelFiles, deadline: float) -> Finding:
    name = f"engine against transformers, {model.title}"
    started = time.monotonic()
    options = inputs.settings.engine or EngineOptions()
    try:
        device = choose_device(options.device)
        directory = locate(model.name)
        dtype = choose_dtype(directory, options.dtype, device)
        needed = sum(count_weight_bytes(directory, torch.float32))
        if needed > (free := available_bytes(device)):
            return Finding(
                name=name,
                level="warning",
                line=f"not compared: the model takes {format_bytes(needed)} in float32, and {format_bytes(free)} are "
                "free",
                fix="verify it on a machine with more memory",
            )
        sequences = write_sequences(directory, model.role, _choose_prompts(inputs, model), options, deadline)
        reference = load_model(directory, model.tokenizer, device)
        finding = compare(sequences, reference, dtype, name)
    except GenssdError as error:
        return Finding(name=name, level="error", line=str(error))
    line = f"{finding.line} ({time.monotonic() - started:.0f} s)"
    return Finding(name=name, level=finding.level, line=line, detail=finding.detail, fix=finding.fix)


def write_sequences(
    directory: Path, role: Role, prompts: Sequence[Sequence[int]], options: EngineOptions, deadline: float
) -> list[WrittenSequence]:
    """Let the engine continue prompts, given as token ids, and score what it wrote. Raises GenssdError."""
    names: Mapping[str, Path] = {role: directory}
    engine = Engine.from_pretrained(
        **names,  # type: ignore[arg-type]
        device=options.device,
        dtype=options.dtype,
        memory_bytes=max(CACHE_BYTES, options.memory_bytes or 0),
        deterministic=options.deterministic,
        threads=options.threads,
        backend=options.backend,
    )
    sequences: list[WrittenSequence] = []
    for prompt_ids in prompts:
        if sequences and time.monotonic() > deadline:
            break
        # two at once, so that they share the prompt's pages and are decoded in a batch
        (completions,) = engine.generate([prompt_ids], model=role, n=2, sampling=GREEDY, max_tokens=MAX_TOKENS)
        for completion in completions:
            (stats,) = engine.score([prompt_ids], [completion.token_ids], model=role)
            sequences.append(
                WrittenSequence(
                    prompt_ids=tuple(prompt_ids),
                    response_ids=tuple(completion.token_ids),
                    written=torch.as_tensor(completion.logprob, dtype=torch.float64),
                    scored=stats.logprob.double().cpu(),
                )
            )
    return sequences


def compare(sequences: Sequence[WrittenSequence], reference: Any, dtype: torch.dtype, name: str) -> Finding:
    """Return how far the engine's log-probabilities are from those of a transformers model, which is in float32.

    dtype: data type of the engine. The reference is converted to it at the end, to see how far transformers itself is.
    """
    expected = [_read_logprobs(reference, sequence) for sequence in sequences]
    allowed = FLOOR[dtype]
    if dtype != torch.float32:
        rounded = reference.to(dtype)
        own = [_read_logprobs(rounded, sequence) for sequence in sequences]
        allowed = max(allowed, MARGIN * max(_difference(a, b) for a, b in zip(own, expected, strict=True)))
    written = max(_difference(s.written, e) for s, e in zip(sequences, expected, strict=True))
    scored = max(_difference(s.scored, e) for s, e in zip(sequences, expected, strict=True))
    tokens = sum(len(sequence.response_ids) for sequence in sequences)
    worst = max(written, scored)
    line = (
        f"log-probabilities of {format_count(tokens, 'token')} in {name_of(dtype)} differ by {worst:.2g} nats at most; "
        f"{allowed:.2g} are allowed"
    )
    detail = (Piece(f"written over the cache: {written:.2g}\nread at once: {scored:.2g}"),)
    if not worst <= allowed:  # also where one is NaN
        return Finding(
            name=name,
            level="error",
            line=line,
            detail=detail,
            fix="take --backend transformers, and report it with the output of `genssd env`",
        )
    return Finding(name=name, level="ok", line=line, detail=detail)


@torch.no_grad()
def _read_logprobs(model: Any, sequence: WrittenSequence) -> torch.Tensor:
    """Return transformers' log-probability of every token of a response, [T] in float64."""
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]], device=model.device)
    logits_TV = model(ids, use_cache=False).logits[0, len(sequence.prompt_ids) - 1 : -1].double().cpu()
    targets_T = torch.tensor(sequence.response_ids)
    logprobs_T: torch.Tensor = logits_TV.log_softmax(dim=-1).gather(1, targets_T[:, None])[:, 0]
    return logprobs_T


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    difference = (one - other).abs().max()
    return float("inf") if difference.isnan() else float(difference)


def _choose_prompts(inputs: Inputs, model: ModelFiles) -> list[list[int]]:
    """Return the first prompts of the data as token ids of a model; a question of our own where there are none."""
    prompts = [ids[model.title] for ids in inputs.prompts.ids.values() if model.title in ids]
    if not prompts and model.role == "student":
        prompts = [list(e.input_ids[: e.num_prompt]) for e in inputs.rows.examples if e.num_prompt]
    if not prompts:
        question = [{"role": "user", "content": "What is 12 + 30?"}]
        prompts = [model.tokenizer.encode_prompt(question if model.tokenizer.chat.exists else "12 + 30 =")]
    longest = model.config.max_position_embeddings - MAX_TOKENS
    return [ids[:longest] for ids in prompts[:MAX_PROMPTS]]
