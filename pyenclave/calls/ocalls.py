"""
Functions of the host that an enclave may call: declared, measured, and typed like trusted ones.

The index of one in a message is its place in the image's list, which is sorted by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pyenclave.calls.signature import Signature
from pyenclave.errors import ArgumentError

__all__ = ["MARK", "Ocall", "declared_in", "ocalls_of"]

# On the stubs that ``trusted.ocall`` makes: the names of the functions that the host may call back.
MARK = "__pyenclave_ocall__"


@dataclass(frozen=True, kw_only=True)
class Ocall:
    """
    One declared function of the host.

    Attributes:
        signature: Its types; of kind ``ocall``.
        allow: Trusted functions that the host may call before it answers, sorted.

    """

    signature: Signature
    allow: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name under which both sides know it."""
        return self.signature.name

    @classmethod
    def of(cls, stub: Callable[..., Any]) -> Ocall:
        """
        Take the declaration of a stub that ``trusted.ocall`` made.

        Raises:
            ArgumentError: A parameter is not annotated, or of a type that does not cross.

        """
        signature = Signature.of(stub)
        if signature.streams:
            raise ArgumentError(f"{signature.name}: what the host returns cannot be a stream")
        signature = dataclasses.replace(
            signature,
            kind="ocall",
            private=False,
            # A default is the stub's own: it is filled in before anything crosses.
            parameters=tuple(
                dataclasses.replace(item, default=False) for item in signature.parameters
            ),
        )
        return cls(signature=signature, allow=tuple(sorted(set(getattr(stub, MARK)))))

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Ocall:
        """
        Read a declaration of an image.

        Raises:
            ArgumentError: It is not one.

        """
        if set(wire) != {"name", "params", "returns", "allow"}:
            raise ArgumentError("an ocall of the image is malformed", found=sorted(wire))
        allow = wire["allow"]
        if not isinstance(allow, list | tuple) or not all(isinstance(item, str) for item in allow):
            raise ArgumentError("an ocall of the image is malformed: allow")
        members = {name: wire[name] for name in ("name", "params", "returns")}
        signature = Signature.from_wire({**members, "kind": "ocall"})
        if signature.optional:
            raise ArgumentError(f"ocall {signature.name}: its parameters have no defaults")
        return cls(signature=signature, allow=tuple(allow))

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON-able form that goes into the image."""
        wire = self.signature.to_wire()
        del wire["kind"]
        return {**wire, "allow": list(self.allow)}

    def __str__(self) -> str:
        allowed = f", allows {', '.join(self.allow)}" if self.allow else ""
        return f"{self.signature}{allowed}"


def declared_in(module: ModuleType) -> list[Ocall]:
    """
    Return what the stubs of *module* declare, sorted by name.

    Raises:
        ArgumentError: A stub is not usable, or two have one name.

    """
    found: dict[str, Any] = {}
    for value in vars(module).values():
        if callable(value) and isinstance(getattr(value, MARK, None), tuple):
            name = value.__qualname__
            if found.setdefault(name, value) is not value:
                raise ArgumentError(f"two ocalls are called {name}")
    return [Ocall.of(found[name]) for name in sorted(found)]


def ocalls_of(module: ModuleType) -> list[dict[str, Any]]:
    """Return the same in the form that goes into the image."""
    return [ocall.to_wire() for ocall in declared_in(module)]
