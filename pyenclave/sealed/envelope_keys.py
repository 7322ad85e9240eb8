"""
Keys that wrap data keys: a public half, a private one, a shared secret, or a vault that is asked.

For `pyenclave.open_sealed(path, mode, key=…)`. Wrapping is RSA-OAEP with SHA-256 or AES key wrap
(RFC 7518, 4.3 and 4.4); nothing else is offered, whatever a file asks for.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, NoReturn, Protocol

from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from pyenclave._locks import Lock
from pyenclave.errors import ArgumentError, UnsealError
from pyenclave.formats import jose, key_envelope
from pyenclave.sealed.envelope import Wrapping, key_name

__all__ = ["PrivateKey", "PublicKey", "SharedKey", "VaultKeys", "VaultWrappingKey", "public_of"]

RSA: Final = "RSA-OAEP-256"
_AES: Final = {16: "A128KW", 24: "A192KW", 32: "A256KW"}
_KEPT: Final = 64  # data keys of a folder's files that stay at hand
_MAX_DATA: Final = 64


def _oaep() -> padding.OAEP:
    return padding.OAEP(
        mgf=padding.MGF1(algorithm=hashes.SHA256()), algorithm=hashes.SHA256(), label=None
    )


def _check_rsa(key: rsa.RSAPublicKey) -> rsa.RSAPublicKey:
    numbers = key.public_numbers()
    if not jose.MIN_RSA_BITS <= key.key_size <= jose.MAX_RSA_BITS or numbers.e < 65537:
        raise ArgumentError(
            "the RSA key is too weak or too long",
            expected=f"{jose.MIN_RSA_BITS} to {jose.MAX_RSA_BITS} bits, exponent 65537 or more",
            found=f"{key.key_size} bits, exponent {numbers.e}",
        )
    return key


def public_of(members: Mapping[str, Any]) -> rsa.RSAPublicKey:
    """
    Return the RSA key of a JWK's public members; others are not looked at.

    Raises:
        ArgumentError: No RSA key, malformed, or too weak.

    """
    kind = str(members.get("kty", "")).removesuffix("-HSM")
    if kind != "RSA":
        raise ArgumentError(
            "only RSA keys encrypt with their public half",
            expected="kty RSA or RSA-HSM",
            found=repr(members.get("kty"))[:40],
            advice="A key of type oct wraps in the vault; EC keys cannot wrap.",
        )
    numbers = []
    for name in ("n", "e"):
        raw = jose.b64url_decode(members.get(name, ""), f"key: {name}")
        numbers.append(int.from_bytes(raw, "big"))
    if numbers[0].bit_length() > jose.MAX_RSA_BITS or numbers[1].bit_length() > 64:
        raise ArgumentError("the RSA key is too long", expected=f"{jose.MAX_RSA_BITS} bits")
    try:
        return _check_rsa(rsa.RSAPublicNumbers(numbers[1], numbers[0]).public_key())
    except ValueError as error:
        raise ArgumentError("the JWK is no RSA key", found=str(error)) from None


class _Key:
    """What all keys have: they are neither copied nor written."""

    def __init__(self, kid: str) -> None:
        self.kid = kid

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kid}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are never pickled")


class PublicKey(_Key):
    """
    The public half of a vault's RSA key: it encrypts, offline, and opens nothing.

    Args:
        kid: The key's identifier with its version, as the vault gives it.
        public: The key.

    Raises:
        ArgumentError: The key is too weak.

    """

    def __init__(self, kid: str, public: rsa.RSAPublicKey) -> None:
        super().__init__(kid)
        self._public = _check_rsa(public)

    def wrap(self, data_key: bytes) -> Wrapping:
        """Wrap *data_key*."""
        return Wrapping(
            kid=self.kid, algorithm=RSA, wrapped=self._public.encrypt(data_key, _oaep())
        )


class PrivateKey(PublicKey):
    """
    An RSA key whole, as an owner has it who made it himself.

    Args:
        kid: Its identifier.
        private: The key.

    Raises:
        ArgumentError: The key is too weak.

    """

    def __init__(self, kid: str, private: rsa.RSAPrivateKey) -> None:
        super().__init__(kid, private.public_key())
        self._private = private

    def unwrap(self, wrapped: bytes, algorithm: str) -> bytes:
        """Unwrap what the public half wrapped."""
        _check_algorithm(algorithm, RSA)
        try:
            return self._private.decrypt(wrapped, _oaep())
        except ValueError:
            raise _not_ours(self.kid) from None


class SharedKey(_Key):
    """
    A secret of 16, 24 or 32 bytes, such as a released key of type oct: wraps and unwraps.

    Args:
        kid: Its identifier.
        secret: The key.

    """

    def __init__(self, kid: str, secret: bytes) -> None:
        super().__init__(kid)
        if len(secret) not in _AES:
            raise ValueError(f"a key that wraps has 16, 24 or 32 bytes, not {len(secret)}")
        self._secret = bytes(secret)
        self.algorithm = _AES[len(secret)]

    def wrap(self, data_key: bytes) -> Wrapping:
        """Wrap *data_key*."""
        made = keywrap.aes_key_wrap(self._secret, data_key)
        return Wrapping(kid=self.kid, algorithm=self.algorithm, wrapped=made)

    def unwrap(self, wrapped: bytes, algorithm: str) -> bytes:
        """Unwrap what `wrap` made."""
        _check_algorithm(algorithm, self.algorithm)
        if len(wrapped) > _MAX_DATA:
            raise _not_ours(self.kid)
        try:
            return keywrap.aes_key_unwrap(self._secret, wrapped)
        except (keywrap.InvalidUnwrap, ValueError):
            raise _not_ours(self.kid) from None


def _check_algorithm(found: str, expected: str) -> None:
    if found != expected:
        raise UnsealError("the key does not unwrap that way", expected=expected, found=found)


def _not_ours(kid: str) -> UnsealError:
    return UnsealError(
        "the data key does not unwrap",
        expected=f"one that {kid} wrapped",
        found="a changed one, or another key's",
    )


class VaultKeys(Protocol):
    """What is needed of a client of a vault: `pyenclave.vault_client.VaultClient` has it."""

    def get_key(self, name: str, version: str = "") -> Any:
        """Return a key's ``kid``, ``kty``, ``key_ops``, ``attributes`` and ``members``."""

    def wrap_key(
        self, name: str, algorithm: str, key: bytes, *, version: str = ""
    ) -> tuple[str, bytes]:
        """Have a key wrapped; return the wrapping key's identifier and the result."""

    def unwrap_key(self, name: str, algorithm: str, wrapped: bytes, *, version: str) -> bytes:
        """Have a key unwrapped."""


