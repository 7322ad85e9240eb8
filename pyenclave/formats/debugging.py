"""
Packets between a debugger in a debug enclave and ``pyenclave debug``: bytes ↔ structs, no I/O.

Both ends of the socket may send anything: a packet is one MessagePack map with a ``t`` member,
unknown members are refused. Only images that allow debug have this module on their lock lists.
"""

from __future__ import annotations

import msgspec

from pyenclave.errors import EnclaveStateError

__all__ = [
    "MAX_PACKET",
    "MAX_TEXT",
    "Asks",
    "Choices",
    "Complete",
    "Ends",
    "Goes",
    "Line",
    "Packet",
    "Said",
    "decode",
    "encode",
]

MAX_PACKET = 64 * 1024
MAX_TEXT = 8 * 1024  # characters of one packet; longer texts are several


class _Base(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", forbid_unknown_fields=True):
    pass


# ---- from the enclave ---------------------------------------------------------------------------


class Said(_Base, frozen=True, kw_only=True, tag="said"):
    """Output of the debugger, to be shown."""

    text: str


class Asks(_Base, frozen=True, kw_only=True, tag="asks"):
    """It waits for a line; answered by Line."""

    prompt: str


class Choices(_Base, frozen=True, kw_only=True, tag="choices"):
    """How a word may go on; the answer to Complete."""

    words: tuple[str, ...]


class Goes(_Base, frozen=True, kw_only=True, tag="goes"):
    """The trusted function goes on, until the next breakpoint."""


class Ends(_Base, frozen=True, kw_only=True, tag="ends"):
    """The enclave's last words to this debugger."""

    reason: str


# ---- from the debugger --------------------------------------------------------------------------


class Line(_Base, frozen=True, kw_only=True, tag="line"):
    """One line of input, without its end; None: there are no more."""

    text: str | None


class Complete(_Base, frozen=True, kw_only=True, tag="complete"):
    """Ask how a word may go on; only while a line is waited for."""

    line: str
    begin: int  # of the word in the line
    end: int


Packet = Said | Asks | Choices | Goes | Ends | Line | Complete

_decoder = msgspec.msgpack.Decoder(Packet, strict=True)
_encoder = msgspec.msgpack.Encoder()


def encode(packet: Packet) -> bytes:
    """Encode *packet*; what is no Unicode text in it is escaped. Raises ValueError if too long."""
    try:
        data = _encoder.encode(packet)
    except UnicodeEncodeError:
        plain = {
            name: value.encode("utf-8", "backslashreplace").decode()
            for name, value in msgspec.structs.asdict(packet).items()
            if isinstance(value, str)
        }
        data = _encoder.encode(msgspec.structs.replace(packet, **plain))
    if len(data) > MAX_PACKET:
        raise ValueError(f"packet of {len(data)} bytes is longer than {MAX_PACKET}")
    return data


def decode(data: bytes) -> Packet:
    """
    Decode one packet.

    Raises:
        EnclaveStateError: The bytes are none.

    """
    if len(data) > MAX_PACKET:
        raise EnclaveStateError(
            "packet of a debugger is too long", expected=f"at most {MAX_PACKET}", found=len(data)
        )
    try:
        packet: Packet = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EnclaveStateError(f"malformed packet of a debugger: {error}") from None
    return packet
