"""Calls that exceed their time are stopped in any thread; others are not touched."""

from __future__ import annotations

import os
import threading
import time

import pytest

from genssd.engine.common.time_limit import TimeLimitError, call_within


def spin(seconds: float) -> str:
    """Compute for so many seconds of the thread's own time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "done"


def test_an_endless_call_is_stopped() -> None:
    with pytest.raises(TimeLimitError, match=r"^the template takes more than 0\.1 seconds$"):
        call_within(0.1, "the template", lambda: spin(30))
    assert spin(0.6) == "done"


def test_a_filter_that_catches_all_exceptions_does_not_catch_it() -> None:
    def stubborn() -> str:
        try:
            return spin(30)
        except Exception:
            return "caught"

    with pytest.raises(TimeLimitError):
        call_within(0.1, "x", stubborn)


def test_a_call_in_time_returns_and_raises_as_without_a_limit() -> None:
    assert call_within(5, "x", lambda: "text") == "text"
    with pytest.raises(ZeroDivisionError):
        call_within(5, "x", lambda: 1 // 0)


def test_waiting_is_not_computing() -> None:
    assert call_within(0.2, "x", lambda: time.sleep(0.8)) is None  # type: ignore[func-returns-value]


def test_threads_have_limits_of_their_own() -> None:
    results: dict[str, object] = {}

    def run(name: str, limit: float, seconds: float) -> None:
        try:
            results[name] = call_within(limit, name, lambda: spin(seconds))
        except TimeLimitError as error:
            results[name] = str(error)

    threads = [
        threading.Thread(target=run, args=arguments)
        for arguments in (("short", 5.0, 0.3), ("long", 0.1, 30.0), ("fine", 30.0, 0.8))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"short": "done", "long": "long takes more than 0.1 seconds", "fine": "done"}


def test_a_forked_process_has_limits_of_its_own() -> None:
    call_within(5, "x", lambda: "started")
    pid = os.fork()
    if pid == 0:  # the exit code tells how it went
        code = 1
        try:
            call_within(0.1, "x", lambda: spin(30))
        except TimeLimitError:
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_an_exception_never_arrives_after_its_call() -> None:
    """Calls that end just as their time does either return or raise, and nothing follows."""
    ended = 0
    for i in range(12):
        try:
            ended += call_within(0.02, "x", lambda i=i: spin(0.2 + 0.01 * i)) == "done"  # type: ignore[misc]
        except TimeLimitError:
            ended += 1
        spin(0.01)
    assert ended == 12
