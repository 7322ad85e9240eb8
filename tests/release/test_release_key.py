"""`trusted.release_key` in this process: what an enclave asks for, keeps and does."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from https_double import Reply
from released_inside import refused
from vault_double import Signer, Vault, coded, decoded

import pyenclave
from pyenclave.calls import services
from pyenclave.errors import (
    ArgumentError,
    EnclaveClosedError,
    KeyReleaseError,
    NotInEnclaveError,
    UnsealError,
)
from pyenclave.trusted import _release, _state
from pyenclave.trusted._release import release_key

# -- what comes -------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", list(_release.release.ALGORITHMS))
@pytest.mark.parametrize("name", ["rsa", "ec", "oct"])
def test_a_key_comes_whole(
    name: str, algorithm: str, inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace
) -> None:
    key = release_key(None, name, algorithm=algorithm)
    expected = getattr(secrets, name)
    if name == "oct":
        assert key.key == expected
    else:
        assert key.key.private_numbers() == expected.private_numbers()
    assert (key.kty, key.name) == ({"rsa": "RSA", "ec": "EC", "oct": "oct"}[name], name)
    assert key.kid == f"{vault.url}/keys/{name}/{vault.keys[name][0][0]}"
    assert key.version == vault.keys[name][0][0]
    assert key.key_ops == ("unwrapKey",)


def test_the_report_data_is_the_digest_of_what_names_the_transfer_key(
    inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace
) -> None:
    seen: list[tuple[bytes, bytes]] = []
    vault.judge = lambda evidence, runtime: seen.append((evidence, runtime))
    release_key(None, "rsa")
    [(evidence, runtime)] = seen
    assert inside.runtime.report_data == [hashlib.sha256(runtime).digest() + bytes(32)]
    assert evidence == b"evidence over " + inside.runtime.report_data[0]
    said = json.loads(runtime)
    assert runtime == json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    [key] = said["keys"]
    numbers = secrets.transfer.public_key().public_numbers()
    assert key["key_ops"] == ["encrypt"]
    assert int.from_bytes(decoded(key["n"]), "big") == numbers.n
    assert int.from_bytes(decoded(key["e"]), "big") == 65537
    assert len(decoded(said["nonce"])) == 32
    assert inside.made == [3072]


@pytest.mark.parametrize("kind", ["elliptic", "good"])
def test_signers_with_rsa_and_with_elliptic_keys_are_read(
    kind: str, inside: SimpleNamespace, vault: Vault, signers: SimpleNamespace
) -> None:
    vault.signer = getattr(signers, kind)
    assert release_key(None, "oct").kty == "oct"


def test_the_root_need_not_be_in_the_answer(inside: SimpleNamespace, vault: Vault) -> None:
    vault.signer = Signer(vault.signer.key, vault.signer.chain[:-1])
    assert release_key(None, "oct").kty == "oct"


def test_evidence_of_other_kinds_is_the_codes_own(inside: SimpleNamespace, vault: Vault) -> None:
    seen: list[bytes] = []
    vault.judge = lambda evidence, _: seen.append(evidence)
    release_key(None, "oct", kind="SgxEnclave", evidence=lambda data: b"quote" + data)
    assert seen[0].startswith(b"quote")
    assert inside.host.asked[0][3] == "/attest/SgxEnclave"
    with pytest.raises(ValueError, match="needs a function"):
        release_key(None, "oct", kind="TdxVm")


# -- keeping, renewing, rotating --------------------------------------------------------------


def test_a_key_is_kept_and_a_token_serves_several_keys(
    inside: SimpleNamespace, vault: Vault
) -> None:
    first = release_key(None, "rsa")
    assert release_key(None, "rsa") is first
    release_key(None, "ec")
    assert (vault.attested, vault.released) == (1, 2)
    assert release_key(None, "rsa", max_age=0) is not first
    assert (vault.attested, vault.released) == (1, 3)


def test_another_version_comes_when_it_is_asked_for(
    inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace
) -> None:
    old = release_key(None, "rsa")
    version = vault.put("rsa", secrets.other)
    assert release_key(None, "rsa") is old
    new = release_key(None, "rsa", refresh=True)
    assert new.version == version
    assert new.key.private_numbers() == secrets.other.private_numbers()
    assert release_key(None, "rsa") is new
    again = release_key(None, "rsa", version=old.version)
    assert again.key.private_numbers() == secrets.rsa.private_numbers()
    assert not old.closed  # who has it may go on


def test_a_key_that_was_closed_or_expired_is_asked_for_again(
    inside: SimpleNamespace, vault: Vault
) -> None:
    first = release_key(None, "oct")
    first.close()
    second = release_key(None, "oct")
    assert second is not first
    second.expires = int(time.time()) - 1
    assert release_key(None, "oct") is not second


def test_a_token_that_ends_is_renewed_with_a_transfer_key_of_its_own(
    inside: SimpleNamespace, vault: Vault
) -> None:
    vault.token_lifetime = 30  # less than what is left of one that is used again
    release_key(None, "rsa")
    release_key(None, "ec")
    assert vault.attested == 2
    assert len(inside.made) == 2


def test_a_token_that_the_vault_refuses_is_renewed_once(
    inside: SimpleNamespace, vault: Vault
) -> None:
    release_key(None, "rsa")
    vault.token_key = ec.generate_private_key(ec.SECP256R1())  # its signer is another one now
    assert release_key(None, "ec").kty == "EC"
    assert vault.attested == 2
    vault.override = lambda asked: (
        Reply({"error": {"code": "Forbidden"}}, status=403) if "release" in asked.path else None
    )
    assert refused("oct").check == "release.refused"
    assert vault.attested == 3


def test_threads_that_ask_at_once_share_one_answer(
    inside: SimpleNamespace, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    begun = threading.Barrier(4)

    def run() -> None:
        _state._links.value = inside.host
        begun.wait(20)
        found.append(release_key(None, "rsa", refresh=True))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len({id(one) for one in found}) == 1
    assert vault.released == 1


def test_who_waits_for_another_threads_answer_waits_no_longer_than_asked(
    inside: SimpleNamespace, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, free = threading.Event(), threading.Event()
    real = inside.host.handlers[services.NAME]

    def hang(*args: Any) -> Any:
        held.set()
        free.wait(20)
        return real(*args)

    inside.host.handlers[services.NAME] = hang

    def run() -> None:
        _state._links.value = inside.host
        release_key(None, "rsa")

    thread = threading.Thread(target=run)
    thread.start()
    assert held.wait(20)
    error = refused("rsa", timeout=0.1)
    assert (error.check, error.transient) == ("deadline", True)
    # Nor does a host that lets one call wait for ever keep the key from all others.
    inside.host.handlers[services.NAME] = real
    monkeypatch.setattr(_release, "_PATIENCE", 0.05)
    begin = time.monotonic()
    assert release_key(None, "rsa", timeout=30).kty == "RSA"
    assert time.monotonic() - begin < 15
    assert thread.is_alive()
    free.set()
    thread.join(20)
    assert release_key(None, "rsa", timeout=0.1).kty == "RSA"


def test_closing_the_enclave_wipes_what_was_released(inside: SimpleNamespace) -> None:
    key = release_key(None, "oct")
    inside.runtime.released.close()
    assert key.closed
    with pytest.raises(EnclaveClosedError):
        key.key  # noqa: B018
    assert "closed" in repr(key)


# -- services that refuse, hang or say nonsense -----------------------------------------------


def test_a_refusal_carries_words_and_reference(inside: SimpleNamespace, vault: Vault) -> None:
    vault.token_lifetime = -1000
    error = refused()
    assert error.check == "release.refused"
    assert (error.status, error.error_code, error.inner) == (403, "Forbidden", "ForbiddenByPolicy")
    assert error.reference == "audit-7"
    assert not error.transient
    assert error.public_fields()["reference"] == "audit-7"


def test_an_attestation_that_is_refused_is_named(inside: SimpleNamespace, vault: Vault) -> None:
    body = {"error": {"code": "PolicyEvaluationError", "message": "debug\x07 launch"}}
    vault.override = lambda asked: Reply(body, status=400) if "attest" in asked.path else None
    error = refused()
    assert (error.check, error.status) == ("attest.refused", 400)
    assert "debug· launch" in str(error)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_asked_again(status: int, inside: SimpleNamespace, vault: Vault) -> None:
    left = [status, status]
    vault.override = lambda asked: (
        Reply(status=left.pop()) if left and "authorization" in asked.headers else None
    )
    assert release_key(None, "rsa").kty == "RSA"
    vault.override = lambda asked: Reply(status=status) if "attest" in asked.path else None
    error = refused("rsa", refresh=True, nonce="n")
    assert (error.check, error.status, error.transient) == ("attest.refused", status, True)


def test_a_service_that_hangs_ends_at_the_deadline(inside: SimpleNamespace, vault: Vault) -> None:
    vault.override = lambda asked: Reply(silent=True)
    begin = time.monotonic()
    error = refused(timeout=0.3)
    assert error.check in ("service.silent", "deadline")
    assert error.transient
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "answer",
    [
        (200, b""),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"token": 5}'),
        (200, b'{"token": "x"}'),
        (200, b'{"token": "a.b.c"}'),
        (200, b'{"token": "", "token": ""}'),
        (200, b"\xff"),
        (200, b"[" * 10_000),
        (200, b'{"token": "' + b"A" * 300_000 + b'"}'),
    ],
)
def test_an_answer_without_a_token_is_refused(answer: Any, inside: SimpleNamespace) -> None:
    inside.host.handlers[services.NAME] = lambda *args: answer
    assert refused().check == "attest.token"


@pytest.mark.parametrize("answer", [(-1, b""), (0, b"\xff"), (999, b"{}"), (1 << 40, b"[]")])
def test_a_status_that_is_none_is_a_refusal(answer: Any, inside: SimpleNamespace) -> None:
    inside.host.handlers[services.NAME] = lambda *args: answer
    assert refused().check in ("attest.refused", "service.silent")


def test_an_answer_that_is_too_long_is_refused(inside: SimpleNamespace) -> None:
    inside.host.handlers[services.NAME] = lambda *args: (200, b" " * (services.MAX_BODY + 1))
    assert refused().check == "relay.size"


def test_a_token_of_another_issuer_or_nonce_is_refused(
    inside: SimpleNamespace, vault: Vault
) -> None:
    vault.change_token = lambda claims: claims.update(iss="https://evil.example")
    error = refused()
    assert (error.check, error.expected) == ("token.issuer", vault.url)
    vault.change_token = lambda claims: claims.update(nonce="old")
    assert refused("rsa", nonce="new").check == "token.nonce"
    vault.change_token = lambda claims: claims.pop("iss") and None
    assert refused().check == "token.issuer"
    vault.change_token = lambda claims: None
    assert release_key(None, "rsa", nonce="new").kty == "RSA"
    assert release_key(None, "rsa", issuer=vault.url + "/").kty == "RSA"


def test_a_nonce_is_bound_by_the_evidence(inside: SimpleNamespace, vault: Vault) -> None:
    """The relying party's, or one that the service gives and takes back once."""
    seen: list[dict[str, Any]] = []
    vault.judge = lambda _, runtime: seen.append(json.loads(runtime))
    release_key(None, "rsa", nonce="of a relying party")
    release_key(None, "ec", server_nonce=True)
    assert [one["nonce"] for one in seen] == ["of a relying party", "nonce-of-the-service-1"]
    for body in ({}, {"nonce": 5}, {"nonce": ""}, {"nonce": "x" * 2000}):
        vault.override = lambda asked, body=body: Reply(body) if asked.path == "/nonces" else None  # type: ignore[misc]
        assert refused("rsa", refresh=True, transfer_bits=2048, server_nonce=True).check == (
            "attest.token"
        )
    vault.override = lambda asked: Reply(status=404) if asked.path == "/nonces" else None
    error = refused("rsa", transfer_bits=2048, server_nonce=True)
    assert (error.check, error.status) == ("attest.refused", 404)
    with pytest.raises(ValueError, match="either a nonce"):
        release_key(None, "rsa", nonce="a", server_nonce=True)


