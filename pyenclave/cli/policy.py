"""``pyenclave policy``: what a policy demands, in sentences and in Azure's languages."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyenclave._files import read_file
from pyenclave.cli import output, policy_signing
from pyenclave.cli.verify import moment, policy_of

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]


def add_commands(subparsers: Subparsers) -> None:
    """Add ``policy`` and its actions."""
    policy = subparsers.add_parser(
        "policy",
        help="explain or sign a policy; write a key's release policy from an image",
    )
    actions = policy.add_subparsers(dest="action", metavar="ACTION", required=True)
    explain = actions.add_parser("explain", help="say in sentences what a policy demands")
    explain.add_argument("policy", metavar="FILE|strict|permissive")
    explain.add_argument(
        "--at", metavar="RFC3339", help="say which reference values hold at this time"
    )
    explain.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="one JSON object on stdout",
    )
    explain.set_defaults(function=_explain)
    render = actions.add_parser(
        "render",
        help="say the same policy in Azure's languages",
        description="Prints an Azure Attestation policy, or with --authority a key-release policy "
        "for Key Vault. What a language cannot say is an error, never left out.",
    )
    render.add_argument("policy", metavar="FILE|strict|permissive")
    render.add_argument("--tee", required=True, choices=("sgx", "sevsnpvm", "tdxvm", "pyenclave"))
    render.add_argument(
        "--authority", metavar="URL", help="the attestation service: print a key-release policy"
    )
    render.add_argument(
        "--prefix",
        default="",
        metavar="NAMES.",
        help="before claims of a key-release policy: x-ms-isolation-tee. for tokens of guest "
        "attestation",
    )
    render.add_argument(
        "--at", metavar="RFC3339", help="for when, if reference values have validity windows"
    )
    render.set_defaults(function=_render)
    _add_from_image(actions)
    policy_signing.add_command(actions)


def _add_from_image(actions: Subparsers) -> None:
    made = actions.add_parser(
        "from-image",
        help="write the release policy of a key that only this image is to get",
        description="Writes a key-release policy (grammar 1.0.0, as Key Vault takes it) for "
        "enclaves of the image. By default exactly its measurement, not as debug, on a platform "
        "in a TEE.",
    )
    made.add_argument("image", metavar="IMAGE")
    made.add_argument(
        "--authority", metavar="URL", help="the attestation service whose tokens count"
    )
    which = made.add_mutually_exclusive_group()
    which.add_argument(
        "--measurement",
        action="store_true",
        help="this build and no other (default)",
    )
    which.add_argument(
        "--signer",
        action="store_true",
        help="any build of its signer and product, from --min-version on",
    )
    made.add_argument(
        "--min-version",
        type=int,
        metavar="N",
        help="with --signer: the lowest security version (default: the image's)",
    )
    made.add_argument(
        "--min-level", choices=("embedded", "service"), default="embedded", help="of the platform"
    )
    made.add_argument(
        "--dangerous-allow-software",
        action="store_true",
        help="release on platforms without TEE hardware too: whoever controls such a machine can "
        "forge its evidence",
    )
    made.add_argument(
        "--dangerous-allow-debug",
        action="store_true",
        help="release to debug launches too: whoever runs the machine reads their memory",
    )
    made.add_argument(
        "--azure-attestation-policy",
        action="store_true",
        help="write the policy of an attestation service instead, in Azure's policy language",
    )
    made.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    made.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="one JSON object on stdout",
    )
    made.set_defaults(function=_from_image)


def _render(args: argparse.Namespace) -> int:
    from pyenclave.attestation import azure_render

    policy = policy_of(args.policy)
    at = moment("--at", args.at)
    if args.authority is None:
        if args.prefix:
            raise ValueError("--prefix belongs to --authority")
        output.say(azure_render.attestation_policy(policy, tee=args.tee, at=at).rstrip())
        return 0
    made = azure_render.release_policy(
        policy, tee=args.tee, authority=args.authority, prefix=args.prefix, at=at
    )
    output.say(made.to_json().decode())
    return 0


def _explain(args: argparse.Namespace) -> int:
    policy = policy_of(args.policy)
    sentences = policy.describe(at=moment("--at", args.at))
    if args.json:
        output.print_json({"policy": policy.to_json(), "demands": sentences})
        return 0
    output.say("Evidence is accepted if all of this holds:")
    for sentence in sentences:
        output.say(f"- {output.line(sentence)}")
    return 0


def _from_image(args: argparse.Namespace) -> int:

    from pyenclave.attestation import AppraisalPolicy, azure_render
    from pyenclave.errors import AttestationError
    from pyenclave.formats.image import MAX_IMAGE, Image
    from pyenclave.image.build import write_image

    if args.azure_attestation_policy == (args.authority is not None):
        raise ValueError("give --authority URL, or --azure-attestation-policy without it")
    if args.min_version is not None and not args.signer:
        raise ValueError("--min-version goes with --signer: a measurement has one version")
    data = read_file(args.image, limit=MAX_IMAGE)
    if not Image.parse(data).signed and not args.dangerous_allow_debug:
        raise ValueError(
            f"{args.image} is not signed, so it launches only as debug, and this policy refuses "
            "debug: sign it first (pyenclave sign)"
        )
    options = {} if args.min_version is None else {"min_security_version": args.min_version}
    policy = AppraisalPolicy.from_image(
        data,
        any_version_of_signer=args.signer,
        min_level=args.min_level,
        allow_debug=args.dangerous_allow_debug,
        dangerous_allow_software=args.dangerous_allow_software,
        **options,
    )
    if args.azure_attestation_policy:
        text = azure_render.attestation_policy(policy, tee="pyenclave").rstrip()
    else:
        try:
            made = azure_render.release_policy(policy, tee="pyenclave", authority=args.authority)
        except AttestationError as error:
            raise ValueError(str(error)) from None
        text = made.to_json().decode()
    if args.output is not None:
        write_image(args.output, f"{text}\n".encode())
    if args.json:
        form = "azure" if args.azure_attestation_policy else "release"
        output.print_json({"image": args.image, "file": args.output, "form": form, "policy": text})
    else:
        output.say(text if args.output is None else f"{args.output}: {len(text) + 1} bytes")
    return 0
