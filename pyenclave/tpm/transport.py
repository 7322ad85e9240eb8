"""The ways to a TPM: a device of Linux, or the socket of a software TPM."""

from __future__ import annotations

import os
import re
import select
import socket
import stat
import time
from typing import Final, Protocol

from pyenclave.errors import TpmError
from pyenclave.formats import tpm_wire as wire

try:
    import fcntl
except ImportError:  # pragma: no cover - not on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["DEFAULT_DEVICE", "Transport", "connect", "lock_file"]

DEFAULT_DEVICE: Final = "/dev/tpmrm0"
_TCTI: Final = re.compile(r"swtpm:(?:path=(?P<path>.+)|host=(?P<host>[^,]+),port=(?P<port>\d+))")
_TCP: Final = re.compile(r"(?:tcp:)?(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):(?P<port>\d{1,5})")


class Transport(Protocol):
    """Carries one command at a time to a TPM, and its answer back."""

    def exchange(self, command: bytes, timeout: float) -> bytes:
        """
        Send *command* and return the whole answer.

        Raises:
            TpmError: No whole answer within *timeout* seconds; nothing more can be sent then.

        """

    def close(self) -> None:
        """Close it; may be called twice."""

    @property
    def fileno(self) -> int | None:
        """The descriptor of a device file, which processes may lock; None of anything else."""


class _Stream:
    """A TPM behind a descriptor that can be polled."""

    def __init__(self, fd: int, name: str, *, owner: socket.socket | None = None) -> None:
        self._fd = fd
        self._name = name
        self._socket = owner

    def exchange(self, command: bytes, timeout: float) -> bytes:
        """As :meth:`Transport.exchange`."""
        if self._fd < 0:
            raise TpmError(f"{self._name} is closed")
        try:
            return self._exchange(command, time.monotonic() + timeout)
        except BaseException as error:
            # The answer may still come, and would be taken for that of the next command.
            self.close()
            if isinstance(error, OSError):
                raise TpmError(f"{self._name}: {error.strerror or error}") from None
            raise

    def _exchange(self, command: bytes, deadline: float) -> bytes:
        if self._ready(select.POLLIN, time.monotonic()):
            stray = os.read(self._fd, wire.MAX_RESPONSE)
            what = "sends what nobody asked for" if stray else "was closed by the other side"
            raise TpmError(f"{self._name} {what}")
        left = memoryview(command)
        while left:
            self._wait(select.POLLOUT, deadline, "take the command")
            left = left[os.write(self._fd, left) :]
        data = b""
        size = wire.HEADER
        while len(data) < size:
            self._wait(select.POLLIN, deadline, "answer")
            # A device gives an answer in one piece: what is left of it after a read may be lost.
            part = os.read(self._fd, wire.MAX_RESPONSE + 1)
            if not part:
                raise TpmError(
                    f"{self._name} ended in the middle of an answer",
                    expected=f"{size} bytes",
                    found=f"{len(data)} bytes",
                )
            data += part
            if len(data) >= wire.HEADER:
                size = wire.response_size(data[: wire.HEADER])
        if len(data) > size:
            raise TpmError(
                f"{self._name}: bytes follow the answer", expected=f"{size} bytes", found=len(data)
            )
        return data

    def _ready(self, event: int, until: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, event)
        return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))

    def _wait(self, event: int, deadline: float, what: str) -> None:
        if not self._ready(event, deadline):
            raise TpmError(f"{self._name} did not {what} in time")

    @property
    def fileno(self) -> int | None:
        """The descriptor of a device; None of a socket."""
        return self._fd if self._socket is None and self._fd >= 0 else None

    def close(self) -> None:
        """Close it; may be called twice."""
        fd, self._fd = self._fd, -1
        if self._socket is not None:
            self._socket.close()
        elif fd >= 0:
            os.close(fd)


def connect(address: str = DEFAULT_DEVICE, *, timeout: float = 30.0) -> Transport:
    """
    Open the way to a TPM.

    Args:
        address: Path of a device or of a Unix socket; ``HOST:PORT``; or swtpm's own form,
            ``swtpm:path=PATH`` or ``swtpm:host=HOST,port=PORT``.
        timeout: Seconds for connecting.

    Raises:
        TpmError: It cannot be opened.
        ValueError: *address* has none of these forms.

    """
    if not address or "\0" in address:
        raise ValueError("the address of a TPM is a path, HOST:PORT, or swtpm:…")
    tcti = _TCTI.fullmatch(address)
    path = tcti["path"] if tcti is not None else address.removeprefix("device:")
    if tcti is None and re.match(r"(swtpm|mssim|tabrmd|libtpms|cmd):", address):
        raise ValueError(
            f"{address!r}: swtpm:path=PATH, swtpm:host=HOST,port=PORT and paths are understood"
        )
    tcp = tcti if tcti is not None and tcti["host"] else _TCP.fullmatch(address)
    try:
        if tcp is not None and (tcti is not None or not os.path.exists(address)):
            host, port = tcp["host"].strip("[]"), int(tcp["port"])
            made = socket.create_connection((host, port), timeout)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif stat.S_ISSOCK(os.stat(path).st_mode):
            made = _unix(path, timeout)
        else:
            # Not blocking: then the kernel works on the command while we can poll for its end.
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            return _Stream(os.open(path, flags), path)
    except PermissionError:
        raise TpmError(
            f"{address} cannot be opened: no permission",
            advice="TPM devices belong to root and group tss: be one of them.",
        ) from None
    except OverflowError:
        raise ValueError(f"{address!r}: a port is at most 65535") from None
    except OSError as error:
        raise TpmError(f"{address} cannot be opened: {error.strerror or error}") from None
    made.setblocking(False)
    return _Stream(made.fileno(), address, owner=made)


def _unix(path: str, timeout: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(timeout)
        made.connect(path)
    except OSError:
        made.close()
        raise
    return made


def lock_file(fd: int, timeout: float) -> None:
    """
    Lock an open file for this process alone, waiting for at most *timeout* seconds.

    Raises:
        TpmError: Another process held it all the time, or it cannot be locked.

    """
    if fcntl is None:
        raise TpmError("this system has no file locks")
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() + pause > deadline:
                raise TpmError(f"another process held the TPM for {timeout:g} s") from None
        except OSError as error:
            raise TpmError(f"the TPM cannot be locked: {error.strerror}") from None
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
