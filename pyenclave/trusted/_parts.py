"""
Encrypted parts of the image, inside: modules and files that open when the data key is there.

On the lock lists of images with ``[encrypted]`` only. The worker makes the one `Parts` of a process
before the entry is imported; ciphertext is part of the measured image.
"""

from __future__ import annotations

import hmac
import io
import threading
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from pyenclave._core import SecretMemory
from pyenclave.errors import EnclaveStateError, UnsealError
from pyenclave.formats.release import split_kid
from pyenclave.sealed import parts as format_of
from pyenclave.trusted import _state

if TYPE_CHECKING:
    from pyenclave.formats.image import EncryptedParts

__all__ = ["Parts", "unlock"]

_SIZE: Final = 32
_MAX_WRAPPED: Final = 1 << 20


class Parts:
    """
    The encrypted parts of an image; a finder and loader of its modules.

    Args:
        info: What the image says of them.
        files: Its files; the parts among them are ciphertext.
        root: Where they seem to lie.

    """

    def __init__(self, info: EncryptedParts, files: Mapping[str, memoryview], root: str) -> None:
        self.info = info
        self.modules = info.modules
        self._names = frozenset(info.files)
        self._files = files
        self._root = root
        self._secret: SecretMemory | None = None
        self._lock = threading.Lock()

    # ---- the key ------------------------------------------------------------------------------

    @property
    def unlocked(self) -> bool:
        """Whether the data key is there."""
        return self._secret is not None

    def unlock(self, data_key: bytes) -> None:
        """
        Take the data key.

        Raises:
            UnsealError: It is not the one that the image was built with.

        """
        if len(data_key) != _SIZE:
            raise UnsealError("the data key has another size", expected=_SIZE, found=len(data_key))
        root = format_of.root_of(data_key)
        if not hmac.compare_digest(format_of.check_value(root).hex(), self.info.check):
            raise UnsealError(
                "this is not the data key of the image's encrypted parts",
                advice="It is the one of --data-key-file when the image was built.",
            )
        with self._lock:
            if self._secret is None:
                secret = SecretMemory(_SIZE)
                secret.write(0, root)
                self._secret = secret

    # ---- what is in them ----------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        """Whether the file *name* of the image is encrypted."""
        return name in self._names

    def read(self, name: str) -> bytes:
        """
        Return what is in an encrypted file.

        Raises:
            EnclaveStateError: The data key is not there yet.
            UnsealError: It does not open, so that the image was built wrongly.

        """
        secret = self._secret
        if secret is None:
            raise EnclaveStateError(
                f"{name} is encrypted, and its key is not there yet",
                advice="Call trusted.unlock() first.",
            )
        return format_of.decrypt(secret.read(0, _SIZE), name, self._files[name])

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of an encrypted module."""
        file = self.modules.get(name)
        if file is None:
            return None
        spec = ModuleSpec(name, self, origin=f"{self._root}/{file}")  # type: ignore[arg-type]
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Use the default module."""

    def exec_module(self, module: ModuleType) -> None:
        """Decrypt, compile and run a module."""
        exec(self.get_code(module.__name__), module.__dict__)  # noqa: S102 - measured code

    def get_code(self, name: str) -> CodeType:
        """Return a module's code."""
        file = self.modules[name]
        code: CodeType = compile(self.read(file), f"{self._root}/{file}", "exec", dont_inherit=True)
        return code

    def get_source(self, name: str) -> None:
        """Return None: tracebacks show no source of encrypted code, in debug neither."""

    def is_package(self, name: str) -> bool:
        """Return False: an encrypted module is one file."""
        return False

    def invalidate_caches(self) -> None:
        """Do nothing: the image does not change."""


def _data_key(key: Any, wrapped: bytes | None) -> bytes:
    """Return the data key from what `unlock` was given."""
    if wrapped is not None:
        from pyenclave.sealed.file import open_sealed

        if len(wrapped) > _MAX_WRAPPED:
            raise UnsealError("the wrapped data key is too long", expected=f"{_MAX_WRAPPED} bytes")
        with open_sealed(io.BytesIO(wrapped), key=key) as file:
            return bytes(file.read(_SIZE + 1))
    if isinstance(key, bytes | bytearray | memoryview):
        return bytes(key)
    released = getattr(key, "key", None)
    if isinstance(released, bytes):
        return released
    raise TypeError(
        "key: 32 bytes or a released key of type oct; any other released key unwraps: give wrapped="
    )


def _released(parts: Parts) -> Any:
    """Have the key released that the manifest names."""
    if not parts.info.key:
        raise EnclaveStateError(
            "the image names no key of a vault",
            advice="Say [encrypted] key in the manifest, or give unlock() a key.",
        )
    from pyenclave import trusted

    vault, name, version = split_kid(parts.info.key)
    return trusted.release_key(vault, name, version=version)


def unlock(key: Any = None, *, wrapped: bytes | None = None) -> None:
    """
    Open the image's encrypted parts (``[encrypted]`` of the manifest), for as long as it runs.

    Afterwards its modules can be imported and its files be read. Called again it changes nothing.

    Args:
        key: The 32 bytes of the data key, such as `receive` returns; or a released key. By default
            the key that ``[encrypted] key`` names is released (`release_key`, from the vault and
            the attestation service of ``[release]``). A released key of type oct is the data key
            itself, any other unwraps it.
        wrapped: The data key as ``pyenclave encrypt`` made it for the vault's key. Where it comes
            from does not matter: what it holds is compared.

    Raises:
        NotInEnclaveError: Outside an enclave.
        EnclaveStateError: The image has no encrypted parts, or names no key.
        UnsealError: Not the data key that the image was built with.
        KeyReleaseError: The key was not released.

    """
    _state.current()
    parts = _state.parts
    if parts is None:
        raise EnclaveStateError(
            "the image has no encrypted parts", advice="Name them in the manifest: [encrypted]."
        )
    if parts.unlocked and key is None:
        return
    parts.unlock(_data_key(_released(parts) if key is None else key, wrapped))
