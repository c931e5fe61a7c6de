"""The model cards, README.md of the directories of a trained model and of its best one on the evaluation data: where
the model comes from, in the hub's form.

The front matter (YAML) is what the hub reads; the text says what was trained on what, how, and by which command. Only
what is known is stated: without a base model of the hub there is no base_model, without its card no license.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import yaml

from genssd.distill.files.rows import find_hub_repository, hash_content
from genssd.distill.runs.command_text import iter_flags, render_command
from genssd.distill.runs.journal import read_json
from genssd.distill.runs.source_version import describe_version
from genssd.distill.runs.writing import write_text
from genssd.distill.train.config import TrainConfig
from genssd.engine.checkpoints.model_names import find_directory
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError

CARD_FILE = "README.md"
FRONT_MATTER = "---"
ROUND_FILE = "kept.jsonl"
"""Name of the file that a round of `genssd distill` trains on."""
SHOWN_ALWAYS = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
"""Options that the card lists also where they have their defaults."""
NOT_OPTIONS = frozenset(
    ("model_name_or_path", "data", "eval_data", "output_dir", "resume_from_checkpoint", "overwrite", "push_to_hub")
)
"""Fields that stand elsewhere in the card, or say nothing about the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The command of genssd that wrote a data file, by the run.json beside it."""

    command: str
    settings: Mapping[str, Any]
    """Settings that decided the result, by dotted name."""

    def get(self, name: str) -> str | None:
        """Return a setting as text, a model or a data file by its name; None where the command has none."""
        value = self.settings.get(name)
        value = value["name"] if isinstance(value, Mapping) and "name" in value else value
        return None if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A data file of a training, as it was when the training began."""

    name: str
    content: str
    """The first 16 hex digits of the SHA-256 of its bytes, or of the rows of a data set of the hub."""
    repository: str | None
    """ORG/NAME of a data set of the hub; None for a file."""
    origin: Origin | None


