"""
Attacks that change, replay or replace something: image, data, ring, evidence, libraries, signer.

Each plays a hostile host in full: it owns the service's process and all its files, starts the
enclave itself, and knows no key of the owner. Where the attack needs the owner's part (data that
is then changed), it plays that too, with keys of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import pyenclave
from pyenclave import errors
from pyenclave.demo.attacks.outcome import Outcome, refused, succeeded
from pyenclave.demo.wire import Peer
from pyenclave.errors import EnclaveError
from pyenclave.host import Enclave
from pyenclave.image import sign

__all__ = ["ATTACKS"]

Order = dict[str, Any]


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 0x01
    path.write_bytes(data)


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _provision(enclave: Enclave, order: Order) -> tuple[bytes, bytes]:
    """Play the owner: verify, send keys, load a model; return table key and a first chunk."""
    root = x509.load_der_x509_certificate(bytes.fromhex(order["root"]))
    policy = pyenclave.AppraisalPolicy.from_image(order["image"], dangerous_allow_software=True)
    nonce = secrets.token_bytes(32)
    evidence = enclave.attest(nonce=nonce).to_bytes()
    result = pyenclave.verify(evidence, policy=policy, nonce=nonce, roots=[root])
    table_key, model_key = secrets.token_bytes(32), secrets.token_bytes(32)
    enclave.call("receive_keys", result.encrypt(table_key + model_key))
    seal = AESGCM(model_key)
    iv = secrets.token_bytes(12)
    enclave.call("load_model", iv + seal.encrypt(iv, np.ones(3).tobytes(), b"model"))
    iv = secrets.token_bytes(12)
    rows = np.arange(12, dtype=np.float64).tobytes()
    return table_key, iv + AESGCM(table_key).encrypt(iv, rows, b"table 0")


# ---- the image --------------------------------------------------------------------------------


def image_byte(order: Order) -> Outcome:
    """Change one byte of the code on disk, then start it."""
    folder = Path(order["folder"])
    if order["target"] == "unprotected":
        script = folder / "plain.py"
        script.write_text("LIMIT = 0.5\nprint('scored with', LIMIT)\n")
        _flip(script, script.read_text().index("5"))  # 0.5 becomes 0.4
        done = _python(str(script))
        return succeeded(f"the changed program ran: {done.stdout.strip()}")
    image = folder / "changed.enclave"
    shutil.copyfile(order["image"], image)
    _flip(image, image.stat().st_size // 2)
    with Enclave(image):
        return succeeded("the changed image ran")


def wrong_signer(order: Order) -> Outcome:
    """Put the same code under another signer's name and ask the owner for its keys."""
    folder = Path(order["folder"])
    if order["target"] == "unprotected":
        script = folder / "theirs.py"
        script.write_text("print(open(__import__('sys').argv[1]).read())\n")
        key = folder / "key.txt"
        key.write_text("the owner's key")
        return succeeded(f"somebody else's program read: {_python(str(script), str(key)).stdout}")
    image = folder / "theirs.enclave"
    image.write_bytes(sign.sign(Path(order["image"]).read_bytes(), order["other_key"].encode()))
    with Enclave(image) as enclave:
        _provision(enclave, order)
    return succeeded("the owner gave its keys to another signer's enclave")


def debug_enclave(order: Order) -> Outcome:
    """Launch the image as a debug enclave, whose insides can be watched, and ask for the keys."""
    if order["target"] == "unprotected":
        script = (
            "import sys\n"
            "seen = []\n"
            "def watch(frame, event, arg):\n"
            "    seen.extend(v for v in frame.f_locals.values() if v == 'secret key')\n"
            "    return watch\n"
            "sys.settrace(watch)\n"
            "def score(key):\n"
            "    return len(key)\n"
            "score('secret key')\n"
            "print(seen[0])\n"
        )
        return succeeded(f"a tracer saw: {_python('-c', script).stdout.strip()}")
    with Enclave(order["debuggable_image"], debug=True) as enclave:
        _provision(enclave, {**order, "image": order["debuggable_image"]})
    return succeeded("the owner gave its keys to a debug enclave")


