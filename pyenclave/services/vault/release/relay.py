"""
Carrying an enclave's TLS to an attestation service: this end sees ciphertext, and chooses nothing.

The enclave asks for the keys of an authority itself (`backends._enclave`); it has no network. Where
to connect is what the configuration says, and what comes back is the enclave's to judge.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Final

from pyenclave.errors import CollateralError
from pyenclave.formats import jose
from pyenclave.formats.jwk import Jwk, Jwks, public_members
from pyenclave.formats.release import canonical
from pyenclave.formats.release_policy import authority_host
from pyenclave.services.vault.backends.base import DecidesInside
from pyenclave.services.vault.release.authorities import KnownAuthority, certificates

__all__ = ["hand_in_keys", "key_set"]

_TIMEOUT: Final = 10.0  # seconds for one key set
_CHUNK: Final = 64 << 10
_MAX_TRAFFIC: Final = 1 << 20  # bytes of TLS that one key set may take


async def hand_in_keys(backend: DecidesInside, known: KnownAuthority, anchor: bytes) -> None:
    """
    Have the enclave get the keys of an authority.

    Args:
        backend: The enclave.
        known: The authority as it is configured.
        anchor: What the enclave knows it by.

    Raises:
        CollateralError: The authority does not answer, or not so that the enclave believes it.
        OSError: It cannot be reached.
        ServiceError: The enclave does not believe it.

    """
    if known.jwks is not None:
        if not await backend.authority_keys(anchor, key_set(known.jwks)):
            raise CollateralError("none of the configured keys is one that the key is bound to")
        return
    roots = [] if known.ca_pem is None else certificates(known.ca_pem)
    try:
        async with asyncio.timeout(_TIMEOUT):
            await _carry(backend, known, anchor, roots)
    except TimeoutError:
        raise CollateralError(f"no whole answer in {_TIMEOUT:g} s") from None


async def _carry(
    backend: DecidesInside, known: KnownAuthority, anchor: bytes, roots: list[bytes]
) -> None:
    host, port, _ = authority_host(known.url)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        session, out = await backend.authority_connect(anchor, roots)
        done, traffic = False, 0
        while not done:
            if out:
                writer.write(out)
                await writer.drain()
            data = await reader.read(_CHUNK)
            traffic += len(data)
            if traffic > _MAX_TRAFFIC:
                raise CollateralError(f"more than {_MAX_TRAFFIC} bytes")
            out, done = await backend.authority_answer(session, data, ended=not data)
            if not data and not done:
                raise CollateralError("the connection ended")
    finally:
        writer.close()


def key_set(keys: Jwks) -> bytes:
    """Return a key set with all of *keys* that judging signatures depends on."""
    return canonical({"keys": [_member(key) for key in keys.keys]})


def _member(key: Jwk) -> dict[str, Any]:
    member: dict[str, Any] = public_members(key.key)
    if key.kid is not None:
        member["kid"] = key.kid
    if key.algorithms != jose.algorithms_of(key.key):
        (member["alg"],) = key.algorithms
    if key.x5c:
        member["x5c"] = [base64.b64encode(item.der).decode("ascii") for item in key.x5c]
    return member
