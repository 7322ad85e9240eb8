"""``pyenclave reseal``: sealed files under another key, signer, policy or version, in place."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from pyenclave.cli import output
from pyenclave.cli.sealing import add_key_options, bound_text, key_sealer, report_folder

if TYPE_CHECKING:
    from pyenclave.cli._folders import Report
    from pyenclave.cli._sealers import Sealer
    from pyenclave.cli._tree import Tree
    from pyenclave.formats import wrapped

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["Resealer", "add_commands", "replace_envelope", "reseal_folder"]


def add_commands(subparsers: Subparsers) -> None:
    """Add ``reseal``."""
    reseal = subparsers.add_parser(
        "reseal",
        help="seal files anew: for another key, signer, policy or security version",
        description="In place: each file is the old one or the new one at any moment. What was "
        "done before an interruption is not done again. With a key, files are written anew; of the "
        "tool enclave's only the envelope of a file's key is.",
    )
    reseal.add_argument("file", metavar="PATH", help="a sealed file, or a folder of them")
    add_key_options(reseal)
    reseal.add_argument("--new-key-file", metavar="FILE", help="with --key-file: the other key")
    reseal.add_argument(
        "--new-signing-key", metavar="FILE", help="tool enclave: the signer from now on"
    )
    reseal.add_argument(
        "--policy", choices=("signer", "unique"), help="tool enclave: default as it was"
    )
    reseal.add_argument(
        "--dry-run",
        action="store_true",
        help="change nothing: name what an upgrade of code, signer or version makes unreadable",
    )
    reseal.add_argument(
        "--image", metavar="FILE", help="with --dry-run: whether this image will open them"
    )
    reseal.set_defaults(function=_reseal)


class Resealer(Protocol):
    """Seals one file anew; the file is the only one of its name that anybody sees."""

    jobs: int

    def file(self, tree: Tree, path: str, tick: Callable[[int], None], *, listing: bool) -> bool:
        """Seal a file anew; False if that was done before."""


class _ByKey:
    """From one key to another: the content is written anew, with the file's own id."""

    def __init__(self, old: Sealer, new: Sealer) -> None:
        self._old, self._new = old, new
        self.jobs = old.jobs

    def file(self, tree: Tree, path: str, tick: Callable[[int], None], *, listing: bool) -> bool:
        from pyenclave.cli import _place, _sealers
        from pyenclave.errors import UnsealError

        assert isinstance(self._old, _sealers.KeySealer)
        assert isinstance(self._new, _sealers.KeySealer)
        parent, _, name = path.rpartition("/")
        fd = tree.open(path)
        try:
            _sealers.check_form(fd, by_key=True)
            try:
                old = self._old.reader(fd, listing=listing)
            except UnsealError:
                self._new.reader(fd, listing=listing).close()  # done before, or neither key's
                return False
            with old, tree.folder(parent) as folder:
                mode = os.fstat(fd).st_mode & 0o700
                with _place.aside(folder, name, force=True, executable=bool(mode & 0o100)) as new:
                    self._new.copy(old, new, tick, listing=listing)
        finally:
            os.close(fd)
        return True


def replace_envelope(
    fd: int, folder: int, name: str, old: wrapped.Envelope, new: wrapped.Envelope
) -> None:
    """
    Put another envelope in front of a file: the new one is durable before the old one is erased.

    Args:
        fd: The file as it was read.
        folder: Descriptor of its folder.
        name: Its name there.
        old: The envelope that counts.
        new: The one that is to count.

    Raises:
        OSError: Another file has that name now, or it cannot be written.

    """
    from pyenclave.cli import _sealers

    both = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        if not os.path.samestat(os.fstat(both), os.fstat(fd)):
            raise OSError(16, "the file was replaced meanwhile", name)
        _sealers.write_envelope(both, new)
        _sealers.erase_place(both, old)
    finally:
        os.close(both)


class _ByEnclave:
    """
    From one envelope to another: the content stays as it is.

    The new envelope goes to the head's other place, durably, before the old one is erased.
    """

    def __init__(self, rewrap: Callable[[bytes, bool, str], bytes], blob: Any, policy: str | None):
        from pyenclave.cli import _tool

        self.jobs = _tool.THREADS
        self._rewrap = rewrap
        self._blob = blob
        self._policy = policy

    def _policy_of(self, key_policy: int) -> str:
        from pyenclave.sealed.policy import SealPolicy

        return self._policy or SealPolicy(key_policy).name

    def file(self, tree: Tree, path: str, tick: Callable[[int], None], *, listing: bool) -> bool:
        from pyenclave.cli import _place, _sealers, _tool
        from pyenclave.formats import wrapped
        from pyenclave.formats.sealed import split

        fd = tree.open(path)
        try:
            _sealers.check_form(fd, by_key=False)
            tick(os.fstat(fd).st_size)
            parent, _, name = path.rpartition("/")
            with tree.folder(parent) as folder:
                if _sealers.form_of(fd) == "blob":
                    blob = _sealers.read_all(fd, _tool.LIMIT + 4096)
                    made = self._blob(blob, self._policy_of(split(blob)[0].key_policy))
                    with _place.aside(folder, name, force=True) as new:
                        _place.write_all(new, made)
                    return True
                old = wrapped.newest(os.pread(fd, wrapped.HEAD_SIZE, 0))
                policy = self._policy_of(old.header.key_policy)
                made = self._rewrap(old.blob, listing, policy)
                replace_envelope(fd, folder, name, old, wrapped.Envelope(old.generation + 1, made))
        finally:
            os.close(fd)
        return True


