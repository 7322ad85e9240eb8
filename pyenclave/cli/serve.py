"""``pyenclave serve``: attestation service, key vault, issuer for development, platform."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import json
import logging
import os
import re
import resource
import secrets
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyenclave._files import read_file
from pyenclave._platform.state import State
from pyenclave.cli import output
from pyenclave.cli._ports import kept
from pyenclave.cli._serve_options import add_services
from pyenclave.cli.verify import moment
from pyenclave.errors import ArgumentError, ConfigurationError, PlatformUnavailableError

if TYPE_CHECKING:
    from pyenclave.services.web.config import ServiceConfig
    from pyenclave.services.web.kit import Service

__all__ = ["add_commands"]

# What the extra brings; another missing module is an error of ours, and is shown as one.
_OF_THE_EXTRA: Final = frozenset({"sqlalchemy", "uvicorn", "httptools", "jmespath"})
_DESCRIPTORS: Final = 8192
_CLIENT: Final = "administrator"
_MAX_ROOT: Final = 64 << 10  # bytes of a certificate
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``serve``."""
    serve = subparsers.add_parser(
        "serve",
        help="run a service: attestation, vault, identity (for development) or the platform",
        description="Runs a service until SIGTERM or Ctrl-C; requests that run then are ended "
        "properly. Each service has its own --help.",
    )
    add_services(serve, _serve)


