"""Scoring against transformers' full forward pass: one shot, in pieces, and as the search does it online."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILY_CASES, save_family
from support.toys import Pair, save_checkpoint, save_tokenizer

from genssd.engine.cache.tree import Path as TreePath
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.paged_runner import Prepared
from genssd.kernels.logprob import TokenStats

Prompts = Callable[[int, int], list[list[int]]]
TOLERANCE = 1e-4  # float32 logits near 10 through two layers; transformers' own sdpa and eager differ by 2e-5


def full_statistics(pair: Pair, role: str, prompt: list[int], response: list[int]) -> dict[str, torch.Tensor]:
    """Statistics of each response token, from transformers' logits in float64."""
    model = pair.teacher_model if role == "teacher" else pair.student_model
    with torch.no_grad():
        z = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    logp = z.log_softmax(dim=1)
    target = torch.tensor(response)[:, None]
    return {
        "logprob": logp.gather(1, target)[:, 0],
        "logsumexp": z.logsumexp(dim=1),
        "entropy": -(logp.exp() * logp).sum(dim=1),
        "sum_p2": logp.exp().square().sum(dim=1),
        "rank": 1 + (z > z.gather(1, target)).sum(dim=1),
    }


def assert_equal(stats: TokenStats, expected: dict[str, torch.Tensor]) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(getattr(stats, name).double(), values.double(), atol=TOLERANCE, rtol=0, msg=name)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_equals_transformers(engine: Engine, pair: Pair, random_prompts: Prompts, role: str) -> None:
    prompts, responses = random_prompts(7, 1), random_prompts(7, 2)
    responses[0], prompts[1] = [17], [3]  # a single token to score, a single token before it
    scored = engine.score(prompts, responses, model=role)  # type: ignore[arg-type]
    for prompt, response, stats in zip(prompts, responses, scored, strict=True):
        assert len(stats) == len(response)
        assert_equal(stats, full_statistics(pair, role, prompt, response))


LLAMAS = [pytest.param(kind, {"vocab_size": 260}, id=kind) for kind in ("llama", "qwen2", "qwen3")]


