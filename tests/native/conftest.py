"""Running a function in a forked child, so that what it closes stays closed there only."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

NOBODY = 65534


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its JSON value, or the exception's text, or the signal."""

    value: Any = None
    error: str = ""
    signal: int = 0
    code: int = 0
    core: bool = False

    def result(self) -> Any:
        assert not self.signal, f"the child died of {signal.Signals(self.signal).name}"
        assert not self.error, self.error
        assert self.code == 0
        return self.value


class Child:
    """A child that runs ``function(*args)``; as root it can become *uid* first."""

    def __init__(self, function: Callable[..., Any], *args: Any, uid: int | None = None) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            faulthandler.disable()  # children die of signals on purpose
            try:
                if uid is not None and os.getuid() == 0:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                answer: dict[str, Any] = {"value": function(*args)}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            try:
                os.write(writer, json.dumps(answer).encode())
            finally:
                os._exit(0)
        os.close(writer)
        self._reader = reader
        self._outcome: Outcome | None = None

    def wait(self, timeout: float = 30.0) -> Outcome:
        if self._outcome is not None:
            return self._outcome
        end = time.monotonic() + timeout
        data = b""
        while True:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self._outcome = Outcome(error="ran out of time", signal=signal.SIGKILL)
                raise AssertionError(f"the child did not end within {timeout} s")
            piece = os.read(self._reader, 65536)
            if not piece:
                break
            data += piece
        os.close(self._reader)
        _, status = os.waitpid(self.pid, 0)
        answer = json.loads(data) if data else {}
        self._outcome = Outcome(
            value=answer.get("value"),
            error=answer.get("error", ""),
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
            core=os.WCOREDUMP(status),
        )
        return self._outcome

    def kill(self) -> None:
        if self._outcome is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


@pytest.fixture
def start_child():
    """Start children that are killed at the end of the test if they still run."""
    children: list[Child] = []

    def start(function: Callable[..., Any], *args: Any, uid: int | None = None) -> Child:
        children.append(Child(function, *args, uid=uid))
        return children[-1]

    yield start
    for child in children:
        child.kill()


@pytest.fixture
def in_child(start_child):
    """Run a function in a child and return its :class:`Outcome`."""

    def run(function: Callable[..., Any], *args: Any, uid: int | None = None) -> Outcome:
        return start_child(function, *args, uid=uid).wait()

    return run


class Target:
    """A child that runs *prepare*, says that it is ready, and waits to be attacked."""

    def __init__(self, start: Callable[..., Child], prepare: Callable[[], Any], uid: int) -> None:
        ready, say_ready = os.pipe()
        held, self._release = os.pipe()

        def run() -> Any:
            os.close(self._release)
            value = prepare()
            os.write(say_ready, b"r")
            os.read(held, 1)
            return value

        self.child = start(run, uid=uid)
        self.pid = self.child.pid
        os.close(say_ready)
        os.close(held)
        try:
            if os.read(ready, 1) != b"r":
                raise AssertionError(self.child.wait())
        finally:
            os.close(ready)

    def end(self) -> Outcome:
        os.write(self._release, b"e")
        os.close(self._release)
        return self.child.wait()


@pytest.fixture
def start_target(start_child):
    """Start a :class:`Target` under a uid (as root), or under this user."""

    def start(prepare: Callable[[], Any], uid: int = NOBODY) -> Target:
        return Target(start_child, prepare, uid)

    return start
