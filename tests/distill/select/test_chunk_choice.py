"""The length of chunks that a run chooses where the user gives none: the rule, its record, and --resume."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from support.doctor import write_rows
from support.tiny_pair import TinyPair

from genssd.distill.select.chunk_choice import CHOICES, STEPS, choose_tokens, count_chunks, list_choices
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import DEFAULT_TOKENS, Chunk
from genssd.engine.search.search_options import SearchOptions

PROBLEMS = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(1, 4)]


def split_by_hand(pieces: list[str], tokens: int, until: str | None, limit: int) -> int:
    """Count chunks by the sentence in the docstring of Chunk, over the text of the tokens."""
    count = length = 0
    text = ""
    for piece in pieces:
        length, text = length + 1, text + piece
        ends_here = until is not None and until in text and text.rfind(until) + len(until) > len(text) - len(piece)
        if length >= limit or (length >= tokens and (until is None or ends_here)):
            count, length, text = count + 1, 0, ""
    return count + (length > 0)


@pytest.mark.parametrize(
    "chunk",
    [Chunk(tokens=3), Chunk(tokens=5, limit=6), Chunk(tokens=4, until="a"), Chunk(tokens=7, until=None)],
    ids=["lines", "limit", "letter", "exact"],
)
def test_chunks_are_counted_as_the_search_cuts_them(chunk: Chunk, tiny_pair: TinyPair) -> None:
    tokenizer = tiny_pair.engine.tokenizer("teacher")
    ids = tokenizer.encode_plain("a\nbcd\n\nefgh\na long line without an end" * 3)
    pieces = [tokenizer.token_text(i) for i in ids]
    expected = split_by_hand(pieces, chunk.least, chunk.until, chunk.longest)
    assert count_chunks(ids, tokenizer, chunk) == expected > 3
    assert count_chunks((), tokenizer, chunk) == 0


def test_the_largest_choice_with_enough_chunks_is_taken() -> None:
    assert choose_tokens((64, 32, 16), [(4, 8, 16)]) == 32
    assert choose_tokens((64, 32, 16), [(4, 8, 16), (8, 9, 20), (9, 9, 20)]) == 64
    assert choose_tokens((64, 32, 16), [(1, 1, 2)]) == 16
    assert choose_tokens(CHOICES, []) == DEFAULT_TOKENS


def test_choices_keep_within_the_other_options() -> None:
    assert list_choices(SearchOptions()) == list(CHOICES)
    assert list_choices(SearchOptions(chunk=Chunk(limit=40))) == [32, 24, 16]
    assert list_choices(SearchOptions(chunk=Chunk(limit=5))) == [5]
    shorten = SearchOptions(on_unlearnable="shorten", min_chunk_tokens=48)
    assert list_choices(shorten)[-1] == 64


def make_config(tiny_pair: TinyPair, directory: Path, **changes: Any) -> SelectConfig:
    data = write_rows(directory / "p.jsonl", PROBLEMS)
    fields = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "data": data, "seed": 5}
    return SelectConfig(
        **{**fields, "output_dir": str(directory / "run"), "max_tokens": 160, "candidates": 2, **changes}
    )


def read_settings(config: SelectConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((Path(config.output_dir) / "run.json").read_text())["settings"]
    return settings


def test_a_run_chooses_once_and_keeps_its_choice(
    tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tiny_pair, tmp_path, limit=1)
    engine = tiny_pair.engine
    with caplog.at_level(logging.INFO, "genssd.select"):
        run_select(config, engine)
    tokens = read_settings(config)["chunk.tokens"]
    # the rule, over the same plain responses
    (one,) = engine.generate(
        [PROBLEMS[0]["prompt"]], sampling=config.sampling, max_tokens=config.max_tokens, seed=config.seed
    )
    tokenizer = engine.tokenizer("teacher")
    enough = [t for t in CHOICES if count_chunks(one[0].token_ids, tokenizer, Chunk(tokens=t)) >= STEPS]
    assert tokens == (enough or CHOICES[-1:])[0]
    assert f"chunks of at least {tokens} tokens" in caplog.text
    assert f"median {median([len(one[0].token_ids)]):g} tokens" in caplog.text
    # more prompts would give another choice: the recorded one counts, and another one is refused
    caplog.clear()
    with caplog.at_level(logging.INFO, "genssd.select"):
        resumed = dataclasses.replace(config, limit=None, resume=True)
        run_select(resumed, engine)
    assert read_settings(config)["chunk.tokens"] == tokens
    assert "as this run was begun" in caplog.text
    run_select(dataclasses.replace(resumed, chunk=Chunk(tokens=tokens)), engine)
    with pytest.raises(InputError, match=f"was begun with chunk.tokens={tokens}, not {tokens + 1}"):
        run_select(dataclasses.replace(resumed, chunk=Chunk(tokens=tokens + 1)), engine)


def test_rows_are_those_of_the_same_number_given(tiny_pair: TinyPair, tmp_path: Path) -> None:
    chosen = make_config(tiny_pair, tmp_path)
    run_select(chosen, tiny_pair.engine)
    tokens = read_settings(chosen)["chunk.tokens"]
    given = dataclasses.replace(chosen, chunk=Chunk(tokens=tokens), output_dir=str(tmp_path / "given"))
    run_select(given, tiny_pair.engine)

    def read(config: SelectConfig) -> list[list[int]]:
        lines = (Path(config.output_dir) / "selections.jsonl").read_text().splitlines()
        return sorted(json.loads(line)["completion_ids"] for line in lines)

    assert read(chosen) == read(given)


@pytest.mark.usefixtures("forked_workers")
def test_several_processes_choose_the_same(tiny_pair: TinyPair, tmp_path: Path) -> None:
    alone = make_config(tiny_pair, tmp_path, memory_bytes=1 << 24)
    run_select(alone)
    divided = dataclasses.replace(alone, processes=2, output_dir=str(tmp_path / "divided"))
    run_select(divided)
    assert read_settings(alone)["chunk.tokens"] == read_settings(divided)["chunk.tokens"]


def test_a_chunk_in_python_has_a_length_by_itself() -> None:
    assert (Chunk().least, Chunk().longest) == (DEFAULT_TOKENS, 2 * DEFAULT_TOKENS)
    assert (Chunk(limit=20).least, Chunk(limit=20).longest) == (20, 20)
    assert Chunk(until=None).longest == DEFAULT_TOKENS
    with pytest.raises(InputError, match="chunk limit must be at least 1"):
        Chunk(limit=0)
