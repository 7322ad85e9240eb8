"""MRENCLAVE from pages, and SIGSTRUCT: signature, Q1 and Q2, MRSIGNER, the checks of EINIT."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import MeasurementError, SignatureError
from pyenclave.formats.sgx import Attributes, Sigstruct
from pyenclave.measurement import sgx

if TYPE_CHECKING:
    from pathlib import Path

RW, RX, TCS = 0x203, 0x205, 0x100
SIZE = 1 << 20


def published(vectors: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a published SIGSTRUCT and what is expected of it."""
    folder = vectors / "measurement" / name
    case = json.loads((folder / "case.json").read_text())
    return (folder / case["files"]["sigstruct"]["path"]).read_bytes(), case["expect"]


# RSA keys are slow to make; the tests that need one share it.
@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    """An author's key."""
    return rsa.generate_private_key(public_exponent=3, key_size=3072)


@pytest.fixture(scope="module")
def signed(key: rsa.RSAPrivateKey) -> Sigstruct:
    """A SIGSTRUCT that the key signed, by the cryptography package."""
    return sign(
        key,
        Sigstruct(
            attributes=Attributes(flags=4, xfrm=3),
            attribute_mask=Attributes(flags=(1 << 64) - 3, xfrm=3),
            mrenclave=b"e" * 32,
            isv_prod_id=7,
            isv_svn=2,
        ),
    )


def sign(key: rsa.RSAPrivateKey, value: Sigstruct) -> Sigstruct:
    """Sign as an author does."""
    modulus = key.public_key().public_numbers().n.to_bytes(384, "little")
    value = dataclasses.replace(value, modulus=modulus)
    signature = key.sign(sgx.sign_message(value), padding.PKCS1v15(), SHA256())[::-1]
    q1, q2 = sgx.compute_q1_q2(modulus, signature)
    return dataclasses.replace(value, signature=signature, q1=q1, q2=q2)


# ---- MRENCLAVE: hostile input -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([(1, RW, bytes(4096))], "ALIGNMENT"),
        ([(SIZE, RW, bytes(4096))], "ARGUMENT"),
        ([(SIZE - 4096, RW, bytes(8192))], "ARGUMENT"),
        ([(0, 0x202, bytes(4096))], "flags"),
        ([(0, TCS | 1, None)], "flags"),
        ([(0, RW, bytes(4095))], "whole pages"),
        ([(-4096, RW, bytes(4096))], "cannot be built"),
        ([(1 << 64, RW, None)], "cannot be built"),
        ([(0, RW, bytes(4096)), (0, RW, bytes(4096))], "twice"),
        ([(0, RW, bytes(4096)), (0, RX, None)], "twice"),
        ([(4096, RW, bytes(8192)), (0, RW, bytes(8192))], "twice"),
        ([(0, RW, bytes(8192)), (4096, RW, None)], "twice"),
        ([(0, RW, None), (8192, RW, None), (4096, RW, None), (4096, RW, None)], "twice"),
    ],
)
def test_pages_that_hardware_refuses_are_refused(
    pages: list[tuple[int, int, bytes | None]], message: str
) -> None:
    with pytest.raises(MeasurementError, match=message):
        sgx.measure_pages(pages, size=SIZE)


@pytest.mark.parametrize(("size", "frame"), [(0, 1), (4096, 1), (SIZE + 4096, 1), (SIZE, 0)])
def test_an_impossible_enclave_is_refused(size: int, frame: int) -> None:
    with pytest.raises(MeasurementError, match="ECREATE"):
        sgx.measure_pages([], size=size, ssa_frame_size=frame)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 3), st.sampled_from([RW, RX]), st.booleans()),
        max_size=12,
    )
)
def test_any_list_of_pages(parts: list[tuple[int, int, int, bool]]) -> None:
    """The value of the stream written by hand, or refusal exactly when a page comes twice."""
    stream = bytearray(struct.pack("<8sIQ44x", b"ECREATE", 1, SIZE))
    pages: list[tuple[int, int, bytes | None]] = []
    seen: set[int] = set()
    twice = False
    for page, count, flags, measured in parts:
        number = count if measured else 1
        content = random.Random(page).randbytes(4096 * number)
        pages.append((page * 4096, flags, content if measured else None))
        twice |= bool(seen & set(range(page, page + number)))
        seen |= set(range(page, page + number))
        for at in range(0, len(content), 4096):
            stream += struct.pack("<8sQQ40x", b"EADD", page * 4096 + at, flags)
            for chunk in range(at, at + 4096, 256) if measured else ():
                stream += struct.pack("<8sQ48x", b"EEXTEND", page * 4096 + chunk)
                stream += content[chunk : chunk + 256]
    if twice:
        with pytest.raises(MeasurementError, match="twice"):
            sgx.measure_pages(pages, size=SIZE)
    else:
        assert sgx.measure_pages(pages, size=SIZE) == hashlib.sha256(stream).digest()


