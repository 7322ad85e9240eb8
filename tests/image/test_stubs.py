"""`pyenclave stubs`: typed handles that type checkers accept, and that can be used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from msgspec.structs import replace

from pyenclave.calls.signature import functions_of, native_functions
from pyenclave.cli import main
from pyenclave.errors import ArgumentError
from pyenclave.formats.image import FileEntry, Image, assemble
from pyenclave.image._classes import Classes
from pyenclave.image.stubs import HANDLES, stubs

GOLDEN = Path(__file__).parent.parent / "golden" / "image.bin"
REPOSITORY = Path(__file__).parents[2]

ENTRY = """
from __future__ import annotations
import datetime as dt, decimal, enum, uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Optional, TypedDict
import msgspec
import numpy as np
import numpy.typing as npt
import pyenclave

class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"

class Level(enum.IntEnum):
    LOW = enum.auto()
    HIGH = 7

@dataclass
class Base:
    age: int
    shared: ClassVar[int] = 5

@dataclass(slots=True)
class Applicant(Base):
    income: float = 0.0
    colour: Colour = Colour.RED
    notes: list[str] = field(default_factory=list)
    parent: Applicant | None = None

class Cat(msgspec.Struct, tag=True):
    lives: int

class Dog(msgspec.Struct, tag="dog", frozen=True):
    name: str
    price: decimal.Decimal
    born: Optional["dt.date"] = None

class Camel(msgspec.Struct, rename="camel"):
    some_name: int

class Renamed(msgspec.Struct):
    x: int = msgspec.field(name="y")

class Row(msgspec.Struct, array_like=True):
    x: int

class Point(NamedTuple):
    x: float
    y: float

class Options(TypedDict, total=False):
    depth: int

ROW = np.dtype([("id", "i4"), ("x", "f8")])

@pyenclave.ecall
def score(rows: npt.NDArray[np.float64], threshold: float = 0.5) -> npt.NDArray[np.bool_]:
    return rows > threshold

@pyenclave.ecall
def admit(one: Applicant, level: Level, *, strict: bool = False) -> dict[str, Applicant]:
    return {"x": one}

@pyenclave.ecall
def pets(them: Sequence[Cat | Dog], options: Options, odd: Camel, other: Renamed) -> Dog:
    return Dog("a", decimal.Decimal(1))

@pyenclave.ecall
def places(row: Row) -> tuple[Point, uuid.UUID]:
    return Point(1, 2), uuid.UUID(int=1)

@pyenclave.ecall
def records(rows: Annotated[np.ndarray, ROW], what: Literal["a", 5] | None) -> Any:
    return None
"""

RIGHT = """
import numpy as np
from client import Applicant, Scoring

with Scoring("x.enclave", quiet=True) as enclave:
    flags = enclave.score(np.zeros(3), threshold=0.5)
    some: bool = bool(flags.any())
    who: Applicant = {"age": 5, "colour": "red"}
    found = enclave.admit(who, 7, strict=True)
    age: int = found["x"]["age"]
    enclave.pets([{"type": "Cat", "lives": 9}], {"depth": 3}, {"someName": 1}, {"y": 5})
    (x, y), identity = enclave.places([1])
    print(x + y, identity.hex)
    enclave.options(timeout=1.0)
