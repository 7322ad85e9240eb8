"""
The running enclave, seen from inside: its identity, its runtime key and its line to the platform.

The worker calls `start` once, after the sandbox is closed; trusted code uses the public functions
of `pyenclave.trusted`, which ask `current`.
"""

from __future__ import annotations

import functools
import os
import select
import struct
import threading
from typing import Any, TypeVar

from pyenclave import errors
from pyenclave._core import SecretMemory, sha256
from pyenclave.calls.channel import Channel, close_all
from pyenclave.errors import EnclaveLostError, EnclaveStateError, SealingError
from pyenclave.formats import evidence as evidence_format
from pyenclave.formats import messages
from pyenclave.formats.image import ImageInfo
from pyenclave.formats.sgx import ReportBody
from pyenclave.sealed import policy
from pyenclave.sealed.blob import SealingIdentity
from pyenclave.sealed.policy import SealPolicy
from pyenclave.sealed.provision import RuntimeKey
from pyenclave.trusted import _state
from pyenclave.trusted._state import EnclaveIdentity, current

__all__ = ["SECRET_SIZE", "EnclaveIdentity", "Runtime", "current", "start", "stop"]

SECRET_SIZE = 32  # bytes of the launch secret

_TIMEOUT = 30.0  # seconds; the platform answers in milliseconds or is broken
_REPORT_BODY = 384
_ATTRIBUTE_DEBUG = 0x02  # notes on SGX structures, 2.1

Reply = TypeVar("Reply", bound=messages.Message)


def _error(failure: messages.Failure) -> errors.EnclaveError:
    kind = errors.by_code().get(failure.code, EnclaveStateError)
    return kind(failure.message)


