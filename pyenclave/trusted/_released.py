"""A key that a vault released to this enclave: what it is, and how it opens what it wrapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from pyenclave._core import SecretMemory
from pyenclave.errors import ArgumentError, EnclaveClosedError, UnsealError
from pyenclave.formats import release

if TYPE_CHECKING:
    from pyenclave.sealed.envelope import Wrapping

__all__ = ["PrivateKey", "ReleasedKey"]

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

_OAEP: Final[Mapping[str, Any]] = {"RSA-OAEP": hashes.SHA1, "RSA-OAEP-256": hashes.SHA256}
_AES: Final = {"A128KW": 16, "A192KW": 24, "A256KW": 32}


class ReleasedKey:
    """
    A released key. It is neither written nor copied out of the enclave by anything here.

    The bytes of an ``oct`` key lie in secret memory and are wiped by `close`; an RSA or EC key is
    an object of OpenSSL, which wipes it when nothing uses it any more. What Python copied on the
    way (the unwrapped bytes, and what `key` returns for ``oct``) is freed, but cannot be wiped.

    Attributes:
        kid: Its identifier with its version, ``https://VAULT/keys/NAME/VERSION``.
        kty: ``RSA``, ``EC`` or ``oct``; whether a vault's hardware keeps it is the vault's word.
        key_ops: Operations that the vault says it is for.
        expires: When it ceases to be valid (seconds since 1970), if the vault says so.
        attributes: All that the vault says of it.
        other: Has another version of the key released; None: nothing does.
    """

    def __init__(
        self,
        *,
        kid: str,
        kty: str,
        key: PrivateKey | bytes,
        key_ops: tuple[str, ...] = (),
        expires: int | None = None,
        attributes: Mapping[str, Any] | None = None,
        other: Callable[[str], ReleasedKey] | None = None,
    ) -> None:
        self.kid = kid
        self.kty = kty
        self.key_ops = key_ops
        self.expires = expires
        self.attributes = dict(attributes or {})
        self.other = other  # has another version of it released
        self._object: PrivateKey | None = None
        self._memory: SecretMemory | None = None
        self._size = 0
        if isinstance(key, bytes):
            self._size = len(key)
            self._memory = SecretMemory(self._size)
            self._memory.write(0, key)
        else:
            self._object = key

    @property
    def name(self) -> str:
        """The key's name."""
        return release.split_kid(self.kid)[1]

    @property
    def version(self) -> str:
        """The key's version."""
        return release.split_kid(self.kid)[2]

    @property
    def key(self) -> Any:
        """
        The key: bytes (``oct``), or a private key object of ``cryptography``.

        Raises:
            EnclaveClosedError: `close` was called.

        """
        if self._object is not None:
            return self._object
        if self._memory is None:
            raise EnclaveClosedError(f"the released key {self.name} was closed")
        return self._memory.read(0, self._size)

    def unwrap(self, wrapped: bytes | bytearray | memoryview, algorithm: str) -> bytes:
        """
        Open a key that was wrapped under this one, as the vault's own ``unwrapkey`` would.

        Args:
            wrapped: What ``wrapkey`` returned, or what was encrypted to the public half.
            algorithm: ``RSA-OAEP-256`` or ``RSA-OAEP``; ``A128KW``, ``A192KW`` or ``A256KW`` for
                an ``oct`` key. There is no ``RSA1_5``.

        Raises:
            ArgumentError: The algorithm does not belong to the key.
            UnsealError: Not wrapped under this key, or changed.
            EnclaveClosedError: `close` was called.

        """
        key = self.key
        data = bytes(wrapped)
        if isinstance(key, rsa.RSAPrivateKey) and algorithm in _OAEP:
            digest = _OAEP[algorithm]()
            scheme = padding.OAEP(padding.MGF1(digest), digest, None)
            try:
                return key.decrypt(data, scheme)
            except ValueError:
                raise self._not_ours() from None
        if isinstance(key, bytes) and _AES.get(algorithm) == len(key):
            try:
                return keywrap.aes_key_unwrap(key, data)
            except (keywrap.InvalidUnwrap, ValueError):
                raise self._not_ours() from None
        known = [*_OAEP] if self.kty == "RSA" else [n for n, s in _AES.items() if s == self._size]
        raise ArgumentError(
            "the algorithm does not belong to the released key",
            expected=", ".join(known) or f"nothing: a key of type {self.kty} wraps nothing",
            found=repr(algorithm)[:60],
        )

    def wrap(self, data_key: bytes) -> Wrapping:
        """
        Wrap a data key, so that a file is sealed under this key (`trusted.open_sealed`).

        Raises:
            ArgumentError: An EC key wraps nothing.
            EnclaveClosedError: `close` was called.

        """
        from pyenclave.sealed.envelope import Wrapping

        key = self.key
        if isinstance(key, rsa.RSAPrivateKey):
            digest = hashes.SHA256()
            scheme = padding.OAEP(padding.MGF1(digest), digest, None)
            wrapped = key.public_key().encrypt(data_key, scheme)
            return Wrapping(kid=self.kid, algorithm="RSA-OAEP-256", wrapped=wrapped)
        for algorithm, size in _AES.items():
            if isinstance(key, bytes) and len(key) == size:
                wrapped = keywrap.aes_key_wrap(key, data_key)
                return Wrapping(kid=self.kid, algorithm=algorithm, wrapped=wrapped)
        raise ArgumentError(f"a released key of type {self.kty} wraps nothing")

    def for_kid(self, kid: str) -> ReleasedKey:
        """
        Return the version of this key that *kid* names, released now if need be.

        So a file that was sealed before the key was rotated opens with the newest key. Another key
        is never asked for, whatever a file says: then this one is returned, and does not fit.

        Raises:
            KeyReleaseError: The other version is not released.

        """
        try:
            _, name, version = release.split_kid(kid)
        except ValueError:
            return self
        if name != self.name or version in ("", self.version) or self.other is None:
            return self
        return self.other(version)

    def _not_ours(self) -> UnsealError:
        return UnsealError(f"not wrapped under the released key {self.kid}, or changed")

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._object is None and self._memory is None

    def close(self) -> None:
        """Wipe the key. May be called twice."""
        memory, self._memory = self._memory, None
        self._object = None
        if memory is not None:
            memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ReleasedKey {self.kid} {self.kty}{' closed' if self.closed else ''}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a released key is never pickled")
