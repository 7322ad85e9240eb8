"""
Control messages between host, platform and worker: bytes ↔ structs, no I/O.

Each message is one MessagePack map with a ``t`` member that names it. Descriptors travel beside
the bytes; which ones a message has is said at its class. Unknown members are refused, so that a
peer of another version fails loudly.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from pyenclave.errors import EnclaveStateError

__all__ = [
    "FORMAT_VERSION",
    "MAX_MESSAGE",
    "AskReserve",
    "Attach",
    "Attached",
    "Close",
    "Closed",
    "CounterRequest",
    "CounterValue",
    "EnclaveInfo",
    "Ending",
    "Failure",
    "Hello",
    "HelloReply",
    "Identity",
    "KeyReply",
    "KeyRequestMessage",
    "Kill",
    "Launch",
    "Launched",
    "List",
    "Listing",
    "Message",
    "Offer",
    "Ok",
    "Output",
    "Poisoned",
    "QuoteReply",
    "QuoteRequest",
    "Ready",
    "ReportReply",
    "ReportRequest",
    "Reserve",
    "Reserved",
    "Root",
    "RootReply",
    "Shut",
    "Soon",
    "Stop",
    "Take",
    "VerifyReport",
    "Why",
    "WhyReply",
    "Withdraw",
    "decode",
    "encode",
]

FORMAT_VERSION = 1
MAX_MESSAGE = 64 * 1024


class _Base(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", forbid_unknown_fields=True):
    pass


# ---- host → platform, and the answers ---------------------------------------------------------


class Hello(_Base, frozen=True, kw_only=True, tag="hello"):
    """First message of a host."""

    version: int = FORMAT_VERSION


class HelloReply(_Base, frozen=True, kw_only=True, tag="hello.ok"):
    """The platform's answer: who it is and at which level it works."""

    version: int
    instance: bytes  # 16 random bytes, new for each platform process
    level: str  # "embedded" or "service"
    ephemeral: bool  # the root lives in memory only
    pid: int


class Launch(_Base, frozen=True, kw_only=True, tag="launch"):
    """Start an enclave. Descriptors: image (write-sealed memfd), ring (size-sealed memfd)."""

    debug: bool | None = None  # None: production if signed, else debug
    require: tuple[str, ...] = ()  # protection bits without which the launch is refused
    allow_ephemeral: bool = False  # seal keys and counters although the root is in memory only


class Launched(_Base, frozen=True, kw_only=True, tag="launched"):
    """The enclave runs. Descriptor: pidfd of the worker."""

    enclave_id: bytes
    pid: int
    debug: bool
    mrenclave: bytes
    mrsigner: bytes
    record: bytes
    runtime_public_key: bytes
    starting: bool = False  # its on_start functions run; it serves calls when they have returned
    slot: int = -1  # Take: the offer whose ring it serves
    warm: bool = False  # the worker was ready before it was asked for


class Reserve(_Base, frozen=True, kw_only=True, tag="reserve"):
    """
    Name a kind of enclave to be kept warm. Descriptor: image. Answered by Reserved.

    A warm worker loaded the entry, closed itself in, was tried from outside and inside and made
    its runtime key; it has no identity.
    """

    debug: bool | None = None  # as in Launch, like the others
    require: tuple[str, ...] = ()
    allow_ephemeral: bool = False


class Offer(_Base, frozen=True, kw_only=True, tag="offer"):
    """
    Have one more worker kept warm. Descriptor: its ring. Answered by Reserved, at once.

    That answer comes with a descriptor: the worker's bell, an eventfd. Who takes the offer by its
    number rings it, so that the worker wakes up while the platform does.
    """

    reserve_id: bytes


class Withdraw(_Base, frozen=True, kw_only=True, tag="withdraw"):
    """End a warm worker that nobody needs, or all and the reserve; answered by Reserved."""

    reserve_id: bytes
    slot: int = -1  # -1: all


class AskReserve(_Base, frozen=True, kw_only=True, tag="reserve.ask"):
    """Ask how a reserve is; answered by Reserved."""

    reserve_id: bytes


class Reserved(_Base, frozen=True, kw_only=True, tag="reserve.ok"):
    """State of a reserve."""

    reserve_id: bytes  # 16 random bytes
    slots: tuple[int, ...]  # numbers of the offers that are open; the last offer's is the last
    ready: int  # how many of them have a warm worker that waits
    failures: int = 0  # in a row
    error: str = ""  # why the last one failed


