"""Signing and the identity that a signature proves: forged and stripped first."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from pyenclave.errors import EnclaveError, SignatureError
from pyenclave.formats.image import FileEntry, Image, ImageInfo, assemble, with_sigstruct
from pyenclave.formats.lock import Lock
from pyenclave.formats.sgx import Sigstruct
from pyenclave.image import keys, sign
from pyenclave.measurement.image import draft_sigstruct, measure_image, verify_image
from pyenclave.measurement.sgx import compute_q1_q2, sign_message

CODE = b"def score(): ...\n"


def image_of(**changes: object) -> bytes:
    values: dict[str, object] = {
        "name": "scoring",
        "product_id": 7,
        "security_version": 3,
        "debug": False,
        "threads": 1,
        "entry_kind": "python",
        "entry_module": "score",
        "entry_file": "entry/score.py",
        "functions": ({"name": "score"},),
        "sealed_memory": 0,
        "message_limit": 4096,
        "ocalls": (),
        "blas_threads": 1,
        "jit": False,
        "seal": {},
        "files": (FileEntry(name="entry/score.py", size=len(CODE), executable=True),),
    }
    lock = Lock(python="p", bootstrap=(), modules=(), libraries=(), preload=())
    return assemble(ImageInfo(**{**values, **changes}), lock, {"entry/score.py": CODE})


UNSIGNED = image_of()


@pytest.fixture(scope="module")
def signed(key: bytes) -> bytes:
    return sign.sign(UNSIGNED, key)


def judged(data: bytes) -> None:
    verify_image(Image.parse(data))


def test_every_byte_of_a_signed_image_is_covered_without_the_checksum(signed: bytes) -> None:
    """An attacker corrects the checksum: measurement, signature and zero checks must catch all."""
    last = len(signed) - 32
    image = Image.parse(signed)
    padding_starts = [offset + size for _, offset, size, _ in image.sections()[1:]]
    for at in range(last):
        in_padding = at < last - 1808 and any(
            start + 16 <= at < -(-start // 4096) * 4096 for start in [*padding_starts, 64]
        )
        if in_padding and at % 64:
            continue
        body = bytearray(signed[:last])
        body[at] ^= 1
        with pytest.raises(EnclaveError):
            judged(bytes(body) + hashlib.sha256(body).digest())


def test_every_flipped_byte_is_refused_by_the_checksum(signed: bytes) -> None:
    for at in range(len(signed)):
        bad = bytearray(signed)
        bad[at] ^= 0x80
        with pytest.raises(EnclaveError):
            Image.parse(bad)


def test_a_signature_of_another_image_is_refused(signed: bytes) -> None:
    for changes in ({"name": "other"}, {"product_id": 8}, {"security_version": 2}, {"debug": True}):
        moved = with_sigstruct(
            Image.parse(image_of(**changes)), Image.parse(signed).sigstruct_bytes
        )
        with pytest.raises(SignatureError):
            judged(moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"isv_prod_id": 8},
        {"isv_svn": 4},
        {"isv_svn": 2},
        {"mrenclave": bytes(32)},
        {"misc_select": 1},
        {"misc_mask": 0},
        {"vendor": 0x8086},
        {"sw_defined": 1},
        {"type": 1 << 31},
        {"isv_family_id": b"x" * 16},
        {"isv_ext_prod_id": b"x" * 16},
        {"cet_attributes": 1},
    ],
)
def test_a_true_signature_over_other_words_is_refused(
    key: bytes, changes: dict[str, object]
) -> None:
    """The signer's own key, but the SIGSTRUCT does not say what the image says."""
    image = Image.parse(UNSIGNED)
    draft = replace(draft_sigstruct(image, measure_image(image)), **changes)
    with pytest.raises(SignatureError, match=next(iter(changes))):
        judged(with_sigstruct(image, signed_by(key, draft)))


def test_attributes_that_allow_debug_behind_the_manifests_back_are_refused(key: bytes) -> None:
    image = Image.parse(UNSIGNED)
    draft = draft_sigstruct(image, measure_image(image))
    loose = replace(draft.attribute_mask, flags=draft.attribute_mask.flags & ~2)
    with pytest.raises(SignatureError, match="attribute_mask"):
        judged(with_sigstruct(image, signed_by(key, replace(draft, attribute_mask=loose))))


def signed_by(key: bytes, draft: Sigstruct) -> bytes:
    private = keys.load_private(key)
    signature = private.sign(sign_message(draft), padding.PKCS1v15(), hashes.SHA256())[::-1]
    modulus = private.public_key().public_numbers().n.to_bytes(384, "little")
    q1, q2 = compute_q1_q2(modulus, signature)
    return replace(draft, modulus=modulus, signature=signature, q1=q1, q2=q2).to_bytes()


def pem_of(key: object) -> bytes:
    return key.private_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def test_keys_of_another_kind_are_refused() -> None:
    others = [
        rsa.generate_private_key(public_exponent=65537, key_size=3072),
        rsa.generate_private_key(public_exponent=3, key_size=2048),
        ec.generate_private_key(ec.SECP256R1()),
    ]
    for other in others:
        with pytest.raises(SignatureError, match="RSA-3072"):
            sign.sign(UNSIGNED, pem_of(other))
    for text in (b"", b"-----BEGIN PRIVATE KEY-----\n", b"\xff" * 100):
        with pytest.raises(SignatureError, match="cannot be read"):
            sign.sign(UNSIGNED, text)


