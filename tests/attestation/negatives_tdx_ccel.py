"""A log of a TD with one thing wrong each, or with another quote beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

from issuer_eventlog import SHA384, event, log, registers

from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.testing.intel import IntelPlatform

AT = datetime(2026, 7, 1, tzinfo=UTC)
NONCE = bytes(range(32))
# Register index is RTMR + 1.
EVENTS = ((1, b"firmware"), (2, b"kernel"), (1, b"variables"), (3, b"initrd"), (4, b"runtime"))
STRUCTURAL = {"log.format", "quote.present"}


@cache
def platform() -> IntelPlatform:
    return IntelPlatform(AT)


def ccel(*events: tuple[int, bytes]) -> bytes:
    return log(*events, banks=(SHA384,))


def quote(*events: tuple[int, bytes], **body: Any) -> bytes:
    held = registers(SHA384, *events)
    rtmrs = {f"rtmr{index - 1}": value for index, value in held.items() if 1 <= index <= 4}
    return platform().td_quote(**({"report_data": NONCE.ljust(64, b"\0")} | rtmrs | body))


def judge(data: bytes, beside: bytes | None, **options: Any) -> Any:
    files = platform().endorsements("tdx")
    if beside is not None:
        files["quote.bin"] = beside
    options = {
        "policy": AppraisalPolicy.any_code(),
        "at": AT,
        "roots": [platform().root],
        "nonce": NONCE,
    } | options
    return appraise(data, endorsements=files, **options)


def without(number: int) -> tuple[tuple[int, bytes], ...]:
    return tuple(item for item in EVENTS if item[0] != number + 1)


def negatives() -> Iterator[tuple[str, Callable[[], Any]]]:
    good = quote(*EVENTS)
    yield "log.format", partial(judge, ccel(*EVENTS)[:-1], good)
    yield "log.format", partial(judge, ccel(*EVENTS) + bytes(8) + b"junk", good)
    # An event of no RTMR changes no replayed value: only this check sees it.
    yield "log.registers", partial(judge, ccel(*EVENTS, (0, b"more")), good)
    # A record without a digest is left out of the replay.
    yield "log.banks", partial(judge, ccel(*EVENTS) + event(1, b"unseen", ()), good)
    yield "quote.present", partial(judge, ccel(*EVENTS), None)
    for number in range(4):
        other = ((number + 1, b"other"),)
        for wrong in (
            EVENTS + other,
            other + EVENTS,
            without(number) + other,
        ):
            yield f"log.rtmr{number}", partial(judge, ccel(*wrong), good)
    for number in range(3):
        yield f"log.rtmr{number}", partial(judge, ccel(*without(number)), good)
    yield (
        "tdx.td.debug",
        partial(
            judge, ccel(*EVENTS), quote(*EVENTS, td_attributes=(1 | 1 << 28).to_bytes(8, "little"))
        ),
    )
    yield "nonce", partial(judge, ccel(*EVENTS), quote(*EVENTS, report_data=bytes(64)))
    yield (
        "report_data",
        partial(
            judge,
            ccel(*EVENTS),
            good,
            report_data=b"x" * 64,
            nonce=None,
            freshness="not_checked",
        ),
    )
    yield "user_data", partial(judge, ccel(*EVENTS), good, user_data=b"")
