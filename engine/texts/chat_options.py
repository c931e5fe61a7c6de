"""Options of the rendering of chats, and the variables of chat templates that they may set."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from genssd.engine.common.options_check import check_types

RENDERER_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
)
"""Variables and functions of chat templates that the renderer itself sets."""
ASKS_DEFINED = frozenset(("defined", "undefined", "none", "default", "d"))
"""Tests and filters by which a chat template asks whether a variable is set."""
DIRECTIVES = "aAwdbBmyYHIpMSfjUWcxXuVGeFDTRhnt"
"""Letters of the directives of strftime that a template may use."""
UNPADDED_DIRECTIVES = "dmHIMSj"
"""Letters of the directives that may also be written without a leading zero, as %-d."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How chats are rendered and encoded, in addition to what the chat template and the messages say."""

    system_prompt: str | None = None
    """System message of the conversations that have none."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the chat template reads, such as enable_thinking."""
    teacher_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the teacher's chat template alone; they replace those of template_kwargs."""
    student_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the student's chat template alone; they replace those of template_kwargs."""
    date: datetime.date | None = None
    """Date that the chat template prints as today's. None: the date at which it is rendered."""
    special_tokens_in_text: bool = False
    """Whether the names of control tokens in the messages of users, systems and tools become these tokens."""

    def __post_init__(self) -> None:
        check_types(self)

    def for_model(self, role: Literal["teacher", "student"]) -> ChatOptions:
        """Return the options of one model: its own variables are among those of template_kwargs, the other's gone."""
        own = self.teacher_template_kwargs if role == "teacher" else self.student_template_kwargs
        return replace(
            self,
            template_kwargs={**self.template_kwargs, **own},
            teacher_template_kwargs=own if role == "teacher" else {},
            student_template_kwargs=own if role == "student" else {},
        )

    def name_option(self, variable: str) -> str:
        """Return the name of the option that sets a variable of the chat template."""
        names = ("teacher_template_kwargs", "student_template_kwargs")
        return next((name for name in names if variable in getattr(self, name)), "chat_template_kwargs")


class _Generation(Extension):
    """The block `{% generation %}` of transformers, which encloses what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_variables(template: str) -> frozenset[str]:
    """Return the names of the variables that a chat template reads and that may be set from outside.

    A variable that the template sets itself is one of them only where the template asks whether it is defined. Raises
    jinja2.TemplateError where the template cannot be parsed.
    """
    environment = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    tree = environment.parse(template)
    names = meta.find_undeclared_variables(tree) - environment.globals.keys()
    assigned = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    questions = [*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter)]
    optional = {q.node.name for q in questions if q.name in ASKS_DEFINED and isinstance(q.node, nodes.Name)}
    return frozenset(names - (assigned - optional))


def fix_date(template: str, date: datetime.date) -> str:
    """Return a chat template in which strftime_now formats the given date instead of today's; the time is midnight."""
    midnight = datetime.datetime.combine(date, datetime.time())
    values = {f"%{letter}": midnight.strftime(f"%{letter}") for letter in DIRECTIVES}
    values |= {f"%-{letter}": str(int(midnight.strftime(f"%{letter}"))) for letter in UNPADDED_DIRECTIVES}
    # the renderer of transformers passes no functions on to a template, but a macro of the template is one
    replaced = "".join(f" | replace({name!r}, {value!r})" for name, value in values.items())
    macro = f"{{%- macro strftime_now(format) -%}}{{{{- format{replaced} | replace('%%', '%') -}}}}{{%- endmacro %}}"
    return f"{macro}\n{template}"  # the renderer removes one line break after a block
