"""Tile registers (AMX): the model against the documented arithmetic, and the instructions against the model.

`amx_model` is the instruction set whose tile instructions are plain C++. `amx` has the instructions themselves: they
run on a processor that has them, and elsewhere under tile_emulator.cpp, which reads the bytes of each one.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from support.page_problems import build
from torch import Tensor

from genssd import _core
from genssd.kernels.attention import paged_attention
from genssd.kernels.linear import linear
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.sampling import linear_sample
from genssd.kernels.weight import PackedWeight, pack_weight

SETS = _core.instruction_sets()
SMALLEST = Fraction(1, 2**126)
"""Smallest normal number of float32 and of bfloat16."""

needs_model = pytest.mark.skipif("amx_model" not in SETS, reason="the model is for processors with AVX-512")


@pytest.fixture(autouse=True)
def best_set_afterwards() -> Iterator[None]:
    yield
    if SETS:
        _core.use_instruction_set(SETS[0])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def to_float32(value: Fraction) -> Fraction:
    """Round to the nearest float32, ties to even; a denormal number becomes 0."""
    near = np.float32(float(value))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    even = {x: int(x.view(np.uint32)) & 1 for x in around}
    best = min(around, key=lambda x: (abs(Fraction(float(x)) - value), even[x]))
    rounded = Fraction(float(best))
    return rounded if abs(rounded) >= SMALLEST else Fraction(0)


def documented_product(x: Tensor, y: Tensor) -> Fraction:
    """Return x . y as the instructions add it up: steps of 32 values, two chains in each (see tiles_model.hpp)."""

    def exact(value: float) -> Fraction:
        return Fraction(value) if abs(Fraction(value)) >= SMALLEST else Fraction(0)

    a, b = ([exact(v) for v in t.tolist()] for t in (x, y))
    total = Fraction(0)
    for step in range(0, len(a), 32):
        chains = [Fraction(0), Fraction(0)]
        for i in range(step, min(step + 32, len(a))):
            chains[i % 2] = to_float32(a[i] * b[i] + chains[i % 2])
        total = to_float32(total + to_float32(chains[0] + chains[1]))
    return total


@needs_model
@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 64, 101])
def test_products_are_summed_as_the_instruction_is_documented(inputs: int) -> None:
    _core.use_instruction_set("amx_model")
    x, w = randn(3, inputs, seed=1), randn(5, inputs, seed=2)
    out = linear(x, w, out=torch.empty(3, 5))
    for i in range(3):
        for j in range(5):
            assert Fraction(float(out[i, j])) == documented_product(x[i], w[j])


@needs_model
def test_denormal_numbers_are_zero_on_both_sides() -> None:
    _core.use_instruction_set("amx_model")
    denormal, smallest = 2.0**-127, 2.0**-126
    x = torch.tensor([[denormal, 0.0], [smallest, 0.0], [smallest, 1.0]]).bfloat16()
    w = torch.tensor([[2.0**100, 0.0], [0.5, 0.0], [0.75, 2.0**-126]]).bfloat16()
    out = linear(x, w, out=torch.empty(3, 3))
    assert out[:, 0].tolist() == [0.0, 2.0**-26, 2.0**-26]  # what goes in
    assert out[:, 1].tolist() == [0.0, 0.0, 0.0]  # what comes out
    assert out[2, 2].item() == 2.0**-126  # 0.75 * 2^-126 alone would be denormal, and is 0


@needs_model
def test_a_value_that_a_row_does_not_see_changes_no_bit() -> None:
    """The values of later tokens are multiplied by 0 where they are finite, and left out where they are not."""
    _core.use_instruction_set("amx_model")
    length = 300
    problem = build([list(range(length))], [length], page_size=16, dtype=torch.bfloat16, heads=4, kv_heads=2)
    table = problem.table(segment=128)

    def attend(window: int = 0) -> Tensor:
        seen = problem.table(segment=128, window=window) if window else table
        return paged_attention(problem.q, problem.packed_keys, problem.v_pages, seen, scale=0.25)

    plain, windowed = attend(), attend(window=70)
    for place, value in ((299, torch.nan), (161, torch.inf), (33, torch.nan)):
        kept = problem.v_pages.clone()
        problem.v_pages[problem.tables[0, place // 16], place % 16] = value
        assert torch.equal(attend()[:place], plain[:place])
        assert not bool(attend()[place:].isfinite().all(-1).any())
        out = attend(window=70)
        assert torch.equal(out[:place], windowed[:place])
        assert torch.equal(out[place + 70 :], windowed[place + 70 :])
        problem.v_pages.copy_(kept)


@needs_model
def test_rounded_weights_cost_what_the_bound_says() -> None:
    """The weights of attention are rounded to bfloat16, each by at most 2^-8 of itself; sums are in float32."""
    _core.use_instruction_set("amx_model")
    problem = build([list(range(700))], [40], page_size=16, dtype=torch.bfloat16, heads=4, kv_heads=2, head_dim=48)
    out = paged_attention(problem.q, problem.packed_keys, problem.v_pages, problem.table(segment=256), scale=0.25)
    truth, sizes = (problem.truth(scale=0.25, sizes=s) for s in (False, True))
    assert bool(((out.double() - truth).abs() <= 2.0**-8 * (truth.abs() + sizes)).all())


def guarded_copy(tensor: Tensor, offset: int = 0) -> Tensor:
    """Return a copy whose last byte, or `offset` bytes before it, is the last one of a page before a forbidden page."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    room = -(-(size + offset) // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size - offset)
    flat.copy_(tensor.reshape(-1))
    return flat.view(tensor.shape)


