"""HMAC-SHA-256 and HKDF-SHA-256 against published vectors and the cryptography package."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from pyenclave import _core

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=[0xFFFFFFFF, 0], ids=["best", "portable"])
def variant(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every implementation in turn."""
    _core.cpu_set_mask(request.param)
    yield request.param
    _core.cpu_set_mask(0xFFFFFFFF)


def acvp(vectors: Path, name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any], Any]]:
    """Group, test and answer of an ACVP set."""
    folder = vectors / "crypto/acvp"
    prompt = json.loads((folder / f"{name}-prompt.json").read_text())[1]
    answers = json.loads((folder / f"{name}-expected.json").read_text())[1]
    expected = {
        test["tcId"]: test for group in answers["testGroups"] for test in group["tests"] or ()
    }
    for group in prompt["testGroups"]:
        for test in group["tests"] or ():
            yield group, test, expected[test["tcId"]]


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, -1, 8161, 1 << 40])
def test_hkdf_refuses_impossible_lengths(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 8160"):
        _core.hkdf_sha256(b"secret", b"", b"", length)
    with pytest.raises(ValueError, match="1 to 8160"):
        _core.hkdf_expand(bytes(32), b"", length)


@pytest.mark.parametrize("size", [0, 1, 16, 31])
def test_hkdf_expand_refuses_a_short_key(size: int) -> None:
    with pytest.raises(ValueError, match="shorter than 32"):
        _core.hkdf_expand(bytes(size), b"", 32)


@pytest.mark.parametrize("position", range(3))
def test_hkdf_refuses_what_is_not_bytes_like(position: int) -> None:
    arguments: list[Any] = [b"", b"", b""]
    arguments[position] = "text"
    with pytest.raises(TypeError):
        _core.hkdf_sha256(*arguments, 32)


def test_hmac_refuses_what_is_not_bytes_like() -> None:
    with pytest.raises(TypeError):
        _core.hmac_sha256("key", b"")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.hmac_sha256(b"key", None)  # type: ignore[arg-type]


# ---- published vectors ------------------------------------------------------------------------


def test_wycheproof_hmac_sha256(vectors: Path, variant: int) -> None:
    count = 0
    data = json.loads((vectors / "crypto/wycheproof/hmac_sha256_test.json").read_text())
    for group in data["testGroups"]:
        size = group["tagSize"] // 8
        for test in group["tests"]:
            key, message = bytes.fromhex(test["key"]), bytes.fromhex(test["msg"])
            same = _core.hmac_sha256(key, message)[:size].hex() == test["tag"]
            assert same == (test["result"] == "valid"), test["tcId"]
            count += 1
    assert count == 174


def test_wycheproof_hkdf_sha256(vectors: Path, variant: int) -> None:
    results = {"valid": 0, "invalid": 0}
    data = json.loads((vectors / "crypto/wycheproof/hkdf_sha256_test.json").read_text())
    for group in data["testGroups"]:
        for test in group["tests"]:
            secret, salt, info = (bytes.fromhex(test[name]) for name in ("ikm", "salt", "info"))
            results[test["result"]] += 1
            if test["result"] == "invalid":
                with pytest.raises(ValueError, match="8160"):
                    _core.hkdf_sha256(secret, salt, info, test["size"])
            else:
                okm = _core.hkdf_sha256(secret, salt, info, test["size"])
                assert okm.hex() == test["okm"], test["tcId"]
    assert results["invalid"] > 0
    assert sum(results.values()) == 86


def test_acvp_hmac_sha256(vectors: Path, variant: int) -> None:
    count = 0
    for group, test, answer in acvp(vectors, "boringssl-HMAC-SHA2-256"):
        mac = _core.hmac_sha256(bytes.fromhex(test["key"]), bytes.fromhex(test["msg"]))
        assert mac[: group["macLen"] // 8].hex() == answer["mac"]
        count += 1
    assert count == 8


# ---- against other implementations ------------------------------------------------------------


def test_hmac_of_every_key_and_message_length(variant: int) -> None:
    view = memoryview(random.Random(2).randbytes(800))
    for length in range(601):
        key, message = view[length % 7 : length % 7 + length], view[length % 64 :]
        assert _core.hmac_sha256(key, message) == hmac.digest(key, message, hashlib.sha256)
        assert _core.hmac_sha256(message, key) == hmac.digest(message, key, hashlib.sha256)


@given(
    secret=st.binary(max_size=200),
    salt=st.binary(max_size=200),
    info=st.binary(max_size=300),
    length=st.integers(1, 8160),
)
def test_hkdf_agrees_with_cryptography(
    secret: bytes, salt: bytes, info: bytes, length: int
) -> None:
    theirs = HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)
    assert _core.hkdf_sha256(secret, salt, info, length) == theirs


@given(prk=st.binary(min_size=32, max_size=100), info=st.binary(max_size=200))
def test_hkdf_expand_agrees_with_cryptography(prk: bytes, info: bytes) -> None:
    theirs = HKDFExpand(algorithm=SHA256(), length=77, info=info).derive(prk)
    assert _core.hkdf_expand(prk, info, 77) == theirs


def test_hkdf_output_of_every_length_is_a_prefix_of_the_longest(variant: int) -> None:
    longest = _core.hkdf_sha256(b"secret", b"salt", b"info", 8160)
    for length in [*range(1, 601), 8128, 8129, 8159]:
        assert _core.hkdf_sha256(b"secret", b"salt", b"info", length) == longest[:length]
