"""Readers that need more than one call, and what must hold between their calls."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import batch_model
import fuzz_files
import fuzz_seeds
from fuzz_seeds import NOW, Corpus

from pyenclave import _core
from pyenclave.attestation import AppraisalPolicy, appraise, azure_policy, policy_text
from pyenclave.attestation import ear as ear_export
from pyenclave.errors import (
    ArgumentError,
    AuditError,
    EvidenceFormatError,
    MeasurementError,
)
from pyenclave.formats import (
    audit_chain,
    audit_log,
    cbor,
    der,
    ear,
    elf,
    elf_enclave,
    elf_protect,
    eventlog,
    http_answer,
    image,
    jose,
    jsonstrict,
    key_envelope,
    pck,
    release,
    sealed,
    sealed_file,
    spdm,
    tpm_wire,
    vault_keys,
    wrapped,
    x509,
    x509_form,
)
from pyenclave.formats.cca import RealmClaims
from pyenclave.formats.release_policy import ReleasePolicy
from pyenclave.measurement import (
    difference,
    eif,
    explain,
    ovmf,
    replay,
    replay_explain,
    sev,
    sgx_file,
)
from pyenclave.measurement import tdx as measure_tdx


class UnstableError(Exception):
    """What was written is not what was read."""


def stable(
    read: Callable[[bytes], Any],
    *,
    canonical: bool = True,
    write: Callable[[Any], bytes] | None = None,
) -> Callable[[bytes], object]:
    """Return a reader that writes what it read, reads that, and compares."""

    def again(data: bytes) -> object:
        first = read(data)
        out = bytes(write(first) if write else first.to_bytes())
        if canonical and out != data:
            raise UnstableError(f"read and written, {data.hex()[:400]} is {out.hex()[:400]}")
        second = read(out)
        if second != first:
            raise UnstableError(f"written and read, {first!r:.400} is {second!r:.400}")
        if not canonical and bytes(write(second) if write else second.to_bytes()) != out:
            raise UnstableError("written twice, it differs")
        return first

    return again


# ---- readers that need more than one call ---------------------------------------------------


def walk_der(data: bytes, depth: int = 0) -> None:
    """Read every element by its tag, and what is constructed, 32 levels deep."""
    cursor = der.Der(data, "DER")
    readers: Mapping[int, Callable[[], object]] = {
        der.BOOLEAN: cursor.boolean,
        der.INTEGER: cursor.integer,
        der.BIT_STRING: cursor.bits,
        der.OCTET_STRING: cursor.octet_string,
        der.OBJECT_IDENTIFIER: cursor.oid,
        der.UTC_TIME: cursor.time,
        der.GENERALIZED_TIME: cursor.time,
    }
    while cursor.more:
        tag = cursor.tag
        assert tag is not None
        if tag in readers:
            readers[tag]()
        elif tag & 0x20 and depth < 32:
            walk_der(cursor.content(tag), depth + 1)
        else:
            cursor.element()
    cursor.end()


def integers_and_oids_are_stable(data: bytes) -> None:
    cursor = der.Der(data, "DER")
    while cursor.more:
        before = cursor.element()
        again = der.Der(before, "DER")
        if before[0] == der.INTEGER:
            written = der.encode_integer(again.integer())
        elif before[0] == der.OBJECT_IDENTIFIER:
            written = der.encode_oid(again.oid())
        elif before[0] in (der.UTC_TIME, der.GENERALIZED_TIME):
            moment = again.time()
            written = der.encode_time(moment)
            if der.Der(written, "DER").time() != moment:
                raise UnstableError(f"{before.hex()} is {written.hex()}")
            continue
        elif before[0] == der.SEQUENCE:
            integers_and_oids_are_stable(again.content(der.SEQUENCE))
            continue
        else:
            continue
        if written != before:
            raise UnstableError(f"{before.hex()} is {written.hex()}")


def read_der(data: bytes) -> None:
    walk_der(data)
    if len(data) < 4096:
        integers_and_oids_are_stable(data)


def read_tpm_answer(data: bytes) -> object:
    """What a TPM answers to NV_ReadPublic, with a password session or without."""
    sessions = int(data[:2] == b"\x80\x02")
    return tpm_wire.NvPublic.from_parameters(tpm_wire.parameters(data, sessions=sessions))


def tpm_size(data: bytes) -> bytes:
    """Put the right size into an answer's header."""
    return data[:2] + len(data).to_bytes(4, "big") + data[6:] if len(data) >= 10 else data


def read_certificate(data: bytes) -> object:
    found = x509.Certificate.from_bytes(data)
    for ask in (found.public_key, lambda: found.key_usage, lambda: pck_of(found)):
        try:
            ask()
        except EvidenceFormatError:
            continue
    return found


