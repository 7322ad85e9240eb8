"""The clients of vaults and attestation services, against a server that is seldom kind."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from https_double import Asked, Authority, Reply, Server

from pyenclave import _https
from pyenclave.errors import RemoteServiceError
from pyenclave.formats import jwk
from pyenclave.vault_client import (
    AttestationClient,
    Challenge,
    StaticToken,
    TokenFile,
    VaultClient,
    VaultKey,
    split_key_url,
)

CHALLENGE = (
    'Bearer authorization="https://login.microsoftonline.com/11111111-2222-3333-4444-555555555555",'
    ' resource="https://vault.azure.net"'
)
VERSION = "0123456789abcdef0123456789abcdef"
PUBLIC = jwk.public_members(ec.generate_private_key(ec.SECP256R1()).public_key())


def client(server: Server, authority: Authority, credential: object = "t0ken", **more: object):  # type: ignore[no-untyped-def]
    options: dict[str, object] = {"verify_challenge_resource": False, "timeout": 5.0, "attempts": 2}
    one = VaultClient(server.url, credential, ca=authority.pem, **(options | more))  # type: ignore[arg-type]
    _clients.append(one)
    return one


_clients: list[VaultClient] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _clients:
        _clients.pop().close()


def bundle(name: str = "data", **more: object) -> dict[str, object]:
    kid = f"https://v.vault.azure.net/keys/{name}/{VERSION}"
    key = {**PUBLIC, "kid": kid, "kty": "EC-HSM", "key_ops": ["sign"]}
    return {"key": key, "attributes": {"enabled": True}, **more}


def vault(asked: Asked) -> Reply:
    """A vault with one key."""
    if "authorization" not in asked.headers:
        return Reply(status=401, headers={"WWW-Authenticate": CHALLENGE})
    if asked.path.startswith("/keys/data"):
        return Reply(bundle())
    body = {"error": {"code": "KeyNotFound", "message": "no such key"}}
    return Reply(body, status=404, headers={"x-ms-request-id": "r-17"})


class Counting:
    """A credential as azure-identity has them."""

    def __init__(self, lifetime: float = 3600) -> None:
        self.scopes: list[str] = []
        self.lifetime = lifetime

    def get_token(self, *scopes: str):  # type: ignore[no-untyped-def]
        self.scopes += scopes
        return type(
            "T", (), {"token": f"t{len(self.scopes)}", "expires_on": time.time() + self.lifetime}
        )


# -- the challenge ----------------------------------------------------------------------------


def test_a_first_request_says_nothing_before_the_service_said_what_tokens_it_takes(
    server: Server, authority: Authority
) -> None:
    server.answer = lambda asked: vault(asked) if not asked.body else Reply(bundle())
    credential = Counting()
    with client(server, authority, credential) as one:
        one.create_key("data", tags={"secret": "no"})
        one.get_key("data")
    assert [(len(a.body) > 0, a.headers.get("authorization")) for a in server.asked] == [
        (False, None),
        (True, "Bearer t1"),
        (False, "Bearer t1"),
    ]
    assert credential.scopes == ["https://vault.azure.net/.default"]


@pytest.mark.parametrize(
    ("host", "resource", "fits"),
    [
        ("v.vault.azure.net", "https://vault.azure.net", True),
        ("V.Vault.Azure.Net", "https://vault.azure.net", True),
        ("h.managedhsm.azure.net", "https://managedhsm.azure.net", True),
        ("evilvault.azure.net", "https://vault.azure.net", False),
        ("vault.azure.net.evil.example", "https://vault.azure.net", False),
        ("evil.example", "https://vault.azure.net", False),
        ("evil.example", "https://management.azure.com", False),
        ("v.vault.azure.net", "vault.azure.net", False),
        ("v.vault.azure.net", "https://", False),
    ],
)
def test_a_token_is_asked_only_for_a_domain_that_the_service_lies_in(
    host: str, resource: str, fits: bool
) -> None:
    header = f'Bearer authorization="https://login.example/t", resource="{resource}"'
    if fits:
        assert Challenge.read(header, host).scope == f"{resource}/.default"
    else:
        with pytest.raises(RemoteServiceError, match=r"domain that it does not lie in|no resource"):
            Challenge.read(header, host)


@pytest.mark.parametrize(
    ("resource", "scope"),
    [
        ("https://vault.azure.net", "https://management.azure.com/.default"),
        ("https://management.azure.com", "https://vault.azure.net/.default"),
        ("https://evil.vault.azure.net", "https://vault.azure.net/.default"),
        ("", "https://management.azure.com/.default"),
        ("", "https://vault.azure.net/.default https://management.azure.com/.default"),
        ("", "https://net/.default"),
        ("", "https://t.vault.azure.net/.default"),
        ("", "http://vault.azure.net/.default"),
        ("", "https://vault.azure.net@management.azure.com/.default"),
        ("", "https://management.azure.com@vault.azure.net/.default"),
        ("", "https://vault.azure.net:443/.default"),
        ("", "https://management.azure.com\\@vault.azure.net/.default"),
        ("", "https://management.azure.com%2f.vault.azure.net/.default"),
        ("", "https://.net/.default"),
        ("", "api://0000/.default"),
        ("https://", "https://vault.azure.net/.default"),
    ],
)
def test_no_scope_of_another_service_is_drawn_by_a_challenge(resource: str, scope: str) -> None:
    """What is judged is what the credential is asked for, also beside a resource that fits."""
    named = f'resource="{resource}", ' if resource else ""
    for header in (
        f'Bearer {named}scope="{scope}"',
        f'Bearer scope="{scope}",{named}authorization="x"',
    ):
        with pytest.raises(RemoteServiceError) as caught:
            Challenge.read(header, "evil.vault.azure.net")
        assert caught.value.error_code == "BadChallenge"


def test_resource_and_scope_of_one_domain_are_read_and_an_address_has_none() -> None:
    found = Challenge.read(
        'Bearer resource="https://VAULT.azure.net", scope="https://vault.azure.net//.default"',
        "v.vault.azure.net",
    )
    assert found.scope == "https://vault.azure.net//.default"
    exact = Challenge.read('Bearer resource="https://127.0.0.1"', "127.0.0.1")
    assert exact.scope == "https://127.0.0.1/.default"
    with pytest.raises(RemoteServiceError):
        Challenge.read('Bearer resource="https://0.1"', "127.0.0.1")


def test_a_vault_of_another_domain_gets_no_token(server: Server, authority: Authority) -> None:
    server.answer = vault
    credential = Counting()
    one = client(server, authority, credential, verify_challenge_resource=True)
    with pytest.raises(RemoteServiceError, match="does not lie in") as caught:
        one.get_key("data")
    assert caught.value.error_code == "BadChallenge"
    assert credential.scopes == []
    assert all("authorization" not in asked.headers for asked in server.asked)


@pytest.mark.parametrize(
    "header",
    ["", "Basic realm=x", "Bearer", 'Bearer authorization="https://l/t"', "Negotiate abc", "\x01"],
)
def test_what_is_no_bearer_challenge_is_refused(header: str) -> None:
    with pytest.raises(RemoteServiceError):
        Challenge.read(header, "v.vault.azure.net")


def test_a_challenge_may_name_authorization_uri_and_scope() -> None:
    header = "Bearer authorization_uri=https://l.example/t scope=https://vault.azure.net/.default"
    found = Challenge.read(header, "v.vault.azure.net")
    assert found == Challenge("https://l.example/t", "https://vault.azure.net/.default")


def test_a_token_that_is_refused_is_renewed_once(server: Server, authority: Authority) -> None:
    def answer(asked: Asked) -> Reply:
        if asked.headers.get("authorization") in (None, "Bearer t1"):
            return Reply(status=401, headers={"WWW-Authenticate": CHALLENGE})
        return vault(asked)

    server.answer = answer
    credential = Counting()
    assert client(server, authority, credential).get_key("data").name == "data"
    assert len(credential.scopes) == 2
    server.answer = lambda _: Reply(status=401, headers={"WWW-Authenticate": CHALLENGE})
    with pytest.raises(RemoteServiceError) as caught:
        client(server, authority, Counting()).get_key("data")
    assert caught.value.status == 401


def test_a_token_is_renewed_before_it_ends(server: Server, authority: Authority) -> None:
    server.answer = vault
    credential = Counting(lifetime=30)
    one = client(server, authority, credential)
    one.get_key("data")
    one.get_key("data")
    assert len(credential.scopes) == 2


@pytest.mark.parametrize("token", ["", "a b", "a\r\nX: y", "ä", "x" * 70_000])
def test_what_cannot_be_a_token_never_becomes_a_header(
    token: str, server: Server, authority: Authority
) -> None:
    with pytest.raises(ValueError, match="bearer token"):
        StaticToken(token)
    server.answer = vault
    bad = type(
        "C", (), {"get_token": lambda *_: type("T", (), {"token": token, "expires_on": 9e9})}
    )
    with pytest.raises(TypeError, match="the credential gave no token"):
        client(server, authority, bad()).get_key("data")


def test_a_file_of_a_token_is_read_anew(tmp_path, server: Server, authority: Authority) -> None:  # type: ignore[no-untyped-def]
    server.answer = vault
    path = tmp_path / "token"
    path.write_text("first\n")
    credential = TokenFile(path)
    client(server, authority, credential).get_key("data")
    path.write_text("second\n")
    client(server, authority, credential).get_key("data")
    seen = [asked.headers.get("authorization") for asked in server.asked]
    assert seen == [None, "Bearer first", None, "Bearer second"]
    assert "second" not in repr(credential)


# -- hostile and broken servers ---------------------------------------------------------------


def test_a_server_of_another_authority_gets_nothing(server: Server) -> None:
    server.answer = vault
    other = Authority("Another")
    with pytest.raises(RemoteServiceError, match="certificate is refused") as caught:
        client(server, other).get_key("data")
    assert not caught.value.transient
    assert server.asked == []


def test_a_certificate_of_another_name_is_refused(authority: Authority) -> None:
    server = Server(authority, vault, names=("vault.example",))
    try:
        with pytest.raises(RemoteServiceError, match="certificate is refused"):
            client(server, authority).get_key("data")
    finally:
        server.close()
    assert server.asked == []


def test_a_common_name_is_no_name_of_a_server() -> None:
    """OpenSSL would take it where a certificate names no host otherwise, as a person's does."""
    assert not _https._context(None).hostname_checks_common_name


