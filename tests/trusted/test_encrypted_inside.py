"""Encrypted parts in real enclaves: nothing of them is there before the key is, all of it after."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import pyenclave
from pyenclave.attestation import AppraisalPolicy
from pyenclave.errors import EcallError, NotInEnclaveError
from pyenclave.host import Enclave
from pyenclave.image import build, keys, sign
from pyenclave.sealed.envelope_keys import SharedKey

KEY = bytes(range(32))
KID = "https://vault.example/keys/algo/" + "1" * 32
ENTRY = """
import pyenclave
from cryptography.hazmat.primitives import keywrap
from pyenclave import trusted


class Released:
    # As trusted.release_key gives it: a key of type oct, or one that unwraps.
    def __init__(self, key: bytes) -> None:
        self.key = key
        self.kid = "https://vault.example/keys/algo/" + "1" * 32

    def unwrap(self, wrapped: bytes, algorithm: str) -> bytes:
        assert algorithm == "A256KW"
        return keywrap.aes_key_unwrap(self.key, wrapped)


@trusted.ecall
def provision(ciphertext: bytes) -> None:
    trusted.unlock(trusted.receive(ciphertext))


@trusted.ecall
def unlock(key: bytes) -> None:
    trusted.unlock(key)


@trusted.ecall
def released(key: bytes) -> None:
    trusted.unlock(Released(key))


@trusted.ecall
def wrapped(key: bytes, wrapped: bytes) -> None:
    trusted.unlock(Released(key), wrapped=wrapped)


@trusted.ecall
def by_itself() -> None:
    trusted.unlock()


@trusted.ecall
def score(x: int) -> int:
    import algo

    return algo.score(x)


@trusted.ecall
def where() -> list[str]:
    import algo

    return [algo.__file__, algo.__name__, str(algo.__spec__.has_location), algo.score.__module__]


@trusted.ecall
def model() -> bytes:
    return __loader__.get_data("/enclave/files/model.bin")


@trusted.ecall
def clear() -> bytes:
    return __loader__.get_data("/enclave/files/clear.bin")


@trusted.ecall
def fails() -> None:
    import algo

    algo.fails()


@trusted.ecall
def memory_has(planted: list[bytes]) -> list[bool]:
    import gc

    gc.collect()
    found = [False] * len(planted)
    image = trusted._state.parts._files
    whole = b"".join(bytes(data) for data in image.values())
    return [item in whole for item in planted]


@trusted.ecall
def unlisted() -> None:
    import this_is_nowhere
"""
ALGO = """
import helper
from fractions import Fraction

THRESHOLD = 731


def score(x):
    return helper.double(x) + int(Fraction(THRESHOLD))


def fails():
    raise ValueError("planted text of the algorithm")
"""
MANIFEST = """
[enclave]
name = "hidden"
entry = "hidden_entry.py"
product_id = 7
security_version = 3
debug = true
threads = 2

[files]
"model.bin" = "model.bin"
"clear.bin" = "clear.bin"