"""

WRONG = [
    'enclave.score("rows")',
    "enclave.score()",
    'enclave.admit({"age": "5"}, 7)',
    'enclave.admit({"age": 5, "color": "red"}, 7)',
    'enclave.admit({"age": 5, "colour": "green"}, 7)',
    'enclave.admit({"age": 5}, 2)',
    'enclave.admit({"age": 5}, 7, True)',
    'enclave.pets([{"type": "dog", "lives": 9}], {}, {}, {})',
    "text: str = enclave.score(np.zeros(3))",
]


def image_of(source: str, **changes: object) -> Image:
    data = source.encode()
    module = ModuleType("entry")
    sys.modules["entry"] = module
    try:
        exec(compile(data, "entry", "exec"), module.__dict__)
        functions = tuple(functions_of(module))
    finally:
        del sys.modules["entry"]
    first = Image.parse(GOLDEN.read_bytes())
    name = first.info.entry_file
    info = replace(
        first.info,
        functions=functions,
        files=(FileEntry(name=name, size=len(data), executable=True),),
        **changes,
    )
    return Image.parse(assemble(info, first.lock, {name: data}))


@pytest.fixture(scope="module")
def image():
    return image_of(ENTRY)


@pytest.fixture(scope="module")
def client(image, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    stub, module = stubs(image, name="Scoring", handles=["Enclave"])
    (folder / "client.py").write_text(module)
    (folder / "pure").mkdir()
    (folder / "pure" / "client.pyi").write_text(stub)
    return folder


def mypy(folder: Path, source: str, path: Path) -> list[str]:
    """Return what mypy says, a line each."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    (folder / "uses.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary",
               "--cache-dir", str(folder / "cache"), "uses.py"]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=folder,
        env={"MYPYPATH": f"{path}:{REPOSITORY}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if ": error:" in line]


@pytest.mark.slow
@pytest.mark.parametrize("form", [".", "pure"])
def test_type_checkers_take_the_right_uses_and_refuse_each_wrong_one(client, form):
    assert mypy(client, RIGHT, client / form) == []
    first = len(RIGHT.splitlines())
    wrong = RIGHT + "".join(f"    {line}\n" for line in WRONG)
    found = {int(line.split(":")[1]) for line in mypy(client, wrong, client / form)}
    assert found == {first + 1 + place for place in range(len(WRONG))}


def test_a_module_can_be_imported_and_its_class_is_the_handle(client, monkeypatch):
    import pyenclave

    monkeypatch.syspath_prepend(str(client))
    import client as made

    assert made.Scoring is pyenclave.Enclave
    assert set(made.Applicant.__annotations__) == {"age", "income", "colour", "notes", "parent"}
    assert set(made.Cat.__annotations__) == {"type", "lives"}
    assert made.Level.__args__ == (1, 7)


def test_what_cannot_be_told_for_certain_is_a_plain_dict(image):
    stub, _ = stubs(image, name="Scoring")
    ast.parse(stub)
    assert "odd: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]: ..." in stub
    assert "row: list[Any]) -> tuple[tuple[float, float], uuid.UUID]" in stub
    assert "class Camel" not in stub
    assert "them: list[Cat | Dog]" in stub


def test_every_handle_can_be_written_and_those_for_asyncio_are_awaited(image):
    stub, module = stubs(image, name="S", handles=HANDLES)
    ast.parse(stub)
    ast.parse(module)
    for name in ("S", "AsyncS", "SPool", "AsyncSPool"):
        assert f"class {name}(pyenclave." in stub
    assert "async def admit(self, one: Applicant" in stub


def test_streams_are_iterators_and_private_functions_are_not_there(image):
    info = image.info
    stream = {**info.functions[0], "name": "many", "returns": ["stream", "int"]}
    hidden = {**info.functions[0], "name": "hidden", "private": True}
    made = replace(info, functions=(stream, hidden))
    changed = type("Changed", (), {"info": made, "files": image.files})
    stub, _ = stubs(changed, handles=["Enclave", "AsyncEnclave"])
    assert "-> Iterator[int]: ..." in stub
    assert "    def many(" in stub.split("class Async")[1]
    assert "-> AsyncIterator[int]: ..." in stub
    assert "hidden" not in stub


def test_native_functions_and_images_without_functions_have_handles(image):
    functions = tuple(native_functions({"plus": "", "half": "f8 -> f8"}))
    made = replace(image.info, functions=functions, entry_kind="native")
    changed = type("Changed", (), {"info": made, "files": {}})
    stub, _ = stubs(changed, name="N")
    assert "def plus(self, data: bytes) -> bytes: ..." in stub
    assert "data: npt.NDArray[np.float64], *, out: npt.NDArray[np.float64] | None = ..." in stub
    empty = type("Changed", (), {"info": replace(made, functions=()), "files": {}})
    ast.parse(stubs(empty, name="N")[0])


@pytest.mark.parametrize("name", ["class", "1x", "a b", "x;import os", "Any", "pyenclave", ""])
def test_a_name_that_no_class_can_have_is_refused(image, name):
    if not name:
        assert "class " in stubs(image, name=name)[0]  # as if none were given
        return
    with pytest.raises(ArgumentError, match="name of a class"):
        stubs(image, name=name)


@pytest.mark.parametrize(
    "source",
    [
        "def (", "\0", "(" * 5000, "x = " + "[" * 300, "class A(A): pass",
        "class A(B): x: int\nclass B(A): y: int", "import a.b as c, d.e",
        "from . import x", "class Applicant:\n    x: '(('", "@deco\nclass Applicant:\n    x: int",
        "from dataclasses import dataclass\n@dataclass\nclass Applicant:\n    x: unknown",
        "from dataclasses import dataclass\n@dataclass\nclass Applicant:\n    x: " + "list[" * 90 + "int" + "]" * 90,  # noqa: E501
    ],
)  # fmt: skip
def test_a_hostile_source_is_never_executed_and_gives_plain_dicts(image, source):
    name = image.info.entry_file
    changed = type("Changed", (), {"info": image.info, "files": {name: source.encode()}})
    stub, module = stubs(changed, name="S")
    ast.parse(stub)
    ast.parse(module)
    assert "one: dict[str, Any]" in stub


def test_an_image_cannot_write_code_into_a_stub(image):
    info = replace(image.info, name="x\n\nimport os; os.system('id')  #")
    changed = type("Changed", (), {"info": info, "files": image.files})
    for text in stubs(changed, name="S"):
        assert not [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) or (isinstance(node, ast.alias) and node.name == "os")
        ]


