"""Quotes of TDs with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from issuer_intel import STRUCTURAL as SHARED
from issuer_intel import Given, machine, shared

from pyenclave.attestation import AppraisalPolicy, AttestationResult
from pyenclave.formats.tdx import TdExtension

STRUCTURAL = SHARED
REDUNDANT = {
    "tcb.tee": "TCB info of SGX has neither TDX levels nor a module: tcb.level and tdx.module "
    "refuse it too. The check says what is the matter.",
}

EXTENSION = TdExtension(
    vmid=0,
    td_id=bytes(32),
    device_info_hash=bytes(48),
    initial_service_td_hash=bytes(48),
    initial_service_td_attributes=bytes(8),
    initial_cpu_svn=bytes(16),
    initial_tee_tcb_svn=bytes(16),
    initial_tee_fmspc=bytes(12),
    current_service_td_hash=bytes(48),
    current_service_td_attributes=bytes(8),
)


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def own() -> Iterator[tuple[str, Callable[[], Given]]]:
    def body(**changes: Any) -> Given:
        return Given(tee="tdx", quote=changes)

    def ask(**changes: Any) -> Given:
        return Given(tee="tdx", policy=AppraisalPolicy(**changes))

    def also(**changes: Any) -> Given:
        return Given(tee="tdx", policy=AppraisalPolicy.any_code(**changes))

    def module(**changes: Any) -> Given:
        info = machine().tcb_info("tdx")
        return Given(tee="tdx", files={"tcb_info": {"tdxModuleIdentities": [
            info["tdxModuleIdentities"][0] | changes
        ]}})  # fmt: skip

    m = machine()
    sgx = m.tcb_info("sgx") | {"tcbLevels": m.tcb_info("tdx")["tcbLevels"]}
    yield (
        "tcb.tee",
        lambda: Given(
            tee="tdx",
            # Version 0 of the module and no TDX levels: only the name of the TEE is left to differ.
            quote={"tee_tcb_svn": bytes(16)},
            extra={"tcb-info.json": m.signed("tcbInfo", sgx)},
        ),
    )
    yield "tdx.module", lambda: body(seam_attributes=number(1))
    yield "tdx.module", lambda: body(mrsigner_seam=b"s" * 48)
    yield "tdx.module", lambda: module(mrsigner="11" * 48)
    yield "tdx.module", lambda: module(attributes="11" * 8)
    yield (
        "tcb.level",
        lambda: module(
            tcbLevels=[
                {"tcb": {"isvsvn": 5}, "tcbDate": "2024-03-13T00:00:00Z", "tcbStatus": "UpToDate"}
            ]
        ),
    )
    yield "tcb.level", lambda: body(tee_tcb_svn=bytes((4, 1, 1, *bytes(13))))
    yield "tcb.level", lambda: body(version=5, tee_tcb_svn2=bytes((3, 1, 2, *bytes(13))))
    yield (
        "tcb.revoked",
        lambda: module(
            tcbLevels=[
                {"tcb": {"isvsvn": 1}, "tcbDate": "2024-03-13T00:00:00Z", "tcbStatus": "Revoked"}
            ]
        ),
    )
    yield "td.debug", lambda: body(td_attributes=number(1))
    yield "td.migration", lambda: body(td_attributes=number(1 << 29))
    yield "td.attributes", lambda: body(td_attributes=number(1 << 40))
    yield "td.attributes", lambda: body(xfam=number(0x6DBE7 | 1 << 30))
    yield "td.attributes", lambda: body(xfam=number(0x6DBE6))
    yield "td.attributes", lambda: body(version=5, extension=EXTENSION)
    yield "td.sept_ve_disable", lambda: also(sept_ve_disable=False)
    yield "code.mrtd", lambda: ask(mrtd=b"m" * 48)
    yield "code.rtmrs", lambda: also(rtmrs={2: b"m" * 48})
    yield "code.mr_config_id", lambda: also(mr_config_id=b"m" * 48)
    yield "code.mr_owner", lambda: also(mr_owner=b"m" * 48)
    yield "code.mr_owner_config", lambda: also(mr_owner_config=b"m" * 48)
    yield "code.mr_service_td", lambda: also(mr_service_td=bytes(48))  # a body of TDX 1.0
    yield (
        "code.mr_service_td",
        lambda: Given(
            tee="tdx",
            quote={"version": 5},
            policy=AppraisalPolicy.any_code(mr_service_td=b"m" * 48),
        ),
    )
    yield "td.xfam", lambda: also(xfam=b"\xe7" + bytes(7))
    yield "platform.ppid", lambda: also(ppid=b"p" * 16)
    yield "platform.fmspc", lambda: also(fmspc=b"f" * 6)
    yield "platform.mr_seam", lambda: also(mr_seam=b"m" * 48)
    yield "code.kind", lambda: ask(mrenclave=b"m" * 32)


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    for make in (lambda: shared("tdx"), own):
        for check, given in make():
            yield check, lambda g=given: g().run()
