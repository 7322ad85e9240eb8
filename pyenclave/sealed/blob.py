"""
Data sealing: blobs that an enclave of the right identity opens later.

Pure functions over a *key provider*, a callable that answers a 512-byte KEYREQUEST with a 32-byte
key (inside, the platform; in tests, a model of it). The construction:

- one key per blob: the KEYID of the request is new each time, hedged by a launch secret and by the
  message itself, so that a repeated random generator (a cloned or restored machine) gives either
  the same blob for the same message or an unrelated key, never one key for two messages;
- HKDF-SHA-256 splits the platform's key into an AES-256-GCM key and a commitment key; the
  commitment covers key, header and additional data, so that a blob opens under one key only;
- the whole header, lengths included, is the additional data of the cipher, before the caller's.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from pyenclave.errors import EnclaveError, SealingError, SealLimitError, UnsealError
from pyenclave.formats import sealed as fmt
from pyenclave.sealed import _aead
from pyenclave.sealed.policy import SealPolicy

__all__ = ["CounterBinding", "KeyProvider", "Opened", "SealingIdentity", "open_blob", "seal"]

KeyProvider = Callable[[bytes], bytes]

# Intel SDK defaults (tseal): every security-relevant attribute flag enters the key, XFRM does not,
# and the upper MISCSELECT bits do. A blob thus survives a CPU feature being switched on.
_ATTRIBUTE_MASK = struct.pack("<QQ", 0xFF0000000000000B, 0)
_MISC_MASK = 0xF0000000
_LABEL = b"pyenclave/blob/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class SealingIdentity:
    """Who seals or opens: the parts of the enclave's identity that choose keys."""

    mrenclave: bytes
    mrsigner: bytes
    product_id: int
    security_version: int
    cpu_svn: bytes
    debug: bool

    def under(self, policy: SealPolicy) -> bytes:
        """Return the 32 bytes that *policy* binds."""
        if policy is SealPolicy.unique:
            return self.mrenclave
        return self.mrsigner if policy is SealPolicy.signer else bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterBinding:
    """The counter, and its value, that make a blob the current one."""

    counter_id: bytes
    value: int


@dataclass(frozen=True, slots=True, repr=False)
class Opened:
    """An opened blob. ``data`` is secret and not shown."""

    header: fmt.SealedHeader
    data: bytes

    def __repr__(self) -> str:
        return f"Opened({self.header!r}, {len(self.data)} bytes)"


def _lengths(*parts: bytes | memoryview) -> bytes:
    return struct.pack(f"<{len(parts)}Q", *(len(part) for part in parts))


def _key_id(
    secret: bytes,
    header: bytes,
    data: memoryview,
    aad: bytes | None,
    random: Callable[[int], bytes],
) -> bytes:
    """
    Return 32 bytes that differ whenever the blob differs, whatever *random* gives.

    The whole header counts, the counter's value in it too: the same message under another value
    would else get the same key with other additional data, where *random* repeats itself.
    """
    fresh = random(32)
    mac = hmac.new(secret, _LABEL + b"/keyid", hashlib.sha256)
    extra = aad if aad is not None else b""
    mac.update(_lengths(fresh, header, extra, data) + bytes([aad is not None]))
    for part in (fresh, header, extra, data):
        mac.update(part)
    return mac.digest()


def _expand(platform_key: bytes) -> tuple[bytes, bytes]:
    """HKDF-SHA-256 (RFC 5869), one block each: the cipher's key and the commitment's key."""
    if len(platform_key) != 32:
        raise SealingError("the platform's key has the wrong size", expected=32)
    extracted = hmac.digest(_LABEL, platform_key, "sha256")
    cipher = hmac.digest(extracted, _LABEL + b"/encrypt\x01", "sha256")
    commit = hmac.digest(extracted, _LABEL + b"/commit\x01", "sha256")
    return cipher, commit


def _commitment(key: bytes, header: bytes, aad: bytes | None) -> bytes:
    inner = hashlib.sha256(aad if aad is not None else b"").digest()
    return hmac.digest(key, header[: fmt.AUTHENTICATED_SIZE] + inner, "sha256")


