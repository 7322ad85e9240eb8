"""
Private halves in a PKCS #11 token: a hardware security module, or SoftHSM in tests.

Two keys stay in the token for good and cannot be extracted: one wraps (AES-KWP), one authenticates
(HMAC-SHA-256) wrapped key, public half and context. A key is made in the token, wrapped there, and
handed out; to be used it is unwrapped there, as an object of the session. The release wrap is done
in the token, too: OAEP of an AES key that was made there, then AES-KWP. What a token cannot do is
refused by its name; nothing is done outside in its place, but for public halves.

The bounds of an update (`rebind`) are checked by this process, where the enclave backend checks
them inside: a token knows nothing of policies.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import unquote

from pyenclave.errors import ConfigurationError, EvidenceFormatError, ServiceError
from pyenclave.formats import jwa
from pyenclave.formats.key_context import KeyContext
from pyenclave.services.vault.backends import pkcs11_use
from pyenclave.services.vault.backends.base import (
    MAX_RANDOM,
    KeyMaterial,
    KeySpec,
    Operation,
    bad_parameter,
    unavailable,
)
from pyenclave.services.vault.backends.pkcs11_token import LABEL, MAC_SIZE, Token, TokenPlace
from pyenclave.services.vault.backends.rules import check_rebind

__all__ = ["Pkcs11Backend", "TokenPlace", "from_config"]

T = TypeVar("T")


def from_config(text: str) -> Pkcs11Backend:
    """
    Read a PKCS #11 URI (RFC 7512) without its scheme.

    Args:
        text: ``token=LABEL?module-path=PATH&pin-source=file:PATH``, and ``;object=LABEL`` after
            the token for other keys than ``pyenclave-vault``.

    Raises:
        ConfigurationError: Anything else; above all a PIN in the text, where every process list
            and log would have it.

    """
    path, _, query = text.partition("?")
    parts: dict[str, str] = {}
    for piece in (*path.split(";"), *(query.split("&") if query else ())):
        name, equals, value = piece.partition("=")
        if not equals or name in parts or not value:
            raise ConfigurationError(
                "pkcs11: not name=value, or twice", found=name[:40] or "nothing"
            )
        parts[name] = unquote(value, errors="strict")
    if "pin-value" in parts:
        raise ConfigurationError(
            "pkcs11: the PIN does not belong here",
            advice="Write it to a file of mode 0600 and name that: pin-source=file:PATH.",
        )
    if unknown := sorted(set(parts) - {"token", "object", "module-path", "pin-source"}):
        raise ConfigurationError(f"pkcs11: unknown attribute {unknown[0]!r:.40}")
    if missing := [name for name in ("token", "module-path", "pin-source") if name not in parts]:
        raise ConfigurationError(
            f"pkcs11: {' and '.join(missing)} missing",
            expected="pkcs11:token=LABEL?module-path=PATH&pin-source=file:PATH",
        )
    place = TokenPlace(
        module=parts["module-path"],
        token=parts["token"],
        pin_file=parts["pin-source"].removeprefix("file:"),
        label=parts.get("object", LABEL),
    )
    return Pkcs11Backend(place)


class Pkcs11Backend:
    """
    Private halves in a token.

    Args:
        place: Where the token is, and its PIN's file.

    """

    name = "pkcs11"

    def __init__(self, place: TokenPlace) -> None:
        self._place = place
        # A session belongs to one thread at a time. Making an RSA key takes seconds in some
        # tokens: it has a session of its own.
        self._threads = {
            name: ThreadPoolExecutor(1, thread_name_prefix=f"pyenclave-hsm-{name}")
            for name in ("use", "make")
        }
        self._tokens: dict[str, Token] = {}
        self._logging_in = threading.Lock()
        self._closed = False

    def check(self) -> None:
        """
        Look for what does not come by itself: the extra, the library, the PIN's file.

        A token that is not there yet is waited for, with each request that needs it.

        Raises:
            ConfigurationError: One of them is missing or not usable.

        """
        self._place.check()

    async def generate(self, spec: KeySpec, context: bytes) -> KeyMaterial:
        """Make a key in the token."""
        return await self._do("make", lambda token: token.generate(spec, context))

    async def import_key(self, jwk: Mapping[str, Any], context: bytes) -> KeyMaterial:
        """Put somebody's key into the token."""
        members = {name: text for name, text in jwk.items() if isinstance(text, str)}
        return await self._do("use", lambda token: token.take(members, context))

    async def perform(
        self,
        wrapped: bytes,
        context: bytes,
        operation: Operation,
        algorithm: str,
        fields: Mapping[str, bytes],
    ) -> dict[str, bytes]:
        """Use a key in the token; what takes the public half alone is done here."""
        return await self._do(
            "use",
            lambda token: pkcs11_use.perform(token, wrapped, context, operation, algorithm, fields),
        )

    async def rebind(self, wrapped: bytes, context: bytes, new_context: bytes) -> bytes:
        """Authenticate a key under another context."""

        def work(token: Token) -> bytes:
            check_rebind(KeyContext.from_bytes(context), KeyContext.from_bytes(new_context))
            kek, _, _ = token.check(wrapped, context)
            head = wrapped[:-MAC_SIZE]
            return head + token.tag(kek, head, new_context)

        return await self._do("use", work)

    async def release(
        self, wrapped: bytes, context: bytes, *, modulus: bytes, exponent: int, enc: str
    ) -> bytes:
        """Wrap a key in the token."""
        return await self._do(
            "use", lambda token: token.release(wrapped, context, modulus, exponent, enc)
        )

    async def keks(self) -> tuple[bytes, ...]:
        """Look for the token's pairs of keys again, and return their ids; the last one wraps."""
        await self._do("make", Token.keks)
        return await self._do("use", Token.keks)

    async def rotate_kek(self) -> bytes:
        """Make another pair of keys in the token, which wraps from now on; return its id."""
        made = await self._do("use", Token.rotate)
        await self._do("make", Token.keks)
        return made

    async def rewrap(self, wrapped: bytes, context: bytes) -> bytes | None:
        """Wrap a key with the newest pair, in the token; None if it is already."""
        return await self._do("use", lambda token: token.rewrap(wrapped, context))

    async def destroy_keks(self, ids: Collection[bytes]) -> None:
        """Destroy pairs of keys in the token, those that are there; never the newest."""
        await self._do("use", lambda token: token.destroy(ids))
        await self._do("make", Token.keks)

    async def random(self, count: int) -> bytes:
        """Return random bytes of the token."""
        if not 0 < count <= MAX_RANDOM:
            raise bad_parameter(f"from 1 to {MAX_RANDOM} bytes")
        return await self._do("use", lambda token: bytes(token.session.generate_random(count * 8)))

    async def close(self) -> None:
        """Close the sessions."""
        self._closed = True
        for name, thread in self._threads.items():
            token = self._tokens.pop(name, None)
            if token is not None:
                await asyncio.get_running_loop().run_in_executor(thread, token.close)
            thread.shutdown(wait=False)

    async def _do(self, name: str, work: Callable[[Token], T]) -> T:
        if self._closed:
            raise unavailable("the key backend is closed")
        return await asyncio.get_running_loop().run_in_executor(
            self._threads[name], self._run, name, work
        )

    def _run(self, name: str, work: Callable[[Token], T]) -> T:
        try:
            token = self._tokens.get(name)
            if token is None:
                with self._logging_in:
                    token = self._tokens[name] = Token(self._place)
            return self._guarded(name, token, work)
        except (jwa.AlgorithmError, EvidenceFormatError) as error:
            raise bad_parameter(str(error)) from None
        except ConfigurationError as error:
            raise ServiceError(
                "the key backend cannot start",
                status=500,
                error_code="InternalError",
                found=str(error),
            ) from error

    def _guarded(self, name: str, token: Token, work: Callable[[Token], T]) -> T:
        try:
            return work(token)
        except token.p.exceptions.PKCS11Error as error:
            # The session, or the token, may be gone: the next request opens another.
            self._tokens.pop(name, None)
            token.close()
            raise unavailable("the token did not answer as it should; try again") from error
