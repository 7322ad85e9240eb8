"""
MRENCLAVE from pages, and what a SIGSTRUCT proves.

Sources: Intel SDM vol. 3D (ECREATE, EADD, EEXTEND, EINIT; SIGSTRUCT), RFC 8017 8.2 for the
signature. Big numbers in SGX structures are little-endian.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from pyenclave.errors import EnclaveStateError, MeasurementError, SignatureError
from pyenclave.formats._binary import shorten
from pyenclave.measurement._records import PAGE_SIZE, add_many, begin, sha256

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

    from pyenclave.formats.sgx import Attributes, Sigstruct

__all__ = [
    "PAGE_SIZE",
    "check_launch",
    "compute_q1_q2",
    "measure_many",
    "measure_pages",
    "mrsigner",
    "q1_q2_valid",
    "sign_message",
    "signature_valid",
    "verify_sigstruct",
]

_RSA_SIZE = 384
# DigestInfo of SHA-256 (RFC 8017, 9.2, note 1).
_DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


class _Taken:
    """Which parts of the enclave have pages, as ranges that neither touch nor overlap."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """Take a range; return whether it was free."""
        if self._ends and start == self._ends[-1]:  # the usual order: on and on
            self._ends[-1] = end
            return True
        at = bisect_left(self._ends, start)
        joins_left = at < len(self._ends) and self._ends[at] == start
        after = at + 1 if joins_left else at
        if after < len(self._starts) and self._starts[after] < end:
            return False
        joins_right = after < len(self._starts) and self._starts[after] == end
        if joins_right:
            end = self._ends[after]
        if joins_left:
            start = self._starts[at]
        stop = after + 1 if joins_right else after
        self._starts[at:stop] = [start]
        self._ends[at:stop] = [end]
        return True


def measure_pages(
    pages: Iterable[tuple[int, int, Buffer | None]], *, size: int, ssa_frame_size: int = 1
) -> bytes:
    """
    Compute the MRENCLAVE of an enclave that is built from *pages* in their order.

    Args:
        pages: Tuples of the offset in bytes from the enclave's base, the SECINFO flags, and the
            content: any whole number of pages of 4096 bytes, which follow one another from the
            offset on; ``None`` for one page that is added but not measured.
        size: The enclave's size in bytes, a power of two from 8192 on.
        ssa_frame_size: Pages of one SSA frame.

    Returns:
        The 32 bytes of MRENCLAVE.

    Raises:
        MeasurementError: If hardware would refuse the launch: a wrong size or SSA frame, pages
            outside the enclave, not aligned, added twice or with impossible flags.
    """
    taken = _Taken()
    before = 0
    try:
        measurement = begin(size, ssa_frame_size)
        for offset, flags, content in pages:
            if content is None:
                measurement.add_unmeasured(1, offset, flags)
            else:
                measurement.add_pages(content, offset, flags)
            after = measurement.num_pages
            added = after - before
            before = after
            if added and not taken.add(offset, offset + added * PAGE_SIZE):
                raise MeasurementError(
                    "a page is added twice", expected="a free range", found=f"offset {offset:#x}"
                )
        return measurement.digest()
    except (ValueError, OverflowError, EnclaveStateError) as error:
        raise MeasurementError(f"the enclave cannot be built: {error}") from None


def measure_many(
    enclaves: Iterable[tuple[Iterable[tuple[int, int, Buffer | None]], int]],
    *,
    ssa_frame_size: int = 1,
) -> list[bytes]:
    """
    Compute the MRENCLAVEs of several enclaves side by side.

    One MRENCLAVE is one chain of SHA-256, which nothing makes shorter; sixteen chains take two
    fifths of the time that they take one after the other (with AVX-512), and less if the enclaves
    have pages at the same offsets.

    Args:
        enclaves: For each its pages, as ``measure_pages`` takes them, and its size in bytes. All
            pages of all enclaves are held at once.
        ssa_frame_size: Pages of one SSA frame, of every enclave.

    Returns:
        The MRENCLAVEs, in the order of *enclaves*.

    Raises:
        MeasurementError: As of ``measure_pages``, with the enclave's number, from 0.
    """
    listed = [(list(pages), size) for pages, size in enclaves]
    try:
        measurements = [begin(size, ssa_frame_size) for _, size in listed]
        if all(_disjoint(pages) for pages, _ in listed):
            add_many([(to, pages) for to, (pages, _) in zip(measurements, listed, strict=True)])
            return [measurement.digest() for measurement in measurements]
    except (ValueError, OverflowError):
        pass  # one by one tells which, and why
    result = []
    for number, (pages, size) in enumerate(listed):
        try:
            result.append(measure_pages(pages, size=size, ssa_frame_size=ssa_frame_size))
        except MeasurementError as error:
            raise MeasurementError(f"enclave {number}: {error}") from None
    return result


def _disjoint(pages: Iterable[tuple[int, int, Buffer | None]]) -> bool:
    """Return whether no page is added twice."""
    taken = _Taken()
    for offset, _, content in pages:
        length = PAGE_SIZE if content is None else memoryview(content).nbytes
        if length and not taken.add(offset, offset + length):
            return False
    return True


def mrsigner(modulus: Buffer) -> bytes:
    """
    Return MRSIGNER: the SHA-256 of the modulus as it stands in SIGSTRUCT.

    Args:
        modulus: 384 bytes, little-endian.
    """
    _integer(modulus, "modulus")
    return sha256(modulus)


def sign_message(sigstruct: Sigstruct) -> bytes:
    """Return the 256 bytes that the author signs (RSASSA-PKCS1-v1_5 with SHA-256)."""
    return sigstruct.signed_bytes


def compute_q1_q2(modulus: Buffer, signature: Buffer) -> tuple[bytes, bytes]:
    """
    Compute SIGSTRUCT's Q1 and Q2, which spare EINIT the long division.

    Q1 = floor(S² / N), Q2 = floor((S³ - Q1·S·N) / N).

    Args:
        modulus: N, 384 bytes, little-endian.
        signature: S, 384 bytes, little-endian.

    Returns:
        Q1 and Q2, 384 bytes each, little-endian.

    Raises:
        SignatureError: If the signature is not smaller than the modulus.
    """
    n = _integer(modulus, "modulus")
    s = _integer(signature, "signature")
    if s >= n:
        raise SignatureError("SIGSTRUCT: the signature is not smaller than the modulus")
    q1, rest = divmod(s * s, n)
    q2 = s * rest // n
    return q1.to_bytes(_RSA_SIZE, "little"), q2.to_bytes(_RSA_SIZE, "little")


def signature_valid(sigstruct: Sigstruct) -> bool:
    """Return whether SIGSTRUCT's RSA-3072 signature holds over its signed bytes."""
    n = int.from_bytes(sigstruct.modulus, "little")
    s = int.from_bytes(sigstruct.signature, "little")
    # An even or a short modulus is no RSA-3072 key; with S >= N one signature has several forms.
    if sigstruct.exponent != 3 or n.bit_length() != 8 * _RSA_SIZE or n % 2 == 0 or s >= n:
        return False
    tail = _DIGEST_INFO + sha256(sigstruct.signed_bytes)
    wanted = b"\x00\x01" + b"\xff" * (_RSA_SIZE - 3 - len(tail)) + b"\x00" + tail
    return pow(s, 3, n) == int.from_bytes(wanted, "big")


