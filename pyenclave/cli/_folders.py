"""
Folders: sealed file by file, with a list of what belongs to them.

The list is itself a sealed file, ``.pyenclave-list``: which files there are, and each one's id.
With it a file that is missing, exchanged for another of the same folder, or added is found. Work
that was interrupted goes on where it was: what is finished is opened and compared, everything else
is redone.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from pyenclave._locks import Lock
from pyenclave.cli import _place
from pyenclave.cli._bar import Bar
from pyenclave.cli._listing import LIST, ListedFile, Listing, list_text, parse_list
from pyenclave.cli._sealers import Recognizer, Sealer, from_descriptor
from pyenclave.cli._tree import Found, Tree
from pyenclave.errors import ArgumentError, EnclaveError, SealingError, UnsealError

__all__ = [
    "LIST",
    "SUFFIX",
    "Listing",
    "Report",
    "read_list",
    "run",
    "seal",
    "sweep",
    "unseal",
    "write_list",
]

SUFFIX: Final = ".sealed"
_MAX_LIST: Final = 1 << 30  # bytes

T = TypeVar("T")


class _StoppedError(Exception):
    """The command was interrupted."""


@dataclass(slots=True)
class Report:
    """What was done: the JSON object of the command."""

    folder: str
    done: int = 0
    verified: int = 0
    kept: int = 0
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    refused: bool = False
    _lock: Lock = field(default_factory=Lock)
    _start: float = field(default_factory=time.monotonic)

    def add(self, *, size: int, verified: bool = False, kept: bool = False) -> None:
        """Count a file: done now, compared with one that is there, or kept by its looks."""
        with self._lock:
            self.bytes += size
            if kept:
                self.kept += 1
            elif verified:
                self.verified += 1
            else:
                self.done += 1

    def fail(self, path: str, error: Exception) -> None:
        """Note a file that was not done."""
        code = error.code if isinstance(error, EnclaveError) else "unreadable"
        text = str(error) if not isinstance(error, OSError) else error.strerror or str(error)
        with self._lock:
            self.failed.append({"file": path, "code": code, "message": text})
            self.refused |= isinstance(error, SealingError)

    @property
    def exit_code(self) -> int:
        """0, or 1 where something was refused, or 2 where something could not be read."""
        return (1 if self.refused else 2) if self.failed else 0

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        self.failed.sort(key=lambda item: item["file"])
        return {
            "folder": self.folder,
            "done": self.done,
            "verified": self.verified,
            **({"kept": self.kept} if self.kept else {}),
            "bytes": self.bytes,
            "left_out": self.left_out,
            "failed": self.failed,
            "seconds": round(time.monotonic() - self._start, 3),
        }


def run(
    items: Iterable[T], work: Callable[[T, Callable[[int], None]], None], *, jobs: int, bar: Bar
) -> None:
    """
    Do *work* for each item, several at a time; an interruption ends all of them.

    Args:
        items: What is to be done.
        work: Does one; the function that it is given is called with bytes that are done.
        jobs: How many at a time.
        bar: Shows them.

    """
    stop = threading.Event()

    def tick(count: int) -> None:
        if stop.is_set():
            raise _StoppedError
        bar.add(count)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, item, tick) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


def check_special(found: Found, where: str, *, skip: bool) -> list[str]:
    """
    Refuse links and special files, all of them by name, before anything is done.

    Raises:
        ArgumentError: There are some, and they are not to be left out.

    """
    if found.special and not skip:
        names = ", ".join(repr(name) for name in found.special[:5])
        more = f" and {len(found.special) - 5} more" if len(found.special) > 5 else ""
        raise ArgumentError(
            f"{where} has links or special files, which are not sealed",
            found=names + more,
            advice="Remove them, or leave them out with --skip-special.",
        )
    return found.special


def _apart(source: str, target: str) -> None:
    """Refuse one folder within the other."""
    a, b = os.path.realpath(source), os.path.realpath(target)
    if os.path.commonpath([a, b]) in (a, b):
        raise ArgumentError("one folder lies within the other", expected="two apart", found=target)


def check_target(source: str, target: str) -> None:
    """
    Refuse before any work what no folder can be put to; `seal` and `unseal` check again.

    Raises:
        ArgumentError: One of them lies within the other.
        OSError: Something else is there.

    """
    _apart(source, target)
    if os.path.lexists(target) and not os.path.isdir(target):
        raise NotADirectoryError(20, "it is no folder", target)


def _check_extra(out: Tree, planned: set[str]) -> None:
    """Refuse a target with other sealed files: they would not be on its list."""
    extra = [item.path for item in out.scan().files if item.path not in planned | {LIST}]
    extra = [path for path in extra if path.endswith(SUFFIX)]
    if extra:
        raise ArgumentError(
            f"{out.path} holds sealed files of other origin",
            found=", ".join(map(repr, extra[:5])),
            advice="Remove them, or take another target.",
        )


def sweep(tree: Tree) -> None:
    """Remove what commands that were killed left behind. The caller has the folder's lock."""
    for path in ("", *tree.scan().folders):
        with tree.folder(path) as folder:
            _place.sweep(folder, alone=True)


