"""Management: uploads, roles, signers, and the faults that tokens can have."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import json
from functools import lru_cache
from typing import Any

import pytest

from pyenclave.errors import ConfigurationError

TEXT = (
    "version=1.0;\nauthorizationrules\n{\n"
    '  [type=="x-ms-sgx-is-debuggable", value==false] => permit();\n};\nissuancerules\n{\n};\n'
)
PATH = "/policies/SgxEnclave"
ADMIN = {"authorization": "Bearer admin"}
NONE = '{"alg":"none"}'


def _b64(data: bytes | str) -> str:
    raw = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _payload(text: str = TEXT) -> str:
    return json.dumps({"AttestationPolicy": _b64(text)})


def unsigned(payload: str | None = None, header: str = NONE) -> bytes:
    return f"{_b64(header)}.{_b64(_payload() if payload is None else payload)}.".encode()


@lru_cache
def _pair(name: str) -> tuple[Any, bytes]:
    """Return a key (EC, or what the name says) and its certificate, DER."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.x509.oid import NameOID

    key: Any
    if name == "ed":
        key = ed25519.Ed25519PrivateKey.generate()
    elif name.startswith("rsa"):
        key = rsa.generate_private_key(65537, 1024 if name == "rsa-weak" else 2048)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, None if name == "ed" else hashes.SHA256())
    )
    return key, certificate.public_bytes(serialization.Encoding.DER)


