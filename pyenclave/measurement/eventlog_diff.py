"""What makes two event logs differ: registers, and event by event what changed in them."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from pyenclave.errors import EvidenceFormatError, MeasurementError
from pyenclave.formats.eventlog_data import decode
from pyenclave.measurement.difference import Difference
from pyenclave.measurement.replay import Replay, replay

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyenclave.formats.eventlog import Event

__all__ = ["diff", "diff_replays"]

# Aligning sequences takes a time that grows with the square of their length.
MAX_ALIGNED = 512


def diff(a: Buffer, b: Buffer) -> list[Difference]:
    """
    Name what makes two logs differ.

    Raises:
        MeasurementError: A file is malformed.
    """
    try:
        return diff_replays(replay(a), replay(b))
    except EvidenceFormatError as error:
        raise MeasurementError(str(error)) from None


def diff_replays(one: Replay, two: Replay) -> list[Difference]:
    """
    Name what makes two replays differ, in the order of the first log.

    Events are compared by the digests of the banks that both logs have. An event whose data
    alone differs is listed as not measured.
    """
    banks = [bank for bank in one.log.banks if bank in two.log.banks]
    found: list[Difference] = []
    if not banks:
        return [Difference("field", "banks", list(one.log.banks), list(two.log.banks))]
    if one.ccel != two.ccel:
        return [Difference("field", "registers", _kind(one), _kind(two))]
    localities = one.log.startup_locality or 0, two.log.startup_locality or 0
    if localities[0] != localities[1]:
        found.append(Difference("field", "startup locality", *localities))
    indices = sorted({event.index for log in (one.log, two.log) for event in log.events})
    ordered: list[tuple[int, Difference]] = []
    for index in indices:
        name = f"rtmr{index - 1}" if one.ccel and index else f"pcr{index}"
        ordered += _register(
            name,
            [event for event in one.log.events if event.index == index and event.extends],
            [event for event in two.log.events if event.index == index and event.extends],
            banks,
        )
    ordered.sort(key=lambda item: item[0])
    return found + [difference for _, difference in ordered]


def _kind(result: Replay) -> str:
    return "TDX" if result.ccel else "TPM"


def _register(
    name: str, one: list[Event], two: list[Event], banks: list[str]
) -> list[tuple[int, Difference]]:
    """Compare the events of one register; each difference with its place in the first log."""

    def keys(events: list[Event]) -> list[tuple[bytes, ...]]:
        return [tuple(event.digests.get(bank, b"") for bank in banks) for event in events]

    found: list[tuple[int, Difference]] = []
    first, second = keys(one), keys(two)
    if max(len(first), len(second)) > MAX_ALIGNED:
        same = next(
            (i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
            min(len(first), len(second)),
        )
        blocks: list[tuple[str, int, int, int, int]] = [("equal", 0, same, 0, same)]
        if first != second:
            blocks.append(("replace", same, same + 1, same, same + 1))
    else:
        blocks = [*SequenceMatcher(None, first, second, autojunk=False).get_opcodes()]
    for kind, i, i_end, j, j_end in blocks:
        measured = kind != "equal"
        for step in range(max(i_end - i, j_end - j)):
            a = one[i + step] if i + step < min(i_end, len(one)) else None
            b = two[j + step] if j + step < min(j_end, len(two)) else None
            if a is None and b is None:
                continue
            if not measured and a is not None and b is not None and a.data == b.data:
                continue
            label = a if a is not None else b
            assert label is not None
            at = a.number if a is not None else (one[i - 1].number if i else -1)
            title = f"{name} event {label.number} {label.name}"
            row = Difference("event", title, _shown(a), _shown(b), measured=measured)
            found.append((at, row))
    return found


def _shown(event: Event | None) -> str | None:
    if event is None:
        return None
    digest = next(iter(event.digests.values()), b"").hex()[:16]
    text = decode(event).text
    return f"{text if len(text) <= 160 else text[:159] + '…'} [{digest}]"
