"""The real platform's quotes and records, judged by the verifier of a relying party."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import UTC, datetime

import pytest

from pyenclave._platform.keys import Keys, attributes, cpu_svn
from pyenclave._platform.quote import Quoter
from pyenclave._platform.root import PLATFORM_SVN, PlatformRoot
from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.errors import EvidenceFormatError, SealingError, UnsealError
from pyenclave.formats.evidence import Evidence, bound_report_data
from pyenclave.formats.record import ProtectionBit, ProtectionRecord
from pyenclave.formats.sgx import KeyRequest, ReportBody
from pyenclave.sealed import SealPolicy, blob
from pyenclave.sealed.provision import RuntimeKey

AT = datetime(2026, 7, 1, tzinfo=UTC)
NONCE = bytes(range(32))


def platform_root(seed: bytes = b"one", level: str = "embedded") -> PlatformRoot:
    secret = bytearray(hashlib.sha256(seed).digest())
    return PlatformRoot(secret, level=level, ephemeral=False)


def signed_record(root: PlatformRoot, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "level": root.level,
        "tee": "none",
        "platform_svn": PLATFORM_SVN,
        "ephemeral": False,
        "debug": False,
        "jit": False,
        "enclave_id": "ab" * 16,
        "bits": {"seccomp": ProtectionBit(value=True, by="outside")},
    } | changes
    unsigned = ProtectionRecord(**fields)  # type: ignore[arg-type]
    signature = root.sign(unsigned.signed_bytes())
    return ProtectionRecord(**fields, signature=signature).to_bytes()  # type: ignore[arg-type]


def body_of(record: bytes = b"", *, debug: bool = False, **changes: object) -> ReportBody:
    fields: dict[str, object] = {
        "cpu_svn": cpu_svn(),
        "attributes": attributes(debug=debug),
        "mrenclave": b"\x11" * 32,
        "mrsigner": b"\x22" * 32,
        "config_id": hashlib.sha256(record).digest() + bytes(32),
        "isv_prod_id": 7,
        "isv_svn": 3,
    }
    return ReportBody(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made() -> tuple[bytes, PlatformRoot]:
    root = platform_root()
    record, key = signed_record(root), RuntimeKey().public
    data = bound_report_data(nonce=NONCE, runtime_key=key, user_data=b"")
    quote = Quoter(root).quote(body_of(record), data)
    evidence = Evidence(quote=quote, record=record, runtime_key=key, user_data=b"", nonce=NONCE)
    return evidence.to_bytes(), root


def judge(evidence: bytes, root: PlatformRoot, **options: object):
    values: dict[str, object] = {
        "policy": AppraisalPolicy.permissive(),
        "nonce": NONCE,
        "roots": [root.chain.root],
        "at": AT,
    }
    return appraise(evidence, **(values | options))  # type: ignore[arg-type]


def test_the_platforms_evidence_is_accepted(made):
    evidence, root = made
    policy = AppraisalPolicy(mrenclave=b"\x11" * 32, dangerous_allow_software=True)
    result = judge(evidence, root, policy=policy)
    assert result.accepted
    assert result.identified
    assert result.fresh
    assert result.refused_by == ()


def test_one_flipped_bit_of_every_byte_of_it_is_refused(made):
    evidence, root = made
    survivors = []
    for position in range(len(evidence)):
        changed = bytearray(evidence)
        changed[position] ^= 0x80 >> position % 8
        try:
            if judge(bytes(changed), root).accepted:
                survivors.append(position)
        except EvidenceFormatError:
            continue
    assert survivors == []


def test_another_platforms_root_is_no_root(made):
    evidence, _ = made
    assert judge(evidence, platform_root(b"two")).refused_by == ("chain.root",)
    assert judge(evidence, platform_root(level="service")).refused_by == ("chain.root",)


def test_a_record_of_another_launch_is_refused(made):
    evidence, root = made
    parts = Evidence.from_bytes(evidence)
    other = signed_record(root, enclave_id="cd" * 16)
    swapped = Evidence(
        quote=parts.quote,
        record=other,
        runtime_key=parts.runtime_key,
        user_data=b"",
        nonce=NONCE,
    )
    assert judge(swapped.to_bytes(), root).refused_by == ("record.binding",)


def test_a_host_that_puts_in_its_own_runtime_key_is_refused(made):
    evidence, root = made
    parts = Evidence.from_bytes(evidence)
    swapped = Evidence(
        quote=parts.quote,
        record=parts.record,
        runtime_key=RuntimeKey().public,
        user_data=b"",
        nonce=NONCE,
    )
    assert judge(swapped.to_bytes(), root).refused_by == ("report_data.binding",)


# ---- data sealing under the platform's own key derivation -------------------------------------


def sealing(body: ReportBody, root: PlatformRoot) -> dict[str, object]:
    keys = Keys(root)
    return {
        "identity": blob.SealingIdentity(
            mrenclave=body.mrenclave,
            mrsigner=body.mrsigner,
            product_id=body.isv_prod_id,
            security_version=body.isv_svn,
            cpu_svn=body.cpu_svn,
            debug=body.attributes.debug,
        ),
        "key_provider": lambda request: keys.get_key(KeyRequest.from_bytes(request), body),
    }


SECRET = secrets.token_bytes(32)


@pytest.mark.parametrize("policy", SealPolicy)
def test_blobs_open_under_the_platforms_keys(policy):
    root, body = platform_root(), body_of()
    sealed = blob.seal(b"data", policy=policy, secret=SECRET, **sealing(body, root))
    assert blob.open_blob(sealed, **sealing(body, root)).data == b"data"
    newer = body_of(isv_svn=9)
    assert blob.open_blob(sealed, **sealing(newer, root)).data == b"data"


@pytest.mark.parametrize(
    ("policy", "body"),
    [
        (SealPolicy.unique, body_of(mrenclave=b"\x33" * 32)),
        (SealPolicy.signer, body_of(mrsigner=b"\x33" * 32)),
        (SealPolicy.signer, body_of(isv_prod_id=8)),
        (SealPolicy.signer, body_of(isv_svn=2)),
        (SealPolicy.signer, body_of(debug=True)),
        (SealPolicy.dangerous_any_enclave, body_of(debug=True)),
    ],
)
def test_the_platforms_keys_refuse_without_the_headers_help(policy, body, monkeypatch):
    """The comparison of the header only explains; it is switched off here."""
    root = platform_root()
    sealed = blob.seal(b"data", policy=policy, secret=SECRET, **sealing(body_of(), root))
    monkeypatch.setattr(blob, "_check_identity", lambda header, who: policy)
    with pytest.raises(UnsealError):
        blob.open_blob(sealed, **sealing(body, root))


def test_levels_and_roots_never_share_sealed_data():
    root = platform_root()
    sealed = blob.seal(b"x", policy=SealPolicy.signer, secret=SECRET, **sealing(body_of(), root))
    for other in (platform_root(b"two"), platform_root(level="service")):
        with pytest.raises(UnsealError, match="not authentic"):
            blob.open_blob(sealed, **sealing(body_of(), other))


def test_sea_02_the_platform_refuses_the_signers_key_of_an_unsigned_image():
    unsigned = body_of(mrsigner=bytes(32))
    header = blob.fmt.split(
        blob.seal(
            b"", policy=SealPolicy.signer, secret=SECRET, **sealing(body_of(), platform_root())
        )
    )[0]
    with pytest.raises(SealingError, match="MRSIGNER"):
        Keys(platform_root()).get_key(KeyRequest.from_bytes(header.key_request()), unsigned)


def test_sea_07_keys_differ_by_every_part_of_the_request_and_the_identity():
    keys = Keys(platform_root())
    base = blob.fmt.split(
        blob.seal(
            b"", policy=SealPolicy.signer, secret=SECRET, **sealing(body_of(), platform_root())
        )
    )[0].key_request()
    seen = {keys.get_key(KeyRequest.from_bytes(base), body_of())}
    for offset in (2, 4, 24, 32, 40, 71, 72):  # policy, ISVSVN, masks, KEYID, MISCMASK
        changed = bytearray(base)
        changed[offset] ^= 1
        seen.add(keys.get_key(KeyRequest.from_bytes(bytes(changed)), body_of()))
    for body in (body_of(mrsigner=b"\x33" * 32), body_of(isv_prod_id=8), body_of(debug=True)):
        seen.add(keys.get_key(KeyRequest.from_bytes(base), body))
    assert len(seen) == 11
    assert not any(hmac.compare_digest(key, bytes(32)) for key in seen)
