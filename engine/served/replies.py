"""What a server answers to a request for completions: token ids, log-probabilities and the reason of the end.

Token ids are taken from `token_ids` (`return_token_ids`), else from the names "token_id:7" of the log-probabilities
(`return_tokens_as_token_ids`), else from the text, where the tokenizer leaves no doubt about them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote
from genssd.engine.texts.text import Tokenizer

FORM_FAULTS = (LookupError, TypeError, ValueError, AttributeError, OverflowError, InputError)
"""Errors of an answer whose values are not those of OpenAI's API; InputError is that of a text that is none."""
LARGEST_LOGPROB = 1e-3
"""Log-probabilities of tokens that are nearly certain may be above 0 by rounding."""
ID_NAME = "token_id:"
"""Beginning of a token's name where names are ids."""


class BadReply(Exception):
    """An answer that cannot be used; the request that it answers fails."""


class TextInDoubt(BadReply):
    """A completion that came as text, from which its tokens cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The tokens that a server wrote after a prompt."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Log-probability of each token at temperature 1."""
    topk: Sequence[tuple[list[int], list[float]]]
    """Ids and log-probabilities of the most likely tokens at each token; empty where they were not asked for."""
    reason: Literal["stop", "length"]
    """Whether the server ended by a token or delimiter, or at the maximum number of tokens."""
    text: str
    """Text of the tokens, as the server has it."""
    is_from_text: bool
    """Whether the ids were found from the text."""


def read_reply(
    fields: Mapping[str, Any], count: int, tokenizer: Tokenizer, *, vocab_size: int, num_topk: int
) -> list[Written]:
    """Return what a server wrote, completion by completion. count: how many were asked for.

    vocab_size: number of ids of its head. num_topk: how many most likely tokens were asked for. Raises BadReply on an
    answer that cannot be used.
    """
    choices = fields.get("choices")
    if not isinstance(choices, list) or len(choices) != count or not all(isinstance(c, Mapping) for c in choices):
        number = len(choices) if isinstance(choices, list) else 0
        raise BadReply(f"{format_count(number, 'completion')} came instead of {count}")
    try:
        return [
            _read_choice(choice, tokenizer, vocab_size, num_topk)
            for choice in sorted(choices, key=lambda c: c["index"])
        ]
    except FORM_FAULTS as error:
        raise BadReply(f"a completion of another form than OpenAI's ({type(error).__name__}: {error})") from None


def is_whole(fields: Mapping[str, Any]) -> bool:
    """Return whether every completion came to an end; a server that is stopped may give them up ("abort")."""
    choices = fields.get("choices")
    return not isinstance(choices, list) or all(
        not isinstance(c, Mapping) or c.get("finish_reason") in ("stop", "length") for c in choices
    )


def _read_choice(choice: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int, num_topk: int) -> Written:
    given = choice.get("logprobs")
    if not isinstance(given, Mapping) or not isinstance(given.get("token_logprobs"), list):
        raise BadReply("it has no log-probabilities (logprobs), which the search records")
    names, is_from_text = given.get("tokens"), False
    ids = choice.get("token_ids")
    if ids is None and names and all(isinstance(name, str) and name.startswith(ID_NAME) for name in names):
        ids = [int(name.removeprefix(ID_NAME)) for name in names]
    if ids is None:
        ids, is_from_text = _ids_of_text(choice, names, tokenizer), True
    logprobs = given["token_logprobs"]
    if len(logprobs) != len(ids):
        raise BadReply(f"{format_count(len(ids), 'token')} came with {len(logprobs)} log-probabilities")
    for position, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        _check_id(token, tokenizer)
        if logprob is None or not math.isfinite(logprob) or logprob > LARGEST_LOGPROB:
            raise BadReply(f"token {position} has the log-probability {logprob}; check the weights of the server")
    topk = [_read_topk(entry, num_topk, tokenizer, vocab_size) for entry in given["top_logprobs"]] if num_topk else []
    if num_topk and len(topk) != len(ids):
        raise BadReply(f"{format_count(len(ids), 'token')} came with the most likely ones of {len(topk)}")
    return Written(
        tokens=list(ids),
        logprobs=[float(value) for value in logprobs],
        topk=topk,
        reason=choice["finish_reason"],
        text=str(choice.get("text", "")),
        is_from_text=is_from_text,
    )


def _check_id(token: object, tokenizer: Tokenizer) -> None:
    """Raise BadReply on what is no id of the tokenizer."""
    if type(token) is not int:
        raise BadReply(f"a token id must be an integer, not {quote(token)}")
    if not 0 <= token <= tokenizer.largest_id:
        raise BadReply(
            f"token id {token} is not in the tokenizer {tokenizer.directory}: give teacher_tokenizer, the directory or "
            "hub id of the served model"
        )


def _read_topk(
    entry: Mapping[str, float], num_topk: int, tokenizer: Tokenizer, vocab_size: int
) -> tuple[list[int], list[float]]:
    """Return the most likely tokens, the lower id first where two are equal. Servers add the token that was drawn."""
    pairs = [(_id_of_name(name, tokenizer, vocab_size), float(logprob)) for name, logprob in entry.items()]
    if any(math.isnan(logprob) for _, logprob in pairs):
        raise BadReply("a most likely token has the log-probability NaN; check the weights of the server")
    best = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:num_topk]
    if len({token for token, _ in best}) < num_topk:
        raise BadReply(f"{format_count(len(best), 'most likely token')} came instead of {num_topk}")
    return [token for token, _ in best], [logprob for _, logprob in best]


def _id_of_name(name: str, tokenizer: Tokenizer, vocab_size: int) -> int:
    if name.startswith(ID_NAME):
        token = int(name.removeprefix(ID_NAME))
        if not 0 <= token < vocab_size:
            raise BadReply(f"the most likely token id {token} is outside of the vocabulary of {vocab_size}")
        return token
    ids = tokenizer.ids_of_text(name)
    if len(ids) != 1:
        raise BadReply(
            f"the most likely token {quote(name)} came as text, which {format_count(len(ids), 'token')} have: "
            "teacher_topk needs a server that names tokens by id (return_tokens_as_token_ids)"
        )
    return ids[0]


def _ids_of_text(choice: Mapping[str, Any], names: object, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a completion that came as text.

    The tokens' names decide where each is the text of one id only; else the text's encoding, where its tokens have
    these names. Raises TextInDoubt where neither is so.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadReply("it has neither token ids (return_token_ids) nor the names of tokens")
    ids_of_names = [tokenizer.ids_of_text(name) for name in names]
    if all(len(ids) == 1 for ids in ids_of_names):
        return [ids[0] for ids in ids_of_names]
    ids = tokenizer.encode(choice["text"], special=False)
    num_ends = len(names) - len(ids)  # the token that ends a response is no part of the text
    ends = [ids_of_name[:1] for ids_of_name in ids_of_names[len(ids) :]]
    if num_ends in (0, 1) and all(ends) and [tokenizer.token_text(i) for i in ids] == names[: len(ids)]:
        return [*ids, *(end[0] for end in ends)]
    raise TextInDoubt(
        "it has no token ids (return_token_ids), and the tokens of its text cannot be told from the text: take a "
        "server that returns token ids, such as vLLM or SGLang"
    )
