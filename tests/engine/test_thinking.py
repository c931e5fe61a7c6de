"""What chat templates do about thoughts, found by rendering them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from support.templates import (
    CHANNELS,
    DEEPSEEK_V31,
    FIELD_OPENER,
    GRANITE,
    MULTI_STEP,
    QWEN3_SWITCH,
    R1_TEMPLATE,
    SMOLLM3,
    THINK_OPENER,
    TRIMMED_DATE,
)
from support.toys import CHATML

from genssd.engine.common.errors import InputError
from genssd.engine.readers.pair_prompts import PairEncoder
from genssd.engine.readers.thinking_pair import ThinkingPair, compare_thinking
from genssd.engine.readers.token_map import TokenMap
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.thinking import find_thinking, read_end
from genssd.engine.texts.thoughts import THINK

Load = Callable[..., Tokenizer]


SWITCH = {"switch": "enable_thinking", "default": True, "is_on": True, "prompt_end_on": "none"}
OFF = {"prompt_end_off": "closed", "knows_thoughts": True}
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, {"has_template": False, "knows_thoughts": False}),
        (CHATML, {"knows_thoughts": False}),
        (TRIMMED_DATE, {"knows_thoughts": False}),  # date_string is no switch
        (CHANNELS, {"knows_thoughts": False}),
        (MULTI_STEP, {**SWITCH, **OFF, "strips_history": True}),
        (QWEN3_SWITCH, {**SWITCH, **OFF, "strips_history": True, "empty_thought": EMPTY}),
        (SMOLLM3, {**SWITCH, **OFF, "system_words": ("/no_think",)}),
        (THINK_OPENER, {"knows_thoughts": True, "prompt_end": "open", "strips_history": True}),
        (R1_TEMPLATE, {"knows_thoughts": True, "prompt_end": "open", "strips_history": True}),
        (FIELD_OPENER, {"knows_thoughts": True, "prompt_end": "open"}),
        (DEEPSEEK_V31, {"knows_thoughts": True, "switch": "thinking", "default": False, "is_on": False,
                        "prompt_end": "closed", "prompt_end_on": "open", "prompt_end_off": "closed",
                        "strips_history": True}),
        (GRANITE, {"knows_thoughts": True, "switch": "thinking", "default": False, "is_on": False,
                   "prompt_end_on": "none", "prompt_end_off": "none"}),
    ],
)  # fmt: skip
def test_templates(load: Load, template: str | None, expected: dict[str, Any]) -> None:
    found = asdict(find_thinking(load(template).chat))
    plain = asdict(find_thinking(load(CHATML).chat))
    assert found == {**plain, **expected}


def test_options_are_part_of_what_is_found(load: Load) -> None:
    off = find_thinking(load(SMOLLM3, template_kwargs={"enable_thinking": False}).chat)
    assert (off.default, off.is_on, off.prompt_end, off.thinks) == (True, False, "closed", False)
    by_word = find_thinking(load(SMOLLM3, system_prompt="Be brief. /no_think").chat)
    assert by_word.prompt_end == "closed"
    on = find_thinking(load(DEEPSEEK_V31, template_kwargs={"thinking": True}).chat)
    assert (on.default, on.is_on, on.prompt_end, on.thinks) == (False, True, "open", True)


def test_a_variable_that_the_template_writes_is_no_switch(load: Load) -> None:
    effort = CHATML + "{{ 'effort ' + reasoning_effort|string if reasoning_effort is defined else '' }}"
    assert find_thinking(load(effort).chat).switch is None


def test_a_template_that_fails_is_no_error(load: Load) -> None:
    assert not find_thinking(load("{{ raise_exception('no') }}").chat).knows_thoughts
    with pytest.raises(InputError, match="cannot be parsed"):
        find_thinking(load("{% if %}").chat)


@pytest.mark.parametrize(
    ("prompt", "state", "text"),
    [
        ("assistant\n<think>\n", "open", "<think>\n"),
        ("assistant\n<think>\n\n</think>\n\n", "closed", "<think>\n\n</think>\n\n"),
        ("assistant\n<think>why</think>", "closed", "</think>"),
        ("assistant\n</think>", "closed", "</think>"),
        ("assistant\n[THINK]", "open", "[THINK]"),
        ("assistant\n", "none", ""),
        ("what does <think> mean", "none", ""),
        ("say <think>", "none", ""),  # the message's own text
    ],
)
def test_the_end_of_a_prompt(prompt: str, state: str, text: str) -> None:
    end = read_end(prompt, [{"role": "user", "content": "say <think>"}], THINK)
    assert (end.state, end.text) == (state, text)


def compare(teacher: Tokenizer, student: Tokenizer) -> ThinkingPair:
    return compare_thinking(PairEncoder(teacher, student, TokenMap()))


def test_a_line_describes_both_templates(load: Load) -> None:
    assert compare(load(CHATML), load(TRIMMED_DATE)).describe() is None
    assert compare(load(CHATML), load(None)).describe() is None
    same = compare(load(SMOLLM3), load(SMOLLM3))
    assert not same.has_other_switch
    assert same.describe() == (
        "thinking: the chat template of teacher and student has the switch enable_thinking, on by default and reads "
        "/no_think in the system message"
    )
    opened = compare(load(FIELD_OPENER), load(CHATML))
    assert opened.describe() == (
        "thinking: the teacher's chat template opens a thought (<think>) in the prompt; the student's knows no "
        "thoughts; the student reads and is trained to write '<think>\\n' before the response"
    )
    other = compare(load(SMOLLM3), load(GRANITE))
    assert other.has_other_switch
    assert (other.describe() or "").endswith(
        "has the switch thinking, off by default. The switches differ: teacher_template_kwargs enable_thinking=... "
        "sets the teacher's, student_template_kwargs thinking=... the student's"
    )
    refused = compare(load(THINK_OPENER), load(DEEPSEEK_V31))
    assert "turn thinking on for the student by student_template_kwargs thinking=true" in (refused.conflict or "")
