"""
The checks of our own kind of evidence (``pyenclave``), in their order.

Signatures first (part ``evidence``), then what the relying party wants (part ``policy``). Layouts:
``docs/formats/evidence.md``; quote: the project's notes on SGX structures, 2.7.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from pyenclave.attestation import pki
from pyenclave.attestation.case import judge_reference
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed, not_asked
from pyenclave.attestation.policy import LEVELS
from pyenclave.attestation.pyenclave_case import PROFILE, Case, machine_checks
from pyenclave.attestation.pyenclave_claims import claims, runtime_binding
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import sgx
from pyenclave.formats.evidence import bound_report_data
from pyenclave.formats.record import QE_MRENCLAVE, QE_MRSIGNER, QE_VENDOR_ID

__all__ = ["CHECKS", "Case", "claims", "machine_checks", "runtime_binding"]

_KNOWN_FLAGS: Final = sgx.FLAG_INITTED | sgx.FLAG_DEBUG | sgx.FLAG_MODE64BIT | sgx.FLAG_KSS
_NEEDED_FLAGS: Final = sgx.FLAG_INITTED | sgx.FLAG_MODE64BIT
CHECKS: Final[Registry[Case]] = Registry()

# What a policy has to name of a machine before that machine's word replaces an enrolled root. The
# firmware alone is not enough where it loads whatever it is given.
_WHOLE_MACHINES: Final = (
    frozenset({"machine.snp.code.launch_digest"}),
    frozenset({"machine.tdx.code.mrtd", "machine.tdx.code.rtmrs"}),
    frozenset({"machine.azure-snp.snp.code.launch_digest", "machine.azure-snp.code.pcrs"}),
    frozenset({"machine.azure-tdx.tdx.code.mrtd", "machine.azure-tdx.code.pcrs"}),
)


def _equal(expected: bytes, found: bytes, advice: str | None = None) -> Verdict:
    if hmac.compare_digest(expected, found):
        return PASSED
    return failed(expected=expected, found=found, advice=advice)


def _signed(key: object, signature: bytes, data: bytes) -> Verdict:
    """Verify a raw signature of P-256; a key of another kind verifies nothing."""
    if pki.verify_p256_raw(key, signature, data):
        return PASSED
    return failed(
        expected="a valid signature", found="an invalid one", advice="Something was changed."
    )


def _attestation_key(case: Case) -> object:
    key = pki.p256_key(case.quote.attestation_key)
    if key is None:
        raise EvidenceFormatError("the attestation key is no point of P-256")
    return key


# ---- is it genuine? ---------------------------------------------------------------------------


@CHECKS.evidence("evidence.format")
def _container(case: Case) -> Verdict:
    """The bytes are evidence of this platform, whole."""
    case.read_container()
    return PASSED


@CHECKS.evidence("quote.format")
def _quote(case: Case) -> Verdict:
    """The quote inside can be read."""
    case.read_quote()
    return PASSED


@CHECKS.evidence("quote.vendor")
def _vendor(case: Case) -> Verdict:
    """The quote is of this platform's vendor identifier."""
    return _equal(QE_VENDOR_ID, case.quote.qe_vendor_id, "This is not a pyenclave quote.")


@CHECKS.evidence("chain.format")
def _chain(case: Case) -> Verdict:
    """The certificates in the quote can be read."""
    case.read_chain()
    return PASSED


@CHECKS.evidence("chain.root")
def _root(case: Case) -> Verdict:
    """
    The chain ends in a root that the relying party enrolled.

    Or a machine vouches for the root whose own code the policy names: then whoever enrolled the
    machine's measurement enrolled what runs the platform there.
    """
    verdict = pki.check_root(case.chain, case.anchors())
    if verdict.outcome != "passed" and _machine_is_named(case):
        return PASSED
    return verdict


@CHECKS.evidence("chain.names")
def _names(case: Case) -> Verdict:
    """Each certificate names the next one as its issuer."""
    entry = case.chain_entry
    return entry.fact("names", lambda: pki.check_names(entry.value))


@CHECKS.evidence("chain.algorithms")
def _algorithms(case: Case) -> Verdict:
    """Keys and signatures are of the algorithms that the platform uses."""
    entry = case.chain_entry
    return entry.fact("algorithms", lambda: pki.check_algorithms(entry.value, PROFILE))


@CHECKS.evidence("chain.constraints")
def _constraints(case: Case) -> Verdict:
    """Only authorities may issue, and no deeper than they are allowed to."""
    entry = case.chain_entry
    return entry.fact("constraints", lambda: pki.check_constraints(entry.value, PROFILE))


@CHECKS.evidence("chain.key_usage")
def _key_usage(case: Case) -> Verdict:
    """Each key is meant for what it did."""
    entry = case.chain_entry
    return entry.fact("key usage", lambda: pki.check_key_usage(entry.value, PROFILE))


@CHECKS.evidence("chain.validity")
def _validity(case: Case) -> Verdict:
    """Every certificate is valid at the time of judging."""
    return pki.check_validity(case.chain, case.at)


