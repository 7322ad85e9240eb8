"""
`Service`: an ASGI application that checks a request's form before anybody looks at its content.

In this order: path, route, rate, authentication, version, query, body, handler. While its body is
awaited a request holds none of the places of those that are worked on. What fails is answered as
Azure answers (``{"error": {"code", "message"}}``); nothing that we did not write ourselves leaves
the service.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from pyenclave.errors import ConfigurationError, ServiceError
from pyenclave.services.identity.caller import Caller
from pyenclave.services.web.bodies import Unfinished
from pyenclave.services.web.call import Answer, Call, Handler
from pyenclave.services.web.limits import Buckets, Limits, address_group
from pyenclave.services.web.logs import clean, logger, trace
from pyenclave.services.web.paths import Router, query_of, segments_of

__all__ = ["Answer", "Authenticates", "Call", "Handler", "Limits", "Service", "error_body"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# A second one of these would be read differently by different readers.
_ONCE: Final = frozenset(
    {"authorization", "content-length", "content-type", "content-encoding", "host"}
    | {"transfer-encoding"}
)
# Where our own server hands the request's `Direct`; any other server has none.
DIRECT: Final = "pyenclave.direct"
_FIXED: Final = "\r\nx-content-type-options: nosniff\r\n"
_SWEEP_SECONDS: Final = 0.25
# A client's own name for its request: text that can stand in a header and in a log.
_CLIENT_ID: Final = b"x-ms-client-request-id"
_PLAIN_ID: Final = re.compile(rb"[A-Za-z0-9._:{}-]{1,128}")
_BODILESS: Final = frozenset({"GET", "DELETE", "HEAD", "OPTIONS"})


class Authenticates(Protocol):
    """What tells who asks; `pyenclave.services.identity.authenticate.Authenticator` does."""

    def remembered(self, headers: Mapping[str, str]) -> Caller | None:
        """Return the caller if his token was validated before and still holds."""

    async def authenticated(self, headers: Mapping[str, str]) -> Caller:
        """Return the caller; ServiceError 401 if there is none."""


class Direct(Protocol):
    """What our own server offers beside ASGI: no message for a body that is here, one write."""

    def body(self) -> bytes | None:
        """Return the whole body, once; None if it is still coming."""

    def respond(self, status: int, head: bytes, body: bytes) -> bool:
        """
        Write a whole answer; *head* is its header lines, each with its end.

        Returns:
            Whether it did; if not, the application sends in the ordinary way.

        """


@dataclass(frozen=True, slots=True)
class _Route:
    handler: Handler
    anonymous: bool
    versions: frozenset[str]


class _Disconnected(Exception):  # noqa: N818 - not an error: the peer left
    pass


class Service:
    """
    An ASGI application with strict routes.

    Args:
        name: For logs.
        api_versions: What ``api-version`` may be. Empty: the service has no versions.
        limits: Sizes, times, rates.
        authenticator: Tells who asks. Without one, every route must be anonymous.

    """

    def __init__(
        self,
        name: str,
        *,
        api_versions: Collection[str],
        limits: Limits | None = None,
        authenticator: Authenticates | None = None,
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
        self.authenticator = authenticator
        self._versions = frozenset(api_versions)
        self._router: Router[_Route] = Router()
        self._deadlines = _Deadlines()
        self._unfinished = Unfinished(self.limits)
        self._rates = Buckets(self.limits.rate, self.limits.burst)
        self._refusals = Buckets(self.limits.refusals, self.limits.refusals_burst)
        self._on_start: list[Callable[[], Awaitable[None] | None]] = []
        self.misconfigured: ConfigurationError | None = None  # why it did not start
        self._on_close: list[Callable[[], Awaitable[None] | None]] = []

    @property
    def app(self) -> Service:
        """The ASGI callable: the service itself."""
        return self

    def route(
        self,
        method: str,
        pattern: str,
        handler: Handler,
        *,
        anonymous: bool = False,
        api_versions: Collection[str] | None = None,
    ) -> None:
        """
        Answer *method* on *pattern* by *handler*.

        Args:
            method: Upper case.
            pattern: Path whose ``{name}`` segments are parameters. An empty segment is one, too.
            handler: Gives the answer, or raises ServiceError.
            anonymous: Anybody may ask; `Call.caller` is None.
            api_versions: Instead of the service's; empty: this route has no versions.

        Raises:
            ValueError: There is such a route, or no authenticator for one that needs it.

        """
        if not anonymous and self.authenticator is None:
            raise ValueError(f"{pattern} is not anonymous, and the service has no authenticator")
        versions = self._versions if api_versions is None else frozenset(api_versions)
        self._router.add(method, pattern, _Route(handler, anonymous, versions))

    def on_start(self, work: Callable[[], Awaitable[None] | None]) -> None:
        """Call *work* before the first request; in order of addition."""
        self._on_start.append(work)

    def on_close(self, work: Callable[[], Awaitable[None] | None]) -> None:
        """Call *work* after the last request; the one added last first."""
        self._on_close.append(work)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or the server's start and end."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"{self.name} speaks HTTP, not {scope['type']}")
        request_id = _request_id()
        try:
            answer = await self._guarded(scope, receive, request_id)
        except _Disconnected:
            return
        await _send(scope, send, answer, request_id)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            for work in self._on_start:
                await _called(work)
        except ConfigurationError as error:  # who started it is told in its own words
            self.misconfigured = error
            await send({"type": "lifespan.startup.failed", "message": clean(error)})
            return
        except Exception as error:  # whatever it is, the server must not start
            logger.error("%s does not start: %s", self.name, trace(error))
            await send({"type": "lifespan.startup.failed", "message": clean(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def close(self) -> None:
        """Do what was asked for with `on_close`; once."""
        while self._on_close:
            work = self._on_close.pop()
            try:
                await _called(work)
            except Exception as error:  # the others must be closed, too
                logger.error("%s does not close cleanly: %s", self.name, trace(error))

    async def _guarded(self, scope: Scope, receive: Receive, request_id: str) -> Answer:
        deadlines = self._deadlines
        if len(deadlines) >= self.limits.concurrent:
            return self._refused(_busy(), scope, request_id)
        task = deadlines.begin(self.limits.total_seconds)
        try:
            return await self._answer(scope, receive, request_id)
        except ServiceError as error:
            return self._refused(error, scope, request_id)
        except asyncio.CancelledError:
            if not deadlines.late(task):
                raise  # the server ends
            task.uncancel()
            return self._too_late(scope, request_id)
        except TimeoutError:
            return self._too_late(scope, request_id)
        except _Disconnected:
            raise
        except Exception as error:  # the caller learns that it failed, and no more
            logger.error("%s request %s failed: %s", self.name, request_id, trace(error))
            internal = ServiceError(
                f"the request failed inside the service; it is number {request_id} in its log",
                status=500,
                error_code="InternalError",
            )
            return Answer(error_body(internal), status=500)
        finally:
            deadlines.end(task)

    def _too_late(self, scope: Scope, request_id: str) -> Answer:
        logger.error("%s request %s took too long", self.name, request_id)
        late = ServiceError("no answer in time", status=503, error_code="ServiceUnavailable")
        return self._refused(late, scope, request_id)

    def _refused(self, error: ServiceError, scope: Scope, request_id: str) -> Answer:
        first = error.status == 401 and error.inner is None  # how Azure's clients begin
        logger.log(
            logging.DEBUG if first else logging.INFO,
            "%s request %s: %s %s: %d %s %s: %s%s",
            self.name,
            request_id,
            clean(scope["method"], 16),
            clean(scope["path"], 120),
            error.status,
            error.error_code,
            error.inner or "-",
            clean(error.message),
            ""
            if error.expected is None and error.found is None
            else f" (expected {clean(error.expected)}, found {clean(error.found)})",
        )
        headers: dict[str, str] = {}
        if error.challenge is not None:
            headers["www-authenticate"] = error.challenge
        if error.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        if error.status == 405 and error.expected:
            headers["allow"] = str(error.expected)
        return Answer(error_body(error), status=error.status, headers=headers)

    async def _answer(self, scope: Scope, receive: Receive, request_id: str) -> Answer:
        limits = self.limits
        raw = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogateescape")
        raw = raw.partition(b"?")[0]
        prefix = scope.get("root_path", "").encode("utf-8")
        if prefix and raw.startswith(prefix):
            raw = raw[len(prefix) :]
        method = scope["method"]
        client = (scope.get("client") or ("",))[0]
        group = address_group(client)
        _take(self._rates, group)
        _spare(self._refusals, group)
        who: object = group
        try:
            segments = segments_of(raw, limits.path)
            found = self._router.find(method, segments)
            if isinstance(found, frozenset):
                raise _no_route(found)
            route, params = found
            headers = _headers(scope["headers"], limits.header)
            if "host" not in headers and scope.get("http_version") == "1.1":  # RFC 9112, 3.2
                raise ServiceError("no Host header", status=400, error_code="BadParameter")
            caller: Caller | None = None
            if not route.anonymous:
                caller = await self._caller(headers)
                who = (caller.tenant, caller.object_id)
                _take(self._rates, who)
                _spare(self._refusals, who)
            query = query_of(scope["query_string"], limits.path)
            version = _version(query, route.versions)
            call = Call(
                method=method,
                path="/" + "/".join(segments),
                params=params,
                query=query,
                headers=headers,
                body=await self._body(method, headers, scope, receive, group),
                client=client,
                api_version=version,
                request_id=request_id,
                caller=caller,
                json_depth=limits.json_depth,
            )
            return await route.handler(call)
        except ServiceError as error:
            # A first request without a token is how Azure's clients begin: no guess.
            if error.status in (403, 404) or (error.status == 401 and error.inner is not None):
                self._refusals.take(who)
            raise

    async def _caller(self, headers: Mapping[str, str]) -> Caller:
        authenticator = self.authenticator
        if authenticator is None:
            raise AssertionError("checked by route()")
        return authenticator.remembered(headers) or await authenticator.authenticated(headers)

    async def _body(
        self, method: str, headers: Mapping[str, str], scope: Scope, receive: Receive, group: str
    ) -> bytes:
        length = headers.get("content-length", "0")
        chunked = "transfer-encoding" in headers
        if length == "0" and not chunked:
            return b""
        if chunked and headers["transfer-encoding"].lower() != "chunked":
            raise ServiceError("Transfer-Encoding", status=400, error_code="BadParameter")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ServiceError(
                "the body must not be compressed", status=415, error_code="UnsupportedMediaType"
            )
        if not chunked:
            if not (length.isascii() and length.isdigit() and len(length) < 16):
                raise ServiceError("Content-Length", status=400, error_code="BadParameter")
            if int(length) > self.limits.body:
                raise self._too_large()
        direct = scope.get(DIRECT)
        body: bytes | None = None if direct is None else direct.body()
        if body is None:
            body = await self._awaited(receive, group)
        elif len(body) > self.limits.body:
            raise self._too_large()
        if body and method in _BODILESS:
            raise ServiceError(f"{method} has no body here", status=400, error_code="BadParameter")
        return body

    async def _awaited(self, receive: Receive, group: str) -> bytes:
        # Who sends slowly waits for himself: the place is for others until there is work to do.
        task = self._deadlines.pause()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await self._received(receive, group)
        except TimeoutError:
            raise ServiceError(
                "the body did not come in time", status=408, error_code="RequestTimeout"
            ) from None
        if len(self._deadlines) >= self.limits.concurrent:
            raise _busy()
        self._deadlines.resume(task, self.limits.total_seconds)
        return body

    async def _received(self, receive: Receive, group: str) -> bytes:
        unfinished = self._unfinished
        held = bytearray()  # not a list: parts of one byte would each cost fifty
        unfinished.begin(group)
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Disconnected
                part: bytes = message.get("body", b"")
                if len(held) + len(part) > self.limits.body:
                    raise self._too_large()
                if not message.get("more_body", False):
                    return bytes(held) + part if held else part
                unfinished.hold(group, len(part))
                held += part
        finally:
            unfinished.end(group, len(held))

    def _too_large(self) -> ServiceError:
        return ServiceError(
            f"the body is larger than {self.limits.body} bytes",
            status=413,
            error_code="RequestEntityTooLarge",
        )


class _Deadlines:
    """When running requests must have ended: one timer for all; a request pays for none."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, seconds: float) -> asyncio.Task[Any]:
        """Start the time of this task."""
        task = _current()
        self.resume(task, seconds)
        return task

    def pause(self) -> asyncio.Task[Any]:
        """Take this task out: it waits for its peer."""
        task = _current()
        self._running.pop(task, None)
        return task

    def resume(self, task: asyncio.Task[Any], seconds: float) -> None:
        """Start the time of *task*, anew if it was paused."""
        loop = task.get_loop()
        self._running[task] = loop.time() + seconds
        if self._timer is None:
            pause = min(_SWEEP_SECONDS, seconds)
            self._timer = loop.call_later(pause, self._sweep, loop, pause)

    def end(self, task: asyncio.Task[Any]) -> None:
        """The task has its answer."""
        self._running.pop(task, None)
        self._late.discard(task)

    def late(self, task: asyncio.Task[Any]) -> bool:
        """Whether it was ended for its time, and not by the server."""
        return task in self._late

    def _sweep(self, loop: asyncio.AbstractEventLoop, pause: float) -> None:
        self._timer = None
        now = loop.time()
        for task, deadline in self._running.items():
            if deadline <= now and task not in self._late:
                self._late.add(task)
                task.cancel()
        if self._running:
            self._timer = loop.call_later(pause, self._sweep, loop, pause)


