"""Requests that nobody's client sends: types, sizes, paths, names, tokens."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from vault_parts import POLICY, Running, b64, release_policy, running_vault

EXPORTABLE = {"exportable": True}


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_vault(tmp_path_factory.mktemp("hostile")) as running:
        assert running.request("POST", "/keys/ec/create", {"kty": "EC"}).status_code == 200
        aes = {"kty": "oct-HSM", "key_size": 128}
        assert running.request("POST", "/keys/aes/create", aes).status_code == 200
        yield running


def refused(running: Running, method: str, path: str, body: Any, part: str = "") -> None:
    answer = running.request(method, path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "BadParameter"
    assert part in error["message"]


WRONG_CREATES: list[tuple[dict[str, Any], str]] = [
    ({}, "kty"),
    ({"kty": None}, "kty"),
    ({"kty": 1}, "kty"),
    ({"kty": "rsa"}, "kty"),
    ({"kty": "RSA", "key_size": 1024}, "key_size"),
    ({"kty": "RSA", "key_size": "2048"}, "key_size"),
    ({"kty": "RSA", "key_size": 2048.0}, "key_size"),
    ({"kty": "RSA", "key_size": True}, "key_size"),
    ({"kty": "RSA", "key_size": -1}, "key_size"),
    ({"kty": "RSA", "key_size": 1 << 60}, "key_size"),
    ({"kty": "RSA", "public_exponent": 3}, "public_exponent"),
    ({"kty": "EC", "public_exponent": 65537}, "public_exponent"),
    ({"kty": "EC", "crv": "P-224"}, "crv"),
    ({"kty": "EC", "crv": ["P-256"]}, "crv"),
    ({"kty": "EC", "key_ops": ["encrypt"]}, "key_ops"),
    ({"kty": "oct", "key_size": 64}, "key_size"),
    ({"kty": "RSA", "key_ops": "sign"}, "key_ops"),
    ({"kty": "RSA", "key_ops": ["sign", 1]}, "key_ops"),
    ({"kty": "RSA", "key_ops": ["deriveKey"]}, "key_ops"),
    ({"kty": "RSA", "key_ops": ["sign"] * 17}, "key_ops"),
    ({"kty": "EC", "attributes": []}, "attributes"),
    ({"kty": "EC", "attributes": {"enabled": "true"}}, "attributes.enabled"),
    ({"kty": "EC", "attributes": {"enabled": 1}}, "attributes.enabled"),
    ({"kty": "EC", "attributes": {"exp": -1}}, "attributes.exp"),
    ({"kty": "EC", "attributes": {"exp": 1e9}}, "attributes.exp"),
    ({"kty": "EC", "attributes": {"exp": 1 << 62}}, "attributes.exp"),
    ({"kty": "EC", "attributes": {"nbf": "now"}}, "attributes.nbf"),
    ({"kty": "EC", "attributes": {"nbf": 20, "exp": 20}}, "nbf"),
    ({"kty": "EC", "tags": []}, "tags"),
    ({"kty": "EC", "tags": {"a": 1}}, "tags"),
    ({"kty": "EC", "tags": {"a": None}}, "tags"),
    ({"kty": "EC", "tags": {"": "a"}}, "tags"),
    ({"kty": "EC", "tags": {"a" * 257: "a"}}, "tags"),
    ({"kty": "EC", "tags": {"a": "a" * 257}}, "tags"),
    ({"kty": "EC", "tags": {str(n): "" for n in range(16)}}, "tags"),
    ({"kty": "EC-HSM", "attributes": EXPORTABLE}, "AKV.SKR.1004"),
    ({"kty": "EC-HSM", "release_policy": release_policy()}, "AKV.SKR.1005"),
    ({"kty": "EC", "attributes": EXPORTABLE, "release_policy": release_policy()}, "AKV.SKR.1006"),
]


@pytest.mark.parametrize(("body", "part"), WRONG_CREATES)
def test_a_wrong_create_request_names_what_is_wrong(
    vault: Running, body: dict[str, Any], part: str
) -> None:
    """400 with the member's name, and no key."""
    refused(vault, "POST", "/keys/wrong/create", body, part)
    assert vault.request("GET", "/keys/wrong").status_code == 404


