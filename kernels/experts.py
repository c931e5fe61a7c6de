"""Mixture-of-experts feed-forward layers (Shazeer et al., 2017; Fedus et al., 2022): X gated units, of which each row
goes through K.

    out = sum over the experts e of a row of  weight_e * down_e(activation(gate_up_e(h)))

The products with matrices, their biases added, and the activation are rounded to the dtype of h, as in the models' own
code; the sum over experts is taken in float32, in ascending order of the experts, and rounded once.

Shapes:  N rows   X experts   K experts of a row   D model width   F feed-forward width of an expert
         T = N K products of a row with an expert
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.activation import Activation
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.linear import linear
from genssd.kernels.native import runs_natively
from genssd.kernels.threads import num_threads
from genssd.kernels.weight import PackedWeight, Weight, select_rows

Stack = tuple[Weight, ...] | Tensor
"""A matrix per expert: a tuple of matrices, or one tensor [X, outputs, inputs] whose rows are contiguous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The matrices of all experts of one layer. Raises ValueError where their shapes or dtypes do not agree.

    On the CPU a tuple of packed matrices (`weight.pack_weight`) is the fastest; on CUDA, and where the weights are
    being trained, a stack is one tensor.
    """

    gate_up: Stack
    """[2 F, D] per expert: the gate's rows, then those of up."""
    gate_up_bias: Tensor | None = None
    """[X, 2 F]."""
    down: Stack
    """[D, F] per expert."""
    down_bias: Tensor | None = None
    """[X, D]."""

    def __post_init__(self) -> None:
        (X, twice, D), (down_X, down_D, F) = _check_stack("gate_up", self.gate_up), _check_stack("down", self.down)
        if (down_X, down_D, 2 * F) != (X, D, twice):
            raise ValueError(
                f"experts: gate_up [{X}, {twice}, {D}] and down [{down_X}, {down_D}, {F}] must be [X, 2 F, D] and "
                "[X, D, F]"
            )
        if self.gate_up[0].dtype != self.down[0].dtype:
            raise ValueError(f"experts: gate_up is {self.gate_up[0].dtype}, and down {self.down[0].dtype}")
        for name, bias, width in (("gate_up_bias", self.gate_up_bias, twice), ("down_bias", self.down_bias, D)):
            if bias is not None and (bias.shape != (X, width) or bias.dtype != self.dtype or bias.stride(-1) != 1):
                raise ValueError(
                    f"experts: {name} must be {self.dtype} [{X}, {width}] with contiguous rows, not {bias.dtype} "
                    f"{list(bias.shape)}"
                )

    @property
    def count(self) -> int:
        """Number of experts, X."""
        return len(self.gate_up)

    @property
    def width(self) -> int:
        """Width of the rows that go in and come out, D."""
        return self.gate_up[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up[0].dtype


def route(logits_NX: Tensor, top_k: int, *, normalize: bool, select_first: bool) -> tuple[Tensor, Tensor]:
    """Choose top_k experts for every row; return them, int64 [N, K], and their weights, [N, K] in the dtype of logits.

    select_first False (Mixtral, Qwen3-MoE): the largest of the softmax over all experts; normalize: divided by their
    sum. select_first True (GPT-OSS): the largest logits, and the softmax over these, whose sum is 1 with or without
    normalize. Of equal values the lower expert comes first. Computed in float32 and rounded once. Raises ValueError
    where there are fewer experts than top_k.
    """
    if logits_NX.ndim != 2 or not 1 <= top_k <= logits_NX.shape[1]:
        raise ValueError(f"route: top_k {top_k} must be between 1 and the experts of logits {list(logits_NX.shape)}")
    scores_NX = logits_NX.to(torch.promote_types(logits_NX.dtype, torch.float32))
    if not select_first:
        scores_NX = scores_NX.softmax(dim=-1)
    sorted_NX, expert_NX = scores_NX.sort(dim=-1, descending=True, stable=True)
    expert_NK, weight_NK = expert_NX[:, :top_k].contiguous(), sorted_NX[:, :top_k].contiguous()
    if select_first:
        weight_NK = weight_NK.softmax(dim=-1)
    elif normalize:
        weight_NK = weight_NK / weight_NK.sum(dim=-1, keepdim=True)
    return expert_NK, weight_NK.to(logits_NX.dtype)


def expert_mlp(
    h_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, weights: ExpertWeights, *, activation: Activation
) -> Tensor:
    """Return the weighted sum of the experts of every row, a new tensor [N, D] in the dtype of h; see above.

    expert_NK: int64, the experts of each row, distinct and from 0 to X - 1, in any order; a CUDA device does not check
    them. weight_NK: their weights, in the dtype of h. On the CPU (float32, bfloat16, float16) a row's bits depend on
    that row alone. On CUDA nothing waits for the host, so the operator can be captured into a graph, and a row's bits
    may depend on the number of rows, by which the sizes of tiles are chosen. Raises ValueError on shapes or dtypes that
    do not agree, on packed weights outside of the CPU, and where a gradient is required and a native or Triton kernel
    would run, because these record none.
    """
    _check_rows(h_ND, expert_NK, weight_NK, weights)
    stacks = (weights.gate_up, weights.gate_up_bias, weights.down, weights.down_bias)
    tensors = [x for x in stacks if isinstance(x, Tensor)]
    if h_ND.is_cuda and h_ND.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.experts_triton import run_experts

        refuse_gradients("expert_mlp", h_ND, weight_NK, *tensors)
        assert isinstance(weights.gate_up, Tensor)
        assert isinstance(weights.down, Tensor)
        gate_up, down = (weights.gate_up, weights.gate_up_bias), (weights.down, weights.down_bias)
        return run_experts(h_ND, expert_NK, weight_NK, gate_up, down, activation)
    if runs_natively(h_ND, weight_NK):
        refuse_gradients("expert_mlp", h_ND, weight_NK, *tensors)
        return _run_natively(h_ND, expert_NK, weight_NK, weights, activation)
    return expert_mlp_reference(h_ND, expert_NK, weight_NK, weights, activation=activation)


def _run_natively(
    h_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, weights: ExpertWeights, activation: Activation
) -> Tensor:
    """Run each expert once, on all of its rows."""
    (N, K), D = expert_NK.shape, weights.width
    expert_NK, place_NK = expert_NK.sort(dim=1, stable=True)
    sorted_T, order_T = expert_NK.flatten().sort(stable=True)
    if N and not 0 <= int(sorted_T[0]) <= int(sorted_T[-1]) < weights.count:
        raise ValueError(f"expert_mlp: experts must be from 0 to {weights.count - 1}")
    x_TD = h_ND.detach().index_select(0, torch.div(order_T, K, rounding_mode="floor"))
    y_TD = h_ND.new_empty(N * K, D)
    start = 0
    for expert, count in enumerate(torch.bincount(sorted_T, minlength=weights.count).tolist()):
        if count:
            rows = slice(start, start + count)
            gate_up_TF = linear(x_TD[rows], weights.gate_up[expert], _of_expert(weights.gate_up_bias, expert))
            inner_TF = activation(gate_up_TF)
            linear(inner_TF, weights.down[expert], _of_expert(weights.down_bias, expert), out=y_TD[rows])
            start += count
    index_NK = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(N * K)).view(N, K)
    out_ND = h_ND.new_empty(N, D)
    _core.weighted_sum(y_TD, index_NK, weight_NK.detach().gather(1, place_NK), out_ND, num_threads())
    return out_ND


