"""The server: in a thread of this process (``with Server(service)``), or blocking (`run`)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Final, Self

import uvicorn

from pyenclave.errors import ServiceError
from pyenclave.services.web.kit import Service
from pyenclave.services.web.limits import Limits
from pyenclave.services.web.protocol import Watch, protocol_class
from pyenclave.services.web.tls import DevCa, ServerTls

__all__ = ["Server", "bound", "settled", "url_of"]

_BACKLOG: Final = 2048
_HANDSHAKE_SECONDS: Final = 10.0
_SECOND_SIGNAL: Final = 0.5  # seconds
_SPARE_DESCRIPTORS: Final = 128
_MOST_CONNECTIONS: Final = 4096


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose TLS servers do not wait a minute for a handshake."""

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", _HANDSHAKE_SECONDS)
            options.setdefault("ssl_shutdown_timeout", 0.5)
        return await super().create_server(*args, **options)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End gracefully on SIGINT and SIGTERM, and then return: they are dealt with."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        begun: list[float] = []

        def stop(number: int, frame: FrameType | None) -> None:
            del number, frame
            begun.append(time.monotonic())
            # The second does not wait for running requests. Who signals a process and its group
            # sends two at once, and means one.
            self.force_exit = begun[-1] - begun[0] > _SECOND_SIGNAL
            self.should_exit = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _most_connections(limits: Limits) -> int:
    if limits.connections is not None:
        return limits.connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(16, min(_MOST_CONNECTIONS, soft - _SPARE_DESCRIPTORS))


def bound(host: str, port: int = 0) -> socket.socket:
    """
    Return a socket that listens; requests wait in it until somebody serves it.

    Args:
        host: Address of this machine, or a name of one.
        port: Port; 0: a free one.

    Raises:
        OSError: The address is taken, or not of this machine.

    """
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    # With its protocol named: asyncio sets TCP_NODELAY on no other, and each answer would wait for
    # the peer's delayed acknowledgement.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket, *, tls: bool = True, host: str | None = None) -> str:
    """Return the base URL of what is served on *sock*."""
    address, port = sock.getsockname()[:2]
    shown = host or address
    shown = f"[{shown}]" if ":" in shown else shown
    return f"{'https' if tls else 'http'}://{shown}:{port}"


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """
    Keep the garbage collector off what is there already, as long as the block runs.

    It would walk some hundred thousand objects that a service made at its start and never drops,
    and answer nobody for some dozen milliseconds. For processes that do nothing but serve: garbage
    of before the block is collected first, and cycles that are dropped in it only afterwards.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Server:
    """
    Serves an ASGI application on one address.

    Args:
        app: A `Service`, or any ASGI application.
        host: Address to listen on.
        port: Port; 0 for a free one.
        tls: Certificate and key. Without: one of an authority in memory, whose certificate is
            ``ca_pem``.
        dangerous_no_tls: Speak plain HTTP.
        limits: Of connections; a service's own by default.
        sock: What `bound` returned, instead of host and port.

    Attributes:
        url: The base address, once the server listens.
        ca_pem: The authority that its clients trust, PEM; None for the system's or without TLS.

    """

    def __init__(
        self,
        app: Any,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ServerTls | None = None,
        dangerous_no_tls: bool = False,
        limits: Limits | None = None,
        sock: socket.socket | None = None,
    ) -> None:
        if tls is not None and dangerous_no_tls:
            raise ValueError("either a certificate or no TLS")
        if tls is None and not dangerous_no_tls:
            tls = DevCa(None).server()
        self.limits = limits or (app.limits if isinstance(app, Service) else Limits())
        self.ca_pem: bytes | None = None if tls is None else tls.ca
        self.url = ""
        self._app = app
        self._context = None if tls is None else tls.context()
        self._address = (host, port)
        self._socket = sock
        self._uvicorn: _Uvicorn | None = None
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return 0 if self._watch is None else len(self._watch)

    def listen(self) -> str:
        """
        Take the address, and return the base URL; requests wait until the server runs.

        Raises:
            OSError: The address is taken, or not of this machine.

        """
        if self._socket is None:
            self._socket = bound(*self._address)
        self.url = url_of(self._socket, tls=self._context is not None)
        return self.url

    def _serve(self, ready: Callable[[], None]) -> None:
        self.listen()
        if self._socket is None:
            raise AssertionError("listen() made it")
        watch = self._watch = Watch(self.limits, _most_connections(self.limits))
        config = uvicorn.Config(
            self._app,
            http=protocol_class(watch),
            ws="none",
            lifespan="on" if isinstance(self._app, Service) else "auto",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=max(1, int(self.limits.idle_seconds)),
            timeout_graceful_shutdown=max(1, int(self.limits.total_seconds)),
        )
        config.load()
        config.ssl = self._context
        self._uvicorn = _Uvicorn(config, ready)
        with asyncio.Runner(loop_factory=_Loop) as runner:
            try:
                runner.run(self._served(self._uvicorn, self._socket))
            except SystemExit:
                pass  # how uvicorn says that the application did not start; `started` has it
            finally:
                self._socket.close()
        if not self._uvicorn.started:
            if isinstance(self._app, Service) and self._app.misconfigured is not None:
                raise self._app.misconfigured
            raise ServiceError(
                "the service did not start; its log says why",
                status=503,
                error_code="ServiceUnavailable",
            )

    async def _served(self, server: _Uvicorn, sock: socket.socket) -> None:
        try:
            await server.serve(sockets=[sock])
        finally:
            if isinstance(self._app, Service) and server.started:
                await self._app.close()  # also if the server had to end before its requests

    def run(self, ready: Callable[[str], None] | None = None) -> None:
        """
        Serve until SIGINT or SIGTERM; running requests end first. The process is taken to do
        nothing else (see `settled`).

        Args:
            ready: Called with the URL once requests are answered.

        """
        with contextlib.ExitStack() as stack:

            def begun() -> None:
                stack.enter_context(settled())
                if ready:
                    ready(self.url)

            self._serve(begun)

    def start(self) -> Self:
        """Serve in a thread of its own; return once requests are answered."""
        if self._thread is not None:
            raise RuntimeError("the server was started before")
        self.listen()
        self._thread = threading.Thread(target=self._in_thread, name="pye-server", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def _in_thread(self) -> None:
        try:
            self._serve(self._started.set)
        except BaseException as error:  # it is raised where the thread was started
            self._failure = error
        finally:
            self._started.set()

    def close(self) -> None:
        """End: running requests first, then what the service closes. May be called twice."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        if self._thread is not None:
            self._thread.join()
        elif self._socket is not None:
            self._socket.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()
