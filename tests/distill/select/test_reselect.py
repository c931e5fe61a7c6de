"""`genssd reselect`: a decision log judged again, and exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_pair import TinyPair

from genssd.distill.data.example_files import read_examples
from genssd.distill.runs.journal import make_line
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.decisions import read_decisions
from genssd.distill.select.reselect import ReselectSummary, run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.criterion_calls import evaluate
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]


def select(pair: TinyPair, data: Path, out: Path, criterion: str, **options: Any) -> None:
    config = SelectConfig(
        teacher=str(pair.teacher), student=str(pair.student), data=str(data), output_dir=str(out), criterion=criterion,
        **{"chunk": Chunk(tokens=5, until=None), "max_tokens": 20, "candidates": 3, **options},
    )  # fmt: skip
    run_select(config, pair.engine)


def again(pair: TinyPair, run: Path, criterion: str | None, out: str = "again") -> ReselectSummary:
    config = ReselectConfig(run=str(run), criterion=criterion, output_dir=str(run / out), memory_bytes=1 << 24)
    return run_reselect(config)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


CRITERIA = ["ppl", "rsr", "divergence", "random", "aslec_drop", "lark", "lalp(steps=1)", "scas", "0.3*ppl + 0.7*length"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_runs_own_criterion_decides_the_same(
    criterion: str, tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """Every value of the log comes out of the log again: online equals post-hoc."""
    data = write_rows([{"question": f"{i}+{i}?"} for i in range(3)])
    select(tiny_pair, data, tmp_path / "run", criterion, beam=2)
    summary = again(tiny_pair, tmp_path / "run", criterion)
    assert summary.differing == 0
    assert summary.largest_change < 1e-4
    assert summary.prompts == 3
    assert summary.contested > 0


def test_another_criterion_decides_by_its_own_values(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows([{"question": f"{i}+{i}?"} for i in range(4)])
    select(tiny_pair, data, tmp_path / "run", "ppl")
    summary = again(tiny_pair, tmp_path / "run", "teacher_logprob")
    assert 0 < summary.differing <= summary.contested
    rows = lines(tmp_path / "run" / "again" / "reselected.jsonl")
    assert sum(not row["agrees"] for row in rows) == summary.differing
    tokenizer, criterion = tiny_pair.engine.tokenizer("student"), resolve("teacher_logprob")
    rounds = [r.candidates for decisions in read_decisions(tmp_path / "run", tokenizer) for r in decisions.rounds]
    for row, decided in zip(rows, rounds, strict=True):
        scores = evaluate(criterion, [d.candidate for d in decided])
        able = [s for s, d in zip(scores, decided, strict=True) if d.verdict not in ("duplicate", "loop")]
        (winner,) = row["reselected"]
        assert scores[[list(d.trace) for d in decided].index(winner)] == max(able)


def test_exports_are_what_the_tree_says(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """By the run's own criterion, which is the default: every label is a verdict of the log."""
    data = write_rows([{"question": f"{i}+{i}?"} for i in range(3)])
    select(tiny_pair, data, tmp_path / "run", "rsr")
    summary = again(tiny_pair, tmp_path / "run", None)
    pairs, steps = (lines(tmp_path / "run" / "again" / f"{name}.jsonl") for name in ("pairs", "steps"))
    assert (summary.criterion, len(pairs), len(steps)) == ("rsr", summary.pairs, summary.steps)
    assert summary.exact_pairs == summary.pairs > 0
    assert all(pair["chosen_score"] <= pair["rejected_score"] for pair in pairs)  # a low ratio is better
    logged = {
        (row["index"], tuple(c["trace"])): c
        for row in lines(tmp_path / "run" / "decisions.jsonl")
        for c in row["candidates"]
    }
    kept = {(i, *c["token_ids"]): c["score"] for (i, _), c in logged.items() if c["verdict"] == "kept"}
    assert all(kept[pair["index"], *pair["chosen_token_ids"]] == pair["chosen_score"] for pair in pairs)
    for row in steps:
        assert len(row["completions"]) == len(row["labels"])
        assert all(row["labels"][:-1])
    assert sum(not row["labels"][-1] for row in steps) == sum(c["verdict"] == "beaten" for c in logged.values())
    selections = {row["index"]: row for row in lines(tmp_path / "run" / "selections.jsonl")}
    whole = [row for row in steps if all(row["labels"])]
    assert len(whole) == 3
    for row in whole:
        completion = selections[row["index"]]["completion"]
        assert "".join(row["completions"]) == completion[0]["content"]


