"""A server with OpenAI's completions API over a model of transformers, which can be told to fail."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from genssd.engine.texts.text import Tokenizer

NAME = "tiny"


@dataclass
class Manners:
    """How the server behaves; the defaults are those of vLLM."""

    ids: bool = True
    """Whether completions have token_ids, and tokens are named by their ids."""
    named_ids: bool = True
    """Whether tokens are named by their ids."""
    logprobs: bool = True
    same_noise: bool = False
    """Whether all completions of a request have the same noise."""
    after_temperature: bool = False
    """Whether log-probabilities are those after temperature and filters."""
    max_logprobs: int = 20
    key: str | None = None
    name: str = NAME
    root: str | None = None
    positions: int | None = 512
    adapters: tuple[str, ...] = ()
    takes_ids: bool = True
    together: int = 0
    """Number of requests that must be there at once before the first of them is answered."""
    seconds: float = 0.0
    """Time that every completion takes, beside what it takes to compute."""


@dataclass
class StubServer:
    """A server on a port of this machine, over one model. faults: what the next requests for completions get."""

    directory: Path
    model: Any
    manners: Manners = field(default_factory=Manners)
    faults: deque[str] = field(default_factory=deque)
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Fields of all requests for completions, those that got a fault included."""
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    kill_every: int = 0
    """Number of requests after which the server is killed and started again, at once; 0 for never."""
    num_kills: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer(self.directory)
        self.lock = threading.Lock()
        self.restarting = threading.Lock()
        self.num_at_once = 0
        self._http: _Http | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self._http = _Http(self, self.port)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        """Close the port and break all connections, whatever they wait for."""
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()
        self._http.break_connections()
        self._http = None

    def restart(self) -> None:
        """Kill the server and start it again on the same port."""
        with self.restarting:
            self.kill()
            self.num_kills += 1
            self.start()

    @contextmanager
    def running(self) -> Iterator[StubServer]:
        self.start()
        try:
            yield self
        finally:
            if self._http is not None:
                self.kill()

    def complete(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request for completions."""
        choices = [self._choice(fields, index) for index in range(fields["n"])]
        return {"object": "text_completion", "model": fields["model"], "choices": choices}

    @torch.no_grad()
    def _choice(self, fields: dict[str, Any], index: int) -> dict[str, Any]:
        generator = torch.Generator()
        if "seed" in fields:
            generator.manual_seed(fields["seed"] + (0 if self.manners.same_noise else index))
        else:
            generator.seed()
        ids, new = list(fields["prompt"]), []
        logprobs, tops, reason, stopped_by = [], [], "length", None
        stops = fields.get("stop") or []
        while len(new) < fields["max_tokens"]:
            with self.lock:
                raw = self.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            law = filtered(raw, fields)
            token = (
                int(law.argmax()) if fields["temperature"] == 0 else int(law.exp().multinomial(1, generator=generator))
            )
            told = law if self.manners.after_temperature else raw
            ids.append(token)
            new.append(token)
            logprobs.append(float(told[token]))
            top = told.topk(max(fields["logprobs"], 1))
            tops.append(
                {self._name(i): max(v, -9999.0) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
            )
            tops[-1].setdefault(self._name(token), float(told[token]))
            if token in fields["stop_token_ids"]:
                reason = "stop"
                break
            stopped_by = next((text for text in stops if text in self.tokenizer.hf.decode(new)), None)
            if stopped_by is not None:
                reason = "stop"
                break
        choice: dict[str, Any] = {
            "index": index,
            "text": self.tokenizer.hf.decode(new[:-1] if reason == "stop" and stopped_by is None else new),
            "finish_reason": reason,
            "stop_reason": stopped_by,
            "logprobs": {
                "tokens": [self._name(i) for i in new],
                "token_logprobs": logprobs,
                "top_logprobs": tops,
            },
        }
        if self.manners.ids:
            choice["token_ids"] = new
        if not self.manners.logprobs:
            choice["logprobs"] = None
        return choice

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.manners.named_ids else self.tokenizer.token_text(token)

    def models(self) -> dict[str, Any]:
        manners = self.manners
        first = {"id": manners.name, "root": manners.root, "parent": None, "max_model_len": manners.positions}
        return {"data": [first, *({"id": name, "parent": manners.name} for name in manners.adapters)]}


def filtered(logprobs: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities after temperature, top_k, top_p and min_p, [V]."""
    if fields["temperature"] == 0:
        return logprobs
    values = logprobs / fields["temperature"]
    if fields["top_k"] > 0:
        values = values.masked_fill(values < values.topk(fields["top_k"]).values[-1], -torch.inf)
    order = values.log_softmax(-1).exp().sort(descending=True)
    drop = order.values.cumsum(0) - order.values >= fields["top_p"]
    values = values.index_fill(0, order.indices[drop], -torch.inf)
    values = values.masked_fill(
        values.log_softmax(-1).exp() < fields["min_p"] * values.log_softmax(-1).exp().max(), -torch.inf
    )
    return values.log_softmax(-1)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, stub: StubServer, port: int) -> None:
        self.stub = stub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def break_connections(self) -> None:
        for connection in list(self.connections):
            reset(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that broke."""


def reset(connection: socket.socket) -> None:
    """Break a connection, so that the other side gets a reset instead of an end."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *values: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self._is_allowed():
            found = self.path == "/v1/models"
            self._send(200 if found else 404, self.server.stub.models() if found else {"error": {"message": "no path"}})

    def do_POST(self) -> None:
        stub = self.server.stub
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        with stub.lock:
            stub.requests.append(fields)
            is_last = stub.kill_every > 0 and len(stub.requests) % stub.kill_every == 0
            stub.num_at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.num_at_once)
            fault = stub.faults.popleft() if stub.faults else ""
        try:
            if is_last:
                stub.restart()
            else:
                self._answer(stub, fields, fault)
        finally:
            with stub.lock:
                stub.num_at_once -= 1

    def _answer(self, stub: StubServer, fields: dict[str, Any], fault: str) -> None:
        name, _, value = fault.partition(":")
        if name.isdecimal():
            self._send(int(name), {"error": {"message": f"fault {name}"}}, {"Retry-After": value} if value else {})
            return
        if name == "refuse":
            reset(self.connection)
            return
        if name == "silent":
            time.sleep(float(value))
            reset(self.connection)
            return
        if fields["logprobs"] > stub.manners.max_logprobs:
            self._send(400, {"error": {"message": f"logprobs above {stub.manners.max_logprobs}"}})
            return
        if not stub.manners.takes_ids:
            self._send(422, {"detail": "prompt must be text"})
            return
        if max(fields["prompt"]) >= stub.model.config.vocab_size:
            self._send(400, {"error": {"message": f"Token id {max(fields['prompt'])} is out of vocabulary"}})
            return
        deadline = time.monotonic() + 60.0
        while stub.most_at_once < stub.manners.together and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(stub.manners.seconds)
        reply = stub.complete(fields)
        spoil(reply, name)
        body = json.dumps(reply).encode()
        if name == "torn":  # a proxy that closed in good order
            body = body[: len(body) // 2]
        if name == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            reset(self.connection)
            return
        self._send(200, body)

    def _is_allowed(self) -> bool:
        stub = self.server.stub
        stub.keys.append(self.headers.get("Authorization"))
        if stub.manners.key is None or stub.keys[-1] == f"Bearer {stub.manners.key}":
            return True
        self._send(401, {"error": {"message": f"wrong key: {stub.keys[-1]}"}})
        return False

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def spoil(reply: dict[str, Any], fault: str) -> None:
    """Change an answer as a fault of a server would."""
    first = reply["choices"][0]
    if fault == "nan":
        first["logprobs"]["token_logprobs"][-1] = float("nan")
    elif fault == "none":
        first["logprobs"]["token_logprobs"][0] = None
    elif fault == "fewer":
        reply["choices"] = reply["choices"][1:]
    elif fault == "abort":
        first["finish_reason"] = "abort"
    elif fault == "empty":
        first["token_ids"] = []
        first["logprobs"] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    elif fault == "foreign":
        first["token_ids"][0] = 100_000
    elif fault == "form":
        del first["finish_reason"]
        first["finish_reason"] = "length"
        first["logprobs"]["token_logprobs"] = first["logprobs"]["token_logprobs"][:-1]
