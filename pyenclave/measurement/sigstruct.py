"""
What a SIGSTRUCT says and proves, by the names that ``measure --json`` prints.

Layout and checks are in ``formats.sgx`` and ``measurement.sgx``; here they become claims and
warnings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyenclave.formats.sgx import (
    FLAG_DEBUG,
    FLAG_EINITTOKEN_KEY,
    FLAG_KSS,
    FLAG_MODE64BIT,
    FLAG_PROVISION_KEY,
    Sigstruct,
)
from pyenclave.measurement.sgx import mrsigner, q1_q2_valid, signature_valid

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["PUBLIC_TEST_SIGNERS", "Signed", "examine"]

# MRSIGNER of keys whose private half is published: anybody can sign with them.
PUBLIC_TEST_SIGNERS = {
    "83d719e77deaca1470f6baf62a4d774303c899db69020f9c70ee1dfc08c7ce9e": (
        "the sample key of Intel's SDK and of many public projects"
    ),
}

_FLAG_NAMES = {
    FLAG_DEBUG: "DEBUG",
    FLAG_MODE64BIT: "MODE64BIT",
    FLAG_PROVISION_KEY: "PROVISION_KEY",
    FLAG_EINITTOKEN_KEY: "EINITTOKEN_KEY",
    FLAG_KSS: "KSS",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """
    A SIGSTRUCT and what was found about it.

    Attributes:
        sigstruct: The structure.
        mrsigner: SHA-256 of its modulus.
        signature_valid: Whether its RSA-3072 signature holds.
        q1_q2_valid: Whether Q1 and Q2 belong to it, as EINIT demands.

    """

    sigstruct: Sigstruct
    mrsigner: bytes
    signature_valid: bool
    q1_q2_valid: bool

    @property
    def valid(self) -> bool:
        """Whether EINIT would take the signature."""
        return self.signature_valid and self.q1_q2_valid

    @property
    def debug_allowed(self) -> bool:
        """Whether the enclave may be launched with DEBUG, so that its memory can be read."""
        wanted, mask = self.sigstruct.attributes.flags, self.sigstruct.attribute_mask.flags
        return bool(wanted & FLAG_DEBUG) or not mask & FLAG_DEBUG

    def claims(self) -> dict[str, Any]:
        """Return the fields; bytes are as they stand in the structure."""
        own = self.sigstruct
        return {
            "mrsigner": self.mrsigner.hex(),
            "vendor": own.vendor,
            "date_hex": f"{own.date:08x}",
            "swdefined": own.sw_defined,
            "exponent": own.exponent,
            "miscselect": own.misc_select,
            "miscmask": own.misc_mask,
            "attributes": own.attributes.to_bytes().hex(),
            "attribute_mask": own.attribute_mask.to_bytes().hex(),
            "cet_attributes": own.cet_attributes,
            "cet_attributes_mask": own.cet_attributes_mask,
            "isvfamilyid": own.isv_family_id.hex(),
            "isvextprodid": own.isv_ext_prod_id.hex(),
            "isvprodid": own.isv_prod_id,
            "isvsvn": own.isv_svn,
            "debug_allowed": self.debug_allowed,
            "signature_valid": self.signature_valid,
            "q1_q2_valid": self.q1_q2_valid,
        }

    def warnings(self) -> list[str]:
        """Return what a relying party should know before it trusts the signer."""
        found = []
        if not self.signature_valid:
            found.append("the signature does not hold: the file was changed after it was signed")
        if not self.q1_q2_valid:
            found.append("Q1 and Q2 do not belong to the signature: hardware refuses to launch it")
        known = PUBLIC_TEST_SIGNERS.get(self.mrsigner.hex())
        if known is not None:
            found.append(f"signed by a public test key ({known}): anybody can sign as this signer")
        if self.debug_allowed:
            found.append("may be launched as debug: check the DEBUG attribute in its evidence")
        return found

    def flag_names(self) -> str:
        """Return the attributes by name, for people."""
        flags = self.sigstruct.attributes.flags
        names = [name for bit, name in _FLAG_NAMES.items() if flags & bit]
        rest = flags & ~sum(_FLAG_NAMES)
        return " ".join([*names, *([f"{rest:#x}"] if rest else [])]) or "none"


def examine(data: Buffer) -> Signed:
    """
    Read a SIGSTRUCT and check its signature, Q1 and Q2.

    Args:
        data: 1808 bytes; untrusted input.

    Returns:
        What was found; a signature that does not hold is told, not raised.

    Raises:
        SignatureError: It is no SIGSTRUCT: size, constants, exponent, vendor or reserved bytes.

    """
    found = Sigstruct.from_bytes(data)
    return Signed(
        sigstruct=found,
        mrsigner=mrsigner(found.modulus),
        signature_valid=signature_valid(found),
        q1_q2_valid=q1_q2_valid(found),
    )
