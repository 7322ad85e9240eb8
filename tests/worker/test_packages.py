"""What packages do while they are imported: read files of their own, load libraries by path."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyenclave._worker import files
from pyenclave._worker.importer import Locked
from pyenclave.errors import ImageError
from pyenclave.formats.lock import Lock, LockedFile

PACKAGE = """
import ctypes
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE / "notes.txt").read_text()
with open(HERE / "notes.txt", "rb") as file:
    BYTES = file.read()
answer = ctypes.CDLL(str(HERE / "libanswer.so"), mode=ctypes.RTLD_GLOBAL).answer
with open("/dev/urandom", "rb", buffering=0) as file:
    RANDOM = file.read(8)
"""
ENTRY = """
import json
import sys
import pyenclave
import withdata

@pyenclave.ecall
def ask() -> list[str]:
    return [withdata.TEXT, withdata.BYTES.decode(), str(withdata.answer()), withdata.RANDOM.hex()]

@pyenclave.ecall
def read(path: str, mode: str) -> str:
    with open(path, mode) as file:
        return str(file.read())

@pyenclave.ecall
def load(path: str) -> None:
    import ctypes
    ctypes.CDLL(path)

if __name__ == "__main__":
    from pyenclave.errors import EnclaveError
    results = []
    with pyenclave.Enclave.from_file(__file__, quiet=True) as enclave:
        for name, *arguments in json.loads(sys.argv[1]):
            try:
                results.append(enclave.call(name, *arguments))
            except EnclaveError as error:
                results.append(getattr(error, "type", error.code))
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "site-packages"
    package = folder / "withdata"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "notes.txt").write_text("of the package\n")
    (package / "other.txt").write_text("never read at import\n")
    source = folder.parent / "answer.c"
    source.write_text("int answer(void) { return 42; }\n")
    for name in ("libanswer.so", "libother.so"):
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o"]
        subprocess.run([*command, str(package / name), str(source)], check=True)
    (folder.parent / "entry_withdata.py").write_text(ENTRY)
    return folder


def run(site: Path, *calls: tuple[str, ...]) -> list[Any]:
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, site.parent / "entry_withdata.py", json.dumps(calls)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    result: list[Any] = json.loads(done.stdout)
    return result


def test_a_package_reads_its_file_and_loads_its_library_as_they_were_locked(site: Path) -> None:
    ((text, data, answer, random),) = run(site, ("ask",))
    assert text == data == "of the package\n"
    assert answer == "42"
    assert len(random) == 16
    assert random != "0" * 16


def test_what_was_not_read_at_build_is_not_there(site: Path) -> None:
    package = site / "withdata"
    results = run(
        site,
        ("read", str(package / "notes.txt"), "r"),
        ("read", str(package / "other.txt"), "r"),
        ("read", str(package / "notes.txt"), "r+"),
        ("read", "/etc/hostname", "r"),
        ("read", "/dev/urandom", "rb"),
        ("load", str(package / "libanswer.so")),
        ("load", str(package / "libother.so")),
    )
    assert results[0] == "of the package\n"
    assert results[1:5] == ["PermissionError"] * 4  # once the filter is closed, urandom too
    assert results[5] is None
    assert results[6] == "OSError"


def test_a_changed_data_file_refuses_the_launch_by_name(site: Path) -> None:
    notes = site / "withdata" / "notes.txt"
    image = site.parent / "withdata.enclave"
    environment = (
        {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ['PYTHONPATH']}"}
        if ("PYTHONPATH" in os.environ)
        else {**os.environ, "PYTHONPATH": str(site)}
    )
    tool = [sys.executable, "-m", "pyenclave"]
    entry = str(site.parent / "entry_withdata.py")
    subprocess.run(
        [*tool, "build", entry, "-o", str(image)], env=environment, check=True, capture_output=True
    )
    shown = subprocess.run(
        [*tool, "inspect", "--json", str(image)], env=environment, check=True, capture_output=True
    )
    (listed,) = json.loads(shown.stdout)["trusted_base"]["data"]
    assert listed["path"] == "site:withdata/notes.txt"
    notes.write_text("changed\n")
    try:
        done = subprocess.run(
            [*tool, "run", str(image), "ask"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        notes.write_text("of the package\n")
    assert done.returncode == 1
    assert "notes.txt" in done.stderr


@pytest.mark.parametrize("path", ["abs:/etc/passwd", "base:x", "site:../x", "notes.txt"])
def test_a_lock_names_no_data_outside_the_folders_of_packages(path: str) -> None:
    file = LockedFile(path=path, sha256="0" * 64)
    lock = Lock(python="x", bootstrap=(), modules=(), libraries=(), preload=(), data=(file,))
    with pytest.raises(ImageError, match="lock list"):
        lock.check()


def test_a_lock_without_data_says_nothing_of_it() -> None:
    lock = Lock(python="x", bootstrap=(), modules=(), libraries=(), preload=())
    assert b"data" not in lock.to_bytes()
    assert Lock.from_bytes(lock.to_bytes()) == lock


def test_a_data_file_is_found_by_any_spelling_and_never_written(tmp_path: Path) -> None:
    content = b"content"
    digest = hashlib.sha256(content).hexdigest()
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    locked = Locked(f"V\tx\t0\t1\nD\t{path}\t{digest}".encode(), b"")
    locked.read_sources({})
    path.unlink()
    for spelling in (str(path), path, f"{tmp_path}/x/../data.txt"):
        opened = files.open_locked(locked, spelling, "rb", None, None)
        assert opened is not None
        assert opened.read() == content
    text = files.open_locked(locked, path, "r", None, None)
    assert text is not None
    assert text.read() == "content"
    for mode in ("w", "a", "x", "r+"):
        assert files.open_locked(locked, path, mode, None, None) is None
    assert files.open_locked(locked, 3, "rb", None, None) is None
    assert files.open_locked(locked, str(path).encode(), "rb", None, None) is None