WRONG_POLICIES: list[Any] = [
    "text",
    [],
    {},
    {"data": 1},
    {"data": ""},
    {"data": "=="},
    {"data": b64(b"not json")},
    {"data": b64(b"[]")},
    {"data": b64(b'{"anyOf":[]}')},
    {"data": b64(json.dumps(POLICY | {"version": "2.0.0"}).encode())},
    {"data": b64(json.dumps(POLICY | {"else": 1}).encode())},
    {"data": b64(json.dumps(POLICY).encode()) + "="},
    {"data": "+" + b64(json.dumps(POLICY).encode())[1:]},
    {"data": b64(b" " * (65 << 10))},
    release_policy() | {"immutable": "true"},
    release_policy() | {"imutable": True},
    release_policy() | {"contentType": "text/plain"},
    release_policy() | {"contentType": 5},
]


@pytest.mark.parametrize("policy", WRONG_POLICIES)
def test_a_release_policy_that_nobody_can_read_makes_no_key(vault: Running, policy: Any) -> None:
    """Also a misspelt member is refused: it could have been the one that protects."""
    body = {"kty": "EC-HSM", "attributes": EXPORTABLE, "release_policy": policy}
    refused(vault, "POST", "/keys/wrong/create", body)
    assert vault.request("GET", "/keys/wrong").status_code == 404


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"kty"',
        b"{",
        b'{"kty":"EC","kty":"EC"}',
        b'{"kty":"EC"} x',
        b'\xef\xbb\xbf{"kty":"EC"}',
        b'{"kty":"E\xff"}',
        b'{"kty":"EC","tags":{"a":"\\ud800"}}',
        b'{"a":' * 40 + b"1" + b"}" * 40,
        b'{"kty":"EC","attributes":{"exp":NaN}}',
        b'{"kty":"EC","attributes":{"exp":1' + b"0" * 4000 + b"}}",
    ],
)
def test_a_body_that_is_not_one_json_object_is_refused(vault: Running, content: bytes) -> None:
    """Malformed, ambiguous, too deep."""
    refused(vault, "POST", "/keys/wrong/create", content)


def test_a_body_beyond_its_limit_is_refused_and_unknown_members_are_passed_over(
    vault: Running,
) -> None:
    """Azure passes over what it does not know; so do we."""
    body = {"kty": "EC", "later": {"x": 1}, "attributes": {"created": 1, "recoveryLevel": "x"}}
    answer = vault.request("POST", "/keys/later/create", body)
    assert answer.status_code == 200
    assert answer.json()["attributes"]["created"] > 1
    assert answer.json()["attributes"]["recoveryLevel"] == "Recoverable+Purgeable"
    huge = vault.request("POST", "/keys/later/create", b'{"a":"' + b"x" * (1 << 20) + b'"}')
    assert huge.status_code == 413


@pytest.mark.parametrize(
    "name", ["a_b", "a.b", "a b", "a%20b", "ä", "a" * 128, "a+b", "a:b", "a;b", "a@b", "~", "a'"]
)
def test_only_letters_digits_and_dashes_name_a_key(vault: Running, name: str) -> None:
    """400, and for letters beyond ASCII too."""
    for method, path in (("GET", f"/keys/{name}"), ("DELETE", f"/deletedkeys/{name}")):
        assert vault.request(method, path).status_code == 400
    assert vault.request("POST", f"/keys/{name}/create", {"kty": "EC"}).status_code == 400


def test_the_longest_name_is_taken(vault: Running) -> None:
    """127 characters."""
    name = "a" * 127
    assert vault.request("POST", f"/keys/{name}/create", {"kty": "EC"}).status_code == 200
    assert vault.request("GET", f"/keys/{name}/").status_code == 200


@pytest.mark.parametrize(
    "version",
    [
        "0" * 31,
        "0" * 33,
        "g" * 32,
        "A" * 32,
        "latest",
        "0" * 32 + "%0a",
        "-1",
        "*",
        "0" * 30 + "--",
    ],
)
def test_a_version_is_32_hexadecimal_digits(vault: Running, version: str) -> None:
    """400; one that does not exist is 404."""
    assert vault.request("GET", f"/keys/ec/{version}").status_code == 400
    assert vault.request("GET", "/keys/ec/" + "0" * 32).status_code == 404


def raw(running: Running, target: bytes, method: bytes = b"GET") -> int:
    """Send a request target as it is; return the status."""
    parts = urlsplit(running.url)
    assert parts.hostname is not None
    context = ssl.create_default_context(cafile=running.ca)
    with (
        socket.create_connection((parts.hostname, parts.port or 0), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=parts.hostname) as tls,
    ):
        tls.sendall(
            method
            + b" "
            + target
            + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer admin\r\nConnection: close\r\n\r\n"
        )
        return int(tls.recv(64).split(b" ")[1])


