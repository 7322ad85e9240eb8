"""
The import closure: every file that runs when an entry runs, by hash.

Taken by importing, in a fresh process that is started as the zygote is: what is imported and
mapped there is what the worker will import and map. Lazy imports inside functions are not seen;
``[runtime] extra`` names them.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyenclave._native import sanitizer_environment
from pyenclave.errors import ImageError
from pyenclave.formats import elf
from pyenclave.formats.lock import (
    START_ENVIRONMENT,
    START_FLAGS,
    Lock,
    LockedFile,
    LockedLibrary,
    LockedModule,
    Roots,
    this_python,
)

__all__ = ["ALLOWED", "Closure", "Entry", "take"]

# Of pyenclave's own parts these, and nothing else, run inside (design, section 9).
ALLOWED = (
    "errors",
    "_locks",
    "_memfd",
    "_native",
    "_core",
    "_ffi",
    "formats",
    "calls",
    "sealed",
    "trusted",
    "_worker",
)
# What a running worker may import later without asking: codecs, and the printing of tracebacks.
LAZY = (
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.utf_8_sig",
    "encodings.utf_16",
    "encodings.utf_32",
    "linecache",
    "traceback",
    # Which traceback and dataclasses import lazily from 3.15 on (PEP 810), and did at their top.
    *(("_colorize", "copy") if sys.version_info >= (3, 15) else ()),
)
# What stops at breakpoint() in a debug enclave: on the lock lists of images that allow debug only.
DEBUG = ("pdb", "pyenclave._worker.debugger")
_DESCRIBE = "pyenclave.calls.signature"
_DESCRIBE_OCALLS = "pyenclave.calls.ocalls"
_TIMEOUT = 300.0
_MAX_FILE = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """
    What to import: a Python source or a shared object.

    Attributes:
        module: Name under which it is imported (native: its stem).
        path: Where it is, for errors and for mapping a shared object.
        shown: Its name inside, which tracebacks show.
        native: Whether it is a shared object.
        source: The Python source.

    """

    module: str
    path: Path
    shown: str
    native: bool = False
    source: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closure:
    """The lock, and what a Python entry declares, as ``calls`` describes it."""

    lock: Lock
    functions: tuple[dict[str, Any], ...]
    ocalls: tuple[dict[str, Any], ...] = ()


def take(
    entry: Entry | None,
    *,
    extra: Iterable[str] = (),
    debug: bool = False,
    roots: Roots | None = None,
    describe: str = _DESCRIBE,
    hidden: Iterable[Entry] = (),
) -> Closure:
    """
    Take the closure of an entry.

    Args:
        entry: What to import; None for the base set alone.
        extra: Modules to import besides.
        debug: Whether the image allows debug: then the debugger is on the list too.
        roots: Where this machine keeps its Python; the running interpreter's by default.
        describe: Module whose ``functions_of`` describes the entry's functions.
        hidden: Modules of the image that are imported after the entry, and never by it at its top.

    Returns:
        The lock and the functions.

    Raises:
        ImageError: The entry cannot be imported (with file and line), or a file that runs cannot
            be locked.

    """
    roots = roots or Roots.of_this_process()
    request = {
        "path": list(roots.path),
        "lazy": [*LAZY, *(DEBUG if debug else ())],
        "extra": list(extra),
        "allowed": list(ALLOWED),
        "describe": describe,
        "describe_ocalls": _DESCRIBE_OCALLS,
        "entry": None if entry is None else _described(entry),
        "hidden": [_described(module) for module in hidden],
    }
    result = _ask(request)
    if "error" in result:
        raise _refusal(result, entry, roots)
    own = str(entry.path.resolve()) if entry is not None and entry.native else ""
    return Closure(
        lock=_Collector(roots, own).lock(result),
        functions=tuple(result["functions"]),
        ocalls=tuple(result["ocalls"]),
    )


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "module": entry.module,
        "path": str(entry.path.absolute()),
        "shown": entry.shown,
        "native": entry.native,
        "source": entry.source,
    }


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the probe and return its answer."""
    # Bytes: what a locale cannot encode would be refused as an argument.
    code = Path(__file__).with_name("_probe.py").read_bytes()
    try:
        done = subprocess.run(
            [sys.executable, *START_FLAGS, "-c", code],
            input=marshal.dumps(dict(request)),
            capture_output=True,
            env={**START_ENVIRONMENT, **sanitizer_environment()},
            cwd="/",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ImageError(
            "importing the entry does not come to an end", expected=f"within {_TIMEOUT:.0f} s"
        ) from None
    except OSError as error:
        raise ImageError(f"cannot start {sys.executable}: {error.strerror}") from None
    if done.returncode or not done.stdout:
        said = done.stderr.decode("utf-8", "replace").strip()[-2000:]
        raise ImageError(
            "the process that imports the entry ended early",
            found=f"exit status {done.returncode}: {said or 'no output'}",
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _lies_beside(entry: Path, module: str) -> bool:
    top = entry.with_name(module.partition(".")[0] or "-")
    return top.is_dir() or top.with_suffix(".py").is_file()


def _refusal(result: Mapping[str, Any], entry: Entry | None, roots: Roots) -> ImageError:
    error = result["error"]
    text = f"{error['type']}: {error['text']}"
    if result.get("message"):  # an error of ours: its own words are enough
        text = error["text"]
    missing, advice = error["missing"], None
    if missing.startswith("pyenclave.") and "does not run inside" in error["text"]:
        advice = 'Import it below `if __name__ == "__main__":`, which is never run inside.'
    elif error["type"] == "ModuleNotFoundError":
        advice = f"It must be installed in one of: {', '.join(roots.site)}."
        if entry is not None and _lies_beside(entry.path, missing):
            advice = (
                "It lies beside the entry, which is one file: move what is needed into the entry, "
                "or install it as a package."
            )
    elif error["type"] == "KeyError" and error["text"].strip("'") in os.environ:
        advice = "There are no environment variables inside: pass values as arguments."
    if error["step"].startswith("hidden "):
        return ImageError(f"[encrypted] {error['step'][7:]}: {text}", advice=advice)
    if error["step"] == "extra":
        return ImageError(f"[runtime] extra cannot be imported: {text}", advice=advice)
    if error["step"] == "worker" or entry is None:
        return ImageError(f"the worker's own modules cannot be imported: {text}", advice=advice)
    where = f"{entry.path}:{error['line']}" if error["line"] else str(entry.path)
    return ImageError(f"{where}: {text}", advice=advice)


class _Collector:
    """Hashes each file once and makes a lock of them."""

    def __init__(self, roots: Roots, own: str) -> None:
        self.roots = roots
        self.own = own  # the native entry: mapped, but part of the image itself
        self.hashes: dict[str, tuple[str, int]] = {}
        self.objects: dict[str, elf.SharedObject | None] = {}

    def lock(self, result: Mapping[str, Any]) -> Lock:
        boot_modules = dict(result["bootstrap_modules"])
        # A module of the bootstrap has to be importable too, if only by name.
        modules = [
            self._module(name, kind, path)
            for name, (kind, path) in sorted({**boot_modules, **result["modules"]}.items())
        ]
        boot_paths = {os.path.realpath(path) for path in result["bootstrap_files"]}
        boot_paths |= {os.path.realpath(path) for _, path in boot_modules.values() if path}
        taken = boot_paths | {os.path.realpath(path) for _, path in result["modules"].values()}
        libraries: dict[str, LockedLibrary] = {}
        for path, executable in sorted(result["files"].items()):
            real = os.path.realpath(path)
            if real in taken or real == self.own or path.startswith(("/dev/", "/memfd:", "/proc/")):
                continue
            shared = self._object(real)
            if shared is None and not executable:
                continue  # data that a module maps, not code
            library = self._library(real, shared)
            other = libraries.setdefault(library.soname, library)
            if other.path != library.path:
                raise ImageError(
                    f"two libraries are called {library.soname}",
                    found=f"{other.path} and {library.path}",
                )
        lock = Lock(
            python=this_python(),
            bootstrap=tuple(
                LockedFile(path=name, sha256=self._hash(path)[0], size=self._hash(path)[1])
                for name, path in sorted((self.roots.name_of(p), p) for p in boot_paths)
            ),
            modules=tuple(modules),
            libraries=tuple(libraries[soname] for soname in sorted(libraries)),
            preload=tuple(result["preload"]),
            data=self._data(result["read"], result["modules"]),
        )
        lock.check()
        self._check_needs(lock, boot_paths)
        return lock

    def _data(
        self, paths: Iterable[str], modules: Mapping[str, tuple[str, str]]
    ) -> tuple[LockedFile, ...]:
        """Lock what modules read of their packages' folders while they were imported."""
        sources = {os.path.realpath(path) for _, path in modules.values()}
        data = {}
        for path in paths:
            real = os.path.realpath(path)
            if not os.path.isfile(real) or real in sources or real.endswith((".py", ".pyc")):
                continue
            name = self.roots.name_of(real)
            if name.startswith(("site:", "stdlib:")):
                digest, size = self._hash(real)
                data[name] = LockedFile(path=name, sha256=digest, size=size)
        return tuple(data[name] for name in sorted(data))

    def _module(self, name: str, kind: str, path: str) -> LockedModule:
        if kind == "namespace":
            return LockedModule(name=name, kind="namespace", path="", sha256="")
        if kind != "extension" and not path.endswith(".py"):
            raise ImageError(
                f"module {name} is not a plain file: it cannot be locked",
                expected="a .py file or an extension module",
                found=path,
            )
        digest, size = self._hash(path)
        shared = self._object(os.path.realpath(path)) if kind == "extension" else None
        return LockedModule(
            name=name,
            kind=kind,  # type: ignore[arg-type] # the probe gives no others; Lock.check follows
            path=self.roots.name_of(path),
            sha256=digest,
            size=size,
            needs=shared.needs if shared else (),
        )

    def _library(self, path: str, shared: elf.SharedObject | None) -> LockedLibrary:
        if shared is None:
            raise ImageError("code is mapped from a file that is not a shared object", found=path)
        digest, size = self._hash(path)
        return LockedLibrary(
            soname=shared.soname or os.path.basename(path),
            path=self.roots.name_of(path),
            sha256=digest,
            size=size,
            needs=shared.needs,
        )

    def _hash(self, path: str) -> tuple[str, int]:
        real = os.path.realpath(path)
        if real not in self.hashes:
            data = _read(real)
            self.hashes[real] = (hashlib.sha256(data).hexdigest(), len(data))
            self.objects[real] = elf.parse(data, real) if elf.is_elf(data) else None
        return self.hashes[real]

    def _object(self, path: str) -> elf.SharedObject | None:
        self._hash(path)
        return self.objects[path]

    def _check_needs(self, lock: Lock, boot_paths: Iterable[str]) -> None:
        """Every need must be met by a locked library, or it would be found by a search path."""
        met = {library.soname for library in lock.libraries}
        for path in boot_paths:
            shared = self._object(path)
            if shared is not None:
                met |= {shared.soname or os.path.basename(path)}
        needs = [(module.path, module.needs) for module in lock.modules]
        needs += [(library.path, library.needs) for library in lock.libraries]
        for path, names in needs:
            for need in names:
                if need not in met:
                    raise ImageError(f"{path} needs {need}, which is not mapped")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            # What is read is allocated first: a limit of a gigabyte is no size to ask for.
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if size <= _MAX_FILE else b""
    except OSError as error:
        raise ImageError(f"a file that runs inside cannot be read: {error}") from None
    if size > _MAX_FILE:
        raise ImageError("a file that runs inside is too large", found=path)
    if len(data) != size:
        raise ImageError("a file that runs inside changes while it is read", found=path)
    return data
