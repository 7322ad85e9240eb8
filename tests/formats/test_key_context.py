"""The context that a vault's key is bound to."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.key_context import KINDS, KeyContext

POLICY = hashlib.sha256(b"policy").digest()
WHOLE: dict[str, Any] = {
    "name": "payroll",
    "version": "0123456789abcdef" * 2,
    "kty": "RSA-HSM",
    "exportable": True,
    "policy_hash": POLICY,
    "immutable": True,
}


def test_its_bytes_are_the_ones_that_were_written_down() -> None:
    """A golden form: keys that were wrapped once open for ever."""
    assert KeyContext(**WHOLE).to_bytes() == (
        b"PYEKCTX\x01"
        b"\x07\x00payroll"
        b"\x20\x000123456789abcdef0123456789abcdef"
        b"\x07\x00RSA-HSM"
        b"\x01\x00\x03"
        b"\x20\x00" + POLICY
    )


@pytest.mark.parametrize("kty", KINDS)
@pytest.mark.parametrize("policy", [None, POLICY])
def test_what_is_written_is_read(kty: str, policy: bytes | None) -> None:
    """Every kind, with and without a policy."""
    context = KeyContext(
        name="A-1", version="0" * 32, kty=kty, exportable=bool(policy), policy_hash=policy
    )
    assert KeyContext.from_bytes(context.to_bytes()) == context


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a" * 128},
        {"name": "../a"},
        {"name": "a\n"},
        {"version": "0" * 31},
        {"version": "A" * 32},
        {"kty": "RSA-hsm"},
        {"kty": "OKP"},
        {"policy_hash": b"short"},
        {"policy_hash": None},
        {"exportable": False},
        {"exportable": False, "policy_hash": None},  # immutable without a policy
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(change: dict[str, Any]) -> None:
    """A context names one key, and its members agree."""
    with pytest.raises(EvidenceFormatError):
        KeyContext(**{**WHOLE, **change})


def test_only_the_one_encoding_is_read() -> None:
    """Each byte changed, cut off or added gives another context or none."""
    data = KeyContext(**WHOLE).to_bytes()
    whole = KeyContext(**WHOLE)
    others = [
        data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        for at in range(len(data))
        for bit in (1, 0x80)
    ]
    others += [data[:size] for size in range(len(data))] + [data + b"\0", data * 9, b""]
    for other in others:
        try:
            read = KeyContext.from_bytes(other)
        except EvidenceFormatError:
            continue
        assert read != whole
        assert read.to_bytes() == other
