"""
``enclave.toml``: what an enclave is made of.

Strict: an unknown table or key, a wrong type or an impossible value is refused by name, so that a
misspelt option can never be ignored in silence. No file but the manifest itself is read here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pyenclave._files import read_file
from pyenclave.errors import ManifestError
from pyenclave.formats.image import MAX_SHARED, MAX_THREADS, PAGE
from pyenclave.formats.release import service_url, split_kid
from pyenclave.sealed._size import parse_size

__all__ = [
    "DEFAULT_MESSAGE",
    "DEFAULT_SEALED",
    "MIN_SEALED",
    "Manifest",
    "OcallEntry",
    "load",
    "parse_sealed",
    "parse_shared",
    "parse_size",
]

DEFAULT_SEALED = 0
MIN_SEALED = 256 << 10
DEFAULT_MESSAGE = 16 << 20

_MAX_MANIFEST = 1 << 20
_MAX_MESSAGE = 1 << 31
_MAX_SEALED = 1 << 46
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")

_LENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MAX_SEALED_FILES = 256

T = TypeVar("T")


def _frozen() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class OcallEntry:
    """
    A line of ``[ocalls]``, as it is written.

    Attributes:
        signature: Text such as ``(key: str) -> bytes``; read when the image is built.
        allow: Trusted functions that the host may call before it answers, sorted.

    """

    signature: str
    allow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """
    A read manifest; paths are absolute, sizes are bytes.

    Attributes:
        name: Name of the enclave, for people.
        entry: Path of the Python file or shared object.
        native: Whether the entry is a shared object.
        product_id: ISVPRODID.
        security_version: ISVSVN.
        debug: Whether a signed image may be launched as debug.
        threads: Calls that run at the same time.
        sealed: Limit of plaintext in sealed arrays; 0: there are none.
        message: Limit of one call's arguments or result.
        shared: Memory that host and enclave both map, for arrays.
        files: Path of each file of ``[files]``, by its name inside.
        ocalls: Host functions that the enclave may call, by name.
        ecalls: Signatures of native functions, by name.
        blas_threads: Threads of the linear algebra library.
        jit: Whether writable-executable memory is allowed.
        extra: Modules to lock beyond what the entry imports.
        seal_policy: Policy of ``trusted.seal`` where none is given.
        sealed_files: Names of sealed files, or folders of them, that the host lends; sorted.
        release: Addresses of ``[release]``; None where there is no such table.
        release_ca: Path of the authorities that sign what its vault says.
        encrypted_code: Paths of modules that are encrypted, by the module's name.
        encrypted_files: Names in ``files`` whose content is encrypted; sorted.
        encrypted_key: Identifier of the vault's key that gives the data key, if one is named.

    """

    name: str
    entry: Path
    native: bool = False
    product_id: int
    security_version: int
    debug: bool = False
    threads: int = 1
    sealed: int = DEFAULT_SEALED
    message: int = DEFAULT_MESSAGE
    shared: int = 0
    files: Mapping[str, Path] = field(default_factory=_frozen)
    ocalls: Mapping[str, OcallEntry] = field(default_factory=_frozen)
    ecalls: Mapping[str, str] = field(default_factory=_frozen)
    blas_threads: int = 1
    jit: bool = False
    extra: tuple[str, ...] = ()
    seal_policy: str = "signer"
    sealed_files: tuple[str, ...] = ()
    release: Mapping[str, str] | None = None
    release_ca: Path | None = None
    encrypted_code: Mapping[str, Path] = field(default_factory=_frozen)
    encrypted_files: tuple[str, ...] = ()
    encrypted_key: str = ""


def parse_shared(value: object) -> int:
    """
    Return a size of memory that host and enclave share, in bytes.

    Args:
        value: As for ``parse_size``; whole pages of 4 KiB, at most 16 GiB; 0 for none.

    Raises:
        ValueError: It is none.

    """
    size = parse_size(value)
    if size > MAX_SHARED or size % PAGE:
        raise ValueError('whole pages of 4 KiB, at most 16 GiB, e.g. "64 MiB"')
    return size


def parse_sealed(value: object) -> int:
    """
    Return a limit of plaintext in sealed arrays, in bytes.

    Args:
        value: As for ``parse_size``; whole pages of 4 KiB, 256 KiB to 64 TiB; 0 for no such arrays.

    Raises:
        ValueError: It is none.

    """
    size = parse_size(value)
    if size and (not MIN_SEALED <= size <= _MAX_SEALED or size % PAGE):
        raise ValueError('whole pages of 4 KiB, at least 256 KiB, e.g. "64 MiB"; or 0')
    return size


def _shown(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"{type(value).__name__} too large to be shown"


class _Table:
    """One table; what was not asked for when it is finished is unknown."""

    def __init__(self, path: str, name: str, values: object) -> None:
        if not isinstance(values, dict):
            raise ManifestError(
                f"{path}: [{name}] is not a table", expected="a table", found=_shown(values)
            )
        self.path, self.name, self.values, self.asked = path, name, values, set[str]()

    def wrong(self, key: str, expected: str, advice: str | None = None) -> ManifestError:
        return ManifestError(
            f"{self.path}: [{self.name}] {key} has a wrong value",
            expected=expected,
            found=_shown(self.values.get(key)),
            advice=advice,
        )

    def take(self, key: str, expected: str, check: Callable[[Any], T | None], default: T) -> T:
        """Return a key's value by *check*, which gives None for a wrong one."""
        self.asked.add(key)
        if key not in self.values:
            return default
        result = check(self.values[key])
        if result is None:
            raise self.wrong(key, expected)
        return result

    def need(self, key: str, expected: str, check: Callable[[Any], T | None]) -> T:
        if key not in self.values:
            raise ManifestError(
                f"{self.path}: [{self.name}] {key} is missing",
                expected=expected,
                found=_like(key, self.values),
            )
        result = check(self.values[key])
        self.asked.add(key)
        if result is None:
            raise self.wrong(key, expected)
        return result

    def number(self, key: str, low: int, high: int, default: int) -> int:
        return self.take(key, f"a number from {low} to {high}", _within(low, high), default)

    def flag(self, key: str) -> bool:
        return self.take(
            key, "true or false", lambda v: v if isinstance(v, bool) else None, default=False
        )

    def size(self, key: str, low: int, high: int, default: int) -> int:
        def check(value: object) -> int | None:
            try:
                size = parse_size(value)
            except ValueError:
                return None
            return size if low <= size <= high else None

        return self.take(key, f'a size from {low} to {high} bytes, e.g. "64 MiB"', check, default)

    def pages(self, key: str, parse: Callable[[object], int], expected: str) -> int:
        def check(value: object) -> int | None:
            try:
                return parse(value)
            except ValueError:
                return None

        return self.take(key, f'whole pages of 4 KiB, {expected}, e.g. "64 MiB"', check, 0)

    def texts(self, expected: str, check: Callable[[str, str], bool]) -> dict[str, str]:
        """Return a table whose keys are free and whose values are texts."""
        for key, value in self.values.items():
            if not isinstance(value, str) or not check(key, value):
                raise self.wrong(key, expected)
        self.asked.update(self.values)
        return dict(sorted(self.values.items()))

    def ocalls(self) -> dict[str, OcallEntry]:
        """Return a table of ocalls: free keys, each a signature or a table that has one."""
        found = {}
        for key, value in self.values.items():
            row = {"signature": value} if isinstance(value, str) else value
            if not isinstance(row, dict) or "signature" not in row:
                raise self.wrong(
                    key, 'a signature such as "(key: str) -> bytes", or a table that has one'
                )
            unknown = sorted(set(row) - {"signature", "allow"})
            if unknown:
                raise self.wrong(key, f"signature and allow, and nothing else: {unknown[0]}")
            signature, allow = row["signature"], _modules(row.get("allow", []))
            if not isinstance(signature, str) or not _function(key, signature):
                raise self.wrong(key, 'a name, and a signature such as "(key: str) -> bytes"')
            if allow is None or any("." in name for name in allow):
                raise self.wrong(key, "allow as a list of names of trusted functions")
            found[key] = OcallEntry(signature=signature, allow=allow)
        self.asked.update(self.values)
        return dict(sorted(found.items()))

    def finish(self) -> None:
        for key in self.values:
            if key not in self.asked:
                raise ManifestError(
                    f"{self.path}: [{self.name}] {key} is not a known key",
                    expected=", ".join(sorted(self.asked)),
                    found=f"{key} = {_shown(self.values[key])}",
                )


