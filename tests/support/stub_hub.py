"""A hub of models on this machine: the requests that sending a model makes, answered as the Hugging Face hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stub"


@dataclass
class StubHub:
    """What the hub was asked and holds."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by their names, of every repository."""
    private: dict[str, bool] = field(default_factory=dict)
    writable: bool = True
    """Whether the token may make repositories."""
    takes_commits: bool = True

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON of an answer."""
        path = path.split("?")[0]
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user", "auth": {}}
        if (method, path) == ("POST", "/api/repos/create"):
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        _, _, _, owner, name, *action = path.split("/")
        repository = f"{owner}/{name}"
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        if method == "POST" and action[0] == "preupload":
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if method == "POST" and action[0] == "commit":
            return self._commit(repository, body)
        return 200, {"id": repository, "sha": "0" * 40, "siblings": [], "private": True}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        repository = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if not self.writable:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if repository in self.repositories:
            return 409, {"url": f"{self.url}/{repository}", "error": "You already created this model repo"}
        self.repositories[repository] = {}
        self.private[repository] = wanted.get("private") is True or wanted.get("visibility") == "private"
        return 200, {"url": f"{self.url}/{repository}", "id": repository, "name": repository}

    def _commit(self, repository: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if not self.takes_commits:
            return 400, {"error": "the repository is full"}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.repositories[repository][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.url}/{repository}"
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{url}/commit/{'1' * 40}", "hookOutput": ""}


@contextmanager
def run_stub_hub() -> Iterator[StubHub]:
    """Serve a hub on a port of this machine while the block runs."""
    hub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = hub.answer(self.command, self.path, body, self.headers.get("Authorization"))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _respond

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
