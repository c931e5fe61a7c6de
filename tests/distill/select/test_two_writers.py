"""Two writers: `genssd generate --method alternate` and `relay`, beside plain loops over each model alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizers import build, save
from support.configs import MODELS
from support.tiny_pair import TinyPair
from support.token_sum import token_sum

from genssd import Alternation, Chunk, Engine, Relay, Sampling, TwoWriterCompletion, generate_two_writers
from genssd.distill.answers.judge import judge
from genssd.distill.data.example_files import read_examples
from genssd.distill.runs.effects import check_effects
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.generate_summary import GenerateSummary
from genssd.distill.select.relay import find_error
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.common.errors import CapacityError, InputError
from genssd.printing import print_writers

Write = Callable[..., Path]
PROBLEMS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in (0, 1, 1)]
PROMPTS = [[{"role": "user", "content": row["question"]}] for row in PROBLEMS]
GREEDY = Sampling(temperature=0.0)
FIVE = Chunk(tokens=5, until=None, shortest=0)
LENGTH = 16


def run(pair: TinyPair, data: Path, out: Path, **options: Any) -> GenerateSummary:
    settings = {"max_tokens": 12, "student": str(pair.student), **options}
    return run_generate(
        GenerateConfig(teacher=str(pair.teacher), data=str(data), output_dir=str(out), **settings), pair.engine
    )


def lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])


def find_threshold(pair: TinyPair) -> float:
    """A threshold that some of the student's first windows of two tokens reach."""
    prompts = [pair.engine.tokenizer("student").encode_prompt(prompt) for prompt in PROMPTS[:3]]
    attempts = [list(c.token_ids) for (c,) in pair.engine.generate(prompts, model="student", max_tokens=2)]
    means = sorted(stats.entropy.mean().item() for stats in pair.engine.score(prompts, attempts))
    return means[1] + 1e-4


def write_alone(engine: Engine, ids: list[int], model: Any, count: int) -> list[int]:
    """Greedy tokens after some ids by one model; they end with the end of sequence or after so many."""
    ((completion,),) = engine.generate([ids], model=model, sampling=GREEDY, max_tokens=count)
    return list(completion.token_ids)


def has_ended(engine: Engine, ids: list[int]) -> bool:
    return bool(ids) and ids[-1] in engine.tokenizer("teacher").end_token_ids


def judge_by_teacher(engine: Engine, prompt: list[int], chunk: list[int]) -> float:
    (stats,) = engine.score([prompt], [chunk], model="teacher")
    return stats.logprob.double().mean().item()


def alternate_by_hand(engine: Engine, prompt: list[int], by_teacher: bool) -> tuple[list[int], list[str]]:
    """The loop writes five greedy tokens with each model, and keeps those of the higher value."""
    ids: list[int] = []
    writers: list[str] = []
    while len(ids) < LENGTH and not has_ended(engine, ids):
        offers = {}
        for model in ("student", "teacher"):
            chunk = write_alone(engine, prompt + ids, model, min(5, LENGTH - len(ids)))
            value = judge_by_teacher(engine, prompt + ids, chunk) if by_teacher else token_sum(chunk)
            offers[model] = (value, chunk)
        writer = "student" if offers["student"][0] >= offers["teacher"][0] else "teacher"
        ids += offers[writer][1]
        writers.append(writer)
    return ids, writers


