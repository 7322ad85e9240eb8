"""Wrapped keys of a vault are as docs/formats/wrapped-key.md says; old ones open for ever."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave.formats.key_context import KeyContext
from pyenclave.formats.release_terms import Anchor, ReleaseTerms
from pyenclave.services.vault.backends import _enclave

KEK = bytes(range(32))
CONTEXT = KeyContext(
    name="golden",
    version="0123456789abcdef" * 2,
    kty="oct-HSM",
    exportable=True,
    policy_hash=hashlib.sha256(b"policy").digest(),
)
MATERIAL = bytes(range(32, 64))
# Wrapped by the first release that had it; it never changes.
GOLDEN = bytes.fromhex(
    "505945564b4559016b97b550aa3e8ae18916570edf4102682fde18a5b999285dda49c4b5ed65e7e9"
    "611ac2828865420eec7328a9f3cee31e2dad99bff2247a91f5b033e6c01f547e2bacc953b7b56a2d"
    "70add11b32dec510b8c06c8f2b11f2cd0ae8e7ce127a1f5182f749a61cfc8a285d934fdfc39395f2"
    "6ae1ff0bd762077e4553eab309a1e11b"
)


TERMS = ReleaseTerms(
    authorities=(
        Anchor(url="https://attest.example", kind="keys", digests=(bytes(32), b"\1" * 32)),
        Anchor(url="https://attest.example:8443/tenant", kind="roots", digests=(b"\2" * 32,)),
        Anchor(url="https://sharedeus.eus.attest.azure.net", kind="system"),
    ),
    loopback=(b"\3" * 32,),
    strict=True,
    skew=30,
)
GOLDEN_TERMS = bytes.fromhex(
    "5059455254524d01941ec39393b668747470733a2f2f6174746573742e6578616d706c65a46b6579"
    "7392c4200000000000000000000000000000000000000000000000000000000000000000c4200101"
    "01010101010101010101010101010101010101010101010101010101010193d92268747470733a2f"
    "2f6174746573742e6578616d706c653a383434332f74656e616e74a5726f6f747391c42002020202"
    "0202020202020202020202020202020202020202020202020202020293d92668747470733a2f2f73"
    "68617265646575732e6575732e6174746573742e617a7572652e6e6574a673797374656d9091c420"
    "0303030303030303030303030303030303030303030303030303030303030303"
)
# With OAEP over SHA-1 among them: another form, whose last member says so.
GOLDEN_TERMS_SHA1 = b"PYERTRM\x02\x95" + GOLDEN_TERMS[9:] + b"\xc3"
# The same for keys that may be released, since they have terms.
GOLDEN_WITH_TERMS = bytes.fromhex(
    "505945564b4559026b97b550aa3e8ae18916570edf410268bf5c47ef8d315ca2a056d9fdb3c120f3"
    "e58e0b008cc67ec1cb764cf561481ee7292ae3c62a31537204c4cbdbd4802bef3efe51f829868434"
    "aa911c307c05477244b1814a4d39d8cd0f2331ce9f4153d1c8fce07a345cfd76654af9f24c8519bf"
    "dd3ef74730e93f96c4a8aa42a6b133c1ab9c083cdbb6d15fa46188ed6c2f683c88924d70032568c6"
    "066cd8005ab61b51d78da8dd84fffb8c1b0935610e7f417e3c765ee474f3a6af09468d7556b69f5b"
    "1b989cfe76b52e20637d2f7a24ca2af050cb2c11cc8e8b11bded229e2fd494d234848b7d2b5b4431"
    "0deae37a53605bbb32760fff09bd3be0b42db3a832734295af7e08bfe2c94bb45862aeecdc0d4112"
    "0e6ad9b75fa9431ea43a78a0f94f8f6dc998af61e53e14583effdac22e4853d15650e9a834a02442"
    "601f39a7597fb2486f79b3848b3623e97801b8fb1dc69c1b489e332c20dd72ee6aa2fed99bba566f"
    "dd20425d47f941541d4832e1a069b84d7512b82fbc53ea7a34c871200a476e22460da96e6fac8388"
    "2943c9bb38a0b300eaa21315"
)


def _by_the_page(wrapped: bytes, context: bytes, version: int = 1) -> bytes:
    """Open a wrapped key from the page alone."""
    label = b"pyenclave/vault-key/1"
    head, commitment, body = wrapped[:56], wrapped[56:88], wrapped[88:]
    assert head[:8] == b"PYEVKEY" + bytes([version])
    assert head[8:24] == hmac.digest(KEK, label + b"/id", "sha256")[:16]
    prk = hmac.digest(head[24:], KEK, "sha256")
    digest = hashlib.sha256(context).digest()
    key = hmac.digest(prk, label + digest + b"/encrypt\x01", "sha256")
    commit = hmac.digest(prk, label + digest + b"/commit\x01", "sha256")
    assert commitment == hmac.digest(commit, head + digest, "sha256")
    return AESGCM(key).decrypt(bytes(12), body, wrapped[:88] + context)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The enclave's module, outside, with a key-encryption key that everybody knows."""
    kek = _enclave._Kek(KEK)
    monkeypatch.setattr(_enclave, "_keks", {kek.id: kek})
    monkeypatch.setattr(_enclave, "_current", [kek])


@pytest.mark.usefixtures("inside")
def test_what_is_wrapped_is_what_the_page_says() -> None:
    """Read by another implementation; each time under another salt."""
    context = CONTEXT.to_bytes()
    first, second = (_enclave._wrap(_enclave._Private(MATERIAL), context) for _ in range(2))
    assert first[24:56] != second[24:56]
    for wrapped in (first, second):
        assert _by_the_page(wrapped, context) == MATERIAL


@pytest.mark.usefixtures("inside")
def test_the_first_wrapped_keys_open_for_ever() -> None:
    """A golden blob."""
    context = CONTEXT.to_bytes()
    assert _by_the_page(GOLDEN, context) == MATERIAL
    assert _enclave._unwrap(GOLDEN, context) == _enclave._Private(MATERIAL)


@pytest.mark.usefixtures("inside")
def test_keys_that_may_be_released_have_their_terms_before_them() -> None:
    """A golden blob, and a fresh one."""
    context = CONTEXT.to_bytes()
    private = _enclave._private(MATERIAL, context, TERMS.to_bytes())
    assert TERMS.to_bytes() == GOLDEN_TERMS
    for wrapped in (GOLDEN_WITH_TERMS, _enclave._wrap(private, context)):
        plain = _by_the_page(wrapped, context, 2)
        assert plain == len(GOLDEN_TERMS).to_bytes(4, "little") + GOLDEN_TERMS + MATERIAL
        assert _enclave._unwrap(wrapped, context) == private
    assert ReleaseTerms.from_bytes(GOLDEN_TERMS) == TERMS
    assert ReleaseTerms.from_bytes(GOLDEN_TERMS_SHA1) == replace(TERMS, sha1=True)


@pytest.mark.usefixtures("inside")
def test_a_repeating_random_generator_makes_no_key_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was cloned: the same blob for the same content, another key for other."""
    monkeypatch.setattr(_enclave.os, "urandom", bytes)
    context = CONTEXT.to_bytes()
    assert _enclave._wrap(_enclave._Private(MATERIAL), context) == _enclave._wrap(
        _enclave._Private(MATERIAL), context
    )
    salts = {
        _enclave._wrap(_enclave._Private(material), bound)[24:56]
        for material in (MATERIAL, MATERIAL[::-1], MATERIAL + b"\0")
        for bound in (context, context + b"x")
    }
    assert len(salts) == 6
