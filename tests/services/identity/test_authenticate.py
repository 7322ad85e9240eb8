"""Bearer tokens with one fault each (catalogue JWT-01 … JWT-16, the list of spec 11), and keys."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from pyenclave.errors import CollateralError, ServiceError
from pyenclave.formats.jwk import public_members
from pyenclave.services.identity.authenticate import Authenticator
from pyenclave.services.identity.reasons import REASONS
from pyenclave.services.identity.trust import Challenge, TrustedIssuer, entra

TENANT: Final = "11111111-2222-3333-4444-555555555555"
OTHER_TENANT: Final = "99999999-2222-3333-4444-555555555555"
V2: Final = f"https://login.microsoftonline.com/{TENANT}/v2.0"
V1: Final = f"https://sts.windows.net/{TENANT}/"
AUDIENCE: Final = "https://vault.azure.net"
NOW: Final = 1_800_000_000
KEY: Final = rsa.generate_private_key(65537, 2048)
SECOND: Final = rsa.generate_private_key(65537, 2048)
SMALL: Final = rsa.generate_private_key(65537, 1024)
CURVE: Final = ec.generate_private_key(ec.SECP256R1())
CHALLENGE: Final = Challenge(f"https://login.microsoftonline.com/{TENANT}", AUDIENCE)


def b64(data: bytes | str | dict[str, Any]) -> str:
    if isinstance(data, dict):
        data = json.dumps(data)
    if isinstance(data, str):
        data = data.encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < 2048:
        numbers = key.public_key().public_numbers()
        members = {"kty": "RSA", "n": b64(numbers.n.to_bytes(128, "big")), "e": "AQAB"}
    else:
        members = public_members(key.public_key())
    return {**members, "kid": kid, "use": "sig", **more}


KEYS: Final = [
    jwk(KEY, "k1", alg="RS256"),
    jwk(SECOND, "k2"),
    jwk(SECOND, "for-encryption", use="enc"),
    jwk(SECOND, "no-verify", key_ops=["sign"]),
    jwk(SECOND, "other-alg", alg="PS256"),
    jwk(SMALL, "small"),
    jwk(CURVE, "curve"),
]


def claims(**changes: Any) -> dict[str, Any]:
    """A good token of version 2.0; a change to None removes."""
    good = {
        "iss": V2,
        "aud": AUDIENCE,
        "iat": NOW - 10,
        "nbf": NOW - 10,
        "exp": NOW + 3600,
        "tid": TENANT,
        "oid": "00000000-0000-0000-0000-00000000abcd",
        "sub": "pairwise",
        "azp": "client-1",
        "idtyp": "app",
        "ver": "2.0",
    }
    good.update(changes)
    return {name: value for name, value in good.items() if value is not None}


def sign(
    header: dict[str, Any], payload: dict[str, Any] | str, key: rsa.RSAPrivateKey = KEY
) -> str:
    """Sign with RS256 whatever the header says."""
    data = f"{b64(json.dumps(header))}.{b64(payload)}"
    signature = key.sign(data.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{data}.{b64(signature)}"


def token(header: dict[str, Any] | None = None, **changes: Any) -> str:
    full = {"alg": "RS256", "kid": "k1", "typ": "JWT", **(header or {})}
    return sign({k: v for k, v in full.items() if v is not None}, claims(**changes))


def hmac_token(secret: bytes) -> str:
    data = f"{b64({'alg': 'HS256', 'kid': 'k1', 'typ': 'JWT'})}.{b64(claims())}"
    return f"{data}.{b64(hmac.new(secret, data.encode(), hashlib.sha256).digest())}"


def spki(encoding: serialization.Encoding, form: serialization.PublicFormat) -> bytes:
    return KEY.public_key().public_bytes(encoding, form)


def trusted(**changes: Any) -> TrustedIssuer:
    values: dict[str, Any] = {
        "issuer": V2,
        "tenants": frozenset({TENANT}),
        "version": "2.0",
        "jwks": json.dumps({"keys": KEYS}).encode(),
    }
    return TrustedIssuer(**(values | changes))


def make(*issuers: TrustedIssuer, **more: Any) -> Authenticator:
    more.setdefault("clock", lambda: float(NOW))
    return Authenticator(issuers or (trusted(),), [AUDIENCE], challenge=CHALLENGE, **more)


def reason(authenticator: Authenticator, text: str) -> str:
    """Return why *text* is refused."""
    with pytest.raises(ServiceError) as caught:
        authenticator.authenticate({"authorization": f"Bearer {text}"})
    assert caught.value.status in (401, 503)
    assert caught.value.inner is not None
    return caught.value.inner


GOOD: Final = token()
HEAD, BODY, SIGNATURE = GOOD.split(".")
ENCODING = serialization.Encoding
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
PKCS1 = serialization.PublicFormat.PKCS1
RAW: Final = {"alg": "RS256", "kid": "k1"}

FAULTS: Final[dict[str, tuple[str, str]]] = {
    # JWT-01
    "alg none": ("alg_none", token({"alg": "none"})),
    "alg NoNe": ("alg_none", token({"alg": "NoNe"})),
    "alg none without signature": ("alg_none", f"{b64({'alg': 'none', 'kid': 'k1'})}.{BODY}."),
    "alg missing": ("alg_missing", token({"alg": None})),
    "alg a number": ("alg_missing", token({"alg": 256})),
    "alg a list": ("alg_missing", token({"alg": ["RS256"]})),
    "alg empty": ("alg_missing", token({"alg": ""})),
    "alg in lower case": ("algorithm", token({"alg": "rs256"})),
    # JWT-02
    "HS256 with PEM": ("alg_symmetric", hmac_token(spki(ENCODING.PEM, SPKI))),
    "HS256 with PKCS#1": ("alg_symmetric", hmac_token(spki(ENCODING.PEM, PKCS1))),
    "HS256 with DER": ("alg_symmetric", hmac_token(spki(ENCODING.DER, SPKI))),
    "HS256 with OpenSSH": (
        "alg_symmetric",
        hmac_token(spki(ENCODING.OpenSSH, serialization.PublicFormat.OpenSSH)),
    ),
    "HS256 with JWK": ("alg_symmetric", hmac_token(json.dumps(KEYS[0]).encode())),
    "hs512": ("alg_symmetric", token({"alg": "hs512"})),
    # JWT-03
    "PS256 with a key for RS256": ("algorithm", token({"alg": "PS256"})),
    "ES256 with a key for RS256": ("algorithm", token({"alg": "ES256"})),
    "a curve's key under RS256": ("key_algorithm", token({"kid": "curve"})),
    "a PS256 key under RS256": ("key_algorithm", token({"kid": "other-alg"})),
    # JWT-04
    "jku": ("embedded_key", token({"jku": "https://evil.example/keys"})),
    "x5u": ("embedded_key", token({"x5u": "https://evil.example/cert"})),
    "jwk": ("embedded_key", token({"jwk": KEYS[1]})),
    "x5c of another": ("signature", sign(RAW | {"x5c": ["AAAA"]}, claims(), SECOND)),
    # JWT-05
    "kid unknown": ("unknown_kid", token({"kid": "k9"})),
    "kid missing": ("kid_missing", token({"kid": None})),
    "kid a path": ("kid_malformed", token({"kid": "../../etc/passwd"})),
    "kid an address": ("kid_malformed", token({"kid": "https://evil.example/k1"})),
    "kid SQL": ("kid_malformed", token({"kid": "' OR 1=1 --"})),
    "kid with zero": ("kid_malformed", token({"kid": "k1\0"})),
    "kid of 10 KB": ("kid_malformed", token({"kid": "k" * 10_000})),
    "kid a number": ("kid_malformed", token({"kid": 1})),
    "kid of another key": ("signature", token({"kid": "k2"})),
    # JWT-06 and the times
    "iss missing": ("iss_missing", token(iss=None)),
    "iss a list": ("iss_missing", token(iss=[V2])),
    "iss with a slash": ("issuer", token(iss=V2 + "/")),
    "iss a prefix": ("issuer", token(iss=V2[:-1])),
    "iss longer": ("issuer", token(iss=V2 + ".evil.example")),
    "iss in upper case": ("issuer", token(iss=V2.upper())),
    "iss of another tenant": ("issuer", token(iss=V2.replace(TENANT, OTHER_TENANT))),
    "iss of version 1": ("issuer", token(iss=V1)),
    "tid of another tenant": ("tenant", token(tid=OTHER_TENANT)),
    "tid missing": ("tenant_missing", token(tid=None)),
    "tid a list": ("tenant_missing", token(tid=[TENANT])),
    "ver 1.0": ("version", token(ver="1.0")),
    "ver missing": ("version", token(ver=None)),
    "ver a number": ("version", token(ver=2.0)),
    "aud missing": ("aud_missing", token(aud=None)),
    "aud a number": ("aud_missing", token(aud=1)),
    "aud an empty list": ("aud_missing", token(aud=[])),
    "aud a list of numbers": ("aud_missing", token(aud=[1])),
    "aud of another API": ("audience", token(aud="https://graph.microsoft.com")),
    "aud a prefix": ("audience", token(aud="https://vault.azure.ne")),
    "aud with one foreign value": ("audience", token(aud=[AUDIENCE, "https://evil.example"])),
    "exp missing": ("exp_missing", token(exp=None)),
    "exp text": ("exp_type", token(exp=str(NOW + 60))),
    "exp a fraction": ("exp_type", token(exp=NOW + 60.5)),
    "exp true": ("exp_type", token(exp=True)),
    "exp huge": ("exp_huge", token(exp=1 << 60)),
    "exp negative": ("exp_huge", token(exp=-1)),
    "exp past": ("expired", token(exp=NOW - 61)),
    "nbf missing": ("nbf_missing", token(nbf=None)),
    "nbf text": ("nbf_type", token(nbf="0")),
    "nbf in the future": ("not_yet", token(nbf=NOW + 61)),
    "iat missing": ("iat_missing", token(iat=None)),
    "iat a list": ("iat_type", token(iat=[NOW])),
    "iat in the future": ("iat_future", token(iat=NOW + 61)),
    "a life of years": ("lifetime", token(exp=NOW + 10 * 365 * 86400)),
    # JWT-07
    "crit": ("crit", token({"crit": ["exp"]})),
    "crit unknown": ("crit", token({"crit": ["urn:x"], "urn:x": 1})),
    "crit empty": ("crit", token({"crit": []})),
    # JWT-08
    "key for encryption": ("key_unusable", sign(RAW | {"kid": "for-encryption"}, claims(), SECOND)),
    "key not to verify": ("key_unusable", sign(RAW | {"kid": "no-verify"}, claims(), SECOND)),
    "key too small": ("key_unusable", sign({"alg": "RS256", "kid": "small"}, claims(), SMALL)),
    # JWT-09
    "JWE": ("encrypted", f"{b64({'alg': 'RSA-OAEP', 'enc': 'A256GCM'})}.AAAA.AAAA.AAAA.AAAA"),
    "JSON serialisation": (
        "serialisation",
        json.dumps(
            {"payload": BODY, "signatures": [{"protected": HEAD, "signature": SIGNATURE}] * 2}
        ),
    ),
    "two parts": ("parts", f"{HEAD}.{BODY}"),
    "four parts": ("parts", f"{GOOD}.{SIGNATURE}"),
    "enc in the header": ("encryption_parameter", token({"enc": "A256GCM"})),
    "a token in a token": ("nested", token({"cty": "JWT"})),
    # JWT-10
    "padding": ("encoding", f"{HEAD}.{BODY}.{SIGNATURE}=="),
    "standard alphabet": ("encoding", f"{HEAD}.{BODY}.{'+/' + SIGNATURE[2:]}"),
    "stray bits": ("encoding", GOOD[:-1] + chr(ord(GOOD[-1]) + 1)),
    "white space": ("encoding", f"{HEAD} .{BODY}.{SIGNATURE}"),
    # JWT-11
    "zip": ("compressed", token({"zip": "DEF"})),
    "PBES2": ("password", token({"alg": "PBES2-HS256+A128KW", "p2c": 1 << 40, "p2s": "AAAA"})),
    "b64 false": ("unencoded", token({"b64": False, "crit": ["b64"]})),
    # JWT-14
    "duplicate claim": ("duplicate", sign(RAW, json.dumps(claims())[:-1] + ', "oid": "x"}')),
    "duplicate in the header": (
        "duplicate",
        b64('{"alg":"RS256","alg":"RS256","kid":"k1"}') + f".{BODY}.{SIGNATURE}",
    ),
    "payload a list": ("payload_json", sign(RAW, "[]")),
    "payload no JSON": ("payload_json", sign(RAW, "x")),
    "payload with NaN": ("payload_json", sign(RAW, '{"exp": NaN}')),
    "header no JSON": ("header_json", f"{b64('x')}.{BODY}.{SIGNATURE}"),
    "roles as text": ("roles_type", token(roles="admin")),
    "roles of numbers": ("roles_type", token(roles=[1])),
    "scp a list": ("scp_type", token(scp=["a"], idtyp=None)),
    "azp a number": ("client_type", token(azp=7)),
    "oid missing": ("principal", token(oid=None)),
    "oid empty": ("principal", token(oid="")),
    "oid a list": ("principal", token(oid=["x"])),
    "idtyp unknown": ("idtyp", token(idtyp="device")),
    "app with delegated scopes": ("idtyp", token(scp="user_impersonation")),
    # JWT-16 and kinds of tokens
    "ID token": ("id_token", token(azp=None, idtyp=None)),
    "ID token with nonce": ("id_token", token(nonce="n")),
    "typ of an ID token": ("token_type", token({"typ": "id+jwt"})),
    "typ a number": ("token_type", token({"typ": 1})),
    "signed by another": ("signature", sign(RAW, claims(), SECOND)),
    "signature cut": ("signature", GOOD[:-10]),
    "payload changed": ("signature", f"{HEAD}.{b64(claims(oid='other'))}.{SIGNATURE}"),
    "oversized": ("oversized", token(x="y" * 20_000)),
}  # fmt: skip


@pytest.mark.parametrize(("expected", "text"), FAULTS.values(), ids=FAULTS)
def test_a_token_with_a_fault_is_refused_for_that_fault(
    expected: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault has its reason; no network is touched on the way (JWT-04)."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert reason(make(), text) == expected


def test_every_byte_of_a_token_matters() -> None:
    """Any other character anywhere: refused, and never with an error of another kind."""
    authenticator = make()
    for place in range(len(GOOD)):
        for other in ("A", "_", "."):
            if GOOD[place] != other:
                text = GOOD[:place] + other + GOOD[place + 1 :]
                with pytest.raises(ServiceError) as caught:
                    authenticator.authenticate({"authorization": f"Bearer {text}"})
                assert caught.value.status == 401


def test_each_reason_that_a_token_can_have_is_tried() -> None:
    """A new reason without a test is noticed; the rest have tests of their own below."""
    elsewhere = {"scheme", "keys_unavailable", "keys_expired", "tenant_issuer", "client", "kind"}
    assert {expected for expected, _ in FAULTS.values()} == set(REASONS) - elsewhere


def test_a_good_token_names_its_caller() -> None:
    """Tenant and object id; the token itself is not kept."""
    caller = make().authenticate({"authorization": f"Bearer {GOOD}"})
    assert (caller.tenant, caller.object_id) == (TENANT, claims()["oid"])
    assert (caller.client_id, caller.kind, caller.expires) == ("client-1", "app", NOW + 3600)
    assert caller.token_digest == hashlib.sha256(GOOD.encode()).hexdigest()


def test_clocks_may_differ_a_little_and_no_more() -> None:
    """Leeway is bounded, for all three times."""
    make().authenticate({"authorization": f"Bearer {token(exp=NOW - 59)}"})
    make().authenticate({"authorization": f"Bearer {token(nbf=NOW + 59, iat=NOW + 59)}"})
    assert reason(make(leeway=0), token(exp=NOW)) == "expired"
    with pytest.raises(ValueError, match="leeway"):
        make(leeway=301)


def test_users_and_applications_are_told_apart() -> None:
    """Delegated tokens have scopes; an issuer may be limited to one kind and to some clients."""
    delegated = token(scp="user_impersonation", idtyp=None)
    assert make().authenticate({"authorization": f"Bearer {delegated}"}).kind == "user"
    assert reason(make(trusted(kinds=frozenset({"app"}))), delegated) == "kind"
    assert reason(make(trusted(kinds=frozenset({"user"}))), GOOD) == "kind"
    assert reason(make(trusted(clients=frozenset({"other"}))), GOOD) == "client"
    make(trusted(clients=frozenset({"client-1"}))).authenticate({"authorization": f"Bearer {GOOD}"})


def test_tokens_of_version_1_are_judged_by_their_own_row() -> None:
    """Issuer, appid and ver of version 1.0; never mixed with 2.0."""
    second, first = entra(TENANT)
    keys = json.dumps({"keys": KEYS}).encode()
    both = make(
        trusted(),
        TrustedIssuer(issuer=first.issuer, version="1.0", tenants=first.tenants, jwks=keys),
    )
    old = token(iss=V1, ver="1.0", azp=None, appid="client-0")
    assert both.authenticate({"authorization": f"Bearer {old}"}).client_id == "client-0"
    assert reason(both, token(iss=V1, ver="2.0")) == "version"
    assert reason(both, token(iss=V2, ver="1.0")) == "version"
    assert second.issuer == V2
    assert first.discovery_url.startswith("https://login.microsoftonline.com/")


def test_an_issuer_of_many_tenants_lets_in_those_of_its_list() -> None:
    """{tenantid} is the token's tid, and tid is in the list; both or nothing."""
    common = trusted(
        issuer="https://login.microsoftonline.com/{tenantid}/v2.0",
        tenants=frozenset({TENANT, OTHER_TENANT}),
    )
    authenticator = make(common)
    other = V2.replace(TENANT, OTHER_TENANT)
    authenticator.authenticate({"authorization": f"Bearer {GOOD}"})
    authenticator.authenticate({"authorization": f"Bearer {token(iss=other, tid=OTHER_TENANT)}"})
    assert reason(authenticator, token(iss=other)) == "tenant_issuer"
    assert reason(authenticator, token(tid=OTHER_TENANT)) == "tenant_issuer"
    unknown = "77777777-2222-3333-4444-555555555555"
    assert reason(authenticator, token(iss=V2.replace(TENANT, unknown), tid=unknown)) == "tenant"
    assert reason(authenticator, token(iss="https://login.microsoftonline.com//v2.0")) == "issuer"
    with pytest.raises(ValueError, match="many tenants"):
        trusted(issuer="https://login.microsoftonline.com/{tenantid}/v2.0", tenants=None)