def swap_library(order: Order) -> Outcome:
    """Put a changed copy of a library in front of the real one."""
    planted = Path(order["folder"]) / "planted"
    planted.mkdir(exist_ok=True)
    if order["target"] == "unprotected":
        (planted / "colorsys.py").write_text("print('the planted library ran')\n")
        done = _python("-c", "import colorsys", PYTHONPATH=str(planted))
        return succeeded(done.stdout.strip())
    # Packages are looked for beside pyenclave first: a folder with the true pyenclave and a changed
    # copy of a library that every enclave loads. The platform starts afresh, in a state directory
    # of its own, so that no zygote with the true library is at hand.
    import msgspec

    copy = planted / "msgspec"
    shutil.copytree(Path(msgspec.__file__).parent, copy, dirs_exist_ok=True)
    with (copy / "__init__.py").open("a") as target:
        target.write("\nprint('the planted library ran')\n")
    shutil.copytree(Path(pyenclave.__file__).parent, planted / "pyenclave", dirs_exist_ok=True)
    script = (
        "import sys, pyenclave\n"
        "try:\n"
        "    with pyenclave.Enclave(sys.argv[1]): print('ran')\n"
        "except pyenclave.errors.RuntimeLockError as error:\n"
        "    print(error.message, *error.files, file=sys.stderr)\n"
        "    sys.exit(7)\n"
    )
    paths = os.pathsep.join([str(planted), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = _python(
        "-c", script, order["image"], PYTHONPATH=paths, PYENCLAVE_STATE=str(planted / "state")
    )
    if done.returncode == 0:
        return succeeded("the enclave ran with the changed library")
    if done.returncode != 7:
        raise EnclaveError(f"the attack broke: {done.stderr.strip()[-2000:]}")
    raise errors.RuntimeLockError(done.stderr)


# ---- data -------------------------------------------------------------------------------------


def blob_byte(order: Order) -> Outcome:
    """Change one byte of the data on its way in."""
    if order["target"] == "unprotected":
        path = Path(order["folder"]) / "table.bin"
        path.write_bytes(np.arange(12, dtype=np.float64).tobytes())
        before = np.fromfile(path).sum()
        _flip(path, 47)
        after = np.fromfile(path).sum()
        return succeeded(f"nobody noticed: the sum went from {before:g} to {after:g}")
    with Enclave(order["image"]) as enclave:
        _, blob = _provision(enclave, order)
        changed = bytearray(blob)
        changed[20] ^= 1
        enclave.call("score", bytes(changed), 0)
    return succeeded("the changed data was scored")


def old_sealed_data(order: Order) -> Outcome:
    """Bring back an older state that was once genuine."""
    if order["target"] == "unprotected":
        path = Path(order["folder"]) / "balance.json"
        path.write_text('{"balance": 100}')
        old = path.read_bytes()
        path.write_text('{"balance": 0}')
        path.write_bytes(old)
        return succeeded(f"the old state counts again: {json.loads(path.read_text())}")
    with Enclave(order["image"]) as enclave:
        counter = enclave.call("new_counter")
        old = enclave.call("remember", b"balance 100", counter)
        enclave.call("remember", b"balance 0", counter)
        enclave.call("recall", old, counter)
    return succeeded("the enclave took the old state")


def other_enclaves_blob(order: Order) -> Outcome:
    """Open data that one enclave sealed with another enclave."""
    if order["target"] == "unprotected":
        path = Path(order["folder"]) / "private.txt"
        path.write_text("meant for one program")
        done = _python("-c", "import sys; print(open(sys.argv[1]).read())", str(path))
        return succeeded(f"another program read: {done.stdout.strip()}")
    with Enclave(order["image"]) as enclave:
        counter = enclave.call("new_counter")
        blob = enclave.call("remember", b"meant for one enclave", counter)
    image = Path(order["folder"]) / "other.enclave"
    image.write_bytes(sign.sign(Path(order["image"]).read_bytes(), order["other_key"].encode()))
    with Enclave(image) as enclave:
        enclave.call("recall", blob, counter)
    return succeeded("the other enclave opened it")


# ---- the ring ---------------------------------------------------------------------------------


def ring_byte(order: Order) -> Outcome:
    """Change bytes of the shared memory between host and enclave while calls run."""
    if order["target"] == "unprotected":
        fd = os.memfd_create("shared")
        os.write(fd, b"score 0.10")
        os.pwrite(fd, b"9", 8)
        return succeeded(f"the reader took what it found: {os.pread(fd, 10, 0).decode()}")
    left, right = socket.socketpair()
    host = subprocess.Popen(
        [sys.executable, "-P", "-m", "pyenclave.demo.service", order["image"], os.devnull],
        stdin=right.fileno(),
    )
    right.close()
    peer = Peer(left)
    rings: list[int] = []
    try:
        if "error" in peer.receive()[0]:
            return refused("the enclave did not start")
        for entry in Path(f"/proc/{host.pid}/fd").iterdir():
            with suppress(OSError):
                if "ring" in os.readlink(entry):
                    rings.append(os.open(entry, os.O_RDWR | os.O_CLOEXEC))
        if not rings:
            return refused("the ring could not be opened")
        stop = threading.Event()

        def vandal() -> None:
            while not stop.is_set():
                for ring in rings:
                    size = os.fstat(ring).st_size
                    for offset in range(0, min(size, 1 << 16), 64):
                        os.pwrite(ring, secrets.token_bytes(8), offset)

        thread = threading.Thread(target=vandal, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                answer, _ = peer.ask({"operation": "accuracy"})
                if answer["accuracy"] != 0.0:
                    return succeeded(f"a wrong result went through: {answer}")
        finally:
            stop.set()
            thread.join()
        return refused("every call gave its own result")
    finally:
        peer.close()
        host.kill()
        host.wait()
        for ring in rings:
            os.close(ring)


# ---- evidence ---------------------------------------------------------------------------------


def evidence_byte(order: Order) -> Outcome:
    """Change one byte of the evidence."""
    if order["target"] == "unprotected":
        claims = bytearray(json.dumps({"service": "scoring", "version": 1}).encode())
        claims[-2] ^= 0x02
        return succeeded(f"the claims were believed: {json.loads(claims)}")
    evidence = bytearray(bytes.fromhex(order["evidence"]))
    evidence[len(evidence) // 3] ^= 0x01
    _verify(bytes(evidence), bytes.fromhex(order["nonce"]), order)
    return succeeded("the changed evidence was accepted")


def old_nonce(order: Order) -> Outcome:
    """Answer a new question with old evidence."""
    if order["target"] == "unprotected":
        return succeeded("a service that says only its name says it again: 'scoring, version 1'")
    _verify(bytes.fromhex(order["evidence"]), secrets.token_bytes(32), order)
    return succeeded("the old evidence was accepted as fresh")


def _verify(evidence: bytes, nonce: bytes, order: Order) -> None:
    root = x509.load_der_x509_certificate(bytes.fromhex(order["root"]))
    policy = pyenclave.AppraisalPolicy.from_image(order["image"], dangerous_allow_software=True)
    pyenclave.verify(evidence, policy=policy, nonce=nonce, roots=[root])


@dataclass(frozen=True, slots=True)
class Attack:
    """
    An attack, and the errors that are its refusal.

    Anything else that stops it (a missing module, say) shows nothing and is an error of the demo.
    """

    run: Callable[[Order], Outcome]
    refusals: tuple[type[EnclaveError], ...] = (errors.EcallError,)
    inside: str = ""  # of an EcallError: the class that trusted code must have raised

    def __call__(self, order: Order) -> Outcome:
        """Run the attack; its own kind of refusal is an outcome, any other error is raised."""
        try:
            return self.run(order)
        except self.refusals as error:
            if self.inside and getattr(error, "type", "") != self.inside:
                raise
            return refused(f"[{error.code}] {error.message}")


ATTACKS: dict[str, Attack] = {
    "image_byte": Attack(image_byte, (errors.ImageError,)),
    "blob_byte": Attack(blob_byte, inside="PublicError"),
    "ring_byte": Attack(ring_byte, (errors.EnclavePoisonedError, errors.CallError)),
    "evidence_byte": Attack(evidence_byte, (errors.AppraisalError, errors.EvidenceFormatError)),
    "old_sealed_data": Attack(old_sealed_data, inside="RollbackError"),
    "old_nonce": Attack(old_nonce, (errors.AppraisalError,)),
    "swap_library": Attack(swap_library, (errors.RuntimeLockError,)),
    "wrong_signer": Attack(wrong_signer, (errors.AppraisalError,)),
    "debug_enclave": Attack(debug_enclave, (errors.AppraisalError,)),
    "other_enclaves_blob": Attack(other_enclaves_blob, inside="UnsealError"),
}
