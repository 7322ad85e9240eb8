"""
Key Vault's algorithms over private keys and shared keys (RFC 7518; PKCS #11 names for AES wrap).

One function, `perform`, does whatever a key of the vault can do; it runs wherever the private half
is: in the enclave that keeps keys. Signatures are over digests, as Key Vault has them. All that a
hostile ciphertext can bring about is one error without detail; RSA1_5 gives random bytes for a bad
padding, inside OpenSSL, so that it tells nothing (implicit rejection; looked for at first use).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave.errors import SealingError

__all__ = [
    "CURVES",
    "HOLDS",
    "OAEP",
    "OCT_SIZES",
    "RSA_SIZES",
    "AlgorithmError",
    "Key",
    "algorithms_for",
    "check_transfer",
    "oaep",
    "perform",
    "perform_public",
    "wrap_for_release",
]

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | bytes

RSA_SIZES: Final = (2048, 3072, 4096)  # bits
OCT_SIZES: Final = (128, 192, 256)  # bits
CURVES: Final[dict[str, ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
    "P-256K": ec.SECP256K1(),
}
HOLDS: Final = {True: b"\x01", False: b"\x00"}
_MAX_VALUE: Final = 64 << 10  # bytes of what is encrypted at once
_BLOCK: Final = 16
_NONCE: Final = 12

_DIGESTS: Final[dict[str, hashes.HashAlgorithm]] = {
    "256": hashes.SHA256(),
    "384": hashes.SHA384(),
    "512": hashes.SHA512(),
}
_EC_OF: Final = {
    "ES256": ("secp256r1", hashes.SHA256()),
    "ES256K": ("secp256k1", hashes.SHA256()),
    "ES384": ("secp384r1", hashes.SHA384()),
    "ES512": ("secp521r1", hashes.SHA512()),
}
# The hash of OAEP and of its MGF1, by the names of releases.
OAEP: Final[dict[str, hashes.HashAlgorithm]] = {
    "CKM_RSA_AES_KEY_WRAP": hashes.SHA1(),  # noqa: S303 - its definition; only where asked for
    "RSA_AES_KEY_WRAP_256": hashes.SHA256(),
    "RSA_AES_KEY_WRAP_384": hashes.SHA384(),
}


class AlgorithmError(SealingError):
    """The key cannot do this, or not with these fields; the text may be told to whoever asked."""


def _refused() -> AlgorithmError:
    # One text for all: padding, tag, length and integrity value fail alike.
    return AlgorithmError("the value cannot be decrypted with this key and algorithm")


def oaep(digest: hashes.HashAlgorithm) -> padding.OAEP:
    """Return OAEP with *digest* for both hashes and an empty label."""
    return padding.OAEP(padding.MGF1(digest), digest, None)


def algorithms_for(key: Key, operation: str) -> tuple[str, ...]:
    """Return the names of the algorithms that *key* has for *operation*."""
    return tuple(sorted(_table(key).get(operation, {})))


def perform(
    key: Key, operation: str, algorithm: str, fields: Mapping[str, bytes]
) -> dict[str, bytes]:
    """
    Use *key*.

    Args:
        key: The private half, or the bytes of a shared key.
        operation: ``encrypt``, ``decrypt``, ``wrapKey``, ``unwrapKey``, ``sign`` or ``verify``.
        algorithm: Key Vault's name of it.
        fields: As for `pyenclave.services.vault.backends.base`.

    Raises:
        AlgorithmError: It cannot be done; decryption does not say why.

    """
    return _run(_table(key), key, operation, algorithm, fields)


def perform_public(
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    operation: str,
    algorithm: str,
    fields: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Do what takes no private half: ``encrypt``, ``wrapKey`` or ``verify``; as `perform`."""
    if operation not in ("encrypt", "wrapKey", "verify"):
        raise AlgorithmError(f"{operation} takes the private half")
    table = _RSA_TABLE if isinstance(key, rsa.RSAPublicKey) else _EC_TABLES.get(key.curve.name, {})
    return _run(table, _PublicHalf(key), operation, algorithm, fields)


class _PublicHalf:
    """Stands for a private key where only its public half is used."""

    def __init__(self, key: Any) -> None:
        self._key = key
        self.curve = getattr(key, "curve", None)

    def public_key(self) -> Any:
        return self._key


