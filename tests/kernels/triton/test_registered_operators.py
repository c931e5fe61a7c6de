"""Every function of kernels/ that has a path for CUDA, on a fake CUDA device, against its results on the CPU.

FakeCuda holds each operator that torch sees to new storage and to the layout of its registered fake. The functions that
choose a path by `is_cuda` are held to new storage here; both lists are taken from the code, so that a new operator
without a case fails.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import FakeCuda, SharedStorage, check_results, interpreted_launches, storage_of
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves

import genssd.kernels
from genssd.kernels import head
from genssd.kernels.activation import clamped_swiglu, geglu, swiglu
from genssd.kernels.attention import build_segment_table, paged_attention
from genssd.kernels.attention_mass import attention_mass
from genssd.kernels.cache import copy_pages, write_kv
from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.device_table import DeviceTable
from genssd.kernels.divergence import linear_divergence
from genssd.kernels.experts import ExpertWeights, expert_mlp, route
from genssd.kernels.head_triton import multiply_by_library
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.logprob_at import linear_logprob_at
from genssd.kernels.norm import add_rms_norm, rms_norm
from genssd.kernels.rotary import rotary_angles
from genssd.kernels.sampling import gumbel_noise, linear_sample, sample
from genssd.kernels.sorted_distance import linear_sorted_distance
from genssd.kernels.standardized import linear_standardized_kl
from genssd.kernels.topk_divergence import topk_divergence

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
ROWS, VOCABULARY, WIDTH = 5, 70, 16


class Inputs:
    """Random tensors on a device, equal on every device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)
        self.made: list[Tensor] = []

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        x = scale * torch.randn(*shape, generator=self._generator)
        return self._place(x.to(dtype)).requires_grad_(grad)

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return self._place(torch.randint(low, high, shape, generator=self._generator))

    def _place(self, x: Tensor) -> Tensor:
        self.made.append(x.to(self.device))
        return self.made[-1]


Case = Callable[[Inputs], Any]


def score(x: Inputs, **options: Any) -> Any:
    stats = linear_logprob(x.normal(ROWS, WIDTH), x.normal(VOCABULARY, WIDTH), x.integers(VOCABULARY, ROWS), **options)
    topk = [] if stats.topk is None else [stats.topk.ids, stats.topk.logprob]
    return [stats.logprob, stats.logsumexp, stats.entropy, stats.sum_p2, stats.rank, *topk]


def score_gradient(x: Inputs) -> Any:
    hidden, weight = x.normal(ROWS, WIDTH, grad=True), x.normal(VOCABULARY, WIDTH, grad=True)
    stats = linear_logprob(hidden, weight, x.integers(VOCABULARY, ROWS), bias=x.normal(VOCABULARY))
    return torch.autograd.grad((stats.logprob - 0.3 * stats.entropy).sum(), (hidden, weight))


def draw(x: Inputs, **options: Any) -> Any:
    hidden, weight, keys = x.normal(ROWS, WIDTH), x.normal(VOCABULARY, WIDTH), x.integers(1 << 40, ROWS)
    return list(linear_sample(hidden, weight, keys, **options))


def draw_from_logits(x: Inputs, **options: Any) -> Any:
    return sample(x.normal(ROWS, VOCABULARY, scale=3.0), x.integers(1 << 40, ROWS), **options)


def loss_gradients(x: Inputs, loss: Callable[[Tensor, Tensor], Any], *, frozen: bool = False) -> Any:
    """Return the losses of the rows and the gradients of their weighted sum."""
    hidden, weight = x.normal(ROWS, WIDTH, grad=True), x.normal(VOCABULARY, WIDTH, grad=not frozen)
    value = loss(hidden, weight)
    return [value.rows, *torch.autograd.grad(value.total, (hidden,) if frozen else (hidden, weight))]


def cross_entropy(x: Inputs, **options: Any) -> Any:
    target, weight = x.integers(VOCABULARY, ROWS), x.normal(ROWS).abs()
    target[1:2] = -100
    return loss_gradients(x, lambda h, w: linear_cross_entropy(h, w, target, row_weight=weight, softcap=9.0), **options)


def divergence(x: Inputs, **options: Any) -> Any:
    teacher = x.normal(ROWS, WIDTH), x.normal(VOCABULARY + 3, WIDTH)
    return loss_gradients(x, lambda h, w: linear_divergence(h, w, *teacher, **options))


