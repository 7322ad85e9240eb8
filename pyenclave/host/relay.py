"""
The host's part in a key release: HTTPS, a token for the vault, and patience.

The enclave trusts it with nothing: what it changes, keeps back or repeats is refused inside. And it
trusts the enclave with little: two services, and no more of them than a release needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Final

from pyenclave._https import NO_ANSWER, Credential, Session
from pyenclave.calls import services
from pyenclave.errors import RemoteServiceError
from pyenclave.formats.release import service_url

__all__ = ["Relay", "relay"]

_LONGEST: Final = 120.0  # seconds that an enclave may ask for


class Relay:
    """
    Answers what enclaves ask of a key vault and an attestation service. Thread-safe.

    Args:
        sessions: The service for each of the words ``vault`` and ``attestation``.

    """

    def __init__(self, sessions: dict[str, Session]) -> None:
        self._sessions = dict(sessions)

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return what answers, by the name that images have."""
        return {services.NAME: self.request}

    def close(self) -> None:
        """Close connections that are kept; they are made again when they are needed."""
        for session in self._sessions.values():
            session.close()

    def request(
        self,
        service: str,
        base: str,
        method: str,
        path: str,
        api_version: str,
        body: bytes,
        seconds: float,
    ) -> tuple[int, bytes]:
        """
        Ask a service for an enclave.

        Returns:
            Its status and answer. Status 0: it gave none; then the answer says why.

        Raises:
            PermissionError: The enclave asks for what a release does not need, or for a service
                that this relay does not reach.

        """
        session = self._sessions.get(service)
        if session is None:
            raise PermissionError(1, "this relay reaches no such service", service[:40])
        try:
            meant, _ = service_url(base)
        except ValueError as error:
            raise PermissionError(1, str(error)) from None
        if meant != session.url:
            raise PermissionError(
                1, f"the enclave asks for the {service} {meant}, this relay reaches {session.url}"
            )
        if not services.is_allowed(service, method, path, api_version):
            raise PermissionError(1, f"a release needs no {method} {path!r:.200} of the {service}")
        if len(body) > services.MAX_BODY:
            raise PermissionError(1, f"a request of {len(body)} bytes")
        wanted = seconds if 0 < seconds <= _LONGEST else _LONGEST
        try:
            answer = session.ask(
                method,
                path,
                query={"api-version": api_version},
                body=None if method == "GET" else body,
                max_size=services.MAX_BODY,
                timeout=min(wanted, session.timeout),
            )
        except RemoteServiceError as error:
            inside = {"code": error.error_code or NO_ANSWER, "message": str(error)[:2000]}
            return 0, json.dumps({"error": inside}).encode()
        return answer.status, answer.body


def relay(
    *,
    vault: str | None = None,
    attestation: str | None = None,
    credential: Credential | str | None = None,
    attestation_credential: Credential | str | None = None,
    ca: str | bytes | os.PathLike[str] | None = None,
    timeout: float = 30.0,
    attempts: int = 4,
    verify_challenge_resource: bool = True,
    proxy: str | None = None,
) -> dict[str, Callable[..., Any]]:
    """
    Relay key releases to an enclave: a handler for ``ocalls=``.

    The image says ``[release]``, and trusted code calls ``trusted.release_key``. The host adds what
    is the host's: the connection, and a token that says who it is. Neither lets it have the key.

    Args:
        vault: The key vault's address, ``https://…``.
        attestation: The attestation service's.
        credential: Gives bearer tokens for the vault (``get_token(*scopes)``, as azure-identity's
            objects do); a text is a token.
        attestation_credential: The same for the attestation service; attesting needs none.
        ca: The authorities that are trusted *instead of* the system's: PEM, or a file of it.
        timeout: Seconds for one request, all attempts included.
        attempts: How often a busy or broken service is asked.
        verify_challenge_resource: Whether the vault may ask only for tokens of a domain that it
            lies in. False: any; for a vault of your own.
        proxy: ``http://host:port`` to go through. The environment's is never used.

    Returns:
        Handlers, to be given as ``ocalls=`` or merged with others.

    Raises:
        ValueError: No service is named, or an argument is not usable.

    """
    if vault is None and attestation is None:
        raise ValueError("relay: name the vault, the attestation service, or both")
    sessions = {}
    wanted = (
        (services.VAULT, vault, credential, "the key vault"),
        (services.ATTESTATION, attestation, attestation_credential, "the attestation service"),
    )
    for service, url, own, what in wanted:
        if url is not None:
            sessions[service] = Session(
                url,
                credential=own,
                ca=ca,
                timeout=timeout,
                attempts=attempts,
                verify_challenge_resource=verify_challenge_resource,
                proxy=proxy,
                what=what,
            )
    return Relay(sessions).handlers()
