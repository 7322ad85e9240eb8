"""A log by itself is never genuine, so most checks can only change what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

from issuer_eventlog import SHA3, log

from pyenclave.attestation import AppraisalPolicy, appraise

AT = datetime(2026, 7, 1, tzinfo=UTC)
EVENTS = ((0, b"crtm"), (7, b"secure boot"))
STRUCTURAL = {"log.format", "log.banks", "nonce", "report_data", "user_data"}


def judge(data: bytes, **options: Any) -> Any:
    options = {"policy": AppraisalPolicy.permissive(), "at": AT} | options
    return appraise(data, freshness="required" if "nonce" in options else "not_checked", **options)


def negatives() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "log.format", partial(judge, log(*EVENTS)[:-1])
    yield "log.format", partial(judge, log(*EVENTS) + b"\xff" * 8 + b"junk")
    yield "log.banks", partial(judge, log(*EVENTS, banks=(SHA3,)))
    yield "log.quote", partial(judge, log(*EVENTS))
    yield "nonce", partial(judge, log(*EVENTS), nonce=b"n" * 32)
    yield "report_data", partial(judge, log(*EVENTS), report_data=bytes(64))
    yield "user_data", partial(judge, log(*EVENTS), user_data=b"")
