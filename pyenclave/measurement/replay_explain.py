"""
Why a register is not what was expected: the first event of the log that explains it.

A register cannot be turned back into events. So the log is replayed with one change after the
other (a prefix of it, one event left out, twice, exchanged, or with other content), and the first
change that gives the expected value is the answer. None does where two things differ at once, or
where the machine measured something that the log does not know; compare two logs then
(``measurement.eventlog_diff``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pyenclave.errors import MeasurementError
from pyenclave.formats.eventlog_data import bank_hash, hash_candidates
from pyenclave.measurement.replay import extend, start_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pyenclave.formats.eventlog import Event
    from pyenclave.measurement.replay import Replay

__all__ = ["Cause", "Expected", "check", "explain", "read_expected"]

# Trying changes takes a time that grows with the square of the events of one register.
MAX_EVENTS = 512

CauseKind = Literal[
    "start", "later", "left out", "twice", "exchanged", "other content", "not covered", "unknown"
]
_BANK_BY_SIZE = {20: "sha1", 32: "sha256", 48: "sha384", 64: "sha512"}


@dataclass(frozen=True, slots=True)
class Expected:
    """
    A register's value as a reference or a quote has it.

    Attributes:
        bank: Name of the bank.
        index: As in the log: PCR, or RTMR + 1 in a log of TDX.
        value: The digest.
    """

    bank: str
    index: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Cause:
    """
    Why a register differs.

    Attributes:
        register: ``pcr7`` or ``rtmr1``.
        bank: Name of the bank.
        expected: The value that was wanted.
        found: The value that the log gives.
        kind: What single change of the log gives the expected value; ``not covered`` and
            ``unknown``: none that was tried.
        event: Number of the event in the log; None where no event is the cause.
        text: A sentence for people.
    """

    register: str
    bank: str
    expected: bytes
    found: bytes
    kind: CauseKind
    event: int | None
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return the cause as plain values."""
        return {
            "register": self.register,
            "bank": self.bank,
            "expected": self.expected.hex(),
            "found": self.found.hex(),
            "cause": self.kind,
            "event": self.event,
            "text": self.text,
        }


def read_expected(values: Mapping[str, Any], *, ccel: bool) -> list[Expected]:
    """
    Read expected registers from their plain form.

    Args:
        values: ``pcrs`` as {bank: {index: hex}}, or its banks by themselves; ``rtmr0`` … ``rtmr3``
            and ``pcr0`` … as hex; the bank of a ``pcrN`` follows from its length. Other names are
            passed over, so that the output of ``measure eventlog --json`` can be given.
        ccel: Whether the log is one of TDX.

    Raises:
        MeasurementError: A value is malformed, or there is none.
    """
    found: list[Expected] = []
    for name, value in values.items():
        if isinstance(value, dict) and (name == "pcrs" or name in _BANK_BY_SIZE.values()):
            for bank, registers in (value if name == "pcrs" else {name: value}).items():
                if not isinstance(registers, dict):
                    raise MeasurementError(f"expected values: pcrs of {bank} are no object")
                found += [_expected(bank, key, item) for key, item in registers.items()]
        elif name[:4] == "rtmr" and name[4:] in ("0", "1", "2", "3"):
            if not ccel:
                raise MeasurementError(f"expected values: {name}, but the log is one of a TPM")
            found.append(_expected("sha384", str(int(name[4:]) + 1), value))
        elif name[:3] == "pcr" and name[3:].isdecimal():
            size = len(value) // 2 if isinstance(value, str) else 0
            found.append(_expected(_BANK_BY_SIZE.get(size, ""), name[3:], value))
    if not found:
        raise MeasurementError("expected values: none", expected="pcrs, pcrN or rtmrN")
    return list(dict.fromkeys(found))


def _expected(bank: str, index: str, value: object) -> Expected:
    try:
        digest = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        digest = b""
    if _BANK_BY_SIZE.get(len(digest)) is None or not index.isdecimal() or len(index) > 2:
        raise MeasurementError(
            f"expected values: register {index!r} of bank {bank!r} is malformed",
            expected="an index below 32 and a digest in hex",
            found=value,
        )
    return Expected(bank, int(index), digest)


def check(result: Replay, expected: Iterable[Expected]) -> list[Cause]:
    """
    Compare a replay with expected values.

    Returns:
        A cause for each register that differs, in the order of *expected*.
    """
    found = []
    for one in expected:
        if one.bank not in result.registers or result.value(one.bank, one.index) != one.value:
            found.append(explain(result, one))
    return found