class Take(_Base, frozen=True, kw_only=True, tag="take"):
    """
    Start an enclave of a reserve, on a ring that was offered. Answered by Launched.

    A warm worker gets its identity now; where none waits, one is started as for Launch. A host that
    names the offer may put its first call into that ring before it has the answer. Nobody reads it
    before that enclave has its identity, and no other enclave ever serves that ring.
    """

    reserve_id: bytes
    slot: int = -1  # the offer; -1: the oldest with a warm worker, else the oldest


class Close(_Base, frozen=True, kw_only=True, tag="close"):
    """End an enclave of this connection; answered by Ok when the worker is reaped."""

    enclave_id: bytes


class Why(_Base, frozen=True, kw_only=True, tag="why"):
    """Ask why an enclave of this connection ended."""

    enclave_id: bytes


class WhyReply(_Base, frozen=True, kw_only=True, tag="why.ok"):
    """State of an enclave: ``running``, ``closed``, ``lost`` or ``poisoned``, and the reason."""

    state: str
    reason: str
    type: str = ""  # class of the exception that an on_start function raised


class EnclaveInfo(_Base, frozen=True, kw_only=True, tag="enclave"):
    """One row of a listing."""

    enclave_id: bytes
    name: str
    pid: int
    host_pid: int
    debug: bool
    mrenclave: bytes
    started: float  # seconds since the epoch
    debugger: str = ""  # "attached", or "stopped": at a breakpoint, waiting for one
    round_trips: int = -1  # through its ring, modulo 2³², as the host's end has it; -1: unknown


class List(_Base, frozen=True, kw_only=True, tag="list"):
    """Ask for the running enclaves of this platform, in the order of their identities."""

    after: bytes = b""  # only those after this one


class Listing(_Base, frozen=True, kw_only=True, tag="list.ok"):
    """Running enclaves, as many as fit a message."""

    enclaves: tuple[EnclaveInfo, ...]
    more: bool = False  # ask again, after the last of these


class Kill(_Base, frozen=True, kw_only=True, tag="kill"):
    """End any enclave of this platform (the same user's)."""

    enclave_id: bytes


class Attach(_Base, frozen=True, kw_only=True, tag="attach"):
    """Debug any debug enclave of this platform (the same user's), until this connection ends."""

    enclave_id: bytes


class Attached(_Base, frozen=True, kw_only=True, tag="attached"):
    """
    The debugger is attached. Descriptor: a packet socket, see ``formats.debugging``.

    It is silent until the enclave stops at a breakpoint, and ends with the enclave.
    """


class Root(_Base, frozen=True, kw_only=True, tag="root"):
    """Ask for the platform's root certificate."""


class RootReply(_Base, frozen=True, kw_only=True, tag="root.ok"):
    """The platform's root certificate (DER) and whether it is ephemeral."""

    certificate: bytes
    ephemeral: bool


class Ok(_Base, frozen=True, kw_only=True, tag="ok"):
    """Done."""


class Failure(_Base, frozen=True, kw_only=True, tag="error"):
    """An error, by the stable code of its class."""

    code: str
    message: str
    files: tuple[str, ...] = ()  # RuntimeLockError: one line a file


# ---- worker → platform, and the answers -------------------------------------------------------


class Output(_Base, frozen=True, kw_only=True, tag="output"):
    """
    First message to a debug worker: where its output goes, and where it asks for a debugger.

    Descriptors: a pipe to write to, and a packet socket (``_platform/debugging.py``). A production
    worker gets none.
    """

    wait: float = 60.0  # seconds that its first breakpoint waits for a debugger


class Closed(_Base, frozen=True, kw_only=True, tag="closed"):
    """The worker's sandbox is closed; each bit was tried inside."""

    inside: dict[str, bool | int]
    secret_memory: str  # "memfd_secret", "locked" or "unlocked"


class Shut(_Base, frozen=True, kw_only=True, tag="shut"):
    """
    The sandbox is closed, so that the platform can try it from outside; Closed follows.

    It saves time: meanwhile the worker looks at what is mapped.
    """


class Identity(_Base, frozen=True, kw_only=True, tag="identity"):
    """
    What the worker is; sent only after the platform's own probes.

    From here on the worker serves calls; it does not answer.
    """

    enclave_id: bytes
    body: bytes  # 384-byte SGX report body; REPORTDATA zero
    debug: bool
    level: str
    record: bytes
    seed: bytes  # 32 bytes from the platform, mixed into the worker's generators


