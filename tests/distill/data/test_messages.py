"""Questions from several fields of a row."""

from __future__ import annotations

from typing import Any

import pytest

from genssd.distill.data.messages import parse_prompt
from genssd.engine.common.errors import InputError


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"instruction": "Add.", "input": "2 and 3"}, "Add.\n\n2 and 3"),
        ({"instruction": "Add.", "input": ""}, "Add."),
        ({"instruction": "Add 3 to 4 and 3", "input": "3"}, "Add 3 to 4 and 3\n\n3"),
        ({"instruction": "Add.", "question": "2 and 3?"}, "Add.\n\n2 and 3?"),
        ({"body": "Tom has 2 pens.", "question": "How many?"}, "Tom has 2 pens.\n\nHow many?"),
        ({"context": "Text.", "question": "Who?"}, "Text.\n\nWho?"),
        ({"question": "Text. Who?", "context": "Text."}, "Text. Who?"),
        ({"question": "q", "options": ["x", "y"]}, "q\nA. x\nB. y"),
        ({"question": "q", "options": ["A)x", "B)y"]}, "q\nA)x\nB)y"),
        ({"question": "q", "options": {"A": "x", "B": 3}}, "q\nA. x\nB. 3"),
        ({"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}}, "q\nA. x\nB. y"),
        ({"question": "q", "choices": [{"key": "A", "value": "x"}]}, "q\nA. x"),
        ({"question": "q\nA. x\nB. y", "options": ["x", "y"]}, "q\nA. x\nB. y"),
        ({"question": "q", "problem": "q"}, "q"),
    ],
)
def test_fields_that_belong_to_a_question(fields: dict[str, Any], text: str) -> None:
    assert parse_prompt(fields, "row") == [{"role": "user", "content": text}]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_message_comes_first(name: str) -> None:
    user = {"role": "user", "content": "q"}
    expected = [{"role": "system", "content": "s"}, user]
    assert parse_prompt({"question": "q", name: "s"}, "row") == expected
    assert parse_prompt({"messages": [user], name: "s"}, "row") == expected
    assert parse_prompt({"messages": expected, name: "s"}, "row") == expected
    with pytest.raises(InputError, match=f"row: {name} differs from the system message"):
        parse_prompt({"messages": expected, name: "t"}, "row")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "q", "problem": "p"}, "row: question and problem hold different texts"),
        ({"question": "q", "query": "Q: q"}, "row: question and query hold different texts"),
        ({"question": "q", "options": [["x"]]}, "row: options must be a list of texts"),
        ({"question": "q", "options": 3}, "row: options must be a list of texts"),
        ({"question": "q", "context": {"a": 1}}, "row: context must be text, not dict"),
        ({"question": "q", "input": 3}, "row: input must be text, not int"),
        ({"prompt": "q", "options": ["x"]}, "row: options is not in the row's prompt"),
        ({"question": "q", "images": ["x"]}, "row: images cannot be used"),
    ],
)
def test_fields_that_cannot_be_used(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_prompt(fields, "row")


TEXT_PART = {"type": "text", "text": "How many?"}


@pytest.mark.parametrize("parts", [[TEXT_PART], [{"text": "How many?"}], ["How many?"], [{**TEXT_PART, "image": None}]])
def test_a_content_of_text_parts_is_their_text(parts: list[Any]) -> None:
    assert parse_prompt({"prompt": [{"role": "user", "content": parts}]}, "row") == [
        {"role": "user", "content": "How many?"}
    ]
    twice = [{"role": "user", "content": [*parts, *parts]}]
    assert parse_prompt({"prompt": twice}, "row") == [{"role": "user", "content": "How many?\nHow many?"}]


@pytest.mark.parametrize("part", [{"type": "image", "image": "x.png"}, {"type": "image_url"}, 3, {"type": "text"}])
def test_a_part_that_is_no_text_is_named(part: Any) -> None:
    with pytest.raises(InputError, match=r"row: prompt: a part of a content must be text, not "):
        parse_prompt({"prompt": [{"role": "user", "content": [TEXT_PART, part]}]}, "row")
