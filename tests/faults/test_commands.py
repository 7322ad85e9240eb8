"""Every command with bad input: exit code 1 or 2, one JSON object under --json, no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pyenclave.cli import main

COMMANDS = (
    *("doctor", "keygen", "build", "sign", "inspect", "diff", "run", "evidence", "verify"),
    *("seal", "unseal", "info", "bench", "demo", "ps", "kill"),
)


@pytest.fixture(scope="session")
def folder(images: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files; the working directory of the commands."""
    place = tmp_path_factory.mktemp("commands")
    (place / "good.enclave").write_bytes(images.signed)
    (place / "unsigned.enclave").write_bytes(images.unsigned)
    (place / "cut.enclave").write_bytes(images.signed[:-1])
    (place / "empty").write_bytes(b"")
    (place / "garbage").write_bytes(os.urandom(3000))
    (place / "text").write_text("\x1b[31mthis is text\n" * 100)
    (place / "broken.toml").write_text("[enclave\n")
    (place / "lacking.toml").write_text('[enclave]\nname = "x"\n')
    (place / "odd.toml").write_text('[enclave]\nname = "x"\nentry = "plain.py"\nthreads = -1\n')
    (place / "syntax.py").write_text("def f(:\n")
    (place / "plain.py").write_text("x = 1\n")
    (place / "raising.py").write_text("raise RuntimeError('at import')\n")
    (place / "folder").mkdir()
    short = rsa.generate_private_key(65537, 2048)
    (place / "short.pem").write_bytes(
        short.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return place


# Command line → exit code (None: either).
CASES: list[tuple[str, int | None]] = [
    ("", 2),
    ("nonsense", 2),
    *((f"{name} --no-such-option", 2) for name in COMMANDS),
    *((f"{name} one two three four five", 2) for name in ("doctor", "ps", "demo", "keygen")),
    ("keygen -o garbage", 2),
    ("keygen -o missing/key.pem", 2),
    ("keygen -o folder", 2),
    ("build missing.toml", 2),
    ("build missing.py", None),
    ("build folder", 2),
    ("build broken.toml", 2),
    ("build lacking.toml", 2),
    ("build odd.toml", 2),
    ("build garbage", 2),
    ("build syntax.py", None),
    ("build raising.py", None),
    ("build plain.py", None),
    ("build good.enclave", 2),
    ("build plain.py --lock garbage", None),
    ("sign good.enclave", 2),
    ("sign garbage --key short.pem", None),
    ("sign unsigned.enclave --key missing.pem", 2),
    ("sign unsigned.enclave --key garbage", None),
    ("sign unsigned.enclave --key short.pem", None),
    ("sign unsigned.enclave --signature garbage", None),
    ("sign missing --digest-out d", 2),
    *((f"inspect {name}", None) for name in ("missing", "empty", "garbage", "folder", "text")),
    ("inspect cut.enclave", 1),
    ("inspect /dev/null", None),
    ("inspect a\0b", 2),
    ("diff good.enclave missing", 2),
    ("diff good.enclave garbage", None),
    ("diff good.enclave", 2),
    ("run missing f", None),
    ("run garbage f", None),
    ("run cut.enclave double 1", 1),
    ("run folder f", None),
    ("run missing.py f", None),
    ("run syntax.py f", None),
    ("run good.enclave", 2),
    ("run good.enclave nothing", 2),
    ("run good.enclave double", 2),
    ("run good.enclave double one", 2),
    ("run good.enclave double 1.5", 2),
    ("run good.enclave double 1 2", 2),
    ("run good.enclave double 99999999999999999999999", 2),
    ("run good.enclave double [[[[[[[[[[", 2),
    ("run good.enclave double NaN", 2),
    ("run good.enclave total [[1],[2,3]]", 2),
    ("run good.enclave total text", 2),
    ("run good.enclave total {}", 2),
    ("run good.enclave fail x", 1),
    ("run good.enclave vanish", 1),
    ("run good.enclave nap 5 --timeout 0.05", 1),
    ("run good.enclave double 1 --timeout nan", 2),
    ("run good.enclave double 1 --timeout=-1", 2),
    ("run good.enclave double 1 --timeout 0", 2),
    ("run good.enclave double 1 --timeout soon", 2),
    ("evidence", 2),
    ("evidence --nonce zz -o e", 2),
    ("evidence --nonce 123 -o e", 2),
    *((f"verify {name}", 2) for name in ("missing", "empty", "garbage", "folder", "text")),
    ("verify good.enclave", 2),
    ("verify garbage --nonce zz", 2),
    ("verify garbage --at yesterday", 2),
    ("verify garbage --at 2026-01-01T00:00:00", 2),
    ("verify garbage --policy missing.toml", 2),
    ("verify garbage --policy garbage", 2),
    ("verify garbage --policy lacking.toml", 2),
    ("verify garbage --root garbage", 2),
    ("verify garbage --root missing", 2),
    ("verify garbage --report-data 00", 2),
    ("seal missing", 2),
    ("seal text --policy everybody", 2),
    ("seal text -o garbage", 2),
    ("unseal missing.sealed", 2),
    ("unseal garbage -o x", None),
    ("unseal garbage", None),
    ("unseal empty -o x", None),
    *((f"info {name}", 2) for name in ("missing", "empty", "garbage", "folder", "good.enclave")),
    ("bench no_such_row", 2),
    ("demo --rows -1", 2),
    ("demo --rows=-1", 2),
    ("demo --rows many", 2),
    ("kill", 2),
    ("kill nobody", 1),
    ("kill --all nobody", 1),
]


@pytest.fixture(scope="module")
def warm(images: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A platform with a zygote for all commands of this module."""
    from pyenclave.host import Enclave

    place = tmp_path_factory.mktemp("warm") / "state"
    with Enclave(images.signed, quiet=True, state=place):
        yield place


@pytest.mark.parametrize(
    ("line", "code"), CASES, ids=[line.replace("\0", "0") for line, _ in CASES]
)
def test_bad_input_is_one_json_object_and_no_traceback(
    warm: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    code: int | None,
) -> None:
    monkeypatch.setenv("PYENCLAVE_STATE", str(warm))
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    for words in ([*line.split(" "), "--json"] if line else ["--json"], line.split()):
        monkeypatch.setattr(sys, "argv", ["pyenclave"])
        begin = time.monotonic()
        try:
            exit_code = main(words)
        except SystemExit as end:
            exit_code = end.code  # type: ignore[assignment]
        seconds = time.monotonic() - begin
        out, err = capsys.readouterr()
        assert exit_code == code or (code is None and exit_code in (1, 2)), (exit_code, out, err)
        assert "Traceback" not in err
        assert "\x1b" not in err
        assert seconds < 60
        if "--json" in words:
            answer = json.loads(out)
            assert isinstance(answer, dict)
            if "error" in answer:
                assert set(answer["error"]) >= {"code", "message"}
                assert re.fullmatch(r"[a-z_.]+", answer["error"]["code"])
                assert answer["error"]["message"]
            else:
                assert line.startswith(("verify", "kill"))
        else:
            assert err or line.startswith("kill")
    assert sorted(os.listdir(folder)) == before, "a failing command left a file"


def run(arguments: list[str], state: Path, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pyenclave", *arguments],
        env={**os.environ, "PYENCLAVE_STATE": str(state)},
        stderr=subprocess.PIPE,
        **options,
    )


def test_the_command_itself_prints_no_traceback(warm: Path, folder: Path) -> None:
    """As above, by the real program, whose last words the tests above do not hear."""
    with run(["inspect", "garbage", "--json"], warm, stdout=subprocess.PIPE, cwd=folder) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode in (1, 2)
    assert "error" in json.loads(out)
    assert b"Traceback" not in err


@pytest.mark.parametrize("place", ["/dev/full", "pipe", "closed"])
def test_an_output_that_takes_nothing_is_no_traceback(warm: Path, folder: Path, place: str) -> None:
    arguments = ["inspect", "--json", "good.enclave"]
    if place == "closed":
        process = run(arguments, warm, cwd=folder, preexec_fn=lambda: os.close(1))
    elif place == "pipe":
        read, write = os.pipe()
        os.close(read)
        process = run(arguments, warm, cwd=folder, stdout=write)
        os.close(write)
    else:
        with open(place, "wb") as full:
            process = run(arguments, warm, cwd=folder, stdout=full)
    with process:
        _, err = process.communicate(timeout=60)
    assert process.returncode in (1, 2), err
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


def test_an_interrupted_command_ends_soon_and_says_so(
    warm: Path, folder: Path, helpers: Any
) -> None:
    arguments = ["run", "--json", "good.enclave", "nap", "30"]
    with run(arguments, warm, stdout=subprocess.PIPE, cwd=folder) as process:
        from pyenclave._platform.client import PlatformClient

        with PlatformClient.connect(warm) as platform:
            helpers.until(
                lambda: any(e.host_pid == process.pid for e in platform.list()), 20, "its enclave"
            )
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 20  # the call would take 30 s
    assert process.returncode == 2
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert b"Traceback" not in err


@pytest.mark.parametrize("command", ["doctor", "run good.enclave double 1", "seal text -o out"])
def test_a_state_in_disorder_is_named(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    place = tmp_path / "state"
    place.write_text("a file")
    monkeypatch.setenv("PYENCLAVE_STATE", str(place))
    monkeypatch.chdir(folder)
    assert main([*command.split(), "--json"]) in (1, 2)
    out, err = capsys.readouterr()
    assert str(place) in json.dumps(json.loads(out))
    assert "Traceback" not in err


def test_kill_ends_the_enclave_that_is_named_and_no_other(
    warm: Path,
    images: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    helpers: Any,
) -> None:
    from pyenclave.errors import EnclaveLostError
    from pyenclave.host import Enclave

    monkeypatch.setenv("PYENCLAVE_STATE", str(warm))
    lost: Callable[[], Any]
    with Enclave(images.signed, quiet=True) as one, Enclave(images.signed, quiet=True) as other:
        assert main(["ps", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["enclaves"]
        assert {one.info.pid, other.info.pid} <= {row["pid"] for row in rows}
        assert main(["kill", "--json", one.info.enclave_id.hex()[:12]]) == 0
        assert json.loads(capsys.readouterr().out)["killed"] == [one.info.enclave_id.hex()]
        lost = lambda: one.call("double", 1)  # noqa: E731
        with pytest.raises(EnclaveLostError):
            lost()
        assert other.call("double", 4) == 8
        assert main(["kill", "--json", one.info.enclave_id.hex()]) == 1
        capsys.readouterr()
