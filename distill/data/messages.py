"""The one reader of rows' prompts and responses: every field that carries content is used, or refused by name.

{"prompt": text}                            raw text; {"prompt": messages} and {"messages": ...} are conversations
{"question" | "problem" | "instruction" | "query" | "input": text}      one user message, together with:
    instruction, body, context, passage     before the question
    input                                   after the question (Alpaca's)
    options, choices                        after it, one line each, with letters
system, system_prompt                       a system message before the others
tools                                       are passed to the chat template
reasoning_content, thinking, reasoning      the thought of the response, or of a message
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.engine.common.errors import InputError
from genssd.engine.texts.chat import THOUGHT_FIELDS, Messages

QUESTION_FIELDS = ("question", "problem", "instruction", "query", "input")
COMPLETION_FIELDS = ("completion", "response", "output", "solution", "answer")
SYSTEM_FIELDS = ("system", "system_prompt")
CONTEXT_FIELDS = ("body", "context", "passage")
OPTION_FIELDS = ("options", "choices")
QUESTION_PARTS = ("body", "input", *OPTION_FIELDS)
REFUSED_FIELDS = ("functions", "history", "images", "image", "audio", "videos")
LABEL_KEYS, OPTION_KEYS = ("label", "key", "letter"), ("text", "value", "option", "content")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row's prompt and its response."""

    prompt: str | Messages
    """Raw text, or the messages before the response."""
    response: Mapping[str, Any]
    """The assistant's message."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Descriptions of the tools that the assistant may call."""


def parse_prompt(fields: Mapping[str, Any], where: str) -> str | Messages:
    """Return a row's prompt. Raises InputError naming `where` and the field where it has none or one that is unusable.

    Assistant's turns at the end of messages belong to the response and are left out.
    """
    if "prompt" in fields and isinstance(fields["prompt"], str):
        check_text(fields["prompt"], "prompt", where)
        return parse_raw_prompt(fields, where)
    name = next((name for name in ("prompt", "messages") if name in fields), None)
    if name is None:
        return parse_question(fields, where)
    messages = parse_messages(fields, name, where)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise InputError(f"{where}: {name} holds no turn to answer")
    return messages


def parse_raw_prompt(fields: Mapping[str, Any], where: str) -> str:
    """Return the text in the field `prompt`, which goes to the model as it is."""
    prompt = str(fields["prompt"])
    check_covered(fields, (*SYSTEM_FIELDS, *QUESTION_PARTS), prompt, where)
    if fields.get("tools"):
        raise InputError(f"{where}: tools cannot be used with a prompt that is text; give messages")
    return prompt


