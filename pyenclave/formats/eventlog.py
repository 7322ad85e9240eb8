"""
Event logs of measured boot: TCG logs of a TPM, CCEL of Intel TDX, and dstack's JSON form.

Sources: TCG PC Client Platform Firmware Profile (PFP) 1.06, section 10 (TCG_PCR_EVENT,
TCG_PCR_EVENT2, TCG_EfiSpecIDEvent); Intel TDX Guest-Hypervisor Communication Interface and
UEFI 2.10, section 38 (CC_EVENT, register index = RTMR + 1); ACPI 6.5, table CCEL. All integers
are little-endian.

A log is what somebody claims was measured. It proves nothing until its replay
(``pyenclave.measurement.replay``) equals registers that hardware signed.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats._binary import Layout, shorten

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "ALGORITHMS",
    "DSTACK_EVENT",
    "EVENT_NAMES",
    "EV_NO_ACTION",
    "MAX_LOG_SIZE",
    "CcelTable",
    "Event",
    "EventLog",
    "event_name",
]

MAX_LOG_SIZE = 16 << 20  # bytes; the largest areas seen are 1 MiB
MAX_EVENTS = 65536
MAX_ALGORITHMS = 16
# Registers of a TPM 2.0 that a quote can select; a CCEL has 0 to 4.
MAX_REGISTER = 31

# TPM_ALG_ID → bank, size of a digest in bytes (TCG Algorithm Registry).
ALGORITHMS = {
    0x0004: ("sha1", 20),
    0x000B: ("sha256", 32),
    0x000C: ("sha384", 48),
    0x000D: ("sha512", 64),
    0x0012: ("sm3_256", 32),
}
_SHA1 = 0x0004
_MAX_DIGEST = 64

EV_NO_ACTION = 3

# PFP 1.06, 10.4.1, with the names of older profiles where they live on.
EVENT_NAMES = {
    0x00000000: "EV_PREBOOT_CERT",
    0x00000001: "EV_POST_CODE",
    0x00000002: "EV_UNUSED",
    0x00000003: "EV_NO_ACTION",
    0x00000004: "EV_SEPARATOR",
    0x00000005: "EV_ACTION",
    0x00000006: "EV_EVENT_TAG",
    0x00000007: "EV_S_CRTM_CONTENTS",
    0x00000008: "EV_S_CRTM_VERSION",
    0x00000009: "EV_CPU_MICROCODE",
    0x0000000A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0000000B: "EV_TABLE_OF_DEVICES",
    0x0000000C: "EV_COMPACT_HASH",
    0x0000000D: "EV_IPL",
    0x0000000E: "EV_IPL_PARTITION_DATA",
    0x0000000F: "EV_NONHOST_CODE",
    0x00000010: "EV_NONHOST_CONFIG",
    0x00000011: "EV_NONHOST_INFO",
    0x00000012: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x00000013: "EV_POST_CODE2",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x8000000D: "EV_EFI_GPT_EVENT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
    0x800000E3: "EV_EFI_SPDM_DEVICE_POLICY",
    0x800000E4: "EV_EFI_SPDM_DEVICE_AUTHORITY",
}
# dstack numbers its own events thus (0x08000001), on RTMR3 only.
DSTACK_EVENT = 0x08000001

_SPEC_ID = b"Spec ID Event03\0"
_LOCALITY = b"StartupLocality\0"


def event_name(event_type: int) -> str:
    """Return the TCG name of an event type, or its number in hex."""
    if event_type == DSTACK_EVENT:
        return "DSTACK_EVENT"
    return EVENT_NAMES.get(event_type, f"{event_type:#010x}")


@dataclass(frozen=True, slots=True)
class Event:
    """
    One record of a log.

    Attributes:
        number: Its place in the log, from 0.
        index: Register as the log has it: PCR, or in a CCEL RTMR + 1 (0: MRTD).
        type: Event type.
        digests: Bank → the digest that was extended. A bank of an unknown algorithm is called by
            the algorithm's number ("0x0027").
        data: The event's own bytes. Only a digest is measured, which need not be theirs.
        offset: Where the record begins, in bytes (JSON form: equal to ``number``).
        label: Name that the JSON form gives an event, else "".
    """

    number: int
    index: int
    type: int
    digests: dict[str, bytes]
    data: bytes
    offset: int
    label: str = ""

    @property
    def name(self) -> str:
        """The TCG name of the event's type."""
        return event_name(self.type)

    @property
    def extends(self) -> bool:
        """Whether the event changed its register."""
        return self.type != EV_NO_ACTION


