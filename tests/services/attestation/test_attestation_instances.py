"""What instances share: nonces, policies and keys; and how keys are replaced."""

from __future__ import annotations

import concurrent.futures
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'services' is not installed")

from pyenclave.errors import EvidenceFormatError, UnsealError
from pyenclave.services.attestation.keys import Schedule
from pyenclave.services.attestation.nonces import PREFIX, Nonces
from pyenclave.services.storage.secrets import Secrets

SGX = "/attest/SgxEnclave"
NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def pair(
    request: pytest.FixtureRequest, make_site: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Two instances on one database, under one name."""
    folder: Path = tmp_path_factory.mktemp("shared")
    if request.param == "sqlite":
        url = f"sqlite:///{folder / 'db'}"
    else:
        pytest.importorskip("psycopg", reason="the extra 'postgres' is not installed")
        url = request.getfixturevalue("postgres").fresh()
    secrets = Secrets(folder / "secrets")
    name = "https://attestation.example"
    first = make_site(database=url, secrets=secrets, url=name)
    return first, make_site(database=url, secrets=secrets, url=name, like=first)


def _nonce(site: Any) -> str:
    answer = site.client.post("/nonces")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["nonce"])


def _body(site: Any, helpers: Any, nonce: str, said: str | None = None) -> dict[str, Any]:
    runtime = b'{"keys":[],"nonce":"' + (nonce if said is None else said).encode() + b'"}'
    quote = helpers.b64(site.quote(runtime))
    return {"quote": quote, "runtimeData": helpers.bound(runtime), "nonce": nonce}


# ---- nonces -----------------------------------------------------------------------------------


def test_a_nonce_is_taken_once(site: Any, helpers: Any) -> None:
    nonce = _nonce(site)
    body = _body(site, helpers, nonce)
    said = site.claims(SGX, body)
    assert said["nonce"] == nonce
    assert said["x-pyenclave-nonce-verified"] is True
    status, code, _ = site.refused(SGX, body)
    assert (status, code) == (400, "InvalidNonce")
    row = site.audit()[-1]
    assert (row["decision"], row["condition"]) == ("refused", "the nonce was used before")


def test_a_nonce_that_the_evidence_does_not_bind_is_refused(site: Any, helpers: Any) -> None:
    nonce = _nonce(site)
    for body in (
        {"quote": helpers.b64(site.quote()), "nonce": nonce},
        _body(site, helpers, nonce, "another"),
        _body(site, helpers, nonce) | {"runtimeData": helpers.bound(b"{}")},
    ):
        assert site.refused(SGX, body)[1] == "AttestationFailed"
    # An attempt used it up.
    assert site.refused(SGX, _body(site, helpers, nonce))[1] == "InvalidNonce"


def test_a_nonce_of_ones_own_is_repeated_and_verifies_nothing(site: Any, helpers: Any) -> None:
    body = _body(site, helpers, "my own")
    for _ in range(2):
        said = site.claims(SGX, body)
        assert said["nonce"] == "my own"
        assert "x-pyenclave-nonce-verified" not in said


@pytest.mark.parametrize("fault", ["forged", "cut", "expired", "another form"])
def test_what_only_looks_like_a_nonce_of_the_service_is_refused(
    site: Any, helpers: Any, fault: str
) -> None:
    nonce = _nonce(site)
    if fault == "forged":
        nonce = nonce[:-2] + ("AA" if nonce[-2:] != "AA" else "BA")
    elif fault == "cut":
        nonce = nonce[:-4]
    elif fault == "another form":
        nonce = PREFIX + "!" * 40
    ahead = site.clock.ahead
    try:
        if fault == "expired":
            site.clock.ahead = timedelta(seconds=301)
        assert site.refused(SGX, _body(site, helpers, nonce))[1] == "InvalidParameter"
    finally:
        site.clock.ahead = ahead


def test_nonces_are_single_use_across_instances(pair: Any, helpers: Any) -> None:
    first, second = pair
    for _ in range(3):
        nonce = _nonce(first)
        body = _body(first, helpers, nonce)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            sites = [first, second] * 4
            answers = list(pool.map(lambda site, body=body: site.post(SGX, body), sites))
        assert sorted(answer.status_code for answer in answers) == [200] + [400] * 7
        codes = {a.json()["error"]["code"] for a in answers if a.status_code == 400}
        assert codes == {"InvalidNonce"}


def test_nonces_of_another_secret_are_refused() -> None:
    text, expires = Nonces(bytes(32), 60).make(NOW)
    assert expires == NOW + timedelta(seconds=60)
    assert Nonces(bytes(32), 60).read(text, NOW) is not None
    with pytest.raises(EvidenceFormatError, match="not one of this service"):
        Nonces(bytes(31) + b"\1", 60).read(text, NOW)
    with pytest.raises(EvidenceFormatError, match="expired"):
        Nonces(bytes(32), 60).read(text, expires)
    with pytest.raises(ValueError, match="32 bytes"):
        Nonces(bytes(16), 60)
    assert Nonces(bytes(32), 60).read("a nonce of somebody's own", NOW) is None


# ---- policies and keys ------------------------------------------------------------------------


def test_a_policy_set_on_one_instance_decides_on_the_other(pair: Any, helpers: Any) -> None:
    first, second = pair
    text = "version=1.0; authorizationrules { => deny(); }; issuancerules { };"
    token = _upload(text)
    headers = {"authorization": "Bearer admin", "content-type": "text/plain"}
    query = {"api-version": "2022-08-01"}
    body = {"quote": helpers.b64(first.quote())}
    first.claims(SGX, body)
    second.claims(SGX, body)
    path = "/policies/SgxEnclave"
    assert first.client.put(path, content=token, params=query, headers=headers).status_code == 200
    assert second.refused(SGX, body)[1] == "PolicyEvaluationError"
    reset = second.client.post(
        f"{path}:reset", content="eyJhbGciOiJub25lIn0..", params=query, headers=headers
    )
    assert reset.status_code == 200
    first.claims(SGX, body)


def _upload(text: str) -> str:
    from pyenclave.services.attestation.uploads import unsecured_policy

    return unsecured_policy(text)


def test_instances_have_the_same_keys_and_verify_each_other(pair: Any, helpers: Any) -> None:
    first, second = pair
    keys = [site.client.get("/certs").json()["keys"] for site in pair]
    assert keys[0] == keys[1]
    assert sorted(key["alg"] for key in keys[0]) == ["ES256", "RS256"]
    token = first.post(SGX, {"quote": helpers.b64(first.quote())}).json()["token"]
    assert second.verified(token)["iss"] == "https://attestation.example"


def test_keys_survive_a_restart_and_are_replaced_with_overlap(
    make_site: Any, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'db'}"
    secrets = Secrets(tmp_path / "secrets")
    options: dict[str, Any] = {
        "database": url,
        "secrets": secrets,
        "url": "https://attestation.example",
        "legacy_algorithm": "ES256",
    }

    def kids(site: Any) -> list[str]:
        return [key["kid"] for key in site.client.get("/certs").json()["keys"]]

    def signs(site: Any) -> str:
        from pyenclave.formats import jose

        token = site.client.put(
            "/policies/PyEnclave",
            content=_upload("version=1.0; authorizationrules { => permit(); }; issuancerules { };"),
            params={"api-version": "2022-08-01"},
            headers={"authorization": "Bearer admin", "content-type": "text/plain"},
        ).json()["token"]
        site.verified(token)
        return str(jose.Jws.from_bytes(token).kid)

    start = datetime.now(UTC)
    first = make_site(at=start, **options)
    (old,) = kids(first)
    assert signs(first) == old
    again = make_site(at=start + timedelta(days=1), **options)
    assert kids(again) == [old]
    # An hour before its end the next one is shown, and does not sign yet.
    soon = make_site(at=start + timedelta(days=30, minutes=-30), **options)
    shown = kids(soon)
    assert shown[0] == old
    assert len(shown) == 2
    assert signs(soon) == old
    later = make_site(at=start + timedelta(days=30, hours=2), **options)
    assert kids(later) == shown
    assert signs(later) == shown[1]
    # The old one is shown until its last token has ended, and not for ever.
    last = make_site(at=start + timedelta(days=34), **options)
    assert kids(last) == shown[1:]


def test_another_services_secrets_do_not_open_the_keys(tmp_path: Path) -> None:
    from pyenclave.services.attestation.keys import make_key, open_key

    schedule = Schedule()
    row = make_key(
        "ES256",
        url="https://a.example",
        starts=NOW,
        now=NOW,
        schedule=schedule,
        secrets=Secrets.ephemeral(),
    )
    with pytest.raises(UnsealError):
        open_key(row, Secrets.ephemeral())
    assert row.expires == NOW + timedelta(days=33, hours=1)


def test_the_schedule_asks_for_keys_in_time() -> None:
    schedule = Schedule(
        lifetime=timedelta(days=10), lead=timedelta(days=1), overlap=timedelta(days=2)
    )
    assert schedule.next_start([], NOW) == NOW
    assert schedule.next_start([NOW], NOW) is None
    assert schedule.next_start([NOW], NOW + timedelta(days=8)) is None
    due = NOW + timedelta(days=9)
    assert schedule.next_start([NOW], due) == NOW + timedelta(days=10)
    late = NOW + timedelta(days=9, hours=12)
    assert schedule.next_start([NOW], late) == late + timedelta(days=1)
    assert schedule.next_start([NOW], NOW + timedelta(days=20)) == NOW + timedelta(days=20)
    assert schedule.next_start([NOW, NOW + timedelta(days=10)], due) is None
    with pytest.raises(ValueError, match="lead"):
        Schedule(lead=timedelta(days=40))


def test_no_token_outlives_its_key(make_site: Any, helpers: Any) -> None:
    site = make_site(
        schedule=Schedule(
            lifetime=timedelta(hours=2), lead=timedelta(minutes=5), overlap=timedelta(hours=1)
        )
    )
    said = site.claims(SGX, {"quote": helpers.b64(site.quote())})
    assert said["exp"] - said["iat"] <= 3 * 3600 + 300
