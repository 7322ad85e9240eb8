"""Parts of OpenAPI 3.0 documents, from which services describe their interfaces."""

from __future__ import annotations

from typing import Any, Final

import msgspec

__all__ = [
    "BYTES",
    "TEXT",
    "Json",
    "choice",
    "closed",
    "json_body",
    "list_of",
    "object_of",
    "ref",
    "refusals",
    "whole",
]

Json = dict[str, Any]
TEXT: Final[Json] = {"type": "string"}
BYTES: Final[Json] = {"type": "string", "pattern": "^[A-Za-z0-9_-]*$"}


def object_of(required: tuple[str, ...] = (), /, **members: Json) -> Json:
    """Return the schema of an object; it may have more members than are named."""
    found: Json = {"type": "object", "properties": members}
    return found | {"required": list(required)} if required else found


def closed(required: tuple[str, ...] = (), /, **members: Json) -> Json:
    """Return the schema of an object that has no other members."""
    return object_of(required, **members) | {"additionalProperties": False}


def list_of(of: Json, **more: Any) -> Json:
    """Return the schema of an array of *of*."""
    return {"type": "array", "items": of, **more}


def choice(values: tuple[str, ...]) -> Json:
    """Return the schema of a text that is one of *values*."""
    return {"type": "string", "enum": list(values)}


def ref(name: str) -> Json:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def json_body(schema: Json) -> Json:
    """Return the content of a body that is JSON."""
    return {"application/json": {"schema": schema}}


def refusals(statuses: tuple[str, ...]) -> Json:
    """Return responses with these *statuses*, each with the document's ``Error``."""
    content = json_body(ref("Error"))
    return {status: {"description": "Refused", "content": content} for status in statuses}


def whole(title: str, version: str, schemas: Json, paths: Json) -> bytes:
    """Return the document, JSON; callers bring a bearer token."""
    bearer = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    return msgspec.json.encode(
        {
            "openapi": "3.0.3",
            "info": {"title": title, "version": version},
            "security": [{"bearer": []}],
            "components": {"securitySchemes": {"bearer": bearer}, "schemas": schemas},
            "paths": paths,
        }
    )
