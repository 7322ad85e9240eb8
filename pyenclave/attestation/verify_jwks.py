"""
The checks of a key set of Azure Attestation whose certificates carry SGX quotes.

An instance may sign its tokens inside an enclave: the certificate of the key has the enclave's
quote in an extension of Open Enclave, and the quote's report data is the hash of the key. Keys of
the set without a quote are shown and vouched for by nobody here.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation import pki, verify_sgx
from pyenclave.attestation.case import CaseBase, gathered, judge_report_data
from pyenclave.attestation.checks import (
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    absent,
    failed,
    not_asked,
)
from pyenclave.attestation.verify_ratls import legacy_binding, self_signature
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose, jsonstrict, ratls
from pyenclave.formats.jwk import MAX_KEYS
from pyenclave.formats.x509 import Certificate

__all__ = ["CHECKS", "Case", "Entry", "claims"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """
    A key of the set.

    Attributes:
        kid: Its name.
        chain: Its certificates.
        quote: The quote in the first of them.
    """

    kid: str
    chain: tuple[Certificate, ...]
    quote: bytes | None


def _entries(data: bytes) -> tuple[Entry, ...]:
    listed = jsonstrict.object_of(data, "key set").get("keys")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_KEYS:
        raise EvidenceFormatError("key set: keys", expected=f"a list of 1 to {MAX_KEYS}")
    found: list[Entry] = []
    for item in listed:
        kid = item.get("kid") if isinstance(item, dict) else None
        if not isinstance(kid, str) or kid in {entry.kid for entry in found}:
            raise EvidenceFormatError("key set: a key", expected="a kid of its own", found=kid)
        raw = jose.x5c_of(item.get("x5c"), "key set: x5c")
        chain = tuple(Certificate.from_der(der) for der in raw)
        quote = None
        for oid in ratls.OIDS_OPEN_ENCLAVE:
            if oid in chain[0].extensions:
                quote = ratls.open_enclave_quote(chain[0].extensions[oid].value)
                break
        found.append(Entry(kid=kid, chain=chain, quote=quote))
    return tuple(found)


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A key set, and what it is judged by."""

    def read_entries(self) -> tuple[Entry, ...]:
        """Read the keys."""
        return self._part("entries", lambda: _entries(self.data))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The keys, for other checks."""
        return self.need("keys.format", self.read_entries)

    @property
    def attested(self) -> tuple[Entry, ...]:
        """The keys with a quote."""
        found = tuple(entry for entry in self.entries if entry.quote is not None)
        if not found:
            raise NotReachedError("keys.attested")
        return found

    def inner(self, entry: Entry) -> verify_sgx.Case:
        """Return the case of a key's quote."""
        return self.derive(verify_sgx.Case, entry.quote or b"")


CHECKS: Final[Registry[Case]] = Registry()
_FRESHNESS: Final = ("nonce", "report_data", "user_data")  # a key set is made for no challenge


# ---- is it genuine? ---------------------------------------------------------------------------


@CHECKS.evidence("keys.format")
def _format(case: Case) -> Verdict:
    """The key set can be read; each key has a name of its own and certificates."""
    case.read_entries()
    return PASSED


@CHECKS.evidence("keys.attested")
def _attested(case: Case) -> Verdict:
    """One key at least is attested, and of several each is genuine."""
    if all(entry.quote is None for entry in case.entries):
        return absent(
            "a key whose certificate carries a quote",
            advice="A plain key set proves nothing: give it as jwks.json beside a token.",
        )
    return _judge_others(case, "evidence")


def _judge_others(case: Case, part: str) -> Verdict:
    """Judge the quotes of further keys; those of the first one are checks of their own."""
    for entry in case.attested[1:]:
        for check in verify_sgx.CHECKS.run(case.inner(entry)):
            if check.part == part and check.name not in _FRESHNESS and not check.holds:
                return failed(
                    expected=f"{entry.kid}: {check.name}: {check.expected}",
                    found=check.found,
                    advice=check.advice,
                )
    return PASSED


@CHECKS.evidence("certificate.signature")
def _signature(case: Case) -> Verdict:
    """The certificate of each attested key is signed by that key."""
    for entry in case.attested:
        verdict = self_signature(entry.chain[0])
        if verdict is not PASSED:
            return verdict
    return PASSED


@CHECKS.evidence("certificate.validity")
def _validity(case: Case) -> Verdict:
    """The certificate of each attested key is valid at the time of judging."""
    for entry in case.attested:
        verdict = pki.check_validity(entry.chain[:1], case.at)
        if verdict is not PASSED:
            return verdict
    return PASSED


@CHECKS.evidence("binding.key")
def _binding(case: Case) -> Verdict:
    """The report data of each quote is the hash of the certificate's key."""
    for entry in case.attested:
        quoted = case.inner(entry).quoted_data
        if not legacy_binding(entry.chain[0].spki, quoted, "open-enclave"):
            return failed(
                expected=f"{entry.kid}: the hash of its key in the report data",
                found=quoted,
                advice="The quote was made for another key.",
            )
    return PASSED


@CHECKS.evidence("key.name")
def _name(case: Case) -> Verdict:
    """Azure names an attested key by the hash in the report data; another name contradicts it."""
    for entry in case.attested:
        try:
            name = jose.b64_decode(entry.kid)
        except EvidenceFormatError:
            continue
        if len(name) == 32 and not hmac.compare_digest(name, case.inner(entry).quoted_data[:32]):
            return failed(expected="the hash of the key as its kid", found=entry.kid)
    return PASSED


CHECKS.include("quote", verify_sgx.CHECKS, lambda case: case.inner(case.attested[0]))


# ---- is it what I want? -----------------------------------------------------------------------


@CHECKS.policy("keys.policy")
def _policy(case: Case) -> Verdict:
    """Debug, code and TCB of further keys count as those of the first one do."""
    return _judge_others(case, "policy")


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """No nonce is expected of a key set."""
    if case.nonce is None:
        return not_asked("a key set is not made for a challenge")
    return failed(expected=case.nonce, found="none: a key set is not made for a challenge")


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """The report data of the first quote is the expected one."""
    return judge_report_data(case, case.inner(case.attested[0]).quoted_data)


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """No user data is expected of a key set."""
    if case.user_data is None:
        return not_asked("a key set has no user data")
    return failed(expected=case.user_data, found="none")


# ---- what it says -----------------------------------------------------------------------------


def claims(case: Case) -> Mapping[str, Any]:
    """Return the keys, and what the first attested one's quote says."""
    return gathered(case, _key_claims, _first_claims)


def _key_claims(case: Case) -> dict[str, Any]:
    return {
        "keys": [{"kid": entry.kid, "certs": len(entry.chain)} for entry in case.entries],
        "attested_keys": [entry.kid for entry in case.entries if entry.quote is not None],
    }


def _first_claims(case: Case) -> dict[str, Any]:
    entry = case.attested[0]
    inner = case.inner(entry)
    leaf = entry.chain[0]
    said = verify_sgx.claims(inner)
    checks = verify_sgx.CHECKS.run(inner)
    names = ("mrenclave", "mrsigner", "debug", "report_data")
    return {
        "first_cert": {
            "quote_verified": all(c.holds for c in checks if c.part == "evidence"),
            **{name: said.get(name) for name in names},
            "fmspc": inner.pck.fmspc.hex(),
            "binding": list(legacy_binding(leaf.spki, inner.quoted_data, "open-enclave")),
        },
        "first_cert_valid": [
            moment.strftime("%Y-%m-%dT%H:%M:%SZ") for moment in (leaf.not_before, leaf.not_after)
        ],
    }