def _run(
    tables: _Table, key: object, operation: str, algorithm: str, fields: Mapping[str, bytes]
) -> dict[str, bytes]:
    table = tables.get(operation, {})
    if algorithm not in table:
        raise AlgorithmError(
            f"{operation} with {algorithm!r:.40} is not possible with this key",
            expected=", ".join(sorted(table)) or f"a key of another kind for {operation}",
        )
    known = _FIELDS[operation]
    if unknown := sorted(set(fields) - set(known)):
        raise AlgorithmError(f"{operation} has no field {unknown[0]!r:.40}")
    if any(len(value) > _MAX_VALUE for value in fields.values()):
        raise AlgorithmError(f"a field is too long, at most {_MAX_VALUE} bytes")
    return table[algorithm](key, dict(fields))


_FIELDS: Final = {
    "encrypt": ("value", "iv", "aad"),
    "decrypt": ("value", "iv", "aad", "tag"),
    "wrapKey": ("value",),
    "unwrapKey": ("value",),
    "sign": ("value",),
    "verify": ("digest", "value"),
}
_Do = Callable[[Any, dict[str, bytes]], dict[str, bytes]]
_Table = dict[str, dict[str, _Do]]


def _need(fields: Mapping[str, bytes], name: str) -> bytes:
    if name not in fields:
        raise AlgorithmError(f"the field {name} is missing")
    return fields[name]


def _none_but(fields: Mapping[str, bytes], *names: str) -> None:
    for name in fields:
        if name not in names:
            raise AlgorithmError(f"this algorithm takes no field {name}")


def _digest_of(data: bytes, digest: hashes.HashAlgorithm) -> utils.Prehashed:
    if len(data) != digest.digest_size:
        raise AlgorithmError(
            f"a digest of {digest.name.upper()} has {digest.digest_size} bytes",
            found=f"{len(data)} bytes",
        )
    return utils.Prehashed(digest)


# ---- RSA ---------------------------------------------------------------------------------------


def _rsa_pair(scheme: Any) -> tuple[_Do, _Do]:
    def encrypt(key: rsa.RSAPrivateKey, fields: dict[str, bytes]) -> dict[str, bytes]:
        _none_but(fields, "value")
        try:
            return {"value": key.public_key().encrypt(_need(fields, "value"), scheme)}
        except ValueError:
            raise AlgorithmError("the value is too long for this key and algorithm") from None

    def decrypt(key: rsa.RSAPrivateKey, fields: dict[str, bytes]) -> dict[str, bytes]:
        _none_but(fields, "value")
        if isinstance(scheme, padding.PKCS1v15):
            _check_implicit_rejection()
        try:
            return {"value": key.decrypt(_need(fields, "value"), scheme)}
        except ValueError:
            raise _refused() from None

    return encrypt, decrypt


_rejects: list[bool] = []


def _check_implicit_rejection() -> None:
    """Refuse RSA1_5 where OpenSSL would tell bad paddings apart (before 3.2)."""
    if not _rejects:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        zero = (2).to_bytes(256, "big")  # no ciphertext of any message, but in one of 2**64 cases
        try:
            key.decrypt(zero, padding.PKCS1v15())
            _rejects.append(True)
        except ValueError:
            _rejects.append(False)
    if not _rejects[0]:
        raise AlgorithmError("RSA1_5 cannot be decrypted safely with this OpenSSL (3.2 is needed)")


def _rsa_signature(name: str) -> tuple[_Do, _Do]:
    digest = _DIGESTS[name[2:]]
    scheme: Any = padding.PKCS1v15()
    if name.startswith("PS"):
        scheme = padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH)

    def sign(key: rsa.RSAPrivateKey, fields: dict[str, bytes]) -> dict[str, bytes]:
        value = _need(fields, "value")
        return {"value": key.sign(value, scheme, _digest_of(value, digest))}

    def verify(key: rsa.RSAPrivateKey, fields: dict[str, bytes]) -> dict[str, bytes]:
        value, signature = _need(fields, "digest"), _need(fields, "value")
        hashed = _digest_of(value, digest)
        try:
            key.public_key().verify(signature, value, scheme, hashed)
        except InvalidSignature:
            return {"value": HOLDS[False]}
        return {"value": HOLDS[True]}

    return sign, verify


# ---- EC ----------------------------------------------------------------------------------------


