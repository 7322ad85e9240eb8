"""A process of the same user, or root, that has a Python run a script of its own (PEP 768)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyenclave._platform.client import PlatformClient

pytestmark = [
    pytest.mark.attack,
    pytest.mark.skipif(
        not getattr(sys, "is_remote_debug_enabled", bool)(),
        reason="this Python runs no scripts of other processes",
    ),
]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "theirs.py"
    path.write_text(f"import os\nopen({str(tmp_path)!r} + f'/ran-{{os.getpid()}}', 'w').close()\n")
    return path


def test_X2_an_ordinary_python_runs_it(script: Path) -> None:
    """The same call works where nobody keeps it away."""
    loop = "import time\nprint(flush=True)\nwhile True: time.sleep(0.01)"
    with subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            sys.remote_exec(process.pid, str(script))
            deadline = time.monotonic() + 20
            while not script.with_name(f"ran-{process.pid}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()


def test_X2_neither_platform_nor_zygote_nor_worker_runs_it(
    worker: Any, as_user: Callable[..., Any], script: Path
) -> None:
    with PlatformClient.connect(start=False) as client:
        platform, zygote = client.hello.pid, parent_of(worker.pid)
        assert parent_of(zygote) == platform

        def results() -> list[str]:
            found = []
            for pid in (platform, zygote, worker.pid):
                try:
                    sys.remote_exec(pid, str(script))
                    found.append("accepted")
                except (RuntimeError, PermissionError) as error:
                    found.append(f"{type(error).__name__}: {error}")
            return found

        assert all(line.startswith("PermissionError") for line in as_user(results))
        if os.geteuid() == 0:
            # It reads what they say. A process in which it finds no Python has another error.
            for line in results():
                assert line.startswith("RuntimeError: Remote debugging is not enabled"), line
