"""SHA-256, SHA-384 and SHA-512 against published vectors and hashlib."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from borders import variants
from hypothesis import given
from hypothesis import strategies as st

from pyenclave import _core, errors
from pyenclave._ffi import lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Every implementation of SHA-256 by its name, and what is left without any CPU feature.
VARIANTS = {**variants(_core.sha256_variant), "portable": 0}
HASHES: dict[str, Callable[[bytes], bytes]] = {
    "sha256": _core.sha256,
    "sha384": _core.sha384,
    "sha512": _core.sha512,
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation in turn."""
    _core.cpu_set_mask(VARIANTS[request.param])
    yield request.param
    _core.cpu_set_mask(0xFFFFFFFF)


def cavp(path: Path) -> Iterator[tuple[bytes, str]]:
    """The messages and digests of a CAVP byte-oriented response file."""
    length = 0
    message = b""
    for line in path.read_text().splitlines():
        name, _, value = (part.strip() for part in line.partition("="))
        if name == "Len":
            length = int(value)
        elif name == "Msg":
            message = bytes.fromhex(value)[: length // 8]
        elif name == "MD":
            yield message, value


def test_masking_selects_the_portable_implementation() -> None:
    """Without this, the variants of this file would all be the same one."""
    _core.cpu_set_mask(0)
    try:
        assert _core.sha256_variant() == "portable"
    finally:
        _core.cpu_set_mask(0xFFFFFFFF)
    if _core.cpu_features() & lib.PYE_CPU_SHANI:
        assert _core.sha256_variant() == "sha-ni"
    if _core.cpu_features() & lib.PYE_CPU_ARM_SHA2:
        assert _core.sha256_variant() == "armv8"


@pytest.mark.parametrize("wrong", [None, "text", 5, [1, 2]])
def test_hashing_refuses_what_is_not_bytes_like(wrong: object) -> None:
    for function in HASHES.values():
        with pytest.raises(TypeError):
            function(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.Sha256().update(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["SHA256ShortMsg.rsp", "SHA256LongMsg.rsp"])
def test_cavp_sha256_messages(vectors: Path, variant: str, file: str) -> None:
    count = 0
    for message, digest in cavp(vectors / "crypto/cavp" / file):
        assert _core.sha256(message).hex() == digest
        count += 1
    assert count >= 38


@pytest.mark.parametrize("file", ["SHA384ShortMsg.rsp", "SHA384LongMsg.rsp"])
def test_cavp_sha384_messages(vectors: Path, variant: str, file: str) -> None:
    count = 0
    for message, digest in cavp(vectors / "crypto/cavp" / file):
        assert _core.sha384(message).hex() == digest
        count += 1
    assert count == 77


def test_cavp_sha256_monte_carlo(vectors: Path, variant: str) -> None:
    """A hundred outputs, each of a thousand digests of the three before."""
    text = (vectors / "crypto/cavp/SHA256Monte.rsp").read_text()
    values = [line.split(" = ")[1] for line in text.splitlines() if line.startswith(("Seed", "MD"))]
    seed, *expected = (bytes.fromhex(value) for value in values)
    assert len(expected) == 100
    for want in expected:
        a = b = c = seed
        for _ in range(1000):
            a, b, c = b, c, _core.sha256(a + b + c)
        assert c == want
        seed = c


def test_acvp_sha256(vectors: Path, variant: str) -> None:
    """AFT, the Monte Carlo rules of ACVP, and the large message (repeated content)."""
    folder = vectors / "crypto/acvp"
    prompt = json.loads((folder / "aws-lc-SHA2-256-prompt.json").read_text())[1]
    answers = json.loads((folder / "aws-lc-SHA2-256-expected.json").read_text())[1]
    expected = {test["tcId"]: test for group in answers["testGroups"] for test in group["tests"]}
    kinds = set()
    for group in prompt["testGroups"]:
        kinds.add(group["testType"])
        for test in group["tests"]:
            want = expected[test["tcId"]]
            if group["testType"] == "AFT":
                message = bytes.fromhex(test["msg"])[: test["len"] // 8]
                assert _core.sha256(message).hex() == want["md"].lower()
            elif group["testType"] == "MCT":
                seed = bytes.fromhex(test["msg"])
                for result in want["resultsArray"]:
                    a = b = c = seed
                    for _ in range(1000):
                        a, b, c = b, c, _core.sha256(a + b + c)
                    seed = c
                    assert c.hex() == result["md"].lower()
            else:
                large = test["largeMsg"]
                assert large["expansionTechnique"] == "repeating"
                if variant != "portable":  # a gigabyte: once is enough
                    assert repeated(large).hex() == want["md"].lower()
    assert kinds == {"AFT", "MCT", "LDT"}


def repeated(large: dict[str, Any]) -> bytes:
    """The digest of ACVP's large message: its content again and again up to the full length."""
    content = bytes.fromhex(large["content"])
    piece = content * ((1 << 20) // len(content))
    whole, rest = divmod(large["fullLength"] // 8, len(piece))
    digest = _core.Sha256()
    for _ in range(whole):
        digest.update(piece)
    digest.update(piece[:rest])
    return digest.digest()


@pytest.mark.parametrize("name", HASHES)
def test_every_length_up_to_600_and_every_alignment(variant: str, name: str) -> None:
    noise = random.Random(1).randbytes(700)
    view = memoryview(noise)
    for length in range(601):
        part = view[length % 64 : length % 64 + length]
        assert HASHES[name](part) == hashlib.new(name, part).digest(), length
    for shift in range(64):
        part = view[shift : shift + 321]
        assert HASHES[name](part) == hashlib.new(name, part).digest(), shift


@given(parts=st.lists(st.binary(max_size=300), max_size=12), portable=st.booleans())
def test_parts_hash_like_the_whole(parts: list[bytes], portable: bool) -> None:
    """Any way of cutting a message gives its digest, at each point on the way."""
    _core.cpu_set_mask(0 if portable else 0xFFFFFFFF)
    try:
        ours = (_core.Sha256(), _core.Sha384())
    finally:
        _core.cpu_set_mask(0xFFFFFFFF)
    theirs = (hashlib.sha256(), hashlib.sha384())
    for part in parts:
        for mine, other in zip(ours, theirs, strict=True):
            mine.update(part)
            other.update(part)
            assert mine.digest() == other.digest()


@pytest.mark.parametrize("kind", [_core.Sha256, _core.Sha384])
def test_a_copy_goes_its_own_way(kind: type[_core.Sha256]) -> None:
    first = kind(b"common")
    second = first.copy()
    first.update(b"one")
    second.update(b"two")
    assert first.digest() == kind(b"commonone").digest()
    assert second.digest() == kind(b"commontwo").digest()


def test_large_input_releases_the_gil_and_a_second_user_gets_an_error() -> None:
    """Two threads on one object: the state is never mixed up, the late one is refused."""
    shared = _core.Sha256()
    big = bytes(8 << 20)
    refused = []
    finished = []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        for _ in range(4):
            try:
                shared.update(big)
                finished.append(1)
            except errors.BusyError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    start.wait()
    for thread in threads:
        thread.join()
    assert len(finished) + len(refused) == 8
    assert shared.digest() == hashlib.sha256(big * len(finished)).digest()