def explain(result: Replay, expected: Expected) -> Cause:
    """
    Name the first event that explains why a register is not the expected one.

    Raises:
        MeasurementError: The register has the expected value.
    """
    bank, index = expected.bank, expected.index
    ccel = result.ccel
    register = f"rtmr{index - 1}" if ccel and index else f"pcr{index}"

    def cause(kind: CauseKind, event: Event | None, text: str) -> Cause:
        found = result.value(bank, index) if bank in result.registers else b""
        number = None if event is None else event.number
        return Cause(register, bank, expected.value, found, kind, number, text)

    if bank not in result.registers:
        return cause("not covered", None, f"the log has no digests of bank {bank}")
    if result.value(bank, index) == expected.value:
        raise MeasurementError(f"{register} has the expected value")
    if len(expected.value) != len(start_value(bank, index)):
        return cause("not covered", None, f"the expected value is no digest of {bank}")
    events = [
        event
        for event in result.log.events
        if event.index == index and event.extends and bank in event.digests
    ]
    digests = [event.digests[bank] for event in events]
    locality = result.log.startup_locality
    for name, value in _starts(bank, index):
        if run(bank, value, digests) == expected.value:
            return cause(
                "start", None, f"{register} began at {name}; the log says locality {locality or 0}"
            )
    states = [start_value(bank, index, locality=locality, ccel=ccel)]
    for digest in digests:
        states.append(extend(bank, states[-1], digest))
    if expected.value in states:
        event = events[states.index(expected.value)]
        return cause(
            "later",
            event,
            f"the expected value is that before event {event.number} ({_name(event)}): it and "
            f"{len(events) - states.index(expected.value) - 1} later ones were added",
        )
    if not events:
        return cause("not covered", None, f"no event of the log extends {register}")
    if len(events) <= MAX_EVENTS:
        for number, event in enumerate(events):
            for kind, before, rest, text in _changes(bank, events, digests, number):
                if run(bank, run(bank, states[number], before), rest) == expected.value:
                    return cause(kind, event, text)
    return cause(
        "unknown",
        None,
        f"no change of one of the {len(events)} events of {register} gives the expected value; "
        "compare with the log of a machine that has it",
    )


def run(bank: str, value: bytes, digests: Iterable[bytes]) -> bytes:
    """Extend a register with one digest after the other."""
    for digest in digests:
        value = extend(bank, value, digest)
    return value


def _starts(bank: str, index: int) -> Iterator[tuple[str, bytes]]:
    size = len(start_value(bank, index))
    yield "zeros", bytes(size)
    yield "all ones", b"\xff" * size
    if index == 0:
        for locality in (3, 4):
            yield f"locality {locality}", start_value(bank, 0, locality=locality)


def _name(event: Event) -> str:
    from pyenclave.formats.eventlog_data import decode

    text = decode(event).text
    return f"{event.name}: {text if len(text) <= 80 else text[:79] + '…'}"


def _changes(
    bank: str, events: list[Event], digests: list[bytes], number: int
) -> Iterator[tuple[CauseKind, list[bytes], list[bytes], str]]:
    """Yield changes at one event: what to extend with in its place, and what follows then."""
    event, own, rest = events[number], digests[number], digests[number + 1 :]
    label = f"event {event.number} ({_name(event)})"
    yield "left out", [], rest, f"{label} was not measured where the expected value is from"
    yield "twice", [own, own], rest, f"{label} was measured twice where the value is from"
    if rest:
        following = events[number + 1]
        yield (
            "exchanged",
            [rest[0], own],
            rest[1:],
            f"{label} came after event {following.number} where the expected value is from",
        )
    for text, content in _other_contents(event):
        digest = bank_hash(bank, content)
        if digest is not None and digest != own:
            yield "other content", [digest], rest, f"{label}: {text}"


def _other_contents(event: Event) -> Iterator[tuple[str, bytes]]:
    """Yield what an event may well have measured instead."""
    for name, content in hash_candidates(event):
        yield f"its digest is not that of its {name}, the expected one is", content
    if event.type == 4:
        for value in (bytes(4), b"\xff" * 4, b"\1\0\0\0"):
            yield f"the separator was {value.hex()}", value
    for name, content in hash_candidates(event):
        if name == "variable" and content in (b"\0", b"\1"):
            other = bytes([1 - content[0]])
            said = f"the variable was {other[0]}, here it is {content[0]}"
            yield said, other
            yield said, event.data[:-1] + other
        elif name == "variable" and content:
            empty = event.data[:24] + bytes(8) + event.data[32 : -len(content)]
            yield "the variable was empty", empty
            yield "the variable was empty", b""
