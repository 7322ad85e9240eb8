"""Key Vault's algorithms, against `cryptography` used by hand and published vectors."""

from __future__ import annotations

import functools
import hashlib
import os

import pytest
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave.formats import jwa


@functools.cache
def rsa_key() -> rsa.RSAPrivateKey:
    """A key that all tests of this file share."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def keys() -> dict[str, jwa.Key]:
    """One key of each kind."""
    found: dict[str, jwa.Key] = {"RSA": rsa_key()}
    found |= {name: ec.generate_private_key(curve) for name, curve in jwa.CURVES.items()}
    return found | {f"oct{bits}": bytes(range(bits // 8)) for bits in jwa.OCT_SIZES}


DIGESTS = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation", ["encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey"]
)
@pytest.mark.parametrize(
    "algorithm", ["none", "None", "", "HS1", "ES256", "RSNULL", "A128GCM", "rsa-oaep", "RSA-OAEP"]
)
def test_no_key_does_what_is_not_its_own(operation: str, algorithm: str) -> None:
    """Only the table's algorithms, by their exact names, for the key's own kind and size."""
    for name, key in keys().items():
        if algorithm in jwa.algorithms_for(key, operation):
            continue
        fields = {"value": bytes(32)}
        with pytest.raises(jwa.AlgorithmError, match="is not possible with this key"):
            jwa.perform(key, operation, algorithm, fields)
        assert name


def test_a_curve_signs_with_its_own_algorithm_only() -> None:
    """ES256 and ES256K differ in the curve, not in the size."""
    for name, key in keys().items():
        if name.startswith("P-"):
            wanted = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "P-256K": "ES256K"}
            assert jwa.algorithms_for(key, "sign") == (wanted[name],)
            assert jwa.algorithms_for(key, "encrypt") == ()


@pytest.mark.parametrize("algorithm", ["RS256", "PS384", "RS512"])
def test_a_digest_of_another_size_is_not_signed(algorithm: str) -> None:
    """The value is a digest of the algorithm's hash, never a message."""
    size = int(algorithm[2:]) // 8
    for wrong in (0, 1, size - 1, size + 1, 20):
        with pytest.raises(jwa.AlgorithmError, match="a digest of"):
            jwa.perform(rsa_key(), "sign", algorithm, {"value": bytes(wrong)})


def test_a_callers_nonce_is_not_used_for_gcm() -> None:
    """A repeated nonce would give the key's stream away."""
    with pytest.raises(jwa.AlgorithmError, match="no field iv"):
        jwa.perform(bytes(16), "encrypt", "A128GCM", {"value": b"x", "iv": bytes(12)})


def test_unknown_fields_and_missing_ones_are_named() -> None:
    """Nothing is ignored."""
    with pytest.raises(jwa.AlgorithmError, match="no field"):
        jwa.perform(bytes(16), "wrapKey", "A128KW", {"value": bytes(16), "iv": b""})
    with pytest.raises(jwa.AlgorithmError, match="the field tag is missing"):
        jwa.perform(bytes(16), "decrypt", "A128GCM", {"value": b"", "iv": bytes(12)})
    with pytest.raises(jwa.AlgorithmError, match="too long"):
        jwa.perform(bytes(16), "encrypt", "A128GCM", {"value": bytes(70_000)})


