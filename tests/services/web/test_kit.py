"""Requests in any wrong form, and the limits of a service; the server is in test_run.py."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import ServiceError
from pyenclave.services.attestation import tokens
from pyenclave.services.identity.caller import Caller
from pyenclave.services.web import kit
from pyenclave.services.web.kit import Answer, Call, Limits, Service
from pyenclave.services.web.limits import Buckets, address_group
from pyenclave.services.web.logs import clean

CALLER = Caller("t", "o", None, "app", "00", 2e9)


class Anyone:
    """Lets a header in, and refuses the one that says so."""

    def remembered(self, headers: Mapping[str, str]) -> Caller | None:
        return CALLER if headers.get("authorization") == "Bearer good" else None

    async def authenticated(self, headers: Mapping[str, str]) -> Caller:
        inner = "signature" if "authorization" in headers else None
        raise ServiceError(
            "no token", status=401, error_code="Unauthorized", inner=inner, challenge="Bearer x"
        )


class Reply:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def code(self) -> str:
        word: str = json.loads(self.body)["error"]["code"]
        return word


async def _ask(
    app: Any,
    method: str,
    path: bytes,
    query: bytes,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
) -> Reply:
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return parts.pop(0) if parts else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path.decode("latin-1"),
        "raw_path": path,
        "query_string": query,
        "headers": headers,
        "client": ("192.0.2.1", 5),
    }
    await app(scope, receive, send)
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], told, sent[1]["body"])


def ask(
    service: Service,
    method: str = "GET",
    path: bytes = b"/things/a",
    query: bytes = b"api-version=1",
    body: bytes = b"",
    *headers: tuple[bytes, bytes],
    token: bytes | None = b"good",
    kind: bytes = b"application/json",
) -> Reply:
    sent = list(headers)
    if token is not None:
        sent.append((b"Authorization", b"Bearer " + token))
    if body:
        sent.append((b"Content-Type", kind))
        sent.append((b"Content-Length", str(len(body)).encode()))
    return asyncio.run(_ask(service.app, method, path, query, sent, body))


async def echo(call: Call) -> Answer:
    return Answer({"params": dict(call.params), "query": dict(call.query), "path": call.path})


async def take(call: Call) -> Answer:
    return Answer({"got": call.json(), "who": call.require_caller().object_id}, status=201)


async def public(call: Call) -> Answer:
    return Answer(b"keys", content_type="text/plain", headers={"x-own": "1"})


async def broken(call: Call) -> Answer:
    raise RuntimeError("secret eyJhbGciOiJub25lIn0.eyJhIjoxMjM0NX0.c2lnbmF0dXJl\nnext line")


def make(**limits: Any) -> Service:
    service = Service(
        "test", api_versions=("1", "2"), limits=Limits(**limits), authenticator=Anyone()
    )
    service.route("GET", "/things/{name}", echo)
    service.route("GET", "/things/{name}/", echo)
    service.route("POST", "/things/{name}", take)
    service.route("POST", "/things/{name}//release", echo)
    service.route("POST", "/things/{name}/{version}/release", echo)
    service.route("GET", "/things/{name}/versions", echo)
    service.route("GET", "/certs", public, anonymous=True, api_versions=())
    service.route("GET", "/broken", broken, anonymous=True, api_versions=())
    return service


BAD_PATHS = {
    "dots": b"/things/../certs",
    "dot": b"/things/./a",
    "encoded dots": b"/things/%2e%2e/a",
    "encoded dots, upper case": b"/things/%2E%2e",
    "encoded slash": b"/things/a%2fb",
    "twice encoded": b"/things/%252e%252e",
    "backslash": b"/things/..\\a",
    "encoded backslash": b"/things/a%5cb",
    "zero": b"/things/a\0b",
    "encoded zero": b"/things/a%00",
    "not ASCII": "/things/é".encode(),
    "encoded, not ASCII": b"/things/%c3%a9",
    "overlong UTF-8": b"/things/%c0%af",
    "encoded letter": b"/things/%61",
    "half an escape": b"/things/%4",
    "space": b"/things/a b",
    "line": b"/things/a\r\nx: y",
    "no slash": b"things/a",
    "an address": b"http://host/things/a",
    "many segments": b"/a" * 40,
}


@pytest.mark.parametrize("path", BAD_PATHS.values(), ids=BAD_PATHS)
def test_a_path_with_two_readings_is_refused_before_it_is_routed(path: bytes) -> None:
    """SKR-11, SVC-03: only the canonical form of a path reaches a handler."""
    reply = ask(make(), path=path)
    assert (reply.status, reply.code) == (400, "BadParameter")


def test_an_empty_segment_is_routed_only_where_a_pattern_has_one() -> None:
    """Azure asks for the newest version with a double slash; nothing else has one."""
    service = make()
    found = json.loads(ask(service, "POST", b"/things/a//release").body)
    assert found["params"] == {"name": "a"}
    assert ask(service, "POST", b"/things//v/release").status == 404
    assert ask(service, path=b"//things/a").status == 404
    assert ask(service, path=b"/things/a//").status == 404
    assert ask(service, path=b"/things/").status == 404
    assert ask(service, path=b"/things/a/").status == 200


def test_a_fixed_segment_goes_before_a_parameter_and_nothing_is_lost() -> None:
    """Both readings of a path are tried, in one order."""
    service = make()
    assert json.loads(ask(service, path=b"/things/a/versions").body)["params"] == {"name": "a"}
    found = json.loads(ask(service, "POST", b"/things/a/versions/release").body)
    assert found["params"] == {"name": "a", "version": "versions"}


def test_what_may_be_encoded_means_the_same_encoded() -> None:
    """Colons and the like have two spellings and one meaning."""
    assert json.loads(ask(make(), path=b"/things/a%3Areset").body)["params"]["name"] == "a:reset"


def test_unknown_paths_and_methods_are_told_apart() -> None:
    """404, and 405 with what there is."""
    service = make()
    assert ask(service, path=b"/nothing").status == 404
    reply = ask(service, "PUT", b"/things/a")
    assert (reply.status, reply.headers["allow"]) == (405, "GET, POST")
    assert ask(service, path=b"/a" + b"b" * 3000).status == 414


BAD_QUERIES = {
    "twice": b"api-version=1&api-version=1",
    "no value": b"api-version=1&x",
    "no name": b"api-version=1&=x",
    "empty part": b"api-version=1&",
    "bad escape": b"api-version=1&x=%zz",
    "not UTF-8": b"api-version=1&x=%ff",
    "control": b"api-version=1&x=%0a",
    "raw bytes": b"api-version=1&x=\xc3\xa9",
    "many": b"api-version=1&" + b"&".join(b"a%d=1" % i for i in range(50)),
    "no version": b"",
    "unknown version": b"api-version=3",
    "empty version": b"api-version=",
}


@pytest.mark.parametrize("query", BAD_QUERIES.values(), ids=BAD_QUERIES)
def test_an_ambiguous_query_is_refused(query: bytes) -> None:
    """Each parameter occurs once, is text, and the version is one we speak."""
    reply = ask(make(), query=query)
    assert (reply.status, reply.code) == (400, "BadParameter")


def test_parameters_are_decoded_once() -> None:
    """An escaped percent sign stays one."""
    reply = ask(make(), query=b"api-version=2&x=%2525+y%26&$filter=a()")
    assert json.loads(reply.body)["query"] == {"api-version": "2", "x": "%25 y&", "$filter": "a()"}


BAD_BODIES = {
    "nothing": b"",
    "not JSON": b"{",
    "not an object": b"[1]",
    "a name twice": b'{"a": 1, "a": 2}',
    "a name twice, deeper": b'{"b": {"a": 1, "a": 2}}',
    "NaN": b'{"a": NaN}',
    "huge number": b'{"a": ' + b"9" * 400 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "after the end": b"{} {}",
    "too deep": b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}",
    "very deep": b'{"a": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_two_readers_could_differ_about_is_refused(body: bytes) -> None:
    """SVC-01: depth, duplicate names, numbers, text."""
    reply = ask(make(), "POST", body=body)
    assert (reply.status, reply.code) == (400, "BadParameter")


def test_a_good_body_arrives_with_its_caller() -> None:
    """And the answer has status, type and number."""
    reply = ask(make(), "POST", body=b'{"a": [1, "x"]}', kind=b"Application/JSON; charset=utf-8")
    assert reply.status == 201
    assert json.loads(reply.body) == {"got": {"a": [1, "x"]}, "who": "o"}
    assert len(reply.headers["x-ms-request-id"]) == 36
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["cache-control"] == "no-store"


def test_other_forms_of_a_body_are_refused() -> None:
    """Type, encoding, length, and a body where none belongs."""
    service = make(body=100)
    assert ask(service, "POST", body=b"{}", kind=b"text/plain").status == 415
    gzip = (b"Content-Encoding", b"gzip")
    assert ask(service, "POST", b"/things/a", b"api-version=1", b"{}", gzip).status == 415
    assert ask(service, "POST", body=b"x" * 101).status == 413
    chunked = (b"transfer-encoding", b"chunked")
    asked = ask(service, "POST", b"/things/a", b"api-version=1", b"", chunked, kind=b"")
    assert asked.status == 400
    assert ask(service, "GET", body=b"{}").status == 400
    for length in (b"-1", b"+5", b"0x5", b"5 5", b"\xb2", b"9" * 30):
        header = (b"content-length", length)
        assert ask(service, "POST", b"/things/a", b"api-version=1", b"", header).status == 400


def test_a_header_that_counts_twice_is_refused() -> None:
    """Two tokens, two lengths: whoever is in front may have read the other one."""
    service = make()
    for name in (b"authorization", b"host", b"content-type"):
        twice = ((name, b"a"), (name.upper(), b"b"))
        assert (
            ask(service, "GET", b"/things/a", b"api-version=1", b"", *twice, token=None).status
            == 400
        )
    both = ((b"content-length", b"3"), (b"transfer-encoding", b"chunked"))
    assert ask(service, "POST", b"/things/a", b"api-version=1", b"", *both).status == 400
    large = (b"x-long", b"y" * 40_000)
    assert ask(service, "GET", b"/things/a", b"api-version=1", b"", large).status == 431


def test_no_bytes_of_a_request_make_the_service_fail() -> None:
    """Whatever path, query, body and header are: an answer that is not 500, and JSON."""
    service = make(rate=None, refusals=None)
    words = st.sampled_from(
        [b"/", b"things", b"a", b"%2e", b"..", b"%", b"&", b"=", b"{", b'"', b"["]
    )
    pieces = st.lists(words | st.binary(max_size=6), max_size=12).map(b"".join)

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(
        st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "BREW"]),
        pieces.map(lambda tail: b"/" + tail),
        pieces.map(lambda tail: b"api-version=1&x=" + tail),
        pieces,
        pieces,
    )
    def run(method: str, path: bytes, query: bytes, body: bytes, header: bytes) -> None:
        reply = ask(service, method, path, query, body, (b"x-any", header))
        assert reply.status != 500
        json.loads(reply.body)
        assert reply.headers["x-ms-request-id"]

    run()


def test_a_body_in_another_transfer_coding_is_refused() -> None:
    """gzip under chunked is a body that nobody here reads."""
    for coding in (b"gzip, chunked", b"identity", b"chunked, chunked"):
        header = (b"transfer-encoding", coding)
        assert ask(make(), "POST", b"/things/a", b"api-version=1", b"", header).status == 400


def test_a_call_does_not_show_its_token() -> None:
    """SVC-07: also if somebody logs it."""
    call = Call("GET", "/", {}, {}, {"authorization": "Bearer secret"}, b"body", "", "", "")
    assert "secret" not in repr(call)


def test_the_challenge_comes_before_version_and_body() -> None:
    """Azure's first request has neither token nor body."""
    reply = ask(make(), "POST", query=b"", token=None)
    assert (reply.status, reply.code) == (401, "Unauthorized")
    assert reply.headers["www-authenticate"] == "Bearer x"


