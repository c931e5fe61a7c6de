"""Conversations as token ids: the prompt, and the response as the model would write it after the prompt.

The response is what the chat template writes after the prompt, up to the end of the turn. Where the template takes the
thought out of the response, or the prompt opens the thought, the response is its own text and the template's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.distill.data.messages import Conversation
from genssd.engine.common.errors import InputError
from genssd.engine.texts.chat import find_thought
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.thinking import read_end
from genssd.engine.texts.thoughts import (
    add_opening,
    is_open_thought,
    lacks_opening,
    remove_opening,
    split_texts,
    split_thought,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedConversation:
    """Token ids of a prompt and of its response."""

    prompt: list[int]
    completion: list[int]
    is_cut_off: bool
    """Whether the response was cut off; it has no end of sequence then."""


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, finished: bool | None) -> EncodedConversation:
    """Return a conversation's token ids.

    finished: whether the response is finished; None where its row does not state it. Raises InputError on a response
    without a token, and where the chat template does not let the response be told from the prompt.
    """
    content, end = tokenizer.split_end(str(conversation.response["content"]))
    message = {**conversation.response, "content": content}
    text = tokenizer.chat.compose(message)
    has_calls = bool(message.get("tool_calls") or message.get("function_call"))
    if not text.strip() and not has_calls:
        raise InputError("the completion has no token to train on")
    if not content.strip() and not has_calls and end is None and finished is None:
        text = text[: text.rindex(tokenizer.chat.tags.closing)].rstrip("\n")  # the thought, and no answer
    is_cut_off = end is None and (finished is False or is_open_thought(text))
    if is_cut_off and has_calls:
        raise InputError("tool_calls of a response that was cut off cannot be used")
    if isinstance(conversation.prompt, str):
        tokenizer.check_raw()
        prompt, completion = tokenizer.encode_raw(conversation.prompt), tokenizer.encode_plain(text)
        if not is_cut_off:
            completion = append_end(completion, tokenizer, end)
        return EncodedConversation(prompt=prompt, completion=completion, is_cut_off=is_cut_off)
    rendered = tokenizer.chat.render(conversation.prompt, tools=conversation.tools)
    if lacks_opening(text, tokenizer.chat.tags) and _remove_opened(rendered, tokenizer) is None:
        text = add_opening(text, tokenizer.chat.tags)
        message = {**message, "content": text}
    if is_cut_off:
        prompt = tokenizer.encode_rendered(rendered)
        completion = tokenizer.encode_plain(_continue(rendered, text, tokenizer, is_cut_off=True))
    else:
        prompt, completion = _encode_turns(conversation, rendered, message, text, tokenizer)
    return EncodedConversation(prompt=prompt, completion=completion, is_cut_off=is_cut_off)


def check_same_thought(conversation: Conversation, student: Tokenizer, teacher: Tokenizer) -> None:
    """Check that the prompts of both models end in the same: no thought, an open one or an empty one.

    Else the response would be another thought to one of them. Raises InputError.
    """
    prompt = conversation.prompt
    if isinstance(prompt, str):
        return
    states = [
        read_end(tokenizer.chat.render(prompt, tools=conversation.tools), prompt, tokenizer.chat.tags).state
        for tokenizer in (student, teacher)
    ]
    if states[0] != states[1]:
        words = {"none": "no thought", "open": "an open thought", "closed": "an empty thought"}
        raise InputError(
            f"its prompt ends in {words[states[1]]}, the student's in {words[states[0]]}; choose a chat template or "
            "chat_template_kwargs by which both end alike, or train on the rows of genssd select"
        )


def append_end(completion: Sequence[int], tokenizer: Tokenizer, end: int | None = None) -> list[int]:
    """Return the completion with one end of sequence, which is trained, too.

    end: the token by whose name the completion's text ended, None where it ended in no such name.
    """
    ending = [] if end is None else [end]
    if end not in tokenizer.end_token_ids and tokenizer.eos_token_id is not None:
        ending.append(tokenizer.eos_token_id)
    return [*completion, *ending]


def skip_opened(prompt: str, parts: tuple[str, str], tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the parts of a response without the tag that opens its thought, where the prompt has opened it."""
    before, text = parts
    if _remove_opened(prompt, tokenizer) is None:
        return parts
    tags = tokenizer.chat.tags
    return (remove_opening(before, tags), text) if before.strip() else (before, remove_opening(text, tags))