def _serve(args: argparse.Namespace) -> int:
    if args.service == "platform":
        return _platform(args)
    if args.dev and args.config is not None:
        raise ArgumentError("either --dev or --config")
    if not args.dev and args.service == "identity":
        raise ArgumentError(
            "the identity service is for development only: --dev",
            advice="In production name your identity provider under [[issuers]].",
        )
    if not args.dev and args.config is None:
        raise ArgumentError(
            "a production service needs its settings: --config FILE",
            advice="To try it on this machine: --dev. docs/services.md has an example file.",
        )
    least = 0 if args.dev else 1  # what is in a URL is not chosen by the kernel
    if args.port is not None and not least <= args.port < 65536:
        raise ArgumentError("--port", expected=f"{least} to 65,535", found=args.port)
    if args.time is not None and not args.dev:
        raise ArgumentError(
            "--time is for attestation --dev",
            advice="A service that others believe judges evidence by the time that it is.",
        )
    _descriptors()
    _logging()
    try:
        if args.dev:
            return _development(args)
        return _production(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _OF_THE_EXTRA:
            raise
        raise ModuleNotFoundError(
            f'the services need {error.name}: pip install "pyenclave[services]"', name=error.name
        ) from None


def _platform(args: argparse.Namespace) -> int:
    from pyenclave.cli.serve_platform import serve_platform

    return serve_platform(args.warm)


def _descriptors() -> None:
    """Have room for slow peers beside the good ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Lines(logging.Formatter):
    """One line a record, whatever the library that wrote it put in."""

    def format(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", super().format(record))


def _logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("pyenclave").setLevel(logging.INFO)
    # It warns of each malformed request, as often as somebody likes to send one.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)


def _build(name: str, config: ServiceConfig) -> Service:
    module = import_module(f"pyenclave.services.{name}")
    made: Service = module.build(config)
    return made


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens; a taken port is refused by its number."""
    from pyenclave.services.web.run import bound

    try:
        return bound(host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        shown = f"[{host}]" if ":" in host else host
        raise ArgumentError(
            f"{shown}:{port} is in use; another --port, or none for a free one"
        ) from None


def _check_database(config: ServiceConfig) -> None:
    """Refuse a folder that nobody made: only what is in the state directory is made by us."""
    from pyenclave.services.storage.engines import parse_url, sqlite_path

    file = sqlite_path(parse_url(config.database))
    if file is None or file.parent.is_dir():
        return
    if Path(config.state_dir).resolve() in (file.parent.resolve(), *file.parent.resolve().parents):
        return
    raise ConfigurationError(
        f"the database's folder {file.parent} is not there",
        advice="Make it, with mode 0700, or correct the database's URL.",
    )


def _ready(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _development(args: argparse.Namespace) -> int:
    from pyenclave.services.web.development import development
    from pyenclave.services.web.run import Server, url_of

    host = args.host or "127.0.0.1"
    if host != "localhost" and not _is_loopback(host):
        raise ArgumentError(
            "--dev listens on this machine only",
            expected="127.0.0.1, ::1 or localhost",
            found=host,
            advice="For others to reach it, write settings for production (docs/services.md).",
        )
    with State.open() as state:
        if not state.writable:
            raise PlatformUnavailableError(
                f"state directory {state.path} is not writable",
                advice="Development services keep their keys there; set PYENCLAVE_STATE.",
            )
        folder = state.path
    sock = kept(host, folder, args.service) if args.port is None else _bound(host, args.port)
    try:
        url = url_of(sock, host=host)
        dev = development(
            args.service,
            folder,
            url=url,
            database=args.database,
            backend=args.backend or "enclave",
        )
        line = {"url": url, "ca": dev.ca.path, "token": dev.token()}
        if args.service == "identity":
            return _identity(sock, dev, line)
        config = dev.config.replace(
            release_tokens_once=args.tokens_once, allow_sha1=args.allow_sha1
        )
        config = _evidence(args, config)
        if config.dangerous_evidence_time is not None:
            line["time"] = shown = config.dangerous_evidence_time.isoformat()
            output.tell(
                f"WARNING: evidence is judged as of {shown}, not of now. What was valid then gets "
                "a token, revoked and expired or not; each says so (x-pyenclave-evidence-time)."
            )
        _check_database(config)
        service = _build(args.service, config)
        Server(service, sock=sock, tls=dev.config.tls).run(lambda _: _ready(line))
    finally:
        sock.close()
    return 0


def _evidence(args: argparse.Namespace, config: ServiceConfig) -> ServiceConfig:
    """Return *config* with the roots and the collateral of the command line."""
    if args.service != "attestation":
        return config
    from pyenclave.services.web.config import check_root

    roots = list(config.platform_roots)
    for path in args.root:
        roots.append(check_root(read_file(path, limit=_MAX_ROOT), f"--root {path}"))
    config = config.replace(
        platform_roots=tuple(roots), dangerous_evidence_time=moment("--time", args.time)
    )
    return config if args.collateral is None else config.replace(collateral=args.collateral)


def _identity(sock: Any, dev: Any, line: dict[str, Any]) -> int:
    """Serve the issuer, and the endpoint of managed identities on a port of its own."""
    from pyenclave.services.identity.issuer import ADMINISTRATOR, MANAGED_IDENTITY
    from pyenclave.services.web.run import Server
    from pyenclave.services.web.tls import private_file

    issuer = dev.issuer
    issuer.url = line["url"]
    path = os.path.join(dev.config.state_dir, "dev", "client-secret")
    secret = private_file(path, secrets.token_urlsafe(32).encode()).decode()
    issuer.register(_CLIENT, secret, object_id=ADMINISTRATOR)
    managed = kept("127.0.0.1", dev.config.state_dir, "managed-identity")
    with Server(issuer.metadata_service(), sock=managed, dangerous_no_tls=True) as metadata:
        line |= {
            "token": dev.token(),  # anew: it names the address of its issuer
            "tenant": issuer.tenant,
            "client_id": _CLIENT,
            "client_secret": secret,
            "managed_identity": metadata.url,
            "managed_identity_object_id": MANAGED_IDENTITY,
        }
        Server(issuer.service(), sock=sock, tls=dev.config.tls).run(lambda _: _ready(line))
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _production(args: argparse.Namespace) -> int:
    from pyenclave.services.web.config import load
    from pyenclave.services.web.run import Server

    config = load(args.config)
    named = {
        "host": args.host,
        "port": args.port,
        "database": args.database,
        "backend": args.backend,
    }
    if args.tokens_once:
        config = config.replace(release_tokens_once=True)
    if args.allow_sha1:
        config = config.replace(allow_sha1=True)
    config = config.replace(**{name: value for name, value in named.items() if value is not None})
    config = _evidence(args, config)
    _check_database(config)
    if args.service == "vault" and not config.authorities:
        raise ConfigurationError(
            "configuration: no attestation service",
            advice="Without [[authorities]] no key could ever be released. Name at least one.",
        )
    sock = _bound(config.host, config.port)
    try:
        service = _build(args.service, config)
        Server(service, sock=sock, tls=config.tls, limits=config.limits).run(
            lambda _: _ready({"url": config.url})
        )
    finally:
        sock.close()
    return 0
