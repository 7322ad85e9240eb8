"""As much of an enclave and its host as a release needs, in this process."""

from __future__ import annotations

from typing import Any

import pytest

from pyenclave.errors import (
    KeyReleaseError,
    OcallError,
)
from pyenclave.trusted import _release
from pyenclave.trusted._release import release_key


class Inside:
    """As much of an enclave's runtime as a release needs."""

    secret = bytes(32)
    message_limit = 1 << 20

    def __init__(self) -> None:
        self.release: dict[str, str] = {}
        self.released: _release.Releases | None = None
        self.report_data: list[bytes] = []

    def attest_raw(self, report_data: bytes) -> bytes:
        self.report_data.append(report_data)
        return b"evidence over " + report_data


class Host:
    """The host's side of ocalls: what a test lets it answer."""

    def __init__(self, handlers: dict[str, Any]) -> None:
        self.handlers = handlers
        self.asked: list[tuple[object, ...]] = []

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert not kwargs
        self.asked.append(args)
        try:
            return self.handlers[name](*args)
        except OSError as error:
            raise OcallError("the handler raised", type=type(error).__name__) from error


def refused(*args: Any, **options: Any) -> KeyReleaseError:
    with pytest.raises(KeyReleaseError) as caught:
        release_key(None, *(args or ("rsa",)), **options)
    return caught.value
