"""What zygotes load: files of the lock as it has them, and nothing that others planted."""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyenclave._native import sanitizer_environment
from pyenclave._platform.zygotes import Zygotes
from pyenclave.errors import ImageError, RuntimeLockError
from pyenclave.formats import messages
from pyenclave.formats.lock import START_ENVIRONMENT, START_FLAGS, Lock, Roots


def own(roots: Roots | None = None) -> contextlib.closing[Zygotes]:
    """Zygotes of this test alone."""
    return contextlib.closing(Zygotes(roots or Roots.of_this_process()))


TELL = "raise RuntimeError('<<' + json.dumps(found) + '>>')\n"


def tell(launching, zygotes: Zygotes, lock: Lock, code: str):
    """Run code as an entry and return what it puts into `found`."""
    data = launching.make(lock, code + TELL, functions=False)
    with launching.Launched(zygotes, data) as worker:
        ending = worker.first()
    assert isinstance(ending, messages.Ending)
    match = re.search(r"<<(.*)>>", ending.message)
    assert match, ending
    return json.loads(match[1])


def shadow(tmp_path: Path, name: str, change: bytes | None) -> tuple[Roots, Path]:
    """Put a copy of a `site:` file, with *change* appended, before the real one."""
    roots = Roots.of_this_process()
    target = tmp_path / "site" / name.removeprefix("site:")
    target.parent.mkdir(parents=True)
    shutil.copyfile(roots.resolve(name), target)
    if change is not None:
        with target.open("ab") as file:
            file.write(change)
    changed = Roots(
        stdlib=roots.stdlib, base=roots.base, site=(str(tmp_path / "site"), *roots.site)
    )
    return changed, target


def path_of(lock: Lock, *, suffix: str) -> str:
    """Return the lock's name of the first `site:` file that ends so."""
    paths = [entry.path for entry in (*lock.modules, *lock.libraries)]
    return next(p for p in paths if p.startswith("site:") and re.search(suffix, p))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "suffix"),
    [
        ("a source", r"msgspec/json\.py$"),
        ("a source that nobody imports early", r"numpy/\w+/\w+\.py$"),
        ("an extension", r"msgspec/_core\.[^/]*so$"),
        ("a library", r"\.libs/[^/]+\.so[.\d]*$"),
        ("the core", r"pyenclave/_core\.[^/]*so$"),
        ("the importer", r"pyenclave/_worker/importer\.py$"),
        ("the first code", r"pyenclave/_worker/boot\.py$"),
    ],
)
def test_a_changed_file_is_refused_by_name(base, tmp_path, what: str, suffix: str) -> None:
    """File, expected and found hash stand in the error; nothing of it was executed."""
    name = path_of(base, suffix=suffix)
    mark = tmp_path / "executed"
    change = f"\nopen({str(mark)!r}, 'w')\n".encode() if name.endswith(".py") else b"\0"
    roots, target = shadow(tmp_path, name, change)
    with own(roots) as zygotes, pytest.raises(RuntimeLockError) as caught:
        zygotes.get(base.to_bytes(), debug=False)
    (line,) = caught.value.files
    assert str(target) in line
    assert re.search("expected [0-9a-f]{64}, found [0-9a-f]{64}", line)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pyenclave._worker.boot", "pyenclave._worker.importer", "numpy"])
def test_an_image_cannot_bring_the_code_that_starts_its_zygote(
    launching, base, tmp_path, name: str
) -> None:
    """A hostile image's lock names a file of its own, hash and all, for one of our modules."""
    mark = tmp_path / "executed"
    stem = "__init__" if name == "numpy" else name.rpartition(".")[2]
    evil = tmp_path / f"{stem}.py"
    evil.write_text(f"open({str(mark)!r}, 'w')\n", encoding="utf-8")
    digest = hashlib.sha256(evil.read_bytes()).hexdigest()
    modules = tuple(
        launching.replace(m, path=f"abs:{evil}", sha256=digest) if m.name == name else m
        for m in base.modules
    )
    lock = launching.replace(base, modules=modules).to_bytes()
    with own() as zygotes, pytest.raises(ImageError, match="not where Python imports it"):
        zygotes.get(lock, debug=True)
    assert not mark.exists()


def test_every_changed_file_is_named_at_once(base, tmp_path) -> None:
    """One look tells everything: sources and shared objects."""
    first, _ = shadow(tmp_path, path_of(base, suffix=r"msgspec/json\.py$"), b"#")
    second = Path(first.site[0]) / "numpy/__init__.py"
    second.parent.mkdir()
    second.write_text("")
    third = Path(first.site[0]) / path_of(base, suffix=r"msgspec/_core\.[^/]*so$")[5:]
    third.write_bytes(b"\x7fELF")
    with own(first) as zygotes, pytest.raises(RuntimeLockError) as caught:
        zygotes.get(base.to_bytes(), debug=False)
    assert len(caught.value.files) == 3


