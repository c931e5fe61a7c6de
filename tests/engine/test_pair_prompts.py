"""Prompts of a teacher and a student that end in different thoughts: what the student reads, and what rows train."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from support.templates import (
    DEEPSEEK_V31,
    GRANITE,
    MULTI_STEP,
    QWEN3_SWITCH,
    SMOLLM3,
    THINK_OPENER,
    TRIMMED_DATE,
)
from support.toys import CHATML

from genssd.engine.common.errors import InputError
from genssd.engine.readers import pair_prompts
from genssd.engine.readers.pair_prompts import PairEncoder
from genssd.engine.readers.thinking_pair import compare_thinking
from genssd.engine.readers.token_map import TokenMap
from genssd.engine.texts.chat import ChatTemplate
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.thinking import ThinkingMode, find_thinking

Load = Callable[..., Tokenizer]
ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
EMPTY = "<think>\n\n</think>\n\n"
OTHER_TAGS = THINK_OPENER.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
OFF: dict[str, Any] = {"template_kwargs": {"enable_thinking": False}}
ON: dict[str, Any] = {"template_kwargs": {"thinking": True}}


def render_with_transformers(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    """The oracle: what a later chat gives to the model."""
    options = tokenizer.chat.options.template_kwargs
    return str(tokenizer.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))


@pytest.mark.parametrize(
    ("teacher", "student", "lead"),
    [
        ((THINK_OPENER, {}), (CHATML, {}), "<think>\n"),
        ((THINK_OPENER, {}), (MULTI_STEP, {}), "<think>\n"),
        ((THINK_OPENER, {}), (SMOLLM3, {}), "<think>\n"),
        ((THINK_OPENER, {}), (TRIMMED_DATE, {}), "<think>\n"),
        ((THINK_OPENER, {}), (THINK_OPENER, {}), ""),
        ((THINK_OPENER, {}), (DEEPSEEK_V31, ON), "\n"),
        ((DEEPSEEK_V31, ON), (THINK_OPENER, {}), ""),
        ((DEEPSEEK_V31, ON), (CHATML, {}), "<think>"),
        ((MULTI_STEP, OFF), (CHATML, {}), ""),
        ((MULTI_STEP, OFF), (MULTI_STEP, OFF), ""),
        ((MULTI_STEP, OFF), (SMOLLM3, OFF), ""),
        ((MULTI_STEP, OFF), (QWEN3_SWITCH, {}), EMPTY),
        ((MULTI_STEP, OFF), (THINK_OPENER, {}), "\n</think>\n\n"),
        ((DEEPSEEK_V31, {}), (THINK_OPENER, {}), "\n</think>\n\n"),
        ((CHATML, {}), (THINK_OPENER, {}), "\n</think>\n\n"),
        ((GRANITE, {}), (THINK_OPENER, {}), "\n</think>\n\n"),
        ((CHATML, {}), (DEEPSEEK_V31, {}), ""),
        ((MULTI_STEP, {}), (SMOLLM3, {}), ""),
        ((CHATML, {}), (TRIMMED_DATE, {}), ""),
    ],
)  # fmt: skip
def test_the_prompt_without_its_lead_is_what_a_later_chat_renders(
    load: Load, teacher: tuple[str, Any], student: tuple[str, Any], lead: str
) -> None:
    writer, reader = load(teacher[0], **teacher[1]), load(student[0], **student[1])
    pair = PairEncoder(writer, reader, TokenMap()).encode(ASKED)
    assert writer.hf.decode(list(pair.teacher)) == render_with_transformers(writer, ASKED)
    num_own = len(pair.student) - pair.num_lead
    assert reader.hf.decode(list(pair.student[:num_own])) == render_with_transformers(reader, ASKED)
    assert reader.hf.decode(list(pair.student[num_own:])) == lead


@pytest.mark.parametrize("teacher", [MULTI_STEP, QWEN3_SWITCH, SMOLLM3])
def test_an_opening_that_the_response_writes_is_left_out_of_the_prompt(load: Load, teacher: str) -> None:
    student = load(THINK_OPENER)
    pair = PairEncoder(load(teacher), student, TokenMap()).encode(ASKED)
    assert pair.num_lead == 0
    text = student.hf.decode(list(pair.student))
    assert text + "<think>\n" == render_with_transformers(student, ASKED)


def test_a_system_message_switches_one_prompt(load: Load) -> None:
    """SmolLM3's /no_think: the prompt alone says that the teacher writes no thought."""
    pairs = PairEncoder(load(SMOLLM3), load(THINK_OPENER), TokenMap())
    silent = [{"role": "system", "content": "/no_think"}, *ASKED]
    leads = [pair.num_lead for pair in map(pairs.encode, (ASKED, silent, ASKED))]
    assert leads == [0, len("\n</think>\n\n"), 0]


def test_prompts_without_a_template_are_read_as_they_are(load: Load) -> None:
    pairs = PairEncoder(load(THINK_OPENER), load(None), TokenMap())
    for prompt in ("What? <think>\n", [1, 2, 3]):
        pair = pairs.encode(prompt)
        assert (pair.teacher, pair.num_lead) == (pair.student, 0)
    with pytest.raises(InputError, match="has no chat template, but the prompt is a list of messages"):
        pairs.encode(ASKED)
    for prompt in ("", []):
        with pytest.raises(InputError, match="the prompt is empty"):
            pairs.encode(prompt)


def test_templates_are_looked_at_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ChatTemplate] = []

    def look(chat: ChatTemplate) -> ThinkingMode:
        seen.append(chat)
        return find_thinking(chat)

    monkeypatch.setattr(pair_prompts, "find_thinking", look)
    pairs = PairEncoder(load(MULTI_STEP), load(THINK_OPENER), TokenMap())
    for _ in range(2):
        assert compare_thinking(pairs).student.prompt_end == "open"
        pairs.encode(ASKED)
    assert seen == [pairs.teacher.chat, pairs.student.chat]


def test_a_tag_in_a_question_opens_no_thought(load: Load) -> None:
    """A template without a generation prompt ends in the question's own text."""
    bare = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    asked = [{"role": "user", "content": "What does <think>"}]
    pair = PairEncoder(load(bare), load(CHATML), TokenMap()).encode(asked)
    assert pair.num_lead == 0


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (THINK_OPENER, DEEPSEEK_V31, "opens a thought (<think>), and the student's prompt ends in an empty one: turn "
         "thinking on for the student by student_template_kwargs thinking=true, or choose a teacher whose"),
        (MULTI_STEP, DEEPSEEK_V31, "the teacher thinks, and the prompt of the student ends in an empty thought: turn "
         "thinking off for the teacher by teacher_template_kwargs enable_thinking=false, or turn thinking on for the "
         "student by student_template_kwargs thinking=true"),
        (THINK_OPENER, OTHER_TAGS, "opens a thought by <think>, the student's by [THINK], so that"),
    ],
)  # fmt: skip
def test_what_cannot_be_the_same_thought_is_refused(load: Load, teacher: str, student: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PairEncoder(load(teacher), load(student), TokenMap()).encode(ASKED)