def _like(key: str, given: Iterable[str]) -> str | None:
    """Return what was probably written for *key*, for a message."""
    import difflib

    return next(iter(difflib.get_close_matches(key, given, n=1)), None)


def _within(low: int, high: int) -> Callable[[Any], int | None]:
    def check(value: object) -> int | None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return value if whole and low <= value <= high else None  # type: ignore[operator,return-value]

    return check


def _text(value: object) -> str | None:
    good = isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable()
    return value if good else None  # type: ignore[return-value]


def _path(value: object) -> str | None:
    return value if isinstance(value, str) and value and "\0" not in value else None


def _modules(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, list):
        return None
    good = all(isinstance(name, str) and _MODULE.fullmatch(name) for name in value)
    return tuple(sorted(set(value))) if good else None


def parse_file_names(value: object) -> tuple[str, ...] | None:
    """Return names of sealed files, sorted; None if *value* is no list of such names."""
    if not isinstance(value, list | tuple) or len(value) > _MAX_SEALED_FILES:
        return None
    good = all(isinstance(name, str) and _LENT.fullmatch(name) for name in value)
    return tuple(sorted(set(value))) if good else None


def _service(value: object) -> str | None:
    """Return the address of a service; None if it is none."""
    try:
        return service_url(value)[0] if isinstance(value, str) else None
    except ValueError:
        return None