def test_a_redirect_is_not_followed(server: Server, authority: Authority) -> None:
    server.answer = lambda _: Reply(status=307, headers={"Location": "https://evil.example/"})
    with pytest.raises(RemoteServiceError, match=r"redirect.*evil\.example"):
        client(server, authority).get_key("data")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"x" * 300_000),
        Reply(b"{}", length=1 << 40),
        Reply(b'{"key"'),
        Reply(b"[]"),
        Reply(b'{"key": {}, "key": {}}'),
        Reply(b"\xff\xfe"),
        Reply(b"{}", headers={"Content-Encoding": "gzip"}),
        Reply({"key": {"kid": "https://v/keys/a", "kty": "RSA", "d": "AQ"}}),
        Reply({"key": {"kid": "nonsense", "kty": "RSA"}}),
        Reply({"key": []}),
    ],
    ids=lambda reply: repr(reply.raw()[:20]),
)
def test_an_answer_that_is_none_is_refused(
    reply: Reply, server: Server, authority: Authority
) -> None:
    server.answer = lambda _: reply
    with pytest.raises(RemoteServiceError) as caught:
        client(server, authority, None).get_key("data")
    assert caught.value.error_code == "BadAnswer"
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [Reply(b"{}", drip=0.05, length=2000), Reply(silent=True)],
    ids=["a byte now and then", "silence"],
)
def test_the_whole_time_is_capped(reply: Reply, server: Server, authority: Authority) -> None:
    reply.body = b" " * 2000 if reply.drip else b""
    server.answer = lambda _: reply
    begin = time.monotonic()
    with pytest.raises(RemoteServiceError, match="before the deadline") as caught:
        client(server, authority, None, timeout=0.4).get_key("data")
    assert time.monotonic() - begin < 20
    assert caught.value.status == 0
    assert caught.value.transient


