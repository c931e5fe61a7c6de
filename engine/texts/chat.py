"""A checkpoint's chat template: messages to text, with every field that carries content used or refused by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line
from genssd.engine.common.time_limit import TimeLimitError, call_within
from genssd.engine.texts.chat_options import RENDERER_VARIABLES, ChatOptions, fix_date, read_variables
from genssd.engine.texts.control_tokens import GUARD, OPTION, ControlTokens, iter_texts
from genssd.engine.texts.template_limits import find_huge_step
from genssd.engine.texts.thoughts import ThoughtTags, compose, find_tags

Messages = Sequence[Mapping[str, Any]]
"""Chat messages: a text `role`, a text `content`, and further fields that the chat template may read."""

THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold the thought before its content."""
CONTENT_FIELDS = ("tool_calls", "function_call", "images", "audio", "videos", "documents", "refusal")
"""Further fields of a message that hold content."""
MAX_SECONDS = 2.0
"""Seconds that the chat template may compute for one conversation."""
PROBE = "genssd7probe"
"""Text of a message that shows what a chat template writes around it."""
NO_SYSTEM_PROMPT = "the prompt is text, to which no system prompt can be added; give messages or a question"
"""Message about raw text where a system prompt is given."""
SYSTEM_ROLES = ("system", "developer")
"""Roles of a system message."""