def _current() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a request is answered in a task")
    return task


async def _called(work: Callable[[], Awaitable[None] | None]) -> None:
    result = work()
    if inspect.isawaitable(result):
        await result


_NUMBERS: Final[list[str]] = []
os.register_at_fork(after_in_child=_NUMBERS.clear)  # or two processes would use the same


def _request_id() -> str:
    """Return a fresh number of 128 random bits; the system is asked for some at once."""
    try:
        number = _NUMBERS.pop()
    except IndexError:  # asked for, not looked at before: threads share the list
        drawn = os.urandom(16 * 64).hex()
        number = drawn[:32]
        _NUMBERS.extend([drawn[at : at + 32] for at in range(32, len(drawn), 32)])
    return f"{number[:8]}-{number[8:12]}-{number[12:16]}-{number[16:20]}-{number[20:]}"


def _take(buckets: Buckets, key: object) -> None:
    wait = buckets.take(key)
    if wait:
        raise _too_many(wait)


def _spare(buckets: Buckets, key: object) -> None:
    wait = buckets.wait(key)
    if wait:
        raise _too_many(wait)


def _busy() -> ServiceError:
    return ServiceError("the service is busy", status=503, error_code="ServerBusy", retry_after=1)


def _too_many(wait: float) -> ServiceError:
    return ServiceError("too many requests", status=429, error_code="Throttled", retry_after=wait)


