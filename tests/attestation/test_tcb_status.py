"""The status algorithm: every status against every other, and component by component."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest

from pyenclave.attestation import tcb
from pyenclave.errors import CollateralError
from pyenclave.formats.tcb import QeIdentity, QeLevel, TcbInfo
from pyenclave.formats.tdx import TdReportBody

DATE = datetime(2024, 1, 1, tzinfo=UTC)
U, S, C, CS, O, OC, R = (  # noqa: E741
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)
PLATFORM = (U, S, C, CS, O, OC, R)
ORDER = {U: 0, S: 1, C: 1, CS: 2, O: 3, OC: 4, R: 5}


def level(svn: int = 0, status: str = U, date: datetime = DATE, *names: str) -> QeLevel:
    return QeLevel(isv_svn=svn, date=date, status=status, advisories=names)


def info(
    *levels: dict[str, Any], tee: str = "SGX", raw: bytes | None = None, **changes: Any
) -> TcbInfo:
    inner: dict[str, Any] = {
        "id": tee,
        "version": 3,
        "issueDate": "2024-01-01T00:00:00Z",
        "nextUpdate": "2024-02-01T00:00:00Z",
        "fmspc": "00906ED50000",
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": 1,
        "tcbLevels": list(levels),
    }
    if tee == "TDX":
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        inner |= {"tdxModule": module}
    text = json.dumps(inner | changes).encode() if raw is None else raw
    return TcbInfo.from_bytes(b'{"tcbInfo":' + text + b',"signature":"' + b"00" * 64 + b'"}')


def platform_level(
    sgx: tuple[int, ...] = (0,) * 16,
    pce: int = 0,
    tdx: tuple[int, ...] | None = None,
    status: str = U,
    **changes: Any,
) -> dict[str, Any]:
    parts: dict[str, Any] = {"sgxtcbcomponents": [{"svn": n} for n in sgx], "pcesvn": pce}
    if tdx is not None:
        parts["tdxtcbcomponents"] = [{"svn": n} for n in tdx]
    return {"tcb": parts, "tcbDate": "2024-01-01T00:00:00Z", "tcbStatus": status} | changes


def svns(*values: int) -> tuple[int, ...]:
    return (*values, *(0,) * (16 - len(values)))


# ---- 5.5 a: the platform's level ----------------------------------------------------------------


@pytest.mark.parametrize("place", range(16))
def test_att_07_each_component_counts_by_itself(place: int) -> None:
    """One lower is too low, however high the others are."""
    need = tuple(5 if index == place else 1 for index in range(16))
    found = info(platform_level(need))
    high = tuple(4 if index == place else 255 for index in range(16))
    assert tcb.match_platform(found, high, 9) is None
    assert tcb.match_platform(found, need, 0) is not None


def test_att_07_crossing_values_match_neither_level() -> None:
    found = info(platform_level(svns(2, 1)), platform_level(svns(1, 2)))
    assert tcb.match_platform(found, svns(1, 1), 0) is None
    lower = tcb.match_platform(found, svns(1, 2), 0)
    assert lower is not None
    assert lower.sgx_components == svns(1, 2)


def test_att_07_pcesvn_counts() -> None:
    found = info(platform_level(pce=5))
    assert tcb.match_platform(found, svns(), 4) is None
    assert tcb.match_platform(found, svns(), 5) is not None


@pytest.mark.parametrize("count", [0, 15, 17])
def test_att_07_lists_of_another_length_are_refused(count: int) -> None:
    with pytest.raises(CollateralError, match="sgxtcbcomponents"):
        info(platform_level((0,) * count))
    with pytest.raises(CollateralError, match="tdxtcbcomponents"):
        info(platform_level(tdx=(0,) * count), tee="TDX")
    with pytest.raises(ValueError, match="sixteen"):
        tcb.match_platform(info(platform_level()), (0,) * count, 0)
    with pytest.raises(ValueError, match="sixteen"):
        tcb.match_platform(info(platform_level()), svns(), 0, bytes(count))


def test_the_highest_level_wins_whatever_their_order_in_the_file() -> None:
    levels = [platform_level(svns(n), status=s) for n, s in ((1, O), (3, U), (2, S))]
    for order in (levels, levels[::-1]):
        found = info(*order)
        assert [tcb.match_platform(found, svns(n), 0).status for n in (1, 2, 3, 9)] == [O, S, U, U]  # type: ignore[union-attr]


def test_tdx_components_0_and_1_are_the_modules_from_major_version_1_on() -> None:
    found = info(platform_level(tdx=svns(5, 5, 1)), tee="TDX")
    assert tcb.match_platform(found, svns(), 0, bytes(svns(0, 1, 1))) is not None
    assert tcb.match_platform(found, svns(), 0, bytes(svns(0, 1, 0))) is None
    assert tcb.match_platform(found, svns(), 0, bytes(svns(5, 0, 1))) is None
    assert tcb.match_platform(info(platform_level()), svns(), 0, bytes(16)) is None


# ---- b, c: module and quoting enclave -----------------------------------------------------------


def test_an_isv_svn_reaches_the_highest_level_that_is_not_above_it() -> None:
    levels = (level(8), level(6, O), level(2, R))
    assert [tcb.match_isv_svn(levels, n) for n in (1, 2, 5, 6, 7, 8, 99)] == [
        None,
        levels[2],
        levels[2],
        levels[1],
        levels[1],
        levels[0],
        levels[0],
    ]


def test_module_identities_are_found_by_two_digits_in_any_case() -> None:
    module = {"mrsigner": "11" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    entry = {**module, "tcbLevels": []}
    found = info(
        platform_level(tdx=svns()), tee="TDX", tdxModuleIdentities=[{"id": "tdx_0a", **entry}]
    )
    assert tcb.find_module(found, bytes(svns(0, 10)))[1] is not None
    assert tcb.find_module(found, bytes(svns(0, 1))) == (None, None)
    assert tcb.find_module(found, bytes(16)) == (found.module, None)
    twice = [{"id": "TDX_01", **entry}, {"id": "tdx_01", **entry}]
    with pytest.raises(CollateralError, match="id once"):
        info(platform_level(tdx=svns()), tee="TDX", tdxModuleIdentities=twice)


def test_att_25_seam_signer_and_attributes_must_both_fit() -> None:
    module = info(platform_level(tdx=svns()), tee="TDX").module
    assert module is not None
    assert tcb.module_fits(module, TdReportBody(mr_td=bytes(48)))
    for changes in ({"mrsigner_seam": b"\1" * 48}, {"seam_attributes": b"\1" + bytes(7)}):
        assert not tcb.module_fits(module, TdReportBody(mr_td=bytes(48), **changes))


# ---- d: convergence -----------------------------------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORM)
def test_att_08_convergence_is_intels_table(platform: str) -> None:
    old = {U: O, S: O, C: OC, CS: OC}.get(platform, platform)
    for qe, module in product((U, O, R), (U, O, R)):
        expected = R if R in (qe, module) else old if O in (qe, module) else platform
        assert tcb.converge(platform, (qe, module)) == expected


@pytest.mark.parametrize(("platform", "qe"), [*product(PLATFORM, (U, O, C, OC, R))])
def test_att_08_a_component_never_makes_a_platform_better(platform: str, qe: str) -> None:
    merged = tcb.converge(platform, (qe,))
    assert ORDER[merged] >= max(ORDER[platform], ORDER[qe])


def test_att_06_unknown_statuses_are_errors_wherever_they_stand() -> None:
    found = info(platform_level(tdx=svns()), tee="TDX").levels[0]
    good = tcb.Evaluation(platform=found, module=level(), qe=level(), module_judged=True)
    assert good.status == U
    other = info(platform_level(tdx=svns(), status="Fine"), tee="TDX").levels[0]
    for changes in (
        {"platform": other},
        {"qe": level(status="Fine")},
        {"qe": level(status=S)},
        {"module": level(status=C)},
        {"module": level(status="uptodate")},
    ):
        parts: dict[str, Any] = {"platform": found, "module": level(), "qe": level()}
        with pytest.raises(CollateralError, match="not recognised"):
            _ = tcb.Evaluation(**parts | changes, module_judged=True).status


def test_a_missing_part_is_no_match_and_dates_and_advisories_merge() -> None:
    found = info(platform_level(advisoryIDs=["B", "A"])).levels[0]
    early = datetime(2020, 1, 1, tzinfo=UTC)
    whole = tcb.Evaluation(platform=found, module=None, qe=level(0, U, early, "C", "A"))
    assert (whole.date, whole.advisories, whole.status) == (early, ("A", "B", "C"), U)
    for changes, missing in (
        ({"platform": None}, "a platform"),
        ({"qe": None}, "a quoting enclave"),
        ({"module_judged": True}, "a TDX module"),
    ):
        parts: dict[str, Any] = {"platform": found, "module": None, "qe": level()}
        part = tcb.Evaluation(**parts | changes)
        assert (part.status, part.missing, part.date) == (tcb.NO_MATCH, missing, None)


# ---- e: relaunch --------------------------------------------------------------------------------


@pytest.mark.parametrize(("launch", "current"), [*product(PLATFORM, PLATFORM)])
def test_a_relaunch_is_advised_only_from_out_of_date_to_better(launch: str, current: str) -> None:
    merged = tcb.relaunch(launch, current)
    if launch in (O, OC) and current in (U, S, C, CS):
        needs = "Configuration" in launch or "Configuration" in current
        assert merged == f"TDRelaunchAdvised{'ConfigurationNeeded' if needs else ''}"
    else:
        assert merged == launch


def test_a_second_evaluation_that_fails_is_a_failure_of_the_whole() -> None:
    found = info(platform_level()).levels[0]
    good = tcb.Evaluation(platform=found, module=None, qe=level())
    bad = tcb.Evaluation(platform=None, module=None, qe=level())
    assert tcb.merge(good, None) == U
    assert tcb.merge(good, good) == U
    assert tcb.merge(good, bad) == tcb.merge(bad, good) == tcb.NO_MATCH


# ---- the documents themselves -------------------------------------------------------------------

GOOD = {
    "id": "QE",
    "version": 2,
    "issueDate": "2024-01-01T00:00:00Z",
    "nextUpdate": "2024-02-01T00:00:00Z",
    "tcbEvaluationDataNumber": 1,
    "miscselect": "01000000",
    "miscselectMask": "FFFFFFFF",
    "attributes": "11" + "00" * 15,
    "attributesMask": "FB" + "FF" * 7 + "00" * 8,
    "mrsigner": "8C" * 32,
    "isvprodid": 1,
    "tcbLevels": [],
}


def identity(inner: bytes, outer: bytes = b'{"enclaveIdentity":%s,"signature":"%s"}') -> QeIdentity:
    return QeIdentity.from_bytes(outer % (inner, b"00" * 64))


def test_an_identity_keeps_the_bytes_as_served() -> None:
    inner = json.dumps(GOOD, indent=1).encode()
    found = identity(inner, b' { "enclaveIdentity" : %s , "signature" : "%s" } ')
    assert found.signed == inner
    assert found.misc_select == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 1),
        ("version", 2.0),
        ("version", True),
        ("version", "2"),
        ("isvprodid", -1),
        ("isvprodid", 65536),
        ("isvprodid", True),
        ("isvprodid", None),
        ("miscselect", "0100000"),
        ("miscselect", "010000000"),
        ("miscselect", "0x000001"),
        ("miscselect", "01 00 00"),
        ("mrsigner", "8C" * 31),
        ("mrsigner", "８C" * 32),
        ("attributes", ["11"]),
        ("issueDate", "2024-01-01T00:00:00+00:00"),
        ("issueDate", "2024-01-01"),
        ("issueDate", "2024-13-01T00:00:00Z"),
        ("issueDate", "２０２４-01-01T00:00:00Z"),
        ("issueDate", 0),
        ("nextUpdate", None),
        ("tcbLevels", {}),
        ("tcbLevels", [1]),
        ("tcbLevels", [{"tcb": {"isvsvn": 1}}]),
        ("id", ""),
        ("id", "Q" * 200),
    ],
)
def test_att_24_a_member_of_another_type_or_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CollateralError, match=name):
        identity(json.dumps(GOOD | {name: value}).encode())


@pytest.mark.parametrize("name", GOOD)
def test_att_24_a_missing_member_is_refused(name: str) -> None:
    with pytest.raises(CollateralError):
        identity(json.dumps({key: value for key, value in GOOD.items() if key != name}).encode())


@pytest.mark.parametrize(
    "outer",
    [
        b'{"enclaveIdentity":%s,"enclaveIdentity":{},"signature":"%s"}',
        b'{"enclaveIdentity":%s,"signature":"%s"}x',
        b'{"enclaveIdentity":%s,"signature":"%sff"}',
        b'{"enclaveIdentity":%s,"signature":1,"s":"%s"}',
        b'{"enclaveIdentity":%s,"s":"%s"}',
        b'[{"enclaveIdentity":%s,"signature":"%s"}]',
        b'{"tcbInfo":%s,"signature":"%s"}',
        b"",
        b"\xff",
    ],
)
def test_att_24_another_envelope_is_refused(outer: bytes) -> None:
    inner = json.dumps(GOOD).encode()
    data = outer % (inner, b"00" * 64) if b"%s" in outer else outer
    with pytest.raises(CollateralError):
        QeIdentity.from_bytes(data)


def test_att_24_names_that_occur_twice_deep_inside_are_refused() -> None:
    inner = json.dumps(GOOD).encode().replace(b'"isvprodid"', b'"isvprodid": 2, "isvprodid"')
    with pytest.raises(CollateralError, match=r"ambiguous|twice"):
        identity(inner)


def test_levels_that_occur_twice_are_refused() -> None:
    with pytest.raises(CollateralError, match="each level once"):
        info(platform_level(), platform_level(status=R))
    entry = {"tcb": {"isvsvn": 1}, "tcbDate": "2024-01-01T00:00:00Z", "tcbStatus": U}
    with pytest.raises(CollateralError, match="isvsvn once"):
        identity(json.dumps(GOOD | {"tcbLevels": [entry, entry]}).encode())


def test_version_2_has_its_components_by_number_and_is_of_sgx() -> None:
    parts = {f"sgxtcbcomp{number:02}svn": number for number in range(1, 17)} | {"pcesvn": 3}
    entry = {"tcb": parts, "tcbDate": "2024-01-01T00:00:00Z", "tcbStatus": U}
    found = info(entry, version=2, id="TDX")
    assert found.id == "SGX"
    assert found.levels[0].sgx_components == tuple(range(1, 17))
    del parts["sgxtcbcomp16svn"]
    with pytest.raises(CollateralError, match="sgxtcbcomp16svn"):
        info(entry, version=2)
    for changes in ({"version": 4}, {"id": "sgx"}, {"tcbType": 1}):
        with pytest.raises(CollateralError):
            info(platform_level(), **changes)