@functools.cache
def usual_pck() -> tuple[bytes, x509_form.CertificateForm]:
    from pyenclave.formats.pck import OID_SGX_EXTENSION
    from pyenclave.testing.intel import IntelPlatform

    data = IntelPlatform(NOW).pck
    form = x509_form.CertificateForm.of(x509.Certificate.from_der(data), (OID_SGX_EXTENSION,))
    assert form is not None
    return data, form


def read_by_form(data: bytes) -> object:
    """The bytes say what is changed of a certificate; what the form accepts the reader does too."""
    base, form = usual_pck()
    changed = bytearray(base)
    for i in range(0, min(len(data), 24) - 2, 3):
        changed[int.from_bytes(data[i : i + 2], "big") % len(base)] ^= data[i + 2]
    quick = form.read(bytes(changed), None)
    if quick is not None:
        full = x509.Certificate.from_der(bytes(changed))
        if quick.extensions != full.extensions or quick.spki != full.spki or quick.tbs != full.tbs:
            raise UnstableError(f"{bytes(changed).hex()[:4000]} is read in two ways")
    return quick or True


def pck_of(found: x509.Certificate) -> object:
    return pck.PckExtension.from_certificate(found)


def read_cbor(data: bytes) -> object:
    try:
        cbor.loads(data, form="any", floats=True, indefinite=True)  # type: ignore[arg-type]
    except ValueError as error:
        if "form" not in str(error):
            raise
    value = cbor.loads(data)
    if cbor.dumps(value) != data:
        raise UnstableError(f"{data.hex()[:400]} is {cbor.dumps(value).hex()[:400]}")
    return value


def read_json(data: bytes) -> object:
    value = jsonstrict.loads(data)
    if json.loads(data) != value:
        raise UnstableError("the library's reader reads something else")
    if isinstance(value, dict):
        for name in [*value][:8]:
            member = jsonstrict.member_bytes(data, name)
            if jsonstrict.loads(member) != value[name]:
                raise UnstableError(f"member {name!r} is cut out as {member[:200]!r}")
    return value


def token_of(data: bytes) -> bytes:
    header, _, claims = data.partition(b"\0")
    return fuzz_seeds.token(header, claims)


def read_token(data: bytes) -> object:
    found = jose.Jws.from_bytes(data)
    claims = found.claims()
    if ear.is_ear(claims):
        ear.appraisals_of(claims)
        ear.plain_submods(claims)
    if "x5c" in found.header:
        jose.x5c_of(found.header["x5c"])
    return found


def read_http_answer(data: bytes) -> object:
    """An answer in one piece, and cut at a place that its bytes choose: the same is read."""
    found = []
    for cut in (0, sum(data[:64]) % (len(data) + 1)):
        reader = http_answer.AnswerReader(1 << 16)
        reader.feed(data[:cut])
        if cut < len(data) or not cut:
            reader.feed(data[cut:])
        reader.end()
        found.append((reader.status, dict(reader.headers), reader.body))
    if found[0] != found[1]:
        raise UnstableError(f"in pieces, {data.hex()[:400]} is another answer")
    return found[0]


def release_of(data: bytes) -> bytes:
    return fuzz_seeds.token(b'{"alg":"RS256","x5c":["AAAA"]}', data)


def read_release(data: bytes) -> object:
    found = release.ReleaseAnswer.from_bytes(data)
    for text in (found.kid, found.asked):
        try:
            vault, name, version = release.split_kid(text)
        except ValueError:
            continue
        again = f"{vault}/keys/{name}/{version}" if version else f"{vault}/keys/{name}"
        if release.split_kid(again) != (vault, name, version):
            raise UnstableError(f"{text!r} is {again!r}")
    return found


def read_vault_key(data: bytes) -> object:
    value = jsonstrict.object_of(data, "key")
    members = {name: text for name, text in value.items() if isinstance(text, str)}
    return vault_keys.from_jwk(members, members.get("kty", ""))


def read_base64(data: bytes) -> object:
    text = data.decode("latin-1")
    for decode in (jose.b64url_decode, jose.b64_decode):
        try:
            found = decode(text)
        except EvidenceFormatError:
            continue
        if decode is jose.b64url_decode and jose.b64url_encode(found) != text:
            raise UnstableError(f"{text!r} is {found.hex()}")
    return None


def read_ccel(data: bytes) -> object:
    return eventlog.CcelTable.from_bytes(data)


