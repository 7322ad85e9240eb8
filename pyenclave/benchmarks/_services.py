"""
The server of the rows of services: an attestation service and a vault, on one processor.

As ``pyenclave serve --dev`` makes them, audit and TLS on, with the collateral of a synthetic Intel
platform. The vault's enclave, which the server starts, shares its processor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyenclave.formats import jose
from pyenclave.formats.jwk import public_members
from pyenclave.services import attestation, vault
from pyenclave.services.web.development import development
from pyenclave.services.web.limits import Limits
from pyenclave.services.web.run import Server, bound, settled, url_of
from pyenclave.testing.intel import IntelPlatform
from pyenclave.vault_client import AttestationClient, VaultClient

_UNLIMITED = Limits(rate=None)


def _served(stack: contextlib.ExitStack, name: str, folder: str, **changes: Any) -> tuple[str, Any]:
    """Serve a development service; return its address and what belongs to it."""
    sock = bound("127.0.0.1", 0)
    stack.callback(sock.close)
    url = url_of(sock, host="127.0.0.1")
    dev = development(name, folder, url=url, limits=_UNLIMITED)
    module = attestation if name == "attestation" else vault
    service = module.build(dev.config.replace(**changes))
    stack.enter_context(Server(service, sock=sock, tls=dev.config.tls))
    return url, dev


def _evidence(machine: IntelPlatform) -> dict[str, Any]:
    """Return a request of Azure's kind: a quote that binds a transfer key of RSA-2048."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    transfer = rsa.generate_private_key(65537, 2048).public_key()
    jwk = {**public_members(transfer), "kid": "transfer", "key_ops": ["encrypt"]}
    data = json.dumps({"keys": [jwk]}, sort_keys=True, separators=(",", ":")).encode()
    quote = machine.enclave_quote(report_data=hashlib.sha256(data).digest() + bytes(32))
    runtime = {"data": jose.b64url_encode(data), "dataType": "JSON"}
    return {"quote": jose.b64url_encode(quote), "runtimeData": runtime}


def serve() -> None:
    """Serve until stdin ends; what clients need is printed as one JSON line."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyenclave-bench-"))
        os.environ["PYENCLAVE_STATE"] = folder
        machine = IntelPlatform(datetime.now(UTC))
        collateral = Path(folder) / "collateral"
        collateral.mkdir()
        for name, data in machine.endorsements().items():
            (collateral / name).write_bytes(data)
        attesting, dev = _served(
            stack,
            "attestation",
            folder,
            platform_roots=(machine.root,),
            collateral=str(collateral),
            signing_algorithm="ES256",
        )
        keeping, _ = _served(stack, "vault", folder)
        ca = Path(dev.ca.path).read_text("ascii")
        token = dev.token()
        request = _evidence(machine)
        with AttestationClient(attesting, ca=ca) as client:
            answer = client.request(
                "POST", "/attest/SgxEnclave", request, what="token", repeatable=True
            )
        claims = jose.Jws.from_bytes(answer["token"]).claims()
        condition = {"claim": "x-ms-sgx-mrenclave", "equals": claims["x-ms-sgx-mrenclave"]}
        policy = {"version": "1.0.0", "anyOf": [{"authority": attesting, "allOf": [condition]}]}
        with VaultClient(keeping, token, ca=ca, verify_challenge_resource=False) as owner:
            owner.create_key("bench", "RSA-HSM", size=2048, release_policy=policy)
        told = {
            "attestation": attesting,
            "vault": keeping,
            "ca": ca,
            "token": token,
            "attest": json.dumps(request),
            "release": json.dumps({"target": answer["token"], "enc": "RSA_AES_KEY_WRAP_256"}),
        }
        stack.enter_context(settled())  # as `Server.run` does
        print(json.dumps(told), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    serve()
