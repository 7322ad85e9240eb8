"""Replay of event logs: every vector, and what a log may do to mislead."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from pyenclave.errors import MeasurementError
from pyenclave.formats.eventlog import EventLog
from pyenclave.measurement.replay import Replay, extend, replay, start_value

if TYPE_CHECKING:
    from pathlib import Path


def legacy(index: int, event_type: int, data: bytes = b"", digest: bytes | None = None) -> bytes:
    digest = hashlib.sha1(data).digest() if digest is None else digest
    return struct.pack("<II20sI", index, event_type, digest, len(data)) + data


def logs(vectors: Path, pattern: str) -> list[tuple[dict[str, Any], Replay, Path]]:
    found = []
    for path in sorted((vectors / "measurement").glob(f"{pattern}/case.json")):
        case = json.loads(path.read_text())
        for role in ("ccel", "event_log", "event_log_json"):
            if role in case["files"]:
                data = (path.parent / case["files"][role]["path"]).read_bytes()
                found.append((case, replay(data), path.parent))
    return found


def test_every_rtmr_of_the_vectors_is_the_expected_one(vectors: Path) -> None:
    found = logs(vectors, "tdx-rtmr-*")
    assert len(found) == 6
    for case, result, folder in found:
        values = result.to_json()
        for name, wanted in case["expect"].items():
            if name != "mrtd":
                assert values[name] == wanted, (case["id"], name)
        if "quote" in case["files"]:
            body = (folder / case["files"]["quote"]["path"]).read_bytes()[48:]
            for number in range(4):
                assert body[328 + 48 * number :][:48] == result.rtmr(number), case["id"]


def test_every_pcr_of_the_vectors_is_the_expected_one(vectors: Path) -> None:
    found = logs(vectors, "tpm-pcr-*")
    assert len(found) == 9
    for case, result, _ in found:
        values = result.to_json()
        for name, wanted in case["expect"].items():
            if name != "pcrs":
                assert values[name] == wanted, (case["id"], name)
                continue
            for bank, registers in wanted.items():
                for index, digest in registers.items():
                    assert values["pcrs"][bank][index] == digest, (case["id"], bank, index)


def test_the_log_of_the_attestation_set_is_replayed_in_its_three_banks(vectors: Path) -> None:
    folder = vectors / "attestation/tpm-eventlog-gcp-cos101-sev"
    case = json.loads((folder / "case.json").read_text())
    result = replay((folder / "eventlog.bin").read_bytes())
    wanted = case["expect"]["replayed_pcrs"]
    found = {
        bank: {str(index): value.hex() for index, value in sorted(registers.items())}
        for bank, registers in result.registers.items()
    }
    assert found == {bank: dict(sorted(values.items(), key=lambda item: int(item[0])))
                     for bank, values in wanted.items()}  # fmt: skip


def test_an_event_without_action_extends_nothing() -> None:
    first = legacy(0, 8, b"v")
    assert replay(first).registers == replay(first + legacy(0, 3, b"x")).registers


def test_registers_start_as_hardware_starts_them() -> None:
    assert start_value("sha1", 5) == bytes(20)
    assert start_value("sha256", 17) == b"\xff" * 32
    assert start_value("sha256", 17, ccel=True) == bytes(32)
    assert start_value("sha256", 0, locality=3) == bytes(31) + b"\3"
    assert start_value("sha256", 1, locality=3) == bytes(32)


def test_a_dynamic_register_is_extended_from_all_ones() -> None:
    result = replay(legacy(17, 8, b"v"))
    wanted = extend("sha1", b"\xff" * 20, hashlib.sha1(b"v").digest())
    assert result.value("sha1", 17) == wanted


def test_the_startup_locality_is_the_start_of_pcr_0() -> None:
    log = legacy(0, 8, b"v") + legacy(0, 3, b"StartupLocality\0\3")
    wanted = extend("sha1", bytes(19) + b"\3", hashlib.sha1(b"v").digest())
    assert replay(log).value("sha1", 0) == wanted


def test_events_of_mrtd_in_a_ccel_extend_nothing() -> None:
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 12, 48, 0)
    head = struct.pack("<II20sI", 0, 3, bytes(20), len(data)) + data
    event = struct.pack("<IIIH48sI", 0, 8, 1, 12, b"d" * 48, 0)
    log = EventLog.from_bytes(head + event)
    assert replay(log).registers == {"sha384": {}}
    assert replay(log, ccel=False).registers["sha384"].keys() == {0}
    assert replay(log).rtmr(0) == bytes(48)


def test_a_log_of_a_tpm_has_no_rtmr() -> None:
    with pytest.raises(MeasurementError, match="not of TDX"):
        replay(legacy(0, 8)).rtmr(0)
    with pytest.raises(ValueError, match="no RTMR4"):
        replay(legacy(0, 8)).rtmr(4)


def test_a_bank_with_a_missing_digest_is_named() -> None:
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHHHB", 0, 0, 2, 0, 2, 2, 4, 20, 11, 32, 0)
    head = struct.pack("<II20sI", 0, 3, bytes(20), len(data)) + data
    event = struct.pack("<IIIH32sI", 1, 8, 1, 11, b"d" * 32, 0)
    result = replay(head + event)
    assert result.incomplete_banks == ("sha1",)
    assert result.registers["sha1"] == {}
    assert result.to_json()["incomplete_banks"] == ["sha1"]


def test_an_algorithm_without_a_hash_is_skipped_and_named() -> None:
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 0x27, 32, 0)
    head = struct.pack("<II20sI", 0, 3, bytes(20), len(data)) + data
    result = replay(head + struct.pack("<IIIH32sI", 1, 8, 1, 0x27, b"d" * 32, 0))
    assert (result.skipped_banks, result.registers) == (("0x0027",), {})


# ---- what events say --------------------------------------------------------------------------


def variable(name: str, content: bytes, guid: bytes = bytes(16)) -> bytes:
    wide = name.encode("utf-16-le")
    return guid + struct.pack("<QQ", len(name), len(content)) + wide + content


@pytest.mark.parametrize(
    ("event_type", "data", "hashed", "covers"),
    [
        (4, bytes(4), bytes(4), "data"),
        (4, bytes(4), b"\1\0\0\0", "differs"),
        (5, b"Calling", b"Calling", "data"),
        (5, b"Calling\0", b"Calling", "text"),
        (0x80000007, b"Exit Boot", b"other", "differs"),
        (0x80000001, variable("SecureBoot", b"\1"), b"\1", "variable"),
        (0x80000001, variable("SecureBoot", b"\1"), variable("SecureBoot", b"\1"), "data"),
        (0x80000001, variable("SecureBoot", b"\1"), b"\0", "differs"),
        (13, b"grub_cmd: linux /vmlinuz\0", b"linux /vmlinuz", "text"),
        (13, b"/boot/grub.cfg\0", b"its content", "unknown"),
        (0x80000003, bytes(32), b"authenticode", "unknown"),
        (0x80000001, b"short", b"x", "unknown"),
        (4, b"", b"x", "unknown"),
    ],
)
def test_what_a_digest_covers_is_told(
    event_type: int, data: bytes, hashed: bytes, covers: str
) -> None:
    log = legacy(7, 8, b"first") + legacy(7, event_type, data, hashlib.sha1(hashed).digest())
    assert replay(log).events[1].covers == covers


def test_the_events_of_real_logs_are_readable(vectors: Path) -> None:
    texts: dict[str, set[str]] = {}
    for _, result, _ in logs(vectors, "t*"):
        for report in result.events:
            texts.setdefault(report.event.name, set()).add(report.decoded.text)
            json.dumps(report.to_json(ccel=result.ccel))
    assert "SecureBoot (EFI_GLOBAL_VARIABLE) = on" in texts["EV_EFI_VARIABLE_DRIVER_CONFIG"]
    assert "00000000 (end of firmware)" in texts["EV_SEPARATOR"]
    assert "Exit Boot Services Invocation" in texts["EV_EFI_ACTION"]
    assert any("\\EFI\\" in text for text in texts["EV_EFI_BOOT_SERVICES_APPLICATION"])
    assert any("partitions" in text for text in texts["EV_EFI_GPT_EVENT"])
    assert any(text.startswith("compose-hash: ") for text in texts["DSTACK_EVENT"])
    assert any("Boot0000" in text for text in texts["EV_EFI_VARIABLE_BOOT"])


def test_no_data_of_an_event_raises(vectors: Path) -> None:
    import random

    from pyenclave.formats.eventlog import EVENT_NAMES, Event
    from pyenclave.formats.eventlog_data import decode, digest_covers

    generator = random.Random(3)
    seeds = {}
    for _, result, _ in logs(vectors, "t*"):
        for event in result.log.events:
            seeds.setdefault(event.type, event.data[:600])
    for event_type in EVENT_NAMES:
        for _ in range(150):
            data = bytearray(seeds.get(event_type, bytes(40)))
            for _ in range(generator.randrange(4)):
                if data:
                    data[generator.randrange(len(data))] = generator.choice((0, 1, 255, 128))
            data = data[: generator.randrange(len(data) + 1)]
            event = Event(0, 0, event_type, {"sha256": bytes(32)}, bytes(data), 0)
            decoded = decode(event)
            assert len(decoded.text) < 3000
            digest_covers(event, decoded)


def test_an_event_of_the_largest_size_is_shown_at_once() -> None:
    import time

    from pyenclave.formats.eventlog import EVENT_NAMES, Event
    from pyenclave.formats.eventlog_data import decode

    name = "Boot0001".encode("utf-16-le")
    head = bytes(16) + struct.pack("<QQ", 8, (16 << 20) - 48) + name
    data = head.ljust(16 << 20, b"a")
    start = time.process_time()
    for event_type in EVENT_NAMES:
        assert len(decode(Event(0, 0, event_type, {}, data, 0)).text) < 1000
    assert time.process_time() - start < 2  # 40 types; a search through all of it takes seconds