# ---- SIGSTRUCT --------------------------------------------------------------------------------


def test_every_bit_of_the_signed_bytes_counts(signed: Sigstruct) -> None:
    """Bytes 0 to 127 and 900 to 1027, through the file form: nothing changed passes."""
    sgx.verify_sigstruct(signed)
    data = bytearray(signed.to_bytes())
    for at in (*range(128), *range(900, 1028)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(SignatureError):
                sgx.verify_sigstruct(Sigstruct.from_bytes(data))
            data[at] ^= 1 << bit
    sgx.verify_sigstruct(Sigstruct.from_bytes(data))


def test_every_byte_of_key_signature_and_quotients_counts(signed: Sigstruct) -> None:
    data = bytearray(signed.to_bytes())
    for at in (*range(128, 900, 3), *range(1028, 1808, 3)):
        data[at] ^= 1 << at % 8
        with pytest.raises(SignatureError):
            sgx.verify_sigstruct(Sigstruct.from_bytes(data))
        data[at] ^= 1 << at % 8


def test_a_signature_not_below_the_modulus_is_refused(signed: Sigstruct) -> None:
    """S + N gives the same cube: accepting it would give one signature two forms."""
    n = int.from_bytes(signed.modulus, "little")
    s = int.from_bytes(signed.signature, "little")
    for other in (n, n + 1, (1 << 3072) - 1, *([s + n] if s + n < 1 << 3072 else [])):
        value = dataclasses.replace(signed, signature=other.to_bytes(384, "little"))
        assert not sgx.signature_valid(value)
        assert not sgx.q1_q2_valid(value)
        with pytest.raises(SignatureError, match="not smaller"):
            sgx.compute_q1_q2(value.modulus, value.signature)


@pytest.mark.parametrize("modulus", [0, 1, 3, (1 << 3071) - 1, 1 << 3071, (1 << 3072) - 2])
def test_a_modulus_that_is_no_rsa_3072_key_is_refused(signed: Sigstruct, modulus: int) -> None:
    value = dataclasses.replace(signed, modulus=modulus.to_bytes(384, "little"))
    with pytest.raises(SignatureError):
        sgx.verify_sigstruct(value)


@pytest.mark.parametrize("exponent", [0, 1, 2, 5, 65537])
def test_another_exponent_is_refused_even_without_the_parser(
    signed: Sigstruct, exponent: int
) -> None:
    assert not sgx.signature_valid(dataclasses.replace(signed, exponent=exponent))


def test_forged_padding_is_refused(signed: Sigstruct) -> None:
    """With exponent 3 a cube root fits any prefix: garbage after a short padding (CVE-2006-4339).

    The modulus is so large that no reduction takes place; all of the padding must be compared.
    """
    digest = hashlib.sha256(signed.signed_bytes).digest()
    info = bytes.fromhex("3031300d060960864801650304020105000420") + digest
    prefix = b"\x00\x01" + b"\xff" * 8 + b"\x00" + info
    target = int.from_bytes(prefix + b"\xff" * (384 - len(prefix)), "big")
    low, high = 0, 1 << 1030
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**3 <= target else (low, middle - 1)
    assert (low**3).to_bytes(384, "big").startswith(prefix)
    value = dataclasses.replace(signed, signature=low.to_bytes(384, "little"))
    assert not sgx.signature_valid(value)


def test_a_signature_by_another_hash_or_padding_is_refused(
    key: rsa.RSAPrivateKey, signed: Sigstruct
) -> None:
    pss = padding.PSS(padding.MGF1(SHA256()), 32)
    signature = key.sign(signed.signed_bytes, pss, SHA256())[::-1]
    assert not sgx.signature_valid(dataclasses.replace(signed, signature=signature))


def test_what_is_signed_verifies_elsewhere(key: rsa.RSAPrivateKey, signed: Sigstruct) -> None:
    key.public_key().verify(
        signed.signature[::-1], sgx.sign_message(signed), padding.PKCS1v15(), SHA256()
    )
    assert len(sgx.sign_message(signed)) == 256
    assert sgx.mrsigner(signed.modulus) == hashlib.sha256(signed.modulus).digest()


@pytest.mark.parametrize("size", [0, 383, 385])
def test_numbers_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="384"):
        sgx.mrsigner(bytes(size))
    with pytest.raises(ValueError, match="384"):
        sgx.compute_q1_q2(b"\xff" * 384, bytes(size))
    with pytest.raises(ValueError, match="384"):
        sgx.compute_q1_q2(bytes(size), bytes(384))


