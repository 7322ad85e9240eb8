"""Row ``snp_digest``: the launch digest of a SEV-SNP guest with a firmware of 2 MiB.

The peer is sev-snp-measure where it is installed, else the same chain with hashlib page by page.
Both read the file. It is made here with the tables of a real one; a quarter of its pages is
padding, as in Debian's OVMF.
"""

from __future__ import annotations

import os
import struct
import tempfile
import uuid
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pyenclave.benchmarks.rows import spread
from pyenclave.measurement import _launch, sev
from pyenclave.measurement.vmsa import vcpu_signature

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["snp_digest"]

_PAGES = 512
_ROUNDS = 60
_VCPUS = 4
_SECTIONS = ((0x800000, 0x9000, 1), (0x80D000, 0x1000, 2), (0x80E000, 0x1000, 3))


def _firmware() -> bytes:
    """Make a firmware file with SEV metadata and a reset block."""
    padding = _PAGES // 4
    data = bytearray(os.urandom((_PAGES - padding) * 4096))
    data[:0] = b"\xff" * (padding * 4096)
    metadata = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(_SECTIONS), 1, len(_SECTIONS))
    metadata += b"".join(struct.pack("<III", *section) for section in _SECTIONS)
    data[-1024 : -1024 + len(metadata)] = metadata
    table = b""
    for guid, word in (
        ("dc886566-984a-4798-a75e-5585a7bf67cc", 1024),
        ("00f771de-1a7e-4fcb-890e-68c77e2fb44e", 0x80B004),
    ):
        table += struct.pack("<IH", word, 22) + uuid.UUID(guid).bytes_le
    footer = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    table += struct.pack("<H", len(table) + 18) + footer
    data[-32 - len(table) : -32] = table
    return bytes(data)


def _peer(path: str) -> tuple[str, Callable[[], bytes]]:
    """Return the peer's name and a call of it."""
    signature = vcpu_signature("EPYC-Milan")
    try:
        from sevsnpmeasure.guest import calc_launch_digest
        from sevsnpmeasure.sev_mode import SevMode
    except ImportError:

        def by_hashlib() -> bytes:
            chain = _launch.PurePythonSnp()
            data = Path(path).read_bytes()
            chain.add_pages(data, (1 << 32) - len(data))
            return sev.snp_launch_digest(
                data, vcpus=_VCPUS, vcpu_sig=signature, ovmf_hash=chain.digest()
            )

        return "hashlib, page by page", by_hashlib

    def by_tool() -> bytes:
        mode = SevMode.SEV_SNP
        return bytes(calc_launch_digest(mode, _VCPUS, signature, path, None, None, None, 1))

    return "sev-snp-measure", by_tool


def snp_digest() -> dict[str, Any]:
    """
    Compute the launch digest of one firmware through the public API.

    Returns:
        The row, in milliseconds; each side's value is that of its fastest round.
    """
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "firmware.fd"))
        Path(path).write_bytes(_firmware())
        name, peer = _peer(path)
        for _ in range(_ROUNDS):
            start = perf_counter()
            data = Path(path).read_bytes()
            value = sev.snp_launch_digest(data, vcpus=_VCPUS, vcpu_type="EPYC-Milan")
            middle = perf_counter()
            wanted = peer()
            end = perf_counter()
            if value != wanted:
                raise AssertionError("the two launch digests of one guest differ")
            ours.append(middle - start)
            theirs.append(end - middle)
    best, peer_best = min(ours), min(theirs)
    return {
        "name": "snp_digest",
        "value": best * 1e3,
        "unit": "ms",
        "peer": name,
        "peer_value": peer_best * 1e3,
        "ratio": peer_best / best,
        **spread(ours, theirs, scale=1e3),
    }
