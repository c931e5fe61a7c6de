"""Activations of the last up projection and the learning cost, against transformers with a hook, pair by pair."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import EXPERTS
from support.toys import Pair, save_checkpoint

from genssd.engine.common.errors import InputError
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.learning_cost import LearningCost
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.runner import MAX_ROWS
from genssd.engine.search.selection import CandidateRecord, Selection
from genssd.kernels.logprob import TokenStats


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def learning_cost(
    model: Any, prompt: list[int], ids: list[int], start: int, special: set[int], w: float = 0.5
) -> float:
    """The formula by all pairs of tokens, in float64, from transformers."""
    seen: list[torch.Tensor] = []
    hook = model.model.layers[-1].mlp.up_proj.register_forward_hook(lambda m, i, o: seen.append(o[0].double()))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0].double()
    hook.remove()
    units = seen[0] / seen[0].norm(dim=1, keepdim=True)
    nll = -logits.log_softmax(1)[:-1].gather(1, torch.tensor((prompt + ids)[1:])[:, None])[:, 0]
    everything = list(enumerate(prompt + ids))
    question = [t for t, token in everything if t < len(prompt) and token not in special]
    answer = [t for t, token in everything if t >= len(prompt) + start and token not in special]
    own = (units[answer] @ units[answer].T).mean()
    shared = (units[answer] @ units[question].T).mean()
    of_answer = nll[[t - 1 for t in answer]].mean()
    of_question = nll[[t - 1 for t in question if t]].mean()
    return float((1 - w) * of_answer**2 * own + w * of_answer * of_question * shared)


def of_engine(engine: Engine, prompt: list[int], ids: list[int], start: int) -> Candidate:
    (stats,) = engine.score([prompt], [ids])
    return Candidate(
        token_ids=tuple(ids[start:]),
        stats=stats[start:],
        history_ids=tuple(ids[:start]),
        history=stats[:start],
        final=True,
        finished=False,
        activations=partial(engine.mean_activations, prompt),
    )


@pytest.mark.parametrize("backend", ["genssd", "transformers"])
def test_the_learning_cost_is_that_of_transformers(pair: Pair, backend: str) -> None:
    engine = pair.engine(backend=backend)
    special = set(engine.tokenizer("student").hf.all_special_ids)
    assert special
    for seed, (num_prompt, num_ids, start) in enumerate([(9, 20, 0), (30, 40, 25), (2, 3, 2), (12, 30, 0)]):
        prompt, ids = random_ids(num_prompt, seed), random_ids(num_ids, 100 + seed)
        if seed == 3:  # special tokens count for nothing, wherever they are
            prompt[4], ids[7], ids[-1] = (min(special),) * 3
        for weight in (0.0, 0.5, 1.0):
            expected = learning_cost(pair.student_model, prompt, ids, start, special, weight)
            made = of_engine(engine, prompt, ids, start)
            assert LearningCost(prompt_weight=weight).score(made) == pytest.approx(expected, rel=1e-4), (seed, weight)
    assert engine.pages_in_use[0] == 0


def test_a_text_is_read_in_pieces(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pair.engine()
    prompt, ids = random_ids(50, 1), random_ids(70, 2)
    whole = engine.mean_activations(prompt, ids, 10)
    monkeypatch.setattr("genssd.engine.models.runner.MAX_ROWS", 32)
    parts = engine.mean_activations(prompt, ids, 10)
    assert MAX_ROWS > 120
    torch.testing.assert_close(parts.prompt_F, whole.prompt_F, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts.response_F, whole.response_F, atol=1e-6, rtol=1e-5)
    assert parts.prompt_nll == pytest.approx(whole.prompt_nll, rel=1e-5)


def test_the_search_ranks_by_the_learning_cost(pair: Pair, engine: Engine) -> None:
    """Every candidate's value is that of transformers over its chunk, after the prompt and its history."""
    special = set(engine.tokenizer("student").hf.all_special_ids)
    (selection,) = engine.select_expand(
        [random_ids(9, 5)], candidates=3, beam=2, chunk=Chunk(tokens=8, until=None), max_tokens=24, criterion="scas",
        loop_guard=None,
    )  # fmt: skip
    values = {}
    for record in selection.tree:
        history = [token for one in ancestors(selection, record) for token in one.token_ids]
        ids = [*history, *record.token_ids]
        start = len(history)
        if record.ended != "chunk":
            start = max(0, min(start, len(ids) - Chunk(tokens=8, until=None).shortest))
        prompt = list(selection.student_prompt_ids)
        if all(token in special for token in ids[start:]):
            continue
        values[record.trace] = learning_cost(pair.student_model, prompt, ids, start, special)
        assert record.score == pytest.approx(values[record.trace], rel=1e-3)
    kept = [values[r.trace] for r in selection.tree if r.verdict == "kept" and len(r.trace) == 1]
    beaten = [values[r.trace] for r in selection.tree if r.verdict == "beaten" and len(r.trace) == 1]
    assert kept
    assert beaten
    assert max(kept) < min(beaten)


def ancestors(selection: Selection, record: CandidateRecord) -> list[CandidateRecord]:
    by_trace = {one.trace: one for one in selection.tree}
    return [by_trace[record.trace[:depth]] for depth in range(1, len(record.trace))]


def test_what_cannot_be_read_is_refused(pair: Pair, engine: Engine) -> None:
    with pytest.raises(InputError, match="start must lie in the response of 2 tokens, not 2"):
        engine.mean_activations([1, 2], [3, 4], 2)
    with pytest.raises(InputError, match="reads 518 tokens at once; the student has 512 positions"):
        engine.mean_activations(random_ids(509, 0), random_ids(9, 1))
    assert engine.pages_in_use[0] == 0
    with pytest.raises(InputError, match="prompt_weight must lie in"):
        LearningCost(prompt_weight=1.5)
    made = of_engine(engine, [5, 6], [7, 8, 9], 0)
    with pytest.raises(InputError, match="scas runs the student"):
        LearningCost().score(dataclasses.replace(made, activations=None))


def test_what_the_student_cannot_write_costs_most(engine: Engine) -> None:
    made = of_engine(engine, [5, 6], [7, 8, 9], 0)
    impossible = dataclasses.replace(made.stats, logprob=torch.tensor([-1.0, -math.inf, -1.0]))
    assert LearningCost().score(dataclasses.replace(made, stats=impossible)) == math.inf
    special = min(engine.tokenizer("student").hf.all_special_ids)
    only_special = dataclasses.replace(made, token_ids=(special,), stats=TokenStats.concatenate([made.stats[:1]]))
    assert LearningCost().score(only_special) == math.inf


@pytest.mark.parametrize("backend", ["genssd", "transformers"])
def test_a_model_of_experts_has_no_single_up_projection(tmp_path: Path, backend: str) -> None:
    save_checkpoint(tmp_path / "m", "mixtral", **EXPERTS)
    engine = Engine.from_pretrained(None, tmp_path / "m", dtype="float32", memory_bytes=1 << 22, backend=backend)
    with pytest.raises(InputError, match=r"the last layer has no single up projection \(mlp.up_proj\)"):
        engine.mean_activations([1, 2, 3], [4, 5])
    assert engine.pages_in_use[0] == 0
