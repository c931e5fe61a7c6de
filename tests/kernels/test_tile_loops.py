"""The machine code of the tile instructions (AMX): the loops of products, as a disassembler reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from itertools import pairwise

import pytest

from genssd import _core

LINE = re.compile(r"^ *([0-9a-f]+):\t(\S+) *([^#<\n]*)")
NEAR = 3000
"""Number of lines around a product that are looked at: more than a function of products has."""
ROW_AND_COLUMN_TILES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]

Block = list[tuple[str, str]]
"""Names and operands of instructions that follow each other; a jump is the last, and the target of one the first."""


def disassemble() -> dict[int, tuple[str, str]]:
    """Return the instructions of the extension around products, as name and operands by their address."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(_core.__file__)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    products = [i for i, line in enumerate(lines) if "tdpbf16ps" in line]
    near = {i for product in products for i in range(max(0, product - NEAR), min(len(lines), product + NEAR))}
    found = (LINE.match(lines[i]) for i in sorted(near))
    return {int(m[1], 16): (m[2], m[3].strip()) for m in found if m}


def target_of(name: str, operands: str) -> int | None:
    """Return the address that an instruction jumps to; None for one that is no jump, or jumps to a computed address."""
    return int(operands, 16) if name.startswith("j") and re.fullmatch("[0-9a-f]+", operands) else None


def divide(instructions: dict[int, tuple[str, str]]) -> tuple[dict[int, Block], dict[int, list[int]]]:
    """Return the blocks by the address of their first instruction, and which blocks each may go on to."""
    targets = {target_of(*instruction) for instruction in instructions.values()}
    blocks: dict[int, Block] = {}
    next_blocks: dict[int, list[int]] = {}
    start = None
    for (address, instruction), (next_address, _) in pairwise([*instructions.items(), (-1, ("", ""))]):
        start = address if start is None else start
        block = blocks.setdefault(start, [])
        block.append(instruction)
        jumps = instruction[0].startswith(("j", "ret"))
        if jumps or next_address in targets:
            goes_on = [target_of(*instruction)] + ([] if instruction[0] in ("jmp", "ret") else [next_address])
            next_blocks[start] = [place for place in goes_on if place in instructions]
            start = None
    return blocks, next_blocks


def comes_back(start: int, blocks: dict[int, Block], next_blocks: dict[int, list[int]]) -> bool:
    """Return whether a block is executed again before the tiles of sums are stored or anything is called."""
    waiting, seen = [start], set()
    while waiting:
        place = waiting.pop()
        if any(name == "tilestored" or name.startswith("call") for name, _ in blocks.get(place, [])):
            continue
        following = next_blocks.get(place, [])
        if start in following:
            return True
        waiting += [block for block in following if block not in seen]
        seen.update(following)
    return False


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump to disassemble with")
def test_a_step_loads_every_tile_once_and_keeps_the_sums_in_registers() -> None:
    """R x C products of a step take R + C loads, and no other instruction of the loop touches a tile register."""
    instructions = disassemble()
    if not instructions:
        pytest.skip("this build has no kernels for AMX, or objdump does not know its instructions")
    blocks, next_blocks = divide(instructions)
    shapes: Counter[tuple[int, int]] = Counter()
    for start, block in blocks.items():
        tiles = [(name, operands) for name, operands in block if "%tmm" in operands]
        products = [operands for name, operands in tiles if name == "tdpbf16ps"]
        if not products or not comes_back(start, blocks, next_blocks):
            continue
        loads = [operands for name, operands in tiles if name == "tileloadd"]
        assert len(products) + len(loads) == len(tiles), block
        assert all(operands.endswith(("%tmm4", "%tmm5", "%tmm6", "%tmm7")) for operands in loads), block
        shapes[len(products), len(loads)] += 1
    assert set(shapes) == {(rows * columns, rows + columns) for rows, columns in ROW_AND_COLUMN_TILES}
