"""
Signatures of trusted functions: taken from annotations at build, kept in the image, compared
with the live functions inside, and used by the host to encode calls.

The index of a function in a call is its place in the image's list, which is sorted by name.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import keyword
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyenclave import _core
from pyenclave.calls import types as _types
from pyenclave.calls.aliases import expand
from pyenclave.errors import ArgumentError

__all__ = [
    "MAX_FUNCTIONS",
    "RESERVED_NAMES",
    "Parameter",
    "Signature",
    "compile_annotations",
    "functions_of",
    "is_ecall",
    "native_functions",
    "trusted_functions",
]

MAX_FUNCTIONS = 65536  # an index has 16 bits
_MAX_PARAMETERS = 64
_ELSEWHERE = {"__wrapped__", "__signature__"}  # of a function: its parameters are another's
_MAX_ANNOTATION = 200  # characters of one that is compiled ahead
_MOST_ANNOTATIONS = 256

# Names that a handle has itself, so that no trusted function may have them.
RESERVED_NAMES = frozenset(
    {
        "attest",
        "call",
        "close",
        "close_on_sigterm",
        "closed",
        "debug",
        "drain",
        "enclave",
        "enclave_id",
        "evidence",
        "from_file",
        "functions",
        "info",
        "map",
        "measurement",
        "mrenclave",
        "mrsigner",
        "options",
        "pid",
        "parameter_types",
        "ping",
        "record",
        "restart",
        "shared",
        "start",
        "started",
        "state",
        "stats",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter: its wire type, and the Python type that this side knows for it."""

    name: str
    wire: Any
    annotation: Any
    default: bool = False  # the function has a default for it
    keyword: bool = False  # given by keyword only


