"""The server on a socket: TLS, slow and greedy peers, its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import json
import os
import resource
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from pyenclave.errors import PlatformUnavailableError, ServiceError
from pyenclave.services.web.kit import Answer, Call, Limits, Service
from pyenclave.services.web.run import Server
from pyenclave.services.web.tls import DevCa, ServerTls, private_file


async def echo(call: Call) -> Answer:
    return Answer({"size": len(call.body), "client": call.client})


async def large(call: Call) -> Answer:
    return Answer(b"x" * (8 << 20), content_type="application/octet-stream")


def service(**limits: Any) -> Service:
    made = Service("test", api_versions=(), limits=Limits(**limits))
    made.route("GET", "/x", echo, anonymous=True)
    made.route("POST", "/x", echo, anonymous=True)
    made.route("GET", "/large", large, anonymous=True)
    return made


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """One server with short deadlines, without TLS."""
    limits = {"header_seconds": 0.2, "body_seconds": 0.2, "idle_seconds": 0.3, "header": 2000}
    made = service(**limits, body=10_000, total_seconds=0.5, connections=120)
    with Server(made, dangerous_no_tls=True) as server:
        yield server


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer(sock: socket.socket) -> bytes:
    """Read until the peer ends."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            got += data
    sock.close()
    return got


def test_tls_is_the_default_and_its_authority_is_handed_out() -> None:
    """A client that trusts ca_pem, and nothing else, gets through."""
    with Server(service()) as server:
        assert server.url.startswith("https://127.0.0.1:")
        assert server.ca_pem
        context = ssl.create_default_context(cadata=server.ca_pem.decode())
        reply = httpx.get(f"{server.url}/x", verify=context)
        assert reply.json() == {"size": 0, "client": "127.0.0.1"}
        assert "server" not in reply.headers
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{server.url}/x")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/x", verify=context)


def test_the_certificate_satisfies_a_strict_verifier(tmp_path: Path) -> None:
    """AKI, SKI, SAN; for every local name, and for no other."""
    authority = DevCa(tmp_path)
    for kind in ("ec", "rsa"):
        _, chain = authority.leaf(key=kind)
        leaf, top = (x509.load_der_x509_certificate(der) for der in chain)
        store = Store([top])
        names = (
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("::1")),
        )
        for name in names:
            PolicyBuilder().store(store).build_server_verifier(name).verify(leaf, [])
        other = PolicyBuilder().store(store).build_server_verifier(x509.DNSName("example.org"))
        with pytest.raises(x509.verification.VerificationError):
            other.verify(leaf, [])