@pytest.mark.parametrize(
    "path",
    [
        b"/keys/../keys/ec",
        b"/keys/./ec",
        b"/keys/%2e%2e/keys/ec",
        b"/keys/%2E/ec",
        b"/keys/ec%2f",
        b"/keys%2Fec",
        b"/keys/ec%5c..",
        b"/keys\\ec",
        b"/keys/ec%00",
        b"/keys/%65c",
        b"/keys/e\xc3\xa7",
        b"/keys/" + b"a" * 3000,
        b"//keys/ec",
        b"/keys//ec",
        b"/keys/ec//",
        b"/keys/ec/" + b"0" * 32 + b"/",
        b"/KEYS/ec",
        b"/Keys/ec",
        b"/keys/ec;x=1",
        b"/keys/ec/versions/",
        b"/keys//versions",
        b"/keys///create",
        b"/deletedkeys//",
    ],
)
def test_a_path_in_another_than_its_canonical_form_reaches_no_key(
    vault: Running, path: bytes
) -> None:
    """SKR-11: dot segments, escapes, backslashes, doubled slashes, other cases."""
    assert raw(vault, path + b"?api-version=7.4") in (400, 404, 405, 414)


def test_the_plain_path_reaches_the_key(vault: Running) -> None:
    """What the cases above differ from."""
    assert raw(vault, b"/keys/ec?api-version=7.4") == 200
    assert raw(vault, b"/keys/ec/?api-version=7.4") == 200


@pytest.mark.parametrize("version", ["", "7.2", "7.0", "2016-10-01", "7.4 ", "9.9", "7.4%00"])
def test_older_and_unknown_versions_of_the_interface_are_told_apart(
    vault: Running, version: str
) -> None:
    """400, with what there is in the service's log and an inner code for clients."""
    answer = vault.request("GET", f"/keys/ec?api-version={version}")
    assert answer.status_code == 400


def test_a_version_of_the_interface_is_needed(vault: Running) -> None:
    """400 UnsupportedApiVersion."""
    answer = vault.http.get("/keys/ec", headers={"authorization": "Bearer admin"})
    assert answer.status_code == 400
    assert answer.json()["error"]["innererror"]["code"] == "UnsupportedApiVersion"


WRONG_OPERATIONS: list[tuple[str, str, dict[str, Any], str]] = [
    ("ec", "sign", {}, "alg"),
    ("ec", "sign", {"alg": "ES256"}, "value"),
    ("ec", "sign", {"alg": 5, "value": b64(b"a" * 32)}, "alg"),
    ("ec", "sign", {"alg": "ES256", "value": "="}, "value"),
    ("ec", "sign", {"alg": "ES256", "value": b64(b"a" * 31)}, "value"),
    ("ec", "sign", {"alg": "ES256", "value": b64(b"a" * 33)}, "value"),
    ("ec", "sign", {"alg": "ES384", "value": b64(b"a" * 48)}, "ES384"),
    ("ec", "sign", {"alg": "RS256", "value": b64(b"a" * 32)}, "RS256"),
    ("ec", "sign", {"alg": "RSNULL", "value": b64(b"a" * 32)}, "alg"),
    ("ec", "sign", {"alg": "none", "value": b64(b"a" * 32)}, "alg"),
    ("ec", "verify", {"alg": "ES256", "digest": b64(b"a" * 32)}, "value"),
    ("ec", "verify", {"alg": "ES256", "value": b64(b"a" * 64)}, "digest"),
    ("ec", "verify", {"alg": "ES256", "digest": "aa", "value": b64(b"a" * 64)}, "digest"),
    ("aes", "encrypt", {"alg": "A256GCM", "value": "YQ"}, "A256GCM"),
    ("aes", "encrypt", {"alg": "A128GCM", "value": "YQ", "iv": b64(b"a" * 12)}, "iv"),
    ("aes", "encrypt", {"alg": "A128GCM", "value": b64(b"a" * 33000)}, "value"),
    ("aes", "encrypt", {"alg": "A128CBC", "value": b64(b"a" * 15), "iv": b64(b"a" * 16)}, "value"),
    ("aes", "encrypt", {"alg": "A128CBC", "value": b64(b"a" * 16), "iv": b64(b"a" * 12)}, "iv"),
    ("aes", "encrypt", {"alg": "A128CBC", "value": b64(b"a" * 16), "aad": "YQ"}, "aad"),
    ("aes", "decrypt", {"alg": "A128GCM", "value": "YQ"}, "iv"),
    ("aes", "decrypt", {"alg": "A128GCM", "value": "YQ", "iv": b64(b"a" * 12)}, "tag"),
    ("aes", "decrypt", {"alg": "A128CBC", "value": b64(b"a" * 16)}, "iv"),
    ("aes", "wrapkey", {"alg": "A128KW", "value": b64(b"a" * 15)}, "length"),
    ("aes", "wrapkey", {"alg": "A256KW", "value": b64(b"a" * 16)}, "A256KW"),
    ("aes", "wrapkey", {"alg": "A128KW", "value": b64(b"a" * 16), "iv": "YQ"}, "iv"),
    ("aes", "encrypt", {"alg": "RSA-OAEP-256", "value": "YQ"}, "RSA-OAEP-256"),
    ("aes", "encrypt", {"alg": "RSA-OAEP", "value": "YQ"}, "switched off"),
    ("aes", "encrypt", {"alg": "RSA1_5", "value": "YQ"}, "switched off"),
]


