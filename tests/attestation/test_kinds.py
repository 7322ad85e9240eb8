"""The table of kinds: imported late, whole, and complete in what a module must have."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyenclave.attestation import kinds
from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import Registry


def test_importing_attestation_loads_no_verifier_and_no_heavy_library():
    script = "import sys, pyenclave.attestation\nprint(*sys.modules)\n"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not [name for name in loaded if ".verify_" in name]
    heavy = ("numpy", "msgspec", "cryptography.x509", "pyenclave.formats.x509", "json", "tomllib")
    assert not set(heavy) & set(loaded)


@pytest.mark.parametrize("kind", kinds.available())
def test_every_kind_has_checks_of_genuineness_a_case_and_claims(kind):
    found = kinds.load(kind)
    assert isinstance(found.checks, Registry)
    assert issubclass(found.case, CaseBase)
    assert callable(found.claims)
    parts = list(found.checks.parts.values())
    assert parts.count("evidence") >= 1
    assert list(found.checks.parts) == list(found.checks.functions)
    if kind not in ("maa-jwks", "sgx-collateral", "sev-snp-vek-cert", "tcg-eventlog"):
        assert "nonce" in found.checks.functions, "freshness is judged by every kind of evidence"