@pytest.mark.parametrize("beam", [1, 2])
def test_exports_are_by_the_criterion_that_is_asked_for(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, beam: int
) -> None:
    """Pairs and labels from the log alone: teacher_logprob is the mean of a field of it."""
    run = tmp_path / "run"
    chunk = Chunk(tokens=5, until=None, shortest=1)  # so that a last chunk is judged by itself
    select(tiny_pair, write_rows([{"question": f"{i}+{i}?"} for i in range(4)]), run, "ppl", beam=beam, chunk=chunk)
    assert again(tiny_pair, run, "teacher_logprob").differing > 0
    pairs, steps = (lines(run / "again" / f"{name}.jsonl") for name in ("pairs", "steps"))
    tokenizer = tiny_pair.engine.tokenizer("student")
    expected_pairs, expected_labels, exact_pairs = set(), {}, 0
    for row, selection in zip(lines(run / "decisions.jsonl"), lines(run / "selections.jsonl"), strict=True):
        rounds: dict[int, list[dict[str, Any]]] = {}
        for c in row["candidates"]:
            rounds.setdefault(len(c["trace"]), []).append(c)
        value = lambda c: float(np.mean(c["teacher_logprob"], dtype=np.float64))  # noqa: E731
        is_exact = True
        labels: dict[tuple[int, ...], bool] = {}
        ids = {tuple(c["trace"]): c["token_ids"] for c in row["candidates"]}
        for number in sorted(rounds):
            able = sorted(
                (c for c in rounds[number] if c["verdict"] not in ("duplicate", "loop")), key=value, reverse=True
            )
            places = sum(c["verdict"] == "kept" for c in rounds[number])
            for c in able:
                labels[tuple(c["trace"])] = c in able[:places]
            for c in able[:places]:
                siblings = [o for o in able[places:] if o["trace"][:-1] == c["trace"][:-1]]
                if siblings:
                    chosen, rejected = tuple(c["token_ids"]), tuple(siblings[-1]["token_ids"])
                    expected_pairs.add((row["index"], number - 1, is_exact, chosen, rejected))
                    exact_pairs += is_exact
            is_exact = is_exact and all((c["verdict"] == "kept") == (c in able[:places]) for c in able)
        for trace in labels:
            if not any(other[:-1] == trace for other in ids):
                chain = [trace[:depth] for depth in range(1, len(trace) + 1)]
                response = [token for link in chain for token in ids[link]]
                key = (row["index"], tokenizer.decode(response), len(chain))
                expected_labels[key] = [labels[link] for link in chain]
        assert selection["index"] == row["index"]
    got = {
        (p["index"], p["round"], p["exact"], tuple(p["chosen_token_ids"]), tuple(p["rejected_token_ids"]))
        for p in pairs
    }
    assert got == expected_pairs
    assert 0 < exact_pairs < len(got)
    assert all(pair["chosen_score"] >= pair["rejected_score"] for pair in pairs)
    got_labels = {(r["index"], "".join(r["completions"]), len(r["completions"])): r["labels"] for r in steps}
    assert got_labels == expected_labels
    assert all(all(row["labels"][:-1]) for row in steps if row["exact"])
    assert any(not all(row["labels"][:-1]) for row in steps if not row["exact"])
    assert {row["criterion"] for row in (*pairs, *steps)} == {"teacher_logprob"}


