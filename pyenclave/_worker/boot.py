"""
The first code of a zygote, run from a write-sealed memfd that the platform verified.

At this point Python has nothing but what is built in or frozen: hashing, sealing and sockets are
files themselves. So the platform hands over, each in its own write-sealed memfd and each checked
against the lock: the source of the importer and the extensions that it stands on (the standard
library's SHA-256, and `fcntl` for seals). From then on every byte is hashed here before it is
executed.

No ``from __future__`` and no typing: both are files.
"""

import _imp
import posix
import sys
from _frozen_importlib import ModuleSpec


def _whole(fd: int) -> bytes:
    """Return all of the memfd *fd*, and close it."""
    parts = []
    offset = 0
    while part := posix.pread(fd, 1 << 24, offset):
        parts.append(part)
        offset += len(part)
    posix.close(fd)
    return b"".join(parts)


def boot(arguments: list[str]) -> None:
    """
    Load the importer and go on in it.

    Args:
        arguments: Numbers of descriptors: control socket, socket for compiled code (-1: none is
            wanted), table, lock, importer's source, compiled code (-1: there is none); then
            ``NAME=FD`` for each extension that the platform hands over.

    """
    # Nothing is found by a search path from here on; what is not in the lock does not exist.
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if getattr(finder, "__name__", "") in ("BuiltinImporter", "FrozenImporter")
    ]
    control, wanted, table, lock, source, code = (int(number) for number in arguments[:6])
    early: dict[str, int] = {}
    for argument in arguments[6:]:
        name, _, number = argument.partition("=")
        early[name] = int(number)
        module = _imp.create_dynamic(ModuleSpec(name, None, origin=f"/proc/self/fd/{number}"))
        _imp.exec_dynamic(module)
        sys.modules[name] = module
    name = "pyenclave._worker.importer"
    importer = type(sys)(name)
    sys.modules[name] = importer
    exec(compile(_whole(source), "pyenclave/_worker/importer.py", "exec"), importer.__dict__)  # noqa: S102 - verified by the platform
    sys.argv[1:] = []
    importer.start(control, _whole(table), _whole(lock), early, (code, wanted))


if __name__ == "__main__":
    boot(sys.argv[2:])
