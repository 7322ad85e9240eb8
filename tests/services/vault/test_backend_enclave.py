"""The enclave that keeps a vault's keys, for real: built, signed, launched, killed."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attest_parts import (
    AUTHORITY,
    POLICY_BYTES,
    POLICY_HASH,
    asked,
    authorities,
    opened,
    terms,
    transfer_key,
)
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from pyenclave.errors import ConfigurationError, ServiceError
from pyenclave.formats import jose, jwa
from pyenclave.formats.image import Image
from pyenclave.formats.key_context import KeyContext
from pyenclave.image.closure import ALLOWED
from pyenclave.services.vault.backends import _image, open_backend
from pyenclave.services.vault.backends.base import KeyBackend, KeyMaterial, KeySpec, Verdict
from pyenclave.services.vault.backends.enclave import EnclaveBackend
from pyenclave.services.vault.release.relay import hand_in_keys

PLAIN = KeyContext(name="k", version="0" * 32, kty="RSA")
HSM = KeyContext(
    name="released", version="1" * 32, kty="RSA-HSM", exportable=True, policy_hash=POLICY_HASH
)


class Vault:
    """A backend on an event loop of its own, called from ordinary tests."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.backend = EnclaveBackend(state, terms=terms())
        self.runner = asyncio.Runner()

    def run(self, work: Any) -> Any:
        """Wait for *work*."""
        return self.runner.run(work)

    def decide(self, wrapped: bytes, context: KeyContext, **changes: Any) -> Verdict:
        """Ask for a release, with the keys of the attestation service where they are needed."""
        request, bound = asked(**changes), context.to_bytes()

        async def work() -> Verdict:
            verdict = await self.backend.decide_release(wrapped, bound, request, final=False)
            if verdict.needed:
                known = authorities()._held[AUTHORITY].authority
                await hand_in_keys(self.backend, known, verdict.needed)
                verdict = await self.backend.decide_release(wrapped, bound, request, final=True)
            return verdict

        verdict: Verdict = self.run(work())
        return verdict

    def enclave(self) -> Any:
        """Return the running enclave."""
        (life,) = self.backend._lives.values()
        assert life.now is not None
        return life.now[0]

    def close(self) -> None:
        """End it."""
        self.run(self.backend.close())
        self.runner.close()


@pytest.fixture(scope="module")
def vault(enclave_state: Path) -> Iterator[Vault]:
    """One backend for all tests of the file."""
    vault = Vault(enclave_state)
    yield vault
    vault.close()


@pytest.fixture(scope="module")
def key(vault: Vault) -> KeyMaterial:
    """An exportable RSA key."""
    made: KeyMaterial = vault.run(vault.backend.generate(KeySpec(kty="RSA-HSM"), HSM.to_bytes()))
    return made


def refused(vault: Vault, work: Any, status: int, code: str, text: str) -> None:
    """*work* must fail so."""
    with pytest.raises(ServiceError, match=text) as caught:
        vault.run(work)
    assert (caught.value.status, caught.value.error_code) == (status, code)


# ---- what must not open ------------------------------------------------------------------------


def test_every_changed_byte_of_a_wrapped_key_is_refused(vault: Vault, key: KeyMaterial) -> None:
    """Head, salt, commitment, ciphertext and tag; cut off, and longer."""
    context = HSM.to_bytes()
    size = len(key.wrapped)
    places = [*range(0, 96, 5), 96, size // 2, size - 17, size - 1]
    others = [
        key.wrapped[:at] + bytes([key.wrapped[at] ^ 1]) + key.wrapped[at + 1 :] for at in places
    ]
    others += [key.wrapped[:-1], key.wrapped + b"\0", key.wrapped[:88], b"", bytes(20_000)]
    for other in others:
        with pytest.raises(ServiceError) as caught:
            vault.run(vault.backend.perform(other, context, "sign", "RS256", {"value": bytes(32)}))
        assert (caught.value.status, caught.value.error_code) in (
            (500, "InternalError"),
            (500, "UnknownKek"),
        )


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"version": "2" * 32},
        {"kty": "RSA"},
        {"kty": "oct-HSM"},
        {"policy_hash": hashlib.sha256(b"another").digest()},
        {"exportable": False, "policy_hash": None},
        {"immutable": True},
    ],
    ids=str,
)
def test_a_key_opens_under_its_own_context_only(
    vault: Vault, key: KeyMaterial, change: dict[str, Any]
) -> None:
    """A row that was changed in the database has no private half any more (SKR-08)."""
    other = dataclasses.replace(HSM, **change).to_bytes()
    do = vault.backend
    for work in (
        do.perform(key.wrapped, other, "sign", "RS256", {"value": bytes(32)}),
        do.rebind(key.wrapped, other, other),
    ):
        refused(vault, work, 500, "InternalError", "does not belong to its record")