@dataclass(frozen=True)
class EventLog:
    """
    A parsed log.

    Attributes:
        format: ``sha1-legacy``, ``crypto-agile`` or ``dstack-json``.
        banks: Bank → size of its digests in bytes, in the order in which the log names them.
        events: Every record in order, the Spec ID record included.
        end: Bytes that the log takes; padding follows.
        size: Bytes given.
        padding: ``none``, ``zeros``, ``ones`` or ``other``: what follows the end.
    """

    format: Literal["sha1-legacy", "crypto-agile", "dstack-json"]
    banks: dict[str, int]
    events: tuple[Event, ...]
    end: int
    size: int
    padding: Literal["none", "zeros", "ones", "other"] = "none"

    @classmethod
    def from_bytes(cls, data: Buffer, *, allow_padding: bool = True) -> EventLog:
        """
        Read a log, of any form; dstack's JSON is told by its first character.

        Args:
            data: The log, or the firmware's area that holds it.
            allow_padding: Accept what follows the last record. An area ends the log with a
                record whose index and type are both 0, or both 0xffffffff.

        Raises:
            EvidenceFormatError: It is no event log, a record does not fit, names an algorithm
                that the log does not declare, or a limit is passed (16 MiB, 65536 events).
        """
        with memoryview(data) as view:
            if view.nbytes > MAX_LOG_SIZE:
                raise EvidenceFormatError(
                    "event log: too large", expected=f"≤ {MAX_LOG_SIZE} bytes", found=view.nbytes
                )
            raw = bytes(view)
        if raw.lstrip(b" \t\r\n")[:1] == b"[":
            return _parse_json(raw)
        return _Parser(raw, allow_padding).parse()

    @property
    def has_spec_id(self) -> bool:
        """Whether the first record declares the algorithms instead of measuring something."""
        return self.format == "crypto-agile"

    @property
    def event_count(self) -> int:
        """Number of records, the Spec ID record included."""
        return len(self.events)

    @cached_property
    def startup_locality(self) -> int | None:
        """Locality of TPM2_Startup (PFP 1.06, 10.4.5.3), which is the start value of PCR 0."""
        for event in self.events:
            if (
                event.type == EV_NO_ACTION
                and event.index == 0
                and len(event.data) == len(_LOCALITY) + 1
                and event.data.startswith(_LOCALITY)
            ):
                return event.data[-1]
        return None

    @cached_property
    def is_ccel(self) -> bool:
        """
        Whether the registers are those of TDX.

        The bytes do not say it. A log of SHA-384 alone that uses no register above 4 is taken for
        a CCEL: a TPM's log has PCR 5 and 7.
        """
        return self.format == "dstack-json" or (
            list(self.banks) == ["sha384"] and all(event.index <= 4 for event in self.events)
        )


_CCEL = Layout(
    "CCEL table",
    EvidenceFormatError,
    ("signature", b"CCEL"),
    ("length", b"\x38\0\0\0"),
    ("revision", "B"),
    ("checksum", "B"),
    ("oem_id", 6),
    ("oem_table_id", 8),
    ("oem_revision", "I"),
    ("creator_id", 4),
    ("creator_revision", "I"),
    ("cc_type", "B"),
    ("cc_subtype", "B"),
    ("reserved", 2),
    ("area_length", "Q"),
    ("area_address", "Q"),
)


@dataclass(frozen=True, slots=True)
class CcelTable:
    """
    The ACPI table CCEL (ACPI 6.5, 5.2.34): where the log's area is.

    Attributes:
        cc_type: 2: TDX (1: SEV).
        cc_subtype: Vendor's.
        area_length: Bytes of the area.
        area_address: Guest-physical address of the area.
    """

    cc_type: int
    cc_subtype: int
    area_length: int
    area_address: int

    @classmethod
    def from_bytes(cls, data: Buffer) -> CcelTable:
        """
        Read the 56 bytes of the table.

        Raises:
            EvidenceFormatError: Wrong signature, length or checksum.
        """
        with memoryview(data) as view:
            fields = _CCEL.unpack(view)
            if sum(view.cast("B")) & 0xFF:
                raise EvidenceFormatError("CCEL table: the checksum is wrong", expected="sum 0")
        return cls(
            cc_type=fields["cc_type"],
            cc_subtype=fields["cc_subtype"],
            area_length=fields["area_length"],
            area_address=fields["area_address"],
        )


_U32x2 = struct.Struct("<II")


