"""The PKCS #11 backend on SoftHSM: what the token does inside, and what it refuses by name."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from vault_parts import rsa_jwk, unb64

from pyenclave.errors import ConfigurationError, ManifestError, ServiceError
from pyenclave.formats import jwa
from pyenclave.formats.key_context import KeyContext
from pyenclave.services.vault.backends import open_backend
from pyenclave.services.vault.backends.base import KeyBackend, KeyMaterial, KeySpec
from pyenclave.services.vault.backends.pkcs11 import Pkcs11Backend, from_config
from pyenclave.trusted._release_answer import without_fill

MODULE = next(
    (
        str(path)
        for folder in ("/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib64")
        if (path := Path(folder, "libsofthsm2.so")).exists()
    ),
    "",
)
PIN = "8352-secret"
CONTEXT = KeyContext(
    name="released",
    version="1" * 32,
    kty="RSA-HSM",
    exportable=True,
    policy_hash=hashlib.sha256(b"policy").digest(),
)


class Token:
    """A backend on an event loop of its own."""

    def __init__(self, uri: str) -> None:
        backend = open_backend(uri)
        assert isinstance(backend, Pkcs11Backend)
        self.uri = uri
        self.backend = backend
        self.runner = asyncio.Runner()

    def run(self, work: Any) -> Any:
        """Wait for *work*."""
        return self.runner.run(work)

    def make(self, kty: str, **options: Any) -> tuple[KeyMaterial, bytes]:
        """Make a key and its context."""
        context = dataclasses.replace(CONTEXT, kty=kty).to_bytes()
        return self.run(self.backend.generate(KeySpec(kty=kty, **options), context)), context

    def use(self, made: tuple[KeyMaterial, bytes], *what: str, **fields: bytes) -> dict[str, bytes]:
        """Use a key."""
        operation: Any
        operation, algorithm = what
        material, context = made
        found: dict[str, bytes] = self.run(
            self.backend.perform(material.wrapped, context, operation, algorithm, fields)
        )
        return found

    def close(self) -> None:
        """End it."""
        self.run(self.backend.close())
        self.runner.close()


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Token]:
    """A fresh token."""
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    if not MODULE or shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM is not installed (apt-get install softhsm2)")
    folder = tmp_path_factory.mktemp("hsm")
    (folder / "tokens").mkdir()
    conf = folder / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {folder}/tokens\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(conf)  # read once, when the library is loaded
    pin = folder / "pin"
    pin.write_text(PIN + "\n")
    pin.chmod(0o600)
    subprocess.run(
        [
            *("softhsm2-util", "--init-token", "--free", "--label", "vault test"),
            *("--so-pin", "1234", "--pin", PIN),
        ],
        check=True,
        capture_output=True,
    )
    uri = f"pkcs11:token=vault%20test?module-path={MODULE}&pin-source=file:{pin}"
    token = Token(uri)
    yield token
    token.close()


def refused(token: Token, work: Any, status: int, code: str, text: str) -> None:
    """*work* must fail so."""
    with pytest.raises(ServiceError, match=text) as caught:
        token.run(work)
    assert (caught.value.status, caught.value.error_code) == (status, code)


# ---- the configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "token=a",
        "token=a?module-path=/x",
        "token=a;token=b?module-path=/x&pin-source=/y",
        "token=a?module-path=/x&pin-source=/y&pin-value=1234",
        "token=a?module-path=/x&pin-value=1234",
        "token=a;slot-id=1?module-path=/x&pin-source=/y",
        "token=?module-path=/x&pin-source=/y",
        "/usr/lib/softhsm/libsofthsm2.so",
    ],
)
def test_a_pin_never_stands_in_the_configuration(text: str) -> None:
    """SKR-12: neither there nor on a command line; and nothing is guessed."""
    with pytest.raises(ManifestError) as caught:
        from_config(text)
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_pin_file_that_others_may_read_is_refused(
    token: Token, tmp_path: Path, mode: int
) -> None:
    """As a private key would be."""
    pin = tmp_path / "pin"
    pin.write_text(PIN)
    pin.chmod(mode)
    other = Token(f"pkcs11:token=vault%20test?module-path={MODULE}&pin-source={pin}")
    with pytest.raises(ServiceError, match="cannot start") as caught:
        other.run(other.backend.random(1))
    assert "open to others" in str(caught.value.found)
    other.close()
    assert token


def test_what_does_not_come_by_itself_is_refused_at_the_start(token: Token, tmp_path: Path) -> None:
    """A library or PIN file that is not there; a token that is not there is waited for."""
    good = token.uri.removeprefix("pkcs11:")
    from_config(good.replace("vault%20test", "nobody")).check()
    wrong = (
        (good.replace(str(MODULE), str(tmp_path / "none.so")), "module-path is no library"),
        (good.partition("&pin-source")[0] + f"&pin-source={tmp_path}/none", "PIN file"),
    )
    for text, named in wrong:
        backend = from_config(text)
        with pytest.raises(ConfigurationError, match=named):
            backend.check()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"vault%20test": "nobody"}, "cannot be used"),
        ({MODULE or "-": "/nonexistent.so"}, "cannot be used"),
    ],
)
def test_a_token_that_is_not_there_is_said_so(
    token: Token, change: dict[str, str], found: str
) -> None:
    """500 for callers, the reason for the log."""
    uri = token.uri
    for old, new in change.items():
        uri = uri.replace(old, new)
    other = Token(uri)
    with pytest.raises(ServiceError, match="cannot start") as caught:
        other.run(other.backend.random(1))
    assert found in str(caught.value.found)
    other.close()


# ---- what must not open --------------------------------------------------------------------------


def test_a_changed_key_or_context_is_refused(token: Token) -> None:
    """Every part of the wrapped form; each member of the context."""
    made, context = token.make("EC-HSM")
    wrapped, size = made.wrapped, len(made.wrapped)
    others = [
        (wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :], context)
        for at in (0, 7, 8, 15, 16, 17, 18, size // 2, size - 33, size - 32, size - 1)
    ]
    others += [(wrapped[:-1], context), (wrapped + b"\0", context), (b"", context)]
    for change in (
        {"name": "other"},
        {"version": "2" * 32},
        {"kty": "RSA-HSM"},
        {"policy_hash": bytes(32)},
        {"exportable": False, "policy_hash": None},
        {"immutable": True},
    ):
        changed: Any = {"kty": "EC-HSM", **change}
        others.append((wrapped, dataclasses.replace(CONTEXT, **changed).to_bytes()))
    for bad, bound in others:
        work = token.backend.perform(bad, bound, "sign", "ES256", {"value": bytes(32)})
        refused(token, work, 500, "InternalError", "does not belong to its record")


def test_only_exportable_keys_are_released_and_immutable_ones_stay(token: Token) -> None:
    """The rules of an update and of a release, as in the enclave."""
    closed = KeyContext(name="k", version="0" * 32, kty="oct-HSM")
    made = token.run(token.backend.generate(KeySpec(kty="oct-HSM"), closed.to_bytes()))
    work = token.backend.release(
        made.wrapped,
        closed.to_bytes(),
        modulus=b"\xff" * 256,
        exponent=65537,
        enc="CKM_RSA_AES_KEY_WRAP",
    )
    refused(token, work, 403, "Forbidden", "not exportable")
    fixed = dataclasses.replace(CONTEXT, kty="oct-HSM", immutable=True)
    other = dataclasses.replace(fixed, policy_hash=bytes(32))
    made = token.run(token.backend.generate(KeySpec(kty="oct-HSM"), fixed.to_bytes()))
    work = token.backend.rebind(made.wrapped, fixed.to_bytes(), other.to_bytes())
    refused(token, work, 403, "Forbidden", "immutable")
    renamed = dataclasses.replace(fixed, name="another")
    work = token.backend.rebind(made.wrapped, fixed.to_bytes(), renamed.to_bytes())
    refused(token, work, 400, "BadParameter", "name")


@pytest.mark.parametrize(
    ("kty", "operation", "algorithm"),
    [
        ("RSA-HSM", "decrypt", "RSA-OAEP-256"),
        ("RSA-HSM", "unwrapKey", "RSA-OAEP-256"),
        ("RSA-HSM", "decrypt", "RSA1_5"),
        ("oct-HSM", "sign", "HS256"),
    ],
)
def test_what_the_token_cannot_do_is_refused_by_its_name(
    token: Token, kty: str, operation: str, algorithm: str
) -> None:
    """Never done outside in its place; RSA1_5 would be an oracle (JWT-15)."""
    made = token.make(kty)
    with pytest.raises(ServiceError, match=f"cannot do {algorithm}") as caught:
        token.use(made, operation, algorithm, value=bytes(256))
    assert (caught.value.status, caught.value.error_code) == (400, "NotSupported")


@pytest.mark.parametrize("enc", ["RSA_AES_KEY_WRAP_256", "RSA_AES_KEY_WRAP_384"])
def test_a_release_wrap_that_the_token_has_not_is_refused_by_its_name(
    token: Token, enc: str
) -> None:
    """SoftHSM has OAEP with SHA-1 only."""
    made, context = token.make("oct-HSM")
    work = token.backend.release(
        made.wrapped, context, modulus=_transfer()[1], exponent=65537, enc=enc
    )
    refused(token, work, 400, "NotSupported", f"cannot do {enc}: it has no RSA-OAEP with SHA-")


@pytest.mark.parametrize(
    ("modulus", "exponent"), [(b"\xff" * 128, 65537), (b"\xff" * 256, 3), (b"\xfe" * 256, 65537)]
)
def test_nothing_is_wrapped_for_a_weak_key(token: Token, modulus: bytes, exponent: int) -> None:
    """SKR-06."""
    made, context = token.make("oct-HSM")
    work = token.backend.release(
        made.wrapped, context, modulus=modulus, exponent=exponent, enc="CKM_RSA_AES_KEY_WRAP"
    )
    refused(token, work, 400, "BadParameter", "weak")


# ---- what it does --------------------------------------------------------------------------------


_keys: list[rsa.RSAPrivateKey] = []


def _transfer() -> tuple[rsa.RSAPrivateKey, bytes]:
    if not _keys:
        _keys.append(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    return _keys[0], _keys[0].public_key().public_numbers().n.to_bytes(256, "big")


def _released(token: Token, made: tuple[KeyMaterial, bytes]) -> bytes:
    private, modulus = _transfer()
    sealed = token.run(
        token.backend.release(
            made[0].wrapped, made[1], modulus=modulus, exponent=65537, enc="CKM_RSA_AES_KEY_WRAP"
        )
    )
    scheme = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
    once = private.decrypt(sealed[:256], scheme)
    return keywrap.aes_key_unwrap_with_padding(once, sealed[256:])


def test_what_a_token_fills_up_is_cut_by_the_receiver_and_nothing_else() -> None:
    """Up to seven zeros behind a PKCS #8; other bytes, and more of them, stay and are refused."""
    long, short = b"\x30\x82\x01\x00" + bytes(256), b"\x30\x05hello"
    for data in (long, short):
        for count in range(8):
            assert without_fill(data + bytes(count)) == data
        for tail in (bytes(8), b"\0x", b"x"):
            assert without_fill(data + tail) == data + tail
    for data in (b"", b"\x30", b"\x31\0\0\0\0", bytes(32)):
        assert without_fill(data) == data


