"""Our decoder against transformers' logits on random small checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.toys import VOCAB, edit_json, save_checkpoint, save_model

from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.parameters import parameter_shapes
from genssd.engine.checkpoints.weights import read_tensors
from genssd.engine.common.errors import CheckpointError
from genssd.engine.models import runner as runners
from genssd.engine.models.model import Decoder
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONGROPE |= {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0]}

CONFIGS = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, id="llama-tied-ungrouped"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}, id="llama-biases-mqa"),
    pytest.param("llama", {"rope_parameters": LLAMA3}, id="llama3-rope"),
    pytest.param("llama", {"rope_parameters": LINEAR, "max_shard_size": "60KB"}, id="linear-rope-sharded"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}, id="qwen2-tied-yarn"),
    pytest.param("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, id="qwen2-window"),
    pytest.param("qwen2", {"rope_parameters": LONGROPE}, id="qwen2-longrope"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param("qwen3", {"tie_word_embeddings": True, "head_dim": 32, "attention_bias": True}, id="qwen3-wide-heads"),
]


def load(directory: Path, page_size: int = 4) -> PagedRunner:
    decoder = Decoder.load(directory, torch.float32, torch.device("cpu"))
    pool = PagePool.for_model(decoder, 200, page_size)
    pool.kv.fill_(torch.nan)  # whatever is read without having been written shows
    return PagedRunner("teacher", directory, decoder, pool)


@pytest.mark.parametrize(("kind", "options"), CONFIGS)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = save_model(tmp_path, kind, **options)
    ids = torch.randint(0, VOCAB, (1, 70), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits[0]
    assert expected.std() > 0.05
    runner, tokens = load(tmp_path), ids[0].tolist()

    one_shot = runner.tree.root()
    (hidden,) = runner.extend([one_shot], [tokens])
    torch.testing.assert_close(runner.logits(hidden), expected, atol=1e-4, rtol=0)

    chunked = runner.tree.root()
    parts = [runner.extend([chunked], [tokens[a:b]])[0] for a, b in [(0, 1), (1, 18), (18, 33), (33, 70)]]
    torch.testing.assert_close(runner.logits(torch.cat(parts)), expected, atol=1e-4, rtol=0)

    # step by step on forked branches: siblings write other tokens in between, old branches are dropped
    path = runner.tree.root()
    runner.extend([path], [tokens[:30]])
    for t in range(30, 60):
        sibling = runner.tree.fork(path)
        fork = runner.tree.fork(path)
        step = runner.extend([sibling, fork], [[(tokens[t] + 1) % VOCAB] * 3, [tokens[t]]])[1]
        torch.testing.assert_close(runner.logits(step), expected[t : t + 1], atol=1e-4, rtol=0)
        runner.tree.drop(path)
        runner.tree.drop(sibling)
        runner.tree.check()
        path = fork


@torch.inference_mode()
def test_a_long_input_goes_in_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path, "llama")
    monkeypatch.setattr("genssd.engine.models.runner.MAX_ROWS", 16)
    ids = torch.randint(0, VOCAB, (2, 41))
    runner = load(tmp_path)
    hidden = runner.extend([runner.tree.root(), runner.tree.root()], [ids[0].tolist(), ids[1, :9].tolist()])
    torch.testing.assert_close(runner.logits(hidden[0]), model(ids[:1]).logits[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(runner.logits(hidden[1]), model(ids[1:, :9]).logits[0], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_last_states_alone_have_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the input is cut into passes of which some give none, and what comes later reads the same cache."""
    save_model(tmp_path, "qwen3")
    monkeypatch.setattr(runners, "MAX_ROWS", 16)
    decoder = Decoder.load(tmp_path, torch.float32, torch.device("cpu"))
    ids = [[(7 * i + j) % VOCAB for j in range(count)] for i, count in enumerate((30, 1, 9))]

    def states(last: list[int] | None) -> list[torch.Tensor]:
        runner = PagedRunner("teacher", tmp_path, decoder, PagePool.for_model(decoder, 20))
        paths = [runner.tree.root() for _ in ids]
        return [*runner.extend(paths, ids, last=last), *runner.extend(paths, [[5, 6]] * 3, last=[9] * 3)]

    full = states(None)
    for last in ([1, 1, 1], [9, 1, 0], [30, 5, 8], [0, 0, 0]):
        part = states(last)
        for i, count in enumerate(last):
            assert torch.equal(part[i], full[i][max(0, len(ids[i]) - count) :])
        assert all(torch.equal(one, other) for one, other in zip(part[3:], full[3:], strict=True))


@torch.inference_mode()
def test_bfloat16_is_as_close_as_transformers(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", scale=2.0)
    ids = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(2))
    truth = model.double()(ids).logits[0]
    reference = (model.bfloat16()(ids).logits[0].double() - truth).abs().mean()
    decoder = Decoder.load(tmp_path, torch.bfloat16, torch.device("cpu"))
    runner = PagedRunner("teacher", tmp_path, decoder, PagePool.for_model(decoder, 20))
    (hidden,) = runner.extend([runner.tree.root()], [ids[0].tolist()])
    assert (runner.logits(hidden).double() - truth).abs().mean() <= 2 * reference


def test_old_style_rope_fields_mean_the_same(tmp_path: Path) -> None:
    import json

    save_model(tmp_path, "llama", rope_parameters=LLAMA3)
    new = ModelConfig.load(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ModelConfig.load(tmp_path) == new


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 64),
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (LLAMA3, 64),
        (LONGROPE, 64),
    ],
    ids=str,
)
def test_the_context_length_is_that_of_vllm(tmp_path: Path, scaling: dict[str, Any] | None, context: int) -> None:
    """vLLM: linear scaling multiplies max_position_embeddings, YaRN the original length; others change nothing."""
    save_model(tmp_path, "qwen3", max_position_embeddings=64)
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=1e4, rope_scaling=scaling)
    assert ModelConfig.load(tmp_path).max_position_embeddings == context


@pytest.mark.parametrize(("kind", "options"), CONFIGS)
def test_the_parameters_are_those_of_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = save_model(tmp_path, kind, **options)
    assert parameter_shapes(ModelConfig.load(tmp_path)) == {n: tuple(p.shape) for n, p in model.state_dict().items()}


@pytest.mark.parametrize("content", ['{"a": 1, "a": 1}', "[]", '{"__metadata__": 3}', '{"a": {}}', "[" * 100_000])
def test_a_header_that_is_none(tmp_path: Path, content: str) -> None:
    save_model(tmp_path)
    body = content.encode()
    (tmp_path / "model.safetensors").write_bytes(len(body).to_bytes(8, "little") + body)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
        Decoder.load(tmp_path, torch.float32, torch.device("cpu"))


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_checkpoint(tmp_path)
    tensors = read_tensors(tmp_path, torch.float32, torch.device("cpu"))
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        Decoder.load(tmp_path, torch.float32, torch.device("cpu"))
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": lost[:5].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \(5, 64\)"):
        Decoder.load(tmp_path, torch.float32, torch.device("cpu"))