def _no_route(methods: frozenset[str]) -> ServiceError:
    if methods:
        return ServiceError(
            "the method does not belong to this path",
            status=405,
            error_code="MethodNotAllowed",
            expected=", ".join(sorted(methods)),
        )
    return ServiceError("there is nothing at this path", status=404, error_code="NotFound")


def _headers(raw: Collection[tuple[bytes, bytes]], limit: int) -> dict[str, str]:
    found: dict[str, str] = {}
    size = 0
    for name_bytes, value_bytes in raw:
        size += len(name_bytes) + len(value_bytes) + 4
        name = name_bytes.decode("latin-1").lower()
        value = value_bytes.decode("latin-1").strip()
        if name in found:
            if name in _ONCE:
                raise ServiceError(
                    "a header occurs twice", status=400, error_code="BadParameter", found=name
                )
            value = f"{found[name]}, {value}"
        found[name] = value
    if size > limit:
        raise ServiceError(
            "the headers are too large", status=431, error_code="RequestHeaderFieldsTooLarge"
        )
    if "content-length" in found and "transfer-encoding" in found:
        raise ServiceError("two lengths of one body", status=400, error_code="BadParameter")
    return found


def _version(query: Mapping[str, str], versions: frozenset[str]) -> str:
    if not versions:
        return query.get("api-version", "")
    version = query.get("api-version")
    if version is None or version not in versions:
        raise ServiceError(
            "api-version is missing" if version is None else "api-version is not supported",
            status=400,
            error_code="BadParameter",
            inner="UnsupportedApiVersion",
            expected=", ".join(sorted(versions)),
            found=version,
        )
    return version


