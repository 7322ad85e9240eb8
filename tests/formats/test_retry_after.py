"""The `Retry-After` field."""

from __future__ import annotations

from pyenclave.formats.retry_after import retry_after


def test_what_a_server_asks_to_wait_is_read_strictly() -> None:
    assert retry_after("7") == 7
    for text in (None, "", "-1", "soon", "1e9", "9" * 50, "\u0665"):
        assert retry_after(text) == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9
