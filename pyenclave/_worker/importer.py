"""
The locked importer: it reads once, hashes that copy, and executes that copy.

Every file of the lock is read when the zygote starts. Verified sources, those not yet imported
too, go into one write-sealed memfd; each shared object goes into its own and is mapped from
there, dependencies first. Later imports, in a closed worker too, open nothing. What the lock does
not list does not exist. On-disk bytecode is never looked at.

This module runs before anything but ``fcntl`` and a SHA-256 exists, so it imports neither typing
nor ``__future__`` (both are files). The core's SHA-256 is eight times faster, but needs modules
itself: it takes over as soon as it can be imported. Threads: imports hold Python's import lock.
"""

import _imp
import fcntl
import gc
import marshal
import posix
import sys
import time
from _frozen_importlib import (  # type: ignore[attr-defined] # typeshed leaves it out
    ModuleSpec,
    _call_with_frames_removed,
)

try:
    from _sha2 import sha256 as _sha256  # type: ignore[import-not-found]
except ImportError:  # before Python 3.12
    from _sha256 import sha256 as _sha256  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import CodeType, ModuleType

    from typing_extensions import Buffer

    from pyenclave.formats.lock import Lock

__all__ = [
    "Entry",
    "Locked",
    "LockedFinder",
    "Mismatch",
    "UnlistedImportError",
    "read_locked",
    "state",
]

_FIRST_FD = 128  # numbers of memfds count up from here: glibc must never see one path twice
_SEALS = 0x0F  # F_SEAL_SEAL | SHRINK | GROW | WRITE
_ADD_SEALS = 1033
_EBUSY = 16
_PATIENCE = 10.0  # seconds
_MFD = 0x0001 | 0x0002  # CLOEXEC | ALLOW_SEALING
_MFD_NOEXEC_SEAL = 0x0008  # nobody may execve it; mapping it executable still works
_MAX_FILE = 1 << 30
_ABSENT = "missing"
_DEBUGGER = "pyenclave._worker.debugger"  # on the lock lists of images that allow debug


class UnlistedImportError(ModuleNotFoundError):
    """
    Trusted code imports a module that the image's lock does not list.

    Attributes:
        module: Its name.

    """

    module = ""


class Mismatch(Exception):  # noqa: N818 - not seen by users, who get RuntimeLockError
    """Files that differ from the lock: one line each."""

    def __init__(self, files: list[str]) -> None:
        super().__init__("the runtime differs from the lock")
        self.files = files


class Entry:
    """One line of the table: a module, a library or a bootstrap file."""

    __slots__ = ("code", "compiled", "kind", "name", "needs", "path", "place", "sha256")

    def __init__(self, kind: str, name: str, path: str, sha256: str, needs: str) -> None:
        self.kind = kind
        self.name = name
        self.path = path
        self.sha256 = sha256
        self.needs = tuple(needs.split(",")) if needs else ()
        # (offset, size) in the memfd of sources, or (descriptor number, 0) of a shared object.
        self.place = (0, 0)
        # Of a source that the zygote compiled ahead for its workers.
        self.code: CodeType | None = None
        # (offset, size) of its compiled code in the memfd of sources; size 0: it has none.
        self.compiled: tuple[int, int] | None = None