PARTNER: Final[dict[str, Any]] = {
    "issuer": "https://partner.example",
    "jwks": json.dumps({"keys": [jwk(SECOND, "k1")]}).encode(),
}


def test_an_issuer_cannot_name_itself_into_the_tenant_of_another() -> None:
    """Roles are of TENANT/OBJECT_ID: whoever signs tokens would be anybody there."""
    with pytest.raises(ValueError, match="tenants of https://partner"):
        TrustedIssuer(**PARTNER)
    with pytest.raises(ValueError, match="tenants"):
        TrustedIssuer(**PARTNER, tenants=frozenset())
    own = TrustedIssuer(**PARTNER, tenants=frozenset({"partner"}))
    both = make(trusted(), own)
    mine = claims(iss=own.issuer, tid="partner", ver=None)
    header = {"alg": "RS256", "kid": "k1"}
    good = both.authenticate({"authorization": f"Bearer {sign(header, mine, SECOND)}"})
    assert good.tenant == "partner"
    assert reason(both, sign(header, {**mine, "tid": TENANT}, SECOND)) == "tenant"
    # An issuer without tenants is one by itself, whatever tid its tokens have.
    alone = make(trusted(), TrustedIssuer(**PARTNER, subject="sub"))
    named = sign(header, {**mine, "tid": TENANT}, SECOND)
    assert alone.authenticate({"authorization": f"Bearer {named}"}).tenant == own.issuer