@pytest.mark.parametrize("crv", [None, *sorted(jwa.CURVES)])
def test_a_key_signs_and_is_released_as_itself(token: Token, crv: str | None) -> None:
    """RSA and every curve: made in the token, signs there, and opens at the receiver."""
    made = token.make("EC-HSM", crv=crv) if crv else token.make("RSA-HSM")
    key: Any = serialization.load_der_private_key(without_fill(_released(token, made)), None)
    public = key.public_key()
    digests: dict[str, Any] = {
        "256": hashes.SHA256(),
        "384": hashes.SHA384(),
        "512": hashes.SHA512(),
    }
    names = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "P-256K": "ES256K"}
    for name in [names[crv]] if crv else ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]:
        digest = digests[name[2:5]]
        hashed = hashlib.new(digest.name, b"text").digest()
        signature = token.use(made, "sign", name, value=hashed)["value"]
        assert token.use(made, "verify", name, digest=hashed, value=signature)["value"] == b"\1"
        assert jwa.perform_public(public, "verify", name, {"digest": hashed, "value": signature})
        other = bytes([signature[0] ^ 1]) + signature[1:]
        assert token.use(made, "verify", name, digest=hashed, value=other)["value"] == b"\0"
        with pytest.raises(ServiceError, match="has"):
            token.use(made, "sign", name, value=hashed[:-1])
    if crv is None:
        sealed = token.use(made, "encrypt", "RSA-OAEP", value=b"secret")["value"]
        assert token.use(made, "decrypt", "RSA-OAEP", value=sealed) == {"value": b"secret"}
        assert key.private_numbers().public_numbers.n == int.from_bytes(
            unb64(made[0].public["n"]), "big"
        )
        with pytest.raises(ServiceError, match="cannot be decrypted"):
            token.use(made, "decrypt", "RSA-OAEP", value=bytes(255) + b"\1")


