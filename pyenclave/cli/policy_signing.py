"""``pyenclave policy sign``: what an isolated attestation service demands to change anything."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyenclave._files import read_file
from pyenclave.cli import output
from pyenclave.errors import ArgumentError, SignatureError

if TYPE_CHECKING:
    from pyenclave.formats import jose

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_command"]

_MAX_FILE = 1 << 20


def add_command(actions: Subparsers) -> None:
    """Add ``policy sign``."""
    sign = actions.add_parser(
        "sign",
        help="sign an upload for an isolated attestation service: a policy, or a change of signers",
        description="Prints the token that PUT /policies/TYPE, POST /policies/TYPE:reset, "
        "POST /certificates:add or POST /certificates:remove takes. Its signed header says which "
        "one: an attestation service takes it for nothing else, and once.",
    )
    what = sign.add_mutually_exclusive_group(required=True)
    what.add_argument("policy", nargs="?", metavar="FILE", help="a policy in Azure's language")
    what.add_argument("--reset", action="store_true", help="the type's policy is reset")
    what.add_argument("--add-signer", metavar="CERTIFICATE", help="PEM or DER: may sign, too")
    what.add_argument("--remove-signer", metavar="CERTIFICATE", help="PEM or DER: may not any more")
    sign.add_argument(
        "--type", metavar="TYPE", help="of a policy: SgxEnclave, SevSnpVm, TdxVm, PyEnclave …"
    )
    sign.add_argument("--key", required=True, metavar="FILE", help="a policy signer's key, PEM")
    sign.add_argument(
        "--certificate", required=True, metavar="FILE", help="that signer's certificate"
    )
    sign.add_argument("--algorithm", metavar="NAME", help="as PS256; default: what the key is for")
    sign.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    sign.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object on stdout"
    )
    sign.set_defaults(function=_sign)


def _key(path: str) -> jose.PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    try:
        key = serialization.load_pem_private_key(read_file(path, limit=_MAX_FILE), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path} cannot be read as a key: {error}") from None
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise SignatureError(f"{path}: a policy is signed with an RSA or EC key")
    return key


def _text(path: str) -> str:
    """Return a file's text as it is: reading as text would change the ends of its lines."""
    try:
        return read_file(path, limit=_MAX_FILE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            "a policy is text", expected="UTF-8", found=f"{path}: a wrong byte at {error.start}"
        ) from None


def _sign(args: argparse.Namespace) -> int:
    from pyenclave.image.build import write_image

    of_signers = args.add_signer is not None or args.remove_signer is not None
    if of_signers == (args.type is not None):
        raise ArgumentError(
            "--type TYPE names whose policy it is", expected="with FILE or --reset, not else"
        )
    certificate = read_file(args.certificate, limit=_MAX_FILE)
    token, use = _signers(args, certificate) if of_signers else _policy(args, certificate)
    if args.output is not None:
        write_image(args.output, token.encode("ascii"))
    if args.json:
        output.print_json({"use": use, "file": args.output, "upload": token})
    else:
        output.say(token if args.output is None else f"{args.output}: for {use}")
    return 0


def _policy(args: argparse.Namespace, certificate: bytes) -> tuple[str, str]:
    from pyenclave.attestation.azure_policy import read_policy
    from pyenclave.services.attestation.requests import ATTESTATION_TYPES
    from pyenclave.services.attestation.uploads import sign_policy

    if args.type not in ATTESTATION_TYPES:
        raise ArgumentError("--type", expected=", ".join(ATTESTATION_TYPES), found=args.type)
    text = None
    if args.policy is not None:
        text = _text(args.policy)
        read_policy(text)  # what the service would refuse is not signed
    token = sign_policy(
        text,
        kind=args.type,
        key=_key(args.key),
        certificate=certificate,
        algorithm=args.algorithm,
    )
    return token, f"policies/{'reset' if text is None else 'set'} {args.type}"


def _signer(path: str | None) -> bytes | None:
    return None if path is None else read_file(path, limit=_MAX_FILE)


def _signers(args: argparse.Namespace, certificate: bytes) -> tuple[str, str]:
    from pyenclave.services.attestation.uploads import sign_certificate

    token = sign_certificate(
        _signer(args.add_signer),
        removed=_signer(args.remove_signer),
        key=_key(args.key),
        certificate=certificate,
        algorithm=args.algorithm,
    )
    return token, f"certificates/{'remove' if args.add_signer is None else 'add'}"
