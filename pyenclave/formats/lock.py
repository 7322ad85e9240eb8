"""
The lock list of an image: every file that runs inside, by hash (docs/formats/image.md).

A lock names a file as ``ROOT:path``, so that it does not depend on where a machine keeps its
Python. The bytes are canonical JSON: one lock has exactly one form, and its digest names it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from typing import Literal

import msgspec

from pyenclave.errors import ImageError

__all__ = [
    "MAX_LOCK",
    "START_ENVIRONMENT",
    "START_FLAGS",
    "Lock",
    "LockedFile",
    "LockedLibrary",
    "LockedModule",
    "Roots",
    "check_name",
    "this_python",
]

# A lock of numpy, cryptography and pandas is about 300 KiB.
MAX_LOCK = 8 * 1024 * 1024
MAX_ENTRIES = 20_000
MAX_PATH = 1024

# How the zygote, and the process that takes the closure at build time, are started: a lock is true
# only for this start. Below /dev/null there is no cached bytecode, so sources are what runs; the C
# locale maps no locale files; threads of a BLAS would forbid namespaces; and OpenSSL reads no
# settings of the machine, which nobody measured: they name modules to load and roots to trust.
# Nobody makes these processes run a script by writing into them (PEP 768, from Python 3.14 on), and
# CPython makes no machine code, which some builds of 3.13 and later do unless told not to. It is
# told by a variable, so this is -I without -E; there are no variables but these.
START_FLAGS = (
    *("-P", "-s", "-S", "-B"),
    *("-X", "utf8"),
    *("-X", "pycache_prefix=/dev/null"),
    *("-X", "disable-remote-debug"),
)
START_ENVIRONMENT = {
    "LC_ALL": "C",
    "PYTHON_JIT": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENSSL_CONF": "",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # else libarrow starts a thread as it loads
}

_ROOTS = ("stdlib", "base", "site", "abs")


class LockedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that the loader or the interpreter maps before our importer runs."""

    path: str
    sha256: str
    size: int = 0  # bytes, for people; the hash decides


class LockedModule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One importable module; a namespace package has neither path nor hash."""

    name: str
    kind: Literal["package", "module", "extension", "namespace"]
    path: str
    sha256: str
    size: int = 0
    needs: tuple[str, ...] = ()


class LockedLibrary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One shared library, by the name under which others need it."""

    soname: str
    path: str
    sha256: str
    size: int = 0
    needs: tuple[str, ...] = ()


