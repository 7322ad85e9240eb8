"""A request that passed the checks of form, and an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyenclave.errors import EnclaveError, ServiceError
from pyenclave.formats import jsonstrict
from pyenclave.services.identity.caller import Caller

__all__ = ["JSON", "Answer", "Call", "Handler"]

JSON = "application/json; charset=utf-8"


@dataclass(slots=True)
class Call:
    """
    A request.

    Attributes:
        method: Upper case.
        path: The path in its canonical form.
        params: What the route's ``{name}`` segments are.
        query: The parameters of the query; each occurred once.
        headers: Names in lower case.
        body: The whole body.
        client: Address of the peer.
        api_version: The version asked for; empty where a route has none.
        request_id: Identifier of this request, also in the answer.
        caller: Who asks; None on anonymous routes.
        json_depth: How deep `json` may be nested.

    """

    method: str
    path: str
    params: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(repr=False)  # they have the token
    body: bytes = field(repr=False)
    client: str
    api_version: str
    request_id: str
    caller: Caller | None = None
    json_depth: int = 24

    def json(self) -> dict[str, Any]:
        """
        Return the body, a JSON object.

        Raises:
            ServiceError: 415 it says that it is something else; 400 it is malformed or ambiguous.

        """
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self.body and kind != "application/json":
            raise ServiceError(
                "the body must be application/json", status=415, error_code="UnsupportedMediaType"
            )
        try:
            return jsonstrict.object_of(
                self.body, "body", max_depth=self.json_depth, max_size=len(self.body)
            )
        except EnclaveError as error:
            # These texts are ours: they name what is wrong, and at most a member of the caller's.
            raise ServiceError(
                str(error), status=400, error_code="BadParameter", found=error.found
            ) from None

    def require_caller(self) -> Caller:
        """Return who asks; only for routes that are not anonymous."""
        if self.caller is None:
            raise AssertionError("an anonymous route asks for its caller")
        return self.caller


@dataclass(slots=True)
class Answer:
    """
    An answer.

    Attributes:
        body: A JSON object, bytes as they are, or nothing.
        status: HTTP status.
        headers: Further headers.
        content_type: Of the body.

    """

    body: Mapping[str, Any] | bytes | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = JSON


Handler = Callable[[Call], Awaitable[Answer]]
