"""AES-128-CMAC against published vectors and the cryptography package."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC
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


def reference(key: bytes, message: bytes) -> bytes:
    """The same by OpenSSL."""
    mac = CMAC(AES(key))
    mac.update(message)
    return mac.finalize()


@pytest.mark.parametrize("size", [0, 1, 15, 17, 24, 32, 64])
def test_cmac_refuses_every_other_key_size(size: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        _core.aes128_cmac(bytes(size), b"message")


def test_cmac_refuses_what_is_not_bytes_like() -> None:
    with pytest.raises(TypeError):
        _core.aes128_cmac("k" * 16, b"")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.aes128_cmac(bytes(16), None)  # type: ignore[arg-type]


def test_rfc_4493_examples(variant: int) -> None:
    """RFC 4493, section 4: 0, 16, 40 and 64 bytes."""
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    message = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    for length, mac in (
        (0, "bb1d6929e95937287fa37d129b756746"),
        (16, "070a16b46b4d4144f79bdd9dd04a287c"),
        (40, "dfa66747de9ae63030ca32611497c827"),
        (64, "51f0bebf7e3b9d92fc49741779363cfe"),
    ):
        assert _core.aes128_cmac(key, message[:length]).hex() == mac


def test_wycheproof_aes_cmac(vectors: Path, variant: int) -> None:
    """Valid tags match, modified ones do not; keys that are not of 128 bits are refused."""
    seen = {"match": 0, "differ": 0, "refused": 0}
    data = json.loads((vectors / "crypto/wycheproof/aes_cmac_test.json").read_text())
    for group in data["testGroups"]:
        for test in group["tests"]:
            key, message = bytes.fromhex(test["key"]), bytes.fromhex(test["msg"])
            if len(key) != 16:
                with pytest.raises(ValueError, match="16 bytes"):
                    _core.aes128_cmac(key, message)
                seen["refused"] += 1
                continue
            mac = _core.aes128_cmac(key, message)[: group["tagSize"] // 8]
            same = mac.hex() == test["tag"]
            assert same == (test["result"] == "valid"), test["tcId"]
            seen["match" if same else "differ"] += 1
    assert sum(seen.values()) == 311
    assert all(seen.values())


def test_acvp_cmac_aes_128(vectors: Path, variant: int) -> None:
    folder = vectors / "crypto/acvp"
    prompt = json.loads((folder / "boringssl-CMAC-AES-prompt.json").read_text())[1]
    answers = json.loads((folder / "boringssl-CMAC-AES-expected.json").read_text())[1]
    expected = {t["tcId"]: t for group in answers["testGroups"] for t in group["tests"] or ()}
    count = 0
    for group in prompt["testGroups"]:
        for test in group["tests"] or ():
            if group["keyLen"] != 128:
                continue
            mac = _core.aes128_cmac(bytes.fromhex(test["key"]), bytes.fromhex(test["message"]))
            mac = mac[: group["macLen"] // 8]
            answer = expected[test["tcId"]]
            if group["direction"] == "gen":
                assert mac.hex() == answer["mac"]
            else:
                assert (mac.hex() == test["mac"].lower()) == answer["testPassed"]
            count += 1
    assert count == 4


def test_every_length_up_to_600_and_every_alignment(variant: int) -> None:
    noise = random.Random(3).randbytes(700)
    view = memoryview(noise)
    key = noise[:16]
    for length in range(601):
        part = view[length % 16 : length % 16 + length]
        assert _core.aes128_cmac(key, part) == reference(key, bytes(part)), length
    for shift in range(64):
        key = bytes(view[shift : shift + 16])
        assert _core.aes128_cmac(view[shift : shift + 16], view) == reference(key, noise)


@given(key=st.binary(min_size=16, max_size=16), message=st.binary(max_size=100))
def test_both_implementations_agree_with_openssl(key: bytes, message: bytes) -> None:
    want = reference(key, message)
    assert _core.aes128_cmac(key, message) == want
    _core.cpu_set_mask(0)
    try:
        assert _core.aes128_cmac(key, message) == want
    finally:
        _core.cpu_set_mask(0xFFFFFFFF)
