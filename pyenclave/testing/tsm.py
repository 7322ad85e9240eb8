"""
A double of configfs-tsm, with any synthetic chip behind it.

`Tsm` is the kernel's behaviour as `pyenclave.providers.tsm.Files`: a test hands it over. As root,
``python -m pyenclave.testing.tsm FOLDER`` mounts the same for any program (FUSE; the package
mfusepy). What the kernel does: ``Documentation/ABI/testing/configfs-tsm-report`` and
``drivers/virt/coco/guest/report.c``.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from pyenclave.formats.snp_certs import (
    GUID_ARK,
    GUID_ASK,
    GUID_VCEK,
    GUID_VLEK,
    CertificateTable,
)
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.intel import IntelPlatform

__all__ = ["ATTRIBUTES", "Tsm", "main"]

_INBLOB: Final = 64
_COMMON: Final = {"generation": 0o400, "inblob": 0o200, "outblob": 0o400, "provider": 0o400}
#: The attributes of an entry by provider, with their modes.
ATTRIBUTES: Final = {
    "tdx_guest": _COMMON,
    "sev_guest": _COMMON
    | {
        "auxblob": 0o400,
        "manifestblob": 0o400,
        "privlevel": 0o200,
        "privlevel_floor": 0o400,
        "service_provider": 0o200,
        "service_guid": 0o200,
        "service_manifest_version": 0o200,
    },
}


def _fail(number: int, path: str = "") -> OSError:
    return OSError(number, os.strerror(number), path)


@dataclass
class _Entry:
    inblob: bytes = b""
    writes: int = 0
    made_at: int = -1  # the generation of what is cached
    outblob: bytes = b""
    options: dict[str, str] = field(default_factory=dict)


class Tsm:
    """
    The kernel's side of configfs-tsm.

    Args:
        quote: Makes the report or quote of 64 bytes of report data.
        provider: ``sev_guest`` or ``tdx_guest``; None is a kernel without a provider.
        table: The host's certificate table.
        floor: The lowest privilege level.
        hook: Called before each step with its name (``mkdir``, ``write``, ``read``, ``rmdir``) and
            the attribute's; it may raise OSError, or write itself.

    Attributes:
        entries: Names of the folders that are there.
        made: How many reports were made.
    """

    def __init__(
        self,
        quote: Callable[[bytes], bytes],
        *,
        provider: str | None = "sev_guest",
        table: bytes = b"",
        floor: int = 0,
        hook: Callable[[str, str], None] | None = None,
    ) -> None:
        self.quote = quote
        self.provider = provider
        self.table = table
        self.floor = floor
        self.hook = hook
        self.made = 0
        self._entries: dict[str, _Entry] = {}
        self._mutex = threading.RLock()

    @classmethod
    def snp(cls, chip: AmdChip, *, with_table: bool = True) -> Self:
        """Put an AMD processor behind it, with its certificates in the host's table."""
        vek = GUID_VCEK if chip.signer == "vcek" else GUID_VLEK
        entries = ((vek, chip.vek), (GUID_ASK, chip.ask.der), (GUID_ARK, chip.ark.der))
        table = CertificateTable(entries).to_bytes() if with_table else b""
        return cls(lambda data: chip.report(report_data=data), table=table)

    @classmethod
    def tdx(cls, platform: IntelPlatform, *, padding: int = 70) -> Self:
        """Put an Intel platform behind it; zeros follow its quotes, as Azure's and Google's."""
        return cls(
            lambda data: platform.td_quote(report_data=data) + bytes(padding),
            provider="tdx_guest",
        )

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the folders that are there."""
        return tuple(self._entries)

    @property
    def attributes(self) -> dict[str, int]:
        """The files of each entry, with their modes."""
        return dict(ATTRIBUTES.get(self.provider or "", {}))

    # ---- as pyenclave.providers.tsm.Files -------------------------------------------------------

    def mkdir(self, path: str) -> None:
        """Make an entry."""
        self._hooked("mkdir", "")
        name = path.rpartition("/")[2]
        with self._mutex:
            if self.provider is None:
                raise _fail(errno.ENXIO, path)
            if name in self._entries:
                raise _fail(errno.EEXIST, path)
            self._entries[name] = _Entry()

    def rmdir(self, path: str) -> None:
        """Remove an entry, with its files."""
        self._hooked("rmdir", "")
        with self._mutex:
            if self._entries.pop(path.rpartition("/")[2], None) is None:
                raise _fail(errno.ENOENT, path)

    def read(self, path: str, limit: int) -> bytes:
        """Read an attribute."""
        name, attribute = path.split("/")[-2:]
        self._hooked("read", attribute)
        return self.content(name, attribute)[: limit + 1]

    def write(self, path: str, data: bytes) -> None:
        """Write an attribute, and close it."""
        name, attribute = path.split("/")[-2:]
        self._hooked("write", attribute)
        self.store(name, attribute, data)

    def _hooked(self, what: str, attribute: str) -> None:
        if self.hook is not None:
            self.hook(what, attribute)

    # ---- what the kernel does -------------------------------------------------------------------

    def _find(self, name: str, attribute: str, mode: int) -> _Entry:
        entry = self._entries.get(name)
        if entry is None or attribute not in self.attributes:
            raise _fail(errno.ENOENT, f"{name}/{attribute}")
        if not self.attributes[attribute] & mode:
            raise _fail(errno.EACCES, f"{name}/{attribute}")
        return entry

    def content(self, name: str, attribute: str) -> bytes:
        """Return what an attribute reads as; a report is made once a generation."""
        with self._mutex:
            entry = self._find(name, attribute, 0o400)
            if attribute == "provider":
                return f"{self.provider}\n".encode()
            if attribute == "generation":
                return b"%d\n" % entry.writes
            if attribute == "privlevel_floor":
                return b"%d\n" % self.floor
            if len(entry.inblob) != _INBLOB:
                raise _fail(errno.EINVAL, f"{name}/{attribute}")
            if entry.made_at != entry.writes:
                entry.outblob = self.quote(entry.inblob)
                entry.made_at = entry.writes
                self.made += 1
            return {"outblob": entry.outblob, "auxblob": self.table}.get(attribute, b"")

    def store(self, name: str, attribute: str, data: bytes) -> None:
        """Write an attribute whole."""
        with self._mutex:
            entry = self._find(name, attribute, 0o200)
            if attribute == "inblob":
                if len(data) > _INBLOB:
                    raise _fail(errno.EFBIG, f"{name}/{attribute}")
                entry.inblob = bytes(data)
            else:
                self._option(entry, attribute, data)
            entry.writes += 1

    def _option(self, entry: _Entry, attribute: str, data: bytes) -> None:
        text = bytes(data).decode("ascii", "replace").strip()
        good = attribute != "service_provider" or text == "svsm"
        if attribute == "privlevel":
            good = text.isdigit() and self.floor <= int(text) <= 3
        if not good:
            raise _fail(errno.EINVAL, attribute)
        entry.options[attribute] = text


# ---- as a file system -------------------------------------------------------------------------


def _mount(model: Tsm, folder: str) -> None:
    """Serve *model* at *folder*/report until it is unmounted."""
    import stat

    import mfusepy

    now = datetime.now(UTC).timestamp()

    class Filesystem(mfusepy.Operations):  # type: ignore[misc, unused-ignore]
        """FUSE's callbacks."""

        use_ns = True

        def __init__(self) -> None:
            self.handles: dict[int, tuple[str, str, bytes | None]] = {}
            self.last = 0

        @staticmethod
        def parts(path: str) -> list[str]:
            return [part for part in path.split("/") if part]

        def getattr(self, path: str, fh: int | None = None) -> dict[str, object]:
            names = self.parts(path)
            if names in ([], ["report"]) or (len(names) == 2 and names[1] in model.entries):
                return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2, "st_mtime": now}
            mode = model.attributes.get(names[-1]) if len(names) == 3 else None
            if mode is None or names[1] not in model.entries:
                raise mfusepy.FuseOSError(errno.ENOENT)
            size = 0 if names[-1].endswith("blob") else 4096
            return {"st_mode": stat.S_IFREG | mode, "st_nlink": 1, "st_size": size}

        def readdir(self, path: str, fh: int) -> list[str]:
            names = self.parts(path)
            inside = ["report"] if not names else list(model.entries)
            return [".", "..", *(model.attributes if len(names) == 2 else inside)]

        def mkdir(self, path: str, mode: int) -> int:
            if len(self.parts(path)) != 2:
                raise mfusepy.FuseOSError(errno.EPERM)
            return self.call(lambda: model.mkdir(path))

        def rmdir(self, path: str) -> int:
            return self.call(lambda: model.rmdir(path))

        def open(self, path: str, flags: int) -> int:
            _, name, attribute = self.parts(path)
            wanted = {os.O_RDONLY: 0o400, os.O_WRONLY: 0o200}.get(flags & os.O_ACCMODE, 0)
            if not model.attributes[attribute] & wanted:
                raise mfusepy.FuseOSError(errno.EACCES)
            self.last += 1
            self.handles[self.last] = (name, attribute, None)
            return self.last

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            name, attribute, data = self.handles[fh]
            if data is None:
                data = self.call_bytes(lambda: model.content(name, attribute))
                self.handles[fh] = (name, attribute, data)
            return data[offset : offset + size]

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            name, attribute, kept = self.handles[fh]
            if attribute == "inblob":  # buffered; what it holds counts when the file is closed
                if offset + len(data) > _INBLOB:
                    raise mfusepy.FuseOSError(errno.EFBIG)
                kept = (kept or b"")[:offset].ljust(offset, b"\0") + bytes(data)
                self.handles[fh] = (name, attribute, kept)
            else:
                self.call(lambda: model.store(name, attribute, bytes(data)))
            return len(data)

        def flush(self, path: str, fh: int) -> int:
            name, attribute, kept = self.handles[fh]
            if attribute == "inblob" and kept is not None:
                self.handles[fh] = (name, attribute, None)
                self.call(lambda: model.store(name, attribute, kept))
            return 0

        def release(self, path: str, fh: int) -> int:
            self.handles.pop(fh, None)
            return 0

        @staticmethod
        def call_bytes(step: Callable[[], bytes]) -> bytes:
            try:
                return step()
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno) from None

        @staticmethod
        def call(step: Callable[[], None]) -> int:
            try:
                step()
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno) from None
            return 0

    mfusepy.FUSE(
        Filesystem(), folder, foreground=True, nothreads=True, direct_io=True, fsname="tsm"
    )


def main(arguments: list[str] | None = None) -> int:
    """Mount the double; the exit code is 0 after it was unmounted."""
    parser = argparse.ArgumentParser(
        prog="python -m pyenclave.testing.tsm",
        description="Mounts a double of configfs-tsm at FOLDER (FOLDER/report), as root, with a "
        "synthetic chip behind it. Unmount it with fusermount3 -u FOLDER.",
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--tee", choices=("snp", "tdx"), default="snp")
    parser.add_argument(
        "--endorsements", metavar="DIR", help="write the chip's endorsements and root.pem there"
    )
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("mfusepy") is None:
        parser.exit(2, f"{parser.prog}: mounting needs mfusepy: pip install mfusepy\n")
    if options.tee == "snp":
        chip = AmdChip("genoa")
        model, files, root = Tsm.snp(chip), chip.endorsements(), chip.root
    else:
        platform = IntelPlatform(datetime.now(UTC))
        model, files, root = Tsm.tdx(platform), platform.endorsements("tdx"), platform.root
    if options.endorsements:
        place = Path(options.endorsements)
        place.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (place / name).write_bytes(data)
        (place / "root.pem").write_bytes(root)
    _mount(model, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
