"""The engine's trajectories with the forward pass's Triton kernels, through the interpreter, against plain torch's.

No GPU means no CUDA tensor: the kernels are put in the place of the operators that the decoder calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import FAMILY_CASES, save_family
from support.toys import Pair, edit_json, save_checkpoint
from torch import Tensor

from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models import model
from genssd.engine.models.decode_graph import DecodeGraphs, StagedStep, StepLayout, _Captured
from genssd.engine.models.forward_batch import ForwardBatch
from genssd.engine.models.model import Decoder
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.engine.models.segments import append_tokens
from genssd.kernels import experts_triton, native
from genssd.kernels.activation import Activation, clamped_swiglu_reference, geglu_reference, swiglu_reference
from genssd.kernels.activation_triton import gated_rows
from genssd.kernels.attention import SEGMENT_TOKENS, SegmentTable, paged_attention_reference
from genssd.kernels.attention_triton import AttentionLaunch, AttentionTiles, attend_rows
from genssd.kernels.cache import write_kv_reference
from genssd.kernels.cache_triton import write_kv_rows
from genssd.kernels.device_table import DeviceTable
from genssd.kernels.experts import ExpertWeights, expert_mlp_reference
from genssd.kernels.experts_triton import ExpertTiles, run_experts
from genssd.kernels.norm import add_rms_norm_reference, rms_norm_reference
from genssd.kernels.norm_triton import add_rms_norm_rows, rms_norm_rows

CPU = torch.device("cpu")
LAUNCH = AttentionLaunch(
    multiprocessors=5,
    tiles=AttentionTiles(
        block_m=16,
        block_t=16,
        num_warps=4,
        num_stages=2,
        tail_m=16,
        tail_warps=4,
        unit_m=16,
        unit_warps=4,
        unit_stages=2,
    ),
    interpret=True,
)
EXPERT_TILES = ExpertTiles(block_t=16, block_m=32, block_d=32, num_warps=1, num_stages=1, interpret=True)
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
TWO_LAYERS = {"gemma2": TWO_KINDS, "gemma3": TWO_KINDS, "olmo3": TWO_KINDS, "gpt-oss": TWO_KINDS}
WINDOWED = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1, "vocab_size": 260}


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: SegmentTable | DeviceTable,
    *,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    there = table if isinstance(table, DeviceTable) else DeviceTable.upload(table, CPU)
    return attend_rows(q, k_pages, v_pages, there, scale, softcap, sinks_H, launch=LAUNCH)


def write(
    qkv: Tensor,
    *rest: Any,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_offset: float | None = None,
) -> Tensor:
    return write_kv_rows(qkv, *rest, heads, q_norm, k_norm, eps, norm_offset)


def choose_experts(
    h: Tensor, expert: Tensor, weight: Tensor, weights: ExpertWeights, *, activation: Activation
) -> Tensor:
    gate_up, down = (
        torch.stack([w for w in stack if isinstance(w, Tensor)]) for stack in (weights.gate_up, weights.down)
    )
    return run_experts(h, expert, weight, (gate_up, weights.gate_up_bias), (down, weights.down_bias), activation)


OPERATORS = {
    "triton": {
        "paged_attention": attend,
        "write_kv": write,
        "rms_norm": rms_norm_rows,
        "add_rms_norm": add_rms_norm_rows,
        "swiglu": functools.partial(gated_rows, gate="silu"),
        "geglu": functools.partial(gated_rows, gate="gelu"),
        "clamped_swiglu": functools.partial(gated_rows, gate="clamped"),
        "expert_mlp": choose_experts,
    },
    "plain": {
        "paged_attention": paged_attention_reference,
        "write_kv": write_kv_reference,
        "rms_norm": rms_norm_reference,
        "add_rms_norm": add_rms_norm_reference,
        "swiglu": swiglu_reference,
        "geglu": geglu_reference,
        "clamped_swiglu": clamped_swiglu_reference,
        "expert_mlp": expert_mlp_reference,
    },
}


def put_in_place(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, operator in OPERATORS[which].items():
        monkeypatch.setattr(model, name, operator)
    monkeypatch.setattr(native, "has_native_kernels", lambda: False)  # all else is plain torch
    monkeypatch.setitem(SEGMENT_TOKENS, "cpu", 16)
    monkeypatch.setattr(experts_triton, "choose_launch", lambda *problem: EXPERT_TILES)


@pytest.mark.parametrize(("kind", "options"), [("qwen3", {}), ("qwen2", WINDOWED)], ids=["qwen3", "qwen2-window"])
def test_trajectories(kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches of several prompts, drawn, scored, chosen and gone on from."""
    models = [
        save_checkpoint(tmp_path / r, kind, seed=s, scale=12.0, **options) for s, r in enumerate(("big", "small"))
    ]
    for role in ("big", "small"):
        for file in ("config.json", "generation_config.json"):
            edit_json(tmp_path / role / file, eos_token_id=list(range(250, 257)))
    pair = Pair(tmp_path / "big", tmp_path / "small", *models)
    prompts = [list(range(40, 73)), [7, 8, 9]]
    found = {}
    for which in OPERATORS:
        put_in_place(which, monkeypatch)
        found[which] = pair.engine().select_expand(
            prompts, candidates=2, beam=2, chunk=Chunk(tokens=3, until=None), max_tokens=6, criterion="ppl", seed=3
        )
        monkeypatch.undo()
    for ours, plain in zip(found["triton"], found["plain"], strict=True):
        assert [(r.trace, r.token_ids, r.verdict, r.ended) for r in ours.tree] == [
            (r.trace, r.token_ids, r.verdict, r.ended) for r in plain.tree
        ]
        scores = ([record.score for record in selection.tree] for selection in (ours, plain))
        assert next(scores) == pytest.approx(next(scores), rel=1e-4)
    assert max(len(selection.best.token_ids) for selection in found["triton"]) > 3


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi4-mini", "olmo3", "gpt-oss"])
@torch.inference_mode()
def test_families_in_one_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms with an offset, softcaps, two rotary embeddings and one of a part of each head, experts and sinks, against
    transformers."""
    kind, options = next(case.values for case in FAMILY_CASES if case.id == name)
    hf = save_family(tmp_path, kind, {**options, "num_hidden_layers": 2, **TWO_LAYERS.get(name, {})})
    put_in_place("triton", monkeypatch)
    runner = load(tmp_path, Decoder.load(tmp_path, torch.float32, CPU))
    ids = list(range(40, 76))  # beyond the windows, and the original context of scaled rotary embeddings
    (hidden,) = runner.extend([runner.tree.root()], [ids])
    torch.testing.assert_close(runner.logits(hidden), hf(torch.tensor([ids])).logits[0], atol=2e-4, rtol=0)


def load(directory: Path, decoder: Decoder) -> PagedRunner:
    pool = PagePool.for_model(decoder, 80, 4)
    pool.kv.fill_(torch.nan)  # whatever is read without having been written shows
    return PagedRunner("teacher", directory, decoder, pool)


@torch.inference_mode()
def test_a_step_from_one_buffer_with_rows_that_fill_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The computation of a captured step, run without the capture, equals the forward pass over the same rows."""
    put_in_place("triton", monkeypatch)
    save_checkpoint(tmp_path, "qwen2", **WINDOWED)
    decoder = Decoder.load(tmp_path, torch.float32, CPU)
    runner = load(tmp_path, decoder)
    trunk = runner.tree.root()
    runner.extend([trunk], [list(range(30))])
    paths = [trunk, *(runner.tree.fork(trunk) for _ in range(2))]
    kv = runner.tree.pool.kv
    tables = append_tokens(runner.tree, paths, [1, 1, 1], windows=set(decoder.config.windows), group=2)
    expected = decoder.forward(torch.tensor([5, 6, 7]), ForwardBatch.from_tables(tables, CPU), kv)
    written = kv.clone()
    step = StepLayout.for_tables(4, 64, tables)
    host = np.empty(step.length, dtype=np.int32)
    step.pack(tables, host)
    ids_N, batch = step.read(torch.from_numpy(host), tables)
    ids_N[:3] = torch.tensor([5, 6, 7])
    found = decoder.forward(ids_N, batch, kv)
    torch.testing.assert_close(found[:3], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(kv, written, atol=1e-5, rtol=0, equal_nan=True)
    assert bool(found[3].isfinite().all())


class Replay:
    """Stand-in for a captured graph, whose replay calls the same function again."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.replay = step


@torch.inference_mode()
def test_steps_that_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner over replayed steps, in changing numbers of branches and over growing tables, equals the eager one."""
    put_in_place("triton", monkeypatch)
    save_checkpoint(tmp_path, "qwen2", **WINDOWED)
    decoder = Decoder.load(tmp_path, torch.float32, CPU)
    captures: list[int] = []

    def capture(self: DecodeGraphs, staged: StagedStep, drawn_N: Tensor) -> _Captured:
        layout, buffer = staged.layout, staged.host.clone()
        captures.append(layout.rows)
        ids_N, batch = layout.read(buffer, staged.tables)
        ids_N[: len(drawn_N)] = drawn_N
        hidden_ND = torch.full((layout.rows, decoder.config.hidden_size), torch.nan)
        replay: Any = Replay(lambda: hidden_ND.copy_(decoder.forward(ids_N, batch, self._kv)))
        return _Captured(layout, buffer, ids_N, replay, hidden_ND)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(DecodeGraphs, "_capture", capture)

    def decode(replayed: bool) -> list[Tensor]:
        runner = load(tmp_path, decoder)
        runner._graphs = DecodeGraphs(decoder, runner.tree.pool.kv) if replayed else None
        trunk = runner.tree.root()
        found = runner.extend([trunk], [list(range(14))])
        paths = [trunk, *(runner.tree.fork(trunk) for _ in range(2))]
        for step in range(6):
            found += runner.extend(paths, [[7 * i + step] for i in range(3)])
        found += runner.extend(paths[:2], [[1], [2, 3]])  # no step of single tokens
        return found + runner.extend(paths[1:2], [[4]])

    eager, replayed = decode(False), decode(True)
    torch.testing.assert_close(replayed, eager, atol=1e-5, rtol=1e-5)
    assert captures.count(1) == 1
    assert 2 <= captures.count(4) <= 4  # the tables outgrew the first, and not at every step
    assert len(captures) == captures.count(1) + captures.count(4)
