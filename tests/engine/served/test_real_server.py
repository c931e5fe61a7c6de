"""A real server, such as vLLM, over a model that is also on disk here.

    export GENSSD_SERVER_URL=http://127.0.0.1:8000/v1 GENSSD_SERVER_MODEL=DIRECTORY
    pytest -s tests/engine/served/test_real_server.py

The server runs the model in float32 (`vllm serve DIRECTORY --dtype float32`).
"""

from __future__ import annotations

import math
import os
from collections import Counter

import pytest
import torch

from genssd import Engine
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.served.options import ServerOptions

URL, MODEL = os.environ.get("GENSSD_SERVER_URL", ""), os.environ.get("GENSSD_SERVER_MODEL", "")
pytestmark = pytest.mark.skipif(not URL or not MODEL, reason="GENSSD_SERVER_URL and GENSSD_SERVER_MODEL name no server")

NEAR_TIE = 1e-3
"""Distance of the two best logits below which two programs may choose differently."""
PROMPTS = [[{"role": "user", "content": f"{17 * i + 3}+{29 * i + 8}"}] for i in range(64)]


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    """The model here, and the one of the server; the same model is the student of both."""
    options = {"dtype": "float32", "memory_bytes": 1 << 28}
    here = Engine.from_pretrained(MODEL, MODEL, **options)  # type: ignore[arg-type]
    served = Engine.from_pretrained(
        URL, MODEL, teacher_tokenizer=MODEL, server=ServerOptions(in_flight=64), **options  # type: ignore[arg-type]
    )  # fmt: skip
    return here, served


def test_greedy_responses_are_those_of_the_model_here_up_to_a_near_tie(engines: tuple[Engine, Engine]) -> None:
    here, served = engines
    changes = {
        "sampling": Sampling(temperature=0.0),
        "candidates": 1,
        "chunk": Chunk(tokens=8, until="\n"),
        "max_tokens": 96,
    }
    pairs = zip(here.select_expand(PROMPTS, **changes), served.select_expand(PROMPTS, **changes), strict=True)  # type: ignore[arg-type]
    ties = compared = differing = 0
    for one, other in pairs:
        mine, theirs = one.best.token_ids, other.best.token_ids
        gaps = greedy_gaps(here, one.prompt_ids, mine)
        tie = next((i for i, gap in enumerate(gaps) if gap < NEAR_TIE), None)
        ties += tie is not None
        compared += len(mine) if tie is None else tie
        differing += mine != theirs
        assert mine[:tie] == theirs[:tie]
        for first, second in zip(one.tree[:2], other.tree[:2], strict=True):
            torch.testing.assert_close(first.teacher_logprob, second.teacher_logprob, atol=1e-3, rtol=1e-3)
    print(f"\n{compared} tokens compared, {ties} responses with a near tie, {differing} responses differ after one")
    assert compared > 1000


def greedy_gaps(engine: Engine, prompt: tuple[int, ...], response: tuple[int, ...]) -> list[float]:
    """The distance of the two best logits at every token, by the most likely tokens of the model here."""
    runner = engine._resources.runner("teacher")
    path = runner.tree.root()
    with torch.inference_mode():
        (hidden,) = runner.extend([path], [[*prompt, *response[:-1]]], last=[len(response)])
        best = runner.logits(hidden).double().topk(2).values
    runner.tree.drop(path)
    return (best[:, 0] - best[:, 1]).tolist()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=20, top_p=0.9), Sampling(min_p=0.05)])
def test_sampled_tokens_follow_the_law_of_the_model_here(engines: tuple[Engine, Engine], sampling: Sampling) -> None:
    """Two samples of the second token after the same first one are compared by a chi-square test."""
    number, prompt = 300, PROMPTS[5]
    counts = [
        Counter(c.token_ids for c in engine.generate([prompt], n=number, max_tokens=2, sampling=sampling, seed=11)[0])
        for engine in engines
    ]
    keys = [key for key in counts[0] + counts[1] if counts[0][key] + counts[1][key] >= 10]
    rests = [number - sum(count[key] for key in keys) for count in counts]
    cells = [[count[key] for count in counts] for key in keys] + ([rests] if sum(rests) >= 10 else [])
    statistic = sum((a - b) ** 2 / (a + b) for a, b in cells)
    degrees = max(len(cells) - 1, 1)
    print(f"\n{sampling}: chi-square {statistic:.1f} with {degrees} degrees of freedom")
    assert statistic < degrees + 4.0 * math.sqrt(2.0 * degrees)


def test_the_most_likely_tokens_are_those_of_the_model_here(engines: tuple[Engine, Engine]) -> None:
    changes = {
        "sampling": Sampling(temperature=0.0),
        "candidates": 1,
        "chunk": Chunk(tokens=16, until=None),
        "max_tokens": 16,
    }
    mine, theirs = (e.select_expand(PROMPTS[:4], teacher_topk=20, **changes) for e in engines)  # type: ignore[arg-type]
    for one, other in zip(mine, theirs, strict=True):
        assert one.best.teacher_topk is not None
        assert other.best.teacher_topk is not None
        covered = one.best.teacher_topk.logprob.double().exp().sum(1)
        print(f"\nprobability of the 20 most likely tokens: least {covered.min():.4f}, mean {covered.mean():.4f}")
        same = (one.best.teacher_topk.ids == other.best.teacher_topk.ids).double().mean()
        assert same > 0.95  # equally likely ones may change places
        torch.testing.assert_close(one.best.teacher_topk.logprob, other.best.teacher_topk.logprob, atol=2e-3, rtol=2e-3)
