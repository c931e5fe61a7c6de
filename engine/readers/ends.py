"""Tokens that end a response for one model and not for the other.

A Base model usually ends with another token than the Instruct model of its family, although it has that token. A
student that is trained on responses which end with it writes it, but nothing that runs the student stops there, unless
its generation_config.json lists the token.
"""

from __future__ import annotations

from genssd.engine.common.errors import CheckpointError, InputError
from genssd.engine.common.quoting import quote
from genssd.engine.readers.reading import Reader
from genssd.engine.texts.text import Tokenizer


def check_ends(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model can write one of its end tokens, if it has any. vocab_size: number of ids of its head.

    Raises CheckpointError naming the ids.
    """
    ends = sorted(tokenizer.end_token_ids)
    if ends and all(i >= vocab_size for i in ends):
        raise CheckpointError(
            f"{tokenizer.directory}: no response could end, because eos_token_id ({', '.join(map(str, ends))}) is "
            f"no id of the model, which has {vocab_size}; correct it in generation_config.json or config.json"
        )


def choose_end(tokenizer: Tokenizer) -> int | None:
    """Return the token by which a model ends a response: that of its chat template, else its end of sequence.

    None where it has neither.
    """
    ends = [i for i in tokenizer.end_names.values() if i in tokenizer.end_token_ids]
    if tokenizer.chat.exists:
        after = tokenizer.chat.write_after([{"role": "user", "content": "a"}]) or ""
        named = [(after.find(name), i) for name, i in tokenizer.end_names.items() if i in ends and name in after]
        if named:
            return min(named)[1]
    known = [i for i in tokenizer.end_token_ids if i <= tokenizer.largest_id]
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(known, default=None)


def find_foreign_ends(teacher: Tokenizer, student: Tokenizer, reader: Reader) -> list[int]:
    """Return the student's ids of the tokens that end the teacher's responses and not the student's, in order.

    reader: how the student reads the teacher's tokens, by ids.
    Raises InputError where the student has no id for such a token.
    """
    foreign: set[int] = set()
    for i in teacher.end_token_ids:
        name = teacher.hf.convert_ids_to_tokens(i)
        if name is None:  # an id of the config that the tokenizer does not have: it is never written
            continue
        if reader.find_missing([i]) is not None:
            raise InputError(
                f"responses of the teacher ({teacher.directory}) end with {_name([i], teacher)}, and the student "
                f"({student.directory}) has neither this token nor an end of its own: add the token to its tokenizer "
                f"(add_tokens([{quote(name)}]) and save_pretrained of its transformers tokenizer, with an id that the "
                "embedding has a row for), or set eos_token in its tokenizer_config.json"
            )
        foreign |= {*reader.read([i], held=b"", begins=True, ends=True).ids}
    return sorted(foreign - student.end_token_ids)


def describe_foreign_ends(ids: list[int], teacher: Tokenizer, student: Tokenizer) -> str:
    """Return one line for the log that names the tokens, the student's own ends, and what follows."""
    return (
        f"responses of the teacher ({teacher.directory}) end with {_name(ids, student)}, where the student "
        f"({student.directory}) does not stop: it ends with {_name(sorted(student.end_token_ids), student)}. A "
        "training on such responses adds the token to the eos_token_id of the trained student's generation_config.json"
    )


def _name(ids: list[int], tokenizer: Tokenizer) -> str:
    known = [(tokenizer.hf.convert_ids_to_tokens(i), i) for i in ids]
    names = [f"{quote(name)} (id {i})" for name, i in known if name is not None]
    return " and ".join(names) if names else "no token"
