"""Loading of several teachers beside one student: each with its own cache, and how everybody reads everybody.

All caches share one budget and hold the same number of tokens. A student that reads one of the teachers by bytes reads
all of them by bytes, so that its tokens of a response do not depend on who wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from genssd.engine.checkpoints.address import is_url
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.errors import InputError
from genssd.engine.readers.byte_reader import ByteReader, find_reader
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.token_bytes import NoByteTable
from genssd.engine.setup.loading import LoadedModels, choose_reader, load_models
from genssd.engine.setup.memory import check_weights_fit, choose_dtype
from genssd.engine.texts.text import Tokenizer

Names = str | Path | Sequence[str | Path]
"""The name of one teacher, or of several."""


def list_names(teacher: Names | None) -> tuple[str | Path, ...]:
    """Return the names of the teachers; none for None."""
    if teacher is None:
        return ()
    return (teacher,) if isinstance(teacher, str | Path) else tuple(teacher)


def check_teachers(names: Sequence[str | Path], student: str | Path | None) -> None:
    """Raise InputError where several teachers cannot compete: no student, a name twice, or two servers."""
    if not names:
        raise InputError("teacher must name a model: the list is empty")
    if len(names) == 1:
        return
    if student is None:
        raise InputError("several teachers compete by what the student scores: give student=, or one teacher")
    twice = next((name for i, name in enumerate(names) if str(name) in map(str, names[:i])), None)
    if twice is not None:
        raise InputError(f"teacher {twice} is given twice; for more candidates of one teacher raise candidates")
    urls = [str(name) for name in names if is_url(str(name))]
    if len(urls) > 1:
        raise InputError(
            f"the teachers {' and '.join(urls)} are both served: teacher_tokenizer and server describe one server, so "
            "only one of several teachers may be the URL of a server"
        )


def load_team(teachers: Sequence[str | Path], student: str | Path, **options: Any) -> LoadedModels:
    """Load several teachers and a student. options: the other arguments of `load_models`.

    Raises the errors of `load_models`, and those of `check_teachers`.
    """
    check_teachers(teachers, student)
    local = {f"teacher {name}": locate(name) for name in teachers if not is_url(str(name))}
    paths = {**local, f"student {student}": locate(student)}
    dtypes = {name: choose_dtype(path, options["dtype"], options["device"]) for name, path in paths.items()}
    check_weights_fit(paths, dtypes, options["device"])
    # a served teacher may take the tokenizer of the student, beside which it is loaded
    paired = next((i for i, name in enumerate(teachers) if is_url(str(name))), 0)
    parts = [load_models(name, student if i == paired else None, **options) for i, name in enumerate(teachers)]
    tokenizers = [part.tokenizers["teacher"] for part in parts]
    names = [f"teacher {name}" for name in teachers]
    own, student_name = parts[paired].tokenizers["student"], f"student {student}"
    readers = read_alike(
        [
            parts[paired].reader if i == paired else choose_reader(tokenizers[i], own, names[i], student_name)
            for i in range(len(parts))
        ],
        tokenizers,
        own,
        names,
        student_name,
    )
    complete = [
        replace(
            part,
            directories={**part.directories, "student": parts[paired].directories["student"]},
            decoders={**part.decoders, "student": parts[paired].decoders["student"]},
            tokenizers={**part.tokenizers, "student": own},
            reader=reader,
        )
        for part, reader in zip(parts, readers, strict=True)
    ]
    return replace(complete[0], others=tuple(complete[1:]), team_readers=_read_each_other(tokenizers, names))


def read_alike(
    readers: Sequence[Reader], tokenizers: Sequence[Tokenizer], student: Tokenizer, names: Sequence[str], own_name: str
) -> list[Reader]:
    """Return how the student reads each teacher: all by ids, or, where it reads one by bytes, all by bytes.

    Raises InputError naming a teacher whose tokens do not spell bytes.
    """
    if not any(reader.reads_bytes for reader in readers):
        return list(readers)
    alike: list[Reader] = []
    for reader, tokenizer, name in zip(readers, tokenizers, names, strict=True):
        try:
            alike.append(reader if reader.reads_bytes else ByteReader.of(tokenizer, student, name, own_name))
        except NoByteTable as error:
            raise InputError(
                f"{error}; the student reads another teacher by bytes, and so has to read all of them"
            ) from None
    return alike


def _read_each_other(tokenizers: Sequence[Tokenizer], names: Sequence[str]) -> dict[tuple[int, int], Reader]:
    """Return how each teacher reads each other one, by the indices of the writer and the reader.

    Raises InputError where the tokenizers differ and do not spell bytes.
    """
    indices = range(len(tokenizers))
    return {
        (i, j): find_reader(tokenizers[i], tokenizers[j], names[i], names[j])
        for i in indices
        for j in indices
        if i != j
    }
