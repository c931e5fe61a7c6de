"""Chat templates whose single steps are too large for a time limit to stop them: powers, and huge numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jinja2 import Environment, TemplateError, nodes

LARGEST_NUMBER = 10_000_000
"""Largest integer that a template may compute with; it may compare with larger ones."""


def find_huge_step(template: str | Mapping[str, str] | None) -> str | None:
    """Return the part of a chat template that one step of it could compute for ever; None where it has none.

    template: the text, or texts by name. A template that cannot be parsed has none: rendering it names the error.
    """
    texts = template.values() if isinstance(template, Mapping) else (template or "",)
    for text in texts:
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(str(text))
        except (TemplateError, RecursionError, ValueError):
            continue
        for node in _iter_computed(tree):
            if isinstance(node, nodes.Pow):
                return f"a power in line {node.lineno}"
            if isinstance(node, nodes.Const) and isinstance(node.value, int) and abs(node.value) > LARGEST_NUMBER:
                return f"a number above {LARGEST_NUMBER} in line {node.lineno}"
    return None


def _iter_computed(node: nodes.Node) -> Iterator[nodes.Node]:
    """Yield all nodes of a template but those of comparisons."""
    for child in node.iter_child_nodes():
        if not isinstance(child, nodes.Compare):
            yield child
            yield from _iter_computed(child)