@pytest.mark.parametrize("exp", [None, "soon", True])
def test_a_token_without_an_end_is_used_once(
    exp: object, inside: SimpleNamespace, vault: Vault
) -> None:
    vault.change_token = lambda claims: claims.update(exp=exp)
    vault.override = lambda asked: (
        Reply({"error": {"code": "Busy"}}, status=409) if "release" in asked.path else None
    )
    before = vault.attested
    refused()
    refused()
    assert vault.attested == before + 2


def test_what_evidence_takes_counts_as_well(inside: SimpleNamespace, vault: Vault) -> None:
    def slow(data: bytes) -> bytes:
        time.sleep(0.05)
        return data

    error = refused("rsa", evidence=slow, timeout=0.02)
    assert (error.check, error.transient) == ("deadline", True)
    assert vault.attested == 0


# -- arguments, and where it works ------------------------------------------------------------


def test_outside_an_enclave_there_is_no_release() -> None:
    with pytest.raises(NotInEnclaveError):
        release_key("https://v.example", "a")


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "RSA1_5"},
        {"transfer_bits": 1024},
        {"kind": "PyEnclave/../x"},
        {"version": "../a"},
        {"api_version": "7.4&x=y"},
        {"attestation_api_version": "a/b"},
        {"ca": "nonsense"},
        {"ca": ""},
        {"attestation": "http://127.0.0.1"},
        {"at": dt.datetime(2030, 1, 1)},
    ],
)
def test_arguments_that_are_not_usable_are_refused(
    options: dict[str, Any], inside: SimpleNamespace
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        release_key(None, "rsa", **options)
    for name in ("", "a/b", "../certs", "x" * 128, "a?b"):
        with pytest.raises(ValueError, match=r"name|expected"):
            release_key(None, name)
    assert inside.host.asked == []


def test_what_the_manifest_does_not_say_must_be_given(inside: SimpleNamespace) -> None:
    inside.runtime.release = {}
    with pytest.raises(ValueError, match=r"\[release\] vault"):
        release_key(None, "rsa")


def test_the_host_cannot_send_the_enclave_to_another_vault(
    inside: SimpleNamespace, vault: Vault
) -> None:
    error = refused("rsa", attestation="https://127.0.0.1:1")
    assert error.check == "relay.refused"
    with pytest.raises(KeyReleaseError) as caught:
        release_key("https://127.0.0.1:1", "rsa")
    assert caught.value.check == "relay.refused"


def test_no_secret_crosses_to_the_host(
    inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace
) -> None:
    """SKR-12: what the relay sees has neither the transfer key nor the released one."""
    key = release_key(None, "oct")
    seen = repr(inside.host.asked).encode()
    assert secrets.oct not in seen
    assert coded(secrets.oct).encode() not in seen
    private = secrets.transfer.private_numbers()
    for number in (private.p, private.q, private.d):
        raw = number.to_bytes((number.bit_length() + 7) // 8, "big")
        assert raw not in seen
        assert coded(raw).encode() not in seen
    assert secrets.oct.decode() not in repr(key)


# -- what a released key does -----------------------------------------------------------------


def test_a_released_rsa_key_opens_what_its_public_half_wrapped(
    inside: SimpleNamespace, secrets: SimpleNamespace
) -> None:
    key = release_key(None, "rsa")
    for name, digest in (("RSA-OAEP", hashes.SHA1()), ("RSA-OAEP-256", hashes.SHA256())):
        scheme = padding.OAEP(padding.MGF1(digest), digest, None)
        wrapped = secrets.rsa.public_key().encrypt(b"data key", scheme)
        assert key.unwrap(wrapped, name) == b"data key"
        with pytest.raises(UnsealError):
            key.unwrap(wrapped[:-1] + bytes([wrapped[-1] ^ 1]), name)
    for name in ("RSA1_5", "A256KW", "", "RSA-OAEP-512"):
        with pytest.raises(ArgumentError, match="RSA-OAEP-256"):
            key.unwrap(wrapped, name)


def test_a_released_oct_key_opens_what_it_wrapped(
    inside: SimpleNamespace, secrets: SimpleNamespace
) -> None:
    key = release_key(None, "oct")
    wrapped = aes_key_wrap(secrets.oct, b"d" * 32)
    assert key.unwrap(wrapped, "A256KW") == b"d" * 32
    for bad in (b"", b"x", wrapped[:-1], wrapped[:-8], bytes(40)):
        with pytest.raises(UnsealError):
            key.unwrap(bad, "A256KW")
    with pytest.raises(ArgumentError, match="A256KW"):
        key.unwrap(wrapped, "A128KW")


@pytest.mark.parametrize("name", ["rsa", "oct"])
def test_files_of_before_a_rotation_open_with_the_newest_key(
    name: str, inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace, tmp_path: Path
) -> None:
    old = release_key(None, name)
    with pyenclave.open_sealed(tmp_path / "old", "wb", key=old) as file:
        file.write(b"of before")
    vault.put(name, secrets.other if name == "rsa" else b"n" * 32)
    new = release_key(None, name, refresh=True)
    assert new.version != old.version
    with pyenclave.open_sealed(tmp_path / "new", "wb", key=new) as file:
        file.write(b"of now")
    for which, said in (("old", b"of before"), ("new", b"of now")):
        with pyenclave.open_sealed(tmp_path / which, key=new) as file:
            assert file.read() == said
    asked = [args[3] for args in inside.host.asked if args[0] == "vault"]
    assert asked[-1] == f"/keys/{name}/{old.version}/release"
    # A file never chooses another key, and what no vault has is not released.
    assert new.for_kid(f"{vault.url}/keys/ec/{vault.keys['ec'][0][0]}") is new
    assert new.for_kid("nonsense") is new
    assert new.for_kid(f"{vault.url}/keys/{name}") is new
    with pytest.raises(KeyReleaseError):
        new.for_kid(f"{vault.url}/keys/{name}/{'0' * 32}")


def test_an_elliptic_key_wraps_nothing_and_none_is_pickled(inside: SimpleNamespace) -> None:
    import pickle

    key = release_key(None, "ec")
    with pytest.raises(ArgumentError, match="nothing"):
        key.unwrap(b"", "RSA-OAEP")
    with pytest.raises(ArgumentError, match="nothing"):
        key.wrap(b"d" * 32)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(key)
    with key:
        pass
    with pytest.raises(EnclaveClosedError):
        key.unwrap(b"", "RSA-OAEP")
