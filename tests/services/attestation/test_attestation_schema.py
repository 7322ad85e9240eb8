"""Requests made up from the service's own description: every answer is one that it describes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("sqlalchemy", reason="the extra 'services' is not installed")

from pyenclave.services.attestation.defaults import DEFAULT_POLICIES
from pyenclave.services.attestation.openapi import document
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.service import make_service
from pyenclave.services.attestation.tables import PART
from pyenclave.services.storage.database import Database
from pyenclave.services.web.kit import Service
from pyenclave.services.web.limits import Limits

DESCRIPTION = json.loads(document())
OPERATIONS = [(path, name) for path, methods in DESCRIPTION["paths"].items() for name in methods]
EXAMPLES = 40
SGX = "/attest/SgxEnclave"
POLICY = DEFAULT_POLICIES["SgxEnclave"]
ADMIN = {"authorization": "Bearer admin"}


def test_the_description_has_every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served is described, and nothing else is."""
    served: set[tuple[str, str]] = set()
    add = Service.route

    def note(self: Service, method: str, pattern: str, *args: Any, **options: Any) -> None:
        served.add((method.lower(), pattern))
        add(self, method, pattern, *args, **options)

    monkeypatch.setattr(Service, "route", note)
    with Database.open(parts=[PART]) as db:
        somebody: Any = object()
        make_service(db, Options(url="https://localhost:1"), authenticator=somebody)
    # The router knows whole segments only; `:reset` is told apart by the handler.
    described = {(name, path.removesuffix(":reset")) for path, name in OPERATIONS}
    assert served == described


def _unsigned(text: str) -> str:
    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    payload = json.dumps({"AttestationPolicy": encode(text.encode())}).encode()
    header = encode(json.dumps({"alg": "none"}).encode())
    return f"{header}.{encode(payload)}."


def _bodies(site: Any, helpers: Any) -> dict[str, Any]:
    """Return bodies that are served, by path: what is made up from a pattern hardly ever is."""
    runtime = b'{"a":1}'
    bound = {"runtimeData": helpers.bound(runtime), "nonce": "n"}
    return {
        SGX: {"quote": helpers.b64(site.quote(runtime)), **bound},
        "/attest/SevSnpVm": {"report": helpers.b64(site.snp(runtime)), **bound},
        "/policies/{type}": _unsigned(POLICY),
    }


def _checks(schemathesis: Any) -> list[Any]:
    named = ("status_code", "content_type", "response_schema", "response_headers")
    return [
        schemathesis.checks.not_a_server_error,
        *(schemathesis.checks.CHECKS.get_one(f"{name}_conformance") for name in named),
        schemathesis.checks.CHECKS.get_one("unsupported_method"),
    ]


def _sender(site: Any, operation: Any) -> Callable[..., Any]:
    schemathesis = pytest.importorskip("schemathesis")
    import requests  # comes with it

    def send(case: Any, **headers: str) -> Any:
        try:
            answer = case.call(base_url=site.url, verify=str(site.ca), headers={**ADMIN, **headers})
        except requests.exceptions.ConnectionError:
            # It is refused by its length, while the client still writes and cannot read that.
            assert 4 * len(repr(case.body)) > Limits().body
            return None
        declared = operation.definition.raw["responses"]
        # What is not built is said by a status of its own, which is no failure of the service.
        checks = _checks(schemathesis)
        if answer.status_code == 501 and "200" not in declared:
            checks = checks[1:]
        case.validate_response(answer, checks=checks)
        if answer.status_code not in (408, 413, 431):  # what the server says before a request
            assert answer.headers["x-ms-request-id"][0]
            assert answer.headers["x-content-type-options"] == ["nosniff"]
        return answer

    return send


@pytest.mark.long
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_described(site: Any, path: str, method: str) -> None:
    """Never a 500, always a described status, media type and form."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    operation = schemathesis.openapi.from_dict(DESCRIPTION)[path][method.upper()]
    strategy = operation.as_strategy()
    described = DESCRIPTION["paths"][path][method]
    if described.get("parameters") or "requestBody" in described:
        strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    send = _sender(site, operation)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(strategy)
    def run(case: object) -> None:
        send(case)

    run()


@pytest.mark.long
@pytest.mark.parametrize("path", ["/attest/SgxEnclave", "/attest/SevSnpVm", "/policies/{type}"])
def test_what_is_served_and_what_nearly_is_are_described(
    site: Any, helpers: Any, path: str
) -> None:
    """Bodies that get a token, with members exchanged, dropped and damaged."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    operation = schemathesis.openapi.from_dict(DESCRIPTION)[path][
        "PUT" if path.startswith("/policies") else "POST"
    ]
    send = _sender(site, operation)
    good = _bodies(site, helpers)[path]
    query = {"api-version": "2025-06-01"}
    seen: set[int] = set()
    parameters = {"type": "SgxEnclave"} if "{type}" in path else {}

    def case_of(body: Any, **more: str) -> Any:
        text = isinstance(body, str)
        return operation.Case(
            body=body,
            media_type="text/plain" if text else "application/json",
            query={**query, **more},
            path_parameters=parameters,
        )

    junk = st.none() | st.booleans() | st.integers() | st.text(max_size=40) | st.lists(st.text())

    @settings(max_examples=4 * EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        body: Any
        if isinstance(good, str):
            text, put = good, st.text("AZaz09-_.", max_size=3)
            if inside := data.draw(st.booleans()):
                text, put = POLICY, st.sampled_from([" ", "\n", "//\0\n", "/*", '"', "=>", "é"])
            at = data.draw(st.integers(0, len(text) - 1))
            body = text[:at] + data.draw(put) + text[at + data.draw(st.integers(0, 1)) :]
            body = _unsigned(body) if inside else body
        else:
            body = json.loads(json.dumps(good))
            name = data.draw(st.sampled_from([*body, "draftPolicyForAttestation", "initTimeData"]))
            how = data.draw(st.sampled_from(["keep", "drop", "junk", "damage"]))
            if how == "drop":
                body.pop(name, None)
            elif how == "junk":
                body[name] = data.draw(junk)
            elif how == "damage" and isinstance(body.get(name), str):
                at = data.draw(st.integers(0, len(body[name]) - 1))
                body[name] = body[name][:at] + "A" + body[name][at + 1 :]
        more = {"format": "ear"} if "attest" in path and data.draw(st.booleans()) else {}
        accept = data.draw(st.sampled_from(["*/*", "application/eat+jwt", "application/json"]))
        seen.add(send(case_of(body, **more), accept=accept).status_code)

    assert send(case_of(good)).status_code == 200
    run()
    assert {200, 400} <= seen
