"""
The status of an Intel platform: platform level, TDX module and quoting enclave, and their merging.

The algorithm of Intel's quote verification library of 2026-07, as the project's notes on collateral
give it in 5.5, a to e. Everything here is arithmetic on parsed collateral: signatures, dates and
matching families are judged elsewhere, before. Unknown states are errors, never "fine".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pyenclave.errors import CollateralError
from pyenclave.formats.tcb import QeLevel, TcbInfo, TcbLevel, TdxModule, TdxModuleIdentity
from pyenclave.formats.tdx import TdReportBody

__all__ = [
    "NO_MATCH",
    "STATUSES",
    "Evaluation",
    "converge",
    "evaluate",
    "find_module",
    "match_isv_svn",
    "match_platform",
    "merge",
    "relaunch",
]

UP_TO_DATE: Final = "UpToDate"
SW_HARDENING: Final = "SWHardeningNeeded"
CONFIGURATION: Final = "ConfigurationNeeded"
CONFIGURATION_AND_SW: Final = "ConfigurationAndSWHardeningNeeded"
OUT_OF_DATE: Final = "OutOfDate"
OUT_OF_DATE_CONFIGURATION: Final = "OutOfDateConfigurationNeeded"
REVOKED: Final = "Revoked"
RELAUNCH: Final = "TDRelaunchAdvised"
RELAUNCH_CONFIGURATION: Final = "TDRelaunchAdvisedConfigurationNeeded"

NO_MATCH: Final = "NO_MATCH"  # the name of the vectors where no level fits
QE: Final = "a quoting enclave"

PLATFORM_STATUSES: Final = frozenset(
    (
        UP_TO_DATE,
        SW_HARDENING,
        CONFIGURATION,
        CONFIGURATION_AND_SW,
        OUT_OF_DATE,
        OUT_OF_DATE_CONFIGURATION,
        REVOKED,
    )
)
QE_STATUSES: Final = frozenset(
    (UP_TO_DATE, OUT_OF_DATE, CONFIGURATION, OUT_OF_DATE_CONFIGURATION, REVOKED)
)
MODULE_STATUSES: Final = frozenset((UP_TO_DATE, OUT_OF_DATE, REVOKED))
#: Every status that a platform can come out with.
STATUSES: Final = PLATFORM_STATUSES | {RELAUNCH, RELAUNCH_CONFIGURATION}

# One component's status → platform's status → what they make together; what is not here stays.
# The first row is Intel's. The others are the same thought carried to states that Intel's signed
# documents may name for a quoting enclave: a need does not vanish because the platform is fine.
_CONVERGED: Final = {
    OUT_OF_DATE: {
        UP_TO_DATE: OUT_OF_DATE,
        SW_HARDENING: OUT_OF_DATE,
        CONFIGURATION: OUT_OF_DATE_CONFIGURATION,
        CONFIGURATION_AND_SW: OUT_OF_DATE_CONFIGURATION,
    },
    CONFIGURATION: {
        UP_TO_DATE: CONFIGURATION,
        SW_HARDENING: CONFIGURATION_AND_SW,
        OUT_OF_DATE: OUT_OF_DATE_CONFIGURATION,
    },
    OUT_OF_DATE_CONFIGURATION: {
        UP_TO_DATE: OUT_OF_DATE_CONFIGURATION,
        SW_HARDENING: OUT_OF_DATE_CONFIGURATION,
        CONFIGURATION: OUT_OF_DATE_CONFIGURATION,
        CONFIGURATION_AND_SW: OUT_OF_DATE_CONFIGURATION,
        OUT_OF_DATE: OUT_OF_DATE_CONFIGURATION,
    },
}
_CONFIGURATIONS: Final = frozenset((CONFIGURATION, CONFIGURATION_AND_SW, OUT_OF_DATE_CONFIGURATION))
_OLD: Final = frozenset((OUT_OF_DATE, OUT_OF_DATE_CONFIGURATION))
_CURRENT: Final = frozenset((UP_TO_DATE, SW_HARDENING, CONFIGURATION, CONFIGURATION_AND_SW))


def _known(status: str, known: frozenset[str], what: str) -> str:
    if status not in known:
        raise CollateralError(
            f"the status of the {what} is not recognised",
            expected=", ".join(sorted(known)),
            found=status[:40],
            advice="Intel may have added a status: upgrade pyenclave.",
        )
    return status


def match_platform(
    info: TcbInfo, components: Sequence[int], pce_svn: int, tee_tcb_svn: bytes | None = None
) -> TcbLevel | None:
    """
    Return the highest level that the platform reaches (5.5 a).

    Args:
        info: TCB info of its family.
        components: The sixteen SGX component SVNs of the PCK certificate.
        pce_svn: PCESVN of the PCK certificate.
        tee_tcb_svn: Of a TD; bytes 0 and 1 are left to the module identity when byte 1 is not 0.
    """
    if len(components) != 16 or (tee_tcb_svn is not None and len(tee_tcb_svn) != 16):
        raise ValueError("a TCB has sixteen components")
    for level in info.levels:
        if pce_svn < level.pce_svn or not _reaches(components, level.sgx_components):
            continue
        if tee_tcb_svn is not None:
            if level.tdx_components is None:
                continue
            start = 2 if tee_tcb_svn[1] else 0
            if not _reaches(tee_tcb_svn[start:], level.tdx_components[start:]):
                continue
        return level
    return None


def _reaches(have: Sequence[int], need: Sequence[int]) -> bool:
    return all(own >= least for own, least in zip(have, need, strict=True))


def match_isv_svn(levels: Iterable[QeLevel], isv_svn: int) -> QeLevel | None:
    """Return the highest level that *isv_svn* reaches (5.5 b, c)."""
    return next((level for level in levels if level.isv_svn <= isv_svn), None)


def module_id(tee_tcb_svn: bytes) -> str | None:
    """Return the name of the module identity of a TD; ``None`` for major version 0."""
    return f"TDX_{tee_tcb_svn[1]:02X}" if tee_tcb_svn[1] else None


def find_module(
    info: TcbInfo, tee_tcb_svn: bytes
) -> tuple[TdxModule | None, TdxModuleIdentity | None]:
    """Return what the TDX module must be, and its identity unless its major version is 0."""
    wanted = module_id(tee_tcb_svn)
    if wanted is None:
        return info.module, None
    for identity in info.module_identities:
        if identity.id.upper() == wanted:
            return identity.module, identity
    return None, None


def module_fits(module: TdxModule, body: TdReportBody) -> bool:
    """Whether the module that a TD reports is *module* (5.5 b); the mask is not used, as in QVL."""
    return (
        body.mrsigner_seam == module.mrsigner
        and not any(body.seam_attributes)
        and body.seam_attributes == module.attributes
    )


def converge(platform: str, components: Iterable[str]) -> str:
    """Return the platform's status together with those of module and quoting enclave (5.5 d)."""
    found = tuple(components)
    if REVOKED in found:
        return REVOKED
    for component in (OUT_OF_DATE, CONFIGURATION, OUT_OF_DATE_CONFIGURATION):
        if component in found:
            platform = _CONVERGED[component].get(platform, platform)
    return platform


