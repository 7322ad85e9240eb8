"""What binds a key to its attestation services: one encoding, and nothing that is too much."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.jwk import Jwks, public_members
from pyenclave.formats.release_terms import Anchor, ReleaseTerms, key_digest

URL = "https://attest.example"
ONE = bytes(32)
TWO = b"\1" * 32
ANCHOR = Anchor(url=URL, kind="roots", digests=(ONE, TWO))
TERMS = ReleaseTerms(authorities=(ANCHOR, Anchor(url=f"{URL}:1", kind="system")), loopback=(TWO,))


@pytest.mark.parametrize(
    "change",
    [
        {"url": f"{URL}/"},
        {"url": "http://attest.example"},
        {"url": "https://Attest.example"},
        {"url": URL + "/" + "x" * 1024},
        {"kind": "other"},
        {"kind": "system"},
        {"digests": ()},
        {"digests": (TWO, ONE)},
        {"digests": (ONE, ONE)},
        {"digests": (ONE[:31],)},
        {"digests": tuple(bytes([n]) * 32 for n in range(65))},
    ],
    ids=lambda change: str(change)[:60],
)
def test_an_anchor_that_says_too_little_or_too_much_is_refused(change: dict[str, Any]) -> None:
    """An address in its one form, a known kind, sorted digests."""
    with pytest.raises(EvidenceFormatError, match="release terms"):
        Anchor(**{"url": URL, "kind": "roots", "digests": (ONE, TWO), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"skew": 301},
        {"skew": -1},
        {"authorities": (ANCHOR, Anchor(url=URL, kind="system"))},
        {"authorities": tuple(Anchor(url=f"{URL}:{n + 1}", kind="system") for n in range(65))},
        {"loopback": (TWO, ONE)},
    ],
    ids=lambda change: str(change)[:60],
)
def test_terms_that_are_none_are_refused(change: dict[str, Any]) -> None:
    """The clocks' difference has a bound; an authority is known in one way."""
    with pytest.raises(EvidenceFormatError, match="release terms"):
        ReleaseTerms(**change)


def test_terms_are_at_most_sixteen_kibibytes() -> None:
    """They are in every wrapped key."""
    digests = tuple(bytes([n]) * 32 for n in range(64))
    many = tuple(Anchor(url=f"{URL}:{n + 1}", kind="keys", digests=digests) for n in range(10))
    with pytest.raises(EvidenceFormatError, match="at most 16384 bytes"):
        ReleaseTerms(authorities=many).to_bytes()


SHA1 = replace(TERMS, sha1=True)


@pytest.mark.parametrize("value", [ANCHOR, TERMS, SHA1], ids=["anchor", "terms", "sha1"])
def test_there_is_one_encoding_and_every_byte_of_it_counts(value: Any) -> None:
    """Changed, cut or longer, it is another value or none."""
    data = value.to_bytes()
    assert type(value).from_bytes(data) == value
    others = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]
    for other in [*others, *(data[:at] for at in range(len(data))), data + b"\0"]:
        try:
            found = type(value).from_bytes(other)
        except EvidenceFormatError:
            continue
        assert found != value
        assert found.to_bytes() == other
    longer = data[:8] + msgspec.msgpack.encode([*msgspec.msgpack.decode(data[8:]), 0])
    for other in (longer, data[:8] + b"\xdd\0\0\0\4" + data[9:], bytes(17 << 10)):
        with pytest.raises(EvidenceFormatError, match="release terms"):
            type(value).from_bytes(other)


def test_what_the_second_form_says_is_said_in_no_other_way() -> None:
    """Without SHA-1 the first form is the only one; it is what keys of before have."""
    assert TERMS.to_bytes()[:8] == b"PYERTRM\x01"
    first, second = (msgspec.msgpack.decode(item.to_bytes()[8:]) for item in (TERMS, SHA1))
    assert second == [*first, True]
    for members in ([*first, False], first, [*first, 1]):
        with pytest.raises(EvidenceFormatError, match="release terms"):
            ReleaseTerms.from_bytes(b"PYERTRM\x02" + msgspec.msgpack.encode(members))
    with pytest.raises(EvidenceFormatError, match="release terms"):
        ReleaseTerms.from_bytes(b"PYERTRM\x01" + msgspec.msgpack.encode(second))


def test_an_authority_is_one_of_the_terms_or_none() -> None:
    """Exactly; on this machine any, if development's root is among them."""
    assert TERMS.anchor(URL) == ANCHOR
    for other in (f"{URL}:2", "https://evil.example", "", "https://127.0.0.1.evil.example"):
        assert TERMS.anchor(other) is None
    local = TERMS.anchor("https://127.0.0.1:4433")
    assert local == Anchor(url="https://127.0.0.1:4433", kind="roots", digests=(TWO,))
    assert ReleaseTerms(authorities=(ANCHOR,)).anchor("https://127.0.0.1:4433") is None


def test_a_key_is_known_by_all_that_judging_depends_on() -> None:
    """Its name, its numbers, what it may be used with."""
    keys = [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]
    members = [public_members(key.public_key()) for key in keys]
    shown = [
        {**members[0]},
        {**members[0], "kid": "a"},
        {**members[0], "kid": "b"},
        {**members[0], "kid": "a", "alg": "RS256"},
        {**members[0], "kid": "a", "alg": "PS256"},
        {**members[1], "kid": "a"},
    ]
    digests = set()
    for item in shown:
        (key,) = Jwks.from_bytes(json.dumps({"keys": [item]}).encode()).keys
        digests.add(key_digest(key))
        assert key_digest(key) in digests
    assert len(digests) == len(shown)
