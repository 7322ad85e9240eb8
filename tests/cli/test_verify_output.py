"""What `pyenclave verify` shows a person."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyenclave.cli import main
from pyenclave.formats.hcl import REPORT_TYPE_TDX
from pyenclave.formats.tdx import TdReportBody, td_report_of
from pyenclave.testing.azure import AzureVm


def test_checks_that_were_not_reached_for_one_reason_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hardware(data: bytes) -> bytes:
        return td_report_of(TdReportBody(mr_td=bytes(48), report_data=data))

    vm = AzureVm(hardware=hardware, report_type=REPORT_TYPE_TDX)
    path = tmp_path / "hcl-report.bin"
    path.write_bytes(vm.hcl_report())
    assert main(["verify", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    unreached = [line for line in lines if "not reached" in line]
    assert len(unreached) == 1
    assert "checks not reached: td.quote failed" in unreached[0]
    assert any("REFUSED" in line and "td.quote" in line for line in lines)