def test_one_authority_serves_a_state_directory_and_its_key_is_private(tmp_path: Path) -> None:
    """Many that start at once agree; a key that others may read is refused."""
    made: list[bytes] = []
    threads = [threading.Thread(target=lambda: made.append(DevCa(tmp_path).pem)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    assert (tmp_path / "dev/ca.pem").read_bytes() == made[0]
    key = tmp_path / "dev/ca-key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path / "dev")) == ["ca-key.pem", "ca.pem"]
    key.chmod(0o644)
    with pytest.raises(PlatformUnavailableError, match="open to others"):
        DevCa(tmp_path)
    key.unlink()
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        DevCa(tmp_path)


def test_a_private_file_is_made_once(tmp_path: Path) -> None:
    """The second gets what the first wrote."""
    assert private_file(tmp_path / "k", b"one") == b"one"
    assert private_file(tmp_path / "k", b"two") == b"one"


def test_certificate_and_key_that_do_not_belong_together_are_refused() -> None:
    """Also a key with a passphrase: nobody is asked at a terminal."""
    first, second = DevCa(None).server(), DevCa(None).server()
    with pytest.raises(ValueError, match="not usable"):
        ServerTls(chain=first.chain, key=second.key).context()
    with pytest.raises(ValueError, match="not usable"):
        ServerTls(chain=b"", key=b"").context()


SLOW = {
    "nothing": b"",
    "half a request line": b"GET /x",
    "half the headers": b"GET /x HTTP/1.1\r\nHost: a\r\n",
    "half a body": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc",
    "half a chunk": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "half a second request": b"GET /x HTTP/1.1\r\nHost: a\r\n\r\nGET /x HT",
}


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
def test_a_peer_that_does_not_go_on_is_cut(plain: Server, sent: bytes) -> None:
    """SVC-02: a deadline on headers, body and idleness."""
    sock = connect(plain)
    sock.sendall(sent)
    got = answer(sock)
    assert b" 200 " not in got or sent.startswith(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")


def test_a_peer_that_drips_is_cut(plain: Server) -> None:
    """Slowloris: each byte in time, the whole too late."""
    sock = connect(plain)
    begun = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(b"GET /x HTTP/1.1\r\n")
        while time.monotonic() - begun < 15:
            sock.sendall(b"a: b\r\n")
            if plain_closed(sock):
                break
    assert time.monotonic() - begun < 15
    sock.close()


def plain_closed(sock: socket.socket) -> bool:
    sock.settimeout(0.05)
    try:
        return b"408" in (got := sock.recv(100)) or got == b""
    except TimeoutError:
        return False


def test_a_peer_that_does_not_read_its_answers_is_cut(plain: Server) -> None:
    """Answers that nobody takes do not hold a connection for ever."""
    sock = connect(plain)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
    ended = time.monotonic() + 20
    while time.monotonic() < ended:
        try:
            sock.send(b"\r\n")
        except OSError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the connection is still open")
    sock.close()


def test_many_slow_peers_do_not_stop_the_service(plain: Server) -> None:
    """More connections than there may be: those that waste time go first."""
    slow = []
    for number in range(200):
        sock = connect(plain)
        with contextlib.suppress(OSError):
            sock.sendall(b"GET /x HTTP/1.1\r\n" if number % 2 else b"POST /x HTTP/1.1\r\nA: b")
        slow.append(sock)
        if number % 50 == 49:
            assert httpx.get(f"{plain.url}/x", timeout=10).status_code == 200
    for sock in slow:
        sock.close()


HALF = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"


def connect_from(server: Server, address: str) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20, source_address=(address, 0))


def status_of(sock: socket.socket) -> int:
    """Return the status of the one answer that is there or comes."""
    return int(sock.recv(65536).split(b" ")[1])


def until(holds: Callable[[], bool]) -> None:
    ended = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ended
        time.sleep(0.005)


def test_unfinished_bodies_take_no_place_of_those_that_are_served() -> None:
    """More of them than `concurrent`, of one address; anonymous, as anybody may be."""
    made = service(concurrent=4, unfinished=8, body_seconds=60)
    with Server(made, dangerous_no_tls=True) as server:
        slow = [connect(server) for _ in range(16)]
        for sock in slow:
            sock.sendall(HALF % 4 + b"ab")
        until(lambda: len(select.select(slow, [], [], 0)[0]) >= 8)
        ready = select.select(slow, [], [], 0)[0]
        assert [status_of(sock) for sock in ready] == [429] * 8
        assert httpx.get(f"{server.url}/x").status_code == 200
        with connect_from(server, "127.0.0.2") as other:
            for _ in range(3):
                other.sendall(HALF % 4)
                other.sendall(b"abcd")
                assert status_of(other) == 200
        for sock in slow:
            if sock not in ready:
                sock.sendall(b"cd")
                assert status_of(sock) == 200
        with connect(server) as again:
            again.sendall(HALF % 4 + b"ab")
            until(lambda: len(made._unfinished) == 1)
            again.sendall(b"cd")
            assert status_of(again) == 200
        for sock in slow:
            sock.close()


def test_bytes_of_unfinished_bodies_are_bounded_for_one_address_and_for_all() -> None:
    """Held only while they come; who is over it is told so, and the others go on."""
    made = service(body=10_000, unfinished_bytes=20_000, body_seconds=60)
    with Server(made, dangerous_no_tls=True) as server:
        begun = {}
        for place, address in enumerate(("127.0.0.1", "127.0.0.2"), 1):
            begun[address] = connect_from(server, address)
            begun[address].sendall(HALF % 10_000 + b"x" * 9000)
            until(lambda held=9000 * place: made._unfinished.held == held)  # type: ignore[misc]
        for address, expected in (("127.0.0.1", 429), ("127.0.0.3", 503)):
            with connect_from(server, address) as more:
                more.sendall(HALF % 10_000 + b"x" * 9000)
                assert status_of(more) == expected
        until(lambda: made._unfinished.held == 18_000)
        for sock in begun.values():
            sock.sendall(b"x" * 1000)
            assert status_of(sock) == 200
            sock.close()
        assert (made._unfinished.held, len(made._unfinished)) == (0, 0)


def test_a_body_that_ends_while_the_service_is_busy_is_told_to_come_back() -> None:
    """The place is taken when the body is whole, and there must be one."""
    made = service(concurrent=1, body_seconds=60)
    may_end = threading.Event()

    async def wait(call: Call) -> Answer:
        while not may_end.is_set():
            await asyncio.sleep(0.005)
        return Answer({})

    made.route("GET", "/wait", wait, anonymous=True)
    with Server(made, dangerous_no_tls=True) as server, connect(server) as late:
        late.sendall(HALF % 4 + b"ab")
        until(lambda: len(made._unfinished) == 1)
        with connect(server) as busy:
            busy.sendall(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            until(lambda: len(made._deadlines) == 1)
            late.sendall(b"cd")
            assert status_of(late) == 503
            may_end.set()
            assert status_of(busy) == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 3000 + b"\r\n\r\n", b"431"),
        (b"GET /x HTTP/1.1\r\n" + b"a: b\r\n" * 2000 + b"\r\n", b"431"),
        (b"GET /x HTTP/1.1\r\nX: " + b"y" * 600_000, b"431"),
        (b"GET /" + b"y" * 600_000, b"431"),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 10001\r\n\r\n", b"413"),
        (
            b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            + (b"400\r\n" + b"z" * 1024 + b"\r\n") * 20,
            b"413",
        ),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n", b"4"),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", b"400"),
        (b"GET  HTTP/1.1\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
    ],
    ids=[
        *("long header", "many headers", "endless header", "endless path", "long body"),
        *("long chunks", "huge length", "two lengths", "no path", "no HTTP", "TLS to plain"),
    ],
)
def test_what_is_too_large_or_malformed_is_refused_without_being_kept(
    plain: Server, sent: bytes, status: bytes
) -> None:
    """SVC-01: caps before memory."""
    sock = connect(plain)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(sent)
    got = answer(sock)
    if got:  # a peer that still sends when it is refused may see a reset instead
        assert got.split(b" ")[1].startswith(status)
        if status in (b"413", b"431"):
            head, _, body = got.partition(b"\r\n\r\n")
            assert f"content-length: {len(body)}\r\n".encode() in head
            assert "too large" in json.loads(body)["error"]["message"]
    assert httpx.get(f"{plain.url}/x").status_code == 200


