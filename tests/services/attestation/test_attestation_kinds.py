"""What the tokens of each type say, and results in the form of EAR."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from issuer_pyenclave import Issuer

from pyenclave.attestation import AppraisalPolicy
from pyenclave.attestation.azure_render import attestation_policy, release_policy

RUNTIME = b'{"keys":[{"kid":"transfer","kty":"RSA","n":"AQAB","e":"AQAB"}]}'
COMMON = {"iss", "iat", "nbf", "exp", "jti", "x-ms-ver", "x-ms-attestation-type"} | {
    "x-ms-policy-hash"
}
ID_KEY = bytes.fromhex(
    "0356215882a825279a85b300b0b742931d113bf7e32dde2e50ffde7ec743ca49"
    "1ecdd7f336dc28a6e0b2bb57af7a44a3"
)


def _sgx(site: Any, helpers: Any, **fields: Any) -> dict[str, Any]:
    quote = site.quote(RUNTIME, **fields)
    body = {"quote": helpers.b64(quote), "runtimeData": helpers.bound(RUNTIME)}
    found: dict[str, Any] = site.claims("/attest/SgxEnclave", body)
    assert found["x-ms-sgx-collateral"]["quotehash"] == hashlib.sha256(quote).hexdigest()
    return found


def test_an_enclaves_token(site: Any, helpers: Any) -> None:
    found = _sgx(site, helpers, isv_prod_id=9, isv_svn=4)
    assert found.keys() >= COMMON
    assert found["x-ms-ver"] == found["ver"] == "1.0"
    assert found["x-ms-attestation-type"] == found["tee"] == "sgx"
    assert found["x-ms-sgx-product-id"] == found["product-id"] == 9
    assert found["x-ms-sgx-svn"] == found["svn"] == 4
    assert found["x-ms-sgx-mrenclave"] == found["sgx-mrenclave"] == bytes(range(32)).hex()
    assert found["x-ms-sgx-mrsigner"] == found["sgx-mrsigner"] == bytes(range(32, 64)).hex()
    assert found["x-ms-sgx-is-debuggable"] is found["is-debuggable"] is False
    assert found["policy_hash"] == found["maa-policyHash"] == found["x-ms-policy-hash"]
    assert found["x-ms-runtime"] == json.loads(RUNTIME)
    assert found["x-pyenclave-tcb-status"] == "UpToDate"
    assert found["exp"] - found["iat"] == 1440 * 60
    assert len(found["jti"]) == 64
    assert "x-ms-sgx-config-id" not in found
    assert found["x-ms-sgx-collateral"].keys() == {
        "qeidcertshash",
        "qeidcrlhash",
        "qeidhash",
        "quotehash",
        "tcbinfocertshash",
        "tcbinfocrlhash",
        "tcbinfohash",
    }


def test_key_separation_has_claims_where_the_enclave_has_it(site: Any, helpers: Any) -> None:
    from pyenclave.formats.sgx import Attributes

    found = _sgx(
        site,
        helpers,
        attributes=Attributes(flags=0x85, xfrm=0xE7),
        config_id=b"\x11" * 64,
        config_svn=5,
        isv_family_id=b"\x22" * 16,
        isv_ext_prod_id=b"\x33" * 16,
    )
    assert found["x-ms-sgx-config-id"] == "11" * 64
    assert found["x-ms-sgx-config-svn"] == 5
    assert found["x-ms-sgx-isv-family-id"] == "22" * 16
    assert found["x-ms-sgx-isv-extended-product-id"] == "33" * 16


def test_data_that_are_no_json_are_held_data(site: Any, helpers: Any) -> None:
    data = b"\0binary"
    body = {"quote": helpers.b64(site.quote(data)), "runtimeData": helpers.bound(data, "Binary")}
    found = site.claims("/attest/SgxEnclave", body)
    assert found["x-ms-sgx-ehd"] == found["maa-ehd"] == found["aas-ehd"] == helpers.b64(data)
    assert "x-ms-runtime" not in found


def test_a_vms_token_on_amd(site: Any, helpers: Any) -> None:
    host = hashlib.sha256(b"init").digest()
    body = {
        "report": helpers.b64(site.snp(RUNTIME, host_data=host, id_key_digest=ID_KEY, guest_svn=2)),
        "runtimeData": helpers.bound(RUNTIME),
        "initTimeData": helpers.bound(b"init", "Binary"),
        "nonce": 18446744073709551615,
    }
    found = site.claims("/attest/SevSnpVm", body)
    assert found["x-ms-attestation-type"] == "sevsnpvm"
    assert found["nonce"] == "18446744073709551615"
    assert found["x-ms-compliance-status"] == "azure-compliant-cvm"
    prefix = "x-ms-sevsnpvm-"
    values = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    assert values["hostdata"] == host.hex()
    assert values["reportdata"] == helpers.digest64(RUNTIME).hex()
    assert values["launchmeasurement"] == bytes(range(48)).hex()
    assert values["guestsvn"] == 2
    assert values["vmpl"] == 0
    assert (values["is-debuggable"], values["migration-allowed"]) == (False, False)
    assert values.keys() >= {
        "authorkeydigest",
        "bootloader-svn",
        "familyId",
        "idkeydigest",
        "imageId",
        "microcode-svn",
        "reportid",
        "smt-allowed",
        "snpfw-svn",
        "tee-svn",
    }
    # Anybody can launch firmware of his own on genuine hardware.
    other = {"report": helpers.b64(site.snp())}
    assert "x-ms-compliance-status" not in site.claims("/attest/SevSnpVm", other)


def test_a_vms_token_on_intel(site: Any, helpers: Any) -> None:
    quote = site.machine.td_quote(report_data=helpers.digest64(RUNTIME), rtmr2=b"\2" * 48)
    body = {"quote": helpers.b64(quote), "runtimeData": helpers.bound(RUNTIME)}
    found = site.claims("/attest/TdxVm", body)
    assert found["x-ms-attestation-type"] == "tdxvm"
    assert found["attester_tcb_status"] == "UpToDate"
    assert found["tdx_mrtd"] == bytes(range(48)).hex()
    assert found["tdx_rtmr2"] == "02" * 48
    assert found["tdx_report_data"] == helpers.digest64(RUNTIME).hex()
    assert found["tdx_td_attributes_septve_disable"] is True
    assert (found["dbgstat"], found["intuse"]) == ("disabled", "generic")
    assert found["eat_profile"] == "https://aka.ms/maa-eat-profile-tdxvm"
    assert found.keys() >= COMMON


# ---- our own ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def enclave(make_site: Any) -> tuple[Any, Issuer]:
    from cryptography.hazmat.primitives.serialization import Encoding

    issuer = Issuer()
    root = issuer.root.public_bytes(Encoding.PEM)
    return make_site(at=Issuer.AT, roots=(root,)), issuer


def _ours(issuer: Issuer, runtime: bytes, helpers: Any, **changes: Any) -> dict[str, Any]:
    body = {"report_data": helpers.digest64(runtime)} | changes.pop("body", {})
    evidence = issuer.evidence(raw=True, body=body, **changes)
    return {"evidence": helpers.b64(evidence), "runtimeData": helpers.bound(runtime)}


def test_software_gets_no_token_by_the_default_policy_of_production(
    make_site: Any, enclave: Any, helpers: Any
) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    issuer = enclave[1]
    root = issuer.root.public_bytes(Encoding.PEM)
    site = make_site(at=Issuer.AT, roots=(root,), like=enclave[0], dangerous_allow_software=False)
    body = _ours(issuer, RUNTIME, helpers)
    assert site.refused("/attest/PyEnclave", body)[1] == "PolicyEvaluationError"
    assert site.audit()[-1]["claims"]["x-pyenclave-tee"] == "none"


def test_our_own_enclaves_token(enclave: Any, helpers: Any) -> None:
    site, issuer = enclave
    found = site.claims("/attest/PyEnclave", _ours(issuer, RUNTIME, helpers))
    assert found["x-ms-attestation-type"] == "pyenclave"
    assert found["x-ms-sgx-mrenclave"] == "11" * 32
    assert found["x-ms-sgx-mrsigner"] == "22" * 32
    assert (found["x-ms-sgx-product-id"], found["x-ms-sgx-svn"]) == (7, 3)
    assert found["x-ms-sgx-is-debuggable"] is False
    assert (found["x-pyenclave-level"], found["x-pyenclave-tee"]) == ("embedded", "none")
    assert found["x-ms-runtime"] == json.loads(RUNTIME)
    assert "tee" not in found


@pytest.mark.parametrize("fault", ["debug", "runtime", "second half", "root", "not raw"])
def test_our_own_evidence_with_a_fault_is_refused(enclave: Any, helpers: Any, fault: str) -> None:
    site, issuer = enclave
    body = _ours(issuer, RUNTIME, helpers)
    wanted = "AttestationFailed"
    if fault == "debug":
        body = _ours(issuer, RUNTIME, helpers, debug=True)
        wanted = "PolicyEvaluationError"
    elif fault == "runtime":
        body["runtimeData"] = helpers.bound(b"{}")
    elif fault == "second half":
        data = hashlib.sha256(RUNTIME).digest() + b"\1" * 32
        body = _ours(issuer, RUNTIME, helpers, body={"report_data": data})
    elif fault == "root":
        key = Issuer.key("another root")
        chain = issuer.chain(root={"key": key, "signer": key}, intermediate={"signer": key})
        body = _ours(issuer, RUNTIME, helpers, chain=chain)
    else:
        body["evidence"] = helpers.b64(issuer.evidence())
    assert site.refused("/attest/PyEnclave", body)[1] == wanted


def test_evidence_that_binds_its_own_nonce_needs_no_runtime_data(
    enclave: Any, helpers: Any
) -> None:
    site, issuer = enclave
    nonce = site.client.post("/nonces").json()["nonce"]
    body = {"evidence": helpers.b64(issuer.evidence(nonce=nonce.encode())), "nonce": nonce}
    assert site.claims("/attest/PyEnclave", body)["x-pyenclave-nonce-verified"] is True
    other = site.client.post("/nonces").json()["nonce"]
    body = {"evidence": helpers.b64(issuer.evidence(nonce=nonce.encode())), "nonce": other}
    assert "binding.nonce" in site.refused("/attest/PyEnclave", body)[2]


@pytest.fixture(scope="module")
def vouched(make_site: Any) -> tuple[Any, Issuer]:
    """A service that knows a platform's root and the vendors of the machines below it."""
    from cryptography.hazmat.primitives.serialization import Encoding

    issuer = Issuer()
    return make_site(at=Issuer.AT, roots=(issuer.root.public_bytes(Encoding.PEM),)), issuer