@pytest.mark.parametrize("criterion", ["teacher_logprob", "support.token_sum:TokenSum"])
def test_alternate_is_a_loop_over_both_models(tiny_pair: TinyPair, criterion: str) -> None:
    engine = tiny_pair.engine
    options = Alternation(criterion=criterion, chunk=FIVE, student_candidates=1, teacher_candidates=1, student=GREEDY)
    responses = generate_two_writers(engine, PROMPTS, options, sampling=GREEDY, max_tokens=LENGTH)
    changes = 0
    for prompt, (response,) in zip(PROMPTS, responses, strict=True):
        ids = engine.tokenizer("teacher").encode_prompt(prompt)
        expected, writers = alternate_by_hand(engine, ids, criterion == "teacher_logprob")
        assert list(response.token_ids) == expected
        assert [chunk.writer for chunk in response.chunks] == writers
        assert response.substituted == sum(c.tokens for c in response.chunks if c.writer == "student")
        assert response.sampled_tokens > len(expected)
        (stats,) = engine.score([ids], [expected], model="teacher")
        assert response.logprob == pytest.approx(stats.logprob.tolist(), abs=1e-5)
        assert sum(chunk.characters for chunk in response.chunks) == len(response.text)
        for chunk in response.chunks:
            assert chunk.score is not None
            assert chunk.runner_up is not None
            assert chunk.score >= chunk.runner_up
        changes += sum(one != other for one, other in pairwise(writers))
    assert changes > 2 or criterion == "teacher_logprob", "the writers do not alternate"
    assert engine.pages_in_use[0] == 0


def test_alternate_with_one_model_twice_is_that_model(tiny_pair: TinyPair) -> None:
    engine = Engine.from_pretrained(tiny_pair.teacher, tiny_pair.teacher, memory_bytes=1 << 24)
    options = Alternation(chunk=FIVE, student=GREEDY, criterion="ppl")
    responses = generate_two_writers(engine, PROMPTS, options, sampling=GREEDY, max_tokens=LENGTH)
    expected = engine.generate(PROMPTS, sampling=GREEDY, max_tokens=LENGTH)
    for (response,), (plain,) in zip(responses, expected, strict=True):
        assert response.token_ids == plain.token_ids
        assert response.text == plain.text
        assert response.status == plain.status
        assert {chunk.writer for chunk in response.chunks} == {"student"}, "what both write is the student's"


@pytest.mark.parametrize("teacher", ["rest", "chunk"])
@pytest.mark.parametrize("error", ["entropy", "answer"])
@pytest.mark.parametrize(("threshold", "writer"), [(math.inf, "student"), (0.0, "teacher")])
def test_limits_of_relay_are_one_model_alone(
    tiny_pair: TinyPair, threshold: float, writer: Any, error: Any, teacher: Any
) -> None:
    sampling = Sampling(top_p=0.95)
    options = Relay(threshold=threshold, error=error, teacher=teacher, chunk=FIVE, student=sampling)
    shared = {"n": 2, "sampling": sampling, "max_tokens": LENGTH, "seed": 3}
    responses = generate_two_writers(tiny_pair.engine, PROMPTS, options, answers=["no number"] * len(PROMPTS), **shared)
    expected = tiny_pair.engine.generate(PROMPTS, model=writer, **shared)
    for ours, plain in zip(responses, expected, strict=True):
        assert [c.token_ids for c in ours] == [c.token_ids for c in plain]
        assert {chunk.writer for c in ours for chunk in c.chunks} == {writer}
    assert tiny_pair.engine.pages_in_use[0] == 0


def relay_by_hand(engine: Engine, prompt: list[int], options: Relay) -> tuple[list[int], list[tuple[int, str]]]:
    """Whole attempts of the student, whose windows are looked at one by one; the teacher goes on at the first."""
    ids: list[int] = []
    spans: list[tuple[int, str]] = []
    while len(ids) < LENGTH and not has_ended(engine, ids):
        attempt = write_alone(engine, prompt + ids, "student", LENGTH - len(ids))
        (stats,) = engine.score([prompt + ids], [attempt])
        window = min(options.window, len(attempt))
        means = [stats.entropy[i : i + window].mean().item() for i in range(len(attempt) - window + 1)]
        places = [i for i, mean in enumerate(means) if mean >= options.threshold]
        is_over = not places or sum(writer == "teacher" for _, writer in spans) == options.takeovers
        kept = attempt if is_over else attempt[: places[0]]
        ids += kept
        spans += [(len(kept), "student")] if kept else []
        if len(kept) == len(attempt):
            break
        rest = LENGTH - len(ids) if options.teacher == "rest" else min(5, LENGTH - len(ids))
        chunk = write_alone(engine, prompt + ids, "teacher", rest)
        ids += chunk
        spans.append((len(chunk), "teacher"))
    return ids, spans


