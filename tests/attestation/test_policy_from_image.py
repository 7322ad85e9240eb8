"""Policies made from an image: what the relying party holds becomes the reference."""

from __future__ import annotations

import pytest

from pyenclave.attestation import AppraisalPolicy
from pyenclave.errors import ImageError
from pyenclave.formats.image import Image
from pyenclave.image import build, keys, sign
from pyenclave.image.manifest import Manifest
from pyenclave.measurement.image import verify_image


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("image")
    (folder / "small.py").write_text(
        "from pyenclave import trusted\n\n\n@trusted.ecall\ndef f(x: int) -> int:\n    return x\n"
    )
    manifest = Manifest(name="small", entry=folder / "small.py", product_id=7, security_version=3)
    unsigned = build.build_manifest(manifest)
    return unsigned, sign.sign(unsigned, keys.keygen())


def test_a_signed_image_gives_measurement_signer_product_and_version(images, tmp_path):
    identity = verify_image(Image.parse(images[1]))
    (tmp_path / "small.enclave").write_bytes(images[1])
    for source in (images[1], bytearray(images[1]), tmp_path / "small.enclave"):
        policy = AppraisalPolicy.from_image(source, dangerous_allow_software=True)
        assert policy.measurements == (identity.mrenclave,)
        assert policy.signers == (identity.mrsigner,)
        assert (policy.product_id, policy.min_security_version) == (7, 3)
        assert policy.dangerous_allow_software
        assert not policy.allow_debug


def test_an_unsigned_image_gives_its_measurement_only(images):
    policy = AppraisalPolicy.from_image(images[0])
    assert policy.signers == ()
    assert policy.measurements
    with pytest.raises(ValueError, match="unsigned"):
        AppraisalPolicy.from_image(images[0], any_version_of_signer=True)


def test_later_versions_of_the_signer_can_be_asked_for(images):
    policy = AppraisalPolicy.from_image(images[1], any_version_of_signer=True)
    assert policy.measurements == ()
    assert policy.signers
    assert (policy.product_id, policy.min_security_version) == (7, 3)


def test_a_changed_image_gives_no_policy(images):
    for position in range(0, len(images[1]), len(images[1]) // 40):
        changed = bytearray(images[1])
        changed[position] ^= 1
        with pytest.raises(ImageError):
            AppraisalPolicy.from_image(changed)


def test_what_is_no_image_gives_no_policy(tmp_path):
    with pytest.raises(ImageError):
        AppraisalPolicy.from_image(b"not an image")
    with pytest.raises(FileNotFoundError):
        AppraisalPolicy.from_image(tmp_path / "missing")
