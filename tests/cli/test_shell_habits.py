"""What shells do to commands: outputs that take nothing, locales, limits, paths that are wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyenclave.cli
from pyenclave.cli import _tool, main
from pyenclave.image import keys
from pyenclave.image.build import write_image

ROOT = Path(__file__).resolve().parents[2]
# Of the package that is tried, which may be an installed one: the checkout's has no core then.
PLACE = Path(pyenclave.cli.__file__).resolve().parents[2]
GREETING = """
import pyenclave


@pyenclave.ecall
def greet(name: str) -> str:
    return "grüß " + name
"""


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("nameless", [True, False])
def test_a_key_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    """An empty key file would be taken for a key, for ever: none is overwritten."""
    path = tmp_path / "key.pem"
    if not nameless:
        monkeypatch.setattr(keys, "_write_nameless", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="No space left") as caught:
            keys.write_new(path, b"text")
        assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == []
    keys.write_new(path, b"text")
    assert path.read_bytes() == b"text"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        keys.write_new(path, b"other")
    assert os.listdir(tmp_path) == ["key.pem"]


def test_a_key_has_no_name_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(os.listdir(tmp_path)))
    keys.write_new(tmp_path / "key.pem", b"text")
    assert seen == [[]]


@pytest.mark.parametrize(
    "write",
    [write_image, lambda path, data: _tool.write_file(path, data, force=False), keys.write_new],
)
def test_what_cannot_be_written_is_named_as_the_caller_did(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "nowhere" / "x"
    with pytest.raises(FileNotFoundError) as caught:
        write(path, b"text")
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere", "f"], "No such file or directory: nowhere"),
        (["run", "nowhere.py", "f"], "No such file or directory: nowhere.py"),
        (["run", ".", "f"], "Is a directory: ."),
        (["info", "."], ". is a folder"),
        (["seal", "text", "--key-file", "/"], "'/' is no regular file"),
    ],
)
def test_a_path_that_is_none_is_named_and_two(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("text")
    assert main([*arguments, "--json"]) == 2
    assert words in json.loads(capsys.readouterr().out)["error"]["message"]


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    places = os.pathsep.join([str(PLACE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pyenclave", *arguments],
        env={**os.environ, "PYTHONPATH": places, **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_a_locale_without_the_characters_gets_escapes(tmp_path: Path, used_state: Path) -> None:
    """Text as Python's escapes, JSON as its own: what reads it gets what was said."""
    script = tmp_path / "hail.py"
    script.write_text(GREETING, encoding="utf-8")
    state = {"PYENCLAVE_STATE": str(used_state)}
    done = program("run", str(script), "greet", "you", **ASCII, **state)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("ascii")) == "grüß you"
    built = str(tmp_path / "hail.enclave")
    assert program("build", str(script), "-o", built, **ASCII).returncode == 0
    done = program("inspect", built, **ASCII)
    assert done.returncode == 0, done.stderr
    assert b"\\u2026" in done.stdout


def test_the_version_is_told_without_any_command() -> None:
    """Importing all of them takes a second."""
    script = (
        "import sys\nfrom pyenclave.cli import _COMMANDS, main\n"
        "try:\n    main(['--version'])\n"
        "except SystemExit as end:\n"
        "    print(end.code, {f'pyenclave.cli.{x}' for x in _COMMANDS.values()} & {*sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    told = [f"pyenclave {pyenclave.__version__}", "0 set()"]
    assert done.stdout.splitlines() == told, done.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_nobody_takes_is_an_error_and_no_traceback(option: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pyenclave", option],
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        b"pyenclave: error [unreadable]: No space left on device",
    ]


def test_an_interrupt_while_a_command_is_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: str) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pyenclave.cli, "import_module", interrupted)
    assert main(["doctor", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "interrupted"


def test_little_memory_is_an_error_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def greedy(*_: Any, **__: Any) -> bytes:
        raise MemoryError

    path = tmp_path / "x.py"
    path.write_text(GREETING, encoding="utf-8")
    monkeypatch.setattr("pyenclave.image.build.build_manifest", greedy)
    assert main(["build", str(path), "-o", str(tmp_path / "x"), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "memory"
    assert "ulimit -v" in error["message"]


def test_a_script_takes_no_more_memory_than_it_has() -> None:
    """read(n) sets n bytes aside: with n of the largest image, a limit of 900 MB refused all."""
    source = (
        "import resource, sys, pathlib\n"
        "from pyenclave.image import build\n"
        "size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        "limit = size + (512 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "print(len(build._read(pathlib.Path(sys.argv[1]), 'the entry')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, __file__],
        env={**os.environ, "PYTHONPATH": str(PLACE)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == Path(__file__).stat().st_size


def test_a_sealed_file_that_does_not_fit_says_why(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(100_000))
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "key").chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-m", "pyenclave", "seal", "text", "--key-file", "key"],
        env={**os.environ, "PYTHONPATH": str(PLACE)},
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"pyenclave: error [unreadable]: File too large"), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["key", "text"]


def test_a_checkout_that_is_not_built_says_so(tmp_path: Path) -> None:
    """Python started in the clone takes the clone, not what was installed from it."""
    shutil.copytree(
        ROOT / "pyenclave",
        tmp_path / "pyenclave",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for arguments in (["-c", "import pyenclave; pyenclave.Enclave"], ["-m", "pyenclave", "doctor"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")},
            cwd=tmp_path,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode in (1, 2)
        last = done.stderr.decode().splitlines()[-1]
        assert f"{tmp_path}/pyenclave is a checkout without its compiled core" in last