@pytest.mark.skipif(not SETS, reason="there is no native kernel for this processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("instructions", SETS)
def test_no_kernel_reads_past_its_tensors(instructions: str, dtype: torch.dtype) -> None:
    """A read past the end would end this process: every tensor ends where a forbidden page begins."""
    _core.use_instruction_set(instructions)
    for rows, inputs, outputs in ((1, 33, 70), (3, 33, 60), (7, 64, 64), (37, 31, 1), (130, 96, 130)):
        x, w, bias = (
            t.to(dtype) for t in (randn(rows, inputs, seed=3), randn(outputs, inputs, seed=4), randn(outputs, seed=5))
        )
        packed = pack_weight(w)
        assert isinstance(packed, PackedWeight)
        guarded = PackedWeight(guarded_copy(packed.cells), packed.shape)
        expected = linear(x, w, bias)
        for weight in (guarded_copy(w), guarded):
            assert torch.equal(linear(guarded_copy(x), weight, guarded_copy(bias)), expected)
            target = outputs - 1 - torch.arange(rows) % outputs  # the last columns, of which only a vector is read
            linear_logprob(guarded_copy(x), weight, guarded_copy(target), bias=guarded_copy(bias), topk=1)
            linear_sample(guarded_copy(x), weight, guarded_copy(target), bias=guarded_copy(bias))
    for length, head_dim, page in ((1, 8, 1), (33, 24, 1), (65, 64, 1), (33, 24, 16), (65, 64, 16), (48, 40, 16)):
        problem = build([list(range(length))], [length], page_size=page, dtype=dtype, head_dim=head_dim)
        count = -(-length // page)
        used = problem.tables[0, :count].tolist()
        order = torch.tensor([p for p in range(len(problem.k_pages)) if p not in used] + used)
        problem.tables[0, :count] = np.arange(len(order) - count, len(order))  # the last token is on the last page
        k, v = (guarded_copy(pages[order]) for pages in (problem.packed_keys, problem.v_pages))
        out = paged_attention(guarded_copy(problem.q), k, v, problem.table(segment=32), scale=0.25)
        assert bool(out.isfinite().all())


def digest(tensor: Tensor) -> str:
    """Return a hash of the bits of a tensor, in which every NaN is the same."""
    return hashlib.sha256(tensor.double().nan_to_num(nan=12345.0).numpy().tobytes()).hexdigest()


def outputs_of(instructions: str, *, emulated: bool) -> dict[str, list[str]]:
    """Return digests of what every operator gives with an instruction set."""
    _core.use_instruction_set(instructions, emulated)
    torch.set_num_threads(1)
    results: dict[str, list[str]] = {}
    for rows, inputs, outputs in ((1, 64, 64), (16, 40, 20), (17, 33, 50), (32, 64, 64), (45, 300, 33), (131, 64, 65)):
        x, w = randn(rows, inputs, seed=6), randn(outputs, inputs, seed=7)
        key = torch.arange(rows) * 11
        stats = linear_logprob(x, pack_weight(w), key % outputs, topk=2)
        assert stats.topk is not None
        results[f"{rows} {inputs} {outputs}"] = [
            digest(t)
            for t in (
                linear(x, w),
                linear(x, pack_weight(w)),
                stats.logprob,
                stats.entropy,
                stats.topk.logprob,
                *linear_sample(x, w, key, temperature=0.7),
            )
        ]
    for length, count, window in ((70, 70, 0), (200, 9, 0), (150, 40, 37)):
        problem = build(
            [list(range(length))], [count], page_size=16, dtype=torch.bfloat16, heads=4, kv_heads=2, head_dim=40
        )
        table = problem.table(segment=128, window=window)
        outs = []
        for value in (0.5, torch.nan):  # with a NaN, the values of every row are masked by themselves
            problem.v_pages[problem.tables[0, 2], 3] = value
            outs.append(paged_attention(problem.q, problem.packed_keys, problem.v_pages, table, scale=0.25))
        results[f"attention {length} {count} {window}"] = [digest(out) for out in outs]
    return results


RUN = """
import ctypes, json, sys
emulator = ctypes.CDLL(sys.argv[1])
emulator.count.restype = ctypes.c_long
assert emulator.install() == 0
sys.path[:0] = json.loads(sys.argv[2])
import torch
from kernels import test_tiles
from genssd import _core
from genssd.kernels.linear import linear
x, w = test_tiles.randn(33, 96, seed=1), test_tiles.randn(64, 96, seed=2)
_core.use_instruction_set("amx", True)
linear(x, w)
counts = [emulator.count(i) for i in range(6)]
print(json.dumps([counts, test_tiles.outputs_of("amx", emulated=True)]))
"""


@needs_model
@pytest.mark.source
@pytest.mark.skipif("amx" in SETS, reason="this processor has the instructions")
@pytest.mark.skipif("avx512_bf16" not in SETS, reason="the set amx rounds with the instructions of AVX512_BF16")
@pytest.mark.skipif(shutil.which("c++") is None, reason="the emulator needs a C++ compiler")
def test_the_instructions_give_the_bits_of_the_model(tmp_path: Path) -> None:
    """The compiled instructions, read byte by byte, do what the model does, and no more of them than expected."""
    library = tmp_path / "tile_emulator.so"
    source = Path(__file__).with_name("tile_emulator.cpp")
    command = ["c++", "-std=c++20", "-O2", "-mfma", "-ffp-contract=off", "-shared", "-fPIC", str(source), "-o"]
    subprocess.run([*command, str(library)], check=True)
    tests = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(library), json.dumps([str(tests)])], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    counts, results = json.loads(run.stdout)
    assert results == outputs_of("amx_model", emulated=False)
    # 33 rows, 96 values, 64 columns: a pair of row tiles and a single row; 3 steps; 4 column tiles
    configured, released, zeroed, loaded, stored, multiplied = counts
    assert multiplied == 3 * 4 * 3
    assert loaded == 3 * (2 * 2 + 2 * 2) + 3 * (1 + 4)  # twice two tiles of rows and two of columns; one and four
    assert zeroed == stored == 3 * 4
    assert configured == 2 * 1
    assert released == 1


@pytest.mark.skipif("amx" not in SETS, reason="this processor lacks the instructions")
def test_the_processor_gives_the_bits_of_the_model() -> None:
    assert outputs_of("amx", emulated=False) == outputs_of("amx_model", emulated=False)
