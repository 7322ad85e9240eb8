"""
A host that is not the vault: what it hands the enclave to get a key that is not its to have.

The enclave's own module, outside, with a key-encryption key that everybody knows: each attack is
refused, and succeeds once the one check that is against it is taken away.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attest_parts import (
    AUTHORITY,
    POLICY,
    POLICY_BYTES,
    POLICY_HASH,
    authority_key,
    jwks_of,
    opened,
    terms,
    token,
    transfer_key,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.jwk import Jwks
from pyenclave.formats.key_context import KeyContext
from pyenclave.formats.release_decision import Step
from pyenclave.formats.release_outcome import Outcome
from pyenclave.formats.release_terms import Anchor, ReleaseTerms, key_digest
from pyenclave.services.vault.backends import _enclave
from pyenclave.services.web.tls import DevCa

CONTEXT = KeyContext(
    name="k", version="0" * 32, kty="oct-HSM", exportable=True, policy_hash=POLICY_HASH
)
MATERIAL = bytes(range(32))
OPEN: tuple[bool, None, None] = (True, None, None)
SHA1 = "CKM_RSA_AES_KEY_WRAP"
CA, OTHER_CA = DevCa(None), DevCa(None)


class Clock:
    """What the enclave reads of the machine's clocks; the host sets the first one."""

    def __init__(self) -> None:
        self.back = 0.0  # seconds that the host set the time back
        self.passed = 0.0

    def time(self) -> float:
        return time.time() + self.passed - self.back

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The enclave's module as if it had just begun."""
    found = Clock()
    kek = _enclave._Kek(bytes(32))
    monkeypatch.setattr(_enclave, "_keks", {kek.id: kek})
    monkeypatch.setattr(_enclave, "_current", [kek])
    monkeypatch.setattr(_enclave, "time", found)
    for name in ("_opened", "_held", "_sessions"):
        monkeypatch.setattr(_enclave, name, type(getattr(_enclave, name))())
    return found


def wrapped(context: KeyContext = CONTEXT, given: ReleaseTerms | None = None) -> bytes:
    """A key as the vault keeps it."""
    bound = context.to_bytes()
    private = _enclave._private(MATERIAL, bound, (given or terms()).to_bytes())
    return _enclave._wrap(private, bound)


def pinned(given: ReleaseTerms | None = None) -> bytes:
    """What the key knows its authority by."""
    anchor = (given or terms()).anchor(AUTHORITY)
    assert anchor is not None
    return anchor.to_bytes()


def told(jwks: bytes | None = None) -> None:
    """Hand in the authority's keys."""
    _enclave.authority_keys(pinned(), jwks or jwks_of(authority_key()))


def release(
    target: str | None = None,
    *,
    key: bytes | None = None,
    context: KeyContext = CONTEXT,
    policy: bytes = POLICY_BYTES,
    enc: str = "RSA_AES_KEY_WRAP_256",
    final: bool = True,
) -> tuple[str, bytes]:
    """Ask as the host does; return the condition that does not hold, and the wrapped key."""
    outcome, needed, missing, ciphertext = _enclave.release(
        key or wrapped(context),
        context.to_bytes(),
        policy,
        target or token(),
        enc,
        OPEN,
        final,
    )
    if needed:
        assert not ciphertext
        return "missing" if missing else "renew", b""
    failed = Outcome.from_bytes(outcome).failed
    assert (failed is None) is bool(ciphertext)
    return "" if failed is None else failed.name, ciphertext


def test_what_is_right_is_released() -> None:
    """All others differ from this in one thing; the host is asked for keys first."""
    assert release(final=False) == ("missing", b"")
    assert release() == ("authority.reached", b"")
    told()
    failed, ciphertext = release(final=False)
    assert failed == ""
    assert opened(ciphertext) == MATERIAL