@pytest.mark.parametrize("changes", [{}, {"teacher": "chunk"}, {"teacher": "chunk", "takeovers": 1}, {"window": 40}])
def test_relay_is_a_loop_over_both_models(tiny_pair: TinyPair, changes: dict[str, Any]) -> None:
    engine = tiny_pair.engine
    tokenizer = engine.tokenizer("teacher")
    prompts = [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    attempts = [write_alone(engine, ids, "student", LENGTH) for ids in prompts]
    stats = engine.score(prompts, attempts)
    window = changes.get("window", 3)
    first = [one.entropy[:window].mean().item() for one in stats]
    threshold = (min(first) + max(first)) / 2  # some take over at once, some do not
    options = Relay(**{"threshold": threshold, "window": window, "chunk": FIVE, "student": GREEDY, **changes})
    responses = generate_two_writers(engine, PROMPTS, options, sampling=GREEDY, max_tokens=LENGTH)
    for ids, (response,) in zip(prompts, responses, strict=True):
        expected, spans = relay_by_hand(engine, ids, options)
        assert list(response.token_ids) == expected
        assert [(chunk.tokens, chunk.writer) for chunk in response.chunks] == spans
        (of_teacher,) = engine.score([ids], [expected], model="teacher")
        assert response.logprob == pytest.approx(of_teacher.logprob.tolist(), abs=1e-5)
    assert {chunk.writer for (response,) in responses for chunk in response.chunks} == {"teacher", "student"}


def test_the_first_unsure_window_is_found() -> None:
    options = Relay(threshold=1.0, window=2)
    assert find_error([0.0, 0.0, 0.9, 1.0, 1.0], options, is_complete=False) == 3
    assert find_error([0.0, 1.5, 0.5], options, is_complete=False) == 1
    assert find_error([3.0], options, is_complete=False) is None
    assert find_error([3.0], options, is_complete=True) == 0
    assert find_error([], options, is_complete=True) is None
    assert find_error([9.0] * 4, Relay(threshold=math.inf), is_complete=True) is None


def test_a_right_attempt_is_kept_and_a_wrong_one_rewound() -> None:
    engine = Engine.from_pretrained(*MODELS, memory_bytes=1 << 26)
    prompts = [[{"role": "user", "content": problem.question}] for problem in make_problems(4, seed=7)]
    shared = {"max_tokens": 96, "seed": 1, "sampling": Sampling(temperature=0.7)}
    alone = engine.generate(prompts, model="student", **shared)
    own_answers = [re.search(r"boxed\{(\d+)\}", c.text) for (c,) in alone]
    answers = [found[1] if found and i % 2 else "none" for i, found in enumerate(own_answers)]
    options = Relay(error="answer", threshold=0.0, student=Sampling(temperature=0.7))
    responses = generate_two_writers(engine, prompts, options, answers=answers, **shared)
    right = [judge(c.text, answer).is_correct for (c,), answer in zip(alone, answers, strict=True)]
    assert right == [False, True, False, True]
    for is_right, (response,), (own,) in zip(right, responses, alone, strict=True):
        assert {chunk.writer for chunk in response.chunks} == {"student" if is_right else "teacher"}
        assert (response.token_ids == own.token_ids) == is_right


@pytest.mark.parametrize("method", ["alternate", "relay"])
def test_rows_say_who_wrote_what_and_a_torn_run_goes_on(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, method: str
) -> None:
    data = write_rows(PROBLEMS)
    by_method = {"alternate": Alternation(chunk=FIVE), "relay": Relay(threshold=find_threshold(tiny_pair), window=2)}
    options: dict[str, Any] = {"method": method, "n": 2, method: by_method[method]}
    summary = run(tiny_pair, data, tmp_path / "whole", **options)
    rows = lines(summary.path)
    responses = [one for row in rows for one in (row, *row["others"])]
    assert len(responses) == 6
    for response in responses:
        assert sum(chunk["tokens"] for chunk in response["chunks"]) == len(response["completion_ids"])
        assert len(response["teacher_logprobs"]) == len(response["completion_ids"])
    assert {chunk["writer"] for one in responses for chunk in one["chunks"]} == {"teacher", "student"}
    assert rows[1]["completion_ids"] != rows[2]["completion_ids"], "equal problems have draws of their own"
    written = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary.writers == written["writers"]
    for writer, part in written["writers"].items():
        tokens = sum(c["tokens"] for one in responses for c in one["chunks"] if c["writer"] == writer)
        assert (part["tokens"], part["token_share"]) == (tokens, tokens / summary.tokens)
    assert written["tokens_sampled"] == sum(one["tokens_sampled"] for one in responses) > summary.tokens
    path = tmp_path / "torn" / "responses.jsonl"
    run(tiny_pair, data, tmp_path / "torn", **options)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    run(tiny_pair, data, tmp_path / "torn", resume=True, **options)
    assert lines(path) == rows
    with pytest.raises(InputError, match="begun with method="):
        run(tiny_pair, data, tmp_path / "torn", resume=True, n=2)


def test_a_tight_cache_changes_no_response(tiny_pair: TinyPair) -> None:
    options = Alternation(chunk=FIVE, criterion="ppl")
    expected = generate_two_writers(tiny_pair.engine, PROMPTS[:3], options, max_tokens=10, seed=2)
    tight = Engine.from_pretrained(tiny_pair.teacher, tiny_pair.student, memory_bytes=16 * 16 * 1024)
    assert generate_two_writers(tight, PROMPTS[:3], options, max_tokens=10, seed=2) == expected
    assert tight.usage.sampled_tokens > sum(c.sampled_tokens for (c,) in expected), "nothing was begun again"
    assert tight.pages_in_use[0] == 0
    with pytest.raises(CapacityError, match=r"prompt 0: .*raise memory_bytes"):
        generate_two_writers(tight, PROMPTS[:1], Relay(error="answer"), max_tokens=400, answers=["1"])
    assert tight.pages_in_use[0] == 0


def test_the_chunks_of_one_writer_are_trained(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    path = run(
        tiny_pair,
        write_rows(PROBLEMS),
        tmp_path / "run",
        method="relay",
        relay=Relay(threshold=find_threshold(tiny_pair), window=2),
    ).path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = tiny_pair.engine.tokenizer("student")
    options: dict[str, Any] = {"max_length": 512, "statuses": ("finished", "length")}
    both = read_examples([path], tokenizer, **options)
    assert [one.token_weights() for one in both.examples] == [[1.0] * len(row["completion_ids"]) for row in rows]
    for writer in ("teacher", "student"):
        trained = read_examples([path], tokenizer, writer=writer, **options)  # type: ignore[arg-type]
        expected = [
            [float(chunk["writer"] == writer) for chunk in row["chunks"] for _ in range(chunk["tokens"])]
            for row in rows
        ]
        assert [one.token_weights() for one in trained.examples] == [weights for weights in expected if any(weights)]
        without = sum(not any(weights) for weights in expected)
        assert trained.left_out == ({f"without a chunk of the {writer}": without} if without else {})
    plain = run(tiny_pair, write_rows(PROBLEMS), tmp_path / "plain").path
    with pytest.raises(InputError, match=r"line 1: its chunks do not say who wrote them, which writer=teacher asks"):
        read_examples([plain], tokenizer, writer="teacher", **options)
    other = write_rows([{**rows[0], "tokenizer": "0"}], "other.jsonl")
    with pytest.raises(InputError, match="its token ids are of another tokenizer than the student's"):
        read_examples([other], tokenizer, writer="student", **options)


def test_unusable_options_are_refused(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    for options, message in (
        ({"teacher_candidates": 0}, "alternate: teacher_candidates must be at least 1, not 0: both models write"),
        ({"student_candidates": -1}, "alternate: student_candidates must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            Alternation(**options)
    for changes, message in (
        ({"threshold": -0.1}, r"relay: threshold must be at least 0, not -0\.1"),
        ({"threshold": math.nan}, r"threshold must be"),
        ({"window": 0}, "relay: window must be at least 1, not 0"),
        ({"takeovers": 0}, "relay: takeovers must be at least 1, not 0; for a student that writes alone"),
    ):
        with pytest.raises(InputError, match=message):
            Relay(**changes)  # type: ignore[arg-type]
    data = write_rows([*PROBLEMS, {"question": "no answer?"}])
    given: dict[str, Any] = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "data": str(data)}
    for method in ("alternate", "relay"):
        with pytest.raises(InputError, match=f"{method} needs a student: give --student"):
            GenerateConfig(**{**given, "student": None}, method=method)
        with pytest.raises(InputError, match=f"{method} has the teacher read what the student writes, .* hub id or"):
            GenerateConfig(**{**given, "teacher": "http://localhost:1/v1"}, method=method)
    for relay, message in (
        (Relay(takeovers=2), r"relay\.takeovers=2 has no effect: it needs relay\.teacher chunk"),
        (Relay(error="answer", chunk=FIVE), r"relay\.chunk\..* has no effect: it needs relay\.error entropy or"),
    ):
        with pytest.raises(InputError, match=message):
            check_effects(GenerateConfig(**given, method="relay", relay=relay))
    for criterion, message in (("nonsense", "nonsense"), ("brts", "cannot judge chunks")):
        with pytest.raises(InputError, match=message):
            run(tiny_pair, data, tmp_path / "a", method="alternate", alternate=Alternation(criterion=criterion))
    with pytest.raises(InputError, match=r"prompt 1: no reference answer, by which relay\.error=answer tells errors"):
        generate_two_writers(tiny_pair.engine, PROMPTS, Relay(error="answer"), answers=["1", None, "2"])


def test_problems_without_the_answer_that_is_read_are_left_out(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows([PROBLEMS[0], {"question": "no answer?"}])
    for options in (
        {"method": "relay", "relay": Relay(error="answer")},
        {"method": "alternate", "alternate": Alternation(criterion="rationale_difficulty", chunk=FIVE)},
    ):
        summary = run(tiny_pair, data, tmp_path / str(options["method"]), **options)
        assert summary.prompts == 1
        assert len(summary.bad_rows) == 1
        assert "line 2: no reference answer" in summary.bad_rows[0]


def test_models_with_other_tokens_are_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    other = save(tmp_path / "gemma", build("gemma", size=700), seed=2)
    engine = Engine.from_pretrained(tiny_pair.teacher, other, dtype="float32", memory_bytes=1 << 22)
    with pytest.raises(InputError, match=r"two writers need models whose tokens are the same: the student .* bytes"):
        generate_two_writers(engine, ["1+1"], Relay())
    with (
        engine.branch("1+1") as root,
        pytest.raises(InputError, match="a student that writes beside the teacher needs"),
    ):
        engine.expand([root], 1, model="student")


def test_parts_of_both_writers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    part = {"tokens": 1, "characters": 3, "token_share": 0.25, "text_share": 0.125}
    print_writers({"teacher": part, "student": {**part, "tokens": 3, "token_share": 0.75, "text_share": 0.875}}, 9)
    assert capsys.readouterr().out == (
        "1 token by the teacher (25.0%; 12.5% of the text), 3 tokens by the student (75.0%; 87.5% of the text); "
        "9 tokens sampled by both\n"
    )
    assert repr(TwoWriterCompletion(token_ids=(1,), text="a", status="finished", logprob=(0.0,)))