def test_a_cut_answer_is_asked_for_again(server: Server, authority: Authority) -> None:
    replies = [Reply(b"{", length=50), Reply(bundle())]
    server.answer = lambda _: replies.pop(0)
    assert client(server, authority, None).get_key("data").kty == "EC-HSM"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_or_broken_service_is_asked_again(
    status: int, server: Server, authority: Authority
) -> None:
    replies = [Reply(status=status, headers={"Retry-After": "0"}), Reply(bundle())]
    server.answer = lambda _: replies.pop(0)
    assert client(server, authority, None).get_key("data").version == VERSION
    server.answer = lambda _: Reply(status=status)
    with pytest.raises(RemoteServiceError) as caught:
        client(server, authority, None).get_key("data")
    assert caught.value.status == status
    assert caught.value.transient
    assert len(server.asked) == 4


def test_a_longer_wait_than_there_is_time_is_not_begun(
    server: Server, authority: Authority
) -> None:
    server.answer = lambda _: Reply(status=429, headers={"Retry-After": "100"})
    begin = time.monotonic()
    with pytest.raises(RemoteServiceError) as caught:
        client(server, authority, None).get_key("data")
    assert caught.value.retry_after == 100
    assert time.monotonic() - begin < 20
    assert len(server.asked) == 1


