"""A machine whose runtime differs is refused, each file by name."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from pyenclave.errors import RuntimeLockError
from pyenclave.formats import elf
from pyenclave.formats.image import Image
from pyenclave.formats.lock import Lock, LockedFile, Roots
from pyenclave.image import lock as locks


@pytest.fixture(scope="module")
def lock(built: bytes) -> Lock:
    return Image.parse(built).lock


@pytest.fixture
def elsewhere(lock: Lock, tmp_path: Path) -> Roots:
    """A machine made of links to this one's files, so that one can be exchanged."""
    here = Roots.of_this_process()
    roots = Roots(
        stdlib=str(tmp_path / "stdlib"),
        base=str(tmp_path / "base"),
        site=(str(tmp_path / "site"),),
    )
    modules = [module.path for module in lock.modules if module.path]
    libraries = [library.path for library in lock.libraries]
    for name in {*modules, *libraries, *(file.path for file in lock.bootstrap)}:
        if not name.startswith("abs:"):
            path = Path(roots.resolve(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(here.resolve(name))
    return roots


def exchange(path: str, content: bytes | None) -> None:
    old = Path(path).read_bytes()
    Path(path).unlink()
    if content is not None:
        Path(path).write_bytes(old + content)


def refused(lock: Lock, roots: Roots) -> tuple[str, ...]:
    with pytest.raises(RuntimeLockError) as caught:
        locks.check(lock, roots)
    assert all(line in str(caught.value) for line in caught.value.files[:20])
    return caught.value.files


def test_a_changed_stdlib_file_is_named(lock: Lock, elsewhere: Roots) -> None:
    exchange(elsewhere.resolve("stdlib:enum.py"), b"\nprint('hello')\n")
    (line,) = refused(lock, elsewhere)
    assert line.startswith("stdlib:enum.py: module enum is changed")


def test_a_changed_bootstrap_file_is_named(lock: Lock, elsewhere: Roots) -> None:
    exchange(elsewhere.resolve("stdlib:encodings/utf_8.py"), b" ")
    (line,) = refused(lock, elsewhere)
    assert line.startswith("stdlib:encodings/utf_8.py: file is changed")


def test_a_swapped_shared_library_is_named(lock: Lock, elsewhere: Roots) -> None:
    library = next(item for item in lock.libraries if item.path.startswith("site:"))
    exchange(elsewhere.resolve(library.path), b"\0")
    (line,) = refused(lock, elsewhere)
    assert library.path in line
    assert f"library {library.soname} is changed" in line


def test_a_missing_module_is_named(lock: Lock, elsewhere: Roots) -> None:
    exchange(elsewhere.resolve("site:numpy/linalg/__init__.py"), None)
    (line,) = refused(lock, elsewhere)
    assert line.startswith("site:numpy/linalg/__init__.py: module numpy.linalg is missing")


def test_every_difference_is_named_at_once(lock: Lock, elsewhere: Roots) -> None:
    for name in ("stdlib:enum.py", "stdlib:types.py", "site:numpy/__init__.py"):
        exchange(elsewhere.resolve(name), b"#")
    assert len(refused(lock, elsewhere)) == 3


def test_another_python_is_named(lock: Lock) -> None:
    (line,) = refused(
        msgspec.structs.replace(lock, python="cpython-3.12.0 x"), Roots.of_this_process()
    )
    assert "cpython-3.12.0 x" in line


def test_a_folder_or_a_pipe_in_place_of_a_file_is_named_and_never_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    files = tuple(LockedFile(path=f"site:{name}", sha256="0" * 64) for name in ("folder", "pipe"))
    from pyenclave.formats.lock import this_python

    lock = Lock(python=this_python(), bootstrap=files, modules=(), libraries=(), preload=())
    roots = Roots(stdlib="/nowhere", base="/nowhere", site=(str(tmp_path),))
    assert len(refused(lock, roots)) == 2


def test_this_machine_has_what_it_locked(lock: Lock, elsewhere: Roots) -> None:
    locks.check(lock, Roots.of_this_process())
    locks.check(lock, elsewhere)


def test_the_lock_holds_the_base_and_what_the_entry_imports(lock: Lock) -> None:
    names = {module.name for module in lock.modules}
    wanted = {
        "msgspec", "numpy", "numpy.random", "numpy.linalg", "numpy.fft", "pyenclave.trusted",
        "cryptography.hazmat.primitives.hpke", "encodings.ascii",
    }  # fmt: skip
    assert wanted <= names
    outside = ("pyenclave.host", "pyenclave.image", "pyenclave.cli", "pyenclave._platform")
    assert not [name for name in names if name.startswith(outside)]


def test_every_need_is_met_by_the_lock(lock: Lock) -> None:
    met = {library.soname for library in lock.libraries}
    for file in lock.bootstrap:
        data = Path(Roots.of_this_process().resolve(file.path)).read_bytes()
        if elf.is_elf(data):
            met.add(elf.parse(data, file.path).soname)
    for item in (*lock.modules, *lock.libraries):
        assert set(item.needs) <= met, item
    boot = [file.path for file in lock.bootstrap]
    assert any("ld-linux" in path for path in boot)
    assert any("libc.so.6" in path for path in boot)
    assert "stdlib:encodings/__init__.py" in boot


def test_sizes_are_those_of_the_files(lock: Lock) -> None:
    roots = Roots.of_this_process()
    for file in lock.bootstrap:
        assert Path(roots.resolve(file.path)).stat().st_size == file.size