def test_a_changed_standard_library_is_refused_by_name(launching, base) -> None:
    """As seen from the lock: the file here is not the one that was locked."""
    modules = tuple(
        launching.replace(m, sha256="0" * 64) if m.name == "json" else m for m in base.modules
    )
    lock = launching.replace(base, modules=modules)
    with own() as zygotes, pytest.raises(RuntimeLockError) as caught:
        zygotes.get(lock.to_bytes(), debug=False)
    assert "json/__init__.py" in caught.value.files[0]


@pytest.mark.parametrize("index", range(4))
def test_a_changed_bootstrap_file_is_refused_before_exec(launching, base, index: int) -> None:
    """Interpreter, loader, C library, first modules: the platform looks before it starts them."""
    files = list(base.bootstrap)
    place = index * (len(files) - 1) // 3
    files[place] = launching.replace(files[place], sha256="1" * 64)
    lock = launching.replace(base, bootstrap=tuple(files))
    with own() as zygotes, pytest.raises(RuntimeLockError) as caught:
        zygotes.get(lock.to_bytes(), debug=False)
    assert Roots.of_this_process().resolve(files[place].path) in caught.value.files[0]


def test_a_bootstrap_file_that_is_not_listed_is_refused(launching, base) -> None:
    """The zygote looks at what is mapped, not only at what is listed."""
    files = tuple(f for f in base.bootstrap if "libm.so" not in f.path)
    assert len(files) < len(base.bootstrap)
    with own() as zygotes, pytest.raises(RuntimeLockError) as caught:
        zygotes.get(launching.replace(base, bootstrap=files).to_bytes(), debug=False)
    assert "libm.so" in " ".join(caught.value.files)


def test_a_preloaded_module_that_needs_an_unlisted_one_is_refused(launching, base) -> None:
    """The refusal names the module that is not in the lock."""
    # NumPy 1 and 2 name it differently.
    needed = next(m.name for m in base.modules if m.name.startswith("numpy.linalg."))
    modules = tuple(m for m in base.modules if m.name != needed)
    with own() as zygotes, pytest.raises(RuntimeLockError) as caught:
        zygotes.get(launching.replace(base, modules=modules).to_bytes(), debug=False)
    assert needed in str(caught.value)
    assert "unlisted import" in str(caught.value)


def test_a_missing_file_and_a_pipe_in_a_files_place_are_refused(base, tmp_path) -> None:
    """Neither hangs."""
    name = path_of(base, suffix=r"msgspec/json\.py$")
    roots, target = shadow(tmp_path, name, b"")
    target.unlink()
    os.mkfifo(target)
    with own(roots) as zygotes, pytest.raises(RuntimeLockError) as caught:
        zygotes.get(base.to_bytes(), debug=False)
    assert "found missing" in caught.value.files[0]


def test_a_lock_for_another_python_is_refused(launching, base) -> None:
    """It says which one it is for."""
    lock = launching.replace(base, python="cpython-3.99.0 cpython-399-x86_64-linux-gnu")
    with own() as zygotes, pytest.raises(RuntimeLockError, match=r"3\.99"):
        zygotes.get(lock.to_bytes(), debug=False)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, b"[" * 100_000])
def test_what_is_no_lock_is_refused(data: bytes) -> None:
    """Hostile bytes never reach a process."""
    with own() as zygotes, pytest.raises(ImageError):
        zygotes.get(data, debug=False)


# ---- what is ignored -----------------------------------------------------------------------------


