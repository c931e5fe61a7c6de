"""A real browser without a window: Chromium over its debugging pipe, without any package.

The protocol is that of https://chromedevtools.github.io/devtools-protocol: JSON messages that end with a null byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 30.0
"""Time that the browser has for an answer."""
FIRST_FREE = 10
"""Smallest number of our ends of the pipes, above the two that the browser reads and writes: 3 and 4."""


def find_browser() -> str | None:
    """Return the path of an installed Chromium; None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page of the browser. `problems`: console errors and exceptions. `requests`: addresses that it asked for."""

    def __init__(self, executable: str, profile: Path) -> None:
        ours, self._write = _make_pipe()
        self._read, theirs = _make_pipe()
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        command = [
            "bash", "-c", f'exec "$0" "$@" 3<&{ours} 4>&{theirs}', executable, *flags, f"--user-data-dir={profile}",
            "--remote-debugging-pipe", "--hide-scrollbars", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, pass_fds=(ours, theirs), stderr=subprocess.DEVNULL)
        os.close(ours)
        os.close(theirs)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._note(answer)

    def open(self, path: Path) -> None:
        """Open a file and wait until its script is ready."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; of a promise, what it becomes."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} does not become true: {self.problems}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press and release a key, such as "j", "Enter" or "ArrowDown"."""
        codes = {"Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Escape": 27}
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        more = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", **more, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    def hover(self, selector: str) -> None:
        """Move the pointer to the middle of the first element of a selector."""
        x, y = self.run(
            f"(async () => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'});"
            "for (let i = 0; i < 2; i += 1) await new Promise(requestAnimationFrame);"  # scrolling hides the tooltip
            "const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def resize(self, width: int, height: int, *, dark: bool = False, media: str = "") -> None:
        """Set the window's size, its colours and the medium ("print", or "" for the screen)."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def photograph(self, path: Path, *, full: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(timeout=SECONDS)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], SECONDS)
            assert ready, "the browser does not answer"
            content = os.read(self._read, 1 << 20)
            assert content, "the browser has ended"
            self._buffer += content
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(parameters["args"]))
        elif event.get("method") == "Log.entryAdded":
            self.problems.append(parameters["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


@contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """Start a browser for the block, with a new profile in a directory."""
    executable = find_browser()
    assert executable is not None
    page = Page(executable, profile)
    try:
        yield page
    finally:
        page.close()


def _make_pipe() -> tuple[int, int]:
    """Return the reading and the writing end of a pipe, with numbers that the browser's own do not meet."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]
