"""Lock lists and the names of locked files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import ImageError
from pyenclave.formats.lock import (
    Lock,
    LockedFile,
    LockedLibrary,
    LockedModule,
    Roots,
    check_name,
    this_python,
)

HASH = "ab" * 32


def lock_of(**changes: object) -> Lock:
    values: dict[str, object] = {
        "python": "cpython-3.11.7 abi",
        "bootstrap": (LockedFile(path="base:bin/python3", sha256=HASH),),
        "modules": (
            LockedModule(name="a", kind="package", path="site:a/__init__.py", sha256=HASH),
            LockedModule(
                name="a.b", kind="extension", path="site:a/b.so", sha256=HASH, needs=("c",)
            ),
            LockedModule(name="n", kind="namespace", path="", sha256=""),
        ),
        "libraries": (LockedLibrary(soname="libz.so.1", path="abs:/lib/libz.so.1", sha256=HASH),),
        "preload": ("a.b", "a"),
    }
    return Lock(**{**values, **changes})


def module(**changes: object) -> LockedModule:
    name = str(changes.get("name", "a"))
    path = f"site:{name.replace('.', '/')}.py"
    values = {"name": name, "kind": "module", "path": path, "sha256": HASH}
    return LockedModule(**{**values, **changes})


@pytest.mark.parametrize(
    "name",
    [
        "", ":", "stdlib:", "stdlib", "other:x", "site:/x", "site:../x", "site:a/../b", "site:a//b",
        "site:./a", "site:a/", "abs:x", "abs:", "abs:/", "abs:/a/../b", "abs://a", "site:a\0b",
        "site:a\nb", "site:" + "a" * 2000, "STDLIB:x",
    ],
)  # fmt: skip
def test_names_that_could_leave_their_root_are_refused(name: str) -> None:
    with pytest.raises(ImageError):
        check_name(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"python": ""},
        {"modules": (module(name="b"), module(name="a")), "preload": ()},
        {"modules": (module(), module()), "preload": ()},
        {"modules": (module(name="a-b"),), "preload": ()},
        {"modules": (module(name="a..b"),), "preload": ()},
        {"modules": (module(sha256=HASH.upper()),), "preload": ()},
        {"modules": (module(sha256=HASH[:-1]),), "preload": ()},
        {"modules": (module(path="x"),), "preload": ()},
        {"modules": (module(needs=("libz.so.1",)),), "preload": ()},
        {"modules": (module(kind="namespace"),), "preload": ()},
        {"modules": (module(kind="extension", needs=("../libz.so",)),), "preload": ()},
        {"preload": ("a", "a")},
        {"preload": ("absent",)},
        {"libraries": (LockedLibrary(soname="", path="abs:/x", sha256=HASH),)},
        {"bootstrap": (LockedFile(path="/bin/sh", sha256=HASH),)},
        {"bootstrap": (LockedFile(path="base:a", sha256=HASH),) * 2},
    ],
)
def test_wrong_locks_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ImageError):
        lock_of(**changes).check()
    with pytest.raises(ImageError):
        Lock.from_bytes(msgspec.json.encode(lock_of(**changes), order="sorted"))


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("pyenclave._worker.boot", "module", "abs:/tmp/pyenclave/_worker/boot.py"),
        ("pyenclave._worker.boot", "module", "site:other/_worker/boot.py"),
        ("pyenclave._worker.boot", "module", "site:pyenclave/_worker/entry.py"),
        ("pyenclave._worker.boot", "module", "stdlib:pyenclave/_worker/boot.py"),
        ("pyenclave._worker", "package", "site:pyenclave/_worker.py"),
        ("pyenclave", "package", "site:other/__init__.py"),
        ("fcntl", "extension", "abs:/tmp/fcntl.so"),
        ("fcntl", "extension", "stdlib:lib-dynload/other.so"),
        ("json", "package", "stdlib:json/decoder.py"),
        ("json", "module", "base:json.py"),
    ],
)
def test_a_module_whose_file_has_another_place_is_refused(name: str, kind: str, path: str) -> None:
    """A lock comes with an image, and zygotes run modules before anything is closed."""
    lock = lock_of(modules=(module(name=name, kind=kind, path=path),), preload=())
    with pytest.raises(ImageError, match=re.escape(f"the file of module {name} is not where")):
        lock.check()


def test_too_many_entries_and_too_long_lists_are_refused() -> None:
    files = tuple(LockedFile(path=f"base:{at:08}", sha256=HASH) for at in range(20_001))
    with pytest.raises(ImageError, match="too many"):
        lock_of(bootstrap=files).check()
    with pytest.raises(ImageError, match="too long"):
        Lock.from_bytes(bytes(9 << 20))


def test_bytes_that_are_not_canonical_are_refused() -> None:
    good = lock_of().to_bytes()
    assert Lock.from_bytes(good) == lock_of()
    for other in (good + b"\n", good.replace(b":[", b": [", 1), good[:-1] + b',"python":"x"}'):
        with pytest.raises(ImageError):
            Lock.from_bytes(other)


def test_unknown_members_are_refused() -> None:
    with pytest.raises(ImageError, match="malformed"):
        Lock.from_bytes(lock_of().to_bytes()[:-1] + b',"z":1}')


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=6))
def test_a_mutated_lock_is_refused_or_canonical(at: int, text: bytes) -> None:
    data = bytearray(lock_of().to_bytes())
    at %= len(data)
    data[at : at + len(text)] = text
    try:
        lock = Lock.from_bytes(bytes(data))
    except ImageError:
        return
    assert lock.to_bytes() == data


def test_equal_locks_have_equal_bytes_and_digests() -> None:
    assert lock_of().digest == Lock.from_bytes(lock_of().to_bytes()).digest
    assert lock_of().digest != lock_of(preload=("a", "a.b")).digest


def test_this_python_names_version_and_abi() -> None:
    assert this_python().startswith(f"cpython-3.{sys.version_info.minor}.{sys.version_info.micro}")


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    for folder in ("base/lib/python3", "one", "two/site-packages", "else"):
        (tmp_path / folder).mkdir(parents=True)
    return Roots(
        stdlib=str(tmp_path / "base/lib/python3"),
        base=str(tmp_path / "base"),
        site=(str(tmp_path / "one"), str(tmp_path / "two/site-packages")),
    )


def test_a_file_is_named_by_its_longest_root(roots: Roots, tmp_path: Path) -> None:
    names = {
        "base/lib/python3/json.py": "stdlib:json.py",
        "base/bin/python": "base:bin/python",
        "one/a.py": "site:a.py",
        "two/site-packages/b.py": "site:b.py",
        "else/c.so": f"abs:{tmp_path}/else/c.so",
    }
    for path, name in names.items():
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        assert roots.name_of(str(file)) == name
        assert roots.resolve(name) == str(file)


def test_the_first_folder_wins_and_what_it_hides_is_named_absolutely(
    roots: Roots, tmp_path: Path
) -> None:
    for folder in ("one", "two/site-packages"):
        (tmp_path / folder / "same.py").write_text("")
    assert roots.resolve("site:same.py") == str(tmp_path / "one/same.py")
    hidden = str(tmp_path / "two/site-packages/same.py")
    assert roots.name_of(hidden) == f"abs:{hidden}"


def test_a_missing_file_still_resolves_to_a_path(roots: Roots, tmp_path: Path) -> None:
    assert roots.resolve("site:gone.py") == str(tmp_path / "one/gone.py")


def test_a_link_into_a_root_is_named_by_its_target(roots: Roots, tmp_path: Path) -> None:
    (tmp_path / "one/real.so").write_text("")
    (tmp_path / "else/link.so").symlink_to(tmp_path / "one/real.so")
    assert roots.name_of(str(tmp_path / "else/link.so")) == "site:real.so"


def test_the_roots_of_this_process_hold_what_runs_here() -> None:
    import pyenclave

    roots = Roots.of_this_process()
    for file in (json_file(), pyenclave.__file__, msgspec.__file__):
        assert not roots.name_of(file).startswith("abs:")
        assert Path(roots.resolve(roots.name_of(file))).samefile(file)


def json_file() -> str:
    import json

    return json.__file__