@pytest.mark.parametrize(
    "changes",
    [
        {"tenants": frozenset({TENANT})},
        {"tenants": frozenset({"partner", TENANT})},
        {"tenants": frozenset({TENANT.upper()}), "subject": "sub"},
        {"tenants": frozenset({TENANT}), "version": "1.0"},
        {"tenants": frozenset({TENANT}), "version": "2.0"},
    ],
    ids=["the same", "among others", "by sub", "of version 1.0", "of version 2.0"],
)
def test_two_issuers_that_share_a_tenant_are_refused(changes: dict[str, Any]) -> None:
    """But Entra ID's two of one authority and one set of keys."""
    other = TrustedIssuer(**PARTNER, **changes)
    for issuers in ((trusted(), other), (other, trusted()), (*entra(TENANT), other)):
        with pytest.raises(ValueError, match="share the tenant"):
            make(*issuers)
    with pytest.raises(ValueError, match="share the tenant"):
        make(*entra(TENANT), *entra(TENANT, authority="https://login.partner.example"))
    name = frozenset({PARTNER["issuer"]})
    with pytest.raises(ValueError, match="share the tenant"):
        make(TrustedIssuer(**PARTNER, subject="sub"), trusted(tenants=name))
    make(*entra(TENANT), *entra(OTHER_TENANT))


