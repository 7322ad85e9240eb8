"""
Keys that a vTPM certifies with its attestation key (TPM 2.0 Library, part 3, TPM2_Certify).

Whether the attestation key is one of a confidential VM, the checks of the VM's evidence say.
"""

from __future__ import annotations

import hmac
from typing import Final

from pyenclave.attestation import vtpm
from pyenclave.errors import AppraisalError
from pyenclave.formats.hcl import RsaKey
from pyenclave.formats.tpm import ALG_RSA, TpmCertification, TpmPublic, TpmSignature

__all__ = ["certified_key"]

_SIZE: Final = 2  # of TPM2B's size
# TPMA_OBJECT: the private half was made in this TPM and never leaves it; it decrypts.
_FIXED_TPM, _SENSITIVE_ORIGIN, _DECRYPT, _SIGN = 1 << 1, 1 << 5, 1 << 17, 1 << 18


def _refused(what: str, expected: object, found: object, advice: str | None = None) -> Exception:
    return AppraisalError(
        f"the vTPM's key is refused by {what}", expected=expected, found=found, advice=advice
    )


def certified_key(public: bytes, certification: bytes, signature: bytes, ak: RsaKey) -> RsaKey:
    """
    Return the RSA decryption key that a vTPM certified.

    Args:
        public: TPM2B_PUBLIC or TPMT_PUBLIC of the key.
        certification: TPMS_ATTEST that names it.
        signature: TPMT_SIGNATURE or bare RSASSA signature over that.
        ak: The attestation key, from verified evidence.

    Raises:
        AppraisalError: The attestation key did not certify this key, or it is no decryption key
            that stays in the TPM.
        EvidenceFormatError: Malformed.

    """
    if int.from_bytes(public[:_SIZE], "big") == len(public) - _SIZE:
        public = public[_SIZE:]
    key = TpmPublic.from_bytes(public)
    said = TpmCertification.from_bytes(certification)
    signed = TpmSignature.from_bytes(signature, raw_size=ak.size)
    if not vtpm.signature_of(ak, signed, certification):
        raise _refused(
            "certify.signature",
            "a signature of the attestation key",
            "another",
            "The certification is another machine's, or was changed.",
        )
    if not hmac.compare_digest(said.name, key.name):
        raise _refused("certify.name", said.name.hex(), key.name.hex(), "It names another key.")
    if key.type != ALG_RSA or not 2048 <= key.bits <= 4096:
        raise _refused("certify.key", "an RSA key of 2,048 to 4,096 bits", f"{key.bits} bits")
    wanted = _FIXED_TPM | _SENSITIVE_ORIGIN | _DECRYPT
    if key.attributes & (wanted | _SIGN) != wanted:
        raise _refused(
            "certify.attributes",
            "fixedTPM, sensitiveDataOrigin and decrypt, without sign",
            f"{key.attributes:#x}",
            "A key that may leave the TPM binds nothing to it.",
        )
    return RsaKey(int.from_bytes(key.unique, "big"), key.exponent or 65537)