def test_only_exportable_hsm_keys_are_released(vault: Vault) -> None:
    """The enclave reads that in the context, whatever the vault says."""
    software = dataclasses.replace(HSM, kty="RSA")
    closed = dataclasses.replace(HSM, exportable=False, policy_hash=None)
    for context, failed in ((PLAIN, "exportable"), (software, "kty"), (closed, "exportable")):
        spec = KeySpec(kty=context.kty)
        made = vault.run(vault.backend.generate(spec, context.to_bytes()))
        verdict = vault.decide(made.wrapped, context)
        assert verdict.outcome is not None
        assert verdict.outcome.failed is not None
        assert verdict.outcome.failed.name == f"key.{failed}"
        assert not verdict.ciphertext


@pytest.mark.parametrize("context", [b"", b"PYEKCTX\x01", HSM.to_bytes() + b"\0", bytes(5000)])
def test_a_context_that_is_none_is_refused(vault: Vault, context: bytes) -> None:
    """Nothing is wrapped for it."""
    refused(
        vault,
        vault.backend.generate(KeySpec(kty="RSA-HSM"), context),
        400,
        "BadParameter",
        "key context",
    )


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        ({}, {"name": "other"}, 400),
        ({}, {"version": "2" * 32}, 400),
        ({}, {"kty": "RSA"}, 400),
        ({}, {"exportable": False, "policy_hash": None}, 400),
        ({"exportable": False, "policy_hash": None}, {}, 400),
        ({"immutable": True}, {"policy_hash": bytes(32), "immutable": True}, 403),
        ({"immutable": True}, {"immutable": False}, 403),
    ],
    ids=str,
)
def test_a_key_is_not_rebound_to_what_no_update_may_do(
    vault: Vault, before: dict[str, Any], after: dict[str, Any], status: int
) -> None:
    """An immutable policy stays; a key never becomes exportable (SKR-08)."""
    old = dataclasses.replace(HSM, kty="oct-HSM", **before)
    new = dataclasses.replace(HSM, **{"kty": "oct-HSM", **after})
    made = vault.run(vault.backend.generate(KeySpec(kty="oct-HSM"), old.to_bytes()))
    with pytest.raises(ServiceError) as caught:
        vault.run(vault.backend.rebind(made.wrapped, old.to_bytes(), new.to_bytes()))
    assert caught.value.status == status


@pytest.mark.parametrize(
    "spec",
    [
        KeySpec(kty="RSA-HSM", size=1024),
        KeySpec(kty="RSA-HSM", size=2049),
        KeySpec(kty="RSA-HSM", crv="P-256"),
        KeySpec(kty="OKP"),
        KeySpec(kty=""),
        KeySpec(kty="oct-HSM"),  # not the context's kind
    ],
    ids=str,
)
def test_keys_that_are_too_small_or_of_no_kind_are_not_made(vault: Vault, spec: KeySpec) -> None:
    """Sizes and curves are a short list."""
    refused(vault, vault.backend.generate(spec, HSM.to_bytes()), 400, "BadParameter", ".")


