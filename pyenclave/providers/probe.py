"""
Which provider this machine has, and why: each is tried in order, and each says what it found.

The order is that of the project's notes on evidence providers, 1.1. An Azure VM runs behind a
paravisor: its vTPM comes before the raw devices. Every path lies below one root folder, so that a
test, or a container that sees its host's devices elsewhere, can name it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from pyenclave.errors import ProviderError, TpmError
from pyenclave.formats.hcl import REPORT_TYPE_SNP, REPORT_TYPE_TDX
from pyenclave.providers import azure_vtpm, gramine, nitro, sev_guest, tsm
from pyenclave.tpm import Tpm

__all__ = ["NAMES", "OVERRIDE", "SOFTWARE", "Finding", "Probe", "place", "probe"]

#: The environment variable that names a provider; it decides which device is asked, and no more.
OVERRIDE: Final = "PYENCLAVE_PROVIDER"
#: What is left where there is no hardware: our own platform, which is no TEE.
SOFTWARE: Final = "pyenclave"
NAMES: Final = ("gramine", "nitro", "tsm", "azure-vtpm", "sev-guest", "tdx-guest", SOFTWARE)
_TPM_DEVICES: Final = ("/dev/tpmrm0", "/dev/tpm0")
_TEES: Final = {"sev_guest": "sev-snp", "tdx_guest": "tdx", "arm_cca_guest": "cca"}
_HCL_TEES: Final = {REPORT_TYPE_SNP: "sev-snp", REPORT_TYPE_TDX: "tdx"}
_TDX_DEVICES: Final = (sev_guest.TDX_DEVICE, "/dev/tdx-guest")


@dataclass(frozen=True, slots=True)
class Finding:
    """
    What was found of one provider.

    Attributes:
        provider: Its name.
        usable: Whether it can make evidence here and now.
        reason: Why, in a sentence.
        path: The device or folder that was looked at.
        tee: Which TEE it speaks for, as it says itself; ``none`` where there is none.
    """

    provider: str
    usable: bool
    reason: str
    path: str = ""
    tee: str = "none"


@dataclass(frozen=True, slots=True)
class Probe:
    """
    What was found of all of them.

    Attributes:
        chosen: The one to be used; `SOFTWARE` where no hardware answers.
        findings: In the order in which they were tried.
    """

    chosen: str
    findings: tuple[Finding, ...]

    @property
    def finding(self) -> Finding:
        """What was found of the chosen one."""
        return next(item for item in self.findings if item.provider == self.chosen)


def place(root: str | os.PathLike[str], path: str) -> str:
    """Return *path* (absolute) below *root*."""
    top = os.fspath(root).rstrip("/")
    return f"{top}{path}"


def probe(
    root: str | os.PathLike[str] = "/",
    *,
    provider: str | None = None,
    device: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Probe:
    """
    Look which providers are here.

    Args:
        root: The folder below which devices and pseudo-files are.
        provider: The one to be used, whatever else is there.
        device: Where that one is, instead of its usual place; a TPM may be a socket.
        environ: The environment; default the process's. ``PYENCLAVE_PROVIDER`` is read from it.

    Raises:
        ValueError: A name that is no provider's, or a device without a provider.

    """
    said = provider
    by = "named by the caller"
    if said is None:
        said = (os.environ if environ is None else environ).get(OVERRIDE) or None
        by = f"named by {OVERRIDE}"
    if said is not None and said not in NAMES:
        raise ValueError(f"no provider is called {said!r}; there is: {', '.join(NAMES)}")
    if device is not None and said is None:
        raise ValueError("a device belongs to a provider: name that, too")
    findings = [_LOOKS[name](root, device if name == said else None) for name in _LOOKS]
    findings.append(
        Finding(SOFTWARE, True, "the software platform is always there; it is no TEE", "")
    )
    if said is None:
        chosen = next(item.provider for item in findings if item.usable)
        return Probe(chosen, tuple(findings))
    named = tuple(
        replace(item, reason=f"{by}; {item.reason}") if item.provider == said else item
        for item in findings
    )
    return Probe(said, named)


def _gramine(root: str | os.PathLike[str], device: str | None) -> Finding:
    path = device or place(root, gramine.DIRECTORY)
    if not os.path.exists(f"{path}/attestation_type"):
        return Finding("gramine", False, "not inside a Gramine enclave", path)
    try:
        kind = gramine.attestation_type(path)
    except ProviderError as error:
        return Finding("gramine", False, error.message, path)
    if kind == "dcap":
        return Finding(
            "gramine", True, "an SGX enclave under Gramine, with DCAP quotes", path, "sgx"
        )
    reason = f"Gramine with attestation type {kind[:40]!r}, which gives no quotes that count"
    return Finding("gramine", False, reason, path)


def _nitro(root: str | os.PathLike[str], device: str | None) -> Finding:
    path = device or place(root, nitro.DEVICE)
    if not os.path.exists(path):
        return Finding("nitro", False, "not inside a Nitro enclave", path)
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("nitro", False, "a Nitro enclave, but the device is not ours to use", path)
    return Finding("nitro", True, "a Nitro enclave, with its security module", path, "nitro")


def _tsm(root: str | os.PathLike[str], device: str | None) -> Finding:
    path = device or place(root, tsm.DIRECTORY)
    if not os.path.isdir(path):
        return Finding("tsm", False, "the kernel has no configfs-tsm, or it is not mounted", path)
    entry = f"{path}/pyenclave-probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        os.mkdir(entry)
    except OSError as error:
        reason = tsm.meaning("mkdir", error)
        return Finding("tsm", False, f"configfs-tsm is there, but {reason}", path)
    name = b""
    try:
        with suppress(OSError):
            name = tsm.OS_FILES.read(f"{entry}/provider", 4096).strip()[:40]
    finally:
        with suppress(OSError):
            os.rmdir(entry)
    if not name:
        return Finding(
            "tsm", False, "the folder is no configfs-tsm: entries have no provider", path
        )
    text = name.decode("ascii", "replace")
    tee = _TEES.get(text)
    if tee is None:
        return Finding("tsm", False, f"configfs-tsm with an unknown provider {text!r}", path)
    return Finding("tsm", True, f"configfs-tsm of the kernel, provider {text}", path, tee)


def _azure(root: str | os.PathLike[str], device: str | None) -> Finding:
    paths = [device] if device else [place(root, path) for path in _TPM_DEVICES]
    present = [path for path in paths if device or os.path.exists(path)]
    if not present:
        return Finding("azure-vtpm", False, "no TPM", paths[0])
    path = present[0]
    try:
        with Tpm.open(path, timeout=5.0) as tpm:
            if not tpm.nv_exists(azure_vtpm.NV_REPORT):
                reason = f"a TPM without an HCL report (NV {azure_vtpm.NV_REPORT:#x}): not Azure's"
                return Finding("azure-vtpm", False, reason, path)
            tee = _HCL_TEES[azure_vtpm.read_report(tpm).report_type]
    except (TpmError, ProviderError) as error:
        return Finding("azure-vtpm", False, f"a TPM, but {error.message}", path)
    return Finding("azure-vtpm", True, "the vTPM of an Azure confidential VM", path, tee)


def _sev_guest(root: str | os.PathLike[str], device: str | None) -> Finding:
    path = device or place(root, sev_guest.DEVICE)
    if not os.path.exists(path):
        return Finding("sev-guest", False, "no SEV-SNP guest device", path)
    if not os.access(path, os.R_OK | os.W_OK):
        reason = "an SEV-SNP guest, but only root may ask"
        return Finding("sev-guest", False, reason, path, "sev-snp")
    return Finding("sev-guest", True, "an SEV-SNP guest, by its device", path, "sev-snp")


def _tdx_guest(root: str | os.PathLike[str], device: str | None) -> Finding:
    paths = [device] if device else [place(root, path) for path in _TDX_DEVICES]
    present = [path for path in paths if os.path.exists(path)]
    if not present:
        return Finding("tdx-guest", False, "no TDX guest device", paths[0])
    reason = (
        "a TDX guest whose device gives a TDREPORT only, which nobody else can verify: "
        "a kernel with configfs-tsm (6.7) gives quotes"
    )
    return Finding("tdx-guest", False, reason, present[0], "tdx")


_LOOKS: Final = {
    "gramine": _gramine,
    "nitro": _nitro,
    "tsm": _tsm,
    "azure-vtpm": _azure,
    "sev-guest": _sev_guest,
    "tdx-guest": _tdx_guest,
}
