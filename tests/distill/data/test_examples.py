"""Training examples: ids, templates, masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.toys import EOS, edit_json, save_checkpoint, save_tokenizer

from genssd.distill.data.example_files import read_examples
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_checkpoint(directory)
    return Tokenizer(directory)


def read(path: Path, tokenizer: Tokenizer, **options: Any) -> Any:
    return read_examples([path], tokenizer, **{"max_length": 512, "statuses": ("finished",), **options})


def text(tokenizer: Tokenizer, ids: Any) -> str:
    return str(tokenizer.hf.decode(list(ids)))


CHAT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        pytest.param({"prompt": "ab", "completion": "cd"}, "ab", "cd<|im_end|>", id="text"),
        pytest.param(
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            CHAT,
            "a<|im_end|>",
            id="messages",
        ),
        pytest.param(
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            CHAT,
            "a<|im_end|>",
            id="conversational",
        ),
        pytest.param({"question": "q", "response": "a"}, CHAT, "a<|im_end|>", id="question"),
        pytest.param(
            {"problem": "q", "solution": "so 2 + 1 = 3", "answer": "3"}, CHAT, "so 2 + 1 = 3<|im_end|>", id="solution"
        ),
    ],
)
def test_what_is_trained(
    tokenizer: Tokenizer, write_rows: Write, row: dict[str, Any], prompt: str, completion: str
) -> None:
    (example,) = read(write_rows([row]), tokenizer).examples
    assert text(tokenizer, example.input_ids[: example.num_prompt]) == prompt
    assert text(tokenizer, example.input_ids[example.num_prompt :]) == completion
    assert example.input_ids.count(EOS) == prompt.count("<|im_end|>") + 1


def test_a_selection_is_trained_by_its_ids(tokenizer: Tokenizer, write_rows: Write) -> None:
    row = {
        "prompt": "irrelevant",
        "completion": "irrelevant",
        "status": "finished",
        "tokenizer": tokenizer.fingerprint,
        "student_prompt_ids": [1, 2],
        "completion_ids": [3, 4, 5],
    }
    (example,) = read(write_rows([row]), tokenizer).examples
    assert (example.input_ids, example.num_prompt) == ((1, 2, 3, 4, 5), 2)
    # ids of another tokenizer mean nothing here: the text is used
    (example,) = read(write_rows([{**row, "tokenizer": "other"}]), tokenizer).examples
    assert text(tokenizer, example.input_ids) == "irrelevantirrelevant<|im_end|>"


def test_statuses_and_lengths_are_left_out_and_counted(tokenizer: Tokenizer, write_rows: Write) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "status": "finished"},
        {"prompt": "a", "completion": "b", "status": "pruned"},
        {"prompt": "a", "completion": "b", "status": "length"},
        {"prompt": "a", "completion": "b" * 600},
    ]
    data = read(write_rows(rows), tokenizer)
    assert len(data.examples) == 1
    assert data.left_out == {"status pruned": 1, "status length": 1, "longer than 512 tokens": 1}
    assert len(read(write_rows(rows), tokenizer, statuses=("finished", "length")).examples) == 2
    with pytest.raises(InputError, match=r"nothing to train on \(1 status pruned\)"):
        read(write_rows(rows[1:2]), tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "line 2: the completion has no token to train on"),
        ({"messages": [{"role": "user", "content": "q"}]}, "line 2: the last message must be the assistant's"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
            "line 2: the completion has no token",
        ),
        ({"prompt": "a"}, "line 2: no prompt with a completion; a row needs"),
    ],
)
def test_an_empty_mask_is_an_error(tokenizer: Tokenizer, write_rows: Write, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(write_rows([{"prompt": "a", "completion": "b"}, row]), tokenizer)


def test_messages_need_a_template(tmp_path: Path, write_rows: Write) -> None:
    save_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    save_tokenizer(tmp_path / "model", template=False)
    with pytest.raises(InputError, match=r"line 1: .*model has no chat template"):
        read(write_rows([{"question": "q", "response": "a"}]), Tokenizer(tmp_path / "model"))


def test_a_template_that_rewrites_history_is_refused(tmp_path: Path, write_rows: Write) -> None:
    save_checkpoint(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    tokenizer.hf.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="differently with and without its answer"):
        read(write_rows([{"question": "q", "response": "a"}]), tokenizer)


def test_the_name_of_a_special_token_in_an_answer_is_text(tokenizer: Tokenizer, write_rows: Write) -> None:
    answer = "2 <|im_end|> and more"
    rows = [{"question": "q", "response": answer}, {"prompt": "q", "completion": answer}]
    for example in read(write_rows(rows), tokenizer).examples:
        completion = example.input_ids[example.num_prompt :]
        assert text(tokenizer, completion) == answer + "<|im_end|>"
        assert completion.count(EOS) == 1


def test_a_template_that_ends_turns_its_own_way(tmp_path: Path, write_rows: Write) -> None:
    """The config lists the end of a turn; the tokenizer's end of sequence is another token."""
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<|pad|>")
    edit_json(tmp_path / "generation_config.json", eos_token_id=[EOS, EOS + 2])
    (example,) = read(write_rows([{"question": "q", "response": "a"}]), Tokenizer(tmp_path)).examples
    assert text(Tokenizer(tmp_path), example.input_ids[example.num_prompt :]) == "a<|im_end|>"


