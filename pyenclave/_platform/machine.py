"""
Having the hardware below vouch for this platform, once, at its start.

On a confidential VM the hardware signs 64 bytes of report data. They name the platform's root
certificate and its attestation key, so a relying party walks from the hardware to the platform and
from there to each enclave (`attestation.verify_machine`). Where there is no such hardware, or it
may not be asked, nothing vouches and records go on saying ``none``. On Azure's TDX the metadata
service below the VM makes the quote; nowhere else is anything asked over a network.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Final

from pyenclave._platform.diagnostics import log
from pyenclave._platform.root import PlatformRoot, raw_public_key
from pyenclave.errors import EnclaveError

__all__ = ["PLACES", "have_vouched"]

#: Where something may be that vouches, below the root folder. Elsewhere nothing more is looked at.
PLACES: Final = (
    "/sys/kernel/config/tsm/report",
    "/dev/tpmrm0",
    "/dev/tpm0",
    "/dev/sev-guest",
)
_IMDS_TIMEOUT: Final = 3.0  # seconds: a host waits for our greeting


def have_vouched(root: PlatformRoot, *, top: str = "/", imds: str = "") -> None:
    """
    Put what the hardware says of *root*'s keys into it; without hardware nothing changes.

    A laptop pays for four looks at names and for nothing else.

    Args:
        root: The platform's keys.
        top: The folder below which devices are.
        imds: Address of Azure's metadata service if it is not the usual one.

    """
    base = top.rstrip("/")
    if not any(os.path.exists(base + place) for place in PLACES):
        return
    from cryptography.hazmat.primitives.serialization import Encoding

    from pyenclave.attestation.verify_machine import TEES
    from pyenclave.formats.machine import MachineEvidence, machine_report_data
    from pyenclave.providers import SOFTWARE, obtain, probe
    from pyenclave.providers.azure_imds import IMDS, quote_td_report

    found = probe(top, environ={})
    if found.chosen == SOFTWARE:
        return
    data = machine_report_data(
        root=root.chain.root.public_bytes(Encoding.DER),
        attestation_key=raw_public_key(root.attestation_key.public_key()),
    )
    azure = found.chosen == "azure-vtpm"
    try:
        made = obtain(
            nonce=data[:32] if azure else b"",
            report_data=None if azure else data,
            user_data=data if azure else None,
            root=top,
            td_quote=partial(quote_td_report, base=imds or IMDS, timeout=_IMDS_TIMEOUT),
            found=found,
        )
        tee = TEES.get(made.kind)
        if tee is None:
            log(f"evidence of kind {made.kind} does not vouch for a platform")
            return
        machine = MachineEvidence(evidence=made.evidence, files=made.endorsements).to_bytes()
    except (EnclaveError, OSError, ValueError) as error:
        # A platform that nothing vouches for is what it is anywhere else, and says so.
        log(f"no hardware vouches for this platform: {type(error).__name__}: {error}")
        return
    root.machine = machine
    root.tee = "sev-snp" if tee == "sev-snp" else "tdx"
