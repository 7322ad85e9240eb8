"""The import closure: what may not be locked is refused, what is locked is what runs."""

from __future__ import annotations

import collections
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pyenclave.errors import ImageError
from pyenclave.formats.lock import Lock, LockedModule, Roots
from pyenclave.image import closure

ECALL = "import pyenclave\n@pyenclave.ecall\ndef f() -> int: return 1\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


def taken(site: Path, text: str) -> Lock:
    here = Roots.of_this_process()
    roots = Roots(stdlib=here.stdlib, base=here.base, site=(*here.site, str(site)))
    entry = closure.Entry(
        module="entry_of_test",
        path=site.parent / "entry_of_test.py",
        shown="entry/entry_of_test.py",
        source=(text + ECALL).encode(),
    )
    return closure.take(entry, roots=roots).lock


def named(lock: Lock) -> dict[str, LockedModule]:
    return {module.name: module for module in lock.modules}


def test_cached_bytecode_is_never_run(site: Path) -> None:
    source = site / "mod_with_cache.py"
    source.write_text("X = 1\n")
    poison = site / "poison.py"
    poison.write_text("raise SystemExit('cached bytecode was run')\n")
    cached = importlib.util.cache_from_source(str(source))
    py_compile.compile(
        str(poison), cached, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    lock = taken(site, "import mod_with_cache\nassert mod_with_cache.X == 1\n")
    assert named(lock)["mod_with_cache"].path == "site:mod_with_cache.py"


def test_modules_from_an_archive_are_refused(site: Path) -> None:
    with zipfile.ZipFile(site / "a.zip", "w") as archive:
        archive.writestr("mod_in_zip.py", "X = 1\n")
    text = f"import sys\nsys.path.append({str(site / 'a.zip')!r})\nimport mod_in_zip\n"
    with pytest.raises(ImageError, match="mod_in_zip"):
        taken(site, text)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_two_libraries_of_one_name_are_refused(site: Path) -> None:
    for folder in ("a", "b"):
        (site / folder).mkdir()
        (site / folder / "x.c").write_text(f"int {folder}(void) {{ return 1; }}\n")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-Wl,-soname,libsame.so", "-o",
             str(site / folder / "libsame.so"), str(site / folder / "x.c")],
            check=True,
        )  # fmt: skip
    text = "import ctypes\n" + "".join(
        f"ctypes.CDLL({str(site / folder / 'libsame.so')!r})\n" for folder in ("a", "b")
    )
    with pytest.raises(ImageError, match="two libraries are called libsame"):
        taken(site, text)


def test_an_entry_that_never_ends_is_refused(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closure, "_TIMEOUT", 3.0)
    with pytest.raises(ImageError, match="does not come to an end"):
        taken(site, "while True: pass\n")


