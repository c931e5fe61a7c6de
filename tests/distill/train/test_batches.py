"""Layouts: whatever shares a forward pass, every completion token is predicted from its own sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint
from transformers import AutoModelForCausalLM

from genssd.distill.data.examples import Example
from genssd.distill.train.batches import ExampleBatch, TokenRow, build_token_batch
from genssd.distill.train.forward import ForwardPass
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.models import Teacher, check_layout, compute_completion_states
from genssd.engine.common.errors import InputError
from genssd.engine.readers.token_map import TokenMap

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
ROWS = st.lists(
    st.builds(lambda prompt, rest: TokenRow((*prompt, *rest), len(prompt)), IDS, IDS), min_size=1, max_size=6
)


@given(ROWS, st.sampled_from(["pad", "pack", "tree"]))
def test_every_token_sees_its_own_sequence_and_nothing_else(rows: list[TokenRow], layout: Any) -> None:
    batch = build_token_batch(rows, layout, pad_id=9)
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    width = batch.input_ids.shape[1]
    place = 0
    for row in rows:
        for t in range(row.num_prompt, len(row.ids)):
            source = int(batch.source[place])
            assert int(batch.target[place]) == row.ids[t]
            if layout == "pad":
                begin = source // width * width
                seen = [i for i in range(begin, source + 1) if batch.attention_mask.flatten()[i]]
            else:
                seen = batch.attention_mask[0, 0, source].nonzero().flatten().tolist()
            assert [int(ids[i]) for i in seen] == list(row.ids[:t])
            assert [int(positions[i]) for i in seen] == list(range(t))
            place += 1
    assert place == len(batch.source) == len(batch.target)


def test_a_tree_stores_a_shared_prefix_once() -> None:
    prompt = (1, 2, 3, 4)
    rows = [TokenRow((*prompt, 5, 6), 4), TokenRow((*prompt, 5, 7), 4), TokenRow((*prompt, 8), 4), TokenRow((1, 9), 1)]
    assert build_token_batch(rows, "tree", 0).input_ids.shape == (1, 4 + 2 + 1 + 1 + 1)
    assert build_token_batch(rows, "pack", 0).input_ids.shape == (1, 6 + 6 + 5 + 2)
    assert build_token_batch(rows, "pad", 0).input_ids.shape == (4, 6)


def norm_in_float64(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: (
                norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
            )


@pytest.mark.parametrize("layout", ["pad", "pack", "tree"])
@pytest.mark.parametrize("kd", [False, True])
def test_a_split_batch_has_the_gradient_of_the_whole(tiny_pair: TinyPair, layout: Any, kd: bool) -> None:
    """float64, over weights of rows and chunks, for every way of splitting six examples."""
    tokenizer = tiny_pair.engine.tokenizer("student")
    models: list[Any] = []
    for directory in (tiny_pair.student, tiny_pair.teacher):
        models.append(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64))
        norm_in_float64(models[-1])
    model, teacher = models
    options = LossOptions(kd_ratio=0.5, kd_loss="jsd", teacher_model_name_or_path="t") if kd else LossOptions()
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i, length in enumerate((4, 9, 2, 7, 7, 3)):
        ids = (1, 2, 3, *torch.randint(0, 4, (length,), generator=generator).tolist())
        chunks = ((1, 2.0), (length - 1, 0.5)) if i % 2 else ()
        examples.append(Example(input_ids=ids, num_prompt=3, weight=1.0 + i, chunk_weights=chunks))
    batch = ExampleBatch(examples=examples, on_policy=False)
    read = Teacher(model=teacher, token_map=TokenMap(), largest_id=tokenizer.largest_id, positions=512)
    forward = ForwardPass.build(model, read if kd else None, tokenizer, options, layout=layout, bf16=False)
    gradients = []
    for size in (6, 4, 3, 1):
        model.zero_grad()
        for part in batch.split(size):
            sums = forward.compute_loss(part, counted=True, when="now")
            (sums.total / batch.weight).backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for split in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(split[name], gradient, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_layouts_give_the_states_and_gradients_of_single_sequences(
    tmp_path: Path, family: str, attention: str
) -> None:
    """In float64, which transformers leaves in its norms (undone here) and in the softmax of eager attention."""
    save_checkpoint(tmp_path / family, family, seed=3)
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / family, dtype=torch.float64, attn_implementation=attention
    )
    norm_in_float64(model)
    close = 1e-10 if attention == "sdpa" else 1e-5
    generator = torch.Generator().manual_seed(0)
    prompt = tuple(torch.randint(0, 200, (7,), generator=generator).tolist())
    rows = [TokenRow((*prompt, *torch.randint(0, 3, (n,), generator=generator).tolist()), 7) for n in (5, 9, 1, 6)] + [
        TokenRow((4, 5, 6), 1)
    ]
    expected = []
    for row in rows:
        hidden = model.base_model(input_ids=torch.tensor([row.ids])).last_hidden_state[0]
        expected.append(hidden[row.num_prompt - 1 : -1])
    alone = torch.cat(expected)
    output_gradient = torch.randn(alone.shape, generator=generator, dtype=torch.float64)
    (alone * output_gradient).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for layout in ("pad", "pack", "tree"):
        model.zero_grad()
        states = compute_completion_states(model, build_token_batch(rows, layout, 0))  # type: ignore[arg-type]
        torch.testing.assert_close(states, alone, atol=close, rtol=close)
        (states * output_gradient).sum().backward()
        for name, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=close, rtol=close)


def test_layouts_that_the_attention_cannot_mask(tiny_pair: TinyPair) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    check_layout(model, "tree")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="layout pack needs a mask of its own"):
        check_layout(model, "pack")
    check_layout(model, "pad")
    model.config._attn_implementation = "sdpa"
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(InputError, match="sliding windows"):
        check_layout(model, "tree")