class _Parser:
    """Reads the binary forms. The record being read is named in every error."""

    def __init__(self, data: bytes, allow_padding: bool) -> None:
        self.data = data
        self.at = 0
        self.allow_padding = allow_padding
        self.events: list[Event] = []
        self.algorithms: dict[int, tuple[str, int]] = {}

    def fail(self, message: str, **details: Any) -> EvidenceFormatError:
        where = f"event log: record {len(self.events)} at offset {self.at}"
        return EvidenceFormatError(f"{where}: {message}", **details)

    def take(self, at: int, size: int, name: str) -> bytes:
        if size > len(self.data) - at:
            raise self.fail(
                f"{name} does not fit",
                expected=f"{size} bytes",
                found=f"{len(self.data) - at} bytes",
            )
        return self.data[at : at + size]

    def u32(self, at: int, name: str) -> int:
        return int.from_bytes(self.take(at, 4, name), "little")

    def parse(self) -> EventLog:
        if self.padding_here():
            raise self.fail("the log is empty", expected="a first record", found="padding")
        agile = self.first()
        read = self.agile_record if agile else self.legacy_record
        while self.at < len(self.data) and not self.padding_here():
            if len(self.events) >= MAX_EVENTS:
                raise self.fail("too many events", expected=f"≤ {MAX_EVENTS}")
            read()
        rest = self.data[self.at :]
        if rest and not self.allow_padding:
            raise self.fail("bytes follow the last record", expected="nothing", found=len(rest))
        if not rest:
            padding: Literal["none", "zeros", "ones", "other"] = "none"
        elif not rest.strip(b"\0"):
            padding = "zeros"
        elif not rest.strip(b"\xff"):
            padding = "ones"
        else:
            padding = "other"
        banks = dict(self.algorithms.values()) if agile else {"sha1": 20}
        return EventLog(
            format="crypto-agile" if agile else "sha1-legacy",
            banks=banks,
            events=tuple(self.events),
            end=self.at,
            size=len(self.data),
            padding=padding,
        )

    def padding_here(self) -> bool:
        """Whether what comes is the end of the log in an area larger than it."""
        head = self.data[self.at : self.at + 8]
        if len(head) < 8:  # too short for a record: padding, or cut off within one
            return bool(head) and (not head.strip(b"\0") or not head.strip(b"\xff"))
        return head in (bytes(8), b"\xff" * 8)

    def first(self) -> bool:
        """Read the first record, which tells the form."""
        self.legacy_record()
        event = self.events[0]
        if event.type != EV_NO_ACTION or not event.data.startswith(_SPEC_ID):
            return False
        end, self.at = self.at, 0
        self.events.clear()
        self.read_spec_id(event.data)
        self.events.append(event)
        self.at = end
        return True

    def read_spec_id(self, data: bytes) -> None:
        """Read TCG_EfiSpecIDEvent (PFP 1.06, 10.4.5.1): which digests each record has."""
        if len(data) < 28:
            raise self.fail("the Spec ID event is short", expected="≥ 28 bytes", found=len(data))
        count = int.from_bytes(data[24:28], "little")
        if not 1 <= count <= MAX_ALGORITHMS or len(data) < 28 + 4 * count:
            raise self.fail(
                "the Spec ID event has an impossible number of algorithms",
                expected=f"1 to {MAX_ALGORITHMS}, within {len(data)} bytes",
                found=count,
            )
        for number in range(count):
            algorithm, size = struct.unpack_from("<HH", data, 28 + 4 * number)
            bank, wanted = ALGORITHMS.get(algorithm, (f"{algorithm:#06x}", size))
            if size != wanted or not 1 <= size <= _MAX_DIGEST:
                raise self.fail(
                    f"the Spec ID event gives {bank} a wrong digest size",
                    expected=wanted,
                    found=size,
                )
            if algorithm in self.algorithms:
                raise self.fail(f"the Spec ID event names {bank} twice")
            self.algorithms[algorithm] = (bank, size)
        at = 28 + 4 * count
        vendor = data[at] if at < len(data) else 0
        if at < len(data) and len(data) - at - 1 < vendor:
            raise self.fail(
                "the Spec ID event's vendor data does not fit",
                expected=f"{vendor} bytes",
                found=f"{len(data) - at - 1} bytes",
            )

    def add(self, index: int, event_type: int, digests: dict[str, bytes], at: int) -> None:
        """Take the data, which both forms end with, and keep the record."""
        size = self.u32(at, "the size of the data")
        data = self.take(at + 4, size, "the data")
        if index > MAX_REGISTER and event_type != EV_NO_ACTION:
            raise self.fail("no such register", expected=f"0 to {MAX_REGISTER}", found=index)
        self.events.append(Event(len(self.events), index, event_type, digests, data, self.at))
        self.at += at + 4 + size - self.at

    def legacy_record(self) -> None:
        """Read a TCG_PCR_EVENT."""
        index, event_type = _U32x2.unpack(self.take(self.at, 8, "the header"))
        digest = self.take(self.at + 8, 20, "the digest")
        self.add(index, event_type, {"sha1": digest}, self.at + 28)

    def agile_record(self) -> None:
        """Read a TCG_PCR_EVENT2."""
        index, event_type = _U32x2.unpack(self.take(self.at, 8, "the header"))
        count = self.u32(self.at + 8, "the number of digests")
        if count > len(self.algorithms):
            raise self.fail("too many digests", expected=f"≤ {len(self.algorithms)}", found=count)
        at = self.at + 12
        digests: dict[str, bytes] = {}
        for _ in range(count):
            algorithm = int.from_bytes(self.take(at, 2, "an algorithm"), "little")
            known = self.algorithms.get(algorithm)
            if known is None:
                raise self.fail(
                    "a digest of an algorithm that the Spec ID event does not name",
                    expected=", ".join(f"{number:#06x}" for number in self.algorithms),
                    found=f"{algorithm:#06x}",
                )
            bank, size = known
            if bank in digests:
                raise self.fail(f"two digests of {bank}")
            digests[bank] = self.take(at + 2, size, f"the digest of {bank}")
            at += 2 + size
        self.add(index, event_type, digests, at)