def test_a_closed_port_is_an_error_with_a_name(authority: Authority) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # its own as long as it lasts, though it does not listen
        one = VaultClient(f"https://127.0.0.1:{port}", None, ca=authority.pem, attempts=1)
        with pytest.raises(RemoteServiceError, match="gave no answer"):
            one.get_key("data")


def test_a_refusal_carries_the_services_words(server: Server, authority: Authority) -> None:
    inner = {"code": "ForbiddenByPolicy", "reference": "a-42"}
    body = {"error": {"code": "Forbidden", "message": "no\x1b[31m", "innererror": inner}}
    server.answer = lambda _: Reply(body, status=403, headers={"x-ms-request-id": "r-1"})
    with pytest.raises(RemoteServiceError) as caught:
        client(server, authority, None).release("data", "a.b.c")
    error = caught.value
    assert (error.status, error.error_code, error.inner) == (403, "Forbidden", "ForbiddenByPolicy")
    assert error.reference == "a-42"
    assert not error.transient
    assert "\x1b" not in str(error)
    server.answer = lambda _: Reply(b"<html>", status=404, headers={"x-ms-request-id": "r-2"})
    with pytest.raises(RemoteServiceError) as caught:
        client(server, authority, None).get_key("data")
    assert (caught.value.error_code, caught.value.reference) == ("Unknown", "r-2")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1",
        "https://",
        "https://u:p@v.example",
        "https://v.example?x=1",
        "https://v.example#x",
        "https://v .example",
        "https://v.example:99999",
        "ftp://v.example",
        "https://v\\.example",
    ],
)
def test_an_address_that_is_no_https_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected https|not an address"):
        VaultClient(url, None)


