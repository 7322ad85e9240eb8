"""What makes two firmware files, Nitro images or event logs differ."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TYPE_CHECKING

import pytest

from pyenclave.errors import MeasurementError
from pyenclave.measurement import difference
from pyenclave.measurement.difference import diff

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[..., bytearray]

BFV = (4096, 12288, 0xFFFFD000, 12288, 0, 1)
CFV = (0, 4096, 0xFFFFC000, 4096, 1, 0)


def record(index: int, event_type: int, data: bytes, hashed: bytes | None = None) -> bytes:
    digest = hashlib.sha1(data if hashed is None else hashed).digest()
    return struct.pack("<II20sI", index, event_type, digest, len(data)) + data


# ---- firmware ---------------------------------------------------------------------------------


def test_equal_files_do_not_differ(firmware: Build) -> None:
    data = firmware(sev=[(0x800000, 4096, 1)], tdx=[BFV, CFV])
    assert diff(data, bytes(data)) == []


def test_a_page_that_differs_is_named_with_its_section(firmware: Build) -> None:
    a = firmware(tdx=[BFV, CFV])
    b = bytearray(a)
    b[100] ^= 1
    b[4096] ^= 1
    b[8191] ^= 1
    b[8192] ^= 1
    rows = diff(a, b)
    assert [row.what for row in rows] == ["page"]
    assert rows[0].name.startswith("0xffffc000, 3 pages from file offset 0x0")
    assert "not measured by TDX" in rows[0].name
    assert rows[0].a == hashlib.sha256(a[:12288]).hexdigest()


def test_entries_and_sections_that_differ_are_named(firmware: Build) -> None:
    a = firmware(sev=[(0x800000, 4096, 1)], tdx=[BFV], reset=1)
    b = firmware(sev=[(0x800000, 8192, 1)], tdx=[BFV, CFV], reset=2)
    named = {(row.what, row.name): (row.a, row.b) for row in diff(a, b)}
    assert named["guid entry", "SEV-ES reset block"] == ("01000000", "02000000")
    assert named["sev section", "0 memory"] == ("4096 bytes at 0x800000", "8192 bytes at 0x800000")
    assert named["tdx section", "1 CFV"][0] is None


def test_a_longer_firmware_is_compared_from_the_end(firmware: Build) -> None:
    a = firmware(8192)
    b = bytes(4096) + bytes(a)
    rows = {(row.what, row.name.split(",")[0]): (row.a, row.b) for row in diff(a, b)}
    assert rows["field", "size"] == (8192, 12288)
    assert rows["page", "0xffffd000"] == (None, hashlib.sha256(bytes(4096)).hexdigest())
    assert len(rows) == 2


def test_many_ranges_are_summed_up(firmware: Build) -> None:
    a = firmware(1 << 20)
    b = bytearray(a)
    for at in range(0, 1 << 20, 8192):
        b[at] ^= 1
    rows = diff(a, b)
    assert len(rows) == 65
    assert rows[-1].name == "64 more ranges"


# ---- event logs -------------------------------------------------------------------------------

FIRST = record(0, 8, b"v1")
SECURE = record(7, 4, bytes(4))
ACTION = record(4, 5, b"Calling")


def test_a_changed_event_is_named_with_both_texts() -> None:
    (row,) = diff(FIRST + SECURE + ACTION, FIRST + SECURE + record(4, 5, b"Exit"))
    assert (row.what, row.name) == ("event", "pcr4 event 2 EV_ACTION")
    assert (str(row.a).startswith("Calling"), str(row.b).startswith("Exit")) == (True, True)
    assert row.measured


def test_an_added_event_does_not_make_the_later_ones_differ() -> None:
    (row,) = diff(FIRST + ACTION + SECURE, FIRST + record(4, 5, b"new") + ACTION + SECURE)
    assert (row.a, row.name) == (None, "pcr4 event 1 EV_ACTION")


def test_data_that_was_not_measured_is_listed_as_such() -> None:
    (row,) = diff(FIRST + ACTION, FIRST + record(4, 5, b"another text", b"Calling"))
    assert not row.measured


def test_a_startup_locality_is_a_difference() -> None:
    rows = diff(FIRST + record(0, 3, b"StartupLocality\0\3"), FIRST)
    assert [(row.name, row.a, row.b) for row in rows] == [("startup locality", 3, 0)]


def test_long_logs_are_compared_up_to_the_first_difference() -> None:
    a = FIRST + b"".join(record(7, 8, number.to_bytes(4, "big")) for number in range(1500))
    b = a[:-32] + record(7, 8, b"last")[:32] + b"last"
    rows = diff(a, a)
    assert rows == []
    b = a[: -len(record(7, 8, bytes(4)))] + record(7, 8, b"last")
    (row,) = diff(a, b)
    assert row.name == "pcr7 event 1500 EV_S_CRTM_VERSION"


def test_two_real_logs_differ_in_named_events(vectors: Path) -> None:
    folder = vectors / "measurement"
    a = (folder / "tpm-pcr-cos101-amd-sev/cos-101-amd-sev.bin").read_bytes()
    b = (folder / "tpm-pcr-cos85-amd-sev/cos-85-amd-sev.bin").read_bytes()
    assert diff(a, a) == []
    rows = diff(a, b)
    assert rows
    assert {row.name.split()[0] for row in rows} <= {f"pcr{index}" for index in range(15)}
    assert "pcr0" not in {row.name.split()[0] for row in rows if row.measured}  # equal in both


# ---- Nitro images, and telling kinds apart ----------------------------------------------------


def test_images_differ_in_named_sections(vectors: Path) -> None:
    folder = vectors / "measurement"
    a = (folder / "nitro-eif-one-ramdisk/image.eif").read_bytes()
    b = (folder / "nitro-eif-signed/image.eif").read_bytes()
    assert diff(a, a) == []
    named = {(row.what, row.name): row for row in diff(a, b)}
    assert named["section", "ramdisk 1"].a is None
    assert named["section", "kernel"].measured
    assert named["signer", "certificate"].a is None
    assert not named["section", "signature"].measured


def test_files_of_different_kinds_are_refused(firmware: Build, vectors: Path) -> None:
    image = (vectors / "measurement/nitro-eif-one-ramdisk/image.eif").read_bytes()
    with pytest.raises(MeasurementError, match="different kinds"):
        diff(image, firmware())
    with pytest.raises(MeasurementError, match="no kind"):
        diff(b"nothing", b"nothing")


def test_every_file_of_the_vectors_is_told_by_its_kind(vectors: Path) -> None:
    kinds = {"eif": "Nitro image", "firmware": "firmware", "ccel": "event log"}
    kinds |= {"event_log": "event log", "event_log_json": "event log"}
    seen = set()
    for path in sorted((vectors / "measurement").glob("*/case.json")):
        case = json.loads(path.read_text())
        for role, info in case["files"].items():
            file = path.parent / info["path"]
            if role in kinds and file.is_file():
                assert difference.kind_of(file.read_bytes()).name == kinds[role], file
                seen.add(role)
    assert seen == set(kinds)
