"""Drafts are programs of strangers: who may have them run, and what they may cost."""

from __future__ import annotations

from typing import Any

import pytest

SGX = "/attest/SgxEnclave"
DRAFT = "version=1.2; configurationrules{}; authorizationrules { %s }; issuancerules { };"


def _body(site: Any, helpers: Any, rule: str = "=> permit();") -> dict[str, Any]:
    return {"quote": helpers.b64(site.quote()), "draftPolicyForAttestation": DRAFT % rule}


def test_a_draft_needs_an_identity_and_a_role_that_reads_policies(
    make_site: Any, helpers: Any
) -> None:
    site = make_site(open_drafts=False)
    body = _body(site, helpers)
    answer = site.post(SGX, body)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"]
    assert site.refused(SGX, body, headers={"authorization": "Bearer somebody"})[0] == 403
    row = site.audit()[-1]
    assert (row["action"], row["decision"]) == ("attestation/draft", "refused")
    assert site.post(SGX, body, headers={"authorization": "Bearer reader"}).status_code == 200
    del body["draftPolicyForAttestation"]
    assert site.post(SGX, body).status_code == 200


def test_a_draft_that_doubles_is_refused_with_its_line(site: Any, helpers: Any) -> None:
    pytest.importorskip("jmespath")
    query = "|".join(["[@,@]"] * 60)
    rule = f'=> add(type="q", value=JmesPath("{{}}", "{query}"));\n=> permit();'
    status, code, _ = site.refused(SGX, _body(site, helpers, rule))
    assert (status, code) == (400, "PolicyEvaluationError")
    assert "line 1 failed: JmesPath" in site.audit()[-1]["rule"]
