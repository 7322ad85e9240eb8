"""
The corpus: real bytes from the vectors, where they are, and synthetic ones, which always are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import batch_model
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pyenclave.errors import EnclaveError
from pyenclave.formats import cbor, dcap, jose, jwk
from pyenclave.formats.cca import CcaToken
from pyenclave.formats.cose import Sign1
from pyenclave.formats.cose_key import write_key
from pyenclave.formats.hcl import REPORT_TYPE_TDX
from pyenclave.formats.key_context import KeyContext
from pyenclave.formats.nitro import NitroDocument
from pyenclave.formats.release_decision import Step
from pyenclave.formats.release_outcome import JudgedToken, JudgedTransfer, Outcome
from pyenclave.formats.release_terms import Anchor, ReleaseTerms
from pyenclave.formats.snp_certs import CertificateTable
from pyenclave.formats.tdx import TdReport
from pyenclave.formats.x509 import Certificate, pem_blocks
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.intel import IntelPlatform
from pyenclave.testing.nitro import NitroHost

NOW = datetime(2026, 7, 1, tzinfo=UTC)
LARGEST = 1 << 16  # bytes of one seed; of what is larger, the beginning
MOST = 40  # seeds of one kind, so that none drowns the others
TESTS = Path(__file__).resolve().parent.parent


def from_tests(path: str) -> ModuleType:
    """Load a file of the tests that makes synthetic files."""
    name = "fuzz_from_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


class Corpus:
    """
    Seeds by kind; `get` returns those of one kind.

    Args:
        vectors: The folder of the vectors, or None.

    """

    def __init__(self, vectors: Path | None) -> None:
        self.vectors = vectors
        self._made: dict[str, list[bytes]] = {}

    def get(self, kind: str) -> list[bytes]:
        """Return the seeds of *kind*, each once; of many, some of every source."""
        if kind not in self._made:
            seeds = dict.fromkeys(bytes(seed[:LARGEST]) for seed in SEEDS[kind](self))
            step = max(1, -(-len(seeds) // MOST))
            self._made[kind] = list(seeds)[::step]
        return self._made[kind]

    def files(self, *patterns: str) -> Iterator[bytes]:
        """Yield the beginnings of the vectors whose path fits a pattern."""
        for pattern in patterns:
            for path in sorted(self.vectors.glob(pattern)) if self.vectors else ():
                with path.open("rb") as file:
                    yield file.read(LARGEST)

    # ---- synthetic issuers -------------------------------------------------------------------

    @functools.cached_property
    def intel(self) -> IntelPlatform:
        return IntelPlatform(NOW)

    @functools.cached_property
    def amd(self) -> AmdChip:
        return AmdChip()

    @functools.cached_property
    def nitro(self) -> NitroHost:
        return NitroHost(NOW)

    @functools.cached_property
    def azure_snp(self) -> AzureVm:
        return AzureVm(hardware=lambda bound: self.amd.report(report_data=bound))

    @functools.cached_property
    def issuer(self) -> Any:
        import issuer_pyenclave

        return issuer_pyenclave.Issuer()

    @functools.cached_property
    def cca(self) -> ModuleType:
        import issuer_cca

        return issuer_cca

    @functools.cached_property
    def nvidia(self) -> ModuleType:
        import issuer_nvidia

        return issuer_nvidia

    @functools.cached_property
    def azure_tdx(self) -> AzureVm:
        return AzureVm(hardware=self._td_report, report_type=REPORT_TYPE_TDX)

    @staticmethod
    def _td_report(bound: bytes) -> bytes:
        plain = TdReport.from_bytes(b"\x81\0\0\0" + bytes(1020))
        return replace(plain, report_data=bound).to_bytes()

    @functools.cached_property
    def ra_tls(self) -> ModuleType:
        return from_tests("attestation/test_verify_ratls.py")

    @functools.cached_property
    def signature(self) -> bytes:
        """A SIGSTRUCT that holds."""
        module = from_tests("measurement/sgx/test_measure_command.py")
        key = rsa.generate_private_key(public_exponent=3, key_size=3072)
        made: bytes = module.signature(key, bytes(range(32)), isv_svn=3)
        return made

    @functools.cached_property
    def enclaves(self) -> ModuleType:
        return from_tests("measurement/sgx/conftest.py")


Maker = Callable[[Corpus], Iterable[bytes]]
SEEDS: dict[str, Maker] = {}


def seeds(kind: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        SEEDS[kind] = maker
        return maker

    return register


def blocks_of(text: bytes) -> tuple[bytes, ...]:
    try:
        return pem_blocks(text, "CERTIFICATE", limit=16)
    except EnclaveError:
        return ()


# ---- certificates and collateral ------------------------------------------------------------


@seeds("batch")
def _(_corpus: Corpus) -> Iterator[bytes]:
    items = [(0, b"abc"), (1, b"an error frame"), (2, b"\1\0\0\0"), (0, bytes(64)), (3, b"")]
    for align in (8, 64):
        yield batch_model.write(items, align)
        yield batch_model.write([(0, data) for _, data in items], align, budget=20)
        yield batch_model.write([(0, bytes(64))] * 3, align, form=batch_model.EVEN)


@seeds("certificate")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield from (corpus.intel.pck, corpus.amd.vek, corpus.amd.ask.der, corpus.nitro.leaf)
    yield AmdChip("turin", signer="vlek").vek
    for chain in corpus.files("attestation/roots/*.pem", "attestation/*/ak-cert*.pem"):
        yield from blocks_of(chain)
    yield from corpus.files("attestation/*/vek.der", "attestation/*/*.der")
    for quote in quotes(corpus):
        if quote.certification_type == dcap.CERTIFICATION_PCK_CHAIN:
            yield from blocks_of(quote.certification_data)


def quotes(corpus: Corpus) -> Iterator[Any]:
    for data in corpus.get("quote"):
        try:
            yield dcap.read_quote(data)
        except EnclaveError:
            continue


@seeds("pem")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield from (corpus.intel.pck_chain, corpus.intel.pck_chain + b"\0", corpus.amd.root)
    yield from corpus.files("attestation/**/*.pem")


@seeds("crl")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield from (corpus.intel.pck_crl(), corpus.intel.root_crl(revoked=range(1, 9)))
    yield corpus.intel.pck_crl(number=None, key_id=False).hex().encode()
    yield corpus.amd.endorsements(revoked=(5, 6))["crl.der"]
    yield from corpus.files("attestation/*/*crl*")


@seeds("pck-extension")
def _(corpus: Corpus) -> Iterator[bytes]:
    found = [corpus.intel.pck]
    for quote in quotes(corpus):
        if quote.certification_type == dcap.CERTIFICATION_PCK_CHAIN:
            found += blocks_of(quote.certification_data)[:1]
    for der in found:
        extension = Certificate.from_der(der).extensions.get("1.2.840.113741.1.13.1")
        if extension is not None:
            yield extension.value


@seeds("tcb-info")
def _(corpus: Corpus) -> Iterator[bytes]:
    for tee in ("sgx", "tdx"):
        yield corpus.intel.endorsements(tee)["tcb-info.json"]
    yield from corpus.files("attestation/*/tcb-info.json")


@seeds("qe-identity")
def _(corpus: Corpus) -> Iterator[bytes]:
    for tee in ("sgx", "tdx"):
        yield corpus.intel.endorsements(tee)["qe-identity.json"]
    yield from corpus.files("attestation/*/qe-identity.json")


# ---- evidence of hardware -------------------------------------------------------------------


@seeds("sgx-quote")
def _(corpus: Corpus) -> Iterator[bytes]:
    for version in (3, 4, 5):
        yield corpus.intel.enclave_quote(version=version)
    yield from corpus.files("attestation/*sgx*/quote.bin", "measurement/*/quote.bin")


@seeds("tdx-quote")
def _(corpus: Corpus) -> Iterator[bytes]:
    for version in (4, 5):
        yield corpus.intel.td_quote(version=version)
    yield from corpus.files("attestation/*tdx*/quote.bin", "attestation/*/td-quote.bin")


@seeds("quote")
def _(corpus: Corpus) -> Iterator[bytes]:
    for pair in zip(corpus.get("sgx-quote"), corpus.get("tdx-quote"), strict=False):
        yield from pair


@seeds("td-body")
def _(corpus: Corpus) -> Iterator[bytes]:
    for quote in quotes(corpus):
        if isinstance(quote, dcap.TdQuote):
            yield quote.report_body.to_bytes()


@seeds("td-report")
def _(corpus: Corpus) -> Iterator[bytes]:
    for data in corpus.files("attestation/azure-tdx*/hcl-report.bin"):
        yield data[32 : 32 + 1024]
    yield b"\x81\0\0\0" + bytes(1020)


@seeds("sgx-report-body")
def _(corpus: Corpus) -> Iterator[bytes]:
    for quote in quotes(corpus):
        if isinstance(quote, dcap.Quote):
            yield quote.report_body.to_bytes()
        yield quote.qe_report.to_bytes()


@seeds("sgx-report")
def _(corpus: Corpus) -> Iterator[bytes]:
    for body in corpus.get("sgx-report-body"):
        yield body + bytes(range(48))


@seeds("targetinfo")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield from (bytes(512), bytes(range(32)) + bytes(480))


@seeds("snp-report")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.amd.report()
    yield AmdChip("turin").report()
    yield AmdChip("genoa", signer="vlek").report()
    yield from corpus.files("attestation/*snp*/report.bin", "measurement/snp-real*/report.bin")


@seeds("snp-certificates")
def _(corpus: Corpus) -> Iterator[bytes]:
    files = corpus.amd.endorsements()
    yield CertificateTable(
        (
            ("63da758d-e664-4564-adc5-f4b93be8accd", files["vek.der"]),
            ("4ab7b379-bbac-4fe4-a02f-05aef327c782", corpus.amd.ask.der),
        )
    ).to_bytes()


@seeds("hcl")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.azure_snp.hcl_report()
    yield from corpus.files("attestation/*snp*/hcl-report.bin")


@seeds("hcl-tdx")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.azure_tdx.hcl_report()
    yield from corpus.files("attestation/*tdx*/hcl-report.bin")


@seeds("ra-tls")
def _(corpus: Corpus) -> Iterator[bytes]:
    own = corpus.ra_tls
    quote = own.PLATFORM.enclave_quote()
    yield own.made((own.DICE, own.extension()))
    yield own.made((own.DICE, own.extension(td=True)))
    inside = cbor.dumps(cbor.Tag(60000, [1, b"{}", b"", b"", b"", b"", b"{}", b""]))
    yield own.made((own.DICE, own.extension()), (own.ratls.OID_ENDORSEMENTS, inside))
    yield own.pem(own.made((own.ratls.OIDS_OPEN_ENCLAVE[0], quote)))
    yield own.made((own.ratls.OIDS_GRAMINE[0], quote))
    azure = own.name(CN="https://shared.attest.azure.net")
    yield own.made((own.ratls.OIDS_OPEN_ENCLAVE[1], quote), subject=azure, issuer=azure)


@seeds("ra-tls-endorsements")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield cbor.dumps(cbor.Tag(60000, [1, b"{}", b"", b"", b"", b"", b"{}", b""]))


@seeds("open-enclave-report")
def _(corpus: Corpus) -> Iterator[bytes]:
    quote = corpus.intel.enclave_quote()
    yield struct.pack("<IIQ", 1, 2, len(quote)) + quote


@seeds("open-enclave-evidence")
def _(corpus: Corpus) -> Iterator[bytes]:
    body = corpus.intel.enclave_quote() + b"claims"
    kind = bytes.fromhex("a3a21e871b4d4014b70aa125d2fbcd8c")
    yield struct.pack("<I16s4xQ", 3, kind, len(body)) + body


@seeds("attested-jwks")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.ra_tls.key_set(corpus.ra_tls.attested())
    yield from corpus.get("jwks")


@seeds("runtime-data")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.azure_snp.runtime_data()
    yield from corpus.files("attestation/*/runtime-data.json")


@seeds("tpm-quote")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.azure_snp.tpm_quote(bytes(range(32))).to_bytes()
    yield from corpus.files("attestation/*/tpm-quote.msg")


@seeds("tpm-signature")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield struct.pack(">HHH", 0x14, 0x0B, 256) + bytes(range(256))
    yield from (struct.pack(">HHH", 0x18, 0x0B, 32) + bytes(32) + b"\0\x20" + bytes(32), bytes(256))
    yield from corpus.files("attestation/*/tpm-quote.sig")


@seeds("tpm-public")
def _(_corpus: Corpus) -> Iterator[bytes]:
    head = struct.pack(">HHIH", 1, 0x0B, 0x00050072, 0)
    rsa = head + struct.pack(">HHHHI", 0x10, 0x14, 0x0B, 2048, 0) + b"\x01\0" + bytes(range(256))
    yield rsa
    yield struct.pack(">H", len(rsa)) + rsa
    head = struct.pack(">HHIH", 0x23, 0x0B, 0x00050072, 0)
    curve = struct.pack(">HHHHH", 0x10, 0x18, 0x0B, 3, 0x10)
    yield head + curve + b"\0\x20" + bytes(32) + b"\0\x20" + bytes(32)


@seeds("tpm-answer")
def _(_corpus: Corpus) -> Iterator[bytes]:
    area = struct.pack(">IHIHH", 0x01400001, 0x0B, 0x20060006, 0, 2600)
    name = b"\0\x0b" + hashlib.sha256(area).digest()
    said = struct.pack(">H", len(area)) + area + struct.pack(">H", len(name)) + name
    in_session = struct.pack(">I", len(said)) + said + b"\0\0\1\0\0"
    for tag, code, body in ((0x8001, 0, said), (0x8002, 0, in_session), (0x8001, 0x18B, b"")):
        yield struct.pack(">HII", tag, 10 + len(body), code) + body


@seeds("tpm-pcrs")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield json.dumps({"sha256": {str(n): "00" * 32 for n in range(24)}}).encode()
    yield from corpus.files("attestation/*/tpm-pcrs.json")


# ---- tokens and documents -------------------------------------------------------------------


@seeds("nitro")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.nitro.document()
    yield corpus.nitro.document(tagged=True, user_data=b"user", nonce=b"nonce-12", public_key=b"k")
    yield from corpus.files("attestation/*/attestation-doc.cbor")


@seeds("nitro-payload")
def _(corpus: Corpus) -> Iterator[bytes]:
    for data in corpus.get("nitro"):
        try:
            NitroDocument.from_bytes(data)
        except EnclaveError:
            continue
        yield Sign1.from_bytes(data).payload


@seeds("cca")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.cca.token()
    yield corpus.cca.token(tag=907, **corpus.cca.newest())
    yield from corpus.files("attestation/arm-cca-*/token.cbor")


@seeds("cca-platform")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield from (CcaToken.from_bytes(data).platform.payload for data in corpus.get("cca"))


@seeds("cca-realm")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield from (CcaToken.from_bytes(data).realm.payload for data in corpus.get("cca"))


@seeds("cose-key")
def _(corpus: Corpus) -> Iterator[bytes]:
    for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()):
        yield write_key(corpus.cca.key_of("seed", curve).public_key())
    yield cbor.dumps({1: 1, -1: 6, -2: bytes(32), 3: -8, 4: [2]})


@seeds("gpu-report")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.nvidia.report()
    yield from corpus.files("attestation/nvidia-*/report.bin")


@seeds("decoded-token")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield b'{"alg": "RS256"}\n\n{"iss": "https://x.attest.azure.net", "x-ms-ver": "1.0"}\n'
    yield b'{"iss": "https://x.attest.azure.net", "a": {"b": 1.5}}'
    yield from corpus.files("attestation/*/decoded-token.json.txt")


@seeds("cbor")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield cbor.dumps({1: [b"x", "text", -7, None, True, {"a": cbor.Tag(18, [])}]})
    yield from (bytes.fromhex("9f0102ff"), bytes.fromhex("fb3ff0000000000000"))
    yield from corpus.files("attestation/*/*.cbor")
    yield from corpus.get("nitro-payload")


def _claims() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    times = {"iat": 1782864000, "nbf": 1782864000, "exp": 1782950400, "jti": "1"}
    yield (
        {"alg": "RS256", "kid": "1", "jku": "https://x.attest.azure.net/certs"},
        {
            **times,
            "iss": "https://x.attest.azure.net",
            "x-ms-attestation-type": "sgx",
            "x-ms-sgx-mrenclave": "00" * 32,
            "x-ms-sgx-is-debuggable": False,
            "x-ms-runtime": {"keys": [], "client-payload": {"nonce": "bm9uY2U"}},
        },
    )
    yield (
        {"alg": "RS256", "kid": "2"},
        {
            **times,
            "iss": "https://confidentialcomputing.googleapis.com",
            "aud": "x",
            "eat_nonce": ["0123456789"],
            "hwmodel": "GCP_AMD_SEV",
            "swname": "CONFIDENTIAL_SPACE",
            "dbgstat": "disabled-since-boot",
            "submods": {"container": {"image_digest": "sha256:" + "00" * 32}},
        },
    )
    yield (
        {"alg": "ES256", "x5c": ["MIIB"]},
        {
            **times,
            "eat_profile": "tag:github.com,2023:veraison/ear",
            "ear.verifier-id": {"build": "1", "developer": "x"},
            "submods": {
                "a": {"ear.status": "affirming", "ear.trustworthiness-vector": {"hardware": 2}}
            },
        },
    )


def token(header: bytes, claims: bytes, signature: bytes = bytes(64)) -> bytes:
    return b".".join(jose.b64url_encode(part).encode() for part in (header, claims, signature))


@seeds("token-parts")
def _(corpus: Corpus) -> Iterator[bytes]:
    """Header and claims as JSON, a NUL between them."""
    for header, claims in _claims():
        yield json.dumps(header).encode() + b"\0" + json.dumps(claims).encode()
    for text in corpus.files("attestation/*/token.jwt"):
        try:
            read = jose.Jws.from_bytes(text.strip())
        except EnclaveError:
            continue
        yield json.dumps(dict(read.header)).encode() + b"\0" + read.payload


@seeds("jwt")
def _(corpus: Corpus) -> Iterator[bytes]:
    for header, claims in _claims():
        yield token(json.dumps(header).encode(), json.dumps(claims).encode())
    yield from corpus.files("attestation/*/token.jwt")


@seeds("release")
def _(_corpus: Corpus) -> Iterator[bytes]:
    """What a vault signs when it releases a key."""
    kid = "https://v.vault.azure.net/keys/data/0123456789abcdef0123456789abcdef"
    inner = jose.b64url_encode(b'{"schema_version":"1.0","header":{},"ciphertext":"AAAA"}')
    key = {"kid": kid, "kty": "RSA-HSM", "key_ops": ["unwrapKey"], "n": "AQAB", "e": "AQAB"}
    for nonce in ({"nonce": "n"}, {}):
        request = {"api-version": "7.4", "enc": "RSA_AES_KEY_WRAP_256", "kid": kid, **nonce}
        bundle = {"key": {**key, "key_hsm": inner}, "attributes": {"exp": 1, "enabled": True}}
        yield json.dumps({"request": request, "response": {"key": bundle}}).encode()


@seeds("http-answer")
def _(_corpus: Corpus) -> Iterator[bytes]:
    """Key sets as attestation services show them."""
    head = b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
    yield head + b"Content-Length: 11\r\n\r\n" + b'{"keys":[]}'
    yield head + b'Transfer-Encoding: chunked\r\n\r\n4\r\n{"ke\r\n7\r\nys":[]}\r\n0\r\n\r\n'
    yield head + b'Connection: close\r\n\r\n{"keys":[]}'


@seeds("release-terms")
def _(_corpus: Corpus) -> Iterator[bytes]:
    url = "https://attest.example"
    roots = Anchor(url=url, kind="roots", digests=(bytes(32), b"\1" * 32))
    system = Anchor(url=f"{url}:8443/tenant", kind="system")
    yield from (roots.to_bytes(), system.to_bytes(), ReleaseTerms().to_bytes())
    terms = ReleaseTerms(authorities=(roots, system), loopback=(bytes(32),), strict=True, skew=300)
    yield terms.to_bytes()
    yield ReleaseTerms(authorities=(system,), sha1=True).to_bytes()


@seeds("outcome")
def _(_corpus: Corpus) -> Iterator[bytes]:
    token = JudgedToken(
        issuer="https://attest.example",
        digest="ab" * 32,
        payload_digest="cd" * 32,
        signed_digest="ef" * 32,
        token_id="0123",
        expires=1_800_000_000,
    )
    failed = Step("policy.claims", False, ["a equals 1"], {"a": 2})
    yield Outcome(held=("key.enabled",), failed=failed, token=token).to_bytes()
    transfer = JudgedTransfer(digest="00" * 32, kid="k", place="x-ms-runtime.keys")
    yield Outcome(policy_hash="ab", claims={"a": 1}, token=token, transfer=transfer).to_bytes()


@seeds("vault-key")
def _(_corpus: Corpus) -> Iterator[bytes]:
    """Private keys as they are brought to a vault."""
    yield json.dumps({"kty": "oct", "k": "A" * 43}).encode()
    key = ec.derive_private_key(7, ec.SECP256R1())
    scalar = key.private_numbers().private_value.to_bytes(32, "big")
    public = jwk.public_members(key.public_key())
    yield json.dumps({**public, "d": jose.b64url_encode(scalar)}).encode()
    small = {"kty": "RSA", **dict.fromkeys(("n", "e", "d", "p", "q"), "AQAB")}
    yield json.dumps(small).encode()


@seeds("key-context")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield KeyContext(name="a-1", version="0" * 32, kty="oct").to_bytes()
    yield KeyContext(
        name="data",
        version="0123456789abcdef" * 2,
        kty="RSA-HSM",
        exportable=True,
        policy_hash=bytes(range(32)),
        immutable=True,
    ).to_bytes()


@seeds("jwks")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield json.dumps({"keys": [corpus.azure_snp.jwk()]}).encode()
    curve = {"kty": "EC", "crv": "P-256", "x": "A" * 43, "y": "A" * 43, "kid": "1", "use": "sig"}
    yield json.dumps({"keys": [curve, {"kty": "RSA", "kid": "2", "x5c": ["MIIB"]}]}).encode()
    yield from corpus.files("attestation/*/certs.json", "attestation/*/jwks.json")


@seeds("json")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield b'{"a":[1,-2.5e3,"\\u00e9\\ud83d\\ude00",true,null,{}],"b":{"c":"d"}}'
    yield from corpus.files("attestation/*/*.json", "measurement/*/event_log.json")
