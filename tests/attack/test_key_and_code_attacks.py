"""
Attackers X1 (another user) and X2 (this user, later) against A2 (keys) and A4 (code identity).

Embedded mode, threat catalogue A.3: X1 is refused; X2 is *not*: root secret, images and state are
files of the same user. The tests show both, so that the documents cannot claim more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyenclave
from pyenclave import image as images
from pyenclave.demo.scan import search_process
from pyenclave.errors import AppraisalError, UnsealError
from pyenclave.host import Enclave
from pyenclave.image import build, sign

pytestmark = pytest.mark.attack

ENTRY = '''
import pyenclave
from pyenclave import trusted

kept = []

@pyenclave.ecall
def take(ciphertext: bytes) -> int:
    """Take a secret that was encrypted to this enclave."""
    kept.append(trusted.receive(ciphertext))
    return len(kept[-1])

@pyenclave.ecall
def keep(note: bytes) -> bytes:
    """Seal a note to this enclave's signer and product."""
    return trusted.seal(note, policy=trusted.SealPolicy.signer)

@pyenclave.ecall
def show(blob: bytes) -> bytes:
    """Open a note and give it away (that is this code's decision)."""
    return trusted.unseal(blob)
'''
MANIFEST = """[enclave]
name = "holder"
entry = "holder.py"
product_id = 3
security_version = 1
"""


@pytest.fixture
def signed(state: Path, tmp_path: Path) -> Path:
    """A signed image."""
    (tmp_path / "holder.py").write_text(ENTRY)
    (tmp_path / "enclave.toml").write_text(MANIFEST)
    path = tmp_path / "holder.enclave"
    path.write_bytes(sign.sign(build.build(tmp_path / "enclave.toml"), images.keygen()))
    return path


def secrets_of(state: Path) -> list[Path]:
    """Return the files of the state directory that hold something: the root secret among them."""
    return [p for p in state.rglob("*") if p.is_file() and p.stat().st_size >= 32]


def read_all(paths: list[Path]) -> Callable[[], int]:
    """Return an action that reads every path and counts what it could read."""

    def action() -> int:
        count = 0
        for path in paths:
            try:
                count += bool(path.read_bytes())
            except OSError:
                continue
        return count

    return action


def test_X1_another_user_cannot_read_the_root_secret(
    need_root: None, as_user: Callable[..., Any], other_user: int, state: Path, worker: Any
) -> None:
    """A2: the state directory is closed to others."""
    assert secrets_of(state), "there is no secret file to attack"
    assert as_user(read_all(secrets_of(state)), uid=other_user) == 0


def test_X2_this_user_can_read_the_root_secret_in_embedded_mode(
    as_user: Callable[..., Any], state: Path, worker: Any
) -> None:
    """A2 and A3 against X2 are *no* in embedded mode: the root is this user's file."""
    assert as_user(read_all(secrets_of(state))) == len(secrets_of(state))


def test_X2_finds_no_provisioned_key_in_the_host_that_relayed_it(
    as_user: Callable[..., Any], signed: Path, tmp_path: Path
) -> None:
    """A2: the host only ever held ciphertext; the worker cannot be read."""
    policy = pyenclave.AppraisalPolicy.from_image(signed, dangerous_allow_software=True)
    with Enclave(signed) as enclave:
        nonce = bytes(range(32))
        evidence = enclave.attest(nonce=nonce).to_bytes()
        # The owner is another process: it verifies, makes a key and encrypts it.
        root = pyenclave.local_platform_root()

        def owner() -> list[str]:
            import secrets

            result = pyenclave.verify(evidence, policy=policy, nonce=nonce, roots=[root])
            key = secrets.token_bytes(32)
            # The pattern comes back reversed, so that this process never holds the key itself.
            return [result.encrypt(key).hex(), key[::-1].hex()]

        ciphertext, backwards = as_user(owner)
        assert enclave.call("take", bytes.fromhex(ciphertext)) == 32

        def scan() -> int:
            import os

            key = bytes.fromhex(backwards)[::-1]
            return sum(search_process(os.getppid(), [key])[1].values())

        assert as_user(scan, privileged=True) == 0
        planted = bytes.fromhex(backwards)[::-1]  # now this process holds it
        assert as_user(scan, privileged=True) >= 1, "the scanner must find what is there"
        assert len(planted) == 32


def test_X1_another_user_cannot_replace_image_or_state(
    need_root: None,
    as_user: Callable[..., Any],
    other_user: int,
    signed: Path,
    state: Path,
    worker: Any,
) -> None:
    """A4: file permissions hold."""

    paths = [signed, *(path for path in state.rglob("*") if path.is_file())]

    def replace() -> int:
        done = 0
        for path in paths:
            try:
                path.write_bytes(b"theirs")
            except OSError:
                continue
            done += 1
        return done

    assert as_user(replace, uid=other_user) == 0


def test_X2_this_user_can_replace_the_image_and_the_owner_notices(
    as_user: Callable[..., Any], signed: Path, tmp_path: Path
) -> None:
    """A4 against X2 is *no* for the next start; verification by the owner detects it."""
    policy = pyenclave.AppraisalPolicy.from_image(
        signed.read_bytes(), dangerous_allow_software=True
    )
    theirs = tmp_path / "theirs.enclave"
    (tmp_path / "holder.py").write_text(ENTRY + "\nbackdoor = True\n")
    theirs.write_bytes(sign.sign(build.build(tmp_path / "enclave.toml"), images.keygen()))

    def replace() -> bool:
        shutil.copyfile(theirs, signed)
        return True

    assert as_user(replace) is True
    with Enclave(signed) as enclave:  # it starts: launching is not what stops X2
        nonce = bytes(32)
        evidence = enclave.attest(nonce=nonce).to_bytes()
        roots = [pyenclave.local_platform_root()]
        with pytest.raises(AppraisalError):
            pyenclave.verify(evidence, policy=policy, nonce=nonce, roots=roots)


def test_X2_cannot_open_sealed_data_with_an_enclave_of_its_own(
    signed: Path, tmp_path: Path
) -> None:
    """A3 through the platform's front door: another signer's enclave gets another key."""
    with Enclave(signed) as enclave:
        blob = enclave.call("keep", b"a note")
        assert enclave.call("show", blob) == b"a note"
    theirs = tmp_path / "theirs.enclave"
    theirs.write_bytes(sign.sign(signed.read_bytes(), images.keygen()))
    with Enclave(theirs) as enclave, pytest.raises((UnsealError, pyenclave.errors.EcallError)):
        enclave.call("show", blob)