@pytest.mark.no_asan(reason="a sanitizer build lets its own variables through")
def test_what_others_planted_is_not_imported(launching, base, tmp_path, monkeypatch) -> None:
    """Working folder, PYTHON*, LD_*, site and customisation files: none of it gets in."""
    mark = tmp_path / "executed"
    for name in ("planted", "sitecustomize", "usercustomize", "random", "encodings", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (tmp_path / "x.pth").write_text(f"import os; open({str(mark)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHON_JIT"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("LD_LIBRARY_PATH", "LD_AUDIT", "GCONV_PATH", "OPENSSL_CONF", "HOME", "SECRET"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    for name in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS"):  # a sanitizer build's only
        monkeypatch.setenv(name, str(tmp_path / "libasan.so.8"))
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    with own() as zygotes:
        found = tell(
            launching,
            zygotes,
            base,
            "import json, os, sys\n"
            "try:\n"
            "    import planted\n"
            "except ImportError:\n"
            "    pass\n"
            "found = [sorted(os.environ), [m for m in sys.modules if m.startswith(('plant',"
            " 'site', 'user'))], os.getcwd()]\n",
        )
    assert found == [sorted(START_ENVIRONMENT), [], "/"]
    assert not mark.exists()


def started(code: str, **environment: str) -> str:
    """Run code in an interpreter that is started as a zygote's is; what it prints."""
    done = subprocess.run(
        [sys.executable, *START_FLAGS, "-c", code],
        env=START_ENVIRONMENT | environment | sanitizer_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_an_interpreter_is_started_that_runs_no_scripts_of_others() -> None:
    """PEP 768: another process writes the name of a script into this one's memory."""
    if not hasattr(sys, "is_remote_debug_enabled"):
        pytest.skip("this Python runs no scripts of other processes")
    assert started("import sys; print(sys.is_remote_debug_enabled())") == "False"


def test_an_interpreter_is_started_that_makes_no_machine_code() -> None:
    """Where CPython's JIT is on unless told otherwise, nothing could start that has no [jit]."""
    code = "import sys; print(sys._jit.is_enabled())"
    if not hasattr(sys, "_jit") or not sys._jit.is_available():
        pytest.skip("this Python has no JIT")
    assert started(code) == "False"
    assert started(code, PYTHON_JIT="1") == "True"  # the variable is what decides


def test_openssl_reads_no_settings_of_the_machine() -> None:
    """They are in no lock, and name modules to load, roots to trust and the weakest protocol."""
    code = (
        "import _ssl, ctypes\n"
        "library = ctypes.CDLL(_ssl.__file__)\n"
        "library.CONF_get1_default_config_file.restype = ctypes.c_char_p\n"
        "print(repr(library.CONF_get1_default_config_file()))\n"
    )
    if not hasattr(ctypes.CDLL(_ssl.__file__), "CONF_get1_default_config_file"):
        pytest.skip("this Python's OpenSSL shows none of its functions")
    assert started(code) == "b''"


def test_bytecode_on_disk_is_ignored(launching, base, tmp_path) -> None:
    """A poisoned .pyc beside an unchanged source is not looked at."""
    import importlib.util
    import py_compile

    roots, target = shadow(tmp_path, path_of(base, suffix=r"msgspec/json\.py$"), None)
    mark = tmp_path / "executed"
    poison = tmp_path / "poison.py"
    poison.write_text(f"open({str(mark)!r}, 'w')\nPOISON = True\n")
    cached = Path(importlib.util.cache_from_source(str(target)))
    cached.parent.mkdir()
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(poison), cfile=str(cached), dfile=str(target), invalidation_mode=mode)
    with own(roots) as zygotes:
        found = tell(
            launching,
            zygotes,
            base,
            "import json, msgspec.json\n"
            "found = [msgspec.json.__file__, hasattr(msgspec.json, 'POISON'),"
            " hasattr(msgspec.json, 'Decoder')]\n",
        )
    assert found == [str(target), False, True]
    assert not mark.exists()


def test_odd_inherited_state_does_not_get_in(launching, base) -> None:
    """Fifty descriptors, ignored and blocked signals, an open umask."""
    extra = [os.open("/dev/zero", os.O_RDONLY) for _ in range(50)]
    for fd in extra:
        os.set_inheritable(fd, True)
    numbers = {signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP}
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGUSR2, signal.SIGHUP)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    mask = os.umask(0)
    try:
        with own() as zygotes:
            code = "@pyenclave.ecall\ndef answer() -> str:\n    return ''\n"
            with launching.Launched(zygotes, launching.make(base, code)) as worker:
                worker.run()
                status = Path(f"/proc/{worker.pid}/status").read_text(encoding="utf-8")
            found = tell(
                launching,
                zygotes,
                base,
                "import json, os\n"
                "links = [os.readlink(f'/proc/self/fd/{n}') for n in range(4096)"
                " if os.path.lexists(f'/proc/self/fd/{n}')]\n"
                "found = ['/dev/zero' in links, os.umask(0)]\n",
            )
    finally:
        os.umask(mask)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)
        for fd in extra:
            os.close(fd)
    ignored = sum(1 << (n - 1) for n in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ))
    assert found == [False, 0o077]
    lines = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert [int(lines[name], 16) for name in ("SigBlk", "SigIgn")] == [0, ignored]
