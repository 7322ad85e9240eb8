"""
Write ``docs/checks.md``: every registered check, what it means, and what to do when it fails.

What a check means is the docstring of its function. ``python docs/tools/checks.py`` writes the page
anew; ``tests/test_checks_page.py`` holds that it is up to date and that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from pyenclave.attestation import kinds

PAGE: Final = Path(__file__).resolve().parent.parent / "checks.md"

# Heading → the kinds below it. Every kind is somewhere.
GROUPS: Final = {
    "Quotes of Intel SGX and TDX": ("sgx-quote", "tdx-quote"),
    "AMD SEV-SNP": ("sev-snp-report", "sev-snp-vek-cert"),
    "Azure confidential VMs": ("azure-hcl-snp", "azure-hcl-tdx"),
    "AWS Nitro Enclaves": ("nitro-document",),
    "Tokens": (
        "maa-jwt",
        "google-confidential-space-jwt",
        "attestation-result-jwt",
        "x5c-jwt",
    ),
    "RA-TLS certificates, and Azure Attestation's own": ("ra-tls-cert", "maa-cert"),
    "Arm CCA": ("arm-cca-token",),
    "NVIDIA GPUs": ("nvidia-gpu-report",),
    "Event logs": ("tdx-ccel", "tcg-eventlog"),
    "Our own platform": ("pyenclave",),
    "Intel's collateral by itself": ("sgx-collateral",),
    "Attested keys of Azure Attestation": ("maa-jwks",),
    "What is read and never genuine": ("akv-release-policy", "maa-claims"),
}

_AGAIN: Final = "Get it again as it was made, whole; if it is newer than this version, upgrade."
_FETCH: Final = "`pyenclave collateral fetch` gets it anew; keep the bytes as they are served."
_VALUE: Final = "Something else runs or was configured there. If it is right, name the value found."
_NOT_HERE: Final = "Leave it out: this kind has none. Its advice says what there is instead."
_CHAIN: Final = (
    "The certificates are not the vendor's: do not trust it. Report it if they should be."
)

# Name, or kind:name, with * → what to do. The first that fits counts.
CURES: Final = {
    # what is expected of the evidence
    "sgx-collateral:nonce": _NOT_HERE,
    "tcg-eventlog:nonce": _NOT_HERE,
    "maa-jwks:nonce": _NOT_HERE,
    "akv-release-policy:nonce": _NOT_HERE,
    "maa-claims:nonce": _NOT_HERE,
    "sev-snp-vek-cert:nonce": _NOT_HERE,
    "nonce": "Replayed, or made for another challenge: ask again with a new nonce. Where code "
    "hashes it into the report data, give `report_data` too.",
    "sgx-collateral:report_data": _NOT_HERE,
    "tcg-eventlog:report_data": _NOT_HERE,
    "sev-snp-vek-cert:report_data": _NOT_HERE,
    "nitro-document:report_data": "Give it as `user_data`.",
    "nvidia-gpu-report:report_data": "Give it as nonce: a GPU signs 32 bytes of the asker's.",
    "akv-release-policy:report_data": _NOT_HERE,
    "maa-claims:report_data": _NOT_HERE,
    "*-jwt:report_data": "Only Azure's tokens of VMs tell it; bind what matters by claims.",
    "report_data": "The evidence speaks of something else (another key, another message): ask "
    "again.",
    "nitro-document:user_data": "The enclave said something else: ask again.",
    "pyenclave:user_data": "The enclave said something else: ask again.",
    "azure-hcl-*:user_data": "The guest writes it to NV index 0x01400002 and reads the report "
    "again.",
    "nvidia-gpu-report:user_data": "Bind it into the nonce that is sent.",
    "akv-release-policy:user_data": _NOT_HERE,
    "maa-claims:user_data": _NOT_HERE,
    "user_data": "Give `report_data` (quotes, reports) or demand claims (tokens) instead.",
    # which code
    "nitro-document:code.kind": "Name PCR0 or PCR8: roles and instances are no code.",
    "azure-hcl-*:code.kind": "Name the firmware (`launch_digest`, `id_key_digest`, `mrtd`): PCRs "
    "alone are the word of whatever firmware makes the vTPM.",
    "code.kind": "Name an identity that this kind has, or use a policy for it.",
    "code.identity": "Ask for a report: a certificate says nothing of code.",
    "code.claims": "Another workload, or another claim than was meant: see the claims printed.",
    "code.container_image": "Another container runs there: deploy the right one, or name its "
    "digest.",
    "code.mrenclave": "Other code runs there: `pyenclave measure sgx` tells what to expect, "
    "`measure diff` what differs.",
    "code.mrsigner": "Somebody else signed it.",
    "code.mrtd": "Another firmware was started: `pyenclave measure tdx` tells what to expect.",
    "code.launch_digest": "Another firmware, kernel or number of CPUs: `pyenclave measure snp` "
    "tells "
    "what to expect, `--explain` where two launches part.",
    "nitro-document:code.pcrs": "Another image runs there: `pyenclave measure eif` tells its PCRs.",
    "code.pcrs": "`pyenclave measure eventlog` explains what was measured; only quoted PCRs count.",
    "code.gpu_measurements": "NVIDIA's manifests of the driver and the VBIOS have the values.",
    "code.rtmrs": "`pyenclave measure eventlog` explains what was measured.",
    "code.*version": "Run a newer version.",
    "code.min_*": "Run a newer version.",
    "code.max_vmpl": "Ask for the report from a higher privilege level.",
    "code.config_svn": "Launch it with a newer configuration.",
    "code.product_id": "Another product of the same signer runs there.",
    "code.id_key_digest": "Somebody else signed the ID block.",
    "code.author_key_digest": "Launch the guest with an author key; if it has one, it is "
    "another's.",
    "code.*": _VALUE,
    "guest.family_id": _VALUE,
    "guest.image_id": _VALUE,
    "guest.host_data": "The host gave the guest other data (a hash of its configuration) at "
    "launch.",
    "platform.ppid": "Another machine quoted it. If it is one of yours, name its PPID.",
    "platform.fmspc": "A machine of another family quoted it. If it is right, name the value "
    "found.",
    "platform.chip_id": "Another machine made the report. If it is one of yours, name its chip.",
    "platform.line": "A processor of another line made the report: name it in `product_lines`.",
    "enclave.xfrm": "It may use other features of the processor: sign it anew, or name the value "
    "found.",
    "enclave.attributes": "Sign the enclave with other attributes.",
    "td.xfam": "It was started with other features of the processor. If it is right, name the "
    "value found.",
    "platform.mr_seam": "Another TDX module runs. If it is right, name the value found.",
    # what the policy demands of the platform
    "*.debug": "Whoever runs the machine reads its memory: launch it without debug; `allow_debug` "
    "only for tests.",
    "debug": "Whoever runs the machine reads its memory: launch it without debug; `allow_debug` "
    "only for tests.",
    "enclave.jit": "Build the image without `jit`, or accept it (`allow_jit`).",
    "*-jwt:platform.software": "That machine's operator reads its memory: use a confidential one, "
    "or `dangerous_allow_software`.",
    "platform.software": "Whoever controls that machine can forge this evidence. If you trust it: "
    "`dangerous_allow_software`.",
    "platform.level": "Launch it at a higher level.",
    "platform.bits": "Demand less, or have the machine set up: `pyenclave doctor` there, or its "
    "firmware's settings.",
    "platform.svn": "Upgrade pyenclave on that machine.",
    "platform.chip": "Have the host show the chip ID (MASK_CHIP_ID off), or "
    "`allow_masked_chip_id`.",
    "guest.migration": "Launch it with a guest policy without bit 18; if you trust the agent: "
    "`allow_migration_agent`.",
    "td.migration": "Start the TD without MIGRATABLE; if you trust its migration TD: "
    "`allow_migration_agent`.",
    "guest.vmpl": "Ask for the report from a higher privilege level (a lower number).",
    "guest.policy": "Launch the guest with another guest policy.",
    "guest.svn": "Launch a newer ID block.",
    "tcb.minimum": "Update the machine's firmware, and fetch the certificate of its new TCB "
    "version.",
    "tcb.status": "Update the machine as the advice says; or accept the status (`tcb_statuses`) "
    "with "
    "its advisories (`accepted_advisories`).",
    "tcb.evaluation": "Somebody kept old collateral: fetch it again.",
    "collateral.complete": "`pyenclave collateral fetch` gets what is named as missing.",
    "td.attributes": "Upgrade this package, or accept unknown features "
    "(`allow_unknown_td_features`).",
    "td.sept_ve_disable": "Start the TD with SEPT_VE_DISABLE as the policy says.",
    "certificate.form": "Never fails: it only says that the form is an old one.",
    "document.age": "Ask for a new document.",
    "token.age": "Ask for a new token.",
    "issuer": "Another service issued the token: ask the right one, or name it in `issuers`.",
    "audience": "It was made for somebody else: ask with your own audience.",
    "compliance": "Azure does not call this VM compliant: see the VM's settings.",
    "secure_boot": "Start the VM with Secure Boot.",
    "ear.status": "The result's own vector says what its verifier found; or accept the tier "
    "(`ear_tiers`).",
    # revocation and collateral
    "crl.*.validity": "The list is over: fetch it again, or give the time at which it was in "
    "force.",
    "crl.chain": _FETCH,
    "crl*": "Fetch the list again. If a certificate in it is of this chain, do not use the "
    "machine.",
    "revocation.*": "Revoked: do not trust this machine or signer any more.",
    "tcb.revoked": "Intel has withdrawn its trust in this TCB level: do not use the machine.",
    "tcb.level": "The machine is older than all that Intel supports: update BIOS, microcode, "
    "module.",
    "qe.level": "Update the attestation software (DCAP) of that machine.",
    "*.validity": "Over, or not begun: fetch it again, or give the time at which it was valid "
    "(`--at`).",
    "validity": "Over, or not begun: fetch it again, or give the time at which it was in force.",
    "tcb.tee": "The collateral of the other kind of TEE was given: fetch this one's.",
    "qe.identity.tee": "The collateral of the other kind of TEE was given: fetch this one's.",
    "tcb.fmspc": "It is of another platform family: fetch the one of this FMSPC.",
    "tcb.pce_id": "It is of another platform family: fetch the one of this platform.",
    "tdx.module": "Fetch the TCB info again: it may be older than the module. If not, do not "
    "trust it.",
    "tcb.*": _FETCH,
    "pyenclave:qe.identity": "Another platform or a debug one made the quote: do not trust it.",
    "qe.identity": "Another enclave made the quote: do not trust it.",
    "qe.identity.*": _FETCH,
    "sgx-collateral:*": _FETCH,
    # keys and certificates
    "sev-snp-*:chain.format": "`pyenclave collateral fetch` gets the certificate of the chip: "
    "`vek.der`.",
    "nvidia-gpu-report:chain.format": "Give the chain that the driver hands out as "
    "`cert-chain.pem`.",
    "*-quote:chain.format": "The quote has no certificates: give `pck-chain.pem`.",
    "*-jwt:chain.format": _AGAIN,
    "chain.root": "Not the vendor's root. On purpose? Give yours (`--root`, `roots=`).",
    "chain.*": _CHAIN,
    "key.trust": "Give the issuer's key set as `jwks.json`, or the root of the token's "
    "certificates.",
    "key.issuer": "The key is of another instance: take the key set of the issuer that you chose.",
    "key.name": "The key set was put together by somebody: fetch it again.",
    "keys.format": "Fetch the key set again: `GET /certs` of the instance that you chose.",
    "keys.policy": "Another key's quote is not what the policy wants: see what was found.",
    "keys.attested": "A plain key set proves nothing: give it as `jwks.json` beside a token.",
    "ak.format": "Read NV index 0x01C101D0 again.",
    "ak.*": "The certificate is another machine's, or not Azure's: read NV index 0x01C101D0 again.",
    "vek.format": "`pyenclave collateral fetch` gets the certificate of the chip: `vek.der`.",
    "vek.tcb": "Fetch the certificate of the reported TCB version.",
    "vek.hwid": "The certificate is of another chip: fetch the one of this report.",
    "vek.*": "The certificate is of another kind or product: fetch the one of this report.",
    "pck.format": _CHAIN,
    "pck.platform": "The certificate is of another platform: ask for the one of this quote.",
    "cpak.format": "Give the platform's key as a public JSON Web Key.",
    # the evidence itself
    "arm-cca-token:platform.signature": "Give the key of this platform (`cpak-pub.json`), by its "
    "instance ID; with it, the token was changed.",
    "platform.profile": "A profile newer than this package: upgrade it.",
    "realm.profile": "A profile newer than this package: upgrade it.",
    "platform.lifecycle": "The platform's keys prove nothing in this state: do not trust it.",
    "platform.implementation": "Another platform: if it is right, name the value found.",
    "realm.key": _AGAIN,
    "realm.binding": "The two parts are of different tokens: ask again, or do not trust it.",
    "report.whole": "Ask for all measurements.",
    "report.fwid": "The report is of other firmware than was certified: do not trust it.",
    "maa-claims:claims.signature": "Give the token itself, not what somebody decoded.",
    "akv-release-policy:policy.signature": "Give evidence or a token: a policy proves nothing.",
    "hcl.copy": "Leave `runtime-data.json` out, or cut it from the report without change.",
    "hcl.type": "The report is of other hardware, or damaged: read it again.",
    "hcl.vmpl": "The guest made this report by itself: read it from the vTPM.",
    "hcl.binding": "Report and claims do not belong together: read them again from the vTPM.",
    "td.quote": "In the VM, have the TDREPORT quoted by Azure's metadata service, and give the "
    "quote as "
    "`td-quote.bin`.",
    "td.binding": "Report and quote do not belong together: make both again.",
    "td.report": "Read the report again from the vTPM.",
    "quote.present": "Put the TD's quote among the endorsements as `quote.bin`.",
    "quote.selection": "Quote the SHA-256 bank, and all PCRs that the policy names.",
    "quote.pcr_digest": "An event came between: read PCRs and quote again.",
    "quote.vendor": "Another vendor's quoting enclave made it: do not trust it.",
    "azure-hcl-*:quote.format": "Give `tpm-quote.msg` with its signature and values, or none of "
    "them.",
    "eventlog.replay": "The log is another boot's, or was changed: read it again.",
    "log.quote": "Verify the quote of that TPM or VM, with the log beside it.",
    "log.registers": "This may be the log of a TPM.",
    "log.banks": "An event was lost or never measured: read the log again where it was made.",
    "log.rtmr*": "An event is changed, missing or added: `pyenclave measure eventlog` explains "
    "the log.",
    "report.product": "A CPU newer than this package: upgrade it.",
    "report.attributes": "No hardware or platform makes such a report: do not trust it.",
    "token.algorithm": "The issuer signs otherwise than it should: do not trust the token.",
    "token.issuer": "It is not a token of that service: do not trust it.",
    "token.times": "Expired, or not begun: ask for a new one; look at the clock.",
    "token.type": "It is not a token of that service: do not trust it.",
    "ear.format": "Its verifier contradicts itself: do not trust the result.",
    "document.digest": "No security module writes that: do not trust it.",
    "document.pcrs": "No security module writes that: do not trust it.",
    "document.time": "Look at the time that was given (`--at`) and at the clock; else do not "
    "trust it.",
    "binding.*": "Certificate and quote do not belong together: somebody may stand between. "
    "Refuse.",
    "certificate.extensions": "The certificate demands something that nobody here understands: "
    "have it made without.",
    "certificate.quote": _AGAIN,
    "certificate.signature": "Whoever made it does not have the key; of an issuer, give its root.",
    "qe.origin": "No quoting enclave of Intel's that is known; if Intel's changed, give "
    "`qe-identity.json`.",
    "qe.*": "The quote was changed, or put together from two: do not trust it.",
    "record.*": "The record is not the one that the platform signed for this launch: do not trust "
    "it.",
    "report_data.binding": "Nonce, key and data are not those of the launch: do not trust it.",
    "*signature": "It was changed on the way, or the key is another's: get it again, or do not "
    "trust it.",
    "*.format": _AGAIN,
    "*.claims": _AGAIN,
}

_HEAD: Final = """\
# Every check

