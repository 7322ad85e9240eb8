"""Typed handles for the functions of an image, written as Python that type checkers read."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pyenclave.errors import ArgumentError
from pyenclave.formats.image import Image
from pyenclave.image._classes import Classes

__all__ = ["HANDLES", "stubs"]

# Handle → (what its class is called, whether it is awaited).
HANDLES = {
    "Enclave": ("{}", False),
    "AsyncEnclave": ("Async{}", True),
    "EnclavePool": ("{}Pool", False),
    "AsyncEnclavePool": ("Async{}Pool", True),
}

_PLAIN = {
    "None": "None",
    "any": "Any",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "str",
    "bytes": "bytes",
    "bytearray": "bytearray",
    "date": "datetime.date",
    "datetime": "datetime.datetime",
    "time": "datetime.time",
    "timedelta": "datetime.timedelta",
    "decimal": "decimal.Decimal",
    "uuid": "uuid.UUID",
}
# The names that a stub itself uses, so that no class of the entry may have them.
_TAKEN = frozenset(
    {
        "Any", "AsyncIterator", "Iterator", "Literal", "NotRequired", "TYPE_CHECKING", "TypedDict",
        "annotations", "bool", "bytearray", "bytes", "datetime", "decimal", "dict", "float",
        "frozenset", "int", "list", "np", "npt", "pa", "pyenclave", "set", "str", "tuple", "uuid",
    }
)  # fmt: skip
_IMPORTS = (
    ("datetime.", "import datetime"),
    ("decimal.", "import decimal"),
    ("uuid.", "import uuid"),
    ("np.", "import numpy as np"),
    ("npt.", "import numpy.typing as npt"),
    ("pa.", "import pyarrow as pa"),
)
_FROM_TYPING = ("Any", "Literal", "NotRequired", "TypedDict")


def stubs(
    image: Image, *, name: str | None = None, handles: Iterable[str] = ("Enclave",)
) -> tuple[str, str]:
    """
    Write typed handles for the functions of *image*.

    Args:
        image: The image; its entry's source is read, not executed.
        name: What the handle's class is called; from the image's name if None.
        handles: Which of ``HANDLES`` to write.

    Returns:
        A ``.pyi`` that type checkers alone read, and a ``.py`` that can also be imported: there the
        classes are those of pyenclave.

    Raises:
        ArgumentError: *name* cannot be that of a class.

    """
    info = image.info
    called = name or _class_name(info.entry_module or info.name)
    if not called.isidentifier() or keyword.iskeyword(called) or called in _TAKEN:
        raise ArgumentError(f"{called!r} cannot be the name of a class", advice="Give another.")
    names = {kind: HANDLES[kind][0].format(called) for kind in handles}
    source = b""
    if info.entry_kind == "python":
        source = bytes(image.files.get(info.entry_file, b""))
    classes = Classes(source, _TAKEN | frozenset(names.values()))
    functions = [dict(item) for item in info.functions if not item.get("private")]
    bodies = {
        kind: [
            f"class {names[kind]}(pyenclave.{kind}):",
            *[_method(item, classes, is_async=HANDLES[kind][1]) for item in functions],
            *([] if functions else ["    pass"]),
        ]
        for kind in names
    }
    defined = "\n\n".join(classes.used.values())
    handle = "\n\n".join("\n".join(body) for body in bodies.values())
    head = f"# Made by `pyenclave stubs` from {_safe(info.name)}. Do not edit: make it anew."
    imports = _imports(defined + handle)
    stub = f"{head}\n\n{imports}\n\n{defined}\n\n{handle}\n"
    indented = "\n".join(f"    {line}" if line else "" for line in handle.splitlines())
    plain = "\n".join(f"    {names[kind]} = pyenclave.{kind}" for kind in names)
    checked = imports.replace("\nimport pyarrow as pa", "")
    if "pa." in defined + handle:  # a host may do without it
        indented = f"    import pyarrow as pa\n\n{indented}"
    module = (
        f"{head}\n\nfrom __future__ import annotations\n\n{checked}\n"
        f"from typing import TYPE_CHECKING\n\n{defined}\n\n"
        f"if TYPE_CHECKING:\n\n{indented}\n\nelse:\n{plain}\n"
    )
    return _tidy(stub), _tidy(module)


def _class_name(text: str) -> str:
    words = [word for word in re.split(r"[^0-9A-Za-z]+", text) if word]
    name = "".join(word[0].upper() + word[1:] for word in words)
    return name if name[:1].isalpha() else f"Enclave{name}"


def _safe(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:100])


def _tidy(text: str) -> str:
    return re.sub(r"\n{4,}", "\n\n\n", text)


def _imports(text: str) -> str:
    typing = [name for name in _FROM_TYPING if re.search(rf"\b{name}\b", text)]
    abc = [name for name in ("AsyncIterator", "Iterator") if re.search(rf"\b{name}\b", text)]
    lines = [line for mark, line in _IMPORTS if re.search(rf"\b{re.escape(mark)}", text)]
    if abc:
        lines.append(f"from collections.abc import {', '.join(abc)}")
    if typing:
        lines.append(f"from typing import {', '.join(typing)}")
    return "\n".join([*lines, "", "import pyenclave"])


def _method(function: Mapping[str, Any], classes: Classes, *, is_async: bool) -> str:
    parts = ["self"]
    params = [dict(item) for item in function["params"]]
    after = False
    for item in params:
        if item["keyword"] and not after:
            after = True
            parts.append("*")
        default = " = ..." if item["default"] else ""
        parts.append(f"{item['name']}: {_written(item['type'], classes)}{default}")
    wire = function["returns"]
    kind = wire[0] if isinstance(wire, list | tuple) else ""
    returned = _written(wire[1] if kind == "stream" else wire, classes, result=True)
    if kind == "array" and all(item["name"] != "out" for item in params):
        if not after:
            parts.append("*")
        parts.append(f"out: {returned} | None = ...")
    if kind == "stream":
        iterator = "AsyncIterator" if is_async else "Iterator"
        return f"    def {function['name']}({', '.join(parts)}) -> {iterator}[{returned}]: ..."
    word = "async def" if is_async else "def"
    return f"    {word} {function['name']}({', '.join(parts)}) -> {returned}: ..."


def _written(wire: Any, classes: Classes, *, result: bool = False) -> str:
    """Return a wire type as an annotation."""
    if isinstance(wire, str):
        return _PLAIN[wire]
    kind, parts = wire[0], list(wire[1:])
    if kind == "struct":
        name = classes.struct(str(parts[0]))
        return "dict[str, Any]" if result and not classes.exact(name) else name
    if kind == "enum":
        return classes.enum(str(parts[0]))
    if kind == "checked":
        return _written(parts[0], classes)
    if kind == "row":
        return "list[Any]"
    if kind == "array":
        return f"npt.NDArray[{_scalar(parts[0])}]"
    if kind == "records":
        text = parts[0] if isinstance(parts[0], str) else "|V"
        return f"npt.NDArray[{_scalar(text)}]"
    if kind == "arrow":
        return f"pa.{parts[0]}"
    if kind == "literal":
        return f"Literal[{', '.join(map(repr, parts))}]"
    inner = [_written(part, classes, result=result) for part in parts]
    if kind == "union":
        return "Any" if "Any" in inner else " | ".join(dict.fromkeys(inner))
    if kind == "tuple...":
        return f"tuple[{inner[0]}, ...]"
    if kind == "tuple":
        return f"tuple[{', '.join(inner) or '()'}]"
    return f"{kind}[{', '.join(inner)}]"


def _scalar(name: str) -> str:
    if not name:
        return "Any"
    kinds = {"M": "datetime64", "m": "timedelta64", "V": "void", "S": "bytes_", "U": "str_"}
    if name[1] in kinds:
        return f"np.{kinds[name[1]]}"
    import numpy as np

    found = np.dtype(name).name
    return "np.bool_" if found == "bool" else f"np.{found}"
