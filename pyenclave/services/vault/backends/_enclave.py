"""
The trusted code of the vault's enclave: private halves exist in here only.

The image is built at first use for this runtime and signed with a key of the state directory, as
the tool enclave is. The key-encryption keys are made here and leave only as sealed blobs (policy
``signer``: an update of this code with the same signer and product reads them; an older security
version never reads newer ones). Each private half leaves only wrapped: its own key by HKDF from a
key-encryption key and a random salt, AES-256-GCM, committed to that key, with the *context* of the
key authenticated. ``docs/formats/wrapped-key.md`` has the bytes.

A release is decided here: the host brings a token and the policy, whose hash is in the context; the
token is verified by keys of the attestation service that this enclave got itself, over TLS that
ends here, under the terms that are wrapped with the key; and what is wrapped for is the transfer
key of that token. The host cannot name another. Its clock is the host's: see `_Held.time`.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - what ssl looks names up with must be on the lock list
import functools
import hashlib
import hmac
import itertools
import os
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pyenclave import trusted
from pyenclave.errors import EvidenceFormatError, UnsealError
from pyenclave.formats import jwa, vault_keys
from pyenclave.formats.http_answer import AnswerReader, http_date
from pyenclave.formats.jwk import Jwk, Jwks
from pyenclave.formats.key_context import KeyContext
from pyenclave.formats.release_decision import (
    Decision,
    NotReleasedError,
    Step,
    Target,
    Trace,
    decide,
)
from pyenclave.formats.release_outcome import Outcome
from pyenclave.formats.release_policy import authority_host
from pyenclave.formats.release_terms import MAX_TERMS, Anchor, ReleaseTerms, key_digest
from pyenclave.sealed import _aead

_MAGIC: Final = b"PYEVKEY\x01"
_WITH_TERMS: Final = b"PYEVKEY\x02"  # exportable: terms before the material
_KEK_AAD: Final = b"pyenclave/vault-kek/1"  # additional data of these blobs, and of nothing else
_LABEL: Final = b"pyenclave/vault-key/1"
_HEAD: Final = len(_MAGIC) + 16 + 32 + 32  # magic, key-encryption key's id, salt, commitment
_MAX_WRAPPED: Final = (16 << 10) + MAX_TERMS  # bytes; RSA-4096 in PKCS #8 has 2,400
_MAX_KEKS: Final = 64
_MAX_RANDOM: Final = 128
_OPENED: Final = 256  # keys that are kept open
_ROOTS: Final = "/enclave/files/authorities.pem"  # the system's, when the image was built
_MAX_KEYS: Final = 512 << 10  # bytes of a key set; Azure's, with certificates, has 60 KB
_FRESH: Final = 600.0  # seconds after which a key set is asked for again
_STALE: Final = 6 * 3600.0  # seconds after which one that was not renewed is dropped
_AUTHORITIES: Final = 256  # whose keys are kept
_SESSIONS: Final = 16
_SESSION: Final = 30.0  # seconds until which an authority must have answered


class Refused(trusted.PublicError):
    """What the caller of the vault may know: why this key cannot do that."""

    text: str = ""
    status: int = 400
    reason: str = "BadParameter"

    def __init__(self, text: str, *, status: int = 400, reason: str = "BadParameter") -> None:
        super().__init__(text, text=text, status=status, reason=reason)


F = TypeVar("F", bound=Callable[..., Any])


def _told(function: F) -> F:
    """Let the text of refusals cross, and of nothing else."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (jwa.AlgorithmError, EvidenceFormatError) as error:
            raise Refused(str(error)) from None

    return wrapper  # type: ignore[return-value]


# ---- key-encryption keys -----------------------------------------------------------------------