def test_a_key_of_one_issuer_does_not_sign_for_another() -> None:
    """JWT-05: kid is looked up among the keys of the issuer that the token names."""
    other = TrustedIssuer(
        issuer="https://other.example",
        jwks=json.dumps({"keys": [jwk(SECOND, "k1")]}).encode(),
        subject="sub",
        require_nbf=False,
    )
    both = make(trusted(), other)
    assert reason(both, token(iss="https://other.example")) == "signature"
    good = sign(
        {"alg": "RS256", "kid": "k1"}, claims(iss="https://other.example", nbf=None), SECOND
    )
    caller = both.authenticate({"authorization": f"Bearer {good}"})
    assert (caller.tenant, caller.object_id) == ("https://other.example", "pairwise")


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", GOOD, f"Bearer {GOOD}\t", f"Token {GOOD}"],
)
def test_another_authorization_header_is_refused(value: str) -> None:
    """One form: Bearer and a token."""
    with pytest.raises(ServiceError) as caught:
        make().authenticate({"authorization": value})
    assert (caught.value.status, caught.value.inner) == (401, "scheme")


def test_a_first_request_gets_the_challenge_that_azure_clients_expect() -> None:
    """Authority and resource; no guess is counted (inner is None)."""
    with pytest.raises(ServiceError) as caught:
        make().authenticate({})
    error = caught.value
    assert (error.status, error.error_code, error.inner) == (401, "Unauthorized", None)
    assert error.challenge == (
        f'Bearer authorization="https://login.microsoftonline.com/{TENANT}", '
        'resource="https://vault.azure.net"'
    )
    with pytest.raises(ValueError, match="header"):
        Challenge('https://a"b', "c")