[encrypted]
code = ["algo.py", "helper.py"]
files = ["model.bin"]
"""
MODEL = os.urandom(300_000)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    folder: Path = tmp_path_factory.mktemp("hidden")
    (folder / "hidden_entry.py").write_text(ENTRY)
    (folder / "algo.py").write_text(ALGO)
    (folder / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "model.bin").write_bytes(MODEL)
    (folder / "clear.bin").write_bytes(b"clear")
    (folder / "enclave.toml").write_text(MANIFEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(folder / "state"))
        yield sign.sign(build.build(folder, data_key=KEY), keys.keygen())


@pytest.fixture(scope="module")
def enclaves(image: bytes) -> Iterator[SimpleNamespace]:
    """One that stays locked, and one that is opened."""
    with Enclave(image) as locked, Enclave(image) as opened:
        opened.unlock(KEY)
        yield SimpleNamespace(locked=locked, opened=opened)


def refused(kind: str, call, *arguments: object) -> EcallError:
    with pytest.raises(EcallError) as caught:
        call(*arguments)
    assert caught.value.type == kind, caught.value
    return caught.value


def test_nothing_opens_before_the_key_is_there(enclaves: SimpleNamespace) -> None:
    locked = enclaves.locked
    refused("EnclaveStateError", locked.score, 1)
    refused("EnclaveStateError", locked.model)
    refused("EnclaveStateError", locked.by_itself)
    assert locked.clear() == b"clear"
    assert locked.memory_has([b"THRESHOLD", MODEL[:64], b"clear"]) == [False, False, True]


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(32), bytes(33), KEY[::-1]])
def test_another_key_opens_nothing(enclaves: SimpleNamespace, key: bytes) -> None:
    locked = enclaves.locked
    refused("UnsealError", locked.unlock, key)
    refused("UnsealError", locked.released, key)
    refused("EnclaveStateError", locked.score, 1)
    refused("EnclaveStateError", locked.model)


def test_with_the_key_code_runs_and_data_is_read(enclaves: SimpleNamespace) -> None:
    opened = enclaves.opened
    assert opened.score(2) == 735
    assert opened.model() == MODEL
    assert opened.clear() == b"clear"
    assert opened.where() == ["/enclave/code/algo.py", "algo", "True", "algo"]
    opened.unlock(KEY)  # again, it changes nothing
    opened.by_itself()
    refused("UnsealError", opened.unlock, bytes(32))
    assert opened.score(3) == 737
    # The finder of encrypted modules lets no other names through.
    refused("UnlistedImportError", opened.unlisted)


def test_the_text_of_an_error_in_encrypted_code_does_not_cross(enclaves: SimpleNamespace) -> None:
    assert "planted" not in str(refused("ValueError", enclaves.opened.fails))


@pytest.mark.long
def test_in_debug_it_crosses_and_the_key_is_needed_all_the_same(image: bytes) -> None:
    with Enclave(image, debug=True) as debug:
        refused("EnclaveStateError", debug.fails)
        debug.unlock(KEY)
        assert "planted" in str(refused("ValueError", debug.fails))


def test_a_key_that_was_provisioned_or_released_opens(image: bytes) -> None:
    """Sent to this very launch by a relying party; released as oct; wrapped for a released key."""
    policy = AppraisalPolicy.from_image(image, dangerous_allow_software=True)
    nonce = os.urandom(32)
    with Enclave(image) as enclave:
        evidence = enclave.attest(nonce=nonce).to_bytes()
        result = pyenclave.verify(
            evidence, policy=policy, nonce=nonce, roots=[pyenclave.local_platform_root()]
        )
        enclave.provision(result.encrypt(KEY))
        assert enclave.score(1) == 733
    vault_key = SharedKey(KID, bytes(32))
    place = io.BytesIO()
    with pyenclave.open_sealed(place, "wb", key=vault_key) as file:
        file.write(KEY)
    other = io.BytesIO()
    with pyenclave.open_sealed(other, "wb", key=SharedKey(KID, bytes(32))) as file:
        file.write(bytes(32))
    with Enclave(image) as enclave:
        changed = bytearray(place.getvalue())
        changed[100] ^= 1
        for bad in (bytes(changed), place.getvalue()[:9000], other.getvalue(), bytes(2 << 20), b""):
            refused("UnsealError", enclave.wrapped, bytes(32), bad)
        refused("EnclaveStateError", enclave.score, 1)
        enclave.wrapped(bytes(32), place.getvalue())
        assert enclave.score(1) == 733
    with Enclave(image) as enclave:
        enclave.released(KEY)
        assert enclave.model() == MODEL


def test_outside_there_is_nothing_to_unlock() -> None:
    from pyenclave import trusted

    with pytest.raises(NotInEnclaveError):
        trusted.unlock(KEY)
