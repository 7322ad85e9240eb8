"""
Replay of event logs: from the records to the registers of a TPM or of TDX.

Sources: TCG PC Client Platform Firmware Profile 1.06, sections 2.3 and 10.4.5.3 (start of PCR 0);
Intel TDX module specification, TDG.MR.RTMR.EXTEND. A register starts at zeros and each event that
is not EV_NO_ACTION makes it ``H(register || digest)`` with the digest that the log gives.

A replay that equals a signed quote proves that the *digests* are those measured. What an event's
data says is a claim of its own: ``EventReport.covers`` tells whether the digest is of that data.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pyenclave.errors import MeasurementError
from pyenclave.formats import eventlog_data
from pyenclave.formats.eventlog import ALGORITHMS, EventLog

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

    from pyenclave.formats.eventlog import Event
    from pyenclave.formats.eventlog_data import Decoded

__all__ = ["EventReport", "Replay", "extend", "replay", "start_value"]

_SIZES = dict(ALGORITHMS.values())
_NUM_PCRS = 24
_DRTM = range(17, 23)  # start at all ones as long as no dynamic launch happened


def extend(bank: str, register: bytes, digest: bytes) -> bytes:
    """Return what a register holds after it was extended with *digest*."""
    return hashlib.new(_function(bank), register + digest).digest()


def _function(bank: str) -> str:
    return "sm3" if bank == "sm3_256" else bank


def start_value(bank: str, index: int, *, locality: int | None = None, ccel: bool = False) -> bytes:
    """
    Return what a register holds before any event.

    Args:
        bank: Name of the bank.
        index: The register: PCR, or RTMR + 1 with *ccel*.
        locality: Of TPM2_Startup, which PCR 0 begins with.
        ccel: Whether the registers are those of TDX, which all begin at zeros.
    """
    size = _SIZES[bank]
    if ccel:
        return bytes(size)
    if index == 0 and locality:
        return bytes(size - 1) + bytes([locality])
    return b"\xff" * size if index in _DRTM else bytes(size)


@dataclass(frozen=True, slots=True)
class EventReport:
    """
    One event, readable.

    Attributes:
        event: The record.
        decoded: What its data says.
        covers: What of the data the digests are of; see ``eventlog_data.digest_covers``.
    """

    event: Event
    decoded: Decoded
    covers: eventlog_data.Covers

    def to_json(self, *, ccel: bool) -> dict[str, Any]:
        """Return the event as plain values."""
        event = self.event
        return {
            "number": event.number,
            "rtmr" if ccel and event.index else "pcr": event.index - (ccel and event.index > 0),
            "type": event.name,
            "text": self.decoded.text,
            "digest_of": self.covers,
            "digests": {bank: digest.hex() for bank, digest in event.digests.items()},
            "fields": self.decoded.fields,
        }


@dataclass(frozen=True)
class Replay:
    """
    The registers after a log.

    Attributes:
        log: What was replayed.
        registers: Bank → index → value, of the registers that the log extends.
        skipped_banks: Banks whose hash function is not available here.
        incomplete_banks: Banks in which some extending event has no digest; their values leave
            those events out.
    """

    log: EventLog
    registers: Mapping[str, Mapping[int, bytes]]
    skipped_banks: tuple[str, ...] = ()
    incomplete_banks: tuple[str, ...] = ()
    ccel: bool = field(default=False, kw_only=True)

    def value(self, bank: str, index: int) -> bytes:
        """Return a register's value, its start value if no event extends it."""
        known = self.registers[bank].get(index)
        if known is not None:
            return known
        return start_value(bank, index, locality=self.log.startup_locality, ccel=self.ccel)

    def rtmr(self, number: int) -> bytes:
        """
        Return an RTMR of TDX.

        Args:
            number: 0 to 3.

        Raises:
            MeasurementError: The log is not one of TDX.
        """
        if not 0 <= number <= 3:
            raise ValueError(f"there is no RTMR{number}")
        if not self.ccel:
            raise MeasurementError("the log is one of a TPM, not of TDX", found=self.log.format)
        return self.value("sha384", number + 1)

    @cached_property
    def events(self) -> tuple[EventReport, ...]:
        """Every event, decoded and compared with its digest."""
        found = []
        for event in self.log.events:
            decoded = eventlog_data.decode(event)
            found.append(EventReport(event, decoded, eventlog_data.digest_covers(event, decoded)))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """
        Return the registers as plain values.

        ``pcrs`` holds every register that a log of its kind can extend, those at their start
        value too; ``extended`` lists the ones that an event changed. ``tpm_pcrs_not_in_log``, for
        a log of one bank, are the registers that begin with ones and were left so.
        """
        count = 5 if self.ccel else _NUM_PCRS
        result: dict[str, Any] = {
            "kind": "tdx-rtmr" if self.ccel else "tpm-pcr",
            "format": self.log.format,
            "event_count": self.log.event_count,
            "log_end_offset": self.log.end,
            "padding": self.log.padding,
            "startup_locality": self.log.startup_locality,
            "pcrs": {
                bank: {str(index): self.value(bank, index).hex() for index in range(count)}
                for bank in self.registers
            },
            "extended": sorted({event.index for event in self.log.events if event.extends}),
        }
        if self.ccel:
            result |= {f"rtmr{number}": self.rtmr(number).hex() for number in range(4)}
        elif len(self.registers) == 1:
            (bank,) = self.registers
            result["tpm_pcrs_not_in_log"] = {
                str(index): self.value(bank, index).hex()
                for index in _DRTM
                if index not in self.registers[bank]
            }
        if self.skipped_banks:
            result["skipped_banks"] = list(self.skipped_banks)
        if self.incomplete_banks:
            result["incomplete_banks"] = list(self.incomplete_banks)
        return result


def replay(log: EventLog | Buffer, *, ccel: bool | None = None) -> Replay:
    """
    Replay a log in every bank that it has.

    Args:
        log: The log, or its bytes.
        ccel: Whether the indices are TDX's (RTMR + 1; 0 is MRTD, which events do not change).
            None: as ``EventLog.is_ccel`` judges.

    Raises:
        EvidenceFormatError: The bytes are no event log.
    """
    log = log if isinstance(log, EventLog) else EventLog.from_bytes(log)
    ccel = log.is_ccel if ccel is None else ccel
    banks: dict[str, dict[int, bytes]] = {}
    skipped: list[str] = []
    incomplete: list[str] = []
    for bank in log.banks:
        # A system may list a hash and still refuse it (FIPS mode), so it is tried.
        if bank not in _SIZES or eventlog_data.bank_hash(bank, b"") is None:
            skipped.append(bank)
            continue
        registers: dict[int, bytes] = {}
        for event in log.events:
            if not event.extends or (ccel and event.index == 0):
                continue
            digest = event.digests.get(bank)
            if digest is None:
                if bank not in incomplete:
                    incomplete.append(bank)
                continue
            before = registers.get(event.index)
            if before is None:
                before = start_value(bank, event.index, locality=log.startup_locality, ccel=ccel)
            registers[event.index] = extend(bank, before, digest)
        banks[bank] = registers
    return Replay(log, banks, tuple(skipped), tuple(incomplete), ccel=ccel)
