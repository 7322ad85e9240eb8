"""
From a manifest or a script to an image.

Deterministic: the image is a function of the manifest's values, the entry, the files and the
runtime's lock list. No path, time, mode or locale of the build goes into it.
"""

from __future__ import annotations

import contextlib
import errno
import keyword
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pyenclave._files import read_file
from pyenclave.calls import files as files_of_host
from pyenclave.calls import services as services_of_host
from pyenclave.errors import ArgumentError, EvidenceFormatError, ImageError, ManifestError
from pyenclave.formats import elf
from pyenclave.formats.image import (
    CODE,
    MAGIC,
    MAX_IMAGE,
    MAX_RELEASE_TEXT,
    EncryptedParts,
    FileEntry,
    ImageInfo,
    assemble,
)
from pyenclave.formats.lock import Lock, Roots
from pyenclave.image import closure, ocalls
from pyenclave.image.manifest import Manifest, load, parse_file_names, parse_sealed, parse_shared
from pyenclave.sealed import parts

__all__ = ["build", "build_manifest", "build_script", "check_replaceable", "write_image"]

ECALL_PREFIX = "pye_ecall_"

# Imported inside when they are first used, by images that ask for what they do.
_SEALED_MEMORY = ("pyenclave.sealed.heap",)
_SEALED_FILES = ("pyenclave.sealed.file", "pyenclave.sealed.counter")
_RELEASE = ("pyenclave.trusted._release",)
_ENCRYPTED = ("pyenclave.trusted._parts", "pyenclave.sealed.file")


def build(
    source: str | Path,
    *,
    out: str | Path | None = None,
    lock: Lock | bytes | None = None,
    roots: Roots | None = None,
    data_key: bytes | None = None,
) -> bytes:
    """
    Build an unsigned image.

    Args:
        source: A manifest, the folder of an ``enclave.toml``, or a single Python file.
        out: Where to write the image, besides returning it.
        lock: The lock list of another runtime, on which the image shall run; this runtime's by
            default. It must hold every module that the entry imports here.
        roots: Where this machine keeps its Python; the running interpreter's by default.
        data_key: 32 bytes that encrypt what ``[encrypted]`` names.

    Returns:
        The bytes of the image.

    Raises:
        ManifestError: The manifest is wrong.
        ImageError: The entry or a file cannot be used, with file and line.
        OSError: *out* cannot be written.

    """
    if Path(source).suffix == ".py":
        if data_key is not None:
            raise ManifestError("a data key is given, and nothing is to be encrypted")
        data = build_script(source, lock=lock, roots=roots)
    else:
        data = build_manifest(load(source), lock=lock, roots=roots, data_key=data_key)
    if out is not None:
        write_image(out, data)
    return data


def build_script(
    path: str | Path,
    *,
    lock: Lock | bytes | None = None,
    roots: Roots | None = None,
    shared_memory: int | str = 0,
    sealed_memory: int | str = 0,
    sealed_files: Iterable[str] = (),
    release: bool = False,
) -> bytes:
    """
    Build an image of a single Python file: its stem is the name, it launches only as debug.

    Args:
        path: The file.
        lock: As for ``build``.
        roots: As for ``build``.
        shared_memory: Memory that host and enclave both map, for arrays: bytes, or a text such as
            ``"64 MiB"``.
        sealed_memory: Limit of plaintext in sealed arrays (``trusted.heap``), in the same form.
        sealed_files: Names of sealed files that the host lends (``trusted.open_sealed``).
        release: Whether keys are released to it (``trusted.release_key``).

    Returns:
        The bytes of the unsigned image.

    Raises:
        ImageError: The file cannot be used, with its line.
        ValueError: *shared_memory* or *sealed_memory* is no size, not whole pages, or out of range.

    """
    path = Path(path)
    _check_script(path)
    names = parse_file_names(list(sealed_files))
    if names is None or isinstance(sealed_files, str):
        raise ValueError(f"sealed_files: a list of plain names, not {sealed_files!r}")
    manifest = Manifest(
        name=path.stem[:64] or "script",
        entry=path.absolute(),
        product_id=0,
        security_version=0,
        debug=True,
        shared=parse_shared(shared_memory),
        sealed=parse_sealed(sealed_memory),
        sealed_files=names,
        release={} if release else None,
    )
    return build_manifest(manifest, lock=lock, roots=roots)


def _check_script(path: Path) -> None:
    """Say what to do instead with the other files that one may have: an image, a manifest."""
    advice = None
    if path.is_dir() or path.suffix == ".toml":
        advice = "Build it with `pyenclave build -o FILE`, and launch Enclave(FILE)."
    elif path.is_file():
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                advice = f"It is an image already: Enclave({str(path)!r})."
    if advice is not None:
        raise ImageError(f"{path}: from_file() takes one Python file", advice=advice)


