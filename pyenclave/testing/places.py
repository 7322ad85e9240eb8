"""A platform of the tests' own, and the images that they use."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pyenclave._platform.client import PlatformClient
from pyenclave.errors import EnclaveError
from pyenclave.formats.image import MAGIC

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

__all__ = ["EnclavePlatform", "image_of"]

_images: dict[tuple[str, bytes], bytes] = {}
_MAX_IMAGES = 64
_SECONDS = 10.0


class EnclavePlatform:
    """
    A platform with a root and counters of its own, in a state directory of the tests'.

    It runs as long as this object is open, so that every launch finds it warm.

    Args:
        state: The state directory; made if it is not there.

    Attributes:
        state: The state directory, for ``Enclave(..., state=…)`` or ``PYENCLAVE_STATE``.

    """

    def __init__(self, state: str | os.PathLike[str]) -> None:
        self.state = Path(state)
        self._client: PlatformClient | None = PlatformClient.connect(self.state)

    def _connection(self) -> PlatformClient:
        if self._client is None or self._client.lost:
            self._client = PlatformClient.connect(self.state)
        return self._client

    @property
    def pid(self) -> int:
        """The platform's process."""
        return self._connection().hello.pid

    @property
    def root(self) -> Certificate:
        """The platform's root certificate: ``verify(..., roots=[platform.root])``."""
        from cryptography import x509

        return x509.load_der_x509_certificate(self._connection().root().certificate)

    def running(self) -> int:
        """Return how many enclaves run."""
        return len(self._connection().list())

    def kill(self) -> None:
        """
        Kill it as the kernel would; all its enclaves are lost. The next launch starts another.

        Raises:
            TimeoutError: It does not end.

        """
        client = self._connection()
        with contextlib.ExitStack() as stack:
            waiting = []
            for pid in (*(row.pid for row in client.list()), client.hello.pid):
                with contextlib.suppress(ProcessLookupError):
                    waiting.append(os.pidfd_open(pid))
                    stack.callback(os.close, waiting[-1])
            os.kill(client.hello.pid, signal.SIGKILL)
            for pidfd in waiting:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(_SECONDS * 1000):
                    raise TimeoutError("the platform or one of its enclaves does not end")
        client.close()
        self._client = None

    def close(self) -> None:
        """Let it end with its last enclave."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def __repr__(self) -> str:
        return f"<EnclavePlatform in {self.state}>"


def image_of(source: Any) -> bytes:
    """
    Return the image of a module, function, Python file, folder with a manifest, or image.

    Built once for each content of its files; what it imports from elsewhere is taken as it was
    when the image was first built in this process.

    Raises:
        TypeError: *source* is none of these.
        ImageError: It cannot be built.

    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if callable(source) and not isinstance(source, type):
        source = sys.modules.get(getattr(source, "__module__", ""), source)
    if isinstance(source, ModuleType):
        file = getattr(source, "__file__", None)
        if file is None:
            raise TypeError(f"module {source.__name__} has no file")
        source = file
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a module, function, path or image is wanted, not {source!r}")
    path = Path(os.fspath(source)).resolve()
    if path.is_file():
        with path.open("rb") as opened:
            if opened.read(len(MAGIC)) == MAGIC:
                return path.read_bytes()
    key = (str(path), _digest(path))
    found = _images.get(key)
    if found is None:
        from pyenclave.image.build import build, build_script

        found = build_script(path) if path.suffix == ".py" else build(path)
        while len(_images) >= _MAX_IMAGES:
            del _images[next(iter(_images))]
        _images[key] = found
    return found


def _digest(path: Path) -> bytes:
    """Digest of a file and of all that lies beside a manifest."""
    digest = hashlib.sha256()
    folder = path if path.is_dir() else path.parent if path.suffix == ".toml" else None
    files = [path] if folder is None else sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        with contextlib.suppress(OSError):
            digest.update(hashlib.sha256(file.read_bytes()).digest() + os.fsencode(file.name))
    return digest.digest()


def end_quietly(handle: Any) -> None:
    """Close what a test may have closed, lost or poisoned."""
    with contextlib.suppress(EnclaveError):
        handle.close()
