"""Requests to one server: faults are waited out, and a server that comes back must serve the model of before.

A request is sent again after a broken connection, a torn or late answer, and the statuses 408, 425, 429 and 5xx,
at intervals that double from half a second to 30 seconds, with jitter; Retry-After holds all requests back. A server
that has answered nobody for `patience` seconds is given up. One that answers others and fails the same request again
and again fails that request alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from genssd.engine.checkpoints.address import KEY_VARIABLES, Address
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import ServerError
from genssd.engine.common.quoting import quote
from genssd.engine.served.connections import Answer, Call, Connections, TransportFault
from genssd.engine.served.options import ServerOptions

AGAIN = frozenset((408, 425, 429))
"""Statuses below 500 after which a request is sent again."""
BUSY = frozenset((429, 502, 503, 504))
"""Statuses of a server that is there and cannot answer now; they do not count against the request."""
MAX_FAILURES = 8
"""Number of times that the server may fail one request (other 5xx, torn or late answers)."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds


class RequestRefused(Exception):
    """A request that the server will never answer, while it answers others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as the server describes it."""

    name: str
    root: str | None
    """Hub id or directory that the server loaded it from; None where the server does not say."""
    positions: int | None
    """Maximum number of tokens in prompt and response; None where the server does not say."""

    @property
    def fingerprint(self) -> str:
        """Name of the model, and 16 hex digits that change with its name, root or number of positions."""
        text = json.dumps([self.name, self.root, self.positions])
        return f"{self.name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def __str__(self) -> str:
        origin = "" if self.root in (None, self.name) else f" from {self.root}"
        length = "" if self.positions is None else f", {self.positions} positions"
        return f"{quote(self.name)}{origin}{length}"


