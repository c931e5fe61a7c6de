"""`genssd prefix`: bisection over steps against judges we know, and the whole command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.progress import Recorder
from support.tiny_pair import TinyPair

from genssd.distill.score import prefix as prefixes
from genssd.distill.score import prefix_judges
from genssd.distill.score.prefix import PrefixSummary, run_prefix, shortest_prefixes
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.score.prefix_judges import Judgement, ReplyCounts, warn_of_unmarked
from genssd.engine.common.errors import InputError
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

Write = Callable[..., Path]
SAID = "First we add.\nThen we carry.\nNow we write it down.\nSo \\boxed{7}"
ROWS: list[dict[str, Any]] = [
    {"question": f"{i}+{7 - i}?", "answer": "7", "generations": [SAID, "It is \\boxed{7}"]} for i in range(3)
]


@given(st.lists(st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), max_size=8))
def test_a_monotone_judge_gives_the_exact_minimum_in_few_calls(cases: list[tuple[int, int]]) -> None:
    calls = [0] * len(cases)

    def enough(asked: Sequence[tuple[int, int]]) -> list[bool]:
        for i, _ in asked:
            calls[i] += 1
        return [steps >= cases[i][1] for i, steps in asked]

    assert shortest_prefixes([n for n, _ in cases], enough) == [least for _, least in cases]
    assert all(count <= math.floor(math.log2(n)) + 1 for count, (n, _) in zip(calls, cases, strict=True))


def test_a_judge_that_always_says_no_keeps_the_whole() -> None:
    assert shortest_prefixes([1, 2, 9, 64], lambda asked: [False] * len(asked)) == [1, 2, 9, 64]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_judge_without_order_still_judged_the_result_enough(verdicts: list[bool]) -> None:
    asked: dict[int, bool] = {}

    def enough(these: Sequence[tuple[int, int]]) -> list[bool]:
        asked.update({steps: verdicts[steps - 1] for _, steps in these})
        return [verdicts[steps - 1] for _, steps in these]

    (found,) = shortest_prefixes([len(verdicts)], enough)
    assert found == len(verdicts) or asked[found]


def run(pair: TinyPair, data: Path, out: Path, **options: Any) -> PrefixSummary:
    asked = {} if options.get("judge") == "solves" else {"judge_tokens": 4}
    settings = {"max_tokens": 8, "batch": 2, **asked, **options}
    return run_prefix(
        PrefixConfig(student=str(pair.student), data=(str(data),), output_dir=str(out), **settings), pair.engine
    )


def without_checksum(row: dict[str, Any]) -> dict[str, Any]:
    """Return a journal's row as files that are written from the journal have it."""
    return {key: value for key, value in row.items() if key != "checksum"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_student_goes_on_behind_the_prefix(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge to whom two steps are enough."""
    tokenizer = tiny_pair.engine.tokenizer("student")
    monkeypatch.setattr(
        prefixes,
        "make_asking_judge",
        lambda engine, judge_tokens: (
            lambda asked: [Judgement(is_sufficient="carry" in tokenizer.decode(ids)) for _, ids in asked]
        ),
    )
    summary = run(tiny_pair, write_rows(ROWS), tmp_path / "out")
    rows = lines(tmp_path / "out" / "prefixes.jsonl")
    assert summary.traces == len(rows) == 6
    for row in rows:
        if row["source"]["response"] == 1:
            assert (row["kept_steps"], row["steps"]) == (1, 1), "one step is never asked about"
            assert row["messages"][-1]["content"] == "It is \\boxed{7}"
            assert (row["status"], row["correct"]) == ("finished", True)
            continue
        assert (row["kept_steps"], row["steps"]) == (2, 4)
        begun = "First we add.\nThen we carry."
        assert tokenizer.decode(row["completion_ids"][: row["prefix_tokens"]]) == begun
        assert row["messages"][-1]["content"].startswith(begun)
        assert row["prefix_tokens"] < len(row["completion_ids"]) <= row["prefix_tokens"] + 8
        assert row["correct"] is False
    correct = [{k: v for k, v in without_checksum(row).items() if k != "judgements"} for row in rows if row["correct"]]
    assert lines(tmp_path / "out" / "aligned.jsonl") == correct
    assert summary.replies == ReplyCounts(), "nobody was asked"
    assert (summary.kept, summary.whole, summary.mean_fraction) == (3, 3, 0.75)


def test_the_student_is_asked_and_the_answer_is_read(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions go through the chat template; only the word in brackets counts."""
    real, asked = Engine.iter_generate, []

    def generate(self: Engine, prompts: Any, **options: Any) -> Any:
        for outcome in real(self, prompts, **options):
            if options["max_tokens"] == 4:
                assert options["sampling"].temperature == 0.0
                text = tiny_pair.engine.tokenizer("student").decode(prompts[outcome.index])
                asked.append(text)
                word = "[ENOUGH]" if "carry" in text else "[NOT_ENOUGH] ENOUGH"
                reply = dataclasses.replace(outcome.completions[0], text=f"I say {word}.")
                outcome = dataclasses.replace(outcome, sampled=(reply,))
            yield outcome

    monkeypatch.setattr(Engine, "iter_generate", generate)
    summary = run(tiny_pair, write_rows(ROWS[:1]), tmp_path / "out")
    row, other = lines(tmp_path / "out" / "prefixes.jsonl")
    assert row["kept_steps"] == 2
    assert row["judgements"] == [
        {"steps": 2, "sufficient": True, "reply": "I say [ENOUGH]."},
        {"steps": 1, "sufficient": False, "reply": "I say [NOT_ENOUGH] ENOUGH."},
    ]
    assert other["judgements"] == [], "one step is never asked about"
    assert summary.replies == ReplyCounts(replies=2)
    assert len(asked) == 2
    assert all("Problem:\n0+7?\n" in text and "First we add." in text for text in asked)


def test_what_is_too_long_to_ask_about_is_not_enough(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """A model of 512 positions is asked about 400 tokens with 120 to answer in."""
    long = ". ".join(["word " * 12] * 4)
    data = write_rows([{"question": "q?", "answer": "1", "generations": [long]}])
    summary = run(tiny_pair, data, tmp_path / "out", judge_tokens=400)
    assert (summary.whole, summary.mean_fraction) == (1, 1.0)
    assert summary.replies == ReplyCounts()


def test_replies_without_a_verdict_are_kept_counted_and_warned_of(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """A random student never writes a mark: everything is kept, and the user learns why."""
    progress = Recorder()
    config = PrefixConfig(
        student=str(tiny_pair.student), data=(str(write_rows(ROWS)),), output_dir=str(tmp_path / "out"), max_tokens=8,
        judge_tokens=4, batch=2,
    )  # fmt: skip
    summary = run_prefix(config, tiny_pair.engine, progress)
    assert summary.whole == 6
    assert summary.replies == ReplyCounts(replies=6, unmarked=6, unmarked_whole=3)
    rows = lines(tmp_path / "out" / "prefixes.jsonl")
    assert [[judged["steps"] for judged in row["judgements"]] for row in rows] == [[2, 3], []] * 3
    assert all(len(judged["reply"]) <= 4 and not judged["sufficient"] for row in rows for judged in row["judgements"])
    warned = [note for note in progress.notes if note.startswith("warning: neither")]
    assert len(warned) == 1, "after the first batch, and once"
    assert "take --judge solves" in warned[0]
    counts = json.loads((tmp_path / "out" / "summary.json").read_text())["replies"]
    assert counts == {"replies": 6, "unmarked": 6, "unmarked_whole": 3}
    assert warn_of_unmarked(ReplyCounts(replies=4, unmarked=2)) is None


@pytest.mark.parametrize("change", [{"seed": 1}, {"sampling": Sampling(temperature=2.0)}, {"batch": 1}])
def test_continuations_depend_on_what_they_should(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    everything = Judgement(is_sufficient=True)
    monkeypatch.setattr(prefixes, "make_asking_judge", lambda *a: lambda asked: [everything] * len(asked))
    rows = [{**ROWS[0], "generations": [SAID]}] * 2
    data = write_rows(rows)
    run(tiny_pair, data, tmp_path / "a")
    run(tiny_pair, data, tmp_path / "b", **change)
    one, other = ([row["completion_ids"] for row in lines(tmp_path / x / "prefixes.jsonl")] for x in "ab")
    assert one[0] != one[1], "equal prompts draw different continuations"
    assert one != other
    for row in lines(tmp_path / "a" / "prefixes.jsonl"):
        ended = row["completion_ids"][-1] in tiny_pair.engine.tokenizer("student").end_token_ids
        assert row["status"] == ("finished" if ended else "length")
    kept = lines(tmp_path / "a" / "aligned.jsonl")
    assert all(row["status"] == "finished" for row in kept)


def test_solving_is_greedy(tiny_pair: TinyPair, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = prefix_judges.continue_prefixes
    for module in (prefixes, prefix_judges):
        monkeypatch.setattr(module, "continue_prefixes", lambda *a, **k: asked.append(k["sampling"]) or real(*a, **k))
    data = write_rows(ROWS[:1])
    run(tiny_pair, data, data.parent / "out", judge="solves")
    assert [sampling.temperature for sampling in asked] == [0.0, 0.0, 0.6]


def test_a_rows_own_verdict_counts_where_nothing_was_written(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows([{"question": "q", "generations": ["It is 7", "It is 8"], "correctness": [False, True]}])
    run(tiny_pair, data, tmp_path / "out")
    assert [row["correct"] for row in lines(tmp_path / "out" / "prefixes.jsonl")] == [False, True]
    assert [row["messages"][-1]["content"] for row in lines(tmp_path / "out" / "aligned.jsonl")] == ["It is 8"]


def test_changed_data_are_not_gone_on_with(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    run(tiny_pair, data, tmp_path / "out")
    changed = [{**ROWS[0], "generations": [SAID, "It is \\boxed{8}"]}, *ROWS[1:]]
    with pytest.raises(InputError, match="begun with other data"):
        run(tiny_pair, write_rows(changed), tmp_path / "out", resume=True)
    with pytest.raises(InputError, match="limit must be"):
        run(tiny_pair, data, tmp_path / "none", limit=-1)


def test_interrupted_runs_go_on(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    run(tiny_pair, data, tmp_path / "whole", judge="solves")
    run(tiny_pair, data, tmp_path / "torn", judge="solves")
    path = tmp_path / "torn" / "prefixes.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="pass --resume"):
        run(tiny_pair, data, tmp_path / "torn", judge="solves")
    with pytest.raises(InputError, match="begun with judge='solves', not 'says'"):
        run(tiny_pair, data, tmp_path / "torn", resume=True)
    run(tiny_pair, data, tmp_path / "torn", judge="solves", resume=True)
    assert path.read_text() == (tmp_path / "whole" / "prefixes.jsonl").read_text()


def test_bad_rows_are_named_and_the_rest_is_done(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows([ROWS[0], {"prompt": "a", "completion": "b. c d e. f g h"}, {"prompt": "x"}])
    summary = run(tiny_pair, data, tmp_path / "out", judge="solves")
    assert summary.traces == 2
    first, second = summary.bad_rows
    assert "line 2: no reference answer" in first
    assert "line 3: " in second
    with pytest.raises(InputError, match="no trace that can be used"):
        run(tiny_pair, write_rows([{"prompt": "x"}], "bad.jsonl"), tmp_path / "none")
