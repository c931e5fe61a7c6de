"""Odd model directories, loaded by the engine's decoder and by the training: the same logits, or both refuse."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.toys import VOCAB, edit_json, save_checkpoint
from torch import Tensor

from genssd.distill.train.saving import save_model
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.errors import CheckpointError
from genssd.engine.models.model import Decoder
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.engine.models.transformers_loading import load_model
from genssd.engine.texts.text import Tokenizer

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
IDS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def engine_logits(directory: Path) -> Tensor:
    decoder = Decoder.load(directory, torch.float32, CPU)
    runner = PagedRunner("teacher", directory, decoder, PagePool.for_model(decoder, 20))
    (hidden,) = runner.extend([runner.tree.root()], [IDS[0].tolist()])
    return runner.logits(hidden)


def training_model(directory: Path) -> Any:
    return load_model(directory, Tokenizer(directory), CPU).eval()


@torch.no_grad()
def training_logits(directory: Path) -> Tensor:
    logits: Tensor = training_model(directory)(IDS).logits[0]
    return logits


def edit_tensors(
    directory: Path, change: Callable[[dict[str, Tensor]], object], name: str = "model.safetensors"
) -> None:
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name, metadata={"format": "pt"})


def sharded(directory: Path, **options: Any) -> dict[str, str]:
    """Write a checkpoint in several shards and return the file of each tensor."""
    save_checkpoint(directory, max_shard_size="60KB", **options)
    weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    return weight_map


def set_weight_map(directory: Path, weight_map: dict[str, str], **changes: str) -> None:
    edit_json(directory / INDEX, weight_map={**weight_map, **changes})


# directories that load


def plain(directory: Path) -> None:
    save_checkpoint(directory)


def stale_index_beside_one_file(directory: Path) -> None:
    sharded(directory)
    save_checkpoint(directory.with_name("new"), seed=9)
    shutil.copy(directory.with_name("new") / "model.safetensors", directory)


def stale_index_without_its_shards(directory: Path) -> None:
    stale_index_beside_one_file(directory)
    for file in directory.glob("model-*.safetensors"):
        file.unlink()


def backup_files_beside_the_shards(directory: Path) -> None:
    sharded(directory)
    save_checkpoint(directory.with_name("old"), seed=9)
    for name in ("model-old.safetensors", "model-00009-of-00009.safetensors", "model.safetensors.bak"):
        shutil.copy(directory.with_name("old") / "model.safetensors", directory / name)


def shards_in_a_folder(directory: Path) -> None:
    weight_map = sharded(directory)
    (directory / "parts").mkdir()
    for name in set(weight_map.values()):
        (directory / name).rename(directory / "parts" / name)
    set_weight_map(directory, {name: f"parts/{file}" for name, file in weight_map.items()})


def names_without_prefix(directory: Path) -> None:
    model = save_checkpoint(directory, tie_word_embeddings=True)
    model.model.save_pretrained(directory)
    edit_json(directory / "config.json", architectures=["LlamaForCausalLM"])


def tied_by_the_config_alone(directory: Path) -> None:
    save_checkpoint(directory, tie_word_embeddings=False)
    edit_json(directory / "config.json", tie_word_embeddings=True)


def tied_and_stored_twice(directory: Path) -> None:
    save_checkpoint(directory, tie_word_embeddings=True)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))


def tied_and_stored_as_the_head(directory: Path) -> None:
    save_checkpoint(directory, tie_word_embeddings=True)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))


def tensors_that_nobody_uses(directory: Path) -> None:
    save_checkpoint(directory)
    unused = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.position_ids": torch.arange(9),
        "model.mtp_layers.0.mlp.up_proj.weight": torch.ones(3, 3),
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 3).to(torch.float8_e4m3fn),
        "model.vision_tower.patch.weight": torch.ones(3, 3),
        "visual.blocks.0.attn.qkv.weight": torch.ones(3, 3, dtype=torch.int8),
    }
    edit_tensors(directory, lambda t: t.update(unused))


def half_and_brain_floats(directory: Path) -> None:
    save_checkpoint(directory)

    def change(tensors: dict[str, Tensor]) -> None:
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to((torch.float16, torch.bfloat16, torch.float32)[i % 3])

    edit_tensors(directory, change)


def older_config(directory: Path) -> None:
    save_checkpoint(directory, "qwen2", vocab_size=272, eos_token_id=[256, 257])
    fields = json.loads((directory / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "dtype"):
        fields.pop(name, None)
    fields |= {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "torch.bfloat16", "rms_norm_eps": 1}
    fields |= {
        "initializer_range": None,
        "head_dim": None,
        "use_sliding_window": False,
        "sliding_window": 7,
        "max_window_layers": 1,
    }
    (directory / "config.json").write_text(json.dumps(fields))


def window_of_the_last_layer(directory: Path) -> None:
    save_checkpoint(directory, "qwen2", vocab_size=272, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    edit_json(directory / "config.json", layer_types=None)


def window_without_max_window_layers(directory: Path) -> None:
    save_checkpoint(directory, "qwen3", use_sliding_window=True, sliding_window=9)
    edit_json(directory / "config.json", layer_types=None, max_window_layers=None)


def llama_with_a_window(directory: Path) -> None:
    save_checkpoint(directory)
    edit_json(directory / "config.json", use_sliding_window=True, sliding_window=5, max_window_layers=0)


def older_yarn(directory: Path) -> None:
    save_checkpoint(directory, "qwen3", max_position_embeddings=32)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    edit_json(directory / "config.json", rope_parameters=None, rope_theta=1e4, rope_scaling=scaling)


def fields_of_a_run(directory: Path) -> None:
    save_checkpoint(directory)
    changes: dict[str, Any] = {
        "num_labels": 10**12,
        "return_dict": False,
        "output_attentions": True,
        "fusion_config": 3,
    }
    edit_json(directory / "config.json", **changes, experts_implementation="none", base_model_tp_plan=7)


LOADING = [
    fields_of_a_run,
    plain,
    stale_index_beside_one_file,
    stale_index_without_its_shards,
    backup_files_beside_the_shards,
    shards_in_a_folder,
    names_without_prefix,
    tied_by_the_config_alone,
    tied_and_stored_twice,
    tied_and_stored_as_the_head,
    tensors_that_nobody_uses,
    half_and_brain_floats,
    older_config,
    window_of_the_last_layer,
    window_without_max_window_layers,
    llama_with_a_window,
    older_yarn,
]


@pytest.mark.parametrize("make", LOADING, ids=lambda make: make.__name__)
def test_both_read_the_same_tensors(tmp_path: Path, make: Callable[[Path], None]) -> None:
    directory = tmp_path / "model"
    make(directory)
    expected = training_logits(directory)
    assert expected.std() > 0.05
    torch.testing.assert_close(engine_logits(directory), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [tied_by_the_config_alone, tied_and_stored_as_the_head, older_config, older_yarn])
def test_saving_keeps_what_was_loaded(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model")
    model = training_model(tmp_path / "model")
    save_model(model, Tokenizer(tmp_path / "model"), tmp_path / "saved")
    with torch.no_grad():
        expected = model(IDS).logits[0]
    for logits in (engine_logits, training_logits):
        torch.testing.assert_close(logits(tmp_path / "saved"), expected, atol=1e-4, rtol=0)
    ties = json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert ties is (make is tied_and_stored_as_the_head)


def test_the_new_file_and_not_the_old_shards_is_read(tmp_path: Path) -> None:
    stale_index_beside_one_file(tmp_path / "model")
    assert torch.equal(engine_logits(tmp_path / "model"), engine_logits(tmp_path / "new"))


# directories that are refused


def tensor_in_two_shards(directory: Path) -> None:
    weight_map = sharded(directory)
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    edit_tensors(directory, lambda t: t.update({"model.norm.weight": torch.ones(64)}), other)


def tensor_that_the_index_does_not_name(directory: Path) -> None:
    weight_map = sharded(directory)
    del weight_map["model.norm.weight"]
    edit_json(directory / INDEX, weight_map=weight_map)


def tensor_in_another_shard(directory: Path) -> None:
    weight_map = sharded(directory)
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    edit_json(directory / INDEX, weight_map={**weight_map, "model.norm.weight": other})


def tensor_that_is_only_in_the_index(directory: Path) -> None:
    weight_map = sharded(directory)
    edit_json(directory / INDEX, weight_map={**weight_map, "model.extra.weight": weight_map["model.norm.weight"]})


def shard_outside(path: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        weight_map = sharded(directory)
        outside = directory.with_name("outside.safetensors")
        shutil.copy(directory / weight_map["model.norm.weight"], outside)
        name = path.format(outside)
        moved = {
            tensor: name if file == weight_map["model.norm.weight"] else file for tensor, file in weight_map.items()
        }
        edit_json(directory / INDEX, weight_map=moved)

    return make


def shards_without_index(directory: Path) -> None:
    sharded(directory)
    (directory / INDEX).unlink()


def extra(name: str, *shape: int) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        save_checkpoint(directory)
        edit_tensors(directory, lambda t: t.update({name: torch.ones(shape)}))

    return make


def stored_as(dtype: torch.dtype) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        save_checkpoint(directory)
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(directory, lambda t: t.update({name: t[name].to(dtype)}))

    return make


def pointer(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        if name == INDEX:
            sharded(directory)
        else:
            save_checkpoint(directory)
        (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")

    return make


def with_file(name: str, content: str = "{}", *, weights: bool = True) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        save_checkpoint(directory)
        (directory / name).write_text(content)
        if not weights:
            (directory / "model.safetensors").unlink()

    return make


def with_config(kind: str = "llama", **changes: Any) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        save_checkpoint(directory, kind)
        fields = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(fields))

    return make


def deep_config(directory: Path) -> None:
    save_checkpoint(directory)
    (directory / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


Refused = tuple[Callable[[Path], None], str]
REFUSED: dict[str, Refused] = {
    "twice": (tensor_in_two_shards, r"model-\d+.*safetensors has the tensor model\.norm\.weight a second time"),
    "unnamed": (tensor_that_the_index_does_not_name, r"model-.*has a tensor model\.norm\.weight that .* does not name"),
    "elsewhere": (tensor_in_another_shard, r"model-.*model\.norm\.weight"),
    "index-alone": (tensor_that_is_only_in_the_index, r"model-\S+ has no tensor model\.extra\.weight"),
    "outside": (shard_outside("../outside.safetensors"), r"index\.json places 'model.*\.\./outside"),
    "absolute": (shard_outside("{}"), r"index\.json places 'model.*outside\.safetensors"),
    "endless": (shard_outside("x" * 5000 + ".safetensors"), r"index\.json places 'model.*' in 'xxx"),
    "no-index": (shards_without_index, r"no safetensors weights.*model-00001-of-.*copy the model\.safetensors\.index"),
    "head-bias": (extra("lm_head.bias", VOCAB), r"model\.safetensors has a tensor lm_head\.bias"),
    "bias": (extra("model.layers.0.self_attn.q_proj.bias", 64), r"layers\.0\.self_attn\.q_proj\.bias"),
    "third-layer": (extra("model.layers.2.mlp.up_proj.weight", 96, 64), r"layers\.2\.mlp\.up_proj\.weight"),
    "scale": (extra("model.layers.0.mlp.up_proj.weight_scale", 1), r"up_proj\.weight_scale"),
    **{
        str(dtype): (stored_as(dtype), rf"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight .*type {name}")
        for dtype, name in (
            (torch.int8, "I8"),
            (torch.float8_e4m3fn, "F8_E4M3"),
            (torch.bool, "BOOL"),
            (torch.complex64, "C64"),
            (torch.float64, "F64"),
            (torch.int32, "I32"),
        )
    },
    "lfs-weights": (pointer("model.safetensors"), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    "lfs-index": (pointer(INDEX), r"index\.json is a Git LFS pointer"),
    "lfs-config": (pointer("config.json"), r"config\.json is a Git LFS pointer"),
    "adapter": (with_file("adapter_config.json"), r"adapter_config\.json: merge the adapter into its base model"),
    "gguf": (with_file("model-q4.gguf", "GGUF", weights=False), r"model-q4\.gguf.*take the checkpoint from which"),
    "pickle": (with_file("pytorch_model.bin", weights=False), r"pytorch_model\.bin: pickles are never read"),
    "distributed": (with_file("shard-00000-model-00001-of-00001.safetensors"), r"part of a distributed checkpoint"),
    "weights-field": (with_config(transformers_weights="other.safetensors"), r"transformers_weights is not supported"),
    "quantized": (
        with_config(compression_config={"quant_method": "fp8"}),
        r"quantized weights \(fp8\) are not supported",
    ),
    "layers": (with_config(num_hidden_layers=10**12), r"num_hidden_layers must be at most 10000"),
    "qwen-layers": (with_config("qwen3", num_hidden_layers=10**12, layer_types=None), r"num_hidden_layers"),
    "head-dim": (with_config(head_dim=10**15), r"head_dim must be at most"),
    "odd-head-dim": (with_config(head_dim=15), r"config\.json.*head_dim"),
    "vocabulary": (with_config(vocab_size=10**15), r"vocab_size must be at most"),
    "wide": (with_config(hidden_size=1 << 20), r"shape .* config\.json implies"),
    "boolean-eps": (with_config(rms_norm_eps=True), r"rms_norm_eps must be a number .* not True"),
    "nan-eps": (with_config(rms_norm_eps=float("nan")), r"rms_norm_eps must be a number .* not nan"),
    "boolean-heads": (with_config(num_attention_heads=True), r"num_attention_heads must be a positive integer"),
    "negative": (with_config(hidden_size=-64), r"hidden_size must be a positive integer, not -64"),
    "list": (with_config(vocab_size=[1] * 9999), r"vocab_size must be a positive integer, not \[1, 1"),
    "long-name": (with_config(hidden_act="x" * 5000), r"hidden_act 'xxx.*\.\.\.x*' is not supported"),
    "long-type": (with_config(model_type="x" * 5000), r"model_type 'xxx.*\.\.\.x*'"),
    "tie": (with_config(tie_word_embeddings="yes"), r"tie_word_embeddings"),
    "bias-type": (with_config(attention_bias="no"), r"attention_bias"),
    "long-dtype": (with_config(dtype="x" * 5000), r"config\.json"),
    "theta": (with_config(rope_parameters={"rope_type": "default", "rope_theta": "10000"}), r"rope_theta"),
    "theta-boolean": (with_config(rope_parameters={"rope_type": "default", "rope_theta": True}), r"rope_theta"),
    "factor": (with_config(rope_parameters={"rope_type": "yarn", "factor": 1e30, "rope_theta": 1e4}), r"context of"),
    "layer-types": (with_config("qwen2", layer_types=["full_attention"]), r"layer_types"),
    "layer-kinds": (with_config("qwen2", layer_types=["chunked_attention"] * 2), r"layer_types"),
    "no-window": (with_config("qwen2", layer_types=["sliding_attention"] * 2), r"layer_types has sliding_attention"),
    "huge": (with_config(num_key_value_heads=10**400), r"num_key_value_heads must be at most"),
    "padding": (with_config(pad_token_id=10**6), r"pad_token_id 1000000 is outside the vocabulary of 259"),
    "wrapper": (with_config(text_config={}), r"text_config is not supported in a config of model_type .llama."),
    "deep": (deep_config, r"config\.json is not valid JSON"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_both_refuse_with_one_line(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "model")
    for load in (engine_logits, training_logits):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(tmp_path / "model")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_in_place_of_the_tokenizer(tmp_path: Path, name: str) -> None:
    pointer(name)(tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        Tokenizer(tmp_path / "model")


def test_weights_that_are_no_numbers_are_not_trained(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda t: t["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="NaN or infinite logits"):
        training_logits(tmp_path)


def test_a_tokenizer_that_loses_spaces(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "tokenizer.json", pre_tokenizer={"type": "Whitespace"}, decoder={"type": "Fuse"})
    with pytest.raises(CheckpointError, match=r"loses spaces \('one two three' becomes 'onetwothree'\)"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin", "model.safetensors"])
def test_a_file_in_place_of_a_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=rf"{name} is a file, not a model directory: .*"):
        locate(tmp_path / name)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 5000, f"{tmp_path}/" + "x" * 5000, "x" * 5000 + "/model", "a\0b", "~nobody-here/model"):
        with pytest.raises(CheckpointError, match="does not exist") as caught:
            locate(name)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"no config|no tokenizer|no safetensors"):
        training_logits(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "own_model"])
def test_python_of_a_checkpoint_is_never_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "model"
    save_checkpoint(directory)
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import *\n"
    for module in ("modeling_own", "configuration_own", "tokenization_own"):
        (directory / f"{module}.py").write_text(code)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_json(directory / "config.json", model_type=kind, auto_map=classes)
    tokenizer = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit_json(directory / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="OwnTokenizer")
    questions: list[str] = []

    def answer(prompt: str = "") -> str:
        questions.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    loads: list[Callable[[Path], object]] = [training_logits, Tokenizer]
    if kind == "llama":
        engine_logits(directory)  # the class is transformers' own, so there is nothing to run
    else:
        loads.append(engine_logits)
    for load in loads:
        with pytest.raises(CheckpointError) as caught:
            load(directory)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not questions
