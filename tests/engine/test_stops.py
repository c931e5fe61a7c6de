"""Stop strings, against the definition on whole texts: a response ends with the token that completes one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from support.byte_tokenizers import KINDS, TEXTS, build
from support.stop_strings import find_by_hand, save_words, substrings, text_of
from support.stub_server import StubServer
from support.toys import save_markov, token_of
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, StopStringCriteria

from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.budget import Budget
from genssd.engine.search.selection import Selection
from genssd.engine.served.options import ServerOptions
from genssd.engine.texts.stops import StopSearch, StopStrings, encode_head
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.text_stream import REPLACEMENT, open_stream

PROMPTS = [TEXTS[0][:50], "Step 1:", "\tif x", "So 3"]
FREE = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root, tokenizers = tmp_path_factory.mktemp("kinds"), {}
    for kind in KINDS:
        PreTrainedTokenizerFast(tokenizer_object=build(kind, size=700), eos_token="<end>").save_pretrained(root / kind)
        config = LlamaConfig(vocab_size=1000, eos_token_id=0)
        config.save_pretrained(root / kind)
        tokenizers[kind] = Tokenizer(root / kind)
    return tokenizers


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Random tokens, which end inside of characters and of words, and a part of their text."""
    tokenizer, random = tokenizers[kind], Random(kind)
    num_found = num_headed = num_lost = 0
    for _ in range(120):
        ids = [random.randrange(2, tokenizer.largest_id - 1) for _ in range(12)]
        text = text_of(tokenizer, ids)
        place = random.randrange(2, len(text) - 4)
        stop = text[place : place + random.randrange(1, 4)]
        if REPLACEMENT in stop or "<" in stop:
            continue
        stops = ("never seen", stop)
        expected = find_by_hand(tokenizer, ids, stops)
        search = StopSearch(StopStrings(texts=stops), open_stream(tokenizer), [])
        matches = (search.find(token) for token in ids)
        count, match = next(((n, m) for n, m in enumerate(matches, 1) if m is not None), (0, None))
        if expected is None:  # the last token ends inside a character of it
            assert match is None
            continue
        assert match is not None
        assert (count, match.text) == (expected[0], stop)
        kept = ids[: match.num_kept]
        head = encode_head(match.head, kept, tokenizer)
        written = text_of(tokenizer, [*kept, *head])
        before = text_of(tokenizer, ids[:count])[: expected[1]]
        if written != before:  # it has no token for the beginning of the token, or that is no text
            assert not head
            assert written == before.removesuffix(match.head)
            num_lost += REPLACEMENT not in match.head
        num_found += 1
        num_headed += bool(head)
    assert num_found >= 50
    assert num_headed >= 10
    assert num_lost <= 2


