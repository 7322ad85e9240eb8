"""Key Vault's algorithms in a PKCS #11 token; what the token has not is refused by its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.errors import ServiceError
from pyenclave.formats import jose, jwa
from pyenclave.services.vault.backends.pkcs11_token import Token, cannot

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


@dataclass(frozen=True, slots=True)
class _Use:
    """What is to be done with a key, and the token that is to do it."""

    token: Token
    operation: str
    algorithm: str
    fields: Mapping[str, bytes]

    def unfit(self) -> jwa.AlgorithmError:
        """Return what the key, of another kind or length, refuses it with."""
        return jwa.AlgorithmError(
            f"{self.operation} with {self.algorithm!r:.40} is not possible with this key"
        )

    def cannot(self, why: str) -> ServiceError:
        """Return what the token refuses it with."""
        return cannot(self.algorithm, why)

    def by_name(self, why: str) -> AbstractContextManager[None]:
        """Refuse it by its name if the token does not do it."""
        return self.token.by_name(self.algorithm, why)

    def need(self, name: str, size: int | None = None) -> bytes:
        """Return a field."""
        value = self.fields.get(name)
        if value is None:
            raise jwa.AlgorithmError(f"the field {name} is missing")
        if size is not None and len(value) != size:
            raise jwa.AlgorithmError(f"{name} has {size} bytes", found=f"{len(value)} bytes")
        return value


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
    use = _Use(token, operation, algorithm, fields)
    if "crv" in public:
        return _sign_ec(use, wrapped, context, public["crv"])
    if "n" in public:
        return _rsa(use, wrapped, context)
    return _oct(use, token.open(wrapped, context), int(public["size"]))


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


# ---- RSA and EC --------------------------------------------------------------------------------


def _sign_ec(use: _Use, wrapped: bytes, context: bytes, crv: str) -> dict[str, bytes]:
    curve, size = _EC.get(use.algorithm, ("", 0))
    if use.operation != "sign" or curve != crv:
        raise use.unfit()
    value = use.need("value", size)
    key = use.token.open(wrapped, context)
    with use.by_name("it has no ECDSA"):
        return {"value": bytes(key.sign(value, mechanism=use.token.p.Mechanism.ECDSA))}


def _rsa(use: _Use, wrapped: bytes, context: bytes) -> dict[str, bytes]:
    token, algorithm = use.token, use.algorithm
    p = token.p
    if use.operation == "sign" and algorithm[2:] in _DIGEST_INFO and algorithm[:2] in ("RS", "PS"):
        bits = algorithm[2:]
        value = use.need("value", int(bits) // 8)
        key = token.open(wrapped, context)
        with use.by_name("it has not this kind of signature"):
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
    if use.operation not in ("decrypt", "unwrapKey"):
        raise use.unfit()
    if algorithm == "RSA1_5":
        # Tokens tell a bad padding apart, and who asks often enough decrypts by it.
        raise use.cannot("it would tell bad paddings apart")
    bits = {"RSA-OAEP": "1", "RSA-OAEP-256": "256"}.get(algorithm, "")
    if not bits:
        raise use.unfit()
    value = use.need("value")
    oaep = token.oaep(bits, algorithm)
    key = token.open(wrapped, context)
    with use.by_name(f"it has no RSA-OAEP with SHA-{bits}"):
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


def _oct(use: _Use, key: Any, bits: int) -> dict[str, bytes]:
    algorithm = use.algorithm
    if algorithm in ("HS256", "HS384", "HS512"):
        raise use.cannot("its AES keys make no HMAC")
    if use.operation in ("wrapKey", "unwrapKey"):
        return _wrap(use, key, bits, use.need("value"))
    prefix = f"A{bits}"
    mode = algorithm.removeprefix(prefix)
    if not algorithm.startswith(prefix) or mode not in ("GCM", "CBC", "CBCPAD"):
        raise use.unfit()
    if use.operation not in ("encrypt", "decrypt"):
        raise use.unfit()
    return _gcm(use, key) if mode == "GCM" else _cbc(use, key)


def _gcm(use: _Use, key: Any) -> dict[str, bytes]:
    p, aad = use.token.p, use.fields.get("aad", b"")
    value = use.need("value")
    with use.by_name("it has no AES-GCM"):
        if use.operation == "encrypt":
            if "iv" in use.fields:
                raise jwa.AlgorithmError("this algorithm takes no field iv")
            nonce = os.urandom(12)
            param = p.GCMParams(nonce, aad, 128)
            sealed = bytes(key.encrypt(value, mechanism=p.Mechanism.AES_GCM, mechanism_param=param))
            return {"value": sealed[:-_TAG], "iv": nonce, "tag": sealed[-_TAG:], "aad": aad}
        nonce, tag = use.need("iv", 12), use.need("tag", _TAG)
        param = p.GCMParams(nonce, aad, 128)
        return _decrypted(
            use.token,
            lambda: key.decrypt(value + tag, mechanism=p.Mechanism.AES_GCM, mechanism_param=param),
        )


def _cbc(use: _Use, key: Any) -> dict[str, bytes]:
    p, value = use.token.p, use.need("value")
    padded = use.algorithm.endswith("PAD")
    mechanism = p.Mechanism.AES_CBC_PAD if padded else p.Mechanism.AES_CBC
    if (not padded or use.operation == "decrypt") and (not value or len(value) % 16):
        raise jwa.AlgorithmError("the value is not whole blocks of 16 bytes")
    if use.operation == "encrypt":
        iv = use.need("iv", 16) if use.fields.get("iv") else os.urandom(16)
        with use.by_name("it has no AES-CBC"):
            sealed = key.encrypt(value, mechanism=mechanism, mechanism_param=iv)
        return {"value": bytes(sealed), "iv": iv}
    iv = use.need("iv", 16)
    with use.by_name("it has no AES-CBC"):
        return _decrypted(
            use.token, lambda: key.decrypt(value, mechanism=mechanism, mechanism_param=iv)
        )


def _wrap(use: _Use, key: Any, bits: int, value: bytes) -> dict[str, bytes]:
    token, algorithm = use.token, use.algorithm
    p = token.p
    a, plain = p.Attribute, p.KeyType.GENERIC_SECRET
    mechanisms = {
        f"A{bits}KW": p.Mechanism.AES_KEY_WRAP,
        "CKM_AES_KEY_WRAP": p.Mechanism.AES_KEY_WRAP,
        "CKM_AES_KEY_WRAP_PAD": p.Mechanism.AES_KEY_WRAP_PAD,
    }
    mechanism = mechanisms.get(algorithm)
    if mechanism is None:
        raise use.unfit()
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

    with use.by_name("it has no such AES key wrap"):
        if use.operation == "wrapKey":
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
                raise use.cannot("it changes the length of keys of such lengths")
            return {"value": wrapped}
        return _decrypted(token, lambda: unwrapped(value))