def signed(
    name: str = "ec",
    payload: str | None = None,
    *,
    header: dict[str, Any] | None = None,
    key: str | None = None,
    drop: tuple[str, ...] = (),
) -> bytes:
    """Return an upload that *name* signed; *key* is whose key really signs."""
    from cryptography.hazmat.primitives.asymmetric import ec

    private, _ = _pair(key or name)
    _, certificate = _pair(name)
    algorithm = "ES256" if isinstance(private, ec.EllipticCurvePrivateKey) else "RS256"
    full: dict[str, Any] = {
        "alg": algorithm,
        "x5c": [base64.b64encode(certificate).decode()],
    } | (header or {})
    full = {member: value for member, value in full.items() if member not in drop}
    data = f"{_b64(json.dumps(full))}.{_b64(_payload() if payload is None else payload)}"
    if algorithm == "ES256":
        from pyenclave.formats._ecdsa import sign

        signature = sign(private, "ES256", data.encode())
    else:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        signature = private.sign(data.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{data}.{_b64(signature)}".encode()


def _put(site: Any, body: bytes, path: str = PATH, **headers: str) -> Any:
    return site.client.put(
        path,
        content=body,
        params={"api-version": "2022-08-01"},
        headers={"content-type": "text/plain"} | ADMIN | headers,
    )


def _get(site: Any, path: str = PATH, who: str = "admin") -> Any:
    return site.client.get(
        path,
        params={"api-version": "2022-08-01"},
        headers={"authorization": f"Bearer {who}"},
    )


def _hash(site: Any) -> str:
    return str(site.verified(_get(site).json()["token"])["x-ms-policy-hash"])


# ---- what is no upload ------------------------------------------------------------------------


def _hmac_upload() -> bytes:
    import hmac

    _, certificate = _pair("rsa")
    header = {"alg": "HS256", "x5c": [base64.b64encode(certificate).decode()]}
    data = f"{_b64(json.dumps(header))}.{_b64(_payload())}"
    mac = hmac.digest(certificate, data.encode(), "sha256")
    return f"{data}.{_b64(mac)}".encode()


FAULTS: dict[str, Any] = {
    "nothing": lambda: b"",
    "two parts": lambda: unsigned().rstrip(b".").rpartition(b".")[0],
    "four parts": lambda: unsigned() + b".",
    "json serialisation": lambda: json.dumps({"payload": "", "signatures": []}).encode(),
    "an encrypted token": lambda: b"e30.e30.e30.e30.e30",
    "None": lambda: unsigned(header='{"alg":"None"}'),
    "NONE": lambda: unsigned(header='{"alg":"NONE"}'),
    "no alg": lambda: unsigned(header="{}"),
    "alg null": lambda: unsigned(header='{"alg":null}'),
    "alg a list": lambda: unsigned(header='{"alg":["none"]}'),
    "alg twice": lambda: unsigned(header='{"alg":"none","alg":"none"}'),
    "crit": lambda: unsigned(header='{"alg":"none","crit":["x"]}'),
    "b64": lambda: unsigned(header='{"alg":"none","b64":false}'),
    "zip": lambda: unsigned(header='{"alg":"none","zip":"DEF"}'),
    "jku": lambda: signed(header={"jku": "https://keys.example/"}),
    "x5u": lambda: signed(header={"x5u": "https://keys.example/"}),
    "none with a signature": lambda: unsigned() + b"AAAA",
    "none with a certificate": lambda: unsigned(header='{"alg":"none","x5c":["AAAA"]}'),
    "a key alone": lambda: signed(header={"jwk": {"kty": "EC"}}, drop=("x5c",)),
    "no certificate": lambda: signed(drop=("x5c",)),
    "two lists": lambda: signed(header={"jwk": {"x5c": ["AAAA"]}}),
    "x5c empty": lambda: signed(header={"x5c": []}),
    "x5c text": lambda: signed(header={"x5c": "AAAA"}),
    "x5c no certificate": lambda: signed(header={"x5c": ["AAAA"]}),
    "another's key": lambda: signed("ec", key="ec-2"),
    "RS256 with an EC key": lambda: signed("ec", header={"alg": "RS256"}),
    "ES256 with an RSA key": lambda: signed("rsa", header={"alg": "ES256"}),
    "PS256 over PKCS #1": lambda: signed("rsa", header={"alg": "PS256"}),
    "EdDSA with an EC key": lambda: signed("ec", header={"alg": "EdDSA"}),
    "a weak RSA key": lambda: signed("rsa-weak"),
    "HMAC with the certificate": _hmac_upload,
    "no signature": lambda: signed().rpartition(b".")[0] + b".",
    "a changed payload": lambda: b".".join(
        (signed().split(b".")[0], unsigned().split(b".")[1][:-4] + b"AAAA", signed().split(b".")[2])
    ),
    "a padded header": lambda: b"eyJhbGciOiJub25lIn0=." + unsigned().partition(b".")[2],
    "the standard alphabet": lambda: unsigned().replace(b"eyJ", b"+yJ", 1),
    "white space": lambda: unsigned().replace(b".", b" .", 1),
    "another member": lambda: unsigned('{"text":"dmVyc2lvbj0xLjA7"}'),
    "two members": lambda: unsigned('{"AttestationPolicy":"AA","x":1}'),
    "a policy of bytes": lambda: unsigned('{"AttestationPolicy":"_w"}'),
    "a policy that is no text": lambda: unsigned('{"AttestationPolicy":1}'),
    "a payload that is a list": lambda: unsigned("[]"),
    "no policy": lambda: unsigned(""),
    "too long": lambda: unsigned(_payload("//" + "x" * 300_000)),
    "no language": lambda: unsigned(_payload("permit everything")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_upload_with_a_fault_changes_nothing(site: Any, fault: str) -> None:
    before = _hash(site)
    answer = _put(site, FAULTS[fault]())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] in ("InvalidParameter", "PolicyParsingError")
    assert _hash(site) == before


def test_an_error_in_a_policy_names_line_and_column(site: Any) -> None:
    answer = _put(site, unsigned(_payload(TEXT.replace("permit", "allow"))))
    error = answer.json()["error"]
    assert error["code"] == "PolicyParsingError"
    assert "line 4, column 53" in error["message"]


# ---- who may ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", PATH),
        ("PUT", PATH),
        ("POST", PATH + ":reset"),
        ("GET", "/certificates"),
        ("POST", "/certificates:add"),
        ("POST", "/certificates:remove"),
    ],
)
def test_management_needs_identity_and_role(site: Any, method: str, path: str) -> None:
    def ask(**headers: str) -> Any:
        body = unsigned() if method != "GET" else None
        if path.endswith(":reset"):
            body = unsigned("")
        if "certificates:" in path:
            _, certificate = _pair("ec-2")
            jwk = {"kty": "EC", "x5c": [base64.b64encode(certificate).decode()]}
            body = unsigned(json.dumps({"policyCertificate": jwk}))
        return site.client.request(
            method,
            path,
            content=body,
            params={"api-version": "2025-06-01"},
            headers={"content-type": "text/plain"} | headers,
        )

    assert ask().status_code == 401
    assert ask().headers["www-authenticate"]
    before = len(site.audit())
    answer = ask(authorization="Bearer somebody")
    assert answer.status_code == 403
    row = site.audit()[before]
    assert (row["decision"], row["caller"]) == ("refused", "somebody")
    assert row["expected"].startswith("Microsoft.Attestation/")
    assert row["reference"] in answer.json()["error"]["message"]
    reader = ask(authorization="Bearer reader")
    assert reader.status_code == (200 if method == "GET" else 403)


