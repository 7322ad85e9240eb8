"""The client: commands of a TPM, each with what it answers, read strictly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from pyenclave._locks import Lock
from pyenclave.errors import EvidenceFormatError, TpmError
from pyenclave.formats import tpm_wire as wire
from pyenclave.formats.tpm import HASHES, PcrSelection, TpmPublic, TpmQuote, TpmSignature
from pyenclave.formats.tpm_wire import NvPublic
from pyenclave.tpm.transport import DEFAULT_DEVICE, Transport, connect, lock_file

try:
    import fcntl
except ImportError:  # pragma: no cover - not on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["OWNER", "Quoted", "Tpm"]

OWNER: Final = 0x40000001  # TPM_RH_OWNER
_NULL_SCHEME: Final = b"\x00\x10"  # TPM_ALG_NULL: the key's own

_NV_UNDEFINE: Final = 0x122
_NV_DEFINE: Final = 0x12A
_NV_INCREMENT: Final = 0x134
_NV_WRITE: Final = 0x137
_NV_READ: Final = 0x14E
_QUOTE: Final = 0x158
_NV_READ_PUBLIC: Final = 0x169
_READ_PUBLIC: Final = 0x173
_GET_CAPABILITY: Final = 0x17A
_PCR_READ: Final = 0x17E

_CAP_PROPERTIES: Final = 6
_PT_NV_BUFFER_MAX: Final = 0x12C
_MAX_CHUNK: Final = 1024  # bytes of NV in one command; the largest that any TPM takes
_MAX_NV: Final = 1 << 16
_COUNTER_SIZE: Final = 8
_MAX_EXTRA: Final = 66  # bytes of a TPM2B_DATA: an algorithm and its longest digest
_MAX_PCR_READS: Final = 64
_PAUSE: Final = 0.02  # seconds before a command is sent again; doubled each time, up to a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Quoted:
    """
    What a TPM quoted.

    Attributes:
        message: The TPMS_ATTEST, byte by byte: what is signed.
        signature: The TPMT_SIGNATURE, byte by byte.
        attest: The message, read.
    """

    message: bytes
    signature: bytes
    attest: TpmQuote


class Tpm:
    """
    A TPM 2.0. Threads may share it: commands go one after the other.

    Args:
        transport: The way to it; closed with this.
        timeout: Seconds for one command, retries included.
        attempts: How often a command is sent that the TPM is too busy for.
        sleep: Waits so many seconds.
        clock: Seconds, from any start.

    """

    def __init__(
        self,
        transport: Transport,
        *,
        timeout: float = 30.0,
        attempts: int = 10,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not timeout > 0 or attempts < 1:
            raise ValueError("timeout is positive, attempts at least 1")
        self._transport = transport
        self._timeout = timeout
        self._attempts = attempts
        self._sleep = sleep
        self._clock = clock
        self._mutex = Lock()
        self._chunk = 0

    @classmethod
    def open(cls, address: str = DEFAULT_DEVICE, *, timeout: float = 30.0) -> Self:
        """
        Open a TPM; see `connect` for the forms of *address*.

        Raises:
            TpmError: It cannot be opened.
            ValueError: An address of no known form.

        """
        return cls(connect(address, timeout=timeout), timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; may be called twice."""
        self._transport.close()

    @property
    def fileno(self) -> int | None:
        """The descriptor of a device file, which processes may lock; None of anything else."""
        return self._transport.fileno

    def run(
        self,
        code: int,
        handles: Sequence[int] = (),
        parameters: bytes = b"",
        *,
        passwords: Sequence[bytes] = (),
        answered_handles: int = 0,
    ) -> wire.Parameters:
        """
        Run any command and return what it answers.

        Args:
            code: TPM_CC.
            handles: Its handles; those with authorisation first.
            parameters: Its parameters, marshalled.
            passwords: The authorisation values, one a handle that needs one.
            answered_handles: How many handles the answer has.

        Raises:
            TpmError: The TPM refused, was busy for too long, or answered wrongly.
            ValueError: The command is too long.

        """
        data = wire.command(code, handles, parameters, passwords=passwords)
        deadline = self._clock() + self._timeout
        pause = _PAUSE
        busy = TpmError("no time was left")
        for attempt in range(self._attempts):
            left = deadline - self._clock()
            if left <= 0:
                break
            with self._mutex:
                answer = self._transport.exchange(data, left)
            try:
                return wire.parameters(answer, sessions=len(passwords), handles=answered_handles)
            except TpmError as error:
                if error.rc not in wire.RETRIED:
                    raise
                busy = error
            if attempt + 1 < self._attempts:
                self._sleep(min(pause, max(0.0, deadline - self._clock())))
                pause = min(2 * pause, 1.0)
        raise TpmError(
            f"the TPM was busy for too long: {busy.message}",
            rc=busy.rc,
            expected=f"an answer after at most {self._attempts} attempts",
        )

    @contextlib.contextmanager
    def exclusive(self, timeout: float | None = None) -> Iterator[None]:
        """
        Keep out others who ask so, for several commands that belong together.

        It is a lock of the device file, which ends with the process. Behind a socket there is
        none: swtpm serves one client at a time.

        Args:
            timeout: Seconds for which others are waited for; default that of the commands.

        Raises:
            TpmError: Somebody else kept it for longer.

        """
        fd = self._transport.fileno
        if fd is None or fcntl is None:
            yield
            return
        lock_file(fd, self._timeout if timeout is None else timeout)
        try:
            yield
        finally:
            # It may have been closed meanwhile, and the lock with it.
            if self._transport.fileno == fd:
                fcntl.flock(fd, fcntl.LOCK_UN)

    def raw(self, command: bytes) -> bytes:
        """
        Pass a command on as it is, and return the whole answer as it is.

        Raises:
            TpmError: There is no answer.

        """
        with self._mutex:
            return self._transport.exchange(command, self._timeout)

    # ---- NV indices ---------------------------------------------------------------------------

    def nv_public(self, index: int) -> NvPublic:
        """
        Return what is known of an NV index.

        Raises:
            TpmError: There is no such index (``rc`` is ``RC_HANDLE``), or as for `run`.

        """
        found = NvPublic.from_parameters(self.run(_NV_READ_PUBLIC, (index,)))
        if found.index != index:
            raise TpmError(
                "the TPM answers for another NV index", expected=f"{index:#x}", found=found.index
            )
        return found

    def nv_exists(self, index: int) -> bool:
        """Return whether there is such an NV index. Raises as :meth:`run`."""
        try:
            self.nv_public(index)
        except TpmError as error:
            if error.rc == wire.RC_HANDLE:
                return False
            raise
        return True

    def nv_read(self, index: int, *, password: bytes = b"") -> bytes:
        """
        Read the whole of an NV index, in pieces of at most 1,024 bytes.

        Args:
            index: Its handle.
            password: Of the owner, or of the index where the owner may not read it.

        Raises:
            TpmError: Not there, never written, not readable with a password, or as for `run`.

        """
        public = self.nv_public(index)
        if public.attributes & wire.NV_OWNERREAD:
            authority = OWNER
        elif public.attributes & wire.NV_AUTHREAD:
            authority = index
        else:
            raise TpmError(
                f"NV index {index:#x} cannot be read with a password",
                expected="the attribute ownerread or authread",
                found=f"{public.attributes:#x}",
            )
        data = b""
        while len(data) < public.size:
            size = min(self._chunk_size(), public.size - len(data))
            place = size.to_bytes(2, "big") + len(data).to_bytes(2, "big")
            answer = self.run(_NV_READ, (authority, index), place, passwords=(password,))
            part = answer.sized("NV data", size)
            answer.end()
            if len(part) != size:
                raise TpmError(
                    f"NV index {index:#x}: the TPM gave another number of bytes",
                    expected=size,
                    found=len(part),
                )
            data += part
        return data

    def nv_define(
        self,
        index: int,
        size: int,
        attributes: int = wire.NV_OWNERREAD | wire.NV_OWNERWRITE,
        *,
        password: bytes = b"",
        owner_password: bytes = b"",
    ) -> None:
        """
        Define an NV index, with SHA-256 as the hash of its name.

        Args:
            index: Its handle, 0x01000000 to 0x01FFFFFF.
            size: Bytes of data; 8 for a counter.
            attributes: TPMA_NV.
            password: The index's own authorisation value.
            owner_password: The owner's.

        Raises:
            TpmError: It exists already (``RC_NV_DEFINED``), no room, or as for `run`.
            ValueError: An impossible index or size.

        """
        if not 0x01000000 <= index <= 0x01FFFFFF:
            raise ValueError(f"an NV index is 0x01000000 to 0x01FFFFFF, not {index:#x}")
        if not 0 <= size < _MAX_NV:
            raise ValueError(f"an NV index has 0 to {_MAX_NV - 1} bytes, not {size}")
        public = NvPublic(index=index, attributes=attributes, size=size).to_bytes()
        body = wire.sized(password) + wire.sized(public)
        self.run(_NV_DEFINE, (OWNER,), body, passwords=(owner_password,)).end()

    def nv_undefine(self, index: int, *, owner_password: bytes = b"") -> None:
        """Remove an NV index. Raises `TpmError` as :meth:`run`."""
        self.run(_NV_UNDEFINE, (OWNER, index), passwords=(owner_password,)).end()

    def nv_write(
        self, index: int, data: bytes, *, offset: int = 0, password: bytes = b"", by: int = OWNER
    ) -> None:
        """
        Write into an NV index.

        Args:
            index: Its handle.
            data: What to write; in pieces, if it is longer than the TPM takes at once.
            offset: Where.
            password: Of *by*.
            by: Who writes: the owner, or the index itself.

        Raises:
            TpmError: As for `run`. Of several pieces some may be written then.
            ValueError: Beyond 65,535 bytes.

        """
        if offset < 0 or offset + len(data) >= _MAX_NV:
            raise ValueError(f"an NV index has at most {_MAX_NV - 1} bytes")
        step = self._chunk_size()
        for start in range(0, max(len(data), 1), step):
            body = wire.sized(data[start : start + step]) + (offset + start).to_bytes(2, "big")
            self.run(_NV_WRITE, (by, index), body, passwords=(password,)).end()

    def nv_increment(self, index: int, *, password: bytes = b"", by: int = OWNER) -> None:
        """
        Add one to an NV counter, durably.

        The first increment sets a new counter to one more than any counter that this TPM ever had:
        removing a counter and making it again takes nothing back (part 3, 31.8).

        Raises:
            TpmError: No counter (``TPM_RC_ATTRIBUTES``), or as for `run`.

        """
        self.run(_NV_INCREMENT, (by, index), passwords=(password,)).end()

    def nv_counter(self, index: int, *, password: bytes = b"") -> int:
        """
        Return the value of an NV counter.

        Raises:
            TpmError: No counter, never incremented, or as for `run`.

        """
        public = self.nv_public(index)
        if not public.is_counter or public.size != _COUNTER_SIZE:
            raise TpmError(f"NV index {index:#x} is no counter", found=f"{public.attributes:#x}")
        return int.from_bytes(self.nv_read(index, password=password), "big")

    def _chunk_size(self) -> int:
        """Return how many bytes of NV this TPM takes or gives at once."""
        if not self._chunk:
            body = b"".join(n.to_bytes(4, "big") for n in (_CAP_PROPERTIES, _PT_NV_BUFFER_MAX, 1))
            answer = self.run(_GET_CAPABILITY, (), body)
            answer.number(1, "whether there is more")
            kind, count = answer.number(4, "kind of capability"), answer.number(4, "count")
            found = _MAX_CHUNK
            if (kind, count) == (_CAP_PROPERTIES, 1):
                name, value = answer.number(4, "property"), answer.number(4, "value")
                if name == _PT_NV_BUFFER_MAX:  # else the TPM has none, and named the next one
                    found = value
            self._chunk = max(1, min(found, _MAX_CHUNK))
        return self._chunk

    # ---- keys, PCRs, quotes -------------------------------------------------------------------

    def read_public(self, handle: int) -> TpmPublic:
        """
        Return the public part of a loaded or persistent key.

        Raises:
            TpmError: There is no such key, or the answer is no public part of an RSA or ECC key.

        """
        answer = self.run(_READ_PUBLIC, (handle,))
        area = answer.sized("public area", 1024)
        name = answer.sized("name of the key", _MAX_EXTRA)
        answer.sized("qualified name", _MAX_EXTRA)
        answer.end()
        try:
            public = TpmPublic.from_bytes(area)
        except EvidenceFormatError as error:
            raise TpmError(f"key {handle:#x}: {error}") from None
        if public.name != name:
            raise TpmError("the name of a key is wrong", expected=public.name.hex(), found=name)
        return public

    def quote(
        self,
        key: int,
        nonce: bytes,
        pcrs: Sequence[PcrSelection],
        *,
        password: bytes = b"",
    ) -> Quoted:
        """
        Have PCRs quoted with the key's own signing scheme.

        Args:
            key: Handle of a restricted signing key.
            nonce: Becomes ``extraData``; up to 64 bytes where the TPM has SHA-512, else fewer.
            pcrs: Which PCRs.
            password: The key's.

        Raises:
            TpmError: As for `run`; or what was quoted is another nonce or other PCRs.
            ValueError: The nonce is longer than any TPM takes.

        """
        if len(nonce) > _MAX_EXTRA:
            raise ValueError(f"a TPM quotes a nonce of at most 64 bytes, not {len(nonce)}")
        body = wire.sized(nonce) + _NULL_SCHEME + _selection(pcrs)
        answer = self.run(_QUOTE, (key,), body, passwords=(password,))
        message = answer.sized("TPMS_ATTEST", 2048)
        signature = answer.rest()
        try:
            attest = TpmQuote.from_bytes(message)
            TpmSignature.from_bytes(signature)
        except EvidenceFormatError as error:
            raise TpmError(f"quote of key {key:#x}: {error}") from None
        if attest.extra_data != nonce:
            raise TpmError(
                "the TPM quoted another nonce", expected=nonce.hex(), found=attest.extra_data.hex()
            )
        wanted = {item.bank: item.indices for item in pcrs}
        if {item.bank: item.indices for item in attest.selections} != wanted:
            raise TpmError("the TPM quoted other PCRs", expected=wanted, found=attest.selections)
        return Quoted(message=message, signature=signature, attest=attest)

    def pcr_read(self, pcrs: Sequence[PcrSelection]) -> Mapping[str, Mapping[int, bytes]]:
        """
        Read PCRs; a TPM gives eight at a time, so it is asked again for the rest.

        Returns:
            Values by bank and index.

        Raises:
            TpmError: A bank that the TPM has not, PCRs that change all the time, or as for `run`.

        """
        left = {item.bank: set(item.indices) for item in pcrs}
        found: dict[str, dict[int, bytes]] = {bank: {} for bank in left}
        counter: int | None = None
        for _ in range(_MAX_PCR_READS):
            asked = [PcrSelection(bank, tuple(sorted(rest))) for bank, rest in left.items() if rest]
            if not asked:
                return found
            answer = self.run(_PCR_READ, (), _selection(asked))
            updates = answer.number(4, "update counter")
            if updates != counter and counter is not None:
                left = {item.bank: set(item.indices) for item in pcrs}  # one moment for all
                found = {bank: {} for bank in left}
                counter = None
                continue
            counter = updates
            given = _read_selection(answer)
            values = [
                answer.sized("PCR", 64) for _ in range(_count(answer, "number of PCR values", 8))
            ]
            answer.end()
            places = [(bank, index) for bank, indices in given for index in indices]
            if len(values) != len(places) or not places:
                raise TpmError(
                    "PCRs cannot be read",
                    expected=f"values of {', '.join(item.bank for item in asked)}",
                    found=f"{len(values)} values of {len(places)} PCRs",
                    advice="The TPM may have no such bank.",
                )
            for (bank, index), value in zip(places, values, strict=True):
                if index not in left.get(bank, ()):
                    raise TpmError("the TPM gives a PCR that was not asked for", found=index)
                left[bank].discard(index)
                found[bank][index] = value
        raise TpmError("PCRs change faster than they can be read")


def _selection(pcrs: Sequence[PcrSelection]) -> bytes:
    return len(pcrs).to_bytes(4, "big") + b"".join(item.to_bytes() for item in pcrs)


def _count(answer: wire.Parameters, name: str, limit: int) -> int:
    count = answer.number(4, name)
    if count > limit:
        raise TpmError(f"answer of the TPM: {name}", expected=f"at most {limit}", found=count)
    return count


def _read_selection(answer: wire.Parameters) -> list[tuple[str, list[int]]]:
    found = []
    for _ in range(_count(answer, "number of banks", 16)):
        hash_id, size = answer.number(2, "bank"), answer.number(1, "size of a selection")
        bits = int.from_bytes(answer.take(size, "selection"), "little")
        bank = HASHES.get(hash_id, "")
        found.append((bank, [index for index in range(8 * size) if bits >> index & 1]))
    return found
