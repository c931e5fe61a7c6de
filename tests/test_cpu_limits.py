"""The work that bench/engine/cpu_peers.py counts, against what torch counts in transformers' model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.source


@pytest.fixture
def sizes():
    from bench.engine.peers.workloads import SIZES

    return replace(SIZES["small"], prefix=5, branches=3, decoded=2, candidates=3, scored=4)


@pytest.fixture
def model(sizes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = sizes.model
    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM._from_config(config, attn_implementation="eager").eval()


@torch.inference_mode()
def counted(model, rows, cache, keep):
    """Operations of one forward pass over [rows, tokens] zeros behind a cache."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(rows, dtype=torch.long), past_key_values=cache, logits_to_keep=keep)
    return counter.get_total_flops()


def test_decoding_counts_what_torch_counts(sizes, model):
    from bench.engine.peers.limits import phases
    from transformers import DynamicCache

    cache = DynamicCache()
    counted(model, (sizes.branches, sizes.prefix), cache, 1)
    steps = phases(sizes, "decode")
    assert len(steps) == sizes.decoded
    counted(model, (sizes.branches, 1), cache, 1)  # each branch's first token, which every engine finds in its prefix
    for step in steps:
        assert step.flops == counted(model, (sizes.branches, 1), cache, 1)


def test_prefill_counts_what_torch_counts_but_for_what_is_masked_or_not_read(sizes, model):
    from bench.engine.peers.limits import phases
    from transformers import DynamicCache

    (phase,) = phases(sizes, "prefill")
    shape = sizes.model
    masked = shape.layers * 4 * shape.heads * shape.head_dim * sizes.prefix * (sizes.prefix - 1) // 2
    # in the last layer the tokens but the last: queries, attention to themselves and before, output, feed-forward
    attended = 4 * shape.heads * shape.head_dim * sizes.prefix * (sizes.prefix - 1) // 2
    products = 2 * shape.heads * shape.head_dim + 3 * shape.inner
    unread = attended + 2 * shape.width * products * (sizes.prefix - 1)
    assert phase.flops == counted(model, (1, sizes.prefix), DynamicCache(), 1) - masked - unread


def test_scoring_counts_what_torch_counts_but_for_what_is_masked(sizes, model):
    from bench.engine.peers.limits import phases
    from transformers import DynamicCache

    cache = DynamicCache()
    counted(model, (sizes.candidates, sizes.prefix), cache, 1)
    (phase,) = phases(sizes, "score")
    shape, read = sizes.model, sizes.scored - 1
    masked = shape.layers * 4 * shape.heads * shape.head_dim * sizes.candidates * read * (read - 1) // 2
    boundary = 2 * shape.width * shape.vocabulary  # the prefix's last state predicts every first token
    assert phase.flops == counted(model, (sizes.candidates, read), cache, 0) - masked + boundary


def test_search_is_made_of_the_other_workloads(sizes):
    from bench.engine.peers.limits import phases

    one = replace(sizes, prompts=1, prompt=5, per_prompt=3, chunk=4, response=4, branches=3, prefix=4, decoded=4)
    teacher, student, *round_ = phases(one, "select_expand")
    (prefill,) = phases(replace(one, prefix=5), "prefill")
    (scoring,) = phases(replace(one, prefix=5, candidates=3, scored=4), "score")
    assert teacher == student == prefill
    assert round_ == [*phases(one, "decode"), scoring]