@pytest.mark.parametrize("kind", ["Tpm", "NoSuch", "sgxenclave", "PyEnclave:reset"])
def test_policies_of_other_types_are_refused(site: Any, kind: str) -> None:
    assert _get(site, f"/policies/{kind}").status_code in (400, 501)
    assert _put(site, unsigned(), f"/policies/{kind}").status_code in (400, 501)


# ---- what is one ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["unsigned", "json string", "ec", "rsa", "jwk", "standard base64", "2020"]
)
def test_policies_are_set_read_and_reset(site: Any, helpers: Any, form: str) -> None:
    default = _hash(site)
    body = unsigned()
    if form == "json string":
        body = json.dumps(body.decode()).encode()
    elif form in ("ec", "rsa"):
        body = signed(form)
    elif form == "jwk":
        _, certificate = _pair("ec")
        jwk = {"x5c": [base64.b64encode(certificate).decode()]}
        body = signed("ec", header={"jwk": jwk}, drop=("x5c",))
    elif form == "standard base64":
        text = base64.b64encode(TEXT.encode()).decode()
        body = unsigned(json.dumps({"AttestationPolicy": text}))
    answer = _put(site, body)
    assert answer.status_code == 200, answer.text
    said = site.verified(answer.json()["token"])
    token = json.loads(body) if form == "json string" else body.decode()
    assert said["x-ms-policy-result"] == "Updated"
    assert said["x-ms-policy-token-hash"] == _b64(hashlib.sha256(token.encode()).digest())
    assert ("x-ms-policy-signer" in said) is (form in ("ec", "rsa", "jwk"))
    read = site.verified(_get(site).json()["token"])
    assert read["x-ms-policy"] == token
    inner = hashlib.sha256(_b64(TEXT).encode()).digest()
    assert read["x-ms-policy-hash"] == _b64(inner)
    attested = site.claims("/attest/SgxEnclave", {"quote": helpers.b64(site.quote())})
    assert attested["x-ms-policy-hash"] == read["x-ms-policy-hash"]
    row = next(row for row in reversed(site.audit()) if row["action"].endswith("policies/set"))
    assert row["caller"] == "admin"
    assert (row["details"]["before"], row["details"]["after"]) == (default, _b64(inner))
    reset = site.client.post(
        PATH + ":reset",
        content=unsigned(""),
        params={"api-version": "2022-08-01"},
        headers={"content-type": "text/plain"} | ADMIN,
    )
    assert site.verified(reset.json()["token"])["x-ms-policy-result"] == "Removed"
    assert _hash(site) == default


def test_a_reset_with_a_policy_is_refused(site: Any) -> None:
    answer = site.client.post(
        PATH + ":reset", content=unsigned(), params={"api-version": "2022-08-01"}, headers=ADMIN
    )
    assert answer.status_code == 400


def test_a_new_policy_decides_the_next_request(make_site: Any, helpers: Any) -> None:
    site = make_site()
    body = {"quote": helpers.b64(site.quote())}
    site.claims("/attest/SgxEnclave", body)
    text = TEXT.replace("value==false", "value==true")
    assert _put(site, unsigned(_payload(text))).status_code == 200
    assert site.refused("/attest/SgxEnclave", body)[1] == "PolicyEvaluationError"
    row = site.audit()[-1]
    assert row["rule"].startswith("policy ")
    assert row["details"]["rules"] == []


