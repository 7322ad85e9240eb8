"""The core's verification of ECDSA P-256 against `cryptography`, Wycheproof and made edge cases."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from pyenclave import _core
from pyenclave.attestation import ecdsa
from pyenclave.errors import EnclaveError

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
INVALID, VALID, DOUBT = 0, 1, 2
Point = tuple[int, int] | None


@pytest.fixture(scope="module")
def verifier() -> _core.P256Verifier:
    try:
        return _core.P256Verifier()
    except EnclaveError:
        pytest.skip("this CPU has no AVX-512 IFMA")


def plus(a: Point, b: Point) -> Point:
    if a is None or b is None:
        return b if a is None else a
    if a[0] == b[0]:
        if (a[1] + b[1]) % P == 0:
            return None
        slope = (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, P) % P
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P) % P
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def times(k: int, point: Point) -> Point:
    total: Point = None
    while k:
        if k & 1:
            total = plus(total, point)
        point = plus(point, point)
        k >>= 1
    return total


def raw(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(32, "big") for number in numbers)


def public(point: tuple[int, int]) -> bytes:
    return raw(*point)


def truth(key: bytes, signature: bytes, data: bytes) -> bool:
    """Return what FIPS 186-5 says, in plain Python."""
    x, y = int.from_bytes(key[:32], "big"), int.from_bytes(key[32:], "big")
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if x >= P or y >= P or (y * y - x**3 + 3 * x - B) % P:
        return False
    if not (0 < r < N and 0 < s < N):
        return False
    e = int.from_bytes(hashlib.sha256(data).digest(), "big")
    w = pow(s, -1, N)
    point = plus(times(e * w % N, G), times(r * w % N, (x, y)))
    return point is not None and point[0] % N == r


def judged(verifier: _core.P256Verifier, key: bytes, signature: bytes, data: bytes) -> set[int]:
    """Return the verdicts with and without a table, alone and beside others."""
    found = set(verifier.verify([(key, signature, data)]))
    found.add(verifier.verify([(key, signature, data)] * 7)[5])
    table = verifier.table(key)
    if table is not None:
        found |= set(verifier.verify([(table, signature, data), (key, signature, data)]))
    return found


def signed_with(d: int, k: int, data: bytes) -> bytes:
    """Sign with a chosen nonce."""
    e = int.from_bytes(hashlib.sha256(data).digest(), "big")
    point = times(k, G)
    assert point is not None
    r = point[0] % N
    return raw(r, pow(k, -1, N) * (e + r * d) % N)


# ---- against others -------------------------------------------------------------------------


def _cases(name: str, vectors: Path) -> Iterator[tuple[bytes, dict[str, object]]]:
    document = json.loads((vectors / "crypto" / "wycheproof" / name).read_text())
    for group in document["testGroups"]:
        point = bytes.fromhex(group["publicKey"]["uncompressed"])
        for test in group["tests"]:
            yield point[1:], test


def test_wycheproof_raw_signatures_are_judged_as_written(
    verifier: _core.P256Verifier, vectors: Path
) -> None:
    count = 0
    for key, test in _cases("ecdsa_secp256r1_sha256_p1363_test.json", vectors):
        signature, data = bytes.fromhex(str(test["sig"])), bytes.fromhex(str(test["msg"]))
        if len(signature) != 64:
            assert test["result"] == "invalid"
            assert ecdsa.verified([(key, signature, data)]) == (False,)
            continue
        # Doubt is no answer; there is none in these files but for infinity and like points.
        found = judged(verifier, key, signature, data)
        assert found <= ({VALID, DOUBT} if test["result"] == "valid" else {INVALID, DOUBT}), test
        count += found != {DOUBT}
    assert count > 100


def test_wycheproof_der_signatures_are_judged_as_written(
    verifier: _core.P256Verifier, vectors: Path
) -> None:
    valid = 0
    for key, test in _cases("ecdsa_secp256r1_sha256_test.json", vectors):
        signature = ecdsa.raw_signature(bytes.fromhex(str(test["sig"])))
        data = bytes.fromhex(str(test["msg"]))
        if signature is None or len(signature) != 64:
            assert test["result"] != "valid", test
            continue
        found = judged(verifier, key, signature, data)
        assert found <= ({VALID, DOUBT} if test["result"] == "valid" else {INVALID, DOUBT}), test
        valid += found == {VALID}
    assert valid > 80


@pytest.mark.parametrize("seed", range(4))
def test_random_signatures_and_changed_ones_are_judged_as_by_the_library(
    verifier: _core.P256Verifier, seed: int
) -> None:
    source = random.Random(seed)
    algorithm = ec.ECDSA(Prehashed(hashes.SHA256()))
    for _ in range(12):
        private = ec.derive_private_key(source.randrange(1, N), ec.SECP256R1())
        library = private.public_key()
        key = library.public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )[1:]
        table = verifier.table(key)
        assert table is not None
        claims = []
        for index in range(16):
            data = source.randbytes(source.randrange(200))
            d = private.private_numbers().private_value
            signature = bytearray(signed_with(d, source.randrange(1, N), data))
            if index % 2:
                signature[source.randrange(64)] ^= 1 << source.randrange(8)
            claims.append((key, bytes(signature), data))
        wanted = []
        for _key, signature_, data in claims:
            r, s = int.from_bytes(signature_[:32], "big"), int.from_bytes(signature_[32:], "big")
            try:
                library.verify(encode_dss_signature(r, s), hashlib.sha256(data).digest(), algorithm)
                wanted.append(VALID)
            except InvalidSignature:
                wanted.append(INVALID)
        assert wanted == [VALID, INVALID] * 8
        assert list(verifier.verify(claims)) == wanted
        assert list(verifier.verify([(table, *claim[1:]) for claim in claims])) == wanted
        mixed = [(table if i % 3 else claim[0], *claim[1:]) for i, claim in enumerate(claims)]
        assert list(verifier.verify(mixed)) == wanted


# ---- edges ------------------------------------------------------------------------------------


def test_numbers_out_of_range_are_refused(verifier: _core.P256Verifier) -> None:
    data, d = b"edge", 12345
    key = public(times(d, G) or (0, 0))
    good = signed_with(d, 777, data)
    r, s = int.from_bytes(good[:32], "big"), int.from_bytes(good[32:], "big")
    assert judged(verifier, key, good, data) == {VALID}
    assert judged(verifier, key, raw(r, N - s), data) == {VALID}
    for wrong in (0, N, N + 1, 2**256 - 1, P, P - 1):
        assert judged(verifier, key, raw(wrong, s), data) == {INVALID}
        assert judged(verifier, key, raw(r, wrong), data) == {INVALID}
    for wrong in (1, 2, N - 1, N - 2, (N - 1) // 2):
        assert judged(verifier, key, raw(wrong, s), data) == {INVALID}
        assert judged(verifier, key, raw(r, wrong), data) == {INVALID}


@pytest.mark.parametrize("d", [1, 2, 3, 16, 31, 32, 33, 64, N - 1, N - 2, N - 32, (N + 1) // 2])
def test_small_multiples_of_the_generator_are_keys_like_others(
    verifier: _core.P256Verifier, d: int
) -> None:
    key = public(times(d, G) or (0, 0))
    for k in (1, 2, 3, 5, 31, 32, 63, 64, N - 1, N - 2, N // 2, d % N, (d + 1) % N):
        if k == 0:
            continue
        data = b"%d" % k
        signature = signed_with(d, k, data)
        assert truth(key, signature, data)
        found = judged(verifier, key, signature, data)
        assert found <= {VALID, DOUBT}
        other = b"another"
        assert judged(verifier, key, signature, other) <= {INVALID, DOUBT}


def test_a_sum_that_is_infinity_or_a_doubling_is_never_valid_by_mistake(
    verifier: _core.P256Verifier,
) -> None:
    data = b"crossing"
    e = int.from_bytes(hashlib.sha256(data).digest(), "big")
    doubts = 0
    for d in (5, 6, N - 5, 2**128 + 1):
        key = public(times(d, G) or (0, 0))
        # e + r d = 0: infinity; e = r d: both halves are the same point; and their negatives.
        for r in (-e * pow(d, -1, N) % N, e * pow(d, -1, N) % N):
            for s in (1, 2, 77, N - 1):
                signature = raw(r, s)
                found = judged(verifier, key, signature, data)
                assert truth(key, signature, data) is False
                assert VALID not in found
                doubts += DOUBT in found
    assert doubts > 8  # these are the cases that this code leaves to another


def test_an_x_coordinate_above_the_order_wraps(verifier: _core.P256Verifier) -> None:
    # A point with n <= x < p; its key is chosen so that the signature over it is known.
    x = N
    while True:
        x += 1
        square = (x**3 - 3 * x + B) % P
        y = pow(square, (P + 1) // 4, P)
        if y * y % P == square:
            break
    data, r, s = b"wrap", x - N, 4711
    e = int.from_bytes(hashlib.sha256(data).digest(), "big")
    # R = (e/s) G + (r/s) Q, so Q = (s R - e G) / r
    negative = times(N - e % N, G)
    point = times(pow(r, -1, N), plus(times(s, (x, y)), negative))
    assert point is not None
    key = public(point)
    assert truth(key, raw(r, s), data)
    assert judged(verifier, key, raw(r, s), data) == {VALID}
    assert judged(verifier, key, raw(r + 1, s), data) == {INVALID}
    # An r of the same size that does not wrap is not taken for one that does.
    assert judged(verifier, key, raw(r, s + 1), data) == {INVALID}


def test_zero_digits_and_a_digest_of_zero_are_like_others(verifier: _core.P256Verifier) -> None:
    # u2 with long runs of zero and of full digits; e does not matter for that.
    data, d = b"digits", 99
    e = int.from_bytes(hashlib.sha256(data).digest(), "big")
    key = public(times(d, G) or (0, 0))
    for u2 in (1, 16, 17, 32, 33, 2**128, 2**255, 2**252 - 1, N - 2**200, N - 16, 1 << 205):
        # R = u1 G + u2 Q for any u1; then r = x(R), s = r / u2, e must be u1 s: choose u1 = e / s
        # by steps: with u2 given, s = r / u2 needs r first, so walk over nonces k: r = x(k G),
        # s = r / u2, and the key that fits: Q = (k - e/s) / u2 times G.
        k = 31337
        point = times(k, G)
        assert point is not None
        r = point[0] % N
        s = r * pow(u2, -1, N) % N
        fitting = (k - e * pow(s, -1, N)) * pow(u2, -1, N) % N
        own = public(times(fitting, G) or (0, 0))
        assert truth(own, raw(r, s), data)
        assert judged(verifier, own, raw(r, s), data) == {VALID}
        assert judged(verifier, key, raw(r, s), data) == {INVALID}


def test_what_is_no_point_is_in_doubt_and_has_no_table(verifier: _core.P256Verifier) -> None:
    d, data = 42, b"point"
    x, y = times(d, G) or (0, 0)
    signature = signed_with(d, 43, data)
    for key in (
        raw(x, (y + 1) % P),
        raw(x, 0),
        raw(0, 0),
        raw(0, 1),
        raw(P, y),
        raw(x, P),
        raw(2**256 - 1, 2**256 - 1),
    ):
        assert verifier.table(key) is None
        assert set(verifier.verify([(key, signature, data)])) == {DOUBT}
        # Beside good ones nothing changes for either.
        good = (raw(x, y), signature, data)
        assert list(verifier.verify([good, (key, signature, data), good])) == [VALID, DOUBT, VALID]
    small = next(v for v in range(1, 99) if pow(v**3 - 3 * v + B, (P - 1) // 2, P) == 1)
    root = pow(small**3 - 3 * small + B, (P + 1) // 4, P)
    assert verifier.table(raw(small, root)) is not None
    if small + P < 2**256:
        assert verifier.table(raw(small + P, root)) is None  # not canonical


def test_arguments_of_impossible_sizes_raise(verifier: _core.P256Verifier) -> None:
    for claims in (
        [(bytes(63), bytes(64), b"")],
        [(bytes(64), bytes(65), b"")],
        [(bytearray(64), bytes(64), b"")],
        [(bytes(64), bytes(64), b"")] * 17,
    ):
        with pytest.raises(ValueError, match=r"bytes|at most"):
            verifier.verify(claims)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        verifier.verify([(bytes(64), bytes(64), bytearray(3))])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="bytes"):
        verifier.table(bytes(65))
    assert verifier.verify([]) == b""


# ---- the choice -------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    ecdsa.forget()
    yield
    ecdsa.forget()


def _good() -> ecdsa.Claim:
    return public(times(7, G) or (0, 0)), signed_with(7, 8, b"x"), b"x"


@pytest.mark.usefixtures("fresh", "verifier")
def test_a_key_that_comes_often_gets_a_table_and_verifies_the_same() -> None:
    good = _good()
    bad = (good[0], good[1], b"y")
    for _ in range(12):
        assert ecdsa.verified([good, bad]) == (True, False)
    assert list(ecdsa._TABLES) == [good[0]]


@pytest.mark.usefixtures("fresh", "verifier")
def test_the_switch_leaves_everything_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ecdsa.SWITCH, "library")
    assert not ecdsa.available()
    assert ecdsa.verified([_good()]) == (False,)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("hidden", [0x20, 0x2000, 0x4000])
def test_a_cpu_without_the_instructions_leaves_everything_to_the_library(hidden: int) -> None:
    _core.cpu_set_mask(0xFFFFFFFF & ~hidden)
    try:
        assert not ecdsa.available()
        assert ecdsa.verified([_good()]) == (False,)
        with pytest.raises(EnclaveError):
            _core.P256Verifier()
    finally:
        _core.cpu_set_mask(0xFFFFFFFF)


@pytest.mark.parametrize(
    "der",
    [
        b"",
        bytes(8),
        bytes.fromhex("3006020101020101") + b"\0",
        bytes.fromhex("300602010102018100")[:8],
        bytes.fromhex("3006020181020101"),
        bytes.fromhex("300702020001020101"),
        bytes.fromhex("3006020101030101"),
        bytes.fromhex("308106020101020101"),
        bytes.fromhex("3005020002010101"),
        bytes.fromhex("3026022101") + bytes(32) + bytes.fromhex("020101"),
    ],
)
def test_signatures_in_other_forms_than_der_are_left_to_the_library(der: bytes) -> None:
    assert ecdsa.raw_signature(der) is None


def test_der_signatures_become_raw_ones() -> None:
    for r, s in ((1, 1), (N - 1, 128), (2**255, 2**248), (127, N // 2)):
        assert ecdsa.raw_signature(encode_dss_signature(r, s)) == raw(r, s)
