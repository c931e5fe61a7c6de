"""What every signal likes, measured before any training; and the tasks in which signals are taken apart."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from genssd.distill.reproduce import small
from genssd.distill.reproduce.apart import MIXTURES, STOPPED_EARLY, ApartTask
from genssd.distill.reproduce.arm_lists import list_arms
from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.reproduce.results import Results
from genssd.distill.reproduce.small import SHIPPED_PAIR, SmallTask
from genssd.distill.reproduce.styles import Step, find_lines, measure_styles, read_styles, score, summarise
from genssd.distill.reproduce.table import render_table
from genssd.distill.runs.progress import SILENT
from genssd.distill.small_pair.problems import (
    JUMP,
    MIXTURE,
    RAMBLING,
    RECITED,
    SPELLED,
    make_problems,
    write_step,
)
from genssd.distill.small_pair.training import (
    STUDENT_PHASES,
    iter_batches,
    make_example_writer,
    scale_learning_rate,
)
from genssd.engine.checkpoints.config import load_config

A = Step(style="a", tokens=4, teacher=-0.4, student=-8.0, right=False)
B = Step(style="b", tokens=2, teacher=-1.0, student=-1.0, right=True)


def test_means_and_choices_by_style() -> None:
    """With half of the steps of each style, a signal's favourite is chosen unless all candidates are of the other."""
    longer = dataclasses.replace(B, tokens=3, teacher=-3.0, right=False)
    first, second = summarise([A, A, A, B, longer], candidates=3)
    assert (first.style, first.steps, first.frequency, first.tokens) == ("a", 3, 0.6, 4.0)
    means = (first.teacher, first.student, first.teacher_sum, first.student_sum)
    assert means == pytest.approx((-0.1, -2.0, -0.4, -8.0))
    assert (first.student_right, second.student_right) == (0.0, 0.5)
    assert second.tokens == 2.5
    assert second.teacher == pytest.approx((-0.5 - 1.0) / 2)  # a mean of means, as a search compares them
    assert second.teacher_sum == -2.0
    chance = 1.0 - 0.4**3
    error = 4 * math.sqrt(chance * (1 - chance) / 4000)
    assert first.chosen["longest"] == pytest.approx(chance, abs=error)
    assert first.chosen["teacher"] == pytest.approx(chance, abs=error)
    assert second.chosen["shortest"] == pytest.approx(1.0 - 0.6**3, abs=0.03)
    assert second.chosen["student"] == pytest.approx(1.0 - 0.6**3, abs=0.03)
    assert summarise([], candidates=4) == []


def test_lines_of_tokens() -> None:
    assert list(find_lines(["=9", "1\n", "4", "+", "5", "\n", "x"])) == [(0, 2), (2, 6), (6, 7)]
    assert list(find_lines([])) == []