class Soon(_Base, frozen=True, kw_only=True, tag="soon"):
    """
    To a warm worker: wake up, an identity may follow. To a host that launches: wake up, the answer
    follows, most likely. It says nothing else.

    A worker that has just become warm gets one with a descriptor: its bell, an eventfd that its
    host may write to, which says the same.
    """


class Ready(_Base, frozen=True, kw_only=True, tag="ready"):
    """The worker made its runtime key and takes its identity, whenever that comes."""

    runtime_public_key: bytes
    starting: bool = False  # it has on_start functions, which run once it has its identity
    grace: float = 0.0  # seconds that its on_stop functions may take; 0: it has none


class Stop(_Base, frozen=True, kw_only=True, tag="stop"):
    """From the platform: run the on_stop functions and end. Sent once, and only if there are."""


class KeyRequestMessage(_Base, frozen=True, kw_only=True, tag="key"):
    """EGETKEY for this worker's identity: a 512-byte KEYREQUEST."""

    request: bytes


class KeyReply(_Base, frozen=True, kw_only=True, tag="key.ok"):
    """A 256-bit key."""

    key: bytes


class ReportRequest(_Base, frozen=True, kw_only=True, tag="report"):
    """EREPORT: a 512-byte TARGETINFO and 64 bytes of report data."""

    target: bytes
    data: bytes


class ReportReply(_Base, frozen=True, kw_only=True, tag="report.ok"):
    """A 432-byte REPORT."""

    report: bytes


class VerifyReport(_Base, frozen=True, kw_only=True, tag="report.verify"):
    """Check the MAC of a report that was made for this worker; answered by Ok or Failure."""

    report: bytes


class QuoteRequest(_Base, frozen=True, kw_only=True, tag="quote"):
    """A quote over 64 bytes of report data."""

    data: bytes


class QuoteReply(_Base, frozen=True, kw_only=True, tag="quote.ok"):
    """A DCAP v3 quote of the platform, and what the machine below it says (empty: nothing)."""

    quote: bytes
    machine: bytes = b""


class CounterRequest(_Base, frozen=True, kw_only=True, tag="counter"):
    """A monotonic counter of this enclave's signer and product."""

    operation: str  # "create", "read", "increment", "destroy"
    counter_id: bytes = b""  # 16 bytes; empty for create
    expected: int | None = None  # increment: refused unless this is the value
    mark: bytes = b""  # increment: 32 bytes of the blob that is committed; needs expected


class CounterValue(_Base, frozen=True, kw_only=True, tag="counter.ok"):
    """The counter's identity and value, and the mark of the blob committed with the value."""

    counter_id: bytes
    value: int
    mark: bytes = b""  # empty: no blob was committed with this value


class Poisoned(_Base, frozen=True, kw_only=True, tag="poisoned"):
    """Last words: the worker wiped its secrets and ends."""

    reason: str


class Ending(_Base, frozen=True, kw_only=True, tag="ending"):
    """Last words: the worker could not start (code and message as in Failure)."""

    code: str
    message: str
    files: tuple[str, ...] = ()
    type: str = ""  # class of the exception that an on_start function raised


Message = (
    Hello
    | HelloReply
    | Launch
    | Launched
    | Reserve
    | Reserved
    | AskReserve
    | Offer
    | Withdraw
    | Take
    | Close
    | Why
    | WhyReply
    | List
    | Listing
    | Kill
    | Attach
    | Attached
    | Root
    | RootReply
    | Ok
    | Failure
    | Output
    | Shut
    | Closed
    | Identity
    | Stop
    | Soon
    | Ready
    | KeyRequestMessage
    | KeyReply
    | ReportRequest
    | ReportReply
    | VerifyReport
    | QuoteRequest
    | QuoteReply
    | CounterRequest
    | CounterValue
    | Poisoned
    | Ending
)

T = TypeVar("T", bound=_Base)

_decoder = msgspec.msgpack.Decoder(Message, strict=True)
_encoder = msgspec.msgpack.Encoder()


def encode(message: _Base) -> bytes:
    """Encode *message*. Raises ValueError if it is longer than MAX_MESSAGE."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"message of {len(data)} bytes is longer than {MAX_MESSAGE}")
    return data


def decode(data: bytes) -> Message:
    """
    Decode one message.

    Raises:
        EnclaveStateError: The bytes are not a known message.

    """
    if len(data) > MAX_MESSAGE:
        raise EnclaveStateError(
            "control message is too long", expected=f"at most {MAX_MESSAGE}", found=len(data)
        )
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EnclaveStateError(f"malformed control message: {error}") from None
    return message
