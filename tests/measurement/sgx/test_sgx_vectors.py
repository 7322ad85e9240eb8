"""Every SGX case of the measurement vectors; binaries that are not kept there by hand.

PYENCLAVE_SGX_BINARIES may name a folder with CASE/FILE for the cases whose ``raw`` is absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pyenclave.errors import SignatureError
from pyenclave.measurement.sgx_file import measure_sgx

BINARIES = os.environ.get("PYENCLAVE_SGX_BINARIES")


def cases(vectors: Path) -> list[dict[str, Any]]:
    folders = sorted((vectors / "measurement").glob("sgx-*"))
    return [json.loads((folder / "case.json").read_text()) for folder in folders]


def content(vectors: Path, case: dict[str, Any], role: str) -> bytes | None:
    """The bytes of a file of a case, checked; None if it is nowhere."""
    file = case["files"][role]
    folders = [vectors / "measurement", *([Path(BINARIES)] if BINARIES else [])]
    for folder in folders:
        path = folder / case["id"] / file["path"]
        if path.exists():
            data = path.read_bytes()
            assert hashlib.sha256(data).hexdigest() == file["sha256"], path
            return data
    return None


def check(case: dict[str, Any], data: bytes, beside: bytes | None) -> None:
    expect = case["expect"]
    if "reject" in expect:
        with pytest.raises(SignatureError):
            measure_sgx(data)
        return
    found = measure_sgx(data, sigstruct=beside)
    claims = found.claims()
    wrong = {
        name: (value, claims.get(name))
        for name, value in expect.items()
        if claims.get(name) != value
    }
    assert not wrong, case["id"]
    negative = case["kind"].endswith("negative")
    assert found.verified is not negative
    if not negative:
        assert claims["kind"] == case["kind"]
    if case["mrenclave_reproduced"]:
        assert found.matches is True


def test_every_signature(vectors: Path) -> None:
    """SIGSTRUCT-only cases, whose files are there."""
    done = 0
    for case in cases(vectors):
        if case["kind"].startswith("sgx-sigstruct"):
            data = content(vectors, case, "sigstruct")
            assert data is not None
            check(case, data, None)
            done += 1
    assert done == 15


def test_every_enclave(vectors: Path) -> None:
    """SDK, Open Enclave and SGXS cases, as far as somebody fetched their binaries."""
    done, absent = 0, []
    for case in cases(vectors):
        if case["kind"].startswith("sgx-sigstruct"):
            continue
        role = "sgxs" if case["kind"] == "sgx-sgxs" else "enclave"
        data = content(vectors, case, role)
        if data is None:
            assert case["raw"].startswith("absent")
            absent.append(case["id"])
            continue
        beside = content(vectors, case, "sigstruct") if "sigstruct" in case["files"] else None
        check(case, data, beside)
        done += 1
    if absent:
        pytest.skip(f"{done} done; not here (PYENCLAVE_SGX_BINARIES): {', '.join(absent)}")
    assert done == 15


def test_the_public_test_key_is_named(vectors: Path) -> None:
    """Its MRSIGNER is in two cases' expectations; nobody should trust it."""
    from pyenclave.measurement.sigstruct import PUBLIC_TEST_SIGNERS

    signers = [case["expect"].get("mrsigner") for case in cases(vectors)]
    known = {signer for signer in signers if signer in PUBLIC_TEST_SIGNERS}
    assert len(known) == 1
