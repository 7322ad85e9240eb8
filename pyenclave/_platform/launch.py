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
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import msgspec

from pyenclave import _native
from pyenclave._platform.ahead import Ahead
from pyenclave._platform.candidate import (
    Candidate,
    NotBegunError,
    SpawnedWorker,
    WorkerGoneError,
    ZygoteFactory,
    await_closed,
    await_ready,
    await_shut,
    complete,
    enclave_of,
    open_status,
)
from pyenclave._platform.debugging import Debuggee, breakpoint_wait
from pyenclave._platform.debuglog import DebugLog
from pyenclave._platform.drafts import Draft, Drafts, Found, Judged, Wish, hold, merge
from pyenclave._platform.held import HeldImages
from pyenclave._platform.policy import LaunchPolicy, load_policy
from pyenclave._platform.probe import check_memfd, has_ended, probe_again, probe_worker
from pyenclave._platform.root import PlatformRoot
from pyenclave._platform.service import Enclave, Facts, kill_and_wait
from pyenclave._platform.spares import MAX_SPARES
from pyenclave._platform.state import State
from pyenclave.calls import ring
from pyenclave.calls.channel import Channel
from pyenclave.errors import (
    ArgumentError,
    EnclaveLostError,
    EnclaveStateError,
    LaunchError,
    LaunchRefusedError,
)
from pyenclave.formats import messages
from pyenclave.formats.image import MAX_IMAGE, MAX_SHARED, Image
from pyenclave.measurement.image import verify_image

__all__ = ["Launcher", "Wish", "check_ring"]

_MAX_RING: Final = (1 << 32) + MAX_SHARED
_SEND_TIMEOUT: Final = 5.0
_CACHED_IMAGES: Final = 16
# Processes that may have ended, unseen, before they were asked: every spare, and some more.
_ATTEMPTS: Final = MAX_SPARES + 3


