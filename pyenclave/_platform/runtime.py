"""
The runtime of this machine against a lock: what is checked before a zygote is executed.

Bootstrap files are what the kernel and the dynamic loader map and Python imports before any code
of ours runs. They are hashed here before exec and again by the zygote after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from pyenclave._memfd import sealed
from pyenclave._platform.codecache import binding_of
from pyenclave.errors import ImageError, RuntimeLockError
from pyenclave.formats.lock import Lock, Roots, this_python

if TYPE_CHECKING:
    from pyenclave._platform.codecache import CodeCache

__all__ = ["BOOT", "Kit", "verify_runtime"]

# The sources that start a zygote, and the extensions that they cannot do without.
BOOT = "pyenclave._worker.boot"
IMPORTER = "pyenclave._worker.importer"
_EARLY = ("_sha2", "_sha256", "fcntl")
_CORE = "pyenclave._core"
_MAX_FILE = 1 << 30
_MISSING = "missing"


def _open(path: str) -> io.FileIO | None:
    """Open a regular file, or return None. A FIFO in its place does not block."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE:
        os.close(fd)
        return None
    return open(fd, "rb", buffering=0)


def _read(path: str) -> bytes | None:
    """Return the bytes of a regular file, or None."""
    file = _open(path)
    if file is None:
        return None
    with file:
        try:
            return file.read()
        except OSError:
            return None


def _hash(path: str) -> str:
    """Return the SHA-256 of a regular file; in pieces, which stay in the processor's cache."""
    file = _open(path)
    if file is None:
        return _MISSING
    with file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return _MISSING


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """
    What a zygote is started with: all of it verified, each part in its own sealed memfd.

    Attributes:
        executable: The interpreter, a bootstrap file.
        boot: Descriptor of the first code.
        arguments: Its further descriptors, as the command line names them.
        fds: All descriptors, for passing on.
        sanitized: Whether the core is a sanitizer build.

    """

    executable: str
    boot: int
    arguments: tuple[str, ...]
    fds: tuple[int, ...]
    sanitized: bool = field(default=False)

    def close(self) -> None:
        """Close the descriptors; the zygote has its own."""
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def verify_runtime(
    lock_bytes: bytes,
    roots: Roots,
    executable: str,
    *,
    debug: bool,
    platform: int,
    codes: CodeCache | None = None,
) -> Kit:
    """
    Check this machine's bootstrap files against a lock and make the kit of its zygote.

    Args:
        lock_bytes: The lock's canonical bytes; untrusted.
        roots: Where this machine keeps what a lock names.
        executable: The interpreter to start; symbolic links are followed.
        debug: Whether the zygote serves debug enclaves.
        platform: Pid of the process that will be the zygote's parent.
        codes: Where compiled code is kept; None: nowhere.

    Returns:
        The kit; the caller closes it.

    Raises:
        ImageError: The bytes are not a lock.
        RuntimeLockError: The runtime differs; ``files`` has a line for each file.

    """
    lock = Lock.from_bytes(lock_bytes)
    if lock.python != this_python():
        raise RuntimeLockError(
            "the image was built for another Python",
            expected=lock.python,
            found=this_python(),
            advice="Build the image with this Python, or make a lock for this runtime.",
        )
    wrong: list[str] = []

    def compare(name: str, path: str, expected: str, found: str) -> None:
        if found != expected:
            wrong.append(f"{path} ({name}): expected {expected}, found {found}")

    def verified(name: str, sha256: str) -> bytes:
        path = roots.resolve(name)
        data = _read(path)
        compare(name, path, sha256, _MISSING if data is None else hashlib.sha256(data).hexdigest())
        return data or b""

    paths = set()
    for file in lock.bootstrap:
        path = roots.resolve(file.path)
        compare(file.path, path, file.sha256, _hash(path))
        paths.add(os.path.realpath(path))
    modules = {module.name: module for module in lock.modules}
    contents: dict[str, bytes] = {}
    for name in (BOOT, IMPORTER, *_EARLY):
        if name in modules:
            contents[name] = verified(modules[name].path, modules[name].sha256)
        elif name not in _EARLY:  # these may be built in
            wrong.append(f"{name}: not in the lock")
    if wrong:
        raise RuntimeLockError("the runtime differs from the image's lock", files=tuple(wrong))
    interpreter = os.path.realpath(executable)
    if interpreter not in paths:
        raise RuntimeLockError(
            "the interpreter is not among the lock's bootstrap files",
            files=(f"{interpreter}: not in the lock",),
        )
    return _kit(
        lock, lock_bytes, roots, interpreter, contents, debug=debug, platform=platform, codes=codes
    )


def _kit(
    lock: Lock,
    lock_bytes: bytes,
    roots: Roots,
    interpreter: str,
    contents: dict[str, bytes],
    *,
    debug: bool,
    platform: int,
    codes: CodeCache | None,
) -> Kit:
    table = _table(lock, roots, debug=debug, platform=platform)
    fds: list[int] = []
    code = wanted = -1
    try:
        fds.extend(
            sealed(f"pyenclave-{what}", data, executable=False)
            for what, data in (
                ("boot", contents[BOOT]),
                ("table", table),
                ("lock", lock_bytes),
                ("importer", contents[IMPORTER]),
            )
        )
        early = []
        for name in _EARLY:
            if name in contents:
                fds.append(sealed("pyenclave-object", contents[name], executable=False))
                early.append(f"{name}={fds[-1]}")
        if codes is not None:
            binding = binding_of(table.partition(b"\n")[2], debug=debug)
            code = codes.load(hashlib.sha256(lock_bytes).digest(), debug=debug, binding=binding)
            wanted = codes.expect(lock_bytes, debug=debug, binding=binding)
            fds.extend(fd for fd in (code, wanted) if fd >= 0)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    needs = next((module.needs for module in lock.modules if module.name == _CORE), ())
    return Kit(
        executable=interpreter,
        boot=fds[0],
        arguments=(str(wanted), *map(str, fds[1:4]), str(code), *early),
        fds=tuple(fds),
        sanitized=any(need.startswith("libasan.") for need in needs),
    )


def _table(lock: Lock, roots: Roots, *, debug: bool, platform: int) -> bytes:
    """Write the lock with this machine's paths, one tab-separated line a file."""
    rows: list[tuple[str, ...]] = [("V", lock.python, "1" if debug else "0", str(platform))]
    rows += [("B", roots.resolve(f.path), f.sha256) for f in lock.bootstrap]
    for m in lock.modules:
        path = roots.resolve(m.path) if m.path else ""
        rows.append(("M", m.name, m.kind, path, m.sha256, ",".join(m.needs)))
    for x in lock.libraries:
        rows.append(("L", x.soname, roots.resolve(x.path), x.sha256, ",".join(x.needs)))
    rows += [("D", roots.resolve(f.path), f.sha256) for f in lock.data]
    rows += [("P", name) for name in lock.preload]
    text = "\n".join("\t".join(row) for row in rows)
    if any("\n" in cell or "\t" in cell for row in rows for cell in row) or "\r" in text:
        raise ImageError("a name in the lock, or a path of this machine, has a control character")
    return text.encode("utf-8", "surrogateescape")