def _ec_sign(name: str) -> tuple[_Do, _Do]:
    digest = _EC_OF[name][1]

    def sign(key: ec.EllipticCurvePrivateKey, fields: dict[str, bytes]) -> dict[str, bytes]:
        value = _need(fields, "value")
        size = (key.curve.key_size + 7) // 8
        der = key.sign(value, ec.ECDSA(_digest_of(value, digest)))
        r, s = utils.decode_dss_signature(der)
        return {"value": r.to_bytes(size, "big") + s.to_bytes(size, "big")}

    def verify(key: ec.EllipticCurvePrivateKey, fields: dict[str, bytes]) -> dict[str, bytes]:
        value, signature = _need(fields, "digest"), _need(fields, "value")
        hashed = _digest_of(value, digest)
        size = (key.curve.key_size + 7) // 8
        if len(signature) != 2 * size:
            return {"value": HOLDS[False]}
        r, s = int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big")
        try:
            der = utils.encode_dss_signature(r, s)
            key.public_key().verify(der, value, ec.ECDSA(hashed))
        except InvalidSignature:
            return {"value": HOLDS[False]}
        return {"value": HOLDS[True]}

    return sign, verify


# ---- shared keys -------------------------------------------------------------------------------


def _gcm_encrypt(key: bytes, fields: dict[str, bytes]) -> dict[str, bytes]:
    # A caller's nonce could repeat: it is made here, as Managed HSM does.
    _none_but(fields, "value", "aad")
    nonce, aad = os.urandom(_NONCE), fields.get("aad", b"")
    sealed = AESGCM(key).encrypt(nonce, _need(fields, "value"), aad)
    return {"value": sealed[:-_BLOCK], "iv": nonce, "tag": sealed[-_BLOCK:], "aad": aad}


def _gcm_decrypt(key: bytes, fields: dict[str, bytes]) -> dict[str, bytes]:
    nonce, tag = _need(fields, "iv"), _need(fields, "tag")
    if len(nonce) != _NONCE or len(tag) != _BLOCK:
        raise AlgorithmError(f"iv has {_NONCE} bytes, and tag {_BLOCK}")
    try:
        opened = AESGCM(key).decrypt(nonce, _need(fields, "value") + tag, fields.get("aad", b""))
    except InvalidTag:
        raise _refused() from None
    return {"value": opened}


def _cbc(*, padded: bool) -> tuple[_Do, _Do]:
    def encrypt(key: bytes, fields: dict[str, bytes]) -> dict[str, bytes]:
        _none_but(fields, "value", "iv")
        value, iv = _need(fields, "value"), fields.get("iv") or os.urandom(_BLOCK)
        if padded:
            fill = _BLOCK - len(value) % _BLOCK
            value += bytes([fill]) * fill
        _check_blocks(value, iv)
        cipher = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
        return {"value": cipher.update(value) + cipher.finalize(), "iv": iv}

    def decrypt(key: bytes, fields: dict[str, bytes]) -> dict[str, bytes]:
        _none_but(fields, "value", "iv")
        value, iv = _need(fields, "value"), _need(fields, "iv")
        _check_blocks(value, iv)
        cipher = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
        opened = cipher.update(value) + cipher.finalize()
        return {"value": _unpadded(opened) if padded else opened}

    return encrypt, decrypt


def _check_blocks(value: bytes, iv: bytes) -> None:
    if len(iv) != _BLOCK:
        raise AlgorithmError(f"iv has {_BLOCK} bytes", found=f"{len(iv)} bytes")
    if not value or len(value) % _BLOCK:
        raise AlgorithmError(f"the value is not whole blocks of {_BLOCK} bytes")


def _unpadded(data: bytes) -> bytes:
    fill = data[-1]
    wanted = bytes([fill]) * fill
    if not 1 <= fill <= _BLOCK or not hmac.compare_digest(data[-fill:], wanted):
        raise _refused()
    return data[:-fill]


def _key_wrap(
    wrap: Callable[[bytes, bytes], bytes], unwrap: Callable[[bytes, bytes], bytes]
) -> tuple[_Do, _Do]:
    def do_wrap(key: bytes, fields: dict[str, bytes]) -> dict[str, bytes]:
        try:
            return {"value": wrap(key, _need(fields, "value"))}
        except ValueError:
            raise AlgorithmError("a key of this length cannot be wrapped so") from None

    def do_unwrap(key: bytes, fields: dict[str, bytes]) -> dict[str, bytes]:
        try:
            return {"value": unwrap(key, _need(fields, "value"))}
        except (ValueError, keywrap.InvalidUnwrap):
            raise _refused() from None

    return do_wrap, do_unwrap


def _hmac(name: str) -> tuple[_Do, _Do]:
    digest = _DIGESTS[name[2:]].name

    def sign(key: bytes, fields: dict[str, bytes]) -> dict[str, bytes]:
        return {"value": hmac.digest(key, _need(fields, "value"), digest)}

    def verify(key: bytes, fields: dict[str, bytes]) -> dict[str, bytes]:
        wanted = hmac.digest(key, _need(fields, "digest"), digest)
        return {"value": HOLDS[hmac.compare_digest(wanted, _need(fields, "value"))]}

    return sign, verify


