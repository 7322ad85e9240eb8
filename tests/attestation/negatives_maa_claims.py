"""A decoded token is never genuine, so most checks can only change what is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from negatives_akv_release_policy import AUTHORITY, judge

STRUCTURAL = {"nonce", "report_data", "user_data"}
REDUNDANT = {"claims.format": "the kind is told by the same reader, which refuses it before"}
CLAIMS = json.dumps({"iss": AUTHORITY, "x-ms-attestation-type": "sgx"}).encode()
HEADER = b'{"alg": "RS256"}\n'


def negatives() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "claims.signature", partial(judge, HEADER + CLAIMS)
    yield "claims.signature", partial(judge, CLAIMS)
    yield "nonce", partial(judge, CLAIMS, nonce=b"n" * 32)
    yield "report_data", partial(judge, CLAIMS, report_data=bytes(64))
    yield "user_data", partial(judge, CLAIMS, user_data=b"")
