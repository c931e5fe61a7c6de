"""Attention on key words: finding them, the masses of transformers' eager attention, the loss, and a training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_pair import TinyPair
from support.training_runs import config_for, metrics, weights
from transformers import AutoModelForCausalLM, StableLmConfig, StableLmForCausalLM

from genssd.distill.train.batches import TokenRow, build_token_batch
from genssd.distill.train.key_attention import (
    IMPLEMENTATION,
    AttentionCollector,
    KeyWords,
    LayerRouter,
    compute_key_attention_loss,
    find_key_words,
    weigh_teacher_layers,
)
from genssd.distill.train.key_attention_options import KeyAttentionOptions
from genssd.distill.train.models import compute_completion_states
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]
NUMBERS = KeyAttentionOptions(weight=1.0)


def words_of(pieces: list[str], keys: KeyWords) -> list[str]:
    return [
        "".join(p for p, w in zip(pieces, keys.word_T.tolist(), strict=True) if w == j) for j in range(keys.num_words)
    ]


def test_numbers_are_found_where_they_stand_and_once() -> None:
    prompt = list("9 has 3.5 and 1,200")
    completion = list("3.5 is less. Then 12 and 3.5 again.")
    keys = find_key_words(prompt, [*completion, ""], NUMBERS)
    assert keys is not None
    # the very first token is no word
    assert words_of([*prompt, *completion, ""], keys) == ["3.53.53.5", "1,200", "12"]
    assert keys.num_steps == 2
    assert keys.step_T[: len(prompt)].unique().tolist() == [-1]
    assert keys.step_T[-1] == -1, "the end of sequence is part of no step"
    assert keys.step_T[len(prompt) : -1].tolist() == [0] * len("3.5 is less.") + [1] * len(" Then 12 and 3.5 again.")


def test_tokens_may_hold_more_or_less_than_a_word() -> None:
    keys = find_key_words(["x", "a 1", "2 b"], ["3", "4 ", "55."], NUMBERS)
    assert keys is not None
    assert keys.word_T.tolist() == [-1, 0, 0, 1, 1, 2]
    only = find_key_words(["x", "a 12 b"], ["34", " and"], NUMBERS, in_prompt=False)
    assert only is None, "one word is none to compare"
    assert find_key_words(["x 1 2"], [""], NUMBERS) is None


def test_given_words_and_a_limit() -> None:
    pieces = ["x", " rain", "bow", " rain", ".", " wet"]
    keys = find_key_words(pieces[:1], pieces[1:], KeyAttentionOptions(words=("rain", "wet", "a+b")))
    assert keys is not None
    assert keys.word_T.tolist() == [-1, -1, -1, 0, -1, 1], "rainbow is another word"
    few = find_key_words(["x"], list("1 2 3 1"), KeyAttentionOptions(max_words=2))
    assert few is not None
    assert words_of(["x", *"1 2 3 1"], few) == ["11", "2"]


def eager_masses(model: Any, ids: list[int], keys: KeyWords) -> torch.Tensor:
    """Return the masses [L, S, W] from transformers' own attention weights."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation(IMPLEMENTATION)
    rows = torch.stack([(keys.step_T == i).float() for i in range(keys.num_steps)])
    columns = torch.stack([(keys.word_T == j).float() for j in range(keys.num_words)])
    return torch.stack([rows @ attention[0].mean(0) @ columns.T for attention in attentions])


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_masses_are_those_of_eager_attention(tiny_pair: TinyPair, which: str) -> None:
    """The models are a llama and a qwen3, and the batch is padded."""
    model: Any = AutoModelForCausalLM.from_pretrained(getattr(tiny_pair, which), dtype=torch.float32)
    model.set_attn_implementation(IMPLEMENTATION)
    generator = torch.Generator().manual_seed(0)
    rows, words_of_row = [], []
    for length in (17, 9, 12):
        ids = torch.randint(0, 200, (length,), generator=generator)
        rows.append(TokenRow(tuple(ids.tolist()), 3))
        step = torch.randint(-1, 3, (length,), generator=generator)
        step[-3:] = torch.arange(3)
        word = torch.randint(-1, 4, (length,), generator=generator)
        word[:4] = torch.arange(4)
        words_of_row.append(KeyWords(step, word, 3, 4))
    key_words: list[KeyWords | None] = [words_of_row[0], None, words_of_row[2]]
    batch = build_token_batch(rows, "pad", 0)
    collector = AttentionCollector(key_words)
    with torch.no_grad():
        states = compute_completion_states(model, batch, collector)
    assert collector.masses[1] == []
    for i in (0, 2):
        expected = eager_masses(model, list(rows[i].ids), words_of_row[i])
        torch.testing.assert_close(torch.stack(collector.masses[i]), expected, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(states, compute_completion_states(model, batch), atol=1e-5, rtol=1e-5)


def test_a_model_whose_layers_pass_no_arguments_on_is_refused() -> None:
    """The layers of StableLM call their attention without the arguments of the model."""
    shape = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = StableLmForCausalLM(StableLmConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    model.set_attn_implementation(IMPLEMENTATION)
    batch = build_token_batch([TokenRow((1, 2, 3, 4), 2)], "pad", 0)
    words = KeyWords(torch.tensor([-1, -1, 0, 0]), torch.tensor([-1, 0, 1, -1]), 1, 2)
    with pytest.raises(InputError, match="key_attention cannot read the attention of stablelm"):
        compute_completion_states(model, batch, AttentionCollector([words]))
    compute_completion_states(model, batch, AttentionCollector([None]))


def build_collector(masses: torch.Tensor, keys: KeyWords, values: torch.Tensor | None = None) -> AttentionCollector:
    collector = AttentionCollector([keys])
    collector.masses[0] = list(masses)
    collector.values[0] = list(torch.zeros(len(masses), 3, dtype=masses.dtype) if values is None else values)
    return collector


KEYS = KeyWords(torch.tensor([-1, -1, -1, 0, 0, 1, 1]), torch.tensor([-1, 0, 1, -1, -1, 2, -1]), 2, 3)


def compute_by_formula(
    teacher: torch.Tensor, student: torch.Tensor, layer_weights: torch.Tensor, temperature: float
) -> float:
    """Compute the loss where the third word is not visible to the first step."""
    change = [sum(abs(a[i][j + 1] - a[i][j]) for i in range(2) for j in range(2)) / 4 for a in teacher.tolist()]
    exponents = [math.exp(c / temperature) for c in change]
    p = [e / sum(exponents) for e in exponents]
    total = 0.0
    for i, seen in ((0, [0, 1]), (1, [0, 1, 2])):
        q = [sum(p[layer] * float(teacher[layer, i, j]) for layer in range(len(p))) for j in seen]
        s = [sum(float(layer_weights[layer] * student[layer, i, j]) for layer in range(len(student))) for j in seen]
        log_q = [x - math.log(sum(map(math.exp, q))) for x in q]
        log_s = [x - math.log(sum(map(math.exp, s))) for x in s]
        total += sum(math.exp(a) * (a - b) for a, b in zip(log_q, log_s, strict=True))
    return total / 2


def random_masses(layers: int, seed: int) -> torch.Tensor:
    return torch.rand(layers, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_formula_whatever_the_numbers_of_layers() -> None:
    teacher, student = random_masses(4, 0), random_masses(2, 1)
    values = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    router = LayerRouter(3, 2).double()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([0.3, -0.2, 0.5]))
        router.bias.copy_(torch.tensor([0.1, -0.4]))
    loss = compute_key_attention_loss(
        build_collector(teacher, KEYS), build_collector(student, KEYS, values), router, NUMBERS
    )
    layer_weights = ((values @ router.weight + router.bias) / 0.5).softmax(0).detach()
    assert float(loss.detach()) == pytest.approx(compute_by_formula(teacher, student, layer_weights, 0.1), rel=1e-9)
    assert float(loss.detach()) > 0.0


def test_the_router_is_differentiated() -> None:
    teacher, student = random_masses(4, 0), random_masses(2, 1)

    def loss(weight: torch.Tensor, bias: torch.Tensor, masses: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        router = LayerRouter(3, 2).double()
        del router.weight, router.bias
        router.weight, router.bias = weight, bias  # type: ignore[assignment]
        return compute_key_attention_loss(
            build_collector(teacher, KEYS), build_collector(masses, KEYS, values), router, NUMBERS
        )

    inputs = [torch.tensor([0.3, -0.2, 0.5]), torch.tensor([0.1, -0.4]), student, torch.rand(2, 3)]
    assert torch.autograd.gradcheck(loss, [x.double().requires_grad_() for x in inputs])


def test_equal_attention_loses_nothing_and_pulls_nowhere() -> None:
    """With one layer, the mixture of both models is that layer."""
    masses = random_masses(1, 3).requires_grad_()
    loss = compute_key_attention_loss(
        build_collector(masses.detach(), KEYS), build_collector(masses, KEYS), LayerRouter(3, 1).double(), NUMBERS
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert masses.grad is not None
    assert float(masses.grad.abs().max()) < 1e-12


def test_the_order_of_the_words_counts_in_the_mixture_alone() -> None:
    teacher, order = random_masses(3, 4), [2, 0, 1]
    assert not torch.allclose(weigh_teacher_layers(teacher, 0.1), weigh_teacher_layers(teacher[:, :, order], 0.1))
    everywhere = KeyWords(torch.tensor([-1, -1, -1, -1, 0, 1]), torch.tensor([-1, 0, 1, 2, -1, -1]), 2, 3)
    one, other, router = random_masses(1, 5), random_masses(1, 6), LayerRouter(3, 1).double()
    losses = [
        float(
            compute_key_attention_loss(
                build_collector(a, everywhere), build_collector(b, everywhere), router, NUMBERS
            ).detach()
        )
        for a, b in ((one, other), (one[:, :, order], other[:, :, order]))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_rows_may_be_means() -> None:
    teacher, student = random_masses(1, 7), random_masses(1, 8)
    halved = dataclasses.replace(NUMBERS, rows="mean")
    router = LayerRouter(3, 1).double()
    mean = compute_key_attention_loss(build_collector(teacher, KEYS), build_collector(student, KEYS), router, halved)
    expected = compute_key_attention_loss(
        build_collector(teacher / 2, KEYS), build_collector(student / 2, KEYS), router, NUMBERS
    )
    assert float(mean.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)


def test_attention_comes_closer_to_the_teachers(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """The attention loss falls, and the logged loss is the sum of its parts."""
    rows = [
        {
            "prompt": f"Tom has {i} and {i + 3}.",
            "completion": f"{i} more. Then {i + 3} make {2 * i + 3}. So {2 * i + 3}",
        }
        for i in range(11, 19)
    ]
    shared = {"teacher_model_name_or_path": str(tiny_pair.teacher), "num_train_epochs": 8, "learning_rate": 3e-3}
    config = config_for(
        tiny_pair, write_rows(rows), tmp_path / "run", key_attention=dataclasses.replace(NUMBERS, weight=5.0),
        save_steps=3, save_total_limit=None, **shared,
    )  # fmt: skip
    run_train(config)
    logged = metrics(tmp_path / "run")
    attention = [row["attention"] for row in logged]
    assert sum(attention[-2:]) < 0.6 * sum(attention[:2])
    for row in logged:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 5.0 * row["attention"], rel=1e-5)
    assert "divergence" not in logged[0]
    router = load_file(tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors")
    assert router["extra/router.weight"].any()
    assert {"router.weight/exp_avg", "router.bias/exp_avg"} <= router.keys()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "checkpoint-6").symlink_to(tmp_path / "run" / "checkpoint-6")
    run_train(dataclasses.replace(config, output_dir=str(tmp_path / "part"), resume_from_checkpoint="last"))
    one, other = weights(tmp_path / "run"), weights(tmp_path / "part")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "run" / "config.json").read_text()).get("_attn_implementation") in (None, "sdpa")


def test_rows_without_key_words_are_trained_without(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    rows = [{"prompt": "no", "completion": "numbers"}, {"prompt": "1", "completion": "2"}]
    config = config_for(
        tiny_pair, write_rows(rows), tmp_path / "run", key_attention=NUMBERS, max_steps=1,
        teacher_model_name_or_path=str(tiny_pair.teacher),
    )  # fmt: skip
    run_train(config)
    assert metrics(tmp_path / "run")[0]["attention"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a teacher in memory"),
        ({"teacher_model_name_or_path": "t", "layout": "tree"}, "layout pad, no checkpointing"),
        ({"teacher_model_name_or_path": "t", "gradient_checkpointing": True}, "layout pad, no checkpointing"),
        ({"teacher_model_name_or_path": "t", "attn_implementation": "eager"}, "brings its own"),
    ],
)
def test_what_it_refuses(tiny_pair: TinyPair, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_for(tiny_pair, tmp_path / "data", tmp_path / "run", key_attention=NUMBERS, **options)
    for wrong in ({"weight": -1.0}, {"max_words": 1}, {"teacher_temperature": 0.0}):
        with pytest.raises(InputError, match="key_attention"):
            KeyAttentionOptions(**wrong)  # type: ignore[arg-type]