@pytest.mark.parametrize("bits", jwa.OCT_SIZES)
def test_shared_keys_encrypt_and_wrap_in_the_token(token: Token, bits: int) -> None:
    """And what they make is opened by others with the released key."""
    made = token.make("oct-HSM", size=bits)
    key = _released(token, made)
    assert len(key) * 8 == bits
    sealed = token.use(made, "encrypt", f"A{bits}GCM", value=b"text", aad=b"more")
    opened = AESGCM(key).decrypt(sealed["iv"], sealed["value"] + sealed["tag"], b"more")
    assert opened == b"text"
    assert token.use(made, "decrypt", f"A{bits}GCM", **sealed) == {"value": b"text"}
    bad = {**sealed, "tag": bytes(16)}
    with pytest.raises(ServiceError, match="cannot be decrypted"):
        token.use(made, "decrypt", f"A{bits}GCM", **bad)
    for name, text in ((f"A{bits}CBC", bytes(48)), (f"A{bits}CBCPAD", b"x" * 45)):
        cbc = token.use(made, "encrypt", name, value=text, iv=bytes(range(16)))
        assert jwa.perform(key, "decrypt", name, cbc) == {"value": text}
        assert token.use(made, "decrypt", name, **cbc) == {"value": text}
    for name, text in ((f"A{bits}KW", bytes(24)), ("CKM_AES_KEY_WRAP_PAD", b"x" * 40)):
        wrapped = token.use(made, "wrapKey", name, value=text)["value"]
        opened = token.use(made, "unwrapKey", name, value=wrapped)["value"]
        assert opened == text
        with pytest.raises(ServiceError, match="cannot be decrypted"):
            token.use(made, "unwrapKey", name, value=bytes(len(wrapped)))
    try:  # a token that changes what it wraps says so
        wrapped = token.use(made, "wrapKey", "CKM_AES_KEY_WRAP_PAD", value=b"x" * 21)["value"]
    except ServiceError as error:
        assert "cannot do CKM_AES_KEY_WRAP_PAD" in str(error)  # noqa: PT017
    else:
        assert keywrap.aes_key_unwrap_with_padding(key, wrapped) == b"x" * 21