def parse_messages(fields: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """Return the conversation in the field `name` of a row, after the row's system message."""
    messages = _add_system(check_messages(fields[name], name, where), fields, where)
    check_covered(fields, QUESTION_PARTS, "\n".join(message["content"] for message in messages), where)
    return messages


def parse_question(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return a row's question as a user message, after the row's system message."""
    _refuse(fields, where)
    return _add_system([{"role": "user", "content": _compose_question(fields, where)}], fields, where)


def find_question(fields: Mapping[str, Any], where: str) -> str | None:
    """Return the text of a row's last turn that is not the assistant's; None where the row has none.

    Raises InputError naming `where` on a question that is unusable.
    """
    turns = fields.get("messages") or fields.get("prompt")
    question = None
    if isinstance(turns, list):
        readable = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") != "assistant"]
        question = readable[-1].get("content") if readable else None
    elif isinstance(turns, str):
        question = turns
    elif any(isinstance(fields.get(name), str) for name in QUESTION_FIELDS):
        question = parse_question(fields, where)[-1]["content"]
    return str(question) if question else None


def parse_conversation(fields: Mapping[str, Any], completion_fields: Sequence[str], where: str) -> Conversation:
    """Return a row's prompt and response.

    completion_fields: names of the fields that may hold the response to a question, the most likely ones first.
    Raises InputError naming `where` and the field.
    """
    thought, tools = parse_thought(fields, where), parse_tools(fields, where)
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        response = {"role": "assistant", "content": completion, **thought}
        return Conversation(prompt=parse_raw_prompt(fields, where), response=response)
    if "messages" in fields:
        turns = parse_messages(fields, "messages", where)
    elif prompt is not None and completion is not None:
        if isinstance(prompt, str):
            fields = {**fields, "prompt": [{"role": "user", "content": prompt}]}
        turns = parse_messages(fields, "prompt", where)
        if isinstance(completion, str):
            turns.append({"role": "assistant", "content": completion})
        else:
            turns += check_messages(completion, "completion", where)
    else:
        answer = next((fields[name] for name in completion_fields if isinstance(fields.get(name), str)), None)
        if answer is None or not any(isinstance(fields.get(name), str) for name in QUESTION_FIELDS):
            raise InputError(
                f"{where}: no prompt with a completion; a row needs messages, or prompt and completion, or a question "
                f"with one of {', '.join(completion_fields)}; this one has {', '.join(fields) or 'nothing'}. `genssd "
                "select` or `genssd generate` writes responses to problems"
            )
        turns = [*parse_question(fields, where), {"role": "assistant", "content": answer}]
    if turns[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: the last message must be the assistant's, it is the {turns[-1]['role']}'s. `genssd select` or "
            "`genssd generate` writes responses to problems"
        )
    return Conversation(prompt=turns[:-1], response={**thought, **turns[-1]}, tools=tools)


def parse_thought(fields: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return the fields of a row that are the thought of its response."""
    thoughts = {name: fields[name] for name in THOUGHT_FIELDS if fields.get(name)}
    for name, thought in thoughts.items():
        if not isinstance(thought, str):
            raise InputError(f"{where}: {name} must be text, not {type(thought).__name__}")
    return thoughts


def parse_tools(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the descriptions of tools of a row, from a list of objects or from the JSON text of one."""
    tools = fields.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: tools is text, but not the JSON of a list") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: tools must be a list of objects")
    return tools


def check_text(value: object, name: str, where: str) -> str:
    """Return the value of a field that must be a text with a visible character."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} must be text, not {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{where}: {name} is empty")
    return value


def _join_parts(content: Any, where: str) -> Any:
    """Return a message's content; one that is a list of texts and text parts as one text, a line for each.

    Raises InputError naming a part that is no text, such as an image.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
        text = part.get("text") if is_text else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InputError(
                f"{where}: a part of a content must be text, not {kind!r}; only text is trained and scored"
            )
        texts.append(text)
    return "\n".join(texts)


def check_messages(value: object, name: str, where: str) -> list[dict[str, Any]]:
    """Return the value as chat messages, without their empty fields. Raises InputError naming `where` if it is none.

    name: the row's field, for the message. Only a message with a tool call or a thought may lack a content.
    """
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {name} must be text or a non-empty list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise InputError(f"{where}: {name}: a message needs a string role and a string content, not {message!r}")
        further = {k: v for k, v in message.items() if k not in ("role", "content") and v not in (None, "", [], {})}
        content = _join_parts(message.get("content"), f"{where}: {name}")
        if content is None and any(name in further for name in ("tool_calls", "function_call", *THOUGHT_FIELDS)):
            content = ""
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise InputError(f"{where}: {name}: a message needs a string role and a string content, not {message!r}")
        messages.append({"role": message["role"], "content": content, **further})
    return messages


def check_covered(fields: Mapping[str, Any], names: Sequence[str], prompt: str, where: str) -> None:
    """Raise InputError naming a field next to a row's prompt or messages whose text is not in these."""
    _refuse(fields, where)
    for name in names:
        if any(text.strip() not in prompt for text in _iter_texts(fields.get(name))):
            raise InputError(f"{where}: {name} is not in the row's prompt or messages; write it into them or remove it")


def _refuse(fields: Mapping[str, Any], where: str) -> None:
    for name in REFUSED_FIELDS:
        if fields.get(name):
            raise InputError(f"{where}: {name} cannot be used; write its content into messages, or remove the field")


def _add_system(messages: list[dict[str, Any]], fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    for name in SYSTEM_FIELDS:
        if not fields.get(name):
            continue
        text = check_text(fields[name], name, where)
        if messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": text}, *messages]
        elif text.strip() not in messages[0]["content"]:
            raise InputError(f"{where}: {name} differs from the system message of the row; keep one of them")
    return messages


def _compose_question(fields: Mapping[str, Any], where: str) -> str:
    """Return the text of a question with the fields before and after it, each on lines of its own."""
    texts = {name: fields[name] for name in QUESTION_FIELDS if name in fields}
    names = [name for name, text in texts.items() if isinstance(text, str) and text.strip()]
    if not names:
        for name in texts:
            check_text(fields[name], name, where)
        expected, present = ", ".join(("prompt", "messages", *QUESTION_FIELDS)), ", ".join(fields) or "nothing"
        raise InputError(f"{where}: no prompt; a row needs one of {expected}, this one has {present}")
    question = check_text(fields[names[0]], names[0], where)
    for name in names[1:]:
        text = fields[name].strip()
        if name == "instruction":
            question = question if question.startswith(text) else f"{text}\n\n{question}"
        elif name == "input" or names[0] == "instruction":
            question = question if question.strip() == text else f"{question}\n\n{text}"
        elif text not in question:
            raise InputError(f"{where}: {names[0]} and {name} hold different texts; keep one of them")
    if "input" in fields and not isinstance(fields["input"], str):
        check_text(fields["input"], "input", where)
    for name in reversed(CONTEXT_FIELDS):
        if fields.get(name) and not question.startswith(text := check_text(fields[name], name, where).strip()):
            question = f"{text}\n\n{question}"
    for name in OPTION_FIELDS:
        options = _format_options(fields.get(name), name, where)
        if not {line.strip() for line in options} <= {line.strip() for line in question.splitlines()}:
            question = "\n".join((question, *options))
    return question


def _format_options(value: object, name: str, where: str) -> list[str]:
    """Return the lines of the options of a question, each with its letter."""
    if value is None or value == "" or value == [] or value == {}:
        return []
    if isinstance(value, str):
        return value.strip().splitlines()
    if isinstance(value, dict):
        labels, texts = _get_first(value, LABEL_KEYS), _get_first(value, OPTION_KEYS)
        is_table = isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts)
        pairs: list[tuple[Any, Any]] = list(zip(labels, texts, strict=True) if is_table else value.items())
    elif isinstance(value, list) and all(isinstance(option, dict) for option in value):
        pairs = [(_get_first(option, LABEL_KEYS), _get_first(option, OPTION_KEYS)) for option in value]
    elif isinstance(value, list) and len(value) <= len(LETTERS):
        pairs = list(zip(LETTERS, value, strict=False))
    else:
        pairs = [(None, None)]
    lines = []
    for label, text in pairs:
        if isinstance(text, bool) or not isinstance(label, str) or not isinstance(text, str | int | float):
            raise InputError(f"{where}: {name} must be a list of texts, or texts by their letters")
        has_label = isinstance(text, str) and text.lstrip("( ").startswith(tuple(f"{label}{end}" for end in ").:"))
        lines.append(str(text) if has_label else f"{label}. {text}")
    return lines


def _get_first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first of the named fields; None where none exists."""
    return next((fields[name] for name in names if name in fields), None)


def _iter_texts(value: object) -> Iterator[str]:
    """Yield all texts in a JSON value that have a visible character."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, dict):
        for element in value.values():
            yield from _iter_texts(element)
    elif isinstance(value, list):
        for element in value:
            yield from _iter_texts(element)