def error_body(error: ServiceError) -> dict[str, Any]:
    """Return the body that tells *error*: code, message, and reference id if there is one."""
    message = error.message or error.error_code
    told: dict[str, Any] = {"code": error.error_code, "message": message}
    if error.reference is not None:
        told["message"] = f"{message} (reference {error.reference})"
        told["reference"] = error.reference
    if error.inner is not None:
        told["innererror"] = {"code": error.inner}
    return {"error": told}


async def _send(scope: Scope, send: Send, answer: Answer, request_id: str) -> None:
    body = answer.body
    if body is None:
        body = b""
    elif not isinstance(body, bytes):
        body = msgspec.json.encode(body)
    # Taken out: what it holds has the scope, and neither would go before a collection of garbage.
    direct = scope.pop(DIRECT, None)
    client_id = _client_id(scope)
    if direct is not None and direct.respond(
        answer.status, _head(answer, body, request_id, client_id), body
    ):
        return
    headers = [
        (b"content-length", str(len(body)).encode("ascii")),
        (b"x-ms-request-id", request_id.encode("ascii")),
        (b"x-content-type-options", b"nosniff"),
    ]
    if body:
        headers.append((b"content-type", answer.content_type.encode("latin-1")))
    if client_id is not None:
        headers.append((_CLIENT_ID, client_id))
    if "cache-control" not in answer.headers:
        headers.append((b"cache-control", b"no-store"))
    for name, value in answer.headers.items():
        headers.append((name.encode("latin-1"), value.encode("latin-1")))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _client_id(scope: Scope) -> bytes | None:
    """Return the client's own name for its request, if it can stand in an answer."""
    for name, value in scope["headers"]:
        if name == _CLIENT_ID and _PLAIN_ID.fullmatch(value):
            found: bytes = value
            return found
    return None


def _head(answer: Answer, body: bytes, request_id: str, client_id: bytes | None) -> bytes:
    """Return the header lines of *answer*, each with its end."""
    text = f"content-length: {len(body)}\r\nx-ms-request-id: {request_id}{_FIXED}"
    if body:
        text += f"content-type: {answer.content_type}\r\n"
    lines = 4 if body else 3
    if client_id is not None:
        text += f"x-ms-client-request-id: {client_id.decode('ascii')}\r\n"
        lines += 1
    given = answer.headers
    if "cache-control" not in given:
        text += "cache-control: no-store\r\n"
        lines += 1
    if given:
        lines += len(given)
        text += "".join([f"{name}: {value}\r\n" for name, value in given.items()])
    head = text.encode("latin-1")
    if head.count(b"\n") != lines or head.count(b"\r") != lines:
        raise ValueError("a line break in a header of an answer")
    return head