class TrainingResult(Protocol):
    """What a training had come to when the model was saved: the part of `TrainSummary` that the card states."""

    @property
    def steps(self) -> int: ...
    @property
    def examples(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def best_eval_loss(self) -> float | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BestResult:
    """What a training had come to when it saved the model with the smallest loss on eval_data; see `TrainSummary`."""

    steps: int
    examples: int
    tokens: int
    loss: float
    best_eval_loss: float


def read_sources(names: Sequence[str]) -> tuple[DataSource, ...]:
    """Return what data files hold now. Raises InputError on one that cannot be read."""
    return tuple(
        DataSource(
            name=name, content=hash_content(name), repository=find_hub_repository(name), origin=_find_origin(Path(name))
        )
        for name in names
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CardInputs:
    """What the card of a training says of its inputs, read before the training begins."""

    student: Path
    """Directory of the model to start from."""
    data: tuple[DataSource, ...]
    held_out: tuple[DataSource, ...]
    """Data on which the loss is measured."""

    @classmethod
    def read(cls, config: TrainConfig, student: Path) -> CardInputs:
        """Read the inputs of a training. Raises InputError on a data file that cannot be read."""
        return cls(student=student, data=read_sources(config.data), held_out=read_sources(config.eval_data))


def write_card(directory: Path, config: TrainConfig, inputs: CardInputs, result: TrainingResult) -> None:
    """Write the card of a model into its directory, as a whole. Raises InputError when it cannot be written."""
    write_text(directory / CARD_FILE, render_card(config, inputs, result))


def render_card(config: TrainConfig, inputs: CardInputs, result: TrainingResult) -> str:
    """Return the card of a trained model, or of the best one on the evaluation data where that is the result."""
    student, data, held_out = inputs.student, inputs.data, inputs.held_out
    base = read_base(config.model_name_or_path, student)
    matter = yaml.safe_dump(_make_front_matter(config, base, data), sort_keys=False, allow_unicode=True)
    sections = [
        f"{FRONT_MATTER}\n{matter}{FRONT_MATTER}",
        f"# {_plain(Path(config.output_dir).resolve().name)}{', best' if isinstance(result, BestResult) else ''}",
        _describe_model(config, base, result),
        "## Data",
        "\n".join(_iter_data(data, held_out)),
        "## Training",
        "\n".join(_iter_training(config, result)),
        "## Command",
        _fence(render_command("train", config, without=("resume_from_checkpoint", "overwrite", "push_to_hub"))),
    ]
    return "\n\n".join(sections) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model from which a training began."""

    repository: str | None
    """Its name on the hub; None for a local directory that does not tell of one."""
    license: str | None
    license_name: str | None
    license_link: str | None


def read_base(name: str, directory: Path) -> Base:
    """Return what is known of the model that a training begins from, by its name and by the card in its directory.

    name: a hub id, or a local directory: where its own card names one base model, it was trained from that, and so is
    what is trained further. directory: where the model lies.
    """
    card = read_front_matter(directory / CARD_FILE)
    is_local = find_directory(name) is not None
    named = card.get("base_model")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    texts = {
        key: value for key in ("license", "license_name", "license_link") if isinstance(value := card.get(key), str)
    }
    return Base(
        repository=name if not is_local else named if isinstance(named, str) else None,
        license=texts.get("license"),
        license_name=texts.get("license_name"),
        license_link=texts.get("license_link"),
    )


def read_front_matter(path: Path) -> Mapping[str, Any]:
    """Return the front matter of a card; empty where there is no card, or none that can be read."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split(f"{FRONT_MATTER}\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        matter = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return matter if isinstance(matter, Mapping) else {}


def _make_front_matter(config: TrainConfig, base: Base, data: Sequence[DataSource]) -> dict[str, Any]:
    sets = [source.repository for source in data if source.repository is not None]
    sets += [name for source in data if source.origin and (name := _find_hub_data(source.origin)) is not None]
    matter = {
        "base_model": base.repository,
        "base_model_relation": None if base.repository is None else "finetune",
        "datasets": list(dict.fromkeys(sets)) or None,
        "license": base.license,
        "license_name": base.license_name,
        "license_link": base.license_link,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["genssd", "distillation" if _is_distilled(config, data) else "sft"],
    }
    return {name: value for name, value in matter.items() if value is not None}


def _is_distilled(config: TrainConfig, data: Sequence[DataSource]) -> bool:
    """Return whether a teacher wrote the data, or is part of the loss."""
    wrote = any(source.origin is not None and source.origin.get("teacher") is not None for source in data)
    return wrote or config.kd_ratio > 0.0 or config.key_attention.weight > 0.0


def _find_hub_data(origin: Origin) -> str | None:
    name = origin.get("data")
    return None if name is None else find_hub_repository(name)


def _describe_model(config: TrainConfig, base: Base, result: TrainingResult) -> str:
    if find_directory(config.model_name_or_path) is None:
        start = f"[{config.model_name_or_path}](https://huggingface.co/{config.model_name_or_path})"
    else:
        start = f"the local model {_code(Path(config.model_name_or_path).resolve().name)}"
        start += "" if base.repository is None else f", which descends from {_code(base.repository)}"
    adapters = ", as low-rank adapters that are merged here and also in `adapter/`" if config.use_peft else ""
    text = f"This model is {start}, trained by genssd {describe_version()}{adapters}."
    if isinstance(result, BestResult):
        steps = format_count(result.steps, "optimizer step")
        text += f" It is the model after {steps}, which had the smallest loss on the evaluation data so far."
    return text


def _iter_data(data: Sequence[DataSource], held_out: Sequence[DataSource]) -> Iterator[str]:
    yield "| data | SHA-256 (its first 16 hex digits) | written by |"
    yield "|---|---|---|"
    for source in data:
        yield f"| {_code(source.name)} | `{source.content}` | {_describe_origin(source.origin)} |"
    for source in held_out:
        yield f"| {_code(source.name)}, for evaluation | `{source.content}` | {_describe_origin(source.origin)} |"


def _describe_origin(origin: Origin | None) -> str:
    if origin is None:
        return "unknown"
    facts = [f"{name} {_code(value)}" for name in ("teacher", "student", "criterion") if (value := origin.get(name))]
    return ", ".join([f"`genssd {_plain(origin.command)}`", *facts])


def _iter_training(config: TrainConfig, result: TrainingResult) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    yield f"| examples | {result.examples:,} |"
    yield f"| steps | {format_count(result.steps, 'optimizer step')} |"
    yield f"| tokens | {format_count(result.tokens, 'completion token')} |"
    yield f"| loss of the last step | {'none' if math.isnan(result.loss) else f'{result.loss:.4f}'} |"
    if result.best_eval_loss is not None:
        model = "this model" if isinstance(result, BestResult) else "the model in `best/`"
        yield f"| smallest loss on the evaluation data | {result.best_eval_loss:.4f} ({model}) |"
    options = {flag.name: flag.value for flag in iter_flags(config) if flag.name not in NOT_OPTIONS}
    options |= {name: getattr(config, name) for name in SHOWN_ALWAYS}
    for name in sorted(options):
        yield f"| `{name}` | {_code(options[name])} |"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    yield f"| versions | genssd {describe_version()}, {packages} |"


def _find_origin(path: Path) -> Origin | None:
    """Return the command that wrote a data file; None where that is not known.

    A round of `genssd distill` keeps what it trains on beside the folder of its selection.
    """
    for folder in (path.parent, *([path.parent / "select"] if path.name == ROUND_FILE else [])):
        try:
            record = read_json(folder / "run.json")
        except (InputError, OSError):
            continue
        command, settings = record.get("command"), record.get("settings")
        if isinstance(command, str) and isinstance(settings, Mapping):
            return Origin(command=command, settings=settings)
    return None


def _fence(text: str) -> str:
    """Return a text as a block of code, which may hold backticks and newlines."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _plain(value: object) -> str:
    """Return a value as one line of text."""
    return " ".join(str(value).split())


def _code(value: object) -> str:
    """Return a value as code in a cell of a table: it may hold backticks and bars."""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    fence = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{_plain(text)}{space}{fence}".replace("|", "\\|")
