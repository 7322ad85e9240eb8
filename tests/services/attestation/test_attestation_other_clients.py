"""What clients other than Microsoft's for Python put on the wire."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

RUNTIME = (
    b'{"keys":[{"e":"AQAB","key_ops":["encrypt"],"kid":"Nvhfuq2cCIOAB8XR4Xi9Pr0NP_9CeMzWQGtW_HALz_w",'
    b'"kty":"RSA","n":"rAy0OVXFPdP7"}]}'
)


def padded(data: bytes) -> str:
    """Go's `base64.URLEncoding`."""
    return base64.urlsafe_b64encode(data).decode()


def sidecar(site: Any, **changes: Any) -> dict[str, Any]:
    """The body that Microsoft's confidential sidecar sends: every member of its Go structure."""
    found = json.loads(site.snp(RUNTIME))
    inner = {name: padded(base64.urlsafe_b64decode(text + "==")) for name, text in found.items()}
    return {
        "report": padded(json.dumps(inner).encode()),
        "runtimeData": {"data": padded(RUNTIME), "dataType": "JSON"},
        "initTimeData": {"data": "", "dataType": ""},
        "nonce": 17_446_744_073_709_551_615,
        **changes,
    }


@pytest.mark.parametrize(
    "version", ["2020-10-01", "2022-08-01", "2023-04-01-preview", "2025-06-01"]
)
def test_the_sidecars_request_is_attested(site: Any, version: str) -> None:
    """Padding, a number as nonce, and empty init-time data where there are none."""
    query = {"api-version": version}
    claims = site.claims("/attest/SevSnpVm", sidecar(site), query=query)
    assert claims["x-ms-runtime"] == json.loads(RUNTIME)
    assert claims["nonce"] == "17446744073709551615"
    assert "x-ms-inittime" not in claims


@pytest.mark.parametrize(
    "changes",
    [
        {"runtimeData": {"data": "", "dataType": ""}},
        {"initTimeData": {"data": "", "dataType": "", "x": 1}},
        {"initTimeData": {"data": "AAAA", "dataType": ""}},
        {"initTimeData": {"data": ""}},
    ],
)
def test_only_init_time_data_that_are_wholly_empty_are_none(
    site: Any, changes: dict[str, Any]
) -> None:
    """Runtime data bind the report to something: without them it is never by oversight."""
    assert site.refused("/attest/SevSnpVm", sidecar(site, **changes))[0] == 400


def respelt(value: Any, spell: Any) -> Any:
    """*value* with every name of a member, and the kind of data, in another case."""
    if isinstance(value, dict):
        return {
            spell(name): spell(item) if name == "dataType" else respelt(item, spell)
            for name, item in value.items()
        }
    return value


@pytest.mark.parametrize("spell", [str.lower, str.upper, lambda name: name[:1].upper() + name[1:]])
def test_members_are_read_in_any_case_and_bind_all_the_same(site: Any, spell: Any) -> None:
    """As Azure reads them; runtime data by another spelling are no less checked."""
    body = sidecar(site)
    del body["initTimeData"]
    assert site.claims("/attest/SevSnpVm", respelt(body, spell))["x-ms-runtime"]["keys"]
    other = body | {"runtimeData": {"data": padded(b'{"keys":[]}'), "dataType": "JSON"}}
    _, code, message = site.refused("/attest/SevSnpVm", respelt(other, spell))
    assert (code, "binding.runtimeData" in message) == ("AttestationFailed", True)


@pytest.mark.parametrize(
    "twice",
    [
        {"RuntimeData": None},
        {"REPORT": "AAAA"},
        {"runtimeData": {"data": "AAAA", "Data": "AAAB", "dataType": "JSON"}},
        {"runtimeData": {"data": "AAAA", "dataType": "JSON", "datatype": "Binary"}},
        {"nonce\u212a": "K"},
    ],
)
def test_two_spellings_of_one_member_are_refused(site: Any, twice: dict[str, Any]) -> None:
    """Two readers could take each another one."""
    assert site.refused("/attest/SevSnpVm", sidecar(site) | twice)[:2] == (400, "InvalidParameter")


def test_the_preview_that_tdx_machines_ask_by_signs_as_the_oldest(site: Any, helpers: Any) -> None:
    """Their tools know RS256 only."""
    quote = site.machine.td_quote(report_data=helpers.digest64(RUNTIME))
    body = {"quote": helpers.b64(quote), "runtimeData": helpers.bound(RUNTIME)}
    query = {"api-version": "2023-04-01-preview"}
    token = site.post("/attest/TdxVm", body, query=query).json()["token"]
    header = json.loads(base64.urlsafe_b64decode(token.split(".")[0] + "=="))
    assert header["alg"] == "RS256"
    assert site.verified(token)["x-ms-attestation-type"] == "tdxvm"