def test_a_route_that_is_not_anonymous_needs_an_authenticator() -> None:
    """A forgotten authenticator is an error at the start, not an open door."""
    service = Service("open", api_versions=())
    with pytest.raises(ValueError, match="no authenticator"):
        service.route("GET", "/x", echo)
    service.route("GET", "/x", public, anonymous=True)
    with pytest.raises(ValueError, match="twice"):
        service.route("GET", "/x", public, anonymous=True)
    with pytest.raises(ValueError, match="twice"):
        service.route("GET", "/{a}/{a}", public, anonymous=True)


def test_what_fails_inside_is_told_to_nobody_and_logged_without_tokens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SVC-07: the caller gets a number; the log one line, its control bytes escaped."""
    with caplog.at_level(logging.INFO, logger="pyenclave.services"):
        reply = ask(make(), path=b"/broken", query=b"")
    assert (reply.status, reply.code) == (500, "InternalError")
    assert b"secret" not in reply.body
    assert reply.headers["x-ms-request-id"] in reply.body.decode()
    lines = [record.getMessage() for record in caplog.records]
    assert any("secret" in line and "<token>" in line for line in lines)
    assert not any("\n" in line or "eyJhbGci" in line for line in lines)


def test_log_text_is_one_bounded_line() -> None:
    """Line breaks, escapes, half characters and long secrets do not get through."""
    text = clean("a\r\nb\x1b[31m\u2028\ud800" + "A" * 500)
    assert text == "a\\x0d\\x0ab\\x1b[31m\\x2028\\xd800<long>"
    assert len(clean("x y " * 1000)) == 200


def test_an_error_shows_its_inner_code_and_reference_and_keeps_the_rest() -> None:
    """expected and found are the auditor's."""
    service = make()

    async def refuse(call: Call) -> Answer:
        error = ServiceError(
            "no", status=403, error_code="Forbidden", inner="ForbiddenByPolicy", found="hidden"
        )
        error.reference = "R1"
        raise error

    service.route("GET", "/no", refuse)
    reply = ask(service, path=b"/no")
    assert reply.status == 403
    assert b"hidden" not in reply.body
    assert json.loads(reply.body)["error"] == {
        "code": "Forbidden",
        "message": "no (reference R1)",
        "reference": "R1",
        "innererror": {"code": "ForbiddenByPolicy"},
    }