class _Kek:
    """One key-encryption key."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._hedge = hmac.digest(secret, _LABEL + b"/salt", "sha256")
        self.id = hmac.digest(secret, _LABEL + b"/id", "sha256")[:16]

    def salt(self, context: bytes, material: bytes) -> bytes:
        """Return 32 bytes that repeat only with the very same content, whatever urandom gives."""
        mac = hmac.new(self._hedge, os.urandom(32), "sha256")
        mac.update(len(context).to_bytes(8, "little") + context + material)
        return mac.digest()

    def keys(self, salt: bytes, context: bytes) -> tuple[bytes, bytes]:
        """HKDF-SHA-256 (RFC 5869), one block each: the cipher's key and the commitment's key."""
        extracted = hmac.digest(salt, self._secret, "sha256")
        info = _LABEL + hashlib.sha256(context).digest()
        cipher = hmac.digest(extracted, info + b"/encrypt\x01", "sha256")
        return cipher, hmac.digest(extracted, info + b"/commit\x01", "sha256")


_keks: dict[bytes, _Kek] = {}
_current: list[_Kek] = []  # none or one
_lock: Final = threading.Lock()


@trusted.ecall
def kek_new() -> tuple[bytes, bytes]:
    """
    Make a key-encryption key; return its id and sealed form.

    Nothing is wrapped with it before `kek_open` was given that form back: the host keeps it first.
    """
    kek = _Kek(secret := os.urandom(32))
    if len(_keks) >= _MAX_KEKS:
        raise Refused("too many key-encryption keys", status=409, reason="Conflict")
    return kek.id, trusted.seal(secret, policy=trusted.SealPolicy.signer, aad=_KEK_AAD)


@trusted.ecall
def kek_open(blobs: list[bytes]) -> list[bytes]:
    """Open key-encryption keys, the last of which wraps, and forget others; return their ids."""
    if not 0 < len(blobs) <= _MAX_KEKS:
        raise Refused("no key-encryption key, or too many")
    try:
        opened = [_Kek(trusted.unseal(blob, aad=_KEK_AAD)) for blob in blobs]
    except UnsealError as error:
        # The host holds the whole blob; the text says nothing that is not in its header.
        raise Refused(str(error), status=500, reason="InternalError") from None
    with _lock:
        gone = _keks.keys() - {kek.id for kek in opened}
        _keks.clear()
        _keks.update({kek.id: kek for kek in opened})
        _current[:] = [opened[-1]]
        if gone:
            _opened.clear()  # what they wrapped opens no more
    return [kek.id for kek in opened]


# ---- wrapped private halves --------------------------------------------------------------------


def _commitment(key: bytes, head: bytes, context: bytes) -> bytes:
    return hmac.digest(key, head + hashlib.sha256(context).digest(), "sha256")


@dataclass(frozen=True, slots=True)
class _Private:
    """What is wrapped: the key's material, and what its releases are judged by."""

    material: bytes
    terms: bytes | None = None

    def plain(self) -> tuple[bytes, bytes]:
        """Return the magic and the plaintext."""
        if self.terms is None:
            return _MAGIC, self.material
        return _WITH_TERMS, len(self.terms).to_bytes(4, "little") + self.terms + self.material


def _private(material: bytes, context: bytes, terms: bytes) -> _Private:
    """Bind terms to a key that may be released; another one has none."""
    if not KeyContext.from_bytes(context).exportable:
        return _Private(material)
    ReleaseTerms.from_bytes(terms)
    return _Private(material, terms)


def _wrap(private: _Private, context: bytes) -> bytes:
    if not _current:
        raise Refused("there is no key-encryption key", status=503, reason="ServiceUnavailable")
    kek = _current[0]
    magic, plain = private.plain()
    salt = kek.salt(context, plain)
    cipher, commit = kek.keys(salt, context)
    head = magic + kek.id + salt
    head += _commitment(commit, head, context)
    return head + _aead.encrypt(cipher, plain, head + context)


def _unwrap(wrapped: bytes, context: bytes) -> _Private:
    """Return the key: PKCS #8, or the bytes of a shared key."""
    refused = Refused(
        "the key's private half does not belong to its record", status=500, reason="InternalError"
    )
    if not _HEAD < len(wrapped) <= _MAX_WRAPPED or wrapped[:8] not in (_MAGIC, _WITH_TERMS):
        raise refused
    kek = _keks.get(wrapped[8:24])
    if kek is None:
        raise Refused("unknown key-encryption key", status=500, reason="UnknownKek")
    head = wrapped[:56]
    cipher, commit = kek.keys(head[24:], context)
    if not hmac.compare_digest(_commitment(commit, head, context), wrapped[56:_HEAD]):
        raise refused
    opened = _aead.decrypt(cipher, wrapped[_HEAD:], wrapped[:_HEAD] + context)
    if opened is None:
        raise refused
    if head.startswith(_MAGIC):
        return _Private(opened)
    end = 4 + int.from_bytes(opened[:4], "little")
    return _Private(opened[end:], opened[4:end])