def test_published_sigstructs(vectors: Path) -> None:
    """Intel's launch enclaves, others, and the negatives that parse."""
    outcomes = []
    for folder in sorted((vectors / "measurement").glob("sgx-sigstruct-*")):
        data, expect = published(vectors, folder.name)
        if "reject" in expect:
            with pytest.raises(SignatureError):
                sgx.verify_sigstruct(Sigstruct.from_bytes(data))
            outcomes.append("rejected")
            continue
        value = Sigstruct.from_bytes(data)
        assert sgx.signature_valid(value) == expect["signature_valid"], folder.name
        assert sgx.q1_q2_valid(value) == expect["q1_q2_valid"], folder.name
        if expect["signature_valid"] and expect["q1_q2_valid"]:
            sgx.verify_sigstruct(value)
            assert sgx.mrsigner(value.modulus).hex() == expect["mrsigner"]
            assert sgx.compute_q1_q2(value.modulus, value.signature) == (value.q1, value.q2)
            outcomes.append("valid")
        else:
            with pytest.raises(SignatureError):
                sgx.verify_sigstruct(value)
            outcomes.append("invalid")
    assert {name: outcomes.count(name) for name in outcomes} == {
        "valid": 11,
        "invalid": 2,
        "rejected": 2,
    }


# ---- EINIT's comparison -----------------------------------------------------------------------


def test_another_measurement_is_refused(signed: Sigstruct) -> None:
    sgx.check_launch(signed, mrenclave=b"e" * 32, attributes=Attributes(flags=4, xfrm=3))
    for other in (b"f" * 32, b"", b"e" * 31, b"e" * 33):
        with pytest.raises(SignatureError, match="not the one that was signed") as caught:
            sgx.check_launch(signed, mrenclave=other, attributes=signed.attributes)
        assert caught.value.expected == (b"e" * 32).hex()


def test_masked_attribute_and_misc_bits_count_and_others_do_not(signed: Sigstruct) -> None:
    mask = signed.attribute_mask
    for bit in range(64):
        flags = signed.attributes.flags ^ 1 << bit
        attributes = Attributes(flags=flags, xfrm=3)
        if mask.flags >> bit & 1:
            with pytest.raises(SignatureError, match="attributes"):
                sgx.check_launch(signed, mrenclave=b"e" * 32, attributes=attributes)
        else:
            sgx.check_launch(signed, mrenclave=b"e" * 32, attributes=attributes)
        attributes = Attributes(flags=4, xfrm=3 ^ 1 << bit)
        if mask.xfrm >> bit & 1:
            with pytest.raises(SignatureError, match="attributes"):
                sgx.check_launch(signed, mrenclave=b"e" * 32, attributes=attributes)
        else:
            sgx.check_launch(signed, mrenclave=b"e" * 32, attributes=attributes)
    narrow = dataclasses.replace(signed, misc_mask=1)
    arguments: dict[str, Any] = {"mrenclave": b"e" * 32, "attributes": signed.attributes}
    sgx.check_launch(narrow, **arguments, misc_select=0xFFFFFFFE)
    with pytest.raises(SignatureError, match="MISCSELECT"):
        sgx.check_launch(narrow, **arguments, misc_select=1)