def test_imported_keys_are_wrapped_in_the_token(token: Token) -> None:
    """And come out as they went in."""
    point = ec.generate_private_key(ec.SECP256R1())
    numbers = point.private_numbers()
    import base64

    def text(number: int) -> str:
        return base64.urlsafe_b64encode(number.to_bytes(32, "big")).rstrip(b"=").decode()

    public = numbers.public_numbers
    jwks = {
        "RSA-HSM": rsa_jwk(_transfer()[0]),
        "EC-HSM": {
            "kty": "EC",
            "crv": "P-256",
            "x": text(public.x),
            "y": text(public.y),
            "d": text(numbers.private_value),
        },
        "oct-HSM": {"kty": "oct", "k": text(5)},
    }
    for kty, jwk in jwks.items():
        context = dataclasses.replace(CONTEXT, kty=kty).to_bytes()
        made = token.run(token.backend.import_key(jwk, context))
        material = _released(token, (made, context))
        if kty == "oct-HSM":
            assert material == (5).to_bytes(32, "big")
            continue
        key: Any = serialization.load_der_private_key(without_fill(material), None)
        wanted = _transfer()[0] if kty == "RSA-HSM" else point
        assert key.private_numbers() == wanted.private_numbers()
        bad = {**jwk, "d": jwk["d"][:-4] + "AAAA"}
        with pytest.raises(ServiceError, match="do not belong together"):
            token.run(token.backend.import_key(bad, context))


def test_another_instance_opens_what_this_one_wrapped(token: Token) -> None:
    """The two keys that stay are found by their label; they cannot be extracted."""
    made = token.make("oct-HSM")
    other = Token(token.uri)
    try:
        assert _released(other, made) == _released(token, made)
        assert len(other.run(other.backend.random(128))) == 128
        assert isinstance(other.backend, KeyBackend)
    finally:
        other.close()
    assert _released(token, made)  # its session lives on


def test_the_pin_is_in_no_process_list(token: Token) -> None:
    """SKR-12."""
    token.run(token.backend.random(1))
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                data = (process / name).read_bytes()
            except OSError:
                continue
            assert PIN.encode() not in data, process


# ---- another pair of keys ----------------------------------------------------------------------


