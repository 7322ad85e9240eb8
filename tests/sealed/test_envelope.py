"""Sealed files under a data key that a key of a vault wraps: hostile files first."""

from __future__ import annotations

import io
import os
import pickle
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa

import pyenclave
from pyenclave.errors import (
    ArgumentError,
    EvidenceFormatError,
    FileBusyError,
    SealingError,
    UnsealError,
)
from pyenclave.formats import jwk, wrapped
from pyenclave.formats.key_envelope import KeyEnvelope
from pyenclave.formats.wrapped import HEAD_SIZE, PLACE_SIZE, Envelope
from pyenclave.sealed import envelope
from pyenclave.sealed.envelope_keys import (
    PrivateKey,
    PublicKey,
    SharedKey,
    VaultWrappingKey,
    public_of,
)

V1, V2 = "1" * 32, "2" * 32
KID = f"https://vault.example/keys/model/{V1}"
DATA = b"planted secret of the owner " * 700


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def shared() -> SharedKey:
    return SharedKey(KID, bytes(range(32)))


def make(key: Any, data: bytes = DATA, **options: Any) -> bytes:
    place = io.BytesIO()
    with pyenclave.open_sealed(place, "wb", key=key, **options) as file:
        file.write(data)
    return place.getvalue()


def read(data: bytes, key: Any, **options: Any) -> bytes:
    with pyenclave.open_sealed(io.BytesIO(data), key=key, **options) as file:
        return file.read()


# ---- hostile files -------------------------------------------------------------------------------


def _with(data: bytes, blob: bytes, generation: int = 2) -> bytes:
    """The file with another envelope, whose unkeyed digest is right."""
    place = Envelope(generation, blob)
    head = bytearray(HEAD_SIZE)
    head[place.offset : place.offset + PLACE_SIZE] = place.to_bytes()
    return bytes(head) + data[HEAD_SIZE:]


def test_every_changed_bit_of_an_envelope_is_refused(shared: SharedKey):
    """With the digest made anew, as an attacker makes it: the MAC is what finds it."""
    data = make(shared, b"short")
    blob = wrapped.newest(data[:HEAD_SIZE]).blob
    for at in range(len(blob)):
        for bit in range(8):
            changed = bytearray(blob)
            changed[at] ^= 1 << bit
            with pytest.raises(UnsealError):
                read(_with(data, bytes(changed)), shared)
    assert read(_with(data, blob), shared) == b"short"


def test_an_envelope_of_another_generation_is_refused(shared: SharedKey):
    data = make(shared)
    blob = wrapped.newest(data[:HEAD_SIZE]).blob
    for generation in (1, 3, 4, (1 << 63) - 1):
        with pytest.raises(UnsealError, match="not authentic"):
            read(_with(data, blob, generation), shared)


def test_a_swapped_envelope_is_refused(shared: SharedKey):
    one, two = make(shared, b"one"), make(shared, b"two")
    with pytest.raises(UnsealError):
        read(one[:HEAD_SIZE] + two[HEAD_SIZE:], shared)


def test_a_file_of_the_same_data_key_under_another_ones_envelope_is_refused(shared: SharedKey):
    together = envelope.Together(shared)
    one, two = make(together, b"one"), make(together, b"two")
    wrappings = [wrapped.newest(data[:HEAD_SIZE]).key_envelope.wrapped for data in (one, two)]
    assert wrappings[0] == wrappings[1]
    with pytest.raises(UnsealError, match="another sealed file"):
        read(one[:HEAD_SIZE] + two[HEAD_SIZE:], shared)
    assert (read(one, shared), read(two, shared)) == (b"one", b"two")


def test_a_higher_envelope_that_was_planted_is_refused_and_not_passed_over(shared: SharedKey):
    """An attacker's own data key, wrapped for the same key: it is not the file's."""
    data, own = make(shared), make(shared, b"attacker's")
    place = wrapped.newest(own[:HEAD_SIZE])
    both = bytearray(data)
    planted = Envelope(3, place.blob)
    both[planted.offset : planted.offset + PLACE_SIZE] = planted.to_bytes()
    with pytest.raises(UnsealError):
        read(bytes(both), shared)


def test_a_cut_file_is_refused(shared: SharedKey):
    data = make(shared)
    for size in (0, 7, 4096, HEAD_SIZE - 1, HEAD_SIZE, HEAD_SIZE + 4095, len(data) - 4096):
        with pytest.raises(UnsealError):
            read(data[:size], shared)


