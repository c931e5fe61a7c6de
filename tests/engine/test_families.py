"""Every family of models: our decoder against transformers' logits on random small checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILY_CASES, MISTRAL3, SLIDING, TWO_BASES, save_family
from support.toys import VOCAB, edit_json, save_model, save_tokenizer
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from genssd.engine.checkpoints import weights
from genssd.engine.checkpoints.mxfp4 import dequantize
from genssd.engine.checkpoints.parameters import count_parameters
from genssd.engine.common.errors import CheckpointError
from genssd.engine.families.registry import FAMILIES
from genssd.engine.models.model import Decoder
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.engine.models.transformers_loading import load_model
from genssd.engine.texts.text import Tokenizer
from genssd.kernels import attention, native

PLAIN = ("smollm3", "gemma2", "gemma3", "phi4-mini", "olmo3", "qwen3-moe-some-dense", "gpt-oss")
BFLOAT16 = ("smollm3", "granite", "gemma2", "gemma3", "phi4-mini", "olmo3", "mixtral", "qwen3-moe", "gpt-oss")
FORMAT = {"format": "pt"}


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PagedRunner:
    decoder = Decoder.load(directory, dtype, torch.device("cpu"))
    pool = PagePool.for_model(decoder, 200, 4)
    pool.kv.fill_(torch.nan)  # whatever is read without having been written shows
    return PagedRunner("teacher", directory, decoder, pool)


def test_every_family_has_a_case() -> None:
    others = {"llama", "qwen2", "qwen3"}  # test_model.py
    assert {case.values[0] for case in FAMILY_CASES} | others == set(FAMILIES)


@pytest.mark.parametrize(("kind", "options"), FAMILY_CASES)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    check_logits(tmp_path, kind, options)


@pytest.mark.parametrize(("kind", "options"), [case for case in FAMILY_CASES if case.id in PLAIN])
@torch.inference_mode()
def test_logits_in_plain_torch(
    tmp_path: Path, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor for which there are no native kernels."""
    monkeypatch.setattr(native, "has_native_kernels", lambda: False)
    called: list[int] = []
    reference = attention.paged_attention_reference
    monkeypatch.setattr(
        attention, "paged_attention_reference", lambda *a, **more: called.append(1) or reference(*a, **more)
    )
    check_logits(tmp_path, kind, options)
    assert called


