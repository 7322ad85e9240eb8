"""Targets and attackers: an enclave, an unprotected process, programs of one or another user."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyenclave._native import drop_capabilities
from pyenclave.demo.attacks.outcome import Outcome
from pyenclave.host import Enclave
from pyenclave.image.build import build_script

OTHER_USER = 23456  # a user id that owns nothing on this machine
_PR_SET_DUMPABLE = 4

HOLDER = '''
import pyenclave
from pyenclave import trusted

held = []

@pyenclave.ecall
def hold(secret: bytes) -> int:
    """Keep a secret in ordinary memory of the worker."""
    held.append(bytearray(secret[::-1]))
    return len(held)
'''


@dataclass
class Target:
    """A process, and what it holds that nobody may find."""

    pid: int
    secret: bytes


def become(uid: int | None) -> None:
    """Make this (forked) process an ordinary program: no capabilities, perhaps another user."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if os.geteuid() == 0:
        drop_capabilities()


def in_child(action: Callable[[], Any], *, uid: int | None = None, privileged: bool = False) -> Any:
    """
    Run *action* in a forked child (as *uid*, without exec) and return its JSON-able answer.

    With *privileged* the child keeps what this process may do: a scanner needs that to read this
    process, where it runs with capabilities.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(readable)
            if not privileged:
                become(uid)
            os.write(writable, json.dumps(action()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writable)
    with open(readable, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the attacker's program broke"
    return json.loads(answer)


def run_attack(
    function: Callable[[dict[str, Any]], Outcome], target: Target, *, uid: int | None = None
) -> Outcome:
    """Run one attack as a program of its own."""
    order = {"pid": target.pid, "patterns": [target.secret.hex(), target.secret[::-1].hex()]}

    def run() -> tuple[str, str]:
        outcome = function(order)
        return outcome.outcome, outcome.detail

    return Outcome(*in_child(run, uid=uid))


@pytest.fixture
def attack() -> Callable[..., Outcome]:
    """``attack(function, target, uid=None)``: run one attack as a program of its own."""
    return run_attack


@pytest.fixture
def as_user() -> Callable[..., Any]:
    """``as_user(action, uid=None)``: run *action* in a forked child without capabilities."""
    return in_child


@pytest.fixture
def other_user() -> int:
    """The id of another user."""
    return OTHER_USER


@pytest.fixture
def need_root() -> None:
    """Another user can only be played by root."""
    if os.geteuid() != 0:
        pytest.skip("attacks by another user need root, to become that user")


@pytest.fixture
def state(used_state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own."""
    monkeypatch.setenv("PYENCLAVE_STATE", str(used_state))
    return used_state


@pytest.fixture(scope="session")
def holder(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The image of ``worker``."""
    script = tmp_path_factory.mktemp("holder") / "holder.py"
    script.write_text(HOLDER)
    return build_script(script)


@pytest.fixture
def worker(state: Path, holder: bytes) -> Iterator[Target]:
    """A worker that holds a secret."""
    with Enclave(holder) as enclave:
        secret = secrets.token_bytes(48)
        assert enclave.call("hold", secret) == 1
        yield Target(enclave.info.pid, secret)


def _plain(uid: int | None, folder: Path) -> tuple[Target, Callable[[], None]]:
    secret = secrets.token_bytes(48)
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become(uid)
            os.chdir(folder)
            # Changing the user makes a process undumpable; an ordinary login does not stay so.
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
            kept = bytearray(secret)
            held = os.memfd_create("table")
            os.write(held, bytes(kept))
            os.write(writable, b"x")
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(writable)
    os.read(readable, 1)
    os.close(readable)

    def end() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    return Target(pid, secret), end


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Target]:
    """An unprotected process of this user that holds a secret."""
    folder = tmp_path / "plain"
    folder.mkdir()
    target, end = _plain(None, folder)
    yield target
    end()


@pytest.fixture
def plain_of_other_user(need_root: None, tmp_path: Path) -> Iterator[Target]:
    """An unprotected process of the other user."""
    folder = tmp_path / "plain"
    folder.mkdir()
    os.chown(folder, OTHER_USER, OTHER_USER)
    for parent in [folder, *folder.parents][:-2]:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    target, end = _plain(OTHER_USER, folder)
    yield target
    end()