@CHECKS.evidence("chain.signatures")
def _chain_signatures(case: Case) -> Verdict:
    """Each certificate is signed by the next one."""
    entry = case.chain_entry
    return entry.fact("signatures", lambda: pki.check_signatures(entry.value))


@CHECKS.evidence("qe.signature")
def _qe_signature(case: Case) -> Verdict:
    """The certified key signed the report of the platform."""
    quote, leaf = case.quote, case.chain[0]
    if "qe" in case.proved:
        return PASSED
    return _signed(leaf.public_key(), quote.qe_report_signature, quote.qe_report_bytes)


@CHECKS.evidence("qe.identity")
def _qe_identity(case: Case) -> Verdict:
    """The QE report is the platform's, and not of a debug enclave."""
    report = case.quote.qe_report
    if report.attributes.debug:
        return failed(expected="a production quoting enclave", found="debug")
    return _equal(QE_MRENCLAVE + QE_MRSIGNER, report.mrenclave + report.mrsigner)


@CHECKS.evidence("qe.binding")
def _qe_binding(case: Case) -> Verdict:
    """The platform's report names the attestation key; its other half is zero."""
    quote = case.quote
    digest = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest()
    return _equal(digest + bytes(32), quote.qe_report.report_data)


@CHECKS.evidence("quote.signature")
def _quote_signature(case: Case) -> Verdict:
    """The attestation key signed the quote."""
    quote = case.quote
    if "quote" in case.proved:
        return PASSED
    return _signed(_attestation_key(case), quote.signature, quote.signed_bytes)


@CHECKS.evidence("report.attributes")
def _attributes(case: Case) -> Verdict:
    """The report is of an initialised enclave and has nothing that our platform never sets."""
    body = case.body
    flags = body.attributes.flags
    if flags & _NEEDED_FLAGS != _NEEDED_FLAGS or flags & ~_KNOWN_FLAGS:
        return failed(expected="INITTED, MODE64BIT and no unknown flag", found=f"{flags:#x}")
    others = (
        body.attributes.xfrm == sgx.XFRM_LEGACY
        and body.misc_select == 0
        and body.config_svn == 0
        and not any(body.isv_ext_prod_id)
        and not any(body.isv_family_id)
        and not any(body.cpu_svn[2:])
    )
    if not others:
        return failed(
            expected="legacy XFRM; the rest of CPUSVN, MISCSELECT, CONFIGSVN and KSS ids zero",
            found=f"xfrm {body.attributes.xfrm:#x}, MISCSELECT {body.misc_select:#x}",
        )
    return PASSED


@CHECKS.evidence("record.format")
def _record(case: Case) -> Verdict:
    """The protection record can be read."""
    case.read_record()
    return PASSED


@CHECKS.evidence("record.signature")
def _record_signature(case: Case) -> Verdict:
    """The attestation key signed the protection record."""
    record = case.record
    if "record" in case.proved:
        return PASSED
    return _signed(_attestation_key(case), record.signature, record.signed_bytes())


@CHECKS.evidence("record.binding")
def _record_binding(case: Case) -> Verdict:
    """The quote's CONFIGID is the hash of the protection record."""
    digest = hashlib.sha256(case.container.record).digest()
    return _equal(digest + bytes(32), case.body.config_id)


@CHECKS.evidence("record.consistency")
def _record_consistency(case: Case) -> Verdict:
    """Record and report say the same of what both name."""
    record, body = case.record, case.body
    both = (record.debug, record.platform_svn)
    report = (body.attributes.debug, int.from_bytes(body.cpu_svn[:2], "little"))
    if both != report:
        return failed(
            expected=f"debug {report[0]}, platform SVN {report[1]} as in the report",
            found=f"debug {both[0]}, platform SVN {both[1]} in the record",
        )
    return PASSED


@CHECKS.evidence("record.tee")
def _tee(case: Case) -> Verdict:
    """A record alone cannot claim hardware: the machine's own evidence comes with it."""
    claimed, there = case.record.tee, case.container.machine is not None
    if (claimed != "none") is there:
        return PASSED
    if there:
        return failed(
            expected="the TEE of the machine's evidence",
            found="none",
            advice="The platform did not claim that machine.",
        )
    return failed(
        expected="none",
        found=claimed,
        advice="A TEE is proven by its own evidence, not by the word of a platform.",
    )


@CHECKS.evidence("report_data.binding")
def _binding(case: Case) -> Verdict:
    """The report data is the hash of nonce, runtime key and user data."""
    parts = case.container
    if parts.runtime_key is None or parts.user_data is None or parts.nonce is None:
        return not_asked("raw evidence: measured code chose the report data itself")
    digest = bound_report_data(
        nonce=parts.nonce, runtime_key=parts.runtime_key, user_data=parts.user_data
    )
    return _equal(digest, case.body.report_data)


def _machine_is_named(case: Case) -> bool:
    """Whether a machine vouches for the platform, and the policy names all that runs on it."""
    if case.container.machine is None:
        return False
    checks = machine_checks(case)
    if not all(check.holds for check in checks):
        return False
    passed = {check.name for check in checks if check.outcome == "passed"}
    return any(names <= passed for names in _WHOLE_MACHINES)