@dataclass(frozen=True, slots=True)
class _Opened:
    material: bytes
    key: jwa.Key
    terms: ReleaseTerms | None


_opened: Final[OrderedDict[bytes, _Opened]] = OrderedDict()


def _open(wrapped: bytes, context: bytes) -> _Opened:
    """Return a key; keys that were used lately are kept open."""
    name = hashlib.sha256(len(context).to_bytes(8, "little") + context + wrapped).digest()
    with _lock:
        if found := _opened.get(name):
            _opened.move_to_end(name)
            return found
    private = _unwrap(wrapped, context)
    key: jwa.Key = private.material
    if not KeyContext.from_bytes(context).kty.startswith("oct"):
        # Authentic, and checked when it was made or imported: not again.
        loaded = serialization.load_der_private_key(
            private.material, None, unsafe_skip_rsa_key_validation=True
        )
        if not isinstance(loaded, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise Refused("the private half is of another kind", status=500, reason="InternalError")
        key = loaded
    terms = None if private.terms is None else ReleaseTerms.from_bytes(private.terms)
    opened = _Opened(private.material, key, terms)
    with _lock:
        if wrapped[8:24] in _keks:  # not one that was taken away meanwhile
            _opened[name] = opened
        while len(_opened) > _OPENED:
            _opened.popitem(last=False)
    return opened


def _kind(kty: str, context: bytes) -> str:
    bound = KeyContext.from_bytes(context).kty
    if kty.removesuffix("-HSM") != bound.removesuffix("-HSM"):
        raise Refused("the key's kind is not that of its record")
    return bound.removesuffix("-HSM")


# ---- what the vault asks for -------------------------------------------------------------------


@trusted.ecall
@_told
def generate(
    kty: str, size: int, crv: str, context: bytes, terms: bytes
) -> tuple[dict[str, str], bytes]:
    """Make a key; 0 and an empty text are the defaults."""
    key = vault_keys.make(_kind(kty, context), size, crv)
    private = _private(vault_keys.material_of(key), context, terms)
    return vault_keys.public_of(key), _wrap(private, context)


@trusted.ecall
@_told
def import_key(jwk: dict[str, str], context: bytes, terms: bytes) -> tuple[dict[str, str], bytes]:
    """Take somebody's key: the members of a JWK as base64url texts."""
    key = vault_keys.from_jwk(jwk, _kind(jwk.get("kty", ""), context))
    private = _private(vault_keys.material_of(key), context, terms)
    return vault_keys.public_of(key), _wrap(private, context)


@trusted.ecall
@_told
def perform(
    wrapped: bytes, context: bytes, operation: str, algorithm: str, fields: dict[str, bytes]
) -> dict[str, bytes]:
    """Use a key."""
    return jwa.perform(_open(wrapped, context).key, operation, algorithm, fields)


@trusted.ecall
@_told
def rebind(wrapped: bytes, context: bytes, new_context: bytes, terms: bytes) -> bytes:
    """
    Wrap a key under another context: its policy was replaced, or made immutable.

    What no update of a key may do is refused here too, where the database cannot overrule it: the
    kind of key stays, a key that may not leave never may, an immutable policy stays and stays so,
    and with it the terms. With a new policy the terms are those of now, and so they are for a key
    of before there were any.
    """
    old, new = KeyContext.from_bytes(context), KeyContext.from_bytes(new_context)
    if (old.name, old.version) != (new.name, new.version):
        raise Refused("a key keeps its name and version")
    if old.kty != new.kty or old.exportable != new.exportable:
        raise Refused("a key keeps its kind, and whether it is exportable")
    if old.immutable and (new.policy_hash != old.policy_hash or not new.immutable):
        raise Refused("the key's release policy is immutable", status=403, reason="Forbidden")
    private = _unwrap(wrapped, context)
    if not old.immutable or _is_lacking(old, wrapped):
        private = _private(private.material, new_context, terms)
    return _wrap(private, new_context)


def _is_lacking(bound: KeyContext, wrapped: bytes) -> bool:
    return bound.exportable and wrapped.startswith(_MAGIC)


@trusted.ecall
@_told
def rewrap(wrapped: bytes, context: bytes, terms: bytes) -> bytes:
    """
    Wrap a key under the current key-encryption key; nothing if it is already.

    An exportable key of before there were terms gets them; terms that there are stay.
    """
    lacking = _is_lacking(KeyContext.from_bytes(context), wrapped)
    if _current and wrapped[8:24] == _current[0].id and not lacking:
        return b""
    private = _unwrap(wrapped, context)
    return _wrap(_private(private.material, context, terms) if lacking else private, context)


# ---- releases ----------------------------------------------------------------------------------


class _Held:
    """The keys of one authority, and what it said of the time."""

    def __init__(self, jwks: Jwks, moment: float | None) -> None:
        self.jwks = jwks
        self.came = time.monotonic()
        # A moment that the authority signed, and when it was heard.
        self._moment = float("-inf") if moment is None else moment
        self._heard = self.came

    def time(self) -> float:
        """
        Return the time, seconds since 1970: never before what the authority is known to have said.

        The machine's clock can be set back by who owns it; an expired token does not hold again
        then, for the authority dates its keys, over TLS, and its tokens.
        """
        return max(time.time(), self.earliest)

    @property
    def earliest(self) -> float:
        """The moment before which it cannot be, by the authority's word."""
        return self._moment + (time.monotonic() - self._heard)

    def heard(self, moment: float) -> None:
        """Take note of a moment that the authority signed."""
        if moment > self.earliest:
            self._moment, self._heard = moment, time.monotonic()

    def merged(self, before: _Held | None) -> _Held:
        """Keep what was known of the time."""
        if before is not None:
            self.heard(before.earliest)
        return self


_held: Final[OrderedDict[bytes, _Held]] = OrderedDict()  # by the anchor's SHA-256


def _keep(anchor: Anchor, jwks: Jwks, moment: float | None) -> None:
    name = hashlib.sha256(anchor.to_bytes()).digest()
    with _lock:
        _held[name] = _Held(jwks, moment).merged(_held.get(name))
        _held.move_to_end(name)
        while len(_held) > _AUTHORITIES:
            _held.popitem(last=False)


@dataclass(slots=True)
class _Record:
    """A key's record: what is bound to the key, and what the host says of its state."""

    enabled: bool
    not_before: int | None
    expires: int | None
    exportable: bool
    kty: str
    release_policy: bytes | None


class _NeededError(Exception):
    """Keys of an authority are needed."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__()
        self.missing = missing


def _anchor_of(terms: ReleaseTerms, target: str | Target) -> tuple[Anchor | None, _Held | None]:
    if isinstance(target, str):
        return None, None
    anchor = terms.anchor(target.issuer)
    if anchor is None:
        return None, None
    name = hashlib.sha256(anchor.to_bytes()).digest()
    with _lock:
        held = _held.get(name)
        if held is not None:
            _held.move_to_end(name)
    return anchor, held


def _decided(record: _Record, terms: ReleaseTerms, target: str, *, final: bool) -> Decision:
    """
    Decide by keys that are at hand.

    Raises:
        _NeededError: There are none, or newer ones should be asked for.

    """
    read: str | Target = target
    with contextlib.suppress(NotReleasedError):  # `decide` says so, at its place
        read = Target.read(Trace(), target)
    anchor, held = _anchor_of(terms, read)

    def find(_authority: str, kid: str | None) -> Jwk | None:
        age = float("inf") if held is None else time.monotonic() - held.came
        if held is None or age > _STALE:
            raise _NeededError(missing=True)
        found = held.jwks.find(kid)
        if not final and (found is None or age > _FRESH):
            raise _NeededError(missing=False)
        return found

    decision = decide(
        record,
        read,
        find=find,
        knows=lambda _authority: anchor is not None,
        now=time.time() if held is None else held.time(),
        skew=terms.skew,
        strict=terms.strict,
    )
    if decision.transfer is not None and held is not None and decision.target is not None:
        held.heard(decision.target.claims["iat"] - terms.skew)
    return decision


def _offered(terms: ReleaseTerms, enc: str) -> Step:
    """Look whether the key may be wrapped like that: the host's settings have no word here."""
    sha1 = isinstance(jwa.OAEP.get(enc), hashes.SHA1)
    return Step("transfer.enc", terms.sha1 or not sha1, "OAEP over another hash than SHA-1", enc)


def _policy_of(bound: KeyContext, policy: bytes) -> bytes | None:
    if bound.policy_hash is None:
        return None
    if not hmac.compare_digest(hashlib.sha256(policy).digest(), bound.policy_hash):
        raise Refused(
            "the release policy does not belong to the key's record",
            status=500,
            reason="InternalError",
        )
    return policy


@trusted.ecall
@_told
def release(
    wrapped: bytes,
    context: bytes,
    policy: bytes,
    target: str,
    enc: str,
    state: tuple[bool, int | None, int | None],
    final: bool,
) -> tuple[bytes, bytes, bool, bytes]:
    """
    Wrap a key for the transfer key of a token that satisfies its policy.

    Args:
        wrapped: The private half.
        context: What it is bound to.
        policy: Its release policy, whose hash is in *context*.
        target: The attestation token.
        enc: The construction to wrap by.
        state: Whether the key is enabled, not before, expires: the host's word.
        final: Decide by the keys at hand. Otherwise newer ones are asked for first, where the
            token names one that there is not, or they are old.

    Returns:
        The outcome (`pyenclave.formats.release_outcome`); the authority whose keys are needed
        first, and whether there are none at all; the wrapped key, empty if it is not released.

    """
    bound = KeyContext.from_bytes(context)
    opened = _open(wrapped, context)
    record = _Record(*state, bound.exportable, bound.kty, _policy_of(bound, policy))
    terms = opened.terms or ReleaseTerms()
    try:
        decision = _decided(record, terms, target, final=final)
    except _NeededError as needed:
        read = Target.read(Trace(), target)
        anchor = terms.anchor(read.issuer)
        if not final and anchor is not None:
            return b"", anchor.to_bytes(), needed.missing, b""
        unreached = Step("authority.reached", False, read.issuer, "no keys")
        digest = hashlib.sha256(policy).hexdigest()
        decision = Decision(steps=(unreached,), policy_hash=digest, target=read)
    if decision.transfer is not None and not (offered := _offered(terms, enc)).holds:
        decision = replace(decision, steps=(*decision.steps, offered), transfer=None)
    outcome = Outcome.of(decision).to_bytes()
    if (transfer := decision.transfer) is None:
        return outcome, b"", False, b""
    sealed = jwa.wrap_for_release(
        opened.material, modulus=transfer.modulus, exponent=transfer.exponent, enc=enc
    )
    return outcome, b"", False, sealed


# ---- keys of attestation services ----------------------------------------------------------------


def _unreached(error: Exception) -> Refused:
    text = f"the attestation service: {error}"
    return Refused(text[:400], status=503, reason="ServiceUnavailable")


@trusted.ecall
@_told
def authority_keys(anchor: bytes, jwks: bytes) -> int:
    """Take a key set of an authority that is known by its keys; return how many are its."""
    found = Anchor.from_bytes(anchor)
    if found.kind != "keys" or len(jwks) > _MAX_KEYS:
        raise Refused("this authority is not known by its keys, or they are too many")
    keys = Jwks.from_bytes(jwks, "authority").keys
    known = tuple(key for key in keys if key_digest(key) in found.digests)
    _keep(found, Jwks(keys=known), None)
    return len(known)


def _roots(anchor: Anchor, given: list[bytes]) -> bytes | str:
    """Return the certificates that the authority's TLS must lead to."""
    if anchor.kind == "roots":
        known = [item for item in given if hashlib.sha256(item).digest() in anchor.digests]
        if not known:
            raise Refused("none of the given roots is one of the key's terms", status=503)
        return b"".join(known)
    if anchor.kind == "system":
        try:
            data = __loader__.get_data(_ROOTS)  # type: ignore[name-defined]
            return bytes(data).decode("ascii")
        except OSError:
            raise Refused("the image has no authorities of the system", status=503) from None
    raise Refused("this authority is known by its keys")


class _Session:
    """One request for a key set, over TLS that ends here; the host carries the bytes."""

    def __init__(self, anchor: Anchor, roots: bytes | str) -> None:
        self._anchor = anchor
        self._end = time.monotonic() + _SESSION
        self._host, self._port, self._path = authority_host(anchor.url)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
        # A common name is whatever its owner calls himself (RFC 9525, 2): no word about a host.
        context.hostname_checks_common_name = False
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=roots)
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=self._host)
        self._shaken = False
        self._answer = AnswerReader(_MAX_KEYS)
        self.lock = threading.Lock()

    def step(self, data: bytes, ended: bool) -> tuple[bytes, bool]:
        """Take what came, and return what to send, and whether it is done."""
        if time.monotonic() > self._end:
            raise TimeoutError("no answer in time")
        self._in.write(data)
        if ended:
            self._in.write_eof()
        with contextlib.suppress(ssl.SSLWantReadError):
            self._speak()
        if self._answer.complete:
            self._done()
        return self._out.read(), self._answer.complete

    def _speak(self) -> None:
        if not self._shaken:
            self._tls.do_handshake()
            self._shaken = True
            host = f"[{self._host}]" if ":" in self._host else self._host
            head = (
                f"GET {self._path}/certs HTTP/1.1",
                f"Host: {host}" + ("" if self._port == 443 else f":{self._port}"),
                "Accept: application/json",
                "Accept-Encoding: identity",
                "Connection: close",
            )
            self._tls.write("\r\n".join((*head, "", "")).encode("ascii"))
        while not self._answer.complete:
            try:
                data = self._tls.read(1 << 16)
            except ssl.SSLZeroReturnError:
                data = b""
            if data:
                self._answer.feed(data)
            else:
                self._answer.end()

    def _done(self) -> None:
        answer = self._answer
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        keys = Jwks.from_bytes(answer.body, "authority")
        date = http_date(answer.headers.get("date", ""))
        _keep(self._anchor, keys, None if date is None else float(date))