def topk_loss(x: Inputs, **options: Any) -> Any:
    ids = torch.arange(4, device=x.device).repeat(ROWS, 1)
    logprob = x.normal(ROWS, 9).log_softmax(1)[:, :4]
    return loss_gradients(x, lambda h, w: topk_divergence(h, w, ids, logprob, **options))


def score_several(x: Inputs) -> Any:
    ids = x.integers(VOCABULARY, ROWS, 3, low=-1)
    return linear_logprob_at(x.normal(ROWS, WIDTH), x.normal(VOCABULARY, WIDTH), ids, temperature=0.7, softcap=5.0)


def standardized(x: Inputs) -> Any:
    teacher = x.normal(ROWS, WIDTH), x.normal(VOCABULARY, WIDTH)
    return loss_gradients(x, lambda h, w: linear_standardized_kl(h, w, *teacher, temperature=2.0))


def sorted_distance(x: Inputs) -> Any:
    teacher = x.normal(ROWS, WIDTH), x.normal(VOCABULARY + 9, WIDTH)
    factors = {"student_log_factor_N": -x.normal(ROWS).abs(), "teacher_log_factor_N": -x.normal(ROWS).abs()}
    return loss_gradients(x, lambda h, w: linear_sorted_distance(h, w, *teacher, student_softcap=5.0, **factors))


def noise(x: Inputs) -> Any:
    return gumbel_noise(x.integers(1 << 40, ROWS), VOCABULARY)


def key_attention(x: Inputs, dtype: torch.dtype) -> Any:
    q, k = x.normal(11, 4, 8, dtype=dtype, grad=True), x.normal(11, 2, 8, dtype=dtype, grad=True)
    step, word = torch.arange(11) // 4 - 1, torch.arange(11) % 3 - 1  # on the CPU, as the training passes them
    mass = attention_mass(q, k, step, word, steps=2, words=2, scale=0.4)
    return [mass, *torch.autograd.grad(mass.square().sum(), (q, k))]


def attend(x: Inputs, *, uploaded: bool) -> Any:
    pages = torch.tensor([[0, 1, 2], [0, 1, 3]], dtype=torch.int32)
    one = torch.ones(2, dtype=torch.int32)
    table = build_segment_table(pages, torch.arange(2, dtype=torch.int32), 8 * one, 2 * one, page_size=4, segment=8)
    placed = DeviceTable.upload(table, x.device) if uploaded and x.device.type == "cuda" else table
    q, kv = x.normal(4, 4, 16), x.normal(2, 4, 4, 2, 16)
    return paged_attention(q, *kv, placed, scale=0.25, sinks_H=x.normal(4))


