"""
Bundles: the endorsements of some evidence in one file, with when and where they were fetched.

A bundle is JSON: ``{"pyenclave_bundle": 1, "fetched_at": …, "source": …, "files": {…}}``, the files
in base64 by name. Nothing in it is believed because it is in it: every file is signed by its vendor
and is checked when evidence is verified. ``docs/formats/bundle.md`` describes it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self

from pyenclave.errors import CollateralError
from pyenclave.formats import jsonstrict

__all__ = ["MAX_FILE", "MAX_SIZE", "Bundle"]

VERSION: Final = 1
MAX_FILE: Final = 4 << 20  # bytes of one file
MAX_SIZE: Final = 64 << 20  # bytes of a bundle
_MAX_FILES: Final = 64
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\.[a-z]{3,4}")
_MEMBERS: Final = {"pyenclave_bundle", "fetched_at", "source", "files"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """
    A bundle.

    Attributes:
        files: Endorsements by the names that ``pyenclave verify`` knows.
        fetched_at: When they were fetched.
        source: Where from, for people.
    """

    files: Mapping[str, bytes]
    fetched_at: datetime
    source: str = ""

    def to_bytes(self) -> bytes:
        """Return the bundle as JSON, names sorted."""
        if self.fetched_at.tzinfo is None:
            raise ValueError("fetched_at: a time without a zone is ambiguous")
        for name, data in self.files.items():
            if not _NAME.fullmatch(name) or len(data) > MAX_FILE:
                raise ValueError(f"files: {name!r} is no name of an endorsement, or too large")
        document = {
            "pyenclave_bundle": VERSION,
            "fetched_at": self.fetched_at.isoformat().replace("+00:00", "Z"),
            "source": self.source,
            "files": {
                name: base64.b64encode(self.files[name]).decode() for name in sorted(self.files)
            },
        }
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read a bundle.

        Raises:
            CollateralError: Not a bundle; the message names the member.

        """
        value = jsonstrict.loads(
            data, "bundle", error=CollateralError, max_size=MAX_SIZE, max_depth=4
        )
        if not isinstance(value, dict) or set(value) != _MEMBERS:
            raise CollateralError(
                "bundle: wrong members",
                expected=", ".join(sorted(_MEMBERS)),
                found=", ".join(sorted(value))[:200] if isinstance(value, dict) else None,
            )
        if value["pyenclave_bundle"] is not VERSION:
            raise CollateralError(
                "bundle: unknown version", expected=VERSION, found=str(value["pyenclave_bundle"])
            )
        files = value["files"]
        if not isinstance(files, dict) or len(files) > _MAX_FILES:
            raise CollateralError(f"bundle: files is an object of up to {_MAX_FILES} files")
        found: dict[str, bytes] = {}
        for name, text in files.items():
            if not _NAME.fullmatch(name) or not isinstance(text, str):
                raise CollateralError("bundle: not a file", found=repr(name)[:100])
            try:
                found[name] = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise CollateralError(f"bundle: {name} is not base64") from None
            if len(found[name]) > MAX_FILE:
                raise CollateralError(f"bundle: {name} is larger than {MAX_FILE} bytes")
        try:
            moment = datetime.fromisoformat(value["fetched_at"])
        except (TypeError, ValueError):
            moment = None
        if moment is None or moment.tzinfo is None or not isinstance(value["source"], str):
            raise CollateralError("bundle: fetched_at is a time with a zone, source a text")
        return cls(found, moment, value["source"])