def test_the_host_has_no_word_for_whom_a_key_is_wrapped() -> None:
    """There is no argument that could name a transfer key; it is the verified token's."""
    names = set(inspect.signature(_enclave.release).parameters)
    assert names == {"wrapped", "context", "policy", "target", "enc", "state", "final"}
    told()
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    _, ciphertext = release(token(transfer=other))
    assert opened(ciphertext, other) == MATERIAL
    with pytest.raises(ValueError, match="ecryption"):
        opened(ciphertext, transfer_key())
    # Somebody's token, with the host's own transfer key in its place.
    head, _, signature = token().split(".")
    _, claims, _ = token(transfer=other).split(".")
    assert release(f"{head}.{claims}.{signature}") == ("token.signature", b"")


def test_a_weaker_wrap_is_a_term_of_the_key() -> None:
    """It is said when the key is made, or its policy set; a key of before has it not."""
    told()
    assert release(enc=SHA1) == ("transfer.enc", b"")
    assert release(token(exp=1), enc=SHA1)[0] == "token.exp"  # the first that does not hold
    with_sha1 = dataclasses.replace(terms(), sha1=True)
    assert release(enc=SHA1, key=wrapped(given=with_sha1))[1]
    assert release(key=wrapped(given=with_sha1))[1]
    bound, fixed = CONTEXT.to_bytes(), dataclasses.replace(CONTEXT, immutable=True)
    for context in (CONTEXT, fixed):
        before = wrapped(context)
        after = _enclave.rebind(
            before, context.to_bytes(), context.to_bytes(), with_sha1.to_bytes()
        )
        assert bool(release(enc=SHA1, key=after, context=context)[1]) is not context.immutable
    new = _enclave._Kek(b"n" * 32)
    _enclave._keks[new.id] = new
    before = wrapped()
    _enclave._current[:] = [new]
    moved = _enclave.rewrap(before, bound, with_sha1.to_bytes())
    assert release(enc=SHA1, key=moved) == ("transfer.enc", b"")


# ---- attacks, and the check that each of them meets ----------------------------------------------


def evil() -> ec.EllipticCurvePrivateKey:
    """A key of the host's own."""
    return ec.derive_private_key(7, ec.SECP256R1())


def forged(**changes: Any) -> str:
    """A token that the host signed."""
    return token(key=evil(), **changes)


def open_policy() -> bytes:
    """A policy that any token satisfies."""
    anything = [{"claim": "iss", "exists": True}]
    return json.dumps({"anyOf": [{"authority": AUTHORITY, "allOf": anything}]}).encode()


def attack_with_another_policy(_clock: Clock) -> bool:
    """The policy of another key, or one of the host's own, for this one."""
    told()
    return bool(release(token(**{"x-ms-sgx-mrsigner": "00"}), policy=open_policy())[1])


def attack_with_changed_keys(_clock: Clock) -> bool:
    """The authority's key set with a key of the host's."""
    told(jwks_of(evil()))
    return bool(release(forged())[1])


def attack_with_a_clock_set_back(clock: Clock) -> bool:
    """A token that ended, shown again after the clock was set back."""
    told()
    stolen = token()
    clock.passed = 3600
    now = int(clock.time())
    assert release(stolen)[0] == "token.exp"
    assert release(token(iat=now, nbf=now, exp=now + 600))[1]
    clock.back = 3600
    return bool(release(stolen)[1])


def attack_with_old_keys(clock: Clock) -> bool:
    """The authority withdrew its key; the host keeps the new set to itself."""
    told()
    clock.passed = 7 * 3600
    now = int(clock.time())
    return bool(release(token(iat=now, nbf=now, exp=now + 600))[1])


def attack_with_a_root_of_ones_own(_clock: Clock) -> bool:
    """The authority's TLS under a certificate that the host made."""
    given = over_tls()
    server = Peer(OTHER_CA, jwks_of(evil()))
    try:
        fetch(pinned(given), server, [root_of(OTHER_CA)])
    except _enclave.Refused:
        return False
    return bool(release(forged(), key=wrapped(given=given))[1])