def write_list(sealer: Sealer, tree: Tree, listing: Listing) -> None:
    """Put the list into its place."""
    text = list_text(listing)
    # Names and ids are no secret: they are on the disk beside it.
    with tempfile.TemporaryFile() as file:
        file.write(text)
        file.flush()
        file.seek(0)
        with tree.folder("") as folder, _place.aside(folder, LIST, force=True) as fd:
            sealer.seal(from_descriptor(file.fileno(), lambda _: None), fd, listing=True)


def read_list(sealer: Sealer, tree: Tree) -> Listing | None:
    """
    Return the list, or None where there is none.

    Raises:
        UnsealError: It is not authentic, or no list.
        ArgumentError: It leads out of the folder.

    """
    try:
        fd = tree.open(LIST)
    except FileNotFoundError:
        return None
    try:
        text = _place.content_of(sealer, fd, _MAX_LIST, listing=True)
    finally:
        os.close(fd)
    return parse_list(text)


def seal(
    sealer: Sealer, source: str, target: str, *, jobs: int, force: bool, skip_special: bool
) -> Report:
    """
    Seal a folder into another one.

    Raises:
        ArgumentError: There is what cannot be sealed, or the folders overlap.

    """
    _apart(source, target)
    report = Report(target)
    with Tree(source) as tree:
        found = tree.scan()
        report.left_out = check_special(found, source, skip=skip_special)
        os.makedirs(target, 0o700, exist_ok=True)
        listing = Listing(1, {}, found.folders)
        with Tree(target) as out:
            out.lock()
            sweep(out)
            _check_extra(out, {item.path + SUFFIX for item in found.files})
            for path in found.folders:
                with out.folder(path, make=True):
                    pass
            bar = Bar(sum(item.size for item in found.files), len(found.files))

            def work(item: Any, tick: Callable[[int], None]) -> None:
                bar.next(item.path)
                try:
                    entry = _seal_one(sealer, tree, out, item, force, tick, report)
                    listing.files[item.path] = entry
                except (EnclaveError, OSError) as error:
                    report.fail(item.path, error)
                bar.end_file()

            with bar:
                run(_long_first(found.files), work, jobs=jobs, bar=bar)
            if not report.failed:
                listing.files = dict(sorted(listing.files.items()))
                write_list(sealer, out, listing)
    return report


def _long_first(files: list[Any]) -> list[Any]:
    return sorted(files, key=lambda item: -item.size)


def _recognised(
    sealer: Sealer, there: int, source: int, tick: Callable[[int], None]
) -> tuple[bytes | None, bool]:
    """Return the id of the file that is there if it is what is wanted, and if by its looks only."""
    if isinstance(sealer, Recognizer):
        return sealer.recognised(there, source, tick)
    return _place.compare(sealer, there, from_descriptor(source, tick)), False


