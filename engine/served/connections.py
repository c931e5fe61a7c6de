"""HTTP exchanges with one server, over connections that stay open, and calls that another thread can give up."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from genssd.engine.checkpoints.address import Address
from genssd.engine.common.quoting import one_line

CONNECT_SECONDS = 10.0
"""Number of seconds that a connection may take to be made."""


class TransportFault(Exception):
    """An exchange that ended without a whole answer: nobody listens, the connection broke, or time ran out.

    is_silent: whether the server took the request and did not answer in time. is_stale: whether the connection had been
    idle, so that its end says nothing of this request: servers close those at some time.
    """

    def __init__(self, text: str, *, is_silent: bool = False, is_stale: bool = False) -> None:
        super().__init__(text)
        self.is_silent = is_silent
        self.is_stale = is_stale


class Cancelled(Exception):
    """A call that was given up."""


class Call:
    """A request that may be given up by another thread while it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given_up = threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    def cancel(self) -> None:
        """Give the request up: its connection is closed, by which servers learn that nobody waits any more."""
        self._given_up.set()
        with self._lock:
            if self._connection is not None and self._connection.sock is not None:
                with suppress(OSError):  # it is closed already
                    self._connection.sock.shutdown(socket.SHUT_RDWR)

    @property
    def is_cancelled(self) -> bool:
        """Whether the request was given up."""
        return self._given_up.is_set()

    def wait(self, seconds: float) -> None:
        """Wait, unless the call is given up meanwhile. Raises Cancelled then."""
        if self._given_up.wait(seconds):
            raise Cancelled

    def hold(self, connection: http.client.HTTPConnection | None) -> None:
        """Note the connection that the request uses now; None when it uses none any more. Raises Cancelled."""
        with self._lock:
            self._connection = connection
        if connection is not None and self.is_cancelled:
            raise Cancelled


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer of a server to one request."""

    status: int
    headers: Mapping[str, str]
    """Header fields by their names in lower case."""
    body: bytes

    @property
    def retry_after(self) -> float | None:
        """Number of seconds after which the server asks to be tried again; None where it says nothing usable."""
        text = self.headers.get("retry-after", "").strip()
        if text.isdecimal():
            return float(text)
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            return None

    @property
    def message(self) -> str:
        """What the server says about an error, on one line."""
        try:
            fields = json.loads(self.body)
        except (ValueError, RecursionError):
            fields = None
        for name in ("error", "message", "detail"):
            if isinstance(fields, dict) and fields.get(name):
                fields = fields[name]
        text = fields if isinstance(fields, str) else self.body.decode(errors="replace")
        return one_line(Exception(text)) if text.strip() else "no message"


class Connections:
    """The open connections to a server, each used by one thread at a time.

    key: the API key; None for a server without one. timeout: seconds without a byte after which an exchange fails.
    """

    def __init__(self, address: Address, key: str | None, timeout: float) -> None:
        self._address = address
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def exchange(self, method: str, path: str, body: bytes | None, call: Call) -> Answer:
        """Send one request and return the answer. Raises TransportFault without one, Cancelled when it is given up."""
        with self._lock:
            reused = self._idle.pop() if self._idle else None
        if reused is None:
            return self._try(self._open(), method, path, body, call)
        try:
            return self._try(reused, method, path, body, call)
        except TransportFault as fault:
            if fault.is_silent:
                raise
            with self._lock:
                stale, self._idle = self._idle, []
            for connection in stale:
                connection.close()
            raise TransportFault(str(fault), is_stale=True) from None

    def _open(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        return kind(self._address.host, self._address.port, timeout=CONNECT_SECONDS)

    def _try(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, call: Call
    ) -> Answer:
        is_sent = False
        try:
            call.hold(connection)
            if connection.sock is None:
                connection.connect()
                call.hold(connection)  # raises where it was given up while the connection was made
            connection.sock.settimeout(self._timeout)
            connection.request(method, f"{self._address.path}{path}", body, self._headers)
            is_sent = True
            response = connection.getresponse()
            answer = Answer(
                status=response.status,
                headers={name.lower(): value for name, value in response.getheaders()},
                body=response.read(),
            )
        except (OSError, http.client.HTTPException, Cancelled) as error:
            connection.close()
            if call.is_cancelled:
                raise Cancelled from None
            is_silent = is_sent and isinstance(error, TimeoutError)
            text = f"no byte in {self._timeout:g} seconds" if is_silent else one_line(error)
            raise TransportFault(text, is_silent=is_silent) from None
        finally:
            call.hold(None)
        if response.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append(connection)
        return answer
