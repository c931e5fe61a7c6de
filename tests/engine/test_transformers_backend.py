"""Models that transformers computes: logits, branches over copied states, and searches as with the own decoder."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.toys import EOS, VOCAB, Pair, edit_json, save_checkpoint

from genssd.engine.cache.tree import Path as TreePath
from genssd.engine.common.errors import CapacityError, CheckpointError, InputError
from genssd.engine.common.usage import Usage
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.transformers_model import TransformersModel
from genssd.engine.models.transformers_runner import CacheTree, TransformersRunner
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.search.selection import Selection
from genssd.engine.setup.loading import open_runner

Prompts = Callable[[int, int], list[list[int]]]
GATED_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
GATED_DELTA |= {"linear_value_head_dim": 16, "num_hidden_layers": 3}
QWEN35: dict[str, Any] = {**GATED_DELTA, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
CASES = [
    pytest.param("qwen3_5_text", QWEN35, id="qwen3.5"),
    pytest.param("lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}, id="lfm2"),
    pytest.param("stablelm", {}, id="stablelm"),
    pytest.param(
        "exaone4",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9, "sliding_window_pattern": 2},
        id="exaone4",
    ),
    pytest.param("falcon_mamba", {"state_size": 8}, id="falcon-mamba"),
]
TOLERANCE = 5e-5
"""Largest difference of logits, whose standard deviation is about 0.7. Between tokens that are computed together (in
chunks) and one by one (recurrently) those of Qwen3.5 differ by 2e-5, those of the others by 3e-6."""
SEARCH = SearchOptions(
    candidates=3, beam=2, chunk=Chunk(tokens=4, until=None), criterion="ppl(scope='trajectory')", max_tokens=20
)


def load(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(**{"student": directory, "dtype": "float32", "memory_bytes": 1 << 23, **options})


def runner_of(engine: Engine) -> TransformersRunner:
    runner = engine._resources.runners["student"]
    assert isinstance(runner, TransformersRunner)
    return runner


@pytest.mark.parametrize(("kind", "options"), CASES)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """In one shot, in pieces, and on branches that fork at every token, beyond every window."""
    model = save_checkpoint(tmp_path, kind, pad_token_id=None, **options)
    ids = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    expected, tokens = model(ids).logits[0], ids[0].tolist()
    assert 0.3 < expected.std() < 1.5
    engine = load(tmp_path)
    runner = runner_of(engine)
    (hidden,) = runner.extend([runner.tree.root()], [tokens])
    torch.testing.assert_close(runner.logits(hidden), expected, atol=TOLERANCE, rtol=0)

    path = runner.tree.root()
    parts = [runner.extend([path], [tokens[a:b]])[0] for a, b in [(0, 1), (1, 12), (12, 20)]]
    torch.testing.assert_close(runner.logits(torch.cat(parts)), expected[:20], atol=TOLERANCE, rtol=0)
    for t in range(20, 40):
        sibling, fork = runner.tree.fork(path), runner.tree.fork(path)
        step = runner.extend([sibling, fork], [[(tokens[t] + 1) % VOCAB] * 3, [tokens[t]]])[1]
        torch.testing.assert_close(runner.logits(step), expected[t : t + 1], atol=TOLERANCE, rtol=0)
        runner.tree.drop(path)
        runner.tree.drop(sibling)
        path = fork
    runner.tree.check()

    prompt, response = tokens[:7], tokens[7:]
    (stats,) = engine.score([prompt], [response])
    logprob = expected.log_softmax(1)[6:-1].gather(1, ids[0, 7:, None])[:, 0]
    torch.testing.assert_close(stats.logprob, logprob, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_the_company_of_a_row_changes_no_bit_and_long_inputs_are_cut_at_the_same_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genssd.engine.models.runner.MAX_ROWS", 16)
    save_checkpoint(tmp_path, "qwen3_5_text", **QWEN35)
    engine = load(tmp_path)
    runner = runner_of(engine)
    generator = torch.Generator().manual_seed(3)
    long, other = (torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (29, 13))
    (alone,) = runner.extend([runner.tree.root()], [long])
    both = runner.extend([runner.tree.root(), runner.tree.root()], [other, long])
    (prefix,) = runner.extend([runner.tree.root()], [long[:20]], last=[11])
    assert torch.equal(both[1], alone)
    assert torch.equal(prefix[:-4], alone[9:16]), "positions 16 to 19 are a piece of their own"
    path = runner.tree.root()
    pieces = [runner.extend([path], [long[a:b]])[0] for a, b in [(0, 8), (8, 16), (16, 24), (24, 29)]]
    assert torch.equal(torch.cat(pieces), alone)


def test_a_cache_is_copied_when_a_second_path_goes_on_and_freed_with_the_last(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3_5_text", **QWEN35)
    runner = runner_of(load(tmp_path))
    tree = runner.tree

    def held(path: TreePath) -> Any:
        return tree._held[path].cache

    root = tree.root()
    runner.extend([root], [[1, 2, 3]])
    first, second = tree.fork(root), tree.fork(root)
    assert held(first) is held(second) is held(root), "nothing is copied before a path goes on"
    shared = weakref.ref(held(root))
    tree.drop(root)
    runner.extend([first], [[4]])
    assert held(first) is not held(second) is shared()
    runner.extend([second], [[5]])
    assert held(second) is shared(), "the last path takes the cache itself"
    keys = [held(path).layers[1]._parts[0][0] for path in (first, second)]
    assert keys[0] is keys[1], "keys of the common past are held once"
    copied = weakref.ref(held(first))
    tree.drop(first)
    assert copied() is None
    del second  # collected instead of dropped
    gc.collect()
    assert shared() is None
    assert tree.num_free == tree.pool.num_pages


def outcomes(selections: Sequence[Selection]) -> list[Any]:
    return [
        (s.error, [(t.token_ids, t.status, t.trace) for t in s.trajectories], [(r.trace, r.verdict) for r in s.tree])
        for s in selections
    ]


@pytest.fixture(scope="module")
def delegated(pair: Pair) -> Engine:
    """Both models of the pair, which are of the Llama class, in transformers."""
    return pair.engine(backend="transformers")


def test_the_search_is_that_of_the_own_decoder(
    pair: Pair, engine: Engine, delegated: Engine, random_prompts: Prompts
) -> None:
    prompts = random_prompts(4, 5)
    own, other = engine.select_expand(prompts, SEARCH), delegated.select_expand(prompts, SEARCH)
    assert outcomes(own) == outcomes(other)
    for mine, theirs in zip(own, other, strict=True):
        for a, b in zip(mine.tree, theirs.tree, strict=True):
            assert a.score == pytest.approx(b.score, rel=1e-4)
    assert delegated.pages_in_use[0] == 0
    sampled, theirs = (e.generate(prompts[:2], model="student", n=2, max_tokens=12) for e in (engine, delegated))
    assert [[c.token_ids for c in row] for row in sampled] == [[c.token_ids for c in row] for row in theirs]


def test_a_suspended_prompt_comes_back_with_the_same_response(delegated: Engine, random_prompts: Prompts) -> None:
    prompts = [prompt[:12] for prompt in random_prompts(4, 31)]

    def run(num_pages: int) -> tuple[list[Any], Usage]:
        resources, usage = delegated._resources, Usage()
        runners = {
            role: open_runner(role, runner.directory, runner.decoder, num_pages, page_size=3, usage=usage)
            for role, runner in resources.runners.items()
        }
        engine = Engine(replace(resources, runners=runners, usage=usage, reservations={}))
        selections = sorted(engine.iter_select_expand(prompts, SEARCH), key=lambda selection: selection.index)
        for runner in runners.values():
            runner.tree.check()
            assert isinstance(runner.tree, CacheTree)
            assert not runner.tree._held
        return outcomes(selections), usage

    ample, tight = run(2000), run(22)
    assert tight[0] == ample[0]
    assert all(error is None for error, *_ in ample[0])
    assert tight[1].prefill_tokens > ample[1].prefill_tokens, "no prompt was suspended"


def test_the_backend_follows_from_the_model_type(tmp_path: Path, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path / "stablelm", "stablelm")
    caplog.set_level(logging.INFO)
    engine = load(tmp_path / "stablelm")
    (line,) = [record.message for record in caplog.records if "transformers" in record.message]
    assert line.endswith("runs in transformers, one sequence at a time: slower than the engine's own decoder")
    assert "(model_type stablelm)" in line
    assert engine.positions("student") == 512
    assert engine.tokenizer("student").end_token_ids == {EOS}
    caplog.clear()
    load(pair.student)
    assert not [record for record in caplog.records if "transformers" in record.message]
    with pytest.raises(CheckpointError, match=r"model_type 'stablelm' is not supported by the engine's own decoder"):
        load(tmp_path / "stablelm", backend="genssd")
    with pytest.raises(InputError, match="backend"):
        load(pair.student, backend="vllm")


def test_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """As Qwen3.5's checkpoints are: `text_config` is the language model, beside an encoder and further predictions."""
    model = save_checkpoint(tmp_path, "qwen3_5_text", **QWEN35)
    text = {**model.config.to_dict(), "model_type": "qwen3_5_text"}
    edit_json(tmp_path / "config.json", **{name: None for name in text})
    edit_json(tmp_path / "config.json", model_type="qwen3_5", text_config=text, eos_token_id=EOS, dtype="float32")
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model."): tensor for name, tensor in tensors.items()}
    others = {name: torch.zeros(2) for name in ("model.visual.blocks.0.norm1.weight", "mtp.norm.weight")}
    save_file({**renamed, **others}, tmp_path / "model.safetensors", {"format": "pt"})
    runner = runner_of(load(tmp_path))
    ids = torch.arange(9)
    with torch.inference_mode():
        (hidden,) = runner.extend([runner.tree.root()], [ids.tolist()])
        torch.testing.assert_close(runner.logits(hidden), model(ids[None]).logits[0], atol=TOLERANCE, rtol=0)


