"""
A key is released to one build of one program: ``python run.py``.

It starts an attestation service and a key vault for development (``pyenclave serve … --dev``),
makes a key that only the image of holder.py may have, encrypts two rows under it, and has them
opened; another image does not get it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

import pyenclave
from pyenclave.attestation import azure_render
from pyenclave.image import build, keys, sign
from pyenclave.vault_client import VaultClient

HERE = Path(__file__).parent


@contextlib.contextmanager
def served(name: str) -> Iterator[dict[str, str]]:
    """Run a development service; it says address, authority and a token in one line."""
    command = [sys.executable, "-m", "pyenclave", "serve", name, "--dev"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as service:
        try:
            yield json.loads(service.stdout.readline())
        finally:
            service.terminate()


def signed_image(name: str, vault: str, attestation: str, ca: str) -> bytes:
    """Build and sign the image; its measurement covers the addresses and the authority."""
    text = (HERE / "enclave.toml").read_text()
    text = text.replace("@VAULT@", vault).replace("@ATTESTATION@", attestation)
    manifest = HERE / f"{name}.toml"
    manifest.write_text(text.replace('"holder"', f'"{name}"'))
    (HERE / "ca.pem").write_text(Path(ca).read_text())
    return sign.sign(build.build(manifest), keys.keygen())


def main() -> None:
    with served("attestation") as attestation, served("vault") as service:
        where = service["url"], attestation["url"], service["ca"]
        image, other = signed_image("holder", *where), signed_image("other", *where)

        # The owner: a key for this image alone, as that attestation service says; then rows.
        code = pyenclave.AppraisalPolicy.from_image(image, dangerous_allow_software=True)
        policy = azure_render.release_policy(code, tee="pyenclave", authority=attestation["url"])
        options = {"ca": service["ca"], "verify_challenge_resource": False}
        with VaultClient(service["url"], service["token"], **options) as vault:
            key = vault.create_key(
                "rows", size=2048, operations=["wrapKey"], release_policy=policy.to_json()
            )
        scheme = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        rows = [key.public_key().encrypt(name, scheme) for name in (b"Ada", b"Grace")]

        # The host: relays, and never has the key.
        relay = pyenclave.relay(
            vault=service["url"],
            attestation=attestation["url"],
            credential=service["token"],
            **options,
        )
        with pyenclave.Enclave(image, ocalls=relay) as enclave:
            print("longest name:", enclave.longest_name(rows))
        with pyenclave.Enclave(other, ocalls=relay) as enclave:
            try:
                enclave.longest_name(rows)
            except pyenclave.errors.EcallError as error:
                fields = error.fields
                print(f"another image: {fields['check']}, {fields['error_code']}")


if __name__ == "__main__":
    main()
