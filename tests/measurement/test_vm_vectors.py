"""Every vector of launch digests and MRTD: the exact value, or the refusal."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pyenclave.errors import MeasurementError
from pyenclave.measurement import sev, tdx
from pyenclave.measurement.ovmf import Firmware, SevLayout, SevSection

FOLDER = (
    Path(
        os.environ.get(
            "PYENCLAVE_VECTORS", Path(__file__).resolve().parents[3] / "shared" / "vectors"
        )
    )
    / "measurement"
)
# Files that the vectors name but do not hold (sev-snp-measure's fixtures) may lie here.
FETCHED = Path(os.environ.get("PYENCLAVE_VECTORS_FETCHED", "/nonexistent"))


def cases(*patterns: str) -> list[str]:
    return sorted(path.name for pattern in patterns for path in FOLDER.glob(pattern))


def load(name: str) -> tuple[dict[str, Any], Path]:
    if not name:
        pytest.skip(f"test vectors are not at {FOLDER} (set PYENCLAVE_VECTORS)")
    return json.loads((FOLDER / name / "case.json").read_text("utf-8")), FOLDER / name


def read(case: dict[str, Any], folder: Path, role: str) -> bytes:
    info = case["files"][role]
    path = folder / info["path"]
    if not path.is_file():
        path = FETCHED / path.name
    if not path.is_file():
        pytest.skip(f"{info['path']} is a public file that the vectors do not hold")
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == info["sha256"]
    return data


def kernel_of(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    def content(name: str | None) -> bytes | None:
        return None if name is None else b"" if name == "empty" else (folder / name).read_bytes()

    if "kernel_sha256" in params:
        return {
            "kernel": sev.KernelHashes(
                bytes.fromhex(params["kernel_sha256"]),
                bytes.fromhex(params["initrd_sha256"]),
                sev.KernelHashes.hash_cmdline(params["cmdline"]),
            )
        }
    if params["kernel"] is None:
        return {}
    return {
        "kernel": content(params["kernel"]),
        "initrd": content(params["initrd"]),
        "append": params["cmdline"],
    }


def measure(case: dict[str, Any], folder: Path, **changes: Any) -> bytes:
    params = case["params"]
    kernel = kernel_of(params, folder)
    processors = {"vcpus": params.get("vcpus"), "vcpu_type": params.get("vcpu_type")} | changes
    if params["mode"] == "sev":
        return sev.sev_launch_digest(read(case, folder, "firmware"), **kernel)
    if params["mode"] == "seves":
        data = read(case, folder, "firmware")
        return sev.sev_es_launch_digest(data, vmm=params["vmm"], **processors, **kernel)
    if params["mode"] == "snp:svsm":
        data = read(case, folder, "firmware")
        svsm = read(case, folder, "svsm")
        size = params["ovmf_vars_size"]
        return sev.svsm_launch_digest(data, svsm, vars_size=size, **processors)
    layout = None
    if "sections" in params:
        layout = SevLayout(
            tuple(SevSection(**section) for section in params["sections"]),
            hashes_table_gpa=params["hashes_table_gpa"],
            ap_reset_eip=params["ap_reset_eip"],
        )
    start = params.get("ovmf_hash")
    return sev.snp_launch_digest(
        None if layout else read(case, folder, "firmware"),
        layout=layout,
        ovmf_hash=bytes.fromhex(start) if start else None,
        vmm=params["vmm"],
        guest_features=params["guest_features"],
        **processors,
        **kernel,
    )


@pytest.mark.parametrize("name", cases("snp-*", "sev-*", "seves-*") or [""])
def test_every_launch_digest_is_the_expected_one(name: str) -> None:
    case, folder = load(name)
    expect = case["expect"]
    if "error" in expect:
        with pytest.raises(MeasurementError, match="kernel-hashes"):
            measure(case, folder)
        return
    assert measure(case, folder).hex() == expect["launch_digest"]
    if "vcpu_sig" in case["params"] and case["params"]["mode"] != "sev":
        signature = case["params"]["vcpu_sig"]
        by_number = measure(case, folder, vcpu_type=None, vcpu_sig=signature)
        assert by_number.hex() == expect["launch_digest"]


def test_a_real_report_holds_the_digest() -> None:
    case, folder = load("snp-real-report-dstack" if FOLDER.is_dir() else "")
    report = read(case, folder, "report")
    assert report[0x90 : 0x90 + 48] == measure(case, folder)


@pytest.mark.parametrize("name", cases("tdx-mrtd-*") or [""])
def test_every_mrtd_is_the_expected_one(name: str) -> None:
    case, folder = load(name)
    expect = case["expect"]
    if "error" in expect:
        whole = read(case, folder, "firmware_full")
        with pytest.raises(MeasurementError, match="past the end of the file"):
            tdx.mrtd(whole[131072:])
        return
    image = Firmware(read(case, folder, "firmware"))
    two_pass = case["params"]["page_add_order"].startswith("two-pass")
    assert tdx.mrtd(image, two_pass=two_pass).hex() == expect["mrtd"]
    names = ("data_offset", "raw_data_size", "memory_address", "memory_data_size", "type")
    for section, wanted in zip(image.tdvf, expect.get("sections", image.tdvf), strict=True):
        if isinstance(wanted, dict):
            assert {key: getattr(section, key) for key in (*names, "attributes")} == wanted
