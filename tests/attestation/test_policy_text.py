"""The written form of a policy: read back equal, strict in every digit, explained in sentences."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.attestation import AppraisalPolicy
from pyenclave.attestation import policy as p
from pyenclave.attestation.references import Reference

D32, D48 = "1a" * 32, "2b" * 48
AT = datetime(2027, 1, 1, tzinfo=UTC)

SIZES = sorted(
    {size for sizes, *_ in (*p.REFERENCES.values(), *p.REGISTERS.values()) for size in sizes}
)
digests = {size: st.binary(min_size=size, max_size=size).filter(any) for size in SIZES}
moments = st.none() | st.datetimes(timezones=st.just(UTC))


@st.composite
def reference(draw, sizes):
    value = draw(digests[draw(st.sampled_from(sizes))])
    start, end = draw(moments), draw(moments)
    if start and end and start > end:
        start, end = end, start
    return Reference(value, start, end)


def several(sizes):
    return st.lists(reference(sizes), min_size=1, max_size=3)


texts = st.text(min_size=1, max_size=12)


@st.composite
def policies(draw):
    values = {}
    for name, (sizes, _) in p.REFERENCES.items():
        if draw(st.booleans()):
            values[name] = draw(several(sizes))
    for name, (sizes, highest, _) in p.REGISTERS.items():
        if draw(st.booleans()):
            values[name] = draw(
                st.dictionaries(st.integers(0, highest), several(sizes), min_size=1, max_size=3)
            )
    for name, largest in p.NUMBERS.items():
        if name != "min_platform_svn" and draw(st.booleans()):
            values[name] = draw(st.integers(0, largest))
    if "mrsigner" in values:
        values.setdefault("product_id", 1)
    for name in ("issuers", "required_bits"):
        values[name] = tuple(draw(st.lists(texts, max_size=3)))
    values["tcb_statuses"] = tuple(draw(st.lists(st.sampled_from(p.TCB_STATUSES), min_size=1)))
    if draw(st.booleans()):
        scalar = texts | st.integers(-(2**63), 2**64 - 1) | st.booleans()
        names = st.from_regex(r"[a-z]+(\.[a-z-]+)?", fullmatch=True)
        values["claims"] = draw(
            st.dictionaries(names, scalar | st.lists(scalar, min_size=1), min_size=1, max_size=3)
        )
    if draw(st.booleans()):
        values["min_tcb"] = {"snp": draw(st.integers(0, 255)), "microcode": 1}
    values["sept_ve_disable"] = draw(st.none() | st.booleans())
    named = {"mrenclave", "mrsigner", "mrtd", "launch_digest", "id_key_digest", "pcrs", "claims"}
    named |= {"author_key_digest", "rim", "gpu_measurements"}
    values["accept_any_code"] = not named & set(values)
    return AppraisalPolicy(**values)


@settings(max_examples=150, deadline=None)
@given(policies())
def test_every_policy_is_read_back_as_it_was_written(policy):
    for form in ("json", "toml"):
        back = AppraisalPolicy.from_text(policy.to_text(form=form), form=form)
        assert back == policy, policy.to_text(form=form)
        assert hash(back) == hash(policy)
    assert AppraisalPolicy.from_text(json.dumps(policy.to_json()), form="json") == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert copy.deepcopy(policy) == policy
    assert policy.with_options() == policy
    assert all(line.endswith(".") for line in policy.describe(at=AT))


def read(**fields: object) -> AppraisalPolicy:
    return AppraisalPolicy.from_text(json.dumps(fields), form="json")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mrtd": D48.upper()}, "lower case"),
        ({"mrtd": " " + D48[1:]}, "hexadecimal"),
        ({"mrtd": D48[:-1] + "\n"}, "hexadecimal"),
        ({"mrtd": D48[:-2]}, "96 hexadecimal digits, not 94"),
        ({"mrtd": D32}, "96 hexadecimal digits, not 64"),
        ({"mrtd": D48 + "00"}, "96 hexadecimal digits"),
        ({"mrtd": "0x" + D48[2:]}, "hexadecimal"),
        ({"mrtd": "00" * 48}, "zero"),
        ({"mrtd": []}, "empty list"),
        ({"mrtd": None}, "hexadecimal"),
        ({"mrtd": [D48, 5]}, "hexadecimal"),
        ({"mrtd": {"not_after": "2027-01-01T00:00:00Z"}}, "needs a value"),
        ({"mrtd": {"value": D48, "notafter": "2027-01-01T00:00:00Z"}}, "did you mean not_after"),
        ({"mrtd": {"value": D48, "not_after": "2027-01-01T00:00:00"}}, "zone"),
        ({"mrtd": {"value": D48, "not_after": "soon"}}, "RFC 3339"),
        ({"mrtd": {"value": D48, "not_after": 5}}, "time with a zone"),
        (
            {
                "mrtd": {
                    "value": D48,
                    "not_before": "2027-01-02T00:00:00Z",
                    "not_after": "2027-01-01T00:00:00Z",
                }
            },
            "not_before is after",
        ),
        ({"rtmrs": D48}, "table of register numbers"),
        ({"mrtd": D48, "rtmrs": {}}, "empty table"),
        ({"mrtd": D48, "rtmrs": {"4": D48}}, "between 0 and 3"),
        ({"mrtd": D48, "rtmrs": {"01": D48}}, "no register number"),
        ({"mrtd": D48, "rtmrs": {"-1": D48}}, "no register number"),
        ({"mrtd": D48, "rtmrs": {"0": D32}}, "96 hexadecimal digits"),
        ({"mrtd": D48, "rtmrs": {"0": []}}, "empty list"),
        ({"pcrs": {"32": D48}}, "between 0 and 31"),
        ({"pcrs": {"0": "00" * 48}}, "zero"),
        ({"rtmrs": {"0": D48}}, "names code"),
        ({"host_data": D32}, "names code"),
        ({"mrtdd": D48}, "did you mean mrtd"),
        ({"mrsigner": D32}, "product_id"),
        ({"mrtd": D48, "max_vmpl": 4}, "between 0 and 3"),
        ({"mrtd": D48, "max_vmpl": True}, "not int"),
        ({"mrtd": D48, "max_vmpl": None}, "no value"),
        ({"mrtd": D48, "tcb_statuses": []}, "empty list"),
        ({"mrtd": D48, "tcb_statuses": ["Revoked"]}, "Revoked"),
        ({"mrtd": D48, "tcb_statuses": "UpToDate"}, "sequence"),
        ({"mrtd": D48, "accepted_advisories": ["any", "INTEL-SA-00837"]}, "stands alone"),
        ({"mrtd": D48, "min_tcb": {"snpp": 1}}, "none of"),
        ({"mrtd": D48, "min_tcb": {"snp": 256}}, "between 0 and 255"),
        ({"mrtd": D48, "min_tcb": {}}, "empty table"),
        ({"mrtd": D48, "min_tcb": {"snp": None}}, "not int"),
        ({"mrtd": D48, "required_policy_bits": ["smtt"]}, "none of"),
        ({"mrtd": D48, "required_policy_bits": ["debug"]}, "contradicts"),
        (
            {"mrtd": D48, "required_policy_bits": ["smt"], "forbidden_policy_bits": ["smt"]},
            "required and forbidden",
        ),
        ({"pcrs": {"5": "00" * 48}}, "not zero"),
        ({"mrtd": D48, "audience": ["me"]}, "audience"),
        ({"claims": {}}, "empty table"),
        ({"claims": {"a..b": 1}}, "dotted name"),
        ({"claims": {"a": []}}, "empty list"),
        ({"claims": {"a": {}}}, "dict"),
        ({"claims": {"a": 1.5}}, "float"),
        ({"mrtd": D48, "sept_ve_disable": 1}, "sept_ve_disable"),
        ({"mrtd": D48, "require_collateral": 0}, "require_collateral"),
        ({"mrtd": D48, "accept_any_code": True}, "contradicts mrtd"),
        ({"claims": {"a": 1}, "accept_any_code": True}, "contradicts claims"),
    ],
)
def test_att_31_a_wrong_value_is_refused_by_name(fields, says):
    with pytest.raises(ValueError, match=says):
        read(**fields)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"mrtd": D48}, TypeError),
        ({"mrtd": [bytearray(48)]}, TypeError),
        ({"mrtd": [Reference(b"\1" * 32)]}, ValueError),
        ({"pcrs": {True: b"\1" * 48}}, TypeError),
        ({"pcrs": {"0": b"\1" * 48}}, TypeError),
        ({"pcrs": {0: None}}, TypeError),
        ({"pcrs": [b"\1" * 48]}, TypeError),
        ({"claims": [1]}, TypeError),
        ({"min_tcb": 1, "mrtd": b"\1" * 48}, TypeError),
        ({"min_platform_svn": None, "mrtd": b"\1" * 48}, TypeError),
    ],
)
def test_att_31_impossible_arguments_are_refused(fields, error):
    with pytest.raises(error):
        AppraisalPolicy(**fields)


def test_references_have_windows_with_zones():
    with pytest.raises(ValueError, match="zone"):
        Reference(b"x", not_before=datetime(2027, 1, 1))
    with pytest.raises(TypeError):
        Reference(b"x", not_after="2027")  # type: ignore[arg-type]
    value = Reference(b"x", AT, AT + timedelta(days=1))
    assert value.holds_at(AT)
    assert value.holds_at(AT.astimezone(timezone(timedelta(hours=5))))
    assert value.holds_at(AT + timedelta(days=1))
    assert not value.holds_at(AT - timedelta(microseconds=1))
    assert not value.holds_at(AT + timedelta(days=1, microseconds=1))


def test_toml_has_times_of_its_own():
    policy = AppraisalPolicy.from_text(
        f'mrtd = [{{ value = "{D48}", not_after = 2027-01-01T00:00:00Z }}]\n'
        f'[rtmrs]\n1 = "{D48}"\n[claims]\n"a.b" = ["x", true]\n',
        form="toml",
    )
    assert policy.reference("mrtd") == (Reference(bytes.fromhex(D48), not_after=AT),)
    assert policy.registers("rtmrs")[1][0].value == bytes.fromhex(D48)
    assert policy.claims == {"a.b": ("x", True)}
    with pytest.raises(ValueError, match="zone"):
        AppraisalPolicy.from_text(
            f'mrtd = {{ value = "{D48}", not_after = 2027-01-01T00:00:00 }}', form="toml"
        )


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a = " + "[" * 100_000,
        "a = " + "{b=" * 5000,
        # Two quotes more may end a string of several lines; a third one would begin another.
        'a = ["""x"""", ' + "[" * 100_000 + '"',
        "a = ['''x''''', " + "[" * 100_000 + "'",
        "a." * 500_000 + "a = 1",
        "[" + "a." * 500_000 + "a]",
    ],
    ids=["arrays", "value", "tables", "after quotes", "after apostrophes", "name", "header"],
)
def test_att_24_deep_nesting_is_refused_before_it_is_parsed(text):
    with pytest.raises(ValueError, match="deeply"):
        AppraisalPolicy.from_text(text, form="toml")


def test_brackets_in_strings_and_comments_nest_nothing():
    text = f'mrtd = "{D48}" # {"[" * 50}\nissuers = ["{"[" * 50}", \'{"{" * 50}\']\n'
    assert AppraisalPolicy.from_text(text, form="toml").issuers == ("[" * 50, "{" * 50)


@pytest.mark.no_asan(reason="its realloc always copies: text made bit by bit takes time squared")
@pytest.mark.parametrize("piece", ['\\"', '"', "'", '"""', "'''", '"a\\', '"""a"', "\\"])
@pytest.mark.parametrize("start", ["", '"', 'a = "', 'a = """', "a = '''"])
def test_att_24_strings_without_an_end_take_no_more_time_than_their_length(start, piece):
    text = (start + piece * p.MAX_FILE)[: p.MAX_FILE]
    before = time.process_time()
    with pytest.raises(ValueError, match="policy"):
        AppraisalPolicy.from_text(text, form="toml")
    assert time.process_time() - before < 5


