"""Import every module of the installed package: `build/clean/bin/python -P scripts/check_installed.py`.

To be run by the interpreter of an environment into which a wheel was installed, with nothing but what the wheel
requires: a module that imports a package of the developers then fails. The modules of Triton kernels may fail where
Triton is missing, which the wheel does not require.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

OPTIONAL = {"triton": "_triton"}
"""Packages that need not be installed, and the ending of the names of the modules that import them at their top."""


def iter_modules(package: Path) -> Iterator[str]:
    """Yield the names of the modules in the folder of a package, which has folders without __init__.py."""
    paths = (Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names)
    for path in sorted(path for path in paths if path.suffix == ".py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def iter_import_faults(package: Path) -> Iterator[str]:
    """Import every module of a package, whose parent is on sys.path, and yield what fails, a line each."""
    for name in iter_modules(package):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            ending = OPTIONAL.get((error.name or "").split(".")[0])
            if ending is None or not name.endswith(ending):
                yield f"{name}: {error}"
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {error}"


def iter_faults() -> Iterator[str]:
    """Yield what is wrong with the installed package, a line each."""
    import genssd

    package = Path(str(genssd.__file__)).parent
    if not package.is_relative_to(sys.prefix):
        yield f"genssd is imported from {package}, which is not in the environment {sys.prefix}"
    installed = importlib.metadata.version("genssd")
    if genssd.__version__ != installed:
        yield f"genssd.__version__ is {genssd.__version__}, that of the distribution {installed}"
    yield from iter_import_faults(package)
    from genssd import _core

    if Path(_core.__file__).parent != package:
        yield f"the native core is {_core.__file__}"
    if _core.instruction_set() is None:
        yield "the native core has no kernels for this processor"
    for name in genssd.__all__:
        try:
            getattr(genssd, name)
        except (AttributeError, ImportError) as error:
            yield f"genssd.{name}: {error}"


if __name__ == "__main__":
    found = list(iter_faults())
    print("\n".join(found) if found else f"every module of genssd imports on Python {sys.version.split()[0]}")
    sys.exit(bool(found))
