"""Model directories and prompts that cannot be used: the class of the error, and a message that names the thing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.toys import Pair, edit_json, save_checkpoint, save_model, save_tokenizer

from genssd.engine.common.errors import CapacityError, CheckpointError, GenssdError, InputError, NumericsError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine

MEGABYTE = 1 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A good checkpoint, to be spoilt."""
    save_checkpoint(tmp_path / "model", scale=12.0)
    return tmp_path / "model"


def load(directory: Path | str) -> Engine:
    return Engine.from_pretrained(directory, dtype="float32", memory_bytes=MEGABYTE)


def spoil_tensor(directory: Path, name: str, value: float, row: int | None = None) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if row is None:
        tensors[name].fill_(value)
    else:
        tensors[name][row] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/nowhere does not exist")):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file does not exist"):
        load(tmp_path / "file")


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)


def test_weights_that_are_pickles_are_never_read(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no safetensors weights.*pytorch_model\.bin.*pickles are never read"):
        load(directory)


def test_a_truncated_weight_file(directory: Path) -> None:
    file = directory / "model.safetensors"
    for size in (0, 5, file.stat().st_size // 2):
        file.write_bytes(file.read_bytes()[:size].ljust(min(size, 5), b"\0"))
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
            load(directory)


def test_a_missing_shard(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    load(tmp_path)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"missing: {shards[1].name}"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_shard_index(tmp_path: Path, content: str) -> None:
    save_checkpoint(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"weights are missing or misshapen: backbone\."),
        ({"model_type": "marmot"}, r"transformers has no model_type 'marmot'"),
        ({"model_type": None}, r"transformers has no model_type None"),
        ({"model_type": {"a": 1}}, r"transformers has no model_type \{'a': 1\}"),
        ({"model_type": ["llama"], "text_config": {"model_type": []}}, r"transformers has no model_type \['llama'\]"),
        ({"hidden_size": None}, r"has no field 'hidden_size'"),
        ({"vocab_size": None}, r"has no field 'vocab_size'"),
        ({"num_hidden_layers": "two"}, r"num_hidden_layers must be a positive integer, not 'two'"),
        ({"intermediate_size": 0}, r"intermediate_size must be a positive integer, not 0"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantized weights are not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, r"rope_type 'dynamic' is not supported"),
        ({"rope_parameters": 7}, r"rope_parameters must be an object, not 7"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, r"config\.json.*'factor'"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads|k_proj"),
        ({"eos_token_id": "end"}, r"eos_token_id"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2\."),
        ({"intermediate_size": 95}, r"gate_proj\.weight has shape \(96, 64\), config\.json implies \(95, 64\)"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_used(directory: Path, changes: dict[str, object], message: str) -> None:
    edit_json(directory / "config.json", **changes)
    if "eos_token_id" in changes:
        (directory / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        load(directory)


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_json_object(directory: Path, name: str, content: str) -> None:
    (directory / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(directory)


def test_query_heads_that_are_no_multiple_of_the_key_heads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, num_attention_heads=4, num_key_value_heads=2)
    edit_json(tmp_path / "config.json", num_attention_heads=3)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in list(tensors):
        if "q_proj" in name:
            tensors[name] = tensors[name][:48].clone()
        if "o_proj" in name:
            tensors[name] = tensors[name][:, :48].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        load(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    save_model(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load(tmp_path)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    save_model(tmp_path, vocab_size=200, eos_token_id=1)
    with pytest.raises(CheckpointError, match=r"tokenizer's largest id is 258, but the embedding has 200 rows"):
        load(tmp_path)


def test_models_with_different_tokenizers(directory: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "student")
    tokenizer = json.loads((tmp_path / "student" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer["decoder"] = None  # so that the student cannot read bytes either
    (tmp_path / "student" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"teacher .*model and student .*student have different vocabularies"):
        Engine.from_pretrained(directory, tmp_path / "student", dtype="float32", memory_bytes=MEGABYTE)


def test_a_larger_embedding_with_the_same_tokenizer_is_fine(directory: Path, tmp_path: Path) -> None:
    """Padded embeddings: the teacher never samples an id that the student does not have, nor the other way."""
    save_checkpoint(tmp_path / "wide", vocab_size=320, scale=12.0)
    for teacher, student in ((directory, tmp_path / "wide"), (tmp_path / "wide", directory)):
        engine = Engine.from_pretrained(teacher, student, dtype="float32", memory_bytes=4 * MEGABYTE)
        selections = engine.select_expand(["a", "b"], candidates=4, chunk=Chunk(tokens=12, until=None), max_tokens=12)
        assert max(t for s in selections for r in s.tree for t in r.token_ids) < 259


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, r"dtype 'float8' is not one of auto, float32, bfloat16, float16"),
        ({"memory_utilization": 0.0}, r"memory_utilization must be in \(0, 1\], not 0.0"),
        ({"memory_utilization": 1.5}, r"memory_utilization must be in \(0, 1\], not 1.5"),
        ({"memory_utilization": math.nan}, r"memory_utilization"),
        ({"memory_bytes": 0}, r"memory_bytes|0 bytes"),
        ({"memory_bytes": 100}, r"100 bytes does not hold one page, which takes \d+; raise memory_bytes"),
        ({"memory_bytes": -5}, r"-5"),
        ({"max_num_seqs": 0}, r"max_num_seqs"),
        ({"device": "quantum"}, r"quantum"),
    ],
    ids=str,
)
def test_a_bad_option_of_loading(pair: Pair, options: dict[str, object], message: str) -> None:
    with pytest.raises(GenssdError, match=message):
        Engine.from_pretrained(pair.teacher, **{"dtype": "float32", "memory_bytes": MEGABYTE, **options})  # type: ignore[arg-type]


def test_no_model_at_all() -> None:
    with pytest.raises(InputError, match="needs a teacher, a student or both"):
        Engine.from_pretrained()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("  \n", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([3, 259], "token id 259 is not in the vocabulary"),
        ([-1], "token id -1 is not in the vocabulary"),
        ([1, "a"], "a prompt is a string, a list of chat messages or a list of token ids"),
        ([1.5], "a prompt is a string"),
        (None, "a prompt is a string"),
        (7, "a prompt is a string"),
        ([{"role": "user"}], "needs a string role and a string content"),
        ([{"role": "user", "content": 3}], "needs a string role and a string content"),
    ],
    ids=str,
)
def test_a_prompt_that_cannot_be_used_is_named_by_its_index(engine: Engine, prompt: object, message: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: engine.select_expand(["fine", prompt]),  # type: ignore[list-item]
        lambda: engine.generate(["fine", prompt], max_tokens=2),  # type: ignore[list-item]
        lambda: engine.score(["fine", prompt], ["x", "y"]),  # type: ignore[list-item]
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"prompt 1: .*{message}"):
            call()


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=False)
    save_model(tmp_path)
    with pytest.raises(InputError, match=r"prompt 0: .* has no chat template"):
        load(tmp_path).generate([[{"role": "user", "content": "hi"}]])


def test_messages_that_the_template_rejects(directory: Path) -> None:
    template = directory / "chat_template.jinja"
    assert template.exists()
    template.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        InputError, match=r"prompt 0: the chat template of .* rejects the messages: roles must alternate"
    ):
        load(directory).generate([[{"role": "user", "content": "hi"}]])


def test_messages_are_rendered_with_the_template(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = engine.tokenizer("teacher").encode(text, special=False)
    (rendered,), (given,) = engine.generate([messages], max_tokens=6), engine.generate([ids], max_tokens=6)
    assert rendered == given


def test_a_prompt_longer_than_the_positions(engine: Engine) -> None:
    for call in (engine.select_expand, engine.generate):
        with pytest.raises(
            CapacityError, match=r"prompt 1: the prompt has 600 tokens; the teacher .* has 512 positions"
        ):
            call(["fine", "x" * 600], max_tokens=4)
    (completion,) = engine.generate(["x" * 511], max_tokens=50)[0]
    assert len(completion.token_ids) == 1


def test_a_prompt_longer_than_the_cache(pair: Pair) -> None:
    tight = pair.engine(memory_bytes=4 * 16 * 1024)  # four pages of 16 tokens per model
    message = r"prompt 1: .* 65 tokens; the teacher's .* holds 64 in 4 pages \(memory_bytes=65536\), and 5 pages \(m"
    with pytest.raises(
        CapacityError,
        match=message,
    ):
        tight.generate(["fine", "x" * 65], max_tokens=1)
    with pytest.raises(
        CapacityError, match=r"prompt 0: 4 candidates of up to 30 tokens need 13 pages \(memory_bytes=212992\)"
    ):
        tight.select_expand(["fine"], candidates=4, chunk=Chunk(tokens=30, until=None))
    assert tight.pages_in_use == (0, 8)


FOUR = Chunk(tokens=4, until=None)


def test_a_teacher_with_nan_weights(directory: Path, pair: Pair) -> None:
    spoil_tensor(directory, "model.norm.weight", math.nan)
    engine = Engine.from_pretrained(directory, pair.student, dtype="float32", memory_bytes=MEGABYTE)
    message = rf"the teacher {directory} produced NaN.* for prompt 0, response position 0; check the weights"
    for call in (engine.select_expand, engine.generate):
        with pytest.raises(NumericsError, match=message):
            call(["fine", "too"], max_tokens=8)
        assert engine.pages_in_use[0] == 0
    with pytest.raises(NumericsError, match=rf"the teacher {directory}.*(prompt|response) 0"):
        engine.score(["fine"], ["abc"], model="teacher")
    assert engine.pages_in_use[0] == 0


def test_a_teacher_that_breaks_on_one_token(directory: Path) -> None:
    """Only the prompt that meets the token is named, at the position after it."""
    spoil_tensor(directory, "model.embed_tokens.weight", math.nan, row=120)
    engine = load(directory)
    assert len(engine.generate([[1, 2], [3]], max_tokens=1)) == 2
    with pytest.raises(NumericsError, match="prompt 1, response position 0"):
        engine.generate([[1, 2], [3, 120], [4]], max_tokens=1)
    with pytest.raises(NumericsError, match=r"(prompt|response) 1\b"):
        engine.score([[1, 2], [3], [4]], [[5, 6], [7, 120, 8], [9]], model="teacher")
    assert engine.pages_in_use[0] == 0


def test_a_student_with_nan_weights(directory: Path, pair: Pair) -> None:
    spoil_tensor(directory, "model.layers.1.mlp.down_proj.weight", math.nan)
    engine = Engine.from_pretrained(pair.teacher, directory, dtype="float32", memory_bytes=4 * MEGABYTE)
    with pytest.raises(NumericsError, match=rf"the student {directory}.*prompt 0"):
        engine.select_expand(["fine", "too"], chunk=FOUR, max_tokens=8)
    assert engine.pages_in_use[0] == 0


def test_a_student_that_breaks_on_one_prompt_names_that_prompt_and_the_position(directory: Path, pair: Pair) -> None:
    spoil_tensor(directory, "model.embed_tokens.weight", math.nan, row=120)
    engine = Engine.from_pretrained(pair.teacher, directory, dtype="float32", memory_bytes=4 * MEGABYTE)
    with pytest.raises(NumericsError) as caught:
        engine.select_expand([[1, 2], [3, 120], [4]], chunk=FOUR, max_tokens=4, seed=1)
    message = str(caught.value)
    assert "prompt 1" in message
    assert "prompt 0" not in message
    assert "prompt 2" not in message
    assert "position 0" in message
