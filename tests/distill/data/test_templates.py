"""What is trained and scored under the chat templates of published models, as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.templates import (
    CHANNELS,
    FIELD_OPENER,
    SPACED,
    THINK_OPENER,
    THINKING_WRAPPER,
    TOOLS,
    make_bos_tokenizer,
    make_tokenizer,
)
from support.toys import CHATML, save_checkpoint
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.problems import read_problems
from genssd.distill.data.traces import Trace, read_traces
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]

RENDERED = "<|begin|><|role|>user\nq<|end|><|role|>assistant\n"
TURNS = [{"role": "user", "content": "q"}]


@pytest.fixture(scope="module")
def bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_bos_tokenizer(tmp_path_factory.mktemp("bos"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    templates = {"wrapper": THINKING_WRAPPER, "opener": THINK_OPENER, "spaced": SPACED, "tools": TOOLS}
    templates |= {"chatml": CHATML, "field": FIELD_OPENER, "channels": CHANNELS}
    return {name: make_tokenizer(tmp_path_factory.mktemp(name), text) for name, text in templates.items()}


def trained(path: Path, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return the texts of prompt and completion of every row; scoring must read the same tokens."""
    examples = read_examples([path], tokenizer, max_length=1000, statuses=("finished",)).examples
    traces = list(read_traces([path], tokenizer, max_length=1000))
    assert [(*t.prompt_ids, *t.response_ids) for t in traces if isinstance(t, Trace)] == [e.input_ids for e in examples]
    decode = tokenizer.hf.decode
    return [(decode(e.input_ids[: e.num_prompt]), decode(e.completion_ids)) for e in examples]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (RENDERED, RENDERED),
        (TURNS, RENDERED),
        ("2 + 3 =", "<|begin|>2 + 3 ="),
        ("<|begin|>2 + 3 =", "<|begin|>2 + 3 ="),
    ],
)
def test_a_prompt_begins_with_one_bos(bos: Tokenizer, write_rows: Write, prompt: Any, expected: str) -> None:
    (problem,) = read_problems(write_rows([{"prompt": prompt}]))
    assert bos.hf.decode(bos.encode_prompt(problem.prompt)) == expected
    ((text, _),) = trained(write_rows([{"prompt": prompt, "completion": "a"}]), bos)
    assert text == expected


@pytest.mark.parametrize("completion", ["a", "a<|end|>", "a<|end|>\n", "a<|end|><|end|>"])
@pytest.mark.parametrize("prompt", [RENDERED, TURNS])
def test_a_completion_ends_in_one_end(bos: Tokenizer, write_rows: Write, prompt: Any, completion: str) -> None:
    path = write_rows([{"prompt": prompt, "completion": completion}])
    assert trained(path, bos) == [(RENDERED, "a<|end|>")]
    (example,) = read_examples([path], bos, max_length=1000, statuses=()).examples
    assert list(example.completion_ids).count(256) == 1


def test_an_end_that_is_written_ends_the_response(bos: Tokenizer, write_rows: Write) -> None:
    rows = [{"prompt": "q", "completion": "a\n<|end|>", "finish_reason": "stop"}]
    rows.append({"prompt": "q", "completion": " <|end|>"})
    first, bad = read_traces([write_rows(rows)], bos, max_length=1000)
    assert isinstance(first, Trace)
    assert bos.hf.decode(first.response_ids) == "a\n<|end|>"
    assert isinstance(bad, str)
    assert "line 2: the completion has no token to train on" in bad


def test_what_a_tokenizer_puts_after_a_text_does_not_end_the_prompt(tmp_path: Path) -> None:
    tokenizer = make_bos_tokenizer(tmp_path)
    tokenizer.hf.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 257), ("<|end|>", 256)]
    )
    assert tokenizer.encode("ab", special=True)[-1] == 256
    for text in ("ab", "<|begin|>ab"):
        assert tokenizer.encode_prompt(text) == [257, *tokenizer.encode("ab", special=False)]