@pytest.mark.parametrize(("name", "operation", "body", "part"), WRONG_OPERATIONS)
def test_a_wrong_operation_names_what_is_wrong(
    vault: Running, name: str, operation: str, body: dict[str, Any], part: str
) -> None:
    """400, and never a 500."""
    refused(vault, "POST", f"/keys/{name}//{operation}", body, part)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({}, "key"),
        ({"key": 5}, "key"),
        ({"key": {"kty": "EC"}}, "crv"),
        ({"key": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}}, "key.d"),
        ({"key": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "d": "AQ"}}, ""),
        ({"key": {"kty": "oct", "k": b64(b"a" * 15)}}, "key.k"),
        ({"key": {"kty": "oct"}}, "key.k"),
        ({"key": {"kty": "RSA", "n": b64(b"\xff" * 128), "e": "AQAB"}}, "key.n"),
        ({"key": {"kty": "RSA", "n": b64(b"\xff" * 256), "e": "Aw"}}, "key.e"),
        ({"key": {"kty": "RSA", "n": b64(b"\xff" * 256), "e": "AQAB"}}, "key.d"),
        ({"key": {"kty": "RSA-HSM", "key_hsm": "AAAA"}}, "key_hsm"),
        ({"key": {"kty": "oct-HSM", "k": b64(b"a" * 16)}, "Hsm": False}, "Hsm"),
        ({"key": {"kty": "oct", "k": b64(b"a" * 16)}, "Hsm": "yes"}, "Hsm"),
        ({"key": {"kty": "oct", "k": b64(b"a" * 16)}, "Hsm": True, "hsm": False}, "Hsm"),
    ],
)
def test_a_wrong_import_names_what_is_wrong(
    vault: Running, body: dict[str, Any], part: str
) -> None:
    """A key that is no key is not kept."""
    refused(vault, "PUT", "/keys/wrong", body, part)
    assert vault.request("GET", "/keys/wrong").status_code == 404


def test_a_key_that_the_backend_does_not_take_is_a_row_of_the_audit_log(vault: Running) -> None:
    """Rights were there, the key was none: failed, with the reference that the caller has."""
    key = {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "d": "AQ"}
    answer = vault.request("PUT", "/keys/wrong", {"key": key})
    row = vault.rows()[-1]
    assert (row["action"], row["decision"]) == ("keys/import", "failed")
    assert row["reference"] == answer.json()["error"]["reference"]


@pytest.mark.parametrize(
    "query",
    [
        "maxresults=0",
        "maxresults=26",
        "maxresults=-1",
        "maxresults=x",
        "maxresults=1e1",
        "maxresults=99999999999999999999",
        "$skiptoken=",
        "$skiptoken=AAAA",
        "$skiptoken=" + "A" * 1000,
        "maxresults=1&maxresults=2",
    ],
)
def test_a_wrong_page_is_refused(vault: Running, query: str) -> None:
    """Of keys, versions and deleted keys."""
    for path in ("/keys", "/keys/ec/versions", "/deletedkeys"):
        assert vault.request("GET", f"{path}?{query}").status_code == 400


def test_a_page_token_is_of_use_to_its_caller_in_its_list_only(vault: Running) -> None:
    """And a changed one to nobody."""
    vault.rights.granted.add(("reader", "Microsoft.KeyVault/vaults/keys/read", "/"))
    link = vault.request("GET", "/keys?maxresults=1").json()["nextLink"]
    token = link.split("$skiptoken=")[1].split("&")[0]
    assert vault.request("GET", f"/keys?$skiptoken={token}").status_code == 200
    other = vault.request("GET", f"/keys?$skiptoken={token}", who="reader")
    assert other.status_code == 400
    assert vault.request("GET", f"/deletedkeys?$skiptoken={token}").status_code == 400
    at = len(token) // 2
    changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
    assert vault.request("GET", f"/keys?$skiptoken={changed}").status_code == 400


