"""What an enclave prints: kept of a debug enclave, nowhere of a production one."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyenclave._platform.debuglog import find_logs
from pyenclave._platform.state import State
from pyenclave.errors import EcallError, EnclaveLostError, LaunchError
from pyenclave.host import Enclave
from pyenclave.host.aio import AsyncEnclave
from pyenclave.host.pool import EnclavePool
from pyenclave.image.build import build
from pyenclave.image.keys import keygen
from pyenclave.image.sign import sign

pytestmark = pytest.mark.usefixtures("used_state")

PLANTED = "planted-" + os.urandom(8).hex()
ENTRY = f"""
import logging
import os
import sys
import warnings

import pyenclave

print("{PLANTED} while loading")

@pyenclave.ecall
def talk() -> None:
    print("{PLANTED} on stdout")
    print("{PLANTED} on stderr", file=sys.stderr)
    sys.__stderr__.write("{PLANTED} on the first stderr")
    os.write(1, b"{PLANTED} to descriptor 1\\n")
    os.write(2, b"{PLANTED} to descriptor 2\\n")
    logging.getLogger("scoring").debug("{PLANTED} in a record")
    logging.getLogger("scoring").error("{PLANTED} in an error record")
    warnings.warn("{PLANTED} in a warning")

@pyenclave.ecall
def fail() -> None:
    raise ValueError("{PLANTED} in an error")