def test_an_ordinary_instance_has_no_signers(site: Any) -> None:
    _, certificate = _pair("ec")
    jwk = {"kty": "EC", "x5c": [base64.b64encode(certificate).decode()]}
    answer = site.client.post(
        "/certificates:add",
        content=signed("ec", json.dumps({"policyCertificate": jwk})),
        params={"api-version": "2022-08-01"},
        headers={"content-type": "application/json"} | ADMIN,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "InvalidOperation"


def test_signers_change_by_the_form_of_2025(make_site: Any) -> None:
    from pyenclave.formats.x509 import encode_pem

    _, first = _pair("ec")
    _, second = _pair("rsa")
    site = make_site(signers=(encode_pem(first),))
    jwk = {"kty": "RSA", "x5c": [base64.b64encode(second).decode()]}
    payload = json.dumps({"policyCertificate": jwk})

    def change(verb: str, token: bytes, member: str | None = None) -> Any:
        name = member or f"policyCertificateTo{verb.capitalize()}"
        return site.client.post(
            f"/certificates:{verb}",
            json={name: token.decode()},
            params={"api-version": "2025-06-01"},
            headers=ADMIN,
        )

    for wrong in (signed("rsa", payload), unsigned(payload)):
        assert change("add", wrong).json()["error"]["code"] == "PolicySignatureRequired"
        assert site.audit()[-1]["rule"] == "isolated mode"
    assert change("add", signed("ec", payload), "policyCertificateToRemove").status_code == 400
    said = site.verified(change("add", signed("ec", payload)).json()["token"])
    assert said["x-ms-policycertificates-result"] == "IsPresent"
    assert said["x-ms-certificate-thumbprint"] == hashlib.sha1(second).hexdigest()
    listed = site.verified(_get(site, "/certificates").json()["token"])
    assert len(listed["x-ms-policy-certificates"]["keys"]) == 2
    assert _put(site, signed("rsa")).status_code == 200
    used = change("remove", signed("ec", payload))  # what added it is not taken to remove it
    assert "used before" in used.json()["error"]["message"]
    fresh = signed("ec", payload, header={"kid": "2"})
    said = site.verified(change("remove", fresh).json()["token"])
    assert said["x-ms-policycertificates-result"] == "IsAbsent"
    assert _put(site, signed("rsa")).json()["error"]["code"] == "PolicySignatureRequired"
    assert _put(site, unsigned()).json()["error"]["code"] == "PolicySignatureRequired"


def test_a_signed_upload_is_taken_once(make_site: Any) -> None:
    from pyenclave.formats.x509 import encode_pem

    site = make_site(signers=(encode_pem(_pair("ec")[1]),))
    first, second = signed("ec"), signed("ec")  # one text, two signatures
    assert first != second
    assert _put(site, first).status_code == 200
    for body, path in ((first, PATH), (second, PATH), (first, "/policies/TdxVm")):
        error = _put(site, body, path).json()["error"]
        assert error["code"] == "PolicySignatureRequired"
        assert "used before" in error["message"]
        assert site.audit()[-1]["condition"] == "an upload is taken once"
    assert _put(site, signed("ec", header={"kid": "2"})).status_code == 200
    # An ordinary instance's clients may repeat themselves.
    plain = make_site(like=site)
    assert [_put(plain, first).status_code for _ in range(2)] == [200, 200]


def test_an_upload_of_before_the_signers_is_not_taken_once_there_are_some(
    make_site: Any, tmp_path: Any
) -> None:
    """A signer's upload that an ordinary instance took is used up when it becomes isolated."""
    from pyenclave.formats.x509 import encode_pem

    database = f"sqlite:///{tmp_path}/service.db"
    ordinary = make_site(database=database)
    body = signed("ec")
    assert [_put(ordinary, body).status_code for _ in range(2)] == [200, 200]
    assert _put(ordinary, unsigned()).status_code == 200
    isolated = make_site(like=ordinary, database=database, signers=(encode_pem(_pair("ec")[1]),))
    for place in (isolated, ordinary):  # one database: both are isolated now
        for path in (PATH, "/policies/TdxVm"):
            error = _put(place, body, path).json()["error"]
            assert (error["code"], "used before" in error["message"]) == (
                "PolicySignatureRequired",
                True,
            )
    assert _put(isolated, signed("ec", header={"kid": "2"})).status_code == 200


def test_signed_use_without_signers_is_no_start(tmp_path: Any) -> None:
    """The setting would change nothing, and whoever wrote it believes that it does."""
    from pyenclave.formats.x509 import encode_pem
    from pyenclave.services.attestation.options import Options
    from pyenclave.services.attestation.state import Shared
    from pyenclave.services.attestation.tables import PART
    from pyenclave.services.storage.database import Database

    def start(**options: Any) -> None:
        settings = Options(url="https://localhost", algorithm="ES256", **options)
        asyncio.run(Shared(db, settings).start())

    with Database.open(f"sqlite:///{tmp_path}/service.db", parts=[PART]) as db:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="require_signed_use without policy sig"):
                start(require_signed_use=True)
        start(require_signed_use=True, signers=(encode_pem(_pair("ec")[1]),))
        start(require_signed_use=True)  # they are in the database now


