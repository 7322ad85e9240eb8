"""Requests made up from the vault's own description: every answer is one that it describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from vault_parts import Running, running_vault

from pyenclave.services.vault.openapi import document
from pyenclave.services.web.kit import Service
from pyenclave.services.web.limits import Limits

DESCRIPTION = json.loads(document())
EXAMPLES = 40


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("schema")
    limits = Limits(refusals=None, rate=None)
    with running_vault(folder, limits=limits) as running:
        for name, kty in (("e", "EC"), ("s", "oct")):
            running.request("POST", f"/keys/{name}/create", {"kty": kty})
        yield running


def test_the_description_has_every_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served is described, and nothing else is."""
    served: set[tuple[str, str]] = set()
    add = Service.route

    def note(self: Service, method: str, pattern: str, *args: Any, **options: Any) -> None:
        served.add((method.lower(), pattern))
        add(self, method, pattern, *args, **options)

    monkeypatch.setattr(Service, "route", note)
    with running_vault(tmp_path):
        pass
    described = {
        (method, path) for path, methods in DESCRIPTION["paths"].items() for method in methods
    }
    assert served == described


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "method"),
    [(path, method) for path, methods in DESCRIPTION["paths"].items() for method in methods],
)
def test_every_answer_is_described(vault: Running, path: str, method: str) -> None:
    """Never a 500, always a described status, media type and form."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schema = schemathesis.openapi.from_dict(DESCRIPTION)
    operation = schema[path][method.upper()]
    strategy = operation.as_strategy() | operation.as_strategy(
        generation_mode=schemathesis.GenerationMode.NEGATIVE
    )

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(strategy)
    def send(case: object) -> None:
        answer = case.call(  # type: ignore[attr-defined]
            base_url=vault.url,
            verify=vault.ca,
            headers={"authorization": "Bearer admin"},
        )
        case.validate_response(  # type: ignore[attr-defined]
            answer,
            checks=[
                schemathesis.checks.not_a_server_error,
                schemathesis.checks.CHECKS.get_one("status_code_conformance"),
                schemathesis.checks.CHECKS.get_one("content_type_conformance"),
                schemathesis.checks.CHECKS.get_one("response_schema_conformance"),
            ],
        )

    send()
