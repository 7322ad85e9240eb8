"""What tests of closed processes share: who is who, and closing one whole."""

from __future__ import annotations

import ctypes
import os

from pyenclave import _native

ROOT = os.getuid() == 0
NOBODY = 65534
X86 = os.uname().machine == "x86_64"
PTRACE_SEIZE = 0x4206
libc = ctypes.CDLL(None, use_errno=True)
everything = {
    "dumpable_off",
    "untraced",
    "userns",
    "netns",
    "pidns",
    "landlock",
    "seccomp",
    "mdwe",
    "secretmem",
    "locked",
    "nodump",
    "no_new_privs",
    "no_capabilities",
    "mountns",
    "ipcns",
    "utsns",
    "cgroupns",
}


def succeeds(attempt) -> bool:
    try:
        return bool(attempt())
    except OSError:
        return False


def spawn_and(function, *, names=_native.NAMESPACES):
    """Run *function* in a spawned worker of this process; return its JSON value."""
    import json

    reader, writer = os.pipe()
    spawned = _native.spawn(names)
    if spawned.pid == 0:
        try:
            answer = json.dumps(function())
        except BaseException as error:
            answer = json.dumps({"failed": repr(error)})
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    text = b""
    while piece := os.read(reader, 65536):
        text += piece
    os.close(reader)
    os.close(spawned.pidfd)
    _, status = os.waitpid(spawned.pid, 0)
    assert status == 0, os.waitstatus_to_exitcode(status)
    return json.loads(text)


def close_whole(*, jit: bool = False) -> dict[str, bool | int]:
    _native.harden_early()
    _native.drop_capabilities()
    _native.reset_signals()
    _native.sandbox_before_threads()
    return _native.sandbox_after_threads(jit=jit)
