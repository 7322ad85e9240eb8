"""Quotes of enclaves with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from issuer_intel import STRUCTURAL as SHARED
from issuer_intel import Given, machine, shared

from pyenclave.attestation import AppraisalPolicy, AttestationResult
from pyenclave.formats.sgx import Attributes

STRUCTURAL = SHARED


def own() -> Iterator[tuple[str, Callable[[], Given]]]:
    def body(**changes: Any) -> Given:
        return Given(quote=changes)

    def ask(**changes: Any) -> Given:
        return Given(policy=AppraisalPolicy(**changes))

    def also(**changes: Any) -> Given:
        return Given(policy=AppraisalPolicy.any_code(**changes))

    m = machine()
    yield "tcb.tee", lambda: Given(extra={"tcb-info.json": m.signed("tcbInfo", m.tcb_info("tdx"))})
    yield "report.attributes", lambda: body(attributes=Attributes(flags=4, xfrm=3))
    yield "enclave.debug", lambda: body(attributes=Attributes(flags=7, xfrm=3))
    yield "code.mrenclave", lambda: ask(mrenclave=b"m" * 32)
    yield "code.mrsigner", lambda: ask(mrsigner=b"m" * 32, product_id=0)
    yield "code.product_id", lambda: also(product_id=1)
    yield "code.security_version", lambda: also(min_security_version=1)
    yield "code.config_id", lambda: also(config_id=b"c" * 64)
    yield "code.isv_ext_prod_id", lambda: also(isv_ext_prod_id=b"c" * 16)
    yield "code.isv_family_id", lambda: also(isv_family_id=b"c" * 16)
    yield "code.config_svn", lambda: also(min_config_svn=1)
    yield "enclave.xfrm", lambda: also(xfrm=b"\xe6" + bytes(7))
    yield "enclave.attributes", lambda: also(required_attributes=("kss",))
    yield "enclave.attributes", lambda: also(forbidden_attributes=("mode64bit",))
    yield "platform.ppid", lambda: also(ppid=b"p" * 16)
    yield "platform.fmspc", lambda: also(fmspc=b"f" * 6)
    yield "code.kind", lambda: ask(mrtd=b"m" * 48)
    yield "code.kind", lambda: ask(pcrs={0: b"m" * 48})


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    for make in (lambda: shared("sgx"), own):
        for check, given in make():
            yield check, lambda g=given: g().run()
