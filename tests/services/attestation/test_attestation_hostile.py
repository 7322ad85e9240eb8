"""No input breaks what reads it: only errors of this package leave."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("sqlalchemy", reason="the extra 'services' is not installed")

from pyenclave.errors import EnclaveError
from pyenclave.formats import jose
from pyenclave.services.attestation.encoding import decode
from pyenclave.services.attestation.requests import ATTESTATION_TYPES, read_request
from pyenclave.services.attestation.uploads import certificate_of, policy_of, read_upload
from pyenclave.services.attestation.verification import prepare

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=8,
)
_MEMBERS = st.sampled_from(
    [
        *("quote", "report", "evidence", "attestationInfo", "runtimeData", "initTimeData"),
        *("nonce", "draftPolicyForAttestation", "data", "dataType"),
    ]
)
_QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _read(kind: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(EnclaveError):
        prepare(read_request(kind, body))


@_QUICK
@given(
    kind=st.sampled_from(sorted(ATTESTATION_TYPES)),
    body=st.dictionaries(_MEMBERS | st.text(max_size=8), _JSON, max_size=4),
)
def test_no_body_breaks_the_reader(kind: str, body: dict[str, Any]) -> None:
    _read(kind, body)


@_QUICK
@given(kind=st.sampled_from(sorted(ATTESTATION_TYPES)), data=st.binary(max_size=600))
def test_no_evidence_breaks_the_reader(kind: str, data: bytes) -> None:
    _read(kind, {ATTESTATION_TYPES[kind]: base64.b64encode(data).decode()})


@_QUICK
@given(found=st.dictionaries(st.sampled_from(["SnpReport", "VcekCertChain", "x"]), _JSON))
def test_no_proof_breaks_the_reader(found: dict[str, Any]) -> None:
    _read("SevSnpVm", {"report": jose.b64url_encode(json.dumps(found).encode())})


_INFO = st.sampled_from(
    ["AttestationProtocolVersion", "ClientPayload", "IsolationInfo", "TpmInfo", "TcgLogs", "OSType"]
)


@_QUICK
@given(found=st.dictionaries(_INFO, _JSON), evidence=st.dictionaries(st.text(max_size=8), _JSON))
def test_no_guest_breaks_the_reader(found: dict[str, Any], evidence: dict[str, Any]) -> None:
    whole = {
        "AttestationProtocolVersion": "2.0",
        "IsolationInfo": {"Type": "SevSnp", "Evidence": evidence},
    } | found
    _read("AzureGuest", {"attestationInfo": jose.b64url_encode(json.dumps(whole).encode())})


@_QUICK
@given(header=_JSON, payload=_JSON, signature=st.binary(max_size=70), raw=st.binary(max_size=80))
def test_no_upload_breaks_the_reader(
    header: Any, payload: Any, signature: bytes, raw: bytes
) -> None:
    parts = [json.dumps(header).encode(), json.dumps(payload).encode(), signature]
    for text in (raw, ".".join(jose.b64url_encode(part) for part in parts).encode()):
        with contextlib.suppress(EnclaveError):
            upload = read_upload(text)
            with contextlib.suppress(EnclaveError):
                policy_of(upload)
            certificate_of(upload)


@given(data=st.binary(max_size=60))
def test_every_spelling_of_bytes_is_the_same_bytes(data: bytes) -> None:
    padded = base64.b64encode(data).decode()
    for text in (padded, padded.rstrip("="), base64.urlsafe_b64encode(data).decode()):
        assert decode(text, "data", limit=60) == data


@given(text=st.text(alphabet="ABab01+/-_= \n", max_size=12))
def test_what_is_decoded_has_one_spelling_an_alphabet(text: str) -> None:
    with contextlib.suppress(EnclaveError):
        data = decode(text, "data", limit=60)
        bare = text.rstrip("=").replace("+", "-").replace("/", "_")
        assert bare == jose.b64url_encode(data)