@pytest.mark.parametrize(
    "algorithm",
    ["RSA-OAEP", "RSA-OAEP-256", "A256GCM", "A256KW", "CKM_AES_KEY_WRAP_PAD", "A256CBCPAD"],
)
def test_every_bad_ciphertext_gives_one_error(algorithm: str) -> None:
    """Padding, tag, length and integrity value are not told apart."""
    key: jwa.Key = rsa_key() if algorithm.startswith("RSA") else bytes(range(32))
    forth, back = ("wrapKey", "unwrapKey") if "W" in algorithm[3:] else ("encrypt", "decrypt")
    sealed = jwa.perform(key, forth, algorithm, {"value": bytes(range(32))})
    texts = set()
    for at in (0, 1, len(sealed["value"]) // 2, len(sealed["value"]) - 1):
        for bit in (1, 0x80):
            value = bytearray(sealed["value"])
            value[at] ^= bit
            try:
                opened = jwa.perform(key, back, algorithm, {**sealed, "value": bytes(value)})
            except jwa.AlgorithmError as error:
                texts.add(str(error))
            else:  # only CBC has no integrity of its own
                assert algorithm == "A256CBCPAD"
                assert opened["value"] != bytes(range(32))
    assert texts == {"the value cannot be decrypted with this key and algorithm"}


def test_a_bad_rsa1_5_padding_tells_nothing() -> None:
    """Implicit rejection: some bytes come out, the same each time, and no error."""
    garbage = (12345).to_bytes(256, "big")
    first = jwa.perform(rsa_key(), "decrypt", "RSA1_5", {"value": garbage})
    assert jwa.perform(rsa_key(), "decrypt", "RSA1_5", {"value": garbage}) == first


# ---- it is what the names say ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"])
def test_rsa_signatures_are_verified_by_others(name: str) -> None:
    """By `cryptography` over the message, and by `verify`; a changed one does not hold."""
    digest = DIGESTS[name[2:]]
    hashed = hashlib.new(digest.name, b"message").digest()
    signature = jwa.perform(rsa_key(), "sign", name, {"value": hashed})["value"]
    scheme: padding.AsymmetricPadding = padding.PKCS1v15()
    if name[0] == "P":
        scheme = padding.PSS(padding.MGF1(digest), digest.digest_size)
    rsa_key().public_key().verify(signature, b"message", scheme, digest)
    verdicts = [
        jwa.perform(rsa_key(), "verify", name, {"digest": hashed, "value": value})["value"]
        for value in (signature, bytes([signature[0] ^ 1]) + signature[1:], b"", signature + b"\0")
    ]
    assert verdicts == [b"\x01", b"\x00", b"\x00", b"\x00"]


@pytest.mark.parametrize("name", ["ES256", "ES384", "ES512", "ES256K"])
def test_ec_signatures_are_raw_and_verified_by_others(name: str) -> None:
    """r and s, each as long as the curve's order."""
    curve = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "ES256K": "P-256K"}[name]
    key = ec.generate_private_key(jwa.CURVES[curve])
    digest = DIGESTS[name[2:5]]
    hashed = hashlib.new(digest.name, b"message").digest()
    raw = jwa.perform(key, "sign", name, {"value": hashed})["value"]
    size = (key.curve.key_size + 7) // 8
    assert len(raw) == 2 * size
    r, s = int.from_bytes(raw[:size], "big"), int.from_bytes(raw[size:], "big")
    key.public_key().verify(utils.encode_dss_signature(r, s), b"message", ec.ECDSA(digest))
    bad = [raw[:-1], raw + b"\0", b"", bytes(2 * size), raw[size:] + raw[:size]]
    verdicts = [
        jwa.perform(key, "verify", name, {"digest": hashed, "value": value})["value"]
        for value in (raw, *bad)
    ]
    assert verdicts == [b"\x01"] + [b"\x00"] * len(bad)


@pytest.mark.parametrize("name", ["RSA-OAEP", "RSA-OAEP-256", "RSA1_5"])
def test_rsa_encryption_is_opened_by_others_and_theirs_by_us(name: str) -> None:
    """In both directions, for encrypt and wrapKey alike."""
    scheme: padding.AsymmetricPadding = padding.PKCS1v15()
    if name != "RSA1_5":
        digest = hashes.SHA256() if name.endswith("256") else hashes.SHA1()
        scheme = padding.OAEP(padding.MGF1(digest), digest, None)
    for forth, back in (("encrypt", "decrypt"), ("wrapKey", "unwrapKey")):
        sealed = jwa.perform(rsa_key(), forth, name, {"value": b"secret"})["value"]
        assert rsa_key().decrypt(sealed, scheme) == b"secret"
        theirs = rsa_key().public_key().encrypt(b"theirs", scheme)
        assert jwa.perform(rsa_key(), back, name, {"value": theirs}) == {"value": b"theirs"}
    with pytest.raises(jwa.AlgorithmError, match="too long"):
        jwa.perform(rsa_key(), "encrypt", name, {"value": bytes(300)})


