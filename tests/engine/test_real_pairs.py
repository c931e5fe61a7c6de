"""Real tokenizers and weights in pairs: a student reads another tokenizer's text by bytes.

    GENSSD_MODELS=DIRECTORY:DIRECTORY pytest tests/engine/test_real_pairs.py

Every ordered pair of the directories is a teacher and a student. Problems as in test_real_weights.py.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import pytest
import torch
from support.byte_tokenizers import TEXTS

from genssd import Chunk, Engine
from genssd.engine.readers.byte_reader import ByteReader
from genssd.engine.texts.text import Tokenizer

MODELS = [Path(name) for name in os.environ.get("GENSSD_MODELS", "").split(os.pathsep) if name]
PAIRS = list(itertools.permutations(MODELS, 2))
PROBLEMS = Path(__file__).parents[3] / "shared/data/gsm8k/test.jsonl"
NUM_CHUNKS = 10_000

pytestmark = pytest.mark.skipif(not PAIRS, reason="GENSSD_MODELS names no two directories of models")


def read_texts() -> list[str]:
    if not PROBLEMS.is_file():
        return [*TEXTS]
    rows = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    return [*TEXTS, *(f"{row['question']}\n{row['answer']}" for row in rows)]


@pytest.mark.parametrize(("writer", "reader"), PAIRS, ids=lambda path: path.name)
def test_chunks_have_the_tokens_of_the_whole_text(writer: Path, reader: Path) -> None:
    teacher, student = Tokenizer(writer), Tokenizer(reader)
    by_bytes = ByteReader.of(teacher, student, "teacher", "student")
    generator = random.Random(0)
    ordinary = sorted(by_bytes.table.bytes_of)
    num_chunks = 0
    for text in itertools.cycle(read_texts()):
        step = generator.choice([1, 2, 3, 8, 32])
        for ids in (teacher.encode_plain(text), generator.choices(ordinary, k=40)):
            held, read = b"", []
            for start in range(0, len(ids), step):
                reading = by_bytes.read(
                    ids[start : start + step], held=held, begins=not start, ends=start + step >= len(ids)
                )
                held = reading.held
                read += reading.ids
                num_chunks += 1
            assert tuple(read) == by_bytes.read(ids, held=b"", begins=True, ends=True).ids
        if num_chunks > NUM_CHUNKS:
            break
        whole = [*by_bytes.read(teacher.encode_plain(text), held=b"", begins=True, ends=True).ids]
        assert whole == student.encode_plain(text)


@pytest.mark.parametrize(("writer", "reader"), PAIRS, ids=lambda path: path.name)
def test_a_search_scores_the_whole_text(writer: Path, reader: Path) -> None:
    engine = Engine.from_pretrained(writer, reader, dtype="float32", memory_bytes=1 << 30)
    prompts = [f"Question: {text.splitlines()[0]}\nAnswer:" for text in read_texts()[len(TEXTS) - 1 :][:3]]
    selections = engine.select_expand(prompts, candidates=2, chunk=Chunk(tokens=16), max_tokens=48)
    student = engine.tokenizer("student")
    for selection in selections:
        best = selection.best
        ends = [student.eos_token_id] if best.status == "finished" else []
        assert [*best.student_ids] == student.encode_plain(best.text) + ends
        (stats,) = engine.score([list(selection.student_prompt_ids)], [list(best.student_ids)])
        torch.testing.assert_close(best.stats.logprob, stats.logprob, atol=1e-4, rtol=0)
    assert engine.usage.drifted_responses == 0