What `pyenclave verify` and `appraise` check, by kind of evidence. Part *evidence* decides whether
it is genuine, part *policy* whether it is what the policy wants. A check that was not asked for, or
whose collateral was not given, is *skipped*; one whose input could not be read is *not reached* and
refuses. What a result says beside a check (expected, found, advice) is more exact than this page.

This page is made by `python docs/tools/checks.py` from the checks as they are registered.

Two checks are added at the end of every kind, if they fail. `code.named` (policy): the policy names
code, but none of its identities is one that this kind of evidence has. Name one that it has.
`policy.answered` (policy): the policy demands something that this kind of evidence cannot answer,
and names no identity of a kind that can: an audience of a quote, PCRs of a bare SEV-SNP report.
Leave the field out for this kind, with one policy for each kind.
"""


def meaning(kind: str, name: str) -> str:
    """Return what check *name* of *kind* means."""
    text = kinds.load(kind).checks.functions[name].__doc__
    if not text:
        raise SystemExit(f"{kind}: {name}: its function has no docstring")
    return " ".join(text.split("\n\n")[0].split())


def cure_of(kind: str, name: str) -> str:
    """Return the pattern whose cure counts for check *name* of *kind*."""
    for pattern in CURES:
        subject = f"{kind}:{name}" if ":" in pattern else name
        if fnmatchcase(subject, pattern):
            return pattern
    raise SystemExit(f"{kind}: {name}: say in {Path(__file__).name} what to do when it fails")


def own(kind: str) -> list[str]:
    """Return the checks that *kind* does not take from another one."""
    checks = kinds.load(kind).checks
    return [name for name in checks.functions if name not in checks.included]


def inner(kind: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Return what *kind* takes from others: prefix, kind, and which of its checks are left out."""
    checks = kinds.load(kind).checks
    for prefix in dict.fromkeys(checks.included.values()):
        taken = {n.removeprefix(f"{prefix}.") for n, p in checks.included.items() if p == prefix}
        for other in kinds.available():
            names = kinds.load(other).checks.functions
            if other != kind and taken <= set(names):
                yield prefix, other, tuple(name for name in names if name not in taken)
                break
        else:
            raise SystemExit(f"{kind}: {prefix}: of which kind are these?")


