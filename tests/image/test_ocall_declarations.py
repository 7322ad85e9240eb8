"""Ocalls of an image: text that is parsed and never run, stubs of the entry, what they allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pyenclave.calls.ocalls import Ocall
from pyenclave.errors import ArgumentError, ImageError, ManifestError
from pyenclave.formats.image import Image
from pyenclave.image import build, ocalls
from pyenclave.image.inspect import describe
from pyenclave.image.manifest import OcallEntry

ENTRY = """\
import dataclasses
import pyenclave
from collections.abc import Iterator


@dataclasses.dataclass
class Row:
    name: str


@pyenclave.ocall(allow=["help_out"])
def fetch(row: Row, *, limit: int = 3) -> bytes:
    raise AssertionError


@pyenclave.ecall(private=True)
def help_out(x: int) -> int:
    return x


@pyenclave.ecall
def score(rows: bytes) -> int:
    return len(rows)


@pyenclave.ecall
def rows(count: int) -> Iterator[Row]:
    yield Row("a")
"""


@pytest.mark.parametrize(
    ("text", "params", "returns"),
    [
        ("(key: str) -> bytes", [("key", "str")], "bytes"),
        ("() -> None", [], "None"),
        (" ( a : int , / , b : float ) -> bool ", [("a", "int"), ("b", "float")], "bool"),
        ("(x: list[int] | None) -> int", [("x", ["union", ["list", "int"], "None"])], "int"),
        ("(x: Optional[str], y: Union[int, str]) -> Any",
         [("x", ["union", "str", "None"]), ("y", ["union", "int", "str"])], "any"),
        ("(x: dict[str, list[tuple[int, ...]]]) -> tuple[int, str]",
         [("x", ["dict", "str", ["list", ["tuple...", "int"]]])], ["tuple", "int", "str"]),
        ("(x: npt.NDArray[np.float32]) -> numpy.ndarray",
         [("x", ["array", "<f4"])], ["array", ""]),
        ("(x: Literal['a', -3, None]) -> datetime.datetime",
         [("x", ["literal", "a", -3, None])], "datetime"),
        ("(x: Sequence[UUID], y: Mapping[str, Decimal]) -> typing.Any",
         [("x", ["list", "uuid"]), ("y", ["dict", "str", "decimal"])], "any"),
        ("(x: bytearray, y: typing.Optional[int]) -> frozenset[str]",
         [("x", "bytearray"), ("y", ["union", "int", "None"])], ["frozenset", "str"]),
    ],
)  # fmt: skip
def test_types_are_named_as_in_python(
    text: str, params: list[tuple[str, Any]], returns: object
) -> None:
    wire = ocalls.parse("fetch", text)
    plain = ocalls._plain(wire)
    assert [[item["name"], item["type"]] for item in plain["params"]] == ocalls._plain(params)
    assert plain["returns"] == returns
    assert not any(item["default"] for item in plain["params"])
    assert ocalls._plain(Ocall.from_wire({**wire, "allow": []}).to_wire()) == {**plain, "allow": []}


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "->", "bytes -> bytes", "key: str -> bytes", "(key: str)", "(key) -> bytes",
        "(*a: int) -> int", "(**a: int) -> int", "(a: int = 3) -> int", "(*, a: int = 3) -> int",
        "(a: int, a: int) -> int", "(a: int) -> int: pass\nimport os\ndef g() -> int",
        "(a: int) -> int: pass; x", "(a: int) -> int: 1; ...", "(a: int) -> int:...;import os;x",
        "[T](a: T) -> T", "[T: (int, str)](a: int) -> int", "(a: 'int') -> int",
        "(a: __import__('os').system('true')) -> int", "(a: int if 1 else str) -> int",
        "(a: (int, str)) -> int", "(a: lambda: 0) -> int", "(a: [int]) -> int", "(a: 5) -> int",
        "(a: int.__class__) -> int", "(a: os.PathLike) -> int", "(a: object) -> int",
        "(a: list[int, str]) -> int", "(a: dict[int]) -> int", "(a: int[str]) -> int",
        "(a: Optional[int, str]) -> int", "(a: NDArray[np.object_]) -> int",
        "(a: NDArray[np.float64, np.int8]) -> int", "(a: Literal[1.5]) -> int",
        "(a: Literal[b'x']) -> int", "(a: list[int]) -> Iterator[int]", "(a: int & str) -> int",
        "(a: int) -> (yield)", "(a: (x := int)) -> int", "(_: f'{1}') -> int",
        "(a: " + "list[" * 40 + "int" + "]" * 40 + ") -> int",
        "(a: " + "list[" * 5000 + "int" + "]" * 5000 + ") -> int",
        "(" + "(" * 3000, "(a: int" + "|int" * 900 + ") -> int",
        "(a: int) -> int\n", "(a: int) -> int\0", "(a: int) -> int # \u202e",
        "(" + ", ".join(f"a{i}: int" for i in range(65)) + ") -> int" + " " * 5000,
        "(if: int) -> int", "(a: int) -> int): ...\n(",
    ],
)  # fmt: skip
def test_text_that_is_no_signature_is_refused_and_nothing_of_it_runs(text: str) -> None:
    with pytest.raises(ManifestError, match=r"\[ocalls\] fetch"):
        ocalls.parse("fetch", text)


@pytest.mark.parametrize("name", ["if", "_hidden", "a-b", "x(a: int): ...\ndef y"])
def test_names_that_no_function_can_have_are_refused(name: str) -> None:
    with pytest.raises(ManifestError):
        ocalls.parse(name, "() -> int")


FUNCTIONS = ({"name": "score"}, {"name": "secret", "private": True})


def entry(*allow: str, text: str = "(x: int) -> int") -> OcallEntry:
    return OcallEntry(signature=text, allow=tuple(sorted(allow)))


def test_stubs_and_lines_of_the_manifest_are_one_list() -> None:
    stub = {**ocalls.parse("b", "(x: int) -> int"), "allow": ["secret"]}
    merged = ocalls.merge({"c": entry(), "a": entry("score")}, (stub,), FUNCTIONS)
    assert [item["name"] for item in merged] == ["a", "b", "c"]
    assert ocalls.merge({"b": entry("secret")}, (stub,), FUNCTIONS) == (stub,)


def test_a_contradiction_between_stub_and_manifest_is_refused() -> None:
    stub = {**ocalls.parse("b", "(x: int) -> int"), "allow": ["secret"]}
    for wrong in (entry(), entry("score"), entry("secret", text="(x: str) -> int")):
        with pytest.raises(ManifestError, match="in another way"):
            ocalls.merge({"b": wrong}, (stub,), FUNCTIONS)


def test_what_is_not_there_cannot_be_allowed() -> None:
    with pytest.raises(ManifestError, match="allows other, which is no trusted function"):
        ocalls.merge({"a": entry("other", "secret")}, (), FUNCTIONS)


def test_a_private_function_that_nobody_could_call_is_refused() -> None:
    with pytest.raises(ManifestError, match="secret is private"):
        ocalls.merge({"a": entry("score")}, (), FUNCTIONS)


# ---- images ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("ocalls")
    (folder / "score_it.py").write_text(ENTRY)
    (folder / "enclave.toml").write_text(
        '[enclave]\nname = "n"\nentry = "score_it.py"\nproduct_id = 1\nsecurity_version = 1\n'
        '[ocalls]\nlog = "(text: str) -> None"\n'
        'ask = {signature = "(x: int) -> int", allow = ["score", "rows"]}\n'
    )
    return Image.parse(build.build(folder))


def test_the_image_has_them_measured_and_inspect_shows_them(image: Image) -> None:
    wires = {item["name"]: item for item in image.info.ocalls}
    assert list(wires) == ["ask", "fetch", "log"]
    assert wires["ask"]["allow"] == ["rows", "score"]
    assert wires["fetch"]["allow"] == ["help_out"]
    assert [item["type"] for item in wires["fetch"]["params"]] == [["struct", "Row"], "int"]
    assert [item["default"] for item in wires["fetch"]["params"]] == [False, False]
    functions = {item["name"]: item for item in image.info.functions}
    assert functions["help_out"]["private"] is True
    assert "private" not in functions["score"]
    assert functions["rows"]["returns"] == ["stream", ["struct", "Row"]]
    assert describe(image)["ocalls"] == list(image.info.ocalls)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 5}, "no name"),
        ({"name": "a b"}, "no name"),
        ({"name": "zzz"}, "not sorted"),
        ({"name": "fetch"}, "not sorted"),
        ({"allow": "score"}, "no list"),
        ({"allow": [5]}, "no list"),
        ({"allow": ["score", "rows"]}, "not sorted"),
        ({"allow": ["rows", "rows"]}, "not sorted"),
        ({"allow": ["other"]}, "not there"),
    ],
)
def test_an_image_whose_ocalls_are_malformed_is_refused(
    image: Image, change: Mapping[str, object], said: str
) -> None:
    first, *rest = image.info.ocalls
    from msgspec.structs import replace

    with pytest.raises(ImageError, match=said):
        replace(image.info, ocalls=({**first, **change}, *rest)).check()


def test_a_wire_with_other_members_is_no_ocall(image: Image) -> None:
    wire = dict(image.info.ocalls[0])
    good = Ocall.from_wire(wire)
    assert dataclasses.replace(good, allow=()).to_wire() == {**wire, "allow": []}
    for wrong in (
        {**wire, "kind": "ocall"},
        {name: wire[name] for name in wire if name != "allow"},
        {**wire, "returns": ["stream", "int"]},
        {**wire, "params": [{**wire["params"][0], "default": True}]},
        {**wire, "name": "a.b"},
        {**wire, "allow": None},
    ):
        with pytest.raises(ArgumentError):
            Ocall.from_wire(wrong)


def test_native_code_cannot_declare_them(tmp_path: Path) -> None:
    import shutil
    import subprocess

    import pyenclave

    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "n.c").write_text(
        "#include <pyenclave_trusted.h>\n"
        "PYE_ECALL(same) { *out_len = 0; (void)in; (void)in_len; (void)out; return 0; }\n"
    )
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-I", pyenclave.get_include(), "-o", "libn.so", "n.c"],
        cwd=tmp_path,
        check=True,
    )
    (tmp_path / "enclave.toml").write_text(
        '[enclave]\nname = "n"\nnative = "libn.so"\nproduct_id = 1\nsecurity_version = 1\n'
        '[ocalls]\nlog = "(text: str) -> None"\n'
    )
    with pytest.raises(ManifestError, match="for Python entries"):
        build.build(tmp_path)