def _below(site: Any, issuer: Issuer, helpers: Any, tee: str, **fields: Any) -> dict[str, Any]:
    """Return a request with evidence of an enclave on a confidential VM."""
    from dataclasses import replace

    from cryptography.hazmat.primitives.serialization import Encoding

    from pyenclave.formats.machine import MachineEvidence, machine_report_data

    data = machine_report_data(
        root=issuer.root.public_bytes(Encoding.DER),
        attestation_key=issuer.raw_public(issuer.key("attestation")),
    )
    if tee == "sev-snp":
        files = {n: d for n, d in site.chip.endorsements().items() if n != "crl.der"}
        machine = MachineEvidence(
            evidence=site.chip.report(report_data=data, **fields), files=files
        )
    else:
        machine = MachineEvidence(evidence=site.machine.td_quote(report_data=data, **fields))
    parts = issuer.parts(
        raw=True, record={"tee": tee}, body={"report_data": helpers.digest64(RUNTIME)}
    )
    whole = replace(parts, machine=machine.to_bytes())
    return {"evidence": helpers.b64(whole.to_bytes()), "runtimeData": helpers.bound(RUNTIME)}


@pytest.mark.parametrize("tee", ["sev-snp", "tdx"])
def test_an_enclave_on_a_confidential_vm_has_the_machines_claims(
    vouched: Any, helpers: Any, tee: str
) -> None:
    site, issuer = vouched
    found = site.claims("/attest/PyEnclave", _below(site, issuer, helpers, tee))
    assert found["x-pyenclave-tee"] == tee
    assert found["x-ms-sgx-is-debuggable"] is False
    inner = found["x-ms-isolation-tee"]
    if tee == "sev-snp":
        assert inner["x-ms-sevsnpvm-launchmeasurement"] == bytes(range(48)).hex()
    else:
        # The machine sent no collateral: it is the service's.
        assert inner["attester_tcb_status"] == "UpToDate"


