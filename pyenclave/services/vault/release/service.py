"""
Releasing a key: the request, the decision, the wrapped key, the record of it.

A backend that decides inside (`DecidesInside`, the enclave) is given the token and answers with the
wrapped key; here is only what it says. With another one, the decision is made here.

Whoever is refused gets one answer, whatever the reason: 403 with a reference id. The audit row of
that id has the condition that does not hold, with what was expected and found.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NoReturn

import msgspec

from pyenclave.errors import ServiceError
from pyenclave.formats import jwa
from pyenclave.formats.jwk import Jwk
from pyenclave.formats.release_decision import (
    MAX_SKEW,
    MAX_TARGET,
    Decision,
    NotReleasedError,
    Step,
    Target,
    Trace,
    check_key,
    decide,
    find_authority,
)
from pyenclave.formats.release_outcome import Outcome
from pyenclave.formats.release_terms import Anchor
from pyenclave.services.audit import Event
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.transaction import Refused, Transaction
from pyenclave.services.vault.backends.base import (
    DecidesInside,
    KeyBackend,
    ReleaseRequest,
    WrapsForTransfer,
    bad_parameter,
)
from pyenclave.services.vault.records import KeyRecord, Retention, bundle
from pyenclave.services.vault.release.answer import AnswerSigner, payload
from pyenclave.services.vault.release.authorities import UNREACHED, AuthorityKeys, unreached
from pyenclave.services.vault.release.relay import hand_in_keys
from pyenclave.services.vault.release.tables import use_up
from pyenclave.services.web.call import Answer, Call

__all__ = ["Releases"]

_SHA1: Final = "CKM_RSA_AES_KEY_WRAP"
_DEFAULT: Final = "RSA_AES_KEY_WRAP_256"
_MEMBERS: Final = frozenset({"target", "nonce", "enc"})
_MAX_NONCE: Final = 2048  # characters
_VERB: Final = "keys/release"
_ENCODE: Final = msgspec.json.Encoder().encode


class Releases:
    """
    Releases keys to attested code.

    Args:
        db: Opened with `pyenclave.services.vault.release.tables.PART` among its parts.
        backend: Wraps the key, and decides if it can; the private half does not come here.
        authorities: Keys of the attestation services that are configured.
        signer: Signs the answer.
        allow_sha1: Also wrap with OAEP over SHA-1, which older clients ask for. A backend that
            decides does so for keys only whose terms say it, too.
        tokens_once: A token releases a key once, over all instances on the database. Otherwise as
            often as it is shown while it is valid, as Azure does.
        strict: Policies are compared by exact JSON type; strings do not stand for booleans. This
            and *skew* are for a backend that does not decide: another one has them in its terms.
        skew: Seconds that an authority's clock may differ, at most 300.
        retention: What keys say about their deletion.
        clock: Seconds since 1970.

    Raises:
        ValueError: *skew* is out of range.

    """

    def __init__(
        self,
        db: Database,
        backend: KeyBackend,
        authorities: AuthorityKeys,
        signer: AnswerSigner,
        *,
        allow_sha1: bool = False,
        tokens_once: bool = False,
        strict: bool = False,
        skew: float = 60.0,
        retention: Retention | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 0 <= skew <= MAX_SKEW:
            raise ValueError(f"clocks differ by 0 to {MAX_SKEW} seconds, not {skew}")
        self._db = db
        self._backend = backend
        self._authorities = authorities
        self._signer = signer
        self._encodings = tuple(name for name in jwa.OAEP if allow_sha1 or name != _SHA1)
        self._default = _SHA1 if allow_sha1 else _DEFAULT
        self._once = tokens_once
        self._strict = strict
        self._skew = skew
        self._retention = retention or Retention()
        self._clock = clock

    async def release(
        self,
        call: Call,
        caller: Caller,
        record: KeyRecord,
        *,
        kid: str,
        base: str,
        confirm: Callable[[Transaction], None],
    ) -> Answer:
        """
        Answer a request for *record*, of a caller who may ask.

        Args:
            call: The request.
            caller: Who asks; authenticated and authorised.
            record: The key.
            kid: Its identifier, with the version.
            base: The vault's address.
            confirm: Raises `Refused` if the caller lost the right, or the key was changed or may
                not be used any more; asked in the transaction that writes the release down.

        Raises:
            ServiceError: 400: the request; 403: it is not released, whatever the reason; 404, 409:
                the key was deleted or changed meanwhile; 503.

        """
        target, nonce, enc = self._read(call)
        decided = self._inside if isinstance(self._backend, DecidesInside) else self._here
        outcome, ciphertext = await decided(call, caller, record, target, enc)
        if outcome.transfer is None:
            return await self._refused(call, caller, record, outcome, enc)
        claims = payload(
            bundle(record, base, self._retention),
            # As Azure repeats it; what was released is under its version in the answer itself.
            kid=kid if call.params.get("version") else kid.rpartition("/")[0],
            transfer=outcome.transfer.kid,
            enc=enc,
            nonce=nonce,
            api_version=call.api_version,
            ciphertext=ciphertext,
        )
        token = self._signer.sign(claims)
        await self._released(call, caller, record, outcome, {"vault": base, "enc": enc}, confirm)
        return Answer(_ENCODE({"value": token}))

    # ---- the request -------------------------------------------------------------------------

    def _read(self, call: Call) -> tuple[str, str | None, str]:
        body = call.json()
        if unknown := sorted(set(body) - _MEMBERS):
            raise bad_parameter(f"Property {unknown[0]!r:.80} is not known.")
        target, nonce, enc = body.get("target"), body.get("nonce"), body.get("enc")
        if not isinstance(target, str) or not 0 < len(target) <= MAX_TARGET:
            raise bad_parameter("Property target must be an attestation token.")
        if nonce is not None and (not isinstance(nonce, str) or len(nonce) > _MAX_NONCE):
            raise bad_parameter(f"Property nonce must be text of at most {_MAX_NONCE} characters.")
        if enc is None:
            enc = self._default
        if enc not in self._encodings:
            more = ""
            if enc == _SHA1:
                more = (
                    " OAEP with SHA-1 is not offered by this vault without its setting allow_sha1."
                )
            raise bad_parameter(f"Property enc must be one of {', '.join(self._encodings)}.{more}")
        return target, nonce, enc

    # ---- the decision ------------------------------------------------------------------------

    async def _inside(
        self, call: Call, caller: Caller, record: KeyRecord, target: str, enc: str
    ) -> tuple[Outcome, bytes]:
        """Have the backend decide; the keys that it judges tokens by it gets itself."""
        backend = self._backend
        if not isinstance(backend, DecidesInside):
            raise TypeError("the backend does not decide")
        request = ReleaseRequest(
            policy=record.release_policy,
            target=target,
            enc=enc,
            enabled=record.enabled,
            not_before=record.not_before,
            expires=record.expires,
        )
        context = record.context()
        try:
            verdict = await backend.decide_release(record.wrapped, context, request, final=False)
            if verdict.outcome is None:
                anchor = verdict.needed
                await self._authorities.supply(
                    Anchor.from_bytes(anchor).url,
                    lambda known: hand_in_keys(backend, known, anchor),
                    missing=verdict.missing,
                    anchor=anchor,
                )
                verdict = await backend.decide_release(record.wrapped, context, request, final=True)
        except ServiceError as error:
            policy_hash = hashlib.sha256(record.release_policy or b"").hexdigest()
            nothing = Outcome(policy_hash=policy_hash)
            return await self._failed(call, caller, record, nothing, enc, error)
        outcome = verdict.outcome or Outcome()
        if outcome.failed is not None and outcome.failed.name == UNREACHED:
            away = unreached(str(outcome.failed.expected))
            return await self._failed(call, caller, record, outcome, enc, away)
        return outcome, verdict.ciphertext

    async def _here(
        self, call: Call, caller: Caller, record: KeyRecord, target: str, enc: str
    ) -> tuple[Outcome, bytes]:
        """Decide, and have the backend wrap for the token's transfer key."""
        backend = self._backend
        if not isinstance(backend, WrapsForTransfer):
            raise TypeError("the backend releases nothing")
        now = self._clock()
        read = _read_target(target)
        key: Jwk | None = None
        if read is not None:
            try:
                key = await self._key_of(record, read, now)
            except ServiceError as error:
                step = Step(UNREACHED, False, read.issuer, "no keys")
                failed = Outcome.of(Decision(steps=(step,), target=read))
                return await self._failed(call, caller, record, failed, enc, error)
        decision = decide(
            record,
            read or target,
            find=lambda _authority, _kid: key,
            knows=self._authorities.knows,
            now=now,
            skew=self._skew,
            strict=self._strict,
        )
        outcome, transfer = Outcome.of(decision), decision.transfer
        if transfer is None:
            return outcome, b""
        try:
            ciphertext = await backend.release(
                record.wrapped,
                record.context(),
                modulus=transfer.modulus,
                exponent=transfer.exponent,
                enc=enc,
            )
        except ServiceError as error:
            return await self._failed(call, caller, record, outcome, enc, error)
        return outcome, ciphertext

    async def _key_of(self, record: KeyRecord, target: Target, now: float) -> Jwk | None:
        """Return the key that would verify the token; nothing is fetched for a hopeless one."""
        trace = Trace()
        try:
            policy = check_key(trace, record, now, strict=self._strict)
            authority = find_authority(trace, policy, target)
        except NotReleasedError:
            return None
        return await self._authorities.find(authority, target.jws.kid)

    # ---- the record --------------------------------------------------------------------------

    def _event(
        self,
        call: Call,
        caller: Caller,
        record: KeyRecord,
        outcome: Outcome,
        verdict: Literal["allowed", "refused", "failed"],
        details: Mapping[str, Any],
        failed: Step | None = None,
    ) -> Event:
        token, transfer = outcome.token, outcome.transfer
        inside = isinstance(self._backend, DecidesInside)
        more: dict[str, Any] = {
            "caller_token": caller.token_digest,
            "decided": "inside" if inside else "by the vault's process",
            **details,
        }
        if token is not None:
            more["claims_digest"] = token.payload_digest
            more["authority"] = token.issuer
        if transfer is not None:
            more["transfer_key"] = transfer.digest
            more["transfer_place"] = transfer.place
        if failed is not None:
            more["held"] = list(outcome.held)
        return Event(
            action=_VERB,
            decision=verdict,
            caller=caller.name,
            resource=f"/keys/{record.name}/{record.version}",
            rule=f"release policy {outcome.policy_hash}",
            condition="" if failed is None else failed.name,
            expected=None if failed is None else failed.expected,
            found=None if failed is None else failed.found,
            claims=dict(outcome.claims),
            evidence_digest="" if token is None else token.digest,
            token_id="" if token is None else token.token_id or token.digest,
            request_id=call.request_id,
            details=more,
        )

    async def _refused(
        self, call: Call, caller: Caller, record: KeyRecord, outcome: Outcome, enc: str
    ) -> NoReturn:
        event = self._event(call, caller, record, outcome, "refused", {"enc": enc}, outcome.failed)

        def work(_tx: Transaction) -> None:
            raise Refused(_not_released(), event)

        await self._db.run(work)
        raise AssertionError("the work refuses")

    async def _failed(
        self,
        call: Call,
        caller: Caller,
        record: KeyRecord,
        outcome: Outcome,
        enc: str,
        error: ServiceError,
    ) -> NoReturn:
        details = {"enc": enc, "status": error.status, "message": error.message}
        event = self._event(call, caller, record, outcome, "failed", details, outcome.failed)

        def work(_tx: Transaction) -> None:
            raise Refused(error, event)

        await self._db.run(work)
        raise AssertionError("the work refuses")

    async def _released(
        self,
        call: Call,
        caller: Caller,
        record: KeyRecord,
        outcome: Outcome,
        asked: Mapping[str, str],
        confirm: Callable[[Transaction], None],
    ) -> None:
        """Write the release down; the answer leaves afterwards, and only if that succeeds."""
        details = {**asked, "signer": self._signer.kid}
        event = self._event(call, caller, record, outcome, "allowed", details)
        if not self._once:

            def keep(tx: Transaction) -> None:
                confirm(tx)
                tx.audit(event)

            await self._db.run(keep)
            return
        judged = outcome.token
        if judged is None:
            raise AssertionError("released without a token")
        # What was signed, not the token: ECDSA signatures have a twin that anybody can make.
        identifier = judged.token_id or judged.signed_digest
        parts = (judged.issuer, identifier, record.name, record.version)
        token = hashlib.sha256("\0".join(parts).encode("utf-8")).digest()
        expires = judged.expires + MAX_SKEW
        used = Step("token.once", False, "a token that was not used for this key", "used before")
        again = self._event(call, caller, record, outcome, "refused", details, used)

        def work(tx: Transaction) -> None:
            confirm(tx)
            if not use_up(tx, token, expires):
                raise Refused(_not_released(), again)
            tx.audit(event)

        await self._db.run(work)


def _read_target(text: str) -> Target | None:
    try:
        return Target.read(Trace(), text)
    except NotReleasedError:
        return None


def _not_released() -> ServiceError:
    # One text and one code, so that nobody learns by asking what a policy wants.
    return ServiceError(
        "The key is not released: the environment assertion does not satisfy its release policy.",
        status=403,
        error_code="Forbidden",
        inner="ForbiddenByPolicy",
    )