def test_guesses_are_slowed_down_and_good_requests_counted_apart() -> None:
    """SKR-14: refused requests draw from a smaller measure; first challenges do not."""
    service = make(refusals=0.001, refusals_burst=3)
    for _ in range(10):
        assert ask(service, token=None).status == 401
    statuses = [ask(service, token=b"bad").status for _ in range(5)]
    assert statuses == [401, 401, 401, 429, 429]
    assert int(ask(service).headers["retry-after"]) > 500


def test_too_many_requests_are_told_when_to_come_back() -> None:
    """A rate for each address and caller."""
    service = make(rate=0.5, burst=4)
    replies = [ask(service) for _ in range(6)]
    assert [reply.status for reply in replies] == [200] * 4 + [429] * 2
    assert replies[-1].headers["retry-after"] == "2"


def test_buckets_fill_again_and_their_number_is_bounded() -> None:
    """SVC-06, SVC-13: keys of an attacker's choice, clocks that jump."""
    now = 100.0
    buckets = Buckets(2.0, 2, clock=lambda: now)
    assert [buckets.take("a") for _ in range(3)] == [0.0, 0.0, 0.5]
    now = 101.0
    assert buckets.take("a") == 0.0
    now = 0.0  # never back
    assert buckets.wait("a") == 0.0
    for number in range(20_000):
        buckets.take(number)
    assert len(buckets) == 10_000