_sessions: Final[OrderedDict[int, _Session]] = OrderedDict()
_numbers: Final = itertools.count(1)


@trusted.ecall
def authority_connect(anchor: bytes, roots: list[bytes]) -> tuple[int, bytes]:
    """Begin to ask an authority for its keys; return the session, and what to send first."""
    try:
        found = Anchor.from_bytes(anchor)
        session = _Session(found, _roots(found, roots))
        first, _ = session.step(b"", False)
    except (OSError, ValueError, EvidenceFormatError) as error:
        raise _unreached(error) from None
    number = next(_numbers)
    with _lock:
        _sessions[number] = session
        while len(_sessions) > _SESSIONS:
            _sessions.popitem(last=False)
    return number, first


@trusted.ecall
def authority_answer(session: int, data: bytes, ended: bool) -> tuple[bytes, bool]:
    """Take what the authority sent; return what to send to it, and whether its keys are there."""
    with _lock:
        found = _sessions.get(session)
    if found is None:
        raise Refused("there is no such session", status=503, reason="ServiceUnavailable")
    try:
        with found.lock:
            out, done = found.step(data, ended)
    except (OSError, ValueError, EvidenceFormatError) as error:
        with _lock:
            _sessions.pop(session, None)
        raise _unreached(error) from None
    if done:
        with _lock:
            _sessions.pop(session, None)
    return out, done


@trusted.ecall
def random_bytes(count: int) -> bytes:
    """Return random bytes."""
    if not 0 < count <= _MAX_RANDOM:
        raise Refused(f"from 1 to {_MAX_RANDOM} bytes")
    return os.urandom(count)