def test_a_trajectory_pruned_at_once_is_left_out(tokenizer: Tokenizer, write_rows: Write) -> None:
    rows = [
        {"status": "pruned", "completion_ids": [], "prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "b"},
    ]
    assert read(write_rows(rows), tokenizer, statuses=("pruned",)).left_out == {"without a token: pruned at once": 1}


@pytest.mark.parametrize("ids", [[1, 999], [-1], ["a"], [1.5], [True], None])
def test_ids_that_are_none_of_the_tokenizer(tokenizer: Tokenizer, write_rows: Write, ids: Any) -> None:
    row = {"tokenizer": tokenizer.fingerprint, "completion_ids": [3], "student_prompt_ids": ids}
    with pytest.raises(InputError, match="line 1: student_prompt_ids must be a list of token ids"):
        read(write_rows([row]), tokenizer)


def test_a_completion_that_was_cut_off_is_left_out_or_has_no_end(tokenizer: Tokenizer, write_rows: Write) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "finish_reason": "length"},
        {"question": "q", "response": "<think>\nb", "finish_reason": None},
        {"prompt": "a", "completion": "b", "finish_reason": "stop"},
    ]
    data = read(write_rows(rows), tokenizer)
    assert (len(data.examples), data.left_out) == (1, {"cut off, by a field of the row or within a thought": 2})
    cut, thought, whole = read(write_rows(rows), tokenizer, statuses=("finished", "length")).examples
    assert [text(tokenizer, e.completion_ids) for e in (cut, thought, whole)] == ["b", "<think>\nb", "b<|im_end|>"]


VERDICTS = [
    {"prompt": "a", "completion": "b", "correct": True, "undecided": None},
    {"prompt": "a", "completion": "b", "correct": False, "undecided": None},
    {"prompt": "a", "completion": "b", "correct": None, "undecided": "the reference is prose"},
    {"prompt": "a", "completion": "b", "correct": False, "undecided": "the reference is prose"},
    {"prompt": "a", "completion": "b", "correct": None, "undecided": None},
    {"prompt": "a", "completion": "b", "correct": False, "status": "length"},
]


def test_only_rows_that_are_known_to_be_correct_are_kept_where_that_is_required(
    tokenizer: Tokenizer, write_rows: Write
) -> None:
    data = read(write_rows(VERDICTS), tokenizer)
    assert (len(data.examples), data.wrong, data.undecided, data.left_out) == (5, 1, 2, {"status length": 1})
    data = read(write_rows(VERDICTS), tokenizer, require_correct=True)
    assert (len(data.examples), data.wrong, data.undecided) == (1, 0, 0)
    assert data.left_out == {"wrong": 1, "undecided": 2, "no reference answer": 1, "status length": 1}
    with pytest.raises(InputError, match=r"nothing to train on \(1 wrong\)"):
        read(write_rows(VERDICTS[1:2]), tokenizer, require_correct=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "line 2: no field `correct`, which --require-correct reads"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "line 2: no field `correct`"),
        (
            {"prompt": "a", "completion": "b", "correct": "yes"},
            "line 2: correct must be true, false or null, not 'yes'",
        ),
    ],
)
def test_a_row_without_a_verdict_is_named_where_one_is_required(
    tokenizer: Tokenizer, write_rows: Write, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(write_rows([VERDICTS[0], row]), tokenizer, require_correct=True)