@pytest.mark.parametrize("name", ["issuers", "product_lines"])
def test_att_31_a_list_of_nothing_does_not_accept_everything(name):
    with pytest.raises(ValueError, match=f"{name} is empty"):
        AppraisalPolicy.from_text(f"accept_any_code = true\n{name} = []\n", form="toml")
    with pytest.raises(ValueError, match=f"{name} is empty"):
        AppraisalPolicy.from_text(f'{{"accept_any_code":true,"{name}":[]}}', form="json")


def test_a_text_beyond_the_limit_is_refused():
    for form in ("toml", "json"):
        with pytest.raises(ValueError, match="more than"):
            AppraisalPolicy.from_text(" " * (p.MAX_FILE + 1), form=form)


def test_a_file_beyond_the_limit_or_of_another_encoding_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "policy.json"
    path.write_bytes(b'{"accept_any_code": true, "issuers": ["\xff"]}')
    with pytest.raises(ValueError, match="utf-8"):
        AppraisalPolicy.from_file(path)
    monkeypatch.setattr(p, "MAX_FILE", 10)
    with pytest.raises(OSError, match="at most 10 bytes"):
        AppraisalPolicy.from_file(path)


def test_neither_form_is_an_error():
    with pytest.raises(ValueError, match="neither"):
        AppraisalPolicy.from_text("", form="yaml")
    with pytest.raises(ValueError, match="neither"):
        AppraisalPolicy.strict().to_text(form="yaml")


