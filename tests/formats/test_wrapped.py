"""The head of wrapped sealed files: two places for the envelope of a file's key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyenclave.errors import UnsealError
from pyenclave.formats import wrapped
from pyenclave.formats.wrapped import HEAD_SIZE, PLACE_SIZE, Envelope

BLOB = (Path(__file__).parent.parent / "golden" / "signer.sealed").read_bytes()


def head(*envelopes: Envelope) -> bytes:
    data = bytearray(HEAD_SIZE)
    for envelope in envelopes:
        data[envelope.offset : envelope.offset + PLACE_SIZE] = envelope.to_bytes()
    return bytes(data)


def test_the_newest_envelope_counts():
    old, new = Envelope(6, BLOB), Envelope(7, BLOB)
    assert wrapped.newest(head(old)) == old
    assert wrapped.newest(head(old, new)) == new
    assert wrapped.newest(head(old, new)).header.length == len(BLOB) - 224 - 16


def test_a_place_written_by_half_leaves_the_other():
    """A crash at any byte of the new place: the old one is what counts, until the new is whole."""
    old, new = Envelope(6, BLOB), Envelope(7, BLOB)
    before, after = head(old), head(old, new)
    end = new.offset + 64 + len(BLOB)
    for cut in range(new.offset, end):
        assert wrapped.newest(after[:cut] + before[cut:]) == old
    assert wrapped.newest(after[:end] + before[end:]) == new


def test_every_changed_bit_of_a_place_is_refused():
    data = head(Envelope(2, BLOB))
    for at in range(64 + len(BLOB) + 8):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            with pytest.raises(UnsealError):
                wrapped.newest(bytes(changed))


@pytest.mark.parametrize("size", [0, 1, PLACE_SIZE, HEAD_SIZE - 1])
def test_a_head_cut_off_is_refused(size):
    with pytest.raises(UnsealError, match="cut off"):
        wrapped.newest(head(Envelope(2, BLOB))[:size])


def test_an_envelope_in_the_other_place_is_none():
    data = head(Envelope(2, BLOB))
    with pytest.raises(UnsealError):
        wrapped.newest(data[PLACE_SIZE:] + data[:PLACE_SIZE])


@pytest.mark.parametrize(
    "envelope",
    [Envelope(0, BLOB), Envelope(1 << 63, BLOB), Envelope(1, b""), Envelope(1, bytes(4033))],
)
def test_impossible_envelopes_are_not_written(envelope):
    with pytest.raises(ValueError, match="does not exist"):
        envelope.to_bytes()