def attack_with_another_name(_clock: Clock) -> bool:
    """A certificate of the right root, for another service."""
    given = over_tls()
    server = Peer(CA, jwks_of(evil()), names=["other.example"])
    try:
        fetch(pinned(given), server, [root_of(CA)])
    except _enclave.Refused:
        return False
    return bool(release(forged(), key=wrapped(given=given))[1])


def attack_with_other_terms(_clock: Clock) -> bool:
    """An immutable policy stays; its attestation service becomes one of the host's."""
    context = dataclasses.replace(CONTEXT, immutable=True)
    bound = context.to_bytes()
    mine = only_key(evil())
    key = _enclave.rebind(wrapped(context), bound, bound, mine.to_bytes())
    _enclave.authority_keys(pinned(mine), jwks_of(evil()))
    told()
    return bool(release(forged(), key=key, context=context)[1])


def attack_with_terms_of_a_rewrap(_clock: Clock) -> bool:
    """The same by way of a new key-encryption key."""
    key = wrapped()
    new = _enclave._Kek(b"n" * 32)
    _enclave._keks[new.id] = new
    _enclave._current[:] = [new]
    mine = only_key(evil())
    moved = _enclave.rewrap(key, CONTEXT.to_bytes(), mine.to_bytes())
    assert moved[8:24] == new.id
    _enclave.authority_keys(pinned(mine), jwks_of(evil()))
    told()
    return bool(release(forged(), key=moved)[1])


def attack_on_a_key_that_may_not_leave(_clock: Clock) -> bool:
    """Its record has no policy; the host brings one."""
    told()
    closed = dataclasses.replace(CONTEXT, exportable=False, policy_hash=None)
    return bool(release(context=closed)[1])


def attack_with_a_weaker_wrap(_clock: Clock) -> bool:
    """OAEP over SHA-1, of a vault that was set up without it; the process says otherwise now."""
    told()
    return bool(release(enc=SHA1)[1])


def only_key(key: ec.EllipticCurvePrivateKey) -> ReleaseTerms:
    """Terms whose authority has this key."""
    (known,) = Jwks.from_bytes(jwks_of(key)).keys
    anchor = Anchor(url=AUTHORITY, kind="keys", digests=(key_digest(known),))
    return ReleaseTerms(authorities=(anchor,))


def _no_name(patch: pytest.MonkeyPatch) -> None:
    def careless(protocol: int) -> ssl.SSLContext:
        made = ssl.SSLContext(protocol)
        made.check_hostname = False
        return made

    patch.setattr(_enclave, "ssl", SimpleNamespace(**vars(ssl) | {"SSLContext": careless}))


def _always_exportable(patch: pytest.MonkeyPatch) -> None:
    make = _enclave._Record

    def record(*values: Any) -> Any:
        return make(*values[:3], True, values[4], POLICY_BYTES)

    patch.setattr(_enclave, "_Record", record)
    patch.setattr(
        _enclave, "_private", lambda material, _c, given: _enclave._Private(material, given)
    )


Mutant = Callable[[pytest.MonkeyPatch], None]
ATTACKS: dict[Callable[[Clock], bool], Mutant] = {
    attack_with_another_policy: lambda patch: patch.setattr(
        _enclave, "_policy_of", lambda _bound, policy: policy
    ),
    attack_with_changed_keys: lambda patch: patch.setattr(
        _enclave, "key_digest", lambda _key: Anchor.from_bytes(pinned()).digests[0]
    ),
    attack_with_a_clock_set_back: lambda patch: patch.setattr(
        _enclave._Held, "earliest", float("-inf")
    ),
    attack_with_old_keys: lambda patch: patch.setattr(_enclave, "_STALE", float("inf")),
    attack_with_a_root_of_ones_own: lambda patch: patch.setattr(
        _enclave, "_roots", lambda _anchor, given: b"".join(given)
    ),
    attack_with_another_name: _no_name,
    attack_with_other_terms: lambda patch: patch.setattr(
        _enclave,
        "KeyContext",
        type("Mutable", (), {"from_bytes": staticmethod(_as_mutable)}),
    ),
    attack_with_terms_of_a_rewrap: lambda patch: patch.setattr(
        _enclave, "_is_lacking", lambda _bound, _wrapped: True
    ),
    attack_on_a_key_that_may_not_leave: _always_exportable,
    attack_with_a_weaker_wrap: lambda patch: patch.setattr(
        _enclave, "_offered", lambda _terms, enc: Step("transfer.enc", True, None, enc)
    ),
}


