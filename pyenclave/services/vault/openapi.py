"""
The vault's interface as an OpenAPI 3.0 document.

A service in development shows it at ``/openapi.json``; tests send what it allows, and what not.
"""

from __future__ import annotations

from typing import Any, Final

from pyenclave.services.vault.algorithms import OPERATION_NAMES, algorithms_of
from pyenclave.services.vault.backends.base import MAX_RANDOM
from pyenclave.services.vault.desk import OF_A_KEY
from pyenclave.services.vault.paging import MAX_PAGE
from pyenclave.services.vault.records import KEY_TYPES
from pyenclave.services.vault.requests import CURVES, OPERATIONS
from pyenclave.services.vault.service import API_VERSIONS, WITH_ATTESTATION
from pyenclave.services.web import health
from pyenclave.services.web.openapi import (
    BYTES,
    TEXT,
    Json,
    choice,
    json_body,
    list_of,
    object_of,
    ref,
    refusals,
    whole,
)

__all__ = ["document"]

_FLAG: Final[Json] = {"type": "boolean"}
_TIME: Final[Json] = {"type": "integer", "minimum": 0, "maximum": 253402300799}


def _schemas() -> Json:
    attributes = {"enabled": _FLAG, "nbf": _TIME, "exp": _TIME, "exportable": _FLAG}
    policy = object_of(("data",), contentType=TEXT, data=BYTES, immutable=_FLAG)
    tags = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 256}}
    ops = list_of(choice(OPERATIONS), maxItems=16)
    shown = object_of(
        ("enabled", "created", "updated", "recoveryLevel", "exportable"),
        **attributes,
        created=_TIME,
        updated=_TIME,
        recoveryLevel=TEXT,
        recoverableDays={"type": "integer"},
    )
    public = dict.fromkeys(("n", "e", "x", "y"), BYTES)
    key = object_of(
        ("kid", "kty", "key_ops"),
        kid=TEXT,
        kty=choice(KEY_TYPES),
        key_ops=ops,
        crv=choice(CURVES),
        **public,
    )
    bundle = {"key": key, "attributes": shown, "tags": tags, "release_policy": policy}
    item = {"kid": TEXT, "attributes": shown, "tags": tags}
    gone = {"recoveryId": TEXT, "deletedDate": _TIME, "scheduledPurgeDate": _TIME}
    trigger = object_of(timeAfterCreate=TEXT, timeBeforeExpiry=TEXT)
    action = object_of(type=choice(("Rotate", "Notify")))
    rotation = {
        "lifetimeActions": list_of(object_of(trigger=trigger, action=action), maxItems=2),
        "attributes": object_of(expiryTime=TEXT, created=_TIME, updated=_TIME),
    }
    private = dict.fromkeys(("d", "dp", "dq", "qi", "p", "q", "k"), BYTES)
    wanted = {"attributes": object_of(**attributes), "tags": tags, "release_policy": policy}
    link = {"type": "string", "nullable": True}
    listed = object_of(("kid", "attributes"), **item)
    listed_gone = object_of(("kid", "attributes", *gone), **item, **gone)
    given = {"kty": choice(KEY_TYPES), "crv": choice(CURVES), "key_ops": ops}
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
        "KeyBundle": object_of(("key", "attributes"), **bundle),
        "DeletedKeyBundle": object_of(("key", "attributes", *gone), **bundle, **gone),
        "KeyList": object_of(("value",), value=list_of(listed), nextLink=link),
        "DeletedKeyList": object_of(
            ("value",),
            value=list_of(listed_gone),
            nextLink=link,
        ),
        "Create": object_of(
            ("kty",),
            kty=choice(KEY_TYPES),
            key_size={"type": "integer", "enum": [128, 192, 256, 2048, 3072, 4096]},
            crv=choice(CURVES),
            key_ops=ops,
            **wanted,
        ),
        "Import": object_of(
            ("key",),
            key=object_of(("kty",), **given, **public, **private),
            Hsm=_FLAG,
            **wanted,
        ),
        "Update": object_of(key_ops=ops, **wanted),
        "Value": object_of(("value",), value=BYTES),
        "Result": object_of(
            ("kid", "value"), kid=TEXT, value=BYTES, iv=BYTES, tag=BYTES, aad=BYTES
        ),
        "Verified": object_of(("value",), value=_FLAG),
        "Random": object_of(
            ("count",), count={"type": "integer", "minimum": 1, "maximum": MAX_RANDOM}
        ),
        "Rotation": object_of(**rotation),
        "ShownRotation": object_of(("id", "lifetimeActions", "attributes"), id=TEXT, **rotation),
        "Release": object_of(
            ("target",),
            target=TEXT,
            nonce=TEXT,
            enc=choice(("CKM_RSA_AES_KEY_WRAP", "RSA_AES_KEY_WRAP_256", "RSA_AES_KEY_WRAP_384")),
        ),
        "Released": object_of(("value",), value=TEXT),
    }


