"""
The list of a sealed folder: what belongs to it, as text (docs/formats/wrapped-file.md).

The text comes out of a sealed file, so it is authentic; still nothing in it leads out of a folder.
"""

from __future__ import annotations

import json
from typing import Annotated, Final

import msgspec

from pyenclave.cli._tree import check_relative
from pyenclave.errors import UnsealError

__all__ = ["LIST", "ListedFile", "Listing", "list_text", "parse_list"]

LIST: Final = ".pyenclave-list"
_MAX_SIZE: Final = 1 << 62

_Id = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{2})*\Z", max_length=64)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE)]


class ListedFile(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A file: its sealed file's id, its length, and whether its owner may execute it."""

    id: _Id
    size: _Size
    executable: bool = False


class Listing(msgspec.Struct, forbid_unknown_fields=True):
    """What belongs to a folder, by relative path."""

    version: int
    files: dict[str, ListedFile]
    folders: list[str]


def list_text(listing: Listing) -> bytes:
    """Return *listing* as it is sealed."""
    return json.dumps(msgspec.to_builtins(listing), separators=(",", ":")).encode()


def parse_list(text: bytes) -> Listing:
    """
    Return the list that *text* is.

    Raises:
        UnsealError: It is none, or of another version.
        ArgumentError: One of its paths leads out of the folder.

    """
    try:
        listing = msgspec.convert(json.loads(text), Listing)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise UnsealError(f"the list of files is malformed: {str(error)[:200]}") from None
    if listing.version != 1:
        raise UnsealError("the list of files is of another version", found=listing.version)
    for path in (*listing.files, *listing.folders):
        check_relative(path)
    return listing
