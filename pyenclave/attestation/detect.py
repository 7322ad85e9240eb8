"""Tell the kind of evidence from its bytes."""

from __future__ import annotations

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.evidence import MAGIC

__all__ = ["kind_of"]


def kind_of(evidence: bytes) -> str:
    """
    Return the kind of *evidence*; only its first bytes are looked at.

    Raises:
        EvidenceFormatError: No known kind.

    """
    if evidence[: len(MAGIC) - 1] == MAGIC[:-1]:
        return "pyenclave"
    raise EvidenceFormatError(
        "this is no evidence of a known kind",
        expected=f"bytes that begin with {MAGIC[:-1].decode()}",
        found=evidence[:8].hex() or "nothing",
    )