class Lock(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """
    Everything that may run inside besides the entry.

    Attributes:
        python: Implementation, version and ABI, as ``this_python()`` gives it.
        bootstrap: What is mapped or imported before our importer runs, sorted by path.
        modules: Every importable module, sorted by name.
        libraries: Every shared library that is loaded later, sorted by SONAME.
        preload: What the zygote imports, in this order.
        data: Files that modules read while they are imported, sorted by path; of ``stdlib`` and
            ``site`` only.

    """

    python: str
    bootstrap: tuple[LockedFile, ...]
    modules: tuple[LockedModule, ...]
    libraries: tuple[LockedLibrary, ...]
    preload: tuple[str, ...]
    data: tuple[LockedFile, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the canonical JSON: sorted keys, no spaces, UTF-8."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes; zygotes are shared by it."""
        return hashlib.sha256(self.to_bytes()).digest()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Lock:
        """
        Read a lock; untrusted input.

        Args:
            data: The canonical bytes.

        Returns:
            The lock, every name, path and hash checked for form.

        Raises:
            ImageError: The bytes are not the canonical form of a valid lock.

        """
        if len(data) > MAX_LOCK:
            raise ImageError("lock list is too long", expected=f"<= {MAX_LOCK}", found=len(data))
        try:
            lock = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ImageError(f"malformed lock list: {error}") from None
        lock.check()
        if lock.to_bytes() != data:
            raise ImageError("lock list is not in its canonical form")
        return lock

    def check(self) -> None:
        """
        Check every name, path and hash for form, and the order of the lists.

        Raises:
            ImageError: The first entry that is not as it must be, by name.

        """
        lists = (self.bootstrap, self.modules, self.libraries, self.preload, self.data)
        entries = sum(map(len, lists))
        if entries > MAX_ENTRIES:
            raise ImageError(
                "lock list has too many entries", expected=f"<= {MAX_ENTRIES}", found=entries
            )
        _check_text("python", self.python)
        for file in self.bootstrap:
            check_name(file.path)
            _check_hash(file.path, file.sha256)
        for file in self.data:
            _check_data(file)
        for module in self.modules:
            _check_module(module)
        for library in self.libraries:
            _check_soname(library.soname)
            check_name(library.path)
            _check_hash(library.path, library.sha256)
            for need in library.needs:
                _check_soname(need)
        _check_order("bootstrap", [file.path for file in self.bootstrap])
        _check_order("data", [file.path for file in self.data])
        _check_order("modules", [module.name for module in self.modules])
        _check_order("libraries", [library.soname for library in self.libraries])
        names = {module.name for module in self.modules}
        if len(set(self.preload)) != len(self.preload):
            raise ImageError("lock list preloads a module twice")
        for name in self.preload:
            if name not in names:
                raise ImageError("lock list preloads a module that it does not hold", found=name)


_decoder = msgspec.json.Decoder(Lock, strict=True)


def this_python() -> str:
    """Return the ``python`` member of a lock for this interpreter."""
    version = sys.version_info
    text = f"{version.major}.{version.minor}.{version.micro}"
    if version.releaselevel != "final":
        text += f"{version.releaselevel}{version.serial}"
    abi = EXTENSION_SUFFIXES[0].removesuffix(".so").strip(".")
    return f"{sys.implementation.name}-{text} {abi}"


def check_name(name: str) -> tuple[str, str]:
    """
    Split a file name of a lock into its root and its path.

    Args:
        name: ``ROOT:path``, for example ``stdlib:json/__init__.py``.

    Returns:
        The root and the path.

    Raises:
        ImageError: The root is unknown, or the path could leave its root.

    """
    root, colon, path = name.partition(":")
    if not colon or root not in _ROOTS:
        raise ImageError(
            "file of a lock list has no known root", expected=", ".join(_ROOTS), found=repr(name)
        )
    parts = path.removeprefix("/").split("/") if root == "abs" else path.split("/")
    whole = (root != "abs" or path.startswith("/")) and len(path) <= MAX_PATH
    if not whole or any(part in ("", ".", "..") for part in parts) or not path.isprintable():
        raise ImageError("file of a lock list has a path that is not plain", found=repr(name))
    return root, path


def _check_text(what: str, text: str) -> None:
    if not text or len(text) > 255 or not text.isprintable():
        raise ImageError(f"lock list: {what} is not a short printable text", found=repr(text[:80]))


def _check_hash(name: str, digest: str) -> None:
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ImageError(f"lock list: hash of {name} is not 64 hexadecimal digits", found=digest)


def _check_soname(soname: str) -> None:
    _check_text("SONAME", soname)
    if "/" in soname:
        raise ImageError("lock list: a SONAME has a slash", found=repr(soname))


def _check_data(file: LockedFile) -> None:
    """
    Refuse data from anywhere but the folders of packages.

    A hostile image could otherwise learn whether a file of this machine has a content it guesses.
    """
    root, _ = check_name(file.path)
    if root not in ("site", "stdlib"):
        raise ImageError(
            "lock list: data is not a file of a package",
            expected="a file of site or stdlib",
            found=repr(file.path),
        )
    _check_hash(file.path, file.sha256)


def _check_module(module: LockedModule) -> None:
    name = module.name
    if name.startswith("_sysconfigdata_"):  # of CPython itself: …_linux_x86_64-linux-gnu
        name = name.replace("-", "_")
    if len(name) > 255 or not all(part.isidentifier() for part in name.split(".")):
        raise ImageError("lock list: not the name of a module", found=repr(module.name[:80]))
    if module.kind == "namespace":
        if module.path or module.sha256:
            raise ImageError(f"lock list: namespace package {module.name} has a file")
    else:
        _check_place(module)
        _check_hash(module.path, module.sha256)
    if module.needs and module.kind != "extension":
        raise ImageError(f"lock list: {module.name} needs libraries but is no extension")
    for need in module.needs:
        _check_soname(need)


def _check_place(module: LockedModule) -> None:
    """
    Refuse a module that is not where an import of its name finds it.

    A lock comes with its image, and a zygote runs modules before anything is closed. Without this
    a hostile image could name any file of the machine as the code that starts a zygote.
    """
    root, path = check_name(module.path)
    folder, _, file = path.rpartition("/")
    stem = file.partition(".")[0]
    full = module.name.replace(".", "/")
    parent, _, last = full.rpartition("/")
    found, wanted = (folder, stem), (parent, last)
    if module.kind == "package":
        wanted = (full, "__init__")
    fits = root in ("site", "stdlib") and stem == wanted[1]
    if module.name.partition(".")[0] == "pyenclave":
        fits = root == "site" and found == wanted
    if not fits:
        raise ImageError(
            f"lock list: the file of module {module.name} is not where Python imports it from",
            expected=f"a file of site or stdlib named for {module.name}",
            found=repr(module.path),
        )


def _check_order(what: str, keys: Sequence[str]) -> None:
    for before, after in pairwise(keys):
        if before >= after:
            raise ImageError(
                f"lock list: {what} are not sorted or not unique", found=f"{before!r}, {after!r}"
            )


class Roots(msgspec.Struct, frozen=True):
    """
    Where a machine keeps what a lock names.

    Attributes:
        stdlib: Folder of the interpreter's standard library.
        base: ``sys.base_prefix``: interpreter binary, libpython.
        site: Folders of packages: the parent of pyenclave, then the site-packages folders; the
            first that has a file wins.

    """

    stdlib: str
    base: str
    site: tuple[str, ...]

    @classmethod
    def of_this_process(cls) -> Roots:
        """Return the roots of the running interpreter."""
        import sysconfig

        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        folders = [package, *packages, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        return cls(
            stdlib=os.path.realpath(sysconfig.get_path("stdlib")),
            base=os.path.realpath(sys.base_prefix),
            site=tuple(dict.fromkeys(os.path.realpath(f) for f in folders if os.path.isdir(f))),
        )

    @property
    def path(self) -> tuple[str, ...]:
        """``sys.path`` of the zygote and of the process that takes the closure."""
        return (self.stdlib, os.path.join(self.stdlib, "lib-dynload"), *self.site)

    def resolve(self, name: str, exists: Callable[[str], bool] = os.path.exists) -> str:
        """
        Return the path of a locked file on this machine.

        Args:
            name: ``ROOT:path``.
            exists: Whether a path is there (for tests).

        Returns:
            The path; below ``site`` that of the first folder that has the file, or of the first
            folder when none has it.

        Raises:
            ImageError: The name is not that of a locked file.

        """
        root, path = check_name(name)
        if root == "abs":
            return path
        if root == "site":
            found = [os.path.join(folder, path) for folder in self.site]
            return next(filter(exists, found), found[0] if found else "/" + path)
        return os.path.join(self.stdlib if root == "stdlib" else self.base, path)

    def name_of(self, path: str) -> str:
        """
        Return the name in a lock of a file of this machine: the inverse of ``resolve``.

        Args:
            path: An absolute path, or one relative to the working directory.

        Returns:
            ``ROOT:path`` by the longest root that holds the file, else ``abs:`` and its real path.

        """
        for form in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):
            for root, folder in self._by_length():
                prefix = folder.rstrip("/") + "/"
                if form.startswith(prefix):
                    name = f"{root}:{form[len(prefix) :]}"
                    # A folder that comes earlier may hold another file of this name.
                    if self.resolve(name) == form:
                        return name
        return f"abs:{os.path.realpath(path)}"

    def _by_length(self) -> Iterable[tuple[str, str]]:
        pairs = [("site", folder) for folder in self.site]
        pairs += [("stdlib", self.stdlib), ("base", self.base)]
        return sorted(pairs, key=lambda pair: -len(pair[1]))
