"""`pyenclave serve platform`: a platform that stays, whoever comes and goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyenclave
from pyenclave._platform.client import PlatformClient
from pyenclave.cli import main, serve_platform
from pyenclave.errors import PlatformUnavailableError

pytestmark = pytest.mark.usefixtures("used_state")

ENTRY = """
import pyenclave

@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x
"""


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    path = tmp_path / "doubling.py"
    path.write_text(ENTRY)
    return path


@pytest.fixture
def served(entry: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "pyenclave", "serve", "platform", "--warm", str(entry)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


ASKING = """
import pyenclave
@pyenclave.ocall
def price(x: int) -> int: ...

@pyenclave.ecall
def double(x: int) -> int:
    return price(x)
"""


def platform_pid() -> int | None:
    try:
        with PlatformClient.connect(start=False) as client:
            return client.hello.pid
    except PlatformUnavailableError:
        return None


def test_the_platform_outlives_its_guests_comes_back_and_ends_with_its_keeper(
    served: subprocess.Popen[str], entry: Path
) -> None:
    line = json.loads(served.stdout.readline())
    assert {"url", "ca", "token", "pid", "level", "ephemeral"} == set(line)
    assert Path(line["url"].removeprefix("unix:")).is_socket()
    assert b"CERTIFICATE" in Path(line["ca"]).read_bytes()
    with pyenclave.Enclave.from_file(entry, quiet=True) as enclave:
        assert enclave.double(4) == 8
    time.sleep(1.5)  # longer than a platform without hosts stays
    assert platform_pid() == line["pid"]

    os.kill(line["pid"], signal.SIGKILL)
    assert "had ended" in served.stderr.readline()
    again = platform_pid()
    assert again not in (None, line["pid"])

    served.send_signal(signal.SIGTERM)
    assert served.wait(20) == 0
    deadline = time.monotonic() + 30
    while platform_pid() is not None:
        assert time.monotonic() < deadline
        time.sleep(1.2)  # to ask is to be a host of it, for which it stays a second


@pytest.mark.parametrize(
    "arguments",
    [
        ["platform", "--port", "1"],
        ["platform", "--port", "0"],
        ["platform", "--config", "a"],
        ["platform", "--tokens-once"],
        ["vault", "--dev", "--warm", "a.enclave"],
    ],
)
def test_options_of_another_service_are_refused(
    arguments: list[str], entry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments, "--json"]) == 2
    assert "--" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_an_image_that_is_not_there_is_told_before_anything_is_ready(
    entry: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main(["serve", "platform", "--warm", str(tmp_path / "missing.enclave")]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    assert out == ""
    assert "missing.enclave" in err


def test_an_image_with_host_functions_is_kept_at_hand(entry: Path) -> None:
    entry.write_text(ASKING)
    serve_platform._begin([str(entry)]).close()
