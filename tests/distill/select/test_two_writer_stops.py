"""Stop strings where both models write, against the definition on whole texts (`find_by_hand`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import MODELS
from support.stop_strings import find_by_hand, save_words, substrings, text_of
from support.tiny_pair import TinyPair
from support.toys import save_markov, token_of

from genssd import Alternation, Chunk, Engine, Relay, Sampling, generate_two_writers
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.texts.text import Tokenizer

GREEDY = Sampling(temperature=0.0)
FREE = Sampling(temperature=1.0)
PROMPTS = ["Step 1:", "\tif x", "So 3"]
LENGTH = 60


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Two models that write words of several letters, in the same tokenizer."""
    root = tmp_path_factory.mktemp("words")
    teacher, student = save_words(root / "teacher", "qwen", 1), save_words(root / "student", "qwen", 1, logits_seed=5)
    return Engine.from_pretrained(teacher, student, dtype="float32", memory_bytes=1 << 22)


@pytest.fixture(scope="module")
def small() -> Engine:
    return Engine.from_pretrained(*MODELS, memory_bytes=1 << 26)


def choose_stops(engine: Engine, ids: Sequence[int]) -> list[str]:
    return substrings(text_of(engine.tokenizer("teacher"), ids), (1, 2, 3, 5))[:5]


def count_whole(tokenizer: Tokenizer, cut: Sequence[int], whole: Sequence[int]) -> int:
    """Number of tokens before the one that a string cuts. cut, whole: the same response with and without the string."""
    return next((i for i, (a, b) in enumerate(zip(cut, whole, strict=False)) if a != b), len(cut))


@pytest.mark.parametrize(("threshold", "writer"), [(math.inf, "student"), (0.0, "teacher")])
@pytest.mark.parametrize("teacher", ["rest", "chunk"])
@pytest.mark.parametrize("include", [False, True])
def test_one_model_alone_ends_where_the_definition_says(
    words: Engine, threshold: float, writer: Any, teacher: Any, include: bool
) -> None:
    tokenizer = words.tokenizer("teacher")
    chunk = Chunk(tokens=4, until="e")
    options = Relay(threshold=threshold, teacher=teacher, chunk=chunk, student=FREE)
    shared: dict[str, Any] = {"sampling": FREE, "max_tokens": LENGTH}
    num_checked = num_kept = 0
    for prompt, (whole,) in zip(PROMPTS, words.generate(PROMPTS, model=writer, **shared), strict=True):
        for stop in choose_stops(words, whole.token_ids):
            ((response,),) = generate_two_writers(
                words, [prompt], options, stop=("never seen", stop), include_stop=include, **shared
            )
            ((plain,),) = words.generate(
                [prompt], model=writer, stop=("never seen", stop), include_stop=include, **shared
            )
            expected = find_by_hand(tokenizer, whole.token_ids, [stop])
            assert expected is not None
            count, place = expected
            text = text_of(tokenizer, whole.token_ids[:count])
            if writer == "teacher" or include:
                assert response.text == (text if include else text[:place])
                assert response.token_ids == plain.token_ids
            else:  # of a token of the student that a string cuts, one token at most is kept
                num_whole = count_whole(tokenizer, plain.token_ids, whole.token_ids)
                is_kept = len(plain.token_ids) <= num_whole + 1
                assert response.token_ids == plain.token_ids[: len(plain.token_ids) if is_kept else num_whole]
                assert response.text == (text[:place] if is_kept else text_of(tokenizer, response.token_ids))
                assert text[:place].startswith(response.text)
                num_kept += is_kept
            assert (response.status, response.stop_reason) == ("finished", stop)
            assert len(response.logprob) == len(response.token_ids) == sum(one.tokens for one in response.chunks)
            assert {one.writer for one in response.chunks} <= {writer}
            num_checked += 1
    assert num_checked >= 9
    assert writer == "teacher" or include or num_kept >= 5
    assert words.pages_in_use[0] == 0


