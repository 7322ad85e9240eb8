"""
The checks of an Intel TDX event log (kind ``tdx-ccel``) with the TD's quote beside it.

The log replays to RTMR 0 to 3 (UEFI 2.10, 38.4; register index = RTMR + 1), and the quote in
``quote.bin`` says what the hardware holds. A replay that differs contradicts the quote.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation import verify_tdx
from pyenclave.attestation.case import gathered, judge_nonce, judge_report_data, judged_at
from pyenclave.attestation.checks import (
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    absent,
    failed,
    not_asked,
)
from pyenclave.attestation.verify_eventlog import LogCase, judge_replay, log_claims
from pyenclave.measurement.replay import Replay, replay

__all__ = ["CHECKS", "Case", "claims"]

_QUOTE: Final = "quote.bin"
_BANK: Final = "sha384"
_BOOT: Final = (0, 1, 2)  # what firmware and boot loader extend; RTMR3 is the running system's


@dataclass(slots=True, kw_only=True)
class Case(LogCase):
    """A log of a TD, and what it is judged by."""

    @property
    def replayed(self) -> Replay:
        """The registers that the log gives."""
        return self._part("replay", lambda: replay(self.log, ccel=True))

    def read_quote(self) -> verify_tdx.Case:
        """Return the case of the quote beside the log."""
        data = self.endorsements.get(_QUOTE)
        if data is None:
            raise NotReachedError("quote.present")
        return self._part("quote", lambda: self.derive(verify_tdx.Case, data, kind="tdx-quote"))

    @property
    def registers(self) -> tuple[bytes, ...]:
        """RTMR 0 to 3 as the quote has them."""
        return self.read_quote().body.rtmrs

    def extends(self, number: int) -> bool:
        """Whether the log has an event of RTMR *number*."""
        return any(event.extends and event.index == number + 1 for event in self.log.events)


CHECKS: Final[Registry[Case]] = Registry()


@CHECKS.evidence("log.format")
def _format(case: Case) -> Verdict:
    """The bytes are an event log that ends where it says."""
    case.read_log()
    return PASSED


@CHECKS.evidence("log.registers")
def _registers(case: Case) -> Verdict:
    """MRTD is not changed by events, and there is no register above RTMR3."""
    wrong = {
        event.index
        for event in case.log.events
        if event.extends and event.index not in (1, 2, 3, 4)
    }
    if wrong:
        return failed(
            expected="events of RTMR 0 to 3 (index 1 to 4)",
            found=sorted(wrong),
            advice="This may be the log of a TPM.",
        )
    return PASSED


@CHECKS.evidence("log.banks")
def _banks(case: Case) -> Verdict:
    """Every event has a digest of SHA-384, so that the log can be replayed."""
    return judge_replay(case.replayed, _BANK)


@CHECKS.evidence("quote.present")
def _present(case: Case) -> Verdict:
    """The quote of the TD was given beside the log."""
    if _QUOTE in case.endorsements:
        return PASSED
    return absent(
        f"the TD's quote in {_QUOTE}",
        advice="Nobody signed the log itself: put the TD's quote into the folder of endorsements.",
    )


CHECKS.include("tdx", verify_tdx.CHECKS, Case.read_quote)


def _replays(case: Case, number: int) -> Verdict:
    replayed, quoted = case.replayed.rtmr(number), case.registers[number]
    if hmac.compare_digest(replayed, quoted):
        return PASSED
    return failed(
        expected=quoted,
        found=replayed,
        advice="The log does not tell what was measured: an event is changed, missing or added. "
        "pyenclave measure eventlog explains it.",
    )


@CHECKS.evidence("log.rtmr0")
def _rtmr0(case: Case) -> Verdict:
    """Replayed, the log gives RTMR0 of the quote."""
    return _replays(case, 0)


@CHECKS.evidence("log.rtmr1")
def _rtmr1(case: Case) -> Verdict:
    """Replayed, the log gives RTMR1 of the quote."""
    return _replays(case, 1)


@CHECKS.evidence("log.rtmr2")
def _rtmr2(case: Case) -> Verdict:
    """Replayed, the log gives RTMR2 of the quote."""
    return _replays(case, 2)


@CHECKS.evidence("log.rtmr3")
def _rtmr3(case: Case) -> Verdict:
    """The running system extends RTMR3, mostly without a record in the firmware's log."""
    if not case.extends(3) and any(case.registers[3]):
        return not_asked(
            "RTMR3 was extended, and this log has no event of it", found=case.registers[3]
        )
    return _replays(case, 3)


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """The report data of the quote is the nonce, or what the caller says it became."""
    return judge_nonce(case, case.read_quote().body.report_data)


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """The report data of the quote is the expected one."""
    return judge_report_data(case, case.read_quote().body.report_data)


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """Nothing is expected that a quote does not have."""
    if case.user_data is None:
        return not_asked("a TD's quote has report data instead")
    return failed(expected=case.user_data, found=None, advice="Give report_data instead.")


def claims(case: Case) -> Mapping[str, Any]:
    """Return what log and quote say, as far as they can be read."""
    return gathered(case, judged_at, _log, _quote)


def _log(case: Case) -> dict[str, Any]:
    told = [number for number in range(4) if number in _BOOT or case.extends(number)]
    replayed = {f"rtmr{number}": case.replayed.rtmr(number).hex() for number in told}
    return log_claims(case.log) | {"bank": _BANK, "replayed": replayed}


def _quote(case: Case) -> dict[str, Any]:
    inner = case.read_quote()
    told = [number for number in range(4) if number in _BOOT or case.extends(number)]
    same = {
        f"rtmr{number}": case.replayed.rtmr(number) == case.registers[number] for number in told
    }
    return {"matches_quote": same, "quote": dict(verify_tdx.claims(inner))}