def test_a_validated_token_is_remembered_until_it_ends() -> None:
    """By digest, bounded, and never beyond exp, whichever way the clock jumps (SVC-13)."""
    now, ticks = [float(NOW)], [0.0]
    authenticator = make(clock=lambda: now[0], monotonic=lambda: ticks[0])
    headers = {"authorization": f"Bearer {GOOD}"}
    assert authenticator.remembered(headers) is None
    caller = authenticator.authenticate(headers)
    assert authenticator.remembered(headers) is caller
    assert authenticator.remembered({"authorization": f"Bearer x{GOOD}"}) is None
    now[0] = NOW + 3600 + 61
    assert authenticator.remembered(headers) is None
    assert reason(authenticator, GOOD) == "expired"
    now[0] = NOW - 86400
    assert authenticator.remembered(headers) is None
    now[0] = NOW
    assert authenticator.remembered(headers) is caller
    ticks[0] = 601.0
    assert authenticator.remembered(headers) is None


def test_what_is_remembered_is_bounded() -> None:
    """SVC-06: many good tokens do not fill the memory."""
    authenticator = make()
    for number in range(4200):
        authenticator._remembered[number.to_bytes(4, "big")] = None  # type: ignore[assignment]
    authenticator.authenticate({"authorization": f"Bearer {GOOD}"})
    assert len(authenticator._remembered) == 4096