@pytest.mark.parametrize("count", [0, 129, -1, "8", 1.5, None, True])
def test_random_bytes_are_1_to_128(vault: Running, count: Any) -> None:
    """And of an integer."""
    refused(vault, "POST", "/rng", {"count": count}, "count")


def test_one_without_rights_is_told_the_same_of_every_name(vault: Running) -> None:
    """SKR-14: of a key that there is, of one that there is not, and of a deleted one."""
    vault.request("POST", "/keys/gone/create", {"kty": "EC"})
    vault.request("DELETE", "/keys/gone")
    said = set()
    for name in ("ec", "nothing", "gone"):
        for method, path, body in (
            ("GET", f"/keys/{name}", None),
            ("GET", f"/deletedkeys/{name}", None),
            ("POST", f"/keys/{name}//sign", {"alg": "ES256", "value": b64(b"a" * 32)}),
            ("POST", f"/keys/{name}//release", {"target": "a"}),
            ("POST", f"/keys/{name}/create", {"kty": "EC"}),
            ("DELETE", f"/keys/{name}", None),
            ("POST", f"/keys/{name}/backup", None),
        ):
            answer = vault.request(method, path, body, who="stranger")
            assert answer.status_code == 403
            error = answer.json()["error"]
            said.add((error["code"], error["innererror"]["code"], error["message"].split("(")[0]))
    assert len(said) == 1


def test_a_refused_caller_gets_the_reference_of_a_row_of_the_audit_log(vault: Running) -> None:
    """The auditor finds there what was missing."""
    answer = vault.request("GET", "/keys/ec", who="stranger").json()
    row = next(row for row in vault.rows() if row["reference"] == answer["error"]["reference"])
    assert (row["decision"], row["caller"], row["resource"]) == (
        "refused",
        "tenant/stranger",
        "/keys/ec",
    )
    assert row["expected"] == "Microsoft.KeyVault/vaults/keys/read"


def test_nobody_without_a_token_is_let_in(vault: Running) -> None:
    """SKR-15: 401 with a challenge before anything is looked at."""
    for path in ("/keys", "/keys/ec", "/deletedkeys", "/keys/nothing"):
        answer = vault.http.get(path + "?api-version=7.4")
        assert answer.status_code == 401
        assert "resource=" in answer.headers["www-authenticate"]


def test_a_damaged_or_moved_row_is_refused(tmp_path: Path) -> None:
    """Whoever writes to the database cannot swap keys, switch one on or change its operations."""
    import sqlite3

    with running_vault(tmp_path) as running:
        for name in ("one", "two"):
            assert running.request("POST", f"/keys/{name}/create", {"kty": "EC"}).status_code == 200
        rows = [
            "UPDATE vault_versions SET public = (SELECT public FROM vault_versions"
            " WHERE name = 'two') WHERE name = 'one'",
            "UPDATE vault_versions SET key_ops = '[\"sign\", \"encrypt\"]' WHERE name = 'one'",
            "UPDATE vault_versions SET enabled = 0 WHERE name = 'one'",
            "UPDATE vault_versions SET expires = 4000000000 WHERE name = 'one'",
            "UPDATE vault_versions SET name = 'three' WHERE name = 'two'",
        ]
        for change in rows:
            database = sqlite3.connect(tmp_path / "vault.db", timeout=10)
            kept = database.execute("SELECT * FROM vault_versions ORDER BY sequence").fetchall()
            heads = database.execute("SELECT * FROM vault_keys").fetchall()
            database.execute(change)
            if "three" in change:
                database.execute("UPDATE vault_keys SET name = 'three' WHERE name = 'two'")
            database.execute("UPDATE audit_head SET generation = generation + 1")
            database.commit()
            answer = running.request("GET", "/keys/three" if "three" in change else "/keys/one")
            assert answer.status_code == 500
            assert running.rows()[-1]["condition"] == "the stored row is as it was written"
            database.execute("DELETE FROM vault_versions")
            database.execute("DELETE FROM vault_keys")
            marks = ",".join("?" * len(kept[0]))
            database.executemany(f"INSERT INTO vault_versions VALUES ({marks})", kept)
            marks = ",".join("?" * len(heads[0]))
            database.executemany(f"INSERT INTO vault_keys VALUES ({marks})", heads)
            database.execute("UPDATE audit_head SET generation = generation + 1")
            database.commit()
            database.close()
        assert running.request("GET", "/keys/one").status_code == 200