def test_a_signer_signs_the_change_of_signers(make_site: Any) -> None:
    from pyenclave.errors import EvidenceFormatError
    from pyenclave.formats.x509 import encode_pem
    from pyenclave.services.attestation.uploads import sign_certificate

    key, certificate = _pair("ec")
    other, second = _pair("ec2")
    site = make_site(signers=(encode_pem(certificate),), require_signed_use=True)

    def change(verb: str, token: str) -> Any:
        return site.client.post(
            f"/certificates:{verb}",
            content=token,
            params={"api-version": "2022-08-01"},
            headers=ADMIN,
        )

    by = {"key": key, "certificate": certificate}
    add = sign_certificate(encode_pem(second), **by)
    remove = sign_certificate(removed=second, **by)
    assert change("remove", add).json()["error"]["innererror"] == {"code": "AnotherUse"}
    assert change("add", remove).json()["error"]["innererror"] == {"code": "AnotherUse"}
    foreign = sign_certificate(second, key=other, certificate=second)
    assert change("add", foreign).json()["error"]["code"] == "PolicySignatureRequired"
    assert change("add", add).status_code == 200
    assert _put(site, sign_policy_of(other, second)).status_code == 200
    assert "used before" in change("add", add).json()["error"]["message"]
    assert change("remove", remove).status_code == 200
    assert _put(site, sign_policy_of(other, second)).status_code == 400
    assert sign_certificate(second, **by) != add  # new each time, so that it is taken
    with pytest.raises(ValueError, match="either"):
        sign_certificate(**by)
    with pytest.raises(ValueError, match="either"):
        sign_certificate(second, removed=second, **by)
    with pytest.raises(ValueError, match="another key"):
        sign_certificate(second, key=other, certificate=certificate)
    with pytest.raises(EvidenceFormatError):
        sign_certificate(b"no certificate", **by)