CHAT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
OPENED = CHAT + "<think>\n"
INST = "[INST] q [/INST]"
THOUGHT = "<think>\nwhy\n</think>\n\na"


@pytest.mark.parametrize(
    ("template", "content", "prompt", "completion"),
    [
        ("wrapper", "a", CHAT, "<think>\n\n</think>\n\na<|im_end|>"),
        ("wrapper", THOUGHT, CHAT, THOUGHT + "<|im_end|>"),
        ("wrapper", "<think>why</think>a", CHAT, THOUGHT + "<|im_end|>"),
        ("wrapper", "2 <|im_end|> a", CHAT, "<think>\n\n</think>\n\n2 <|im_end|> a<|im_end|>"),
        (
            "wrapper",
            "<think>why</think>b<think>more</think>a",
            CHAT,
            "<think>why</think>b<think>more</think>a<|im_end|>",
        ),
        ("opener", "a", OPENED, "\n</think>\n\na<|im_end|>"),
        ("opener", THOUGHT, OPENED, "why\n</think>\n\na<|im_end|>"),
        ("opener", "<think>why</think>a", OPENED, "why</think>a<|im_end|>"),
        ("opener", "why</think>a", OPENED, "why</think>a<|im_end|>"),
        ("field", "a", OPENED, "</think>a<|im_end|>"),
        ("field", THOUGHT, OPENED, "why</think>a<|im_end|>"),
        ("field", "<think>why</think>2 <|im_end|> a", OPENED, "why</think>2 <|im_end|> a<|im_end|>"),
        ("spaced", "a", INST, " a <|im_end|>"),
        ("spaced", THOUGHT, INST, f" {THOUGHT} <|im_end|>"),
        ("chatml", THOUGHT, CHAT, THOUGHT + "<|im_end|>"),
    ],
)
def test_what_the_template_writes_after_the_prompt_is_trained(
    tokenizers: dict[str, Tokenizer], write_rows: Write, template: str, content: str, prompt: str, completion: str
) -> None:
    rows = [
        {"question": "q", "response": content},
        {"messages": [*TURNS, {"role": "assistant", "content": content}]},
        {"prompt": TURNS, "completion": content},
    ]
    tokenizer = tokenizers[template]
    assert trained(write_rows(rows), tokenizer) == [(prompt, completion)] * 3
    (trace,) = read_traces([write_rows([{"problem": "q", "generations": [content]}])], tokenizer, max_length=1000)
    assert isinstance(trace, Trace)
    assert trace.finished
    assert list(trace.prompt_ids) == tokenizer.encode_prompt(TURNS)
    assert list(trace.response_ids).count(256) == 1


def test_a_thought_goes_where_the_template_writes_it(tokenizers: dict[str, Tokenizer], write_rows: Write) -> None:
    question = "<|im_start|>user<|final|>q<|im_end|><|im_start|>assistant"
    rows = [
        {"question": "q", "response": "a"},
        {"question": "q", "response": THOUGHT},
        {"question": "q", "response": "a", "reasoning_content": "why"},
    ]
    tokenizer = tokenizers["channels"]
    examples = read_examples([write_rows(rows)], tokenizer, max_length=1000, statuses=("finished",)).examples
    assert {tokenizer.hf.decode(e.input_ids[: e.num_prompt]) for e in examples} == {question}
    composed = "<|thought|>why<|im_end|><|im_start|>assistant<|final|>a<|im_end|>"
    texts = [tokenizer.hf.decode(e.completion_ids) for e in examples]
    assert texts == ["<|final|>a<|im_end|>", composed, composed]


def test_thoughts_in_the_history_are_the_templates_affair(tokenizers: dict[str, Tokenizer], write_rows: Write) -> None:
    turns = [*TURNS, {"role": "assistant", "content": THOUGHT}, *TURNS, {"role": "assistant", "content": THOUGHT}]
    path = write_rows([{"messages": turns}])
    history = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert trained(path, tokenizers["wrapper"]) == [(f"{history}a<|im_end|>\n{CHAT}", THOUGHT + "<|im_end|>")]
    ((prompt, completion),) = trained(path, tokenizers["opener"])
    assert prompt == f"{history}\n\na<|im_end|>\n{OPENED}"
    assert completion == "why\n</think>\n\na<|im_end|>"


