"""The tokens that end a trained student's responses: its own, and those that end the responses it is trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from genssd.distill.data.examples import Example
from genssd.engine.common.quoting import quote
from genssd.engine.texts.text import Tokenizer

logger = logging.getLogger("genssd.train")


def find_learnt_ends(examples: Iterable[Example], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the special tokens that end completions and that the student does not take as an end, in order.

    Only rows with token ids of their own count: text ends with the student's own end of sequence.
    """
    special = set(tokenizer.hf.all_special_ids)
    special |= {int(i) for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    last = {e.input_ids[-1] for e in examples if e.has_own_ids and not e.is_cut_off}
    return tuple(sorted((last & special) - tokenizer.end_token_ids))


def add_ends(model: Any, ends: tuple[int, ...], tokenizer: Tokenizer) -> None:
    """Let the model that is saved list further ends in its generation_config.json. Logs a line that names them."""
    if not ends:
        return
    own = sorted(tokenizer.end_token_ids)
    model.generation_config.eos_token_id = [*own, *ends]

    def name(ids: Iterable[int]) -> str:
        return ", ".join(f"{quote(tokenizer.hf.convert_ids_to_tokens(i))} (id {i})" for i in ids) or "no token"

    logger.warning(
        "the completions end with %s, and the student with %s: it is trained to end with both, and its "
        "generation_config.json lists both",
        name(ends),
        name(own),
    )
