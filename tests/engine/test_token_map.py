"""Pairs of tokenizers that match but for added tokens, pairs that do not, and how a model reads the other's tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tokenizer_families import (
    EMBEDDING_ROWS,
    MERGES,
    QWEN25,
    R1_END,
    R1_QWEN,
    R1_USER,
    build_backend,
    edit_tokenizer,
    save_backend,
    save_qwen3,
    save_qwen25,
    save_r1_qwen,
)
from support.toys import save_markov, save_model

from genssd.distill.data.examples import read_examples
from genssd.distill.select.generate import GenerateConfig, run_generate
from genssd.distill.select.run import SelectConfig, run_select
from genssd.distill.train.models import load_teacher
from genssd.engine.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.reverse_speculation import ReverseSpeculation
from genssd.engine.text import Tokenizer
from genssd.engine.token_map import TokenMap, match_tokenizers

Families = dict[str, Path]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    root = tmp_path_factory.mktemp("families")
    return {
        "qwen2.5": save_qwen25(root / "qwen25"),
        "qwen3": save_qwen3(root / "qwen3", seed=1),
        "r1": save_r1_qwen(root / "r1", seed=2),
    }


def match(writer: Path, reader: Path) -> TokenMap:
    return match_tokenizers(Tokenizer(writer), Tokenizer(reader), "teacher T", "student S")


@pytest.mark.parametrize(
    ("writer", "reader", "read", "refused"),
    [
        ("qwen2.5", "qwen3", {}, set()),
        ("qwen3", "qwen2.5", {}, {"<think>", "</think>", "<tool_response>", "</tool_response>"}),
        (
            "r1",
            "qwen3",
            {"<think>": "<think>", "</think>": "</think>", R1_END: "<|im_end|>"},
            {"<|EOT|>"},
        ),
        ("r1", "qwen2.5", {R1_END: "<|im_end|>"}, {"<think>", "</think>", R1_USER}),
        ("qwen2.5", "r1", {"<|im_end|>": R1_END}, {"<|im_start|>", "<|box_start|>"}),
    ],
)
def test_pairs_that_differ_in_added_tokens_match(
    families: Families, writer: str, reader: str, read: dict[str, str], refused: set[str]
) -> None:
    token_map = match(families[writer], families[reader])
    ids, reader_ids = (Tokenizer(families[name]).hf.get_vocab() for name in (writer, reader))
    assert {name: token_map.replaced[ids[name]] for name in read} == {name: reader_ids[to] for name, to in read.items()}
    assert refused <= {name for i, name in token_map.strings.items() if i not in token_map.replaced}
    assert all(i >= 256 + len(MERGES) for i in token_map.strings)
    assert token_map.is_identity == (writer == "qwen2.5" and reader == "qwen3")
    assert token_map.translate([1, 2, 258], "x") == [1, 2, 258]
    for name in refused:
        with pytest.raises(InputError, match=rf"prompt 7: the teacher T wrote the token '.*' \(id {ids[name]}\)"):
            token_map.translate([1, ids[name]], "prompt 7")


def swap(fields: dict[str, Any]) -> None:
    vocabulary = fields["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]


def set_part(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.update({name: value})


def set_model(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["model"].update({name: value})


OTHER_MERGES = [["i", "n"], ["t", "h"], ["th", "e"], ["Ġ", "the"], ["in", "k"], ["<", "/"], ["e", "r"]]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (swap, r"different vocabularies: id \d+ is '!' in one and '#' in the other, id \d+ is '#' in one and '!' in"),
        (set_model("merges", OTHER_MERGES),
         r"merges\[0\] is \['t', 'h'\] \(id 2\d+\) in one and \['i', 'n'\] \(id 2\d+\)"),
        (set_model("merges", OTHER_MERGES[1:]), r"merges\[3\] is .*|7 merges in one and 6 in the other"),
        (set_part("normalizer", None), r"normalizer is \{'type': 'NFC'\} in one and None in the other"),
        (set_part("normalizer", {"type": "Lowercase"}), r"normalizer is \{'type': 'NFC'\} in one and \{'type': 'Low"),
        (set_part("pre_tokenizer", BYTE_LEVEL), r"pre_tokenizer is .* in one and \{.*'ByteLevel'.*\} in the other"),
        (set_part("decoder", {"type": "ByteFallback"}), "decoder is 'ByteLevel' in one and .*ByteFallback.* in"),
        (set_model("byte_fallback", True), "byte_fallback is None in one and True in the other"),
        (set_model("ignore_merges", True), "ignore_merges is None in one and True in the other"),
    ],
)  # fmt: skip
def test_pairs_that_differ_in_more_than_added_tokens_are_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory in (one, other):
        save_backend(directory, build_backend(QWEN25), "<|im_end|>")
        save_model(directory, vocab_size=EMBEDDING_ROWS, eos_token_id=265)
    edit_tokenizer(other, edit)
    with pytest.raises(InputError, match=message):
        match(one, other)
    with pytest.raises(InputError, match="need the same tokenizer"):
        match(other, one)


def test_a_regular_token_in_the_place_of_an_added_one_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory, merges in ((one, MERGES), (other, [*MERGES, ("z", "z")])):
        save_backend(directory, build_backend(QWEN25, merges), QWEN25[0])
        save_model(directory, vocab_size=EMBEDDING_ROWS, eos_token_id=263)
    for writer, reader in ((one, other), (other, one)):
        with pytest.raises(InputError, match=r"id 26\d is '.*' in one and '.*' in the other"):
            match(writer, reader)


@pytest.mark.parametrize(
    "edit",
    [
        lambda fields: fields["decoder"].update({"add_prefix_space": True, "trim_offsets": False}),
        lambda fields: fields.update({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}),
        lambda fields: fields["pre_tokenizer"]["pretokenizers"][1].update({"trim_offsets": False}),
        lambda fields: fields["model"].update({"continuing_subword_prefix": "", "end_of_word_suffix": ""}),
        lambda fields: fields.update({"post_processor": None}),
        lambda fields: fields["added_tokens"].pop(),
    ],
)
def test_differences_that_change_no_id_are_none(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory in (one, other):
        save_backend(directory, build_backend(QWEN25), "<|im_end|>")
        save_model(directory, vocab_size=EMBEDDING_ROWS, eos_token_id=265)
    edit_tokenizer(other, edit)
    assert match(other, one).is_identity
    match(one, other)


def save_writer(directory: Path, names: list[str]) -> Path:
    """Write a teacher with the tokenizer of R1 that writes some tokens alone, each as likely as the others."""
    backend = build_backend(R1_QWEN)
    ids = [int(backend.token_to_id(name)) for name in names]
    end = backend.token_to_id(R1_END)
    save_markov(directory, ids, torch.zeros(len(ids), len(ids)), vocab_size=EMBEDDING_ROWS, eos_token_id=end)
    save_backend(directory, backend, R1_END)
    return directory


def open_pair(teacher: Path, student: Path) -> Engine:
    return Engine.from_pretrained(teacher, student, dtype="float32", memory_bytes=1 << 22)


def test_the_student_reads_the_teachers_added_tokens_as_its_own(
    families: Families, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The statistics of a search are those of the student's own tokens, and an end is the student's end."""
    teacher = save_writer(tmp_path / "teacher", ["a", "b", "</think>", R1_END])
    with caplog.at_level(logging.WARNING):
        engine = open_pair(teacher, families["qwen3"])
    (record,) = caplog.records
    assert "'</think>' (id 269) is read as id 278" in record.getMessage()
    assert "\n" not in record.getMessage()
    selections = engine.select_expand(["x", "yy"], candidates=3, chunk=Chunk(tokens=6, until=None), max_tokens=40)
    ids = {name: Tokenizer(families["qwen3"]).hf.get_vocab()[name] for name in ("</think>", "<|im_end|>")}
    seen = set()
    for selection in selections:
        best = selection.best
        assert best.status == "finished"
        assert best.token_ids[-1] == 263
        own = [{269: ids["</think>"], 263: ids["<|im_end|>"]}.get(token, token) for token in best.token_ids]
        seen |= set(own)
        (stats,) = engine.score([list(selection.student_prompt_ids)], [own])
        torch.testing.assert_close(stats.logprob, best.stats.logprob, atol=1e-5, rtol=1e-5)
    assert ids["</think>"] in seen


