"""A service over a synthetic machine, one a module, and what requests are made of."""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'services' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'services' is not installed")

from pyenclave.errors import ServiceError
from pyenclave.formats import jose
from pyenclave.formats.x509 import encode_pem
from pyenclave.services.attestation.collateral import Collateral
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.service import make_service
from pyenclave.services.attestation.tables import PART
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.web.run import Server
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.intel import IntelPlatform

Body = dict[str, Any]
VERSION = "2025-06-01"


class Clock:
    """The service's time; tests move it."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Identities:
    """Authenticates ``Bearer NAME`` as NAME; what the real one does has tests of its own."""

    def remembered(self, headers: Mapping[str, str]) -> Caller | None:
        del headers
        return None

    async def authenticated(self, headers: Mapping[str, str]) -> Caller:
        kind, _, name = headers.get("authorization", "").partition(" ")
        if kind != "Bearer" or not name:
            raise ServiceError(
                "a token is needed", status=401, error_code="Unauthorized", challenge="Bearer"
            )
        return Caller("tenant", name, None, "app", hashlib.sha256(name.encode()).hexdigest(), 0.0)


def authorize(tx: Transaction, caller: Caller, action: str, scope: str) -> None:
    """Let ``admin`` do everything and ``reader`` read."""
    del tx, scope
    if caller.object_id == "admin" or (caller.object_id == "reader" and action.endswith("/read")):
        return
    raise ServiceError("no role allows that", status=403, error_code="Forbidden")


@dataclass
class Site:
    """A running service with its machines."""

    url: str
    ca: Path
    machine: IntelPlatform
    chip: AmdChip
    db: Database
    clock: Clock
    client: httpx.Client
    made: list[str] = field(default_factory=list)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Post to the service; bytes as they are, anything else as JSON."""
        query = {"api-version": VERSION} | options.pop("query", {})
        if isinstance(body, bytes):
            options["content"] = body
        else:
            options["json"] = body
        return self.client.post(path, params=query, **options)

    def claims(self, path: str, body: Any, **options: Any) -> dict[str, Any]:
        """Post, demand success, and return what the token says, its signature verified."""
        answer = self.post(path, body, **options)
        assert answer.status_code == 200, answer.text
        return self.verified(answer.json()["token"])

    def verified(self, token: str) -> dict[str, Any]:
        """Return what *token* says after its key was found in the key set."""
        read = jose.Jws.from_bytes(token)
        keys = {item["kid"]: item for item in self.client.get("/certs").json()["keys"]}
        from pyenclave.formats.jwk import Jwk

        key = Jwk.from_json(keys[read.kid])
        assert read.verify(key.key, allowed=key.algorithms)
        assert read.header["jku"] == f"{self.url}/certs"
        found = read.claims()
        assert found["iss"] == self.url
        return found

    def refused(self, path: str, body: Any, **options: Any) -> tuple[int, str, str]:
        """Post, demand a refusal, and return status, code and message."""
        answer = self.post(path, body, **options)
        assert answer.status_code >= 400, answer.text
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["message"]

    def audit(self) -> list[dict[str, Any]]:
        """Return the rows of the audit log, oldest first."""
        from sqlalchemy import select

        from pyenclave.services.storage import tables

        rows = self.db.submit(
            lambda tx: [
                row[0]
                for row in tx.connection.execute(
                    select(tables.audit.c.body).order_by(tables.audit.c.seq)
                )
            ]
        ).result()
        return [json.loads(row) for row in rows]

    def quote(self, runtime: bytes | None = None, **fields: Any) -> bytes:
        """Return a quote of an enclave over *runtime*."""
        if runtime is not None:
            fields.setdefault("report_data", digest64(runtime))
        return self.machine.enclave_quote(**fields)

    def snp(self, runtime: bytes | None = None, **fields: Any) -> bytes:
        """Return the JSON that carries a report of SEV-SNP."""
        if runtime is not None:
            fields.setdefault("report_data", digest64(runtime))
        return proof(self.chip, self.chip.report(**fields))


def digest64(data: bytes) -> bytes:
    """Return report data that binds *data*."""
    return hashlib.sha256(data).digest() + bytes(32)


def proof(chip: AmdChip, report: bytes) -> bytes:
    """Return *report* with the chip's certificates as ``SevSnpVm`` has them."""
    files = chip.endorsements()
    chain = encode_pem(chip.vek) + files["ask.pem"] + files["ark.pem"]
    value = {"SnpReport": b64(report), "VcekCertChain": b64(chain)}
    return json.dumps(value).encode()


def b64(data: bytes) -> str:
    """Return base64url as Azure's SDKs write it."""
    return jose.b64url_encode(data)


def bound(data: bytes, kind: str = "JSON") -> dict[str, str]:
    """Return runtime or init-time data."""
    return {"data": b64(data), "dataType": kind}


def collateral_folder(path: Path, machine: IntelPlatform, chip: AmdChip) -> Path:
    """Write the collateral of the machines."""
    for name, files in (
        ("sgx", machine.endorsements()),
        ("tdx", machine.endorsements("tdx")),
        ("amd", {"crl.der": chip.endorsements()["crl.der"]}),
    ):
        (path / name).mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            (path / name / file).write_bytes(data)
    return path


Make = Callable[..., Site]


@pytest.fixture(scope="module")
def make_site(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Make]:
    """Make services; keyword arguments are those of `Options`."""
    ends: list[Callable[[], Any]] = []

    def make(
        *,
        url: str | None = None,
        database: str = "sqlite://",
        secrets: Any = None,
        at: datetime | None = None,
        like: Site | None = None,
        **options: Any,
    ) -> Site:
        folder = tmp_path_factory.mktemp("attestation")
        clock = Clock()
        if at is not None:
            clock.ahead = at - datetime.now(UTC)
        machine = IntelPlatform(at or datetime.now(UTC)) if like is None else like.machine
        chip = AmdChip() if like is None else like.chip
        roots = (machine.root, chip.root, *options.pop("roots", ()))
        files = collateral_folder(folder / "collateral", machine, chip)
        db = Database.open(database, parts=[PART], secrets=secrets)
        ends.append(db.close)
        port = free_port()  # the address is in the tokens, so it comes first
        shown = {"open_drafts": True, "dangerous_allow_software": True, "algorithm": "ES256"}
        options = shown | options
        settings = Options(
            url=url or f"https://localhost:{port}", roots=roots, clock=clock, **options
        )
        service = make_service(
            db,
            settings,
            collateral=Collateral([files], roots=roots),
            authenticator=Identities(),
            authorize=authorize,
        )
        server = Server(service, port=port)
        server.__enter__()
        ends.append(lambda: server.__exit__(None, None, None))
        ca = folder / "ca.pem"
        ca.write_bytes(server.ca_pem or b"")
        client = httpx.Client(
            base_url=f"https://localhost:{port}",
            verify=ssl.create_default_context(cafile=str(ca)),
            timeout=20,
        )
        ends.append(client.close)
        return Site(settings.url, ca, machine, chip, db, clock, client)

    yield make
    for end in reversed(ends):
        end()


@pytest.fixture(scope="module")
def site(make_site: Make) -> Site:
    """Return a service with the default settings."""
    return make_site()


@pytest.fixture(scope="session")
def helpers() -> Any:
    """Return this module's functions: conftest files are not imported by name."""
    from types import SimpleNamespace

    return SimpleNamespace(b64=b64, bound=bound, digest64=digest64, proof=proof)