def test_a_debug_machine_makes_a_debug_enclave(vouched: Any, helpers: Any) -> None:
    site, issuer = vouched
    body = _below(site, issuer, helpers, "sev-snp", policy=0x30000 | 1 << 19)
    assert site.refused("/attest/PyEnclave", body)[1] == "PolicyEvaluationError"
    text = "version=1.0; authorizationrules { => permit(); }; issuancerules { };"
    token = site.post("/attest/PyEnclave", body | {"draftPolicyForAttestation": text}).json()
    said = json.loads(base64.urlsafe_b64decode(token["token"].split(".")[1] + "=="))
    assert said["x-ms-sgx-is-debuggable"] is True


def test_a_machine_that_may_migrate_is_refused(vouched: Any, helpers: Any) -> None:
    site, issuer = vouched
    body = _below(site, issuer, helpers, "sev-snp", policy=0x30000 | 1 << 18)
    assert site.refused("/attest/PyEnclave", body)[1] == "PolicyEvaluationError"


def test_our_vault_client_attests(enclave: Any, helpers: Any) -> None:
    from pyenclave.vault_client import AttestationClient

    site, issuer = enclave
    body = {"report_data": helpers.digest64(RUNTIME)}
    evidence = issuer.evidence(raw=True, body=body)
    port = site.client.base_url.port
    with AttestationClient(f"https://localhost:{port}", ca=str(site.ca)) as client:
        token = client.attest("PyEnclave", evidence, runtime_data=RUNTIME, nonce="n")
    assert site.verified(token)["nonce"] == "n"


