"""Policies: what is impossible is refused, and what weakens must be named."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
from issuer_amd import AT as AMD_AT
from issuer_intel import NOW as INTEL_NOW

from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.attestation.references import Reference
from pyenclave.formats import der
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.intel import IntelPlatform

NOW = datetime.now(UTC)
M, S = b"\x11" * 32, b"\x22" * 32


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, ValueError),
        ({"mrenclave": ()}, ValueError),
        ({"mrenclave": []}, ValueError),
        ({"mrenclave": b""}, ValueError),
        ({"mrenclave": M[:-1]}, ValueError),
        ({"mrenclave": (M, b"\x11" * 16)}, ValueError),
        ({"mrenclave": bytes(32)}, ValueError),
        ({"mrenclave": M.hex()}, TypeError),
        ({"mrenclave": [M.hex()]}, TypeError),
        ({"mrsigner": S}, ValueError),
        ({"mrsigner": bytes(32), "product_id": 1}, ValueError),
        ({"mrenclave": M, "accept_any_code": True}, ValueError),
        ({"mrenclave": M, "product_id": -1}, ValueError),
        ({"mrenclave": M, "product_id": 65536}, ValueError),
        ({"mrenclave": M, "product_id": True}, TypeError),
        ({"mrenclave": M, "product_id": "7"}, TypeError),
        ({"mrenclave": M, "min_security_version": -1}, ValueError),
        ({"mrenclave": M, "min_platform_svn": 1.5}, TypeError),
        ({"mrenclave": M, "min_level": "none"}, ValueError),
        ({"mrenclave": M, "required_bits": "seccomp"}, TypeError),
        ({"mrenclave": M, "required_bits": (1,)}, TypeError),
        ({"mrenclave": M, "required_bits": ("",)}, TypeError),
        ({"mrenclave": M, "allow_debug": 1}, TypeError),
        ({"launch_digest": M}, ValueError),
        ({"launch_digest": bytes(48)}, ValueError),
        ({"launch_digest": ()}, ValueError),
        ({"host_data": M}, ValueError),
        ({"mrenclave": M, "family_id": M}, ValueError),
        ({"mrenclave": M, "host_data": ()}, ValueError),
        ({"mrenclave": M, "max_vmpl": 4}, ValueError),
        ({"mrenclave": M, "min_guest_svn": 1 << 32}, ValueError),
        ({"mrenclave": M, "min_tcb": {"fpga": 1}}, ValueError),
        ({"mrenclave": M, "min_tcb": {"snp": 256}}, ValueError),
        ({"mrenclave": M, "min_tcb": {"snp": True}}, TypeError),
        ({"mrenclave": M, "min_tcb": 7}, TypeError),
        ({"mrenclave": M, "required_policy_bits": ("alias_check_complete",)}, ValueError),
        ({"mrenclave": M, "forbidden_policy_bits": ("SMT",)}, ValueError),
        ({"mrenclave": M, "required_platform_bits": "ecc_en"}, TypeError),
        ({"mrenclave": M, "allow_migration_agent": 1}, TypeError),
        ({"mrenclave": M, "dangerous_allow_software": "yes"}, TypeError),
    ],
)
def test_att_31_impossible_or_empty_policies_are_refused(fields, error):
    with pytest.raises(error):
        AppraisalPolicy(**fields)


def test_what_weakens_is_off():
    for policy in (AppraisalPolicy(mrenclave=M), AppraisalPolicy.strict()):
        assert not policy.allow_debug
        assert not policy.dangerous_allow_software
    assert not AppraisalPolicy(mrenclave=M).accept_any_code


def test_sev_snp_fields_are_read_from_text():
    fields = {
        "launch_digest": ["5a" * 48],
        "host_data": "00" * 32,
        "min_tcb": {"snp": 24},
        "max_vmpl": 0,
        "forbidden_policy_bits": ["smt"],
        "min_guest_svn": 65547,
    }
    policy = AppraisalPolicy.from_text(json.dumps(fields), form="json")
    assert policy.accepted("launch_digest", NOW) == (b"\x5a" * 48,)
    assert policy.accepted("host_data", NOW) == (bytes(32),)
    assert policy.accepted("image_id", NOW) == ()
    assert policy.min_tcb == {"snp": 24}
    assert policy.forbidden_policy_bits == ("smt",)
    assert not policy.accept_any_code


def test_one_digest_or_several_are_taken():
    assert AppraisalPolicy(mrenclave=M).measurements == (M,)
    assert AppraisalPolicy(mrenclave=[M, S]).measurements == (M, S)  # type: ignore[arg-type]
    assert AppraisalPolicy(mrsigner=(S,), product_id=1).signers == (S,)
    assert AppraisalPolicy.any_code().measurements == ()


def test_a_policy_is_frozen_and_copies_are_checked_again():
    policy = AppraisalPolicy(mrenclave=M)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.allow_debug = True  # type: ignore[misc]
    assert policy.with_options(allow_debug=True).allow_debug
    with pytest.raises(ValueError, match="empty list"):
        policy.with_options(mrenclave=())


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("{", "json"),
        ("[]", "json"),
        ("null", "json"),
        ("{}", "json"),
        ('{"mrenclave": "11"}', "json"),
        ('{"mrenclave": 5}', "json"),
        ('{"mrenclave": [5]}', "json"),
        ('{"mrenclave": "' + "zz" * 32 + '"}', "json"),
        ('{"mrenclave": []}', "json"),
        ('{"accept_any_code": true, "alow_debug": true}', "json"),
        ('{"accept_any_code": true, "allow_debug": false, "allow_debug": true}', "json"),
        ('{"accept_any_code": "true"}', "json"),
        ('{"accept_any_code": true} {}', "json"),
        ('{"accept_any_code": true, "min_platform_svn": 1e400}', "json"),
        ('{"accept_any_code": true, "min_platform_svn": NaN}', "json"),
        ("[" * 100_000, "json"),
        ("accept_any_code = true\naccept_any_code = true", "toml"),
        ("accept_any_code = 1979-01-01", "toml"),
    ],
)
def test_att_24_malformed_policy_files_are_refused(text, form):
    with pytest.raises(ValueError, match=r".+"):
        AppraisalPolicy.from_text(text, form=form)


def test_policy_files_are_read_as_json_and_toml(tmp_path):
    want = AppraisalPolicy(
        mrsigner=S, product_id=7, required_bits=("seccomp",), dangerous_allow_software=True
    )
    (tmp_path / "p.json").write_text(
        f'{{"mrsigner": "{S.hex()}", "product_id": 7, "required_bits": ["seccomp"],'
        ' "dangerous_allow_software": true}'
    )
    (tmp_path / "p.toml").write_text(
        f'mrsigner = ["{S.hex()}"]\nproduct_id = 7\nrequired_bits = ["seccomp"]\n'
        "dangerous_allow_software = true\n"
    )
    assert AppraisalPolicy.from_file(tmp_path / "p.json") == want
    assert AppraisalPolicy.from_file(tmp_path / "p.toml") == want


@pytest.mark.parametrize(
    "values",
    [
        {},
        {-1: bytes(48)},
        {32: bytes(48)},
        {0: bytes(47)},
        {0: b""},
        {0: ()},
    ],
)
def test_registers_have_an_index_and_whole_digests(values: Any) -> None:
    with pytest.raises(ValueError, match="pcrs"):
        AppraisalPolicy(pcrs=values)


def test_registers_are_one_digest_or_several() -> None:
    one, two = b"\1" * 48, b"\2" * 48
    policy = AppraisalPolicy(pcrs={0: one, 8: (bytes(48), two)})
    assert policy.registers("pcrs") == {
        0: (Reference(one),),
        8: (Reference(bytes(48)), Reference(two)),
    }
    text = f'{{"pcrs": {{"0": "{one.hex()}", "8": ["{"00" * 48}", "{two.hex()}"]}}}}'
    assert AppraisalPolicy.from_text(text, form="json").pcrs == policy.pcrs
    for wrong in ('{"pcrs": {"x": "00"}}', '{"pcrs": {"0": 5}}', '{"pcrs": {"0": "zz"}}'):
        with pytest.raises(ValueError, match=r"policy|hexadecimal"):
            AppraisalPolicy.from_text(wrong, form="json")


def test_what_tokens_must_say_is_part_of_a_policy() -> None:
    policy = AppraisalPolicy.any_code(issuers=["https://a"], audience="me")
    assert policy.issuers == ("https://a",)
    with pytest.raises(TypeError):
        AppraisalPolicy.any_code(issuers="https://a")
    with pytest.raises(TypeError):
        AppraisalPolicy.any_code(audience="")
    assert AppraisalPolicy(claims={"swname": "X"}).claims == {"swname": ("X",)}


def quoted(machine: IntelPlatform, tee: Literal["sgx", "tdx"], **asked: Any) -> tuple[str, ...]:
    quote = machine.enclave_quote(config_svn=3) if tee == "sgx" else machine.td_quote(version=5)
    return appraise(
        quote,
        policy=AppraisalPolicy.any_code(**asked),
        freshness="not_checked",
        endorsements=machine.endorsements(tee),
        roots=[machine.root],
        at=INTEL_NOW,
    ).refused_by


def test_att_26_state_attributes_and_platforms_can_be_named() -> None:
    ppid = b"\x77" * 16
    machine = IntelPlatform(INTEL_NOW, pck_changes={"1": der.encode_octet_string(ppid)})
    xfrm = (0xE7).to_bytes(8, "little")
    for accepted in (
        {"min_config_svn": 3},
        {"xfrm": [b"\1" * 8, xfrm]},
        {"required_attributes": ("mode64bit",), "forbidden_attributes": ("debug", "kss")},
        {"ppid": [b"\1" * 16, ppid], "fmspc": machine.fmspc},
    ):
        assert quoted(machine, "sgx", **accepted) == ()
    for refused, check in (
        ({"min_config_svn": 4}, "code.config_svn"),
        ({"xfrm": (0xE3).to_bytes(8, "little")}, "enclave.xfrm"),
        ({"required_attributes": ("aex_notify",)}, "enclave.attributes"),
        ({"ppid": b"\1" * 16}, "platform.ppid"),
        ({"fmspc": b"\1" * 6}, "platform.fmspc"),
    ):
        assert quoted(machine, "sgx", **refused) == (check,)
    xfam = bytes.fromhex("e702060000000000")
    assert quoted(machine, "tdx", xfam=xfam, mr_service_td=bytes(48), ppid=ppid) == ()
    assert quoted(machine, "tdx", mr_service_td=b"\1" * 48) == ("code.mr_service_td",)
    assert quoted(machine, "tdx", xfam=b"\1" * 8) == ("td.xfam",)


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
def test_att_36_chips_and_lines_can_be_named(product: Literal["milan", "genoa", "turin"]) -> None:
    chip = AmdChip(product)

    def refused_by(**asked: Any) -> tuple[str, ...]:
        return appraise(
            chip.report(),
            policy=AppraisalPolicy.any_code(**asked),
            freshness="not_checked",
            endorsements=chip.endorsements(),
            roots=[chip.root],
            at=AMD_AT,
        ).refused_by

    other = AmdChip("milan", chip_id=bytes(range(2, 66))).chip_id
    assert refused_by(chip_id=[other, chip.chip_id], product_lines=("turin", product)) == ()
    assert refused_by(chip_id=other) == ("platform.chip_id",)
    short = () if product == "turin" else ("platform.chip_id",)
    assert refused_by(chip_id=[other, chip.chip_id[:8]]) == short
    lines = tuple({"milan", "genoa", "turin"} - {product})
    assert refused_by(product_lines=lines) == ("platform.line",)
    # A key that is of no chip says of any chip that it is its own.
    chip = AmdChip(product, signer="vlek")
    assert refused_by() == ()
    assert refused_by(chip_id=chip.chip_id) == ("platform.chip_id",)
    # Eight bytes name a chip of Turin only.
    if product != "turin":
        chip = AmdChip(product, chip_id=bytes(range(1, 9)).ljust(64, b"\0"))
        assert refused_by(chip_id=chip.chip_id) == ()
        assert refused_by(chip_id=chip.chip_id[:8]) == ("platform.chip_id",)