@pytest.mark.parametrize("bits", jwa.OCT_SIZES)
def test_shared_keys_do_what_others_do(bits: int) -> None:
    """GCM, CBC with and without padding, both key wraps, HMAC."""
    key = os.urandom(bits // 8)
    gcm = jwa.perform(key, "encrypt", f"A{bits}GCM", {"value": b"text", "aad": b"more"})
    assert AESGCM(key).decrypt(gcm["iv"], gcm["value"] + gcm["tag"], b"more") == b"text"
    assert jwa.perform(key, "decrypt", f"A{bits}GCM", gcm) == {"value": b"text"}
    iv = bytes(range(16))
    for name, text in ((f"A{bits}CBC", bytes(48)), (f"A{bits}CBCPAD", bytes(45))):
        sealed = jwa.perform(key, "encrypt", name, {"value": text, "iv": iv})
        cipher = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
        opened = cipher.update(sealed["value"]) + cipher.finalize()
        assert opened == text + (b"" if name.endswith("CBC") else b"\x03\x03\x03")
        assert jwa.perform(key, "decrypt", name, sealed) == {"value": text}
    with pytest.raises(jwa.AlgorithmError, match="whole blocks"):
        jwa.perform(key, "encrypt", f"A{bits}CBC", {"value": bytes(15), "iv": iv})
    for name in (f"A{bits}KW", "CKM_AES_KEY_WRAP"):
        wrapped = jwa.perform(key, "wrapKey", name, {"value": bytes(24)})["value"]
        assert keywrap.aes_key_unwrap(key, wrapped) == bytes(24)
        assert jwa.perform(key, "unwrapKey", name, {"value": wrapped}) == {"value": bytes(24)}
    wrapped = jwa.perform(key, "wrapKey", "CKM_AES_KEY_WRAP_PAD", {"value": b"seven b"})["value"]
    assert keywrap.aes_key_unwrap_with_padding(key, wrapped) == b"seven b"
    mac = jwa.perform(key, "sign", "HS256", {"value": b"digest"})["value"]
    assert (
        jwa.perform(key, "verify", "HS256", {"digest": b"digest", "value": mac})["value"] == b"\1"
    )
    assert (
        jwa.perform(key, "verify", "HS256", {"digest": b"digesT", "value": mac})["value"] == b"\0"
    )


# ---- release -----------------------------------------------------------------------------------


@pytest.mark.parametrize("enc", sorted(jwa.OAEP))
@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 31, 1217])
def test_a_released_key_is_unwrapped_by_others(enc: str, size: int) -> None:
    """OAEP by the name's hash, split at the modulus, KWP with the whole integrity value."""
    numbers = rsa_key().public_key().public_numbers()
    modulus = numbers.n.to_bytes(256, "big")
    material = os.urandom(size)
    sealed = jwa.wrap_for_release(material, modulus=modulus, exponent=numbers.e, enc=enc)
    once = rsa_key().decrypt(sealed[:256], jwa.oaep(jwa.OAEP[enc]))
    assert len(once) == 32
    assert keywrap.aes_key_unwrap_with_padding(once, sealed[256:]) == material
    others = [name for name in jwa.OAEP if name != enc]
    for other in others:
        with pytest.raises(ValueError, match="failed"):
            rsa_key().decrypt(sealed[:256], jwa.oaep(jwa.OAEP[other]))


def _modulus(bits: int) -> bytes:
    return (((1 << bits) - 1) | 1).to_bytes((bits + 7) // 8, "big")


@pytest.mark.parametrize(
    ("modulus", "exponent"),
    [
        (b"", 65537),
        (b"\x01", 65537),
        (_modulus(1024), 65537),
        (_modulus(2047), 65537),
        (_modulus(8200), 65537),
        (b"\0" + _modulus(2048), 65537),
        (_modulus(2048)[:-1] + b"\xfe", 65537),
        (_modulus(2048), 1),
        (_modulus(2048), 3),
        (_modulus(2048), 65535),
        (_modulus(2048), 65538),
        (_modulus(2048), 0),
        (_modulus(2048), -65537),
        (_modulus(2048), 1 << 64),
    ],
)
def test_nothing_is_wrapped_for_a_weak_key(modulus: bytes, exponent: int) -> None:
    """Small or even moduli, small, even or huge exponents (SKR-06)."""
    with pytest.raises(jwa.AlgorithmError, match="weak or no RSA key"):
        jwa.wrap_for_release(b"k", modulus=modulus, exponent=exponent, enc="RSA_AES_KEY_WRAP_256")


@pytest.mark.parametrize(
    "enc", ["", "RSA_AES_KEY_WRAP", "rsa_aes_key_wrap_256", "RSA_AES_KEY_WRAP_512", "none"]
)
def test_there_are_three_wraps_and_no_others(enc: str) -> None:
    """A caller does not choose another hash (SKR-06)."""
    with pytest.raises(jwa.AlgorithmError, match="no such key wrap"):
        jwa.wrap_for_release(b"k", modulus=_modulus(2048), exponent=65537, enc=enc)