def _jwk(key: rsa.RSAPrivateKey) -> dict[str, str]:
    numbers = key.private_numbers()
    named = {
        "n": numbers.public_numbers.n,
        "e": numbers.public_numbers.e,
        "d": numbers.d,
        "p": numbers.p,
        "q": numbers.q,
        "dp": numbers.dmp1,
        "dq": numbers.dmq1,
        "qi": numbers.iqmp,
    }
    texts = {
        name: jose.b64url_encode(number.to_bytes((number.bit_length() + 7) // 8, "big"))
        for name, number in named.items()
    }
    return {"kty": "RSA-HSM", **texts}


def test_an_imported_key_must_be_whole_and_consistent(vault: Vault) -> None:
    """Each member changed, missing or another kind of thing."""
    whole = _jwk(transfer_key())
    context = HSM.to_bytes()
    bad: list[dict[str, Any]] = [{**whole, name: None} for name in ("n", "e", "d", "p", "q")]
    bad += [{**whole, name: whole["e"]} for name in ("n", "d", "p", "q", "dp", "dq", "qi")]
    bad += [{**whole, "d": whole["d"] + "="}, {**whole, "kty": "EC"}, {**whole, "n": 5}]
    for jwk in bad:
        with pytest.raises(ServiceError) as caught:
            vault.run(vault.backend.import_key(jwk, context))
        assert (caught.value.status, caught.value.error_code) == (400, "BadParameter"), jwk


# ---- what opens --------------------------------------------------------------------------------


def _released(
    vault: Vault, made: KeyMaterial, context: KeyContext, policy: bytes = POLICY_BYTES
) -> bytes:
    verdict = vault.decide(made.wrapped, context, policy=policy)
    assert verdict.outcome is not None
    assert verdict.outcome.failed is None, verdict.outcome.failed
    return opened(verdict.ciphertext)


def test_a_released_rsa_key_is_the_one_that_signed(vault: Vault, key: KeyMaterial) -> None:
    """PKCS #8 whose public half is the key's own."""
    private = serialization.load_der_private_key(_released(vault, key, HSM), None)
    assert isinstance(private, rsa.RSAPrivateKey)
    numbers = private.public_key().public_numbers()
    assert jose.b64url_decode(key.public["n"]) == numbers.n.to_bytes(256, "big")
    digest = hashlib.sha256(b"text").digest()
    signed = vault.run(
        vault.backend.perform(key.wrapped, HSM.to_bytes(), "sign", "PS256", {"value": digest})
    )
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    private.public_key().verify(signed["value"], b"text", scheme, hashes.SHA256())


@pytest.mark.parametrize("crv", sorted(jwa.CURVES))
def test_a_released_ec_key_is_the_one_that_signed(vault: Vault, crv: str) -> None:
    """On every curve."""
    context = dataclasses.replace(HSM, kty="EC-HSM")
    made = vault.run(vault.backend.generate(KeySpec(kty="EC-HSM", crv=crv), context.to_bytes()))
    private = serialization.load_der_private_key(_released(vault, made, context), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    point = private.public_key().public_numbers()
    size = (private.curve.key_size + 7) // 8
    assert made.public["x"] == jose.b64url_encode(point.x.to_bytes(size, "big"))
    assert made.public["crv"] == crv
    name = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "P-256K": "ES256K"}[crv]
    bits = {"ES384": "384", "ES512": "512"}.get(name, "256")
    digest = hashlib.new(f"sha{bits}", b"text").digest()
    raw = vault.run(
        vault.backend.perform(made.wrapped, context.to_bytes(), "sign", name, {"value": digest})
    )["value"]
    r, s = int.from_bytes(raw[:size], "big"), int.from_bytes(raw[size:], "big")
    der = utils.encode_dss_signature(r, s)
    hashed: Any = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}[bits]
    private.public_key().verify(der, b"text", ec.ECDSA(hashed))


def test_imported_keys_are_released_as_they_came(vault: Vault) -> None:
    """RSA, EC and shared keys; with and without the parts that follow from others."""
    rsa_jwk = _jwk(transfer_key())
    short = {name: rsa_jwk[name] for name in ("kty", "n", "e", "d", "p", "q")}
    point = ec.generate_private_key(ec.SECP256R1())
    numbers = point.private_numbers()
    ec_jwk = {
        "kty": "EC",
        "crv": "P-256",
        "d": jose.b64url_encode(numbers.private_value.to_bytes(32, "big")),
    }
    for name in ("x", "y"):
        ec_jwk[name] = jose.b64url_encode(getattr(numbers.public_numbers, name).to_bytes(32, "big"))
    oct_jwk = {"kty": "oct", "k": jose.b64url_encode(bytes(range(32)))}
    form = (
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    wanted = {
        "RSA-HSM": (short, transfer_key().private_bytes(*form)),
        "EC-HSM": (ec_jwk, point.private_bytes(*form)),
        "oct-HSM": (oct_jwk, bytes(range(32))),
    }
    for kty, (jwk, material) in wanted.items():
        context = dataclasses.replace(HSM, kty=kty)
        made = vault.run(vault.backend.import_key(jwk, context.to_bytes()))
        assert material not in made.wrapped
        assert _released(vault, made, context) == material


def test_a_rebound_key_opens_under_the_new_context_only(vault: Vault) -> None:
    """A policy is replaced, and made immutable."""
    old, policy = dataclasses.replace(HSM, kty="oct-HSM"), POLICY_BYTES + b" "
    other = hashlib.sha256(policy).digest()
    new = dataclasses.replace(old, policy_hash=other, immutable=True)
    made = vault.run(vault.backend.generate(KeySpec(kty="oct-HSM"), old.to_bytes()))
    wrapped = vault.run(vault.backend.rebind(made.wrapped, old.to_bytes(), new.to_bytes()))
    moved = KeyMaterial(public={}, wrapped=wrapped)
    assert _released(vault, moved, new, policy) == _released(vault, made, old)
    with pytest.raises(ServiceError):
        _released(vault, moved, old)
    with pytest.raises(ServiceError):
        _released(vault, made, new, policy)


def test_random_bytes_come_from_inside(vault: Vault) -> None:
    """Up to 128, as Managed HSM gives."""
    assert len(vault.run(vault.backend.random(128))) == 128
    for count in (0, -1, 129):
        refused(vault, vault.backend.random(count), 400, "BadParameter", "from 1 to 128")


# ---- its life ----------------------------------------------------------------------------------


def test_keys_outlive_rotation_of_their_key_encryption_key(vault: Vault, key: KeyMaterial) -> None:
    """What was wrapped before opens, and is moved by `rewrap`."""
    before = _released(vault, key, HSM)
    kek = vault.run(vault.backend.rotate_kek())
    assert key.wrapped[8:24] != kek
    assert _released(vault, key, HSM) == before
    moved = vault.run(vault.backend.rewrap(key.wrapped, HSM.to_bytes()))
    assert moved[8:24] == kek
    assert vault.run(vault.backend.rewrap(moved, HSM.to_bytes())) is None
    assert _released(vault, KeyMaterial(public={}, wrapped=moved), HSM) == before


def test_a_key_encryption_key_wraps_nothing_before_it_is_kept(vault: Vault) -> None:
    """Else a process that ends between the two would leave keys that nothing opens."""
    spec, context = KeySpec(kty="oct-HSM"), dataclasses.replace(HSM, kty="oct-HSM").to_bytes()
    before = vault.run(vault.backend.keks())
    made, blob = vault.run(vault.enclave().call("kek_new"))
    assert made not in before
    wrapped = vault.run(vault.backend.generate(spec, context)).wrapped
    assert wrapped[8:24] == before[-1]
    assert vault.run(vault.backend.keks()) == before  # what was not kept is forgotten
    assert blob


def test_two_instances_of_one_state_directory_open_each_others_keys(
    vault: Vault, key: KeyMaterial
) -> None:
    """Also those that were wrapped with a key-encryption key made meanwhile."""
    other = Vault(vault.state)
    try:
        material = _released(vault, key, HSM)
        assert _released(other, key, HSM) == material
        other.run(other.backend.rotate_kek())
        moved = KeyMaterial(
            public={}, wrapped=other.run(other.backend.rewrap(key.wrapped, HSM.to_bytes()))
        )
        assert _released(vault, moved, HSM) == material
    finally:
        other.close()


@pytest.mark.parametrize("whose", ["worker", pytest.param("platform", marks=pytest.mark.long)])
def test_a_lost_worker_or_platform_is_replaced(vault: Vault, key: KeyMaterial, whose: str) -> None:
    """Who waits gets a 503 and may ask again; keys are as they were."""
    material = _released(vault, key, HSM)
    pid = vault.enclave().info.pid if whose == "worker" else _platform(vault.enclave().info.pid)

    async def slow() -> list[Any]:
        spec = KeySpec(kty="RSA-HSM", size=4096)
        making = [
            asyncio.ensure_future(vault.backend.generate(spec, HSM.to_bytes())) for _ in range(3)
        ]
        await vault.backend.random(1)
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*making, return_exceptions=True)

    results = vault.run(slow())
    lost = [error for error in results if isinstance(error, BaseException)]
    assert lost
    for error in lost:
        assert isinstance(error, ServiceError), error
        assert (error.status, error.error_code) == (503, "ServiceUnavailable")
        assert error.retry_after
    for _ in range(3):  # the loss of a platform is noticed by its workers a moment later
        try:
            assert _released(vault, key, HSM) == material
            break
        except ServiceError as error:
            assert error.status == 503  # noqa: PT017 - any number of them, none is also fine
    else:
        pytest.fail("the backend did not come back")


def test_making_a_large_key_keeps_nobody_else_waiting(vault: Vault) -> None:
    """It takes some hundred milliseconds; other calls come back meanwhile."""

    async def work() -> int:
        spec = KeySpec(kty="RSA-HSM", size=3072)
        making = asyncio.ensure_future(vault.backend.generate(spec, HSM.to_bytes()))
        answered = 0
        while not making.done():
            await vault.backend.random(16)
            answered += 1
            await asyncio.sleep(0)
        await making
        return answered

    # One, of which nobody knows whether it waited, would be there in any case.
    assert sum(vault.run(work()) for _ in range(3)) > 9


def _platform(worker: int) -> int:
    """Return the process that made the worker's zygote: the nearest ancestor that is a platform."""
    pid = worker
    while pid > 1:
        if b"pyenclave._platform" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
        status = Path(f"/proc/{pid}/stat").read_text()
        pid = int(status.rpartition(")")[2].split()[1])
    pytest.fail("the worker has no platform")


def test_what_the_host_keeps_is_its_own_and_holds_no_key(vault: Vault, key: KeyMaterial) -> None:
    """Files of mode 0600; no private half in any of them (SKR-12)."""
    private = _released(vault, key, HSM)
    names = {path.name for path in vault.state.iterdir()}
    assert {"vault.enclave", "vault-keks.json", "vault-signing-key.pem"} <= names
    for path in vault.state.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        if path.is_file():
            assert private[-64:] not in path.read_bytes()


def test_a_damaged_file_of_key_encryption_keys_is_never_replaced(vault: Vault) -> None:
    """A new one in its place would lose every key of the vault in silence."""
    place = vault.state / _image.KEKS
    good = place.read_bytes()
    document = json.loads(good)
    document["keks"][0]["sealed"] = "A" + document["keks"][0]["sealed"][1:]
    for bad in (b'{"version":1,"keks":[]}', json.dumps(document).encode()):
        place.write_bytes(bad)
        other = Vault(vault.state)
        try:
            with pytest.raises(ServiceError) as caught:
                other.run(other.backend.random(1))
            assert caught.value.status == 500
            assert place.read_bytes() == bad
        finally:
            place.write_bytes(good)
            other.close()


def test_the_trusted_base_of_the_vaults_enclave_is_short(vault: Vault) -> None:
    """Of our own modules only those that may run inside; no SQL, no HTTP."""
    image = Image.parse((vault.state / "vault.enclave").read_bytes())
    lock = json.loads(bytes(image.files["lock"])) if "lock" in image.files else None
    names = {module.name for module in image.lock.modules} if lock is None else set()
    own = {name.split(".")[1] for name in names if name.startswith("pyenclave.")}
    assert own <= set(ALLOWED)
    assert "cryptography" in names
    # TLS ends inside (keys of attestation services), but nothing in there speaks to the network.
    assert not names & {"sqlalchemy", "starlette", "uvicorn", "http", "urllib.request", "asyncio"}
    assert {"ssl", "encodings.idna"} <= names
    assert image.info.debug is False


def test_the_backend_is_what_the_vault_asks_for(vault: Vault) -> None:
    """By its protocol, and by its name in the configuration."""
    assert isinstance(vault.backend, KeyBackend)
    assert isinstance(open_backend("enclave", vault.state), EnclaveBackend)
    make: Callable[[], Any]
    for text in ("", "Enclave", "enclave:x", "memory", "file:/tmp/key"):
        make = lambda text=text: open_backend(text, vault.state)  # noqa: E731
        with pytest.raises(ConfigurationError, match="no such key backend"):
            make()