def test_alternate_ends_at_the_first_string(words: Engine) -> None:
    """Whoever wrote the chunks: no string is left, and the tokens but the last are those of some model's chunks."""
    tokenizer = words.tokenizer("teacher")
    options = Alternation(chunk=Chunk(tokens=3, until="e"), student=FREE, criterion="ppl")
    shared: dict[str, Any] = {"n": 3, "sampling": FREE, "max_tokens": LENGTH}
    alone = words.generate(PROMPTS, model="student", sampling=FREE, max_tokens=LENGTH)
    stops = tuple(substrings(completion.text, (4,))[0] for (completion,) in alone)
    writers: set[str] = set()
    num_stopped = 0
    together = generate_two_writers(words, PROMPTS, options, stop=stops, **shared)
    for prompt, responses in zip(PROMPTS, together, strict=True):
        (alone,) = generate_two_writers(words, [prompt], options, stop=stops, **shared)
        assert [one.token_ids for one in alone] == [one.token_ids for one in responses]
        for response in responses:
            assert not any(stop in response.text for stop in stops)
            assert text_of(tokenizer, response.token_ids).startswith(response.text)
            assert len(response.logprob) == len(response.token_ids) == sum(one.tokens for one in response.chunks)
            ids = tokenizer.encode_prompt(prompt)
            if response.token_ids:
                (of_teacher,) = words.score([ids], [list(response.token_ids)], model="teacher")
                whole = len(response.token_ids) - 8 if response.stop_reason else len(response.token_ids)
                assert response.logprob[: max(0, whole)] == pytest.approx(
                    of_teacher.logprob[: max(0, whole)].tolist(), abs=1e-4
                )
            writers |= {one.writer for one in response.chunks}
            num_stopped += response.stop_reason is not None
    assert num_stopped >= 5
    assert writers == {"teacher", "student"}


def grow(engine: Engine, before: list[int], model: Any, limit: int) -> list[int]:
    ((completion,),) = engine.generate([before], model=model, sampling=GREEDY, max_tokens=limit)
    return list(completion.token_ids)


def is_open(text: str, stop: str) -> bool:
    return any(text.endswith(stop[:length]) for length in range(1, len(stop)))


def relay_by_hand(engine: Engine, prompt: list[int], options: Relay, stop: str) -> tuple[set[str], str | None, int]:
    """The text of a relay of whole attempts, the string that ended it, and how often a takeover was moved back.

    Of a token of the student that the string cuts, the text may be lost as well: there are two texts then.
    """
    tokenizer, ids, moves = engine.tokenizer("teacher"), list[int](), 0
    while True:
        attempt = grow(engine, prompt + ids, "student", 96 - len(ids))
        (stats,) = engine.score([prompt + ids], [attempt])
        match = find_by_hand(tokenizer, [*ids, *attempt], [stop])
        kept = len(attempt)
        if match is not None:
            lengths = [len(text_of(tokenizer, [*ids, *attempt[:k]])) for k in range(len(attempt) + 1)]
            whole = max(k for k, length in enumerate(lengths) if length <= match[1])
            kept = whole + (lengths[whole] < match[1])
        entropy, window = stats.entropy[:kept], min(options.window, kept)
        places = [i for i in range(kept - window + 1) if window and entropy[i : i + window].mean() >= options.threshold]
        if not places:
            ids += attempt
            least = "" if match is None else text_of(tokenizer, ids[: len(ids) - len(attempt) + whole])
            break
        place = places[0]
        while place and is_open(text_of(tokenizer, [*ids, *attempt[:place]]), stop):
            place, moves = place - 1, moves + 1
        ids += attempt[:place]
        rest = grow(engine, prompt + ids, "teacher", 96 - len(ids))
        count = len(rest) if options.teacher == "rest" else 5
        match = find_by_hand(tokenizer, [*ids, *rest[:count]], [stop])
        while match is None and is_open(text_of(tokenizer, [*ids, *rest[:count]]), stop) and count < 4 + len(stop):
            count += 1
            match = find_by_hand(tokenizer, [*ids, *rest[:count]], [stop])
        ids += rest[:count]
        if match is not None or count >= len(rest):
            least = ""
            break
    text = text_of(tokenizer, ids)
    place = text.find(stop)
    texts = {text} if place < 0 else {text[:place], least or text[:place]}
    return {tokenizer.decode(tokenizer.encode_plain(one)) for one in texts}, stop if place >= 0 else None, moves


