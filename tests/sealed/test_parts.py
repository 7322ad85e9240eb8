"""Encrypted parts of images: deterministic, bound to their names, one key and one content each."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave.errors import UnsealError
from pyenclave.sealed import parts

ROOT = parts.root_of(bytes(range(32)))
NAME = "code/algo.py"
DATA = b"THRESHOLD = 0.731\n" * 300


def test_every_changed_bit_is_refused():
    part = parts.encrypt(ROOT, NAME, b"short")
    for at in range(len(part)):
        for bit in range(8):
            changed = bytearray(part)
            changed[at] ^= 1 << bit
            with pytest.raises(UnsealError):
                parts.decrypt(ROOT, NAME, changed)
    for size in range(len(part)):
        with pytest.raises(UnsealError):
            parts.decrypt(ROOT, NAME, part[:size])
    with pytest.raises(UnsealError):
        parts.decrypt(ROOT, NAME, part + b"\0")
    assert parts.decrypt(ROOT, NAME, part) == b"short"


def test_a_part_opens_under_its_key_and_name_only():
    part = parts.encrypt(ROOT, NAME, DATA)
    for root, name in (
        (parts.root_of(bytes(32)), NAME),
        (ROOT, "code/other.py"),
        (ROOT, "code/algo.p"),
        (ROOT, ""),
    ):
        with pytest.raises(UnsealError):
            parts.decrypt(root, name, part)


def test_a_part_under_its_own_key_with_another_salts_content_is_refused():
    """Who has the data key cannot make a part that is not what its salt says, either."""
    salt = bytes(32)
    named = len(NAME).to_bytes(2, "little") + NAME.encode()
    key = hmac.digest(ROOT, b"pyenclave/part/1/key" + salt + named + b"\1", "sha256")
    made = AESGCM(key).encrypt(bytes(12), DATA, parts.MAGIC + salt + named)
    with pytest.raises(UnsealError):
        parts.decrypt(ROOT, NAME, parts.MAGIC + salt + made)


def test_the_same_inputs_give_the_same_bytes_and_others_share_no_key():
    assert parts.encrypt(ROOT, NAME, DATA) == parts.encrypt(ROOT, NAME, DATA)
    made = [
        parts.encrypt(ROOT, NAME, DATA),
        parts.encrypt(ROOT, NAME, DATA + b"\n"),
        parts.encrypt(ROOT, "code/b.py", DATA),
        parts.encrypt(parts.root_of(bytes(32)), NAME, DATA),
    ]
    assert len({part[8:40] for part in made}) == 4
    assert len({part[40:56] for part in made}) == 4


def test_a_part_is_of_the_documented_bytes():
    """docs/formats/encrypted-part.md, computed here once more, with another AES-GCM."""

    def mac(key: bytes, data: bytes) -> bytes:
        return hmac.new(key, data, hashlib.sha256).digest()

    named = len(NAME).to_bytes(2, "little") + NAME.encode()
    root = mac(b"pyenclave/part/1", bytes(range(32)))
    salt = mac(mac(root, b"pyenclave/part/1/salt\1"), named + DATA)
    key = mac(root, b"pyenclave/part/1/key" + salt + named + b"\1")
    sealed = AESGCM(key).encrypt(bytes(12), DATA, b"PYEPART\1" + salt + named)
    assert parts.encrypt(ROOT, NAME, DATA) == b"PYEPART\1" + salt + sealed
    assert parts.check_value(ROOT) == mac(root, b"pyenclave/part/1/check\1")
    assert len(parts.encrypt(ROOT, NAME, b"")) == parts.OVERHEAD


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_data_key_has_32_bytes(size: int):
    with pytest.raises(ValueError, match="32 bytes"):
        parts.root_of(bytes(size))
