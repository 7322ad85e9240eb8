"""Every reader of hostile bytes, what it reads, and how it may refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fuzz_calls
import fuzz_files
import fuzz_sealed
import fuzz_seeds
from fuzz_reads import (
    ccel_sum,
    checked_image,
    compare_files,
    endorsement_seeds,
    firmware,
    judged,
    measure_sgx,
    nitro_of,
    read_audit_log,
    read_azure_policy,
    read_base64,
    read_batch_answer,
    read_batch_request,
    read_by_form,
    read_cbor,
    read_cca_realm,
    read_ccel,
    read_certificate,
    read_der,
    read_eif,
    read_elf,
    read_elf_protect,
    read_enclave_elf,
    read_expected,
    read_gpu_report,
    read_http_answer,
    read_image,
    read_json,
    read_key_envelope,
    read_policy,
    read_release,
    read_release_policy,
    read_replay,
    read_sealed,
    read_sealed_file,
    read_token,
    read_tpm_answer,
    read_vault_key,
    read_wrapped,
    release_of,
    stable,
    token_of,
    tpm_size,
    with_endorsement,
)
from fuzz_seeds import Corpus

from pyenclave import errors as pye
from pyenclave.attestation import detect
from pyenclave.cli import _listing
from pyenclave.errors import (
    AttestationError,
    CollateralError,
    EnclaveError,
    EvidenceFormatError,
    ImageError,
    MeasurementError,
    SignatureError,
)
from pyenclave.formats import (
    arrow_ipc,
    bundle,
    cca,
    cose,
    cose_key,
    dcap,
    debugging,
    decoded_token,
    eventlog,
    evidence,
    hcl,
    image,
    jwk,
    key_context,
    lock,
    machine,
    messages,
    nitro,
    pck,
    ratls,
    record,
    release_outcome,
    release_terms,
    sealed_stream,
    sgx,
    snp,
    snp_certs,
    tcb,
    tdx,
    tpm,
    x509,
)
from pyenclave.measurement import (
    enclave,
    sigstruct,
)

EVIDENCE = (EvidenceFormatError,)
COLLATERAL = (CollateralError,)
MEASURED = (MeasurementError,)
IMAGE = (ImageError,)


@dataclass(frozen=True)
class Target:
    """
    A reader.

    Attributes:
        name: What it is called on the command line.
        read: Reads; what it returns is looked at by `fuzz_guard.touch`.
        seeds: Kind of its seeds in `fuzz_seeds`.
        errors: The errors that its documentation names; nothing else may come out.
        frame: Makes what is read of what is fuzzed, such as a checksum that holds.
        rounds: Inputs in the gate.

    """

    name: str
    read: Callable[[bytes], object]
    seeds: str
    errors: tuple[type[Exception], ...] = EVIDENCE
    frame: Callable[[bytes], bytes] = bytes
    rounds: int = 800


# ---- the table ------------------------------------------------------------------------------


def _formats() -> list[Target]:
    t = Target
    unsealed = (pye.UnsealError,)
    return [
        t("arrow-ipc", arrow_ipc.scan, "arrow-stream", fuzz_calls.CALLS),
        t("batch-answer", read_batch_answer, "batch", (pye.ArgumentError,)),
        t("batch-request", read_batch_request, "batch", (pye.ArgumentError,)),
        t("bundle", stable(bundle.Bundle.from_bytes, canonical=False), "bundle", COLLATERAL),
        t("cbor", read_cbor, "cbor"),
        t("cca", stable(cca.CcaToken.from_bytes, canonical=False), "cca"),
        t(
            "cca-platform",
            stable(cca.PlatformClaims.from_bytes, canonical=False),
            "cca-platform",
        ),
        t("cca-realm", read_cca_realm, "cca-realm"),
        t("cose-key", cose_key.read_key, "cose-key"),
        t("cose", stable(cose.Sign1.from_bytes, canonical=False), "nitro"),
        t("dcap", stable(dcap.read_quote, canonical=False), "quote"),
        t(
            "debugging",
            stable(debugging.decode, canonical=False, write=debugging.encode),
            "debugging",
            (pye.EnclaveStateError,),
        ),
        t("decoded-token", decoded_token.DecodedToken.from_bytes, "decoded-token"),
        t("der", read_der, "certificate"),
        t("elf", read_elf, "elf", IMAGE),
        t("elf-protect", read_elf_protect, "elf-protect", (*IMAGE, pye.ProtectionError)),
        t("elf-enclave", read_enclave_elf, "sgx-file", MEASURED),
        t("eventlog", eventlog.EventLog.from_bytes, "eventlog"),
        t("eventlog-ccel-table", read_ccel, "ccel-table", frame=ccel_sum),
        t("evidence", stable(evidence.Evidence.from_bytes), "evidence"),
        t("evidence-machine", stable(machine.MachineEvidence.from_bytes), "machine"),
        t("hcl", stable(hcl.HclReport.from_bytes, canonical=False), "hcl"),
        t("hcl-runtime-claims", hcl.RuntimeClaims.from_bytes, "runtime-data"),
        t("image", read_image, "image", IMAGE, frame=checked_image, rounds=200),
        t("image-info", stable(image.ImageInfo.from_bytes), "image-info", IMAGE),
        t("jose", read_token, "jwt"),
        t("jose-base64", read_base64, "jwt"),
        t("jose-claims", read_token, "token-parts", frame=token_of),
        t("jsonstrict", read_json, "json"),
        t("jwk", jwk.Jwks.from_bytes, "jwks"),
        t("key-context", stable(key_context.KeyContext.from_bytes), "key-context"),
        t("lock", stable(lock.Lock.from_bytes), "lock", IMAGE),
        t(
            "messages",
            stable(messages.decode, canonical=False, write=messages.encode),
            "message",
            (pye.EnclaveStateError,),
        ),
        t("nitro", stable(nitro.NitroDocument.from_bytes, canonical=False), "nitro"),
        t("nitro-payload", stable(nitro.NitroPayload.from_bytes, canonical=False), "nitro-payload"),
        t("pck", pck.PckExtension.from_bytes, "pck-extension"),
        t("http-answer", read_http_answer, "http-answer"),
        t(
            "release-outcome",
            stable(release_outcome.Outcome.from_bytes, canonical=False),
            "outcome",
        ),
        t("release-terms", stable(release_terms.ReleaseTerms.from_bytes), "release-terms"),
        t("release-terms-anchor", stable(release_terms.Anchor.from_bytes), "release-terms"),
        t("release", read_release, "release", frame=release_of),
        t("ratls", ratls.RaTlsCertificate.from_bytes, "ra-tls"),
        t("ratls-endorsements", ratls.endorsement_files, "ra-tls-endorsements"),
        t("ratls-open-enclave", ratls.open_enclave_quote, "open-enclave-report"),
        t("ratls-oe-evidence", ratls.open_enclave_evidence, "open-enclave-evidence"),
        t("record", stable(record.ProtectionRecord.from_bytes), "record"),
        t("sealed", read_sealed, "sealed", (pye.UnsealError,)),
        t("sealed-file", fuzz_sealed.read_whole, "sealed-file", (pye.SealingError,), rounds=200),
        t("sealed-file-header", read_sealed_file, "sealed-file", unsealed),
        t(
            "sealed-file-signed",
            fuzz_sealed.read_whole,
            "sealed-file",
            (pye.SealingError,),
            frame=fuzz_sealed.signed,
            rounds=200,
        ),
        t("sealed-file-node", fuzz_sealed.read_node, "sealed-node", (pye.UnsealError,), rounds=200),
        t(
            "sealed-stream-header",
            stable(sealed_stream.StreamHeader.from_bytes),
            "sealed-stream",
            unsealed,
            frame=lambda data: data[:96],
        ),
        t("sealed-stream", fuzz_sealed.read_stream, "sealed-stream", (pye.SealingError,)),
        t("audit-log", read_audit_log, "audit-log", (pye.AuditError,)),
        t("folder-list", _listing.parse_list, "folder-list", (pye.UnsealError, pye.ArgumentError)),
        t("wrapped", read_wrapped, "wrapped", (pye.UnsealError,)),
        t("key-envelope", read_key_envelope, "key-envelope", (pye.UnsealError,)),
        t("sgx-key-request", stable(sgx.KeyRequest.from_bytes), "targetinfo"),
        t("sgx-report", stable(sgx.Report.from_bytes), "sgx-report"),
        t("sgx-report-body", stable(sgx.ReportBody.from_bytes), "sgx-report-body"),
        t("sgx-sigstruct", stable(sgx.Sigstruct.from_bytes), "sigstruct", (SignatureError,)),
        t("sgx-targetinfo", stable(sgx.TargetInfo.from_bytes), "targetinfo"),
        t("snp", stable(snp.SnpReport.from_bytes), "snp-report"),
        t("snp-lenient", stable(snp.SnpReport.decode, canonical=False), "snp-report"),
        t(
            "snp-certs",
            stable(snp_certs.CertificateTable.from_bytes, canonical=False),
            "snp-certificates",
        ),
        t("spdm", read_gpu_report, "gpu-report"),
        t("tcb-info", tcb.TcbInfo.from_bytes, "tcb-info", COLLATERAL),
        t("tcb-qe-identity", tcb.QeIdentity.from_bytes, "qe-identity", COLLATERAL),
        t("tdx", stable(tdx.TdReportBody.from_bytes), "td-body"),
        t("tdx-report", stable(tdx.TdReport.from_bytes), "td-report"),
        t("tpm", stable(tpm.TpmQuote.from_bytes), "tpm-quote"),
        t("tpm-answer", read_tpm_answer, "tpm-answer", (pye.TpmError,), frame=tpm_size),
        t("tpm-pcrs", tpm.read_pcr_values, "tpm-pcrs"),
        t("tpm-public", stable(tpm.TpmPublic.from_bytes), "tpm-public"),
        t("tpm-signature", stable(tpm.TpmSignature.from_bytes, canonical=False), "tpm-signature"),
        t(
            "vault-keys",
            read_vault_key,
            "vault-key",
            (EvidenceFormatError, pye.SealingError),
            rounds=200,
        ),
        t("x509", read_certificate, "certificate"),
        t("x509-chain", x509.Certificate.from_pem_chain, "pem", rounds=200),
        t("x509-form", read_by_form, "certificate"),
        t("x509-crl", x509.Crl.from_bytes, "crl"),
    ]


def _calls() -> list[Target]:
    t = Target
    return [
        t("call-element", fuzz_calls.read_element, "call-element", fuzz_calls.CALLS),
        t("call-error", fuzz_calls.read_error, "call-error", ()),
        t("call-frame", fuzz_calls.read_frame, "call-frame", fuzz_calls.CALLS),
        t("call-signature", fuzz_calls.read_signature, "call-signature", fuzz_calls.CALLS),
    ]


def _measurement() -> list[Target]:
    t = Target
    measured = (MeasurementError, SignatureError, ImageError)
    return [
        t("measure-diff", compare_files, "measured", measured + EVIDENCE, rounds=150),
        t("measure-eif", read_eif, "eif", MEASURED, frame=fuzz_files.checked_eif),
        t("measure-firmware", firmware, "firmware", MEASURED, rounds=150),
        t("measure-replay", read_replay, "eventlog", rounds=150),
        t("measure-replay-expected", read_expected, "json"),
        t("measure-sgx", measure_sgx, "sgx-file", measured, rounds=200),
        t("measure-sigstruct", sigstruct.examine, "sigstruct", (SignatureError,), rounds=100),
    ]


def _attestation() -> list[Target]:
    t = Target
    whole = (EvidenceFormatError, CollateralError)
    found = [
        t("detect", detect.kind_of, "everything"),
        t("policy-json", read_policy("json"), "policy-json", (ValueError,)),
        t("policy-toml", read_policy("toml"), "policy-toml", (ValueError,)),
        t("policy-azure", read_azure_policy, "azure-policy", (AttestationError,), rounds=200),
        t("policy-release", read_release_policy, "release-policy", (AttestationError,)),
        t("appraise-any", judged("none"), "everything", rounds=100),
    ]
    for kind, family, kind_of_seeds in (
        ("sgx-quote", "sgx", "sgx-quote"),
        ("tdx-quote", "tdx", "tdx-quote"),
        ("sgx-collateral", "sgx", "tcb-info"),
        ("sev-snp-report", "amd", "snp-report"),
        ("sev-snp-vek-cert", "amd", "certificate"),
        ("azure-hcl-snp", "azure", "hcl"),
        ("azure-hcl-tdx", "azure-tdx", "hcl-tdx"),
        ("nitro-document", "none", "nitro"),
        ("token", "tokens", "jwt"),
        ("maa-jwks", "sgx", "attested-jwks"),
        ("ra-tls-cert", "sgx", "ra-tls"),
        ("eventlog", "tdx", "eventlog"),
        ("arm-cca-token", "cca", "cca"),
        ("nvidia-gpu-report", "nvidia", "gpu-report"),
        ("akv-release-policy", "release", "release-policy"),
        ("maa-claims", "none", "decoded-token"),
        ("pyenclave", "none", "evidence"),
    ):
        found.append(t(f"appraise-{kind}", judged(family), kind_of_seeds, whole, rounds=60))
    found += [
        t("appraise-nitro-payload", judged("none"), "nitro-payload", whole, nitro_of, 60),
        t("appraise-token-claims", judged("tokens"), "token-parts", whole, token_of, 100),
    ]
    for family, kind_of_seeds in (
        ("sgx", "sgx-quote"),
        ("tdx", "tdx-quote"),
        ("amd", "snp-report"),
        ("azure", "hcl"),
        ("azure-tdx", "hcl-tdx"),
        ("tokens", "jwt"),
        ("cca", "cca"),
        ("nvidia", "gpu-report"),
        ("release", "release-policy"),
    ):
        name = f"endorsements-{family}"
        fuzz_seeds.SEEDS[name] = endorsement_seeds(family)
        found.append(t(name, with_endorsement(family, kind_of_seeds), name, whole, rounds=80))
    return found


@fuzz_seeds.seeds("measured")
def _(corpus: Corpus) -> list[bytes]:
    checked = [fuzz_files.checked_eif(data) for data in corpus.get("eif")]
    return checked + corpus.get("sgx-file") + corpus.get("firmware") + corpus.get("eventlog")


@fuzz_seeds.seeds("everything")
def _(corpus: Corpus) -> list[bytes]:
    named = (
        "evidence",
        "quote",
        "snp-report",
        "hcl",
        "hcl-tdx",
        "ra-tls",
        "nitro",
        "jwt",
        "jwks",
        "tcb-info",
        "eventlog",
        "cca",
        "gpu-report",
        "release-policy",
        "decoded-token",
    )
    found = [seed for kind in named for seed in corpus.get(kind)[:4]]
    return found + corpus.get("certificate")[:3] + corpus.get("pem")[:2]


TARGETS: dict[str, Target] = {
    target.name: target for target in (*_formats(), *_calls(), *_measurement(), *_attestation())
}

# A small file may say of an enclave that it is huge, and hashing what it says is what was asked
# for. `measure` bounds it at MAX_HASHED; here it is less, so that the rest can be tried often.
enclave.MAX_HASHED = 1 << 26
assert issubclass(MeasurementError, EnclaveError)
