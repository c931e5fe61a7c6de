"""Small random checkpoints and tokenizers for the tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerFast

from genssd.engine.engine import Engine

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
VOCAB = 256 + len(SPECIAL)
EOS = 256


def save_tokenizer(directory: Path, *, template: bool = True) -> None:
    """Write a byte-level tokenizer without merges: one token per byte, ids 0..255, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.add_special_tokens(
        {"eos_token": SPECIAL[0], "additional_special_tokens": [SPECIAL[1]], "pad_token": SPECIAL[2]}
    )
    if template:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)


def save_model(directory: Path, kind: str = "llama", *, seed: int = 0, scale: float = 4.0, **overrides: Any) -> Any:
    """Write a random checkpoint and return its transformers model in float32.

    scale: of the weights; large ones make the logits differ. overrides: options of the model's config.
    """
    torch.manual_seed(seed)
    config_class = CONFIG_MAPPING[kind]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": EOS,
        "initializer_range": 0.02 * scale,
    }
    shard = overrides.pop("max_shard_size", "5GB")
    if not hasattr(config_class(), "head_dim"):
        del options["head_dim"]  # the models of such a class would take it for a field of the user
    model = model_class(config_class(**{**options, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")) or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def save_checkpoint(directory: Path, kind: str = "llama", **options: Any) -> Any:
    """Write a random checkpoint with its tokenizer, and return its transformers model. options: see `save_model`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory)
    return save_model(directory, kind, **options)


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes a field."""
    fields = json.loads(path.read_text())
    fields.update(changes)
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def token_of(text: str) -> int:
    """Return the id of a one-byte text in the tokenizer of `save_tokenizer`."""
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0]
    assert len(mapped) == 1, f"{text!r} is not one byte"
    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(mapped)


def save_markov(directory: Path, token_ids: list[int], logits: torch.Tensor, **overrides: Any) -> None:
    """Write a checkpoint whose next token depends on the current token alone, with a tokenizer.

    logits: [A, A], element i, j that of token_ids[j] after token_ids[i]; A is at most 8. All other tokens are never
    drawn; after one of them the model predicts as after token_ids[0].
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory)
    width, states = 8, len(token_ids)
    assert logits.shape == (states, states)
    assert states <= width
    small = {"hidden_size": width, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    options = {"intermediate_size": 8, "num_hidden_layers": 1, "tie_word_embeddings": False}
    model = save_model(directory, "llama", **{**small, **options, **overrides})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.zero_()
        embedding[:, 0] = 1.0
        head.zero_()
        head.fill_(-1e4)
        for i, token in enumerate(token_ids):
            embedding[token] = torch.nn.functional.one_hot(torch.tensor(i), width).float()
            # the norm makes sqrt(width) of the one-hot coordinate
            head[token, :states] = logits[:, i] / width**0.5
    model.save_pretrained(directory)


ENDINGS = list(range(250, 257))
"""Ids that end a sequence; there are several, so that short random responses do end."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Directories of a teacher and a student, with their transformers models."""

    teacher: Path
    student: Path
    teacher_model: Any
    student_model: Any

    def engine(self, **options: Any) -> Engine:
        """Return a new engine over both in float32. options: of `Engine.from_pretrained`."""
        settings = {"dtype": "float32", "memory_bytes": 1 << 22, **options}
        return Engine.from_pretrained(self.teacher, self.student, **settings)

    def logprobs(self, role: str, prompt_ids: list[int], response: list[int]) -> torch.Tensor:
        """Return the log-probability of each response token, by one full forward pass of transformers; float64."""
        model = self.teacher_model if role == "teacher" else self.student_model
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + response])).logits[0].double()
        table = logits.log_softmax(dim=-1)[len(prompt_ids) - 1 : -1]
        return table.gather(1, torch.tensor(response)[:, None])[:, 0]
