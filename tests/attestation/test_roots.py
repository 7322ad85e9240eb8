"""The pinned roots are the ones that were pinned."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pyenclave.attestation import roots
from pyenclave.errors import CollateralError

FOLDER = Path(roots.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.pem"))


def test_every_file_is_named_and_every_name_is_a_file():
    used = {
        name for table in (roots.VENDORS, roots.INTERMEDIATES) for v in table.values() for name in v
    }
    assert used == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file_table_and_readme_agree(name):
    der = roots.der_of(name)
    readme = (FOLDER / "README.md").read_text("utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith(f"| {name}.pem ")]
    assert hashlib.sha256(der).hexdigest() in line
    assert (
        x509.load_pem_x509_certificate((FOLDER / f"{name}.pem").read_bytes()).public_bytes(
            Encoding.DER
        )
        == der
    )


def test_they_are_those_of_the_vectors(vectors):
    readme = (vectors / "attestation" / "roots" / "README.md").read_text("utf-8")
    for name in NAMES:
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {name}.pem ")]
        (fingerprint,) = re.findall(r"`([0-9a-f]{64})`", line)
        assert hashlib.sha256(roots.der_of(name)).hexdigest() == fingerprint


def test_no_intermediate_is_an_anchor():
    anchors = {name for names in roots.VENDORS.values() for name in names}
    assert not anchors & {name for names in roots.INTERMEDIATES.values() for name in names}
    assert not [name for name in anchors if "ask" in name or "asvk" in name]


def test_every_anchor_signs_itself():
    for names in roots.VENDORS.values():
        for name in names:
            certificate = x509.load_der_x509_certificate(roots.der_of(name))
            assert certificate.subject == certificate.issuer


@pytest.mark.parametrize("damage", ["swapped", "cut", "absent", "junk"])
def test_a_damaged_root_is_refused(damage, tmp_path, monkeypatch):
    text = (FOLDER / "amd-ark-milan.pem").read_bytes()
    other = (FOLDER / "amd-ark-genoa.pem").read_bytes()
    content = {"swapped": other, "cut": text[:400], "junk": text.replace(b"M", b"!")}.get(damage)
    if content is not None:
        (tmp_path / "amd-ark-milan.pem").write_bytes(content)
    monkeypatch.setattr(roots, "__file__", str(tmp_path / "__init__.py"))
    roots.der_of.cache_clear()
    try:
        with pytest.raises(CollateralError, match="pinned root amd-ark-milan"):
            roots.der_of("amd-ark-milan")
    finally:
        roots.der_of.cache_clear()
