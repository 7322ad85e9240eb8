"""``POST /attest/{type}`` and ``POST /nonces``: verify, decide, issue, record."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec

from pyenclave.errors import (
    AppraisalError,
    AttestationError,
    CollateralError,
    EnclaveError,
    EvidenceFormatError,
    ServiceError,
)
from pyenclave.services.attestation import nonces as nonce_store
from pyenclave.services.attestation.claims import claims_of
from pyenclave.services.attestation.collateral import Collateral
from pyenclave.services.attestation.decisions import (
    Decision,
    PolicyRefusedError,
    StoredPolicy,
    decide,
)
from pyenclave.services.attestation.nonces import Nonce, Nonces
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.requests import Request, read_request
from pyenclave.services.attestation.state import Shared, View
from pyenclave.services.attestation.tokens import Issued, Issuer
from pyenclave.services.attestation.uploads import draft_text
from pyenclave.services.attestation.verification import Verified, prepare, verify
from pyenclave.services.audit.event import Event
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.web.call import Answer, Call

__all__ = ["EAR_TYPE", "Attested", "Attesting", "judge", "told_of"]

EAR_TYPE: Final = "application/eat+jwt"
_ATTEMPTS: Final = 4  # a policy may be changed while evidence is judged by the one before
_MAX_RULES: Final = 64  # that a record names
# What a record says of the evidence; everything else can be looked up by its digest.
_SUMMARY: Final = (
    "x-ms-attestation-type",
    "x-ms-sgx-mrenclave",
    "x-ms-sgx-mrsigner",
    "x-ms-sgx-product-id",
    "x-ms-sgx-svn",
    "x-ms-sgx-is-debuggable",
    "x-ms-sevsnpvm-launchmeasurement",
    "x-ms-sevsnpvm-hostdata",
    "x-ms-sevsnpvm-idkeydigest",
    "x-ms-sevsnpvm-is-debuggable",
    "tdx_mrtd",
    "tdx_mrconfigid",
    "tdx_td_attributes_debug",
    "attester_tcb_status",
    "x-ms-compliance-status",
    "x-pyenclave-tcb-status",
    "x-pyenclave-tee",
    "x-pyenclave-level",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attested:
    """Evidence that is genuine and that the policy permits."""

    verified: Verified
    decision: Decision
    stored: StoredPolicy
    nonce: Nonce | None = None


def judge(
    verified: Verified,
    own: Mapping[str, Any],
    stored: StoredPolicy,
    nonce: Nonce | None = None,
) -> Attested:
    """
    Let the policy decide on verified evidence.

    Args:
        verified: The evidence.
        own: The service's claims of it.
        stored: The policy; a draft in the request goes before it.
        nonce: The service's own nonce in the request.

    Raises:
        AppraisalError: The nonce is not bound by the evidence.
        AttestationError: A draft policy that is not the grammar.
        PolicyRefusedError: The policy does not permit.

    """
    request = verified.request
    if nonce is not None:
        _demand_bound(request, verified)
    policy = stored if request.draft is None else StoredPolicy.of(draft_text(request.draft))
    decision = decide(verified, own, policy)
    return Attested(verified=verified, decision=decision, stored=policy, nonce=nonce)


def _demand_bound(request: Request, verified: Verified) -> None:
    """Refuse a nonce of ours that only the request says: anybody could have added it."""
    wanted = request.nonce or ""
    said: object = None
    if request.runtime is not None and request.runtime.json is not None:
        said = request.runtime.json.get("nonce")
    elif verified.result.kind == "pyenclave":
        raw = verified.result.claims.get("nonce")
        said = None if raw is None else bytes.fromhex(raw).decode("latin-1")
    if isinstance(said, str) and hmac.compare_digest(said.encode(), wanted.encode()):
        return
    raise AppraisalError(
        "the evidence is refused by binding.nonce",
        expected="the nonce as member nonce of runtimeData (dataType JSON)",
        found=None if said is None else f"{said!r:.80}",
        advice="Put the nonce that the service gave into the runtime data before they are hashed.",
    )


def summary(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record says of *claims*."""
    inner = claims.get("x-ms-isolation-tee")
    found = {name: claims[name] for name in _SUMMARY if name in claims}
    if isinstance(inner, Mapping):
        found["x-ms-isolation-tee"] = {name: inner[name] for name in _SUMMARY if name in inner}
    return found


