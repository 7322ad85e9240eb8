"""The image file: hostile bytes first, then the layout."""

from __future__ import annotations

import hashlib
import struct

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyenclave.errors import EnclaveError, ImageError
from pyenclave.formats import image as format_image
from pyenclave.formats.image import (
    MAX_SHARED,
    FileEntry,
    Image,
    ImageInfo,
    assemble,
    with_sigstruct,
)
from pyenclave.formats.lock import Lock

PAGE = 4096
FILES = {"entry/score.py": b"def score(): ...\n", "files/model": bytes(range(256)) * 17}
LOCK = Lock(python="cpython-3.11.7 abi", bootstrap=(), modules=(), libraries=(), preload=())


def info_of(contents: dict[str, bytes] = FILES, **changes: object) -> ImageInfo:
    values: dict[str, object] = {
        "name": "scoring",
        "product_id": 1,
        "security_version": 2,
        "debug": False,
        "threads": 2,
        "entry_kind": "python",
        "entry_module": "score",
        "entry_file": "entry/score.py",
        "functions": ({"name": "score"},),
        "sealed_memory": 1 << 26,
        "message_limit": 1 << 20,
        "ocalls": (),
        "blas_threads": 1,
        "jit": False,
        "seal": {},
        "files": tuple(
            FileEntry(name=name, size=len(content), executable=name.startswith("entry/"))
            for name, content in sorted(contents.items())
        ),
    }
    return ImageInfo(**{**values, **changes})


GOOD = assemble(info_of(), LOCK, FILES)


def finished(body: bytes) -> bytes:
    """Return *body* with a checksum that holds: what an attacker would do."""
    return body + hashlib.sha256(body).digest()


def rebuilt(info: bytes, *, stored: int | None = None) -> bytes:
    """Return an image with other info bytes in its info page, all else in place."""
    body = bytearray(GOOD[:-32])
    body[PAGE : 2 * PAGE] = info + bytes(PAGE - len(info))
    struct.pack_into("<Q", body, 32, len(info))
    if stored is not None:
        struct.pack_into("<Q", body, 24, stored)
    return finished(bytes(body))


def test_every_flipped_byte_is_refused() -> None:
    for at in range(len(GOOD)):
        bad = bytearray(GOOD)
        bad[at] ^= 0x40
        with pytest.raises(ImageError):
            Image.parse(bad)


def test_every_length_but_the_right_one_is_refused() -> None:
    for length in [*range(200), *range(PAGE - 2, PAGE + 2), len(GOOD) - 32, len(GOOD) - 1]:
        with pytest.raises(ImageError):
            Image.parse(GOOD[:length])
    for tail in (b"\0", b"x" * 32, bytes(PAGE), GOOD):
        with pytest.raises(ImageError, match="trailing"):
            Image.parse(GOOD + tail)


@pytest.mark.parametrize("field", [8, 12, 16, 24, 32, 40])
@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1])
def test_impossible_header_fields_are_refused_with_a_valid_checksum(field: int, value: int) -> None:
    body = bytearray(GOOD[:-32])
    if struct.unpack_from("<I", body, field)[0] == value:
        return
    struct.pack_into("<I", body, field, value)
    with pytest.raises(ImageError):
        Image.parse(finished(bytes(body)))


def test_huge_counts_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("work was done before the lengths were checked")

    monkeypatch.setattr(format_image.hashlib, "sha256", forbidden)
    for field in (24, 32, 40):
        body = bytearray(GOOD)
        struct.pack_into("<Q", body, field, 2**64 - 1)
        with pytest.raises(ImageError):
            Image.parse(body)


def test_nonzero_padding_is_refused_with_a_valid_checksum() -> None:
    image = Image.parse(GOOD)
    for _, offset, size, _ in image.sections()[1:]:
        end = -(-(offset + size) // PAGE) * PAGE
        for at in {offset + size, end - 1}:
            body = bytearray(GOOD[:-32])
            body[at] = 1
            with pytest.raises(ImageError, match="padding"):
                Image.parse(finished(bytes(body)))


def test_reserved_header_bytes_must_be_zero() -> None:
    for at in (48, 49, 100, PAGE - 1):
        body = bytearray(GOOD[:-32])
        body[at] = 1
        with pytest.raises(ImageError, match="reserved"):
            Image.parse(finished(bytes(body)))


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("product_id", -1),
        ("product_id", 65536),
        ("security_version", 65536),
        ("threads", 0),
        ("threads", 257),
        ("threads", 2**62),
        ("message_limit", 0),
        ("sealed_memory", -1),
        ("shared_memory", -4096),
        ("shared_memory", 4097),
        ("shared_memory", 0),  # canonical: left out
        ("shared_memory", MAX_SHARED + 4096),
        ("shared_memory", "64 MiB"),
        ("blas_threads", 0),
        ("name", ""),
        ("name", "a\x1b[31m"),
        ("entry_module", "a-b"),
        ("entry_file", "entry/other.py"),
        ("functions", [{"name": "a"}, {"name": "a"}]),
        ("functions", [{}]),
        ("entry_kind", "wasm"),
        ("debug", 1),
        ("product_id", True),
        ("files", []),
        ("unknown", 1),
    ],
)
def test_wrong_info_is_refused(member: str, value: object) -> None:
    info = msgspec.json.decode(info_of().to_bytes())
    info[member] = value
    with pytest.raises(ImageError):
        Image.parse(rebuilt(msgspec.json.encode(info, order="sorted")))


