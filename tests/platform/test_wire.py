"""Errors as messages: whatever an image put into them, they fit one packet."""

from __future__ import annotations

import pytest

from pyenclave._platform.client import PlatformClient
from pyenclave._platform.wire import failure_of, raise_failure
from pyenclave._worker.main import _ending
from pyenclave.errors import EnclaveError, RuntimeLockError
from pyenclave.formats import messages

NAMES = ("\U0001f9ea", "\u65e5\u672c", "\udcff", "a")


@pytest.mark.parametrize("letter", NAMES)
def test_an_error_full_of_an_images_names_can_always_be_sent(letter: str) -> None:
    """An answer that cannot be sent would cost a host its connection and all its enclaves."""
    error = RuntimeLockError(letter * 20_000, files=tuple(letter * 5_000 for _ in range(20_000)))
    for message in (
        failure_of(error),
        _ending(error, debug=True, running=False),
        _ending(ModuleNotFoundError("x", name=letter * 90_000), debug=True, running=False),
        _ending(ValueError(letter * 90_000), debug=True, running=False),
    ):
        decoded = messages.decode(messages.encode(message))
        assert isinstance(decoded, messages.Failure | messages.Ending)
        with pytest.raises(EnclaveError):
            raise_failure(decoded)


def test_a_listing_of_long_names_can_always_be_sent(client: PlatformClient, launch) -> None:
    """As many enclaves as there may be, each with the longest name there is."""
    launch(client, name=NAMES[0] * 64)
    (row,) = client.list()
    assert row.name == NAMES[0] * 16
    rows = messages.Listing(enclaves=(row,) * 256)
    assert messages.decode(messages.encode(rows)) == rows