def _encode_turns(
    conversation: Conversation, prompt: str, message: Mapping[str, Any], text: str, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of the last turn with its end.

    prompt: the rendered turns before the last one. message: the last turn. text: its content, with its thought.
    """
    assert not isinstance(conversation.prompt, str)
    turns, tools, chat = conversation.prompt, conversation.tools, tokenizer.chat
    rendered = chat.render([*turns, message], tools=tools, generate=False)
    prompt_ids = tokenizer.encode_rendered(prompt)
    if rendered.startswith(prompt):
        written = rendered[len(prompt) :]
        content = next((c for c in (text, text.strip()) if written.startswith(c)), None)
        if content is not None:
            # the name of a special token is text inside the answer, but after it that is the template's end of turn
            return prompt_ids, _encode_ending(tokenizer.encode_plain(content), written[len(content) :], tokenizer)
    after = chat.write_after(turns, tools=tools)
    if after is None:
        raise InputError("the chat template changes the answer; give prompt and completion as text")
    body = None
    split = split_thought(str(message["content"])) if chat.thought_field and find_thought(message) is None else None
    if split is not None:
        # the thought in the field of its own, from which the template writes the model's format
        apart = {**message, str(chat.thought_field): split[0], "content": split[1]}
        rendered_apart = chat.render([*turns, apart], tools=tools, generate=False)
        body = _find_written(prompt, rendered_apart, after, text, tokenizer)
    if body is None:
        body = _find_written(prompt, rendered, after, text, tokenizer)
    if body is None:
        _check_composition(prompt, rendered, message, text, tokenizer)
        body = _continue(prompt, text, tokenizer, is_cut_off=False)
    return prompt_ids, _encode_written(prompt, prompt_ids, body, text, after, tokenizer)


def _find_written(prompt: str, rendered: str, after: str, text: str, tokenizer: Tokenizer) -> str | None:
    """Return the response as the template writes it after the prompt; None where that is not the whole response.

    rendered: the conversation with the response. after: what the template writes after a response.
    """
    tags, base = tokenizer.chat.tags, _remove_opened(prompt, tokenizer)
    if rendered.startswith(prompt):
        written = rendered[len(prompt) :]
    elif base is not None and rendered.startswith(base) and rendered[len(base) :].lstrip().startswith(tags.opening):
        written = remove_opening(rendered[len(base) :], tags)
    else:
        return None
    body = written.removesuffix(after)
    is_nested = body.count(tags.closing) > max(text.count(tags.closing), 1)
    return body if written.endswith(after) and not is_nested and _holds(body, split_texts(text, tags)) else None


def _check_composition(prompt: str, rendered: str, message: Mapping[str, Any], text: str, tokenizer: Tokenizer) -> None:
    """Check that a response may follow the prompt as its own text: only thoughts keep the template from writing it."""
    base = _remove_opened(prompt, tokenizer)
    if not rendered.startswith(prompt) and (base is None or not rendered.startswith(base)):
        raise InputError(
            "the chat template writes the conversation differently with and without its answer, so the completion "
            "cannot be told from the prompt; give prompt and completion as text"
        )
    if message.get("tool_calls"):
        raise InputError("tool_calls: the chat template writes them otherwise than after the prompt; give text instead")
    if rendered.startswith(prompt) and tokenizer.chat.tags.closing not in text:
        raise InputError("the chat template changes the answer; give prompt and completion as text")


def _holds(body: str, texts: Sequence[str]) -> bool:
    """Return whether all texts stand in the body, in their order."""
    start = 0
    for text in texts:
        position = body.find(text, start)
        if position < 0:
            return False
        start = position + len(text)
    return True


def _remove_opened(prompt: str, tokenizer: Tokenizer) -> str | None:
    """Return a prompt without the tag that opens the thought at its end; None where it opens none."""
    opening = tokenizer.chat.tags.opening
    return prompt.rstrip().removesuffix(opening) if prompt.rstrip().endswith(opening) else None


def _continue(prompt: str, text: str, tokenizer: Tokenizer, *, is_cut_off: bool) -> str:
    """Return the response after a prompt that may have opened its thought."""
    tags = tokenizer.chat.tags
    if _remove_opened(prompt, tokenizer) is None:
        return text
    if text.lstrip().startswith(tags.opening):
        return remove_opening(text, tags)
    if tags.closing in text or is_cut_off:
        return text
    line_break = "" if prompt.endswith("\n") else "\n"
    return f"{line_break}\n{tags.closing}\n\n{text}"  # an empty thought


def _encode_written(
    prompt: str, prompt_ids: list[int], body: str, text: str, after: str, tokenizer: Tokenizer
) -> list[int]:
    """Return the token ids of a response as the template writes it, with its end.

    body: the response. text: the response as the row has it, in which the names of special tokens are characters.
    after: what the template writes after the response.
    """
    if tokenizer.encode_plain(text) == tokenizer.encode(text, special=False):
        before_end, ending = _split_at_end(after, tokenizer)
        body += before_end
        ids = tokenizer.encode(body, special=False)
        joined = tokenizer.encode_rendered(prompt + body)  # tokenizers that put a space before a text do not here
        if joined[: len(prompt_ids)] == prompt_ids:
            ids = joined[len(prompt_ids) :]
        return _encode_ending(ids, ending, tokenizer)
    ids, start = [], 0
    for part in split_texts(text, tokenizer.chat.tags):
        position = body.index(part, start)
        ids += [*tokenizer.encode(body[start:position], special=False), *tokenizer.encode_plain(part)]
        start = position + len(part)
    return _encode_ending([*ids, *tokenizer.encode(body[start:], special=False)], after, tokenizer)


def _split_at_end(after: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return what a template writes after a response up to the name of an end token, and the remainder."""
    positions = [after.find(name) for name, i in tokenizer.end_names.items() if i in tokenizer.end_token_ids]
    position = min((p for p in positions if p >= 0), default=0)
    return after[:position], after[position:]


def _encode_ending(ids: list[int], ending: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a response, then of the template's text after it up to the first end of sequence."""
    ending_ids = tokenizer.encode(ending, special=False)
    ends = [i for i, token in enumerate(ending_ids) if token in tokenizer.end_token_ids]
    completion = [*ids, *(ending_ids[: ends[0] + 1] if ends else ending_ids)]
    return completion if ends else append_end(completion, tokenizer)