def test_pairs_are_rendered_by_another_students_template(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """Prompt and response so far are the prompt, and only a chunk that ends the response gets an end."""
    rows = [{"question": "1+1?"}, {"prompt": "2+2="}]
    select(tiny_pair, write_rows(rows), tmp_path / "run", "ppl", sampling=Sampling(temperature=0.3))
    again(tiny_pair, tmp_path / "run", None)
    other = tmp_path / "other"
    shutil.copytree(tiny_pair.student, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}Q {{ m.content }} {% endfor %}A ")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["added_tokens"][-1]["content"] += "!"  # another tokenizer: the ids of the rows are not its own
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    tokenizer = Tokenizer(other)
    path = tmp_path / "run" / "again" / "pairs.jsonl"
    examples = read_examples([path], tokenizer, max_length=512, statuses=()).examples
    pairs = lines(path)
    assert len(examples) == 2 * len(pairs) > 4
    for example, (pair, name) in zip(examples, product(pairs, ("chosen", "rejected")), strict=True):
        prompt = "Q 1+1? A " if pair["index"] == 0 else "2+2="
        assert tokenizer.decode(example.input_ids[: example.num_prompt]) == prompt + pair["response_so_far"]
        assert tokenizer.decode(example.completion_ids) == pair[name]
        ends = example.completion_ids[-1] in tokenizer.end_token_ids
        assert ends == pair[f"{name}_finished"] == (pair[f"{name}_token_ids"][-1] in tokenizer.end_token_ids)


def test_results_are_not_overwritten(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    select(tiny_pair, write_rows([{"question": "1+1?"}]), tmp_path / "run", "ppl")
    again(tiny_pair, tmp_path / "run", "rsr")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "again").iterdir()}
    for criterion in ("rsr", "ppl"):
        with pytest.raises(InputError, match=r"again holds finished work already; choose another output_dir"):
            again(tiny_pair, tmp_path / "run", criterion)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "again").iterdir()} == before


def test_exports_load_as_trl_reads_them(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl.data_utils")
    select(tiny_pair, write_rows([{"question": "1+1?"}]), tmp_path / "run", "ppl")
    again(tiny_pair, tmp_path / "run", "ppl")
    load = datasets.load_dataset
    out, cache = tmp_path / "run" / "again", str(tmp_path / "cache")
    pairs = load("json", data_files=str(out / "pairs.jsonl"), split="train", cache_dir=cache)
    assert not trl.is_conversational(pairs[0])
    assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names)
    steps = load("json", data_files=str(out / "steps.jsonl"), split="train", cache_dir=cache)
    assert isinstance(steps[0]["labels"][0], bool)


def test_what_does_not_belong_together_is_named(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    run = tmp_path / "run"
    select(tiny_pair, write_rows([{"question": f"{i}?"} for i in range(2)]), run, "ppl")
    with pytest.raises(InputError, match="fitted over all of the data"):
        again(tiny_pair, run, "aslec_casl")
    with pytest.raises(InputError, match=r"run\.json cannot be read"):
        again(tiny_pair, tmp_path, "ppl")
    again(tiny_pair, run, "ppl")
    log = run / "decisions.jsonl"
    log.write_text("".join(reversed(log.read_text().splitlines(keepends=True))))
    with pytest.raises(
        InputError, match=r"decisions\.jsonl does not hold the decisions of .*selections\.jsonl, line 2, in"
    ):
        again(tiny_pair, run, "rsr", "b")
    indices = [json.loads(line)["index"] for line in (run / "selections.jsonl").read_text().splitlines()]
    log.write_bytes(b"".join(make_line({"index": i, "candidates": [{}]}) for i in indices))
    with pytest.raises(InputError, match=r"decisions\.jsonl, line \d is no decision of ours"):
        again(tiny_pair, run, "ppl", "b")
