"""What an enclave's handle gives out: evidence, a description, and its functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyenclave._core import BatchCall, HostCall, HostLanes
from pyenclave.calls.signature import Signature
from pyenclave.calls.types import describe
from pyenclave.errors import UnknownFunctionError
from pyenclave.host._map import batch_call
from pyenclave.host._options import NO_OPTIONS, Options

__all__ = ["EnclaveInfo", "Evidence", "Functions"]


class Evidence(bytes):
    """Evidence of an enclave, as bytes that a relying party verifies."""

    __slots__ = ()

    def to_bytes(self) -> bytes:
        """Return the plain bytes."""
        return bytes(self)

    def __repr__(self) -> str:
        return f"<Evidence of {len(self)} bytes>"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveInfo:
    """
    What the platform says of a running enclave. Only verified evidence proves any of it.

    Attributes:
        name: Name in the image.
        enclave_id: Identity of this launch.
        pid: Process of the worker.
        debug: Whether it runs as debug.
        mrenclave: Measurement.
        mrsigner: Signer, zero if unsigned.
        product_id: ISVPRODID.
        security_version: ISVSVN.
        threads: Calls that run at the same time.
        functions: Signatures, as people write them.
        level: Level of protection.
        protections: The probed bits, by name.
        record: The signed protection record.
        runtime_public_key: Key to which secrets for this launch are encrypted.

    """

    name: str
    enclave_id: bytes
    pid: int
    debug: bool
    mrenclave: bytes
    mrsigner: bytes
    product_id: int
    security_version: int
    threads: int
    functions: tuple[str, ...]
    level: str
    protections: Mapping[str, bool | int]
    record: bytes = field(repr=False)
    runtime_public_key: bytes = field(repr=False)


class Functions:
    """
    The functions of one enclave, as callables.

    Args:
        signatures: In the order of the image, which gives each its index.
        lanes: Where calls go.
        options: How calls are made.
        wrap: Makes of a call for threads what is given out.

    """

    def __init__(
        self,
        signatures: tuple[Signature, ...],
        lanes: HostLanes,
        options: Options = NO_OPTIONS,
        wrap: Callable[[HostCall], Callable[..., Any]] | None = None,
    ) -> None:
        self._signatures = {item.name: (index, item) for index, item in enumerate(signatures)}
        self._lanes = lanes
        self._options = options
        self._wrap = wrap
        self._by_name: dict[str, Callable[..., Any]] = {}
        self._by_function: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._batched: dict[Any, BatchCall] = {}

    def with_options(
        self, options: Options, wrap: Callable[[HostCall], Callable[..., Any]] | None = None
    ) -> Functions:
        """Return the same functions with other options."""
        signatures = tuple(item for _, item in self._signatures.values())
        return Functions(signatures, self._lanes, options, wrap)

    def signature(self, name: str) -> Signature:
        """
        Return a function's signature.

        Raises:
            UnknownFunctionError: There is none of that name.

        """
        try:
            return self._signatures[name][1]
        except (KeyError, TypeError):
            raise UnknownFunctionError(
                f"the enclave has no function {name!r}",
                advice=f"It has: {', '.join(self._signatures) or 'none'}.",
            ) from None

    def named(self, name: str) -> Callable[..., Any]:
        """Return the function *name*, with dicts for the entry's classes."""
        found = self._by_name.get(name)
        if found is None:
            found = self._by_name[name] = self._make(name)
        return found

    def typed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the enclave's counterpart of the host's own *function*, with its classes."""
        try:
            found = self._by_function.get(function)
        except TypeError:
            found = None
        if found is None:
            found = self._by_function[function] = self._make(function)
        return found

    def batched(self, function: str | Callable[..., Any]) -> BatchCall:
        """
        Return the form of a function that is called many times in one crossing.

        Raises:
            UnknownFunctionError: There is none of that name.
            ArgumentError: It cannot be called with one item each.

        """
        try:
            found = self._batched.get(function)
        except TypeError:  # what cannot be looked up is no function either
            found = None
        if found is None:
            found = batch_call(*self._host_call(function))
            self._batched[function] = found
        return found

    def _make(self, function: str | Callable[..., Any]) -> Callable[..., Any]:
        call, _ = self._host_call(function)
        return call.quick() if self._wrap is None else self._wrap(call)

    def _host_call(self, function: str | Callable[..., Any]) -> tuple[HostCall, Signature]:
        name: Any = function
        if isinstance(function, str):
            signature = self.signature(name)
        else:
            name = getattr(function, "__qualname__", None)
            if not isinstance(name, str):
                raise TypeError(f"a function or its name is wanted, not {function!r}")
            signature = self.signature(name)
            if signature.kind == "python":
                signature = signature.with_types_of(function)
        native = signature.kind == "native"
        array = (
            not signature.streams
            and isinstance(signature.returns, list | tuple)
            and signature.returns[0] == "array"
        )
        call = HostCall(
            self._lanes,
            self._signatures[name][0],
            name,
            str(signature),
            signature.request_plan,
            signature.reply_plan,
            signature.bind,
            native=native,
            element=signature.returns[1] if native and array else None,
            timeout=self._options.seconds,
            kill_after=self._options.grace,
            note=self._options.correlation,
            has_out=array and all(item.name != "out" for item in signature.parameters),
            streams=signature.streams,
        )
        return call, signature

    def parameter_types(self, name: str) -> list[str]:
        """Return the types of a function's parameters; arrays as ``ndarray:<f8``."""
        return [
            f"ndarray:{item.wire[1]}"
            if isinstance(item.wire, list | tuple) and item.wire[0] == "array"
            else describe(item.wire)
            for item in self.signature(name).parameters
        ]