# ---- dstack's JSON form -----------------------------------------------------------------------


def dstack_digest(event_type: int, label: str, payload: bytes) -> bytes:
    """Return the SHA-384 that dstack's guest agent extends RTMR3 with for an event of its own."""
    head = event_type.to_bytes(4, "little")
    return hashlib.sha384(head + b":" + label.encode() + b":" + payload).digest()


def _parse_json(raw: bytes) -> EventLog:
    from pyenclave.formats import jsonstrict

    rows = jsonstrict.loads(raw, "event log", EvidenceFormatError, max_size=MAX_LOG_SIZE)
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_EVENTS:
        raise EvidenceFormatError(
            "event log: wrong number of events in JSON", expected=f"1 to {MAX_EVENTS}"
        )
    events = tuple(_json_event(number, row) for number, row in enumerate(rows))
    return EventLog("dstack-json", {"sha384": 48}, events, end=len(raw), size=len(raw))


def _json_event(number: int, row: object) -> Event:
    def fail(message: str, **details: Any) -> EvidenceFormatError:
        return EvidenceFormatError(f"event log: event {number}: {message}", **details)

    if not isinstance(row, dict):
        raise fail("not an object")
    fields: dict[str, Any] = row

    def integer(name: str, limit: int) -> int:
        value = fields.get(name)
        if type(value) is not int or not 0 <= value <= limit:
            raise fail(f"{name} is wrong", expected=f"an integer, 0 to {limit}", found=value)
        return value

    def hexadecimal(name: str) -> bytes:
        value = fields.get(name, "")
        # fromhex() alone would pass over spaces.
        if not isinstance(value, str) or (value and not value.isalnum()):
            raise fail(f"{name} is not hex")
        try:
            return bytes.fromhex(value)
        except ValueError:
            raise fail(f"{name} is not hex") from None

    imr = integer("imr", 3)
    event_type = integer("event_type", 0xFFFFFFFF)
    label = fields.get("event", "")
    if not isinstance(label, str):
        raise fail("event is not a string")
    payload = hexadecimal("event_payload")
    digest = hexadecimal("digest")
    # The agent's own events, all on RTMR3, may leave their digest out. Where one is given it
    # must be theirs: otherwise the name and payload shown would not be what was measured.
    own = imr == 3 and event_type == DSTACK_EVENT
    if own or (imr == 3 and not digest):
        computed = dstack_digest(event_type, label, payload)
        if digest and digest != computed:
            raise fail(
                "the digest is not that of the event's name and payload",
                expected=shorten(computed),
                found=shorten(digest),
            )
        digest = computed
    if len(digest) != 48:
        raise fail("the digest has a wrong size", expected="48 bytes", found=f"{len(digest)} bytes")
    return Event(number, imr + 1, event_type, {"sha384": digest}, payload, number, label)