def _operation(name: str) -> Json:
    members = {"alg": choice(algorithms_of(OPERATION_NAMES[name])), "value": BYTES}
    if name == "verify":
        members["digest"] = BYTES
    elif name in ("encrypt", "decrypt"):
        members |= {"iv": BYTES, "aad": BYTES, "tag": BYTES}
    return object_of(
        ("alg", "value", "digest") if name == "verify" else ("alg", "value"), **members
    )


_NAME: Final[Json] = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9a-zA-Z-]{1,127}$"},
}
_VERSION: Final[Json] = {
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
    {"name": "$skiptoken", "in": "query", "schema": BYTES},
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
    body: Json | None = None,
    paged: bool = False,
    versions: tuple[str, ...] = API_VERSIONS,
) -> Json:
    parameters: list[Json] = [
        {"name": "api-version", "in": "query", "required": True, "schema": choice(versions)}
    ]
    parameters += [part for part in (_NAME, _VERSION) if f"{{{part['name']}}}" in path]
    if paged:
        parameters += _PAGING
    responses = refusals(_ERRORS)
    if answer is None:
        responses["204"] = {"description": "Done"}
    else:
        content = json_body(ref(answer))
        responses["200"] = {"description": "Done", "content": content}
    found: Json = {"parameters": parameters, "responses": responses}
    if body is not None:
        found["requestBody"] = {"required": True, "content": json_body(body)}
    return found


def _paths() -> Json:
    found: Json = {}

    def add(method: str, path: str, answer: str | None, **more: Any) -> None:
        found.setdefault(path, {})[method] = _call(path, answer=answer, **more)

    for slash in ("", "/"):
        add("get", "/keys" + slash, "KeyList", paged=True)
        add("get", "/deletedkeys" + slash, "DeletedKeyList", paged=True)
    add("post", "/keys/{name}/create", "KeyBundle", body=ref("Create"))
    add("put", "/keys/{name}", "KeyBundle", body=ref("Import"))
    add("delete", "/keys/{name}", "DeletedKeyBundle")
    add("get", "/keys/{name}/versions", "KeyList", paged=True)
    for path in ("/keys/{name}", "/keys/{name}/", "/keys/{name}/{version}"):
        add("get", path, "KeyBundle")
        add("patch", path, "KeyBundle", body=ref("Update"))
    for path in OF_A_KEY:
        for word in OPERATION_NAMES:
            answer = "Verified" if word == "verify" else "Result"
            add("post", path + word, answer, body=_operation(word))
        add("post", path + "release", "Released", body=ref("Release"))
        add("get", path + "attestation", "KeyBundle", versions=WITH_ATTESTATION)
    add("get", "/deletedkeys/{name}", "DeletedKeyBundle")
    add("delete", "/deletedkeys/{name}", None)
    add("post", "/deletedkeys/{name}/recover", "KeyBundle")
    add("post", "/keys/{name}/backup", "Value")
    add("post", "/keys/restore", "KeyBundle", body=ref("Value"))
    add("post", "/keys/{name}/rotate", "KeyBundle")
    add("get", "/keys/{name}/rotationpolicy", "ShownRotation")
    add("put", "/keys/{name}/rotationpolicy", "ShownRotation", body=ref("Rotation"))
    add("post", "/rng", "Value", body=ref("Random"))
    return found | health.described()


def document() -> bytes:
    """Return the document, JSON."""
    return whole("pyenclave key vault", API_VERSIONS[-1], _schemas(), _paths())
