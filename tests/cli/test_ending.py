"""What is left of a command that was told to end: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pyenclave.cli

PLACE = Path(pyenclave.cli.__file__).resolve().parents[2]

# A command that has a folder, a file on its way to its place and a child, and goes on for ever.
COMMAND = """
import os, signal, subprocess, sys, tempfile, time
from pyenclave.cli import main, processes
from pyenclave.cli._place import aside
import pyenclave.cli._place as place

# Each does what it does by itself, whatever the tests were started with.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if number == int(sys.argv[2]) else signal.SIG_DFL)
place._nameless = lambda *_: None  # as on file systems without such files

def busy(args):
    here = os.open(os.environ["TMPDIR"], os.O_RDONLY)
    with tempfile.TemporaryDirectory() as folder, aside(here, "out", force=False) as fd:
        os.write(fd, b"half")
        try:
            code = "print('ready', flush=True); import time; time.sleep(600)"
            child = [sys.executable, "-c", code]
            subprocess.run(child, stdout=int(sys.argv[1]), check=False)
        finally:
            if sys.argv[3:] == ["slow"]:
                os.write(int(sys.argv[1]), b"cleaning\\n")
                time.sleep(600)
    return 0

processes._ps = busy
json = ["--json"] if sys.argv[3:] == ["json"] else []
sys.exit(main(["ps", *json]))
"""


class Running:
    """The command, once its child runs."""

    def __init__(self, tmp_path: Path, *words: str, ignored: int | None = None) -> None:
        reader, writer = os.pipe()
        self.words = os.fdopen(reader)
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(writer), str(int(ignored or 0)), *words],
            pass_fds=(writer,),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(PLACE)},
        )
        os.close(writer)
        assert self.words.readline() == "ready\n"

    def ends(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        assert self.words.read() == ""  # its child ended too: nobody has the other end
        self.words.close()
        return self.process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_and_ends_the_process_as_it_would_have(tmp_path, number) -> None:
    running = Running(tmp_path)
    assert len(os.listdir(tmp_path)) == 2  # the folder, and the file under another name
    running.process.send_signal(number)
    code, out, err = running.ends()
    assert os.listdir(tmp_path) == []
    assert code == -number
    assert out == ""
    assert err == f"pyenclave: error [interrupted]: ended by {number.name}\n"


def test_so_does_ctrl_c(tmp_path) -> None:
    running = Running(tmp_path)
    running.process.send_signal(signal.SIGINT)
    code, out, err = running.ends()
    assert os.listdir(tmp_path) == []
    assert (code, out) == (2, "")
    assert err == "pyenclave: error [interrupted]: interrupted\n"


def test_json_has_its_one_object(tmp_path) -> None:
    running = Running(tmp_path, "json")
    running.process.terminate()
    code, out, _ = running.ends()
    assert code == -signal.SIGTERM
    wanted = {"error": {"code": "interrupted", "message": "ended by SIGTERM"}}
    assert json.loads(out) == wanted


def test_a_second_signal_waits_for_nothing(tmp_path) -> None:
    running = Running(tmp_path, "slow")
    running.process.terminate()
    assert running.words.readline() == "cleaning\n"
    running.process.terminate()
    code, _, err = running.ends()
    assert code == -signal.SIGTERM
    assert err == ""


def test_what_is_ignored_stays_ignored(tmp_path) -> None:
    """As nohup has it."""
    running = Running(tmp_path, ignored=signal.SIGHUP)
    running.process.send_signal(signal.SIGHUP)
    running.process.send_signal(signal.SIGTERM)
    code, _, err = running.ends()
    assert code == -signal.SIGTERM
    assert "SIGTERM" in err
    assert os.listdir(tmp_path) == []


def test_a_terminal_that_is_gone_changes_nothing(tmp_path) -> None:
    running = Running(tmp_path)
    assert running.process.stderr is not None
    running.process.stderr.close()
    running.process.stderr = None
    running.process.send_signal(signal.SIGHUP)
    code, _, _ = running.ends()
    assert code == -signal.SIGHUP
    assert os.listdir(tmp_path) == []
