"""
Changes to bytes that know nothing of their structure, from a seeded generator.

The same seeds and the same number give the same inputs on every machine.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence

MAX_SIZE = 1 << 16  # bytes of one input

_INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000)
_INTERESTING += (0xFFFFFFFF, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
# What nests, ends or means something in one of the formats that are read.
_TOKENS = (
    *b'[ { " \\u0000 \\ud800 null true -0 1e999 NaN . = , : ( ) && => ; ! == \n \r\n \0'.split(
        b" "
    ),
    b'\\"',
    b'"""',
    b"'''",
    b"\x30\x80",
    b"\x30\x84\xff\xff\xff\xff",
    b"\xa0\x82",
    b"\x81",
    b"\xa1\x00",
    b"\x9f",
    b"\xbf",
    b"\xff",
    b"\xd8\x12",
    b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xf9\x7e\x00",
    b"-----BEGIN CERTIFICATE-----\n",
    b"-----END CERTIFICATE-----\n",
    b"19700101000000Z",
    b"99991231235959Z",
    b"0001-01-01T00:00:00Z",
    b"2024-02-30T24:00:60Z",
    "é\u2028\U0001f600".encode(),
)
_NUMBER = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?")
_NUMBERS = (b"0", b"-1", b"256", b"65536", b"4294967296", b"18446744073709551616", b"1e309", b"0.5")


class Mutator:
    """Makes inputs out of *seeds*; see `inputs`."""

    def __init__(self, seeds: Sequence[bytes], number: int) -> None:
        self.seeds = sorted({seed[:MAX_SIZE] for seed in seeds}, key=lambda one: (len(one), one))
        self.random = random.Random(number)

    def inputs(self, rounds: int) -> Iterator[bytes]:
        """Yield the seeds as they are, then *rounds* changed ones, each of at most 64 KiB."""
        yield b""
        yield from self.seeds
        for _ in range(rounds):
            yield self.mutated(self.random.choice(self.seeds) if self.seeds else b"")

    def mutated(self, seed: bytes) -> bytes:
        data = bytearray(seed)
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 3, 5, 9))):
            self.random.choice(_CHANGES)(self, data)
            del data[MAX_SIZE:]
        return bytes(data)

    def place(self, data: bytearray, room: int = 0) -> int:
        """A place in *data*; headers, where lengths stand, more often than the rest."""
        end = max(len(data) - room, 0)
        if self.random.random() < 0.3:
            end = min(end, 64)
        return self.random.randint(0, end)

    def piece(self, data: bytearray) -> tuple[int, int]:
        """A piece of *data*, mostly short."""
        start = self.place(data)
        limit = self.random.choice((1, 4, 16, 64, 1024, MAX_SIZE))
        return start, min(len(data), start + self.random.randint(1, limit))

    # ---- changes ---------------------------------------------------------------------------

    def flip(self, data: bytearray) -> None:
        if data:
            data[self.place(data, 1)] ^= 1 << self.random.randrange(8)

    def set_byte(self, data: bytearray) -> None:
        if data:
            data[self.place(data, 1)] = self.random.randrange(256)

    def truncate(self, data: bytearray) -> None:
        del data[self.place(data) :]

    def behead(self, data: bytearray) -> None:
        del data[: self.random.randint(0, min(len(data), 16))]

    def delete(self, data: bytearray) -> None:
        start, stop = self.piece(data)
        del data[start:stop]

    def duplicate(self, data: bytearray) -> None:
        start, stop = self.piece(data)
        data[stop:stop] = data[start:stop]

    def repeat(self, data: bytearray) -> None:
        """Many of one piece: what is quadratic or recursive shows."""
        start, stop = self.piece(data)
        stop = min(stop, start + 64)
        times = self.random.choice((16, 200, 5000))
        data[stop:stop] = (data[start:stop] * times)[:MAX_SIZE]

    def move(self, data: bytearray) -> None:
        start, stop = self.piece(data)
        moved = data[start:stop]
        del data[start:stop]
        at = self.place(data)
        data[at:at] = moved

    def insert(self, data: bytearray) -> None:
        at = self.place(data)
        data[at:at] = self.random.randbytes(self.random.choice((1, 2, 4, 8, 33)))

    def token(self, data: bytearray) -> None:
        at = self.place(data)
        times = self.random.choice((1, 1, 1, 40, 3000))
        data[at:at] = (self.random.choice(_TOKENS) * times)[:MAX_SIZE]

    def append(self, data: bytearray) -> None:
        data += self.random.choice((b"\0", b"\n", b"\xff", bytes(16), b"\0" * 4096, bytes(data)))

    def splice(self, data: bytearray) -> None:
        if self.seeds:
            other = self.random.choice(self.seeds)
            cut = self.random.randint(0, len(other))
            at = self.place(data) if self.random.random() < 0.5 else min(cut, len(data))
            data[at:] = other[cut:]

    def transplant(self, data: bytearray) -> None:
        if self.seeds:
            other = bytearray(self.random.choice(self.seeds))
            start, stop = self.piece(other)
            at = self.place(data)
            data[at : at + stop - start] = other[start:stop]

    def integer(self, data: bytearray) -> None:
        width = self.random.choice((1, 2, 4, 8))
        if len(data) < width:
            return
        value = self.random.choice((*_INTERESTING, len(data), len(data) + 1))
        self._write(data, self.place(data, width), width, value)

    def length(self, data: bytearray) -> None:
        """Change what could be a length: a number that fits into what follows it."""
        for _ in range(16):
            width = self.random.choice((1, 2, 3, 4, 8))
            if len(data) < width:
                continue
            at = self.place(data, width)
            order = self.random.choice(("little", "big"))
            value = int.from_bytes(data[at : at + width], order)  # type: ignore[arg-type]
            if 0 < value <= len(data) - at:
                near = (value - 1, value + 1, value * 2, value // 2, len(data) - at - width)
                new = self.random.choice((*near, 0, (1 << 8 * width) - 1))
                data[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
                return

    def number(self, data: bytearray) -> None:
        """Change a number that is written in digits."""
        start, _ = self.piece(data)
        match = _NUMBER.search(data, start, start + 512)
        if match:
            data[match.start() : match.end()] = self.random.choice(_NUMBERS)

    def character(self, data: bytearray) -> None:
        """Turn what is text into other text."""
        if data:
            data[self.place(data, 1)] = self.random.choice(b'"\\{}[]:,.;=()-+&|! 09afAFzZ_~\n')

    def _write(self, data: bytearray, at: int, width: int, value: int) -> None:
        order = self.random.choice(("little", "big"))
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]


_CHANGES: tuple[Callable[[Mutator, bytearray], None], ...] = (
    Mutator.flip,
    Mutator.flip,
    Mutator.set_byte,
    Mutator.set_byte,
    Mutator.truncate,
    Mutator.behead,
    Mutator.delete,
    Mutator.duplicate,
    Mutator.repeat,
    Mutator.move,
    Mutator.insert,
    Mutator.token,
    Mutator.append,
    Mutator.splice,
    Mutator.transplant,
    Mutator.integer,
    Mutator.integer,
    Mutator.length,
    Mutator.length,
    Mutator.number,
    Mutator.character,
)