@pytest.mark.parametrize(("template", "opening"), [("wrapper", "<think>\n"), ("opener", ""), ("chatml", "<think>\n")])
def test_a_thought_that_was_cut_off_has_no_end(
    tokenizers: dict[str, Tokenizer], write_rows: Write, template: str, opening: str
) -> None:
    tokenizer = tokenizers[template]
    rows: list[dict[str, Any]] = [{"problem": "q", "generations": ["<think>\nwhy"], "finish_reasons": ["length"]}]
    rows.append({"messages": [*TURNS, {"role": "assistant", "reasoning_content": "why"}]})
    for trace in read_traces([write_rows(rows)], tokenizer, max_length=1000):
        assert isinstance(trace, Trace)
        assert tokenizer.hf.decode(trace.response_ids) == opening + "why"
        assert not trace.finished


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("wrapper", THOUGHT + "<|im_end|>"),
        ("opener", "why\n</think>\n\na<|im_end|>"),
        ("chatml", THOUGHT + "<|im_end|>"),
        ("spaced", f" {THOUGHT} <|im_end|>"),
    ],
)
def test_a_thought_in_a_field_is_trained(
    tokenizers: dict[str, Tokenizer], write_rows: Write, field: str, template: str, expected: str
) -> None:
    rows = [
        {"messages": [*TURNS, {"role": "assistant", "content": "a", field: "why"}]},
        {"question": "q", "response": "a", field: "why"},
        {"prompt": TURNS, "completion": [{"role": "assistant", "content": "a", field: "why"}]},
    ]
    assert [completion for _, completion in trained(write_rows(rows), tokenizers[template])] == [expected] * 3
    row = {"problem": "q", "generations": ["a", "b"], field: ["why", "how"]}
    traces = read_traces([write_rows([row])], tokenizers[template], max_length=1000)
    texts = [tokenizers[template].hf.decode(t.response_ids) for t in traces if isinstance(t, Trace)]
    assert texts == [expected, expected.replace("why", "how").replace("\na", "\nb")]


