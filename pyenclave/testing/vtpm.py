"""
A software TPM, and the vTPM of an Azure confidential VM in front of it.

`Swtpm` runs swtpm, which Debian has as a package. `AzureTpm` stands before one: it passes commands
on, and answers those for the HCL report's NV index itself, for swtpm caps an index at 2,048 bytes
and the report is larger. As the paravisor does, it makes a new report at the start of a read, at
most every two seconds, of what the guest wrote into the index for user data.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from pyenclave.errors import TpmError
from pyenclave.formats.tpm import TpmPublic
from pyenclave.formats.tpm_wire import (
    NV_AUTHREAD,
    NV_AUTHWRITE,
    NV_OWNERREAD,
    NV_OWNERWRITE,
    NV_WRITTEN,
    NvPublic,
    sized,
)
from pyenclave.testing.azure import AzureVm
from pyenclave.tpm import OWNER, Tpm

__all__ = ["AK_HANDLE", "AzureTpm", "Swtpm"]

AK_HANDLE: Final = 0x81000003
_NV_REPORT: Final = 0x01400001
_NV_USER_DATA: Final = 0x01400002
_NV_SIZE: Final = 2600  # what current images define
_PERIOD: Final = 2.0  # REPORT_TIMER_PERIOD, seconds
_WAIT: Final = 10.0
_READ_PUBLIC, _READ = 0x169, 0x14E
_CREATE_PRIMARY, _EVICT, _FLUSH = 0x131, 0x120, 0x165
_RANGE: Final = 0x146  # TPM_RC_NV_RANGE
# fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign
_AK_ATTRIBUTES: Final = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 16 | 1 << 18


class Swtpm:
    """
    A software TPM of its own, on a Unix socket; `address` is the one for `Tpm.open` and tpm2-tools.

    Raises:
        FileNotFoundError: swtpm is not installed.

    """

    def __init__(self) -> None:
        if shutil.which("swtpm") is None:
            raise FileNotFoundError("swtpm is not installed")
        self._folder = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> str:
        """The socket."""
        return f"{self._folder}/tpm.sock"

    @property
    def address(self) -> str:
        """The form that tpm2-tools understand, too (TPM2TOOLS_TCTI)."""
        return f"swtpm:path={self.path}"

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="pyenclave-swtpm-")
        server, control = (f"type=unixio,path={self.path}{end}" for end in ("", ".ctrl"))
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self._folder}"]
        flags = ["--flags", "not-need-init,startup-clear"]
        self._process = subprocess.Popen(
            [*command, "--server", server, "--ctrl", control, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _WAIT
        while not (os.path.exists(self.path) and os.path.exists(f"{self.path}.ctrl")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise TpmError("swtpm did not start")
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_WAIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self) -> Tpm:
        """Connect to it; it serves one client at a time."""
        return Tpm.open(self.address)


def make_ak(tpm: Tpm, handle: int = AK_HANDLE) -> TpmPublic:
    """Make an attestation key as Azure's vTPM has it, and keep it at *handle*."""
    template = TpmPublic(attributes=_AK_ATTRIBUTES, unique=bytes(256)).to_bytes()
    template = template[: -2 - 256] + sized(b"")  # the modulus is for the TPM to make
    sensitive = sized(sized(b"") + sized(b""))
    body = sensitive + sized(template) + sized(b"") + bytes(4)
    answer = tpm.run(_CREATE_PRIMARY, (OWNER,), body, passwords=(b"",), answered_handles=1)
    made = answer.number(4, "handle")
    tpm.run(_EVICT, (OWNER, made), handle.to_bytes(4, "big"), passwords=(b"",)).end()
    tpm.run(_FLUSH, (), made.to_bytes(4, "big")).end()
    return tpm.read_public(handle)