def test_another_key_another_name_and_another_kind_of_file_are_refused(shared: SharedKey):
    data = make(shared, name=b"a")
    assert read(data, shared, name=b"a") == DATA
    with pytest.raises(UnsealError):
        read(data, shared)
    with pytest.raises(UnsealError, match="does not unwrap"):
        read(data, SharedKey(KID, bytes(32)), name=b"a")
    with pytest.raises(UnsealError, match="another key"):
        read(data, SharedKey(KID.replace(V1, V2), bytes(range(32))), name=b"a")
    golden = Path(__file__).parent.parent / "golden" / "signer.sealed"
    sealed_to_enclave = Envelope(2, golden.read_bytes()).to_bytes() + bytes(PLACE_SIZE)
    with pytest.raises(UnsealError, match="sealed to an enclave"):
        read(sealed_to_enclave, shared)
    plain = io.BytesIO()
    with pyenclave.open_sealed(plain, "wb", key=bytes(32)) as file:
        file.write(DATA)
    with pytest.raises(UnsealError):
        read(plain.getvalue(), shared)
    with pytest.raises(UnsealError):
        read(data, bytes(32), name=b"a")


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_data_key_of_another_size_is_refused(shared: SharedKey, size: int):
    class Odd:
        def unwrap(self, wrapped: bytes, algorithm: str) -> bytes:
            return bytes(size)

    with pytest.raises(UnsealError, match="no data key"):
        read(make(shared), Odd())


def test_a_wrapping_that_fits_no_envelope_makes_no_file():
    class Odd:
        def __init__(self, **values: Any) -> None:
            self.values = {"kid": KID, "algorithm": "A256KW", "wrapped": bytes(40)} | values

        def wrap(self, data_key: bytes) -> envelope.Wrapping:
            return envelope.Wrapping(**self.values)

    for values in ({"kid": "a\nb"}, {"algorithm": "RSA1_5"}, {"wrapped": b""}):
        place = io.BytesIO()
        with pytest.raises(SealingError):
            pyenclave.open_sealed(place, "wb", key=Odd(**values))
        assert place.getvalue() == b""


# ---- what it is for ------------------------------------------------------------------------------


def test_the_public_half_encrypts_and_the_private_one_opens(
    rsa_key: rsa.RSAPrivateKey, tmp_path: Path
):
    public = PublicKey(KID, rsa_key.public_key())
    path = tmp_path / "model.sealed"
    with pyenclave.open_sealed(path, "wb", key=public) as file:
        file.write(DATA)
        file.commit()
        file.write(DATA)
    data = path.read_bytes()
    assert b"planted secret" not in data
    found = wrapped.newest(data[:HEAD_SIZE]).key_envelope
    assert (found.kid, found.algorithm, len(found.wrapped)) == (KID, "RSA-OAEP-256", 256)
    with pytest.raises(UnsealError, match="no private half"):
        pyenclave.open_sealed(path, key=public)
    with pyenclave.open_sealed(path, key=PrivateKey(KID, rsa_key)) as file:
        assert file.read() == DATA * 2
        assert file.pread(7, len(DATA)) == DATA[:7]
    with pyenclave.open_sealed(path, "r+b", key=PrivateKey(KID, rsa_key)) as file:
        file.seek(3)
        file.write(b"changed")
    with pyenclave.open_sealed(path, "ab", key=PrivateKey(KID, rsa_key)) as file:
        file.write(b"end")
    with pyenclave.open_sealed(path, "r", key=PrivateKey(KID, rsa_key), encoding="ascii") as text:
        assert text.read() == (DATA[:3] + b"changed" + DATA[10:] + DATA + b"end").decode()


def test_each_file_has_a_data_key_of_its_own(shared: SharedKey):
    one, two = make(shared), make(shared)
    keys = {wrapped.newest(data[:HEAD_SIZE]).key_envelope.wrapped for data in (one, two)}
    assert len(keys) == 2


def test_writing_anew_takes_away_what_was_there(shared: SharedKey, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"not a sealed file " * 5000)
    with pyenclave.open_sealed(path, "wb", key=shared) as file:
        file.write(b"new")
    with pyenclave.open_sealed(path, key=shared) as file:
        assert file.read() == b"new"
    with pytest.raises(FileExistsError):
        pyenclave.open_sealed(path, "xb", key=shared)
    with pytest.raises(TypeError, match="does not wrap"):
        pyenclave.open_sealed(path, "wb", key=VaultWrappingKey(Vault(), "model").for_kid(KID))
    with pyenclave.open_sealed(path, key=shared) as file:
        assert file.read() == b"new"


def test_a_lock_keeps_two_writers_apart(shared: SharedKey, tmp_path: Path):
    path = tmp_path / "file"
    with pyenclave.open_sealed(path, "wb", key=shared) as file:
        file.write(b"first")
        file.commit()
        before = path.read_bytes()
        with pytest.raises(FileBusyError):
            pyenclave.open_sealed(path, "wb", key=shared)
        assert path.read_bytes() == before


