"""``pyenclave encrypt`` and ``decrypt``: files and folders for whoever gets a key of a vault."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyenclave.cli.sealing import (
    SUFFIX,
    add_work_options,
    bound_text,
    common_options,
    report_folder,
    say,
    seal_path,
    unseal_path,
)

if TYPE_CHECKING:
    from pyenclave.cli._vault_sealers import VaultSealer

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]


def add_commands(subparsers: Subparsers) -> None:
    """Add ``encrypt`` and ``decrypt``."""
    encrypt = subparsers.add_parser(
        "encrypt",
        help="encrypt a file or a folder to a key of a vault",
        description="Only who may unwrap with the vault's key opens the result: enclaves to which "
        "the vault releases it (trusted.open_sealed), and pyenclave decrypt. A folder that was "
        "begun is gone on with. An RSA key needs its public half only; with --public-key nothing "
        "is asked.",
    )
    common_options(encrypt, f"default: PATH{SUFFIX}")
    _key_options(encrypt)
    encrypt.add_argument(
        "--public-key",
        metavar="FILE",
        help="the key's public half, JWK or PEM: no vault is asked; --key is its identifier",
    )
    encrypt.add_argument(
        "--algorithm",
        choices=("A128KW", "A192KW", "A256KW"),
        default="A256KW",
        help="for keys of type oct",
    )
    encrypt.add_argument(
        "--skip-special",
        action="store_true",
        help="folders: leave out links and special files, which are refused else",
    )
    encrypt.add_argument(
        "--rewrap",
        action="store_true",
        help="PATH is encrypted: in place, wrap its keys for --key (or its newest version) anew; "
        "the data is not touched",
    )
    encrypt.add_argument(
        "--old-key", metavar="URL", help="with --rewrap: the key until now (default: --key)"
    )
    encrypt.set_defaults(function=_encrypt)

    decrypt = subparsers.add_parser("decrypt", help="open what pyenclave encrypt made")
    common_options(decrypt, f"default: PATH without {SUFFIX}; - is standard output")
    _key_options(decrypt)
    decrypt.add_argument(
        "--no-list",
        action="store_true",
        help="folders: open what is there, though the list of what belongs to it is missing",
    )
    decrypt.set_defaults(function=_decrypt)


def _key_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--key",
        "--kid",
        metavar="URL",
        help="https://VAULT/keys/NAME[/VERSION]: without a version the newest encrypts, and each "
        "file's own decrypts",
    )
    command.add_argument(
        "--ca", metavar="FILE", help="the vault's authority, PEM, instead of the system's"
    )
    command.add_argument("--token-file", metavar="FILE", help="a bearer token for the vault")
    command.add_argument("--token-env", metavar="NAME", help="the variable that holds the token")
    command.add_argument(
        "--private-key", metavar="FILE", help="the RSA key whole, PEM: no vault is asked"
    )
    add_work_options(command)


@contextlib.contextmanager
def _sealer(args: argparse.Namespace, *, makes: bool) -> Iterator[VaultSealer]:
    from pyenclave.cli import _vault_sealers

    with _vault_sealers.opened_key(args) as key:
        sealer = _vault_sealers.VaultSealer(key, bound_text(args) or b"")
        if makes:
            sealer.prepare()
        yield sealer


def _encrypt(args: argparse.Namespace) -> int:
    from pyenclave.cli import _headers

    if args.rewrap:
        return _rewrap(args)
    if args.old_key is not None:
        raise ValueError("--old-key goes with --rewrap")
    target = args.output or args.file.rstrip("/") + SUFFIX
    code = seal_path(args, target, lambda: _sealer(args, makes=True), "encrypted")
    if code is not None:
        return code
    found = _headers.describe(target)
    result = {"file": target, "size": found["size"], "key": found["key"]}
    return say(args, result, f"{target}: {found['size']} bytes, encrypted to {found['key']}")


def _decrypt(args: argparse.Namespace) -> int:
    from pyenclave.cli._vault_sealers import check_encrypted

    return unseal_path(args, lambda: _sealer(args, makes=False), check_encrypted, "decrypted")


def _rewrap(args: argparse.Namespace) -> int:
    from pyenclave.cli import _vault_sealers
    from pyenclave.cli._targets import check_jobs
    from pyenclave.cli._tree import Tree
    from pyenclave.cli.resealing import reseal_folder
    from pyenclave.vault_client import split_key_url

    if args.output is not None or args.force or args.skip_special:
        raise ValueError("--rewrap works in place: no -o, --force or --skip-special")
    if args.public_key or args.private_key:
        raise ValueError("--rewrap asks the vault: no --public-key or --private-key")
    check_jobs(args.jobs)
    folder = os.path.isdir(args.file)
    parent, leaf = os.path.split(os.path.abspath(args.file))
    if not folder:
        with Tree(parent) as tree:
            fd = tree.open(leaf)
            try:
                _vault_sealers.check_encrypted(fd)
            finally:
                os.close(fd)
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(_vault_sealers.opened_key(args))
        before = args.old_key
        if before is None:
            vault, name, _ = split_key_url(args.key)
            before = f"{vault}/keys/{name}"
        old_args = argparse.Namespace(**vars(args) | {"key": before})
        old = stack.enter_context(_vault_sealers.opened_key(old_args))
        rewrapper = _vault_sealers.Rewrapper(old, new)
        if folder:
            return report_folder(args, reseal_folder(args, rewrapper), "wrapped anew")
        with Tree(parent) as tree:
            done = rewrapper.file(tree, leaf, lambda _: None, listing=False)
    text = "wrapped anew" if done else "was done before"
    return say(args, {"file": args.file, "rewrapped": done}, f"{args.file}: {text}")