# ---- policies of this package -----------------------------------------------------------------


def test_policies_that_the_package_writes_hold_here(site: Any, helpers: Any) -> None:
    policy = AppraisalPolicy(mrenclave=bytes(range(32)))
    body = {
        "quote": helpers.b64(site.quote()),
        "draftPolicyForAttestation": attestation_policy(policy, tee="sgx"),
    }
    assert site.post("/attest/SgxEnclave", body).status_code == 200
    other = AppraisalPolicy(mrenclave=bytes(range(1, 33)))
    body["draftPolicyForAttestation"] = attestation_policy(other, tee="sgx")
    assert site.refused("/attest/SgxEnclave", body)[1] == "PolicyEvaluationError"


def test_release_policies_that_the_package_writes_meet_the_token(site: Any, helpers: Any) -> None:
    policy = AppraisalPolicy(mrenclave=bytes(range(32)))
    found = site.claims("/attest/SgxEnclave", {"quote": helpers.b64(site.quote())})
    written = release_policy(policy, tee="sgx", authority="https://attest.example")
    assert written.evaluate("https://attest.example", found).released
    other = site.quote(mrenclave=b"\7" * 32)
    found = site.claims("/attest/SgxEnclave", {"quote": helpers.b64(other)})
    assert not written.evaluate("https://attest.example", found).released


