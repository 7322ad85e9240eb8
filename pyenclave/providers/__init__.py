"""
Evidence of the machine that this runs on: one module a provider, and what finds the right one.

Devices only: no network, no policy, nothing is verified beyond what the answer must bind. Every
path is an argument (``root``, ``device``). What a provider gives is what
`pyenclave.attestation.appraise` takes.

    found = obtain(nonce=nonce)
    found.write("evidence")      # pyenclave verify evidence/report.bin --endorsements evidence
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from pyenclave.errors import BindingError, ProviderError, ReportRaceError, TpmError
from pyenclave.providers import azure_vtpm, gramine, nitro, sev_guest, tsm
from pyenclave.providers.evidence import Evidence
from pyenclave.providers.probe import NAMES, SOFTWARE, Finding, Probe, place, probe
from pyenclave.tpm import Tpm

__all__ = [
    "NAMES",
    "SOFTWARE",
    "BindingError",
    "Evidence",
    "Finding",
    "Probe",
    "ReportRaceError",
    "obtain",
    "probe",
]


def obtain(
    *,
    nonce: bytes = b"",
    report_data: bytes | None = None,
    user_data: bytes | None = None,
    provider: str | None = None,
    device: str | None = None,
    root: str | os.PathLike[str] = "/",
    td_quote: Callable[[bytes], bytes] | None = None,
    fresh_report: bool = True,
    environ: Mapping[str, str] | None = None,
    found: Probe | None = None,
) -> Evidence:
    """
    Make evidence of this machine's hardware.

    Args:
        nonce: The relying party's challenge: up to 64 bytes, on Nitro up to 1,024.
        report_data: The 64 bytes that SGX, TDX, SEV-SNP and CCA sign, instead of the padded nonce.
        user_data: What else is bound where there is a place for it: Azure and Nitro.
        provider: Which provider; default the first that is usable (`probe`).
        device: Where it is; only with *provider*.
        root: The folder below which devices are.
        td_quote: Azure TDX: has a TDREPORT quoted.
        fresh_report: Azure: whether the hardware report must be a new one.
        environ: As for `probe`.
        found: What `probe` found, if it was asked already.

    Raises:
        BindingError: The device gave what binds other data.
        ProviderError: There is no hardware that makes evidence, or it refuses.
        ValueError: Impossible arguments, also ones that this provider has no place for.

    """
    seen = found or probe(root, provider=provider, device=device, environ=environ)
    name, path = seen.chosen, seen.finding.path
    signs_report_data = name in ("gramine", "tsm", "sev-guest")
    if report_data is not None and not signs_report_data:
        raise ValueError(f"{name} chooses its report data itself: give user_data")
    if user_data is not None and signs_report_data:
        raise ValueError(f"{name} has no place for user data: hash it into report_data")
    if name == "gramine":
        return gramine.evidence(nonce=nonce, report_data=report_data, directory=path)
    if name == "tsm":
        return tsm.evidence(nonce=nonce, report_data=report_data, directory=path)
    if name == "sev-guest":
        return sev_guest.evidence(nonce=nonce, report_data=report_data, device=path)
    if name == "nitro":
        return nitro.evidence(nonce=nonce, user_data=user_data, device=path)
    if name == "azure-vtpm":
        with _open(path) as tpm:
            return azure_vtpm.evidence(
                tpm,
                nonce=nonce,
                user_data=user_data,
                fresh_report=fresh_report,
                event_log=place(root, azure_vtpm.EVENT_LOG),
                td_quote=td_quote,
            )
    reasons = "; ".join(f"{item.provider}: {item.reason}" for item in seen.findings[:-1])
    raise ProviderError(
        "no hardware of this machine makes evidence",
        found=reasons if name == SOFTWARE else seen.finding.reason,
        advice="pyenclave evidence takes the tool enclave then, which is no TEE.",
    )


def _open(path: str) -> Tpm:
    try:
        return Tpm.open(path)
    except TpmError as error:
        raise ProviderError(f"azure-vtpm: {error.message}", advice=error.advice) from error