def check_logits(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """In one shot, in pieces, and on branches that fork inside of a page, beyond every window."""
    model = save_family(tmp_path, kind, options)
    ids = torch.randint(0, VOCAB, (1, 70), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits[0]
    assert expected.std() > 0.02
    runner, tokens = load(tmp_path), ids[0].tolist()
    assert count_parameters(runner.decoder.config) == sum(p.numel() for p in model.parameters())

    (hidden,) = runner.extend([runner.tree.root()], [tokens])
    torch.testing.assert_close(runner.logits(hidden), expected, atol=1e-4, rtol=0)

    path = runner.tree.root()
    parts = [runner.extend([path], [tokens[a:b]])[0] for a, b in [(0, 1), (1, 18), (18, 33)]]
    torch.testing.assert_close(runner.logits(torch.cat(parts)), expected[:33], atol=1e-4, rtol=0)
    for t in range(33, 40):
        sibling, fork = runner.tree.fork(path), runner.tree.fork(path)
        step = runner.extend([sibling, fork], [[(tokens[t] + 1) % VOCAB] * 3, [tokens[t]]])[1]
        torch.testing.assert_close(runner.logits(step), expected[t : t + 1], atol=1e-4, rtol=0)
        runner.tree.drop(path)
        runner.tree.drop(sibling)
        path = fork
    stats = runner.decoder.head.score(hidden[:-1], ids[0, 1:])
    logprob = expected[:-1].log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(stats.logprob, logprob, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "options"), [case for case in FAMILY_CASES if case.id in BFLOAT16])
@torch.inference_mode()
def test_bfloat16_is_as_close_as_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = save_family(tmp_path, kind, options, scale=2.0)
    ids = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(2))
    truth = model(ids).logits[0].double()
    model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    reference = (model(ids).logits[0].double() - truth).abs().mean()
    runner = load(tmp_path, torch.bfloat16)
    (hidden,) = runner.extend([runner.tree.root()], [ids[0].tolist()])
    assert (runner.logits(hidden).double() - truth).abs().mean() <= 2 * reference


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
@torch.inference_mode()
def test_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path, kind: str) -> None:
    """Its tensors have the names of either version of transformers, beside those of an encoder."""
    inner, options = {
        "gemma3": ("gemma3_text", {**SLIDING, "rope_parameters": TWO_BASES}),
        "mistral3": ("ministral3", {"rope_parameters": MISTRAL3, "sliding_window": None}),
    }[kind]
    model = save_family(tmp_path, inner, {**options, "tie_word_embeddings": True})
    ids = torch.randint(0, VOCAB, (1, 30), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits[0]
    text = json.loads((tmp_path / "config.json").read_text())
    eos, dtype = text.pop("eos_token_id"), text.pop("dtype")
    whole = {"model_type": kind, "text_config": text, "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "eos_token_id": eos, "dtype": dtype}))
    tensors = load_file(tmp_path / "model.safetensors")
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file({**renamed, "model.vision_tower.a.weight": torch.zeros(2)}, tmp_path / "model.safetensors", FORMAT)
        runner = load(tmp_path)
        assert (runner.decoder.config.eos_token_ids, runner.decoder.config.dtype) == ((eos,), dtype)
        (hidden,) = runner.extend([runner.tree.root()], [ids[0].tolist()])
        torch.testing.assert_close(runner.logits(hidden), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_weights_in_mxfp4_are_read_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    """Against transformers' own conversion, with blocks and scales of every value."""
    generator = torch.Generator().manual_seed(4)
    kind, options = next(case.values for case in FAMILY_CASES if case.id == "gpt-oss")
    model = save_family(tmp_path, kind, options, intermediate_size=96)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj")) and "experts" in name]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 125, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        model.get_parameter(name).copy_(numbers)
        assert torch.equal(dequantize(blocks, scales, torch.float32).transpose(1, 2), numbers)
    save_file(tensors, tmp_path / "model.safetensors", FORMAT)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "mxfp4"})
    ids = torch.randint(0, VOCAB, (1, 30), generator=generator)
    runner = load(tmp_path)
    (hidden,) = runner.extend([runner.tree.root()], [ids[0].tolist()])
    torch.testing.assert_close(runner.logits(hidden), model(ids).logits[0], atol=2e-4, rtol=0)
    with pytest.raises(CheckpointError, match=r"do not read weights in MXFP4.*Mxfp4Config\(dequantize=True\)"):
        load_model(tmp_path, save_and_read_tokenizer(tmp_path), torch.device("cpu"))


def save_and_read_tokenizer(directory: Path) -> Tokenizer:
    save_tokenizer(directory)
    return Tokenizer(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, r"quantized weights \(gptq\) are not supported; use .* without -GPTQ"),
        ({"quant_method": "compressed-tensors"}, r"\(compressed-tensors\) are not supported; use .* without -FP8 or"),
        (
            {"quant_method": "new"},
            r"quantized weights \(new\) are not supported; use the checkpoint that it was made from",
        ),
        ({"bits": 4}, r"quantized weights are not supported; use the checkpoint"),
        ("fp8", r"quantized weights \(fp8\) are not supported; use"),
    ],
)
def test_other_quantized_weights_are_refused_by_name(tmp_path: Path, config: object, message: str) -> None:
    save_model(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=config)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_only_one_layer_is_in_memory_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the tensors that are read and not yet freed."""
    save_family(tmp_path, "mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 6})
    alive: WeakSet[torch.Tensor] = WeakSet()
    most = 0
    read = weights._LazyTensors.__getitem__

    def spy(self: Any, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, sum(t.numel() for t in alive))
        return tensor

    monkeypatch.setattr(weights._LazyTensors, "__getitem__", spy)
    decoder = Decoder.load(tmp_path, torch.bfloat16, torch.device("cpu"))
    norms = 64 * (2 * 6 + 1)
    table = decoder.config.vocab_size * 64
    assert most <= norms + 2 * table  # an expert's matrices are smaller than the tables of the vocabulary