def test_tables_of_a_policy_cannot_be_changed():
    policy = AppraisalPolicy(pcrs={0: bytes.fromhex(D48)}, claims={"a": 1}, min_tcb={"snp": 1})
    for table in (policy.pcrs, policy.claims, policy.min_tcb):
        with pytest.raises(TypeError):
            table[5] = b""  # type: ignore[index]


def test_advisories_are_a_subset_or_any():
    policy = AppraisalPolicy.any_code(accepted_advisories=("A", "B"))
    assert policy.unaccepted_advisories(["B", "A"]) == ()
    assert policy.unaccepted_advisories(["C", "B", "C"]) == ("C",)
    assert AppraisalPolicy.permissive().unaccepted_advisories(["C"]) == ()
    assert AppraisalPolicy.strict().unaccepted_advisories(["C"]) == ("C",)


def test_bits_are_those_that_reports_have():
    from pyenclave.formats import snp

    assert set(p.WORDS["required_policy_bits"]) == set(snp.POLICY_BITS)
    assert set(p.WORDS["required_platform_bits"]) == set(snp.PLATFORM_BITS)
    components = {name for line in ("milan", "genoa", "turin") for name in snp.tcb_names(line)}
    assert components == set(p.TCB_COMPONENTS)


def test_attributes_and_lines_are_those_that_are_judged():
    from pyenclave.attestation import amd, verify_sgx

    assert tuple(verify_sgx._ATTRIBUTES) == p.SGX_ATTRIBUTES
    assert amd.LINES == p.PRODUCT_LINES