class Documents:
    """An issuer's documents, counted; an exception stands for the network."""

    def __init__(self, keys: list[dict[str, Any]] | Exception, issuer: str = V2) -> None:
        self.keys = keys
        self.metadata: dict[str, Any] = {
            "issuer": issuer,
            "jwks_uri": "https://login.microsoftonline.com/keys",
        }
        self.asked: list[str] = []
        self.gate: threading.Event | None = None

    def __call__(self, url: str, most: int) -> bytes:
        self.asked.append(url)
        if self.gate is not None:
            self.gate.wait(20)
        if isinstance(self.keys, Exception):
            raise self.keys
        if url.endswith("openid-configuration"):
            return json.dumps(self.metadata).encode()
        return json.dumps({"keys": self.keys}).encode()


def fetched(documents: Documents, ticks: Callable[[], float] = lambda: 0.0) -> Authenticator:
    return make(trusted(jwks=None), fetch=documents, monotonic=ticks)


def test_keys_are_found_by_discovery_once() -> None:
    """Two documents, then none for each further token."""
    documents = Documents(KEYS[:1])
    authenticator = fetched(documents)
    for number in range(5):
        authenticator.authenticate({"authorization": f"Bearer {token(jti=str(number))}"})
    assert documents.asked == [
        f"{V2}/.well-known/openid-configuration",
        "https://login.microsoftonline.com/keys",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"issuer": V2 + "/"},
        {"issuer": "https://evil.example"},
        {"issuer": None},
        {"jwks_uri": "https://evil.example/keys"},
        {"jwks_uri": "http://login.microsoftonline.com/keys"},
        {"jwks_uri": "https://login.microsoftonline.com@evil.example/keys"},
        {"jwks_uri": "https://169.254.169.254/keys"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": "https://login.microsoftonline.com:x/keys"},
        {"jwks_uri": 7},
    ],
)
def test_metadata_of_another_issuer_or_place_is_refused(change: dict[str, Any]) -> None:
    """JWT-13, SVC-04: issuer equality, https, pinned hosts."""
    documents = Documents(KEYS)
    documents.metadata |= change
    assert reason(fetched(documents), GOOD) == "keys_unavailable"
    assert len(documents.asked) == 1


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [{**jwk(KEY, "k1"), "d": "AQAB"}],
        [{"kty": "oct", "kid": "k1", "k": "AAAA"}],
        [jwk(KEY, "k1"), jwk(SECOND, "k1")],
        [jwk(KEY, f"k{number}") for number in range(100)],
        [jwk(KEY, "k1", use="enc")],
    ],
    ids=["none", "private", "shared", "two of one name", "too many", "only for encryption"],
)
def test_a_set_of_keys_that_is_wrong_is_not_taken(keys: list[dict[str, Any]]) -> None:
    """JWT-08: a secret in the set, two keys of one name, too many."""
    assert reason(fetched(Documents(keys)), GOOD) == "keys_unavailable"