def seal(
    data: bytes | bytearray | memoryview,
    *,
    identity: SealingIdentity,
    policy: SealPolicy,
    key_provider: KeyProvider,
    secret: bytes,
    aad: bytes | None = None,
    min_version: int | None = None,
    counter: CounterBinding | None = None,
    random: Callable[[int], bytes] = os.urandom,
) -> bytes:
    """
    Seal *data*.

    Args:
        data: The plaintext; may be empty.
        identity: Who seals.
        policy: Who may open.
        key_provider: Answers key requests for *identity*.
        secret: At least 16 secret bytes of this launch; they hedge *random*.
        aad: Additional data, authenticated and not stored. ``None`` is not the same as empty.
        min_version: Lowest security version that may open; default (and at most) the own one.
        counter: Makes the blob the current one at this value of a monotonic counter.
        random: Source of random bytes.

    Raises:
        SealingError: The policy needs a signed image and this one is not; the key is refused.
        SealLimitError: More data than one blob holds.
        ValueError: *min_version* or *secret* is impossible.

    """
    view = memoryview(data).cast("B")
    if len(secret) < 16:
        raise ValueError("the hedging secret has fewer than 16 bytes")
    if len(view) > fmt.MAX_DATA or len(aad or b"") > fmt.MAX_DATA:
        raise SealLimitError("more data than one blob holds", expected=f"at most {fmt.MAX_DATA}")
    if policy is SealPolicy.signer and not any(identity.mrsigner):
        raise SealingError(
            "SealPolicy.signer needs a signed image",
            advice="Sign the image, or seal with SealPolicy.unique.",
        )
    version = identity.security_version if min_version is None else min_version
    if not 0 <= version <= identity.security_version:
        raise ValueError(
            f"min_version {version} is not between 0 and the own version "
            f"{identity.security_version}"
        )
    header = fmt.SealedHeader(
        key_policy=policy.value,
        security_version=version,
        product_id=identity.product_id,
        cpu_svn=identity.cpu_svn,
        attribute_mask=_ATTRIBUTE_MASK,
        misc_mask=_MISC_MASK,
        key_id=bytes(32),
        identity=identity.under(policy),
        debug=identity.debug,
        aad_length=None if aad is None else len(aad),
        length=len(view),
        counter_id=counter.counter_id if counter else None,
        counter_value=counter.value if counter else 0,
    )
    header = replace(header, key_id=_key_id(secret, header.to_bytes(), view, aad, random))
    cipher_key, commit_key = _expand(key_provider(header.key_request()))
    commitment = _commitment(commit_key, header.to_bytes(), aad)
    head = replace(header, commitment=commitment).to_bytes()
    return head + _aead.encrypt(cipher_key, view, head + (aad or b""))


def _check_identity(header: fmt.SealedHeader, identity: SealingIdentity) -> SealPolicy:
    """
    Compare what the header names with the own identity, for a clear message.

    Only public values are compared, and a header that lies leads to another key: this explains
    refusals, the key enforces them.
    """
    policy = SealPolicy(header.key_policy)
    wanted = identity.under(policy)
    name = {
        SealPolicy.unique: "measurement (SealPolicy.unique)",
        SealPolicy.signer: "signer (SealPolicy.signer)",
        SealPolicy.dangerous_any_enclave: "identity",
    }[policy]
    if header.debug != identity.debug:
        kinds = ("production", "debug")
        raise UnsealError(
            "debug and production enclaves never share sealed data",
            expected=kinds[identity.debug],
            found=kinds[header.debug],
        )
    if header.identity != wanted:
        raise UnsealError(
            f"the blob was sealed for another {name}",
            expected=wanted.hex(),
            found=header.identity.hex(),
            advice="Open it with the enclave that it was sealed for."
            if policy is SealPolicy.signer
            else "Data that must survive an update of the code is sealed with SealPolicy.signer.",
        )
    if header.product_id != identity.product_id:
        raise UnsealError(
            "the blob was sealed for another product",
            expected=identity.product_id,
            found=header.product_id,
        )
    if header.security_version > identity.security_version:
        raise UnsealError(
            "the blob was sealed for a newer security version",
            expected=f"at most {identity.security_version}",
            found=header.security_version,
            advice="Run the newer enclave; an older one never opens newer data.",
        )
    return policy


def open_blob(
    blob: bytes | bytearray | memoryview,
    *,
    identity: SealingIdentity,
    key_provider: KeyProvider,
    aad: bytes | None = None,
    min_version: int = 0,
) -> Opened:
    """
    Open *blob* for *identity*. The caller still judges ``header.counter_id``.

    Args:
        blob: What `seal` returned. It may be changed by others while this runs.
        identity: Who opens.
        key_provider: Answers key requests for *identity*.
        aad: Exactly what was given to `seal`.
        min_version: Blobs of lower security versions are refused.

    Raises:
        UnsealError: Not for this identity or version (named), or not authentic (not told apart:
            key, header, additional data, ciphertext and tag fail alike).

    """
    header, body = fmt.split(bytes(blob))
    _check_identity(header, identity)
    if header.security_version < min_version:
        raise UnsealError(
            "the blob is of a security version that is no longer accepted",
            expected=f"at least {min_version}",
            found=header.security_version,
        )
    failed = UnsealError(
        "the blob is not authentic",
        advice="It was changed, belongs to another platform, or the additional data differs.",
    )
    if header.aad_length != (None if aad is None else len(aad)):
        raise failed
    try:
        platform_key = key_provider(header.key_request())
    except UnsealError:
        raise
    except SealingError as error:
        raise UnsealError(f"the platform refuses the blob's key: {error}") from None
    except EnclaveError as error:
        if error.code.startswith("state"):
            raise  # the platform or the enclave is gone: that says nothing about the blob
        raise UnsealError(f"the platform refuses the blob's key: {error}") from None
    cipher_key, commit_key = _expand(platform_key)
    head = header.to_bytes()
    if not hmac.compare_digest(_commitment(commit_key, head, aad), header.commitment):
        raise failed
    data = _aead.decrypt(cipher_key, body, head + (aad or b""))
    if data is None:
        raise failed
    return Opened(header, data)
