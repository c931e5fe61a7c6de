"""Rows that two writers wrote: training on the chunks of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from genssd.distill.data.examples import Example, read_chunks
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role


def keep_writer(example: Example, fields: Mapping[str, Any], writer: Role) -> Example | None:
    """Return the example with the weight 0 for the chunks of the other writer; None where all are the other's.

    fields: the row of the example. Raises InputError naming the row where it does not say who wrote its tokens.
    """
    chunks = fields.get("chunks")
    if not isinstance(chunks, list) or not all(
        isinstance(chunk, dict) and chunk.get("writer") in ("teacher", "student") for chunk in chunks
    ):
        raise InputError(
            f"{example.where}: its chunks do not say who wrote them, which writer={writer} asks for; take rows of "
            "genssd generate with method alternate or relay, or writer both"
        )
    if not example.has_own_ids:
        raise InputError(
            f"{example.where}: its token ids are of another tokenizer than the student's, so that the tokens of the "
            f"{writer} are not known; train the student of the run that wrote the row, or take writer both"
        )
    read = read_chunks(chunks, example.num_completion, example.where)
    if not any(count for (count, _), chunk in zip(read, chunks, strict=True) if chunk["writer"] == writer):
        return None
    return replace(
        example,
        chunk_weights=tuple(
            (count, weight if chunk["writer"] == writer else 0.0)
            for (count, weight), chunk in zip(read, chunks, strict=True)
        ),
    )