class Attesting:
    """
    Handlers of attestation.

    Args:
        db: The database.
        shared: Policies and keys.
        collateral: The vendors' word.
        options: Settings.
        issuer: Makes the tokens.
        draft_role: Raises ServiceError if the caller may not try policies; None: everybody may.
    """

    def __init__(
        self,
        db: Database,
        shared: Shared,
        collateral: Collateral,
        options: Options,
        issuer: Issuer,
        draft_role: Callable[[Call], Awaitable[None]] | None = None,
    ) -> None:
        self._draft_role = draft_role
        self._db = db
        self._shared = shared
        self._collateral = collateral
        self._options = options
        self._issuer = issuer
        self.nonces: Nonces | None = None

    def _nonces(self) -> Nonces:
        if self.nonces is None:
            raise ServiceError(
                "the service is starting", status=503, error_code="ServiceUnavailable"
            )
        return self.nonces

    async def give_nonce(self, call: Call) -> Answer:
        """Answer ``POST /nonces``."""
        del call
        text, expires = self._nonces().make(self._options.clock())
        return Answer({"nonce": text, "expires": int(expires.timestamp())})

    async def attest(self, kind: str, call: Call) -> Answer:
        """Answer ``POST /attest/{kind}``."""
        at = self._options.clock()
        form = _form(call)
        try:
            request = read_request(kind, call.json())
        except EvidenceFormatError as error:
            raise told_of(error) from None
        if form != "jwt" and (request.draft is not None or kind == "AzureGuest"):
            raise ServiceError(
                "an EAR is made of attestations by the service's own policy only",
                status=400,
                error_code="InvalidParameter",
            )
        if request.draft is not None and self._draft_role is not None:
            await self._draft_role(call)
        verified: Verified | None = None
        own: Mapping[str, Any] | None = None
        for _ in range(_ATTEMPTS):
            view = self._shared.view
            nonce: Nonce | None = None
            try:
                nonce = self._nonces().read(request.nonce, at)
                if verified is None or own is None:
                    verified = await self._verified(request, at)
                    own = claims_of(verified)
                stored = view.policies[kind]
                if request.draft is None and not stored.heavy:
                    attested = judge(verified, own, stored, nonce)
                else:  # a stranger's text, or a long one: the others do not wait for it
                    attested = await asyncio.to_thread(judge, verified, own, stored, nonce)
            except (EvidenceFormatError, AttestationError) as error:
                answer = await self._refuse(call, request, error, own, nonce, view)
                if answer is None:
                    continue
                raise answer from None
            token = self._issue(attested, call, form, at)
            if await self._record(call, attested, token, view):
                return self._answer(attested, token, form)
        raise ServiceError(
            "the policy changes too often", status=503, error_code="ServerBusy", retry_after=1
        )

    async def _verified(self, request: Request, at: datetime) -> Verified:
        prepared = prepare(request)
        at = self._options.dangerous_evidence_time or at
        endorsements = await self._collateral.of(prepared, at)
        return verify(prepared, endorsements=endorsements, roots=self._options.roots, at=at)

    def _issue(self, attested: Attested, call: Call, form: str, at: datetime) -> Issued:
        key = self._shared.key(self._options.signs(call.api_version), at)
        make = self._issuer.attested if form == "jwt" else self._issuer.ear
        return make(
            attested.verified,
            attested.decision,
            attested.stored,
            key=key,
            at=at,
            nonce_verified=attested.nonce is not None,
        )

    def _answer(self, attested: Attested, token: Issued, form: str) -> Answer:
        if form == "eat":
            return Answer(token.token.encode("ascii"), content_type=EAR_TYPE)
        if attested.verified.request.type == "AzureGuest":
            from pyenclave.services.attestation import guest

            return Answer({"token": guest.sealed(attested.verified, token.token)})
        return Answer({"token": token.token})

    # ---- the record --------------------------------------------------------------------------

    def _event(self, call: Call, request: Request, **fields: Any) -> Event:
        return Event(
            action=f"attestation/attest/{request.type}",
            caller=call.caller.object_id if call.caller is not None else "",
            resource=f"/attest/{request.type}",
            request_id=call.request_id,
            **fields,
        )

    async def _record(self, call: Call, attested: Attested, token: Issued, view: View) -> bool:
        """Record an attestation; False if the policy changed meanwhile."""
        verified, decision = attested.verified, attested.decision
        request = verified.request
        draft = request.draft is not None
        event = self._event(
            call,
            request,
            decision="allowed",
            rule=f"policy {attested.stored.hash} {decision.rule}",
            claims=summary(decision.claims),
            evidence_digest=verified.prepared.digest,
            token_id=token.id,
            details={
                "client": call.client,
                "draft": draft,
                "expires": token.expires,
                "rules": [str(fired) for fired in decision.trace[:_MAX_RULES]],
                "nonce_verified": attested.nonce is not None,
                **(
                    {"ignored": list(verified.prepared.ignored)}
                    if verified.prepared.ignored
                    else {}
                ),
            },
        )

        def work(tx: Transaction) -> str | None:
            current = self._shared.renewed(tx)
            if current is not view and not _same(current, view, request.type):
                return None
            if attested.nonce is not None and not nonce_store.use(tx, attested.nonce):
                return tx.audit(_replayed(event))
            tx.audit(event)
            return ""

        outcome = await self._db.run(work)
        if outcome:
            error = ServiceError("the nonce was used before", status=400, error_code="InvalidNonce")
            error.reference = outcome
            raise error
        return outcome is not None

    async def _refuse(
        self,
        call: Call,
        request: Request,
        error: EnclaveError,
        own: Mapping[str, Any] | None,
        nonce: Nonce | None,
        view: View,
    ) -> ServiceError | None:
        """Record a refusal and return what the caller is told; None to judge again."""
        told = told_of(error, fetched=self._collateral.fetches, explain=self._options.explain)
        details: dict[str, Any] = {"client": call.client, "draft": request.draft is not None}
        fields: dict[str, Any] = {
            "decision": "failed" if told.status >= 500 else "refused",
            "condition": error.message,
            "expected": error.expected,
            "found": error.found,
            "details": details,
        }
        stored = view.policies[request.type]
        try:
            fields["evidence_digest"] = prepare(request).digest
        except EvidenceFormatError:
            fields["evidence_digest"] = hashlib.sha256(request.evidence).hexdigest()
        if own is not None:
            fields["claims"] = summary(own)
        elif isinstance(error, AppraisalError) and error.result is not None:
            details["checks"] = list(error.result.refused_by)
        if isinstance(error, PolicyRefusedError):
            outcome = error.outcome
            which = str(outcome.decided) if outcome.decided is not None else outcome.reason
            name = stored.hash if request.draft is None else "draft"
            fields["rule"] = f"policy {name} {which}"
            details["rules"] = [str(fired) for fired in outcome.trace[:_MAX_RULES]]
        event = self._event(call, request, **fields)

        def work(tx: Transaction) -> str | None:
            current = self._shared.renewed(tx)
            if current is not view and not _same(current, view, request.type):
                return None
            if nonce is not None:
                nonce_store.use(tx, nonce)  # an attempt uses it up
            return tx.audit(event)

        reference = await self._db.run(work)
        if reference is None:
            return None
        told.reference = reference
        return told


