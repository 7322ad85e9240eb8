"""
What follows from a launch that was judged: the record of its walls, signed, and its identity.

Bytes only: nothing here waits for a process. A draft may be made before a worker is there; whether
it is used is decided by what is found at the worker.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Final, Literal, cast

from pyenclave._platform.keys import attributes, cpu_svn
from pyenclave._platform.policy import LaunchPolicy
from pyenclave._platform.probe import OUTSIDE, refuse_unless_held
from pyenclave._platform.root import PLATFORM_SVN, PlatformRoot
from pyenclave._platform.service import Facts
from pyenclave.errors import LaunchError
from pyenclave.formats import messages
from pyenclave.formats.image import ImageInfo
from pyenclave.formats.record import ProtectionBit, ProtectionRecord
from pyenclave.formats.sgx import ReportBody
from pyenclave.measurement.image import SignedIdentity

__all__ = ["Draft", "Drafts", "Found", "Judged", "Package", "Wish", "hold", "merge"]

_BIT_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_MAX_INSIDE: Final = 32
_BEST_MEMORY: Final = "memfd_secret"

#: What was tried at a worker from outside, and what it tried inside.
Found = tuple[dict[str, bool], messages.Closed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What is kept of an image whose bytes were once parsed and verified."""

    info: ImageInfo
    lock_bytes: bytes
    identity: SignedIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """
    What a host asked for, judged: every enclave that is started of it is the same kind.

    Attributes:
        judged: The image.
        digest: SHA-256 of the image's bytes.
        size: Their number.
        debug: Whether it starts as debug.
        require: Protection bits that the host demands.
        allow_ephemeral: The host accepts sealing under a root that lives in memory only.

    """

    judged: Judged
    digest: bytes
    size: int
    debug: bool
    require: tuple[str, ...]
    allow_ephemeral: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """
    What an identity will be, if policy and walls are the same when it is given.

    Attributes:
        policy: The policy that admitted it; the very same object while the file is the same.
        outside: The bits that were tried from outside, all True or False.
        closed: What was tried inside, to the byte: True equals 1 and is written otherwise.
        identity: The message, without seed.
        facts: What the platform notes, without process and time.

    """

    policy: LaunchPolicy
    outside: dict[str, bool]
    closed: bytes
    identity: messages.Identity
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """
    The name of an enclave, and what was made for it ahead and may never be used.

    Attributes:
        enclave_id: The name.
        signed: A record as it is expected to be.
        signature: The signature over it.
        package: What follows from it, if it is expected to be admitted.

    """

    enclave_id: bytes
    signed: bytes
    signature: bytes
    package: Package | None = None


class Drafts:
    """
    Makes records and identities, and signs them. Thread-safe: it keeps nothing.

    Args:
        root: The platform's keys.

    """

    def __init__(self, root: PlatformRoot) -> None:
        self._root = root

    def draft(self, wish: Wish, bits: dict[str, ProtectionBit]) -> Draft:
        """
        Name an enclave, and sign its record ahead as it will be if *bits* hold.

        A draft leaves this process only if what is found before the identity is sent is the same
        to the last byte.
        """
        enclave_id = secrets.token_bytes(16)
        signed = self._record(wish, bits, enclave_id)
        return Draft(enclave_id=enclave_id, signed=signed, signature=self._root.sign(signed))

    def package(
        self,
        wish: Wish,
        draft: Draft,
        outside: dict[str, bool],
        closed: messages.Closed,
        policy: LaunchPolicy,
    ) -> Package:
        """
        Judge and sign what holds, and write down what follows from it.

        Args:
            wish: What was asked for.
            draft: The enclave's name; its signature is used if it is over the same bytes.
            outside: What was tried from outside.
            closed: What was tried inside.
            policy: The policy that admitted the wish.

        Raises:
            LaunchRefusedError: A bit that is required does not hold.
            LaunchError: The worker reports what cannot be.

        """
        judged = wish.judged
        bits = hold(wish, outside, closed, policy)
        record = self.sign_record(wish, draft, bits)
        body = _body(judged.identity, record, debug=wish.debug)
        return Package(
            policy=policy,
            outside=outside,
            closed=messages.encode(closed),
            identity=messages.Identity(
                enclave_id=draft.enclave_id,
                body=body.to_bytes(),
                debug=wish.debug,
                level=self._root.level,
                record=record,
                seed=bytes(32),
            ),
            facts=Facts(
                enclave_id=draft.enclave_id,
                name=judged.info.name,
                pid=0,
                debug=wish.debug,
                body=body,
                record=record,
                runtime_public_key=b"",
                may_seal=not self._root.ephemeral or wish.allow_ephemeral or policy.allow_ephemeral,
                started=0.0,
            ),
        )

    def sign_record(self, wish: Wish, draft: Draft, bits: dict[str, ProtectionBit]) -> bytes:
        """Return the record of *bits* with its signature, under the name of *draft*."""
        signed = self._record(wish, bits, draft.enclave_id)
        # The bytes are compared, not the bits: True equals 1, and is written otherwise.
        return signed + (draft.signature if signed == draft.signed else self._root.sign(signed))

    def _record(self, wish: Wish, bits: dict[str, ProtectionBit], enclave_id: bytes) -> bytes:
        record = ProtectionRecord(
            level=cast(Literal["embedded", "service"], self._root.level),
            tee=self._root.tee,
            platform_svn=PLATFORM_SVN,
            ephemeral=self._root.ephemeral,
            debug=wish.debug,
            jit=wish.judged.info.jit,
            enclave_id=enclave_id.hex(),
            bits=bits,
        )
        record.check()
        return record.signed_bytes()


def hold(
    wish: Wish, outside: dict[str, bool], closed: messages.Closed, policy: LaunchPolicy
) -> dict[str, ProtectionBit]:
    """
    Return the bits of a worker, if those that are required hold.

    Raises:
        LaunchRefusedError: One does not hold.
        LaunchError: The worker reports what cannot be.

    """
    bits = merge(outside, closed)
    held = {name: bit.value for name, bit in bits.items()}
    refuse_unless_held(held, wish.require + policy.require, debug=wish.debug)
    return bits


def merge(outside: dict[str, bool], closed: messages.Closed) -> dict[str, ProtectionBit]:
    """
    Return the bits of a worker, each with who tried it.

    Raises:
        LaunchError: The worker reports what cannot be.

    """
    if len(closed.inside) > _MAX_INSIDE:
        raise LaunchError("the worker reports too many protection bits")
    bits: dict[str, ProtectionBit] = {}
    for name, value in closed.inside.items():
        if not _BIT_NAME.match(name) or not 0 <= value < 1 << 31:
            raise LaunchError("the worker reports an impossible protection bit", found=name[:64])
        bits[name] = ProtectionBit(value=value, by="inside")
    kind = closed.secret_memory
    bits["secretmem"] = ProtectionBit(value=kind == _BEST_MEMORY, by="inside")
    for name in OUTSIDE:
        # The worker's word can only take away: a filter that this process was started under looks
        # from outside like the worker's own.
        held = outside[name] and bool(closed.inside.get(name, True))
        bits[name] = ProtectionBit(value=held, by="outside")
    return bits


def _body(identity: SignedIdentity, record: bytes, *, debug: bool) -> ReportBody:
    return ReportBody(
        cpu_svn=cpu_svn(),
        attributes=attributes(debug=debug),
        mrenclave=identity.mrenclave,
        mrsigner=identity.mrsigner,
        config_id=hashlib.sha256(record).digest() + bytes(32),
        isv_prod_id=identity.product_id,
        isv_svn=identity.security_version,
    )