def test_a_data_key_is_wrapped_for_another_key_without_touching_the_file(
    rsa_key: rsa.RSAPrivateKey, shared: SharedKey
):
    data = make(shared)
    new = PrivateKey(KID.replace(V1, V2), rsa_key)
    old_place, new_place = envelope.rewrap(data[:HEAD_SIZE], shared, new)
    both = bytearray(data)
    both[new_place.offset : new_place.offset + PLACE_SIZE] = new_place.to_bytes()
    assert read(bytes(both), new) == DATA
    both[old_place.offset : old_place.offset + PLACE_SIZE] = bytes(PLACE_SIZE)
    assert read(bytes(both), new) == DATA
    with pytest.raises(UnsealError):
        read(bytes(both), shared)
    # At any byte of the new place: it is the old file, until the new place is whole.
    for cut in range(0, 64 + len(new_place.blob), 37):
        part = bytearray(data)
        part[new_place.offset : new_place.offset + cut] = new_place.to_bytes()[:cut]
        assert read(bytes(part), shared) == DATA


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "word"), [(16, "A128KW"), (24, "A192KW"), (32, "A256KW")])
def test_a_shared_key_unwraps_by_its_own_algorithm_only(size: int, word: str):
    key = SharedKey(KID, bytes(range(size)))
    made = key.wrap(bytes(32))
    assert (made.algorithm, len(made.wrapped)) == (word, 40)
    assert key.unwrap(made.wrapped, word) == bytes(32)
    for other in ("RSA-OAEP-256", "A128KW", "A192KW", "A256KW", "none"):
        if other != word:
            with pytest.raises(UnsealError, match="that way"):
                key.unwrap(made.wrapped, other)
    for bad in (b"", made.wrapped[:-1], made.wrapped[:-8], bytes(40), made.wrapped + bytes(64)):
        with pytest.raises(UnsealError):
            key.unwrap(bad, word)
    with pytest.raises(ValueError, match="16, 24 or 32"):
        SharedKey(KID, bytes(20))


def test_only_oaep_with_sha256_is_unwrapped(rsa_key: rsa.RSAPrivateKey):
    key = PrivateKey(KID, rsa_key)
    for algorithm in ("RSA-OAEP", "RSA1_5", "A256KW"):
        with pytest.raises(UnsealError, match="that way"):
            key.unwrap(bytes(256), algorithm)
    v15 = rsa_key.public_key().encrypt(bytes(32), padding.PKCS1v15())
    for bad in (v15, b"", bytes(255), bytes(256), bytes(257)):
        with pytest.raises(UnsealError, match="does not unwrap"):
            key.unwrap(bad, "RSA-OAEP-256")


def test_weak_keys_and_other_kinds_are_refused(rsa_key: rsa.RSAPrivateKey):
    members = jwk.public_members(rsa_key.public_key())
    assert public_of({**members, "kty": "RSA-HSM"}) == rsa_key.public_key()
    n = rsa_key.public_key().public_numbers().n
    with pytest.raises(ArgumentError, match="weak"):
        PublicKey(KID, rsa.RSAPublicNumbers(3, n).public_key())
    with pytest.raises(ArgumentError, match="weak"):
        PublicKey(KID, rsa.generate_private_key(65537, 1024).public_key())
    for bad in (
        {"kty": "EC"},
        {"kty": "oct"},
        {},
        {**members, "n": ""},
        {**members, "e": ""},
        {**members, "e": "Ag"},
        {**members, "n": "A" * 4000},
    ):
        with pytest.raises((ArgumentError, EvidenceFormatError)):
            public_of(bad)


def test_keys_show_and_copy_nothing(rsa_key: rsa.RSAPrivateKey, shared: SharedKey):
    for key in (
        shared,
        PublicKey(KID, rsa_key.public_key()),
        PrivateKey(KID, rsa_key),
        VaultWrappingKey(Vault(), "model"),
        envelope.Together(shared),
    ):
        assert bytes(range(32)).hex() not in repr(key)
        with pytest.raises(TypeError):
            pickle.dumps(key)


# ---- a vault -------------------------------------------------------------------------------------


@dataclass
class Found:
    kid: str
    kty: str
    members: dict[str, str] = field(default_factory=dict)
    key_ops: tuple[str, ...] = ("wrapKey", "unwrapKey")
    attributes: dict[str, Any] = field(default_factory=dict)