# ---- which key has what ------------------------------------------------------------------------


def _tables(pairs: Mapping[tuple[str, str], Mapping[str, tuple[_Do, _Do]]]) -> _Table:
    table: _Table = {}
    for (forth, back), named in pairs.items():
        table[forth] = {name: pair[0] for name, pair in named.items()}
        table[back] = {name: pair[1] for name, pair in named.items()}
    return table


_RSA_CRYPT: Final = {
    "RSA-OAEP": _rsa_pair(oaep(hashes.SHA1())),  # noqa: S303 - its definition
    "RSA-OAEP-256": _rsa_pair(oaep(hashes.SHA256())),
    "RSA1_5": _rsa_pair(padding.PKCS1v15()),
}
_RSA_TABLE: Final = _tables(
    {
        ("encrypt", "decrypt"): _RSA_CRYPT,
        ("wrapKey", "unwrapKey"): _RSA_CRYPT,
        ("sign", "verify"): {
            f"{kind}{bits}": _rsa_signature(f"{kind}{bits}")
            for kind in ("RS", "PS")
            for bits in _DIGESTS
        },
    }
)
_EC_TABLES: Final = {
    curve: _tables({("sign", "verify"): {name: _ec_sign(name)}})
    for name, (curve, _) in _EC_OF.items()
}
_RAW_WRAP: Final = _key_wrap(keywrap.aes_key_wrap, keywrap.aes_key_unwrap)
_PADDED_WRAP: Final = _key_wrap(
    keywrap.aes_key_wrap_with_padding, keywrap.aes_key_unwrap_with_padding
)
_OCT_TABLES: Final = {
    bits // 8: _tables(
        {
            ("encrypt", "decrypt"): {
                f"A{bits}GCM": (_gcm_encrypt, _gcm_decrypt),
                f"A{bits}CBC": _cbc(padded=False),
                f"A{bits}CBCPAD": _cbc(padded=True),
            },
            ("wrapKey", "unwrapKey"): {
                f"A{bits}KW": _RAW_WRAP,
                "CKM_AES_KEY_WRAP": _RAW_WRAP,
                "CKM_AES_KEY_WRAP_PAD": _PADDED_WRAP,
            },
            ("sign", "verify"): {f"HS{size}": _hmac(f"HS{size}") for size in _DIGESTS},
        }
    )
    for bits in OCT_SIZES
}


def _table(key: Key) -> _Table:
    if isinstance(key, rsa.RSAPrivateKey):
        return _RSA_TABLE
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return _EC_TABLES.get(key.curve.name, {})
    return _OCT_TABLES.get(len(key), {})


def check_transfer(modulus: bytes, exponent: int) -> int:
    """
    Return the modulus of a key that is fit to wrap for.

    Raises:
        AlgorithmError: It is weak, or no RSA key.

    """
    number = int.from_bytes(modulus, "big")
    if (
        not modulus
        or modulus[0] == 0
        or not 2048 <= number.bit_length() <= 8192
        or number % 2 == 0
        or not 65537 <= exponent < 1 << 64
        or exponent % 2 == 0
    ):
        raise AlgorithmError(
            "the key to wrap for is weak or no RSA key",
            expected="an odd modulus of 2,048 to 8,192 bits, an odd exponent from 65,537",
        )
    return number


def wrap_for_release(material: bytes, *, modulus: bytes, exponent: int, enc: str) -> bytes:
    """
    Wrap *material* for the holder of an RSA key, as a key release has it.

    Args:
        material: The key: PKCS #8 or plain bytes.
        modulus: Of the RSA public key, big-endian, without leading zeros; 2,048 to 8,192 bits.
        exponent: Odd, 65,537 to 2**64.
        enc: Name of the construction: a key of `OAEP`.

    Returns:
        RSA-OAEP of a fresh AES-256 key, as long as the modulus, then AES-KWP of *material*.

    Raises:
        AlgorithmError: A weak or impossible public key, or an unknown construction.

    """
    digest = OAEP.get(enc)
    if digest is None:
        raise AlgorithmError(f"no such key wrap: {enc!r:.40}", expected=", ".join(OAEP))
    number = check_transfer(modulus, exponent)
    once = os.urandom(32)
    try:
        public = rsa.RSAPublicNumbers(exponent, number).public_key()
        head = public.encrypt(once, oaep(digest))
    except ValueError:
        raise AlgorithmError("the key to wrap for is no RSA key") from None
    # OpenSSL gives as many bytes as the modulus has; whoever unwraps splits there.
    return head + keywrap.aes_key_wrap_with_padding(once, material)
