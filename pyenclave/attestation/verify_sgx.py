"""
The checks of DCAP quotes of SGX enclaves, versions 3 to 5.

Structures: the project's notes on SGX, 2.2 and 2.7; order of the checks: the notes on collateral,
5.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pyenclave.attestation.case import gathered, judge_reference, judged_at
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed
from pyenclave.attestation.intel import CHAIN_BLOCK, EVIDENCE, IntelCase, adopt
from pyenclave.attestation.intel_collateral import COLLATERAL, collateral_block
from pyenclave.attestation.intel_policy import NAME, POLICY, SHARED_CLAIMS, judge_code_kind
from pyenclave.formats import dcap, sgx

__all__ = ["CHECKS", "Case", "claims"]

# By the names that policies have for them.
_ATTRIBUTES: Final = {
    "debug": sgx.FLAG_DEBUG,
    "mode64bit": sgx.FLAG_MODE64BIT,
    "provision_key": sgx.FLAG_PROVISION_KEY,
    "einittoken_key": sgx.FLAG_EINITTOKEN_KEY,
    "kss": sgx.FLAG_KSS,
    "aex_notify": sgx.FLAG_AEX_NOTIFY,
}


@dataclass(slots=True, kw_only=True)
class Case(IntelCase):
    """A quote of an enclave, and what it is judged by."""

    tee: ClassVar[str] = "SGX"

    def read_quote(self) -> dcap.Quote:
        """Read the quote."""
        return self._part("quote", lambda: dcap.Quote.from_bytes(self.data))

    @property
    def body(self) -> sgx.ReportBody:
        """The enclave's report, for other checks."""
        found = self._read.get("quote")
        if isinstance(found, dcap.Quote):
            return found.report_body
        return self.need("quote.format", self.read_quote).report_body


CHECKS: Final[Registry[Case]] = Registry()
adopt(CHECKS, EVIDENCE)
adopt(CHECKS, COLLATERAL)


@CHECKS.evidence("report.attributes")
def _attributes(case: Case) -> Verdict:
    """Only an enclave that was initialised has an identity."""
    flags = case.body.attributes.flags
    if flags & sgx.FLAG_INITTED:
        return PASSED
    return failed(expected="an initialised enclave (INIT)", found=f"{flags:#x}")


adopt(CHECKS, POLICY)


@CHECKS.policy("enclave.debug")
def _debug(case: Case) -> Verdict:
    """The enclave is no debug enclave, unless the policy allows it."""
    if case.body.attributes.debug and not case.policy.allow_debug:
        return failed(
            expected="a production enclave",
            found="debug",
            advice="Whoever runs the machine reads its memory. Sign and launch it without DEBUG; "
            "allow_debug only for tests.",
        )
    return PASSED


@CHECKS.policy("code.mrenclave")
def _mrenclave(case: Case) -> Verdict:
    """The measurement is one that the policy names."""
    if not case.policy.reference("mrenclave"):
        return NAME("mrenclave")
    advice = "Other code runs there. pyenclave measure sgx tells what to expect."
    return judge_reference(case, "mrenclave", case.body.mrenclave, advice=advice)


@CHECKS.policy("code.mrsigner")
def _mrsigner(case: Case) -> Verdict:
    """The signer is one that the policy names."""
    if not case.policy.reference("mrsigner"):
        return NAME("mrsigner")
    return judge_reference(case, "mrsigner", case.body.mrsigner, advice="Somebody else signed it.")


@CHECKS.policy("code.product_id")
def _product(case: Case) -> Verdict:
    """The product is the one that the policy names."""
    wanted, found = case.policy.product_id, case.body.isv_prod_id
    if wanted is None:
        return NAME("product_id")
    if found == wanted:
        return PASSED
    return failed(expected=wanted, found=found, advice="Another product of the same signer.")