def test_addresses_count_as_networks() -> None:
    """One IPv6 client has 2^64 addresses."""
    assert address_group("2001:db8::1") == address_group("2001:db8::ffff:1")
    assert address_group("::ffff:192.0.2.7") == address_group("192.0.2.7")
    assert address_group("strange:") == "strange:"


def test_requests_beyond_the_limit_are_told_that_the_service_is_busy() -> None:
    """Nothing queues without end."""
    service = make(concurrent=2)
    gate: list[asyncio.Event] = []

    async def wait(call: Call) -> Answer:
        await gate[0].wait()
        return Answer({})

    service.route("GET", "/wait", wait, anonymous=True, api_versions=())

    async def run() -> list[int]:
        gate.append(asyncio.Event())
        asked = [
            asyncio.create_task(_ask(service, "GET", b"/wait", b"", [], b"")) for _ in range(3)
        ]
        await asyncio.sleep(0)
        late = await asked[2]
        gate[0].set()
        return [late.status, (await asked[0]).status, (await asked[1]).status]

    assert asyncio.run(run()) == [503, 200, 200]
    assert ask(service).status == 200


def test_a_handler_that_takes_too_long_is_ended() -> None:
    """The whole request has a deadline."""
    service = make(total_seconds=0.02)
    ended: list[bool] = []

    async def slow(call: Call) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(True)
            raise
        return Answer({})

    service.route("GET", "/slow", slow, anonymous=True, api_versions=())
    assert ask(service, path=b"/slow").status == 503
    assert ended == [True]


@pytest.mark.parametrize(("draw", "size"), [(kit._request_id, 36), (tokens._identifier, 64)])
def test_no_identifier_is_given_twice_not_even_by_a_forked_child(
    draw: Callable[[], str], size: int
) -> None:
    drawn = [draw() for _ in range(200)]
    assert {len(name) for name in drawn} == {size}
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writable, " ".join(draw() for _ in range(20)).encode())
        os._exit(0)
    os.close(writable)
    with open(readable, encoding="ascii") as told:
        drawn += told.read().split()
    os.waitpid(child, 0)
    drawn += [draw() for _ in range(200)]
    assert len(set(drawn)) == len(drawn) == 420


def test_start_and_end_are_told_in_order() -> None:
    """Lifespan: what was opened last is closed first, also if another one fails."""
    service = make()
    seen: list[str] = []

    async def opened() -> None:
        seen.append("start")

    def fails() -> None:
        seen.append("fails")
        raise OSError("disk")

    service.on_start(opened)
    service.on_close(lambda: seen.append("first"))
    service.on_close(fails)
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def run() -> None:
        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await service({"type": "lifespan"}, receive, send)

    asyncio.run(run())
    assert seen == ["start", "fails", "first"]
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
