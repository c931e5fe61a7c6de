"""Small random checkpoints and tokenizers for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers import Qwen3Config, Qwen3ForCausalLM

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
VOCAB = 256 + len(SPECIAL)
EOS = 256

CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def save_tokenizer(directory: Path, *, template: bool = True) -> None:
    """A byte-level tokenizer without merges: one token per byte, ids 0..255, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.add_special_tokens({"eos_token": SPECIAL[0], "additional_special_tokens": [SPECIAL[1]], "pad_token": SPECIAL[2]})
    if template:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)


def save_model(directory: Path, kind: str = "llama", *, seed: int = 0, scale: float = 4.0, **overrides: Any) -> Any:
    """A random checkpoint; returns the transformers model in float32. scale widens the weights so logits differ."""
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[kind]
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
    model = model_class(config_class(**{**options, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def save_checkpoint(directory: Path, kind: str = "llama", **options: Any) -> Any:
    """Model and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory)
    return save_model(directory, kind, **options)


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes."""
    fields = json.loads(path.read_text())
    fields.update(changes)
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
