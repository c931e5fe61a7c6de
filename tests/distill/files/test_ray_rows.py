"""Directories, which are read where the command runs; nothing here needs Ray (tests/distill/pool/test_ray.py does)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.data_directories import write_directory

from genssd.distill.data.problems import read_usable_problems
from genssd.distill.files.cluster_files import read_with
from genssd.distill.files.ray_rows import RayRows
from genssd.distill.files.rows import hash_content
from genssd.engine.common.errors import InputError


@pytest.fixture
def reader() -> Iterator[None]:
    """A reader that starts no cluster."""
    with read_with(RayRows(lambda: pytest.fail("a directory needs no cluster"))):
        yield


def test_a_directory_needs_a_command_that_reads_it(tmp_path: Path) -> None:
    write_directory(tmp_path / "d")
    with pytest.raises(InputError, match=r"is a directory, not a data file; it holds a[.]jsonl[.]gz, t0"):
        read_usable_problems(tmp_path / "d")


@pytest.mark.usefixtures("reader")
def test_a_directory_is_read_with_the_names_of_its_files(tmp_path: Path) -> None:
    write_directory(tmp_path / "d")
    name = str(tmp_path / "d")
    problems, content = read_usable_problems(name), hash_content(name)
    assert [(problem.prompt[-1]["content"], problem.answer) for problem in problems.problems] == [
        ("7?", "7"), ("8?", None), *((f"{i % 4}?", str(i)) for i in range(6))
    ]  # fmt: skip
    assert [problem.where for problem in problems.problems[:3]] == [
        f"{name}/a.jsonl.gz, line 1", f"{name}/a.jsonl.gz, line 5", f"{name}/t0.parquet, row 1"
    ]  # fmt: skip
    assert problems.problems[-1].where == f"{name}/t1.parquet, row 3"
    assert problems.list_bad_rows()[0].startswith(f"{name}/a.jsonl.gz, line 3: ")
    (tmp_path / "d/t0.parquet").unlink()
    with read_with(RayRows(lambda: None)):
        assert hash_content(name) != content


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt.swp", b"", r"d holds no data files \("),
        ("x.parquet", b"PAR1 and then nothing", "d/x.parquet is damaged or cut off: "),
        ("x.parquet", b"no table", "d/x.parquet is no Parquet file: its first bytes are others"),
        ("x.jsonl.gz", b"\x1f\x8b\x08 and then nothing", "d/x.jsonl.gz is damaged or cut off: "),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_usable_problems(tmp_path / "d")


@pytest.mark.usefixtures("reader")
def test_what_only_has_the_name_of_a_data_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "d/x.jsonl").mkdir(parents=True)
    (tmp_path / "d/y.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "d/x.jsonl/z.jsonl").write_text('{"question": "1?"}')
    (only,) = read_usable_problems(tmp_path / "d").problems
    assert only.where == f"{tmp_path}/d/x.jsonl/z.jsonl, line 1"
