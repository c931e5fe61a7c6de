"""Small random checkpoints of every family of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.toys import save_model

WINDOW = 9
"""Sliding window, in tokens: sequences of the tests are many times as long."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONGROPE |= {"short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0], "partial_rotary_factor": 0.75}
MISTRAL3 = {**YARN, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING = {"layer_types": ALTERNATING, "num_hidden_layers": 3, "sliding_window": WINDOW}
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
}
OLMO3 = {"sliding_attention": {"rope_type": "default", "rope_theta": 5e5}, "full_attention": YARN}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 5.0}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

FAMILY_CASES: list[Any] = [
    pytest.param("mistral", {"sliding_window": WINDOW}, id="mistral-window"),
    pytest.param("mistral", {"sliding_window": None, "tie_word_embeddings": True}, id="mistral"),
    pytest.param("ministral", SLIDING, id="ministral"),
    pytest.param("ministral3", {"rope_parameters": MISTRAL3, "sliding_window": None}, id="ministral3"),
    pytest.param("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}, id="smollm3"),
    pytest.param("granite", GRANITE, id="granite"),
    pytest.param("granite", {**GRANITE, "attention_bias": True, "tie_word_embeddings": True}, id="granite-tied"),
    pytest.param("gemma2", {**SLIDING, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}, id="gemma2"),
    pytest.param("gemma3_text", {**SLIDING, "rope_parameters": TWO_BASES}, id="gemma3"),
    pytest.param("phi3", {"sliding_window": WINDOW}, id="phi3"),
    pytest.param("phi3", {"rope_parameters": LONGROPE, "tie_word_embeddings": True}, id="phi4-mini"),
    pytest.param("olmo2", {}, id="olmo2"),
    pytest.param("olmo3", {**SLIDING, "rope_parameters": OLMO3}, id="olmo3"),
    pytest.param("mixtral", EXPERTS, id="mixtral"),
    pytest.param("qwen3_moe", {**QWEN_MOE, "norm_topk_prob": True}, id="qwen3-moe"),
    pytest.param(
        "qwen3_moe",
        {**QWEN_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
        id="qwen3-moe-some-dense",
    ),
    pytest.param("gpt_oss", {**EXPERTS, **SLIDING, "rope_parameters": {**YARN, "truncate": False}}, id="gpt-oss"),
]


def save_family(directory: Path, kind: str, options: dict[str, Any], **more: Any) -> Any:
    """Write a random checkpoint of a family and return its transformers model, whose attention is the plain one."""
    model = save_model(directory, kind, **{"pad_token_id": None, **options, **more})
    model.set_attn_implementation("eager")  # which caps scores and has sinks
    return model