def _file_names(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return None
    return tuple(sorted(set(value)))


def _key_url(value: object) -> str | None:
    """Return the identifier of a vault's key in its one form; None if it is none."""
    try:
        vault, name, version = split_kid(value) if isinstance(value, str) else ("", "", "")
    except ValueError:
        return None
    return "/".join(filter(None, (vault, "keys", name, version))) if name else None


def _code(table: _Table, folder: Path) -> dict[str, Path]:
    """Return the encrypted modules; each is one file, imported inside under its stem."""

    def check(value: object) -> dict[str, Path] | None:
        if not isinstance(value, list) or not all(map(_path, value)):
            return None
        paths = {Path(name).stem: folder / name for name in value}
        good = all(name.isidentifier() and path.suffix == ".py" for name, path in paths.items())
        return dict(sorted(paths.items())) if good and len(paths) == len(value) else None

    return table.take("code", "a list of Python files of different names", check, {})


def _check_encrypted(table: _Table, manifest: Manifest, *, given: bool) -> None:
    if not given:
        return
    if not manifest.encrypted_code and not manifest.encrypted_files:
        raise ManifestError(
            f"{table.path}: [encrypted] names nothing", expected="code, files, or both"
        )
    if manifest.native:
        raise ManifestError(f"{table.path}: [encrypted] is for Python entries")
    for name in manifest.encrypted_files:
        if name not in manifest.files:
            raise table.wrong("files", "names that [files] has", f"{name!r} is none of them.")


def _file_name(name: str, path: str) -> bool:
    parts = name.split("/")
    plain = not any(part in ("", ".", "..") for part in parts)
    return plain and name.isprintable() and len(name) <= 240 and bool(_path(path))


def _function(name: str, signature: str) -> bool:
    return name.isidentifier() and bool(signature) and signature.isprintable()


_TABLES = (
    "enclave",
    "memory",
    "files",
    "ocalls",
    "runtime",
    "seal",
    "release",
    "encrypted",
    "ecalls",
)


def load(path: str | Path) -> Manifest:
    """
    Read a manifest.

    Args:
        path: The manifest, or the folder of an ``enclave.toml``.

    Returns:
        The manifest, every value checked; the files it names are not looked at.

    Raises:
        ManifestError: What is wrong, by table, key and value.

    """
    path = Path(path)
    if path.is_dir():
        path = path / "enclave.toml"
    try:
        data = read_file(path, limit=_MAX_MANIFEST)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        values = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # numbers too long, too
        raise ManifestError(f"{path}: is not TOML: {error}") from None
    return _read(str(path), path.absolute().parent, values)


def _read(path: str, folder: Path, values: dict[str, Any]) -> Manifest:
    for name, value in values.items():
        if name not in _TABLES:
            what = f"table [{name}]" if isinstance(value, dict) else f"key {name} = {_shown(value)}"
            raise ManifestError(
                f"{path}: {what} is not known", expected=", ".join(f"[{t}]" for t in _TABLES)
            )
    tables = {name: _Table(path, name, values.get(name, {})) for name in _TABLES}
    enclave, memory, runtime = tables["enclave"], tables["memory"], tables["runtime"]
    native = "native" in enclave.values
    if native and "entry" in enclave.values:
        raise enclave.wrong("native", "either entry or native, not both")
    entry = folder / enclave.need("native" if native else "entry", "the path of a file", _path)
    enclave.asked |= {"entry", "native"}
    if not native and entry.suffix != ".py":
        raise enclave.wrong("entry", "a Python file", "A shared object is given as native = ….")
    if not native and tables["ecalls"].values:
        raise ManifestError(
            f"{path}: [ecalls] is for native entries",
            found=", ".join(tables["ecalls"].values),
            advice="A Python function says its types by annotations.",
        )
    seal, release, encrypted = tables["seal"], tables["release"], tables["encrypted"]
    ca = release.take("ca", "the path of a file", _path, "")
    addresses = {
        key: release.take(key, "an address https://host[:port]", _service, "")
        for key in ("attestation", "vault")
    }
    signature = "the text of a signature, by a function's name"
    manifest = Manifest(
        name=enclave.need("name", "a printable text of 1 to 64 characters", _text),
        entry=entry,
        native=native,
        product_id=enclave.need("product_id", "a number from 0 to 65535", _within(0, 65535)),
        security_version=enclave.need(
            "security_version", "a number from 0 to 65535", _within(0, 65535)
        ),
        debug=enclave.flag("debug"),
        threads=enclave.number("threads", 1, MAX_THREADS, 1),
        sealed=memory.pages("sealed", parse_sealed, "256 KiB to 64 TiB, or 0"),
        message=memory.size("message", 4096, _MAX_MESSAGE, DEFAULT_MESSAGE),
        shared=memory.pages("shared", parse_shared, "at most 16 GiB"),
        files={
            name: folder / value
            for name, value in tables["files"]
            .texts("the path of a file, by its plain name inside", _file_name)
            .items()
        },
        ocalls=tables["ocalls"].ocalls(),
        ecalls=tables["ecalls"].texts(signature, _function),
        blas_threads=runtime.number("blas_threads", 1, 1024, 1),
        jit=runtime.flag("jit"),
        extra=runtime.take("extra", "a list of modules", _modules, ()),
        seal_policy=seal.take(
            "policy",
            '"signer" or "unique"',
            lambda v: v if v in ("signer", "unique") else None,
            "signer",
        ),
        sealed_files=seal.take(
            "files", "a list of names of letters, digits, - and _", parse_file_names, ()
        ),
        release={key: value for key, value in addresses.items() if value}
        if "release" in values
        else None,
        release_ca=folder / ca if ca else None,
        encrypted_code=_code(encrypted, folder),
        encrypted_files=encrypted.take("files", "a list of names of [files]", _file_names, ()),
        encrypted_key=encrypted.take(
            "key", "https://VAULT/keys/NAME, with or without /VERSION", _key_url, ""
        ),
    )
    _check_encrypted(encrypted, manifest, given="encrypted" in values)
    for table in tables.values():
        table.finish()
    return manifest