class ChatTemplate:
    """The chat template of a tokenizer of transformers, with the options of its rendering."""

    def __init__(self, hf: Any, directory: Path, options: ChatOptions = ChatOptions()) -> None:
        self.hf = hf
        self.directory = directory
        self.options = options

    @property
    def exists(self) -> bool:
        return bool(self.hf.chat_template)

    @cached_property
    def _huge_step(self) -> str | None:
        return find_huge_step(self.hf.chat_template)

    @cached_property
    def tags(self) -> ThoughtTags:
        """Tags around thoughts, as the template names them."""
        return find_tags(str(self.hf.chat_template or ""))

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """Control tokens of the tokenizer."""
        return ControlTokens(self.hf)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the variables that the template reads, those of the renderer included."""
        template: str | Mapping[str, str] = self.hf.chat_template or ""
        texts = (template,) if isinstance(template, str) else template.values()
        try:
            names = {name for text in texts for name in read_variables(text)}
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template of {self.directory} cannot be parsed: {error}") from None
        return frozenset(names)

    def check_options(self) -> None:
        """Raise InputError naming a variable of the options that the template does not read."""
        unread = [name for name in self.options.template_kwargs if name not in self.settable_variables]
        if unread:
            known = ", ".join(sorted(self.settable_variables)) or "none"
            raise InputError(
                f"{self.options.name_option(unread[0])}: the chat template of {self.directory} does not read "
                f"{unread[0]}; it reads: {known}"
            )

    @cached_property
    def settable_variables(self) -> frozenset[str]:
        """Names of the variables that the options may set."""
        return self.variables - RENDERER_VARIABLES - frozenset(map(str, self.hf.special_tokens_map))

    @cached_property
    def thought_field(self) -> str | None:
        """Name of the message field that the template writes as the last message's thought; None if it writes none."""
        user = {"role": "user", "content": "a"}
        for name in THOUGHT_FIELDS:
            text = self.try_render([user, {"role": "assistant", "content": "b", name: PROBE}], (), generate=False)
            if text is not None and PROBE in text:
                return name
        return None

    def render(self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] = (), generate: bool = True) -> str:
        """Return the text of chat messages. generate: add the opening of the assistant's turn.

        Where a message that is not the assistant's, or a tool, holds the name of a control token, the text holds a
        placeholder in its place (see control_tokens.py), unless the options make it a token. A thought in a field that
        the template ignores stands in tags before the content.

        Raises InputError where the template ignores tools, a message that is neither the user's nor the assistant's, or
        a field of CONTENT_FIELDS; where it alters contents that hold the name of a control token, or forms such a name
        out of them; on messages that are malformed or that the template rejects; and where no template exists.
        """
        if not self.exists:
            raise InputError(
                f"{self.directory} has no chat template, but the prompt is a list of messages; "
                "pass plain text or add chat_template.jinja"
            )
        messages = add_system_prompt(messages, self.options.system_prompt)
        if self.options.special_tokens_in_text:
            return self._render(messages, tools, generate=generate)
        replaced, replaced_tools = self._replace_names(messages, tools)
        text = self._render(replaced, replaced_tools, generate=generate)
        self._check_borders(text, replaced, replaced_tools, generate=generate)
        if (replaced, replaced_tools) != (list(messages), list(tools)):
            try:
                plain = self._render(messages, tools, generate=generate)
            except InputError:
                plain = None
            if self.control_tokens.restore_names(text) != plain:
                written = self.control_tokens.find_names("\n".join(iter_texts([*messages, *tools])))
                raise InputError(
                    f"the chat template of {self.directory} alters a message that holds the name of a control token "
                    f"({', '.join(dict.fromkeys(written))}), so that it cannot be kept as text; remove the name, or "
                    f"pass {OPTION} to have it as the token"
                )
        return text

    def _replace_names(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """Return messages and tools with placeholders in place of the names of control tokens that are text."""
        tokens = self.control_tokens
        tokens.check_no_placeholder([*messages, *tools])
        replaced = [
            message if message.get("role") == "assistant" else tokens.replace_names(message) for message in messages
        ]
        return replaced, tokens.replace_names(tools)

    def _check_borders(
        self, text: str, replaced: Messages, tools: Sequence[Mapping[str, Any]], *, generate: bool
    ) -> None:
        """Raise InputError where a content and what stands around it form the name of a control token together."""
        tokens = self.control_tokens
        guarded = [
            {**message, "content": f"{GUARD}{message['content']}{GUARD}"}
            if message["role"] != "assistant" and tokens.may_cross(message["content"])
            else message
            for message in replaced
        ]
        if guarded == list(replaced):
            return
        names, apart = tokens.find_names(text), tokens.find_names(self._render(guarded, tools, generate=generate))
        formed = Counter(names) - Counter(apart)
        if formed:
            raise InputError(
                f"the chat template of {self.directory} forms the name of a control token ({', '.join(formed)}) out "
                f"of a message and the text around it; change the message, or pass {OPTION} to have it as the token"
            )

    def _render(self, messages: Messages, tools: Sequence[Mapping[str, Any]], *, generate: bool) -> str:
        prepared = [self._prepare(message) for message in messages]
        try:
            text = self._apply(prepared, tools, generate=generate)
        except TimeLimitError:
            raise
        except Exception as error:  # a template is a program of its own
            # the arguments of a call are an object for most templates, and JSON text for some
            prepared = [self._prepare(message, parse_calls=False) for message in messages]
            text_or_none = self.try_render(prepared, tools, generate=generate)
            if text_or_none is None:
                raise InputError(
                    f"the chat template of {self.directory} rejects the messages: {one_line(error)}"
                ) from None
            text = text_or_none
        self._check_use(text, prepared, tools, generate=generate)
        return text

    def write_after(self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] = ()) -> str | None:
        """Return what the template writes after the content of an assistant's turn that follows the messages.

        The result is None where the template does not write the content.
        """
        probe = {"role": "assistant", "content": PROBE}
        messages = add_system_prompt(messages, self.options.system_prompt)
        text = self.try_render([*(self._prepare(message) for message in messages), probe], tools, generate=False)
        return None if text is None or PROBE not in text else text.rpartition(PROBE)[2]

    def compose(self, message: Mapping[str, Any]) -> str:
        """Return a message's content with its thought, if it has one in a field, in tags before it.

        Raises InputError where the content has another thought.
        """
        content, thought = str(message.get("content", "")), find_thought(message)
        if thought is None:
            return content
        if self.tags.closing in content:
            if thought.strip() in content:
                return content
            raise InputError(f"a message has one thought in its content and another one in {_name_thought(message)}")
        return compose(thought, content, self.tags)

    def _prepare(self, message: Mapping[str, Any], *, parse_calls: bool = True) -> dict[str, Any]:
        """Return a message as the template reads it. parse_calls: give the arguments of tool calls as objects."""
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f"a chat message needs a string role and a string content, not {dict(message)!r}")
        prepared = {name: value for name, value in message.items() if name not in THOUGHT_FIELDS}
        thought = find_thought(message)
        if thought is not None and self.thought_field is not None and self.tags.closing not in message["content"]:
            prepared[self.thought_field] = thought
        elif thought is not None:
            prepared["content"] = self.compose(message)
        if parse_calls and isinstance(message.get("tool_calls"), list):
            prepared["tool_calls"] = [_parse_arguments(call) for call in message["tool_calls"]]
        return prepared

    def _check_use(self, text: str, messages: Messages, tools: Sequence[Mapping[str, Any]], *, generate: bool) -> None:
        """Raise InputError naming what the text does not depend on."""
        if tools and text == self.try_render(messages, (), generate=generate):
            raise InputError(f"tools: the chat template of {self.directory} ignores them")
        for index, message in enumerate(messages):
            before, after = messages[:index], messages[index + 1 :]
            if message["role"] not in ("user", "assistant"):
                without = self.try_render([*before, *after], tools, generate=generate) if before or after else ""
                # a template may write the same text by itself, as its default system message
                if message["content"].strip() not in text and text == without:
                    role = message["role"]
                    raise InputError(f"the chat template of {self.directory} ignores messages of the role {role!r}")
            for name in CONTENT_FIELDS:
                if message.get(name):
                    rest = {key: value for key, value in message.items() if key != name}
                    if text == self.try_render([*before, rest, *after], tools, generate=generate):
                        raise InputError(f"the chat template of {self.directory} ignores the field {name} of a message")

    def try_render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = (), *, generate: bool) -> str | None:
        """Return the text of prepared messages; None where the template rejects them."""
        try:
            return self._apply(messages, tools, generate=generate)
        except TimeLimitError:
            raise
        except Exception:  # a template is a program of its own
            return None

    def _apply(self, messages: Messages, tools: Sequence[Mapping[str, Any]], *, generate: bool) -> str:
        options: dict[str, Any] = {**self.options.template_kwargs}
        if tools:
            options["tools"] = list(tools)
        if self._huge_step is not None:
            raise TimeLimitError(f"the chat template of {self.directory} has {self._huge_step}, which is not computed")
        if self.options.date is not None and "strftime_now" in self.variables:
            template = self.hf.get_chat_template(tools=options.get("tools"))
            options["chat_template"] = fix_date(template, self.options.date)
        return call_within(
            MAX_SECONDS,
            f"the chat template of {self.directory}",
            lambda: str(
                self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate, **options)
            ),
        )


def add_system_prompt(messages: Messages, system_prompt: str | None) -> Messages:
    """Return messages that begin with the system prompt, unless they have a system message of their own."""
    has_system = bool(messages) and messages[0].get("role") in SYSTEM_ROLES
    return (
        messages if system_prompt is None or has_system else [{"role": "system", "content": system_prompt}, *messages]
    )


def find_thought(message: Mapping[str, Any]) -> str | None:
    """Return the thought in a message's fields; None where it has none. Raises InputError on two different ones."""
    thoughts = {name: message[name] for name in THOUGHT_FIELDS if message.get(name)}
    for name, thought in thoughts.items():
        if not isinstance(thought, str):
            raise InputError(f"{name} must be text, not {type(thought).__name__}")
    texts = {thought.strip() for thought in thoughts.values() if thought.strip()}
    if len(texts) > 1:
        raise InputError(f"a message has different thoughts in {' and '.join(thoughts)}")
    return next((thought for thought in thoughts.values() if thought.strip()), None)


def _name_thought(message: Mapping[str, Any]) -> str:
    return next(name for name in THOUGHT_FIELDS if message.get(name))


def _parse_arguments(call: Any) -> Any:
    """Return a tool call whose arguments, a JSON text in the servers' format, are the object that templates expect."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
