"""Requests of attestation: what is refused, over the wire, and what the record says of it."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

RUNTIME = b'{"keys":[],"colour":"green","x-ms-sgx-mrsigner":"' + b"00" * 32 + b'"}'
SGX = "/attest/SgxEnclave"
DRAFT = (
    "version=1.0;\nauthorizationrules\n{\n  %s\n};\nissuancerules\n{\n  => issue("
    'type="team", value="blue");\n};\n'
)


def _sgx(site: Any, helpers: Any, runtime: bytes = RUNTIME, **members: Any) -> dict[str, Any]:
    return {
        "quote": helpers.b64(site.quote(runtime)),
        "runtimeData": helpers.bound(runtime),
        **members,
    }


# ---- form -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"quote": None},
        {"quote": ""},
        {"quote": 7},
        {"quote": ["AAAA"]},
        {"quote": "AA A"},
        {"quote": "AAAAA"},
        {"quote": "AAA=="},
        {"quote": "AB"},
        {"quote": "+_8A"},
        {"quote": "A" * 200_000},
        {"report": "AAAA"},
        {"quote": "AAAA", "runtimedata": {"data": "", "dataType": "JSON"}},
        {"quote": "AAAA", "runtimeData": "AAAA"},
        {"quote": "AAAA", "runtimeData": {"data": "AAAA"}},
        {"quote": "AAAA", "runtimeData": {"dataType": "JSON"}},
        {"quote": "AAAA", "runtimeData": {"data": "AAAA", "dataType": "json"}},
        {"quote": "AAAA", "runtimeData": {"data": "AAAA", "dataType": "Binary", "x": 1}},
        {"quote": "AAAA", "runtimeData": {"data": "AAAA", "dataType": "JSON"}},
        {"quote": "AAAA", "nonce": ""},
        {"quote": "AAAA", "nonce": True},
        {"quote": "AAAA", "nonce": -1},
        {"quote": "AAAA", "nonce": 1.5},
        {"quote": "AAAA", "nonce": "two\nlines"},
        {"quote": "AAAA", "nonce": "n" * 2000},
        {"quote": "AAAA", "draftPolicyForAttestation": 1},
        {"quote": base64.b64encode(b"no quote at all" * 40).decode()},
    ],
)
def test_what_is_no_request_is_refused(site: Any, wrong: dict[str, Any]) -> None:
    status, code, _ = site.refused(SGX, wrong)
    assert (status, code) == (400, "InvalidParameter")


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"{", b'{"quote":"AAAA","quote":"AAAA"}', b'{"quote":"\\ud800"}'],
)
def test_what_is_no_strict_json_is_refused(site: Any, body: bytes) -> None:
    answer = site.post(SGX, body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize("spelt", ["url", "url padded", "standard", "standard bare"])
def test_bytes_may_come_in_either_alphabet(site: Any, helpers: Any, spelt: str) -> None:
    quote = site.quote()
    text = base64.b64encode(quote) if "standard" in spelt else base64.urlsafe_b64encode(quote)
    text = text if spelt in ("url padded", "standard") else text.rstrip(b"=")
    assert site.claims(SGX, {"quote": text.decode()})["x-ms-attestation-type"] == "sgx"


def test_evidence_of_another_type_is_refused(site: Any, helpers: Any) -> None:
    td = site.machine.td_quote()
    assert site.refused(SGX, {"quote": helpers.b64(td)})[1] == "InvalidParameter"
    enclave = site.quote()
    assert site.refused("/attest/TdxVm", {"quote": helpers.b64(enclave)})[1] == "InvalidParameter"
    body = {"report": helpers.b64(enclave)}
    assert site.refused("/attest/OpenEnclave", body)[1] == "InvalidParameter"
    assert site.refused("/attest/SevSnpVm", body)[1] == "InvalidParameter"
    body = {"evidence": helpers.b64(enclave)}
    assert site.refused("/attest/PyEnclave", body)[1] == "InvalidParameter"


@pytest.mark.parametrize("kind", ["Tpm"])
def test_what_is_not_supported_is_said(site: Any, kind: str) -> None:
    status, code, message = site.refused(f"/attest/{kind}", {"data": "AAAA"})
    assert (status, code) == (501, "NotImplemented")
    assert kind in message


def test_versions_are_demanded(site: Any, helpers: Any) -> None:
    body = _sgx(site, helpers)
    assert site.refused(SGX, body, query={"api-version": "2019-01-01"})[0] == 400
    for version in ("2020-10-01", "2022-08-01", "2025-06-01"):
        site.claims(SGX, body, query={"api-version": version})


# ---- genuine ----------------------------------------------------------------------------------


def test_a_changed_quote_is_refused_with_the_check(site: Any, helpers: Any) -> None:
    quote = bytearray(site.quote(RUNTIME))
    quote[120] ^= 1
    status, code, message = site.refused(SGX, {"quote": helpers.b64(bytes(quote))})
    assert (status, code) == (400, "AttestationFailed")
    assert "quote.signature" in message
    row = site.audit()[-1]
    assert row["decision"] == "refused"
    assert row["action"] == "attestation/attest/SgxEnclave"
    assert row["reference"] in message
    assert "quote.signature" in row["details"]["checks"]


def test_another_root_is_refused(site: Any, helpers: Any) -> None:
    from datetime import UTC, datetime

    from pyenclave.testing.intel import IntelPlatform

    other = IntelPlatform(datetime.now(UTC))
    _, code, _ = site.refused(SGX, {"quote": helpers.b64(other.enclave_quote())})
    assert code == "AttestationFailed"


def test_a_report_with_another_chips_certificate_is_refused(site: Any, helpers: Any) -> None:
    from pyenclave.testing.amd import AmdChip

    other = AmdChip(chip_id=bytes(range(64, 128)))
    body = {"report": helpers.b64(helpers.proof(other, site.chip.report()))}
    assert site.refused("/attest/SevSnpVm", body)[1] == "AttestationFailed"


@pytest.mark.parametrize(
    "change",
    [
        {"SnpReport": None},
        {"VcekCertChain": None},
        {"VcekCertChain": "AAAA"},
        {"More": "AAAA"},
        {"Endorsements": "!"},
    ],
)
def test_a_malformed_proof_is_refused(site: Any, helpers: Any, change: dict[str, Any]) -> None:
    value = json.loads(helpers.proof(site.chip, site.chip.report())) | change
    body = {"report": helpers.b64(json.dumps(value).encode())}
    assert site.refused("/attest/SevSnpVm", body)[1] == "InvalidParameter"


# ---- binding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SgxEnclave", "TdxVm", "SevSnpVm"])
def test_other_runtime_data_are_refused(site: Any, helpers: Any, kind: str) -> None:
    bound = helpers.digest64(RUNTIME)
    if kind == "SgxEnclave":
        body = {"quote": helpers.b64(site.machine.enclave_quote(report_data=bound))}
    elif kind == "TdxVm":
        body = {"quote": helpers.b64(site.machine.td_quote(report_data=bound))}
    else:
        body = {"report": helpers.b64(site.snp(RUNTIME))}
    path = f"/attest/{kind}"
    site.claims(path, body | {"runtimeData": helpers.bound(RUNTIME)})
    other = helpers.bound(RUNTIME.replace(b"green", b"white"))
    status, code, message = site.refused(path, body | {"runtimeData": other})
    assert (status, code) == (400, "AttestationFailed")
    assert "binding.runtimeData" in message


def test_the_rest_of_report_data_is_free_for_enclaves_and_zero_for_vms(
    site: Any, helpers: Any
) -> None:
    filled = helpers.digest64(RUNTIME)[:32] + b"\1" * 32
    runtime = helpers.bound(RUNTIME)
    quote = helpers.b64(site.machine.enclave_quote(report_data=filled))
    site.claims(SGX, {"quote": quote, "runtimeData": runtime})
    body = {"report": helpers.b64(site.snp(report_data=filled)), "runtimeData": runtime}
    assert "binding" in site.refused("/attest/SevSnpVm", body)[2]


def test_init_time_data_are_bound_to_the_launch(site: Any, helpers: Any) -> None:
    import hashlib

    data = b"policy of the container"
    digest = hashlib.sha256(data).digest()
    init = {"initTimeData": helpers.bound(data, "Binary")}
    td = site.machine.td_quote
    for path, good, bad in (
        (
            SGX,
            {"quote": helpers.b64(site.quote(config_id=digest + bytes(32)))},
            {"quote": helpers.b64(site.quote())},
        ),
        (
            "/attest/SevSnpVm",
            {"report": helpers.b64(site.snp(host_data=digest))},
            {"report": helpers.b64(site.snp())},
        ),
        (
            "/attest/TdxVm",
            {"quote": helpers.b64(td(mr_config_id=digest + bytes(16)))},
            {"quote": helpers.b64(td(mr_config_id=digest + b"\1" * 16))},
        ),
        (
            "/attest/TdxVm",
            {"quote": helpers.b64(td(mr_config_id=hashlib.sha384(data).digest()))},
            {"quote": helpers.b64(td())},
        ),
    ):
        site.claims(path, good | init)
        assert "binding.initTimeData" in site.refused(path, bad | init)[2]


# ---- the policy -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SgxEnclave", "TdxVm", "SevSnpVm"])
def test_debug_is_refused_by_the_default_policies(site: Any, helpers: Any, kind: str) -> None:
    from pyenclave.formats.sgx import Attributes

    if kind == "SgxEnclave":
        evidence = site.quote(attributes=Attributes(flags=0x07, xfrm=0xE7))
        body = {"quote": helpers.b64(evidence)}
    elif kind == "TdxVm":
        body = {"quote": helpers.b64(site.machine.td_quote(td_attributes=b"\1" + bytes(7)))}
    else:
        body = {"report": helpers.b64(site.snp(policy=0x30000 | 1 << 19))}
    status, code, message = site.refused(f"/attest/{kind}", body)
    assert (status, code) == (400, "PolicyEvaluationError")
    assert "does not permit" in message
    row = site.audit()[-1]
    assert row["rule"].endswith("no rule permits")
    assert row["evidence_digest"]
    assert any(name.endswith(("debuggable", "debug")) for name in row["claims"])


def test_an_attester_cannot_claim_what_the_hardware_says(site: Any, helpers: Any) -> None:
    # The runtime data of these tests name another signer.
    rule = '[type=="x-ms-sgx-mrsigner", value=="' + "00" * 32 + '"] => permit();'
    body = _sgx(site, helpers, draftPolicyForAttestation=DRAFT % rule)
    assert site.refused(SGX, body)[1] == "PolicyEvaluationError"
    rule = '[type=="colour", value=="green", issuer=="CustomClaim"] => permit();'
    body["draftPolicyForAttestation"] = DRAFT % rule
    assert site.post(SGX, body).status_code == 200


def test_a_draft_makes_a_token_that_nobody_accepts(site: Any, helpers: Any) -> None:
    from pyenclave.errors import EvidenceFormatError
    from pyenclave.formats import jose

    body = _sgx(site, helpers, draftPolicyForAttestation=DRAFT % "=> permit();")
    token = site.post(SGX, body).json()["token"]
    header, payload, signature = token.split(".")
    assert json.loads(jose.b64url_decode(header))["alg"] == "none"
    assert signature == ""
    said = json.loads(jose.b64url_decode(payload))
    assert said["team"] == "blue"
    assert said["x-pyenclave-draft"] is True
    assert said["x-pyenclave-trace"] == ["authorization 4:3 permit", "issuance 8:3 issue"]
    with pytest.raises(EvidenceFormatError, match="algorithm"):
        jose.Jws.from_bytes(token)
    assert site.audit()[-1]["details"]["draft"] is True


def test_a_draft_that_is_not_the_language_is_refused_with_its_place(
    site: Any, helpers: Any
) -> None:
    body = _sgx(site, helpers, draftPolicyForAttestation=DRAFT % "=> allow();")
    status, code, message = site.refused(SGX, body)
    assert (status, code) == (400, "PolicyParsingError")
    assert "line 4, column 6" in message


@pytest.mark.parametrize(
    "claim",
    [
        "x-ms-sgx-mrenclave",
        "iss",
        "exp",
        "nonce",
        "tdx_mrtd",
        "x-ms-runtime",
        "x-ms-isolation-tee",
        "x-pyenclave-nonce-verified",
        "sgx-mrsigner",
        "submods",
    ],
)
def test_a_policy_cannot_issue_what_only_the_service_can(
    site: Any, helpers: Any, claim: str
) -> None:
    text = (DRAFT % "=> permit();").replace('"team"', f'"{claim}"')
    body = _sgx(site, helpers, draftPolicyForAttestation=text)
    status, code, _ = site.refused(SGX, body)
    assert (status, code) == (400, "PolicyEvaluationError")


def test_a_policy_may_repeat_what_the_service_says(site: Any, helpers: Any) -> None:
    rules = "\n".join(
        f'c{n}:[type=="{name}"] => issue(type="{target}", value=c{n}.value);'
        for n, (name, target) in enumerate(
            (
                ("$sgx-mrsigner", "sgx-mrsigner"),
                ("$is-debuggable", "is-debuggable"),
                ("$svn", "svn"),
                ("$tee", "kind"),
                ("x-ms-sgx-mrenclave", "x-ms-sgx-mrenclave"),
            )
        )
    )
    text = f"version=1.0; authorizationrules {{ => permit(); }}; issuancerules {{ {rules} }};"
    token = site.post(SGX, _sgx(site, helpers, draftPolicyForAttestation=text)).json()["token"]
    said = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert said["kind"] == "sgx"
    assert said["x-ms-policy"] == {"kind": "sgx"}


def test_properties_of_a_policy_shape_the_token(site: Any, helpers: Any) -> None:
    text = (
        "version=1.0; authorizationrules { => permit(); }; issuancerules { "
        '=> issueproperty(type="report_validity_in_minutes", value=5); '
        '=> issue(type="group", value="a"); => issue(type="group", value="b"); };'
    )
    token = site.post(SGX, _sgx(site, helpers, draftPolicyForAttestation=text)).json()["token"]
    said = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert said["exp"] - said["iat"] == 300
    assert said["group"] == ["a", "b"]


# ---- the record -------------------------------------------------------------------------------


def test_every_decision_is_recorded(site: Any, helpers: Any) -> None:
    import hashlib

    runtime = b'{"secret-of-the-attester":"kept"}'
    before = len(site.audit())
    body = _sgx(site, helpers, runtime)
    answer = site.post(SGX, body)
    token = answer.json()["token"]
    rows = site.audit()[before:]
    assert len(rows) == 1
    (row,) = rows
    said = site.verified(token)
    quote = base64.urlsafe_b64decode(body["quote"] + "==")
    assert row["decision"] == "allowed"
    assert row["token_id"] == said["jti"]
    assert row["evidence_digest"] == hashlib.sha256(quote).hexdigest()
    assert row["rule"] == f"policy {said['x-ms-policy-hash']} authorization 4:3 permit"
    assert row["details"]["rules"] == ["authorization 4:3 permit"]
    assert row["request_id"] == answer.headers["x-ms-request-id"]
    assert row["claims"]["x-ms-sgx-mrenclave"] == said["x-ms-sgx-mrenclave"]
    text = json.dumps(row)
    assert "kept" not in text
    assert token not in text


def test_expired_collateral_refuses(make_site: Any, helpers: Any) -> None:
    from datetime import timedelta

    site = make_site()
    body = {"quote": helpers.b64(site.quote())}
    site.claims(SGX, body)
    site.clock.ahead = timedelta(days=40)
    status, code, message = site.refused(SGX, body)
    assert (status, code) == (400, "AttestationFailed")
    assert "tcb.validity" in message