def test_a_wrong_passphrase_is_refused() -> None:
    locked = keys.keygen(b"right")
    for passphrase in (None, b"wrong"):
        with pytest.raises(SignatureError, match="cannot be read"):
            sign.sign(UNSIGNED, locked, passphrase=passphrase)
    judged(sign.sign(UNSIGNED, locked, passphrase=b"right"))
    with pytest.raises(ValueError, match="empty"):
        keys.keygen(b"")


def test_a_wrong_second_step_is_refused(key: bytes) -> None:
    public = keys.public_pem(key)
    private = keys.load_private(key)
    digest = sign.signing_digest(UNSIGNED)
    good = private.sign(digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))
    other = keys.keygen()
    with pytest.raises(SignatureError):  # another signer's key
        sign.attach_signature(UNSIGNED, keys.public_pem(other), good)
    with pytest.raises(SignatureError):  # another image
        sign.attach_signature(image_of(name="other"), public, good)
    with pytest.raises(SignatureError):  # another date
        sign.attach_signature(UNSIGNED, public, good, date=0x20260101)
    with pytest.raises(SignatureError):  # little-endian
        sign.attach_signature(UNSIGNED, public, good[::-1])
    for wrong in (b"", good[:-1], good + b"\0", bytes(384), b"\xff" * 384):
        with pytest.raises(SignatureError):
            sign.attach_signature(UNSIGNED, public, wrong)
    with pytest.raises(SignatureError, match="public key"):
        sign.attach_signature(UNSIGNED, key, good)


def test_two_steps_give_what_one_step_gives(key: bytes, signed: bytes) -> None:
    private = keys.load_private(key)
    public = keys.public_pem(key)
    by_digest = private.sign(
        sign.signing_digest(UNSIGNED), padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())
    )
    by_message = private.sign(sign.signing_message(UNSIGNED), padding.PKCS1v15(), hashes.SHA256())
    assert sign.attach_signature(UNSIGNED, public, by_digest) == signed
    assert sign.attach_signature(UNSIGNED, public, by_message) == signed
    assert hashlib.sha256(sign.signing_message(UNSIGNED)).digest() == sign.signing_digest(UNSIGNED)


def test_signing_is_deterministic_and_replaces_a_signature(key: bytes, signed: bytes) -> None:
    assert sign.sign(UNSIGNED, key) == sign.sign(signed, key) == signed
    assert sign.unsign(signed) == UNSIGNED


def test_the_date_is_signed_but_not_measured(key: bytes, signed: bytes) -> None:
    dated = sign.sign(UNSIGNED, key, date=sign.bcd_date(1_700_000_000))
    assert Image.parse(dated).sigstruct.date == 0x20231114  # type: ignore[union-attr]
    assert dated != signed
    assert verify_image(Image.parse(dated)) == verify_image(Image.parse(signed))


@pytest.mark.parametrize("epoch", [-1, 10**18])
def test_impossible_dates_are_refused(epoch: int) -> None:
    with pytest.raises(ValueError, match="date"):
        sign.bcd_date(epoch)


def test_the_identity_is_that_of_image_and_key(key: bytes, signed: bytes) -> None:
    identity = verify_image(Image.parse(signed))
    modulus = keys.load_private(key).public_key().public_numbers().n
    assert identity.mrsigner == hashlib.sha256(modulus.to_bytes(384, "little")).digest()
    assert identity.mrenclave == measure_image(Image.parse(UNSIGNED))
    assert (identity.product_id, identity.security_version) == (7, 3)
    assert identity.signed
    assert not identity.debug_allowed
    assert identity.attributes.flags == 4
    assert identity.attribute_mask.flags & 2


def test_an_unsigned_image_has_no_signer_and_is_debug() -> None:
    identity = verify_image(Image.parse(UNSIGNED))
    assert identity.mrsigner == bytes(32)
    assert not identity.signed
    assert identity.debug_allowed
    assert not identity.attribute_mask.flags & 2


def test_the_measurement_is_sgxs_record_stream() -> None:
    """Computed again with hashlib alone, from the specification of ECREATE, EADD and EEXTEND."""
    image = Image.parse(UNSIGNED)
    stream = hashlib.sha256()
    create = b"ECREATE\0" + image.ssa_frame_size.to_bytes(4, "little")
    stream.update((create + image.size.to_bytes(8, "little")).ljust(64, b"\0"))
    for offset, flags, page in image.pages():
        add = b"EADD\0\0\0\0" + offset.to_bytes(8, "little") + flags.to_bytes(8, "little")
        stream.update(add.ljust(64, b"\0"))
        for at in range(0, 4096, 256):
            stream.update((b"EEXTEND\0" + (offset + at).to_bytes(8, "little")).ljust(64, b"\0"))
            stream.update(page[at : at + 256])
    assert measure_image(image) == stream.digest()


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path, key: bytes) -> None:
    path = tmp_path / "key.pem"
    before = os.umask(0)
    try:
        keys.write_new(path, key)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        keys.write_new(path, b"other")
    assert path.read_bytes() == key
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError):  # noqa: PT011 - EEXIST or ELOOP
        keys.write_new(tmp_path / "link", key)
    assert not (tmp_path / "absent").exists()


def test_a_key_has_3072_bits_and_exponent_3(key: bytes) -> None:
    numbers = keys.load_private(key).public_key().public_numbers()
    assert (numbers.n.bit_length(), numbers.e) == (3072, 3)
