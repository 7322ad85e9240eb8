"""
Fetched answers on disk, and the newest evaluation that was seen.

What is cached is signed by its vendor and checked on every verification: whoever can write the
cache can make verification fail, not succeed. It must all the same be the user's own directory. The
newest ``tcbEvaluationDataNumber`` per platform family is kept beside it, so that a service cannot
quietly serve older collateral than was seen before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pyenclave._files import read_file
from pyenclave.collateral.http import Response
from pyenclave.errors import CollateralError
from pyenclave.formats import jsonstrict

__all__ = ["Cache", "default_cache_directory"]

_MAX_ENTRY: Final = 8 << 20
_MAX_SEEN: Final = 1 << 20
_MAX_ENTRIES: Final = 4096


def default_cache_directory() -> Path:
    """Return ``pyenclave/collateral`` under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: relative values are ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "pyenclave" / "collateral"


class Cache:
    """
    A cache in a directory of the user's own.

    Args:
        directory: Made with mode 0700 if it is not there.

    Raises:
        CollateralError: The directory belongs to somebody else or others may write to it.

    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._path = Path(directory)
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = os.stat(self._path)
        except OSError as error:
            raise CollateralError(
                "the cache's directory cannot be used", found=str(error)
            ) from None
        # Windows has neither owner nor mode here; its profile folders are the user's own.
        if sys.platform != "win32" and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise CollateralError(
                "the cache's directory is not this user's own",
                expected="a directory of this user that nobody else may write to",
                found=f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}",
            )

    def _file(self, url: str) -> Path:
        return self._path / f"{hashlib.sha256(url.encode()).hexdigest()}.json"

    def get(self, url: str) -> Response | None:
        """Return the answer that is kept for *url*, unless it is too old or damaged."""
        try:
            data = read_file(self._file(url), limit=_MAX_ENTRY)
            value = jsonstrict.loads(
                data, "cache entry", error=CollateralError, max_size=_MAX_ENTRY, max_depth=3
            )
            if (
                isinstance(value, dict)
                and value.get("url") == url
                and isinstance(value.get("until"), int | float)
                and isinstance(value.get("body"), str)
                and isinstance(value.get("headers"), dict)
                and all(isinstance(text, str) for text in value["headers"].values())
                and value["until"] > time.time()
            ):
                return Response(bytes.fromhex(value["body"]), value["headers"])
        except (OSError, CollateralError, ValueError):
            pass  # a damaged entry is no entry: it is fetched again
        return None

    def put(self, url: str, answer: Response, *, seconds: float) -> None:
        """Keep *answer* for *seconds*. A full disk or too large an answer is no error."""
        value = {
            "url": url,
            "until": time.time() + seconds,
            "headers": dict(answer.headers),
            "body": answer.body.hex(),
        }
        data = json.dumps(value).encode()
        if len(data) > _MAX_ENTRY or seconds <= 0:
            return
        with contextlib.suppress(OSError):
            self._prune()
            self._write(self._file(url), data)

    def _prune(self) -> None:
        entries = [item for item in os.scandir(self._path) if item.name.endswith(".json")]
        if len(entries) >= _MAX_ENTRIES:
            for item in sorted(entries, key=lambda item: item.stat().st_mtime)[: _MAX_ENTRIES // 4]:
                os.unlink(item.path)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def check_not_older(self, family: str, number: int, *, remember: bool) -> None:
        """
        Refuse an evaluation that is older than one that was seen of *family*.

        Args:
            family: What the number is of: TEE, FMSPC and object.
            number: Its ``tcbEvaluationDataNumber``.
            remember: Take it for seen from now on; only if its signature holds, or whoever answers
                once could have all true collateral refused for ever.

        Raises:
            CollateralError: Older than what was seen, or the record of it cannot be read.

        """
        path = self._path / "seen.state"
        with self._lock():
            seen: dict[str, int] = {}
            if path.exists():
                value = jsonstrict.loads(
                    read_file(path, limit=_MAX_SEEN),
                    str(path),
                    error=CollateralError,
                    max_size=_MAX_SEEN,
                )
                if not isinstance(value, dict) or not all(
                    type(item) is int for item in value.values()
                ):
                    raise CollateralError(f"{path} is damaged", advice="Remove it to start anew.")
                seen = value
            if number < seen.get(family, 0):
                raise CollateralError(
                    f"the collateral of {family} is older than what was seen before",
                    expected=f"tcbEvaluationDataNumber {seen[family]} or later",
                    found=number,
                    advice="Somebody serves old collateral, or the source changed from 'early' to "
                    "'standard'; allow_older=True (--allow-older) takes it all the same.",
                )
            if remember and number > seen.get(family, 0):
                self._write(path, json.dumps(seen | {family: number}).encode())