def _as_mutable(data: bytes) -> KeyContext:
    return dataclasses.replace(KeyContext.from_bytes(data), immutable=False)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda item: item.__name__)
def test_an_attack_is_refused_and_would_not_be_without_its_check(
    attack: Callable[[Clock], bool], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves: a check that nothing misses is none."""
    try:
        assert not attack(clock)
    except _enclave.Refused as error:
        assert error.status in (400, 403, 500, 503)  # noqa: PT017 - or it is False
    for name in ("_opened", "_held", "_sessions"):
        getattr(_enclave, name).clear()
    clock.back = clock.passed = 0
    _enclave._current[:] = list(_enclave._keks.values())[:1]
    ATTACKS[attack](monkeypatch)
    assert attack(clock), "the check is missed by nothing"


# ---- refusals that need no check of their own ----------------------------------------------------


@pytest.mark.parametrize(
    ("target", "condition"),
    [
        (forged, "token.signature"),
        (lambda: forged(kid="two"), "token.key"),
        (lambda: token(iss="https://evil.example"), "policy.authority"),
        (lambda: token(**{"x-ms-sgx-mrsigner": "00"}), "policy.claims"),
        (lambda: token(exp=int(time.time()) - 61), "token.exp"),
        (lambda: token(nbf=int(time.time()) + 100), "token.nbf"),
        (lambda: token(iat=int(time.time()) + 100), "token.iat"),
        (lambda: "no token", "token.format"),
    ],
)
def test_a_token_is_judged_inside(target: Callable[[], str], condition: str) -> None:
    """The whole decision is `test_release_decision`'s; this is that it is made here."""
    told()
    assert release(target()) == (condition, b"")


@pytest.mark.parametrize(
    "change", [{"version": "1" * 32}, {"name": "other"}, {"kty": "RSA-HSM"}, {"immutable": True}]
)
def test_a_key_of_another_row_is_not_released(change: dict[str, Any]) -> None:
    """The private half of one version, with name, version and policy of another."""
    told()
    with pytest.raises(_enclave.Refused, match="does not belong to its record"):
        release(key=wrapped(), context=dataclasses.replace(CONTEXT, **change))


def test_an_older_policy_is_not_taken_for_a_key_that_has_a_newer_one() -> None:
    """Neither the policy by itself nor with the context that it was in."""
    told()
    policy = POLICY_BYTES + b" "
    newer = dataclasses.replace(CONTEXT, policy_hash=hashlib.sha256(policy).digest())
    key = _enclave.rebind(wrapped(), CONTEXT.to_bytes(), newer.to_bytes(), terms().to_bytes())
    assert release(key=key, context=newer, policy=policy)[1]
    for context, older in ((newer, POLICY_BYTES), (CONTEXT, POLICY_BYTES), (CONTEXT, policy)):
        with pytest.raises(_enclave.Refused, match="does not belong"):
            release(key=key, context=context, policy=older)


def test_a_key_of_before_gets_terms_with_its_new_context_also_under_an_immutable_policy() -> None:
    """Else each update of it would be one more copy to which a rewrap binds any terms."""
    context = dataclasses.replace(CONTEXT, immutable=True)
    bound = context.to_bytes()
    before = _enclave._wrap(_enclave._Private(MATERIAL), bound)
    key = _enclave.rebind(before, bound, bound, terms().to_bytes())
    assert key.startswith(_enclave._WITH_TERMS)
    told()
    assert release(key=key, context=context)[1]


def test_a_key_of_before_has_no_authority_until_it_is_wrapped_anew() -> None:
    """Wrapped without terms: nobody can speak for it; a rewrap binds it, once."""
    bound = CONTEXT.to_bytes()
    before = _enclave._wrap(_enclave._Private(MATERIAL), bound)
    told()
    assert release(key=before) == ("authority.known", b"")
    after = _enclave.rewrap(before, bound, terms().to_bytes())
    assert opened(release(key=after)[1]) == MATERIAL
    assert _enclave.rewrap(after, bound, only_key(evil()).to_bytes()) == b""


def test_what_a_destroyed_key_encryption_key_wrapped_opens_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not from what is kept open either; what stays is kept open."""
    monkeypatch.setattr(_enclave.trusted, "unseal", lambda blob, aad: blob)
    told()
    old, new = bytes(32), b"\1" * 32
    kek = _enclave._Kek(old).id
    before = wrapped()
    assert release(key=before)[1]
    assert _enclave.kek_open([old, new])[0] == kek
    assert len(_enclave._opened) == 1
    assert release(key=before)[1]
    after = _enclave.rewrap(before, CONTEXT.to_bytes(), terms().to_bytes())
    assert _enclave.kek_open([new]) == [after[8:24]]
    with pytest.raises(_enclave.Refused, match="unknown key-encryption key"):
        release(key=before)
    assert release(key=after)[1]


def test_a_key_that_is_being_opened_is_not_kept_when_its_wrap_is_destroyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was unwrapped before, and is looked for afterwards."""
    monkeypatch.setattr(_enclave.trusted, "unseal", lambda blob, aad: blob)
    told()
    unwrap = _enclave._unwrap

    def slow(*arguments: bytes) -> _enclave._Private:
        found = unwrap(*arguments)
        _enclave.kek_open([b"\1" * 32])
        return found

    before = wrapped()
    monkeypatch.setattr(_enclave, "_unwrap", slow)
    assert release(key=before)[1]
    assert not _enclave._opened


def test_keys_under_another_anchor_are_another_authoritys() -> None:
    """The host makes an anchor of its own: it is kept apart."""
    mine = only_key(evil())
    assert _enclave.authority_keys(pinned(mine), jwks_of(evil())) == 1
    assert release(forged()) == ("authority.reached", b"")
    told()
    assert release(forged()) == ("token.signature", b"")


def test_terms_that_are_none_are_bound_to_nothing() -> None:
    """A key that may leave has some; another one has none."""
    for bad in (b"", b"PYERTRM\x01", terms().to_bytes() + b"\0"):
        with pytest.raises(EvidenceFormatError):
            _enclave._private(MATERIAL, CONTEXT.to_bytes(), bad)
    closed = dataclasses.replace(CONTEXT, exportable=False, policy_hash=None)
    assert _enclave._private(MATERIAL, closed.to_bytes(), b"").terms is None


def test_newer_keys_are_asked_for_after_a_while_and_for_a_new_name(clock: Clock) -> None:
    """Ten minutes; the host may say that there are none, for six hours."""
    told()
    assert release(final=False)[0] == ""
    assert release(token(kid="new"), final=False)[0] == "renew"
    assert release(token(kid="new"))[0] == "token.key"
    clock.passed = 601
    now = int(clock.time())
    fresh = token(iat=now, nbf=now, exp=now + 60)
    assert release(fresh, final=False)[0] == "renew"
    assert release(fresh)[0] == ""


# ---- keys over TLS -------------------------------------------------------------------------------


class Peer:
    """An attestation service, by the bytes of its TLS."""

    def __init__(
        self, ca: DevCa, body: bytes, *, names: Any = ("attest.example",), **options: Any
    ) -> None:
        shown = ca.server(list(names))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        place = Path(options.pop("folder", None) or _folder())
        (place / "chain.pem").write_bytes(shown.chain)
        (place / "key.pem").write_bytes(shown.key)
        context.load_cert_chain(place / "chain.pem", place / "key.pem")
        self.came, self.sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.came, self.sent, server_side=True)
        head = {
            "Date": formatdate(options.pop("date", None) or time.time(), usegmt=True),
            "Content-Length": str(len(body)),
        } | options.pop("headers", {})
        lines = [options.pop("status", "HTTP/1.1 200 OK")]
        lines += [f"{name}: {value}" for name, value in head.items() if value is not None]
        self.answer = "\r\n".join([*lines, "", ""]).encode() + body
        self.asked = b""

    def take(self, data: bytes) -> bytes:
        """Take what the enclave sends, and return what it gets."""
        self.came.write(data)
        try:
            if not self.asked:
                self.tls.do_handshake()
                self.asked = self.tls.read(1 << 14)
                self.tls.write(self.answer)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            return self.sent.read()
        return self.sent.read()