def test_calls_and_tools_reach_the_template(tokenizers: dict[str, Tokenizer], write_rows: Write) -> None:
    call = {"type": "function", "function": {"name": "calc", "arguments": '{"e": "2+5"}'}}
    reply = {"role": "assistant", "content": None, "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "calc"}}]
    results = [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "It is 7."}]
    rows: list[dict[str, Any]] = [
        {"messages": [*TURNS, reply], "tools": tools},
        {"messages": [*TURNS, reply, *results]},
    ]
    called = 'calc {"e": "2+5"}</call><|im_end|>'
    (first, second) = trained(write_rows(rows), tokenizers["tools"])
    assert first == (
        '<|im_start|>tools\n[{"type": "function", "function": {"name": "calc"}}]<|im_end|>\n' + CHAT,
        f"<call>{called}",
    )
    assert second == (
        f"{CHAT}<call>{called}\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n",
        "It is 7.<|im_end|>",
    )


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": [*TURNS, {"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}]}, "chatml",
         "line 1: the chat template of .* ignores the field tool_calls of a message"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "a", "images": ["x"]}]}, "chatml",
         "line 1: the chat template of .* ignores the field images of a message"),
        ({"question": "q", "response": "a", "tools": [{"name": "f"}]}, "chatml",
         "line 1: tools: the chat template of .* ignores them"),
        ({"question": "q", "response": "a", "tools": "[{"}, "chatml", "line 1: tools is text, but not the JSON"),
        ({"question": "q", "response": "a", "system": "s"}, "spaced",
         "line 1: the chat template of .* ignores messages of the role 'system'"),
        ({"question": "q", "response": "<think>x</think>a", "reasoning": "y"}, "chatml",
         "line 1: a message has one thought in its content and another one in reasoning"),
        ({"question": "q", "response": "a", "reasoning": "x", "thinking": "y"}, "chatml",
         "line 1: a message has different thoughts in thinking and reasoning"),
        ({"prompt": "q", "completion": "a", "system": "s"}, "chatml", "line 1: system is not in the row's prompt"),
        ({"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "chatml", "line 1: tools cannot be used with"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "a"}], "input": "i"}, "chatml",
         "line 1: input is not in the row's prompt or messages"),
        ({"question": "q", "response": "a", "history": [["b", "c"]]}, "chatml", "line 1: history cannot be used"),
        ({"question": "q", "response": "a", "reasoning": ["x"]}, "chatml", "line 1: reasoning must be text, not list"),
    ],
)  # fmt: skip
def test_content_that_cannot_be_used_is_refused_by_name(
    tokenizers: dict[str, Tokenizer], write_rows: Write, row: dict[str, Any], template: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_examples([write_rows([row])], tokenizers[template], max_length=1000, statuses=())
    (bad,) = read_traces([write_rows([row])], tokenizers[template], max_length=1000)
    assert isinstance(bad, str)


def test_the_templates_own_system_message_may_be_given(tmp_path: Path, write_rows: Write) -> None:
    default = "{% if messages[0].role != 'system' %}<|im_start|>system\ns<|im_end|>\n{% endif %}" + CHATML
    tokenizer = make_tokenizer(tmp_path, default)
    rows = [{"question": "q", "response": "a", "system": "s"}, {"question": "q", "response": "a"}]
    assert trained(write_rows(rows), tokenizer) == [("<|im_start|>system\ns<|im_end|>\n" + CHAT, "a<|im_end|>")] * 2


def test_different_questions_have_different_keys(tokenizers: dict[str, Tokenizer], write_rows: Write) -> None:
    rows: list[dict[str, Any]] = []
    for name in ("input", "body", "options", "system"):
        rows += [{"instruction": "Solve.", name: text, "output": "a"} for text in ("2+3", "4+5")]
    traces = list(read_traces([write_rows(rows)], tokenizers["chatml"], max_length=1000))
    keys = {trace.prompt_key for trace in traces if isinstance(trace, Trace)}
    assert len(keys) == len(rows)


def test_a_pair_has_its_system_message_and_its_input(tokenizers: dict[str, Tokenizer], write_rows: Write) -> None:
    row = {"system": "s", "instruction": "Add.", "input": "2+3", "chosen": "5", "rejected": "6"}
    examples = read_examples([write_rows([row])], tokenizers["chatml"], max_length=1000, statuses=()).examples
    texts = [tokenizers["chatml"].hf.decode(example.input_ids) for example in examples]
    prompt = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nAdd.\n\n2+3<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [f"{prompt}5<|im_end|>", f"{prompt}6<|im_end|>"]


def test_an_answer_after_a_space_is_one_text_with_it(tmp_path: Path, write_rows: Write) -> None:
    """Llama 2's tokenizer puts a space before every text: the answer's first token has one space, not two."""
    pieces = ["<unk>", "</s>", "\u2581", *"INSTqa[]/", "\u2581a", "\u2581\u2581"]
    raw = RawTokenizer(models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("\u2581", "\u2581"), ("\u2581", "a")],
        unk_token="<unk>",
    ))  # fmt: skip
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens(["</s>"])
    save_checkpoint(tmp_path, eos_token_id=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (tmp_path / name).unlink(missing_ok=True)
    hf = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    hf.chat_template = SPACED
    hf.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    (example,) = read_examples(
        [write_rows([{"question": "q", "response": "a"}])], tokenizer, max_length=99, statuses=()
    ).examples
    assert tokenizer.hf.convert_ids_to_tokens(list(example.completion_ids)) == ["\u2581a", "\u2581", "</s>"]
