"""
Launching: from two untrusted descriptors to a running enclave with an identity.

The order is that of the design (section 3): parse, verify, judge, spawn, wait until the worker
has closed itself in, probe it from outside, sign what was found, and only then give it an identity.
Whatever fails on the way ends the worker and gives every descriptor back.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeVar, cast

import msgspec

from pyenclave import _native
from pyenclave._platform.held import HeldImages
from pyenclave._platform.keys import attributes, cpu_svn
from pyenclave._platform.policy import LaunchPolicy, load_policy
from pyenclave._platform.probe import (
    OUTSIDE,
    check_memfd,
    has_ended,
    probe_worker,
    refuse_unless_held,
)
from pyenclave._platform.root import PLATFORM_SVN, PlatformRoot
from pyenclave._platform.service import Attendant, Enclave, Facts, kill_and_wait
from pyenclave._platform.state import State
from pyenclave._platform.wire import raise_failure
from pyenclave.calls.channel import Channel, close_all
from pyenclave.errors import (
    EnclaveError,
    EnclaveLostError,
    EnclavePoisonedError,
    LaunchError,
    LaunchRefusedError,
)
from pyenclave.formats import messages
from pyenclave.formats.image import MAX_IMAGE, Image, ImageInfo
from pyenclave.formats.record import ProtectionBit, ProtectionRecord
from pyenclave.formats.sgx import ReportBody
from pyenclave.measurement.image import SignedIdentity, verify_image

__all__ = ["Launcher", "WorkerFactory", "ZygoteFactory"]

_MAX_RING: Final = 1 << 32
_CLOSED_TIMEOUT: Final = 30.0  # seconds: imports of the entry count
_RUNNING_TIMEOUT: Final = 15.0
_SEND_TIMEOUT: Final = 5.0
_MAX_GRACE: Final = 5.0  # of on_stop functions: whoever closes waits for them
_SLICE: Final = 0.1
_CACHED_IMAGES: Final = 16
_BIT_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_MAX_INSIDE: Final = 32
_BEST_MEMORY: Final = "memfd_secret"
_Message = TypeVar("_Message", bound=msgspec.Struct)


class SpawnedWorker(Protocol):
    """What a zygote returns: a new worker."""

    @property
    def pid(self) -> int:
        """Its number in the platform's pid namespace."""

    @property
    def pidfd(self) -> int:
        """Its pidfd, the caller's."""


class WorkerFactory(Protocol):
    """A zygote."""

    @property
    def alive(self) -> bool:
        """Whether its process runs."""

    def spawn(
        self, *, image_fd: int, ring_fd: int, channel_fd: int, debug: bool, image: bytes = b""
    ) -> SpawnedWorker:
        """Start a worker; the descriptors stay the caller's. *image* is the image's SHA-256."""