def q1_q2_valid(sigstruct: Sigstruct) -> bool:
    """Return whether Q1 and Q2 belong to the modulus and the signature, as EINIT demands."""
    try:
        wanted = compute_q1_q2(sigstruct.modulus, sigstruct.signature)
    except SignatureError:
        return False
    return (sigstruct.q1, sigstruct.q2) == wanted


def verify_sigstruct(sigstruct: Sigstruct) -> None:
    """
    Verify a SIGSTRUCT in itself: its signature, and Q1 and Q2.

    It says nothing about who signed (compare ``mrsigner``) or what runs (see ``check_launch``).

    Raises:
        SignatureError: If EINIT would refuse it.
    """
    if not signature_valid(sigstruct):
        raise SignatureError(
            "SIGSTRUCT: the RSA-3072 signature does not hold",
            advice="The file was changed after it was signed, or is signed by another key.",
        )
    if not q1_q2_valid(sigstruct):
        raise SignatureError("SIGSTRUCT: Q1 and Q2 do not belong to the signature")


def check_launch(
    sigstruct: Sigstruct, *, mrenclave: bytes, attributes: Attributes, misc_select: int = 0
) -> None:
    """
    Check that an enclave is the one that a verified SIGSTRUCT describes, as EINIT does.

    Args:
        sigstruct: Already verified.
        mrenclave: The enclave's measurement.
        attributes: The enclave's ATTRIBUTES.
        misc_select: The enclave's MISCSELECT.

    Raises:
        SignatureError: If the measurement, or a masked attribute or MISCSELECT bit, differs.
    """
    if mrenclave != sigstruct.mrenclave:
        raise SignatureError(
            "the enclave is not the one that was signed",
            expected=sigstruct.mrenclave.hex(),
            found=shorten(mrenclave) if len(mrenclave) != 32 else mrenclave.hex(),
        )
    mask = sigstruct.attribute_mask
    if attributes & mask != sigstruct.attributes & mask:
        raise SignatureError(
            "the enclave's attributes are not the signed ones",
            expected=(sigstruct.attributes & mask).to_bytes().hex(),
            found=(attributes & mask).to_bytes().hex(),
        )
    if misc_select & sigstruct.misc_mask != sigstruct.misc_select & sigstruct.misc_mask:
        raise SignatureError(
            "the enclave's MISCSELECT is not the signed one",
            expected=hex(sigstruct.misc_select & sigstruct.misc_mask),
            found=hex(misc_select & sigstruct.misc_mask),
        )


def _integer(data: Buffer, name: str) -> int:
    with memoryview(data) as view:
        if view.nbytes != _RSA_SIZE:
            raise ValueError(f"{name} has {_RSA_SIZE} bytes, not {view.nbytes}")
        return int.from_bytes(view, "little")