def _same(current: View, view: View, kind: str) -> bool:
    """Whether two views say the same of *kind*, and no key was taken away."""
    if current.policies[kind] is not view.policies.get(kind):
        return False
    return {row.kid for row in view.keys} <= {row.kid for row in current.keys}


def _replayed(event: Event) -> Event:
    return msgspec.structs.replace(
        event,
        decision="refused",
        condition="the nonce was used before",
        expected="a nonce that was not used",
        found="used",
        token_id="",
    )


def _form(call: Call) -> str:
    """Return ``jwt``, ``ear`` (in the usual answer) or ``eat`` (the token itself)."""
    wanted = call.query.get("format", "")
    if wanted not in ("", "jwt", "ear"):
        raise ServiceError(
            "format is jwt or ear", status=400, error_code="InvalidParameter", found=wanted[:40]
        )
    if wanted == "ear":
        return "ear"
    accepted = call.headers.get("accept", "")
    kinds = [item.partition(";")[0].strip().lower() for item in accepted.split(",")]
    return "eat" if EAR_TYPE in kinds and "application/json" not in kinds else "jwt"


def told_of(error: EnclaveError, *, fetched: bool = False, explain: bool = False) -> ServiceError:
    """
    Return what a caller is told.

    The evidence is the caller's own: which check refused it, what that expected and what it found
    is no secret. What the policy looks at is, and stays in the record.
    """
    if isinstance(error, ServiceError):
        return error
    message = error.message or error.code
    status, code = 400, "InvalidParameter"
    if isinstance(error, PolicyRefusedError):
        code = "PolicyEvaluationError"
    elif isinstance(error, CollateralError):
        code = "CollateralUnavailable" if fetched else "AttestationFailed"
        status = 503 if fetched else 400
    elif isinstance(error, AppraisalError):
        code = "AttestationFailed"
    elif isinstance(error, AttestationError) and not isinstance(error, EvidenceFormatError):
        code = "PolicyParsingError"
    if explain or not isinstance(error, PolicyRefusedError):
        if error.expected is not None:
            message += f"; expected {error.expected!s:.300}"
        if error.found is not None:
            message += f"; found {error.found!s:.300}"
        if error.advice:
            message += f". {error.advice}"
    return ServiceError(
        message,
        status=status,
        error_code=code,
        expected=error.expected,
        found=error.found,
        retry_after=30 if status == 503 else None,
    )