_folders: list[Path] = []


def _folder() -> Path:
    return _folders[-1]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path) -> Iterator[None]:
    _folders.append(tmp_path)
    yield
    _folders.pop()


def root_of(ca: DevCa) -> bytes:
    """The authority's certificate in DER."""
    return ssl.PEM_cert_to_DER_cert(ca.pem.decode())


def over_tls(ca: DevCa = CA) -> ReleaseTerms:
    """Terms whose authority is known by its TLS."""
    digest = hashlib.sha256(root_of(ca)).digest()
    return ReleaseTerms(authorities=(Anchor(url=AUTHORITY, kind="roots", digests=(digest,)),))


def fetch(anchor: bytes, peer: Peer, roots: list[bytes], *, size: int = 1 << 16) -> bool:
    """Carry bytes between the two, *size* at a time; whether the enclave has its keys."""
    session, out = _enclave.authority_connect(anchor, roots)
    done = False
    while not done:
        data = peer.take(out)
        out = b""
        pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
        for piece in pieces:
            more, done = _enclave.authority_answer(session, piece, not piece)
            out += more
        if not data and not done:
            return False
    return True


@pytest.mark.parametrize("size", [1 << 16, 97])
def test_keys_come_over_tls_that_ends_inside(size: int) -> None:
    """The host sees one name and ciphertext."""
    given, peer = over_tls(), Peer(CA, jwks_of(authority_key()))
    assert fetch(pinned(given), peer, [root_of(OTHER_CA), root_of(CA)], size=size)
    assert peer.asked.startswith(b"GET /certs HTTP/1.1\r\nHost: attest.example\r\n")
    assert opened(release(key=wrapped(given=given))[1]) == MATERIAL
    assert not _enclave._sessions