# ---- is it what I want? -----------------------------------------------------------------------


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """The evidence was made for the nonce."""
    found = case.container.nonce
    if case.nonce is None:
        return not_asked("give the nonce that was sent, or the evidence may be an old one")
    if found is None:
        return failed(expected=case.nonce, found=None, advice="Raw evidence carries no nonce.")
    return _equal(case.nonce, found, "Replayed, or made for another challenge.")


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """The report data is the expected one."""
    if case.report_data is None:
        return not_asked("give the expected report data to have it compared")
    return _equal(case.report_data, case.body.report_data)


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """Measured code put the expected user data in."""
    found = case.container.user_data
    if case.user_data is None:
        return not_asked("give the expected user data to have it compared")
    if found is None:
        return failed(expected=case.user_data, found=None, advice="Raw evidence has none.")
    return _equal(case.user_data, found)


@CHECKS.policy("enclave.debug")
def _debug(case: Case) -> Verdict:
    """The enclave is no debug enclave, unless the policy allows it."""
    if case.body.attributes.debug and not case.policy.allow_debug:
        return failed(
            expected="a production enclave",
            found="debug",
            advice="Sign the image and launch it without debug; allow_debug only for tests.",
        )
    return PASSED


@CHECKS.policy("enclave.jit")
def _jit(case: Case) -> Verdict:
    """The enclave cannot execute memory that was written, unless the policy allows it."""
    if case.record.jit and not case.policy.allow_jit:
        return failed(expected="no memory that is written, then executed", found="jit")
    return PASSED


@CHECKS.policy("platform.software")
def _software(case: Case) -> Verdict:
    """The platform is in a TEE, unless the policy accepts software."""
    if case.record.tee == "none" and not case.policy.dangerous_allow_software:
        return failed(
            expected="a platform in a TEE",
            found="tee none",
            advice="Whoever controls that machine can forge this evidence. If you trust it, say "
            "dangerous_allow_software=True (--policy permissive).",
        )
    return PASSED


@CHECKS.policy("platform.level")
def _level(case: Case) -> Verdict:
    """The level is at least the policy's."""
    wanted = case.policy.min_level
    if LEVELS.index(case.record.level) < LEVELS.index(wanted):
        return failed(expected=f"at least {wanted}", found=case.record.level)
    return PASSED


@CHECKS.policy("platform.bits")
def _bits(case: Case) -> Verdict:
    """The protections that the policy names held at launch."""
    wanted = case.policy.required_bits
    if not wanted:
        return not_asked("name required_bits to have protections demanded")
    missing = [name for name in wanted if not case.record.holds(name)]
    if missing:
        held = sorted(name for name in case.record.bits if case.record.holds(name))
        return failed(
            expected=wanted,
            found=f"without {', '.join(missing)}; held: {', '.join(held) or 'none'}",
            advice="pyenclave doctor on that machine says what is missing.",
        )
    return PASSED


@CHECKS.policy("platform.svn")
def _platform_svn(case: Case) -> Verdict:
    """The platform's security version is high enough."""
    if case.record.platform_svn < case.policy.min_platform_svn:
        return failed(
            expected=f"at least {case.policy.min_platform_svn}",
            found=case.record.platform_svn,
            advice="Upgrade pyenclave on that machine.",
        )
    return PASSED


_NO_CODE: Final = "name mrenclave or mrsigner, or any code is accepted"


@CHECKS.policy("code.mrenclave")
def _mrenclave(case: Case) -> Verdict:
    """The measurement is one that the policy names."""
    return judge_reference(
        case,
        "mrenclave",
        case.body.mrenclave,
        advice="Other code runs there. pyenclave diff explains how two images differ.",
        unnamed=_NO_CODE,
    )


@CHECKS.policy("code.mrsigner")
def _mrsigner(case: Case) -> Verdict:
    """The signer is one that the policy names."""
    return judge_reference(
        case,
        "mrsigner",
        case.body.mrsigner,
        advice="Somebody else signed it.",
        unnamed=_NO_CODE,
    )


@CHECKS.policy("code.product_id")
def _product(case: Case) -> Verdict:
    """The product is the one that the policy names."""
    wanted = case.policy.product_id
    if wanted is None:
        return not_asked("name product_id to have it compared", found=case.body.isv_prod_id)
    if case.body.isv_prod_id != wanted:
        return failed(expected=wanted, found=case.body.isv_prod_id)
    return PASSED


@CHECKS.policy("code.security_version")
def _security_version(case: Case) -> Verdict:
    """The security version is high enough."""
    wanted = case.policy.min_security_version
    if wanted is None:
        return not_asked("name min_security_version to have it compared", found=case.body.isv_svn)
    if case.body.isv_svn < wanted:
        return failed(
            expected=f"at least {wanted}", found=case.body.isv_svn, advice="Run a newer image."
        )
    return PASSED
