"""``pyenclave bench``: what it prints, keeps, draws and compares; nothing long is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyenclave import cli
from pyenclave.benchmarks import registry
from pyenclave.benchmarks.rows import figures

SEAL = figures("seal_page", [99.0, 100.0, 101.0], [300.0, 310.0, 320.0], peer="cryptography")
CALL = figures("ecall_worker", [1000.0], [90000.0], peer="Pipe", cores="far", native=700.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the rows give; a test changes it."""
    found: dict[str, Any] = {"seal_page": [SEAL], "ecall_worker": [CALL]}

    def measure(name: str) -> Any:
        return found.get(name, [{"name": name, "absent": ["x"]}])

    monkeypatch.setattr(registry, "_measure", measure)
    return found


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["bench", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def keep(capsys: pytest.CaptureFixture[str], path: Path, *rows: str) -> Path:
    code, out, _ = bench(capsys, *rows, "--json")
    assert code == 0
    path.write_text(out)
    return path


def test_rows_are_listed_and_patterns_narrow_the_list(capsys) -> None:
    assert bench(capsys, "--list")[1].split() == registry.names()
    code, out, _ = bench(capsys, "--list", "--only", "seal_page,open_*", "--json")
    assert (code, json.loads(out)) == (0, {"names": ["seal_page", "open_page"]})


def test_an_unknown_name_is_refused_before_anything_is_measured(capsys, measured) -> None:
    code, out, err = bench(capsys, "seal_pagee")
    assert (code, out) == (2, "")
    assert "did you mean seal_page" in err
    assert "measuring" not in err


def test_the_table_has_ratio_goal_verdict_and_c_beside_python(capsys, measured) -> None:
    code, out, err = bench(capsys, "seal_page", "ecall_worker")
    assert code == 0
    assert "\x1b" not in out + err
    head, seal, call = out.splitlines()[2:5]
    assert head.split() == ["NAME", "OURS", "IN", "C", "AGAINST", "THEIRS", "RATIO", "GOAL"]
    assert seal.split()[:4] == ["seal_page", "100.0", "ns", "±0%"]
    assert ("3.10x" in seal, "3.8x" in seal) == (True, True)
    assert ("ecall_worker (far cores)" in call, "700.0 ns" in call) == (True, True)
    assert call.split()[-3:] == ["90.00x", "18x", "met"]
    assert ("cycles: absent" in out) == (not registry.machine()["cycles"])
    assert "1/2 measuring seal_page" in err


def test_a_row_that_failed_is_told_and_gives_exit_code_1(capsys, measured, tmp_path) -> None:
    measured["open_page"] = [{"name": "open_page", "error": "OSError: \x1b[31mgone"}]
    picture = tmp_path / "x.svg"
    code, out, _ = bench(capsys, "seal_page", "open_page", "--plot", picture)
    assert code == 1
    assert "seal_page" in out
    assert "open_page: failed: OSError: \\x1b[31mgone" in out
    assert "failed: OSError" in picture.read_text()
    code, out, _ = bench(capsys, "seal_page", "open_page", "--json")
    rows = json.loads(out)["results"]
    assert (code, rows[0]["ratio"], rows[1]["name"]) == (1, 3.1, "open_page")


def test_peers_that_are_not_installed_are_named(capsys, measured) -> None:
    measured["snp_digest"] = [{**SEAL, "name": "snp_digest", "absent": ["sev-snp-measure"]}]
    code, out, _ = bench(capsys, "snp_digest", "fastapi_overhead")
    assert code == 0
    assert "snp_digest: peer absent: sev-snp-measure" in out
    assert "fastapi_overhead: not measured; absent: x" in out


def test_json_is_one_object_with_machine_date_and_spread(capsys, measured) -> None:
    code, out, err = bench(capsys, "seal_page", "--json")
    document = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert document["results"] == [SEAL]
    assert document["results"][0]["spread"] == [99.5, 100.5]
    assert document["machine"]["kernels"]["gcm"]
    assert document["when"].endswith("Z")
    assert document["version"]


def test_a_kept_run_is_shown_and_drawn_without_measuring(capsys, measured, tmp_path) -> None:
    kept = keep(capsys, tmp_path / "run.json", "seal_page", "ecall_worker")
    measured.clear()
    picture = tmp_path / "run.svg"
    code, out, err = bench(capsys, "--from", kept, "--plot", picture)
    assert (code, err) == (0, "")
    assert ("3.10x" in out, "90.00x" in out) == (True, True)
    assert picture.read_text().startswith("<svg ")
    _, out, _ = bench(capsys, "--from", kept, "seal_*")
    assert ("seal_page" in out, "ecall_worker" in out) == (True, False)


def test_a_kept_launch_is_shown_with_its_protections_once(capsys, measured, tmp_path) -> None:
    bits = {"seccomp": True, "landlock_abi": 7}
    told = f"launch_pool: probed bits {json.dumps(bits)}"
    launch = figures("launch_pool", [20.0], [40.0], peer="launch_zygote", unit="us", bits=bits)
    for note, line in (
        ({"note": f"probed bits {json.dumps(bits)}"}, told),
        ({}, told),
        ({"note": "a\x1b"}, told.replace("probed", "a\\x1b; probed")),
    ):
        measured["launch_pool"] = [{**launch, **note}]
        live = bench(capsys, "launch_pool")[1]
        kept = keep(capsys, tmp_path / "run.json", "launch_pool")
        picture = tmp_path / "run.svg"
        code, out, _ = bench(capsys, "--from", kept, "--plot", picture)
        assert code == 0
        assert "seccomp yes, landlock_abi 7" in picture.read_text()
        for shown in (live, out):
            assert [text for text in shown.splitlines() if "probed" in text] == [line]
        assert json.loads(bench(capsys, "--from", kept, "--json")[1])["results"][0]["bits"] == bits


def test_rows_that_a_kept_run_does_not_have_are_refused(capsys, measured, tmp_path) -> None:
    kept = keep(capsys, tmp_path / "run.json", "seal_page")
    picture = tmp_path / "x.svg"
    for more in ([], ["--json"], ["--plot", picture], ["seal_page"]):
        code, out, err = bench(capsys, *more, "--from", kept, "--only", "seal_many_keys,open_*")
        assert code == 2
        said = json.loads(out)["error"]["message"] if "--json" in more else err
        assert "not in this run: seal_many_keys, open_*" in said
        assert "seal_page" not in out
    assert not picture.exists()
    assert bench(capsys, "--from", kept, "seal_*")[0] == 0


def test_compared_runs_need_a_row_in_one_of_them(capsys, measured, tmp_path) -> None:
    old = keep(capsys, tmp_path / "old.json", "seal_page", "ecall_worker")
    new = keep(capsys, tmp_path / "new.json", "seal_page")
    code, out, _ = bench(capsys, "ecall_worker", "--compare", old, new)
    assert (code, "not measured now" in out) == (0, True)
    code, out, err = bench(capsys, "open_page", "--compare", old, new)
    assert (code, out) == (2, "")
    assert "not in either run: open_page" in err


def test_a_machine_is_told_as_far_as_it_is_kept(capsys, tmp_path) -> None:
    kept = tmp_path / "run.json"
    for machine, told in (
        (None, "machine not told"),
        ({}, "machine not told"),
        ({"cpu": "A"}, "A, cores not told; kernels not told"),
        ({"cores": 2, "kernels": {"gcm": "g"}}, "CPU not told, 2 cores; gcm g"),
    ):
        document = {"results": [{"name": "x"}], **({} if machine is None else {"machine": machine})}
        kept.write_text(json.dumps(document))
        code, out, _ = bench(capsys, "--from", kept)
        assert (code, out.splitlines()) == (0, [told])


def test_a_name_that_the_table_prints_is_taken(capsys, measured, tmp_path) -> None:
    measured["ecall_worker"] = [CALL, {**CALL, "name": "ecall_worker/c_ring"}]
    code, out, _ = bench(capsys, "ecall_worker/c_ring")
    assert code == 0
    assert "ecall_worker/c_ring (far cores)" in out
    kept = keep(capsys, tmp_path / "run.json", "seal_page", "ecall_worker")
    out = bench(capsys, "--from", kept, "ecall_worker/c_ring")[1]
    assert ("ecall_worker/c_ring" in out, "seal_page" in out) == (True, False)


def test_help_says_where_rows_stand(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    assert capsys.readouterr().out.count("rows come before") == 2


def test_compare_says_what_moved(capsys, measured, tmp_path) -> None:
    old = keep(capsys, tmp_path / "old.json", "seal_page", "ecall_worker")
    measured["seal_page"] = [figures("seal_page", [60.0], [300.0], peer="cryptography")]
    code, out, _ = bench(capsys, "seal_page", "ecall_worker", "--compare", old)
    seal, call = (line.split() for line in out.splitlines()[1:3])
    assert code == 0
    assert seal == ["seal_page", "3.10x", "5.00x", "+61.3%", "faster"]
    assert call == ["ecall_worker", "90.00x", "90.00x", "+0.0%"]
    new = keep(capsys, tmp_path / "new.json", "seal_page")
    code, out, _ = bench(capsys, "--compare", new, old, "--json")
    first, second = json.loads(out)["changes"]
    assert (first["moved"], second["then"], second["now"]) == (True, None, 90.0)
    assert first["factor"] == pytest.approx(0.62)
    assert "slower" in bench(capsys, "--compare", new, old)[1]


def test_runs_of_different_machines_are_said_to_be(capsys, measured, tmp_path) -> None:
    old = keep(capsys, tmp_path / "old.json", "seal_page")
    document = json.loads(old.read_text())
    document["machine"]["cpu"] = "another\x1b[2J"
    old.write_text(json.dumps(document))
    assert (
        "the machines differ: then another\\x1b[2J"
        in bench(
            capsys, "--compare", old, "--from", keep(capsys, tmp_path / "n.json", "seal_page")
        )[1]
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--plot", "x.png"], "x.svg"),
        (["--plot", "missing/x.svg"], "missing"),
        (["--plot", "folder.svg"], "directory"),
        (["--compare", "missing.json"], "missing.json"),
        (["--compare", "garbage.json"], "garbage.json"),
        (["--from", "garbage.json"], "garbage.json"),
        (["--compare", "a", "b", "c"], "two"),
        (["--compare", "run.json", "seal_page"], "rows come before --compare"),
        (["--compare", "run.json", "seal_page", "open_*"], "rows come before --compare"),
        (["--compare", "run.json", "run.json", "--from", "run.json"], "one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_refused_before_anything_is_measured(
    capsys, measured, tmp_path, monkeypatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "garbage.json").write_bytes(b"\x00\xff" * 50)
    keep(capsys, tmp_path / "run.json", "seal_page")
    code, out, err = bench(capsys, *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "measuring" not in err