class Launcher:
    """
    Starts enclaves. Thread-safe: hosts launch at the same time.

    Args:
        root: The platform's keys.
        zygotes: Where workers come from.
        state: The state directory, for the policy.

    """

    def __init__(self, root: PlatformRoot, zygotes: ZygoteFactory, state: State) -> None:
        self._drafts = Drafts(root)
        self._zygotes = zygotes
        self._state = state
        self._mutex = threading.Lock()
        self._images: OrderedDict[bytes, Judged] = OrderedDict()
        self._found: dict[tuple[bool, bool], Found] = {}  # at the last launch, by debug and jit
        self._ahead: Ahead[Draft] = Ahead()

    def rouse(self) -> None:
        """A host wants something started, which was not looked at yet: wake who may be needed."""
        self._zygotes.rouse()

    def _listen(self, channel: Channel, name: str) -> DebugLog:
        """
        Give a debug worker a pipe for its output, before it is there, and keep what comes.

        Beside it goes the socket on which it asks for a debugger.
        """
        debuggee = None
        try:
            debuggee = Debuggee()
            log = DebugLog(self._state, name)
            log.start()
        except (OSError, RuntimeError) as error:
            if debuggee is not None:
                debuggee.close()
            raise LaunchError(f"the enclave's output cannot be kept: {error}") from None
        log.debuggee = debuggee
        try:
            fds = (log.write_fd, debuggee.worker_fd)
            channel.send(messages.Output(wait=breakpoint_wait()), fds, timeout=_SEND_TIMEOUT)
        finally:
            log.close_writer()
            debuggee.close_worker_end()
        return log

    def judge(
        self,
        request: messages.Launch | messages.Reserve,
        image_fd: int,
        *,
        held: HeldImages,
    ) -> Wish:
        """
        Judge what a host asks for.

        Args:
            request: The host's wishes.
            image_fd: The image; stays the caller's.
            held: The images that this host launched last.

        Raises:
            ArgumentError: The descriptor is not what it must be.
            ImageError: The image or its signature is refused.
            LaunchRefusedError: The image, or the platform's policy, does not allow it.

        """
        size = check_memfd(image_fd, "image", seals=_native.SEALED, limit=MAX_IMAGE)
        judged, digest = self._judge_image(image_fd, size, held)
        wish = Wish(
            judged=judged,
            digest=digest,
            size=size,
            debug=_choose_debug(request.debug, judged),
            require=tuple(request.require),
            allow_ephemeral=request.allow_ephemeral,
        )
        self._admit(wish)
        return wish

    def _admit(self, wish: Wish) -> LaunchPolicy:
        """Return the policy as it is now, if it admits *wish*."""
        policy = load_policy(self._state)
        identity = wish.judged.identity
        policy.judge(
            mrsigner=identity.mrsigner,
            product_id=identity.product_id,
            security_version=identity.security_version,
            debug=wish.debug,
        )
        return policy

    def launch(
        self,
        wish: Wish,
        image_fd: int,
        ring_fd: int,
        *,
        host_pid: int,
        wanted: Callable[[], bool],
        slow: Callable[[], None],
        soon: Callable[[], None] = lambda: None,
    ) -> Enclave:
        """
        Start one enclave.

        Args:
            wish: What was asked for.
            image_fd: The image that *wish* was made of; stays the caller's.
            ring_fd: The ring; stays the caller's.
            host_pid: For listings.
            wanted: Whether the host is still there; asked while a worker is waited for.
            slow: Called before this waits for a zygote without asking *wanted*.
            soon: Called when only the worker's key is waited for; must not block or raise.

        Raises:
            ArgumentError: The descriptor of the ring is not what it must be.
            ImageError: The runtime's lock is refused, or the image by the worker.
            LaunchError: It is refused (LaunchRefusedError) or could not be started.

        """
        check_ring(ring_fd, wish)
        candidate = self._start(wish, image_fd, ring_fd, wanted=wanted, slow=slow)
        try:
            try:
                facts = self._identify(candidate, candidate.outside)
            except WorkerGoneError:
                await_ready(candidate, wanted)  # raises what it said last, if it said something
                raise
            # It makes its key meanwhile, and takes what it is afterwards.
            soon()
            enclave = enclave_of(candidate, facts, host_pid)
            complete(enclave, await_ready(candidate, wanted))
        except BaseException:
            candidate.end()
            raise
        return enclave

    def warm(
        self,
        wish: Wish,
        image_fd: int,
        ring_fd: int,
        bell: int,
        *,
        wanted: Callable[[], bool],
        slow: Callable[[], None],
    ) -> Candidate:
        """
        Start a worker that has all but an identity.

        Args:
            wish: As for :meth:`launch`, like the others.
            image_fd: The image.
            ring_fd: The ring, which was checked.
            bell: An eventfd by which the host wakes it.
            wanted: Whether anybody still wants it.
            slow: Called before a zygote is waited for.

        Returns:
            The worker, the caller's to hand out or to end.

        Raises:
            EnclaveError: As :meth:`launch`.

        """
        candidate = self._start(wish, image_fd, ring_fd, wanted=wanted, slow=slow)
        try:
            candidate.ready = await_ready(candidate, wanted)
            with contextlib.suppress(EnclaveLostError, TimeoutError):  # whoever takes it sees that
                candidate.channel.send(messages.Soon(), (bell,), timeout=0)
            policy = self._admit(wish)
            outside, closed = candidate.outside, candidate.closed
            bits = hold(wish, outside, closed, policy)
            candidate.draft = self._drafts.draft(wish, bits)
            candidate.package = self._drafts.package(wish, candidate.draft, outside, closed, policy)
            candidate.status = open_status(candidate.worker)
        except BaseException:
            candidate.end()
            raise
        self.refill()
        return candidate

    def hand_out(self, candidate: Candidate, *, host_pid: int, wake: bool = True) -> Enclave:
        """
        Make a warm worker an enclave: the policy of now, walls tried again, then the identity.

        Args:
            candidate: From :meth:`warm`; if this fails it is ended.
            host_pid: For listings.
            wake: Whether nobody else tells the worker to wake up.

        Raises:
            WorkerGoneError: The worker ended; it never had an identity.
            LaunchError: It is refused (LaunchRefusedError).

        """
        try:
            worker = candidate.worker
            if wake:
                # It wakes up while this tries its walls: that takes as long.
                with contextlib.suppress(EnclaveLostError, TimeoutError):
                    candidate.channel.send(messages.Soon(), timeout=0)
            outside = probe_again(worker.pid, worker.pidfd, candidate.status)
            if not any(outside.values()) and has_ended(worker.pidfd):
                raise WorkerGoneError("the worker ended while it waited")
            if candidate.ready is None:
                raise EnclaveStateError("a worker that is not ready is no enclave")
            facts = self._identify(candidate, outside)
        except BaseException:
            candidate.end()
            raise
        return complete(enclave_of(candidate, facts, host_pid), candidate.ready)

    def _judge_image(self, image_fd: int, size: int, held: HeldImages) -> tuple[Judged, bytes]:
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

    def _start(
        self,
        wish: Wish,
        image_fd: int,
        ring_fd: int,
        *,
        wanted: Callable[[], bool],
        slow: Callable[[], None],
    ) -> Candidate:
        """Start a worker and bring it to where it has closed itself in, tried from both sides."""
        for last in (*(False,) * (_ATTEMPTS - 1), True):
            try:
                return self._start_one(wish, image_fd, ring_fd, wanted=wanted, slow=slow)
            except NotBegunError:
                if last:
                    raise
        raise AssertionError("unreachable")

    def _start_one(
        self,
        wish: Wish,
        image_fd: int,
        ring_fd: int,
        *,
        wanted: Callable[[], bool],
        slow: Callable[[], None],
    ) -> Candidate:
        platform_end, worker_end = Channel.pair()
        with contextlib.ExitStack() as failed:
            failed.callback(platform_end.close)
            with worker_end:
                log = self._listen(platform_end, wish.judged.info.name) if wish.debug else None
                if log is not None:
                    failed.callback(log.join)
                worker = self._spawn(
                    wish.judged.lock_bytes,
                    image_fd,
                    wish.digest,
                    ring_fd,
                    worker_end.fileno(),
                    debug=wish.debug,
                    slow=slow,
                )
            failed.callback(os.close, worker.pidfd)
            failed.callback(kill_and_wait, worker.pidfd)
            failed.callback(worker.forget)
            attendant = self._ahead.attendant()
            failed.callback(attendant.dismiss)
            draft = self._draft_ahead(wish)
            await_shut(platform_end, worker, wanted)
            # From here on the worker's own filter refuses whatever could undo what is tried now.
            outside = probe_worker(worker.pid, worker.pidfd)
            closed = await_closed(platform_end, worker, wanted)
            failed.pop_all()
        return Candidate(
            wish=wish,
            worker=worker,
            channel=platform_end,
            attendant=attendant,
            draft=draft,
            outside=outside,
            closed=closed,
            package=draft.package,
            log=log,
        )

    def _identify(self, candidate: Candidate, outside: dict[str, bool]) -> Facts:
        """Judge and sign what holds, and send the worker what it is."""
        wish, closed = candidate.wish, candidate.closed
        policy = self._admit(wish)
        package = candidate.package
        if (
            package is None
            or package.policy is not policy
            or package.outside != outside
            or package.closed != messages.encode(closed)
        ):
            package = self._drafts.package(wish, candidate.draft, outside, closed, policy)
            self._found[wish.debug, wish.judged.info.jit] = outside, closed
        identity = msgspec.structs.replace(package.identity, seed=secrets.token_bytes(32))
        try:
            candidate.channel.send(identity, timeout=_SEND_TIMEOUT)
        except (EnclaveLostError, TimeoutError):
            raise WorkerGoneError("the worker ended while it started") from None
        if candidate.log is not None:
            candidate.log.name_after(package.facts.enclave_id)
        return package.facts

    def _draft_ahead(self, wish: Wish) -> Draft:
        """
        Return a draft of what follows if the same is found as at the last launch.

        It may have been made in a quiet moment before. What is found decides whether it is used.
        """
        found = self._found.get((wish.debug, wish.judged.info.jit))
        # The identity of what was found will do: whoever makes drafts of this kind holds it.
        kind = wish.digest, wish.debug, wish.require, wish.allow_ephemeral, id(found)
        return self._ahead.draft(kind, lambda: self._expect_found(wish, found))

    def _expect_found(self, wish: Wish, found: Found | None) -> Draft:
        if found is None:  # nothing is known yet
            return Draft(enclave_id=secrets.token_bytes(16), signed=b"", signature=b"")
        draft = self._drafts.draft(wish, merge(*found))
        with contextlib.suppress(LaunchError):  # it is refused, or not, when it was tried
            return replace(
                draft, package=self._drafts.package(wish, draft, *found, self._admit(wish))
            )
        return draft

    def refill(self) -> None:
        """Make for later launches what this one took; to be called once the host has its answer."""
        self._ahead.refill()

    def close(self) -> None:
        """End the threads that wait for launches."""
        self._ahead.close()


def _parse_and_verify(data: mmap.mmap) -> Judged:
    image = Image.parse(data)
    return Judged(info=image.info, lock_bytes=image.lock_bytes, identity=verify_image(image))


def check_ring(fd: int, wish: Wish) -> None:
    """
    Check the descriptor of a ring.

    Raises:
        ArgumentError: It is no size-sealed memfd, or not of the size that the image's threads take.

    """
    size = check_memfd(fd, "ring", seals=_native.RING_SEALS, limit=_MAX_RING)
    info = wish.judged.info
    expected = ring.layout(info.threads, shared=info.shared_memory)
    if size != expected:
        raise ArgumentError("memfd of the ring has another size", expected=expected, found=size)


def _choose_debug(wanted: bool | None, judged: Judged) -> bool:
    signed = judged.identity.signed
    debug = not signed if wanted is None else wanted
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
