"""
The attestation service's interface as an OpenAPI 3.0 document.

A service in development shows it at ``/openapi.json``; tests send what it allows, and what not.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from pyenclave.services.attestation.attesting import EAR_TYPE
from pyenclave.services.attestation.requests import ATTESTATION_TYPES, UNSUPPORTED
from pyenclave.services.attestation.service import API_VERSIONS
from pyenclave.services.attestation.tokens import ALGORITHMS
from pyenclave.services.attestation.uploads import MAX_UPLOAD
from pyenclave.services.web import health

__all__ = ["document"]

_Json = dict[str, Any]
_TEXT: Final[_Json] = {"type": "string"}
_NUMBER: Final[_Json] = {"type": "integer", "minimum": 0}
_BYTES: Final[_Json] = {"type": "string", "pattern": "^[A-Za-z0-9_-]*$"}
_TOKEN: Final[_Json] = {
    "type": "string",
    "pattern": r"^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*$",
}
_SHOWN_ALGORITHMS: Final = {"type": "string", "enum": list(ALGORITHMS)}


def _object(required: tuple[str, ...] = (), /, **members: _Json) -> _Json:
    found: _Json = {"type": "object", "properties": members}
    return found | {"required": list(required)} if required else found


def _closed(required: tuple[str, ...] = (), /, **members: _Json) -> _Json:
    return _object(required, **members) | {"additionalProperties": False}


def _list(of: _Json) -> _Json:
    return {"type": "array", "items": of}


def _ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _request(kind: str) -> _Json:
    evidence = ATTESTATION_TYPES[kind]
    if kind == "AzureGuest":
        return _closed((evidence,), **{evidence: _BYTES})
    return _closed(
        (evidence,),
        **{evidence: _BYTES},
        runtimeData=_ref("BoundData"),
        initTimeData=_ref("BoundData"),
        draftPolicyForAttestation=_TEXT,
        nonce={"type": "string", "minLength": 1, "maxLength": 1024, "pattern": "^[ -~]+$"},
    )


def _schemas() -> _Json:
    key = _object(
        ("kid", "use", "alg", "kty", "x5c"),
        kid=_TEXT,
        use={"type": "string", "enum": ["sig"]},
        alg=_SHOWN_ALGORITHMS,
        kty={"type": "string", "enum": ["EC", "RSA"]},
        x5c=_list(_TEXT),
        **dict.fromkeys(("n", "e", "x", "y"), _BYTES),
        crv=_TEXT,
    )
    baseline = _object(
        ("tcbIdentifier", "tcbEvaluationDataNumber", "tcbReleaseDate", "isSelectedTcb"),
        tcbIdentifier=_TEXT,
        tcbEvaluationDataNumber=_NUMBER,
        tcbReleaseDate=_TEXT,
        isSelectedTcb={"type": "boolean"},
    )
    return {
        "Error": _object(
            ("error",),
            error=_object(
                ("code", "message"),
                code=_TEXT,
                message=_TEXT,
                reference=_TEXT,
                innererror=_object(("code",), code=_TEXT),
            ),
        ),
        "BoundData": _closed(
            ("data", "dataType"),
            data=_BYTES,
            dataType={"type": "string", "enum": ["Binary", "JSON"]},
        ),
        **{f"Attest{kind}": _request(kind) for kind in ATTESTATION_TYPES},
        "Token": _closed(("token",), token=_TOKEN),
        # Of a guest it is sealed to the guest's vTPM.
        "SealedToken": _closed(("token",), token=_TEXT),
        "Nonce": _closed(("nonce", "expires"), nonce=_TEXT, expires=_NUMBER),
        "KeySet": _closed(("keys",), keys=_list(key)),
        "Baselines": _closed(("tcbBaselines",), tcbBaselines=_list(baseline)),
        "Discovery": _object(
            ("issuer", "jwks_uri", "id_token_signing_alg_values_supported", "claims_supported"),
            issuer=_TEXT,
            jwks_uri=_TEXT,
            response_types_supported=_list(_TEXT),
            id_token_signing_alg_values_supported=_list(_SHOWN_ALGORITHMS),
            revocation_endpoint=_TEXT,
            claims_supported=_list(_TEXT),
        ),
        "Upload": {**_TOKEN, "maxLength": MAX_UPLOAD},
    }


_VERSION: Final[_Json] = {
    "name": "api-version",
    "in": "query",
    "required": True,
    "schema": {"type": "string", "enum": list(API_VERSIONS)},
}
_FORMAT: Final[_Json] = {
    "name": "format",
    "in": "query",
    "schema": {"type": "string", "enum": ["jwt", "ear"]},
}
_TYPE: Final[_Json] = {
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
    parameters: tuple[_Json, ...] = (_VERSION,),
    body: _Json | None = None,
    anonymous: bool = False,
    ear: bool = False,
) -> _Json:
    error = {"application/json": {"schema": _ref("Error")}}
    responses: _Json = {status: {"description": "Refused", "content": error} for status in _ERRORS}
    if answer is not None:
        content: _Json = {"application/json": {"schema": _ref(answer)}}
        if ear:
            content[EAR_TYPE] = {"schema": _TEXT}
        responses["200"] = {"description": "Done", "content": content}
    found: _Json = {"parameters": list(parameters), "responses": responses}
    if anonymous:
        found["security"] = []
    if body is not None:
        found["requestBody"] = {"required": True, "content": body}
    return found


def _json_body(schema: _Json) -> _Json:
    return {"application/json": {"schema": schema}}


def _paths() -> _Json:
    found: _Json = {}

    def add(method: str, path: str, answer: str | None, **more: Any) -> None:
        found.setdefault(path, {})[method] = _call(answer, **more)

    # Azure's clients send the token as text or as JSON text.
    upload = {
        "text/plain": {"schema": _ref("Upload")},
        "application/json": {"schema": _ref("Upload")},
    }
    for kind in ATTESTATION_TYPES:
        guest = kind == "AzureGuest"
        add(
            "post",
            f"/attest/{kind}",
            "SealedToken" if guest else "Token",
            parameters=(_VERSION,) if guest else (_VERSION, _FORMAT),
            body=_json_body(_ref(f"Attest{kind}")),
            anonymous=True,
            ear=not guest,
        )
    for kind in UNSUPPORTED:
        add(
            "post",
            f"/attest/{kind}",
            None,
            body=_json_body({"type": "object"}),
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
            "application/json": {"schema": _closed((member,), **{member: _ref("Upload")})},
        }
        add("post", f"/certificates:{verb.lower()}", "Token", body=given)
    return found | health.described()


def document() -> bytes:
    """Return the document, JSON."""
    bearer = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    return msgspec.json.encode(
        {
            "openapi": "3.0.3",
            "info": {"title": "pyenclave attestation service", "version": API_VERSIONS[-1]},
            "security": [{"bearer": []}],
            "components": {"securitySchemes": {"bearer": bearer}, "schemas": _schemas()},
            "paths": _paths(),
        }
    )