def test_a_flood_of_unknown_keys_makes_one_fetch_in_five_minutes() -> None:
    """JWT-12: whoever sends it."""
    ticks = [0.0]
    documents = Documents(KEYS[:1])
    authenticator = fetched(documents, lambda: ticks[0])
    authenticator.authenticate({"authorization": f"Bearer {GOOD}"})
    for number in range(50):
        assert reason(authenticator, token({"kid": f"u{number}"})) == "unknown_kid"
    assert len(documents.asked) == 2
    ticks[0] = 300.0
    for number in range(50):
        assert reason(authenticator, token({"kid": f"w{number}"})) == "unknown_kid"
    assert len(documents.asked) == 4


def test_a_rotated_key_is_fetched_and_the_old_one_ends() -> None:
    """Also for tokens that are remembered: a key that was withdrawn lets nobody in."""
    ticks = [0.0]
    documents = Documents(KEYS[:1])
    authenticator = fetched(documents, lambda: ticks[0])
    headers = {"authorization": f"Bearer {GOOD}"}
    authenticator.authenticate(headers)
    documents.keys = [KEYS[1]]
    ticks[0] = 301.0
    new = sign({"alg": "RS256", "kid": "k2"}, claims(), SECOND)
    authenticator.authenticate({"authorization": f"Bearer {new}"})
    assert authenticator.remembered(headers) is None
    assert reason(authenticator, GOOD) == "unknown_kid"


