"""Checkpoints with any config, index, weight header or tokenizer: loaded, or refused in one line."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import fuzz_settings, limited, mutated_bytes, mutated_file, mutated_json, succeeds_or_refuses
from support.templates import TOOLS
from support.tokenizer_families import QWEN25, build_backend, save_backend
from support.toys import save_model

from genssd.cli import main
from genssd.engine.checkpoints.checkpoint import fingerprint
from genssd.engine.common.errors import GenssdError
from genssd.engine.engine import Engine
from genssd.engine.models.transformers_loading import load_model
from genssd.engine.texts.text import Tokenizer

pytestmark = pytest.mark.fuzz

SMALL = {
    "vocab_size": 288, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "eos_token_id": 265,
}  # fmt: skip
CONFIG_FIELDS = (
    "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "use_sliding_window",
    "max_window_layers", "head_dim", "tie_word_embeddings", "torch_dtype", "dtype", "auto_map", "quantization_config",
    "attention_bias", "mlp_bias", "pad_token_id", "bos_token_id", "eos_token_id", "text_config", "architectures",
    "transformers_version", "hidden_act", "initializer_range", "attention_dropout", "id2label", "num_labels",
    "_attn_implementation", "attn_implementation", "tokenizer_class", "partial_rotary_factor", "is_decoder",
    "use_cache", "pruned_heads", "chunk_size_feed_forward", "output_hidden_states", "return_dict", "model_type",
    "transformers_weights", "_name_or_path", "problem_type", "pretraining_tp", "cross_attention_hidden_size",
)  # fmt: skip
ROPE = (
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0],
     "original_max_position_embeddings": 16},
)  # fmt: skip
TOKENIZER_FIELDS = (
    "tokenizer_class", "add_bos_token", "add_eos_token", "eos_token", "bos_token", "pad_token", "unk_token",
    "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "chat_template", "model_max_length",
    "clean_up_tokenization_spaces", "padding_side", "split_special_tokens", "add_prefix_space", "legacy", "auto_map",
    "vocab_file", "tokenizer_file", "name_or_path", "model_input_names", "processor_class", "backend", "is_local",
)  # fmt: skip


def save_small(directory: Path, kind: str) -> Path:
    """Write a checkpoint of a few kilobytes."""
    directory.mkdir(parents=True)
    save_model(directory, kind, max_shard_size="4KB", **SMALL)
    save_backend(directory, build_backend(QWEN25), "<|im_end|>", TOOLS)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("sharded") / "model", "qwen3")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small checkpoint whose weights are in one file, without shards."""
    directory = save_small(tmp_path_factory.mktemp("single") / "model", "qwen2")
    for file in directory.glob("model*"):
        file.unlink()
    save_model(directory, "qwen2", **SMALL)
    return directory


@contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """Give a file another content for a while."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        yield
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)


def use_model(directory: Path) -> None:
    """Do what commands do with a model, whose checkpoint may be odd: the engine and the training load it."""
    fingerprint(directory)
    engine = Engine.from_pretrained(directory, memory_bytes=1 << 18, device="cpu")
    engine.generate(["ab"], max_tokens=2)
    load_model(directory, engine.tokenizer("teacher"), torch.device("cpu"))


def use_tokenizer(directory: Path) -> None:
    """Do what commands do with a tokenizer."""
    tokenizer = Tokenizer(directory)
    assert tokenizer.end_token_ids is not None
    messages = [{"role": "user", "content": "the e\u0301 <|im_end|> \U0001f600"}]
    for prompt in ("the ink er </", messages):
        ids = tokenizer.encode_prompt(prompt)
        tokenizer.pieces(ids)
        tokenizer.decode(ids)
    tokenizer.encode_plain("<|im_end|> the")
    tokenizer.split_end("a<|im_end|>")


@st.composite
def mutated_tensors(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """Draw a header of a weight file with other types, shapes, names or places of one or two tensors."""
    names = [name for name in fields if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 2))):
        name, other = (draw(st.sampled_from([n for n in names if n in fields])) for _ in range(2))
        entry = fields[name]
        kind = draw(st.sampled_from(["dtype", "shape", "name", "swap", "remove", "metadata"]))
        if kind == "dtype":  # of the same size, mostly
            entry["dtype"] = draw(
                st.sampled_from(["I32", "U32", "F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F64", "X"])
            )
        elif kind == "shape":
            count = math.prod(entry["shape"])
            entry["shape"] = draw(
                st.sampled_from([[count], [1, *entry["shape"]], entry["shape"][::-1], [2, count // 2], []])
            )
        elif kind == "name":
            fields[draw(st.sampled_from([f"model.{name}", name.removeprefix("model."), "a", "", f"{name}.bias"]))] = (
                entry
            )
            fields.pop(name)
        elif kind == "swap":
            fields[name], fields[other] = fields[other], fields[name]
        elif kind == "remove":
            fields.pop(name)
        else:
            fields["__metadata__"] = draw(
                st.sampled_from([{}, {"format": "tf"}, {"format": "pt", "a": "b"}, {"a": "x" * 999}])
            )
    return fields


def base_config(directory: Path) -> dict[str, object]:
    fields: dict[str, object] = json.loads((directory / "config.json").read_text())
    return fields


@fuzz_settings(60, 0.28)
@given(data=st.data())
def test_any_config(single: Path, sharded: Path, data: st.DataObject) -> None:
    directory = data.draw(st.sampled_from([single, sharded]))
    fields = base_config(directory)
    if data.draw(st.booleans()):
        fields["rope_parameters"] = dict(data.draw(st.sampled_from(ROPE)))
    with changed(directory / "config.json", data.draw(mutated_file(fields, CONFIG_FIELDS))):
        succeeds_or_refuses(lambda: use_model(directory))


@fuzz_settings(20, 0.05)
@given(data=st.data())
def test_any_generation_config(single: Path, data: st.DataObject) -> None:
    file = single / "generation_config.json"
    content = data.draw(mutated_file(json.loads(file.read_text()), ("eos_token_id", "temperature", "max_length")))
    with changed(file, content):
        succeeds_or_refuses(lambda: use_model(single))


@fuzz_settings(40, 0.15)
@given(data=st.data())
def test_any_index(sharded: Path, data: st.DataObject) -> None:
    file = sharded / "model.safetensors.index.json"
    with changed(file, data.draw(mutated_file(json.loads(file.read_text()), ("metadata", "weight_map")))):
        succeeds_or_refuses(lambda: use_model(sharded))


@fuzz_settings(40, 0.15)
@given(data=st.data())
def test_any_weight_file(single: Path, data: st.DataObject) -> None:
    """Bits of the header, its length and its fields; the data after it as it is."""
    file = single / "model.safetensors"
    stored = file.read_bytes()
    size = int.from_bytes(stored[:8], "little")
    fields = json.loads(stored[8 : 8 + size])
    kind = data.draw(st.sampled_from(["bytes", "json", "tensor", "tensor", "tensor"]))
    if kind == "bytes":
        content = data.draw(mutated_bytes(stored[: 8 + size])) + stored[8 + size :]
    else:
        changed_fields = data.draw(mutated_json(fields) if kind == "json" else mutated_tensors(fields))
        header = json.dumps(changed_fields).encode()
        content = len(header).to_bytes(8, "little") + header + stored[8 + size :]
    with changed(file, content):
        succeeds_or_refuses(lambda: use_model(single))


@fuzz_settings(60, 0.15)
@given(data=st.data())
def test_any_tokenizer(single: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]))
    file = single / name
    base = json.loads(file.read_text()) if file.exists() else {"eos_token": "<|im_end|>", "pad_token": {"content": "a"}}
    with changed(file, data.draw(mutated_file(base, TOKENIZER_FIELDS))):
        succeeds_or_refuses(lambda: use_tokenizer(single))


INFORMATION = ("genssd: computing with ", "genssd: the student computes in float32")
"""Beginnings of lines on stderr that say how a model is computed."""


@fuzz_settings(12, 0.02)
@given(data=st.data())
def test_the_command_line_ends_in_success_or_with_one_line(
    single: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Exit code 0, or exit code 2 after one line on stderr."""
    out = tmp_path_factory.mktemp("out")
    problems = out / "problems.jsonl"
    problems.write_text('{"prompt": "q", "answer": "1"}\n')
    flags = f"--model {single} --data {problems} --max-tokens 2 --memory-bytes {1 << 18} --output-dir {out / 'run'}"
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]))
    base = json.loads((single / name).read_text())
    errors = io.StringIO()
    code: object = 0
    with changed(single / name, data.draw(mutated_file(base, CONFIG_FIELDS))), redirect_stderr(errors), limited():
        try:
            main(["evaluate", *flags.split()])
        except SystemExit as ended:
            code = ended.code
    printed = [line for line in errors.getvalue().splitlines() if line.startswith("genssd: ")]
    lines = [line for line in printed if not line.startswith(INFORMATION)]
    assert code in (0, 2)
    assert len(lines) == (code == 2)
    assert "Traceback" not in errors.getvalue()


def test_the_base_is_fine(single: Path, sharded: Path, tmp_path: Path) -> None:
    """What is not mutated loads, so the fuzz tests begin with something that works."""
    for directory in (single, sharded):
        use_model(directory)
        use_tokenizer(directory)
    copied = tmp_path / "copy"
    shutil.copytree(single, copied)
    (copied / "config.json").write_text("[")
    with pytest.raises(GenssdError, match=r"config\.json"):
        use_model(copied)