class Vault:
    """A vault with an oct key in two versions; as `pyenclave.vault_client.VaultClient` is used."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.keys = {V1: SharedKey(KID, bytes(32)), V2: SharedKey(KID, bytes(range(32)))}
        self.key = Found(KID, "oct-HSM")
        self.lock = threading.Lock()
        self.error: Exception | None = None

    def get_key(self, name: str, version: str = "") -> Found:
        self.asked.append(("get", name, version))
        return replace(self.key, kid=f"https://vault.example/keys/{name}/{version or V1}")

    def wrap_key(
        self, name: str, algorithm: str, key: bytes, *, version: str = ""
    ) -> tuple[str, bytes]:
        self.asked.append(("wrap", name, version))
        made = self.keys[version].wrap(key)
        return f"https://vault.example/keys/{name}/{version}", made.wrapped

    def unwrap_key(self, name: str, algorithm: str, wrapped: bytes, *, version: str) -> bytes:
        with self.lock:
            self.asked.append(("unwrap", name, version))
        if self.error is not None:
            raise self.error
        return self.keys[version].unwrap(wrapped, algorithm)


def test_a_vaults_oct_key_wraps_and_unwraps_there():
    vault = Vault()
    key = VaultWrappingKey(vault, "model")
    data = make(key)
    assert vault.asked == [("get", "model", ""), ("wrap", "model", V1)]
    assert read(data, key) == DATA
    assert read(data, VaultWrappingKey(vault, "model", V1)) == DATA
    assert vault.asked[2:] == [("unwrap", "model", V1)] * 2


def test_a_vaults_rsa_key_wraps_here(rsa_key: rsa.RSAPrivateKey):
    vault = Vault()
    vault.key = Found(KID, "RSA-HSM", jwk.public_members(rsa_key.public_key()))
    data = make(VaultWrappingKey(vault, "model"))
    assert vault.asked == [("get", "model", "")]
    assert read(data, PrivateKey(KID, rsa_key)) == DATA


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kty": "EC-HSM"}, "cannot wrap"),
        ({"attributes": {"enabled": False}}, "disabled"),
        ({"key_ops": ("encrypt",)}, "nobody could open"),
    ],
)
def test_a_key_that_would_lose_the_data_is_refused_before(changes: dict[str, Any], words: str):
    vault = Vault()
    vault.key = replace(vault.key, **changes)
    place = io.BytesIO()
    with pytest.raises(ArgumentError, match=words):
        pyenclave.open_sealed(place, "wb", key=VaultWrappingKey(vault, "model"))
    assert place.getvalue() == b""
    vault.key = replace(vault.key, attributes={"exportable": True}, kty="oct-HSM")
    if words == "nobody could open":
        make(VaultWrappingKey(vault, "model"))


@pytest.mark.parametrize(
    "kid",
    [
        f"https://vault.example/keys/other/{V1}",
        "https://vault.example/keys/model",
        "https://vault.example/keys/model/../other/" + V1,
        f"https://vault.example/keys/model/{V1}/unwrapkey",
        f"https://vault.example/keys/model/{V1}?x=",
        "model/" + V1,
    ],
)
def test_a_file_never_chooses_what_the_vault_is_asked_for(kid: str):
    vault = Vault()
    data = make(SharedKey(kid, bytes(32)))
    with pytest.raises(UnsealError, match="another key"):
        read(data, VaultWrappingKey(vault, "model"))
    assert vault.asked == []


def test_a_file_of_another_version_is_opened_only_where_none_is_named():
    vault = Vault()
    data = make(SharedKey(KID.replace(V1, V2), bytes(range(32))))
    assert read(data, VaultWrappingKey(vault, "model")) == DATA
    with pytest.raises(UnsealError, match="another version"):
        read(data, VaultWrappingKey(vault, "model", V1))


def test_files_of_one_data_key_ask_the_vault_once_and_an_error_is_not_kept():
    vault = Vault()
    key = VaultWrappingKey(vault, "model")
    together = envelope.Together(key)
    files = [make(together, os.urandom(10)) for _ in range(6)]
    vault.asked.clear()
    vault.error = ConnectionError("no answer")
    with pytest.raises(ConnectionError):
        read(files[0], key)
    vault.error = None
    threads = [threading.Thread(target=read, args=(data, key)) for data in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert vault.asked == [("unwrap", "model", V1)] * 2


def test_an_envelope_is_of_the_documented_bytes():
    """docs/formats/key-envelope.md: the MAC, computed here once more."""
    import hashlib
    import hmac

    data_key = bytes(range(32))
    made = SharedKey(KID, bytes(32)).wrap(data_key)
    place = envelope.seal_envelope(data_key, made, file_id=bytes(range(16)))
    found = KeyEnvelope.from_bytes(place.blob)
    secret = hmac.new(b"pyenclave/key-envelope/1", data_key, hashlib.sha256).digest()
    zeroed = place.blob[:32] + bytes(32) + place.blob[64:]
    covered = (2).to_bytes(8, "little") + zeroed
    assert found.mac == hmac.new(secret, covered, hashlib.sha256).digest()