def test_the_last_good_keys_go_on_for_a_day_without_the_issuer() -> None:
    """Then they end, with a reason of its own: the network's fault, not the token's."""
    ticks = [0.0]
    documents = Documents(KEYS[:1])
    authenticator = fetched(documents, lambda: ticks[0])
    authenticator.authenticate({"authorization": f"Bearer {token(jti='0')}"})
    documents.keys = CollateralError("no network")
    ticks[0] = 86_000.0
    authenticator.authenticate({"authorization": f"Bearer {token(jti='1')}"})
    authenticator.close()
    ticks[0] = 86_401.0 + 300
    assert reason(authenticator, token(jti="2")) == "keys_expired"
    documents.keys = KEYS[:1]
    ticks[0] += 300.0
    authenticator.authenticate({"authorization": f"Bearer {token(jti='3')}"})


def test_an_issuer_that_is_away_at_the_start_is_asked_again_soon() -> None:
    """503, nobody is let in; fifteen seconds later it is asked again."""
    ticks = [0.0]
    documents = Documents(CollateralError("no network"))
    authenticator = fetched(documents, lambda: ticks[0])
    assert [reason(authenticator, GOOD) for _ in range(5)] == ["keys_unavailable"] * 5
    assert len(documents.asked) == 1
    documents.keys = KEYS
    ticks[0] = 15.0
    authenticator.authenticate({"authorization": f"Bearer {GOOD}"})


def test_those_who_wait_for_keys_share_one_fetch() -> None:
    """SVC-05: single flight, and the event loop goes on meanwhile."""
    documents = Documents(KEYS[:1])
    documents.gate = threading.Event()
    authenticator = fetched(documents)

    async def run() -> list[str]:
        asked = [
            asyncio.create_task(
                authenticator.authenticated({"authorization": f"Bearer {token(jti=str(n))}"})
            )
            for n in range(12)
        ]
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not any(task.done() for task in asked)
        assert documents.gate is not None
        documents.gate.set()
        return [(await task).object_id for task in asked]

    assert asyncio.run(run()) == [claims()["oid"]] * 12
    assert len(documents.asked) == 2
    authenticator.close()


def test_nothing_but_https_is_configured() -> None:
    """An issuer is an https address without user, query and fragment."""
    for url in ("http://login.example", "https://", "https://u@host", "https://h/?q", "ftp://h"):
        with pytest.raises(ValueError, match="https"):
            TrustedIssuer(issuer=url)
    with pytest.raises(ValueError, match="algorithms"):
        TrustedIssuer(issuer="https://h", algorithms=frozenset({"HS256"}))
    with pytest.raises(ValueError, match="issuer"):
        Authenticator([], [AUDIENCE], challenge=None)
    for wrong in ((), "text", [""]):
        with pytest.raises(ValueError, match="audiences"):
            Authenticator([trusted()], wrong, challenge=None)


def test_tokens_are_not_in_what_is_raised_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    """SVC-07: reasons and names, never the token."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ServiceError) as caught:
        make().authenticate({"authorization": f"Bearer {token({'kid': 'k9'})}"})
    shown = str(caught.value) + repr(caught.value) + caplog.text
    assert GOOD.split(".")[1][:40] not in shown
    assert "k9" in str(caught.value.found)