@pytest.mark.parametrize("teacher", ["rest", "chunk"])
def test_relay_is_a_loop_over_both_models(small: Engine, teacher: Any) -> None:
    tokenizer = small.tokenizer("teacher")
    problems = make_problems(6, seed=7)  # the student writes the first tokens of these
    prompts = [[{"role": "user", "content": problems[i].question}] for i in (0, 2, 5)]
    options = Relay(threshold=1.1, window=3, teacher=teacher, chunk=Chunk(tokens=5, until=None), student=GREEDY)
    shared: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 96}
    num_stopped = num_moved = num_exact = 0
    for prompt in prompts:
        ids = tokenizer.encode_prompt(prompt)
        ((whole,),) = generate_two_writers(small, [prompt], options, **shared)
        assert {one.writer for one in whole.chunks} == {"teacher", "student"}
        place = next(
            sum(one.tokens for one in whole.chunks[: i + 1])
            for i, (one, after) in enumerate(pairwise(whole.chunks))
            if (one.writer, after.writer) == ("student", "teacher")
        )
        border = len(tokenizer.decode(list(whole.token_ids[:place])))
        stops = [
            whole.text[max(0, border - 2) : border + 4],
            *(whole.text[i : i + 3] for i in range(5, len(whole.text), 15)),
        ]
        for stop in stops:
            expected, reason, moves = relay_by_hand(small, ids, options, stop)
            ((response,),) = generate_two_writers(small, [prompt], options, stop=(stop,), **shared)
            assert response.text in expected
            assert response.stop_reason == reason
            num_exact += response.text == max(expected, key=len)
            assert stop not in response.text
            num_stopped += reason is not None
            num_moved += moves
    assert num_stopped >= 9
    assert num_exact >= 5
    assert num_moved, "no takeover falls into a string"


def test_of_a_chunk_that_is_a_string_alone_nothing_is_left(tmp_path: Path) -> None:
    """The student writes b at once: an empty response is not kept beside the teacher's letters; alone it is."""
    letters = [token_of(letter) for letter in "ab"]
    save_markov(tmp_path / "student", letters, torch.tensor([[-9.0, 9.0], [-9.0, 9.0]]))
    save_markov(tmp_path / "teacher", letters, torch.tensor([[9.0, -9.0], [9.0, -9.0]]))
    engine = Engine.from_pretrained(tmp_path / "teacher", tmp_path / "student", memory_bytes=1 << 20)
    options = Alternation(chunk=Chunk(tokens=2, until=None), student=GREEDY, criterion="teacher_logprob")
    shared: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 6, "stop": ("b",)}
    ((response,),) = generate_two_writers(engine, [[letters[0]]], options, **shared)
    assert (response.text, response.stop_reason) == ("aa", "b"), "later an end is as good as any letter"
    assert [(one.writer, one.tokens) for one in response.chunks] == [("teacher", 2)]
    ((response,),) = generate_two_writers(engine, [[letters[0]]], Relay(threshold=math.inf, student=GREEDY), **shared)
    assert (response.token_ids, response.text, response.chunks) == ((), "", ())
    assert (response.status, response.stop_reason) == ("finished", "b")
    assert engine.pages_in_use[0] == 0


@pytest.mark.parametrize("method", ["rsd", "alternate", "relay"])
def test_the_command_takes_them_with_every_method(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path, method: Any
) -> None:
    data = write_rows([{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(3)])
    shared: dict[str, Any] = {
        "teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "data": str(data), "method": method,
        "max_tokens": 24,
    }  # fmt: skip
    options: dict[str, Any] = {"relay": {"relay": Relay(threshold=1.0, window=2)}}.get(method, {})
    whole = run_generate(GenerateConfig(**shared, **options, output_dir=str(tmp_path / "whole")), tiny_pair.engine)
    rows = [json.loads(line) for line in whole.path.read_text().splitlines()]
    stops = tuple(sorted({letter for row in rows for letter in row["completion"][0]["content"] if letter.isascii()}))
    assert stops
    cut = run_generate(
        GenerateConfig(**shared, **options, stop=stops, output_dir=str(tmp_path / "cut")), tiny_pair.engine
    )
    for row in (json.loads(line) for line in cut.path.read_text().splitlines()):
        if row["stop_reason"] is not None:
            assert row["status"] == "finished"
        assert not set(stops) & set(row["completion"][0]["content"])