class VaultWrappingKey:
    """
    A key of a vault: RSA wraps here with the public half, oct in the vault; the vault unwraps.

    Any thread may use it. A data key that several files share is unwrapped once.

    Args:
        client: Asks the vault.
        name: The key's name.
        version: Its version. Without one the newest wraps, and each file's own unwraps.
        algorithm: For keys of type oct: ``A128KW``, ``A192KW`` or ``A256KW`` (default).

    Attributes:
        may_unwrap: False once it is known that the vault does not unwrap with the key, so that only
            what it is released to can open files.

    """

    def __init__(
        self, client: VaultKeys, name: str, version: str = "", *, algorithm: str = "A256KW"
    ) -> None:
        if algorithm not in key_envelope.ALGORITHMS:
            raise ValueError(f"algorithm: {algorithm!r} is none of {list(key_envelope.ALGORITHMS)}")
        self._client = client
        self.name = name
        self.version = version
        self._algorithm = algorithm
        self.may_unwrap = True  # as far as is known: the key's operations are asked for to wrap
        self._wraps: Callable[[bytes], Wrapping] | None = None
        self._opened: OrderedDict[bytes, Future[bytes]] = OrderedDict()
        self._lock = Lock()

    def wrap(self, data_key: bytes) -> Wrapping:
        """Wrap *data_key*; the vault is asked for the key once."""
        with self._lock:
            if self._wraps is None:
                self._wraps = self._wrapper()
            wraps = self._wraps
        return wraps(data_key)

    def _wrapper(self) -> Callable[[bytes], Wrapping]:
        key = self._client.get_key(self.name, self.version)
        kid, kind = str(key.kid), str(key.kty).removesuffix("-HSM")
        if key.attributes.get("enabled") is False:
            raise ArgumentError("the vault's key is disabled", found=kid)
        self.may_unwrap = "unwrapKey" in key.key_ops
        if not self.may_unwrap and not key.attributes.get("exportable"):
            raise ArgumentError(
                "nobody could open what this key encrypts",
                expected="the operation unwrapKey, or a key that may be released",
                found=", ".join(key.key_ops) or "no operation",
            )
        if kind == "RSA":
            return PublicKey(kid, public_of({**key.members, "kty": key.kty})).wrap
        if kind != "oct":
            raise ArgumentError(
                "the vault's key cannot wrap", expected="RSA or oct", found=str(key.kty)
            )
        version = key_name(kid).partition("/")[2]

        def wraps(data_key: bytes) -> Wrapping:
            said, made = self._client.wrap_key(
                self.name, self._algorithm, data_key, version=version
            )
            return Wrapping(kid=said, algorithm=self._algorithm, wrapped=made)

        return wraps

    def for_kid(self, kid: str) -> _Unwrapper:
        """
        Return what unwraps for the version that an envelope names.

        The name must be this key's: an envelope never chooses what the vault is asked for. Nor
        does it choose the vault.

        Raises:
            UnsealError: It is another key.

        """
        name, _, version = key_name(kid).partition("/")
        if "/keys/" not in kid or name != self.name or not version.isalnum():
            raise UnsealError(
                "the file is encrypted to another key", expected=f"…/keys/{self.name}/…", found=kid
            )
        if self.version and version != self.version:
            raise UnsealError(
                "the file is encrypted to another version of the key",
                expected=self.version,
                found=version,
                advice="Leave the version out of --key.",
            )
        return _Unwrapper(self, version)

    def unwrap_at(self, version: str, wrapped: bytes, algorithm: str) -> bytes:
        """Have the vault unwrap; used by what `for_kid` returns."""
        if algorithm not in key_envelope.ALGORITHMS:
            raise UnsealError(
                "the key does not unwrap that way",
                expected=" or ".join(key_envelope.ALGORITHMS),
                found=algorithm,
            )
        mark = hashlib.sha256(f"{version}/{algorithm}/".encode() + wrapped).digest()
        with self._lock:
            first = mark not in self._opened
            found = self._opened.setdefault(mark, Future())
            if len(self._opened) > _KEPT:
                self._opened.popitem(last=False)
        # Files of one folder that begin together ask once, and wait for the one answer.
        if first:
            try:
                made = self._client.unwrap_key(self.name, algorithm, wrapped, version=version)
                found.set_result(made)
            except BaseException as error:
                found.set_exception(error)
                with self._lock:
                    self._opened.pop(mark, None)
                raise
        return found.result()

    def __repr__(self) -> str:
        return f"<VaultWrappingKey {self.name}/{self.version}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are never pickled")


class _Unwrapper:
    """One version of a vault's key."""

    def __init__(self, key: VaultWrappingKey, version: str) -> None:
        self._key = key
        self._version = version

    def unwrap(self, wrapped: bytes, algorithm: str) -> bytes:
        return self._key.unwrap_at(self._version, wrapped, algorithm)