def test_a_signer_whose_key_signs_nothing_is_no_start_and_can_be_removed(
    make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one is there from before such keys were refused."""
    from pyenclave.errors import ConfigurationError
    from pyenclave.formats.x509 import encode_pem
    from pyenclave.services.attestation import state
    from pyenclave.services.attestation.uploads import sign_certificate

    key, certificate = _pair("ec")
    _, useless = _pair("ed")
    signers = (encode_pem(certificate), encode_pem(useless))
    with pytest.raises(ConfigurationError, match="can sign nothing"):
        make_site(signers=signers)
    with monkeypatch.context() as patch:
        patch.setattr(state, "demand_signing_key", lambda found: found)
        site = make_site(signers=signers)
    answer = site.client.post(
        "/certificates:remove",
        content=sign_certificate(removed=useless, key=key, certificate=certificate),
        params={"api-version": "2022-08-01"},
        headers=ADMIN,
    )
    assert answer.status_code == 200, answer.text


def sign_policy_of(key: Any, certificate: bytes) -> bytes:
    from pyenclave.services.attestation.uploads import sign_policy

    return sign_policy(TEXT, kind="SgxEnclave", key=key, certificate=certificate).encode()


def test_an_upload_whose_header_says_its_use_is_taken_for_nothing_else(make_site: Any) -> None:
    """The type and the action are under the signature; the fresh header keeps its one chance."""
    from pyenclave.formats.x509 import encode_pem
    from pyenclave.services.attestation.uploads import sign_policy

    key, certificate = _pair("ec")
    other, _ = _pair("ec2")
    site = make_site(signers=(encode_pem(certificate),), require_signed_use=True)
    for_sgx = sign_policy(TEXT, kind="SgxEnclave", key=key, certificate=certificate).encode()
    reset = sign_policy(None, kind="SgxEnclave", key=key, certificate=encode_pem(certificate))

    def refused(body: bytes, path: str) -> None:
        post = path.endswith(":reset")
        answer = site.client.request(
            "POST" if post else "PUT",
            path,
            content=body,
            params={"api-version": "2022-08-01"},
            headers=ADMIN,
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["innererror"] == {"code": "AnotherUse"}
        assert site.audit()[-1]["condition"] == "signed for this change"

    refused(for_sgx, "/policies/TdxVm")
    refused(signed("ec"), PATH)  # as Azure's clients sign: for nothing by name
    refused(signed("ec", header={"x-pyenclave-use": "certificates/add"}), PATH)
    refused(reset.encode(), "/policies/TdxVm:reset")
    assert _put(site, for_sgx).status_code == 200
    assert site.audit()[-1]["details"]["register"]["serial"] > 1
    answer = site.client.post(
        f"{PATH}:reset", content=reset, params={"api-version": "2022-08-01"}, headers=ADMIN
    )
    assert answer.status_code == 200, answer.text
    # Where it is not demanded it holds all the same, and others are taken as ever.
    plain = make_site(like=site)
    site = plain
    refused(for_sgx, "/policies/TdxVm")
    assert _put(plain, signed("ec"), "/policies/TdxVm").status_code == 200
    with pytest.raises(ValueError, match="another key"):
        sign_policy(TEXT, kind="SgxEnclave", key=other, certificate=certificate)
    with pytest.raises(ValueError, match="ES256"):
        sign_policy(TEXT, kind="SgxEnclave", key=key, certificate=certificate, algorithm="RS256")


@pytest.mark.parametrize("use", ["", "policies/set", "policies/set A B", 1, None, ["x"]])
def test_a_use_that_is_none_is_refused(site: Any, use: object) -> None:
    answer = _put(site, signed("ec", header={"x-pyenclave-use": use}))
    assert answer.status_code == 400
    assert "x-pyenclave-use" in answer.json()["error"]["message"]


JOINED = TEXT.replace(
    "issuancerules\n{\n",
    "issuancerules\n{\n"
    '  c1:[type=="x-ms-sgx-svn"] && c2:[type=="x-ms-sgx-product-id"]\n'
    '    => issue(type="joined", value=c1.value);\n',
)
CALLED = TEXT.replace("version=1.0", "version=1.2").replace(
    "issuancerules\n{\n",
    "issuancerules\n{\n"
    '  c:[type=="x-ms-sgx-mrsigner"]\n'
    '    => issue(type="called", value=AppendString(c.value, "x"));\n',
)


@pytest.mark.parametrize(
    ("text", "beside"), [(None, False), (TEXT, False), (JOINED, True), (CALLED, True)]
)
def test_a_policy_that_may_take_long_is_evaluated_beside_the_event_loop(
    site: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch, text: str | None, beside: bool
) -> None:
    """What only looks at claims one by one is not: the change of threads would cost more."""
    import threading

    from pyenclave.services.attestation import attesting

    seen: list[str] = []
    judge = attesting.judge

    def note(*arguments: Any) -> Any:
        seen.append(threading.current_thread().name)
        return judge(*arguments)

    monkeypatch.setattr(attesting, "judge", note)
    try:
        if text is not None:
            answer = _put(site, unsigned(_payload(text)))
            assert answer.status_code == 200, answer.text
        said = site.claims("/attest/SgxEnclave", {"quote": helpers.b64(site.quote())})
        assert ("joined" in said, "called" in said) == (text is JOINED, text is CALLED)
        assert [name != "pye-server" for name in seen] == [beside]
    finally:
        site.client.post(
            f"{PATH}:reset",
            content=f"{_b64(NONE)}..",
            params={"api-version": "2022-08-01"},
            headers=ADMIN,
        )
