"""Rows of sealed files: all ways are measured, and a file that lost something is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyenclave.benchmarks import filing, goals, registry
from pyenclave.benchmarks.rows import AbsentError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take no time; what they give says nothing."""
    monkeypatch.setattr(filing, "_SIZE", 2 << 20)
    monkeypatch.setattr(filing, "_TABLE", 500)
    monkeypatch.setattr(filing, "_ROUNDS", 1)


@pytest.mark.parametrize("name", filing.__all__)
def test_a_row_of_files_is_measured_in_all_its_ways(name: str) -> None:
    ((_, rows),) = registry.run([name])
    assert "error" not in rows[0], rows[0]
    if "absent" in rows[0]:
        pytest.skip(f"not on this machine: {rows[0]['absent']}")
    assert {row["name"] for row in rows} == {
        goal for goal in goals.GOALS if goal.partition("/")[0] == name
    }
    assert all(row["ratio"] > 0 for row in rows)


def test_a_file_that_loses_data_makes_its_rows_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(path: Path, content: memoryview) -> None:
        changed = bytearray(content)
        changed[-1] ^= 1
        filing._write_plain(path, memoryview(changed))

    monkeypatch.setattr(filing, "_WRITE", (filing._WRITE[0], forgetful, filing._WRITE[2]))
    for name in ("file_seq_write", "file_seq_read"):
        ((_, rows),) = registry.run([name])
        assert rows[0].get("error", "").startswith("AssertionError"), rows


def test_files_need_room_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AbsentError, match="MiB for temporary files"), filing._folder(1 << 60):
        pass
    monkeypatch.setattr(filing.shutil, "disk_usage", lambda _: type("Use", (), {"free": 0}))
    ((_, rows),) = registry.run(["file_seq_read"])
    assert rows == [{"name": "file_seq_read", "absent": ["8 MiB for temporary files"]}]