class AzureTpm:
    """
    The vTPM of an Azure confidential VM, on a Unix socket of its own.

    Args:
        upstream: The TPM behind it: a software TPM; its attestation key is made if it has none.
        vm: Makes the HCL reports; its attestation key is replaced by the TPM's.
        clock: Seconds, from any start: when a new report is due.
        recorded: An HCL report that is served for ever instead: a recording.
        size: Bytes of the NV index.

    Attributes:
        reports: How many reports were made.
    """

    def __init__(
        self,
        upstream: Tpm,
        vm: AzureVm,
        *,
        clock: Callable[[], float] = time.monotonic,
        recorded: bytes | None = None,
        size: int = _NV_SIZE,
    ) -> None:
        self.reports = 0
        self._upstream = upstream
        self._vm = vm
        self._clock = clock
        self._recorded = recorded
        self._size = size
        self._made_at: float | None = None
        self._blob = b""
        self._mutex = threading.Lock()
        self._folder = ""
        self._listener: socket.socket | None = None
        self._clients: set[socket.socket] = set()
        try:
            self.ak = upstream.read_public(AK_HANDLE)
        except TpmError:
            self.ak = make_ak(upstream)

    @property
    def path(self) -> str:
        """The socket: for `Tpm.open`, or as ``/dev/tpmrm0`` below a folder of devices."""
        return f"{self._folder}/tpmrm0"

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="pyenclave-vtpm-")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for client in list(self._clients):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- the report -----------------------------------------------------------------------------

    def _jwk(self) -> dict[str, Any]:
        def text(value: bytes) -> str:
            return base64.urlsafe_b64encode(value).rstrip(b"=").decode("ascii")

        exponent = (self.ak.exponent or 65537).to_bytes(3, "big")
        key = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": text(exponent)}
        return key | {"n": text(self.ak.unique)}

    def _report(self) -> bytes:
        """Return the index's content at the start of a read."""
        if self._recorded is not None:
            self._blob = self._recorded.ljust(self._size, b"\0")
            return self._blob
        now = self._clock()
        if self._made_at is None or now - self._made_at >= _PERIOD:
            claims: dict[str, Any] = {"keys": [self._jwk()]}
            with contextlib.suppress(TpmError):  # the guest wrote nothing yet
                claims["user-data"] = self._upstream.nv_read(_NV_USER_DATA).hex().upper()
            data = self._vm.runtime_data(**claims)
            self._blob = self._vm.hcl_report(runtime_data=data).ljust(self._size, b"\0")
            self._made_at = now
            self.reports += 1
        return self._blob

    # ---- the socket -----------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), client:
            while True:
                head = _exactly(client, 10)
                size = int.from_bytes(head[2:6], "big")
                command = head + _exactly(client, size - 10)
                with self._mutex:
                    answer = self._answer(command)
                client.sendall(answer)
        self._clients.discard(client)

    def _answer(self, command: bytes) -> bytes:
        code, index = int.from_bytes(command[6:10], "big"), _NV_REPORT.to_bytes(4, "big")
        if code == _READ_PUBLIC and command[10:14] == index:
            attributes = NV_WRITTEN | NV_OWNERREAD | NV_OWNERWRITE | NV_AUTHREAD | NV_AUTHWRITE
            public = NvPublic(index=_NV_REPORT, attributes=attributes, size=self._size)
            area = public.to_bytes()
            return _framed(0x8001, sized(area) + sized(public.name))
        if code == _READ and command[14:18] == index:
            end = 22 + int.from_bytes(command[18:22], "big")
            wanted = int.from_bytes(command[end : end + 2], "big")
            offset = int.from_bytes(command[end + 2 : end + 4], "big")
            blob = self._blob if offset and self._blob else self._report()
            if wanted > 1024 or offset + wanted > len(blob):
                return _framed(0x8001, b"", code=_RANGE)
            data = sized(blob[offset : offset + wanted])
            body = len(data).to_bytes(4, "big") + data + _session(command, data)
            return _framed(0x8002, body)
        return self._upstream.raw(command)


def _session(command: bytes, data: bytes) -> bytes:
    """Answer the session of a read: a password, or an HMAC without key, as tpm2-tss takes."""
    handle = command[22]
    if handle != 0x02:
        return b"\0\0\1\0\0"
    import hmac

    nonce_size = int.from_bytes(command[26:28], "big")
    caller = command[28 : 28 + nonce_size]
    attributes = command[28 + nonce_size : 29 + nonce_size]
    digest = hashlib.sha256((0).to_bytes(4, "big") + _READ.to_bytes(4, "big") + data).digest()
    nonce = os.urandom(32)
    code = hmac.digest(b"", digest + nonce + caller + attributes, "sha256")
    return sized(nonce) + attributes + sized(code)


def _framed(tag: int, body: bytes, *, code: int = 0) -> bytes:
    size = 10 + len(body)
    return tag.to_bytes(2, "big") + size.to_bytes(4, "big") + code.to_bytes(4, "big") + body


def _exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = client.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def device_folder(folder: Path, socket_path: str) -> Path:
    """Make ``dev/tpmrm0`` below *folder* a way to a socket, for ``root=`` arguments."""
    (folder / "dev").mkdir(parents=True, exist_ok=True)
    (folder / "dev" / "tpmrm0").symlink_to(socket_path)
    return folder
