"""The tests that such a service has: ``pytest test_app.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from app import app
from fastapi.testclient import TestClient


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def test_an_applicant_is_scored(client: TestClient) -> None:
    answer = client.post("/score", json={"income": 4000, "debt": 1000})
    assert answer.status_code == 200
    assert answer.json()["score"] == pytest.approx(0.7311, abs=1e-4)


def test_what_cannot_be_scored_is_said(client: TestClient) -> None:
    answer = client.post("/score", json={"income": 0, "debt": 1000})
    assert answer.status_code == 422
    assert "income must be above 0" in answer.json()["error"]


def test_metrics_count_calls(client: TestClient) -> None:
    assert "pyenclave_calls_total" in client.get("/metrics").text


def test_health(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
