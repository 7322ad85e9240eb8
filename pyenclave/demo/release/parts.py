"""What the demo is made of: the services as processes, the image's builds, the host's launches."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import pyenclave
from pyenclave.demo._starting import undisturbed
from pyenclave.errors import EcallError, EnclaveError
from pyenclave.image import build, sign

__all__ = ["Service", "build_image", "launch", "read_command", "run_command", "start_service"]

_START: Final = 60.0  # seconds
_STOP: Final = 10.0
_MANIFEST: Final = """\
[enclave]
name = "released"
entry = "released.py"
product_id = 9
security_version = 1
debug = {debug}

[seal]
files = ["table", "model"]

[release]
vault = "{vault}"
attestation = "{attestation}"
ca = "ca.pem"
"""


@dataclass(frozen=True, slots=True)
class Service:
    """A service that runs as a process of its own."""

    name: str
    url: str
    ca: str
    token: str


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a service politely; it finishes what it has begun."""
    process.terminate()
    try:
        process.wait(_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "pyenclave", *arguments]


def start_service(stack: ExitStack, name: str, *arguments: str) -> Service:
    """
    Start ``pyenclave serve NAME --dev`` and wait for its line.

    Raises:
        EnclaveError: It ended, or did not get ready.

    """
    with open(f"{os.environ['PYENCLAVE_STATE']}-{name}.log", "xb") as log, undisturbed():
        process = subprocess.Popen(
            _command("serve", name, "--dev", *arguments),
            stdout=subprocess.PIPE,
            stderr=log,
            stdin=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C is the director's, who ends it
        )
        stack.callback(_stop, process)  # also where it is not waited for to the end
    out = process.stdout
    if out is None:
        raise AssertionError("there is a pipe")
    line, deadline = b"", time.monotonic() + _START
    while not line.endswith(b"\n") and time.monotonic() < deadline:
        if select.select([out], [], [], 0.1)[0]:
            piece = os.read(out.fileno(), 65536)
            if not piece:
                break
            line += piece
    try:
        ready = json.loads(line)
        return Service(name, ready["url"], ready["ca"], ready["token"])
    except (ValueError, KeyError):
        raise EnclaveError(f"the {name} service did not start", found=line[:200]) from None


def read_command(*arguments: str) -> str:
    """
    Run a command of ``pyenclave`` as a user would, and return what it prints.

    Raises:
        EnclaveError: It ended with an error.

    """
    done = subprocess.run(
        _command(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        process_group=0,
    )
    if done.returncode:
        raise EnclaveError(
            f"pyenclave {arguments[0]} ended with {done.returncode}",
            found=(done.stdout + done.stderr).decode("utf-8", "replace")[-400:],
        )
    return done.stdout.decode("utf-8", "replace")


def run_command(*arguments: str) -> dict[str, Any]:
    """
    Run a command of ``pyenclave`` as a user would, with ``--json``.

    Raises:
        EnclaveError: It ended with an error.

    """
    found = json.loads(read_command(*arguments, "--json"))
    if not isinstance(found, dict):
        raise EnclaveError(f"pyenclave {arguments[0]} printed no object")
    return found


def build_image(
    folder: Path,
    name: str,
    *,
    key: bytes,
    vault: str,
    attestation: str,
    ca: str,
    debug: bool = False,
    more: str = "",
) -> Path:
    """
    Build and sign one build of the code.

    Args:
        folder: Where sources and image go.
        name: Name of the image's file.
        key: Signing key, PEM.
        vault: Address of the vault.
        attestation: Address of the attestation service.
        ca: PEM of the authority that signs the vault's certificate.
        debug: Whether it may be launched as debug.
        more: Lines that this build has besides.

    """
    place = folder / name
    place.mkdir()
    source = resources.files("pyenclave.demo.release").joinpath("released.py").read_text("utf-8")
    (place / "released.py").write_text(source + more)
    (place / "ca.pem").write_text(ca)
    manifest = place / "enclave.toml"
    text = _MANIFEST.format(
        vault=vault, attestation=attestation, debug="true" if debug else "false"
    )
    manifest.write_text(text)
    path = place / f"{name}.enclave"
    path.write_bytes(sign.sign(build.build(manifest), key))
    return path


def launch(
    image: Path, *, handlers: Mapping[str, Callable[..., Any]], debug: bool = False
) -> dict[str, float]:
    """
    Launch the image and have it score; its refusal is raised as what it said.

    Raises:
        EnclaveError: The enclave could not have its key, or could not start.

    """
    with pyenclave.Enclave(image, ocalls=handlers, debug=debug, quiet=True) as enclave:
        try:
            answer: dict[str, float] = enclave.call("score")
        except EcallError as error:
            raise EnclaveError(str(error)) from None
        return answer
