"""
Classes of an entry as a side sees them that has them not: read from the source, never executed.

An image's table names the classes of its signatures; their fields are in the measured source. What
cannot be read for certain becomes ``dict[str, Any]``.
"""

from __future__ import annotations

import ast
import keyword
import re
from dataclasses import dataclass, field

__all__ = ["Classes"]

_MAX_SOURCE = 4 << 20  # bytes; more is not parsed
_MAX_DEPTH = 32

# What an entry may name in an annotation, and how a stub writes it.
_KNOWN = {
    **{name: name for name in ("bool", "bytes", "bytearray", "float", "int", "str")},
    **{name: name for name in ("dict", "frozenset", "list", "set", "tuple")},
    "datetime.date": "datetime.date",
    "datetime.datetime": "datetime.datetime",
    "datetime.time": "datetime.time",
    "datetime.timedelta": "datetime.timedelta",
    "decimal.Decimal": "decimal.Decimal",
    "uuid.UUID": "uuid.UUID",
    "numpy.ndarray": "npt.NDArray[Any]",
    "typing.Any": "Any",
    "typing.Dict": "dict",
    "typing.FrozenSet": "frozenset",
    "typing.List": "list",
    "typing.Set": "set",
    "typing.Tuple": "tuple",
    **{
        f"{module}.{name}": plain
        for module in ("typing", "collections.abc")
        for name, plain in (
            ("Collection", "list"),
            ("Mapping", "dict"),
            ("MutableMapping", "dict"),
            ("Sequence", "list"),
        )
    },
}
_SCALARS = {
    "bool_": "bool",
    "bool": "bool",
    **{name: name for name in ("complex64", "complex128", "float16", "float32", "float64")},
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "datetime64": "datetime64",
    "timedelta64": "timedelta64",
}


class _UnknownError(Exception):
    """An annotation or a class that cannot be told for certain."""


