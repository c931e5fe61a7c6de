"""`genssd score`: traces of every origin, columns, choices, rankings; what is bad is named and the rest is scored."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from transformers import AutoModelForCausalLM

from genssd import Engine
from genssd.distill.data.example_files import read_examples
from genssd.distill.runs.journal import complete_rows
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.pick_options import PickOptions
from genssd.distill.score.ranking import rank_teachers
from genssd.distill.score.run import ScoreSummary, run_score
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError
from genssd.engine.criteria import criterion_names
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]

ROWS: list[dict[str, Any]] = [
    {"problem": "1+1?", "answer": "2", "generations": ["It is 2.\nSo \\boxed{2}", "Three. \\boxed{3}"], "model": "A"},
    {"problem": "1+1?", "answer": "2", "generations": ["Well. Now then. \\boxed{2}"], "model": "B"},
    {"prompt": "2+2=", "completion": "4, of course", "teacher": {"name": "A"}},
    {"prompt": "2+2=", "completion": "5. No. 4", "teacher": {"name": "B"}},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}], "model": "A"},
]
CRITERIA = ("ppl", "rsr", "lalp(steps=1)", "aslec_casl", "lark", "0.5*rsr + 0.5*length(longest=True)")


def score(pair: TinyPair, data: Path | list[Path], out: Path, **options: Any) -> ScoreSummary:
    files = data if isinstance(data, list) else [data]
    config = ScoreConfig(student=str(pair.student), data=tuple(map(str, files)), output_dir=str(out), **options)
    return run_score(config, pair.engine)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_columns_equal_transformers(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """ppl and rsr of every trace, from transformers' full logits."""
    data = write_rows(ROWS)
    summary = score(tiny_pair, data, tmp_path / "out", criteria=CRITERIA)
    assert (summary.traces, summary.prompts, summary.bad_rows) == (6, 3, ())
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair.student, dtype=torch.float32)
    tokenizer = tiny_pair.engine.tokenizer("student")
    rows = lines(tmp_path / "out" / "scores.jsonl")
    picked = {(r["source"]["line"], r["source"]["response"]): r for r in lines(tmp_path / "out" / "selected.jsonl")}
    assert len(picked) == 3
    for row in picked.values():
        prompt, response = row["student_prompt_ids"], row["completion_ids"]
        assert response[-1] in tokenizer.end_token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0]
        logp = logits.double().log_softmax(1)[len(prompt) - 1 : -1]
        chosen = logp.gather(1, torch.tensor(response)[:, None])
        column = next(r for r in rows if r["source"] == row["source"])
        assert column["ppl"] == pytest.approx(math.exp(-float(chosen.mean())), rel=1e-4)
        rank = 1 + (logp > chosen).sum(1)[:-1]
        assert column["rsr"] == pytest.approx(float(rank.clamp(max=100).sum() / -chosen[:-1].sum()), rel=1e-3)
    for members in ([0, 1, 2], [3, 4], [5]):
        best = min(members, key=lambda i: rows[i]["ppl"])
        assert (rows[best]["source"]["line"], rows[best]["source"]["response"]) in picked
    assert [row["correct"] for row in rows] == [True, False, True, None, None, None]
    assert [row["teacher"] for row in rows] == ["A", "A", "B", "A", "B", "A"]
    assert set(CRITERIA) <= rows[0].keys()


