"""The attestation service: routes, start, upkeep."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import Any, Final

from pyenclave.errors import EnclaveError, ServiceError
from pyenclave.services.attestation import nonces as nonce_store
from pyenclave.services.attestation.attesting import Attesting
from pyenclave.services.attestation.collateral import Collateral
from pyenclave.services.attestation.managing import (
    Authorize,
    DraftRole,
    Managing,
)
from pyenclave.services.attestation.nonces import Nonces
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.requests import ATTESTATION_TYPES, UNSUPPORTED
from pyenclave.services.attestation.state import Shared
from pyenclave.services.attestation.tokens import Issuer
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.web.call import Answer, Call
from pyenclave.services.web.health import add_health
from pyenclave.services.web.kit import Authenticates, Limits, Service

__all__ = ["API_VERSIONS", "make_service"]

# The preview is what clients for Azure's TDX machines ask by.
API_VERSIONS: Final = ("2020-10-01", "2022-08-01", "2023-04-01-preview", "2025-06-01")
_UPKEEP: Final = 600.0  # seconds
_KEEP_KEYS: Final = "max-age=600"
_LOG: Final = logging.getLogger("pyenclave.attestation")
_SUPPORTED: Final = (
    "iss",
    "iat",
    "nbf",
    "exp",
    "jti",
    "nonce",
    "x-ms-ver",
    "x-ms-attestation-type",
    "x-ms-policy-hash",
    "x-ms-policy-signer",
    "x-ms-runtime",
    "x-ms-inittime",
    "x-ms-isolation-tee",
    "x-ms-compliance-status",
    "x-ms-sgx-mrenclave",
    "x-ms-sgx-mrsigner",
    "x-ms-sgx-product-id",
    "x-ms-sgx-svn",
    "x-ms-sgx-is-debuggable",
    "x-ms-sgx-ehd",
    "x-ms-sgx-collateral",
    "x-ms-sevsnpvm-launchmeasurement",
    "x-ms-sevsnpvm-hostdata",
    "x-ms-sevsnpvm-reportdata",
    "tdx_mrtd",
    "tdx_report_data",
    "attester_tcb_status",
    "x-pyenclave-tee",
    "x-pyenclave-level",
    "x-pyenclave-nonce-verified",
)


def _nobody(tx: Transaction, caller: Caller, action: str, scope: str) -> None:
    del tx, caller, scope
    raise ServiceError(
        f"no role allows {action}", status=403, error_code="Forbidden", inner="ForbiddenByRbac"
    )


class _Metadata:
    """``/certs`` and discovery."""

    def __init__(self, db: Database, shared: Shared, options: Options) -> None:
        self._db = db
        self._shared = shared
        self._options = options

    async def certs(self, call: Call) -> Answer:
        """Answer ``GET /certs``."""
        del call
        view = await self._db.run(self._shared.renewed)
        rows = view.published(self._options.clock())
        keys = [self._shared.opened(row).jwk for row in rows]
        return Answer({"keys": keys}, headers={"cache-control": _KEEP_KEYS})

    async def discovery(self, call: Call) -> Answer:
        """Answer ``GET /.well-known/openid-configuration``."""
        del call
        url = self._options.url
        return Answer(
            {
                "issuer": url,
                "jwks_uri": f"{url}/certs",
                "response_types_supported": ["token", "none"],
                "id_token_signing_alg_values_supported": list(self._options.algorithms),
                "revocation_endpoint": f"{url}/revoke",
                "claims_supported": list(_SUPPORTED),
            },
            headers={"cache-control": _KEEP_KEYS},
        )


async def _revoke(call: Call) -> Answer:
    del call
    raise ServiceError(
        "tokens are not revoked; they end by themselves", status=501, error_code="NotImplemented"
    )


async def _unsupported(kind: str, call: Call) -> Answer:
    del call
    raise ServiceError(
        f"attestation of type {kind} is not supported by this service",
        status=501,
        error_code="NotImplemented",
    )


async def _baselines(collateral: Collateral, call: Call) -> Answer:
    """Answer ``GET /tcbbaselines/{type}``: what the collateral that is given was made for."""
    tee = {"SgxEnclave": "sgx", "OpenEnclave": "sgx", "TdxVm": "tdx"}.get(call.params["type"])
    if tee is None:
        raise ServiceError(
            "there are baselines of SgxEnclave, OpenEnclave and TdxVm",
            status=400,
            error_code="InvalidParameter",
        )
    found: list[dict[str, Any]] = [
        {
            "tcbIdentifier": str(number),
            "tcbEvaluationDataNumber": number,
            "tcbReleaseDate": issued,
            "isSelectedTcb": True,
        }
        for number, issued in collateral.baselines.get(tee, ())
    ]
    return Answer({"tcbBaselines": found})


def make_service(
    db: Database,
    options: Options,
    *,
    collateral: Collateral | None = None,
    authenticator: Authenticates | None = None,
    authorize: Authorize | None = None,
    limits: Limits | None = None,
    close_db: bool = False,
) -> Service:
    """
    Return the service.

    Args:
        db: The database, with `tables.PART`.
        options: Settings.
        collateral: The vendors' word; without it only evidence that needs none is attested.
        authenticator: Tells who manages policies. Without one, nobody can.
        authorize: Raises ServiceError 403 if a caller may not do an action; default: nobody may.
        limits: Sizes, times, rates.
        close_db: Whether the service closes the database.

    """
    service = Service(
        "attestation", api_versions=API_VERSIONS, limits=limits, authenticator=authenticator
    )
    given = collateral or Collateral()
    shared = Shared(db, options)
    issuer = Issuer(options.url, ear_form=options.ear_form, marks=options.marks)
    drafts = DraftRole(db, authenticator, authorize or _nobody)
    attesting = Attesting(
        db,
        shared,
        given,
        options,
        issuer,
        draft_role=None if options.open_drafts else drafts.demand,
    )
    for kind in ATTESTATION_TYPES:
        service.route(
            "POST",
            f"/attest/{kind}",
            partial(attesting.attest, kind),
            anonymous=not options.attest_identity,
        )
    for kind in UNSUPPORTED:
        service.route("POST", f"/attest/{kind}", partial(_unsupported, kind), anonymous=True)
    service.route("POST", "/nonces", attesting.give_nonce, anonymous=True, api_versions=())
    service.route("GET", "/tcbbaselines/{type}", partial(_baselines, given), anonymous=True)
    metadata = _Metadata(db, shared, options)
    service.route("GET", "/certs", metadata.certs, anonymous=True, api_versions=())
    service.route(
        "GET",
        "/.well-known/openid-configuration",
        metadata.discovery,
        anonymous=True,
        api_versions=(),
    )
    service.route("POST", "/revoke", _revoke, anonymous=True, api_versions=())
    if authenticator is not None:
        managing = Managing(db, shared, options, issuer, authorize or _nobody)
        service.route("GET", "/policies/{type}", managing.get_policy)
        service.route("PUT", "/policies/{type}", managing.set_policy)
        service.route("POST", "/policies/{type}", managing.post_policy)
        service.route("GET", "/certificates", managing.get_certificates)
        service.route("POST", "/certificates:add", managing.add_certificate)
        service.route("POST", "/certificates:remove", managing.remove_certificate)
    upkeep = _Upkeep(db, shared)
    # Ready is who can read what decides; it is compared with the register on the way.
    add_health(service, lambda: db.run(shared.renewed))

    async def start() -> None:
        attesting.nonces = Nonces(await shared.start(), options.nonce_seconds)
        upkeep.begin()

    service.on_start(start)
    if close_db:
        service.on_close(lambda: asyncio.to_thread(db.close))
    service.on_close(given.close)
    service.on_close(upkeep.end)
    return service


class _Upkeep:
    """Makes keys in time and forgets used nonces that expired."""

    def __init__(self, db: Database, shared: Shared) -> None:
        self._db = db
        self._shared = shared
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start."""
        self._task = asyncio.create_task(self._run())

    async def end(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_UPKEEP)
            try:
                await self._shared.keep()
                while await self._db.run(nonce_store.purge):
                    pass
            except EnclaveError as error:
                _LOG.warning("upkeep of the attestation service: %s", error)
