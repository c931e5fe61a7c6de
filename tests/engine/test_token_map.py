"""Pairs of tokenizers that match but for added tokens, pairs that do not, and how a model reads the other's tokens."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
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
from support.toys import CHATML, save_markov, save_model

from genssd.cli import main
from genssd.distill.data.example_files import read_examples
from genssd.distill.diagnose.forcing import Question
from genssd.distill.diagnose.tokenizers import ReaderTokenizers
from genssd.distill.score.leaf import run_leaf
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.models import load_teacher
from genssd.distill.train.trainer import run_train
from genssd.engine.calls.generation import Completion
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.engine import Engine
from genssd.engine.readers.byte_reader import ByteReader
from genssd.engine.readers.ends import choose_end
from genssd.engine.readers.token_map import TokenMap, match_tokenizers
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Tokenizer

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


def test_an_end_is_read_as_the_one_that_the_readers_template_writes(tmp_path: Path, families: Families) -> None:
    """The end of sequence of a tokenizer is not always the end of a turn: Qwen's are <|endoftext|> and <|im_end|>."""
    base = tmp_path / "base"
    base.mkdir()
    backend = build_backend(QWEN25)
    save_backend(base, backend, "<|endoftext|>", CHATML)
    ends = [backend.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")]
    save_model(base, vocab_size=EMBEDDING_ROWS, eos_token_id=ends)
    writer, reader = Tokenizer(families["r1"]), Tokenizer(base)
    own = writer.hf.get_vocab()[R1_END]
    assert choose_end(reader) == ends[1]
    assert match_tokenizers(writer, reader, "teacher T", "student S").replaced[own] == ends[1]
    assert ByteReader.of(writer, reader, "teacher T", "student S").replaced[own] == ends[1]
    reader.hf.chat_template = None
    bare = reader.with_chat(ChatOptions())
    assert choose_end(bare) == ends[0]
    assert match_tokenizers(writer, bare, "teacher T", "student S").replaced[own] == ends[0]


def test_a_prompt_of_token_ids_is_translated_or_refused(families: Families) -> None:
    engine = Engine.from_pretrained(families["r1"], families["qwen3"], memory_bytes=1 << 22)
    ids = engine.tokenizer("teacher").hf.get_vocab()
    think = engine.tokenizer("student").hf.get_vocab()["<think>"]
    assert ids["<think>"] != think
    pair = engine.encode_pair([1, ids["<think>"], 2])
    assert (pair.teacher, pair.student) == ((1, ids["<think>"], 2), (1, think, 2))
    (selection,) = engine.select_expand([[1, ids["<think>"], 2]], candidates=1, max_tokens=2)
    assert (selection.prompt_ids, selection.student_prompt_ids) == (pair.teacher, pair.student)
    with pytest.raises(InputError, match=r"^prompt 0: the prompt has the token '<\|EOT\|>' .*tokenizer of the student"):
        engine.select_expand([[1, ids["<|EOT|>"]]], max_tokens=2)


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


def save_answering_teacher(directory: Path, template: str | None = None) -> Path:
    """Write a teacher that ends at once after "b", and writes </think> before the end after "a"."""
    backend = build_backend(R1_QWEN)
    names = ["a", "b", "</think>", R1_END]
    ids = [int(backend.token_to_id(name)) for name in names]
    logits = torch.full((4, 4), -1e3)
    for before, after in ((0, 2), (1, 3), (2, 3), (3, 3)):
        logits[before, after] = 0.0
    save_markov(directory, ids, logits, vocab_size=EMBEDDING_ROWS, eos_token_id=ids[-1])
    save_backend(directory, backend, R1_END, template)
    return directory


LACKS = r"the teacher .* wrote the token '</think>' \(id 269\).*student .* does not have.*add_tokens"


@pytest.mark.parametrize("beam", [1, 2])
def test_a_prompt_fails_alone_when_the_teacher_writes_a_token_that_the_student_lacks(
    families: Families, tmp_path: Path, beam: int
) -> None:
    engine = open_pair(save_answering_teacher(tmp_path / "teacher"), families["qwen2.5"])
    failed, selected, _ = engine.select_expand(["a", "b", "aa"], max_tokens=8, candidates=2, beam=beam)
    assert (failed.error is not None, failed.missing_token, failed.trajectories) == (True, 269, ())
    assert re.fullmatch(LACKS + ".*", failed.error or "")
    assert (selected.error, selected.missing_token, selected.best.status) == (None, None, "finished")
    (alone,) = engine.select_expand(["b"], max_tokens=8, candidates=2, beam=beam)
    assert alone.best.token_ids == selected.best.token_ids
    assert (engine.pages_in_use[0], engine.generate(["a"], max_tokens=8)[0][0].status) == (0, "finished")
    branch = engine.branch("a")
    with pytest.raises(InputError, match=f"^the branch: {LACKS}"):
        branch.expand(2, 4)
    branch.drop()
    assert engine.pages_in_use[0] == 0


def test_select_reports_such_prompts_and_does_the_others(
    families: Families, tmp_path: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_answering_teacher(tmp_path / "teacher")
    data = write_rows([{"prompt": text} for text in ("a", "b", "aa", "bb")])
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["select", "--teacher", str(teacher), "--student", str(families["qwen2.5"]), "--data", str(data),
              "--output-dir", str(out), "--max-tokens", "8", "--memory-bytes", str(1 << 22)])  # fmt: skip
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert (
        "2 prompts without a selection, because the teacher wrote a token that the student does not have: " in printed
    )
    assert "2 rows could not be used; all others were:" in printed
    bad_rows = (out / "bad_rows.txt").read_text().splitlines()
    for row, line in zip(bad_rows, (1, 3), strict=True):
        assert re.search(rf"data\.jsonl, line {line}: {LACKS}", row)
    assert len((out / "selections.jsonl").read_text().splitlines()) == 2
    assert json.loads((out / "summary.json").read_text())["missing_tokens"] == {"'</think>' (id 269)": 2}


def test_a_pair_whose_every_response_has_such_a_token_is_refused_at_once(
    families: Families, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    """The chat template of the teacher opens a thought, which its response closes."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    teacher = save_answering_teacher(tmp_path / "teacher", template)
    student = save_qwen25(tmp_path / "student")
    save_backend(student, build_backend(QWEN25), "<|im_end|>", template)
    message = r"opens a thought \(<think>\), and the response closes it by the token '</think>' \(id 269\).*add_tokens"
    for rows, whole in (([{"question": "b"}, {"question": "c"}], True), ([{"question": "b"}, {"prompt": "b"}], False)):
        out = tmp_path / str(whole)
        data = write_rows(rows)
        config = SelectConfig(
            teacher=str(teacher), student=str(student), data=str(data), output_dir=str(out), max_tokens=8,
            memory_bytes=1 << 22,
        )  # fmt: skip
        if whole:
            with pytest.raises(InputError, match=rf"data\.jsonl: of every prompt, .*{message}"):
                run_select(config)
            assert not (out / "selections.jsonl").exists()
        else:
            summary = run_select(config)
            assert (summary.prompts, summary.failures) == (1, ())
            assert re.search(f"line 1: .*{message}", summary.bad_rows[0])


THINKING = [{"prompt": "x y", "completion": "<think>a</think>b"}, {"prompt": "x y", "completion": "b"}]
UNREAD = r"data\.jsonl, line 1: the student .* wrote the token '<think>' \(id 277\)"


def test_a_trace_that_the_teacher_cannot_read_is_left_out(
    families: Families, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    config = LeafConfig(
        teacher=str(families["qwen2.5"]), student=str(families["qwen3"]), data=(str(write_rows(THINKING)),),
        output_dir=str(tmp_path / "leaf"),
    )  # fmt: skip
    summary = run_leaf(config)
    assert summary.traces == 1
    assert re.search(UNREAD, summary.bad_rows[0])


def test_a_row_that_the_teacher_cannot_read_is_refused_before_the_training(
    families: Families, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    config = TrainConfig(
        model_name_or_path=str(families["qwen3"]), teacher_model_name_or_path=str(families["qwen2.5"]), kd_ratio=0.5,
        data=(str(write_rows(THINKING)),), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(InputError, match=UNREAD):
        run_train(config)
    assert not (tmp_path / "out").exists()


def test_a_question_whose_rollout_a_teacher_cannot_read_is_left_out(families: Families) -> None:
    student, teacher = str(families["qwen3"]), str(families["qwen2.5"])
    tokenizers = ReaderTokenizers.load(student, [teacher], ChatOptions())
    question = Question(
        index=0, label="data.jsonl, line 1", prompt="x", prompt_ids=(1,), occurrence=0, answer="1",
        rollouts=(completion_of(2), completion_of(2, 277)),
    )  # fmt: skip
    assert re.match(UNREAD, tokenizers.find_fault(question) or "")
    assert tokenizers.find_fault(dataclasses.replace(question, rollouts=(completion_of(2),))) is None


def completion_of(*token_ids: int) -> Completion:
    return Completion(token_ids=token_ids, text="", status="finished", logprob=(0.0,) * len(token_ids))


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