def test_a_request_of_http_1_1_names_its_host(plain: Server) -> None:
    """RFC 9112, 3.2: otherwise 400; one of HTTP/1.0 need not."""
    for sent, status in (
        (b"GET /x HTTP/1.1\r\nConnection: close\r\n\r\n", b"400"),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n", b"400"),
        (b"GET /x HTTP/1.0\r\n\r\n", b"200"),
    ):
        sock = connect(plain)
        sock.sendall(sent)
        assert answer(sock).split(b" ")[1] == status


def test_trailers_do_not_become_headers(plain: Server) -> None:
    """A header that comes after the checks was never checked."""
    sock = connect(plain)
    sock.sendall(
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1\r\nx\r\n0\r\nAuthorization: Bearer later\r\n\r\n"
    )
    assert b" 200 " not in answer(sock)


def test_pipelined_requests_are_answered_in_order_up_to_a_bound(plain: Server) -> None:
    """A few; thousands in one packet end the connection."""
    sock = connect(plain)
    sock.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * 3)
    sock.shutdown(socket.SHUT_WR)
    assert answer(sock).count(b"HTTP/1.1 200") >= 1
    sock = connect(plain)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * 5000)
    assert answer(sock).count(b"HTTP/1.1 200") < 5000


def test_a_body_in_parts_and_one_that_comes_with_its_header_are_the_same() -> None:
    """The second is taken without a message of ASGI; a peer that waits for 100 gets it."""
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    made = service()
    with Server(made, dangerous_no_tls=True) as server:
        for sent in (
            [head + b"Content-Length: 9\r\n\r\n" + b"x" * 9],
            [head + b"Content-Length: 9\r\n\r\n" + b"x" * 4, b"x" * 5],
            [chunked + b"9\r\nxxxxxxxxx\r\n0\r\n\r\n"],
            [chunked + b"4\r\nxxxx\r\n5\r\nxxxxx\r\n", b"0\r\n\r\n"],
            [head + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n", b"x" * 9],
        ):
            sock = connect(server)
            sock.sendall(sent[0])
            for part in sent[1:]:
                until(lambda: len(made._unfinished) == 1)
                sock.sendall(part)
            got = answer(sock)
            assert got.count(b"HTTP/1.1 200") == 1, (sent, got)
            assert got.endswith(b'{"size":9,"client":"127.0.0.1"}')
            assert (b"100 Continue" in got) is (b"100-continue" in sent[0])


def test_an_answer_names_the_request_as_its_client_did(plain: Server) -> None:
    for given, told in (("a-1.{2}", "a-1.{2}"), ("a b", None), ("x" * 129, None), (None, None)):
        headers = {} if given is None else {"x-ms-client-request-id": given}
        reply = httpx.get(f"{plain.url}/x", headers=headers)
        assert reply.status_code == 200
        assert reply.headers.get("x-ms-client-request-id") == told
        assert len(reply.headers["x-ms-request-id"]) == 36


@pytest.mark.parametrize("name", ["content-type", "location"])
def test_an_answer_with_a_line_break_in_a_header_is_never_sent(name: str) -> None:
    async def split(call: Call) -> Answer:
        word = "text/plain\r\nx-injected: 1"
        return (
            Answer(b"x", content_type=word)
            if name == "content-type"
            else Answer(b"x", headers={name: word})
        )

    made = service()
    made.route("GET", "/split", split, anonymous=True)
    with Server(made, dangerous_no_tls=True) as server:
        sock = connect(server)
        sock.sendall(b"GET /split HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        got = answer(sock)
        assert b" 500 " in got
        assert b"injected" not in got


def test_a_request_that_was_answered_leaves_no_garbage() -> None:
    """Cycles would have the collector stop the service again and again."""
    with Server(service(), dangerous_no_tls=True) as server:
        sock = connect(server)
        sent = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"

        def ask() -> None:
            sock.sendall(sent)
            assert b" 200 " in sock.recv(65536)

        for _ in range(20):
            ask()
        gc.collect()
        gc.disable()
        try:
            for _ in range(200):
                ask()
            assert gc.collect() < 200
        finally:
            gc.enable()
        sock.close()


def test_a_process_that_serves_keeps_the_collector_off_what_was_there_before() -> None:
    """And whatever else runs in the process afterwards is collected again."""
    gc.unfreeze()  # what was there before the tests
    assert gc.get_freeze_count() == 0
    server = Server(service(), dangerous_no_tls=True)
    counts: list[int] = []
    up = threading.Event()

    def ready(url: str) -> None:
        counts.append(gc.get_freeze_count())
        up.set()

    thread = threading.Thread(target=server.run, args=(ready,))
    thread.start()
    assert up.wait(20)
    assert httpx.get(f"{server.url}/x").status_code == 200
    assert server._uvicorn is not None
    server._uvicorn.should_exit = True
    thread.join()
    assert counts[0] > 0
    assert gc.get_freeze_count() == 0
    with Server(service(), dangerous_no_tls=True):
        assert gc.get_freeze_count() == 0  # a part of somebody's process: his own affair


def fail(server: Server, times: int) -> tuple[int, int]:
    """Make requests that fail; return descriptors and threads once all connections are gone."""
    with httpx.Client() as client:
        for number in range(times):
            # Its answer also says that the connections before it were taken.
            assert client.get(f"{server.url}/nothing").status_code in (404, 429)
            if number % 4 == 0:
                sock = connect(server)
                sent = b"POST /x HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc"
                sock.sendall(sent[: number % 60])
                sock.close()
    ended = time.monotonic() + 30
    while server.connections and time.monotonic() < ended:
        time.sleep(0.01)
    return open_now()


def open_now() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_failing_requests_leak_nothing(plain: Server) -> None:
    """SVC-09: descriptors and threads are as many after errors as before."""
    before = fail(plain, 20)
    fail(plain, 200)
    until(lambda: all(now <= then for now, then in zip(open_now(), before, strict=True)))


@pytest.mark.long
def test_ten_thousand_failing_requests_leak_nothing() -> None:
    """SVC-09, in full: memory too."""

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    with Server(service(refusals=None), dangerous_no_tls=True) as server:
        before, pages = fail(server, 2000), memory()
        assert fail(server, 10_000) <= before
        assert memory() - pages < 2048  # 8 MiB


@pytest.mark.long
def test_a_thousand_slow_peers_do_not_stop_the_service() -> None:
    """SVC-02, in full: within header, body and idleness, and over TLS's handshake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        with Server(service()) as server:
            host, port = server.url.removeprefix("https://").split(":")
            context = ssl.create_default_context(cadata=(server.ca_pem or b"").decode())
            slow = []
            for number in range(1000):
                sock = socket.create_connection((host, int(port)), timeout=20)
                if number % 2:
                    sock = context.wrap_socket(sock, server_hostname=host)
                    sock.sendall(list(SLOW.values())[number // 2 % len(SLOW)])
                slow.append(sock)
            times = []
            with httpx.Client(verify=context) as client:
                for _ in range(200):
                    begun = time.monotonic()
                    assert client.get(f"{server.url}/x").status_code == 200
                    times.append(time.monotonic() - begun)
            assert max(times) < 5
            for sock in slow:
                sock.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_running_requests_end_before_the_server_does() -> None:
    """close() waits for them, and takes no others."""
    begun, may_end = threading.Event(), threading.Event()
    closed: list[str] = []
    made = Service("slow", api_versions=())

    async def slow(call: Call) -> Answer:
        begun.set()
        while not may_end.is_set():
            await asyncio.sleep(0.01)
        return Answer({"done": True})

    made.route("GET", "/slow", slow, anonymous=True)
    made.on_close(lambda: closed.append("closed"))
    got: list[int] = []
    server = Server(made, dangerous_no_tls=True).start()
    asking = threading.Thread(
        target=lambda: got.append(httpx.get(f"{server.url}/slow", timeout=30).status_code)
    )
    asking.start()
    assert begun.wait(20)
    closing = threading.Thread(target=server.close)
    closing.start()
    time.sleep(0.2)
    assert not closed
    may_end.set()
    closing.join(20)
    asking.join(20)
    assert (got, closed) == ([200], ["closed"])


def test_a_service_that_cannot_start_says_so() -> None:
    """And leaves no thread and no port behind."""
    made = service()

    def fails() -> None:
        raise OSError("no disk")

    made.on_start(fails)
    before = threading.active_count()
    with pytest.raises(ServiceError, match="did not start"):
        Server(made, dangerous_no_tls=True).start()
    until(lambda: threading.active_count() <= before)


def test_an_address_that_is_taken_is_an_error(plain: Server) -> None:
    """Not another port, not a wait."""
    port = int(plain.url.rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        Server(service(), port=port, dangerous_no_tls=True).listen()