@dataclass
class Classes:
    """
    The classes of one entry.

    Args:
        source: The entry's source.
        taken: Names that a stub uses for something else.

    Attributes:
        used: Names of those that a stub must define, in the order of their first use.

    """

    source: bytes
    taken: frozenset[str] = frozenset()
    used: dict[str, str] = field(default_factory=dict)
    _nodes: dict[str, ast.ClassDef] = field(default_factory=dict)
    _imports: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.source) > _MAX_SOURCE:
            return
        try:
            tree = ast.parse(self.source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self._nodes[node.name] = node
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname:
                        self._imports[alias.asname] = alias.name
                    else:
                        self._imports[alias.name.split(".")[0]] = alias.name.split(".")[0]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                for alias in node.names:
                    self._imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def struct(self, name: str) -> str:
        """Return how a stub writes the struct *name*, and see to its definition."""
        return self._use(name, "dict[str, Any]")

    def exact(self, name: str, seen: frozenset[str] = frozenset()) -> bool:
        """
        Whether what comes back for the struct *name* is what `struct` says.

        A side that has not the class does not know the types of its fields: in MessagePack a
        Decimal is text and a tuple is a list.
        """
        text = self.used.get(name, "")
        if re.search(r"\b(datetime|decimal|uuid|npt)\.|\b(bytearray|frozenset|set|tuple)\b", text):
            return False
        others = (other for other in self.used if other not in seen and other != name)
        seen = seen | {name}
        return all(self.exact(other, seen) for other in others if re.search(rf"\b{other}\b", text))

    def enum(self, name: str) -> str:
        """Return how a stub writes the values of the enum *name*."""
        return self._use(name, "Any")

    def _use(self, name: str, otherwise: str) -> str:
        if name in self.used:
            return name
        if name not in self._nodes or name in self.taken or keyword.iskeyword(name):
            return otherwise
        self.used[name] = ""  # it may refer to itself
        before = list(self.used)
        try:
            self.used[name] = self._define(self._nodes[name])
        except (_UnknownError, RecursionError):
            for other in list(self.used):  # also those that only it needs
                if other not in before or other == name:
                    del self.used[other]
            del self._nodes[name]
            return otherwise
        return name

    # ---- definitions --------------------------------------------------------------------------

    def _define(self, node: ast.ClassDef) -> str:
        kinds = self._kinds(node)
        if "enum" in kinds:
            return f"{node.name} = {self._values(node, kinds)}"
        if kinds & {"tuple", "row"} or not kinds:
            raise _UnknownError
        lines = [f"    {name}: {text}" for name, text in self._members(node, 0).items()]
        return "\n".join([f"class {node.name}(TypedDict):", *(lines or ["    pass"])])

    def _kinds(self, node: ast.ClassDef, depth: int = 0) -> set[str]:
        """Return what a class is, by its bases and decorators; raise if one is not known."""
        if depth > _MAX_DEPTH:
            raise _UnknownError
        kinds: set[str] = set()
        for decorator in node.decorator_list:
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            if self._name(call) != "dataclasses.dataclass":
                raise _UnknownError
            kinds.add("dataclass")
        for base in node.bases:
            name = self._name(base)
            if name in self._nodes:
                kinds |= self._kinds(self._nodes[name], depth + 1)
            elif name in ("enum.Enum", "enum.IntEnum", "enum.StrEnum"):
                kinds |= {"enum", name}
            elif name in ("int", "str"):
                kinds.add(f"enum.{'IntEnum' if name == 'int' else 'Enum'}")
            elif name == "msgspec.Struct":
                kinds.add("struct")
            elif name in ("typing.TypedDict", "typing_extensions.TypedDict"):
                kinds.add("typeddict")
            else:
                raise _UnknownError
        for option in node.keywords:
            plain = isinstance(option.value, ast.Constant)
            if option.arg == "array_like":
                kinds.add("row")
            elif option.arg not in _OPTIONS or not plain:
                raise _UnknownError
        return kinds

    def _members(self, node: ast.ClassDef, depth: int) -> dict[str, str]:
        if depth > _MAX_DEPTH:
            raise _UnknownError
        found: dict[str, str] = {}
        for base in reversed(node.bases):
            inherited = self._nodes.get(self._name(base))
            if inherited is not None:
                found.update(self._members(inherited, depth + 1))
        options = {item.arg: item.value for item in node.keywords}
        tag = options.get("tag")
        if isinstance(tag, ast.Constant) and tag.value not in (None, False):
            key = options.get("tag_field")
            named = key.value if isinstance(key, ast.Constant) else "type"
            value = node.name if tag.value is True else tag.value
            if not isinstance(named, str) or not named.isidentifier():
                raise _UnknownError
            found[named] = f"Literal[{value!r}]"
        total = options.get("total")
        optional = isinstance(total, ast.Constant) and total.value is False
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            name = item.target.id
            inside, required = self._unqualified(item.annotation)
            text = self._member(item, inside)
            if text is None:
                continue
            left_out = item.value is not None and _has_default(item.value)
            may_lack = left_out or optional if required is None else not required
            found[name] = f"NotRequired[{text}]" if may_lack else text
        return found

    def _unqualified(self, node: ast.expr) -> tuple[ast.expr, bool | None]:
        """Return an item's type without what says whether it must be there, and that."""
        required: bool | None = None
        while True:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node = _parsed(node.value)
                continue
            name = self._name(node.value) if isinstance(node, ast.Subscript) else ""
            word = name.rpartition(".")[2]
            if name.partition(".")[0] not in ("typing", "typing_extensions"):
                return node, required
            if word in ("Required", "NotRequired"):
                required = word == "Required"
            elif word not in ("ReadOnly", "Annotated"):
                return node, required
            assert isinstance(node, ast.Subscript)
            node = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice

    def _member(self, item: ast.AnnAssign, inside: ast.expr) -> str | None:
        if isinstance(inside, ast.Subscript) and self._name(inside.value) == "typing.ClassVar":
            return None
        if isinstance(item.value, ast.Call) and any(
            option.arg in ("name", "init") for option in item.value.keywords
        ):
            raise _UnknownError  # another name on the wire, or none
        return self._annotation(inside, 0)

    def _values(self, node: ast.ClassDef, kinds: set[str]) -> str:
        values: list[object] = []
        for item in node.body:
            if not isinstance(item, ast.Assign):
                continue
            if len(item.targets) != 1 or not isinstance(item.targets[0], ast.Name):
                raise _UnknownError
            name, value = item.targets[0].id, item.value
            if name.startswith("_"):
                continue
            if isinstance(value, ast.Constant) and type(value.value) in (int, str):
                values.append(value.value)
            elif isinstance(value, ast.Call) and self._name(value.func) == "enum.auto":
                before = [one for one in values if isinstance(one, int)]
                values.append(
                    name.lower() if "enum.StrEnum" in kinds else max(before, default=0) + 1
                )
            else:
                raise _UnknownError
        if not values:
            raise _UnknownError
        return f"Literal[{', '.join(map(repr, dict.fromkeys(values)))}]"

    # ---- annotations --------------------------------------------------------------------------

    def _name(self, node: ast.expr) -> str:
        """Return the full name of what a name stands for."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self._imports.get(node.id, node.id), *reversed(parts)])

    def _annotation(self, node: ast.expr, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise _UnknownError
        if isinstance(node, ast.Constant):
            if node.value is None:
                return "None"
            if isinstance(node.value, str):
                return self._annotation(_parsed(node.value), depth + 1)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            left, right = (self._annotation(side, depth + 1) for side in (node.left, node.right))
            return f"{left} | {right}"
        if isinstance(node, ast.Subscript):
            return self._subscript(node, depth)
        name = self._name(node)
        if name in self._nodes:
            text = self._use(name, "")
            if not text:
                raise _UnknownError
            return text
        if name in _KNOWN:
            return _KNOWN[name]
        raise _UnknownError

    def _subscript(self, node: ast.Subscript, depth: int) -> str:
        name = self._name(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name in ("typing.Annotated", "typing_extensions.Annotated"):
            return self._annotation(parts[0], depth + 1)
        if name == "typing.Literal":
            values = [part.value for part in parts if isinstance(part, ast.Constant)]
            if len(values) != len(parts) or not all(
                isinstance(value, str | int | None) for value in values
            ):
                raise _UnknownError
            return f"Literal[{', '.join(map(repr, values))}]"
        if name == "numpy.typing.NDArray":
            scalar = _SCALARS.get(self._name(parts[0]).removeprefix("numpy."))
            return f"npt.NDArray[np.{scalar}]" if scalar else "npt.NDArray[Any]"
        if name == "typing.Optional":
            return f"{self._annotation(parts[0], depth + 1)} | None"
        if name == "typing.Union":
            return " | ".join(self._annotation(part, depth + 1) for part in parts)
        outer = _KNOWN.get(name, "")
        if outer not in ("dict", "frozenset", "list", "set", "tuple"):
            raise _UnknownError
        inner = [
            "..."
            if isinstance(part, ast.Constant) and part.value is Ellipsis
            else self._annotation(part, depth + 1)
            for part in parts
        ]
        return f"{outer}[{', '.join(inner)}]"


# Options of a class that change nothing of the names of its fields.
_OPTIONS = frozenset(
    {
        "cache_hash", "dict", "eq", "forbid_unknown_fields", "frozen", "gc", "kw_only",
        "omit_defaults", "order", "repr_omit_defaults", "tag", "tag_field", "total", "weakref",
    }
)  # fmt: skip


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _UnknownError from None


def _has_default(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else ""
        name = value.func.id if isinstance(value.func, ast.Name) else name
        if name == "field":
            return any(option.arg in ("default", "default_factory") for option in value.keywords)
    return True
