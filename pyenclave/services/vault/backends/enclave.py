"""
The default backend: private halves exist only inside an enclave of ours.

The host of the vault holds wrapped bytes and asks; whether a key is released is decided inside. The
enclave is launched at the first call, and again when its worker or its platform was lost; calls
that were under way then get a 503. Making an RSA key takes a second or more and leaves threads of
the enclave for everybody else.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Collection, Mapping
from typing import Any, Final

from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallTimeoutError,
    EcallError,
    EnclaveError,
    EnclaveStateError,
    EvidenceFormatError,
    ImageError,
    LaunchError,
    RuntimeLockError,
    ServiceError,
)
from pyenclave.formats.release_outcome import Outcome
from pyenclave.formats.release_terms import ReleaseTerms
from pyenclave.host.aio import AsyncEnclave, AsyncEnclaveOptions
from pyenclave.services.vault.backends import _image
from pyenclave.services.vault.backends.base import (
    KeyMaterial,
    KeySpec,
    Operation,
    ReleaseRequest,
    Verdict,
    bad_parameter,
    unavailable,
)

__all__ = ["EnclaveBackend"]

_MAKING: Final = max(1, _image.THREADS - 2)  # RSA keys that are made at once
_TIMEOUT: Final = 60.0  # seconds of one call
_KINDS: Final = ("RSA", "RSA-HSM", "EC", "EC-HSM", "oct", "oct-HSM")
_JWK_MEMBERS: Final = ("kty", "crv", "n", "e", "d", "p", "q", "dp", "dq", "qi", "x", "y", "k")


_Running = tuple[AsyncEnclave, AsyncEnclaveOptions]


class _Life:
    """The enclave of one event loop."""

    def __init__(self, state_dir: str | None) -> None:
        self._state_dir = state_dir
        self._starting = asyncio.Lock()
        self.making = asyncio.Semaphore(_MAKING)
        self.now: _Running | None = None
        self.keks: tuple[_image.SealedKek, ...] = ()

    async def running(self) -> _Running:
        """Return the enclave, launched if there is none, and its form with a deadline."""
        if self.now is None:
            async with self._starting:
                # Somebody else may have launched it while this one waited.
                return await self._launched()
        return self.now

    async def _launched(self) -> _Running:
        if self.now is None:
            enclave = await self._launch()
            self.now = enclave, enclave.options(timeout=_TIMEOUT)
        return self.now

    async def _launch(self) -> AsyncEnclave:
        try:
            enclave = await self._started(rebuild=False)
        except RuntimeLockError:
            enclave = await self._started(rebuild=True)
        try:
            await self._open_keks(enclave)
        except BaseException:
            await enclave.close()
            raise
        return enclave

    async def _started(self, *, rebuild: bool) -> AsyncEnclave:
        image = await asyncio.to_thread(_image.enclave_image, self._state_dir, rebuild=rebuild)
        enclave = AsyncEnclave(image, state=self._state_dir)
        try:
            await enclave.start()
        except BaseException:
            await enclave.close()
            raise
        return enclave

    async def _open_keks(self, enclave: AsyncEnclave) -> None:
        keks = await asyncio.to_thread(_image.load_keks, self._state_dir)
        if not keks:
            made = await enclave.call("kek_new")
            keks = await asyncio.to_thread(_image.store_keks, self._state_dir, (), *made)
        # Opened from the file in any case: what could not be opened again must not be used.
        await enclave.call("kek_open", [kek.blob for kek in keks])
        self.keks = keks

    async def reopen_keks(self) -> bool:
        """Read the key-encryption keys again; whether there are new ones."""
        before = self.keks
        enclave, _ = await self.running()
        async with self._starting:  # two at once might open them in the wrong order
            if before == self.keks:
                await self._open_keks(enclave)
        return before != self.keks

    async def new_kek(self) -> bytes:
        """Make a key-encryption key, which wraps from now on."""
        enclave, _ = await self.running()
        async with self._starting:
            made = await enclave.call("kek_new")
            await asyncio.to_thread(_image.store_keks, self._state_dir, self.keks, *made)
            await self._open_keks(enclave)  # another process may have been faster
        return self.keks[-1].id

    def drop(self, enclave: AsyncEnclave) -> None:
        """Forget an enclave that is lost: the next call launches another."""
        if self.now is not None and self.now[0] is enclave:
            self.now = None
            task = asyncio.ensure_future(enclave.close())
            task.add_done_callback(_ignore)


def _ignore(task: asyncio.Future[None]) -> None:
    if not task.cancelled():
        task.exception()


class EnclaveBackend:
    """
    Private halves in an enclave of ours.

    Args:
        state_dir: Where image, signing key and sealed key-encryption keys are kept, and the
            platform's root; None for the default state directory. Instances of a vault that share
            a database share this directory too.
        terms: The attestation services that exportable keys are bound to from now on; by default
            none, and then no key is released.

    """

    name = "enclave"

    def __init__(
        self,
        state_dir: str | os.PathLike[str] | None = None,
        *,
        terms: ReleaseTerms | None = None,
    ) -> None:
        self._terms = (terms or ReleaseTerms()).to_bytes()
        self._state_dir = None if state_dir is None else os.fspath(state_dir)
        self._lives: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Life] = (
            weakref.WeakKeyDictionary()
        )
        self._closed = False

    # ---- the protocol ------------------------------------------------------------------------

    async def generate(self, spec: KeySpec, context: bytes) -> KeyMaterial:
        """Make a key inside."""
        if spec.kty not in _KINDS:
            raise bad_parameter("no such kind of key", expected=", ".join(_KINDS))
        arguments = (spec.kty, spec.size or 0, spec.crv or "", context, self._terms)
        if spec.kty.startswith("RSA"):
            async with self._life().making:
                public, wrapped = await self._call("generate", *arguments)
        else:
            public, wrapped = await self._call("generate", *arguments)
        return KeyMaterial(public=public, wrapped=wrapped)

    async def import_key(self, jwk: Mapping[str, Any], context: bytes) -> KeyMaterial:
        """Hand a key in; the host had it once, and keeps no copy."""
        members = {name: jwk[name] for name in _JWK_MEMBERS if jwk.get(name) is not None}
        if not all(isinstance(value, str) for value in members.values()):
            raise bad_parameter("a member of the key is not text")
        async with self._life().making:
            public, wrapped = await self._call("import_key", members, context, self._terms)
        return KeyMaterial(public=public, wrapped=wrapped)

    async def perform(
        self,
        wrapped: bytes,
        context: bytes,
        operation: Operation,
        algorithm: str,
        fields: Mapping[str, bytes],
    ) -> dict[str, bytes]:
        """Use a key inside."""
        answer: dict[str, bytes] = await self._call(
            "perform", wrapped, context, operation, algorithm, dict(fields)
        )
        return answer

    async def rebind(self, wrapped: bytes, context: bytes, new_context: bytes) -> bytes:
        """Wrap a key under another context; the enclave refuses what no update may do."""
        return bytes(await self._call("rebind", wrapped, context, new_context, self._terms))

    async def decide_release(
        self, wrapped: bytes, context: bytes, request: ReleaseRequest, *, final: bool
    ) -> Verdict:
        """
        Have the enclave decide, and wrap for the transfer key of the token.

        Args:
            wrapped: The private half.
            context: What it is bound to.
            request: What is asked.
            final: By the authority's keys that are at hand.

        """
        state = (request.enabled, request.not_before, request.expires)
        outcome, needed, missing, ciphertext = await self._call(
            "release",
            wrapped,
            context,
            request.policy or b"",
            request.target,
            request.enc,
            state,
            final,
        )
        if needed:
            return Verdict(outcome=None, needed=bytes(needed), missing=missing)
        return Verdict(outcome=Outcome.from_bytes(outcome), ciphertext=bytes(ciphertext))

    async def authority_keys(self, anchor: bytes, jwks: bytes) -> int:
        """Hand in the key set of an authority that is known by its keys; how many are its."""
        return int(await self._call("authority_keys", anchor, jwks))

    async def authority_connect(self, anchor: bytes, roots: list[bytes]) -> tuple[int, bytes]:
        """Begin TLS to an authority, inside; return the session, and what to send first."""
        session, first = await self._call("authority_connect", anchor, roots)
        return session, bytes(first)

    async def authority_answer(
        self, session: int, data: bytes, *, ended: bool
    ) -> tuple[bytes, bool]:
        """Hand in what came; return what to send, and whether the keys are there."""
        out, done = await self._call("authority_answer", session, data, ended)
        return bytes(out), done

    async def random(self, count: int) -> bytes:
        """Return random bytes of the enclave."""
        return bytes(await self._call("random_bytes", count))

    async def close(self) -> None:
        """End the enclaves."""
        self._closed = True
        lives = list(self._lives.values())
        self._lives.clear()
        for life in lives:
            now, life.now = life.now, None
            if now is not None:
                await now[0].close()

    # ---- key-encryption keys -----------------------------------------------------------------

    async def rotate_kek(self) -> bytes:
        """
        Make a new key-encryption key; what is wrapped from now on is wrapped with it.

        Returns:
            Its id. Older keys stay readable; `rewrap` moves a key.

        """
        try:
            return await self._life().new_kek()
        except EnclaveError as error:
            raise _translated(error) from error

    async def keks(self) -> tuple[bytes, ...]:
        """Read the key-encryption keys again, and return their ids; the last one wraps."""
        life = self._life()
        try:
            if not life.keks and not await asyncio.to_thread(_image.load_keks, self._state_dir):
                return ()  # whoever asks is no reason to make one
            await life.reopen_keks()
        except EnclaveError as error:
            raise _translated(error) from error
        return tuple(kek.id for kek in life.keks)

    async def destroy_keks(self, ids: Collection[bytes]) -> None:
        """
        Remove sealed key-encryption keys from the state directory, and from the enclave.

        What a medium keeps of a file that was replaced is opened by this platform's root only.
        """
        try:
            await asyncio.to_thread(_image.remove_keks, self._state_dir, ids)
        except EnclaveError as error:
            raise _translated(error) from error
        await self.keks()

    async def rewrap(self, wrapped: bytes, context: bytes) -> bytes | None:
        """Return the key wrapped with the current key-encryption key; None if it is already."""
        return bytes(await self._call("rewrap", wrapped, context, self._terms)) or None

    # ---- calls -------------------------------------------------------------------------------

    def _life(self) -> _Life:
        if self._closed:
            raise unavailable("the key backend is closed")
        loop = asyncio.get_running_loop()
        life = self._lives.get(loop)
        if life is None:
            life = self._lives[loop] = _Life(self._state_dir)
        return life

    async def _call(self, function: str, *arguments: Any) -> Any:
        life = self._life()
        try:
            return await self._once(life, function, *arguments)
        except EcallError as error:
            if error.fields.get("reason") != "UnknownKek":
                raise _translated(error) from error
        except EnclaveError as error:
            raise _translated(error) from error
        # Another process made a key-encryption key since.
        try:
            await life.reopen_keks()
            return await self._once(life, function, *arguments)
        except EnclaveError as error:
            raise _translated(error) from error

    async def _once(self, life: _Life, function: str, *arguments: Any) -> Any:
        enclave, calls = await life.running()
        try:
            return await calls.call(function, *arguments)
        except EnclaveStateError:
            life.drop(enclave)
            raise


def _translated(error: EnclaveError) -> ServiceError:
    """Return what the vault may say of an error; it is the cause of what is raised."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, EcallError):
        if error.public and "status" in error.fields:
            status, reason = int(error.fields["status"]), str(error.fields["reason"])
            return ServiceError(str(error.fields["text"]), status=status, error_code=reason)
        return ServiceError("the key backend failed", status=500, error_code="InternalError")
    if isinstance(error, ArgumentError):
        return bad_parameter("a value does not fit the key backend's limits")
    if isinstance(error, EnclaveStateError | BusyError | CallTimeoutError | LaunchError):
        return unavailable("the key backend was lost or is busy; try again")
    if isinstance(error, ImageError | EvidenceFormatError):
        return ServiceError("the key backend cannot start", status=500, error_code="InternalError")
    return ServiceError("the key backend failed", status=500, error_code="InternalError")
