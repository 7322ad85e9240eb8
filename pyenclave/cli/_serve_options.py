"""The options of ``pyenclave serve``: each service has its own, and knows whose the others are."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final, NoReturn

__all__ = ["SERVICES", "add_services"]

Subparsers = argparse._SubParsersAction  # noqa: SLF001 - what add_subparsers returns
_OF_ONE: Final = ("attestation", "vault", "identity")
SERVICES: Final[dict[str, tuple[str, str]]] = {
    "attestation": (
        "verify evidence, and issue tokens by policies, as Azure Attestation does",
        "--dev: on this machine, with the platform's root and an authority of its own. In "
        "production --config names a TOML file (docs/attestation-service.md).",
    ),
    "vault": (
        "keep keys and release them to attested code, as Azure Key Vault does",
        "--dev: on this machine; it knows the attestation services of its state directory. In "
        "production --config names a TOML file (docs/key-vault.md).",
    ),
    "identity": (
        "an issuer of bearer tokens and a managed-identity endpoint, for development only",
        "Tokens for the other services, and credentials for clients that ask for them.",
    ),
    "platform": (
        "keep this user's platform running, so that no program waits for its start",
        "It listens on a socket of the state directory (PYENCLAVE_STATE) only.",
    ),
}
# Name, the services that have it, and how it is read.
_OPTIONS: Final[tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...]] = (
    (
        "--dev",
        _OF_ONE,
        {
            "action": "store_true",
            "help": "for development: a port of this machine that is kept over restarts, an own "
            'authority, and one JSON line {"url", "ca", "token"} when it is ready; all --dev '
            "services of a state directory trust each other",
        },
    ),
    (
        "--config",
        ("attestation", "vault"),
        {"metavar": "FILE", "help": "settings of production, TOML"},
    ),
    ("--host", _OF_ONE, {"metavar": "ADDRESS", "help": "address to listen on"}),
    (
        "--port",
        _OF_ONE,
        {"type": int, "metavar": "N", "help": "port to listen on; 0 with --dev: any free one"},
    ),
    (
        "--database",
        ("attestation", "vault"),
        {"metavar": "URL", "help": "SQLAlchemy URL instead of the settings'"},
    ),
    (
        "--backend",
        ("vault",),
        {"metavar": "WHERE", "help": "where the keys live: enclave or pkcs11:…"},
    ),
    (
        "--tokens-once",
        ("vault",),
        {"action": "store_true", "help": "an attestation token releases a key once"},
    ),
    (
        "--allow-sha1",
        ("vault",),
        {
            "action": "store_true",
            "help": "also RSA-OAEP, RSA1_5 and CKM_RSA_AES_KEY_WRAP, which are OAEP with SHA-1 or "
            "weaker (setting allow_sha1)",
        },
    ),
    (
        "--root",
        ("attestation",),
        {
            "metavar": "FILE",
            "action": "append",
            "default": [],
            "help": "certificate of a further root that evidence may lead to; repeatable",
        },
    ),
    (
        "--collateral",
        ("attestation",),
        {
            "metavar": "WHERE",
            "help": "folder or bundle of the vendors' files, pccs:https://HOST, or intel",
        },
    ),
    (
        "--time",
        ("attestation",),
        {
            "metavar": "RFC3339",
            "help": "with --dev: judge evidence as of this time, for recorded evidence; every "
            "token says so",
        },
    ),
    (
        "--warm",
        ("platform",),
        {
            "metavar": "IMAGE",
            "action": "append",
            "default": [],
            "help": "an image or entry whose runtime is kept at hand; repeatable",
        },
    ),
)


class _OfAnother(argparse.Action):
    """An option that another service has: it is refused by its name, and not in the help."""

    def __init__(self, *args: Any, owners: tuple[str, ...], **options: Any) -> None:
        self._owners = owners
        super().__init__(*args, **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        del namespace, values
        service = parser.prog.rpartition(" ")[2]
        parser.error(
            f"serve {service} has no {option_string}; that is for serve {', '.join(self._owners)}"
        )


def add_services(
    serve: argparse.ArgumentParser, function: Callable[[argparse.Namespace], int]
) -> None:
    """Add the services, each with the options that it has."""
    services = serve.add_subparsers(dest="service", metavar="SERVICE", required=True)
    for name, (what, more) in SERVICES.items():
        service = services.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}. {more} It ends at SIGTERM or Ctrl-C.",
            allow_abbrev=False,
        )
        for option, owners, form in _OPTIONS:
            if name in owners:
                service.add_argument(option, **form)
                continue
            dest = option.removeprefix("--").replace("-", "_")
            plain = form.get("action") == "store_true"
            service.add_argument(
                option,
                action=_OfAnother,
                owners=owners,
                nargs=0 if plain else 1,
                help=argparse.SUPPRESS,
            )
            service.set_defaults(**{dest: False if plain else form.get("default")})
        service.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        service.set_defaults(function=function)
