"""The table of rows: selecting, failing in part, peers that are absent, figures and goals."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyenclave.benchmarks import goals, in_c, registry
from pyenclave.benchmarks.rows import AbsentError, figures, quartiles, spread


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A registry of three rows whose functions a test gives."""
    module = ModuleType("pyenclave.benchmarks._planted")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "_ROWS", {name: ("_planted", name) for name in "abc"})
    monkeypatch.setattr(registry, "_PEERS", {"b": {"json": "json", "no_such_module": "no-such"}})
    for name in "abc":
        setattr(module, name, lambda name=name: figures(name, [2.0], [4.0], peer="p"))
    return vars(module)


def measured() -> list[dict[str, Any]]:
    return [row for _, found in registry.run(registry.names()) for row in found]


def raising(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return fail


def test_an_unknown_row_is_refused_with_the_names_that_come_near() -> None:
    with pytest.raises(ValueError, match=r"'seal_pag'; did you mean .*seal_page.*--list"):
        registry.select(["seal_pag"])
    with pytest.raises(ValueError, match=r"'\*x\*y\*z' \(bench --list"):
        registry.select(["seal_page", "*x*y*z"])


def test_patterns_select_rows_in_the_order_of_the_table() -> None:
    found = registry.select(["open_page", "seal_*", "open_page"])
    assert found == [name for name in registry.names() if name in found]
    assert {"seal_page", "open_page", "seal_pages_64"} <= set(found)
    assert registry.select([]) == registry.names()


def test_a_way_of_a_row_names_the_row() -> None:
    assert registry.select(["ecall_worker/c_ring", "ecall_async/64/Pool"]) == [
        "ecall_worker",
        "ecall_async",
    ]
    assert registry.select(["ecall_w*/c_ring"]) == ["ecall_worker"]
    for pattern in ("/c_ring", "seal_pag/x", "x/ecall_worker"):
        with pytest.raises(ValueError, match="no such row"):
            registry.select([pattern])


def test_a_row_that_fails_does_not_lose_the_others(rows: dict[str, Any]) -> None:
    rows["b"] = raising(OSError("no\nmemory"))
    a, b, c = measured()
    assert (a["ratio"], c["ratio"]) == (2.0, 2.0)
    assert b == {"name": "b", "error": "OSError: no\nmemory"}


def test_what_is_not_installed_is_named(rows: dict[str, Any]) -> None:
    rows["a"] = raising(AbsentError("a C compiler"))
    rows["c"] = raising(ModuleNotFoundError("No module named 'x.y'", name="x.y"))
    a, b, c = measured()
    assert a == {"name": "a", "absent": ["a C compiler"]}
    assert (b["ratio"], b["absent"]) == (2.0, ["no-such"])
    assert c == {"name": "c", "absent": ["x"]}
    rows["b"] = list
    assert measured()[1] == {"name": "b", "absent": ["no-such"]}


def test_what_c_takes_is_beside_a_row_and_its_failure_is_told(
    rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_c, "beside", lambda row: {"native": 1.0} if row["name"] == "a" else {})
    a, b, _ = measured()
    assert (a["native"], "native" in b) == (1.0, False)
    monkeypatch.setattr(in_c, "beside", lambda row: raising(AssertionError("PYE_E_AUTH"))())
    assert {"name": "c/in_c", "error": "AssertionError: PYE_E_AUTH"} in measured()
    monkeypatch.setattr(in_c, "beside", lambda row: raising(AbsentError("a C compiler"))())
    assert [row["ratio"] for row in measured()] == [2.0, 2.0, 2.0]


def test_cycles_are_counted_or_said_to_be_absent() -> None:
    """No hypervisor here may count any; then nothing else stands in for them."""
    if not in_c.counts_cycles():
        assert in_c.loops().cycles() is None
        return
    first = in_c.loops().cycles()
    statistics.median(range(10_000))
    assert first is not None
    assert (in_c.loops().cycles() or 0) > first


@pytest.mark.parametrize(("name", "unit"), [("seal_page", "ns"), ("mrenclave", "GB/s")])
def test_the_loops_in_c_do_the_work(name: str, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_c, "_ROUNDS", 1)
    found = in_c.beside({"name": name, "unit": unit})
    assert found["native"] > 0
    assert in_c.beside({"name": "ecall_array", "unit": "ns"}) == {}
    assert set(in_c._BESIDE) <= set(registry.names())


def test_a_status_of_the_core_is_an_error_with_its_name() -> None:
    with pytest.raises(AssertionError, match="PYE_E_AUTH"):
        in_c.check(32)


def test_without_a_compiler_there_are_no_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(AbsentError, match="a C compiler"):
        in_c.Loops(tmp_path)
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(AbsentError, match=r"compiles _loops\.c"):
        in_c.Loops(tmp_path)
    in_c.loops.cache_clear()
    assert not in_c.counts_cycles()


def test_a_module_of_our_own_that_is_missing_is_a_failure(rows: dict[str, Any]) -> None:
    rows["a"] = raising(ModuleNotFoundError("gone", name="pyenclave.gone"))
    assert measured()[0]["error"] == "ModuleNotFoundError: gone"


def test_progress_counts_the_rows(rows: dict[str, Any]) -> None:
    said: list[str] = []
    list(registry.run(["a", "c"], progress=said.append))
    assert said == ["1/2 measuring a", "2/2 measuring c"]


def test_quartiles_are_those_of_the_rounds() -> None:
    assert quartiles([5.0]) == [5.0, 5.0]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]


