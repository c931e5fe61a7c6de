"""Random Qwen3-class checkpoint as a Hugging Face directory that every engine can load."""

from __future__ import annotations

from pathlib import Path

import torch
from bench.engine.peers.workloads import FIRST_ID, SIZES, Sizes

HEAD_SCALE = 0.08
"""Standard deviation of the head's weights. That of the logits is sqrt(width) times as large: 2.6 at width 1024."""


def save_model(directory: Path, sizes: Sizes) -> None:
    """Save a model with bf16 weights and an untied head, without an end-of-sequence token, and its tokenizer.

    Without an end of sequence every response has the requested length.
    """
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    shape = sizes.model
    config = Qwen3Config(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=False, max_position_embeddings=16384, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    torch.nn.init.normal_(model.lm_head.weight, std=HEAD_SCALE)
    model.generation_config = GenerationConfig()
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(shape.vocabulary), pad_token="<pad>").save_pretrained(
        directory
    )


def byte_tokenizer(vocabulary: int) -> object:
    """Return a tokenizer whose ids are the bytes, one merge, names that no text is encoded to, and <pad>.

    OpenVINO cannot convert a tokenizer without a merge and a special token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    named = (f"<{i}>" for i in range(FIRST_ID + 1, vocabulary - 1))
    words = {word: i for i, word in enumerate([*alphabet, "th", *named, "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ensure_model(parent: Path, sizes: str) -> Path:
    """Return the directory parent/sizes, after creating the model/ in it where that is missing."""
    directory = parent / sizes
    model = directory / "model"
    if not model.exists():
        part = directory / "model.part"
        save_model(part, SIZES[sizes])
        part.rename(model)
    return directory
