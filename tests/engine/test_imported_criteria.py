"""Criteria from a module of the user's own, in the working directory or installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from genssd.engine.common.errors import InputError
from genssd.engine.criteria.criterion_names import resolve

CRITERION = """
import helper_of_own

class Short:
    def __init__(self, factor: float = 1.0) -> None:
        if factor < 0:
            raise RuntimeError("no such factor")
        self.factor = factor

    def score(self, candidate) -> float:
        return helper_of_own.FACTOR * self.factor * len(candidate.token_ids)

    def higher_is_better(self) -> bool:
        return False

instance = Short()
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a criterion, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_criterion_here.py").write_text(CRITERION)
    (tmp_path / "helper_of_own.py").write_text("FACTOR = 2\n")
    (tmp_path / "package_here").mkdir()
    (tmp_path / "package_here" / "inner.py").write_text(CRITERION)
    before = dict(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


def test_a_module_of_the_working_directory_is_found_and_the_path_stays(directory: Path) -> None:
    path = list(sys.path)
    for name in ("own_criterion_here:Short", "own_criterion_here:instance", "package_here.inner:Short(factor=3)"):
        assert type(resolve(name)).__name__ == "Short"
    resolve("0.5*own_criterion_here:Short(factor=2) + 0.5*rsr")
    assert sys.path == path


def test_a_file_of_the_working_directory_does_not_hide_a_module_that_an_installed_criterion_imports(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path_factory.mktemp("installed")
    (installed / "installed_criterion.py").write_text(f"import colorsys\n{CRITERION}")
    (installed / "helper_of_own.py").write_text("FACTOR = 2\n")
    monkeypatch.syspath_prepend(installed)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (directory / "colorsys.py").write_text("raise RuntimeError('the wrong module')\n")
    resolve("installed_criterion:Short")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "absent_criterion:Thing",
            "there is no module absent_criterion in {here} or among the installed packages",
        ),
        ("package_here.absent:Thing", "there is no module package_here.absent in {here} or among"),
        ("own_criterion_here:Absent", r"{here}/own_criterion_here\.py has no Absent$"),
        ("own_criterion_here.py:Short", "no import path, which is package.module:Name; write own_criterion_here:Short"),
        ("./own_criterion_here.py:Short", "write own_criterion_here:Short$"),
        ("own_criterion_here:", "is no import path, which is package.module:Name$"),
        (
            "own_criterion_here:Short(factr=2)",
            "own_criterion_here:Short has no option factr; it has: factor; did you mean .factor.",
        ),
        ("own_criterion_here:instance(factor=2)", "is an object already and takes no options"),
        ("own_criterion_here:Short(factor=-1)", r"own_criterion_here\.py, line 7: RuntimeError: no such factor$"),
        ("raises:Thing", r"{here}/raises\.py, line 3: ZeroDivisionError: division by zero$"),
        ("syntax:Thing", r"{here}/syntax\.py, line 2: SyntaxError: "),
        ("needs:Thing", r"{here}/needs\.py, line 1: ModuleNotFoundError: No module named 'not_installed_here'$"),
        ("exits:Thing", r"{here}/exits\.py, line 1: SystemExit: 3$"),
        ("later:Thing", r"{here}/raises\.py, line 3: ZeroDivisionError: division by zero$"),
    ],
)
def test_what_is_wrong_is_one_line(directory: Path, text: str, says: str) -> None:
    (directory / "raises.py").write_text("def broken():\n    # a comment\n    return 1 / 0\n\nbroken()\n")
    (directory / "later.py").write_text("import raises\n")
    (directory / "syntax.py").write_text("x = 1\ny = (\n")
    (directory / "needs.py").write_text("import not_installed_here\n")
    (directory / "exits.py").write_text("raise SystemExit(3)\n")
    path = list(sys.path)
    with pytest.raises(InputError, match=says.format(here=directory)) as error:
        resolve(text)
    assert str(error.value).startswith(f"criterion '{text}': ")
    assert "\n" not in str(error.value)
    assert sys.path == path


def test_the_command_line_finds_it_too(directory: Path) -> None:
    """The installed command has its own directory at the front of the path, not the working directory."""
    code = (
        "import sys; sys.path = [p for p in sys.path if p not in ('', sys.argv[1])]\n"
        "from genssd.engine.search.search_options import SearchOptions\n"
        "print(SearchOptions(criterion='own_criterion_here:Short').criterion)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, cwd=directory)
    assert done.stdout == "own_criterion_here:Short\n", done.stderr
