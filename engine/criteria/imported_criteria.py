"""Criteria from a user's own module, named by an import path: "package.module:Name"."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line


def import_object(path: str) -> Any:
    """Return the object at an import path; the module may lie in the working directory.

    Raises InputError where there is no such module or object, and where the module raises, naming file and line.
    """
    module_name, _, name = path.partition(":")
    if module_name.endswith(".py") or not all(part.isidentifier() for part in (*module_name.split("."), name)):
        hint = f"; write {Path(module_name).stem}:{name or 'Name'}" if module_name.endswith(".py") else ""
        raise InputError(f"{path!r} is no import path, which is package.module:Name{hint}")
    try:
        with _working_directory_on_path(module_name.partition(".")[0]) as directory:
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(describe_failure(error)) from error
        raise InputError(
            f"there is no module {error.name} in {directory or 'the working directory'} or among the installed packages"
        ) from None
    except (Exception, SystemExit) as error:
        raise InputError(describe_failure(error)) from error
    if not hasattr(module, name):
        raise InputError(f"{module.__file__ or module_name} has no {name}")
    return getattr(module, name)


def describe_failure(error: BaseException, file: str | None = None) -> str:
    """Return an exception of a user's code as one line that names the file and the line.

    file: that of the user's code, whose last line is named rather than one of a library that it called.
    """
    text = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ") and not frame.filename.startswith(_OWN)
    ]
    frames = [frame for frame in frames if frame.filename == file] or frames
    return f"{frames[-1].filename}, line {frames[-1].lineno}: {text}" if frames else text


_OWN = (str(Path(__file__).parent), str(Path(importlib.__file__).parent))
"""Folders of the files whose frames are not the user's: the engine's, and the import system's."""


@contextmanager
def _working_directory_on_path(top_module: str) -> Iterator[str | None]:
    """Import from the working directory first, if it holds the top module; yield its name, None where it is gone.

    Otherwise the path stays as it is, so that no other file of the directory can hide an installed module.
    """
    try:
        directory = os.getcwd()
    except OSError:
        yield None
        return
    held = Path(directory, f"{top_module}.py").is_file() or Path(directory, top_module).is_dir()
    if not held or directory in sys.path:
        yield directory
        return
    sys.path.insert(0, directory)
    try:
        yield directory
    finally:
        sys.path.remove(directory)
