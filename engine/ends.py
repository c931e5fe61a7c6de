"""Tokens that end a response for one model and not for the other.

A Base model usually ends with another token than the Instruct model of its family, although it has that token. A
student that is trained on responses which end with it writes it, but nothing that runs the student stops there, unless
its generation_config.json lists the token.
"""

from __future__ import annotations

from genssd.engine.quoting import quote
from genssd.engine.text import Tokenizer
from genssd.engine.token_map import TokenMap


def find_foreign_ends(teacher: Tokenizer, student: Tokenizer, token_map: TokenMap) -> list[int]:
    """Return the student's ids of the tokens that end the teacher's responses and not the student's, in order."""
    read = {token_map.replaced.get(i, None if i in token_map.strings else i) for i in teacher.end_token_ids}
    return sorted(i for i in read if i is not None and i not in student.end_token_ids)


def describe_foreign_ends(ids: list[int], teacher: Tokenizer, student: Tokenizer) -> str:
    """Return one line for the log that names the tokens, the student's own ends, and what follows."""
    return (
        f"responses of the teacher ({teacher.directory}) end with {_name(ids, student)}, where the student "
        f"({student.directory}) does not stop: it ends with {_name(sorted(student.end_token_ids), student)}. A "
        "training on such responses adds the token to the eos_token_id of the trained student's generation_config.json"
    )


def _name(ids: list[int], tokenizer: Tokenizer) -> str:
    names = [f"{quote(tokenizer.hf.convert_ids_to_tokens(i))} (id {i})" for i in ids]
    return " and ".join(names) if names else "no token"