@pytest.mark.parametrize(
    "name", ["", "/", "entry", "entry/", "entry/../x", "./x", "entry//x", "/etc/passwd", "e/\n"]
)
def test_file_names_that_are_not_plain_are_refused(name: str) -> None:
    with pytest.raises(ImageError):
        info_of(files=(FileEntry(name=name, size=0, executable=False),), entry_file=name).check()


def test_info_that_is_not_canonical_is_refused() -> None:
    info = info_of().to_bytes()
    for other in (info.replace(b",", b", ", 1), info + b" ", info[:-1] + b',"jit":false}'):
        with pytest.raises(ImageError, match="canonical"):
            Image.parse(rebuilt(other))


def test_file_sizes_that_do_not_fill_the_pages_are_refused() -> None:
    for size in (0, PAGE, 2 * PAGE + 1, 2**40, 2**62):
        files = (
            FileEntry(name="entry/score.py", size=17, executable=True),
            FileEntry(name="files/model", size=size, executable=False),
        )
        with pytest.raises(ImageError):
            Image.parse(rebuilt(info_of(files=files).to_bytes()))


def test_deeply_nested_info_is_refused() -> None:
    with pytest.raises(ImageError):
        ImageInfo.from_bytes(b"[" * 200_000)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 33), st.binary(min_size=1, max_size=9)), max_size=4
    )
)
def test_a_mutated_image_is_refused_or_equal(edits: list[tuple[int, bytes]]) -> None:
    body = bytearray(GOOD[:-32])
    for at, text in edits:
        body[at : at + len(text)] = text[: len(body) - at]
    data = finished(bytes(body))
    try:
        image = Image.parse(data)
    except EnclaveError:
        return
    # What is accepted is canonical: writing it again gives the same bytes.
    again = assemble(image.info, image.lock, {n: bytes(c) for n, c in image.files.items()})
    assert with_sigstruct(Image.parse(again), data[-1840:-32]) == data


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=9000))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        Image.parse(data)
    with pytest.raises(ImageError):
        Image.parse(b"PYENCIMG" + data)


def test_an_image_gives_back_what_went_in() -> None:
    image = Image.parse(memoryview(GOOD))
    assert image.info == info_of()
    assert image.lock == LOCK
    assert image.lock_digest == hashlib.sha256(LOCK.to_bytes()).digest() == LOCK.digest
    assert {name: bytes(content) for name, content in image.files.items()} == FILES
    assert image.sigstruct is None
    assert not image.signed
    assert image.sha256 == GOOD[-32:] == hashlib.sha256(GOOD[:-32]).digest()


def test_pages_cover_every_stored_byte_once_and_in_order() -> None:
    image = Image.parse(GOOD)
    pages = list(image.pages())
    stored = [page for offset, _, page in pages if offset < len(image.stored_bytes)]
    assert b"".join(stored) == bytes(image.stored_bytes) == GOOD[:-1840]
    assert [offset for offset, _, _ in pages] == [PAGE * at for at in range(len(pages))]
    assert all(len(page) == PAGE for _, _, page in pages)
    assert len(pages) * PAGE <= image.size == 1 << (image.size.bit_length() - 1)


def test_runs_and_pages_are_the_same_pages() -> None:
    image = Image.parse(GOOD)
    split = [
        (offset + at, flags, bytes(run[at : at + PAGE]))
        for offset, flags, run in image.runs()
        for at in range(0, len(run), PAGE)
    ]
    assert split == [(offset, flags, bytes(page)) for offset, flags, page in image.pages()]


def test_flags_are_those_of_sgx() -> None:
    image = Image.parse(GOOD)
    flags = {offset: value for offset, value, _ in image.pages()}
    for what, offset, size, value in image.sections():
        assert value == (0x205 if what == "entry/score.py" else 0x201)
        assert all(flags[at] == value for at in range(offset, offset + size, PAGE))
    first = len(image.stored_bytes)
    assert [flags[first + at * PAGE] for at in range(4)] == [0x100, 0x203, 0x100, 0x203]


def test_a_tcs_names_its_ssa_frame_and_the_entry() -> None:
    image = Image.parse(GOOD)
    for offset, flags, page in image.pages():
        if flags == 0x100:
            ossa, cssa, nssa, oentry = struct.unpack_from("<QIIQ", page, 16)
            assert (ossa, cssa, nssa) == (offset + PAGE, 0, 1)
            assert oentry == image.offset_of("entry/score.py") == image.entry_offset
            assert struct.unpack_from("<II", page, 64) == (0xFFFFFFFF, 0xFFFFFFFF)


def test_an_empty_file_has_no_page() -> None:
    files = {"entry/score.py": b"x", "files/empty": b""}
    image = Image.parse(assemble(info_of(files), LOCK, files))
    assert bytes(image.files["files/empty"]) == b""
    assert len(image.stored_bytes) == 4 * PAGE


def test_assemble_refuses_files_that_the_info_does_not_describe() -> None:
    with pytest.raises(ValueError, match="describe"):
        assemble(info_of(), LOCK, {"entry/score.py": b""})


def test_a_sigstruct_of_zeros_is_no_signature() -> None:
    image = Image.parse(GOOD)
    assert with_sigstruct(image, bytes(1808)) == GOOD
    with pytest.raises(ValueError, match="1808"):
        with_sigstruct(image, bytes(1807))