class Locked:
    """
    The lock's files as this process knows them after reading each once.

    Attributes:
        modules: Modules by name.
        libraries: Shared libraries by SONAME.
        bootstrap: What was mapped or imported before this code ran, by path.
        data: Files that modules read while they are imported, by path.
        preload: Names that the zygote imports before it forks.
        sources: Descriptor of the write-sealed memfd with every verified source, and with the
            compiled code that the platform handed over.
        keep_code: Whether code compiled for an import is kept, to be handed to the platform.
        sealed: (device, inode) of every memfd that was sealed here or by the platform, and of
            libffi's copy of its code (``trampolines.py``).
        held: Descriptors that no worker may close, for what could come to lie under their numbers.
        files: (device, inode) of every bootstrap file, after its hash was checked.
        paths: Every locked path.
        lock: The lock's canonical bytes, as the platform handed them over.
        python: The interpreter that the lock names.
        debug: Whether debug enclaves are served.
        platform: Pid of the platform, this process's parent.
        locks: The one lock by its digest, once the zygote compared it with the table.
        accepted: Lines of ``/proc/self/maps`` that were judged and found right.
        snapshot: The whole of it when it was judged last. Its lines are among these or plain.

    """

    def __init__(self, table: bytes, lock: bytes) -> None:
        self.modules: dict[str, Entry] = {}
        self.libraries: dict[str, Entry] = {}
        self.bootstrap: dict[str, Entry] = {}
        self.data: dict[str, Entry] = {}
        self.preload: list[str] = []
        self.sources = -1
        self.keep_code = False
        self.sealed: set[tuple[int, int]] = set()
        self.held: list[int] = []
        self.files: dict[tuple[int, int], str] = {}
        self.lock = lock
        self.python = ""
        self.debug = False
        self.platform = 0
        self.locks: dict[bytes, Lock] = {}
        self.accepted: set[bytes] = set()
        self.snapshot = b""
        self._next_fd = _FIRST_FD
        for line in table.decode("utf-8").splitlines():
            tag, *fields = line.split("\t")
            if tag == "M":
                name, kind, path, sha256, needs = fields
                self.modules[name] = Entry(kind, name, path, sha256, needs)
            elif tag == "L":
                name, path, sha256, needs = fields
                self.libraries[name] = Entry("library", name, path, sha256, needs)
            elif tag == "B":
                path, sha256 = fields
                self.bootstrap[path] = Entry("bootstrap", path, path, sha256, "")
            elif tag == "D":
                path, sha256 = fields
                self.data[path] = Entry("data", path, path, sha256, "")
            elif tag == "P":
                self.preload.append(fields[0])
            elif tag == "V":
                self.python, debug, platform = fields
                self.debug = debug == "1"
                self.platform = int(platform)
            else:
                raise ValueError(f"unknown line in the table: {tag!r}")
        self.paths = {
            entry.path
            for entries in (self.modules, self.libraries, self.bootstrap, self.data)
            for entry in entries.values()
        }

    # ---- reading ------------------------------------------------------------------------------

    def verify_bootstrap(self) -> None:
        """Hash again what the platform hashed before exec. Raises Mismatch."""
        wrong: list[str] = []
        for entry in self.bootstrap.values():
            data, identity = _read(entry.path)
            if _check(entry, data, wrong):
                self.files[identity] = entry.path
        if wrong:
            raise Mismatch(wrong)

    def read_sources(self, early: dict[str, int], code: int = -1) -> None:
        """
        Read, hash and seal every source, and account for what the platform handed over.

        Args:
            early: Extensions that boot loaded, by name: the descriptor of the memfd.
            code: Descriptor of compiled code whose MAC the platform checked; -1: there is none.

        Raises:
            Mismatch: With a line for each file that is missing or changed.

        """
        wrong: list[str] = []
        for name, fd in early.items():
            status = posix.fstat(fd)
            self.sealed.add((status.st_dev, status.st_ino))
            entry = self.modules[name]
            if _check(entry, _pread(fd, status.st_size), wrong):
                entry.place = (fd, 0)
            # A number is never used twice: glibc knows what is mapped by its path.
            self._next_fd = max(self._next_fd, fd + 1)
            posix.close(fd)
        memfd = _memfd("pyenclave-sources")
        offset = 0
        for entry in [*self.modules.values(), *self.data.values()]:
            if entry.kind in ("module", "package", "data"):
                data, _ = _read(entry.path)
                if _check(entry, data, wrong) and data is not None:
                    _write(memfd, data)
                    entry.place = (offset, len(data))
                    offset += len(data)
        if wrong:
            # Name the shared objects too, so that one look tells everything.
            for entry in self._objects():
                _check(entry, _read(entry.path)[0], wrong)
            raise Mismatch(wrong)
        if code >= 0:
            try:
                self._add_code(memfd, offset, code)
            except (OSError, ValueError):
                pass  # sources are compiled, as they are without it
            finally:
                posix.close(code)
        self.sources = self._take(memfd)
        self._seal(self.sources)

    def _add_code(self, memfd: int, offset: int, fd: int) -> None:
        """
        Put compiled code behind the sources, and note which source each piece was compiled from.

        Only code of the very source that this process verified counts. The layout is in
        docs/formats/state.md; whoever wrote it had the platform's root key or was a zygote of this
        lock, in the same mode.
        """
        head = _pread(fd, 48)
        lock_size, table_size = (int.from_bytes(head[at : at + 4], "little") for at in (40, 44))
        begin = 48 + lock_size + table_size
        size = posix.fstat(fd).st_size - 32 - begin
        if size < 0 or _pread(fd, lock_size, 48) != self.lock:
            return
        table = _pread(fd, table_size, 48 + lock_size).decode("utf-8")
        posix.lseek(fd, begin, 0)
        left = size
        while left and (sent := posix.sendfile(memfd, fd, None, left)):
            left -= sent
        for line in table.splitlines():
            name, sha256, first, length = line.split("\t")
            entry = self.modules.get(name)
            place = (int(first), int(length))
            fits = place[0] >= 0 and place[1] >= 0 and sum(place) <= size - left
            if entry is not None and entry.sha256 == sha256 and fits:
                entry.compiled = (offset + place[0], place[1])

    def map_objects(self) -> None:
        """
        Read, hash, seal and map every shared object that is not mapped yet.

        Raises:
            Mismatch: With a line for each file that is missing or changed; then none is mapped.

        """
        import mmap  # a shared object itself

        wrong: list[str] = []
        held = []
        for entry in self._objects():
            # Copied by the kernel, sealed, and only then hashed: what is hashed is what is mapped.
            fd = self._copy(entry.path)
            if fd < 0:
                _check(entry, None, wrong)
                continue
            with mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as data:
                _check(entry, data, wrong)
            held.append((entry, fd))
        if wrong:
            raise Mismatch(wrong)
        for entry, fd in held:
            self._map(entry, fd)

    def map_object(self, entry: Entry) -> None:
        """Map one extension before its turn, with what it needs. Raises Mismatch."""
        needs = _dependencies_first(self.libraries, entry.needs)
        for one in [*needs, entry]:
            if not one.place[0]:
                wrong: list[str] = []
                data, _ = _read(one.path)
                if not _check(one, data, wrong) or data is None:
                    raise Mismatch(wrong)
                self._map(one, self._hold(data))

    def map_bytes(self, data: bytes) -> str:
        """Map a shared object out of the image; return the path by which the loader knows it."""
        entry = Entry("extension", "", "an object of the image", "", "")
        self._map(entry, self._hold(data))
        return f"/proc/self/fd/{entry.place[0]}"

    def _objects(self) -> list[Entry]:
        """Return all shared objects that are not mapped yet, dependencies first."""
        extensions = [entry for entry in self.modules.values() if entry.kind == "extension"]
        libraries = _dependencies_first(self.libraries, sorted(self.libraries))
        return [entry for entry in [*libraries, *extensions] if not entry.place[0]]

    def _hold(self, data: bytes) -> int:
        """Return a descriptor of a new sealed memfd that holds *data*."""
        fd = self._take(_memfd("pyenclave-object"))
        _write(fd, data)
        self._seal(fd)
        return fd

    def _copy(self, path: str) -> int:
        """Return a descriptor of a new sealed memfd with the file's bytes; -1: there are none."""
        file = _open(path)
        if file < 0:
            return -1
        fd = self._take(_memfd("pyenclave-object"))
        try:
            while posix.sendfile(fd, file, None, _MAX_FILE):
                pass
        except OSError:
            pass  # what is not whole has another hash
        finally:
            posix.close(file)
        self._seal(fd)
        if not posix.fstat(fd).st_size:
            posix.close(fd)
            return -1
        return fd

    def _take(self, fd: int) -> int:
        """Move the new descriptor *fd* to the next number that was never used."""
        number = self._next_fd
        self._next_fd += 1
        posix.dup2(fd, number, False)
        posix.close(fd)
        return number

    def _seal(self, fd: int) -> None:
        # The kernel refuses while anybody, itself too, holds on to a page (see _memfd.py).
        begin = time.monotonic()
        while True:
            try:
                fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
                break
            except OSError as error:
                if error.errno != _EBUSY or time.monotonic() - begin > _PATIENCE:
                    raise
            time.sleep(0.01)
        status = posix.fstat(fd)
        self.sealed.add((status.st_dev, status.st_ino))

    def _map(self, entry: Entry, fd: int) -> None:
        """
        Map a shared object now, so that nothing opens it later.

        The loader matches paths of objects that are mapped, so that the import proper finds this
        one by its path, and dependencies by their SONAME. create_dynamic is the only dlopen that
        is built in; no object has a start function of this name, so it maps and then fails.
        """
        entry.place = (fd, 0)
        spec = ModuleSpec("pyenclave_only_map_it", None, origin=f"/proc/self/fd/{fd}")
        flags = sys.getdlopenflags()
        sys.setdlopenflags(posix.RTLD_NOW)
        try:
            _imp.create_dynamic(spec)
        except ImportError as error:
            if "PyInit_pyenclave_only_map_it" not in str(error):
                raise Mismatch([f"{entry.path}: cannot be mapped: {error}"]) from None
        finally:
            sys.setdlopenflags(flags)
            posix.close(fd)

    def code(self, entry: Entry) -> "CodeType":
        """Return the code of a source: as it was compiled before, else compiled now."""
        if entry.code is not None:
            return entry.code
        if entry.compiled is not None and entry.compiled[1]:
            offset, size = entry.compiled
            try:
                # Not from outside: the platform checked the MAC, this process the source's hash.
                found = marshal.loads(_pread(self.sources, size, offset))  # noqa: S302
            except (EOFError, ValueError, TypeError, MemoryError):
                found = None
            if type(found) is type(_memfd.__code__):
                return found
            entry.compiled = None  # and is handed over anew
        code: CodeType = _call_with_frames_removed(
            compile, self.source(entry), entry.path, "exec", dont_inherit=True
        )
        if self.keep_code:
            entry.code = code
        return code

    def source(self, entry: Entry) -> bytes:
        """Return the verified source of a module, or a data file's bytes."""
        offset, size = entry.place
        return _pread(self.sources, size, offset)


