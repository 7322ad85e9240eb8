"""
Reading members of request bodies: a wrong type or size is a 400 that names the member.

Members that are not known are passed over, as Azure does it, because a later client sends more of
them; where a misspelt member would weaken a key (its release policy), they are refused. ``null``
counts as absent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from pyenclave.errors import EvidenceFormatError, ServiceError
from pyenclave.formats.jose import b64url_decode

__all__ = ["MAX_TIME", "Fields", "bad_parameter"]

MAX_TIME: Final = 253_402_300_799  # the last second of the year 9999


def bad_parameter(message: str) -> ServiceError:
    """Return the error of a request that is wrong in itself."""
    return ServiceError(message, status=400, error_code="BadParameter")


class Fields:
    """
    The members of one JSON object.

    Args:
        members: The object.
        where: Name of the object in errors, with a dot at its end; empty for the whole body.
    """

    def __init__(self, members: Mapping[str, Any], where: str = "") -> None:
        self._members = members
        self._where = where

    @classmethod
    def of(cls, value: object, where: str = "") -> Fields:
        """Return the members of *value*, which must be an object."""
        if not isinstance(value, Mapping):
            raise bad_parameter(f"{where.rstrip('.') or 'The body'} is not an object.")
        return cls(value, where)

    def error(self, name: str, wanted: str) -> ServiceError:
        """Return the error that member *name* is not what was wanted."""
        return bad_parameter(f"Property {self._where}{name} has invalid value: {wanted} is needed.")

    def only(self, names: Collection[str]) -> None:
        """Refuse members that are not among *names*."""
        for name in self._members:
            if name not in names:
                # The name is the caller's own; what is not plain in it is escaped.
                raise bad_parameter(f"Property {self._where}{ascii(name)[:80]} is not known.")

    def get(self, name: str) -> Any:
        """Return the member as it is, None if it is absent."""
        return self._members.get(name)

    def has(self, name: str) -> bool:
        """Tell whether the member is there and not null."""
        return self._members.get(name) is not None

    def text(self, name: str, *, longest: int, shortest: int = 0) -> str | None:
        """Return a string of so many characters, or None."""
        value = self._members.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or not shortest <= len(value) <= longest:
            raise self.error(name, f"a string of {shortest} to {longest} characters")
        return value

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """Return one of *choices*, or None."""
        value = self._members.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or value not in choices:
            raise self.error(name, "one of " + ", ".join(choices))
        return value

    def flag(self, name: str) -> bool | None:
        """Return true or false, or None."""
        value = self._members.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def whole(self, name: str, *, least: int, most: int) -> int | None:
        """Return an integer, or None."""
        value = self._members.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(name, f"an integer of {least} to {most}")
        return value

    def time(self, name: str) -> int | None:
        """Return a Unix time in seconds, or None."""
        return self.whole(name, least=0, most=MAX_TIME)

    def data(self, name: str, *, longest: int, shortest: int = 0) -> bytes | None:
        """Return bytes that stand there as base64url without padding, or None."""
        value = self._members.get(name)
        if value is None:
            return None
        wanted = f"base64url of {shortest} to {longest} bytes"
        if not isinstance(value, str) or len(value) > (longest * 4 + 2) // 3:
            raise self.error(name, wanted)
        try:
            data = b64url_decode(value, name)
        except EvidenceFormatError:
            raise self.error(name, wanted) from None
        if not shortest <= len(data) <= longest:
            raise self.error(name, wanted)
        return data

    def need_data(self, name: str, *, longest: int, shortest: int = 0) -> bytes:
        """Return bytes as `data` does; the member must be there."""
        value = self.data(name, longest=longest, shortest=shortest)
        if value is None:
            raise bad_parameter(f"Property {self._where}{name} is missing.")
        return value

    def table(self, name: str) -> Fields | None:
        """Return the members of an object, or None."""
        value = self._members.get(name)
        return None if value is None else Fields.of(value, f"{self._where}{name}.")

    def array(self, name: str, *, longest: int) -> Sequence[Any] | None:
        """Return a list, or None."""
        value = self._members.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > longest:
            raise self.error(name, f"a list of at most {longest}")
        return value
