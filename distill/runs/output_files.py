"""What every command writes, by file: listed in its help, printed at its end, and removed by --overwrite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genssd.distill.runs.field_kinds import fields_of
from genssd.distill.runs.writing import remove_directory, remove_file
from genssd.engine.common.errors import InputError

JOURNALS: Mapping[str, str] = {
    "select": "selections.jsonl",
    "generate": "responses.jsonl",
    "score": "features.jsonl",
    "prefix": "prefixes.jsonl",
    "leaf": "journal.jsonl",
    "diagnose": "questions.jsonl",
    "evaluate": "evaluation.jsonl",
    "distill": "rounds.jsonl",
    "reproduce": "results.jsonl",
}
"""The file of every command that resumes by a line for each finished piece of work."""
RECORD = {"run.json": "the settings, models and versions; --config reads it"}
BAD_ROWS = {"bad_rows.txt": "what could not be used, by file and line"}
SUMMARY = {"summary.json": "the counts that are printed, and more"}

OUTPUTS: Mapping[str, Mapping[str, str]] = {
    "demo": {
        "demo.json": "all results",
        "standard/": "journal, student and evaluation without selection",
        "selected/": "the same with selection",
        "post-hoc/": "the same with the best whole responses",
        "cold-start/": "evaluation of the student before its training",
        "train.jsonl": "the problems of the training",
        "eval.jsonl": "the held-out problems",
        "run.json": "the mark of a demo",
    },
    "select": {
        "selections.jsonl": "a line for each prompt: what genssd train reads",
        "decisions.jsonl": "every candidate with its scores: what genssd reselect reads",
        "teacher_topk.bin": "the teacher's most likely tokens, for genssd train --kd-ratio",
        "teacher_states.bin": "the teacher's hidden states, for genssd train --kd-states",
        "calibration.json": "the threshold that was taken from data",
        "metrics.jsonl": "speed, tokens kept and accuracy after every few prompts",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
    "score": {
        "selected.jsonl": "the responses that were picked: what genssd train reads",
        "scores.jsonl": "a line for each trace, with a column for each criterion",
        "report.html": "a page to look at",
        "teachers.json": "the ranking of the teachers",
        "controls.json": "what the rankings have to do with length, steps and correctness",
        "features.jsonl": "the journal",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
    "reselect": {
        "pairs.jsonl": "preference pairs: what DPO trainers read",
        "steps.jsonl": "stepwise supervision",
        "reselected.jsonl": "a line for each round: what was kept, and what would have been",
        **SUMMARY, **RECORD,
    },
    "export": {
        "dataset/": "the rows: what datasets.load_from_disk reads",
        "compression_config.yaml": "how the log-probabilities are written: DistillKit's logprob_compressor",
        **SUMMARY, **RECORD,
    },
    "generate": {
        "responses.jsonl": "a line for each prompt: what genssd train and genssd score read",
        "teacher_states.bin": "the teacher's hidden states, for genssd train --kd-states",
        "metrics.jsonl": "speed, tokens kept and accuracy after every few prompts",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
    "prefix": {
        "aligned.jsonl": "finished rows that are not known to be wrong: what genssd train reads",
        "prefixes.jsonl": "the journal, a line for each trace",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
    "leaf": {
        "counterfactuals.jsonl": "the traces, and those without distracting words: what genssd train reads",
        "journal.jsonl": "the words that distract the student, by trace",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
    "train": {
        "*.safetensors": "the trained model; transformers and genssd load the directory",
        "README.md": "the model card: data, options, loss and command",
        "best/": "the model with the smallest loss on eval_data, with its card",
        "adapter/": "the LoRA adapters",
        "checkpoint-*/": "checkpoints to resume from",
        "metrics.jsonl": "losses and learning rates by step",
        "bad_batch.jsonl": "the examples of a step whose loss is not finite",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
    "distill": {
        "round-*/": "problems, selection, training and evaluation of each round; round-N/train is its student",
        "rounds.jsonl": "a line for each round",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
    "evaluate": {
        "evaluation.jsonl": "a line for each problem, with its responses and verdicts",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
    "reproduce": {
        "table.md": "accuracy of every arm, and the comparisons with the controls",
        "results.json": "the same, and more",
        "plot.png": "the same as a plot",
        "results.jsonl": "the journal: a line for every arm of every seed, with the verdict on every test problem",
        "seed-*/": "problems, rows and evaluations",
        "models/": "models that were made first",
        "styles/": "what length, teacher and student like, measured before any training",
        "bad_rows.txt": "arms that could not be run, and why",
        **SUMMARY, **RECORD,
    },
    "diagnose": {
        "diagnosis.html": "a page to look at",
        "questions.jsonl": "the journal, a line for each question",
        "nodes.jsonl": "a line for each node, with all alignments",
        **BAD_ROWS, **SUMMARY, **RECORD,
    },
}  # fmt: skip
"""Files and directories (with a slash at the end) below output_dir, the most useful first, by command."""


MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.*", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files that transformers writes beside the weights of a model. The first one goes first: a directory without it holds
no complete model."""


def list_outputs(directory: Path, command: str) -> list[Path]:
    """Return what a finished or interrupted run of a command has written, in the order in which it is removed.

    run.json is left out, which the next run writes again, and files of the user's own.
    """
    patterns = [*(MODEL_FILES if command == "train" else ()), *(p for p in OUTPUTS[command] if p not in RECORD)]
    return [path for pattern in patterns for path in directory.glob(pattern.rstrip("/"))]


def remove_outputs(directory: Path, command: str) -> None:
    """Remove what `list_outputs` lists. Raises InputError where the system refuses it."""
    for path in list_outputs(directory, command):
        if path.is_dir():
            remove_directory(path)
        else:
            remove_file(path)


def check_outputs_unread(config: Any, command: str) -> None:
    """Raise InputError naming a field of a config whose model or file lies among what `remove_outputs` would remove."""
    directory = Path(config.output_dir).resolve()
    removed = {path.resolve() for path in list_outputs(directory, command)}
    for setting in fields_of(config):
        names = (setting.value,) if isinstance(setting.value, str) else setting.value
        if setting.name == "output_dir" or not isinstance(names, tuple):
            continue
        for name in names:
            path = Path(name).resolve() if isinstance(name, str) and name and "\0" not in name else None
            is_read = path is not None and (path == directory or not removed.isdisjoint((path, *path.parents)))
            if removed and is_read:
                raise InputError(
                    f"overwrite would remove what the run reads: {setting.name} {name} lies in output_dir "
                    f"{config.output_dir}; choose another output_dir"
                )
