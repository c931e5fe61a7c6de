"""A finished search as DistillKit reads it: a decoder written from its format finds the stored top k again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.small_runs import make_small_runs
from support.tiny_pair import TinyPair

from genssd.distill.data.examples import Example
from genssd.distill.data.topk_store import TopkStore, locate_topk
from genssd.distill.select.distillkit import NO_PROBABILITY, count_bits, make_row, pack_bits
from genssd.distill.select.export import run_export
from genssd.distill.select.export_config import ExportConfig
from genssd.engine.common.errors import InputError
from genssd.kernels.logprob import TopK

datasets = pytest.importorskip("datasets")


def unpack(values: list[int], bits: int, count: int) -> list[int]:
    """Numbers of `bits` bits from bytes, by the digits of one long number."""
    digits = "".join(f"{value:08b}" for value in values)
    return [int(digits[i * bits : (i + 1) * bits], 2) for i in range(count)]


def decode(row: dict[str, Any], compression: dict[str, Any]) -> list[dict[int, float]]:
    """Probabilities by id at every position, as `decompress_to_sparse` gives them for exact values without deltas."""
    k, bits = compression["k"], math.ceil(math.log2(compression["d"]))
    assert (compression["exact_k"], compression["exact_dtype"]) == (k, "float16")
    assert not compression["delta_encoding"]
    decoded = []
    for code, ids in zip(row["compressed_logprobs"], row["bytepacked_indices"], strict=True):
        logprob = np.frombuffer(bytes(code), dtype="<f2").astype(float)
        assert len(logprob) == k
        assert (np.diff(logprob) <= 0).all()
        decoded.append(dict(zip(unpack(ids, bits, k), np.exp(logprob).tolist(), strict=True)))
    return decoded


@pytest.fixture(scope="module")
def searched(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a search."""
    return Path(make_small_runs(tiny_pair, tmp_path_factory.mktemp("data"))["export"].config.run)


def test_the_rows_of_a_search(searched: Path, tmp_path: Path) -> None:
    run = str(searched)
    summary = run_export(ExportConfig(run=run, output_dir=str(tmp_path / "out"), statuses=("finished", "length")))
    compression = yaml.safe_load((tmp_path / "out" / "compression_config.yaml").read_text())
    rows = list(datasets.load_from_disk(str(tmp_path / "out" / "dataset")))
    selections = [json.loads(line) for line in (Path(run) / "selections.jsonl").read_text().splitlines()]
    assert summary.rows == len(rows) == len(selections) > 1
    assert not (tmp_path / "out" / "rows.arrow").exists()
    for row, selection in zip(rows, selections, strict=True):
        prompt, completion = selection["student_prompt_ids"], selection["completion_ids"]
        assert row["input_ids"] == [*prompt, *completion][:-1]
        assert row["labels"] == [-100] * (len(prompt) - 1) + [prompt[-1], *completion[:-1]]
        place = locate_topk(selection["teacher_topk"], Path(run), len(completion), "row")
        assert place is not None
        top = place.read()
        decoded = decode(row, compression)
        assert len(decoded) == len(row["input_ids"])
        for found, ids, logprob in zip(decoded[len(prompt) - 1 :], top.ids, top.logprob, strict=True):
            assert found == pytest.approx(dict(zip(ids.tolist(), logprob.exp().tolist(), strict=True)))
        for found in decoded[: len(prompt) - 1]:
            assert sum(found.values()) == pytest.approx(1.0, abs=1e-3)


def test_ids_that_the_student_does_not_have_get_no_probability(tmp_path: Path) -> None:
    top = TopK(torch.tensor([[1, 300, 0], [301, 2, 302]]), torch.tensor([[-1.0, -1.5, -2.0], [-1.0, -1.5, -2.0]]))
    with TopkStore(tmp_path / "t.bin", 0, vocabulary=303) as store:
        place = locate_topk(store.append(top), tmp_path, 2, "here")
    example = Example(input_ids=(7, 8, 1, 2), num_prompt=2, topk=place, where="here")
    row = make_row(example, 259, 3)
    ids = [unpack(values.tolist(), 9, 3) for values in row["bytepacked_indices"]]
    assert ids == [[0, 1, 2], [1, 2, 0], [0, 2, 1]]
    logprob = row["compressed_logprobs"].view(np.float16)
    assert logprob[1].tolist() == [-1.0, NO_PROBABILITY, -2.0]
    assert logprob[2].tolist() == [NO_PROBABILITY, -1.5, NO_PROBABILITY]


@pytest.mark.parametrize(("vocabulary", "bits"), [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (151_936, 18)])
def test_bits_of_ids(vocabulary: int, bits: int) -> None:
    assert count_bits(vocabulary) == bits
    ids = np.array([[vocabulary - 1, 0, vocabulary // 2]])
    assert unpack(pack_bits(ids, bits)[0].tolist(), bits, 3) == ids[0].tolist()


def test_a_search_without_top_k_is_refused(searched: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rows = [json.loads(line) for line in (searched / "selections.jsonl").read_text().splitlines()]
    (tmp_path / "run" / "run.json").write_bytes((searched / "run.json").read_bytes())
    for name in ("teacher_topk.bin", "teacher_states.bin"):
        (tmp_path / "run" / name).write_bytes((searched / name).read_bytes())
    for kept, message in (
        (0, r"selections\.jsonl, line 1: no teacher_topk of this student's tokenizer: select with --teacher-topk"),
        (1, r"selections\.jsonl, line 2: no teacher_topk, where other rows have k=2"),
    ):
        text = [json.dumps({**row, **({} if i < kept else {"teacher_topk": None})}) for i, row in enumerate(rows)]
        (tmp_path / "run" / "selections.jsonl").write_text("\n".join(text) + "\n")
        config = ExportConfig(
            run=str(tmp_path / "run"), output_dir=str(tmp_path / f"out{kept}"), statuses=("finished", "length")
        )
        with pytest.raises(InputError, match=message):
            run_export(config)
