"""A policy is never genuine, so most checks can only change what is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pyenclave.attestation import AppraisalPolicy, appraise

AT = datetime(2026, 7, 1, tzinfo=UTC)
AUTHORITY = "https://mine.attest.azure.net"
CONDITION = {"claim": "x-ms-attestation-type", "equals": "sevsnpvm"}
STRUCTURAL = {"policy.format", "claims.format", "nonce", "report_data", "user_data"}


def policy(*conditions: Any, authority: str = AUTHORITY) -> bytes:
    groups = [{"authority": authority, "allOf": list(conditions or (CONDITION,))}]
    return json.dumps({"version": "1.0.0", "anyOf": groups}).encode()


def judge(data: bytes, **options: Any) -> Any:
    options = {"policy": AppraisalPolicy.permissive(), "at": AT} | options
    return appraise(data, freshness="required" if "nonce" in options else "not_checked", **options)


def negatives() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "policy.format", partial(judge, policy({"claim": "a", "is": "b"}))
    yield "claims.format", partial(judge, policy(), endorsements={"claims.json": b"[]"})
    yield "policy.signature", partial(judge, policy())
    yield "nonce", partial(judge, policy(), nonce=b"n" * 32)
    yield "report_data", partial(judge, policy(), report_data=bytes(64))
    yield "user_data", partial(judge, policy(), user_data=b"")