class Runtime:
    """
    The enclave's side of its own socket to the platform. Thread-safe.

    Args:
        channel: The worker's inherited channel; the runtime owns exchanges on it from now on.
        identity: The platform's word on what this worker is.
        info: The measured description of the image.
        memory: Secret memory of SECRET_SIZE bytes for the launch secret, now the runtime's; made
            here if None.
        key: The key that was made for this launch; made here if None.

    Raises:
        EnclaveStateError: The identity is malformed.

    """

    def __init__(
        self,
        channel: Channel,
        identity: messages.Identity,
        info: ImageInfo | None,
        memory: SecretMemory | None = None,
        key: RuntimeKey | None = None,
    ) -> None:
        body = identity.body
        if len(body) != _REPORT_BODY or len(identity.seed) != 32:
            raise EnclaveStateError("the platform's identity message is malformed")
        if bool(body[48] & _ATTRIBUTE_DEBUG) != identity.debug:
            raise EnclaveStateError("the platform's identity message contradicts itself")
        self.body = body
        self.record = identity.record
        self._told = identity
        self._info = info
        # Two sources: whoever knows only the platform's or only the worker's randomness is lost.
        self._memory = SecretMemory(SECRET_SIZE) if memory is None else memory
        self._memory.write(0, sha256(b"pyenclave/launch-secret/1" + identity.seed + os.urandom(32)))
        self.key = RuntimeKey() if key is None else key
        self._channel = channel
        self._lock = threading.Lock()
        self._user_data = b""
        self.released: Any = None  # keys that a vault released, and what has them released
        self._stop: list[bool] = []  # not empty: the platform asked this enclave to end

    # What follows is worked out when it is first asked for: an enclave that a host waits for needs
    # none of it to begin.

    @functools.cached_property
    def identity(self) -> EnclaveIdentity:
        """What this enclave is."""
        body, told, info = self.body, self._told, self._info
        product_id, security_version = struct.unpack_from("<HH", body, 256)
        return EnclaveIdentity(
            enclave_id=told.enclave_id,
            mrenclave=body[64:96],
            mrsigner=body[128:160],
            product_id=product_id,
            security_version=security_version,
            debug=told.debug,
            level=told.level,
            platform_svn=struct.unpack_from("<H", body)[0],
            name=info.name if info is not None else "",
        )

    @functools.cached_property
    def sealing(self) -> SealingIdentity:
        """The same, as sealing takes it."""
        body = self.body
        product_id, security_version = struct.unpack_from("<HH", body, 256)
        return SealingIdentity(
            mrenclave=body[64:96],
            mrsigner=body[128:160],
            product_id=product_id,
            security_version=security_version,
            cpu_svn=body[:16],
            debug=self._told.debug,
        )

    @functools.cached_property
    def target_info(self) -> bytes:
        """TARGETINFO of this enclave (notes on SGX structures, 2.3)."""
        body = self.body
        (config_svn,) = struct.unpack_from("<H", body, 260)
        return (
            body[64:96]
            + body[48:64]
            + struct.pack("<2xH", config_svn)
            + body[16:20]
            + bytes(8)
            + body[192:256]
            + bytes(384)
        )

    @property
    def secret(self) -> bytes:
        """The launch secret: it hedges randomness, and no key derives from it alone."""
        return self._memory.read(0, SECRET_SIZE)

    @property
    def sealed_memory(self) -> int:
        """Limit of plaintext in sealed arrays, in bytes; 0: the image asks for none."""
        return self._info.sealed_memory if self._info is not None else 0

    @property
    def message_limit(self) -> int:
        """Bytes of the longest message that crosses."""
        return self._info.message_limit if self._info is not None else 1 << 20

    @property
    def files(self) -> tuple[str, ...]:
        """Names of sealed files that the image may be lent."""
        return tuple(self._info.seal.get("files", ())) if self._info is not None else ()

    @property
    def release(self) -> dict[str, str]:
        """The image's `[release]` table: addresses, and the authorities' certificates."""
        return dict(self._info.release or {}) if self._info is not None else {}

    @functools.cached_property
    def default_policy(self) -> SealPolicy:
        """The image's `[seal]` policy; an unsigned image has no signer to seal to."""
        info = self._info
        named = info.seal.get("policy", "signer") if info is not None else "signer"
        if named == "signer" and not any(self.identity.mrsigner):
            return SealPolicy.unique
        return SealPolicy[named]

    def request(self, message: messages.Message, kind: type[Reply]) -> Reply:
        """
        Exchange one message with the platform.

        Raises:
            EnclaveError: What the platform answers instead, by its code.
            EnclaveLostError: The platform is gone or does not answer; the line is closed then.

        """
        with self._lock:
            try:
                self._channel.send(message)
                reply, fds = self._channel.receive(_TIMEOUT)
                if isinstance(reply, messages.Stop):  # it may come at any time, once
                    self._stop.append(True)
                    close_all(fds)
                    reply, fds = self._channel.receive(_TIMEOUT)
            except TimeoutError:
                # A late answer would be taken for the next question's.
                self._channel.close()
                raise EnclaveLostError("the platform does not answer") from None
            except (OSError, ValueError) as error:
                raise EnclaveLostError(f"the platform's line is closed: {error}") from None
        close_all(fds)
        if isinstance(reply, messages.Failure):
            raise _error(reply)
        if not isinstance(reply, kind):
            raise EnclaveStateError(
                "unexpected answer of the platform",
                expected=kind.__name__,
                found=type(reply).__name__,
            )
        return reply

    def wait_for_stop(self) -> bool:
        """
        Wait until the platform asks this enclave to end.

        Returns:
            Whether it asked; else it is gone, or said something that it may not.

        """
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        while not self._stop:
            poll.poll()
            # What came may be the answer to a request: whoever asked holds the lock and takes it.
            with self._lock:
                if self._stop or not poll.poll(0):
                    continue
                try:
                    message, fds = self._channel.receive(_TIMEOUT)
                except (EnclaveStateError, OSError, ValueError):
                    return False
                close_all(fds)
                if not isinstance(message, messages.Stop):
                    return False
                self._stop.append(True)
        return True

    def derive_key(self, request: bytes) -> bytes:
        """Answer a 512-byte KEYREQUEST with the platform's 32-byte key."""
        key = self.request(messages.KeyRequestMessage(request=request), messages.KeyReply).key
        if len(key) != 32:
            raise SealingError("the platform's key has the wrong size", expected=32)
        return key

    def set_user_data(self, data: bytes) -> None:
        """Put *data* into all evidence from now on."""
        if len(data) > evidence_format.MAX_USER_DATA:
            raise ValueError(
                f"user data of {len(data)} bytes is longer than {evidence_format.MAX_USER_DATA}"
            )
        self._user_data = data

    def attest(self, nonce: bytes) -> bytes:
        """Return bound evidence for *nonce* (the relying party's; may be empty)."""
        if len(nonce) > evidence_format.MAX_NONCE:
            raise errors.ArgumentError(
                "the nonce is too long",
                expected=f"at most {evidence_format.MAX_NONCE} bytes",
                found=len(nonce),
            )
        user_data, runtime_key = self._user_data, self.key.public
        data = evidence_format.bound_report_data(
            nonce=nonce, runtime_key=runtime_key, user_data=user_data
        )
        reply = self._quote(data)
        return evidence_format.Evidence(
            quote=reply.quote,
            record=self.record,
            runtime_key=runtime_key,
            user_data=user_data,
            nonce=nonce,
            machine=reply.machine or None,
        ).to_bytes()

    def attest_raw(self, report_data: bytes) -> bytes:
        """Return raw evidence over 64 bytes that trusted code chose."""
        reply = self._quote(report_data)
        return evidence_format.Evidence(
            quote=reply.quote, record=self.record, machine=reply.machine or None
        ).to_bytes()

    def _quote(self, report_data: bytes) -> messages.QuoteReply:
        """Return a quote over 64 bytes of report data, with the word of the machine below."""
        if len(report_data) != 64:
            raise ValueError(f"report data has 64 bytes, not {len(report_data)}")
        return self.request(messages.QuoteRequest(data=report_data), messages.QuoteReply)

    def report(self, target_info: bytes, data: bytes) -> bytes:
        """Return a 432-byte REPORT for the enclave that *target_info* (512 bytes) names."""
        if len(target_info) != 512:
            raise ValueError(f"TARGETINFO has 512 bytes, not {len(target_info)}")
        if len(data) > 64:
            raise ValueError(f"report data has at most 64 bytes, not {len(data)}")
        padded = data + bytes(64 - len(data))
        message = messages.ReportRequest(target=target_info, data=padded)
        return self.request(message, messages.ReportReply).report

    def verify_report(self, report: bytes) -> ReportBody:
        """Return the body of a REPORT that was made for this enclave, MAC checked."""
        if len(report) != 432:
            raise errors.EvidenceFormatError(
                "a report has another size", expected=432, found=len(report)
            )
        self.request(messages.VerifyReport(report=report), messages.Ok)
        return ReportBody.from_bytes(report[:_REPORT_BODY])

    def counter(
        self,
        operation: str,
        counter_id: bytes = b"",
        expected: int | None = None,
        mark: bytes = b"",
    ) -> messages.CounterValue:
        """Do one operation on a monotonic counter of this enclave's signer and product."""
        message = messages.CounterRequest(
            operation=operation, counter_id=counter_id, expected=expected, mark=mark
        )
        return self.request(message, messages.CounterValue)

    def receive(self, ciphertext: bytes, info: bytes) -> bytes:
        """Open a secret that a relying party encrypted to this launch."""
        context = evidence_format.provision_info(
            report_body=self.body, runtime_key=self.key.public, info=info
        )
        return self.key.decrypt(ciphertext, info=context)

    def wipe(self) -> None:
        """
        Drop the runtime key, the launch secret and released keys.

        The line to the platform stays open: the worker still tells why it ends.
        """
        self.key.wipe()
        self._memory.close()
        if self.released is not None:
            self.released.close()

    def __repr__(self) -> str:
        return f"Runtime({self.identity!r})"

    def __reduce__(self) -> str:
        raise TypeError("the runtime of an enclave cannot be pickled")


def start(
    channel: Channel,
    identity: messages.Identity,
    info: ImageInfo,
    memory: SecretMemory | None = None,
    key: RuntimeKey | None = None,
) -> bytes:
    """
    Begin the enclave's life inside this process.

    Args:
        channel: As for ``Runtime``, like the others.
        identity: What this worker is.
        info: The image.
        memory: For the launch secret.
        key: The runtime key.

    Returns:
        The runtime public key, 1,216 bytes.

    Raises:
        EnclaveStateError: It was started before, or *identity* is malformed.

    """
    if _state.runtime is not None:
        raise EnclaveStateError("this process is an enclave already")
    _state.runtime = Runtime(channel, identity, info, memory, key)
    policy.opener = _open_sealed
    return _state.runtime.key.public


def stop() -> None:
    """Wipe the runtime; the process is no enclave any more. May be called twice."""
    if _state.runtime is not None:
        _state.runtime.wipe()
        _state.runtime = None
        policy.opener = None


def _open_sealed(*arguments: Any, **options: Any) -> Any:
    from pyenclave.trusted._files import open_sealed

    return open_sealed(*arguments, **options)
