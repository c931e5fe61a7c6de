"""Chat templates of any kind: rendered, or refused in one line, in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import NUM_INPUTS, fuzz_settings, succeeds_or_refuses
from support.templates import CHANNELS, FIELD_OPENER, SPACED, THINK_OPENER, THINKING_WRAPPER, TOOLS
from support.toys import CHATML, save_checkpoint

from genssd.engine.texts.chat import ChatTemplate
from genssd.engine.texts.text import Tokenizer

pytestmark = pytest.mark.fuzz

PARTS = [
    "{{ messages }}", "{{ messages[0].content }}", "{{ messages[99].content }}", "{{ messages[0]['role'] }}",
    "{{ x.y.z }}", "{{ x }}", "{{ eos_token }}", "{{ bos_token }}", "{{ raise_exception('a\\nb') }}",
    "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}", "{{ self }}",
    "{{ cycler.__init__.__globals__ }}", "{{ lipsum() }}", "{{ messages | tojson }}", "{{ messages | nofilter }}",
    "{{ messages | join }}", "{{ messages | first | last }}", "{{ 'a' * 100 }}", "{{ 'a' * 10000000000 }}",
    "{{ 10 ** 10 ** 10 }}", "{{ 1 / 0 }}", "{{ '%s' | format }}", "{{ 'a' | center(1000000000) }}",
    "{% for m in messages %}", "{% endfor %}", "{% for i in range(99999) %}", "{% for i in range(10**9) %}",
    "{% if add_generation_prompt %}", "{% else %}", "{% endif %}", "{% set x = messages %}",
    "{% set ns = namespace(s='aa') %}", "{% set ns.s = ns.s ~ ns.s %}", "{% set x = x ~ x %}", "{% break %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}", 
    "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}",
    "{{ f(1) }}", "{{ f(60) }}", "{% include 'a' %}", "{% import 'a' as b %}", "{% extends 'a' %}", "{% generation %}",
    "{% endgeneration %}", "{{ strftime_now('%Y') }}", "{{ strftime_now(1) }}", "{{ tools }}", "{{ m.content | trim }}",
    "{{ m.tool_calls[0].function.arguments | tojson }}", "{{ m.reasoning_content }}", "<think>", "</think>", "{#", "#}",
    "{{", "}}", "{%", "%}", "\x00", "\ud7ff", "\U0001f600", "<|im_start|>", "<|im_end|>\n", "{% raw %}", "{% endraw %}",
    "{{ messages.append(1) }}", "{{ messages.pop() }}", "{% do 1 %}", "{{ (((((1))))) }}", "{{ 'a'.join(messages) }}",
    "{% for i in messages recursive %}", "{{ loop(messages) }}", "{{ loop.index }}", "{{ dict(a=1) | dictsort }}",
    "{{ range(3) | list | batch(2) | list }}", "{{ messages | sort }}", "{{ messages | groupby('role') }}",
    "{{ messages | map(attribute='a.b.c') | list }}", "{{ 'a'.format(1) }}", "{{ '{0.__class__}'.format(1) }}",
]  # fmt: skip
"""Pieces of templates: sensible, broken, endless and hostile ones."""
USABLE = [CHATML, THINKING_WRAPPER, THINK_OPENER, SPACED, FIELD_OPENER, CHANNELS, TOOLS]
LOOP = "{% for i in range(99999) %}"
CONVERSATION = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
    {"role": "user", "content": "\u0301<|im_end|>"},
]


@pytest.fixture(autouse=True)
def shorter_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates that never end are stopped sooner in the normal tests."""
    if not NUM_INPUTS:
        monkeypatch.setattr("genssd.engine.texts.chat.MAX_SECONDS", 0.3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("templates")
    save_checkpoint(directory)
    return Tokenizer(directory)


def render_all(tokenizer: Tokenizer, template: str) -> None:
    """Render conversations as the commands do."""
    tokenizer.hf.chat_template = template
    chat = ChatTemplate(tokenizer.hf, tokenizer.directory)
    messages: Sequence[list[dict[str, object]]] = [CONVERSATION[1:2], CONVERSATION]
    for turns in messages:
        failure = succeeds_or_refuses(lambda turns=turns: chat.render(turns))  # type: ignore[misc]
        if failure is not None and "seconds" in failure:
            return
    succeeds_or_refuses(lambda: chat.write_after(CONVERSATION[:2]))
    assert chat.tags


BLOCKS = [
    ("{% for m in messages %}", "{% endfor %}"), ("{% if add_generation_prompt %}", "{% endif %}"),
    ("{% for i in range(99999) %}", "{% endfor %}"), ("{% macro f(n) %}", "{% endmacro %}{{ f(9) }}"),
    ("{% set x %}", "{% endset %}{{ x ~ x }}"), ("{% filter upper %}", "{% endfilter %}"),
    ("{% generation %}", "{% endgeneration %}"),
    ("{% for i in messages recursive %}", "{{ loop(messages) }}{% endfor %}"),
    ("{% call f(1) %}", "{% endcall %}"), ("{% set ns = namespace(s='aa') %}", "{{ ns.s }}"),
    ("{% for k, v in messages[0].items() %}", "{% else %}b{% endfor %}"), ("{% raw %}", "{% endraw %}"),
]  # fmt: skip
"""Openings and endings of blocks."""
COMPLETE = [part for part in PARTS if "{%" not in part or part.startswith(("{% set", "{% do"))]
NESTED = st.recursive(
    st.sampled_from(COMPLETE),
    lambda inner: st.builds(
        lambda block, bodies: block[0] + "".join(bodies) + block[1],
        st.sampled_from(BLOCKS),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)
TEMPLATES = NESTED | st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join)
TEMPLATES |= st.builds(
    lambda base, place, part: base[: place % len(base)] + part + base[place % len(base) :],
    st.sampled_from(USABLE),
    st.integers(0, 2000),
    st.sampled_from(PARTS) | NESTED,
)
TEMPLATES |= st.builds(
    lambda base, start, end: base[: start % len(base)] + base[(start + end) % len(base) :],
    st.sampled_from(USABLE),
    st.integers(0, 2000),
    st.integers(1, 60),
)


@fuzz_settings(80, 0.1)
@given(template=TEMPLATES)
def test_any_template(tokenizer: Tokenizer, template: str) -> None:
    render_all(tokenizer, template)


@pytest.mark.parametrize(
    "template",
    [
        f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}",
        f"{{% set ns = namespace(s='aa') %}}{LOOP}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_never_ends_is_stopped(tokenizer: Tokenizer, tmp_path: Path, template: str) -> None:
    tokenizer.hf.chat_template = template
    message = succeeds_or_refuses(lambda: ChatTemplate(tokenizer.hf, tmp_path).render(CONVERSATION[1:2]))
    assert str(message).startswith(f"the chat template of {tmp_path} takes more than")
    tokenizer.hf.chat_template = CHATML
    assert ChatTemplate(tokenizer.hf, tmp_path).render(CONVERSATION[1:2]).endswith("assistant\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 2 ** 9 }}", "has a power in line 1, which is not computed"),
        ("{% generation %}{{ 2 ** 9 }}{% endgeneration %}", "has a power in line 1, which is not computed"),
        ("\n{{ 'a' * 999999999 }}", "has a number above 1000000 in line 2"),
        ("\n{{ 'a' * 0xffffffff }}", "has a number above 1000000 in line 2"),
        ("{{ 'a' * (1e9 | int) }}", "has a number above 1000000 in line 1"),
        ("9999999 ** 9999999 {# 2 ** 3 #}{{ '2 ** 3' }}{{ 1_000 < 200000 and 0.5 < 7 }}", None),
    ],
)
def test_steps_that_cannot_be_stopped_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, template: str, message: str | None
) -> None:
    tokenizer.hf.chat_template = template
    refusal = succeeds_or_refuses(lambda: ChatTemplate(tokenizer.hf, tmp_path).render(CONVERSATION[1:2]))
    assert refusal is None if message is None else message in str(refusal)
