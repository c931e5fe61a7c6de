"""`genssd leaf`: gradients against transformers' own loss, runs against the definition, and the command."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from transformers import AutoModelForCausalLM

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.traces import Trace, read_traces
from genssd.distill.score.leaf import run_leaf
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.score.leaf_work import distracting_spans, gradient_norms, question_places, scaled
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]
ROWS: list[dict[str, Any]] = [
    {"question": "Tom, who is tall, has 3 and 4 pens. How many?", "generations": ["He has 3 + 4 = 7.", "So 7"]},
    {"prompt": "3+4=", "completion": "7"},
]


def traces_of(pair: TinyPair, data: Path) -> list[Trace]:
    found = list(read_traces([data], pair.engine.tokenizer("student"), max_length=512))
    return [item for item in found if not isinstance(item, str)]


def test_norms_are_those_of_transformers_loss(tiny_pair: TinyPair, write_rows: Write) -> None:
    for which in ("student", "teacher"):
        model: Any = AutoModelForCausalLM.from_pretrained(getattr(tiny_pair, which), dtype=torch.float32)
        for trace in traces_of(tiny_pair, write_rows(ROWS)):
            ids = torch.tensor([[*trace.prompt_ids, *trace.response_ids]])
            labels = ids.clone()
            labels[:, : len(trace.prompt_ids)] = -100
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            loss = model(inputs_embeds=embedded, labels=labels).loss * len(trace.response_ids)
            (gradient,) = torch.autograd.grad(loss, [embedded])
            expected = gradient[0, : len(trace.prompt_ids)].norm(dim=1)
            torch.testing.assert_close(gradient_norms(model, trace), expected, atol=1e-5, rtol=1e-4)


def test_the_question_is_found_behind_the_template(tiny_pair: TinyPair, write_rows: Write) -> None:
    tokenizer = tiny_pair.engine.tokenizer("student")
    first, _, plain = traces_of(tiny_pair, write_rows(ROWS))
    for trace, text in ((first, ROWS[0]["question"]), (plain, "3+4=")):
        places = question_places(trace, tokenizer)
        assert tokenizer.decode([trace.prompt_ids[i] for i in places]) == text
    lost = dataclasses.replace(first, question="another text")
    special = set(tokenizer.hf.all_special_ids)
    assert question_places(lost, tokenizer) == [i for i, t in enumerate(first.prompt_ids) if t not in special]


def test_runs_by_definition() -> None:
    student = torch.tensor([0.0, 4.0, 4.0, 1.0, 2.0, 4.0])
    teacher = torch.tensor([3.0, 0.0, 0.0, 3.0, 0.0, 0.0])
    words = [1, 2, 3, 4, 5, None]
    # scaled: student 0 1 1 1/4 1/2 1, teacher 1 0 0 1 0 0: the least differences are at 1, 2 (and 5, white space)
    assert distracting_spans(student, teacher, words, 0.5) == [[1, 2], [4]]
    assert distracting_spans(student, teacher, words, 0.2) == [[1, 2]]
    assert distracting_spans(student, teacher, words, 0.01) == [[1]]
    assert distracting_spans(torch.ones(1), torch.ones(1), [1], 0.5) == [], "a question is left"
    # tokens 2 to 4 are one word: with the token that is chosen the others are taken, and count
    assert distracting_spans(student, teacher, [1, 2, 3, 3, 3, None], 0.2) == [[1, 2, 3, 4]]
    assert distracting_spans(student, teacher, [1, 2, 3, 3, 3, None], 0.01) == [[1]]
    assert scaled(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
    assert distracting_spans(torch.empty(0), torch.empty(0), [], 0.5) == []


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    data = write_rows([*ROWS, {"prompt": "no completion"}])
    config = LeafConfig(
        student=str(tiny_pair.student), teacher=str(tiny_pair.teacher), data=(str(data),), share=0.2,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    summary = run_leaf(config)
    assert summary.traces == 3
    assert len(summary.bad_rows) == 1
    rows = lines(tmp_path / "run" / "counterfactuals.jsonl")
    assert len(rows) == 3 + summary.counterfactuals > 3
    originals = [row for row in rows if row["left_out"] is None]
    assert len(originals) == 3
    tokenizer = tiny_pair.engine.tokenizer("student")
    for row in rows:
        # the prompt as text, which any student's chat template renders, is that of the ids
        assert tokenizer.encode_prompt(row["prompt"]) == row["student_prompt_ids"]
        assert row["messages"][:-1] == (row["prompt"] if isinstance(row["prompt"], list) else row["messages"][:1])
        if row["left_out"] is not None:
            place = (row["source"]["line"], row["source"]["response"])
            whole = next(o for o in originals if (o["source"]["line"], o["source"]["response"]) == place)
            assert row["completion_ids"] == whole["completion_ids"]
            taken = len(whole["student_prompt_ids"]) - len(row["student_prompt_ids"])
            assert taken == len(tokenizer.encode_plain(row["left_out"]))
            question = whole["prompt"] if isinstance(whole["prompt"], str) else whole["prompt"][-1]["content"]
            assert re.search(rf"(?<!\w){re.escape(row['left_out'].strip())}(?!\w)", question), "whole words"
    examples = read_examples(
        [tmp_path / "run" / "counterfactuals.jsonl"], tokenizer, max_length=512, statuses=("finished", "length")
    )
    assert len(examples.examples) == len(rows)
    with pytest.raises(InputError, match="pass --resume"):
        run_leaf(config)
    journal = tmp_path / "run" / "journal.jsonl"
    whole = (tmp_path / "run" / "counterfactuals.jsonl").read_text()
    journal.write_bytes(journal.read_bytes()[:-20])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_leaf(dataclasses.replace(config, resume=True))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["threads"] == 2
    assert (tmp_path / "run" / "counterfactuals.jsonl").read_text() == whole
    with pytest.raises(InputError, match=r"begun with share=0\.2"):
        run_leaf(dataclasses.replace(config, resume=True, share=0.3))
    for wrong in ({"share": 0.0}, {"share": 0.6}, {"limit": 0}, {"data": ()}):
        with pytest.raises(InputError):
            dataclasses.replace(config, **wrong)  # type: ignore[arg-type]