@pytest.fixture
def rotating(token: Token) -> Iterator[Token]:
    """A backend with a pair of keys of its own in the same token."""
    label = os.urandom(4).hex()
    found = Token(token.uri.replace("?", f";object={label}?"))
    yield found
    found.close()


def test_keys_are_moved_to_another_pair_inside_the_token(rotating: Token) -> None:
    """Of every kind, while another instance uses them; then the old pair is gone from the token."""
    other = Token(rotating.uri)
    try:
        made = {
            "RSA-HSM": rotating.make("RSA-HSM", size=2048),
            "EC-HSM": rotating.make("EC-HSM", crv="P-256"),
            "oct-HSM": rotating.make("oct-HSM"),
        }
        before = {kty: _released(rotating, one) for kty, one in made.items()}
        assert _released(other, made["EC-HSM"]) == before["EC-HSM"]
        (old,) = rotating.run(rotating.backend.keks())
        new = rotating.run(rotating.backend.rotate_kek())
        assert rotating.run(rotating.backend.keks()) == (old, new)
        moved = {}
        for kty, (material, context) in made.items():
            wrapped = rotating.run(rotating.backend.rewrap(material.wrapped, context))
            assert (material.wrapped[8:16], wrapped[8:16]) == (old, new)
            assert rotating.run(rotating.backend.rewrap(wrapped, context)) is None
            moved[kty] = (KeyMaterial(public=material.public, wrapped=wrapped), context)
            assert _released(rotating, moved[kty]) == before[kty]
            assert _released(other, moved[kty]) == before[kty]  # it looks for the new pair
        assert rotating.make("oct-HSM")[0].wrapped[8:16] == new
        rotating.run(rotating.backend.destroy_keks([old, new, b"8 others"]))
        assert rotating.run(rotating.backend.keks()) == (new,)  # the newest stays in any case
        assert _released(rotating, moved["RSA-HSM"]) == before["RSA-HSM"]
        third = Token(rotating.uri)
        try:
            assert _released(third, moved["oct-HSM"]) == before["oct-HSM"]
            with pytest.raises(ServiceError, match="does not belong to its record"):
                _released(third, made["oct-HSM"])
        finally:
            third.close()
    finally:
        other.close()


def test_what_a_token_does_not_wrap_again_inside_is_refused_by_its_name(
    rotating: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that gives no key out again that it unwrapped; and the key is as it was."""
    material, context = rotating.make("EC-HSM", crv="P-256")
    before = _released(rotating, (material, context))
    rotating.run(rotating.backend.rotate_kek())
    from pkcs11 import exceptions

    from pyenclave.services.vault.backends import pkcs11_token

    def cannot(*_arguments: Any) -> Any:
        raise exceptions.KeyUnextractable

    with monkeypatch.context() as patched:
        patched.setattr(pkcs11_token.Token, "_unwrap", cannot)
        refused(
            rotating,
            rotating.backend.rewrap(material.wrapped, context),
            400,
            "NotSupported",
            "the token cannot do AES_KEY_WRAP_PAD of EC-HSM keys: it does not wrap them again "
            r"inside \(KeyUnextractable\)",
        )
    assert _released(rotating, (material, context)) == before
    changed = material.wrapped[:-1] + bytes([material.wrapped[-1] ^ 1])
    with pytest.raises(ServiceError, match="does not belong to its record"):
        rotating.run(rotating.backend.rewrap(changed, context))


def test_half_a_pair_is_no_pair_and_can_be_destroyed(rotating: Token) -> None:
    """A process that ended between the two keys leaves one: nothing is wrapped with it."""
    made = rotating.make("oct-HSM")
    (old,) = rotating.run(rotating.backend.keks())
    half = bytes(8)

    def make_half(token: Any) -> None:
        p = token.p
        token.session.generate_key(
            p.KeyType.AES, 256, id=half, label=token._place.label, store=True,
            template={p.Attribute.SENSITIVE: True, p.Attribute.EXTRACTABLE: False},
            capabilities=p.MechanismFlag.WRAP | p.MechanismFlag.UNWRAP,
        )  # fmt: skip

    rotating.run(rotating.backend._do("use", make_half))
    other = Token(rotating.uri)
    try:
        assert other.run(other.backend.keks()) == (old,)
        assert _released(other, made) == _released(rotating, made)
        other.run(other.backend.destroy_keks([half]))
        assert other.run(other.backend.keks()) == (old,)
    finally:
        other.close()