def test_the_command_writes_both_forms(image, tmp_path, capsys):
    path = tmp_path / "x.enclave"
    path.write_bytes(GOLDEN.read_bytes())
    assert main(["stubs", str(path), "--name", "Golden"]) == 0
    shown = capsys.readouterr().out
    assert "class Golden(pyenclave.Enclave):" in shown
    for suffix in ("py", "pyi"):
        output = tmp_path / f"client.{suffix}"
        assert main(["stubs", str(path), "--json", "-o", str(output)]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["file"] == str(output)
        assert output.read_text() == said["text"]
        ast.parse(said["text"])
        assert ("TYPE_CHECKING" in said["text"]) is (suffix == "py")
    assert main(["stubs", str(path), "--name", "class"]) == 2


def test_items_of_typed_dicts_keep_whether_they_must_be_there() -> None:
    source = b"""
from typing import Annotated, NotRequired, Required, TypedDict
import typing
import typing_extensions as te

class Options(te.TypedDict, total=False):
    must: Required[te.ReadOnly[int]]
    may: te.ReadOnly[NotRequired[str]]
    plain: "te.ReadOnly[float]"
    noted: Annotated[typing.Required[int], "a note"]

class Whole(TypedDict):
    must: te.ReadOnly[int]
    may: te.NotRequired[list[int]]
"""
    classes = Classes(source)
    assert classes.struct("Options") == "Options"
    assert classes.struct("Whole") == "Whole"
    assert classes.used == {
        "Options": (
            "class Options(TypedDict):\n"
            "    must: int\n"
            "    may: NotRequired[str]\n"
            "    plain: NotRequired[float]\n"
            "    noted: int"
        ),
        "Whole": "class Whole(TypedDict):\n    must: int\n    may: NotRequired[list[int]]",
    }
