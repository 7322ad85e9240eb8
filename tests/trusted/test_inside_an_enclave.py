"""`pyenclave.trusted` in real enclaves on a real platform."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyenclave._platform.client import local_platform_root
from pyenclave.attestation import AppraisalPolicy, appraise, verify
from pyenclave.errors import EcallError
from pyenclave.host import Enclave
from pyenclave.image import build, keys, sign
from pyenclave.image.manifest import Manifest

ENTRY = """
from pyenclave import trusted


@trusted.ecall
def take(ciphertext: bytes, info: bytes) -> int:
    return len(trusted.receive(ciphertext, info=info))


@trusted.ecall
def save(data: bytes, policy: str) -> bytes:
    return trusted.seal(data, policy=trusted.SealPolicy[policy])


@trusted.ecall
def load(blob: bytes) -> bytes:
    return trusted.unseal(blob)


@trusted.ecall
def new_counter() -> bytes:
    return trusted.Counter.create().counter_id


@trusted.ecall
def save_newest(data: bytes, counter: bytes) -> bytes:
    return trusted.seal(data, counter=trusted.Counter(counter))


@trusted.ecall
def save_pending(data: bytes, counter: bytes) -> bytes:
    return trusted.seal(data, counter=trusted.Counter(counter), advance=False)


@trusted.ecall
def commit(blob: bytes, counter: bytes) -> int:
    return trusted.Counter(counter).increment(blob=blob)


@trusted.ecall
def target() -> bytes:
    return trusted.target_info()


@trusted.ecall
def report_for(target: bytes, data: bytes) -> bytes:
    return trusted.report(target, data)


@trusted.ecall
def reporter(report: bytes) -> bytes:
    body = trusted.verify_report(report)
    return body.mrenclave + body.report_data


@trusted.ecall
def raw(data: bytes) -> bytes:
    return trusted.attest(data)


@trusted.ecall
def publish(data: bytes) -> bytes:
    trusted.set_user_data(data)
    return trusted.identity().mrenclave
