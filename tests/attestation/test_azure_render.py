"""An appraisal policy means the same in Azure's two languages as here."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from issuer_pyenclave import Issuer

from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.attestation.azure_policy import Claim, evaluate, read_policy
from pyenclave.attestation.azure_render import (
    Tee,
    attestation_policy,
    azure_claims,
    release_policy,
)
from pyenclave.attestation.references import Reference
from pyenclave.cli import main
from pyenclave.formats.release_policy import ReleasePolicy
from pyenclave.formats.sgx import Attributes
from pyenclave.formats.snp import POLICY_DEBUG, POLICY_MIGRATE_MA, POLICY_RESERVED_ONE
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.intel import IntelPlatform

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
URL = "https://shared.eus.attest.azure.net"


@pytest.fixture(scope="module")
def chip() -> AmdChip:
    return AmdChip("milan")


@pytest.fixture(scope="module")
def platform() -> IntelPlatform:
    return IntelPlatform(NOW)


@pytest.fixture(scope="module")
def ours() -> Issuer:
    return Issuer()


def _azure(policy: AppraisalPolicy, claims: dict[str, Any], tee: Tee) -> tuple[bool, bool]:
    """Return what the attestation policy and the key-release policy say."""
    text = attestation_policy(policy, tee=tee)
    named = azure_claims(claims, tee=tee)
    incoming = [Claim(name, value, "AttestationService") for name, value in named.items()]
    release = release_policy(policy, tee=tee, authority=URL)
    written = ReleasePolicy.from_json(release.to_json())
    nested = release_policy(policy, tee=tee, authority=URL, prefix="x-ms-isolation-tee.")
    released = release.evaluate(URL, named).released
    assert written.evaluate(URL, named).released is released
    assert nested.evaluate(URL, {"x-ms-isolation-tee": named}).released is released
    return evaluate(read_policy(text), incoming).permitted, released


def _some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def _digest(size: int) -> st.SearchStrategy[bytes]:
    return st.sampled_from([bytes([n]) * size for n in (1, 2, 3)])


def _accepted(size: int) -> st.SearchStrategy[Any]:
    return _some(_digest(size) | st.lists(_digest(size), min_size=1, max_size=3))


def _policy(values: dict[str, Any], identity: tuple[str, ...]) -> AppraisalPolicy:
    given = {name: value for name, value in values.items() if value is not None}
    if not any(name in given for name in identity):
        return AppraisalPolicy.any_code(**given)
    return AppraisalPolicy(**given)


_SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_SETTINGS
@given(
    wanted=st.fixed_dictionaries(
        {
            "launch_digest": _accepted(48),
            "host_data": _accepted(32),
            "id_key_digest": _accepted(48),
            "min_guest_svn": _some(st.integers(0, 3)),
            "max_vmpl": _some(st.integers(0, 3)),
            "min_tcb": _some(
                st.dictionaries(
                    st.sampled_from(["bootloader", "tee", "snp", "microcode"]),
                    st.sampled_from([0, 4, 24, 219, 220]),
                    min_size=1,
                )
            ),
            "forbidden_policy_bits": st.sampled_from([None, ("smt",)]),
            "allow_debug": st.booleans(),
            "allow_migration_agent": st.booleans(),
        }
    ),
    found=st.fixed_dictionaries(
        {
            "measurement": _digest(48),
            "host_data": _digest(32),
            "id_key_digest": _digest(48),
            "guest_svn": st.integers(0, 3),
            "vmpl": st.integers(0, 3),
            "policy": st.sampled_from([0, 1 << 16, POLICY_DEBUG, POLICY_MIGRATE_MA]),
        }
    ),
)
def test_a_policy_for_sev_snp_means_the_same(
    chip: AmdChip, wanted: dict[str, Any], found: dict[str, Any]
) -> None:
    report = chip.report(**(found | {"policy": found["policy"] | POLICY_RESERVED_ONE}))
    policy = _policy(wanted, ("launch_digest", "id_key_digest"))
    result = appraise(
        report,
        policy=policy,
        endorsements=chip.endorsements(),
        freshness="not_checked",
        roots=[chip.root],
        at=NOW,
    )
    assert result.genuine
    ours = result.accepted
    assert _azure(policy, dict(result.claims), "sevsnpvm") == (ours, ours)


@_SETTINGS
@given(
    wanted=st.fixed_dictionaries(
        {
            "mrenclave": _accepted(32),
            "mrsigner": _accepted(32),
            "product_id": st.sampled_from([1, 2]),
            "min_security_version": _some(st.integers(0, 3)),
            "config_id": _accepted(64),
            "allow_debug": st.booleans(),
        }
    ),
    found=st.fixed_dictionaries(
        {
            "mrenclave": _digest(32),
            "mrsigner": _digest(32),
            "isv_prod_id": st.integers(1, 2),
            "isv_svn": st.integers(0, 3),
            "config_id": _digest(64),
        }
    ),
    debug=st.booleans(),
)
def test_a_policy_for_sgx_means_the_same(
    platform: IntelPlatform, wanted: dict[str, Any], found: dict[str, Any], *, debug: bool
) -> None:
    flags = 0x85 | (2 if debug else 0)  # INITTED, MODE64BIT, KSS
    quote = platform.enclave_quote(attributes=Attributes(flags=flags, xfrm=0xE7), **found)
    policy = _policy(wanted, ("mrenclave", "mrsigner"))
    result = appraise(
        quote,
        policy=policy,
        endorsements=platform.endorsements(),
        freshness="not_checked",
        roots=[platform.root],
        at=NOW,
    )
    assert result.genuine
    ours = result.accepted
    assert _azure(policy, dict(result.claims), "sgx") == (ours, ours)


@_SETTINGS
@given(
    wanted=st.fixed_dictionaries(
        {
            "mrtd": _accepted(48),
            "rtmrs": _some(st.dictionaries(st.integers(0, 3), _digest(48), min_size=1)),
            "mr_config_id": _accepted(48),
            "mr_owner": _accepted(48),
            "sept_ve_disable": st.sampled_from([None, True]),
            "tcb_statuses": st.sampled_from([None, ("UpToDate", "OutOfDate")]),
            "accepted_advisories": st.none(),
        }
    ),
    found=st.fixed_dictionaries(
        {
            "mr_td": _digest(48),
            "rtmr0": _digest(48),
            "rtmr2": _digest(48),
            "mr_config_id": _digest(48),
            "mr_owner": _digest(48),
            "td_attributes": st.sampled_from([bytes((0, 0, 0, 0x10, 0, 0, 0, 0))]),
        }
    ),
    status=st.sampled_from(["UpToDate", "OutOfDate"]),
)
def test_a_policy_for_tdx_means_the_same(
    platform: IntelPlatform, wanted: dict[str, Any], found: dict[str, Any], status: str
) -> None:
    quote = platform.td_quote(**found)
    policy = _policy(wanted, ("mrtd",))
    level = platform.tcb_level(status, td_components=(4, 1, 2, *bytes(13)))
    result = appraise(
        quote,
        policy=policy,
        endorsements=platform.endorsements("tdx", tcb_info={"tcbLevels": [level]}),
        freshness="not_checked",
        roots=[platform.root],
        at=NOW,
    )
    assert result.genuine
    ours = result.accepted
    assert _azure(policy, dict(result.claims), "tdxvm") == (ours, ours)


@settings(_SETTINGS, max_examples=60)
@given(
    wanted=st.fixed_dictionaries(
        {
            "mrenclave": _accepted(32),
            "mrsigner": _accepted(32),
            "product_id": st.sampled_from([1, 2]),
            "min_security_version": _some(st.integers(0, 3)),
            "min_level": st.sampled_from(["embedded", "service"]),
            "min_platform_svn": st.sampled_from([0, 2, 3]),
            "allow_jit": st.booleans(),
            "allow_debug": st.booleans(),
            "dangerous_allow_software": st.booleans(),
        }
    ),
    found=st.fixed_dictionaries(
        {
            "mrenclave": _digest(32),
            "mrsigner": _digest(32),
            "isv_prod_id": st.integers(1, 2),
            "isv_svn": st.integers(0, 3),
        }
    ),
    level=st.sampled_from(["embedded", "service"]),
    jit=st.booleans(),
    debug=st.booleans(),
)
def test_a_policy_for_our_own_enclaves_means_the_same(
    ours: Issuer,
    wanted: dict[str, Any],
    found: dict[str, Any],
    level: str,
    *,
    jit: bool,
    debug: bool,
) -> None:
    record = {"level": level, "debug": debug, "jit": jit}
    evidence = ours.evidence(body=found, debug=debug, record=record)
    policy = _policy(wanted, ("mrenclave", "mrsigner"))
    result = ours.appraise(evidence, policy=policy)
    assert result.genuine
    accepted = result.accepted
    assert _azure(policy, dict(result.claims), "pyenclave") == (accepted, accepted)


@pytest.mark.parametrize(
    ("tee", "values", "word"),
    [
        ("sgx", {"launch_digest": b"\1" * 48}, "launch_digest"),
        ("sgx", {"mrenclave": b"\1" * 32, "tcb_statuses": ("OutOfDate",)}, "tcb_statuses"),
        ("sgx", {"mrenclave": b"\1" * 32, "min_tcb_evaluation_number": 5}, "evaluation"),
        ("sevsnpvm", {"launch_digest": b"\1" * 48, "min_tcb": {"fmc": 1}}, "fmc"),
        (
            "sevsnpvm",
            {"launch_digest": b"\1" * 48, "required_platform_bits": ("ecc_en",)},
            "required_platform_bits",
        ),
        (
            "sevsnpvm",
            {"launch_digest": b"\1" * 48, "forbidden_policy_bits": ("smt", "cxl_allow")},
            "forbidden_policy_bits",
        ),
        ("sevsnpvm", {"launch_digest": b"\1" * 48, "pcrs": {0: b"\1" * 32}}, "pcrs"),
        ("tdxvm", {"mrtd": b"\1" * 48, "audience": "me"}, "audience"),
        ("pyenclave", {"mrenclave": b"\1" * 32, "required_bits": ("seccomp",)}, "required_bits"),
    ],
)
def test_what_azure_cannot_say_is_refused_and_not_left_out(
    tee: Tee, values: dict[str, Any], word: str
) -> None:
    policy = AppraisalPolicy(**values)
    with pytest.raises(ValueError, match=word):
        attestation_policy(policy, tee=tee)
    with pytest.raises(ValueError, match=word):
        release_policy(policy, tee=tee, authority=URL)


def test_validity_windows_need_a_time_and_close() -> None:
    past = Reference(b"\1" * 48, not_after=datetime(2026, 1, 1, tzinfo=UTC))
    now = Reference(b"\2" * 48, not_before=datetime(2026, 1, 1, tzinfo=UTC))
    policy = AppraisalPolicy(launch_digest=[past, now])
    with pytest.raises(ValueError, match="at="):
        attestation_policy(policy, tee="sevsnpvm")
    text = attestation_policy(policy, tee="sevsnpvm", at=NOW)
    assert "02" * 48 in text
    assert "01" * 48 not in text
    with pytest.raises(ValueError, match="no value"):
        attestation_policy(AppraisalPolicy(launch_digest=[past]), tee="sevsnpvm", at=NOW)


def test_a_claim_of_the_attester_does_not_pass_for_the_services() -> None:
    policy = AppraisalPolicy(mrenclave=[b"\1" * 32, b"\2" * 32])
    read = read_policy(attestation_policy(policy, tee="sgx"))
    true = {"x-ms-attestation-type": "sgx", "x-ms-sgx-is-debuggable": False}
    mine: list[Claim] = [Claim(n, v, "AttestationService") for n, v in true.items()]
    genuine = Claim("x-ms-sgx-mrenclave", "01" * 32, "AttestationService")
    assert evaluate(read, [*mine, genuine]).permitted
    for forged in (
        Claim("x-ms-sgx-mrenclave", "01" * 32, "CustomClaim"),
        Claim("demand-2", True, "CustomClaim"),
    ):
        assert not evaluate(read, [*mine, forged]).permitted


def test_an_unknown_tee_or_prefix_is_an_impossible_argument() -> None:
    policy = AppraisalPolicy(mrenclave=b"\1" * 32)
    with pytest.raises(ValueError, match="tee"):
        attestation_policy(policy, tee="snp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tee"):
        azure_claims({}, tee="snp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefix"):
        release_policy(policy, tee="sgx", authority=URL, prefix="a")


def test_the_command_says_a_policy_in_both_languages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.toml"
    path.write_text(f'launch_digest = "{"ab" * 48}"\nmin_guest_svn = 2\n')
    assert main(["policy", "render", str(path), "--tee", "sevsnpvm"]) == 0
    read_policy(capsys.readouterr().out)
    release = ["policy", "render", str(path), "--tee", "sevsnpvm", "--authority", URL]
    assert main([*release, "--prefix", "x-ms-isolation-tee."]) == 0
    made = ReleasePolicy.from_json(capsys.readouterr().out)
    assert made.authorities[0].url == URL
    assert main(["policy", "render", str(path), "--tee", "sgx"]) == 2
    assert "launch_digest" in capsys.readouterr().err
    assert main(["policy", "render", str(path), "--tee", "sgx", "--prefix", "a."]) == 2