def test_is_open_says_that_the_next_token_may_complete_a_string(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["qwen"]
    search = StopSearch(StopStrings(texts=("aab", "答x")), open_stream(tokenizer), [])
    seen = []
    for token in [i for letter in "zabaa" for i in tokenizer.encode_plain(letter)]:
        assert search.find(token) is None
        seen.append(search.is_open)
    assert seen == [False, True, False, True, True]
    (first, *_) = tokenizer.encode_plain("答")
    search.find(first)
    assert search.is_open  # the first byte of a character that begins a string
    assert StopStrings(texts=("aab", "答x")).slack == len("答x".encode()) - 1


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    root = tmp_path_factory.mktemp("two")
    qwen, gemma = save_words(root / "qwen", "qwen", 1), save_words(root / "gemma", "gemma", 2)

    def open_pair(teacher: Path, student: Path) -> Engine:
        return Engine.from_pretrained(teacher, student, dtype="float32", memory_bytes=1 << 22)

    return {"same": open_pair(qwen, qwen), "bytes": open_pair(qwen, gemma), "pieces": open_pair(gemma, qwen)}


def plain(engine: Engine, prompts: Sequence[str], **options: Any) -> list[list[int]]:
    generated = engine.generate(prompts, sampling=FREE, max_tokens=60, **options)
    return [list(completion.token_ids) for (completion,) in generated]


@pytest.mark.parametrize("pair_name", ["same", "pieces"])
@pytest.mark.parametrize("include", [False, True])
def test_generation_ends_where_the_definition_says(engine_of: dict[str, Engine], pair_name: str, include: bool) -> None:
    engine = engine_of[pair_name]
    tokenizer = engine.tokenizer("teacher")
    num_stopped = num_headed = 0
    for prompt, ids in zip(PROMPTS, plain(engine, PROMPTS), strict=True):
        for stop in substrings(text_of(tokenizer, ids), (1, 2, 3, 5))[:5]:
            ((completion,),) = engine.generate(
                [prompt], sampling=FREE, max_tokens=60, stop=("never seen", stop), include_stop=include
            )
            expected = find_by_hand(tokenizer, ids, [stop])
            assert expected is not None
            count, place = expected
            text = text_of(tokenizer, ids[:count])
            assert (completion.status, completion.stop_reason) == ("finished", stop)
            kept = list(completion.token_ids)
            assert text_of(tokenizer, kept) == (text if include else text[:place])
            assert len(completion.logprob) == len(kept)
            same = next((i for i, (a, b) in enumerate(zip(kept, ids, strict=False)) if a != b), len(kept))
            assert not include or same == count == len(kept)
            assert len(kept) - same <= len(stop) + 8  # only the tokens that keep the beginning of one are others
            num_stopped += 1
            num_headed += same < len(kept)
    assert num_stopped >= 12
    assert include or num_headed


def test_it_ends_where_transformers_stops(engine_of: dict[str, Engine]) -> None:
    """The token is the one at which transformers' StopStringCriteria is fulfilled for the first time."""
    engine = engine_of["same"]
    tokenizer, num_compared = engine.tokenizer("teacher"), 0
    for prompt, ids in zip(PROMPTS, plain(engine, PROMPTS), strict=True):
        for stop in substrings(text_of(tokenizer, ids), (1, 3))[:3]:
            criteria = StopStringCriteria(tokenizer.hf, [stop])
            counts = [n for n in range(1, len(ids) + 1) if criteria(torch.tensor([ids[:n]]), None).item()]  # type: ignore[arg-type]
            ((completion,),) = engine.generate([prompt], sampling=FREE, max_tokens=60, stop=(stop,), include_stop=True)
            assert len(completion.token_ids) == counts[0]
            num_compared += 1
    assert num_compared >= 6


def check_response(engine: Engine, selection: Selection, expected_text: str) -> None:
    """The kept text is the expected one, and the student's statistics are those of one pass over what is kept."""
    best = selection.best
    assert text_of(engine.tokenizer("teacher"), best.token_ids) == expected_text
    assert best.status == "finished"
    assert len(best.stats) == len(best.student_ids)
    (stats,) = engine.score([list(selection.student_prompt_ids)], [list(best.student_ids)])
    for name in ("logprob", "entropy", "sum_p2", "logsumexp"):
        torch.testing.assert_close(getattr(best.stats, name), getattr(stats, name), atol=1e-4, rtol=1e-4)
    assert sum(c.tokens for c in best.chunks) == len(best.token_ids)


@pytest.mark.parametrize("pair_name", ["same", "bytes", "pieces"])
@pytest.mark.parametrize(
    "chunk", [Chunk(tokens=1, until=None), Chunk(tokens=4, until=None), Chunk(tokens=3, until="e")]
)
def test_a_search_ends_there_whatever_the_chunks_are(
    engine_of: dict[str, Engine], pair_name: str, chunk: Chunk
) -> None:
    """With one candidate a search writes what plain sampling writes, so that strings span chunks' borders."""
    engine = engine_of[pair_name]
    tokenizer, num_checked = engine.tokenizer("teacher"), 0
    for prompt, ids in zip(PROMPTS, plain(engine, PROMPTS), strict=True):
        for stop in substrings(text_of(tokenizer, ids), (2, 4))[:3]:
            expected = find_by_hand(tokenizer, ids, [stop])
            assert expected is not None
            count, place = expected
            text = text_of(tokenizer, ids[:count])[:place]
            if not text:
                continue
            (selection,) = engine.select_expand(
                [prompt], candidates=1, chunk=chunk, sampling=FREE, max_tokens=60, loop_guard=False, stop=(stop,)
            )
            check_response(engine, selection, text)
            assert selection.best.stop_reason == selection.tree[-1].stop_reason == stop
            assert {one.ended for one in selection.tree[:-1]} <= {"chunk"}
            assert selection.tree[-1].ended == "stopped"
            assert all(len(one.token_ids) <= chunk.longest + len(stop) - 1 for one in selection.tree[:-1])
            num_checked += 1
    assert num_checked >= 6
    assert engine.pages_in_use[0] == 0
    assert engine.usage.drifted_responses == 0


@pytest.mark.parametrize("pair_name", ["same", "bytes", "pieces"])
def test_a_wide_search_replays_and_does_not_depend_on_the_batch(engine_of: dict[str, Engine], pair_name: str) -> None:
    engine = engine_of[pair_name]
    options: dict[str, Any] = {
        "candidates": 3,
        "beam": 2,
        "chunk": Chunk(tokens=4, until="e"),
        "sampling": FREE,
        "max_tokens": 50,
        "stop": ("e", " t", "1"),
        "teacher_topk": 3,
    }
    together = engine.select_expand(PROMPTS, **options)
    num_stopped = 0
    for prompt, selection in zip(PROMPTS, together, strict=True):
        (alone,) = engine.select_expand([prompt], **options)
        tokens = [[(t.token_ids, t.student_ids, t.stop_reason) for t in s.trajectories] for s in (selection, alone)]
        assert tokens[0] == tokens[1]
        for trajectory in selection.trajectories:
            text = text_of(engine.tokenizer("teacher"), trajectory.token_ids)
            assert not any(stop in text for stop in options["stop"])
            num_stopped += trajectory.stop_reason is not None
            assert trajectory.teacher_topk is None or len(trajectory.teacher_topk.ids) == len(trajectory.token_ids)
        for one in selection.tree:
            assert len(one.teacher_logprob) == len(one.token_ids)
            assert len(one.stats) == len(one.reading.judged_ids)
            assert (one.ended == "stopped") == (one.stop_reason is not None)
    assert num_stopped >= 4


def test_a_response_of_which_nothing_is_left_is_rejected(tmp_path: Path) -> None:
    """A candidate that is a stop string alone ends at once; the search keeps a candidate with text where it has one."""
    letters = [token_of(letter) for letter in "ab"]
    for role in ("teacher", "student"):
        save_markov(tmp_path / role, letters, torch.zeros(2, 2))
    engine = Engine.from_pretrained(tmp_path / "teacher", tmp_path / "student", memory_bytes=1 << 20)
    verdicts: list[str] = []
    for seed in range(6):
        (selection,) = engine.select_expand(
            [[letters[0]]],
            candidates=2,
            chunk=2,
            sampling=FREE,
            max_tokens=6,
            stop=("b",),
            loop_guard=False,
            seed=seed,
        )
        first = [one for one in selection.tree if one.round == 0]
        verdicts += [one.verdict for one in first]
        for one in first:
            assert (one.verdict == "empty") == (one.token_ids == ()) == (len(one.stats) == 0)
        best = selection.best
        assert set(best.text) <= {"a"}
        assert (best.status == "pruned") == (best.text == "")
    assert {"empty", "kept"} <= set(verdicts)


def test_a_last_chunk_without_a_token_is_judged_with_the_end_before_it(tmp_path: Path) -> None:
    letters = [token_of(letter) for letter in "ab"]
    logits = torch.tensor([[0.0, 0.0], [9.0, -9.0]])
    for role in ("teacher", "student"):
        save_markov(tmp_path / role, letters, logits)
    engine = Engine.from_pretrained(tmp_path / "teacher", tmp_path / "student", memory_bytes=1 << 20)
    for shortest in (0, 8):
        (selection,) = engine.select_expand(
            [[letters[0]]],
            candidates=8,
            chunk=Chunk(tokens=1, until=None, shortest=shortest),
            sampling=FREE,
            max_tokens=20,
            stop=("b",),
            loop_guard=False,
        )
        empty = [one for one in selection.tree if one.round > 0 and not one.token_ids]
        assert empty
        assert all(one.score == pytest.approx(2.0, rel=1e-4) for one in empty)  # every letter is one of two


def test_a_chunk_goes_on_inside_the_beginning_of_a_string(tmp_path: Path) -> None:
    """a a a ... never completes aab: chunks of at most 2 tokens grow by the string's length less one, and no more."""
    letters = [token_of(letter) for letter in "ab"]
    logits = torch.tensor([[9.0, -9.0], [9.0, -9.0]])
    for role in ("teacher", "student"):
        save_markov(tmp_path / role, letters, logits)
    engine = Engine.from_pretrained(tmp_path / "teacher", tmp_path / "student", memory_bytes=1 << 20)
    options: dict[str, Any] = {"candidates": 1, "sampling": Sampling(temperature=0.0), "loop_guard": False}
    (selection,) = engine.select_expand(
        [[letters[0]]], chunk=Chunk(tokens=2, until=None), max_tokens=9, stop=("aab",), **options
    )
    assert [len(one.token_ids) for one in selection.tree] == [4, 4, 1]
    assert selection.best.status == "length"
    (selection,) = engine.select_expand(
        [[letters[0]]],
        chunk=Chunk(tokens=2, until=None),
        max_tokens=9,
        stop=("aab",),
        prompt_budget=Budget(tokens=4),
        **options,
    )
    assert selection.ended_by == "prompt_budget.tokens"
    assert len(selection.best.token_ids) == 4


def test_a_server_is_asked_to_stop_and_its_responses_end_where_those_here_do(tmp_path: Path) -> None:
    directory = save_words(tmp_path / "words", "qwen", 1)
    with StubServer(directory, AutoModelForCausalLM.from_pretrained(directory)).running() as stub:
        compare_with_server(directory, stub)


def compare_with_server(directory: Path, stub: StubServer) -> None:
    here = Engine.from_pretrained(directory, directory, dtype="float32", memory_bytes=1 << 22)
    served = Engine.from_pretrained(
        stub.url,
        directory,
        dtype="float32",
        memory_bytes=1 << 22,
        teacher_tokenizer=directory,
        server=ServerOptions(timeout=10.0, patience=10.0),
    )
    options: dict[str, Any] = {"candidates": 1, "sampling": Sampling(temperature=0.0), "max_tokens": 30}
    num_stopped = 0
    for prompt in PROMPTS[:2]:
        (whole,) = here.select_expand([prompt], chunk=5, loop_guard=False, **options)
        text = here.tokenizer("teacher").decode(whole.best.token_ids)
        for stop in [text[i : i + 2] for i in range(3, len(text) - 2, 5)]:
            if REPLACEMENT in stop:
                continue
            for chunk in (Chunk(tokens=4, until=None), Chunk(tokens=2, until="e")):
                results = [
                    engine.select_expand([prompt], chunk=chunk, stop=(stop,), loop_guard=False, **options)[0]
                    for engine in (here, served)
                ]
                one, other = ([(r.token_ids, r.ended, r.stop_reason) for r in result.tree] for result in results)
                assert one == other
                num_stopped += results[0].best.stop_reason == stop
    assert num_stopped >= 4
    assert any(fields.get("stop") for fields in stub.requests)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (("",), "an empty text is in every response"),
        (("\ud800",), "stop must be a list of text values"),
        ("Answer:", "stop must be a list of text values, not 'Answer:'"),
    ],
)
def test_strings_that_cannot_be_searched_are_refused(engine: Engine, stop: Any, message: str) -> None:
    for call in (
        lambda: engine.generate(["a"], stop=stop),
        lambda: engine.select_expand(["a"], stop=stop),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("include", [False, True])
def test_reverse_speculation_ends_where_the_definition_says(tmp_path: Path, include: bool) -> None:
    """A response with stop strings is the one without them, cut at the first string; its student tokens are cut too."""
    teacher = save_words(tmp_path / "teacher", "qwen", 1)
    student = save_words(tmp_path / "student", "qwen", 1, logits_seed=5)
    engine = Engine.from_pretrained(teacher, student, dtype="float32", memory_bytes=1 << 22)
    tokenizer = engine.tokenizer("teacher")
    shared: dict[str, Any] = {"sampling": FREE, "rsd": ReverseSpeculation(top=2, tries=2)}
    num_headed = num_written = num_checked = 0
    for prompt in PROMPTS:
        ((whole,),) = engine.generate([prompt], max_tokens=30, **shared)
        by_student = [0]
        for length in range(1, len(whole.token_ids) + 1):
            ((part,),) = engine.generate([prompt], max_tokens=length, **shared)
            assert part.token_ids == whole.token_ids[:length]
            by_student.append(part.substituted)
        for stop in substrings(whole.text, (1, 2, 3, 5))[:5]:
            expected = find_by_hand(tokenizer, whole.token_ids, [stop])
            assert expected is not None
            count, place = expected
            text = text_of(tokenizer, whole.token_ids[:count])
            ((cut,),) = engine.generate(
                [prompt], max_tokens=30, stop=("never seen", stop), include_stop=include, **shared
            )
            assert cut.text == (text if include else text[:place])
            assert (cut.status, cut.stop_reason) == ("finished", stop)
            same = next(
                (i for i, (a, b) in enumerate(zip(cut.token_ids, whole.token_ids, strict=False)) if a != b),
                len(cut.token_ids),
            )
            of_cut_token = (len(cut.token_ids) - same) * (by_student[min(same + 1, count)] - by_student[same])
            assert cut.substituted == by_student[same] + of_cut_token
            assert len(cut.logprob) == len(cut.token_ids)
            assert cut.logprob[: same + 1] == pytest.approx(whole.logprob[: same + 1][: len(cut.logprob)])
            num_headed += same < len(cut.token_ids)
            num_written += cut.substituted
            num_checked += 1
    assert num_checked >= 12
    assert num_written
    assert include or num_headed
