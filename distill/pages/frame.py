"""The frame of every page that genssd writes: one self-contained HTML file in one look, light and dark.

A page fetches nothing: its style and its script stand in it, and its content security policy forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.resources import files

from jinja2 import Environment, Template
from markupsafe import Markup

HOME = "genssd.distill.pages"
"""Package of the frame's own files."""
GENERATOR = "genssd"
"""Content of the `generator` of every page, by which a page of ours is recognised."""


def render_frame(*, title: str, body: Markup, style: str = "", script: str = "", data: str = "") -> str:
    """Return the HTML of a page.

    title: text of its tab. body: HTML within `main`. style, script: added to those of the frame. data: HTML after the
    body that holds data for the script.
    """
    script = f'"use strict";\n{read_file(HOME, "frame.js")}\n{script}'
    return _compile(HOME, "frame.html", ()).render(
        title=title,
        generator=GENERATOR,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(f"{read_file(HOME, 'frame.css')}\n{style}"),
        script=Markup(script),
        body=body,
        data=Markup(data),
    )


def render_template(
    package: str, name: str, filters: Mapping[str, Callable[..., object]] | None = None, /, **values: object
) -> Markup:
    """Return the HTML of a template of a package, in which values are escaped. filters: further ones, by name."""
    return Markup(_compile(package, name, tuple((filters or {}).items())).render(**values))


@lru_cache(maxsize=16)
def _compile(package: str, name: str, filters: tuple[tuple[str, Callable[..., object]], ...]) -> Template:
    """Compile a template once for all pages of a process: that takes longer than to fill it in."""
    environment = Environment(autoescape=True)
    environment.filters.update(filters)
    return environment.from_string(read_file(package, name))


def read_file(package: str, *names: str) -> str:
    """Return the text of a file of a package, by the names of the folders around it and its own."""
    place = files(package)
    for name in names:
        place = place.joinpath(name)
    return place.read_text(encoding="utf-8")
