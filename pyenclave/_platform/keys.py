"""
EGETKEY in software (specs: Intel SDM volume 3D, EGETKEY; sealing in design section 4).

A key is derived from a *dependency structure*: what of the enclave's identity the request binds,
and what the request says of itself. Two requests share a key only if this structure, the level and
the root are equal. Layout, little-endian, 432 bytes:

======  ====  ==========================================================
offset  size  field
======  ====  ==========================================================
0       2     KEYNAME
2       2     KEYPOLICY
4       2     ISVSVN of the request
6       2     ISVPRODID
8       2     CONFIGSVN of the request
10      6     zero
16      16    CPUSVN of the request (REPORT: the current one)
32      16    ATTRIBUTES, masked
48      16    ATTRIBUTEMASK
64      4     MISCSELECT, masked
68      4     NOT MISCMASK
72      8     zero
80      16    ISVEXTPRODID
96      16    ISVFAMILYID
112     32    MRENCLAVE
144     32    MRSIGNER
176     64    CONFIGID
240     32    KEYID
272     160   zero (SEAL_FUSES and OWNEREPOCH of a CPU: here the root has their part)
======  ====  ==========================================================

A field that the key does not depend on is zero. The 256-bit form is HKDF-SHA-256 and is what
enclaves get; the 128-bit form is AES-128-CMAC, as Intel's simulation library has it.
"""

from __future__ import annotations

import struct
from typing import Final

from pyenclave._core import aes128_cmac
from pyenclave._platform.root import PLATFORM_SVN, PlatformRoot
from pyenclave.errors import SealingError
from pyenclave.formats.sgx import (
    FLAG_DEBUG,
    FLAG_EINITTOKEN_KEY,
    FLAG_INITTED,
    FLAG_KSS,
    FLAG_MODE64BIT,
    FLAG_PROVISION_KEY,
    KEYNAME_EINITTOKEN,
    KEYNAME_PROVISION,
    KEYNAME_PROVISION_SEAL,
    KEYNAME_REPORT,
    KEYNAME_SEAL,
    KEYPOLICY_CONFIGID,
    KEYPOLICY_ISVEXTPRODID,
    KEYPOLICY_ISVFAMILYID,
    KEYPOLICY_MRENCLAVE,
    KEYPOLICY_MRSIGNER,
    KEYPOLICY_NOISVPRODID,
    XFRM_LEGACY,
    Attributes,
    KeyRequest,
    ReportBody,
    TargetInfo,
)

__all__ = ["Keys", "attributes", "cpu_svn", "dependencies", "report_dependencies"]

_POLICY_KSS: Final = (
    KEYPOLICY_NOISVPRODID | KEYPOLICY_CONFIGID | KEYPOLICY_ISVFAMILYID | KEYPOLICY_ISVEXTPRODID
)
_POLICY_KNOWN: Final = KEYPOLICY_MRENCLAVE | KEYPOLICY_MRSIGNER | _POLICY_KSS
# INIT and DEBUG are always bound, whatever the mask says: debug and production never share.
_ATTRIBUTES_ALWAYS: Final = FLAG_INITTED | FLAG_DEBUG
_LAYOUT: Final = struct.Struct("<HHHHH6x16sQQQQII8x16s16s32s32s64s32s160x")


def cpu_svn(version: int = PLATFORM_SVN) -> bytes:
    """Return the CPUSVN of a platform version: 16 bytes, the version in the first two."""
    return version.to_bytes(2, "little") + bytes(14)


def dependencies(request: KeyRequest, body: ReportBody) -> bytes:
    """
    Check a key request against the identity that makes it, and return what its key depends on.

    Args:
        request: The request, as parsed (its reserved bytes are zero).
        body: The identity of the enclave, from the platform's own books.

    Raises:
        SealingError: The request is refused; the message begins with the name of the SGX error
            (``INVALID_KEYNAME``, ``INVALID_ATTRIBUTE``, ``INVALID_CPUSVN``, ``INVALID_ISVSVN``)
            or with ``#GP`` where the instruction would fault.

    """
    name = request.key_name
    if name == KEYNAME_REPORT:
        return report_dependencies(TargetInfo.of(body), request.key_id, body.cpu_svn)
    if name not in (KEYNAME_EINITTOKEN, KEYNAME_PROVISION, KEYNAME_PROVISION_SEAL, KEYNAME_SEAL):
        raise SealingError("INVALID_KEYNAME (256)", expected="0 to 4", found=name)
    flags, xfrm = body.attributes.flags, body.attributes.xfrm
    if name == KEYNAME_EINITTOKEN and not flags & FLAG_EINITTOKEN_KEY:
        raise SealingError("INVALID_ATTRIBUTE (2): EINITTOKEN_KEY", found=f"{flags:#x}")
    if name in (KEYNAME_PROVISION, KEYNAME_PROVISION_SEAL) and not flags & FLAG_PROVISION_KEY:
        raise SealingError("INVALID_ATTRIBUTE (2): PROVISION_KEY", found=f"{flags:#x}")
    policy = request.key_policy
    _check_policy(request, kss=bool(flags & FLAG_KSS))
    _check_versions(request, body)
    by_policy = policy if name in (KEYNAME_SEAL, KEYNAME_PROVISION_SEAL) else 0
    sealing = name in (KEYNAME_SEAL, KEYNAME_PROVISION_SEAL)
    bind_signer = name != KEYNAME_SEAL or bool(policy & KEYPOLICY_MRSIGNER)
    if bind_signer and not any(body.mrsigner):
        raise SealingError(
            "INVALID_ATTRIBUTE (2): MRSIGNER policy of an unsigned image",
            advice="Sign the image, or seal to its measurement.",
        )
    mask = request.attribute_mask
    masked = name != KEYNAME_EINITTOKEN
    return _LAYOUT.pack(
        name,
        by_policy,
        request.isv_svn,
        0 if sealing and policy & KEYPOLICY_NOISVPRODID else body.isv_prod_id,
        request.config_svn if by_policy & KEYPOLICY_CONFIGID else 0,
        request.cpu_svn,
        (mask.flags | _ATTRIBUTES_ALWAYS) & flags,
        mask.xfrm & xfrm,
        mask.flags if masked else 0,
        mask.xfrm if masked else 0,
        request.misc_mask & body.misc_select,
        ~request.misc_mask & 0xFFFFFFFF if masked else 0,
        body.isv_ext_prod_id if by_policy & KEYPOLICY_ISVEXTPRODID else bytes(16),
        body.isv_family_id if by_policy & KEYPOLICY_ISVFAMILYID else bytes(16),
        body.mrenclave if name == KEYNAME_SEAL and policy & KEYPOLICY_MRENCLAVE else bytes(32),
        body.mrsigner if bind_signer else bytes(32),
        body.config_id if by_policy & KEYPOLICY_CONFIGID else bytes(64),
        request.key_id if name in (KEYNAME_EINITTOKEN, KEYNAME_SEAL) else bytes(32),
    )


