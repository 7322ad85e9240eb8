"""
Attackers X1 (another user) and X2 (this user, later) against A1, plaintext in the worker.

Threat catalogue A.3: both are refused. Each attack is also shown to succeed on a process without
protection, so that a refusal means something.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyenclave.demo.attacks import memory

pytestmark = pytest.mark.attack
NAMES = sorted(memory.ATTACKS)
Attack = Callable[..., Any]


@pytest.mark.parametrize("name", NAMES)
def test_X2_a_later_program_of_this_user_cannot_read_the_worker(
    name: str, attack: Attack, worker: Any
) -> None:
    """Same user, first after the worker is up."""
    outcome = attack(memory.ATTACKS[name], worker)
    assert outcome.outcome == "refused", outcome.detail


@pytest.mark.parametrize("name", NAMES)
def test_X2_the_same_program_reads_an_unprotected_process(
    name: str, attack: Attack, plain: Any
) -> None:
    """The attack works where nothing stops it."""
    outcome = attack(memory.ATTACKS[name], plain)
    assert outcome.outcome == "succeeded", outcome.detail


@pytest.mark.parametrize("name", NAMES)
def test_X1_another_user_cannot_read_the_worker(
    name: str, need_root: None, attack: Attack, other_user: int, worker: Any
) -> None:
    """Another user's program, without privileges."""
    outcome = attack(memory.ATTACKS[name], worker, uid=other_user)
    assert outcome.outcome == "refused", outcome.detail


@pytest.mark.parametrize("name", NAMES)
def test_X1_the_same_program_reads_a_process_of_its_own_user(
    name: str, attack: Attack, other_user: int, plain_of_other_user: Any
) -> None:
    """What stops X1 is the difference of users: without it the attack works."""
    outcome = attack(memory.ATTACKS[name], plain_of_other_user, uid=other_user)
    assert outcome.outcome == "succeeded", outcome.detail


def test_PRC_12_a_worker_that_was_made_to_crash_leaves_no_core_file(
    attack: Attack, worker: Any, tmp_path: Path
) -> None:
    """A crash writes nothing, anywhere that this test can see."""
    attack(memory.core_dump, worker)
    deadline = time.monotonic() + 2
    while Path(f"/proc/{worker.pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for folder in (tmp_path, Path.cwd(), Path("/")):
        assert not list(folder.glob("core*.[0-9]*")), folder
        assert not os.path.isfile(folder / "core")