def test_what_was_picked_trains(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    score(tiny_pair, write_rows(ROWS), tmp_path / "out")
    tokenizer = tiny_pair.engine.tokenizer("student")
    examples = read_examples(
        [tmp_path / "out" / "selected.jsonl"], tokenizer, max_length=512, statuses=("finished", "length")
    )
    rows = lines(tmp_path / "out" / "selected.jsonl")
    assert [list(e.input_ids[e.num_prompt :]) for e in examples.examples] == [row["completion_ids"] for row in rows]


def test_filters_choose_among_what_is_left(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    summary = score(tiny_pair, data, tmp_path / "a", criteria=("ppl",), pick=PickOptions(correct=True))
    assert summary.selected == 1
    (row,) = lines(tmp_path / "a" / "selected.jsonl")
    assert "\\boxed{2}" in row["messages"][-1]["content"]
    assert score(tiny_pair, data, tmp_path / "b", criteria=("ppl",), pick=PickOptions(min_steps=3)).selected == 1
    verdicts = [{**ROWS[0], "correctness_math_verify": [False, True]}]
    score(tiny_pair, write_rows(verdicts, "v.jsonl"), tmp_path / "c", criteria=("ppl",), pick=PickOptions(correct=True))
    (row,) = lines(tmp_path / "c" / "selected.jsonl")
    assert "Three" in row["messages"][-1]["content"], "the row's verdict counts"


JUDGED: list[dict[str, Any]] = [
    {"problem": "a?", "answer": "3\\sqrt{2}", "generations": ["\\boxed{3\\sqrt{2}}", "\\boxed{3}"]},
    {"problem": "b?", "answer": "\\text{Ada}", "generations": ["\\boxed{\\text{Bob}}", "\\boxed{\\text{Ada}}"]},
    {"problem": "c?", "answer": 1e-05, "generations": ["\\boxed{0.00001}", "\\boxed{0.00002}"]},
    {"problem": "d?", "answer": "5", "generations": ["<think>\\boxed{5}</think>3", "<think>\\boxed{3}</think>5"]},
    {"problem": "e?", "answer": "5", "generations": ["<think>It is \\boxed{5}", "The answer is 5."]},
    {"problem": "f?", "answer": "C", "generations": ["\\boxed{4}", "The answer is (C)."]},
]


def test_answers_are_judged_after_the_thought_and_undecided_ones_are_counted(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    summary = score(tiny_pair, write_rows(JUDGED), tmp_path / "out", pick=PickOptions(correct=True))
    rows = lines(tmp_path / "out" / "scores.jsonl")
    expected = [[True, False], [False, True], [True, False], [False, True], [False, True], [False, True]]
    assert [row["correct"] for row in rows] == [verdict for pair in expected for verdict in pair]
    assert [row["undecided"] is not None for row in rows] == [i == 10 for i in range(12)]
    assert "letter of an option" in rows[10]["undecided"]
    assert (summary.selected, summary.undecided) == (6, 1)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["undecided"] == 1


@pytest.mark.plots
def test_several_responses_are_kept_with_larks_weights(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    summary = score(tiny_pair, data, tmp_path / "out", criteria=("lark",), pick=PickOptions(keep=2, weigh=True))
    assert summary.selected == 5  # 2 of 3, 2 of 2, 1 of 1
    rows = lines(tmp_path / "out" / "selected.jsonl")
    assert rows[0]["score"] >= rows[1]["score"]
    assert [row["weight"] for row in rows[2:]] == [1.0, 1.0, 1.0]  # all are kept: no threshold
    assert rows[0]["weight"] + rows[1]["weight"] == pytest.approx(2.0)
    tokenizer = tiny_pair.engine.tokenizer("student")
    examples = read_examples(
        [tmp_path / "out" / "selected.jsonl"], tokenizer, max_length=512, statuses=("finished", "length")
    )
    assert [example.weight for example in examples.examples] == [row["weight"] for row in rows]


@pytest.mark.plots
def test_bad_rows_are_named_and_the_rest_is_scored(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    with data.open("ab") as stream:
        stream.write(b'{"prompt": "\xff"}\n{"prompt": "a", "completion": " "}\nnot json\n')
        stream.write(b'{"prompt": "b"}\n{"problem": "c", "generations": []}\n')
        stream.write(b'{"problem": "d", "generations": ["x", "y"], "correctness": [true]}\n')
        stream.write(b'{"problem": "e", "generations": ["", "fine"]}\n')
        stream.write(json.dumps({"prompt": "f", "completion": "g" * 10_000}).encode() + b"\n")
    summary = score(tiny_pair, data, tmp_path / "out")
    assert summary.traces == 7
    text = (tmp_path / "out" / "bad_rows.txt").read_text()
    for number, what in [(6, "not UTF-8"), (7, "no token"), (8, "not valid JSON"), (9, "needs"), (10, "non-empty")]:
        assert any(f"line {number}: " in line and what in line for line in text.splitlines()), (number, text)
    assert "line 11: 2 generations but 1 verdict" in text
    assert "line 12, response 0" in text
    assert "line 13: 10" in text
    with pytest.raises(InputError, match=r"no trace that can be used\n.*line 1"):
        score(tiny_pair, write_rows([{"x": 1}], "bad.jsonl"), tmp_path / "none")


def test_a_run_that_stopped_goes_on(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genssd.distill.score.features.BATCH_TOKENS", 60)
    data = write_rows(ROWS)
    score(tiny_pair, data, tmp_path / "whole", criteria=CRITERIA)
    score(tiny_pair, data, tmp_path / "torn", criteria=CRITERIA)
    journal = tmp_path / "torn" / "features.jsonl"
    journal.write_bytes(journal.read_bytes()[:-300])
    with pytest.raises(InputError, match="--resume"):
        score(tiny_pair, data, tmp_path / "torn", criteria=CRITERIA)
    with pytest.raises(InputError, match="criteria="):
        score(tiny_pair, data, tmp_path / "torn", criteria=("ppl",), resume=True)
    score(tiny_pair, data, tmp_path / "torn", criteria=CRITERIA, resume=True)
    for name in ("scores.jsonl", "selected.jsonl", "teachers.json"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(InputError, match="other data"):
        score(tiny_pair, write_rows(ROWS[1:], data.name), tmp_path / "torn", criteria=CRITERIA, resume=True)


def test_batches_do_not_change_a_value(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(tiny_pair, write_rows(ROWS), tmp_path / "a", criteria=CRITERIA)
    monkeypatch.setattr("genssd.distill.score.features.BATCH_TOKENS", 1)
    score(tiny_pair, write_rows(list(reversed(ROWS)), "r.jsonl"), tmp_path / "b", criteria=CRITERIA)
    key = lambda row: (row["prompt"], row["teacher"], row["tokens"], row["ppl"])  # noqa: E731
    ours, theirs = (sorted(lines(tmp_path / name / "scores.jsonl"), key=key) for name in "ab")
    for a, b in zip(ours, theirs, strict=True):
        for name in CRITERIA[:3]:
            assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_online_equals_post_hoc(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """A journal's whole-response scores under trajectory-wide criteria are the columns over its saved ids."""
    data = write_rows([{"question": f"{i}+{i}?"} for i in range(4)])
    for name in ("ppl(scope='trajectory')", "rsr(scope='trajectory')"):
        out = tmp_path / name[:3]
        config = SelectConfig(
            teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), data=str(data), output_dir=str(out),
            criterion=name, max_tokens=24, candidates=2, beam=2,
        )  # fmt: skip
        run_select(config, tiny_pair.engine)
        score(tiny_pair, out / "selections.jsonl", out / "score", criteria=(name,), pick=PickOptions(finished=False))
        online = []
        for row, _ in complete_rows(out / "selections.jsonl"):
            online += [row["score"], *(other["score"] for other in row["others"])]
        column = [row[name] for row in lines(out / "score" / "scores.jsonl")]
        assert column == pytest.approx(online, rel=1e-5)


TEACHERS = ("divergence", "teacher_logprob", "0.5*divergence + 0.5*ppl")


@pytest.mark.parametrize("criterion", TEACHERS)
@pytest.mark.parametrize("by", ["rows", "teacher", "teacher from text"])
def test_criteria_of_the_teacher_equal_the_searchs(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, criterion: str, by: str
) -> None:
    """From the log-probabilities in the rows, from a teacher in memory, and from one that renders the prompt itself."""
    student = tmp_path / "student"  # with another chat template than the teacher's
    shutil.copytree(tiny_pair.student, student)
    (student / "chat_template.jinja").write_text("{% for m in messages %}Q {{ m.content }} {% endfor %}A ")
    engine = Engine.from_pretrained(tiny_pair.teacher, student, memory_bytes=1 << 24)
    config = SelectConfig(
        teacher=str(tiny_pair.teacher), student=str(student), criterion=criterion, output_dir=str(tmp_path / "run"),
        data=str(write_rows([{"question": f"{i}+{i}?"} for i in range(3)])), max_tokens=24, candidates=2, beam=2,
    )  # fmt: skip
    path = run_select(config, engine).path
    rows = [row for row, _ in complete_rows(path)]
    assert all(row["prompt_ids"] != row["student_prompt_ids"] for row in rows)
    if by != "rows":
        for row in rows:
            for response in (row, *row["others"]):
                del response["teacher_logprobs"]
        path = write_rows(rows, "without.jsonl")
    if by == "teacher from text":
        path = write_rows([{**row, "prompt_ids": None, "teacher": "T"} for row in rows], "text.jsonl")
    settings = {} if by == "rows" else {"teacher": str(tiny_pair.teacher)}
    scored = ScoreConfig(
        student=str(student), data=(str(path),), criteria=(criterion,), output_dir=str(tmp_path / "score"), **settings
    )
    assert run_score(scored, engine).bad_rows == ()
    online = [response["score"] for row in rows for response in (row, *row["others"])]
    column = [row[criterion] for row in lines(tmp_path / "score" / "scores.jsonl")]
    assert column == pytest.approx(online, rel=1e-4)


def test_what_was_picked_is_rendered_by_another_students_template(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """selected.jsonl has the problem's messages, tools and all, and the ids of the student that scored."""
    other = tmp_path / "other"
    shutil.copytree(tiny_pair.student, other)
    (other / "chat_template.jinja").write_text(
        "{% for t in tools or [] %}T {{ t.name }} {% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["added_tokens"][-1]["content"] += "!"  # another tokenizer: the ids of the rows are not its own
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}]
    rows = [
        {"messages": [*turns, {"role": "assistant", "content": "Two."}]},
        {"prompt": "2+2=", "completion": "4"},
        {"problem": "3+3?", "generations": ["6"]},
    ]
    score(tiny_pair, write_rows(rows), tmp_path / "out")
    selected = tmp_path / "out" / "selected.jsonl"
    written = lines(selected)
    asked = [turns, [{"role": "user", "content": "2+2="}], [{"role": "user", "content": "3+3?"}]]
    assert [row["messages"][:-1] for row in written] == asked
    assert [row["prompt"] for row in written] == [asked[0], "2+2=", asked[2]]
    examples = read_examples([selected], Tokenizer(other), max_length=512, statuses=("finished",)).examples
    texts = [Tokenizer(other).decode(example.input_ids[: example.num_prompt]) for example in examples]
    assert texts == ["<system>Be kind.\n<user>1+1?\n<assistant>", "2+2=", "<user>3+3?\n<assistant>"]
    own = tiny_pair.engine.tokenizer("student")
    same = read_examples([selected], own, max_length=512, statuses=("finished",)).examples
    assert [list(e.input_ids) for e in same] == [[*r["student_prompt_ids"], *r["completion_ids"]] for r in written]


class Undefined:
    def score(self, candidate: Any) -> float:
        return math.nan

    def higher_is_better(self) -> bool:
        return True


def test_a_criterion_that_gives_nan_is_named(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(criterion_names._MAKERS, "undefined", Undefined)
    with pytest.raises(InputError, match=r"criterion undefined gave NaN for .*line 1"):
        score(tiny_pair, write_rows(ROWS), tmp_path / "out", criteria=("undefined",))


def test_teachers_are_ranked_over_the_prompts_that_all_answered() -> None:
    rows = []
    for prompt in range(30):
        for teacher, value in (("good", 1.0 + prompt % 3), ("bad", 2.0 + prompt % 3)):
            rows.append({"prompt": str(prompt), "teacher": teacher, "ratios": {}, "value": value})
    rows.append({"prompt": "only one", "teacher": "bad", "ratios": {}, "value": -100.0})
    columns = {"ppl": [row["value"] for row in rows]}
    ranks, incomplete = rank_teachers(rows, {"ppl": resolve("ppl")}, columns)
    first, second = ranks["ppl"]
    assert (first.teacher, first.value, first.first, first.prompts) == ("good", pytest.approx(2.0), 1.0, 30)
    assert (second.teacher, second.value, second.first) == ("bad", pytest.approx(3.0), 0.0)
    assert 1.6 < first.low < 2.0 < first.high < 2.4
    assert incomplete == 1


def test_a_ratio_criterion_ranks_by_the_ratio_of_sums() -> None:
    ratios = [(1.0, 4.0), (8.0, 1.0), (3.0, 1.0), (3.0, 1.0)]
    rows = [
        {"prompt": str(i // 2), "teacher": "AB"[i % 2], "ratios": {"rsr": list(ratio)}}
        for i, ratio in enumerate(ratios)
    ]
    ranks, _ = rank_teachers(rows, {"rsr": resolve("rsr")}, {"rsr": [n / d for n, d in ratios]})
    assert {rank.teacher: rank.value for rank in ranks["rsr"]} == pytest.approx({"A": 4.0 / 5.0, "B": 11.0 / 2.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criteria": ()}, "at least one"),
        ({"criteria": ("ppl", "ppl")}, "twice"),
        ({"criteria": ("nope",)}, "unknown criterion 'nope'"),
        ({"pick": {"by": "rsr"}}, "not among"),
        ({"limit": 0}, "limit"),
        ({"pick": {"min_steps": 3, "max_steps": 2}}, "no range"),
        ({"pick": {"keep": 0}}, "keep"),
        ({"pick": {"weigh": True}}, "weights of lark"),
        ({"pick": {"weigh": True, "threshold": 1.0}}, "no mix, similarity"),
        ({"pick": {"mix": ("long=1",), "keep": 2}}, "one response per prompt"),
        ({"pick": {"mix": ("long",)}}, "'long' is not one kind"),
        ({"pick": {"mix": ("long=0",)}}, "'long=0' is not one kind"),
        ({"pick": {"mix": ("Z=1", "long=1")}}, "no teacher is called 'Z'; there are A, B"),
        ({"pick": {"best_share": 0.0}}, "best_share"),
        ({"pick": {"similarity": 1.5}}, "similarity"),
        ({"criteria": ("divergence",)}, r"line 1: .*divergence reads: give --teacher MODEL"),
        ({"criteria": ("0.5*ppl + 0.5*teacher_logprob",)}, r"of the teacher, .*teacher_logprob reads: give --teacher"),
        ({"equal_length": 1.0}, r"equal_length must lie in \[0, 1\), not 1.0"),
        ({"equal_length": -0.1}, r"equal_length must lie in \[0, 1\), not -0.1"),
    ],
)
def test_wrong_options_are_named(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    def run() -> None:
        made = {**options, "pick": PickOptions(**options["pick"])} if "pick" in options else options
        score(tiny_pair, write_rows(ROWS), tmp_path / "out", **made)

    with pytest.raises(InputError, match=message):
        run()


def test_selections_with_the_teachers_topk_are_read_from_any_directory(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = SelectConfig(
        teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), data=str(write_rows([{"prompt": "one"}])),
        output_dir=str(tmp_path / "run"), candidates=3, beam=2, chunk=Chunk(tokens=3, until=None), max_tokens=6,
        teacher_topk=2,
    )  # fmt: skip
    path = run_select(select, tiny_pair.engine).path
    monkeypatch.chdir(tmp_path)
    data = (str(path.relative_to(tmp_path)),)
    config = ScoreConfig(student=str(tiny_pair.student), data=data, output_dir=str(tmp_path / "scored"))
    summary = run_score(config, tiny_pair.engine)
    assert (summary.traces, summary.bad_rows) == (2, ())