def build_manifest(
    manifest: Manifest,
    *,
    lock: Lock | bytes | None = None,
    roots: Roots | None = None,
    data_key: bytes | None = None,
) -> bytes:
    """
    Build an unsigned image of a read manifest.

    Args:
        manifest: What to build.
        lock: As for ``build``.
        roots: As for ``build``.
        data_key: As for ``build``.

    Returns:
        The bytes of the image.

    Raises:
        ManifestError: Something is asked for that cannot be had.
        ImageError: The entry or a file cannot be used, with file and line.

    """
    entry = _entry(manifest)
    files = {entry.shown: entry.source}
    for name, path in manifest.files.items():
        files[f"files/{name}"] = _read(path, f"[files] {name}")
    hidden = _hidden(manifest, data_key)
    for module in hidden:
        files[module.shown] = module.source
    if sum(map(len, files.values())) > MAX_IMAGE // 2:
        raise ImageError("files of the image are too large", expected=f"<= {MAX_IMAGE // 2} bytes")
    only_python = {
        "[memory] sealed": bool(manifest.sealed),
        "[seal] files": bool(manifest.sealed_files),
        "[release]": manifest.release is not None,
    }
    for what, asked in only_python.items():
        if manifest.native and asked:
            raise ManifestError(f"{what} is for Python entries")
    released = _release(manifest)  # quickly wrong, and then the slow part is not begun
    if released is not None and services_of_host.NAME in manifest.ocalls:
        raise _by_hand("key release", services_of_host.NAME)
    extra = [
        *manifest.extra,
        *(_SEALED_MEMORY if manifest.sealed else ()),
        *(_SEALED_FILES if manifest.sealed_files else ()),
        *(_RELEASE if manifest.release is not None else ()),
        *(_ENCRYPTED if data_key is not None else ()),
    ]
    taken = closure.take(entry, extra=extra, debug=manifest.debug, roots=roots, hidden=hidden)
    encrypted = _encrypt(manifest, data_key, files)
    functions = _native_functions(entry, manifest.ecalls) if manifest.native else taken.functions
    _check_functions(entry, functions)
    declared = ocalls.merge(manifest.ocalls, taken.ocalls, functions)
    if manifest.sealed_files:
        declared = _with_own(declared, files_of_host.declared(), "sealed files")
    if manifest.release is not None:
        declared = _with_own(declared, services_of_host.declared(), "key release")
    if manifest.native and declared:
        raise ManifestError(
            "[ocalls] is for Python entries: native functions cannot call the host",
            found=", ".join(manifest.ocalls),
        )
    info = ImageInfo(
        name=manifest.name,
        product_id=manifest.product_id,
        security_version=manifest.security_version,
        debug=manifest.debug,
        threads=manifest.threads,
        entry_kind="native" if manifest.native else "python",
        entry_module=entry.module,
        entry_file=entry.shown,
        functions=functions,
        sealed_memory=manifest.sealed,
        message_limit=manifest.message,
        ocalls=declared,
        blas_threads=manifest.blas_threads,
        jit=manifest.jit,
        seal={
            "policy": manifest.seal_policy,
            # Absent where there are none, so that images without are what they were.
            **({"files": list(manifest.sealed_files)} if manifest.sealed_files else {}),
        },
        files=tuple(
            FileEntry(name=name, size=len(content), executable=name == entry.shown)
            for name, content in sorted(files.items())
        ),
        shared_memory=manifest.shared,
        release=released,
        encrypted=encrypted,
    )
    return assemble(info, _chosen_lock(lock, taken.lock), files)


def _with_own(
    declared: tuple[dict[str, Any], ...], own: tuple[dict[str, Any], ...], what: str
) -> tuple[dict[str, Any], ...]:
    """Return the ocalls and those that the library needs itself, sorted."""
    by_hand = {item["name"] for item in declared} & {item["name"] for item in own}
    if by_hand:
        raise _by_hand(what, min(by_hand))
    return tuple(sorted((*declared, *own), key=lambda item: str(item["name"])))


def _by_hand(what: str, name: str) -> ManifestError:
    return ManifestError(f"ocalls of {what} are not declared by hand", found=name)


def _release(manifest: Manifest) -> dict[str, str] | None:
    """Return what the image says of key release: addresses, and the authorities' certificates."""
    if manifest.release is None:
        return None
    found = dict(manifest.release)
    if manifest.release_ca is not None:
        from pyenclave.formats import x509

        data = _read(manifest.release_ca, "[release] ca")
        try:
            chain = x509.Certificate.from_pem_chain(data)
        except EvidenceFormatError as error:
            raise ManifestError(f"[release] ca: {error}") from None
        found["ca"] = "".join(x509.encode_pem(one.der).decode() for one in chain)
        if len(found["ca"]) > MAX_RELEASE_TEXT:
            raise ManifestError("[release] ca is too long", expected=f"<= {MAX_RELEASE_TEXT}")
    return found