# ---- EAR --------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["accept", "query"])
def test_a_result_may_be_an_ear(site: Any, helpers: Any, asked: str) -> None:
    from pyenclave.formats import ear

    body = {
        "quote": helpers.b64(site.quote(RUNTIME)),
        "runtimeData": helpers.bound(RUNTIME),
        "nonce": "0123456789",
    }
    if asked == "accept":
        answer = site.post("/attest/SgxEnclave", body, headers={"accept": "application/eat+jwt"})
        assert answer.headers["content-type"] == "application/eat+jwt"
        token = answer.text
    else:
        token = site.post("/attest/SgxEnclave", body, query={"format": "ear"}).json()["token"]
    found = site.verified(token)
    (appraisal,) = ear.appraisals_of(found).values()
    assert appraisal.status == "affirming"
    assert appraisal.vector["hardware"] == 2
    assert found["eat_nonce"] == "0123456789"
    submod = found["submods"]["cpu0"]
    assert submod["x-ms-runtime"] == json.loads(RUNTIME)
    assert submod["ear.veraison.annotated-evidence"]["x-ms-sgx-svn"] == 0


def test_an_ear_is_written_as_the_draft_has_it_where_that_is_set(
    make_site: Any, site: Any, helpers: Any
) -> None:
    from pyenclave.formats import ear

    other = make_site(like=site, ear_form="underscored")
    body = {"quote": helpers.b64(site.quote())}
    found = other.verified(
        other.post("/attest/SgxEnclave", body, query={"format": "ear"}).json()["token"]
    )
    assert found["eat_profile"] == "tag:ietf.org,2026:rats/ear#03"
    assert found["submods"]["cpu0"]["ear_status"] == "affirming"
    assert not any(name.startswith("ear.") for name in found)
    (appraisal,) = ear.appraisals_of(found).values()
    assert appraisal.vector["hardware"] == 2


def test_our_verifier_reads_the_ear(site: Any, helpers: Any) -> None:
    from pyenclave.attestation import appraise

    body = {"quote": helpers.b64(site.quote())}
    token = site.post("/attest/SgxEnclave", body, query={"format": "ear"}).json()["token"]
    result = appraise(
        token.encode(),
        policy=AppraisalPolicy.any_code(),
        freshness="not_checked",
        endorsements={"jwks.json": site.client.get("/certs").content},
    )
    assert result.kind == "attestation-result-jwt"
    assert result.accepted, result.refused_by


def test_a_draft_is_no_ear(site: Any, helpers: Any) -> None:
    body = {"quote": helpers.b64(site.quote()), "draftPolicyForAttestation": "version=1.0;"}
    assert site.refused("/attest/SgxEnclave", body, query={"format": "ear"})[0] == 400
    body = {"quote": helpers.b64(site.quote())}
    assert site.refused("/attest/SgxEnclave", body, query={"format": "xml"})[0] == 400


# ---- what else there is -----------------------------------------------------------------------


def test_baselines_are_those_of_the_collateral(site: Any) -> None:
    query = {"api-version": "2025-06-01"}
    for kind in ("SgxEnclave", "OpenEnclave", "TdxVm"):
        found = site.client.get(f"/tcbbaselines/{kind}", params=query).json()["tcbBaselines"]
        assert [item["tcbEvaluationDataNumber"] for item in found] == [17]
    assert site.client.get("/tcbbaselines/SevSnpVm", params=query).status_code == 400


def test_the_key_set_has_public_keys_with_certificates(site: Any) -> None:
    from cryptography import x509

    answer = site.client.get("/certs")
    assert "max-age" in answer.headers["cache-control"]
    for key in answer.json()["keys"]:
        assert not set(key) & {"d", "p", "q", "dp", "dq", "qi", "k"}
        certificate = x509.load_der_x509_certificate(base64.b64decode(key["x5c"][0]))
        certificate.verify_directly_issued_by(certificate)
    assert site.client.post("/revoke").status_code == 501
