"""
The director of ``demo --services``: one key, from its creation to its release and its refusals.

Owner and operator are identities of the development issuer. Vault and attestation service are
processes that anybody can start with ``pyenclave serve``; whatever a command of ``pyenclave`` does
is done by that command. The director plays the host, too: it relays messages and has no key.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

import pyenclave
from pyenclave import image as images
from pyenclave.demo import _starting, data
from pyenclave.demo.release import parts
from pyenclave.errors import EnclaveError
from pyenclave.formats import jose, jsonstrict
from pyenclave.services.identity.issuer import ADMINISTRATOR, DevIssuer
from pyenclave.vault_client import VaultClient

__all__ = ["run"]

Say = Callable[[str], None]

_KEY: Final = "applicants"
_RELEASE_USER: Final = "08bbd89e-9f13-488c-ac41-acfcb10c90ab"
_CRYPTO_OFFICER: Final = "14b46e9e-c2b7-41b4-b07b-48a6ebf60603"
_OPERATOR: Final = "de0e0000-0000-4000-8000-00000000000b"
_OFFICER: Final = "de0e0000-0000-4000-8000-00000000000c"
_STRANGER: Final = "de0e0000-0000-4000-8000-00000000000d"


class _World:
    """What every step of the demo uses."""

    def __init__(self, folder: Path, vault: parts.Service, attestation: parts.Service) -> None:
        self.folder = folder
        self.vault = vault
        self.attestation = attestation
        self.ca = Path(vault.ca).read_text("ascii")
        self.issuer = DevIssuer(os.environ["PYENCLAVE_STATE"])
        self.signer = images.keygen()
        self.owner = VaultClient(vault.url, vault.token, ca=self.ca, **_ANYWHERE)
        self.tokens: list[str] = []

    def client(self, object_id: str) -> VaultClient:
        """Return a client of the vault with another identity."""
        token = self.issuer.token(object_id=object_id)
        return VaultClient(self.vault.url, token, ca=self.ca, **_ANYWHERE)

    def build(self, name: str, **options: Any) -> Path:
        """Build a build of the code."""
        return parts.build_image(
            self.folder,
            name,
            key=self.signer,
            vault=self.vault.url,
            attestation=self.attestation.url,
            ca=self.ca,
            **options,
        )

    def handlers(self, object_id: str = _OPERATOR) -> dict[str, Callable[..., Any]]:
        """Return the host's part: the relay, with *object_id*'s right to ask, and the files."""
        relayed = pyenclave.relay(
            vault=self.vault.url,
            attestation=self.attestation.url,
            credential=self.issuer.token(object_id=object_id),
            ca=self.ca,
            **_ANYWHERE,
        )
        (name,) = relayed

        def listening(*arguments: Any) -> Any:
            """Carry a message, and keep its token: a host can."""
            answer = relayed[name](*arguments)
            body = arguments[5]
            if b'"target"' in body:
                self.tokens.append(jsonstrict.object_of(body, "request")["target"])
            return answer

        lent = pyenclave.lend_files(
            table=self.folder / "table.sealed", model=self.folder / "model.sealed"
        )
        return {name: listening, **lent}


# A development vault is not under vault.azure.net, whose name its challenge has.
_ANYWHERE: Final[dict[str, Any]] = {"verify_challenge_resource": False}


def run(*, say: Say, progress: Say) -> dict[str, Any]:
    """
    Run the demo and return its summary.

    Args:
        say: Called with each line for people.
        progress: Called with what is being done now.

    Returns:
        ``released`` (what the enclave found), ``attempts`` (name, outcome and reference id of each
        that must not get the key), ``audit`` (rows, and whether the log is intact), ``seconds``.

    """
    started = time.monotonic()
    if missing := [name for name in ("sqlalchemy", "uvicorn") if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f'the services need {", ".join(missing)}: pip install "pyenclave[demo,services]"',
            name=missing[0],
        )
    data.check()
    with ExitStack() as stack:
        folder = stack.enter_context(_starting.folder())
        before = os.environ.get("PYENCLAVE_STATE")
        stack.callback(_restore, "PYENCLAVE_STATE", before)
        os.environ["PYENCLAVE_STATE"] = str(folder / "state")
        progress("starting an attestation service and a key vault")
        services = stack.enter_context(ExitStack())
        attestation = parts.start_service(services, "attestation")
        vault = parts.start_service(services, "vault", "--tokens-once")
        say(f"attestation {attestation.url}\nvault       {vault.url}")
        world = _World(folder, vault, attestation)
        released = _main_job(world, say, progress)
        attempts = _attempts(world, say, progress)
        services.close()  # which signs the logs as far as they go
        audit = _audit(say, progress)
        return {
            "released": released,
            "attempts": attempts,
            "audit": audit,
            "seconds": round(time.monotonic() - started, 2),
        }


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _main_job(world: _World, say: Say, progress: Say) -> dict[str, float]:
    """Encrypt as the owner does, grant, launch, and have the enclave get its key."""
    progress("building the image, and the policy of its key")
    image = world.build("scoring")
    policy = world.folder / "policy.json"
    parts.run_command(
        "policy",
        "from-image",
        str(image),
        "--authority",
        world.attestation.url,
        "--dangerous-allow-software",  # a laptop; leave it out where there is a TEE
        "-o",
        str(policy),
    )
    # The vault itself decrypts for nobody: a token of the vault must not be as good as the proof.
    key = world.owner.create_key(
        _KEY,
        "RSA-HSM",
        size=3072,
        operations=["wrapKey"],
        release_policy=policy.read_bytes(),
        immutable=True,
    )
    say(f"key         {key.kid}\n            released to this build only, for ever")
    for principal, role in ((_OPERATOR, _RELEASE_USER), (_OFFICER, _CRYPTO_OFFICER)):
        _grant(world, principal, role)
    progress("encrypting what the owner has")
    table, _ = data.load(planted=8)
    model = data.train(table)
    known = {
        "table": table.matrix(),
        "model": model.matrix(),
    }
    token = world.folder / "token"
    token.write_text(world.vault.token)
    for name, values in known.items():
        out = BytesIO()
        np.save(out, values, allow_pickle=False)
        plain = world.folder / f"{name}.npy"
        plain.write_bytes(out.getvalue())
        sealed = world.folder / f"{name}.sealed"
        parts.run_command(
            "encrypt",
            str(plain),
            "--key",
            f"{world.vault.url}/keys/{_KEY}",
            "--ca",
            world.vault.ca,
            "--token-file",
            str(token),
            "-o",
            str(sealed),
        )
        plain.unlink()
        say(f"encrypted   {sealed.name}: {sealed.stat().st_size:,} bytes")
    progress("launching: evidence, token, release, key inside")
    found = parts.launch(image, handlers=world.handlers())
    say(
        f"released    inside only: {int(found['applicants']):,} applicants scored, "
        f"{found['accuracy']:.1%} right"
    )
    expected = np.mean((model.score(table.features) > 0.5) == (table.labels > 0.5))
    if found["applicants"] != len(table.labels) or abs(found["accuracy"] - expected) > 1e-9:
        raise EnclaveError("the enclave computed something else", expected=expected, found=found)
    return found


def _grant(world: _World, principal: str, role: str) -> None:
    path = f"/keys/{_KEY}/providers/Microsoft.Authorization/roleAssignments/{uuid.uuid4()}"
    definition = f"Microsoft.KeyVault/providers/Microsoft.Authorization/roleDefinitions/{role}"
    properties = {"roleDefinitionId": definition, "principalId": principal}
    world.owner.request("PUT", path, {"properties": properties}, what="role assignment")


def _attempts(world: _World, say: Say, progress: Say) -> list[dict[str, str]]:
    """Try what must not get the key; each attempt says how it ended."""
    found = []
    for name, what in (
        ("another build", _another_build),
        ("debug launch", _debug_launch),
        ("replayed token", _replayed_token),
        ("unauthorised identity", _stranger),
        ("changed policy", _changed_policy),
    ):
        progress(name)
        try:
            outcome, why = what(world), "it got through"
        except EnclaveError as error:
            outcome, why = "refused", " ".join(str(error).split())
        say(f"{outcome:<11} {name}: {_briefly(why)}")
        found.append({"name": name, "outcome": outcome, "reason": why})
    return found


def _briefly(why: str) -> str:
    """Return what a refusal says, without the words around it."""
    return why.removeprefix("the trusted function raised PublicError: ")[:150]


def _another_build(world: _World) -> str:
    image = world.build("other", more="\n# one line more, signed with the same key\n")
    parts.launch(image, handlers=world.handlers())
    return "succeeded"


def _debug_launch(world: _World) -> str:
    image = world.build("debuggable", debug=True)
    parts.launch(image, handlers=world.handlers(), debug=True)
    return "succeeded"


def _replayed_token(world: _World) -> str:
    """Show the token again that the enclave used; the host saw it pass."""
    with world.client(_OPERATOR) as client:
        client.release(_KEY, world.tokens[0], enc="RSA_AES_KEY_WRAP_256")
    return "succeeded"


def _stranger(world: _World) -> str:
    parts.launch(world.folder / "scoring" / "scoring.enclave", handlers=world.handlers(_STRANGER))
    return "succeeded"


def _changed_policy(world: _World) -> str:
    """An officer who may change keys tries to let everybody have this one."""
    with world.client(_OFFICER) as client:
        key = client.get_key(_KEY)
        policy = {
            "version": "1.0.0",
            "anyOf": [
                {
                    "authority": world.attestation.url,
                    "allOf": [{"claim": "x-ms-attestation-type", "equals": "pyenclave"}],
                }
            ],
        }
        encoded = jose.b64url_encode(json.dumps(policy).encode())
        body = {"release_policy": {"contentType": "application/json", "data": encoded}}
        client.request("PATCH", f"/keys/{_KEY}/{key.version}", body, what="key")
    return "succeeded"


def _audit(say: Say, progress: Say) -> dict[str, Any]:
    """Follow the key through the logs of both services, as a reviewer does."""
    progress("reading the audit logs")
    say("")
    told = parts.read_command("audit", "follow", _KEY, "--brief")
    for identity, name in _NAMES.items():
        told = told.replace(identity, name)
    say(told.rstrip("\n"))
    found = parts.run_command("audit", "follow", _KEY)
    rows = [{**item, **item["facts"]} for item in found["happenings"]]
    return {"rows": rows, "intact": found["holds"] is True, "summary": found["summary"]}


_NAMES: Final = {
    ADMINISTRATOR: "owner",
    _OPERATOR: "operator",
    _OFFICER: "officer",
    _STRANGER: "stranger",
}