def expert_mlp_reference(
    h_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, weights: ExpertWeights, *, activation: Activation
) -> Tensor:
    """Compute `expert_mlp` in plain torch, differentiably where the activation is differentiable."""
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    y_NKD = h_ND.new_zeros(*expert_NK.shape, weights.width)
    for expert in range(weights.count):
        row, k = torch.where(expert_NK == expert)
        gate_up, down = (_unpack(stack[expert]) for stack in (weights.gate_up, weights.down))
        inner = torch.nn.functional.linear(h_ND[row], gate_up, _of_expert(weights.gate_up_bias, expert))
        y_NKD[row, k] = torch.nn.functional.linear(activation(inner), down, _of_expert(weights.down_bias, expert))
    place_NK = expert_NK.argsort(dim=1)
    terms_NKD = weight_NK[..., None].to(wide) * y_NKD.to(wide)
    total_ND = h_ND.new_zeros(len(h_ND), weights.width, dtype=wide)
    for place_N in place_NK.unbind(1):
        total_ND = total_ND + terms_NKD[torch.arange(len(h_ND), device=h_ND.device), place_N]
    return total_ND.to(h_ND.dtype)


def _of_expert(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _unpack(weight: Weight) -> Tensor:
    return select_rows(weight, torch.arange(weight.shape[0])) if isinstance(weight, PackedWeight) else weight


def _check_stack(name: str, stack: Stack) -> tuple[int, int, int]:
    """Return the number of matrices of a stack, their outputs and their inputs."""
    if isinstance(stack, Tensor):
        if stack.ndim != 3 or not len(stack) or stack.stride(-1) != 1:
            raise ValueError(
                f"experts: {name} must be [X, outputs, inputs] with contiguous rows, not {list(stack.shape)} of "
                f"strides {list(stack.stride())}"
            )
    elif not stack or any(w.shape != stack[0].shape or w.dtype != stack[0].dtype for w in stack):
        raise ValueError(f"experts: {name} must hold matrices of one shape and dtype, and at least one")
    outputs, inputs = stack[0].shape
    return len(stack), outputs, inputs


def _check_rows(h_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, weights: ExpertWeights) -> None:
    if h_ND.ndim != 2 or h_ND.shape[1] != weights.width or h_ND.dtype != weights.dtype:
        raise ValueError(
            f"expert_mlp: h must be {weights.dtype} [N, {weights.width}], not {h_ND.dtype} {list(h_ND.shape)}"
        )
    is_pair = expert_NK.ndim == 2 and len(expert_NK) == len(h_ND) and expert_NK.shape[1] > 0
    if not is_pair or expert_NK.dtype != torch.int64:
        raise ValueError(
            f"expert_mlp: expert must be int64 [{len(h_ND)}, K], with K at least 1, not {expert_NK.dtype} "
            f"{list(expert_NK.shape)}"
        )
    if weight_NK.shape != expert_NK.shape or weight_NK.dtype != h_ND.dtype:
        raise ValueError(
            f"expert_mlp: weight must be {h_ND.dtype} {list(expert_NK.shape)}, not {weight_NK.dtype} "
            f"{list(weight_NK.shape)}"
        )
    if h_ND.device.type != "cpu" and not all(isinstance(s, Tensor) for s in (weights.gate_up, weights.down)):
        raise ValueError(f"expert_mlp: on {h_ND.device} gate_up and down must be one tensor each, not one per expert")
