"""``pyenclave seal``, ``unseal``, ``info``: files and folders, by a key or the tool enclave."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyenclave._files import open_file
from pyenclave.cli import output

if TYPE_CHECKING:
    from pyenclave.cli._folders import Report
    from pyenclave.cli._sealers import Sealer

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001
    Sealers = Callable[[], contextlib.AbstractContextManager[Sealer]]

__all__ = [
    "SUFFIX",
    "add_commands",
    "add_key_options",
    "add_work_options",
    "bound_text",
    "common_options",
    "key_sealer",
    "report_folder",
    "say",
    "seal_path",
    "unseal_path",
]

SUFFIX = ".sealed"


def add_commands(subparsers: Subparsers) -> None:
    """Add ``seal``, ``unseal`` and ``info``."""
    seal = subparsers.add_parser(
        "seal",
        help="seal a file or a folder with a key, or to this user's tool enclave",
        description="With --key-file, who has the key opens the result, also in Python "
        "(pyenclave.open_sealed, fsspec). Without, who owns the state directory does. "
        "A folder that was begun is gone on with.",
    )
    _common(seal, f"default: PATH{SUFFIX}")
    seal.add_argument(
        "--policy",
        choices=("signer", "unique"),
        help="tool enclave: signer (default): also later versions of the tool open it; "
        "unique: only this build",
    )
    seal.add_argument(
        "--skip-special",
        action="store_true",
        help="folders: leave out links and special files, which are refused else",
    )
    seal.set_defaults(function=_seal)

    unseal = subparsers.add_parser("unseal", help="open a sealed file or folder")
    _common(unseal, f"default: PATH without {SUFFIX}; - is standard output")
    unseal.add_argument(
        "--no-list",
        action="store_true",
        help="folders: open what is there, though the list of what belongs to it is missing",
    )
    unseal.set_defaults(function=_unseal)

    info = subparsers.add_parser(
        "info", help="show the header of a sealed file; nothing is opened or verified"
    )
    info.add_argument("file", metavar="FILE")
    info.set_defaults(function=_info)


def add_key_options(command: argparse.ArgumentParser) -> None:
    """Add what chooses the key: ``--key-file``, ``--signing-key``, ``--aad``, ``--jobs``."""
    command.add_argument(
        "--key-file", metavar="FILE", help="a file of 32 random bytes: the key, without an enclave"
    )
    command.add_argument(
        "--signing-key",
        metavar="FILE",
        help="tool enclave: signed with this key (pyenclave keygen), not the state directory's",
    )
    add_work_options(command)


def add_work_options(command: argparse.ArgumentParser) -> None:
    """Add ``--aad`` and ``--jobs``."""
    command.add_argument(
        "--aad",
        "--name",
        metavar="TEXT",
        help="a name or other data, bound and not stored (the same when it is opened)",
    )
    command.add_argument("--jobs", metavar="N", type=int, help="files at a time")


def common_options(command: argparse.ArgumentParser, default: str) -> None:
    """Add ``PATH``, ``-o`` and ``--force``."""
    command.add_argument("file", metavar="PATH", help="a file or a folder")
    command.add_argument("-o", "--output", metavar="PATH", help=default)
    command.add_argument("--force", action="store_true", help="replace what is there")


def _common(command: argparse.ArgumentParser, default: str) -> None:
    common_options(command, default)
    add_key_options(command)


def bound_text(args: argparse.Namespace) -> bytes | None:
    """Return what ``--aad`` says, or None."""
    return None if args.aad is None else os.fsencode(args.aad)


def key_sealer(path: str, name: bytes | None) -> Sealer:
    """
    Return what seals with the key of a file.

    Raises:
        ValueError: It is no key file.

    """
    from pyenclave.cli._sealers import KeySealer
    from pyenclave.sealed._held import HeldKey, read_key_file

    key = HeldKey(read_key_file(path))
    if os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        output.note(f"others may read the key file {path} (chmod 600)")
    return KeySealer(key, name or b"")


@contextlib.contextmanager
def _sealer(args: argparse.Namespace, policy: str) -> Iterator[Sealer]:
    if args.key_file is not None:
        if args.signing_key is not None:
            raise ValueError("--signing-key is the tool enclave's; with --key-file there is none")
        yield key_sealer(args.key_file, bound_text(args))
        return
    from pyenclave.cli import _tool
    from pyenclave.cli._sealers import EnclaveSealer

    files = _tool.HostFiles()
    with _tool.tool_enclave(quiet=args.json, files=files, signing_key=args.signing_key) as enclave:
        yield EnclaveSealer(enclave, files, policy, bound_text(args))


def _jobs(args: argparse.Namespace, sealer: Sealer) -> int:
    return min(args.jobs or sealer.jobs, sealer.jobs)


def say(args: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    """Say what was done: *result* as JSON, or *text*."""
    if args.json:
        output.print_json(result)
    else:
        output.say(text)
    return 0


def report_folder(args: argparse.Namespace, report: Report, verb: str) -> int:
    """Say what became of a folder, and return the exit code."""
    from pyenclave.cli._bar import bytes_text

    result = report.as_json()
    if args.json:
        output.print_json(result)
        return report.exit_code
    for item in result["failed"]:
        output.note(f"{item['file']}: [{item['code']}] {item['message']}")
    for path in result["left_out"]:
        output.note(f"left out: {path}")
    text = f"{report.folder}: {report.done} files {verb}"
    if report.verified:
        text += f", {report.verified} were done before and compared"
    if report.kept:
        text += f", {report.kept} were done before by size and time (nothing here opens them)"
    if report.failed:
        text += f", {len(report.failed)} failed"
    rate = report.bytes / max(result["seconds"], 1e-3)
    output.say(f"{text}; {bytes_text(report.bytes)} at {bytes_text(rate)}/s")
    return report.exit_code


def _free(path: str, *, force: bool) -> str:
    """Refuse before any work is done; writing checks again."""
    from pyenclave.cli._targets import check_target

    check_target(path, force=force)
    return path


def _seal(args: argparse.Namespace) -> int:
    if args.key_file is not None and args.policy is not None:
        raise ValueError("--policy is the tool enclave's; a key opens wherever it is")
    policy = args.policy or "signer"
    target = args.output or args.file.rstrip("/") + SUFFIX
    code = seal_path(args, target, lambda: _sealer(args, policy), "sealed")
    if code is not None:
        return code
    size = os.stat(target).st_size
    how = "with a key" if args.key_file is not None else policy
    result = {"file": target, "size": size, "policy": None if args.key_file else policy}
    return say(args, result, f"{target}: {size} bytes, sealed ({how})")


def seal_path(args: argparse.Namespace, target: str, sealers: Sealers, verb: str) -> int | None:
    """
    Seal a file or folder.

    Args:
        args: Of the command: ``file``, ``jobs``, ``force``, ``skip_special``, ``json``.
        target: Where the result goes.
        sealers: Gives the sealer, once the arguments make sense.
        verb: What was done, in a word.

    Returns:
        The exit code of a folder, which was reported; None for a file, which was not.

    """
    from pyenclave.cli import _folders, _place
    from pyenclave.cli._bar import Bar
    from pyenclave.cli._targets import check_jobs
    from pyenclave.cli._tree import Tree

    check_jobs(args.jobs)
    if os.path.isdir(args.file):
        _folders.check_target(args.file, target)
        with sealers() as sealer:
            report = _folders.seal(
                sealer,
                args.file,
                target,
                jobs=_jobs(args, sealer),
                force=args.force,
                skip_special=args.skip_special,
            )
        return report_folder(args, report, verb)
    fd = open_file(args.file, pipes=True)
    try:
        _free(target, force=args.force)
        parent, name = os.path.split(os.path.abspath(target))
        with (
            Tree(parent) as tree,
            tree.folder("") as folder,
            sealers() as sealer,
            Bar(os.fstat(fd).st_size, 1) as bar,
        ):
            _place.sweep(folder)
            _place.seal_to(sealer, fd, folder, name, force=args.force, tick=bar.add)
    finally:
        os.close(fd)
    return None


def _target_of(args: argparse.Namespace) -> str:
    from pyenclave.errors import ArgumentError

    if args.output is not None:
        return str(args.output)
    path = args.file.rstrip("/")
    if not path.endswith(SUFFIX) or len(Path(path).name) == len(SUFFIX):
        raise ArgumentError(f"{path} does not end in {SUFFIX}: name the output with -o")
    return str(path.removesuffix(SUFFIX))


def _unseal(args: argparse.Namespace) -> int:
    from pyenclave.cli._sealers import check_form

    # Refused without launching anything.
    by_key = args.key_file is not None
    return unseal_path(
        args, lambda: _sealer(args, "signer"), lambda fd: check_form(fd, by_key=by_key), "opened"
    )


def unseal_path(
    args: argparse.Namespace, sealers: Sealers, check: Callable[[int], None], verb: str
) -> int:
    """
    Open a file or folder, and report it.

    Args:
        args: Of the command: ``file``, ``output``, ``jobs``, ``force``, ``no_list``, ``json``.
        sealers: Gives what opens it, once the arguments make sense.
        check: Refuses a file that it cannot open, by its descriptor.
        verb: What was done, in a word.

    Returns:
        The exit code.

    """
    from pyenclave.cli import _folders, _place
    from pyenclave.cli._bar import Bar
    from pyenclave.cli._targets import check_jobs
    from pyenclave.cli._tree import Tree
    from pyenclave.errors import ArgumentError

    check_jobs(args.jobs)
    if os.path.isdir(args.file):
        target = _target_of(args)
        if target == "-":
            raise ArgumentError("a folder does not go to standard output")
        _folders.check_target(args.file, target)
        with sealers() as sealer:
            report = _folders.unseal(
                sealer,
                args.file,
                target,
                jobs=_jobs(args, sealer),
                force=args.force,
                without_list=args.no_list,
            )
        return report_folder(args, report, verb)
    fd = open_file(args.file)
    try:
        check(fd)
        target = _target_of(args)
        if target == "-":
            if args.json:
                raise ArgumentError("standard output holds the JSON object: name a file with -o")
            with sealers() as sealer:
                sealer.open(fd, _to_stdout)
            return 0
        _free(target, force=args.force)
        parent, name = os.path.split(os.path.abspath(target))
        with (
            Tree(parent) as tree,
            tree.folder("") as folder,
            sealers() as sealer,
            Bar(os.fstat(fd).st_size, 1) as bar,
        ):
            _place.sweep(folder)
            size = _place.unseal_to(sealer, fd, folder, name, force=args.force, tick=bar.add)
    finally:
        os.close(fd)
    return say(args, {"file": target, "size": size}, f"{target}: {size} bytes")


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)


def _info(args: argparse.Namespace) -> int:
    from pyenclave.cli import _headers
    from pyenclave.errors import UnsealError

    try:
        result = _headers.describe(args.file)
    except IsADirectoryError:
        raise ValueError(f"{args.file} is a folder; name one of the files in it") from None
    except UnsealError as error:  # nothing was to be opened: the file is unreadable
        return output.report_error(error.code, str(error), as_json=args.json, exit_code=2)
    lines = [f"{args.file}: {result['form']}, {result['size']} bytes (header only, not verified)"]
    for name, value in result.items():
        if name in ("file", "form", "size", "verified") or value is None:
            continue
        shown = value.hex() if isinstance(value, bytes) else value
        if isinstance(value, dict):
            shown = f"{value['id'].hex()} at {value['value']}"
            shown += f", before {value['before'].hex()}" if "before" in value else ""
        lines.append(f"{name:<17} {shown}")
    return say(args, result, "\n".join(lines))
