"""An HTTPS server on loopback whose every answer a test chooses, with an authority of its own."""

from __future__ import annotations

import datetime as dt
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class Authority:
    """A root of certificates."""

    def __init__(self, name: str = "Test Root", *, now: dt.datetime | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.now = now or dt.datetime.now(dt.UTC)
        self.certificate = self._make(name, self.key, name, self.key, ca=True)
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def _make(
        self,
        name: str,
        key: Key,
        issuer: str,
        issuer_key: Key,
        *,
        ca: bool = False,
        names: Sequence[str] = (),
        days: tuple[float, float] = (-1, 30),
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
    ) -> x509.Certificate:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now + dt.timedelta(days=days[0]))
            .not_valid_after(self.now + dt.timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
            )
        )
        usages = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = builder.add_extension(
            x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **usages), True
        )
        if not ca:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_san(one) for one in names]), False
            )
        return builder.sign(issuer_key, hashes.SHA256())

    def intermediate(self, name: str = "Test Intermediate") -> Authority:
        """Return an authority below this one."""
        lower = Authority.__new__(Authority)
        lower.key = ec.generate_private_key(ec.SECP256R1())
        lower.now = self.now
        root = self.certificate.subject.rfc4514_string().removeprefix("CN=")
        lower.certificate = self._make(name, lower.key, root, self.key, ca=True)
        lower.pem = lower.certificate.public_bytes(serialization.Encoding.PEM).decode()
        return lower

    def leaf(
        self,
        *names: str,
        key: Key | None = None,
        days: tuple[float, float] = (-1, 30),
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
    ) -> tuple[Key, x509.Certificate]:
        """Return a key and a certificate for *names*."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        own = self.certificate.subject.rfc4514_string().removeprefix("CN=")
        made = self._make(names[0], key, own, self.key, names=names, days=days, usage=usage)
        return key, made


@dataclass
class Asked:
    """A request, as it came."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    """An answer, and how badly it is given."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None  # what Content-Length says
    drip: float | None = None  # seconds between bytes
    silent: bool = False  # nothing at all

    def raw(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Server:
    """The server; `answer` is the test's, `asked` has the requests in their order."""

    def __init__(
        self,
        authority: Authority,
        answer: Callable[[Asked], Reply] | None = None,
        *,
        names: Sequence[str] = ("127.0.0.1", "localhost"),
    ) -> None:
        self.answer = answer or (lambda _: Reply({"error": {"code": "NotFound"}}, status=404))
        self.asked: list[Asked] = []
        self.connections = 0
        self.stop = threading.Event()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def setup(self) -> None:
                double.connections += 1
                super().setup()

            def serve(self) -> None:
                size = int(self.headers.get("content-length") or 0)
                path, _, query = self.path.partition("?")
                names = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.command, path, query, names, self.rfile.read(size))
                double.asked.append(asked)
                double._give(self, double.answer(asked))

            def log_message(self, *_: object) -> None:
                pass

        for verb in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            setattr(Handler, f"do_{verb}", Handler.serve)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # a client that goes away is what many tests are about

        key, certificate = authority.leaf(*names)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "leaf.pem")
            path.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
                + certificate.public_bytes(serialization.Encoding.PEM)
                + authority.certificate.public_bytes(serialization.Encoding.PEM)
            )
            context.load_cert_chain(path)
        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def _give(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.silent:
            self.stop.wait(20)
            handler.close_connection = True
            return
        body = reply.raw()
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        length = len(body) if reply.length is None else reply.length
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if length > len(body):
            handler.close_connection = True
        if reply.drip is None:
            handler.wfile.write(body)
            return
        for byte in body:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(reply.drip)

    def close(self) -> None:
        self.stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
