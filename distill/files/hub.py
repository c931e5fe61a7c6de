"""Data sets of the Hugging Face hub as data files: ORG/NAME:SPLIT or ORG/NAME/CONFIG:SPLIT."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from genssd.distill.files.tables import BATCH_ROWS, EXTRA, encode_batches
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line

_PATTERN = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/([^/:\s]+))?(?::([^/:\s]+(?:\[[^\]]*\])?))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """Name of a split of a data set on the hub."""

    text: str
    """The name as it was given."""
    repository: str
    """Organisation and name of the data set: ORG/NAME."""
    config: str | None
    split: str | None


def parse_hub_name(name: str, file_suffixes: frozenset[str]) -> HubName | None:
    """Return the data set that a name means; None where it is the name of a file.

    A path that exists is a file, whatever its name. Without a split, so is a name with a suffix of data files, and one
    whose first part is a directory here.
    """
    match = _PATTERN.fullmatch(name)
    if match is None or os.path.lexists(name):
        return None
    repository, config, split = match.groups()
    if split is None and (Path(name).suffix in file_suffixes or os.path.isdir(name.split("/")[0])):
        return None
    return HubName(text=name, repository=repository, config=config, split=split)


def read_hub(name: HubName) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of a data set as JSON objects, with their numbers, from 1.

    Raises InputError on a data set that cannot be had, and, naming the choices, on a name that leaves a choice open.
    """
    rows = _load(name).with_format("arrow")  # as they are stored: an image or a sound is not decoded
    yield from encode_batches(rows.iter(batch_size=BATCH_ROWS), name.text)


@cache
def _load(name: HubName) -> Any:
    """Return a `datasets.Dataset`, which a process loads once."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(
            f"{name.text} is no file here; to read a data set of the hub, install a package: {EXTRA}"
        ) from None
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every attempt to reach the hub
    try:
        return datasets.load_dataset(name.repository, name.config, split=name.split or _only_split(name))
    except InputError:
        raise
    except Exception as error:  # the libraries below raise errors of many kinds without a common base
        if isinstance(error, ValueError):
            _check_config(name)
        raise InputError(
            f"{name.text} is no file here, and no data set that the hub gives: {one_line(error)}"
        ) from None


def _only_split(name: HubName) -> str:
    """Return the split of a data set that has a single one; raise InputError naming them if it has several."""
    import datasets

    splits = datasets.get_dataset_split_names(name.repository, name.config)
    if len(splits) != 1:
        choices = ", ".join(f"{name.text}:{split}" for split in splits)
        raise InputError(f"{name.text} has several splits; name one of them: {choices}")
    return str(splits[0])


def _check_config(name: HubName) -> None:
    """Raise InputError naming the configs of a data set that needs one, if the name has none or another one."""
    import datasets

    try:
        configs = datasets.get_dataset_config_names(name.repository)
    except Exception:  # the caller reports why the hub gives nothing
        return
    if name.config not in configs and (len(configs) > 1 or name.config is not None):
        split = f":{name.split}" if name.split else ""
        listed = ", ".join(f"{name.repository}/{config}{split}" for config in configs)
        raise InputError(f"{name.text} must name one of the data set's configs: {listed}")