def relaunch(launch: str, current: str) -> str:
    """Return the status of a TD whose module was replaced while it ran (5.5 e)."""
    if launch not in _OLD or current not in _CURRENT:
        return launch
    if launch in _CONFIGURATIONS or current in _CONFIGURATIONS:
        return RELAUNCH_CONFIGURATION
    return RELAUNCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """
    How a platform stands.

    Attributes:
        platform: The level that the platform reaches; ``None`` if none.
        module: The level of the TDX module; ``None`` if there is none to judge.
        qe: The level of the quoting enclave; ``None`` if none is reached.
        module_judged: Whether the module has a level of its own to reach.
        qe_judged: Whether the identity of the quoting enclave is known.
    """

    platform: TcbLevel | None
    module: QeLevel | None
    qe: QeLevel | None
    module_judged: bool = False
    qe_judged: bool = True

    @property
    def missing(self) -> str | None:
        """The part that reaches no level."""
        if self.platform is None:
            return "a platform"
        if self.module is None and self.module_judged:
            return "a TDX module"
        if self.qe is None and self.qe_judged:
            return QE
        return None

    @property
    def revoked(self) -> bool:
        """Whether the level of the platform or of its TDX module is revoked."""
        return any(
            part is not None and part.status == REVOKED for part in (self.platform, self.module)
        )

    @property
    def platform_status(self) -> str:
        """The platform's own status, or `NO_MATCH`."""
        return NO_MATCH if self.platform is None else self.platform.status

    @property
    def status(self) -> str:
        """
        The merged status, or `NO_MATCH`.

        Raises:
            CollateralError: A status that is not recognised.

        """
        if self.platform is None or self.missing is not None:
            return NO_MATCH
        parts = []
        if self.qe is not None:
            parts.append(_known(self.qe.status, QE_STATUSES, "quoting enclave"))
        if self.module is not None:
            parts.append(_known(self.module.status, MODULE_STATUSES, "TDX module"))
        return converge(_known(self.platform.status, PLATFORM_STATUSES, "platform"), parts)

    @property
    def _parts(self) -> list[TcbLevel | QeLevel]:
        return [part for part in (self.platform, self.module, self.qe) if part is not None]

    @property
    def date(self) -> datetime | None:
        """The earliest date of the levels."""
        return None if self.missing else min(part.date for part in self._parts)

    @property
    def advisories(self) -> tuple[str, ...]:
        """Every advisory of the levels, sorted, each once."""
        return tuple(sorted({name for part in self._parts for name in part.advisories}))


def evaluate(
    info: TcbInfo,
    qe_level: QeLevel | None,
    components: Sequence[int],
    pce_svn: int,
    tee_tcb_svn: bytes | None = None,
    *,
    qe_judged: bool = True,
) -> Evaluation:
    """
    Evaluate a platform (5.5 a to d).

    Args:
        info: TCB info of its family, SGX or TDX.
        qe_level: What `match_isv_svn` gave for the quoting enclave.
        components: SGX component SVNs of the PCK certificate.
        pce_svn: PCESVN of the PCK certificate.
        tee_tcb_svn: TEE_TCB_SVN of a TD (at launch, or TEE_TCB_SVN2: now).
        qe_judged: Whether the identity of the quoting enclave is known.
    """
    module = None
    judged = False
    if tee_tcb_svn is not None and tee_tcb_svn[1]:
        judged = True
        _, identity = find_module(info, tee_tcb_svn)
        if identity is not None:
            module = match_isv_svn(identity.levels, tee_tcb_svn[0])
    return Evaluation(
        platform=match_platform(info, components, pce_svn, tee_tcb_svn),
        module=module,
        qe=qe_level,
        module_judged=judged,
        qe_judged=qe_judged,
    )


def merge(launch: Evaluation, current: Evaluation | None) -> str:
    """Return the final status; a failure of either evaluation is one of the whole (5.5 e)."""
    if current is None:
        return launch.status
    if NO_MATCH in (launch.status, current.status):
        return NO_MATCH
    return relaunch(launch.status, current.status)
