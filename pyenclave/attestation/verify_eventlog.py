"""
The checks of a TCG event log by itself (kind ``tcg-eventlog``).

A log is what somebody claims was measured. Without a quote nobody signed it, so it is never
genuine; what it replays to is told in the claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import (
    BREAKS,
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    failed,
    not_asked,
)
from pyenclave.errors import EnclaveError, EvidenceFormatError
from pyenclave.formats.eventlog import EventLog
from pyenclave.measurement.replay import Replay, replay

__all__ = ["CHECKS", "Case", "LogCase", "claims", "judge_replay", "log_claims"]


@dataclass(slots=True, kw_only=True)
class LogCase(CaseBase):
    """An event log, and what it is judged by."""

    def read_log(self) -> EventLog:
        """Read the log; an area of firmware may be larger than it."""

        def read() -> EventLog:
            log = EventLog.from_bytes(self.data)
            if log.padding == "other":
                raise EvidenceFormatError(
                    "bytes follow the event log", expected="zeros or ones", found=log.end
                )
            return log

        return self._part("log", read)

    @property
    def log(self) -> EventLog:
        """The log, for other checks."""
        return self.need("log.format", self.read_log)


@dataclass(slots=True, kw_only=True)
class Case(LogCase):
    """A log of a TPM."""

    @property
    def replayed(self) -> Replay:
        """The registers that the log gives."""
        return self._part("replay", lambda: replay(self.log, ccel=False))


CHECKS: Final[Registry[Case]] = Registry()


def judge_replay(found: Replay, *banks: str) -> Verdict:
    """Say whether a log can be replayed in *banks* (none named: in some bank), event for event."""
    whole = set(found.registers) - set(found.incomplete_banks)
    if whole and set(banks) <= whole:
        return PASSED
    return failed(
        expected=f"digests of {' and '.join(banks) or 'some bank'} in every event",
        found=f"whole: {', '.join(sorted(whole)) or 'none'}",
        advice="Read the log again where it was made; an event was lost or never measured.",
    )


@CHECKS.evidence("log.format")
def _format(case: Case) -> Verdict:
    """The bytes are an event log that ends where it says."""
    case.read_log()
    return PASSED


@CHECKS.evidence("log.banks")
def _banks(case: Case) -> Verdict:
    """In some bank every event has a digest, so that the log can be replayed."""
    return judge_replay(case.replayed)


@CHECKS.evidence("log.quote")
def _quote(case: Case) -> Verdict:
    """Nothing here is signed."""
    del case
    return failed(
        expected="registers that hardware signed",
        found="an event log by itself",
        advice="Verify the quote of that TPM or VM and give the log beside it (an Azure HCL report "
        "with tpm-eventlog.bin). pyenclave measure eventlog explains a log.",
    )


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """No nonce is expected of a log."""
    if case.nonce is None:
        return not_asked("an event log carries no nonce")
    return failed(expected=case.nonce, found=None, advice="An event log carries no nonce.")


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """No report data is expected of a log."""
    if case.report_data is None:
        return not_asked("an event log carries no report data")
    return failed(expected=case.report_data, found=None, advice="It carries no report data.")


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """No user data is expected of a log."""
    if case.user_data is None:
        return not_asked("an event log carries no user data")
    return failed(expected=case.user_data, found=None, advice="It carries no user data.")


def log_claims(log: EventLog) -> dict[str, Any]:
    """Return what a log says of itself."""
    return {
        # The record that declares the algorithms measures nothing and is not counted.
        "events": log.event_count - log.has_spec_id,
        "log_bytes_used": log.end,
        "log_bytes_total": log.size,
        "log_format": log.format,
    }


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the log says, as far as it can be read."""
    found: dict[str, Any] = {"verify_at": case.at.isoformat()}
    try:
        found |= log_claims(case.log)
        found["replayed_pcrs"] = {
            bank: {str(index): value.hex() for index, value in sorted(registers.items())}
            for bank, registers in case.replayed.registers.items()
        }
    except (EnclaveError, NotReachedError, *BREAKS):  # the checks say what is wrong
        return found
    return found
