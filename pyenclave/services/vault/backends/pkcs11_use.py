"""Key Vault's algorithms in a PKCS #11 token; what the token has not is refused by its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from pyenclave.errors import ServiceError
from pyenclave.formats import jose, jwa

if TYPE_CHECKING:
    from pyenclave.services.vault.backends.pkcs11_token import Token

__all__ = ["perform"]

_DIGEST_INFO: Final = {  # RFC 8017, 9.2, note 1
    "256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "512": bytes.fromhex("3051300d060960864801650304020305000440"),
}
_EC: Final = {
    "ES256": ("P-256", 32),
    "ES256K": ("P-256K", 32),
    "ES384": ("P-384", 48),
    "ES512": ("P-521", 64),
}
_TAG: Final = 16


def _cannot(what: str, why: str) -> ServiceError:
    return ServiceError(f"the token cannot do {what}: {why}", status=400, error_code="NotSupported")


def _unfit(operation: str, algorithm: str) -> jwa.AlgorithmError:
    return jwa.AlgorithmError(f"{operation} with {algorithm!r:.40} is not possible with this key")


def perform(
    token: Token,
    wrapped: bytes,
    context: bytes,
    operation: str,
    algorithm: str,
    fields: Mapping[str, bytes],
) -> dict[str, bytes]:
    """
    Use a key; arguments, fields and answer are those of `backends.base`.

    Raises:
        AlgorithmError: The key has no such algorithm, or not with these fields.
        ServiceError: The token does not do it.

    """
    _, public, _ = token.check(wrapped, context)
    shown = _public_key(public)
    if shown is not None and operation in ("encrypt", "wrapKey", "verify"):
        return jwa.perform_public(shown, operation, algorithm, fields)
    if "crv" in public:
        return _sign_ec(token, wrapped, context, public["crv"], operation, algorithm, fields)
    if "n" in public:
        return _rsa(token, wrapped, context, operation, algorithm, fields)
    key, bits = token.open(wrapped, context), int(public["size"])
    return _oct(token, key, bits, operation, algorithm, fields)


def _public_key(public: Mapping[str, str]) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    def number(name: str) -> int:
        return int.from_bytes(jose.b64url_decode(public[name]), "big")

    if "n" in public:
        return rsa.RSAPublicNumbers(number("e"), number("n")).public_key()
    if "crv" in public:
        curve = jwa.CURVES[public["crv"]]
        return ec.EllipticCurvePublicNumbers(number("x"), number("y"), curve).public_key()
    return None


def _need(fields: Mapping[str, bytes], name: str, size: int | None = None) -> bytes:
    value = fields.get(name)
    if value is None:
        raise jwa.AlgorithmError(f"the field {name} is missing")
    if size is not None and len(value) != size:
        raise jwa.AlgorithmError(f"{name} has {size} bytes", found=f"{len(value)} bytes")
    return value


# ---- RSA and EC --------------------------------------------------------------------------------


def _sign_ec(
    token: Token,
    wrapped: bytes,
    context: bytes,
    crv: str,
    operation: str,
    algorithm: str,
    fields: Mapping[str, bytes],
) -> dict[str, bytes]:
    curve, size = _EC.get(algorithm, ("", 0))
    if operation != "sign" or curve != crv:
        raise _unfit(operation, algorithm)
    value = _need(fields, "value", size)
    key = token.open(wrapped, context)
    with token.by_name(algorithm, "it has no ECDSA"):
        return {"value": bytes(key.sign(value, mechanism=token.p.Mechanism.ECDSA))}


def _rsa(
    token: Token,
    wrapped: bytes,
    context: bytes,
    operation: str,
    algorithm: str,
    fields: Mapping[str, bytes],
) -> dict[str, bytes]:
    p = token.p
    if operation == "sign" and algorithm[2:] in _DIGEST_INFO and algorithm[:2] in ("RS", "PS"):
        bits = algorithm[2:]
        value = _need(fields, "value", int(bits) // 8)
        key = token.open(wrapped, context)
        with token.by_name(algorithm, "it has not this kind of signature"):
            if algorithm[0] == "R":
                data = _DIGEST_INFO[bits] + value
                return {"value": bytes(key.sign(data, mechanism=p.Mechanism.RSA_PKCS))}
            param = (
                getattr(p.Mechanism, f"SHA{bits}"),
                getattr(p.MGF, f"SHA{bits}"),
                int(bits) // 8,
            )
            signature = key.sign(value, mechanism=p.Mechanism.RSA_PKCS_PSS, mechanism_param=param)
            return {"value": bytes(signature)}
    if operation not in ("decrypt", "unwrapKey"):
        raise _unfit(operation, algorithm)
    if algorithm == "RSA1_5":
        # Tokens tell a bad padding apart, and who asks often enough decrypts by it.
        raise _cannot("RSA1_5", "it would tell bad paddings apart")
    bits = {"RSA-OAEP": "1", "RSA-OAEP-256": "256"}.get(algorithm, "")
    if not bits:
        raise _unfit(operation, algorithm)
    value = _need(fields, "value")
    oaep = token.oaep(bits, algorithm)
    key = token.open(wrapped, context)
    with token.by_name(algorithm, f"it has no RSA-OAEP with SHA-{bits}"):
        return _decrypted(
            token,
            lambda: key.decrypt(value, mechanism=p.Mechanism.RSA_PKCS_OAEP, mechanism_param=oaep),
        )


def _decrypted(token: Token, work: Callable[[], bytes]) -> dict[str, bytes]:
    e = token.p.exceptions
    try:
        return {"value": bytes(work())}
    except (
        e.EncryptedDataInvalid,
        e.EncryptedDataLenRange,
        e.GeneralError,
        e.FunctionFailed,
        e.WrappedKeyInvalid,
        e.WrappedKeyLenRange,
        e.DataInvalid,
        e.DataLenRange,
    ):
        raise jwa.AlgorithmError(
            "the value cannot be decrypted with this key and algorithm"
        ) from None


# ---- shared keys -------------------------------------------------------------------------------


def _oct(
    token: Token,
    key: Any,
    bits: int,
    operation: str,
    algorithm: str,
    fields: Mapping[str, bytes],
) -> dict[str, bytes]:
    if algorithm in ("HS256", "HS384", "HS512"):
        raise _cannot(algorithm, "its AES keys make no HMAC")
    if operation in ("wrapKey", "unwrapKey"):
        return _wrap(token, key, bits, operation, algorithm, _need(fields, "value"))
    prefix = f"A{bits}"
    mode = algorithm.removeprefix(prefix)
    if not algorithm.startswith(prefix) or mode not in ("GCM", "CBC", "CBCPAD"):
        raise _unfit(operation, algorithm)
    if operation not in ("encrypt", "decrypt"):
        raise _unfit(operation, algorithm)
    if mode == "GCM":
        return _gcm(token, key, operation, algorithm, fields)
    return _cbc(token, key, operation, algorithm, fields)


def _gcm(
    token: Token, key: Any, operation: str, algorithm: str, fields: Mapping[str, bytes]
) -> dict[str, bytes]:
    p, aad = token.p, fields.get("aad", b"")
    value = _need(fields, "value")
    with token.by_name(algorithm, "it has no AES-GCM"):
        if operation == "encrypt":
            if "iv" in fields:
                raise jwa.AlgorithmError("this algorithm takes no field iv")
            nonce = os.urandom(12)
            param = p.GCMParams(nonce, aad, 128)
            sealed = bytes(key.encrypt(value, mechanism=p.Mechanism.AES_GCM, mechanism_param=param))
            return {"value": sealed[:-_TAG], "iv": nonce, "tag": sealed[-_TAG:], "aad": aad}
        nonce, tag = _need(fields, "iv", 12), _need(fields, "tag", _TAG)
        param = p.GCMParams(nonce, aad, 128)
        return _decrypted(
            token,
            lambda: key.decrypt(value + tag, mechanism=p.Mechanism.AES_GCM, mechanism_param=param),
        )


def _cbc(
    token: Token, key: Any, operation: str, algorithm: str, fields: Mapping[str, bytes]
) -> dict[str, bytes]:
    p, value = token.p, _need(fields, "value")
    padded = algorithm.endswith("PAD")
    mechanism = p.Mechanism.AES_CBC_PAD if padded else p.Mechanism.AES_CBC
    if (not padded or operation == "decrypt") and (not value or len(value) % 16):
        raise jwa.AlgorithmError("the value is not whole blocks of 16 bytes")
    if operation == "encrypt":
        iv = fields.get("iv") or os.urandom(16)
        _need({"iv": iv}, "iv", 16)
        with token.by_name(algorithm, "it has no AES-CBC"):
            sealed = key.encrypt(value, mechanism=mechanism, mechanism_param=iv)
        return {"value": bytes(sealed), "iv": iv}
    iv = _need(fields, "iv", 16)
    with token.by_name(algorithm, "it has no AES-CBC"):
        return _decrypted(
            token, lambda: key.decrypt(value, mechanism=mechanism, mechanism_param=iv)
        )


def _wrap(
    token: Token, key: Any, bits: int, operation: str, algorithm: str, value: bytes
) -> dict[str, bytes]:
    p = token.p
    a, plain = p.Attribute, p.KeyType.GENERIC_SECRET
    mechanisms = {
        f"A{bits}KW": p.Mechanism.AES_KEY_WRAP,
        "CKM_AES_KEY_WRAP": p.Mechanism.AES_KEY_WRAP,
        "CKM_AES_KEY_WRAP_PAD": p.Mechanism.AES_KEY_WRAP_PAD,
    }
    mechanism = mechanisms.get(algorithm)
    if mechanism is None:
        raise _unfit(operation, algorithm)
    if algorithm != "CKM_AES_KEY_WRAP_PAD" and (len(value) % 8 or len(value) < 16):
        raise jwa.AlgorithmError("a key of this length cannot be wrapped so")
    if not value:
        raise jwa.AlgorithmError("a key of this length cannot be wrapped so")
    open_to_all = {a.SENSITIVE: False, a.EXTRACTABLE: True}

    def unwrapped(data: bytes) -> bytes:
        secret = key.unwrap_key(
            p.ObjectClass.SECRET_KEY,
            plain,
            data,
            store=False,
            mechanism=mechanism,
            capabilities=0,
            template=open_to_all,
        )
        try:
            return bytes(secret[a.VALUE])
        finally:
            secret.destroy()

    with token.by_name(algorithm, "it has no such AES key wrap"):
        if operation == "wrapKey":
            secret = token.session.create_object(
                {
                    a.CLASS: p.ObjectClass.SECRET_KEY,
                    a.KEY_TYPE: plain,
                    a.TOKEN: False,
                    a.VALUE: value,
                    **open_to_all,
                }
            )
            try:
                wrapped = bytes(key.wrap_key(secret, mechanism=mechanism))
            finally:
                secret.destroy()
            if len(value) % 8 and unwrapped(wrapped) != value:
                # SoftHSM fills up with zeros, and notes the longer length.
                raise _cannot(algorithm, "it changes the length of keys of such lengths")
            return {"value": wrapped}
        return _decrypted(token, lambda: unwrapped(value))