class Naming:
    """A private authority that certifies people, who choose what they are called."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.root = self._signed("root", self._key, ca=True)

    def _signed(self, name: str, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.Certificate:
        now = datetime.now(UTC)
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, "root")
        )
        said = x509.SubjectAlternativeName([x509.RFC822Name("mallory@people.example")])
        return (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(said, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def server(self, names: list[str]) -> SimpleNamespace:
        """What a person has whose common name is that of a host."""
        key = ec.generate_private_key(ec.SECP256R1())
        plain = serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        chain = self._signed(names[0], key, ca=False).public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(serialization.Encoding.PEM, form, plain)
        return SimpleNamespace(chain=chain, key=private)


def test_a_common_name_is_no_name_of_a_host() -> None:
    """Of the right authority, and not the attestation service's."""
    ca: Any = Naming()
    root = ca.root.public_bytes(serialization.Encoding.DER)
    digest = hashlib.sha256(root).digest()
    anchor = Anchor(url=AUTHORITY, kind="roots", digests=(digest,)).to_bytes()
    with pytest.raises(_enclave.Refused, match="not valid for 'attest"):
        fetch(anchor, Peer(ca, jwks_of(evil())), [root])


def test_the_authoritys_date_holds_against_a_clock_set_back(clock: Clock) -> None:
    """Also for an enclave that saw no token yet: it asks for keys, and they are dated."""
    given, stolen = over_tls(), token()
    later = time.time() + 3600
    clock.passed, clock.back = 3600, 3600
    assert fetch(pinned(given), Peer(CA, jwks_of(authority_key()), date=later), [root_of(CA)])
    assert release(stolen, key=wrapped(given=given))[0] == "token.exp"
    # Another set of keys, dated earlier, does not turn it back.
    assert fetch(pinned(given), Peer(CA, jwks_of(authority_key())), [root_of(CA)])
    assert release(stolen, key=wrapped(given=given))[0] == "token.exp"
    # Without a date there is the machine's clock only, which is what is not held.
    _enclave._held.clear()
    undated = Peer(CA, jwks_of(authority_key()), headers={"Date": None})
    assert fetch(pinned(given), undated, [root_of(CA)])
    assert release(stolen, key=wrapped(given=given))[0] == ""


