"""
The vault's interface as an OpenAPI 3.0 document.

A service in development shows it at ``/openapi.json``; tests send what it allows, and what not.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from pyenclave.services.vault.algorithms import OPERATION_NAMES, algorithms_of
from pyenclave.services.vault.backends.base import MAX_RANDOM
from pyenclave.services.vault.desk import OF_A_KEY
from pyenclave.services.vault.paging import MAX_PAGE
from pyenclave.services.vault.records import KEY_TYPES
from pyenclave.services.vault.requests import CURVES, OPERATIONS
from pyenclave.services.vault.service import API_VERSIONS, WITH_ATTESTATION
from pyenclave.services.web import health

__all__ = ["document"]

_Json = dict[str, Any]
_TEXT: Final[_Json] = {"type": "string"}
_FLAG: Final[_Json] = {"type": "boolean"}
_TIME: Final[_Json] = {"type": "integer", "minimum": 0, "maximum": 253402300799}
_BYTES: Final[_Json] = {"type": "string", "pattern": "^[A-Za-z0-9_-]*$"}


def _object(required: tuple[str, ...] = (), /, **members: _Json) -> _Json:
    found: _Json = {"type": "object", "properties": members}
    return found | {"required": list(required)} if required else found


def _choice(values: tuple[str, ...]) -> _Json:
    return {"type": "string", "enum": list(values)}


def _list(of: _Json, **more: Any) -> _Json:
    return {"type": "array", "items": of, **more}


def _ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> _Json:
    attributes = {"enabled": _FLAG, "nbf": _TIME, "exp": _TIME, "exportable": _FLAG}
    policy = _object(("data",), contentType=_TEXT, data=_BYTES, immutable=_FLAG)
    tags = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 256}}
    ops = _list(_choice(OPERATIONS), maxItems=16)
    shown = _object(
        ("enabled", "created", "updated", "recoveryLevel", "exportable"),
        **attributes,
        created=_TIME,
        updated=_TIME,
        recoveryLevel=_TEXT,
        recoverableDays={"type": "integer"},
    )
    public = dict.fromkeys(("n", "e", "x", "y"), _BYTES)
    key = _object(
        ("kid", "kty", "key_ops"),
        kid=_TEXT,
        kty=_choice(KEY_TYPES),
        key_ops=ops,
        crv=_choice(CURVES),
        **public,
    )
    bundle = {"key": key, "attributes": shown, "tags": tags, "release_policy": policy}
    item = {"kid": _TEXT, "attributes": shown, "tags": tags}
    gone = {"recoveryId": _TEXT, "deletedDate": _TIME, "scheduledPurgeDate": _TIME}
    trigger = _object(timeAfterCreate=_TEXT, timeBeforeExpiry=_TEXT)
    action = _object(type=_choice(("Rotate", "Notify")))
    rotation = {
        "lifetimeActions": _list(_object(trigger=trigger, action=action), maxItems=2),
        "attributes": _object(expiryTime=_TEXT, created=_TIME, updated=_TIME),
    }
    private = dict.fromkeys(("d", "dp", "dq", "qi", "p", "q", "k"), _BYTES)
    wanted = {"attributes": _object(**attributes), "tags": tags, "release_policy": policy}
    link = {"type": "string", "nullable": True}
    listed = _object(("kid", "attributes"), **item)
    listed_gone = _object(("kid", "attributes", *gone), **item, **gone)
    given = {"kty": _choice(KEY_TYPES), "crv": _choice(CURVES), "key_ops": ops}
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
        "KeyBundle": _object(("key", "attributes"), **bundle),
        "DeletedKeyBundle": _object(("key", "attributes", *gone), **bundle, **gone),
        "KeyList": _object(("value",), value=_list(listed), nextLink=link),
        "DeletedKeyList": _object(
            ("value",),
            value=_list(listed_gone),
            nextLink=link,
        ),
        "Create": _object(
            ("kty",),
            kty=_choice(KEY_TYPES),
            key_size={"type": "integer", "enum": [128, 192, 256, 2048, 3072, 4096]},
            crv=_choice(CURVES),
            key_ops=ops,
            **wanted,
        ),
        "Import": _object(
            ("key",),
            key=_object(("kty",), **given, **public, **private),
            Hsm=_FLAG,
            **wanted,
        ),
        "Update": _object(key_ops=ops, **wanted),
        "Value": _object(("value",), value=_BYTES),
        "Result": _object(
            ("kid", "value"), kid=_TEXT, value=_BYTES, iv=_BYTES, tag=_BYTES, aad=_BYTES
        ),
        "Verified": _object(("value",), value=_FLAG),
        "Random": _object(
            ("count",), count={"type": "integer", "minimum": 1, "maximum": MAX_RANDOM}
        ),
        "Rotation": _object(**rotation),
        "ShownRotation": _object(("id", "lifetimeActions", "attributes"), id=_TEXT, **rotation),
        "Release": _object(
            ("target",),
            target=_TEXT,
            nonce=_TEXT,
            enc=_choice(("CKM_RSA_AES_KEY_WRAP", "RSA_AES_KEY_WRAP_256", "RSA_AES_KEY_WRAP_384")),
        ),
        "Released": _object(("value",), value=_TEXT),
    }


def _operation(name: str) -> _Json:
    members = {"alg": _choice(algorithms_of(OPERATION_NAMES[name])), "value": _BYTES}
    if name == "verify":
        members["digest"] = _BYTES
    elif name in ("encrypt", "decrypt"):
        members |= {"iv": _BYTES, "aad": _BYTES, "tag": _BYTES}
    return _object(("alg", "value", "digest") if name == "verify" else ("alg", "value"), **members)


_NAME: Final[_Json] = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9a-zA-Z-]{1,127}$"},
}
_VERSION: Final[_Json] = {
    "name": "version",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
}
_PAGING: Final = (
    {
        "name": "maxresults",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
    },
    {"name": "$skiptoken", "in": "query", "schema": _BYTES},
)
_ERRORS: Final = (
    "400",
    "401",
    "403",
    "404",
    "405",
    "408",
    "409",
    "413",
    "414",
    "415",
    "429",
    "503",
)


def _call(
    path: str,
    *,
    answer: str | None,
    body: _Json | None = None,
    paged: bool = False,
    versions: tuple[str, ...] = API_VERSIONS,
) -> _Json:
    parameters: list[_Json] = [
        {"name": "api-version", "in": "query", "required": True, "schema": _choice(versions)}
    ]
    parameters += [part for part in (_NAME, _VERSION) if f"{{{part['name']}}}" in path]
    if paged:
        parameters += _PAGING
    error = {"application/json": {"schema": _ref("Error")}}
    responses: _Json = {status: {"description": "Refused", "content": error} for status in _ERRORS}
    if answer is None:
        responses["204"] = {"description": "Done"}
    else:
        content = {"application/json": {"schema": _ref(answer)}}
        responses["200"] = {"description": "Done", "content": content}
    found: _Json = {"parameters": parameters, "responses": responses}
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found


def _paths() -> _Json:
    found: _Json = {}

    def add(method: str, path: str, answer: str | None, **more: Any) -> None:
        found.setdefault(path, {})[method] = _call(path, answer=answer, **more)

    for slash in ("", "/"):
        add("get", "/keys" + slash, "KeyList", paged=True)
        add("get", "/deletedkeys" + slash, "DeletedKeyList", paged=True)
    add("post", "/keys/{name}/create", "KeyBundle", body=_ref("Create"))
    add("put", "/keys/{name}", "KeyBundle", body=_ref("Import"))
    add("delete", "/keys/{name}", "DeletedKeyBundle")
    add("get", "/keys/{name}/versions", "KeyList", paged=True)
    for path in ("/keys/{name}", "/keys/{name}/", "/keys/{name}/{version}"):
        add("get", path, "KeyBundle")
        add("patch", path, "KeyBundle", body=_ref("Update"))
    for path in OF_A_KEY:
        for word in OPERATION_NAMES:
            answer = "Verified" if word == "verify" else "Result"
            add("post", path + word, answer, body=_operation(word))
        add("post", path + "release", "Released", body=_ref("Release"))
        add("get", path + "attestation", "KeyBundle", versions=WITH_ATTESTATION)
    add("get", "/deletedkeys/{name}", "DeletedKeyBundle")
    add("delete", "/deletedkeys/{name}", None)
    add("post", "/deletedkeys/{name}/recover", "KeyBundle")
    add("post", "/keys/{name}/backup", "Value")
    add("post", "/keys/restore", "KeyBundle", body=_ref("Value"))
    add("post", "/keys/{name}/rotate", "KeyBundle")
    add("get", "/keys/{name}/rotationpolicy", "ShownRotation")
    add("put", "/keys/{name}/rotationpolicy", "ShownRotation", body=_ref("Rotation"))
    add("post", "/rng", "Value", body=_ref("Random"))
    return found | health.described()


def document() -> bytes:
    """Return the document, JSON."""
    bearer = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    return msgspec.json.encode(
        {
            "openapi": "3.0.3",
            "info": {"title": "pyenclave key vault", "version": API_VERSIONS[-1]},
            "security": [{"bearer": []}],
            "components": {"securitySchemes": {"bearer": bearer}, "schemas": _schemas()},
            "paths": _paths(),
        }
    )
