"""
Policies and policy signers (the project's notes on Azure Attestation, 8.1).

Two modes, as Azure has them. Of an ordinary instance, whoever has the role sets policies, signed or
not. An isolated one has signers: a policy must be signed by the key of one of their certificates,
and so must a change of the certificates themselves. It takes each upload once, for whatever, and
none that was taken while there were no signers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

from pyenclave.errors import AttestationError, EvidenceFormatError, ServiceError
from pyenclave.formats import jose
from pyenclave.formats.x509 import Certificate
from pyenclave.services.attestation.attesting import told_of
from pyenclave.services.attestation.decisions import StoredPolicy
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.register import Register
from pyenclave.services.attestation.requests import ATTESTATION_TYPES, UNSUPPORTED
from pyenclave.services.attestation.state import (
    Shared,
    View,
)
from pyenclave.services.attestation.tokens import Issuer
from pyenclave.services.attestation.uploads import (
    USE,
    Upload,
    certificate_of,
    demand_signing_key,
    jwk_of,
    policy_of,
    read_upload,
    unsecured_policy,
)
from pyenclave.services.audit.event import Event
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.transaction import Refused, Transaction
from pyenclave.services.web.call import Answer, Call
from pyenclave.services.web.kit import Authenticates

__all__ = ["READ", "WRITE", "Authorize", "DraftRole", "Managing"]

# Azure's data actions of attestation providers.
READ: Final = "Microsoft.Attestation/attestationProviders/attestation/read"
WRITE: Final = "Microsoft.Attestation/attestationProviders/attestation/write"
DELETE: Final = "Microsoft.Attestation/attestationProviders/attestation/delete"
Authorize = Callable[[Transaction, Caller, str, str], None]
_RESET: Final = ":reset"


class Managing:
    """
    Handlers of management.

    Args:
        db: The database.
        shared: Policies, signers and keys.
        options: Settings.
        issuer: Makes the tokens.
        authorize: Raises ServiceError 403 if the caller may not do an action on a path.
    """

    def __init__(
        self,
        db: Database,
        shared: Shared,
        options: Options,
        issuer: Issuer,
        authorize: Authorize,
    ) -> None:
        self._db = db
        self._shared = shared
        self._options = options
        self._issuer = issuer
        self._authorize = authorize

    def _token(self, call: Call, members: dict[str, Any]) -> Answer:
        at = self._options.clock()
        key = self._shared.key(self._options.signs(call.api_version), at)
        return Answer({"token": self._issuer.result(members, key=key, at=at)})

    def _event(self, call: Call, action: str, **fields: Any) -> Event:
        return Event(
            action=f"attestation/{action}",
            caller=call.require_caller().object_id,
            resource=call.path,
            request_id=call.request_id,
            token_id=call.require_caller().token_digest,
            **fields,
        )

    def _demand_role(self, tx: Transaction, call: Call, action: str, event: str) -> None:
        try:
            self._authorize(tx, call.require_caller(), action, call.path)
        except ServiceError as error:
            raise Refused(
                error,
                self._event(
                    call,
                    event,
                    decision="refused",
                    rule="roles",
                    condition=error.message,
                    expected=action,
                    found=error.found,
                ),
            ) from None

    def _demand_signer(self, call: Call, view: View, upload: Upload, event: str) -> None:
        """Refuse an upload that no signer of an isolated instance signed."""
        if not view.isolated:
            return
        allowed = {signer.der for signer in view.signers}
        if upload.signer is not None and upload.signer.der in allowed:
            return
        found = "no signature" if upload.signer is None else upload.signer.sha256.hex()
        raise Refused(
            ServiceError(
                "this instance is isolated: the upload must be signed by one of its policy signers",
                status=400,
                error_code="PolicySignatureRequired",
                expected="a policy signer's certificate",
                found=found,
            ),
            self._event(
                call,
                event,
                decision="refused",
                rule="isolated mode",
                condition="signed by a policy signer",
                expected=[signer.sha256.hex() for signer in view.signers],
                found=found,
            ),
        )

    def _demand_use(self, call: Call, view: View, upload: Upload, event: str, use: str) -> None:
        """Refuse an upload that was made for something else."""
        if upload.use == use or (
            upload.use is None and not (view.isolated and self._options.require_signed_use)
        ):
            return
        raise Refused(
            ServiceError(
                f"the upload was not signed for {use}: its header says "
                f"{upload.use or f'nothing ({USE})'}",
                status=400,
                error_code="PolicySignatureRequired",
                inner="AnotherUse",
                expected=use,
                found=upload.use,
            ),
            self._event(
                call,
                event,
                decision="refused",
                rule="isolated mode" if view.isolated else "the upload's header",
                condition="signed for this change",
                expected=use,
                found=upload.use or "no use",
            ),
        )

    def _demand_unused(
        self, tx: Transaction, call: Call, view: View, upload: Upload, event: str, use: str
    ) -> None:
        """
        Note that a signed upload is taken; an isolated instance takes none a second time.

        An ordinary one notes it too: if it gets signers later, none of before can be used again.
        """
        if upload.signer is None:
            return  # an isolated instance took none of these
        fresh = self._shared.use_upload(tx, upload.signing_digest, use)
        if fresh or not view.isolated:
            return
        raise Refused(
            ServiceError(
                "this instance is isolated: the upload was used before",
                status=400,
                error_code="PolicySignatureRequired",
                expected="an upload that was signed for this change",
                found=upload.signing_digest.hex(),
                advice="Sign it anew, with something in it that is new: another kid in the header.",
            ),
            self._event(
                call,
                event,
                decision="refused",
                rule="isolated mode",
                condition="an upload is taken once",
                found=upload.signing_digest.hex(),
            ),
        )

    # ---- policies ----------------------------------------------------------------------------

    @staticmethod
    def _kind(call: Call) -> str:
        kind = call.params["type"]
        if kind in ATTESTATION_TYPES:
            return kind
        if kind in UNSUPPORTED:
            raise ServiceError(
                f"attestation of type {kind} is not supported by this service",
                status=501,
                error_code="NotImplemented",
            )
        raise ServiceError(
            f"no such attestation type; there are {', '.join(ATTESTATION_TYPES)}",
            status=400,
            error_code="InvalidParameter",
            found=kind[:60],
        )

    async def get_policy(self, call: Call) -> Answer:
        """Answer ``GET /policies/{type}``."""
        kind = self._kind(call)

        def work(tx: Transaction) -> View:
            self._demand_role(tx, call, READ, "policies/get")
            return self._shared.renewed(tx)

        view = await self._db.run(work)
        stored = view.policies[kind]
        members: dict[str, Any] = {
            "x-ms-policy": stored.upload or unsecured_policy(stored.text),
            "x-ms-policy-hash": stored.hash,
        }
        if stored.signer is not None:
            members["x-ms-policy-signer"] = dict(stored.signer)
        return self._token(call, members)

    @staticmethod
    def _uploaded(body: bytes) -> Upload:
        try:
            return read_upload(body)
        except EvidenceFormatError as error:
            raise told_of(error) from None

    async def set_policy(self, call: Call) -> Answer:
        """Answer ``PUT /policies/{type}``."""
        kind = self._kind(call)
        upload = self._uploaded(call.body)
        try:
            text = policy_of(upload)
            if text is None:
                raise EvidenceFormatError("policy token: payload", expected="AttestationPolicy")
            stored = StoredPolicy.of(text)
        except AttestationError as error:
            raise told_of(error) from None

        def work(tx: Transaction) -> None:
            self._demand_role(tx, call, WRITE, "policies/set")
            view = self._shared.renewed(tx)
            use = f"policies/set {kind}"
            self._demand_signer(call, view, upload, "policies/set")
            self._demand_use(call, view, upload, "policies/set", use)
            self._demand_unused(tx, call, view, upload, "policies/set", use)
            before = view.policies[kind].hash
            register = self._shared.set_policy(
                tx, kind, text=text, upload=upload.text, signer=upload.signer
            )
            tx.audit(
                self._event(
                    call,
                    "policies/set",
                    decision="allowed",
                    rule="isolated mode" if view.isolated else "roles",
                    details=_change(before, stored.hash, upload, register),
                )
            )
            self._shared.renewed(tx)

        await self._db.run(work)
        return self._token(call, _modified("Updated", upload))

    async def post_policy(self, call: Call) -> Answer:
        """Answer ``POST /policies/{type}:reset``."""
        name = call.params["type"]
        if not name.endswith(_RESET):
            raise ServiceError(
                "the method does not belong to this path",
                status=405,
                error_code="MethodNotAllowed",
                expected="GET, PUT",
            )
        call.params = {"type": name.removesuffix(_RESET)}
        kind = self._kind(call)
        upload = self._uploaded(call.body)
        try:
            if policy_of(upload) is not None:
                raise EvidenceFormatError(
                    "policy token: payload", expected="nothing, in a reset", found="a policy"
                )
        except AttestationError as error:
            raise told_of(error) from None

        def work(tx: Transaction) -> None:
            self._demand_role(tx, call, DELETE, "policies/reset")
            view = self._shared.renewed(tx)
            use = f"policies/reset {kind}"
            self._demand_signer(call, view, upload, "policies/reset")
            self._demand_use(call, view, upload, "policies/reset", use)
            self._demand_unused(tx, call, view, upload, "policies/reset", use)
            before = view.policies[kind].hash
            register = self._shared.reset_policy(tx, kind)
            after = self._shared.renewed(tx).policies[kind].hash
            tx.audit(
                self._event(
                    call,
                    "policies/reset",
                    decision="allowed",
                    rule="isolated mode" if view.isolated else "roles",
                    details=_change(before, after, upload, register),
                )
            )

        await self._db.run(work)
        return self._token(call, _modified("Removed", upload))

    # ---- policy signers ----------------------------------------------------------------------

    async def get_certificates(self, call: Call) -> Answer:
        """Answer ``GET /certificates``."""

        def work(tx: Transaction) -> View:
            self._demand_role(tx, call, READ, "certificates/get")
            return self._shared.renewed(tx)

        view = await self._db.run(work)
        keys = [jwk_of(signer) for signer in view.signers]
        return self._token(call, {"x-ms-policy-certificates": {"keys": keys}})

    async def add_certificate(self, call: Call) -> Answer:
        """Answer ``POST /certificates:add``."""
        upload, certificate = self._certificate(call, "policyCertificateToAdd")
        try:
            demand_signing_key(certificate)
        except EvidenceFormatError as error:
            raise told_of(error) from None

        def change(tx: Transaction, view: View) -> Register:
            del view
            return self._shared.add_signer(tx, certificate)

        return await self._change_signers(call, upload, certificate, "add", change)

    async def remove_certificate(self, call: Call) -> Answer:
        """Answer ``POST /certificates:remove``."""
        upload, certificate = self._certificate(call, "policyCertificateToRemove")

        def change(tx: Transaction, view: View) -> Register:
            if [signer.der for signer in view.signers] == [certificate.der]:
                raise Refused(
                    ServiceError(
                        "the last policy signer cannot be removed",
                        status=400,
                        error_code="InvalidOperation",
                    ),
                    self._event(
                        call,
                        "certificates/remove",
                        decision="refused",
                        rule="isolated mode",
                        condition="another policy signer remains",
                        found=certificate.sha256.hex(),
                    ),
                )
            return self._shared.remove_signer(tx, certificate)

        return await self._change_signers(call, upload, certificate, "remove", change)

    def _certificate(self, call: Call, member: str) -> tuple[Upload, Certificate]:
        """Read the token: the body itself, or (from 2025-06-01) a member of a JSON object."""
        body = call.body
        if body.lstrip()[:1] == b"{":
            value = call.json()
            if set(value) != {member} or not isinstance(value[member], str):
                raise ServiceError(
                    f"the body is a token, or an object with {member}",
                    status=400,
                    error_code="InvalidParameter",
                )
            body = value[member].encode("utf-8", "replace")
        upload = self._uploaded(body)
        try:
            return upload, certificate_of(upload)
        except EvidenceFormatError as error:
            raise told_of(error) from None

    async def _change_signers(
        self,
        call: Call,
        upload: Upload,
        certificate: Certificate,
        verb: str,
        change: Callable[[Transaction, View], Register],
    ) -> Answer:
        action = f"certificates/{verb}"

        def work(tx: Transaction) -> None:
            self._demand_role(tx, call, WRITE, action)
            view = self._shared.renewed(tx)
            if not view.isolated:
                raise Refused(
                    ServiceError(
                        "this instance is not isolated: it has no policy signers",
                        status=400,
                        error_code="InvalidOperation",
                    ),
                    self._event(
                        call,
                        action,
                        decision="refused",
                        condition="an isolated instance",
                        found="an ordinary one",
                    ),
                )
            self._demand_signer(call, view, upload, action)
            self._demand_use(call, view, upload, action, action)
            self._demand_unused(tx, call, view, upload, action, action)
            register = change(tx, view)
            tx.audit(
                self._event(
                    call,
                    action,
                    decision="allowed",
                    rule="isolated mode",
                    details={
                        "certificate": certificate.sha256.hex(),
                        "signer": None if upload.signer is None else upload.signer.sha256.hex(),
                        "upload": upload.digest.hex(),
                        "register": register.shown,
                    },
                )
            )
            self._shared.renewed(tx)

        await self._db.run(work)
        # The thumbprint is a name that clients compare, not a check.
        thumbprint = hashlib.sha1(certificate.der, usedforsecurity=False).hexdigest()
        return self._token(
            call,
            {
                "x-ms-certificate-thumbprint": thumbprint,
                "x-ms-policycertificates-result": "IsPresent" if verb == "add" else "IsAbsent",
            },
        )


class DraftRole:
    """
    Who may have a draft policy evaluated: it is a program of the caller's, and costs like one.

    Args:
        db: The database.
        authenticator: Tells who asks; None: nobody may.
        authorize: Raises ServiceError 403 if the caller may not do an action on a path.
    """

    def __init__(
        self, db: Database, authenticator: Authenticates | None, authorize: Authorize
    ) -> None:
        self._db = db
        self._authenticator = authenticator
        self._authorize = authorize

    async def demand(self, call: Call) -> None:
        """
        Go on only if the caller may read policies.

        Raises:
            ServiceError: 401 or 403.

        """
        caller = call.caller
        if caller is None:
            known = self._authenticator
            if known is None:
                raise ServiceError(
                    "draftPolicyForAttestation needs an identity, and this service knows none",
                    status=403,
                    error_code="Forbidden",
                )
            caller = known.remembered(call.headers) or await known.authenticated(call.headers)
        who = caller

        def work(tx: Transaction) -> None:
            try:
                self._authorize(tx, who, READ, call.path)
            except ServiceError as error:
                event = Event(
                    action="attestation/draft",
                    caller=who.object_id,
                    resource=call.path,
                    request_id=call.request_id,
                    token_id=who.token_digest,
                    decision="refused",
                    rule="roles",
                    condition=error.message,
                    expected=READ,
                    found=error.found,
                )
                raise Refused(error, event) from None

        await self._db.run(work)


def _modified(result: str, upload: Upload) -> dict[str, Any]:
    members: dict[str, Any] = {
        "x-ms-policy-result": result,
        "x-ms-policy-token-hash": jose.b64url_encode(upload.digest),
    }
    if upload.signer is not None:
        members["x-ms-policy-signer"] = jwk_of(upload.signer)
    return members


def _change(before: str, after: str, upload: Upload, register: Register) -> dict[str, Any]:
    return {
        "before": before,
        "after": after,
        "upload": upload.digest.hex(),
        "signer": None if upload.signer is None else upload.signer.sha256.hex(),
        "register": register.shown,
    }