def ccel_sum(data: bytes) -> bytes:
    """Make the checksum of a table hold."""
    if len(data) <= 9:
        return data
    rest = sum(data) - data[9]
    return data[:9] + bytes((-rest & 0xFF,)) + data[10:]


def read_replay(data: bytes) -> object:
    found = replay.replay(data)
    text = found.to_json()
    for event in found.events[:64]:
        event.to_json(ccel=found.ccel)
    for bank, registers in [*found.registers.items()][:2]:
        for index in [*registers][:2]:
            expected = replay_explain.Expected(bank, index, bytes(len(registers[index])))
            for cause in replay_explain.check(found, [expected]):
                cause.to_json()
    return text


def read_expected(data: bytes) -> object:
    value = jsonstrict.object_of(data)
    found = None
    for ccel in (False, True):
        try:
            found = replay_explain.read_expected(value, ccel=ccel)
        except MeasurementError:
            continue
    return found


def read_elf(data: bytes) -> object:
    found = elf.parse(data, "fuzz")
    return found, elf.exported(data, "fuzz")


def read_elf_protect(data: bytes) -> object:
    return elf_protect.protectable(data, "fuzz")


def read_enclave_elf(data: bytes) -> object:
    found = elf_enclave.EnclaveElf(data)
    for name in (".note.sgxmeta", ".oeinfo", ".rela.dyn"):
        found.section(name)
    return found


def measure_sgx(data: bytes) -> object:
    found = sgx_file.measure_sgx(data)
    found.claims()
    if found.layout is not None:
        explain.explain(found.layout)
    return found


def read_batch_request(data: bytes) -> object:
    """Check a batch as the enclave does, in C, against a second reader in Python."""
    return _batch(data, reply=False)


def read_batch_answer(data: bytes) -> object:
    """The same for what the host checks."""
    return _batch(data, reply=True)


def _batch(data: bytes, *, reply: bool) -> object:
    found = None
    for align in (8, 64):
        want = batch_model.read(data, align, reply)
        try:
            items = _core.batch_items(data, align, reply)
        except ArgumentError:
            assert want is None, want
            continue
        assert items == want
        found = items
    if found is None:
        raise ArgumentError("malformed batch")
    return found