@pytest.mark.parametrize(
    "options",
    [
        {"status": "HTTP/1.1 404 Not Found"},
        {"status": "HTTP/1.1 302 Found", "headers": {"Location": "https://evil.example"}},
        {"headers": {"Content-Length": "9999999"}},
        {"headers": {"Content-Length": "5"}},
        {"headers": {"Transfer-Encoding": "chunked"}},
    ],
    ids=str,
)
def test_an_answer_that_is_none_gives_no_keys(options: dict[str, Any]) -> None:
    """A status, a redirect, lengths."""
    given = over_tls()
    with pytest.raises(_enclave.Refused, match="the attestation service"):
        fetch(pinned(given), Peer(CA, jwks_of(authority_key()), **options), [root_of(CA)])
    assert not _enclave._held
    assert not _enclave._sessions


def test_a_cut_answer_and_a_slow_one_give_no_keys(clock: Clock) -> None:
    """The host ends the connection early, or carries on for ever."""
    given = over_tls()
    session, out = _enclave.authority_connect(pinned(given), [root_of(CA)])
    data = Peer(CA, jwks_of(authority_key())).take(out)
    _enclave.authority_answer(session, data[:100], False)
    with pytest.raises(_enclave.Refused, match="the attestation service"):
        _enclave.authority_answer(session, b"", True)
    with pytest.raises(_enclave.Refused, match="no such session"):
        _enclave.authority_answer(session, data, False)
    session, _ = _enclave.authority_connect(pinned(given), [root_of(CA)])
    clock.passed = 31
    with pytest.raises(_enclave.Refused, match="in time"):
        _enclave.authority_answer(session, data, False)
    for _ in range(20):
        _enclave.authority_connect(pinned(given), [root_of(CA)])
    assert len(_enclave._sessions) == 16


def test_an_authority_known_by_its_keys_is_not_asked_and_the_reverse() -> None:
    """Each kind of anchor has its own way in."""
    given = over_tls()
    with pytest.raises(_enclave.Refused, match="not known by its keys"):
        _enclave.authority_keys(pinned(given), jwks_of(evil()))
    with pytest.raises(_enclave.Refused, match="known by its keys"):
        _enclave.authority_connect(pinned(), [root_of(CA)])
    for bad in (b"", pinned() + b"\0", b"PYEANCH\x01\x00"):
        with pytest.raises((_enclave.Refused, EvidenceFormatError)):
            _enclave.authority_keys(bad, jwks_of(evil()))
        with pytest.raises((_enclave.Refused, EvidenceFormatError)):
            _enclave.authority_connect(bad, [root_of(CA)])


def test_the_policy_of_the_tests_is_the_one_that_is_bound() -> None:
    """Else nothing above would be released."""
    assert json.loads(POLICY_BYTES) == POLICY