def _hidden(manifest: Manifest, data_key: bytes | None) -> list[closure.Entry]:
    """Return the modules that are encrypted, as they are read here."""
    asked = bool(manifest.encrypted_code or manifest.encrypted_files)
    if asked != (data_key is not None):
        raise ManifestError(
            "a data key is given, and nothing is to be encrypted"
            if data_key is not None
            else "[encrypted] needs a data key",
            advice="pyenclave build --data-key-file FILE makes one and keeps it.",
        )
    if data_key is not None:
        parts.root_of(data_key)  # quickly wrong, and then the slow part is not begun
    found = []
    for name, path in manifest.encrypted_code.items():
        if name in sys.stdlib_module_names or name in ("pyenclave", "__main__"):
            raise ImageError(f"{path}: is called like the module {name} of the runtime")
        source = _read(path, "[encrypted] code")
        found.append(closure.Entry(module=name, path=path, shown=f"{CODE}{name}.py", source=source))
    return found


def _encrypt(
    manifest: Manifest, data_key: bytes | None, files: dict[str, bytes]
) -> EncryptedParts | None:
    """Replace in *files* what is to be encrypted."""
    if data_key is None:
        return None
    root = parts.root_of(data_key)
    names = [f"{CODE}{name}.py" for name in manifest.encrypted_code]
    names += [f"files/{name}" for name in manifest.encrypted_files]
    for name in names:
        files[name] = parts.encrypt(root, name, files[name])
    return EncryptedParts(
        check=parts.check_value(root).hex(),
        files=tuple(sorted(names)),
        key=manifest.encrypted_key,
    )


def write_image(path: str | Path, data: bytes, *, first: Callable[[], None] | None = None) -> None:
    """
    Write an image whole or not at all.

    Args:
        path: Where; what is there is replaced.
        data: The image.
        first: Called when all of it is written, before it has its name.

    Raises:
        OSError: It cannot be written, or what is there is no file.

    """
    path = Path(path)
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        if first is not None:
            first()
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (str(temporary), None):
            # The caller named this file, not the one beside it.
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """
    Refuse a place that has something else than a file: who may, would end a device with it.

    Args:
        path: Where a file is to be put.

    Raises:
        OSError: There is a device, a pipe, a socket, a folder, or a name of an open file.

    """
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return  # nothing is there, or writing finds out why it cannot be seen
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    opened = os.path.islink(name) and os.readlink(name).startswith("/proc/")  # /dev/stdout
    if opened or not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no file that could be replaced", name)


def _entry(manifest: Manifest) -> closure.Entry:
    path = manifest.entry
    stem = path.stem.replace("-", "_") if manifest.native else path.stem
    if not stem.isidentifier() or keyword.iskeyword(stem):
        raise ImageError(f"{path}: the file's name is not that of a module", found=repr(stem))
    if stem in sys.stdlib_module_names or stem in ("pyenclave", "__main__"):
        raise ImageError(
            f"{path}: the entry is called like the module {stem} of the runtime",
            advice="Give the file another name.",
        )
    source = _read(path, "the entry")
    if manifest.native and not elf.is_elf(source):
        raise ImageError(f"{path}: not a shared object")
    return closure.Entry(
        module=stem,
        path=path,
        shown=f"entry/{path.name}",
        native=manifest.native,
        source=source,
    )


def _read(path: Path, what: str) -> bytes:
    if not path.is_file():
        raise ImageError(f"{what}: {path} is not a file")
    try:
        return read_file(path, limit=MAX_IMAGE)
    except OSError as error:
        raise ImageError(f"{what}: {path} cannot be read: {error.strerror}") from None


def _native_functions(
    entry: closure.Entry, annotations: Mapping[str, str]
) -> tuple[dict[str, Any], ...]:
    from pyenclave.calls import signature

    names = elf.exported(entry.source, str(entry.path), ECALL_PREFIX)
    for name in annotations:
        if name not in names:
            raise ManifestError(
                f"[ecalls] {name}: {entry.path.name} has no such function",
                expected=", ".join(names) or f"a function {ECALL_PREFIX}{name}",
            )
    try:
        return tuple(
            signature.native_functions({name: annotations.get(name, "") for name in names})
        )
    except ArgumentError as error:
        raise ManifestError(f"[ecalls] {error}") from None


def _check_functions(entry: closure.Entry, functions: tuple[dict[str, Any], ...]) -> None:
    from pyenclave.calls.signature import RESERVED_NAMES

    if not functions:
        raise ImageError(
            f"{entry.path}: no function can be called",
            advice="Decorate one with @pyenclave.ecall (native: define it by PYE_ECALL).",
        )
    for function in functions:
        name = function["name"]
        # The signature says so too; an image with such a name must not come to be in any case.
        if name in RESERVED_NAMES or name.startswith("_"):
            raise ImageError(
                f"{entry.path}: an ecall cannot be called {name}",
                expected="no method of Enclave, and no underscore in front",
                advice="Give the function another name.",
            )


def _chosen_lock(given: Lock | bytes | None, own: Lock) -> Lock:
    if given is None:
        return own
    lock = given if isinstance(given, Lock) else Lock.from_bytes(given)
    known = {module.name for module in lock.modules}
    missing = [module.name for module in own.modules if module.name not in known]
    if missing:
        raise ImageError(
            "the given lock list has not every module that the entry imports",
            found=", ".join(missing[:20]),
            advice="Make the lock list with the same entry and extras on that runtime.",
        )
    return lock