@pytest.mark.parametrize("name", ["", "../certs", "a/b", "a%2fb", "a?b", "x" * 128, "ä", "a b"])
def test_a_name_that_is_no_keys_name_is_never_sent(
    name: str, server: Server, authority: Authority
) -> None:
    one = client(server, authority, None)
    with pytest.raises(ValueError, match="name of a key"):
        one.get_key(name)
    with pytest.raises(ValueError, match="version of a key"):
        one.get_key("data", "../" + name)
    assert server.asked == []


def test_no_proxy_is_taken_from_the_environment(
    server: Server, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.answer = lambda _: Reply(bundle())
    assert client(server, authority, None).get_key("data").name == "data"


def test_a_proxy_is_used_where_it_is_asked_for(server: Server, authority: Authority) -> None:
    server.answer = lambda _: Reply(bundle())
    seen: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def run() -> None:
        end, _ = listener.accept()
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += end.recv(1)
        seen.append(head.split(b"\r\n")[0])
        end.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        far = socket.create_connection(("127.0.0.1", server.port))
        other = threading.Thread(target=copy, args=(far, end), daemon=True)
        other.start()
        copy(end, far)
        other.join(5)
        for one in (end, far):
            one.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with client(server, authority, None, proxy=proxy) as one:
        assert one.get_key("data").name == "data"
    thread.join(5)
    listener.close()
    assert seen[0].startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.".encode())


# -- what is asked ----------------------------------------------------------------------------


def test_connections_are_kept(server: Server, authority: Authority) -> None:
    server.answer = vault
    with client(server, authority) as one:
        for _ in range(5):
            one.get_key("data", VERSION)
    assert server.connections == 1
    assert {asked.path for asked in server.asked} == {f"/keys/data/{VERSION}"}
    assert {asked.query for asked in server.asked} == {"api-version=7.4"}


def test_a_key_is_made_with_its_policy(server: Server, authority: Authority) -> None:
    policy = b'{"version":"1.0.0","anyOf":[]}'
    coded = base64.urlsafe_b64encode(policy).decode().rstrip("=")
    answer = {"contentType": "application/json; charset=utf-8", "data": coded, "immutable": True}
    server.answer = lambda _: Reply(bundle(release_policy=answer, tags={"a": "b"}))
    key = client(server, authority, None).create_key(
        "data", size=3072, operations=["wrapKey"], release_policy=policy, immutable=True
    )
    assert server.asked[0].path == "/keys/data/create"
    assert server.asked[0].json() == {
        "kty": "RSA-HSM",
        "key_size": 3072,
        "key_ops": ["wrapKey"],
        "attributes": {"enabled": True, "exportable": True},
        "release_policy": answer,
    }
    assert (key.release_policy, key.immutable, key.tags) == (policy, True, {"a": "b"})
    assert isinstance(key.public_key(), ec.EllipticCurvePublicKey)


def test_a_hardware_key_of_azures_is_read_with_its_leading_zero(
    server: Server, authority: Authority
) -> None:
    """Azure writes the exponent of an RSA-HSM key as 00 01 00 01."""
    public = rsa.generate_private_key(65537, 2048).public_key()
    kid = f"https://v.vault.azure.net/keys/data/{VERSION}"
    members = {**jwk.public_members(public), "kid": kid, "kty": "RSA-HSM", "e": "AAEAAQ"}
    server.answer = lambda _: Reply(bundle(key=members))
    assert client(server, authority, None).get_key("data").public_key() == public
    server.answer = lambda _: Reply(bundle(key={**members, "n": "!"}))
    with pytest.raises(RemoteServiceError):
        client(server, authority, None).get_key("data").public_key()


def test_a_key_is_imported(server: Server, authority: Authority) -> None:
    server.answer = lambda _: Reply(bundle())
    client(server, authority, None).import_key("data", {"kty": "oct", "k": "AA"}, expires=5)
    assert (server.asked[0].method, server.asked[0].path) == ("PUT", "/keys/data")
    assert server.asked[0].json() == {
        "key": {"kty": "oct", "k": "AA"},
        "hsm": True,
        "attributes": {"enabled": True, "exp": 5},
    }


def test_creating_is_not_repeated_when_nobody_knows_whether_it_was_done(
    server: Server, authority: Authority
) -> None:
    server.answer = lambda _: Reply(b"{", length=50)
    with pytest.raises(RemoteServiceError):
        client(server, authority, None).create_key("data")
    assert len(server.asked) == 1


def test_wrapping_and_releasing_say_what_they_want(server: Server, authority: Authority) -> None:
    def answer(asked: Asked) -> Reply:
        if asked.path.endswith("/release"):
            return Reply({"value": "x.y.z"})
        return Reply({"kid": bundle()["key"]["kid"], "value": "AQI"})  # type: ignore[index]

    server.answer = answer
    one = client(server, authority, None)
    assert one.wrap_key("data", "RSA-OAEP-256", b"key") == (
        f"https://v.vault.azure.net/keys/data/{VERSION}",
        b"\1\2",
    )
    assert one.unwrap_key("data", "RSA-OAEP-256", b"w", version=VERSION) == b"\1\2"
    assert one.release("data", "a.b.c", nonce="n", enc="RSA_AES_KEY_WRAP_256") == "x.y.z"
    assert one.release("data", "a.b.c", version=VERSION) == "x.y.z"
    assert [asked.path for asked in server.asked] == [
        "/keys/data//wrapkey",
        f"/keys/data/{VERSION}/unwrapkey",
        "/keys/data//release",
        f"/keys/data/{VERSION}/release",
    ]
    assert server.asked[2].json() == {
        "target": "a.b.c",
        "nonce": "n",
        "enc": "RSA_AES_KEY_WRAP_256",
    }
    with pytest.raises(ValueError, match="enc"):
        one.release("data", "a.b.c", enc="RSA1_5")


@pytest.mark.parametrize(
    ("kind", "member"),
    [
        ("PyEnclave", "evidence"),
        ("SgxEnclave", "quote"),
        ("TdxVm", "quote"),
        ("SevSnpVm", "report"),
        ("OpenEnclave", "report"),
    ],
)
def test_each_kind_of_evidence_is_sent_under_its_name(
    kind: str, member: str, server: Server, authority: Authority
) -> None:
    server.answer = lambda _: Reply({"token": "t.t.t"})
    with AttestationClient(server.url, ca=authority.pem) as one:
        assert one.attest(kind, b"\xff\xfe", runtime_data=b"{}", nonce="n") == "t.t.t"
    assert server.asked[0].path == f"/attest/{kind}"
    assert server.asked[0].query == "api-version=2022-08-01"
    assert server.asked[0].json() == {
        member: "__4",
        "runtimeData": {"data": "e30", "dataType": "JSON"},
        "nonce": "n",
    }


def test_an_unknown_kind_of_evidence_is_not_sent(server: Server, authority: Authority) -> None:
    with pytest.raises(ValueError, match="kind of evidence"):
        AttestationClient(server.url, ca=authority.pem).attest("../policies", b"")
    assert server.asked == []


def test_the_identifier_of_a_key_is_taken_apart() -> None:
    url = "https://v.vault.azure.net/keys/data"
    assert split_key_url(url) == ("https://v.vault.azure.net", "data", "")
    assert split_key_url(f"{url}/{VERSION}") == ("https://v.vault.azure.net", "data", VERSION)
    for bad in ("", "keys/data", url + "/a/b", url + "/..", "https://v/secrets/x", "/keys/x"):
        with pytest.raises(ValueError, match="expected https"):
            split_key_url(bad)


def test_neither_client_nor_key_shows_a_token() -> None:
    one = VaultClient("https://v.vault.azure.net/", "very-secret")
    assert repr(one) == "VaultClient('https://v.vault.azure.net')"
    assert "very-secret" not in repr(vars(one))
    assert "members" not in repr(VaultKey.from_json(bundle()))