def test_the_ratio_is_above_one_where_ours_is_better() -> None:
    less = figures("x", [1.0, 2.0, 3.0], [4.0, 4.0, 6.0], peer="p")
    assert (less["value"], less["peer_value"], less["ratio"]) == (2.0, 4.0, 2.0)
    assert less["ratio_spread"] == [2.0, 3.0]
    more = figures("x", [8.0], [2.0], peer="p", unit="/s", more=True, cores="far")
    assert (more["ratio"], more["ratio_spread"], more["cores"]) == (4.0, [4.0, 4.0], "far")


def test_rounds_that_are_not_pairs_are_compared_with_the_median() -> None:
    found = spread([1.0, 2.0, 4.0], [4.0, 8.0], scale=1e3)
    assert found["spread"] == [1500.0, 3000.0]
    assert found["ratio_spread"] == quartiles([6.0, 3.0, 1.5])
    assert statistics.median([4.0, 8.0]) == 6.0


@pytest.mark.parametrize(
    ("row", "wide", "goal", "met"),
    [
        ({"name": "seal_page", "ratio": 3.8, "peer": "cryptography"}, True, 3.8, True),
        ({"name": "seal_page", "ratio": 3.7, "peer": "cryptography"}, True, 3.8, False),
        ({"name": "seal_page", "ratio": 9.0, "peer": "cryptography"}, False, 3.8, None),
        ({"name": "ecall_worker", "ratio": 20, "peer": "p", "cores": "far"}, False, 18, True),
        ({"name": "ecall_worker", "ratio": 20, "peer": "p", "cores": "near"}, False, 60, False),
        ({"name": "verify_sgx_quote", "ratio": 3.1, "peer": "dcap-qvl"}, False, 3, True),
        ({"name": "verify_sgx_quote", "ratio": 9, "peer": "three bare"}, False, 3, None),
    ],
)
def test_a_row_is_judged_only_where_its_goal_is_about_it(
    row: dict[str, Any], wide: bool, goal: float, met: bool | None
) -> None:
    assert goals.judge(row, wide=wide) == (goal, met)


def test_a_row_without_a_goal_is_not_judged() -> None:
    assert goals.judge({"name": "verify_batch", "ratio": 0.1}, wide=True) is None


def test_every_goal_is_of_a_row() -> None:
    assert {name.partition("/")[0] for name in goals.GOALS} <= set(registry.names())


def test_the_machine_says_what_ran_on_it() -> None:
    machine = registry.machine()
    assert machine["cores"] >= 1
    assert set(machine["kernels"]) == {"gcm", "sha256", "sha256_lanes", "sha384_lanes"}