class ZygoteFactory(Protocol):
    """The zygotes of a platform."""

    def get(self, lock_bytes: bytes, *, debug: bool) -> WorkerFactory:
        """Return the zygote of a lock list, starting it if need be."""

    def ready(self, lock_bytes: bytes, *, debug: bool) -> bool:
        """Whether ``get`` and then ``spawn`` return at once, as far as is known."""

    def close(self) -> None:
        """End all zygotes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What is kept of an image whose bytes were once parsed and verified."""

    info: ImageInfo
    lock_bytes: bytes
    identity: SignedIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A record that was signed before anything was found, and may never be used."""

    signed: bytes
    signature: bytes


class Launcher:
    """
    Starts enclaves. Thread-safe: hosts launch at the same time.

    Args:
        root: The platform's keys.
        zygotes: Where workers come from.
        state: The state directory, for the policy.

    """

    def __init__(self, root: PlatformRoot, zygotes: ZygoteFactory, state: State) -> None:
        self._root = root
        self._zygotes = zygotes
        self._state = state
        self._mutex = threading.Lock()
        self._images: OrderedDict[bytes, _Judged] = OrderedDict()
        self._last_bits: dict[str, ProtectionBit] = {}

    def launch(
        self,
        request: messages.Launch,
        image_fd: int,
        ring_fd: int,
        *,
        host_pid: int,
        wanted: Callable[[], bool],
        slow: Callable[[], None],
        held: HeldImages,
    ) -> Enclave:
        """
        Start one enclave.

        Args:
            request: The host's wishes.
            image_fd: The image; stays the caller's.
            ring_fd: The ring; stays the caller's.
            host_pid: For listings.
            wanted: Whether the host is still there; asked while a worker is waited for.
            slow: Called before this waits for a zygote without asking *wanted*.
            held: The images that this host launched last.

        Raises:
            ArgumentError: A descriptor is not what it must be.
            ImageError: The image, its signature or the runtime's lock is refused.
            LaunchError: It is refused (LaunchRefusedError) or could not be started.

        """
        size = check_memfd(image_fd, "image", seals=_native.SEALED, limit=MAX_IMAGE)
        check_memfd(ring_fd, "ring", seals=_native.RING_SEALS, limit=_MAX_RING)
        judged, digest = self._judge_image(image_fd, size, held)
        policy = load_policy(self._state)
        debug = _choose_debug(request, judged)
        identity = judged.identity
        policy.judge(
            mrsigner=identity.mrsigner,
            product_id=identity.product_id,
            security_version=identity.security_version,
            debug=debug,
        )
        platform_end, worker_end = Channel.pair()
        try:
            with worker_end:
                spawned = self._spawn(
                    judged.lock_bytes,
                    image_fd,
                    digest,
                    ring_fd,
                    worker_end.fileno(),
                    debug=debug,
                    slow=slow,
                )
            attendant = None
            try:
                attendant = Attendant()
                facts = self._introduce(
                    judged, policy, request, platform_end, spawned, debug=debug, wanted=wanted
                )
                held.add(image_fd, digest, size)
                return Enclave(
                    facts,
                    pidfd=spawned.pidfd,
                    channel=platform_end,
                    host_pid=host_pid,
                    attendant=attendant,
                )
            except BaseException:
                if attendant is not None:
                    attendant.dismiss()
                kill_and_wait(spawned.pidfd)
                os.close(spawned.pidfd)
                raise
        except BaseException:
            platform_end.close()
            raise

    def _judge_image(self, image_fd: int, size: int, held: HeldImages) -> tuple[_Judged, bytes]:
        # Write-sealed: the bytes hashed here are the bytes that the worker maps. So an image seen
        # before needs one hash and no second look, and the very same memory file not even that.
        digest = held.find(image_fd)
        with self._mutex:
            judged = self._images.get(digest)
        if judged is not None:
            return judged, digest
        mapped = mmap.mmap(image_fd, size, prot=mmap.PROT_READ)
        try:
            digest = hashlib.sha256(mapped).digest()
            with self._mutex:
                judged = self._images.get(digest)
                if judged is not None:
                    self._images.move_to_end(digest)
            if judged is None:
                judged = _parse_and_verify(mapped)
                with self._mutex:
                    self._images[digest] = judged
                    while len(self._images) > _CACHED_IMAGES:
                        self._images.popitem(last=False)
        finally:
            # Views that an error's traceback holds keep the mapping until that is gone.
            with contextlib.suppress(BufferError):
                mapped.close()
        return judged, digest

    def _spawn(
        self,
        lock_bytes: bytes,
        image_fd: int,
        digest: bytes,
        ring_fd: int,
        channel_fd: int,
        *,
        debug: bool,
        slow: Callable[[], None],
    ) -> SpawnedWorker:
        for last in (False, True):
            if not self._zygotes.ready(lock_bytes, debug=debug):
                slow()
            zygote = self._zygotes.get(lock_bytes, debug=debug)
            try:
                return zygote.spawn(
                    image_fd=image_fd,
                    ring_fd=ring_fd,
                    channel_fd=channel_fd,
                    debug=debug,
                    image=digest,
                )
            except LaunchError:
                # If it died between get and spawn, the next get starts a new one.
                if last or zygote.alive:
                    raise
        raise AssertionError("unreachable")

    def _introduce(
        self,
        judged: _Judged,
        policy: LaunchPolicy,
        request: messages.Launch,
        channel: Channel,
        worker: SpawnedWorker,
        *,
        debug: bool,
        wanted: Callable[[], bool],
    ) -> Facts:
        enclave_id = secrets.token_bytes(16)
        draft = self._draft(judged.info, enclave_id, debug=debug)
        _expect(channel, worker.pidfd, messages.Shut, _CLOSED_TIMEOUT, wanted)
        # From here on the worker's own filter refuses whatever could undo what is tried now.
        outside = probe_worker(worker.pid, worker.pidfd)
        closed = _expect(channel, worker.pidfd, messages.Closed, _RUNNING_TIMEOUT, wanted)
        bits = _merge(outside, closed)
        require = tuple(request.require) + policy.require
        held = {name: bit.value for name, bit in bits.items()}
        refuse_unless_held(held, require, debug=debug)
        record = self._sign_record(judged.info, bits, enclave_id, draft, debug=debug)
        body = _body(judged.identity, record, debug=debug)
        channel.send(
            messages.Identity(
                enclave_id=enclave_id,
                body=body.to_bytes(),
                debug=debug,
                level=self._root.level,
                record=record,
                seed=secrets.token_bytes(32),
            ),
            timeout=_SEND_TIMEOUT,
        )
        running = _expect(channel, worker.pidfd, messages.Running, _RUNNING_TIMEOUT, wanted)
        if not 0 < len(running.runtime_public_key) <= 4096:
            raise LaunchError("the worker sent no usable runtime key")
        return Facts(
            enclave_id=enclave_id,
            name=judged.info.name,
            pid=worker.pid,
            debug=debug,
            body=body,
            record=record,
            runtime_public_key=running.runtime_public_key,
            may_seal=not self._root.ephemeral or request.allow_ephemeral or policy.allow_ephemeral,
            started=time.time(),
            starting=running.starting,
            grace=min(max(running.grace, 0.0), _MAX_GRACE),
        )

    def _draft(self, info: ImageInfo, enclave_id: bytes, *, debug: bool) -> _Draft:
        """
        Sign, while the worker starts, the record as it will be if all is as at the last launch.

        A draft leaves this process only if what is then found is the same to the last byte.
        """
        signed = self._record(info, self._last_bits, enclave_id, debug=debug)
        return _Draft(signed=signed, signature=self._root.sign(signed))

    def _sign_record(
        self,
        info: ImageInfo,
        bits: dict[str, ProtectionBit],
        enclave_id: bytes,
        draft: _Draft,
        *,
        debug: bool,
    ) -> bytes:
        signed = self._record(info, bits, enclave_id, debug=debug)
        self._last_bits = bits
        # The bytes are compared, not the bits: True equals 1, and is written otherwise.
        return signed + (draft.signature if signed == draft.signed else self._root.sign(signed))

    def _record(
        self, info: ImageInfo, bits: dict[str, ProtectionBit], enclave_id: bytes, *, debug: bool
    ) -> bytes:
        record = ProtectionRecord(
            level=cast(Literal["embedded", "service"], self._root.level),
            tee="none",
            platform_svn=PLATFORM_SVN,
            ephemeral=self._root.ephemeral,
            debug=debug,
            jit=info.jit,
            enclave_id=enclave_id.hex(),
            bits=bits,
        )
        record.check()
        return record.signed_bytes()


def _parse_and_verify(data: mmap.mmap) -> _Judged:
    image = Image.parse(data)
    return _Judged(info=image.info, lock_bytes=image.lock_bytes, identity=verify_image(image))


def _choose_debug(request: messages.Launch, judged: _Judged) -> bool:
    signed = judged.identity.signed
    debug = not signed if request.debug is None else request.debug
    if not signed and not debug:
        raise LaunchRefusedError(
            "an unsigned image starts only as debug",
            expected="a signature",
            advice="Sign it with 'pyenclave sign', or launch it with debug=True.",
        )
    if signed and debug and not judged.identity.debug_allowed:
        raise LaunchRefusedError(
            "the image's manifest does not allow debug",
            expected="debug = true in its [enclave] table",
            found="debug = false",
        )
    return debug


def _merge(outside: dict[str, bool], closed: messages.Closed) -> dict[str, ProtectionBit]:
    if len(closed.inside) > _MAX_INSIDE:
        raise LaunchError("the worker reports too many protection bits")
    bits: dict[str, ProtectionBit] = {}
    for name, value in closed.inside.items():
        if not _BIT_NAME.match(name) or not 0 <= value < 1 << 31:
            raise LaunchError("the worker reports an impossible protection bit", found=name[:64])
        bits[name] = ProtectionBit(value=value, by="inside")
    kind = closed.secret_memory
    bits["secretmem"] = ProtectionBit(value=kind == _BEST_MEMORY, by="inside")
    for name in OUTSIDE:
        # The worker's word can only take away: a filter that this process was started under looks
        # from outside like the worker's own.
        held = outside[name] and bool(closed.inside.get(name, True))
        bits[name] = ProtectionBit(value=held, by="outside")
    return bits


def _body(identity: SignedIdentity, record: bytes, *, debug: bool) -> ReportBody:
    return ReportBody(
        cpu_svn=cpu_svn(),
        attributes=attributes(debug=debug),
        mrenclave=identity.mrenclave,
        mrsigner=identity.mrsigner,
        config_id=hashlib.sha256(record).digest() + bytes(32),
        isv_prod_id=identity.product_id,
        isv_svn=identity.security_version,
    )


def _expect(
    channel: Channel,
    pidfd: int,
    kind: type[_Message],
    timeout: float,
    wanted: Callable[[], bool],
) -> _Message:
    deadline = time.monotonic() + timeout
    while True:
        ended = has_ended(pidfd)
        try:
            message, fds = channel.receive(_SLICE)
            break
        except TimeoutError:
            if ended:
                raise LaunchError("the worker ended while it started") from None
            if not wanted():
                raise LaunchError("the host is gone") from None
            if time.monotonic() >= deadline:
                raise LaunchError(
                    "the worker did not start in time", expected=f"{timeout:g} s"
                ) from None
        except EnclaveLostError:
            raise LaunchError(
                "the worker ended while it started",
                advice="Launch it as debug to see what it prints.",
            ) from None
        except EnclaveError as error:
            raise LaunchError(f"the worker broke the control protocol: {error}") from None
    close_all(fds)
    if isinstance(message, messages.Ending):
        raise_failure(message)
    if isinstance(message, messages.Poisoned):
        raise EnclavePoisonedError(message.reason[:1000])
    if fds or not isinstance(message, kind):
        raise LaunchError(
            "the worker broke the control protocol",
            expected=kind.__name__,
            found=type(message).__name__,
        )
    return message
