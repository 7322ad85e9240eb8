"""``pyenclave encrypt`` and ``decrypt``: what the owner of data does with a key of a vault."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import pyenclave
from pyenclave import cli
from pyenclave.cli import _folders, _place
from pyenclave.errors import RemoteServiceError, UnsealError
from pyenclave.formats import jwk, wrapped
from pyenclave.sealed.envelope_keys import PrivateKey, SharedKey

VAULT = "https://vault.example"
V1, V2 = "1" * 32, "2" * 32


@dataclass
class Found:
    kid: str
    kty: str
    members: dict[str, str] = field(default_factory=dict)
    key_ops: tuple[str, ...] = ("wrapKey", "unwrapKey")
    attributes: dict[str, Any] = field(default_factory=dict)


class Vault:
    """The state of a vault; `Client` asks it as `VaultClient` asks one."""

    def __init__(self, rsa_keys: dict[str, rsa.RSAPrivateKey]) -> None:
        self.newest = V1
        self.rsa = rsa_keys
        self.oct = {V1: bytes(32), V2: bytes(range(32))}
        self.may_unwrap = True
        self.key_ops: tuple[str, ...] = ("wrapKey", "unwrapKey")
        self.asked: list[str] = []
        self.clients: list[tuple[Any, ...]] = []

    def key(self, name: str, version: str) -> PrivateKey | SharedKey:
        kid = f"{VAULT}/keys/{name}/{version}"
        if version not in self.rsa:
            raise RemoteServiceError("no such key", status=404, error_code="KeyNotFound")
        if name == "model":
            return PrivateKey(kid, self.rsa[version])
        return SharedKey(kid, self.oct[version])


class Client:
    def __init__(self, vault: Vault, url: str, credential: Any, **options: Any) -> None:
        self.vault = vault
        vault.clients.append((url, credential.get_token("x").token, options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def get_key(self, name: str, version: str = "") -> Found:
        self.vault.asked.append("get")
        key = self.vault.key(name, version or self.vault.newest)
        exportable = {"exportable": True}
        if isinstance(key, SharedKey):
            return Found(key.kid, "oct-HSM", {}, self.vault.key_ops, exportable)
        members = jwk.public_members(self.vault.rsa[version or self.vault.newest].public_key())
        return Found(key.kid, "RSA-HSM", members, self.vault.key_ops, exportable)

    def wrap_key(
        self, name: str, algorithm: str, key: bytes, *, version: str = ""
    ) -> tuple[str, bytes]:
        self.vault.asked.append("wrap")
        made = self.vault.key(name, version).wrap(key)
        assert made.algorithm == algorithm
        return made.kid, made.wrapped

    def unwrap_key(self, name: str, algorithm: str, wrapped: bytes, *, version: str) -> bytes:
        self.vault.asked.append("unwrap")
        if not self.vault.may_unwrap:
            raise RemoteServiceError("no", status=403, error_code="Forbidden")
        return self.vault.key(name, version).unwrap(wrapped, algorithm)


@pytest.fixture(scope="module")
def rsa_keys() -> dict[str, rsa.RSAPrivateKey]:
    return {version: rsa.generate_private_key(65537, 2048) for version in (V1, V2)}


@pytest.fixture
def vault(rsa_keys, tmp_path, monkeypatch) -> Vault:
    vault = Vault(rsa_keys)
    monkeypatch.setattr(
        "pyenclave.vault_client.VaultClient", lambda *a, **o: Client(vault, *a, **o)
    )
    monkeypatch.setattr("pyenclave.cli._tool.tool_enclave", None)  # nothing here launches one
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("the-token\n")
    return vault


KEY = ("--key", f"{VAULT}/keys/model", "--token-file", "token")


def run(capsys, *arguments: object) -> tuple[int, dict]:
    code = cli.main([*map(str, arguments), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return code, json.loads(lines[0])


@pytest.fixture
def plain(tmp_path) -> Path:
    folder = tmp_path / "plain"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "a" / "one").write_bytes(b"planted secret one " * 3000)
    (folder / "a" / "two").write_bytes(b"planted secret two " * 3000)
    (folder / "a" / "b" / "run.sh").write_bytes(b"#!/bin/sh\n")
    (folder / "a" / "b" / "run.sh").chmod(0o755)
    (folder / "nothing").write_bytes(b"")
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# ---- hostile -------------------------------------------------------------------------------------


def test_a_files_envelope_never_chooses_the_key_or_the_vault(vault, capsys):
    """Files that name another vault, another key or another version: nothing is asked."""
    Path("f").write_bytes(b"data")
    for kid, options in (
        ("https://evil.example/keys/other/" + V1, KEY),
        (f"{VAULT}/keys/other/{V1}", KEY),
        (f"{VAULT}/keys/model/{V2}", ("--key", f"{VAULT}/keys/model/{V1}", *KEY[2:])),
    ):
        with pyenclave.open_sealed("f.sealed", "wb", key=SharedKey(kid, bytes(32))) as file:
            file.write(b"x")
        code, document = run(capsys, "decrypt", "f.sealed", "-o", "g", *options)
        assert (code, document["error"]["code"]) == (1, "sealing.unseal")
        assert not Path("g").exists()
    assert vault.asked == []
    # The same key's name elsewhere: the vault that the caller named is asked, and no other.
    kid = f"https://evil.example/keys/model/{V1}"
    with pyenclave.open_sealed("f.sealed", "wb", key=SharedKey(kid, bytes(32))) as file:
        file.write(b"x")
    assert run(capsys, "decrypt", "f.sealed", "-o", "g", *KEY)[0] == 1
    assert {client[0] for client in vault.clients} == {VAULT}


def test_swapped_missing_added_and_changed_files_of_a_folder_are_found(vault, plain, capsys):
    assert run(capsys, "encrypt", plain, *KEY)[0] == 0
    sealed = plain.with_name("plain.sealed")
    one, two = sealed / "a" / "one.sealed", sealed / "a" / "two.sealed"
    both = one.read_bytes(), two.read_bytes()
    one.write_bytes(both[1])
    two.write_bytes(both[0])
    (sealed / "added.sealed").write_bytes(both[0])
    (sealed / "nothing.sealed").unlink()
    code, report = run(capsys, "decrypt", sealed, "-o", "back", *KEY)
    assert code == 1
    assert [item["file"] for item in report["failed"]] == [
        "a/one.sealed",
        "a/two.sealed",
        "added.sealed",
        "nothing.sealed",
    ]
    assert sorted(path.name for path in Path("back").rglob("*") if path.is_file()) == ["run.sh"]
    # Head of one file, body of another: the data key is the same, and it is found all the same.
    head = wrapped.HEAD_SIZE
    one.write_bytes(both[0][:head] + both[1][head:])
    assert run(capsys, "decrypt", one, "-o", "mixed", *KEY)[0] == 1
    assert not Path("mixed").exists()


def test_what_was_sealed_in_another_way_is_named(vault, capsys):
    Path("key").write_bytes(bytes(32))
    Path("key").chmod(0o600)
    Path("f").write_bytes(b"data")
    assert run(capsys, "seal", "f", "--key-file", "key")[0] == 0
    code, document = run(capsys, "decrypt", "f.sealed", "-o", "g", *KEY)
    assert code == 1
    assert "pyenclave unseal" in document["error"]["message"]
    assert run(capsys, "encrypt", "f", "-o", "h.sealed", *KEY)[0] == 0
    for options in (("--key-file", "key"), ()):
        code, document = run(capsys, "unseal", "h.sealed", *options)
        assert code == 1
        assert "pyenclave decrypt" in document["error"]["message"]
    assert vault.asked == ["get"]


def test_a_refusing_vault_leaves_nothing_behind(vault, plain, capsys, rsa_keys):
    code, document = run(
        capsys, "encrypt", plain, *KEY[2:], "--key", f"{VAULT}/keys/model/{'3' * 32}"
    )
    assert (code, document["error"]["code"]) == (1, "remote_service")
    assert not plain.with_name("plain.sealed").exists()
    Path("f").write_bytes(b"data")
    assert run(capsys, "encrypt", "f", *KEY)[0] == 0
    vault.may_unwrap = False
    code, document = run(capsys, "decrypt", "f.sealed", "-o", "g", *KEY)
    assert (code, document["error"]["code"]) == (1, "remote_service")
    assert sorted(path.name for path in Path().iterdir()) == ["f", "f.sealed", "plain", "token"]


def test_a_vault_that_is_not_reached_has_refused_nothing(vault, plain, capsys, monkeypatch):
    def silent(*arguments: object, **options: object) -> None:
        raise RemoteServiceError("no answer", status=0, error_code="NoAnswer")

    monkeypatch.setattr(Client, "get_key", silent)
    code, document = run(capsys, "encrypt", plain, *KEY)
    assert (code, document["error"]["code"]) == (2, "remote_service")


@pytest.mark.parametrize(
    "options",
    [
        ("--key", f"{VAULT}/keys/model"),
        ("--token-file", "token"),
        ("--key", "http://vault/keys/x y", "--token-file", "token"),
        ("--key", f"{VAULT}/secrets/model", "--token-file", "token"),
        (*KEY, "--token-env", "T"),
        ("--key", f"{VAULT}/keys/model", "--token-env", "NO_SUCH_VARIABLE"),
        (*KEY, "--private-key", "pem"),
        (*KEY, "--old-key", f"{VAULT}/keys/model"),
        (*KEY, "--jobs", "0"),
    ],
)
def test_wrong_use_is_said_before_anything_is_done(vault, plain, capsys, monkeypatch, options):
    monkeypatch.setitem(__import__("sys").modules, "azure.identity", None)
    code, document = run(capsys, "encrypt", plain, *options)
    assert (code, document["error"]["code"]) == (2, "usage")
    assert not plain.with_name("plain.sealed").exists()


# ---- files and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "shared"])
def test_a_folder_comes_back_as_it_was(vault, plain, capsys, name):
    key = ("--key", f"{VAULT}/keys/{name}", "--token-file", "token", "--ca", "ca.pem")
    code, report = run(capsys, "encrypt", plain, *key)
    assert (code, report["done"], report["failed"]) == (0, 4, [])
    sealed = plain.with_name("plain.sealed")
    assert b"planted secret" not in b"".join(
        path.read_bytes() for path in sealed.rglob("*") if path.is_file()
    )
    # One data key for the folder: two requests to make it, one to open it.
    assert vault.asked == (["get"] if name == "model" else ["get", "wrap"])
    vault.asked.clear()
    code, report = run(capsys, "decrypt", sealed, "-o", "back", *key)
    assert (code, report["done"]) == (0, 4)
    assert vault.asked == ["unwrap"]
    assert content(Path("back")) == content(plain)
    assert stat.S_IMODE(Path("back/a/b/run.sh").stat().st_mode) == 0o700
    assert stat.S_IMODE(Path("back/a/one").stat().st_mode) == 0o600
    url, token, options = vault.clients[0]
    assert (url, token, options["ca"]) == (VAULT, "the-token", "ca.pem")
    # The token was chosen for this vault: its challenge need not be of a cloud's domain.
    assert options["verify_challenge_resource"] is False


def test_a_file_opens_in_python_too(vault, rsa_keys, capsys):
    Path("f").write_bytes(b"data " * 9000)
    code, said = run(capsys, "encrypt", "f", *KEY, "--name", "model")
    assert (code, said["key"]) == (0, f"{VAULT}/keys/model/{V1}")
    key = PrivateKey(said["key"], rsa_keys[V1])
    with pyenclave.open_sealed("f.sealed", key=key, name=b"model") as file:
        assert file.read() == b"data " * 9000
    with pytest.raises(UnsealError):
        pyenclave.open_sealed("f.sealed", key=key)
    assert cli.main(["decrypt", "f.sealed", "-o", "-", *KEY, "--name", "model"]) == 0


def test_a_pipe_of_the_shell_is_encrypted_whole(vault, capsys):
    """Longer than the pipe holds, and than what is sealed at once."""
    plain = os.urandom((3 << 20) + 7)
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb") as pipe:
            pipe.write(plain)

    feeding = threading.Thread(target=feed)
    feeding.start()
    code, _ = run(capsys, "encrypt", f"/dev/fd/{reader}", "-o", "out", *KEY)
    os.close(reader)
    feeding.join()
    assert code == 0
    assert run(capsys, "decrypt", "out", "-o", "back", *KEY)[0] == 0
    assert Path("back").read_bytes() == plain


def test_bash_gives_what_is_encrypted_by_process_substitution(rsa_keys, tmp_path):
    public = rsa_keys[V1].public_key()
    (tmp_path / "key.pem").write_bytes(
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    shell = (
        '"$0" -m pyenclave encrypt <(head -c 3000000 /dev/zero; printf end) -o out '
        f"--key {VAULT}/keys/model/{V1} --public-key key.pem"
    )
    place = {**os.environ, "PYTHONPATH": str(Path(pyenclave.__file__).parents[1])}
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable], cwd=tmp_path, env=place,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    key = PrivateKey(f"{VAULT}/keys/model/{V1}", rsa_keys[V1])
    with pyenclave.open_sealed(tmp_path / "out", key=key) as file:
        assert file.read() == bytes(3_000_000) + b"end"


def test_info_says_which_key_opens_a_file(vault, capsys):
    Path("f").write_bytes(b"data")
    assert run(capsys, "encrypt", "f", *KEY)[0] == 0
    code, said = run(capsys, "info", "f.sealed")
    assert code == 0
    assert said["form"] == "sealed file of a vault's key"
    assert (said["key"], said["algorithm"]) == (f"{VAULT}/keys/model/{V1}", "RSA-OAEP-256")
    assert (said["wrapped_key"], said["length"], said["verified"]) == (256, 4, False)
    code = cli.main(["info", "f.sealed"])
    assert f"{VAULT}/keys/model/{V1}" in capsys.readouterr().out


def test_encrypting_goes_on_where_it_stopped_and_compares(vault, plain, capsys):
    assert run(capsys, "encrypt", plain, *KEY)[0] == 0
    sealed = plain.with_name("plain.sealed")
    (sealed / "a" / "one.sealed").unlink()
    (sealed / _folders.LIST).unlink()
    (sealed / "a" / f".pyenclave-{'0' * 32}.part").write_bytes(b"by half")
    code, document = run(capsys, "decrypt", sealed, "-o", "back", *KEY)
    assert (code, "no list" in document["error"]["message"]) == (1, True)
    code, report = run(capsys, "encrypt", plain, *KEY)
    assert (code, report["done"], report["verified"]) == (0, 1, 3)
    assert "kept" not in report
    (plain / "a" / "two").write_bytes(b"changed since")
    code, report = run(capsys, "encrypt", plain, *KEY)
    assert (code, report["done"], report["verified"]) == (2, 0, 3)
    assert "--force" in report["failed"][0]["message"]
    assert run(capsys, "encrypt", plain, *KEY, "--force")[0] == 0
    assert run(capsys, "decrypt", sealed, "-o", "back", *KEY)[0] == 0
    assert content(Path("back")) == content(plain)


def test_who_may_only_encrypt_goes_on_by_size_and_time(vault, plain, capsys):
    assert run(capsys, "encrypt", plain, *KEY)[0] == 0
    vault.may_unwrap = False
    sealed = plain.with_name("plain.sealed")
    (sealed / _folders.LIST).unlink()
    (sealed / "a" / "one.sealed").unlink()
    two = sealed / "a" / "two.sealed"
    before = two.read_bytes()
    code, report = run(capsys, "encrypt", plain, *KEY)
    assert (code, report["done"], report["verified"], report["kept"]) == (0, 1, 0, 3)
    assert two.read_bytes() == before
    # A source that was changed since, at the same length, with its time put back.
    was = (plain / "a" / "two").stat()
    (plain / "a" / "two").write_bytes(b"planted SECRET two " * 3000)
    os.utime(plain / "a" / "two", ns=(was.st_atime_ns, was.st_mtime_ns))
    code, report = run(capsys, "encrypt", plain, *KEY)
    assert (code, report["kept"], len(report["failed"])) == (2, 3, 1)
    assert run(capsys, "encrypt", plain, *KEY, "--force")[0] == 0
    # By half, of another key, or no file of this kind: made anew.
    (plain / "a" / "two").write_bytes(b"planted secret two " * 3000)
    assert run(capsys, "encrypt", plain, *KEY, "--force")[0] == 0
    for bad in (before[:9000], before[:100], b"", os.urandom(30_000)):
        two.write_bytes(bad)
        code, report = run(capsys, "encrypt", plain, *KEY, "--force")
        assert (code, report["done"], report["kept"]) == (0, 1, 3)
    vault.may_unwrap = True
    assert run(capsys, "decrypt", sealed, "-o", "back", *KEY)[0] == 0
    assert content(Path("back")) == content(plain)


def test_a_key_that_only_enclaves_get_is_never_asked_to_unwrap(vault, plain, capsys):
    """Its operations say so: going on does not even try."""
    vault.key_ops = ("wrapKey",)
    for kept in (0, 4):
        code, report = run(capsys, "encrypt", plain, *KEY)
        assert (code, report.get("kept", 0), report["failed"]) == (0, kept, [])
    assert "unwrap" not in vault.asked


def test_opening_goes_on_where_it_stopped(vault, plain, capsys):
    assert run(capsys, "encrypt", plain, *KEY)[0] == 0
    for _ in range(2):
        code, report = run(capsys, "decrypt", "plain.sealed", "-o", "back", *KEY)
        assert code == 0
    assert (report["done"], report["verified"]) == (0, 4)


def test_nothing_stands_half_written_when_writing_fails(vault, capsys, monkeypatch):
    Path("f").write_bytes(os.urandom(3 << 20))
    assert run(capsys, "encrypt", "f", *KEY)[0] == 0
    whole = Path("f.sealed").read_bytes()

    def fails(self, take, target, *, listing=False):
        take(1 << 20)
        raise OSError(28, "no space left")

    monkeypatch.setattr("pyenclave.cli._sealers.KeySealer.seal", fails)
    assert run(capsys, "encrypt", "f", "--force", *KEY)[0] == 2
    assert Path("f.sealed").read_bytes() == whole
    assert not [path for path in Path().iterdir() if _place.LEFT_BEHIND.fullmatch(path.name)]


def test_a_new_version_of_the_key_leaves_old_files_to_their_own(vault, capsys):
    Path("f").write_bytes(b"first")
    assert run(capsys, "encrypt", "f", *KEY)[0] == 0
    vault.newest = V2
    assert run(capsys, "encrypt", "f", "-o", "g.sealed", *KEY)[0] == 0
    for name, version in (("f", V1), ("g", V2)):
        assert run(capsys, "info", f"{name}.sealed")[1]["key"].endswith(version)
        assert run(capsys, "decrypt", f"{name}.sealed", "-o", f"{name}.out", *KEY)[0] == 0
        assert Path(f"{name}.out").read_bytes() == b"first"


@pytest.mark.long
def test_a_command_that_is_killed_is_gone_on_with(vault, rsa_keys, tmp_path, capsys):
    """SIGKILL at ten places: nothing by half has a name, and in the end all is there."""
    kid = f"{VAULT}/keys/model/{V1}"
    Path("p.json").write_text(
        json.dumps({**jwk.public_members(rsa_keys[V1].public_key()), "kid": kid})
    )
    source, target = tmp_path / "many", tmp_path / "out"
    source.mkdir()
    for number in range(120):
        (source / f"f{number}").write_bytes(os.urandom(400_000))
    command = [sys.executable, "-m", "pyenclave", "encrypt", source, "-o", target, "--jobs", "2"]
    command += ["--public-key", "p.json", "--json"]
    key = PrivateKey(kid, rsa_keys[V1])
    environment = {**os.environ, "PYTHONPATH": str(Path(pyenclave.__file__).parent.parent)}
    for number in range(1, 11):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        while process.poll() is None and len(list(target.glob("*.sealed"))) < 10 * number:
            time.sleep(0.002)
        process.kill()
        process.wait()
        for path in target.glob("*.sealed"):
            with pyenclave.open_sealed(path, key=key) as file:
                assert file.read() == (source / path.stem).read_bytes()
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    report = json.loads(done.stdout)
    assert (report["done"] + report["kept"], report["failed"]) == (120, [])
    assert report["kept"] >= 90
    assert not [path for path in target.iterdir() if _place.LEFT_BEHIND.fullmatch(path.name)]
    assert run(capsys, "decrypt", target, "-o", "back", *KEY)[1]["done"] == 120
    assert content(Path("back")) == content(source)


# ---- rewrapping ----------------------------------------------------------------------------------


def _bodies(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()[wrapped.HEAD_SIZE :]
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_is_wrapped_anew_without_touching_its_data(vault, plain, capsys):
    assert run(capsys, "encrypt", plain, *KEY)[0] == 0
    sealed = plain.with_name("plain.sealed")
    before = _bodies(sealed)
    vault.newest = V2
    vault.asked.clear()
    code, report = run(capsys, "encrypt", "--rewrap", sealed, *KEY)
    assert (code, report["done"], report["verified"], report["failed"]) == (0, 4, 0, [])
    assert vault.asked.count("unwrap") == 1
    assert _bodies(sealed) == before
    for path in sealed.rglob("*.sealed"):
        assert run(capsys, "info", path)[1]["key"].endswith(V2)
        # The old envelope is gone: who has the old version opens nothing.
        assert sum(place is not None for place in wrapped.read_places(path.read_bytes())) == 1
    code, report = run(capsys, "encrypt", "--rewrap", sealed, *KEY)
    assert (code, report["done"], report["verified"]) == (0, 0, 4)
    new = ("--key", f"{VAULT}/keys/model/{V2}", "--token-file", "token")
    assert run(capsys, "decrypt", sealed, "-o", "back", *new)[0] == 0
    assert content(Path("back")) == content(plain)
    old = ("--key", f"{VAULT}/keys/model/{V1}", "--token-file", "token")
    assert run(capsys, "decrypt", sealed, "-o", "none", *old)[0] == 1


def test_a_file_is_wrapped_for_another_key(vault, capsys):
    Path("f").write_bytes(b"data")
    assert run(capsys, "encrypt", "f", *KEY)[0] == 0
    other = ("--key", f"{VAULT}/keys/shared", "--token-file", "token")
    code, document = run(capsys, "encrypt", "--rewrap", "f.sealed", *other)
    assert (code, document["error"]["code"]) == (1, "sealing.unseal")
    code, said = run(
        capsys, "encrypt", "--rewrap", "f.sealed", *other, "--old-key", f"{VAULT}/keys/model"
    )
    assert (code, said["rewrapped"]) == (0, True)
    assert run(capsys, "decrypt", "f.sealed", "-o", "g", *other)[0] == 0
    assert Path("g").read_bytes() == b"data"
    assert run(capsys, "decrypt", "f.sealed", "-o", "h", *KEY)[0] == 1


def test_rewrapping_that_is_cut_off_leaves_one_key_or_the_other(vault, capsys, monkeypatch):
    from pyenclave.cli import _sealers

    Path("f").write_bytes(b"data")
    assert run(capsys, "encrypt", "f", *KEY)[0] == 0
    vault.newest = V2

    class CutError(Exception):
        """The power went."""

    def cut(fd, envelope):
        raise CutError

    monkeypatch.setattr(_sealers, "erase_place", cut)
    with pytest.raises(CutError):
        cli.main(["encrypt", "--rewrap", "f.sealed", *KEY])
    assert run(capsys, "decrypt", "f.sealed", "-o", "g", *KEY)[0] == 0
    assert run(capsys, "info", "f.sealed")[1]["key"].endswith(V2)


# ---- without a vault -----------------------------------------------------------------------------


def test_the_public_half_is_enough_to_encrypt_offline(vault, rsa_keys, plain, capsys):
    kid = f"{VAULT}/keys/model/{V1}"
    public = rsa_keys[V1].public_key()
    members = jwk.public_members(public)
    Path("p.pem").write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    Path("p.json").write_text(json.dumps({**members, "kty": "RSA-HSM", "kid": kid}))
    Path("bundle.json").write_text(json.dumps({"key": {**members, "kid": kid}, "attributes": {}}))
    Path("private.pem").write_bytes(
        rsa_keys[V1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    for number, options in enumerate(
        (
            ("--public-key", "p.pem", "--kid", kid),
            ("--public-key", "p.json"),
            ("--public-key", "p.json", "--key", kid),
            ("--public-key", "p.json", "--key", f"{VAULT}/keys/model"),
            ("--public-key", "bundle.json"),
        )
    ):
        code, report = run(capsys, "encrypt", plain, "-o", f"out{number}", *options)
        assert (code, report["done"]) == (0, 4)
        # Again: nothing here opens them.
        code, report = run(capsys, "encrypt", plain, "-o", f"out{number}", *options)
        assert (code, report["done"], report["kept"]) == (0, 0, 4)
    assert vault.clients == []
    assert run(capsys, "decrypt", "out0", "-o", "back", *KEY)[0] == 0
    local = ("--private-key", "private.pem", "--key", kid)
    assert run(capsys, "decrypt", "out1", "-o", "back2", *local)[0] == 0
    assert content(Path("back")) == content(Path("back2")) == content(plain)
    code, report = run(capsys, "encrypt", plain, "-o", "out0", *local)
    assert (code, report["verified"]) == (0, 4)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("{}", ()),
        ('{"kty":"EC"}', ()),
        ('{"kty":"oct","k":"AAAA"}', ()),
        ("-----BEGIN nothing", ("--key", f"{VAULT}/keys/model/{V1}")),
        ("x" * 70_000, ()),
        ("[", ()),
    ],
)
def test_what_is_no_public_key_is_refused(vault, plain, capsys, text, options):
    Path("p").write_text(text)
    assert run(capsys, "encrypt", plain, "--public-key", "p", *options)[0] == 2
    assert not plain.with_name("plain.sealed").exists()


def test_a_key_from_a_file_needs_its_version_and_must_be_the_one_that_is_named(
    vault, rsa_keys, plain, capsys
):
    members = jwk.public_members(rsa_keys[V1].public_key())
    Path("p.json").write_text(json.dumps(members))
    for options in ((), ("--key", f"{VAULT}/keys/model")):
        code, document = run(capsys, "encrypt", plain, "--public-key", "p.json", *options)
        assert (code, document["error"]["code"]) == (2, "usage")
    Path("p.json").write_text(json.dumps({**members, "kid": f"{VAULT}/keys/model/{V1}"}))
    for key in (f"{VAULT}/keys/model/{V2}", f"{VAULT}/keys/other"):
        code, document = run(capsys, "encrypt", plain, "--public-key", "p.json", "--key", key)
        assert (code, "another key" in document["error"]["message"]) == (2, True)