def _seal_one(
    sealer: Sealer,
    tree: Tree,
    out: Tree,
    item: Any,
    force: bool,
    tick: Callable[[int], None],
    report: Report,
) -> ListedFile:
    parent, _, name = item.path.rpartition("/")
    source = tree.open(item.path)
    try:
        made: bytes | None = None
        size = item.size
        kept = False
        with out.folder(parent) as folder:
            if out.exists(item.path + SUFFIX):
                with contextlib.ExitStack() as stack:
                    there = out.open(item.path + SUFFIX)
                    stack.callback(os.close, there)
                    made, kept = _recognised(sealer, there, source, tick)
                os.lseek(source, 0, os.SEEK_SET)
            if made is not None:
                report.add(size=size, verified=True, kept=kept)
            else:
                made, size = _place.seal_to(
                    sealer, source, folder, name + SUFFIX, force=force, tick=tick
                )
                report.add(size=size)
        return ListedFile(made.hex(), size, item.executable)
    finally:
        os.close(source)


def unseal(
    sealer: Sealer, source: str, target: str, *, jobs: int, force: bool, without_list: bool
) -> Report:
    """
    Open a folder that `seal` made into another one.

    Raises:
        UnsealError: Its list is missing or not authentic.

    """
    _apart(source, target)
    report = Report(target)
    with Tree(source) as tree:
        listing = None if without_list else read_list(sealer, tree)
        found = tree.scan()
        sizes = {item.path: item.size for item in found.files}
        there = {
            item.path.removesuffix(SUFFIX)
            for item in found.files
            if item.path.endswith(SUFFIX) and not item.path.endswith(f"/{SUFFIX}")
        } - {""}
        if listing is None:
            if not without_list:
                raise UnsealError(
                    "the folder has no list of its files",
                    expected=LIST,
                    advice="Sealing it did not end (run it again), or the list was removed; "
                    "--no-list opens what is there, whatever is missing or exchanged.",
                )
            files = {path: ListedFile("", 0) for path in sorted(there)}
            folders = found.folders
        else:
            files, folders = listing.files, listing.folders
            for path in sorted(there - set(files)):
                report.fail(path + SUFFIX, UnsealError("the file is not on the folder's list"))
            for path in [path for path in files if path not in there]:
                report.fail(path + SUFFIX, UnsealError("the file is on the list, and missing"))
                files.pop(path)
        known = {path + SUFFIX for path in (there | set(files))} | {LIST}
        report.left_out = sorted({*found.special, *(set(sizes) - known)})
        os.makedirs(target, 0o700, exist_ok=True)
        with Tree(target) as out:
            out.lock()
            sweep(out)
            for path in folders:
                with out.folder(path, make=True):
                    pass
            total = sum(
                entry.size if entry.id else sizes[path + SUFFIX] for path, entry in files.items()
            )
            bar = Bar(total, len(files))

            def work(item: tuple[str, ListedFile], tick: Callable[[int], None]) -> None:
                path, entry = item
                bar.next(path)
                try:
                    _unseal_one(sealer, tree, out, path, entry, force, tick, report)
                except (EnclaveError, OSError) as error:
                    report.fail(path + SUFFIX, error)
                bar.end_file()

            with bar:
                order = sorted(files.items(), key=lambda item: -sizes[item[0] + SUFFIX])
                run(order, work, jobs=jobs, bar=bar)
    return report


def _unseal_one(
    sealer: Sealer,
    tree: Tree,
    out: Tree,
    path: str,
    entry: ListedFile,
    force: bool,
    tick: Callable[[int], None],
    report: Report,
) -> None:
    parent, _, name = path.rpartition("/")
    wanted = bytes.fromhex(entry.id) if entry.id else None
    source = tree.open(path + SUFFIX)
    try:
        with out.folder(parent, make=True) as folder:
            if out.exists(path):
                plain = out.open(path)
                try:
                    there = os.fstat(plain).st_size
                    found = _place.compare(sealer, source, from_descriptor(plain, tick))
                finally:
                    os.close(plain)
                if found is not None:
                    _place.check_id(found, wanted, path)
                    report.add(size=there, verified=True)
                    return
            size = _place.unseal_to(
                sealer,
                source,
                folder,
                name,
                force=force,
                tick=tick,
                executable=entry.executable,
                wanted=wanted,
            )
            report.add(size=size)
    finally:
        os.close(source)