def _rows(group: tuple[str, ...]) -> Iterator[str]:
    rows: dict[tuple[str, ...], list[str]] = {}
    for kind in group:
        for name in own(kind):
            part = kinds.load(kind).checks.parts[name]
            row = (name, part, meaning(kind, name), CURES[cure_of(kind, name)])
            rows.setdefault(row, []).append(kind)
    several = len(group) > 1
    yield f"| check | part |{' kinds |' if several else ''} means | when it fails |"
    yield f"|---|---|{'---|' if several else ''}---|---|"
    for (check, what, means, cure), of in rows.items():
        listed = "all" if len(of) == len(group) else ", ".join(f"`{kind}`" for kind in of)
        yield f"| `{check}` | {what} |{f' {listed} |' if several else ''} {means} | {cure} |"


def _machine() -> str:
    """Return what is said of the machine below a platform: its checks are there only with it."""
    from pyenclave.attestation import verify_machine

    own = [name for name in verify_machine.CHECKS.functions if "." not in name]
    means = (verify_machine.CHECKS.functions[name].__doc__ or "" for name in own)
    listed = "; ".join(
        f"`machine.{name}`: {text.strip().splitlines()[0].rstrip('.')}"
        for name, text in zip(own, means, strict=True)
    )
    return (
        "Evidence of a platform on a confidential VM also has the machine's own checks, and a "
        f"failure of any means that nothing vouches for the platform. {listed}. The checks of the "
        "kind found follow as `machine.snp.…`, `machine.tdx.…`, `machine.azure-snp.…` or "
        "`machine.azure-tdx.…`, with the meanings that they have above."
    )


def page() -> str:
    """Return the page."""
    lines = [_HEAD]
    for heading, group in GROUPS.items():
        lines += [f"## {heading}", "", f"Kinds: {', '.join(f'`{kind}`' for kind in group)}.", ""]
        lines += [*_rows(group), ""]
        for kind in group:
            for prefix, other, left_out in inner(kind):
                without = ", ".join(f"`{name}`" for name in left_out) or "none"
                lines.append(
                    f"`{kind}` also has the checks of `{other}` as `{prefix}.…`, "
                    f"without: {without}."
                )
                lines.append("")
        if "pyenclave" in group:
            lines += [_machine(), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
