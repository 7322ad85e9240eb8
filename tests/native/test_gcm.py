"""AES-GCM: published vectors, every length and alignment, and an independent library."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from borders import ALL_FEATURES, gcm_implementations, gcm_masks
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave._ffi import ffi, lib
from pyenclave.errors import EnclaveClosedError, UnsealError

# The features to leave visible so that each implementation of this CPU is chosen.
MASKS = gcm_masks()
AVAILABLE = _core.gcm_implementations()


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Handles made inside use implementation *name*."""
    _core.cpu_set_mask(MASKS[name])
    try:
        if _core.Gcm(bytes(16)).implementation != name:
            raise AssertionError(f"{name} was not chosen")
        yield
    finally:
        _core.cpu_set_mask(ALL_FEATURES)


class Memory:
    """Bytes at a chosen alignment, with guards on both sides that must not change."""

    def __init__(self, size: int, offset: int = 0, fill: int = 0xA5) -> None:
        self._raw = ffi.new("uint8_t[]", size + 256)
        start = 64 + (-int(ffi.cast("uintptr_t", self._raw)) % 64) + offset
        ffi.memmove(self._raw, bytes([fill]) * (size + 256), size + 256)
        self._start, self._size, self._fill = start, size, fill
        self.at = self._raw + start

    def __bytes__(self) -> bytes:
        return bytes(ffi.buffer(self.at, self._size))

    def write(self, data: bytes, at: int = 0) -> None:
        ffi.memmove(self.at + at, data, len(data))

    def guards_hold(self) -> bool:
        raw = bytes(ffi.buffer(self._raw, self._size + 256))
        around = raw[: self._start] + raw[self._start + self._size :]
        return around == bytes([self._fill]) * len(around)


def aligned_key(size: int, kind: str) -> Any:
    """Memory for a key, aligned as the header asks; keep the second value alive."""
    raw = ffi.new("uint8_t[]", size + 64)
    return ffi.cast(kind, raw + (-int(ffi.cast("uintptr_t", raw)) % 64)), raw


IMPLEMENTATION = gcm_implementations()


class CGcm:
    """AES-GCM at the level of C, where every address can be chosen."""

    def __init__(self, secret: bytes, name: str) -> None:
        self.key, self._keep = aligned_key(lib.pye_gcm_key_size(), "pye_gcm_key *")
        status = lib.pye_gcm_init(self.key, secret, len(secret), IMPLEMENTATION[name])
        if status != lib.PYE_OK:
            raise AssertionError(ffi.string(lib.pye_status_name(status)))

    def seal(self, out: Any, tag: Any, iv: bytes, data: Any, size: int, aad: bytes = b"") -> int:
        return int(lib.pye_gcm_seal(self.key, out, tag, iv, data, size, aad, len(aad)))

    def open(self, out: Any, iv: bytes, data: Any, size: int, tag: Any, aad: bytes = b"") -> int:
        return int(lib.pye_gcm_open(self.key, out, iv, data, size, tag, aad, len(aad)))


@pytest.fixture(params=list(MASKS))
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with chosen(request.param):
        yield request.param


def data_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def reference(key: bytes, iv: bytes, data: bytes, aad: bytes) -> bytes:
    return AESGCM(key).encrypt(iv, data, aad)


# ---- refusal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 8, 15, 17, 24, 31, 33, 64])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="16 or 32"):
        _core.Gcm(bytes(size))


@pytest.mark.parametrize("size", [0, 1, 4, 8, 11, 13, 15, 16, 20, 64, 128, 257])
def test_CRY_04_an_iv_that_is_not_96_bits_is_refused(size: int, implementation: str) -> None:
    gcm = _core.Gcm(bytes(32))
    with pytest.raises(ValueError, match="IV"):
        gcm.seal(bytes(size), b"data")
    with pytest.raises(ValueError, match="IV"):
        gcm.open(bytes(size), bytes(20))


