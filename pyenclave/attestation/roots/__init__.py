"""
The vendors' roots, pinned. Where each was confirmed is in the README beside the files.

A file whose SHA-256 is not the one below is refused: whoever can change package data silently can
change this table too, but a damaged or swapped file is found.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from pyenclave.errors import CollateralError

if TYPE_CHECKING:
    from pyenclave.formats.x509 import Certificate

__all__ = ["INTERMEDIATES", "VENDORS", "certificate", "der_of", "for_kind", "intermediates"]

_FINGERPRINTS: Final = MappingProxyType(
    {
        "amd-ark-genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
        "amd-ark-milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
        "amd-ark-turin": "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
        "amd-ask-genoa": "5464738c1546aed5f2cecf1dc98c5c960a92e8913238a61711bc90ec6e828521",
        "amd-ask-milan": "67d303bd3905fd38db8b20e0793699870e7fa612eaad5dec358293fd8c0bac1b",
        "amd-ask-turin": "5b77ef5fe7a7a004fd9032668fba9d0fda22f88c4442069a479636a6ae3b3185",
        "amd-asvk-genoa": "197e610743a917d6b9bb982a5a9226ccc0a15b611be0619e626aca9151457372",
        "amd-asvk-milan": "c5e081f59b7efab1fe2f8b505e159704e72f29cab7ef7cf628a05a42439082f5",
        "amd-asvk-turin": "104e10a8bd060a3c20a434261a57d0588fd65a88915b4f65b08bdecaf8df1a3c",
        "aws-nitro-root-g1": "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b",
        "azure-virtual-tpm-root-2023": (
            "e6c596b17f8ffefba5c300f714cfb1260c6028704ecf7becc4ab5018efb00e95"
        ),
        "google-confidential-space-root": (
            "148b293821bb0c6a317f413c8ba475814091cb22d49b9e3c94198db8e8f86c39"
        ),
        "intel-sgx-root-ca": "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3",
        "nvidia-device-root": "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48",
    }
)

# What evidence of a vendor may lead to.
VENDORS: Final = MappingProxyType(
    {
        "intel": ("intel-sgx-root-ca",),
        "amd": ("amd-ark-milan", "amd-ark-genoa", "amd-ark-turin"),
        "amd-milan": ("amd-ark-milan",),
        "amd-genoa": ("amd-ark-genoa",),
        "amd-turin": ("amd-ark-turin",),
        "nitro": ("aws-nitro-root-g1",),
        "google-cs": ("google-confidential-space-root",),
        "azure-vtpm": ("azure-virtual-tpm-root-2023",),
        "nvidia": ("nvidia-device-root",),
    }
)

# Certificates between root and leaf that evidence often comes without. Never anchors.
INTERMEDIATES: Final = MappingProxyType(
    {
        f"{kind}-{product}": (f"amd-{kind}-{product}",)
        for kind in ("ask", "asvk")
        for product in ("milan", "genoa", "turin")
    }
)

_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"
_END: Final = b"-----END CERTIFICATE-----"


@cache
def der_of(name: str) -> bytes:
    """
    Return the certificate *name* (a file here, without ``.pem``) in DER.

    Raises:
        CollateralError: The file is missing, or not the one that was pinned.
        KeyError: No such name.

    """
    wanted = _FINGERPRINTS[name]
    try:
        with open(os.path.join(os.path.dirname(__file__), f"{name}.pem"), "rb") as file:
            text = file.read()
        begin = text.index(_BEGIN) + len(_BEGIN)
        body = b"".join(text[begin : text.index(_END, begin)].split())
        data = base64.b64decode(body, validate=True)
    except (OSError, ValueError, binascii.Error) as error:
        raise CollateralError(
            f"the pinned root {name} cannot be read: {error}",
            advice="The installation is damaged: install pyenclave again.",
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise CollateralError(
            f"the pinned root {name} is not the one that was pinned",
            expected=wanted,
            found=found,
            advice="The installation was changed: install pyenclave again.",
        )
    return data


@lru_cache(maxsize=64)  # callers' roots too, so bounded
def certificate(der: bytes) -> Certificate:
    """Return a root in DER as a certificate."""
    from pyenclave.formats.x509 import Certificate

    return Certificate.from_der(der)


@cache
def for_kind(vendor: str) -> tuple[Certificate, ...]:
    """
    Return the pinned roots of *vendor*, a name of `VENDORS`.

    Raises:
        CollateralError: The installation is damaged.
        KeyError: No such vendor.

    """
    return tuple(certificate(der_of(name)) for name in VENDORS[vendor])


@cache
def intermediates(name: str) -> tuple[Certificate, ...]:
    """
    Return vendors' intermediates (a name of `INTERMEDIATES`); they still have to be verified.

    Raises:
        CollateralError: The installation is damaged.
        KeyError: No such name.

    """
    return tuple(certificate(der_of(entry)) for entry in INTERMEDIATES[name])