@CHECKS.policy("code.security_version")
def _security_version(case: Case) -> Verdict:
    """The security version is high enough."""
    wanted, found = case.policy.min_security_version, case.body.isv_svn
    if wanted is None:
        return NAME("min_security_version")
    if found >= wanted:
        return PASSED
    return failed(expected=f"at least {wanted}", found=found, advice="Run a newer enclave.")


@CHECKS.policy("code.config_id")
def _config_id(case: Case) -> Verdict:
    """CONFIGID, which the host sets at launch, is one that the policy names."""
    if not case.policy.reference("config_id"):
        return NAME("config_id")
    return judge_reference(case, "config_id", case.body.config_id)


@CHECKS.policy("code.isv_ext_prod_id")
def _ext_product(case: Case) -> Verdict:
    """ISVEXTPRODID is one that the policy names."""
    if not case.policy.reference("isv_ext_prod_id"):
        return NAME("isv_ext_prod_id")
    return judge_reference(case, "isv_ext_prod_id", case.body.isv_ext_prod_id)


@CHECKS.policy("code.isv_family_id")
def _family(case: Case) -> Verdict:
    """ISVFAMILYID is one that the policy names."""
    if not case.policy.reference("isv_family_id"):
        return NAME("isv_family_id")
    return judge_reference(case, "isv_family_id", case.body.isv_family_id)


@CHECKS.policy("code.config_svn")
def _config_svn(case: Case) -> Verdict:
    """CONFIGSVN, the version of what CONFIGID names, is high enough."""
    wanted, found = case.policy.min_config_svn, case.body.config_svn
    if wanted is None:
        return NAME("min_config_svn")
    if found >= wanted:
        return PASSED
    return failed(
        expected=f"at least {wanted}", found=found, advice="Launch it with a newer configuration."
    )


@CHECKS.policy("enclave.xfrm")
def _xfrm(case: Case) -> Verdict:
    """XFRM, the processor's state that the enclave may use, is one that the policy names."""
    if not case.policy.reference("xfrm"):
        return NAME("xfrm")
    found = case.body.attributes.xfrm.to_bytes(8, "little")
    return judge_reference(
        case, "xfrm", found, advice="It was signed or launched for other features of the CPU."
    )


@CHECKS.policy("enclave.attributes")
def _wanted_attributes(case: Case) -> Verdict:
    """The enclave has the required attributes and none of the forbidden ones."""
    wanted, unwanted = case.policy.required_attributes, case.policy.forbidden_attributes
    if not wanted and not unwanted:
        return NAME("required_attributes or forbidden_attributes")
    flags = case.body.attributes.flags
    names = [name for name, flag in _ATTRIBUTES.items() if flags & flag]
    if set(wanted) <= set(names) and not set(unwanted) & set(names):
        return PASSED
    return failed(
        expected=f"with {', '.join(wanted) or 'any'}, without {', '.join(unwanted) or 'none'}",
        found=names,
        advice="Sign the enclave with other attributes.",
    )


@CHECKS.policy("code.kind")
def _code_kind(case: Case) -> Verdict:
    """A policy that names code of other kinds of evidence only is not met by this one."""
    return judge_code_kind(case, "mrenclave", "mrsigner")


CHECKS.remember(CHAIN_BLOCK)
CHECKS.remember(collateral_block())


def _body_claims(case: Case) -> dict[str, Any]:
    body = case.body
    return {
        "cpu_svn": body.cpu_svn.hex(),
        "misc_select": body.misc_select,
        "isv_ext_prod_id": body.isv_ext_prod_id.hex(),
        "attributes": body.attributes.to_bytes().hex(),
        "debug": body.attributes.debug,
        "mrenclave": body.mrenclave.hex(),
        "mrsigner": body.mrsigner.hex(),
        "config_id": body.config_id.hex(),
        "isv_prod_id": body.isv_prod_id,
        "isv_svn": body.isv_svn,
        "config_svn": body.config_svn,
        "isv_family_id": body.isv_family_id.hex(),
    }


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the evidence says, as far as it can be read; binary values as hex."""
    return gathered(case, judged_at, _body_claims, *SHARED_CLAIMS)