class Client:
    """The requests of one process to a server. Its methods may be called by many threads at once."""

    def __init__(self, address: Address, options: ServerOptions) -> None:
        self.address = address
        self.options = options
        self._key = read_key()
        self._connections = Connections(address, self._key, options.timeout)
        self._model: ServedModel | None = None
        self._is_doubtful = False
        """Whether the server was away, so that another one may be there now."""
        self._doubt = threading.Lock()
        self._answered = monotonic()
        self._held_until = 0.0
        self.num_requests = 0
        """Number of requests that were answered."""
        self.num_repeats = 0
        """Number of times that a request was sent again."""

    def connect(self) -> ServedModel:
        """Return the model that the server runs, which all later answers must come from.

        Raises ServerError when the server is not there, or its list of models leaves open which one is meant.
        """
        self._model = self._identify(Call())
        return self._model

    def post(self, path: str, fields: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Return the server's answer to a request, a JSON object.

        Raises RequestRefused where this request will never be answered, ServerError where none will be, Cancelled.
        """
        body = json.dumps(fields).encode()
        started, failures, attempt = monotonic(), 0, 0
        while True:
            call.wait(max(0.0, self._held_until - monotonic()))
            retry_after: float | None = None
            try:
                self._check_model(call)
                answer = self._connections.exchange("POST", path, body, call)
                if answer.status == 200:
                    return self._take(answer)
                self._refuse(answer)
                fault, retry_after = f"status {answer.status}, {answer.message}", answer.retry_after
                failures += answer.status not in BUSY
            except TransportFault as error:
                self._is_doubtful = True
                if error.is_stale:
                    continue
                fault = str(error)
                failures += error.is_silent
            self.num_repeats += 1
            if failures >= MAX_FAILURES:
                raise RequestRefused(self._clean(f"failed {format_count(failures, 'time')}, last with {fault}"))
            wait = min(FIRST_WAIT * 2.0 ** min(attempt, 20), LONGEST_WAIT) * random.uniform(0.5, 1.0)
            away = monotonic() + (retry_after or 0.0) - max(started, self._answered)
            if away > self.options.patience:
                raise self._make_error(
                    f"has not answered for {self.options.patience:g} seconds ({fault}); start it again and go on with "
                    "--resume, or raise server.patience"
                )
            if retry_after is not None:
                self._held_until = max(self._held_until, monotonic() + retry_after)
            call.wait(max(wait, retry_after or 0.0))
            attempt += 1

    def _take(self, answer: Answer) -> dict[str, Any]:
        """Return the fields of an answer. Raises TransportFault on one that is no JSON object: it is torn."""
        try:
            fields = json.loads(answer.body)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            # what is torn the same way every time must end at some time
            raise TransportFault("an answer that is no JSON object", is_silent=True)
        self._answered = monotonic()
        self.num_requests += 1
        return fields

    def _refuse(self, answer: Answer) -> None:
        """Raise what a status means that is not worth another try; return on the others."""
        status = answer.status
        if status in (401, 403):
            has_key = "it was refused" if self._key else "none is set"
            raise self._make_error(
                f"asks for a key (status {status}): set {' or '.join(KEY_VARIABLES)} in the environment; {has_key}"
            )
        if status == 404:
            raise self._make_error(
                f"does not know the model or the path (status 404, {answer.message}); a URL ends with /v1"
            )
        if 300 <= status < 400:
            raise self._make_error(f"sends us to {quote(answer.headers.get('location'))}: give that URL, up to /v1")
        if status < 500 and status not in AGAIN:
            self._answered = monotonic()
            raise RequestRefused(self._clean(f"status {status}, {answer.message}"))

    def _check_model(self, call: Call) -> None:
        """Ask for the model again where the server was away. Raises ServerError where it is another one now."""
        if not self._is_doubtful or self._model is None:
            return
        with self._doubt:
            if not self._is_doubtful:
                return
            now = self._identify(call)
            if now != self._model:
                raise self._make_error(f"served {self._model} before and now serves {now}; start the first one again")
            self._is_doubtful = False

    def _identify(self, call: Call) -> ServedModel:
        """Return the model of the server now. Once it is known, raises TransportFault where nobody answers."""
        try:
            answer = self._list_models(call)
        except TransportFault as error:
            if self._model is not None:
                raise
            raise self._make_error(f"is not there ({error}): start it, or correct the URL") from None
        if answer.status != 200:
            if self._model is not None and answer.status >= 500:
                raise TransportFault(f"status {answer.status}")
            self._refuse_list(answer)
        try:
            listed = json.loads(answer.body)["data"]
            adapters = frozenset(fields["id"] for fields in listed if fields.get("parent") is not None)
            models = [_read_model(fields) for fields in listed]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._make_error("does not list its models as OpenAI's API does; a URL ends with /v1") from None
        return self._choose(models, adapters)

    def _list_models(self, call: Call) -> Answer:
        try:
            return self._connections.exchange("GET", "/models", None, call)
        except TransportFault as error:
            if not error.is_stale:
                raise
            return self._connections.exchange("GET", "/models", None, call)

    def _refuse_list(self, answer: Answer) -> None:
        try:
            self._refuse(answer)
        except RequestRefused as error:
            raise self._make_error(f"does not list its models ({error})") from None
        raise self._make_error(f"does not list its models (status {answer.status}, {answer.message})")

    def _choose(self, models: list[ServedModel], adapters: frozenset[str]) -> ServedModel:
        wanted = self.options.model_name
        chosen = [m for m in models if (m.name not in adapters if wanted is None else m.name == wanted)]
        if len(chosen) == 1:
            return chosen[0]
        names = ", ".join(quote(model.name) for model in models) or "no model"
        if wanted is None:
            raise self._make_error(f"serves {names}: name one with server.model_name")
        raise self._make_error(f"serves {names}, and server.model_name is {quote(wanted)}")

    def _make_error(self, text: str) -> ServerError:
        return ServerError(self._clean(f"the server {self.address.url} {text}"))

    def _clean(self, text: str) -> str:
        """Return a text without the key, which servers repeat in their messages."""
        return text if not self._key else text.replace(self._key, "***")


def read_key() -> str | None:
    """Return the API key from the environment; None without one. Raises ServerError on one that no header can hold."""
    for name in KEY_VARIABLES:
        key = os.environ.get(name, "").strip()
        if key:
            if not key.isascii() or not key.isprintable():
                raise ServerError(f"the environment variable {name} holds characters that no key has")
            return key
    return None


def _read_model(fields: Mapping[str, Any]) -> ServedModel:
    positions = fields.get("max_model_len")
    root = fields.get("root")
    return ServedModel(
        name=str(fields["id"]),
        root=root if isinstance(root, str) else None,
        positions=positions if isinstance(positions, int) and positions > 0 else None,
    )
