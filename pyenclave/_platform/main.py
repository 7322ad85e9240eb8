"""
The start of the platform process.

Whoever starts it waits for it, and for the zygote of what is to be launched. So the zygote comes
first, if its lock is at hand: the rest of the platform is imported while that one starts.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from pyenclave._platform.client import Start
from pyenclave._platform.codecache import CodeCache
from pyenclave._platform.diagnostics import log
from pyenclave._platform.endpoint import Endpoint
from pyenclave._platform.hardening import harden_platform
from pyenclave._platform.root import PlatformRoot
from pyenclave._platform.state import State
from pyenclave._platform.zygotes import Zygotes
from pyenclave.calls.channel import Channel, close_all
from pyenclave.errors import EnclaveError
from pyenclave.formats.lock import Roots

if TYPE_CHECKING:
    from pyenclave._platform.candidate import ZygoteFactory

__all__ = ["main", "make_zygotes"]

_HELLO_TIMEOUT: Final = 5.0
_SEND_TIMEOUT: Final = 5.0
_CLOSE_TIMEOUT: Final = 0.25
_LOCK_TIMEOUT: Final = 5.0  # for a predecessor that is ending
_OPEN_FILES: Final = 16384
_ROOT_FILE: Final = "platform-root.pem"
_MAX_ROOT_FILE: Final = 16 * 1024


def make_zygotes(roots: Roots, executable: str, codes: CodeCache | None) -> ZygoteFactory:
    """Return the zygotes of this platform; called in the main thread."""
    return Zygotes(roots, executable=executable, codes=codes)


def main(told: str) -> None:
    """
    Be the platform process; does not return.

    Args:
        told: A :class:`~pyenclave._platform.client.Start` as JSON.

    """
    status = 1
    try:
        harden_platform()
        start = msgspec.json.decode(told, type=Start, strict=True)
        first = Channel.from_fd(start.channel)
        os.set_inheritable(start.channel, False)
        try:
            _raise_limit()
            _run(start, first)
            status = 0
        except EnclaveError as error:
            _refuse(first, error)
    except Exception as error:
        log(f"{type(error).__name__}: {error}")
    finally:
        # Threads that wait for hosts must not hold up the end.
        os._exit(status)


def _run(start: Start, first: Channel) -> None:
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(State.open(start.state))
        endpoint = Endpoint(state, start.runtime)
        lock = None
        if state.writable:
            lock = state.take_lock(endpoint.lock_name, timeout=_LOCK_TIMEOUT)
        secret, ephemeral = state.load_root()
        root = PlatformRoot(secret, level="embedded", ephemeral=ephemeral)
        stack.callback(root.close)
        lasting = state.writable and not ephemeral
        codes = None
        if lasting:
            codes = CodeCache(state, root.derive("compiled-code", 32), start.runtime)
            stack.callback(codes.close)
        zygotes = make_zygotes(start.roots, start.executable, codes)
        stack.callback(_close_soon, zygotes)
        if codes is not None:
            _begin(zygotes, codes, start)

        # Most of the platform, imported while the zygote starts.
        from pyenclave._platform.counters import CounterStore, MemoryFiles
        from pyenclave._platform.launch import Launcher
        from pyenclave._platform.machine import have_vouched
        from pyenclave._platform.server import Server
        from pyenclave._platform.service import Services

        gc.enable()
        gc.freeze()
        if state.writable:
            state.sweep()
        if lasting:
            _publish(state, root)
        have_vouched(root, top=start.devices, imds=start.imds)
        files = state if not ephemeral else MemoryFiles()
        services = Services(root, CounterStore(files, root.derive("counters", 32), os.urandom))
        launcher = Launcher(root, zygotes, state)
        stack.callback(launcher.close)
        server = Server(root, services, launcher, state)
        stack.callback(server.close)
        _handle_signals(server.stop)
        listener = endpoint.listen()
        try:
            server.run(listener, first)
        finally:
            # First nobody can come any more, then what is there ends. The lock goes early: a
            # successor need not wait for our zygotes.
            if listener is not None:
                listener.close()
                endpoint.forget()
            if lock is not None:
                os.close(lock)


def _begin(zygotes: ZygoteFactory, codes: CodeCache, start: Start) -> None:
    """Start the zygote that the first host says it will need, if its lock is at hand."""
    if len(start.expect) != 32:
        return
    found = codes.lock_of(start.expect, debug=start.debug)
    if found is not None:
        zygotes.begin(found, debug=start.debug)


def _close_soon(zygotes: ZygoteFactory) -> None:
    # One that is just starting would hold up the end. It dies with this process in any case.
    thread = threading.Thread(target=zygotes.close, daemon=True)
    thread.start()
    thread.join(_CLOSE_TIMEOUT)


def _publish(state: State, root: PlatformRoot) -> None:
    """Have the root certificate in the state directory; nobody waits for what is there already."""
    if state.read_file(_ROOT_FILE, limit=_MAX_ROOT_FILE) is None:
        _write_root(state, root)
        return
    with contextlib.suppress(RuntimeError):  # no thread to be had: the next start looks
        threading.Thread(target=_write_root, args=(state, root), daemon=True).start()


def _write_root(state: State, root: PlatformRoot) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        pem = root.chain.root.public_bytes(Encoding.PEM)
        if state.read_file(_ROOT_FILE, limit=_MAX_ROOT_FILE) != pem:
            state.replace_file(_ROOT_FILE, pem)
    except (OSError, EnclaveError) as error:
        log(f"{_ROOT_FILE} cannot be written: {error}")


def _handle_signals(stop: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: stop())
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _raise_limit() -> None:
    # Each enclave and host needs a few descriptors; the soft limit is often 1024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _refuse(first: Channel, error: EnclaveError) -> None:
    """Tell the host that started us why there will be no platform."""
    from pyenclave._platform.wire import failure_of

    log(str(error))
    with contextlib.suppress(EnclaveError, TimeoutError):
        _, fds = first.receive(_HELLO_TIMEOUT)
        close_all(fds)
        first.send(failure_of(error), timeout=_SEND_TIMEOUT)