def test_rows_have_the_students_ids(families: Families, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    teacher = save_writer(tmp_path / "teacher", ["a", "b", "</think>", R1_END])
    engine = open_pair(teacher, families["qwen3"])
    data = write_rows([{"prompt": "x", "answer": "1"}, {"prompt": "y", "answer": "1"}])
    config = SelectConfig(
        teacher=str(teacher), student=str(families["qwen3"]), data=str(data), output_dir=str(tmp_path / "select"),
        candidates=2, max_tokens=30,
    )  # fmt: skip
    summary = run_select(config, engine)
    rows = [json.loads(line) for line in summary.path.read_text().splitlines()]
    tokenizer = Tokenizer(families["qwen3"])
    assert {row["tokenizer"] for row in rows} == {tokenizer.fingerprint}
    assert rows[0]["completion_ids"][-1] == tokenizer.eos_token_id
    examples = read_examples([summary.path], tokenizer, max_length=100, statuses=("finished", "length")).examples
    assert [list(e.completion_ids) for e in examples] == [row["completion_ids"] for row in rows]
    decisions = (tmp_path / "select" / "decisions.jsonl").read_text()
    assert "269" not in decisions
    # generate lets the student read nothing: its rows are read as text
    generated = run_generate(
        GenerateConfig(
            teacher=str(teacher), student=str(families["qwen3"]), data=str(data), output_dir=str(tmp_path / "g"),
            max_tokens=30,
        ),
        engine,
    )  # fmt: skip
    row = json.loads(generated.path.read_text().splitlines()[0])
    assert row["tokenizer"] == Tokenizer(teacher).fingerprint


def test_a_token_that_the_student_lacks_is_refused_by_name(families: Families, tmp_path: Path) -> None:
    teacher = save_writer(tmp_path / "teacher", ["a", "</think>"])
    engine = open_pair(teacher, families["qwen2.5"])
    message = r"prompt 0: the teacher .* wrote the token '</think>' \(id 269\).*student .* does not have.*add_tokens"
    with pytest.raises(InputError, match=message):
        engine.select_expand(["x"], max_tokens=40)
    assert engine.pages_in_use[0] == 0
    assert engine.generate(["x"], max_tokens=8)


def test_options_that_need_the_same_tokens(families: Families, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    engine = open_pair(families["r1"], families["qwen3"])
    with pytest.raises(InputError, match="rsd needs models whose tokens are the same"):
        engine.generate(["x"], max_tokens=4, rsd=ReverseSpeculation())
    config = SelectConfig(
        teacher=str(families["r1"]), student=str(families["qwen3"]), data=str(write_rows([{"prompt": "x"}])),
        output_dir=str(tmp_path / "out"), teacher_topk=2,
    )  # fmt: skip
    with pytest.raises(InputError, match="teacher_topk needs models whose tokens are the same"):
        run_select(config, engine)
    same = open_pair(families["qwen2.5"], families["qwen3"])
    assert same.generate(["x"], max_tokens=4, rsd=ReverseSpeculation())


def test_a_teacher_of_a_training_has_the_students_tokens(families: Families) -> None:
    student, device = Tokenizer(families["qwen3"]), torch.device("cpu")
    with pytest.raises(InputError, match=r"same ids for different tokens: id 263 is .*kd_ratio 0"):
        load_teacher(families["r1"], student, device, torch.float32)
    teacher = load_teacher(families["qwen2.5"], student, device, torch.float32)
    teacher.check_reads([1], [2, 3], "row 1")
    with pytest.raises(InputError, match=r"row 1: the student .* wrote the token '<think>' \(id 277\)"):
        teacher.check_reads([1], [2, 277], "row 1")
    with pytest.raises(InputError, match="row 1: token id 277 of the prompt is not in the teacher's vocabulary"):
        teacher.check_reads([277], [2], "row 1")


def test_a_token_under_another_id_is_read_by_search_alone(tmp_path: Path) -> None:
    """Where ids are not translated, the same string under another id is another token."""
    one, other = tmp_path / "one", tmp_path / "other"
    for directory, added in ((one, [*QWEN25, "<x>"]), (other, [*QWEN25, "<y>", "<x>"])):
        save_backend(directory, build_backend(added), "<|im_end|>")
        save_model(directory, vocab_size=EMBEDDING_ROWS, eos_token_id=265)
    token_map, back = match(one, other), match(other, one)
    assert token_map.translate([1, 275], "x") == [1, 276]
    assert back.translate([1, 276], "x") == [1, 275]
    with pytest.raises(InputError, match=r"x: the teacher T wrote the token '<x>' \(id 275\)"):
        token_map.check_same([1, 275], "x")