def report_dependencies(target: TargetInfo, key_id: bytes, current_cpu_svn: bytes) -> bytes:
    """Return what a report key depends on: the whole identity of the *target*."""
    return _LAYOUT.pack(
        KEYNAME_REPORT,
        0,
        0,
        0,
        target.config_svn,
        current_cpu_svn,
        target.attributes.flags,
        target.attributes.xfrm,
        0,
        0,
        target.misc_select,
        0,
        bytes(16),
        bytes(16),
        target.mrenclave,
        bytes(32),
        target.config_id,
        key_id,
    )


def _check_policy(request: KeyRequest, *, kss: bool) -> None:
    if request.key_policy & ~_POLICY_KNOWN:
        raise SealingError("#GP: reserved KEYPOLICY bits", found=f"{request.key_policy:#x}")
    if not kss and (request.key_policy & _POLICY_KSS or request.config_svn):
        raise SealingError(
            "#GP: KEYPOLICY or CONFIGSVN needs the KSS attribute",
            found=f"policy {request.key_policy:#x}, CONFIGSVN {request.config_svn}",
        )


def _check_versions(request: KeyRequest, body: ReportBody) -> None:
    asked = int.from_bytes(request.cpu_svn[:2], "little")
    current = int.from_bytes(body.cpu_svn[:2], "little")
    if asked > current or any(request.cpu_svn[2:]):
        raise SealingError(
            "INVALID_CPUSVN (32)", expected=f"at most {current}", found=request.cpu_svn.hex()
        )
    if request.isv_svn > body.isv_svn:
        raise SealingError(
            "INVALID_ISVSVN (64)", expected=f"at most {body.isv_svn}", found=request.isv_svn
        )
    if request.config_svn > body.config_svn:
        raise SealingError(
            "INVALID_ISVSVN (64): CONFIGSVN",
            expected=f"at most {body.config_svn}",
            found=request.config_svn,
        )


class Keys:
    """The keys of one platform, by request and identity."""

    def __init__(self, root: PlatformRoot) -> None:
        self._root = root

    def get_key(self, request: KeyRequest, body: ReportBody) -> bytes:
        """
        Return a 256-bit seal key for the enclave with identity *body*.

        Raises:
            SealingError: As :func:`dependencies`; and any KEYNAME but SEAL, for report keys stay
                with the platform and no image has the rights to the others.

        """
        if request.key_name != KEYNAME_SEAL:
            raise SealingError(
                "INVALID_KEYNAME (256)", expected=KEYNAME_SEAL, found=request.key_name
            )
        debug = body.attributes.debug
        return self._root.derive_seal_key(dependencies(request, body), debug=debug)

    def get_key_128(self, request: KeyRequest, body: ReportBody) -> bytes:
        """Return the 128-bit form: AES-128-CMAC of the dependency structure, by KEYNAME."""
        depends = dependencies(request, body)
        return aes128_cmac(self._root.derive(f"egetkey/{request.key_name}", 16), depends)

    def report_key(self, target: TargetInfo, key_id: bytes) -> bytes:
        """Return the 128-bit report key of *target*."""
        depends = report_dependencies(target, key_id, cpu_svn())
        return aes128_cmac(self._root.derive(f"egetkey/{KEYNAME_REPORT}", 16), depends)


def attributes(*, debug: bool) -> Attributes:
    """Return the attributes of our enclaves: INITTED, MODE64BIT and, if so, DEBUG; XFRM legacy."""
    flags = FLAG_INITTED | FLAG_MODE64BIT | (FLAG_DEBUG if debug else 0)
    return Attributes(flags=flags, xfrm=XFRM_LEGACY)