@pytest.mark.parametrize(("kind", "options"), [*LLAMAS, *FAMILY_CASES])
@torch.inference_mode()
def test_every_family_equals_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """20 random models, with responses that continue beyond every window after prompts that begin alike."""
    save_tokenizer(tmp_path)
    model = save_family(tmp_path, kind, options, scale=3.0)
    engine = Engine.from_pretrained(student=tmp_path, dtype="float32", memory_bytes=1 << 23)
    generator = torch.Generator().manual_seed(8)
    begin, *rest = (torch.randint(0, 250, (n,), generator=generator).tolist() for n in (21, 4, 30, 9, 17, 26))
    prompts, responses = [begin + rest[0], begin + rest[1], rest[2]], [rest[3], rest[4], rest[0] + rest[1]]
    for prompt, response, stats in zip(prompts, responses, engine.score(prompts, responses), strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert logits.std() > 0.02
        expected = logits.log_softmax(1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(stats.logprob, expected, atol=TOLERANCE, rtol=0)


def test_the_sum_over_any_split_is_the_sum_in_one_shot(engine: Engine, random_prompts: Prompts) -> None:
    (prompt,), (response,) = random_prompts(1, 3), [random_prompts(9, 4)[5] + random_prompts(1, 5)[0]]
    (full,) = engine.score([prompt], [response])
    generator = torch.Generator().manual_seed(6)
    for pieces in (2, 3, len(response)):
        cuts = sorted(torch.randperm(len(response) - 1, generator=generator)[: pieces - 1].add(1).tolist())
        bounds = list(zip([0, *cuts], [*cuts, len(response)], strict=True))
        parts = engine.score([prompt + response[:a] for a, _ in bounds], [response[a:b] for a, b in bounds])
        joined = TokenStats.concatenate(parts)
        torch.testing.assert_close(joined.logprob, full.logprob, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(joined.entropy, full.entropy, atol=TOLERANCE, rtol=0)
        assert float(joined.logprob.sum()) == pytest.approx(float(full.logprob.sum()), abs=TOLERANCE * len(response))


def test_what_the_search_recorded_equals_scoring_afterwards(engine: Engine, random_prompts: Prompts) -> None:
    selections = engine.select_expand(
        random_prompts(4, 7), candidates=3, beam=2, chunk=Chunk(tokens=5, until=None), max_tokens=17
    )
    for selection in selections:
        prompt = list(selection.student_prompt_ids)
        finals = [t for t in selection.trajectories if t.token_ids]
        for t, stats in zip(finals, engine.score([prompt] * len(finals), [t.token_ids for t in finals]), strict=True):
            assert len(t.stats) == len(t.token_ids)
            for name in ("logprob", "entropy", "sum_p2", "logsumexp"):
                torch.testing.assert_close(getattr(t.stats, name), getattr(stats, name), atol=TOLERANCE, rtol=0)
            assert torch.equal(t.stats.rank, stats.rank)
        by_trace = {r.trace: r for r in selection.tree}
        for record in selection.tree:  # dropped candidates too
            before = [t for k in range(1, len(record.trace)) for t in by_trace[record.trace[:k]].token_ids]
            (stats,) = engine.score([prompt + before], [record.token_ids])
            torch.testing.assert_close(record.stats.logprob, stats.logprob, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(record.stats.entropy, stats.entropy, atol=TOLERANCE, rtol=0)


def test_the_logprobs_of_generate_equal_scoring(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(3, 8)
    for model in ("teacher", "student"):
        for prompt, completions in zip(
            prompts,
            engine.generate(prompts, n=2, max_tokens=9, model=model),  # type: ignore[arg-type]
            strict=True,
        ):
            ids = [c.token_ids for c in completions]
            for c, stats in zip(completions, engine.score([prompt] * 2, ids, model=model), strict=True):  # type: ignore[arg-type]
                torch.testing.assert_close(torch.tensor(c.logprob), stats.logprob, atol=TOLERANCE, rtol=0)


def test_many_passes_and_a_full_cache_change_nothing(
    pair: Pair, random_prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, responses = random_prompts(9, 9), random_prompts(9, 10)
    expected = pair.engine().score(prompts, responses)
    monkeypatch.setattr("genssd.engine.calls.scoring.MAX_ROWS", 64)
    monkeypatch.setattr("genssd.engine.models.runner.MAX_ROWS", 24)
    tight = pair.engine(memory_bytes=6 * 16 * 1024)  # six pages of 16 tokens per model
    for actual, reference in zip(tight.score(prompts, responses), expected, strict=True):
        torch.testing.assert_close(actual.logprob, reference.logprob, atol=TOLERANCE, rtol=0)
    assert tight.pages_in_use == (0, 12)


def test_a_prompt_of_many_responses_is_computed_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they take several passes."""
    monkeypatch.setattr("genssd.engine.calls.scoring.MAX_ROWS", 50)
    engine = pair.engine()
    runner, counts = engine._resources.runners["student"], []
    prepare = runner.prepare

    def counted(paths: Sequence[TreePath], tokens: Sequence[int], **options: Any) -> Prepared:
        counts.append(sum(tokens))
        return prepare(paths, tokens, **options)

    monkeypatch.setattr(runner, "prepare", counted)
    first, second = list(range(20)), list(range(50, 62))
    responses = [[100 + i, *range(6)] for i in range(12)]
    together = engine.score([first] * 9 + [second] * 3, responses)
    assert len(counts) > 4, "no second pass: the test does not test anything"
    assert sum(counts) == len(first) + len(second) + 12 * 6
    for prompt, response, stats in zip([first] * 9 + [second] * 3, responses, together, strict=True):
        assert torch.equal(stats.logprob, pair.engine().score([prompt], [response])[0].logprob)
    assert engine.pages_in_use[0] == 0


def test_prompts_that_take_turns_in_a_full_cache(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are held for later responses are dropped for the present one."""
    monkeypatch.setattr("genssd.engine.calls.scoring.MAX_ROWS", 64)
    prompts = [[*range(i, i + 30)] for i in (0, 40, 80)] * 4
    responses = [[100 + i, *range(12)] for i in range(12)]
    tight = pair.engine(memory_bytes=6 * 16 * 1024)
    for actual, reference in zip(tight.score(prompts, responses), pair.engine().score(prompts, responses), strict=True):
        torch.testing.assert_close(actual.logprob, reference.logprob, atol=TOLERANCE, rtol=0)
    assert tight.pages_in_use == (0, 12)


def test_text_is_encoded_as_it_is(engine: Engine) -> None:
    ids = engine.tokenizer("student").encode("xyz", special=False)
    (as_text,), (as_ids,) = engine.score(["hello "], ["xyz"]), engine.score(["hello "], [ids])
    assert torch.equal(as_text.logprob, as_ids.logprob)
    assert len(as_text) == 3


def test_bad_requests_are_named(engine: Engine) -> None:
    with pytest.raises(InputError, match="2 prompts but 1 response"):
        engine.score(["a", "b"], ["c"])
    with pytest.raises(InputError, match="response 1 is empty"):
        engine.score(["a", "b"], ["c", ""])
    with pytest.raises(InputError, match=r"response 0: token id 259 is outside"):
        engine.score(["a"], [[1, 259]])
    with pytest.raises(InputError, match=r"response 0: token id -1 is outside"):
        engine.score(["a"], [[-1]])
    with pytest.raises(InputError, match="prompt 1: the prompt is empty"):
        engine.score(["a", ""], ["b", "c"])
    with pytest.raises(CapacityError, match=r"prompt 0 with its response has 512 tokens.*512 positions"):
        engine.score(["a" * 500], ["b" * 13])
    assert len(engine.score(["a" * 500], ["b" * 12])[0]) == 12


def test_a_response_longer_than_the_cache_is_named(pair: Pair) -> None:
    tight = pair.engine(memory_bytes=6 * 16 * 1024)
    with pytest.raises(CapacityError, match=r"prompt 1 with its response has 97 tokens.*holds 96.*memory_bytes"):
        tight.score(["a", "a" * 90], ["b", "b" * 8])
    assert len(tight.score(["a" * 90], ["b" * 7])[0]) == 7


def test_a_mild_model_agrees_to_1e_5(tmp_path: Path) -> None:
    """With logits of an ordinary size, against transformers' full forward and over any chunking."""
    model = save_checkpoint(tmp_path / "mild", "qwen3", scale=2.0)
    engine = Engine.from_pretrained(student=tmp_path / "mild", dtype="float32", memory_bytes=1 << 22)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, 256, (17,), generator=generator).tolist()
    response = torch.randint(0, 256, (60,), generator=generator).tolist()
    with torch.no_grad():
        table = model(torch.tensor([prompt + response])).logits[0].log_softmax(dim=-1)
    expected = table[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
    (full,) = engine.score([prompt], [response])
    torch.testing.assert_close(full.logprob, expected, atol=1e-5, rtol=0)
    for cuts in ([0, 1, 60], [0, 7, 8, 31, 60], list(range(0, 61, 4))):
        spans = list(pairwise(cuts))
        parts = engine.score([prompt + response[:a] for a, _ in spans], [response[a:b] for a, b in spans])
        joined = torch.cat([part.logprob for part in parts])
        torch.testing.assert_close(joined, full.logprob, atol=1e-5, rtol=0)
        assert float(joined.double().mean()) == pytest.approx(float(full.logprob.double().mean()), abs=1e-6)