def read_locked(entry: Entry) -> bytes:
    """Read a file of the lock once more; empty if it is not what was locked."""
    data, _ = _read(entry.path)
    return data if data is not None and _check(entry, data, []) else b""


def _read(path: str) -> tuple[bytes | None, tuple[int, int]]:
    """Return the file's bytes (None: there is no such regular file) and (device, inode)."""
    fd = _open(path)
    if fd < 0:
        return None, (0, 0)
    try:
        status = posix.fstat(fd)
        parts = []
        while part := posix.read(fd, max(status.st_size, 1) + 1):
            parts.append(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data, (status.st_dev, status.st_ino)
    except OSError:
        return None, (0, 0)
    finally:
        posix.close(fd)


def _open(path: str) -> int:
    """Return a descriptor of the regular file *path*, or -1."""
    try:
        # Not blocking: a FIFO in the place of a file must not hold the launch up.
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    except OSError:
        return -1
    status = posix.fstat(fd)
    if status.st_mode & 0o170000 != 0o100000 or status.st_size > _MAX_FILE:
        posix.close(fd)
        return -1
    return fd


def _check(entry: Entry, data: "Buffer | None", wrong: list[str]) -> bool:
    """Compare with the lock; a difference becomes a line of *wrong*."""
    found = _ABSENT
    if data is not None:
        core = sys.modules.get("pyenclave._core")
        fast = getattr(core, "sha256", None)
        found = fast(data).hex() if fast is not None else _sha256(data).hexdigest()
    if found == entry.sha256:
        return True
    wrong.append(f"{entry.path} ({entry.name}): expected {entry.sha256}, found {found}")
    return False


def _memfd(name: str) -> int:
    try:
        return posix.memfd_create(name, _MFD | _MFD_NOEXEC_SEAL)
    except OSError:  # before Linux 6.3
        return posix.memfd_create(name, _MFD)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[posix.write(fd, view) :]


def _pread(fd: int, size: int, offset: int = 0) -> bytes:
    parts = []
    while size and (part := posix.pread(fd, size, offset)):
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _dependencies_first(libraries: dict[str, Entry], wanted: "Iterable[str]") -> list[Entry]:
    """Return the *wanted* libraries and what they need, each after those that it needs."""
    ordered: dict[str, Entry] = {}
    for start in wanted:
        pending = [(start, False)]
        under_way: set[str] = set()
        while pending:
            name, ready = pending.pop()
            if name in ordered or name not in libraries:
                continue
            if ready:
                ordered[name] = libraries[name]
            elif name not in under_way:
                under_way.add(name)
                pending.append((name, True))
                pending.extend((need, False) for need in libraries[name].needs)
    return list(ordered.values())


# ---- import protocol -----------------------------------------------------------------------------


class _Loader:
    """What loaders of sources and of extensions have in common."""

    def __init__(self, locked: Locked, entry: Entry) -> None:
        self.locked = locked
        self.entry = entry

    def is_package(self, name: str) -> bool:
        return self.entry.kind in ("package", "namespace")

    def get_filename(self, name: str) -> str:
        return self.entry.path

    def get_code(self, name: str) -> "CodeType | None":
        return None

    def get_source(self, name: str) -> str | None:
        return None

    def get_data(self, path: str) -> bytes:
        """Return a locked source or data file by its path; nothing else is readable."""
        found = self.locked.data.get(path)
        if found is not None:
            return self.locked.source(found)
        for entry in self.locked.modules.values():
            if entry.path == path and entry.kind in ("module", "package"):
                return self.locked.source(entry)
        raise FileNotFoundError(2, "not in the lock", path)


class _SourceLoader(_Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: "ModuleType") -> None:
        code = self.get_code(self.entry.name)
        _call_with_frames_removed(exec, code, module.__dict__)
        if self.entry.name == "pdb" and self.locked.debug and _DEBUGGER in self.locked.modules:
            __import__(_DEBUGGER)  # makes pdb speak to ``pyenclave debug``

    def get_code(self, name: str) -> "CodeType":
        return self.locked.code(self.entry)

    def get_source(self, name: str) -> str | None:
        return self.locked.source(self.entry).decode("utf-8-sig", "replace")


class _NamespaceLoader(_Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: "ModuleType") -> None:
        pass


class _ExtensionLoader(_Loader):
    def create_module(self, spec: ModuleSpec) -> "ModuleType":
        if not self.entry.place[0]:
            self.locked.map_object(self.entry)
        inner = ModuleSpec(spec.name, None, origin=f"/proc/self/fd/{self.entry.place[0]}")
        module: ModuleType = _call_with_frames_removed(_imp.create_dynamic, inner)
        module.__file__ = self.entry.path
        return module

    def exec_module(self, module: "ModuleType") -> None:
        _call_with_frames_removed(_imp.exec_dynamic, module)


class LockedFinder:
    """The only finder besides those of built-in and frozen modules."""

    def __init__(self, locked: Locked) -> None:
        self.locked = locked

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """
        Return the spec of a locked module.

        Raises:
            UnlistedImportError: An import statement names a module that the lock does not list.

        """
        entry = self.locked.modules.get(name)
        if entry is None:
            # importlib.util.find_spec only asks whether there is such a module.
            if sys._getframe(2).f_code.co_name == "_find_and_load_unlocked":  # noqa: SLF001
                raise _unlisted(name)
            return None
        kinds = {"extension": _ExtensionLoader, "namespace": _NamespaceLoader}
        loader = kinds.get(entry.kind, _SourceLoader)(self.locked, entry)
        package = entry.kind in ("package", "namespace")
        namespace = entry.kind == "namespace"
        spec = ModuleSpec(
            name,
            loader,  # type: ignore[arg-type] # has the protocol, not the base class: that is a file
            origin=None if namespace else entry.path,
            is_package=package,
        )
        if package:
            folder = entry.path if namespace else entry.path.rpartition("/")[0]
            spec.submodule_search_locations = [folder]
        if not namespace:
            spec.has_location = True
        return spec

    def invalidate_caches(self) -> None:
        """Do nothing: the lock does not change."""


def _unlisted(name: str) -> UnlistedImportError:
    """Return the error of an import statement, called from find_spec."""
    error = UnlistedImportError(
        f"unlisted import: the image's lock has no module {name!r}; import it at the top of the "
        "entry, or name it in [runtime] extra",
        name=name,
    )
    error.module = name
    try:
        # find_spec, _find_spec, _find_and_load_unlocked, _find_and_load, and one to remove frames.
        caller = sys._getframe(6).f_code.co_name  # noqa: SLF001
    except ValueError:
        caller = ""
    if caller == "_handle_fromlist":
        # `from package import module`: by its name the error would be taken for that of an
        # attribute, and replaced by one that names no module.
        error.name = None
    return error


_state: Locked | None = None


def state() -> Locked:
    """Return what this zygote or worker loaded."""
    if _state is None:
        raise RuntimeError("this process was not started by the locked importer")
    return _state


# ---- start ---------------------------------------------------------------------------------------


def failure(code: str, message: str, files: list[str]) -> bytes:
    """Encode an error for the platform: plain bytes, since decoders are not loaded yet."""
    text = "\0".join([code, message, "\n".join(files)])
    return b"E" + text.encode("utf-8", "surrogateescape")[: 60 * 1024]


def start(
    control: int, table: bytes, lock: bytes, early: dict[str, int], codes: tuple[int, int]
) -> None:
    """
    Verify and load everything, then serve as the zygote; never returns.

    Args:
        control: The socket to the platform.
        table: The lock with resolved paths, one tab-separated line a file.
        lock: The lock's canonical bytes.
        early: Extensions that boot loaded: name and descriptor.
        codes: Descriptors of compiled code, and of the socket to hand over what is compiled here;
            -1: there is none.

    """
    global _state  # noqa: PLW0603 - one process, one lock
    gc.disable()  # what is loaded stays; zygote.serve collects once, at the end
    try:
        begun = time.monotonic()
        locked = Locked(table, lock)
        # The platform may have numbered them as the memfds that are to come: those overwrite.
        control = _renumber(control)
        wanted = _renumber(codes[1]) if codes[1] >= 0 else -1
        locked.read_sources(early, codes[0])
        locked.keep_code = wanted >= 0
        _state = locked
        sys.meta_path.append(LockedFinder(locked))
        for name in (*early, __name__):
            _adopt(locked, name)
        __import__("pyenclave._core")
        locked.verify_bootstrap()
        locked.map_objects()
        read = time.monotonic()
        for name in locked.preload:
            __import__(name)
        zygote = sys.modules["pyenclave._worker.zygote"]
        zygote.serve(control, locked, (read - begun, time.monotonic() - read), wanted)
    except Mismatch as error:
        posix.write(control, failure("image.runtime_lock", str(error), error.files))
    except UnlistedImportError as error:
        posix.write(control, failure("image.runtime_lock", str(error), [error.module]))
    except BaseException as error:
        posix.write(control, failure(*_describe(error)))
    posix._exit(1)  # noqa: SLF001


def _renumber(fd: int) -> int:
    """Move *fd* to the lowest number that is free."""
    found = posix.dup(fd)
    posix.close(fd)
    return found


def _adopt(locked: Locked, name: str) -> None:
    """Give a module that was loaded before the finder existed the looks of one loaded by it."""
    module = sys.modules[name]
    spec = LockedFinder(locked).find_spec(name)
    if spec is not None:
        module.__spec__ = spec
        module.__loader__ = spec.loader
        module.__file__ = spec.origin
        module.__package__ = spec.parent


def _describe(error: BaseException) -> tuple[str, str, list[str]]:
    """Return code, message and files of an error of any kind."""
    code = getattr(error, "code", None)
    message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    files = [str(line) for line in getattr(error, "files", ())]
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    if not isinstance(code, str):
        code = "launch"
        if where is not None:
            message += f" ({where.tb_frame.f_code.co_filename}:{where.tb_lineno})"
    return code, str(message), files