@dataclass(frozen=True, kw_only=True)
class Signature:
    """
    The signature of one trusted function.

    Attributes:
        name: The function's ``__qualname__``, or the native symbol without its prefix.
        kind: ``python`` or ``native``; ``ocall`` for a function of the host.
        parameters: In order.
        returns: Wire type of the result; of one that streams, of each item.
        returns_annotation: The Python type that this side knows for it.
        streams: Whether the result comes item by item.
        private: Whether it can be called only nested in an ocall that allows it.

    """

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    returns: Any
    returns_annotation: Any
    streams: bool = False
    private: bool = False

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """
        Take the signature of a Python function.

        Raises:
            ArgumentError: A parameter is not annotated, or of a type that does not cross.

        """
        name = function.__qualname__
        try:
            hints = _hints(function)
        except (NameError, TypeError, AttributeError) as error:
            raise ArgumentError(f"{name}: its annotations cannot be read: {error}") from None
        parameters = []
        for item, default, by_keyword in _parameters(function, name):
            where = f"{name}({item})"
            if item not in hints:
                raise ArgumentError(
                    f"{where} has no annotation", advice="Annotate it, as in `rows: list[float]`."
                )
            parameters.append(
                Parameter(
                    name=item,
                    wire=_types.to_wire(hints[item], where),
                    annotation=hints[item],
                    default=default,
                    keyword=by_keyword,
                )
            )
        if "return" not in hints:
            raise ArgumentError(
                f"{name} has no annotation of what it returns", advice="Annotate it: `-> None`."
            )
        if len(parameters) > _MAX_PARAMETERS:
            raise ArgumentError(f"{name}: at most {_MAX_PARAMETERS} parameters")
        streams, returned = _item_of(hints["return"], name)
        signature = cls(
            name=name,
            kind="python",
            parameters=tuple(parameters),
            returns=_types.to_wire(returned, f"what {name} returns"),
            returns_annotation=returned,
            streams=streams,
            private=getattr(function, "__pyenclave_private__", False) is True,
        )
        signature._check()
        return signature

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Signature:
        """
        Read a signature of an image; classes of the entry become dicts.

        Raises:
            ArgumentError: It is not a signature.

        """
        try:
            if set(wire) - {"private"} != {"name", "kind", "params", "returns"}:
                raise ValueError("members")
            name, kind, private = wire["name"], wire["kind"], wire.get("private", False)
            if not isinstance(name, str) or kind not in ("python", "native", "ocall"):
                raise ValueError("name or kind")
            if private is not ("private" in wire) or (private and kind != "python"):
                raise ValueError("private")
            returns = wire["returns"]
            streams = isinstance(returns, list | tuple) and list(returns[:1]) == ["stream"]
            if streams:
                if len(returns) != 2 or kind != "python":
                    raise ValueError("stream")
                returns = returns[1]
            params = [dict(item) for item in wire["params"]]
            parameters = tuple(
                Parameter(
                    name=str(item["name"]),
                    wire=item["type"],
                    annotation=_types.from_wire(item["type"]),
                    default=bool(item["default"]),
                    keyword=bool(item["keyword"]),
                )
                for item in params
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(f"a signature of the image is malformed: {error}") from None
        signature = cls(
            name=name,
            kind=kind,
            parameters=parameters,
            returns=returns,
            returns_annotation=_types.from_wire(returns),
            streams=streams,
            private=private,
        )
        signature._check()
        return signature

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON-able form that goes into the image."""
        return {
            "name": self.name,
            "kind": self.kind,
            "params": [
                {
                    "name": item.name,
                    "type": item.wire,
                    "default": item.default,
                    "keyword": item.keyword,
                }
                for item in self.parameters
            ],
            "returns": ["stream", self.returns] if self.streams else self.returns,
            # Only where it is so: images of functions that are not stay what they were.
            **({"private": True} if self.private else {}),
        }

    def _check(self) -> None:
        for text in (self.name, *(item.name for item in self.parameters)):
            if not text.isidentifier() or keyword.iskeyword(text):
                raise ArgumentError(
                    f"{text!r} is not a name that a trusted function or parameter can have",
                    advice="Trusted functions are plain functions at the top of the module.",
                )
        reserved = self.name in RESERVED_NAMES and self.kind != "ocall"
        if reserved or self.name.startswith("_"):
            raise ArgumentError(
                f"a trusted function may not be called {self.name!r}",
                advice="The handle has that name itself, or it begins with an underscore.",
            )
        try:
            self.request_plan  # noqa: B018 - made now, so that its limits are checked now
            self.reply_plan  # noqa: B018
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{self.name}: {error}") from None

    @functools.cached_property
    def _plain(self) -> bool:
        parts = (*(item.wire for item in self.parameters), self.returns)
        return self.kind == "python" and not self.streams and all(map(_types.is_plain, parts))

    def is_of(self, function: Callable[..., Any]) -> bool:
        """
        Whether :meth:`of` would return this signature, with the same plans.

        It costs a third of that. False says nothing: it answers for the simplest types only.
        """
        if not self._plain or function.__qualname__ != self.name:
            return False
        if self.private is not (getattr(function, "__pyenclave_private__", False) is True):
            return False
        try:
            hints, found = _hints(function), _parameters(function, self.name)
        except (ArgumentError, NameError, TypeError, AttributeError):
            return False  # that one says what is wrong
        if (
            "return" not in hints
            or len(found) != len(self.parameters)
            or len(found) > _MAX_PARAMETERS
        ):
            return False
        for (name, default, by_keyword), mine in zip(found, self.parameters, strict=True):
            if (
                name != mine.name
                or default is not mine.default
                or by_keyword is not mine.keyword
                or name not in hints
                or not _types.has_plain_wire(hints[name], mine.wire)
            ):
                return False
        return _types.has_plain_wire(hints["return"], self.returns)

    @property
    def optional(self) -> bool:
        """Whether some argument may be left out."""
        return any(item.default for item in self.parameters)

    @functools.cached_property
    def request_plan(self) -> _core.Plan:
        """The plan of the arguments."""
        return _plan(
            [(f"argument {item.name}", item.wire, item.annotation) for item in self.parameters],
            optional=self.optional,
        )

    @functools.cached_property
    def reply_plan(self) -> _core.Plan:
        """The plan of the result."""
        what = "the item" if self.streams else "the result"
        return _plan([(what, self.returns, self.returns_annotation)])

    def with_types_of(self, function: Callable[..., Any]) -> Signature:
        """
        Return this signature with the Python types of the host's own *function*.

        Raises:
            ArgumentError: The function's signature is another one.

        """
        mine = Signature.of(function)
        if mine.to_wire() != self.to_wire():
            raise ArgumentError(
                f"{self.name}: the host's function differs from the image's",
                expected=str(self),
                found=str(mine),
                advice="Rebuild the image, or use the module that it was built from.",
            )
        return mine

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """
        Bring call arguments in the order of the parameters; what is left out is MISSING.

        Raises:
            ArgumentError: Too many, too few, unknown or doubled arguments.

        """
        positional = [item for item in self.parameters if not item.keyword]
        if len(args) > len(positional):
            raise ArgumentError(
                f"{self.name}: too many arguments", expected=str(self), found=len(args)
            )
        given = dict(zip((item.name for item in positional), args, strict=False))
        names = {item.name for item in self.parameters}
        for name, value in kwargs.items():
            if name not in names or name in given:
                why = "given twice" if name in given else "unknown"
                raise ArgumentError(
                    f"{self.name}: argument {name} is {why}",
                    expected=str(self),
                )
            given[name] = value
        for item in self.parameters:
            if item.name not in given and not item.default:
                raise ArgumentError(
                    f"{self.name}: argument {item.name} is missing", expected=str(self)
                )
        return tuple(given.get(item.name, _core.MISSING) for item in self.parameters)

    def __str__(self) -> str:
        shown = ", ".join(
            f"{item.name}: {_types.describe(item.wire)}{' = …' if item.default else ''}"
            for item in self.parameters
        )
        returned = _types.describe(self.returns)
        return f"{self.name}({shown}) -> {f'Iterator[{returned}]' if self.streams else returned}"


def _plan(items: list[tuple[str, Any, Any]], *, optional: bool = False) -> _core.Plan:
    codes = [_types.code_of(wire, annotation) for _, wire, annotation in items]
    return _core.Plan(
        "".join(code for code, _ in codes).encode(),
        tuple(name for name, _, _ in items),
        tuple(detail for _, detail in codes),
        optional,
    )


_STREAMS = (collections.abc.Iterator, collections.abc.Iterable, collections.abc.Generator)
_ASYNC = (
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncGenerator,
    collections.abc.Coroutine,
    collections.abc.Awaitable,
)


def _item_of(annotation: Any, name: str) -> tuple[bool, Any]:
    """Return whether a result streams, and the type of it or of its items."""
    origin = typing.get_origin(annotation) or annotation
    if origin is typing.Annotated:
        streams, item = _item_of(typing.get_args(annotation)[0], name)
        return streams, item if streams else annotation  # an array's dtype is in the note
    if origin in _ASYNC:
        raise ArgumentError(
            f"what {name} returns: trusted functions are not async",
            advice="Stream by a plain generator: `-> Iterator[T]`. The host may await it.",
        )
    if origin not in _STREAMS:
        return False, annotation
    arguments = typing.get_args(annotation)
    if any(part not in (None, type(None), Any) for part in arguments[1:]):
        raise ArgumentError(
            f"what {name} returns: nothing is sent into a generator, and it returns nothing",
            advice="Write `Iterator[T]`, or `Generator[T, None, None]`.",
        )
    return True, arguments[0] if arguments else Any


@functools.lru_cache(maxsize=_MOST_ANNOTATIONS)
def _compiled(text: str) -> types.CodeType:
    return compile(text, "<annotation>", "eval", dont_inherit=True)


def compile_annotations(code: types.CodeType) -> None:
    """
    Compile ahead what may be annotations of functions of a module; nothing of it is run.

    Args:
        code: The module's code, whose annotations are among its constants as text.

    """
    texts = [one for one in code.co_consts if isinstance(one, str) and len(one) <= _MAX_ANNOTATION]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # most are no annotations
        for text in texts[:_MOST_ANNOTATIONS]:
            with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
                _compiled(text)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """
    Return what ``typing.get_type_hints(function, include_extras=True)`` returns, without aliases.

    Most annotations are classes, or arrays and lists of them: for these evaluating the text is all
    that there is to do, in less time. One that is anything else sends all of them the long way.
    """
    hints: dict[str, Any] = {}
    if type(function) is types.FunctionType and not function.__dict__.keys() & _ELSEWHERE:
        try:
            for name, hint in function.__annotations__.items():
                found = hint
                if isinstance(hint, str):
                    found = eval(_compiled(hint), function.__globals__)  # noqa: S307 - as typing does
                if found is None:
                    found = type(None)
                found = expand(found, f"{function.__qualname__}({name})")
                if not _is_plain(found):
                    break
                hints[name] = found
            else:
                return hints
        except (NameError, TypeError, AttributeError, SyntaxError):
            pass  # typing says what is wrong with it
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: expand(hint, f"{function.__qualname__}({name})") for name, hint in hints.items()}


def _is_plain(hint: object) -> bool:
    """Whether *hint* is a class, or made of classes and nothing else."""
    if type(hint) is types.GenericAlias:
        return all(part is Any or part is ... or _is_plain(part) for part in hint.__args__)
    return type(hint) is type


def _parameters(function: Callable[..., Any], name: str) -> list[tuple[str, bool, bool]]:
    """
    Return name, whether it has a default, and whether it is given by keyword only, of each.

    Raises:
        ArgumentError: There is a * or ** parameter.

    """
    if type(function) is types.FunctionType and not function.__dict__.keys() & _ELSEWHERE:
        code = function.__code__
        if not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
            # What inspect.signature finds, without its objects.
            first = code.co_argcount - len(function.__defaults__ or ())
            last = code.co_argcount + code.co_kwonlyargcount
            places = [(text, at >= first, False) for at, text in enumerate(code.co_varnames[:last])]
            optional = function.__kwdefaults__ or {}
            for at in range(code.co_argcount, last):
                text = code.co_varnames[at]
                places[at] = (text, text in optional, True)
            return places
    found = []
    for item in inspect.signature(function).parameters.values():
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            raise ArgumentError(
                f"{name}({item.name}): * and ** parameters do not cross",
                advice="Name each parameter, or take a list or dict.",
            )
        by_keyword = item.kind is item.KEYWORD_ONLY
        found.append((item.name, item.default is not item.empty, by_keyword))
    return found


def is_ecall(value: object) -> bool:
    """Whether *value* is a function that ``trusted.ecall`` marked."""
    return callable(value) and getattr(value, "__pyenclave_ecall__", False) is True


def functions_of(module: types.ModuleType) -> list[dict[str, Any]]:
    """
    Return the wire signatures of the trusted functions of *module*, sorted by name.

    Raises:
        ArgumentError: A function cannot be called from outside as it is written.

    """
    return [signature.to_wire() for _, signature in trusted_functions(module)]


def trusted_functions(
    module: types.ModuleType, known: Mapping[str, Signature] | None = None
) -> list[tuple[Callable[..., Any], Signature]]:
    """
    Return the trusted functions of *module* with their signatures, sorted by name.

    Args:
        module: The imported module.
        known: What their signatures are expected to be, by name; one that is right is used.

    Raises:
        ArgumentError: A function cannot be called from outside as it is written.

    """
    found: dict[str, Any] = {}
    for value in vars(module).values():
        if is_ecall(value):
            name = value.__qualname__
            if name in found and found[name] is not value:
                raise ArgumentError(f"two trusted functions are called {name}")
            found[name] = value
    if len(found) > MAX_FUNCTIONS:
        raise ArgumentError(f"at most {MAX_FUNCTIONS} trusted functions", found=len(found))
    result = []
    for name in sorted(found):
        expected = None if known is None else known.get(name)
        if expected is None or not expected.is_of(found[name]):
            expected = Signature.of(found[name])
        result.append((found[name], expected))
    return result


def native_functions(annotations: Mapping[str, str]) -> list[dict[str, Any]]:
    """
    Return the wire signatures of native functions, sorted by name.

    Args:
        annotations: For each name without ``pye_ecall_``: ``"bytes -> bytes"`` or empty for the
            default, or element types of the packed input and output, ``"f8 -> f8"`` for instance
            (a NumPy array of that type goes in and comes out; either side may be ``bytes``).

    Raises:
        ArgumentError: A name or annotation is not usable.

    """
    result = []
    for name in sorted(annotations):
        text = annotations[name] or "bytes -> bytes"
        sides = [side.strip() for side in text.split("->")]
        if len(sides) != 2:
            raise ArgumentError(f"{name}: the annotation is not 'TYPE -> TYPE'", found=text)
        wires = [_native_wire(side, name) for side in sides]
        signature = Signature.from_wire(
            {
                "name": name,
                "kind": "native",
                "params": [{"name": "data", "type": wires[0], "default": False, "keyword": False}],
                "returns": wires[1],
            }
        )
        result.append(signature.to_wire())
    return result


def _native_wire(side: str, name: str) -> Any:
    if side == "bytes":
        return "bytes"
    import numpy as np

    try:
        element = np.dtype(side).newbyteorder("<").str
    except TypeError:
        element = "?"
    if element not in _core.ARRAY_TYPES:
        raise ArgumentError(
            f"{name}: {side!r} is neither bytes nor the element type of an array",
            advice="Such as f8, f4, i8, u1.",
        )
    return ["array", element]
