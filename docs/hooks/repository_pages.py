"""Hooks of mkdocs: files of the repository that are pages of the site, and the reference of the command line.

README.md is the first page. A link from one page to a file of the repository becomes a link between pages where the
file is a page, and otherwise one to a copy of the file in the site, so that every link is checked.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "benchmarks.md",
}
"""Pages that lie outside of docs/, by their place in the repository."""
PACKAGE = ROOT / "build/reference/genssd"
"""Copy of the package that mkdocstrings reads, which follows no links and skips folders without __init__.py."""
COPIES = "repository"
"""Folder of the site for other files that pages link to."""
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")
HELP = "<!-- the help of every command -->"
"""Line of cli.md in whose place the reference of the command line stands."""
NAMES = re.compile(r"<!-- names of: (.*) -->")
"""Line in whose place the names stand that genssd exports from these modules."""
REST = "the rest"
"""What the line lists for the names that no other page has."""


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package to where mkdocstrings reads it (`paths` in mkdocs.yml)."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / "src/genssd", PACKAGE, ignore=_leave_out)
    for folder in PACKAGE.rglob("*"):
        if folder.is_dir():
            (folder / "__init__.py").touch()


def _leave_out(folder: str, names: list[str]) -> list[str]:
    """Return the names in a folder that are neither folders of the package nor Python files."""
    paths = {name: Path(folder, name) for name in names}
    return [n for n, path in paths.items() if n == "__pycache__" or not (path.is_dir() or path.suffix == ".py")]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of docs/, and copies of the other files that pages link to."""
    origins = {page: origin for origin, page in PAGES.items()}
    origins |= {f.src_uri: f"docs/{f.src_uri}" for f in files if f.is_documentation_page()}
    copies: set[str] = set()
    for page, origin in origins.items():
        text = (ROOT / origin).read_text()
        rewritten = LINK.sub(partial(_place_link, origin=origin, page=page, copies=copies), text)
        if page == "cli.md":
            rewritten = rewritten.replace(HELP, render_commands())
        rewritten = NAMES.sub(lambda match: render_names(match[1]), rewritten)
        if (file := files.get_file_from_path(page)) is not None:
            files.remove(file)
        files.append(File.generated(config, page, content=rewritten))
    for copy in sorted(copies):
        files.append(File.generated(config, f"{COPIES}/{copy}", abs_src_path=str(ROOT / copy)))
    return files


def _place_link(match: re.Match[str], *, origin: str, page: str, copies: set[str]) -> str:
    """Return the target of a link of the file `origin` as a target of the page `page`."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
    if not (ROOT / target).exists():
        raise PluginError(f"{origin} links to {match[1]}, which is not there")
    if target in PAGES:
        place = PAGES[target]
    elif target.startswith("docs/"):
        place = target.removeprefix("docs/")
    elif (ROOT / target).is_file():
        copies.add(target)
        place = f"{COPIES}/{target}"
    else:
        raise PluginError(f"{origin} links to the folder {match[1]}: link to a file in it")
    return posixpath.relpath(place, posixpath.dirname(page) or ".") + (match[2] or "")


def render_names(modules: str) -> str:
    """Return the lines of mkdocstrings for what genssd exports from modules, which may be those of a folder."""
    import genssd

    listed = [set(NAMES.findall(path.read_text())) for path in (ROOT / "docs/api").glob("*.md")]
    taken = [prefix for text in sorted(set().union(*listed)) if text != REST for prefix in text.split()]
    wanted = taken if modules == REST else modules.split()
    chosen: dict[int, list[str]] = {}
    for name, module in genssd._HOME.items():
        places = [i for i, prefix in enumerate(wanted) if f"{module}.".startswith(f"{prefix}.")]
        if bool(places) != (modules == REST):
            chosen.setdefault(places[0] if places else 0, []).append(f"::: {module}.{name}")
    return "\n\n".join(line for _, lines in sorted(chosen.items()) for line in lines)


def render_commands() -> str:
    """Return the help of every command as Markdown: a table for each group of flags."""
    from genssd.cli import SUMMARIES
    from genssd.configs import CONFIGS
    from genssd.flag_groups import group_flags
    from genssd.flag_list import list_flags
    from genssd.help_text import COMMON, describe_flag
    from genssd.outputs import OUTPUTS

    lines: list[str] = []
    for command, summary in SUMMARIES.items():
        flags = list_flags(CONFIGS[command])
        required = " ".join(flag.spell() for flag in flags if flag.is_required)
        lines += [f"## genssd {command}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        lines += ["```", f"genssd {command} {required + ' ' if required else ''}[--flag value ...]", "```", ""]
        for title, members in group_flags(command, flags).items():
            lines += _table(f"{title[0].upper()}{title[1:]}", [(flag.spell(), describe_flag(flag)) for flag in members])
        if command in OUTPUTS:
            lines += _table("Files in the output directory", list(OUTPUTS[command].items()))
    return "\n".join([*lines, *_table("For every command", list(COMMON))])


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    entries = [f"| {_cell(name, is_code=True)} | {_cell(text)} |" for name, text in rows]
    return [f"**{title}**", "", "| | |", "|---|---|", *entries, ""]


def _cell(text: str, *, is_code: bool = False) -> str:
    """Return a text as the cell of a table in which nothing of it is Markdown."""
    if is_code:
        return "<code>" + text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;") + "</code>"
    return re.sub(r"([\\`*_\[\]<>|{}])", r"\\\1", " ".join(text.split())).replace(r"\|", "&#124;")