@pytest.mark.parametrize("size", range(16))
def test_CRY_03_a_truncated_tag_is_refused(size: int, implementation: str) -> None:
    """A message cut to any tag length below 16 does not open; shorter than a tag is an error."""
    gcm = _core.Gcm(bytes(32))
    with pytest.raises(ValueError, match="at least 16"):
        gcm.open(bytes(12), bytes(size))
    sealed = gcm.seal(bytes(12), b"x" * 40)
    with pytest.raises(UnsealError):
        gcm.open(bytes(12), sealed[: 40 + size])


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 64, 500, 600])
def test_every_changed_bit_is_refused_and_the_output_is_zero(
    size: int, implementation: str
) -> None:
    key, iv, aad = data_of(32), data_of(12), data_of(33)
    gcm = _core.Gcm(key)
    data = data_of(size, 2)
    sealed = bytearray(gcm.seal(iv, data, aad))
    for bit in range(0, 8 * len(sealed), 1 if size <= 64 else 7):
        sealed[bit // 8] ^= 1 << bit % 8
        out = bytearray(b"\xff" * size)
        with pytest.raises(UnsealError):
            gcm.open_into(iv, sealed, out, aad)
        assert out == bytes(size)
        sealed[bit // 8] ^= 1 << bit % 8
    for changed_iv, changed_aad in ((data_of(12, 9), aad), (iv, aad[:-1]), (iv, aad + b"\0")):
        with pytest.raises(UnsealError):
            gcm.open(changed_iv, bytes(sealed), changed_aad)
    assert gcm.open(iv, bytes(sealed), aad) == data


def test_CRY_05_partial_overlap_is_refused_and_writes_nothing(implementation: str) -> None:
    gcm = CGcm(bytes(32), implementation)
    for size in (1, 16, 64, 600):
        for shift in (1, 15, 16, 63, size - 1, -1, -16, 1 - size):
            if shift == 0 or abs(shift) >= size:
                continue
            area = Memory(3 * size + 64)
            before = bytes(area)
            data, out = area.at + size, area.at + size + shift
            tag = ffi.new("uint8_t[16]")
            assert gcm.seal(out, tag, bytes(12), data, size) == lib.PYE_E_OVERLAP
            assert gcm.open(out, bytes(12), data, size, tag) == lib.PYE_E_OVERLAP
            assert bytes(area) == before
            assert bytes(tag) == bytes(16)
    area = Memory(128)
    assert gcm.seal(area.at, area.at + 63, bytes(12), area.at, 64) == lib.PYE_E_OVERLAP
    assert gcm.open(area.at, bytes(12), area.at, 64, area.at + 10) == lib.PYE_E_OVERLAP


def test_CRY_05_touching_ranges_are_not_overlap(implementation: str) -> None:
    gcm = CGcm(bytes(32), implementation)
    area = Memory(300)
    tag = ffi.new("uint8_t[16]")
    assert gcm.seal(area.at + 100, tag, bytes(12), area.at, 100) == lib.PYE_OK
    assert gcm.open(area.at + 200, bytes(12), area.at + 100, 100, tag) == lib.PYE_OK
    assert bytes(area)[200:] == bytes(area)[:100]


def test_CRY_04_lengths_beyond_the_standard_are_refused() -> None:
    """SP 800-38D, 5.2.1.1. The length is looked at before any byte is."""
    gcm = CGcm(bytes(32), "portable")
    area, tag = Memory(16), ffi.new("uint8_t[16]")
    for size in (lib.PYE_GCM_MAX_DATA + 1, 2**40, 2**63):
        assert gcm.seal(area.at, tag, bytes(12), area.at, size) == lib.PYE_E_LIMIT
        assert gcm.open(area.at, bytes(12), area.at, size, tag) == lib.PYE_E_LIMIT
    status = lib.pye_gcm_seal(
        gcm.key, area.at, tag, bytes(12), area.at, 16, area.at, lib.PYE_GCM_MAX_AAD + 1
    )
    assert status == lib.PYE_E_LIMIT
    assert bytes(area) == b"\xa5" * 16


def test_impossible_arguments_of_the_c_interface_are_refused() -> None:
    gcm = CGcm(bytes(32), "portable")
    tag, data = ffi.new("uint8_t[16]"), ffi.new("uint8_t[16]")
    null = ffi.NULL
    assert gcm.seal(null, tag, bytes(12), data, 16) == lib.PYE_E_ARGUMENT
    assert gcm.seal(data, null, bytes(12), data, 16) == lib.PYE_E_ARGUMENT
    assert gcm.seal(data, tag, bytes(12), null, 16) == lib.PYE_E_ARGUMENT
    assert lib.pye_gcm_seal(null, data, tag, bytes(12), data, 16, null, 0) == lib.PYE_E_ARGUMENT
    assert lib.pye_gcm_seal(gcm.key, data, tag, null, data, 16, null, 0) == lib.PYE_E_ARGUMENT
    assert lib.pye_gcm_seal(gcm.key, data, tag, bytes(12), data, 16, null, 1) == lib.PYE_E_ARGUMENT
    assert gcm.seal(null, tag, bytes(12), null, 0) == lib.PYE_OK
    moved = ffi.cast("pye_gcm_key *", ffi.cast("uint8_t *", gcm.key) + 16)
    assert lib.pye_gcm_init(moved, bytes(32), 32, lib.PYE_GCM_ANY) == lib.PYE_E_ALIGNMENT
    assert lib.pye_gcm_init(gcm.key, bytes(24), 24, lib.PYE_GCM_ANY) == lib.PYE_E_LENGTH
    assert lib.pye_gcm_init(gcm.key, bytes(32), 32, 0) == lib.PYE_E_UNSUPPORTED
    assert lib.pye_gcm_init(gcm.key, bytes(32), 32, 1 << 16) == lib.PYE_E_UNSUPPORTED


def test_CRY_06_a_wiped_key_is_zero_and_refused(implementation: str) -> None:
    gcm = CGcm(data_of(32), implementation)
    memory = ffi.buffer(gcm.key, lib.pye_gcm_key_size())
    assert any(bytes(memory))
    lib.pye_gcm_wipe(gcm.key)
    assert not any(bytes(memory))
    tag, data = ffi.new("uint8_t[16]"), ffi.new("uint8_t[16]")
    assert gcm.seal(data, tag, bytes(12), data, 16) == lib.PYE_E_STATE
    lib.pye_gcm_wipe(ffi.NULL)


def test_use_after_close_is_refused(implementation: str) -> None:
    gcm = _core.Gcm(bytes(32))
    gcm.close()
    gcm.close()
    assert gcm.implementation == "none"
    with pytest.raises(EnclaveClosedError):
        gcm.seal(bytes(12), b"")
    with _core.Gcm(bytes(32)) as used:
        used.seal(bytes(12), b"")
    with pytest.raises(EnclaveClosedError):
        used.seal(bytes(12), b"")


# ---- published vectors -----------------------------------------------------------------------


def check_vector(
    key: bytes, iv: bytes, aad: bytes, data: bytes | None, ct: bytes, tag: bytes
) -> bool:
    """Try one vector; data of None must be refused. False where only refusal could be tested."""
    if len(key) not in (16, 32):
        with pytest.raises(ValueError, match="key"):
            _core.Gcm(key)
        return False
    gcm = _core.Gcm(key)
    if len(iv) != 12:
        with pytest.raises(ValueError, match="IV"):
            gcm.open(iv, ct + tag.ljust(16, b"\0"), aad)
        with pytest.raises(ValueError, match="IV"):
            gcm.seal(iv, data or b"", aad)
        return False
    if data is None or len(tag) != 16:
        with pytest.raises((UnsealError, ValueError)):
            gcm.open(iv, ct + tag, aad)
        return len(tag) == 16
    assert gcm.seal(iv, data, aad) == ct + tag
    assert gcm.open(iv, ct + tag, aad) == data
    return True


def test_CRY_01_wycheproof(vectors: Path, implementation: str) -> None:
    suite = json.loads((vectors / "crypto/wycheproof/aes_gcm_test.json").read_text())
    applicable = 0
    for group in suite["testGroups"]:
        for test in group["tests"]:
            field = {k: bytes.fromhex(test[k]) for k in ("key", "iv", "aad", "msg", "ct", "tag")}
            data = None if test["result"] == "invalid" else field["msg"]
            applicable += check_vector(
                field["key"], field["iv"], field["aad"], data, field["ct"], field["tag"]
            )
    assert applicable >= 70


def rsp_cases(path: Path) -> Iterator[dict[str, str]]:
    case: dict[str, str] = {}
    for line in [*path.read_text().splitlines(), "Count = end"]:
        name, _, value = (part.strip() for part in line.partition("="))
        if name == "Count":
            if "Key" in case:
                yield case
            case = {}
        elif name == "FAIL" or (name and not line.startswith(("#", "["))):
            case[name] = value


@pytest.mark.parametrize(
    "name", ["gcmEncryptExtIV128", "gcmEncryptExtIV256", "gcmDecrypt128", "gcmDecrypt256"]
)
def test_CRY_01_cavp(vectors: Path, implementation: str, name: str) -> None:
    applicable = total = 0
    for case in rsp_cases(vectors / f"crypto/cavp/{name}.rsp"):
        total += 1
        key, iv, aad, ct, tag = (bytes.fromhex(case[k]) for k in ("Key", "IV", "AAD", "CT", "Tag"))
        data = None if "FAIL" in case else bytes.fromhex(case["PT"])
        applicable += check_vector(key, iv, aad, data, ct, tag)
    assert total == 1575
    assert applicable >= 70


def test_CRY_01_acvp(vectors: Path, implementation: str) -> None:
    folder = vectors / "crypto/acvp"
    prompt = json.loads((folder / "boringssl-ACVP-AES-GCM-prompt.json").read_text())[1]
    answers = json.loads((folder / "boringssl-ACVP-AES-GCM-expected.json").read_text())[1]
    expected = {t["tcId"]: t for g in answers["testGroups"] for t in g["tests"]}
    applicable = refused = 0
    for group in prompt["testGroups"]:
        for test in group["tests"]:
            both = {**test, **expected[test["tcId"]]}
            if "iv" not in both:  # the IV is to be made inside: not offered
                continue
            key, iv, aad = (bytes.fromhex(both[k]) for k in ("key", "iv", "aad"))
            data = bytes.fromhex(both["pt"]) if both.get("testPassed", True) else None
            refused += data is None
            applicable += check_vector(
                key, iv, aad, data, bytes.fromhex(both["ct"]), bytes.fromhex(both["tag"])
            )
    assert applicable >= 3


# ---- every length, alignment and path ---------------------------------------------------------


@pytest.mark.parametrize("key_size", [16, 32])
def test_CRY_01_every_length_up_to_1100_equals_another_library(
    implementation: str, key_size: int
) -> None:
    key, iv = data_of(key_size, 3), data_of(12, 4)
    gcm, other = _core.Gcm(key), AESGCM(key)
    source = data_of(1100, 5)
    for size in range(1101):
        data, aad = source[:size], source[: size * 7 % 131]
        sealed = other.encrypt(iv, data, aad)
        assert gcm.seal(iv, data, aad) == sealed
        assert gcm.open(iv, sealed, aad) == data


@pytest.mark.parametrize(
    "size", [2047, 4080, 4095, 4096, 4097, 4112, 4608, 8191, 8192, 8193, 8704, 12289, 70001]
)
@pytest.mark.parametrize("aad_size", [0, 1, 16, 63, 64, 65, 4095, 4096, 4097, 5000, 9000])
def test_CRY_01_long_messages_and_headers_equal_another_library(
    implementation: str, size: int, aad_size: int
) -> None:
    """The borders between chunks of one reduction lie at multiples of 4096."""
    iv, data, aad = data_of(12, 4), data_of(size, 6), data_of(aad_size, 7)
    for key_size in (16, 32):  # each has code of its own
        key = data_of(key_size, 3)
        sealed = reference(key, iv, data, aad)
        gcm = _core.Gcm(key)
        assert gcm.seal(iv, data, aad) == sealed
        assert gcm.open(iv, sealed, aad) == data


def test_CRY_01_every_alignment_of_every_buffer(implementation: str) -> None:
    """Offsets 0 … 63 of input, output and tag; nothing outside is touched."""
    key, iv, aad = data_of(32), data_of(12), data_of(20)
    gcm = CGcm(key, implementation)
    for size in (1, 17, 64, 130, 523, 1100):
        data = data_of(size, 8)
        sealed = reference(key, iv, data, aad)
        for offset in range(64):
            source = Memory(size, offset)
            out = Memory(size, (offset * 5 + 3) % 64)
            tag = Memory(16, (offset * 11 + 7) % 64)
            source.write(data)
            assert gcm.seal(out.at, tag.at, iv, source.at, size, aad) == lib.PYE_OK
            assert bytes(out) + bytes(tag) == sealed
            assert gcm.open(source.at, iv, out.at, size, tag.at, aad) == lib.PYE_OK
            assert bytes(source) == data
            assert source.guards_hold()
            assert out.guards_hold()
            assert tag.guards_hold()


def test_CRY_05_in_place(implementation: str) -> None:
    key, iv, aad = data_of(32), data_of(12), b"header"
    gcm = _core.Gcm(key)
    for size in [*range(200), 511, 512, 513, 1024, 4096, 5000]:
        data = data_of(size, 8)
        area = bytearray(data + bytes(16))
        gcm.seal_into(iv, memoryview(area)[:size], area, aad)
        assert area == reference(key, iv, data, aad)
        gcm.open_into(iv, area, memoryview(area)[:size], aad)
        assert area[:size] == data


def test_CRY_04_the_counter_may_carry_into_its_upper_bytes(implementation: str) -> None:
    """65,600 blocks: the counter's low 16 bits wrap around, and the IV ends in ones."""
    key, iv = data_of(16), b"\xff" * 12
    data = data_of(16 * 65600 + 5)
    gcm = _core.Gcm(key)
    sealed = gcm.seal(iv, data)
    assert sealed == reference(key, iv, data, b"")
    assert gcm.open(iv, sealed) == data


@settings(max_examples=150, deadline=None)
@given(
    key=st.one_of(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)),
    iv=st.binary(min_size=12, max_size=12),
    data=st.binary(max_size=6000),
    aad=st.binary(max_size=300),
)
def test_CRY_01_all_implementations_agree_with_another_library(
    key: bytes, iv: bytes, data: bytes, aad: bytes
) -> None:
    sealed = reference(key, iv, data, aad)
    for name in AVAILABLE:
        with chosen(name):
            gcm = _core.Gcm(key)
        assert gcm.seal(iv, data, aad) == sealed
        assert gcm.open(iv, sealed, aad) == data


def test_CRY_10_every_implementation_passes_its_self_test() -> None:
    for name in AVAILABLE:
        bit = getattr(lib, f"PYE_GCM_{name.upper()}")
        assert lib.pye_gcm_self_test(bit) == lib.PYE_OK
    assert lib.pye_gcm_self_test(0) == lib.PYE_E_ARGUMENT
    assert lib.pye_gcm_self_test(3) == lib.PYE_E_ARGUMENT
    assert lib.pye_gcm_self_test(1 << 16) == lib.PYE_E_UNSUPPORTED


def test_the_fastest_implementation_that_the_mask_leaves_is_chosen() -> None:
    assert set(MASKS) == set(AVAILABLE)
    for name in AVAILABLE:
        with chosen(name):
            assert _core.gcm_implementations()[-1] == name
            kept = _core.Gcm(bytes(32))
        assert kept.implementation == name