def test_styles_of_the_shipped_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "exclude_pools", frozenset)
    monkeypatch.setattr(small, "CALIBRATION", 4)
    task = SmallTask(models=tmp_path, problems=4, multiple=2, eval_problems=4, threads=1)
    pair, files = task.make_pair("shipped", SILENT), task.write_problems(0, tmp_path)
    styles = tmp_path / "styles"
    assert read_styles(styles) == {}
    measure_styles(task, pair, files, styles / "shipped", 4, SILENT)
    measures = read_styles(styles)["shipped"]
    assert sum(one.frequency for one in measures) == pytest.approx(1.0)
    assert sum(one.steps for one in measures) == pytest.approx(4 * 8 * 3, abs=2)  # four problems, eight responses
    by_style = {one.style: one for one in measures}
    assert by_style["jump"].tokens < by_style["spelled"].tokens < by_style["detour"].tokens
    assert by_style["jump"].student_sum < by_style["jump"].teacher_sum  # mental arithmetic surprises the student
    assert by_style["jump"].student_right < by_style["spelled"].student_right
    assert all(one.student < 0.0 and one.teacher < 0.0 for one in measures)
    written = (styles / "shipped" / "styles.json").stat().st_mtime_ns
    measure_styles(task, pair, files, styles / "shipped", 4, SILENT)
    assert (styles / "shipped" / "styles.json").stat().st_mtime_ns == written
    # the engine's log-probabilities of what it sampled are those of transformers
    model = AutoModelForCausalLM.from_pretrained(pair.teacher)
    rows = [json.loads(line) for line in (styles / "shipped" / "rows" / "responses.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        values, is_likeliest = score(model, row["prompt_ids"], row["completion_ids"])
        assert values == pytest.approx(row["teacher_logprobs"], abs=1e-4)
        assert all(is_likeliest[i] for i, value in enumerate(values) if value > math.log(0.501))
        assert not any(is_likeliest[i] for i, value in enumerate(values) if value < math.log(1 / 446))
    results = Results(arms=(), main=(), others=())
    table = render_table(results, ReproduceConfig(task="small"), {"shipped": measures, "other": measures})
    assert table.count("shortest chooses, %") == table.count("| jump |") == 2
    assert "**Before any training**:" in table
    assert "**Before any training, other**:" in table


def test_padded_steps_are_mental_arithmetic_in_tokens_of_the_small_pair() -> None:
    """Lengths in order jump < spelled < recited < rambling, with one token for each word; no digit but the result's."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_PAIR / "student")
    rng = random.Random(0)
    lengths: dict[str, list[int]] = {style: [] for style in (JUMP, SPELLED, RECITED, RAMBLING)}
    for _ in range(100):
        total, operand = rng.randint(10, 290), rng.randint(10, 99)
        for style, counts in lengths.items():
            step = write_step(total, operand, style, rng)
            counts.append(len(tokenizer.encode(step, add_special_tokens=False)))
            if style in (RECITED, RAMBLING):
                words, _, result = step.partition("=")
                assert result == f"{total + operand}\n"
                assert not any(letter.isdigit() for letter in words)
                assert len(words.split()) == len(tokenizer.encode(words, add_special_tokens=False))
    assert max(lengths[JUMP]) < min(lengths[SPELLED])
    assert max(lengths[SPELLED]) < min(lengths[RECITED])
    assert max(lengths[RECITED]) < min(lengths[RAMBLING])


def test_mixtures_keep_the_frequencies_of_the_shipped_pair() -> None:
    shipped = Counter(MIXTURE)
    for name, mixture in MIXTURES.items():
        counts = Counter(mixture)
        assert counts[SPELLED] / len(mixture) == shipped[SPELLED] / len(MIXTURE)
        assert counts[RECITED] / len(mixture) == shipped[JUMP] / len(MIXTURE) == max(counts.values()) / len(mixture)
        assert (counts[JUMP] == 0) is (name == "apart-short")


def test_tasks_apart_make_their_own_models_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "exclude_pools", frozenset)
    task = ApartTask(
        models=tmp_path / "models", problems=4, multiple=2, eval_problems=4, steps=1, threads=1, mixture="apart"
    )
    pair = task.make_pair("shipped", SILENT)
    assert [load_config(one).num_hidden_layers for one in (pair.teacher, pair.student)] == [4, 2]
    before = (pair.student / "config.json").stat().st_mtime_ns
    assert task.make_pair("shipped", SILENT) == pair
    assert (pair.student / "config.json").stat().st_mtime_ns == before
    early = task.make_pair("early", SILENT)
    assert early.teacher == pair.teacher
    assert early.student != pair.student
    assert task.count_styles(["=9\nHow many are there=10\nHe and more=11\n\\boxed{11}"]) == Counter(
        {JUMP: 1, RECITED: 1, RAMBLING: 1}
    )


def test_a_cold_start_that_is_stopped_early_is_the_same_training_up_to_there() -> None:
    start = STUDENT_PHASES[0]
    assert STOPPED_EARLY.steps < start.steps
    for step in (0, 99, 100, STOPPED_EARLY.steps - 1):
        assert scale_learning_rate(step, STOPPED_EARLY) == scale_learning_rate(step, start)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_PAIR / "student")
    writers = [make_example_writer(tokenizer, make_problems(9, 3), phase) for phase in (STOPPED_EARLY, start)]
    batches = [iter_batches(w, phase, 0, seed=0) for w, phase in zip(writers, (STOPPED_EARLY, start), strict=True)]
    for _ in range(9):
        (ids, labels), (other_ids, other_labels) = (next(each) for each in batches)
        assert ids.equal(other_ids)
        assert labels.equal(other_labels)


def test_signals_are_compared_with_one_another_in_both_tasks_apart() -> None:
    for task in ("apart", "apart-short"):
        by_name = {arm.name: arm for arm in list_arms(task)}
        signals = {"gen-ssd-random", "gen-ssd-longest", "gen-ssd-shortest", "gen-ssd-teacher"}
        assert signals < set(by_name["gen-ssd"].controls)
        assert {"random-of-n", "longest", "shortest", "teacher-logprob"} < set(by_name["grape"].controls)