"""
MANIFEST = """
[enclave]
name = "talking"
entry = "talking.py"
product_id = 1
security_version = 1
debug = true
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A signed image that may be launched either way."""
    folder = tmp_path_factory.mktemp("talking")
    (folder / "enclave.toml").write_text(MANIFEST)
    (folder / "talking.py").write_text(ENTRY)
    return sign(build(folder / "enclave.toml"), keygen())


def log_of(state: Path, enclave_id: bytes | None = None) -> str:
    """Return a log once its enclave has ended."""
    with State.open(str(state)) as opened:
        deadline = time.monotonic() + 20
        while any(log.running for log in find_logs(opened)) and time.monotonic() < deadline:
            time.sleep(0.02)
        found = [
            log
            for log in find_logs(opened)
            if enclave_id is None or log.enclave_id == enclave_id.hex()
        ]
        return found[0].read(opened).decode() if found else ""


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_debug_enclaves_output_is_kept(image: bytes, tmp_path: Path) -> None:
    with Enclave(image, debug=True, state=tmp_path / "state") as enclave:
        enclave.talk()
        enclave_id = enclave.info.enclave_id
    text = log_of(tmp_path / "state", enclave_id)
    for where in (
        "while loading",
        "on stdout",
        "on stderr",
        "to descriptor 1",
        "to descriptor 2",
        "in a record",
        "in an error record",
        "in a warning",
    ):
        assert f"{PLANTED} {where}" in text, where
    assert f"DEBUG scoring: {PLANTED} in a record" in text


def test_nothing_of_a_production_enclaves_output_reaches_anywhere(
    image: bytes, tmp_path: Path
) -> None:
    """Not the host's streams, not the platform's log, not a file of the state directory."""
    (tmp_path / "image").write_bytes(image)
    script = (
        "import sys\n"
        "from pyenclave.errors import EcallError\n"
        "from pyenclave.host import Enclave\n"
        "import logging\n"
        "logging.basicConfig(level=0)\n"
        "with Enclave(sys.argv[1], debug=False, state=sys.argv[2]) as enclave:\n"
        "    assert not enclave.info.debug\n"
        "    handle = enclave.options(correlation='req-1')\n"
        "    handle.talk()\n"
        "    try:\n"
        "        handle.fail()\n"
        "    except EcallError as error:\n"
        "        print(repr(error), error.id, error.type)\n"
        "    else:\n"
        "        sys.exit(3)\n"
    )
    arguments = [sys.executable, "-c", script, tmp_path / "image", tmp_path / "state"]
    done = subprocess.run(arguments, capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"ValueError" in done.stdout
    assert b"req-1" in done.stdout
    for place in (done.stdout, done.stderr, everything_in(tmp_path / "state")):
        assert PLANTED.encode() not in place
    with State.open(str(tmp_path / "state")) as state:
        assert find_logs(state) == []


def test_one_id_is_in_the_error_the_hosts_record_and_the_enclaves_log(
    image: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Enclave(image, debug=True, state=tmp_path / "state") as enclave:
        with pytest.raises(EcallError) as caught:
            enclave.fail()
        mine = enclave.options(correlation="req-123:a.b_c-9")
        mine.talk()
        with pytest.raises(EcallError) as chosen:
            mine.fail()
        enclave.talk()
    text = log_of(tmp_path / "state")
    assert re.fullmatch("[0-9a-f]{16}", caught.value.id)
    assert chosen.value.id == "req-123:a.b_c-9"
    assert "[req-123:a.b_c-9]" in str(chosen.value)
    for error in (caught.value, chosen.value):
        assert f"[{error.id}] a trusted function raised:\nTraceback" in text
    assert text.count(f"DEBUG scoring: [req-123:a.b_c-9] {PLANTED} in a record") == 1
    assert text.count(f"DEBUG scoring: {PLANTED} in a record") == 1
    records = [r for r in caplog.records if r.name == "pyenclave"]
    assert [r.correlation for r in records] == [caught.value.id, "req-123:a.b_c-9"]  # type: ignore[attr-defined]
    assert {r.levelno for r in records} == {logging.WARNING}
    assert all(PLANTED not in r.getMessage() and "fail" in r.getMessage() for r in records)


@pytest.mark.parametrize("wrong", ["", "x" * 65, "a b", "a\nb", "a\0", "é", "[x]", "\x1b"])
def test_a_correlation_id_is_short_and_plain(image: bytes, wrong: str) -> None:
    with pytest.raises(ValueError, match="correlation"):
        Enclave(image).options(correlation=wrong)
    with pytest.raises(TypeError, match="correlation"):
        Enclave(image).options(correlation=5)  # type: ignore[arg-type]


def test_a_lost_enclave_is_an_error_record_once(
    image: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Enclave(image, state=tmp_path / "state") as enclave:
        os.kill(enclave.info.pid, 9)
        for _ in range(3):
            with pytest.raises(EnclaveLostError):
                enclave.talk()
        assert enclave.stats.state == "lost"
    records = [r for r in caplog.records if r.name == "pyenclave"]
    assert [r.levelno for r in records] == [logging.ERROR]
    assert "talking is lost" in records[0].getMessage()


def test_why_an_entry_cannot_be_loaded_is_in_its_log(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "import pyenclave\n"
        "try:\n"
        "    open('/etc/passwd').close()\n"
        "except OSError:\n"
        f"    raise RuntimeError('{PLANTED} at the start') from None\n"
        "@pyenclave.ecall\n"
        "def nothing() -> None: pass\n"
    )
    with pytest.raises(LaunchError, match="at the start"):
        Enclave.from_file(script, quiet=True, state=tmp_path / "state").start()
    text = log_of(tmp_path / "state")
    assert "Traceback" in text
    assert f"{PLANTED} at the start" in text


def test_an_enclave_that_prints_without_end_holds_up_nobody(tmp_path: Path) -> None:
    script = tmp_path / "noisy.py"
    script.write_text(
        "import pyenclave\n"
        "@pyenclave.ecall\n"
        "def shout(count: int) -> int:\n"
        "    for number in range(count):\n"
        "        print(number, 'x' * 1000)\n"
        "    return count\n"
    )
    with Enclave.from_file(script, quiet=True, state=tmp_path / "state") as enclave:
        assert enclave.options(timeout=30).shout(5000) == 5000
    text = log_of(tmp_path / "state")
    assert len(text) < 400_000
    assert text.rstrip().endswith("4999 " + "x" * 1000)


def test_asyncio_and_pools_name_their_calls_alike(image: bytes, tmp_path: Path) -> None:
    async def one() -> str:
        async with AsyncEnclave(image, debug=True, state=tmp_path / "state") as enclave:
            with pytest.raises(EcallError) as caught:
                await enclave.options(correlation="req-async").fail()
            with pytest.raises(EcallError) as other:
                await enclave.fail()
            assert other.value.id != "req-async"
            return caught.value.id

    assert asyncio.run(one()) == "req-async"
    with (
        EnclavePool(image, size=1, debug=True, state=tmp_path / "state") as pool,
        pytest.raises(EcallError) as caught,
    ):
        pool.options(correlation="req-pool").call("fail")
    assert caught.value.id == "req-pool"
    with State.open(str(tmp_path / "state")) as state:
        text = b"".join(log.read(state) for log in find_logs(state)).decode()
    assert text.count("[req-async] a trusted function raised:") == 1
    assert text.count("[req-pool] a trusted function raised:") == 1


@pytest.mark.parametrize("debug", [True, False])
def test_a_breakpoint_to_which_nobody_comes_is_passed(
    tmp_path: Path, debug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a debug enclave it waits for a while and says so; in a production one it does nothing."""
    monkeypatch.setenv("PYENCLAVE_BREAKPOINT_WAIT", "0.1")
    (tmp_path / "enclave.toml").write_text(MANIFEST.replace("talking", "halting"))
    (tmp_path / "halting.py").write_text(
        "import pyenclave\n"
        "@pyenclave.ecall\n"
        "def halt() -> int:\n"
        "    breakpoint()\n"
        "    return 1\n"
        "@pyenclave.ecall\n"
        "def go_on() -> int:\n"
        "    return 2\n"
    )
    image = sign(build(tmp_path / "enclave.toml"), keygen())
    with Enclave(image, debug=debug, state=tmp_path / "state") as enclave:
        assert enclave.options(timeout=20).halt() == 1
        assert enclave.go_on() == 2
    assert ("nobody came" in log_of(tmp_path / "state")) is debug
