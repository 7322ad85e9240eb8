"""Event logs: hostile bytes first, then the forms, then every log of the vectors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
from typing import TYPE_CHECKING

import pytest

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import eventlog
from pyenclave.formats.eventlog import CcelTable, EventLog

if TYPE_CHECKING:
    from pathlib import Path

SHA1, SHA256, SHA384 = 0x4, 0xB, 0xC
SIZES = {SHA1: 20, SHA256: 32, SHA384: 48}


def legacy(index: int, event_type: int, data: bytes = b"", digest: bytes = bytes(20)) -> bytes:
    return struct.pack("<II20sI", index, event_type, digest, len(data)) + data


def spec_id(*algorithms: tuple[int, int], vendor: bytes = b"\0") -> bytes:
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms))
    data += b"".join(struct.pack("<HH", *pair) for pair in algorithms) + vendor
    return legacy(0, 3, data)


def agile(index: int, event_type: int, data: bytes, *algorithms: int) -> bytes:
    digests = b"".join(
        struct.pack("<H", number)
        + hashlib.new({SHA1: "sha1", SHA256: "sha256", SHA384: "sha384"}[number], data).digest()
        for number in algorithms
    )
    head = struct.pack("<III", index, event_type, len(algorithms))
    return head + digests + struct.pack("<I", len(data)) + data


HEAD = spec_id((SHA1, 20), (SHA256, 32))
GOOD = HEAD + agile(0, 8, b"v1", SHA1, SHA256) + agile(7, 4, bytes(4), SHA1, SHA256)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "first record|fit"),
        (bytes(8), "empty"),
        (b"\xff" * 4096, "empty"),
        (b"\0\0\0\0\3", "header"),
        (legacy(0, 8)[:31], "size"),
        (struct.pack("<II20sI", 0, 8, bytes(20), 1), "data does not fit"),
        (struct.pack("<II20sI", 0, 8, bytes(20), 0xFFFFFFFF), "data does not fit"),
        (legacy(32, 8), "no such register"),
        (legacy(0, 8) + legacy(0xFFFFFFFF, 8), "no such register"),
        (legacy(0, 3, b"Spec ID Event03\0" + bytes(11)), "short"),
        (spec_id(), "number of algorithms"),
        (legacy(0, 3, b"Spec ID Event03\0" + bytes(8) + b"\xff" * 4 + bytes(80)), "number of"),
        (legacy(0, 3, b"Spec ID Event03\0" + bytes(8) + b"\x02\0\0\0" + bytes(4)), "number of"),
        (spec_id((SHA1, 20), (SHA1, 20)), "twice"),
        (spec_id((SHA256, 20)), "wrong digest size"),
        (spec_id((0x99, 0)), "wrong digest size"),
        (spec_id((0x99, 65)), "wrong digest size"),
        (spec_id((SHA1, 20), vendor=b"\x05abcd"), "vendor data"),
        (HEAD + agile(0, 8, b"", SHA384), "does not name"),
        (HEAD + agile(0, 8, b"", SHA1, SHA1), "two digests"),
        (HEAD + agile(0, 8, b"", SHA1, SHA256, SHA1), "too many digests"),
        (HEAD + struct.pack("<III", 0, 8, 0xFFFFFFFF), "too many digests"),
        (GOOD[:-1], "data does not fit"),
        (GOOD + b"\1", "header"),
        (GOOD + bytes(7) + b"\1", "number of digests"),
    ],
)
def test_what_is_no_log_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(EvidenceFormatError, match=match):
        EventLog.from_bytes(data)


def test_a_log_larger_than_the_limit_is_refused() -> None:
    with pytest.raises(EvidenceFormatError, match="too large"):
        EventLog.from_bytes(bytes(eventlog.MAX_LOG_SIZE + 1))


def test_a_log_with_more_events_than_the_limit_is_refused() -> None:
    with pytest.raises(EvidenceFormatError, match="too many events"):
        EventLog.from_bytes(legacy(0, 8) * (eventlog.MAX_EVENTS + 1))


def test_padding_is_refused_where_it_is_not_allowed() -> None:
    with pytest.raises(EvidenceFormatError, match="follow"):
        EventLog.from_bytes(GOOD + bytes(16), allow_padding=False)
    assert EventLog.from_bytes(GOOD, allow_padding=False).event_count == 3


def test_every_truncation_of_a_log_is_refused_or_ends_between_records() -> None:
    whole = EventLog.from_bytes(GOOD)
    ends = {event.offset for event in whole.events} | {whole.end}
    for size in range(len(GOOD)):
        try:
            log = EventLog.from_bytes(GOOD[:size])
        except EvidenceFormatError:
            continue
        assert log.end in ends
        assert not GOOD[log.end : size].strip(b"\0"), size  # the rest reads as padding


def test_no_mutation_raises_anything_but_the_typed_error() -> None:
    generator = random.Random(7)
    for _ in range(4000):
        data = bytearray(GOOD)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        with contextlib.suppress(EvidenceFormatError):
            EventLog.from_bytes(data)


# ---- the binary forms -------------------------------------------------------------------------


def test_a_crypto_agile_log_gives_its_banks_events_and_digests() -> None:
    log = EventLog.from_bytes(GOOD)
    assert (log.format, log.banks) == ("crypto-agile", {"sha1": 20, "sha256": 32})
    assert [(event.index, event.name) for event in log.events] == [
        (0, "EV_NO_ACTION"),
        (0, "EV_S_CRTM_VERSION"),
        (7, "EV_SEPARATOR"),
    ]
    assert log.events[1].digests["sha256"] == hashlib.sha256(b"v1").digest()
    assert (log.end, log.padding, log.is_ccel) == (len(GOOD), "none", False)


@pytest.mark.parametrize(
    ("tail", "padding"),
    [
        (bytes(1), "zeros"),
        (bytes(100), "zeros"),
        (b"\xff" * 3, "ones"),
        (b"\xff" * 64, "ones"),
        (bytes(8) + GOOD, "other"),
    ],
)
def test_a_log_ends_where_padding_begins(tail: bytes, padding: str) -> None:
    log = EventLog.from_bytes(GOOD + tail)
    assert (log.end, log.padding, log.event_count) == (len(GOOD), padding, 3)


def test_a_legacy_log_counts_its_first_record() -> None:
    log = EventLog.from_bytes(legacy(0, 8, b"v", hashlib.sha1(b"v").digest()) + legacy(4, 4))
    assert (log.format, log.banks, log.event_count) == ("sha1-legacy", {"sha1": 20}, 2)


def test_an_unknown_algorithm_is_carried_under_its_number() -> None:
    data = spec_id((SHA256, 32), (0x27, 32))
    data += struct.pack("<IIIH32sH32sI", 1, 8, 2, 0x27, b"k" * 32, SHA256, b"s" * 32, 0)
    log = EventLog.from_bytes(data)
    assert log.banks == {"sha256": 32, "0x0027": 32}
    assert log.events[1].digests == {"0x0027": b"k" * 32, "sha256": b"s" * 32}


def test_a_hidden_event_of_windows_may_name_no_register() -> None:
    assert EventLog.from_bytes(legacy(0, 8) + legacy(0xFFFFFFFF, 3, b"x")).event_count == 2


def test_the_startup_locality_is_read_from_pcr_0_only() -> None:
    locality = b"StartupLocality\0\3"
    assert EventLog.from_bytes(HEAD + agile(0, 3, locality, SHA1)).startup_locality == 3
    assert EventLog.from_bytes(HEAD + agile(1, 3, locality, SHA1)).startup_locality is None
    assert EventLog.from_bytes(HEAD + agile(0, 8, locality, SHA1)).startup_locality is None
    assert EventLog.from_bytes(HEAD + agile(0, 3, locality + b"x", SHA1)).startup_locality is None


def test_a_log_of_sha384_without_high_registers_is_taken_for_a_ccel() -> None:
    head = spec_id((SHA384, 48))
    assert EventLog.from_bytes(head + agile(4, 8, b"", SHA384)).is_ccel
    assert not EventLog.from_bytes(head + agile(5, 8, b"", SHA384)).is_ccel


# ---- the JSON form ----------------------------------------------------------------------------


def row(**changes: object) -> dict[str, object]:
    return {
        "imr": 3,
        "event_type": 0x08000001,
        "digest": "",
        "event": "app-id",
        "event_payload": "86b0",
    } | changes


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "number of events"),
        ([1], "not an object"),
        ([row(imr=4)], "imr"),
        ([row(imr=True)], "imr"),
        ([row(imr=-1)], "imr"),
        ([row(event_type="4")], "event_type"),
        ([row(event_type=1 << 32)], "event_type"),
        ([row(event=1)], "event is not"),
        ([row(event_payload="8")], "not hex"),
        ([row(event_payload="86 b0")], "not hex"),
        ([row(event_payload=5)], "not hex"),
        ([row(digest="00" * 48)], "not that of the event"),
        ([row(imr=2)], "wrong size"),
        ([row(imr=0, event_type=4, digest="00" * 32)], "wrong size"),
    ],
)
def test_json_that_is_no_log_is_refused(rows: list[object], match: str) -> None:
    with pytest.raises(EvidenceFormatError, match=match):
        EventLog.from_bytes(json.dumps(rows).encode())


def test_json_with_a_duplicate_key_is_refused() -> None:
    with pytest.raises(EvidenceFormatError):
        EventLog.from_bytes(b'[{"imr": 0, "imr": 3}]')


def test_a_missing_digest_of_dstack_is_computed() -> None:
    log = EventLog.from_bytes(json.dumps([row()]).encode())
    wanted = hashlib.sha384(b"\x01\0\0\x08:app-id:\x86\xb0").digest()
    assert log.events[0].digests == {"sha384": wanted}
    assert (log.events[0].index, log.events[0].name, log.is_ccel) == (4, "DSTACK_EVENT", True)
    given = EventLog.from_bytes(json.dumps([row(digest=wanted.hex())]).encode())
    assert given.events[0].digests == {"sha384": wanted}


# ---- the ACPI table ---------------------------------------------------------------------------


def test_the_ccel_table_is_read_and_its_checksum_holds(vectors: Path) -> None:
    data = (vectors / "measurement/tdx-rtmr-gcp-cos113-quote/ccel_table.bin").read_bytes()
    table = CcelTable.from_bytes(data)
    assert (table.cc_type, table.area_length) == (2, 262144)
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1
        with pytest.raises(EvidenceFormatError):
            CcelTable.from_bytes(broken)


# ---- vectors ----------------------------------------------------------------------------------


def test_every_log_of_the_vectors_is_read_to_its_end(vectors: Path) -> None:
    seen = 0
    for path in sorted((vectors / "measurement").glob("t[dp]*/case.json")):
        case = json.loads(path.read_text())
        expect = case["expect"]
        for role in ("ccel", "event_log", "event_log_json"):
            if role not in case["files"]:
                continue
            log = EventLog.from_bytes((path.parent / case["files"][role]["path"]).read_bytes())
            assert log.event_count == expect["event_count"], path
            assert log.is_ccel == (case["kind"] == "tdx-rtmr"), path
            if "format" in expect:
                assert log.format == expect["format"], path
                assert log.startup_locality == expect["startup_locality"], path
            assert log.end == expect.get("log_end_offset", log.end), path
            assert log.padding != "other", path
            seen += 1
    assert seen == 15