def test_pages_have_room_for_the_states_of_paths(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3_5_text", **QWEN35)
    runner = runner_of(load(tmp_path))
    model, pool = runner.decoder, runner.tree.pool
    # keys and values of one layer with 2 heads of 16; two layers with states of 4 heads [16, 16] and convolutions
    assert model.kv_bytes_per_token == 2 * 2 * 16 * 4
    assert model.state_bytes == 2 * 4 * (4 * 16 * 16 + (2 * 2 * 16 + 4 * 16) * 4)
    assert pool.page_size * model.kv_bytes_per_token >= model.state_bytes > 0
    assert pool.page_nbytes == pool.page_size * model.kv_bytes_per_token + model.state_bytes
    with pytest.raises(CapacityError, match="does not hold one page"):
        load(tmp_path, memory_bytes=pool.page_nbytes - 1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cohere", {}, r"the head of cohere is more than a matrix product with a softcap or a divisor"),
        ("bert", {}, r"bert"),
        ("rwkv", {"attention_hidden_size": 64}, r"RwkvForCausalLM has no cache object that can be copied"),
    ],
)
def test_models_that_cannot_run_are_refused_in_one_line(
    tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    save_checkpoint(tmp_path, kind, pad_token_id=0, **options)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_encoder_with_a_plain_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that see later tokens differ between a prefix and the whole."""
    save_checkpoint(tmp_path, "stablelm")
    compute = TransformersModel.forward

    def forward(self: TransformersModel, ids_N: torch.Tensor, cache: Any, *, is_first: bool) -> torch.Tensor:
        return compute(self, ids_N, cache, is_first=is_first) + 0.1 * len(ids_N)

    monkeypatch.setattr(TransformersModel, "forward", forward)
    with pytest.raises(CheckpointError, match="depend on later tokens, or on where its cache was copied"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5' is no causal language model"),
        ({"model_type": "unheard-of"}, "transformers has no model_type 'unheard-of'"),
        ({"max_position_embeddings": -3}, "max_position_embeddings must be a positive integer, not -3"),
        ({"num_hidden_layers": 3}, "weights are missing or misshapen"),
        ({"intermediate_size": 100}, "weights are missing or misshapen|cannot be loaded"),
    ],
)
def test_configs_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_checkpoint(tmp_path, "stablelm")
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tensor_that_the_class_does_not_have_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "stablelm", num_hidden_layers=3)
    edit_json(tmp_path / "config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"has a tensor model\.layers\.2\..* that StableLmForCausalLM does not"):
        load(tmp_path)