def _kept_signer() -> Exception:
    from pyenclave.errors import ArgumentError

    return ArgumentError(
        "a blob keeps its signer",
        advice="Open it with unseal, and seal it with --signing-key.",
    )


def _check_keys(args: argparse.Namespace) -> bool:
    """Refuse keys that do not go together, or are none; return whether there is no enclave."""
    from pyenclave.cli import _tool

    if args.key_file is None and args.new_key_file is None:
        for path in (args.signing_key, args.new_signing_key):
            if path is not None:
                _tool.check_key(path)
        return False
    if args.key_file is None or args.new_key_file is None:
        raise ValueError("--key-file and --new-key-file go together")
    if args.signing_key or args.new_signing_key or args.policy:
        raise ValueError("signing keys and --policy are the tool enclave's")
    return True


@contextlib.contextmanager
def _resealer(args: argparse.Namespace) -> Iterator[Resealer]:
    from pyenclave.cli import _sealers, _tool

    bound = bound_text(args)
    if args.key_file is not None:
        yield _ByKey(key_sealer(args.key_file, bound), key_sealer(args.new_key_file, bound))
        return
    text = (b"", False) if bound is None else (bound, True)
    with contextlib.ExitStack() as stack:
        enclave = stack.enter_context(
            _tool.tool_enclave(quiet=args.json, signing_key=args.signing_key)
        )

        def call(name: str, *values: Any) -> Any:
            with _sealers.as_unseal():
                return enclave.call(name, *values)

        if args.new_signing_key is None:

            def rewrap(envelope: bytes, listing: bool, policy: str) -> bytes:
                made: bytes = call("rewrap", envelope, policy, *text, listing)
                return made

            def blob(data: bytes, policy: str) -> bytes:
                made: bytes = call("reseal_blob", data, policy, *text)
                return made

        else:
            other = stack.enter_context(
                _tool.tool_enclave(quiet=args.json, signing_key=args.new_signing_key)
            )
            public, report = other.call("introduce", call("target"))

            def rewrap(envelope: bytes, listing: bool, policy: str) -> bytes:
                sent = call("hand_over", envelope, *text, listing, public, report)
                with _sealers.as_unseal():
                    made: bytes = other.call("take_over", sent, policy, *text, listing)
                return made

            def blob(data: bytes, policy: str) -> bytes:
                raise _kept_signer()

        yield _ByEnclave(rewrap, blob, args.policy)


def _reseal(args: argparse.Namespace) -> int:
    if args.dry_run:
        from pyenclave.cli import _upgrade

        return _upgrade.dry_run(args)
    if args.image is not None:
        raise ValueError("--image goes with --dry-run")
    from pyenclave.cli import _place, _sealers
    from pyenclave.cli._targets import check_jobs
    from pyenclave.cli._tree import Tree

    by_key = _check_keys(args)
    check_jobs(args.jobs)
    if os.path.isdir(args.file):
        with _resealer(args) as resealer:
            return report_folder(args, reseal_folder(args, resealer), "sealed anew")
    parent, name = os.path.split(os.path.abspath(args.file))
    with contextlib.ExitStack() as stack:
        tree = stack.enter_context(Tree(parent))
        folder = stack.enter_context(tree.folder(""))
        fd = tree.open(name)
        try:
            _sealers.check_form(fd, by_key=by_key)
            if args.new_signing_key is not None and _sealers.form_of(fd) == "blob":
                raise _kept_signer()
        finally:
            os.close(fd)
        resealer = stack.enter_context(_resealer(args))
        _place.sweep(folder)
        done = resealer.file(tree, name, lambda _: None, listing=False)
    result = {"file": args.file, "resealed": done, "size": os.stat(args.file).st_size}
    if args.json:
        output.print_json(result)
    else:
        output.say(f"{args.file}: {'sealed anew' if done else 'was done before'}")
    return 0


def reseal_folder(args: argparse.Namespace, resealer: Resealer) -> Report:
    """Seal the files of a folder anew, in place, and its list last."""
    from pyenclave.cli import _folders
    from pyenclave.cli._bar import Bar
    from pyenclave.cli._tree import Tree
    from pyenclave.errors import EnclaveError

    report = _folders.Report(args.file)
    with Tree(args.file) as tree:
        tree.lock()
        _folders.sweep(tree)
        found = tree.scan()
        files = [item for item in found.files if item.path.endswith(_folders.SUFFIX)]
        report.left_out = [
            item.path for item in found.files if item not in files and item.path != _folders.LIST
        ] + found.special
        bar = Bar(sum(item.size for item in files), len(files))

        def work(item: Any, tick: Callable[[int], None]) -> None:
            bar.next(item.path)
            try:
                done = resealer.file(tree, item.path, tick, listing=False)
                report.add(size=item.size, verified=not done)
            except (EnclaveError, OSError) as error:
                report.fail(item.path, error)
            bar.end_file()

        with bar:
            jobs = min(args.jobs or resealer.jobs, resealer.jobs)
            _folders.run(sorted(files, key=lambda item: -item.size), work, jobs=jobs, bar=bar)
        # Last: as long as the list opens as before, it says that there is work left.
        if not report.failed and tree.exists(_folders.LIST):
            try:
                resealer.file(tree, _folders.LIST, lambda _: None, listing=True)
            except (EnclaveError, OSError) as error:
                report.fail(_folders.LIST, error)
    return report
