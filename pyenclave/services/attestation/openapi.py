"""
The attestation service's interface as an OpenAPI 3.0 document.

A service in development shows it at ``/openapi.json``; tests send what it allows, and what not.
"""

from __future__ import annotations

from typing import Any, Final

from pyenclave.services.attestation.attesting import EAR_TYPE
from pyenclave.services.attestation.requests import ATTESTATION_TYPES, UNSUPPORTED
from pyenclave.services.attestation.service import API_VERSIONS
from pyenclave.services.attestation.tokens import ALGORITHMS
from pyenclave.services.attestation.uploads import MAX_UPLOAD
from pyenclave.services.web import health
from pyenclave.services.web.openapi import (
    BYTES,
    TEXT,
    Json,
    closed,
    json_body,
    list_of,
    object_of,
    ref,
    refusals,
    whole,
)

__all__ = ["document"]

_NUMBER: Final[Json] = {"type": "integer", "minimum": 0}
_TOKEN: Final[Json] = {
    "type": "string",
    "pattern": r"^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*$",
}
_SHOWN_ALGORITHMS: Final = {"type": "string", "enum": list(ALGORITHMS)}


def _request(kind: str) -> Json:
    evidence = ATTESTATION_TYPES[kind]
    if kind == "AzureGuest":
        return closed((evidence,), **{evidence: BYTES})
    return closed(
        (evidence,),
        **{evidence: BYTES},
        runtimeData=ref("BoundData"),
        initTimeData=ref("BoundData"),
        draftPolicyForAttestation=TEXT,
        nonce={"type": "string", "minLength": 1, "maxLength": 1024, "pattern": "^[ -~]+$"},
    )


def _schemas() -> Json:
    key = object_of(
        ("kid", "use", "alg", "kty", "x5c"),
        kid=TEXT,
        use={"type": "string", "enum": ["sig"]},
        alg=_SHOWN_ALGORITHMS,
        kty={"type": "string", "enum": ["EC", "RSA"]},
        x5c=list_of(TEXT),
        **dict.fromkeys(("n", "e", "x", "y"), BYTES),
        crv=TEXT,
    )
    baseline = object_of(
        ("tcbIdentifier", "tcbEvaluationDataNumber", "tcbReleaseDate", "isSelectedTcb"),
        tcbIdentifier=TEXT,
        tcbEvaluationDataNumber=_NUMBER,
        tcbReleaseDate=TEXT,
        isSelectedTcb={"type": "boolean"},
    )
    return {
        "Error": object_of(
            ("error",),
            error=object_of(
                ("code", "message"),
                code=TEXT,
                message=TEXT,
                reference=TEXT,
                innererror=object_of(("code",), code=TEXT),
            ),
        ),
        "BoundData": closed(
            ("data", "dataType"),
            data=BYTES,
            dataType={"type": "string", "enum": ["Binary", "JSON"]},
        ),
        **{f"Attest{kind}": _request(kind) for kind in ATTESTATION_TYPES},
        "Token": closed(("token",), token=_TOKEN),
        # Of a guest it is sealed to the guest's vTPM.
        "SealedToken": closed(("token",), token=TEXT),
        "Nonce": closed(("nonce", "expires"), nonce=TEXT, expires=_NUMBER),
        "KeySet": closed(("keys",), keys=list_of(key)),
        "Baselines": closed(("tcbBaselines",), tcbBaselines=list_of(baseline)),
        "Discovery": object_of(
            ("issuer", "jwks_uri", "id_token_signing_alg_values_supported", "claims_supported"),
            issuer=TEXT,
            jwks_uri=TEXT,
            response_types_supported=list_of(TEXT),
            id_token_signing_alg_values_supported=list_of(_SHOWN_ALGORITHMS),
            revocation_endpoint=TEXT,
            claims_supported=list_of(TEXT),
        ),
        "Upload": {**_TOKEN, "maxLength": MAX_UPLOAD},
    }


_VERSION: Final[Json] = {
    "name": "api-version",
    "in": "query",
    "required": True,
    "schema": {"type": "string", "enum": list(API_VERSIONS)},
}
_FORMAT: Final[Json] = {
    "name": "format",
    "in": "query",
    "schema": {"type": "string", "enum": ["jwt", "ear"]},
}
_TYPE: Final[Json] = {
    "name": "type",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "enum": list(ATTESTATION_TYPES)},
}
_ERRORS: Final = (
    *("400", "401", "403", "404", "405", "408", "413", "414", "415"),
    *("429", "431", "501", "503"),
)


def _call(
    answer: str | None,
    *,
    parameters: tuple[Json, ...] = (_VERSION,),
    body: Json | None = None,
    anonymous: bool = False,
    ear: bool = False,
) -> Json:
    responses = refusals(_ERRORS)
    if answer is not None:
        content: Json = json_body(ref(answer))
        if ear:
            content[EAR_TYPE] = {"schema": TEXT}
        responses["200"] = {"description": "Done", "content": content}
    found: Json = {"parameters": list(parameters), "responses": responses}
    if anonymous:
        found["security"] = []
    if body is not None:
        found["requestBody"] = {"required": True, "content": body}
    return found


def _paths() -> Json:
    found: Json = {}

    def add(method: str, path: str, answer: str | None, **more: Any) -> None:
        found.setdefault(path, {})[method] = _call(answer, **more)

    # Azure's clients send the token as text or as JSON text.
    upload = {
        "text/plain": {"schema": ref("Upload")},
        "application/json": {"schema": ref("Upload")},
    }
    for kind in ATTESTATION_TYPES:
        guest = kind == "AzureGuest"
        add(
            "post",
            f"/attest/{kind}",
            "SealedToken" if guest else "Token",
            parameters=(_VERSION,) if guest else (_VERSION, _FORMAT),
            body=json_body(ref(f"Attest{kind}")),
            anonymous=True,
            ear=not guest,
        )
    for kind in UNSUPPORTED:
        add(
            "post",
            f"/attest/{kind}",
            None,
            body=json_body({"type": "object"}),
            anonymous=True,
        )
    add("post", "/nonces", "Nonce", parameters=(), anonymous=True)
    add("get", "/tcbbaselines/{type}", "Baselines", parameters=(_VERSION, _TYPE), anonymous=True)
    add("get", "/certs", "KeySet", parameters=(), anonymous=True)
    add(
        "get",
        "/.well-known/openid-configuration",
        "Discovery",
        parameters=(),
        anonymous=True,
    )
    add("post", "/revoke", None, parameters=(), anonymous=True)
    add("get", "/policies/{type}", "Token", parameters=(_VERSION, _TYPE))
    add("put", "/policies/{type}", "Token", parameters=(_VERSION, _TYPE), body=upload)
    add("post", "/policies/{type}:reset", "Token", parameters=(_VERSION, _TYPE), body=upload)
    add("get", "/certificates", "Token")
    for verb in ("Add", "Remove"):
        member = f"policyCertificateTo{verb}"
        given = {
            **upload,
            "application/json": {"schema": closed((member,), **{member: ref("Upload")})},
        }
        add("post", f"/certificates:{verb.lower()}", "Token", body=given)
    return found | health.described()


def document() -> bytes:
    """Return the document, JSON."""
    return whole("pyenclave attestation service", API_VERSIONS[-1], _schemas(), _paths())
