"""Calls of the native kernels that must be refused, whatever the instruction set: the checks come before its code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genssd import _core

pytestmark = pytest.mark.skipif(not _core.instruction_sets(), reason="there is no native kernel for this processor")


def test_a_unit_that_runs_out_of_memory_is_an_error_on_any_threads() -> None:
    """Run in another process, whose memory is limited."""
    script = (
        "import resource, torch\n"
        "from genssd import _core\n"
        "logits, key, out = torch.zeros(8, 1_000_000), torch.arange(8), torch.zeros(8, dtype=torch.int64)\n"
        "def draw(columns):\n"
        "    _core.sample(logits[:, :columns], key, 1.0, 5, 1.0, 0.0, out, 4)\n"
        "draw(10_000)\n"  # the threads begin here
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (3 << 20), -1))\n"
        "for _ in range(10):\n"
        "    try:\n"
        "        draw(1_000_000)\n"
        "    except MemoryError:\n"
        "        print('refused')\n"
        "draw(10_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"
    assert done.stdout == "refused\n" * 10


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


LONG, INT, HALF, WIDE = torch.int64, torch.int32, torch.bfloat16, torch.float64
CALLS: dict[str, tuple[Callable[..., None], list[Any]]] = {
    "linear": (_core.linear, [empty(3, 8), empty(5, 8), empty(5), empty(3, 5), 1]),
    "linear, packed": (_core.linear, [empty(3, 8), empty(1, 8, 64, 1), empty(5), empty(3, 5), 1]),
    "packed_rows": (_core.packed_rows, [empty(1, 8, 64, 1), 5, empty(3, dtype=LONG), empty(3, 8)]),
    "linear_logprob": (
        _core.linear_logprob,
        [empty(3, 8), empty(5, 8), 5, empty(3, dtype=LONG), empty(5), 1.0, 0.0, empty(4, 3), empty(3, dtype=INT),
         empty(3, 2, dtype=LONG), empty(3, 2), 1],
    ),
    "linear_logprob, packed": (
        _core.linear_logprob,
        [empty(3, 8, dtype=HALF), empty(1, 4, 64, 2, dtype=HALF), 5, empty(3, dtype=LONG), empty(5, dtype=HALF), 1.0,
         0.0, empty(4, 3), empty(3, dtype=INT), empty(3, 2, dtype=LONG), empty(3, 2), 1],
    ),
    "linear_sample": (
        _core.linear_sample,
        [empty(3, 8), empty(5, 8), 5, empty(3, dtype=LONG), empty(5), 1.0, 0.0, 5, empty(3, dtype=LONG), empty(3), 1],
    ),
    "sample": (_core.sample, [empty(3, 8), empty(3, dtype=LONG), 1.0, 0, 1.0, 0.0, empty(3, dtype=LONG), 1]),
    "rms_norm": (_core.rms_norm, [empty(3, 8), empty(3, 8), empty(8), 1e-6, 1.0, empty(3, 8), empty(3, 8), 1]),
    "gated": (_core.gated, [empty(3, 8), "silu", 0.0, 0.0, empty(3, 4), 1]),
    "weighted_sum": (_core.weighted_sum, [empty(5, 8), empty(3, 2, dtype=LONG), empty(3, 2), empty(3, 8), 1]),
    "write_kv": (
        _core.write_kv,
        [empty(3, 4, 8), empty(3, 4), empty(3, 4), empty(2, 1, 8, 4, 1), empty(2, 4, 1, 8), empty(3, dtype=LONG),
         empty(8), empty(8), 1e-6, None, empty(3, 2, 8), 1],
    ),
    "write_kv, pairs": (
        _core.write_kv,
        [empty(3, 4, 8, dtype=HALF), empty(3, 4), empty(3, 4), empty(2, 1, 4, 4, 2, dtype=HALF),
         empty(2, 4, 1, 8, dtype=HALF), empty(3, dtype=LONG), None, None, 1e-6, None, empty(3, 2, 8, dtype=HALF), 1],
    ),
    "write_kv, rotated in part": (
        _core.write_kv,
        [empty(3, 4, 8), empty(3, 3), empty(3, 3), empty(2, 1, 8, 4, 1), empty(2, 4, 1, 8), empty(3, dtype=LONG),
         None, None, 1e-6, None, empty(3, 2, 8), 1],
    ),
    "copy_pages": (_core.copy_pages, [empty(2, 2, 5, 4, 1, 8), empty(3, dtype=LONG), torch.tensor([2, 3, 4]), 1]),
    "rotary_angles": (_core.rotary_angles, [empty(3, dtype=INT), empty(4), 1.0, empty(3, 4), empty(3, 4), 1]),
    "gumbel_noise": (_core.gumbel_noise, [empty(3, dtype=LONG), empty(3, 8), 1]),
}  # fmt: skip


def spoilt(tensor: Tensor) -> dict[str, Tensor]:
    """Versions of an argument that no call may take."""
    other = LONG if tensor.dtype != LONG else INT
    wrong = {
        "dtype": tensor.to(other),
        "float64": tensor.to(WIDE),
        "rank": tensor[None],
        "longer": torch.cat((tensor, tensor[:1])),
        "shorter": tensor[:-1],
    }
    if tensor.shape[-1] > 1:
        wrong["stride"] = torch.stack((tensor, tensor), -1)[..., 0]
        wrong["width"] = tensor[..., :-1]
    return wrong


@pytest.mark.parametrize(
    ("name", "index", "kind"),
    [
        (name, index, kind)
        for name, (_, arguments) in CALLS.items()
        for index, argument in enumerate(arguments)
        if isinstance(argument, Tensor)
        for kind in spoilt(argument)
    ],
)
def test_wrong_tensors_are_refused_with_a_message(name: str, index: int, kind: str) -> None:
    """Each tensor argument of each function is replaced by one of a wrong dtype, shape or stride, one at a time."""
    function, arguments = CALLS[name]
    function(*arguments)
    wrong = spoilt(arguments[index])[kind]
    if (name, index, kind) in HARMLESS:
        function(*arguments[:index], wrong, *arguments[index + 1 :])
        return
    with pytest.raises(ValueError, match=f"^{name.partition(',')[0]}: "):
        function(*arguments[:index], wrong, *arguments[index + 1 :])


HARMLESS = {
    ("sample", 0, "width"),  # fewer columns are a smaller vocabulary
    ("linear_logprob, packed", 0, "width"),  # of the last cell's two values one is multiplied
    *(("copy_pages", 0, kind) for kind in ("dtype", "float64", "longer", "shorter")),  # bytes of any kind, any layers
    *(("weighted_sum", 0, kind) for kind in ("longer", "shorter")),  # more or fewer values to choose from
}


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("linear_logprob", 2, 0, "between 1 and"),
        ("linear_logprob", 2, 6, "weight must be"),
        ("linear_logprob", 3, torch.tensor([0, 5, 0]), "target of row 1"),
        ("linear_logprob", 3, torch.tensor([-1, 0, 0]), "target of row 0"),
        ("linear_logprob", 5, 0.0, "temperature"),
        ("linear_logprob", 5, -1.0, "temperature"),
        ("linear_logprob", 6, -1.0, "softcap"),
        ("linear_sample", 7, 6, "vocabulary"),
        ("linear_sample", 7, 0, "vocabulary"),
        ("packed_rows", 0, torch.zeros(5, 8), "must be packed"),
        ("packed_rows", 1, 65, "weight must be"),
        ("packed_rows", 2, torch.tensor([0, 5, 0]), "index 1 names a row"),
        ("packed_rows", 2, torch.tensor([0, 1, -1]), "index 2 names a row"),
        ("rms_norm", 1, None, "come together"),
        ("gated", 1, "relu", "no gate of the name relu"),
        ("weighted_sum", 1, torch.tensor([[0, 1], [4, 5], [0, 0]]), "index of row 1"),
        ("weighted_sum", 1, torch.tensor([[0, -1], [4, 4], [0, 0]]), "index of row 0"),
        ("write_kv", 5, torch.tensor([0, 8, 1]), "slot of row 1"),
        ("copy_pages", 1, torch.tensor([0, 1, 5]), "copy 2 names a page"),
        ("copy_pages", 2, torch.tensor([0, -1, 4]), "copy 1 names a page"),
    ],
)
def test_wrong_values_are_refused_with_a_message(name: str, index: int, value: object, message: str) -> None:
    function, arguments = CALLS[name]
    with pytest.raises(ValueError, match=message):
        function(*arguments[:index], value, *arguments[index + 1 :])


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="mmx"):
        _core.use_instruction_set("mmx")
