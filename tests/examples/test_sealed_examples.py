"""examples/sealed_arrays and sealed_files: what they print, and how few lines they differ by."""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import pyenclave
from pyenclave import cli

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def changed(name: str) -> list[str]:
    """Return the lines of sealed.py that are not in plain.py, but for docstring and indentation."""

    def code(file: str) -> list[str]:
        text = (EXAMPLES / name / file).read_text("utf-8")
        first = ast.parse(text).body[0].end_lineno
        return [line.strip() for line in text.splitlines()[first:] if line.strip()]

    found = difflib.ndiff(code("plain.py"), code("sealed.py"))
    return [line[2:] for line in found if line.startswith("+ ")]


def run(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return said


@pytest.mark.parametrize(
    "rows", [600_000, pytest.param(8_000_000, marks=pytest.mark.long)], ids=["146 MiB", "1.9 GiB"]
)
def test_sealed_arrays_prints_the_same_with_64_mib_in_the_clear(tmp_path: Path, rows: int) -> None:
    assert [line.rpartition("# ")[2] for line in changed("sealed_arrays")[:3]] == ["1", "2", "3"]
    assert len(changed("sealed_arrays")) == 4  # the fourth prints what was
    folder = tmp_path / "sealed_arrays"
    shutil.copytree(EXAMPLES / "sealed_arrays", folder)
    both = [run(folder, name, str(rows)) for name in ("plain.py", "sealed.py")]
    plain, sealed = map(output, both)
    assert plain.startswith(f"{rows * 256 >> 20} MiB")
    assert sealed == f"{plain}64 MiB of it were plaintext at most\n"


@pytest.fixture
def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tests run from a checkout, say as an installed package what pyproject.toml says."""
    if any(point.name == "sealed" for point in entry_points(group="fsspec.specs")):
        return
    root = EXAMPLES.parent
    points = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    about = tmp_path / "site" / "checkout-0.dist-info"
    about.mkdir(parents=True)
    about.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: checkout\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in points["fsspec.specs"].items()]
    about.joinpath("entry_points.txt").write_text("\n".join(["[fsspec.specs]", *lines, ""]))
    monkeypatch.setenv("PYTHONPATH", f"{about.parent}{os.pathsep}{root}")


@pytest.mark.usefixtures("entry_point")
def test_sealed_files_prints_the_same_and_leaves_only_ciphertext(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pd = pytest.importorskip("pandas")
    for name in ("pyarrow", "fsspec"):
        pytest.importorskip(name)
    lines = changed("sealed_files")
    assert [line.rpartition("# ")[2] for line in lines] == ["1", "2", "3"]
    folder = tmp_path / "sealed_files"
    shutil.copytree(EXAMPLES / "sealed_files", folder)
    monkeypatch.chdir(folder)
    carriers = ["planted carrier A", "planted carrier B"]
    table = {"carrier": carriers * 5000, "arr_delay": [float(i % 70) for i in range(10_000)]}
    pd.DataFrame(table).to_parquet("flights.parquet")
    Path("data.key").write_bytes(os.urandom(32))
    Path("data.key").chmod(0o600)
    assert cli.main(["seal", "flights.parquet", "--key-file", "data.key", "--json"]) == 0
    sealing = run(folder, "sealed.py", "flights.parquet.sealed")
    capsys.readouterr()
    runpy.run_path("plain.py")["main"]("flights.parquet")
    plain = capsys.readouterr().out
    assert output(sealing) == plain
    assert plain.count("planted carrier") == 2
    with pyenclave.open_sealed("delays.csv.sealed", key=Path("data.key").read_bytes()) as file:
        assert file.read() == Path("delays.csv").read_bytes()
    for name in ("delays.csv.sealed", "flights.parquet.sealed"):
        assert b"planted carrier" not in Path(name).read_bytes()