def test_what_the_entry_prints_or_leaves_running_does_no_harm(site: Path) -> None:
    text = (
        "import os, sys, threading, time\n"
        "print('{\"error\": 1}'); os.write(1, b'noise'); os.write(2, b'more noise')\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    )
    assert "threading" in named(taken(site, text))


def test_packages_namespaces_and_modules_are_told_apart(site: Path) -> None:
    (site / "space_of_test/inner").mkdir(parents=True)
    (site / "space_of_test/inner/__init__.py").write_text("")
    (site / "space_of_test/inner/leaf.py").write_text("")
    modules = named(taken(site, "import space_of_test.inner.leaf\n"))
    assert modules["space_of_test"].kind == "namespace"
    assert modules["space_of_test.inner"].kind == "package"
    assert modules["space_of_test.inner.leaf"].kind == "module"
    assert modules["numpy._core._multiarray_umath"].kind == "extension"


def test_a_module_that_calls_itself_a_package_is_locked_as_the_file_that_it_is(site: Path) -> None:
    """As six does, which dateutil and with it pandas import."""
    (site / "mod_as_six.py").write_text(
        "__path__ = []\n__spec__.submodule_search_locations = []\nX = 1\n"
    )
    lock = taken(site, "import mod_as_six\nassert mod_as_six.X == 1\n")
    found = named(lock)["mod_as_six"]
    assert (found.kind, found.path) == ("module", "site:mod_as_six.py")
    assert Lock.from_bytes(lock.to_bytes()) == lock


def test_the_file_of_a_package_may_be_a_module_too(site: Path) -> None:
    """As ``from package.__init__ import x`` makes it one."""
    (site / "pkg_of_itself").mkdir()
    (site / "pkg_of_itself/__init__.py").write_text("X = 1\n")
    modules = named(taken(site, "from pkg_of_itself.__init__ import X\n"))
    assert modules["pkg_of_itself"].kind == "package"
    assert modules["pkg_of_itself.__init__"].kind == "module"


def test_a_module_that_replaces_itself_is_locked_all_the_same(site: Path) -> None:
    (site / "pkg_of_test").mkdir()
    (site / "pkg_of_test/__init__.py").write_text("")
    text = "import sys\nclass Own: X = 1\nsys.modules[__name__] = Own()\n"
    for name in ("pkg_of_test/replaced.py", "replaced_top.py"):
        (site / name).write_text(text)
    modules = named(taken(site, "import pkg_of_test.replaced, replaced_top\n"))
    assert modules["pkg_of_test.replaced"].path == "site:pkg_of_test/replaced.py"
    assert modules["replaced_top"].path == "site:replaced_top.py"


def test_a_module_that_puts_another_in_its_place_is_locked_by_both_names(site: Path) -> None:
    """As collections.abc does from Python 3.13.0 on, with a frozen one; later it has no file."""
    (site / "pkg_with_other").mkdir()
    (site / "pkg_with_other/__init__.py").write_text("")
    (site / "other_place.py").write_text("X = 1\n")
    (site / "pkg_with_other/stands_in.py").write_text(
        "import sys, other_place\nsys.modules[__name__] = other_place\n"
    )
    (site / "pkg_with_other/frozen_in.py").write_text(
        "import sys, _collections_abc\nsys.modules[__name__] = _collections_abc\n"
    )
    text = "import pkg_with_other.stands_in, pkg_with_other.frozen_in, collections.abc, os.path\n"
    modules = named(taken(site, text))
    assert modules["pkg_with_other.stands_in"].path == "site:pkg_with_other/stands_in.py"
    assert modules["pkg_with_other.frozen_in"].path == "site:pkg_with_other/frozen_in.py"
    assert modules["other_place"].path == "site:other_place.py"
    if Path(collections.__file__).with_name("abc.py").exists():
        assert modules["collections.abc"].path == "stdlib:collections/abc.py"
    else:
        assert "collections.abc" not in modules
    assert "os.path" not in modules


def test_a_module_is_only_locked_with_its_own_file(site: Path) -> None:
    """``typing.io`` is an object of typing; a file io.py is something else."""
    for module in taken(site, "import typing.io\n" if _has_typing_io() else "").modules:
        if module.kind in ("module", "package"):
            stem = module.name.replace(".", "/")
            end = f"{stem}/__init__.py" if module.kind == "package" else f"{stem}.py"
            assert module.path.endswith(end), module


def _has_typing_io() -> bool:
    import sys
    import typing  # noqa: F401 - puts typing.io in place, where there is one

    return "typing.io" in sys.modules


def test_an_import_inside_a_function_is_not_seen_unless_declared(site: Path) -> None:
    (site / "later.py").write_text("")
    text = "def g() -> None:\n    import later\n"
    assert "later" not in named(taken(site, text))


def test_the_build_leaves_no_file_behind(site: Path) -> None:
    (site / "mod_left.py").write_text("")
    before = sorted(os.walk(site))
    taken(site, "import mod_left\n")
    assert sorted(os.walk(site)) == before


def test_the_base_set_needs_no_entry() -> None:
    lock = closure.take(None).lock
    assert "pyenclave._worker.main" in named(lock)
    assert set(lock.preload) <= set(named(lock))


needs_lazy_imports = pytest.mark.skipif(
    sys.version_info < (3, 15), reason="this Python has no lazy imports"
)


@needs_lazy_imports
def test_what_is_imported_lazily_is_locked(site: Path) -> None:
    """PEP 810: the entry's lazy imports, those of what it imports, and what these lead to."""
    (site / "eager_mod.py").write_text("lazy import second_mod\n")
    (site / "second_mod.py").write_text("lazy from pkg_lazy.part import X\n")
    (site / "pkg_lazy").mkdir()
    (site / "pkg_lazy/__init__.py").write_text(
        "__lazy_modules__ = ['third_mod']\nimport third_mod\n"
    )
    (site / "pkg_lazy/part.py").write_text("X = 1\n")
    (site / "third_mod.py").write_text("")
    (site / "own_mod.py").write_text("")
    modules = named(taken(site, "import eager_mod\nlazy import own_mod, colorsys\n"))
    wanted = {"second_mod", "pkg_lazy", "pkg_lazy.part", "third_mod", "own_mod", "colorsys"}
    assert wanted <= set(modules)


@needs_lazy_imports
def test_what_is_imported_lazily_and_not_there_is_no_error(site: Path) -> None:
    (site / "broken_mod.py").write_text("raise ValueError('not today')\n")
    lock = taken(site, "lazy import not_there_at_all\nlazy import broken_mod\n")
    assert "not_there_at_all" not in named(lock)


@needs_lazy_imports
def test_the_worker_has_what_its_modules_import_lazily_and_need() -> None:
    """But not shutil, of which pathlib needs what moves files."""
    modules = named(closure.take(None).lock)
    assert {"_colorize", "copy"} <= set(modules)
    assert "shutil" not in modules