"""
NONCE = bytes(range(32))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two versions of one signer, and the first one of another signer."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "entry_of_test.py").write_text(ENTRY)
    key, other = keys.keygen(), keys.keygen()
    made: dict[str, bytes] = {}
    for version in (1, 2):
        manifest = Manifest(
            name="test",
            entry=Path(folder / "entry_of_test.py"),
            product_id=9,
            security_version=version,
        )
        image = build.build_manifest(manifest)
        made[f"v{version}"] = sign.sign(image, key)
        if version == 1:
            made["other"] = sign.sign(image, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(folder / "state"))
        yield made


@pytest.fixture(scope="module")
def enclaves(images):
    with (
        Enclave(images["v1"]) as first,
        Enclave(images["v2"]) as second,
        Enclave(images["other"]) as other,
    ):
        yield {"v1": first, "v2": second, "other": other}


def refused_with(kind: str, call, *arguments) -> None:
    with pytest.raises(EcallError) as caught:
        call(*arguments)
    assert caught.value.type == kind


def test_a_secret_opens_in_the_attested_launch_only(images, enclaves):
    policy = AppraisalPolicy.from_image(images["v1"], dangerous_allow_software=True)
    evidence = enclaves["v1"].attest(nonce=NONCE).to_bytes()
    result = verify(evidence, policy=policy, nonce=NONCE, roots=[local_platform_root()])
    secret = result.encrypt(b"twelve bytes", info=b"model 7")
    assert enclaves["v1"].take(secret, b"model 7") == 12
    refused_with("UnsealError", enclaves["v1"].take, secret, b"model 8")
    refused_with("UnsealError", enclaves["v2"].take, secret, b"model 7")
    with Enclave(images["v1"]) as again:  # the same image, another launch
        refused_with("UnsealError", again.take, secret, b"model 7")


def test_evidence_of_another_image_or_an_old_nonce_is_refused(images, enclaves):
    policy = AppraisalPolicy.from_image(images["v1"], dangerous_allow_software=True)
    roots = [local_platform_root()]
    other = enclaves["other"].attest(nonce=NONCE).to_bytes()
    assert appraise(other, policy=policy, nonce=NONCE, roots=roots).refused_by == ("code.mrsigner",)
    old = enclaves["v1"].attest(nonce=NONCE).to_bytes()
    assert appraise(old, policy=policy, nonce=bytes(32), roots=roots).refused_by == ("nonce",)


def test_user_data_is_set_by_measured_code_and_bound(images, enclaves):
    enclaves["v2"].publish(b"version of the model: 7")
    policy = AppraisalPolicy.from_image(images["v2"], dangerous_allow_software=True)
    evidence = enclaves["v2"].attest(nonce=NONCE).to_bytes()
    options = {"policy": policy, "nonce": NONCE, "roots": [local_platform_root()]}
    assert appraise(evidence, user_data=b"version of the model: 7", **options).accepted
    wrong = appraise(evidence, user_data=b"version of the model: 8", **options)
    assert wrong.refused_by == ("user_data",)


def test_raw_report_data_reaches_the_quote(images, enclaves):
    policy = AppraisalPolicy.from_image(images["v1"], dangerous_allow_software=True)
    result = appraise(
        enclaves["v1"].raw(bytes(range(64))),
        policy=policy,
        freshness="not_checked",
        report_data=bytes(range(64)),
        roots=[local_platform_root()],
    )
    assert result.accepted
    assert result.claims["report_data"] == bytes(range(64)).hex()


@pytest.mark.parametrize(
    ("policy", "sealer", "opener", "error"),
    [
        ("signer", "v1", "v2", None),
        ("signer", "v2", "v1", "UnsealError"),  # SEA-01: older code never opens newer data
        ("signer", "v1", "other", "UnsealError"),
        ("unique", "v1", "v1", None),
        ("unique", "v1", "v2", "UnsealError"),
        ("dangerous_any_enclave", "v1", "other", None),
    ],
)
def test_sea_01_sea_02_who_opens_what(enclaves, policy, sealer, opener, error):
    blob = enclaves[sealer].save(b"data", policy)
    if error is None:
        assert enclaves[opener].load(blob) == b"data"
    else:
        refused_with(error, enclaves[opener].load, blob)


def test_sea_11_old_data_of_a_counter_is_refused_also_after_a_restart(images, enclaves):
    counter = enclaves["v1"].new_counter()
    old = enclaves["v1"].save_newest(b"100", counter)
    new = enclaves["v1"].save_newest(b"0", counter)
    refused_with("RollbackError", enclaves["v1"].load, old)
    with Enclave(images["v1"]) as again:
        assert again.load(new) == b"0"
        refused_with("RollbackError", again.load, old)


@pytest.mark.parametrize("opened", [False, True])
def test_sea_11_two_blobs_pending_at_once_are_never_both_the_newest_for_a_platform(
    images, enclaves, opened
):
    v1 = enclaves["v1"]
    counter = v1.new_counter()
    newest = v1.save_newest(b"B0", counter)
    first = v1.save_pending(b"B1", counter)
    with Enclave(images["v1"]) as again:  # the first writer died
        assert again.load(newest) == b"B0"
        second = again.save_pending(b"B2", counter)
        assert again.load(second) == b"B2" if opened else again.commit(second, counter) == 2
        assert again.load(second) == b"B2"
    for enclave in (v1, enclaves["v2"]):
        refused_with("RollbackError", enclave.load, first)
        refused_with("RollbackError", enclave.load, newest)
        assert enclave.load(second) == b"B2"
    refused_with("RollbackError", v1.commit, first, counter)
    assert v1.commit(second, counter) == 2  # again, as after a lost answer


def test_one_enclave_verifies_the_report_of_another(enclaves):
    v1, v2 = enclaves["v1"], enclaves["v2"]
    report = v1.report_for(v2.target(), b"hello")
    assert v2.reporter(report) == v1.info.mrenclave + b"hello" + bytes(59)
    refused = [report[:-1] + bytes([report[-1] ^ 1]), report[:64] + bytes(32) + report[96:]]
    for forged in refused:
        with pytest.raises(EcallError):
            v2.reporter(forged)
    with pytest.raises(EcallError):
        enclaves["other"].reporter(report)  # made for another enclave
