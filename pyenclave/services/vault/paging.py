"""
Pages of lists: an opaque token that says where the next one begins.

The token is protected by the service's secrets for the list and the caller it was made for: it
says nothing, cannot be made up, and is of no use in another list or to somebody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlencode

from pyenclave.errors import EvidenceFormatError, UnsealError
from pyenclave.formats.jose import b64url_decode, b64url_encode
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.vault.fields import bad_parameter
from pyenclave.services.vault.records import Place

__all__ = ["MAX_PAGE", "Pager"]

MAX_PAGE: Final = 25  # Azure's
_SKIP: Final = "$skiptoken"
_MAX_SKIP: Final = 600
_DIGITS: Final = 4


class Pager:
    """
    Reads ``maxresults`` and the token of a request, and makes the next link.

    Args:
        secrets: Protect the tokens.
        place: Where the vault is.
    """

    def __init__(self, secrets: Secrets, place: Place) -> None:
        self._secrets = secrets
        self._place = place

    @staticmethod
    def _context(path: str, caller: Caller) -> bytes:
        return f"vault page\0{path}\0{caller.name}".encode()

    def start(self, query: Mapping[str, str], path: str, caller: Caller) -> tuple[str, int]:
        """
        Return after what the page begins ("" for the first) and how long it is at most.

        Raises:
            ServiceError: 400.

        """
        wanted = query.get("maxresults")
        limit = MAX_PAGE
        if wanted is not None:
            digits = wanted.isascii() and wanted.isdigit() and len(wanted) <= _DIGITS
            if not digits or not 1 <= int(wanted) <= MAX_PAGE:
                raise bad_parameter(f"Parameter maxresults is 1 to {MAX_PAGE}.")
            limit = int(wanted)
        token = query.get(_SKIP)
        if token is None:
            return "", limit
        try:
            if len(token) > _MAX_SKIP:
                raise bad_parameter("Parameter $skiptoken is not valid.")
            blob = b64url_decode(token, "token")
            return self._secrets.open(blob, self._context(path, caller)).decode(), limit
        except (EvidenceFormatError, UnsealError):
            raise bad_parameter("Parameter $skiptoken is not valid.") from None

    def next_link(self, path: str, caller: Caller, version: str, limit: int, last: str) -> str:
        """Return the address of the page that follows *last*."""
        blob = self._secrets.protect(last.encode(), self._context(path, caller))
        query = {"api-version": version, _SKIP: b64url_encode(blob), "maxresults": str(limit)}
        return f"{self._place.base}{path}?{urlencode(query, safe='$')}"
