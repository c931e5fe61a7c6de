"""`genssd export`: the trajectories of a finished search, with the teacher's most likely tokens, for other trainers.

OUTPUT_DIR/dataset/                a data set that `datasets.load_from_disk` reads (distillkit.py has its columns)
OUTPUT_DIR/compression_config.yaml how its log-probabilities are written: DistillKit's `logprob_compressor`
OUTPUT_DIR/summary.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.examples import Example
from genssd.distill.runs.run import Run
from genssd.distill.runs.writing import name_failure, write_text
from genssd.distill.select.distillkit import make_compression, make_row
from genssd.distill.select.export_config import ExportConfig
from genssd.distill.select.reselect import read_selection_config
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What was written."""

    output_dir: Path
    rows: int
    tokens: int
    """Number of tokens with a distribution of the teacher."""
    k: int
    left_out: Mapping[str, int]
    """Number of rows that were left out, by reason."""


def run_export(config: ExportConfig) -> ExportSummary:
    """Write the rows. Raises InputError on rows without the teacher's most likely tokens, and without `datasets`."""
    source = Path(config.run) / "selections.jsonl"
    tokenizer = Tokenizer(locate(config.student or read_selection_config(Path(config.run))["student"]))
    read = read_examples(
        [source],
        tokenizer,
        max_length=1 << 62,
        statuses=config.statuses,
        require_correct=config.require_correct,
    )
    first = read.examples[0]
    if first.topk is None:
        raise InputError(f"{first.where}: no teacher_topk of this student's tokenizer: select with --teacher-topk")
    k, vocabulary = first.topk.k, tokenizer.largest_id + 1
    with Run.open(config, "export", parts="compression_config.yaml") as run:
        _write_dataset(run.path("dataset"), read.examples, vocabulary, k)
        write_text(
            run.path("compression_config.yaml"), yaml.safe_dump(make_compression(vocabulary, k), sort_keys=False)
        )
        run.record()
        summary = ExportSummary(
            output_dir=run.output_dir,
            rows=len(read.examples),
            tokens=sum(one.topk.tokens for one in read.examples if one.topk is not None),
            k=k,
            left_out=read.left_out,
        )
        run.write_summary({**dataclasses.asdict(summary), "output_dir": config.output_dir, "run": config.run})
    return summary


def _write_dataset(path: Path, examples: Sequence[Example], vocabulary: int, k: int) -> None:
    """Write the rows one after the other, so that memory holds one. Raises InputError as `make_row` does."""
    try:
        import pyarrow
        from datasets import Dataset, disable_progress_bars
    except ImportError:
        raise InputError("this needs the datasets library: pip install genssd[data]") from None
    disable_progress_bars()
    byte_lists = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
    schema = pyarrow.schema(
        {
            "input_ids": pyarrow.list_(pyarrow.uint64()),
            "labels": pyarrow.list_(pyarrow.int64()),
            "compressed_logprobs": byte_lists,
            "bytepacked_indices": byte_lists,
        }
    )
    rows = path.with_name("rows.arrow")
    try:
        with (
            name_failure(rows),
            pyarrow.OSFile(str(rows), "wb") as file,
            pyarrow.ipc.new_stream(file, schema) as stream,
        ):
            for example in examples:
                row = {name: [values.tolist()] for name, values in make_row(example, vocabulary, k).items()}
                stream.write_batch(pyarrow.RecordBatch.from_pydict(row, schema=schema))
        with name_failure(path):
            Dataset.from_file(str(rows)).save_to_disk(str(path))
    finally:
        rows.unlink(missing_ok=True)