def checked_image(data: bytes) -> bytes:
    """End an image with the digest that it must have."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def read_image(data: bytes) -> object:
    found = image.Image.parse(data)
    found.sigstruct  # noqa: B018 - it is read when it is asked for
    return found


def read_sealed(data: bytes) -> object:
    header, _ = sealed.split(data)
    return header


def read_sealed_file(data: bytes) -> object:
    """The header of a sealed file; what is written again is what was read, but for the MAC."""
    header = sealed_file.FileHeader.from_bytes(data)
    again = bytearray(data[: header.geometry.stride])
    end = sealed_file.MAC_OFFSET + sealed_file.MAC_SIZE
    again[sealed_file.MAC_OFFSET : end] = bytes(sealed_file.MAC_SIZE)
    assert header.to_bytes() == again
    return header


def read_wrapped(data: bytes) -> object:
    envelope = wrapped.newest(data)
    place = envelope.to_bytes()
    assert place in (data[: wrapped.PLACE_SIZE], data[wrapped.PLACE_SIZE : wrapped.HEAD_SIZE])
    return envelope.key_envelope if envelope.of_vault else envelope.header


def read_key_envelope(data: bytes) -> object:
    envelope = key_envelope.KeyEnvelope.from_bytes(data)
    assert envelope.to_bytes() == data
    return envelope


def read_audit_log(data: bytes) -> object:
    exported = audit_log.read_export(io.BytesIO(data))
    items = list(exported.items)
    report = audit_chain.verify_chain(items, start=exported.start)
    for item in items:
        if isinstance(item, audit_log.Row):
            with contextlib.suppress(AuditError):
                audit_log.fields_of(item)
    return report


def firmware(data: bytes) -> object:
    found = ovmf.Firmware(data)
    for ask in (
        lambda: found.sev,
        lambda: found.svsm_entry_offset,
        lambda: found.tdvf,
        lambda: measure_tdx.mrtd(found),
        lambda: measure_tdx.mrtd_steps(found, two_pass=True),
        lambda: sev.snp_launch_digest(found, vcpus=1, vcpu_type="EPYC-v4"),
    ):
        try:
            ask()
        except MeasurementError:
            continue
    return found


def read_eif(data: bytes) -> object:
    found = eif.Eif(data)
    found.to_json()
    return found


@functools.cache
def others() -> dict[int, bytes]:
    """A file of each kind that `measure diff` knows."""
    corpus = Corpus(None)
    made = [fuzz_files.checked_eif(corpus.get("eif")[0]), *corpus.get("firmware")[:1]]
    made += [*corpus.get("sgx-file")[:3], corpus.get("eventlog")[0]]
    return dict(enumerate(made))


def compare_files(data: bytes) -> object:
    found = []
    kind = difference.kind_of(data)
    for other in others().values():
        if difference.kind_of(other) is kind:
            found += difference.diff(data, other)
    return found


def read_cca_realm(data: bytes) -> object:
    found: RealmClaims = stable(RealmClaims.from_bytes, canonical=False)(data)  # type: ignore[assignment]
    return found.read_key()


def read_gpu_report(data: bytes) -> object:
    found = spdm.GpuReport.from_bytes(data)
    whole = found.signed + found.signature
    if data[: len(whole)] != whole or any(data[len(whole) :]):  # a file may end in NULs
        raise UnstableError("bytes that are neither signed nor the signature")
    return found.named_fields()


# ---- appraisal ------------------------------------------------------------------------------


@functools.cache
def corpus_of_own() -> Corpus:
    return Corpus(None)


@functools.cache
def endorsements() -> Mapping[str, Mapping[str, bytes]]:
    """Endorsements of the synthetic chips, by family."""
    own = corpus_of_own()
    return {
        "sgx": own.intel.endorsements("sgx"),
        "tdx": own.intel.endorsements("tdx"),
        "amd": own.amd.endorsements(),
        "azure": {**own.amd.endorsements(), **own.azure_snp.endorsements(bytes(8))},
        "azure-tdx": {
            **own.intel.endorsements("tdx"),
            **own.azure_tdx.endorsements(bytes(8)),
            "td-quote.bin": own.intel.td_quote(),
        },
        "tokens": {"jwks.json": own.get("jwks")[0]},
        "cca": own.cca.cpak_file(),
        "nvidia": {"cert-chain.pem": own.nvidia.chain(), "crl.der": own.nvidia.crl()},
        "release": {"claims.json": own.get("decoded-token")[0]},
        "none": {},
    }


@functools.cache
def roots() -> tuple[bytes, ...]:
    own = corpus_of_own()
    return (own.intel.root, own.amd.root, own.nitro.root, own.nvidia.root())


POLICY = AppraisalPolicy.permissive()


def judge(data: bytes, files: Mapping[str, bytes]) -> object:
    found = appraise(
        data,
        policy=POLICY,
        freshness="not_checked",
        at=NOW,
        roots=roots(),
        endorsements=dict(files),
    )
    json.dumps([found.to_json(), ear_export.to_ear(found)], allow_nan=False).encode()
    return None


def judged(family: str) -> Callable[[bytes], object]:
    return lambda data: judge(data, endorsements()[family])


def with_endorsement(family: str, kind: str) -> Callable[[bytes], object]:
    """Return a reader whose first byte says which endorsement the rest is; the evidence is good."""

    def read(data: bytes) -> object:
        files = dict(endorsements()[family])
        name = sorted(files)[data[0] % len(files)] if data else ""
        if name:
            files[name] = data[1:]
        return judge(corpus_of_own().get(kind)[0], files)

    return read


def endorsement_seeds(family: str) -> fuzz_seeds.Maker:
    def make(_corpus: Corpus) -> list[bytes]:
        files = endorsements()[family]
        return [bytes((place,)) + files[name] for place, name in enumerate(sorted(files))]

    return make


def nitro_of(data: bytes) -> bytes:
    """Sign what is fuzzed as a document's payload."""
    return corpus_of_own().nitro.sign(data)


def read_azure_policy(data: bytes) -> object:
    found = azure_policy.read_policy(data.decode("utf-8", "replace"))
    claims = [
        azure_policy.Claim("x", "1", "AttestationService"),
        azure_policy.Claim("x", 2, "AttestationService"),
        azure_policy.Claim("a", True),
        azure_policy.Claim("boot", '{"Events":[{"a":1}]}', "AttestationService"),
    ]
    return azure_policy.evaluate(found, claims)


def read_release_policy(data: bytes) -> object:
    found = ReleasePolicy.from_json(data)
    if ReleasePolicy.from_json(found.to_json()) != found:
        raise UnstableError(f"{data[:200]!r} is {found.to_json()[:200]!r}")
    return found.evaluate("https://x.attest.azure.net", {"a": {"b": 1}, "c": True})


def read_policy(form: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        found = AppraisalPolicy.from_text(data.decode("utf-8", "replace"), form=form)
        again = AppraisalPolicy.from_text(policy_text.text_of(found, form=form), form=form)
        if again != found:
            raise UnstableError(f"{found!r:.300} is {again!r:.300}")
        return found

    return read