def test_what_is_required_is_not_forbidden():
    for name, value in (("attributes", "kss"), ("policy_bits", "smt")):
        both = {f"required_{name}": (value,), f"forbidden_{name}": (value,)}
        with pytest.raises(ValueError, match="required and forbidden"):
            AppraisalPolicy.any_code(**both)
        with pytest.raises(ValueError, match="allow_debug"):
            AppraisalPolicy.any_code(**{f"required_{name}": ("debug",)})


def test_strict_is_the_default_and_permissive_wants_genuine_only():
    strict, permissive = AppraisalPolicy.strict(), AppraisalPolicy.permissive()
    assert strict.to_json() == {"accept_any_code": True}
    assert strict.require_collateral
    assert not permissive.require_collateral
    assert set(permissive.tcb_statuses) == set(p.TCB_STATUSES)


def test_the_explanation_names_every_field_that_is_set():
    values = {name: b"\x5a" * sizes[0] for name, (sizes, _) in p.REFERENCES.items()}
    policy = AppraisalPolicy(
        **values,
        **{name: {3: b"\xa5" * sizes[0]} for name, (sizes, _, _) in p.REGISTERS.items()},
        **dict.fromkeys(p.NUMBERS, 3),
        required_bits=("seccomp",),
        tcb_statuses=("OutOfDate",),
        accepted_advisories=("INTEL-SA-00837",),
        required_attributes=("kss",),
        forbidden_attributes=("provision_key",),
        product_lines=("genoa",),
        required_policy_bits=("single_socket",),
        forbidden_policy_bits=("smt",),
        issuers=("https://issuer",),
        audience="me",
        required_platform_bits=("tsme_en",),
        ear_tiers=("affirming", "warning"),
        allow_migration_agent=True,
        allow_masked_chip_id=True,
        allow_unknown_td_features=True,
        claims={"a.b": "value"},
        min_tcb={"microcode": 77},
        sept_ve_disable=True,
        allow_debug=True,
        allow_jit=False,
        dangerous_allow_software=True,
        min_level="service",
        require_collateral=False,
    )
    set_fields = {f.name for f in dataclasses.fields(policy)} - {"accept_any_code"}
    assert set(policy.to_json()) == set_fields
    before = policy.describe()
    for name in set_fields:
        default = next(f.default for f in dataclasses.fields(policy) if f.name == name)
        changes = {name: default}
        if name == "product_id":
            changes["mrsigner"] = None
        assert policy.with_options(**changes).describe() != before, name


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"launch_digest": bytes.fromhex(D48)}, ()),
        ({"rim": bytes.fromhex(D32)}, ()),
        ({"mrtd": bytes.fromhex(D48)}, ("TCB status", "collateral")),
        ({"claims": {"a": 1}}, ("TCB status", "Attestation results")),
        (
            {"mrenclave": bytes.fromhex(D32)},
            ("TCB status", "collateral", "the level", "without TEE hardware"),
        ),
        # What a policy says itself is told, whatever it names.
        (
            {
                "launch_digest": bytes.fromhex(D48),
                "tcb_statuses": ("OutOfDate",),
                "require_collateral": False,
                "ear_tiers": ("warning",),
                "min_level": "service",
                "dangerous_allow_software": True,
            },
            ("TCB status", "collateral", "Attestation results", "the level", "SOFTWARE PLATFORM"),
        ),
        (
            {"accept_any_code": True},
            (
                *("TCB status", "collateral", "Attestation results"),
                *("the level", "without TEE hardware"),
            ),
        ),
    ],
)
def test_the_explanation_speaks_of_the_kinds_that_the_policy_names(fields, told):
    words = {
        *("TCB status", "collateral", "Attestation results"),
        *("the level", "without TEE hardware", "SOFTWARE PLATFORM"),
    }
    text = " ".join(AppraisalPolicy(**fields).describe())
    assert {word for word in words if word in text} == set(told)
    assert ("tells no code identity" in text) is ("accept_any_code" not in fields)


def test_the_explanation_says_what_weakens_and_what_has_ended():
    text = " ".join(AppraisalPolicy.permissive().describe())
    for word in ("ANY CODE", "DEBUG IS ACCEPTED", "SOFTWARE PLATFORM", "NOT GIVEN"):
        assert word in text
    text = " ".join(AppraisalPolicy(mrtd=bytes.fromhex(D48)).describe())
    for word in ("ANY", "IS ACCEPTED", "NOT GIVEN"):
        assert word not in text
    ended = AppraisalPolicy(mrtd=Reference(bytes.fromhex(D48), not_after=AT))
    assert "not accepted at this time" not in " ".join(ended.describe(at=AT))
    assert "not accepted at this time" in " ".join(ended.describe(at=AT + timedelta(1)))