def write(x: Inputs, rotated: int = 16, offset: float | None = None) -> Any:
    qkv, kv = x.normal(3, 8, 16), x.normal(2, 4, 4, 2, 16)
    frequency = x.normal(rotated // 2)
    cos, sin = rotary_angles(torch.arange(3, dtype=torch.int32).to(x.device), frequency, 1.0)
    norm = x.normal(16)
    slots = torch.tensor([1, 6, -1]).to(x.device)
    q = write_kv(qkv, cos, sin, *kv, slots, heads=4, q_norm=norm, k_norm=norm, norm_offset=offset)
    return [q, kv.clone()]


def copy(x: Inputs) -> Any:
    kv = x.normal(2, 2, 4, 4, 2, 16)
    copy_pages(kv, torch.tensor([0, 1]).to(x.device), torch.tensor([3, 2]).to(x.device))
    return kv.clone()


def wide_products(x: Inputs) -> Any:
    a, b = x.normal(3, 16, dtype=torch.float16), x.normal(6, 16, dtype=torch.float16)
    out = torch.empty(3, 6, device=x.device)
    total = torch.ones(3, 6, device=x.device)
    head.add_product(total, a, b.T, first=False)
    written = torch.full((3, 6), torch.nan, device=x.device)
    head.add_product(written, a, b.T, first=True)
    return [head.multiply_into(a, b, out).clone(), total, written]


def library_product(x: Inputs) -> Any:
    x_ND, w_VD = x.normal(3, 16, dtype=torch.float16), x.normal(6, 16, dtype=torch.float16)
    return multiply_by_library(x_ND, w_VD)


def row_passes(x: Inputs) -> Any:
    z = x.normal(3, VOCABULARY)
    lse = head.row_logsumexp(z, 1.5, 8.0)
    return [lse, head.softmax_gradient(z.clone(), lse, x.normal(3, 3), 1.5, 8.0, torch.float32)]


def normalize(x: Inputs, offset: float | None = None) -> Any:
    return rms_norm(x.normal(ROWS, WIDTH), x.normal(WIDTH), 1e-6, offset=offset)


def add_and_normalize(x: Inputs, offset: float | None = None) -> Any:
    return list(add_rms_norm(x.normal(ROWS, WIDTH), x.normal(ROWS, WIDTH), x.normal(WIDTH), 1e-6, offset=offset))


def gate(x: Inputs, function: Callable[[Tensor], Tensor]) -> Any:
    return function(x.normal(ROWS, 2 * WIDTH))


def choose_experts(x: Inputs, **options: Any) -> Any:
    return list(route(x.normal(ROWS, 6), 2, **options))


def feed_experts(x: Inputs, *, biased: bool) -> Any:
    expert, weight = route(x.normal(ROWS, 6), 2, normalize=True, select_first=False)
    weights = ExpertWeights(
        gate_up=x.normal(6, 2 * WIDTH, WIDTH), gate_up_bias=x.normal(6, 2 * WIDTH) if biased else None,
        down=x.normal(6, WIDTH, WIDTH), down_bias=x.normal(6, WIDTH) if biased else None,
    )  # fmt: skip
    activation = clamped_swiglu if biased else swiglu
    return expert_mlp(x.normal(ROWS, WIDTH), expert, weight, weights, activation=activation)


OPERATORS: dict[str, list[Case]] = {
    "linear_logprob": [score, functools.partial(score, topk=3), functools.partial(score, temperature=0.7, softcap=5.0)],
    "linear_logprob_backward": [score_gradient],
    "linear_sample": [draw, functools.partial(draw, temperature=0.0), functools.partial(draw, vocabulary=60)],
    "sample": [draw_from_logits, functools.partial(draw_from_logits, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01)],
    "linear_cross_entropy": [cross_entropy, functools.partial(cross_entropy, frozen=True)],
    "linear_divergence": [
        functools.partial(divergence, kind=kind, vocabulary=rule)
        for kind, rule in (("forward_kl", "restrict"), ("jsd", "restrict"), ("reverse_kl", "drop"))
    ]
    + [lambda x: divergence(x, kind="skew_forward_kl", alpha=[(ROWS - ROWS // 2, 0.1), (ROWS // 2, 0.4)])],
    "topk_divergence": [
        functools.partial(topk_loss, kind="forward_kl"),
        functools.partial(topk_loss, kind="jsd", tail="renormalize", student_softcap=9.0),
        functools.partial(topk_loss, kind="reverse_kl", tail="drop"),
        functools.partial(topk_loss, kind="reverse_kl", tail="policy_gradient", student_softcap=9.0),
    ],
    "attention_mass": [functools.partial(key_attention, dtype=torch.float16)],
    "attention_mass_backward": [functools.partial(key_attention, dtype=torch.float16)],
}
"""Cases by the name of the operator that torch sees, without its namespace."""

FUNCTIONS: dict[str, list[Case]] = {
    "_linear_cross_entropy": OPERATORS["linear_cross_entropy"],
    "_linear_divergence": OPERATORS["linear_divergence"],
    "_scale": OPERATORS["linear_cross_entropy"],
    "attention_mass": [functools.partial(key_attention, dtype=torch.float32)],
    "paged_attention": [functools.partial(attend, uploaded=uploaded) for uploaded in (False, True)],
    "write_kv": [write, functools.partial(write, rotated=6, offset=1.0)],
    "copy_pages": [copy],
    "rms_norm": [normalize, functools.partial(normalize, offset=1.0)],
    "add_rms_norm": [add_and_normalize, functools.partial(add_and_normalize, offset=1.0)],
    "swiglu": [functools.partial(gate, function=swiglu)],
    "geglu": [functools.partial(gate, function=geglu)],
    "clamped_swiglu": [functools.partial(gate, function=clamped_swiglu)],
    "expert_mlp": [functools.partial(feed_experts, biased=biased) for biased in (False, True)],
    "linear": [wide_products],
    "multiply_by_library": [library_product],
    "add_product": [wide_products],
    "row_logsumexp": [row_passes],
    "softmax_gradient": [row_passes],
}
"""Cases by the name of the function of kernels/ that chooses its path by the device."""

COMPOSED: dict[str, list[Case]] = {
    "linear_logprob_at": [score_several],
    "linear_standardized_kl": [standardized],
    "linear_sorted_distance": [sorted_distance],
    "gumbel_noise": [noise],
    "route": [functools.partial(choose_experts, normalize=first, select_first=not first) for first in (False, True)],
}
"""Cases of functions in plain torch."""

CASES = [
    pytest.param(case, f"genssd::{name}" if group is OPERATORS else None, id=f"{name}-{i}")
    for group in (OPERATORS, FUNCTIONS, COMPOSED)
    for name, cases in group.items()
    for i, case in enumerate(cases)
]


def choosing_functions() -> set[str]:
    """Return the names of the functions of kernels/ that read `is_cuda`."""
    names = set()
    for path in Path(genssd.kernels.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(part, ast.Attribute) and part.attr == "is_cuda" for part in ast.walk(node)
            ):
                names.add(node.name)
    return names


def test_every_path_for_cuda_has_a_case() -> None:
    assert {name for name in OPDEFS if name.startswith("genssd::")} == {f"genssd::{name}" for name in OPERATORS}
    # row_loss is a function inside of _linear_divergence
    assert choosing_functions() - {"row_loss"} == set(FUNCTIONS)


@pytest.mark.parametrize(("case", "operator"), CASES)
def test_a_path_for_cuda(case: Case, operator: str | None) -> None:
    """It mixes no devices, returns new tensors that are laid out as promised, and the values of the CPU."""
    expected = tree_leaves(case(Inputs(CPU)))
    with FakeCuda() as device:
        inputs = Inputs(CUDA)
        results = tree_leaves(case(inputs))
        assert operator is None or operator in device.operators
        storages = [storage_of(tensor) for tensor in (*inputs.made, *results)]
        assert len(set(storages)) == len(storages), "a result shares storage"
        for result, value in zip(results, expected, strict=True):
            assert result.is_cuda
            # the CPU rounds the sum of a wide product's addends to float16
            rounding = 2e-3 if value.dtype == torch.float16 or case is wide_products else 1e-4
            torch.testing.assert_close(result.detach().cpu(), value.detach(), atol=rounding, rtol=rounding)


HEADS = ["linear_logprob", "linear_sample", "linear_cross_entropy", "linear_divergence", "topk_divergence"]


@pytest.mark.parametrize("name", [*HEADS, *COMPOSED])
def test_a_batch_without_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROWS", 0)
    for case in (OPERATORS | COMPOSED)[name]:
        expected = tree_leaves(case(Inputs(CPU)))
        with FakeCuda():
            results = [result.detach().cpu() for result in tree_leaves(case(Inputs(CUDA)))]
        torch.testing.assert_close(results, [value.detach() for value in expected])


def registered_calls() -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and the arguments, on the CPU, of every call of an operator with a function for CUDA alone."""
    for cases in OPERATORS.values():
        for case in cases:
            with FakeCuda() as device:
                case(Inputs(CUDA))
            for name, args, kwargs in device.calls:
                if "cuda" in OPDEFS[name]._backend_fns:
                    yield name, args, kwargs


def test_torch_accepts_the_registered_functions() -> None:
    """The functions registered for CUDA, called through torch's dispatcher as those of the CPU."""
    calls = list(registered_calls())
    assert {name for name, _, _ in calls} >= {"genssd::linear_logprob", "genssd::linear_sample", "genssd::sample"}
    with interpreted_launches():
        for name, args, kwargs in calls:
            definition = OPDEFS[name]
            definition.register_kernel("cpu", definition._backend_fns["cuda"])
            try:
                utils = ("test_schema", "test_faketensor")
                torch.library.opcheck(definition._opoverload, args, kwargs, test_utils=utils)
            finally:
                definition._backend_fns["cpu"] = definition._init_fn


def test_shared_storage_and_other_layouts_are_refused() -> None:
    with FakeCuda():
        rows = torch.zeros(2, 3, device=CUDA)
        a, b = rows.unbind()
        fresh = [torch.zeros(3, device=CUDA) for _ in range(2)]
        check_results("f", [rows], fresh, fresh)
        with pytest.raises(SharedStorage, match="result 1 shares the storage of result 0"):
            check_results("f", [], [a, b], fresh)
        with pytest.raises(SharedStorage, match="shares the storage of an input"):
            check_results("f", [rows], [a, fresh[0]], fresh)
        with pytest.raises(AssertionError, match="dtype of result 0"):
            check_results("f", [], fresh[:1], [fresh[0].half()])
