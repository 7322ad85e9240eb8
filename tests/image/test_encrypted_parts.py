"""``[encrypted]``: what building, inspecting and comparing images with encrypted parts says."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pyenclave import cli
from pyenclave.errors import ImageError, ManifestError
from pyenclave.formats.image import EncryptedParts, Image, assemble
from pyenclave.image import build, closure, diff, inspect
from pyenclave.image.manifest import load
from pyenclave.measurement.image import measure_image
from pyenclave.sealed import parts

KEY = bytes(range(32))
ENTRY = """\
import pyenclave


@pyenclave.ecall
def score(x: int) -> int:
    import algo

    return algo.score(x)
"""
ALGO = """\
import colorsys

from fractions import Fraction


def score(x: int) -> int:
    import helper

    return helper.double(x) + int(Fraction(4, 2)) + int(colorsys.rgb_to_hsv(0, 0, 1)[2])
"""
MANIFEST = """\
[enclave]
name = "hidden"
entry = "entry.py"
product_id = 7
security_version = 3

[files]
"model.bin" = "model.bin"
"clear.bin" = "model.bin"

[encrypted]
code = ["algo.py", "src/helper.py"]
files = ["model.bin"]
key = "https://vault.example/keys/algo"
"""
MODEL = b"planted weights " * 500


@pytest.fixture(scope="module", autouse=True)
def _closures() -> Iterator[None]:
    """The closure of the same sources is taken once: a fresh process each, else."""
    taken: dict[object, closure.Closure] = {}
    take = closure.take

    def once(entry: closure.Entry, **options: Any) -> closure.Closure:
        hidden = tuple((one.shown, one.source) for one in options["hidden"])
        mark = (entry.source, hidden, tuple(options["extra"]))
        if mark not in taken:
            taken[mark] = take(entry, **options)
        return taken[mark]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closure, "take", once)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "src").mkdir()
    (folder / "entry.py").write_text(ENTRY)
    (folder / "algo.py").write_text(ALGO)
    (folder / "src" / "helper.py").write_text("def double(x):\n    return 2 * x  # planted\n")
    (folder / "model.bin").write_bytes(MODEL)
    (folder / "enclave.toml").write_text(MANIFEST)
    return folder


@pytest.fixture(scope="module")
def image(folder: Path) -> bytes:
    return build.build(folder, data_key=KEY)


def _with(folder: Path, tmp_path: Path, **texts: str) -> Path:
    """A copy of the project with other files."""
    for path in folder.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    for name, text in texts.items():
        (
            tmp_path / name.replace("__", "/").replace("_toml", ".toml").replace("_py", ".py")
        ).write_text(text)
    return tmp_path


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('files = ["model.bin"]', 'files = ["other.bin"]', "names that"),
        ('files = ["model.bin"]', 'files = "model.bin"', "files"),
        ('code = ["algo.py", "src/helper.py"]', 'code = ["algo.py", "src/algo.py"]', "different"),
        ('code = ["algo.py", "src/helper.py"]', 'code = ["algo.txt"]', "different names"),
        ('code = ["algo.py", "src/helper.py"]', 'code = ["a-b.py"]', "different names"),
        ('key = "https://vault.example/keys/algo"', 'key = "http://v/keys/a"', "https://VAULT"),
        ('key = "https://vault.example/keys/algo"', 'key = "https://v/keys/a b"', "https://VAULT"),
        ('key = "https://vault.example/keys/algo"', "other = 1", "not a known key"),
        ('code = ["algo.py", "src/helper.py"]\nfiles = ["model.bin"]', "", "names nothing"),
        ('entry = "entry.py"', 'native = "entry.so"', "Python entries"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    folder: Path, tmp_path: Path, old: str, new: str, words: str
):
    assert old in MANIFEST
    path = tmp_path / "enclave.toml"
    path.write_text(MANIFEST.replace(old, new))
    with pytest.raises(ManifestError, match=words):
        load(path)


def test_without_a_data_key_or_with_a_needless_one_nothing_is_built(folder: Path, tmp_path: Path):
    with pytest.raises(ManifestError, match="needs a data key"):
        build.build(folder)
    clear = MANIFEST[: MANIFEST.index("[encrypted]")]
    with pytest.raises(ManifestError, match="nothing is to be encrypted"):
        build.build(_with(folder, tmp_path, enclave_toml=clear), data_key=KEY)
    with pytest.raises(ManifestError, match="nothing is to be encrypted"):
        build.build(folder / "entry.py", data_key=KEY)
    with pytest.raises(ValueError, match="32 bytes"):
        build.build(folder, data_key=b"short")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"entry_py": "import algo\n" + ENTRY}, "import it inside a function"),
        ({"algo_py": "def f(:\n"}, "algo.py"),
        pytest.param(
            {"algo_py": "import pyenclave.cli\n"}, "does not run inside", marks=pytest.mark.long
        ),
        (
            {"enclave_toml": MANIFEST.replace('"algo.py"', '"json.py"'), "json_py": ""},
            "called like the module json",
        ),
        pytest.param(
            {"enclave_toml": MANIFEST.replace('"algo.py"', '"numpy.py"'), "numpy_py": ""},
            "that of another module",
            marks=pytest.mark.long,
        ),
        (
            {"enclave_toml": MANIFEST.replace('"algo.py"', '"src/entry.py"'), "src__entry_py": ""},
            "that of another module",
        ),
    ],
)
def test_code_that_could_not_run_inside_is_refused_when_it_is_built(
    folder: Path, tmp_path: Path, texts: dict[str, str], words: str
):
    with pytest.raises(ImageError, match=words):
        build.build(_with(folder, tmp_path, **texts), data_key=KEY)


def _changed(image: bytes, **changes: Any) -> bytes:
    """The image with another table of encrypted parts, checksum and all."""
    read = Image.parse(image)
    assert read.info.encrypted is not None
    encrypted = (
        None if changes.get("gone") else msgspec.structs.replace(read.info.encrypted, **changes)
    )
    info = msgspec.structs.replace(read.info, encrypted=encrypted)
    return assemble(info, read.lock, {name: bytes(data) for name, data in read.files.items()})


@pytest.mark.parametrize(
    "changes",
    [
        {"gone": True},
        {"check": ""},
        {"check": "A" * 64},
        {"check": "0" * 63},
        {"key": "k" * 1025},
        {"key": "a\nb"},
        {"files": ()},
        {"files": ("files/model.bin", "code/algo.py", "code/helper.py")},
        {"files": ("code/algo.py", "code/algo.py", "code/helper.py")},
        {"files": ("code/algo.py", "code/helper.py", "files/none")},
        {"files": ("code/algo.py", "files/model.bin")},
        {"files": ("code/algo.py", "code/helper.py", "entry/entry.py")},
    ],
)
def test_an_image_that_says_other_things_is_refused(image: bytes, changes: dict[str, Any]):
    with pytest.raises(ImageError):
        _changed(image, **changes)


def test_a_short_part_and_a_module_in_the_entrys_place_are_refused(image: bytes):
    read = Image.parse(image)
    files = {name: bytes(data) for name, data in read.files.items()}
    for name, data, words in (
        ("code/algo.py", b"x" * 55, "too short"),
        ("code/entry.py", b"x" * 56, "entry's place"),
        ("code/a-b.py", b"x" * 56, "name that can be imported"),
        ("code/sub/x.py", b"x" * 56, "name that can be imported"),
    ):
        both = {**files, name: data}
        entries = tuple(
            msgspec.structs.replace(
                read.info.files[0], name=n, size=len(d), executable=n.startswith("entry/")
            )
            for n, d in sorted(both.items())
        )
        encrypted = EncryptedParts(
            check="0" * 64,
            files=tuple(sorted({name, "code/algo.py", "code/helper.py", "files/model.bin"})),
        )
        info = msgspec.structs.replace(read.info, files=entries, encrypted=encrypted)
        with pytest.raises(ImageError, match=words):
            assemble(info, read.lock, both)


# ---- what is built -------------------------------------------------------------------------------


def test_nothing_of_the_parts_is_in_the_image_and_all_of_it_is_measured(image: bytes):
    for planted in (b"planted", b"Fraction(", b"def score(x: int) -> int:\n    import helper"):
        assert planted not in image.replace(MODEL, b"")  # clear.bin is the same file, in clear
    read = Image.parse(image)
    assert bytes(read.files["files/clear.bin"]) == MODEL
    root = parts.root_of(KEY)
    assert parts.decrypt(root, "files/model.bin", read.files["files/model.bin"]) == MODEL
    assert parts.decrypt(root, "code/algo.py", read.files["code/algo.py"]) == ALGO.encode()
    assert read.info.encrypted is not None
    assert read.info.encrypted.modules == {"algo": "code/algo.py", "helper": "code/helper.py"}
    assert read.info.encrypted.check == parts.check_value(root).hex()
    # What only encrypted code imports is on the lock list.
    assert {"fractions", "colorsys"} <= {module.name for module in read.lock.modules}
    assert not {"algo", "helper"} & {module.name for module in read.lock.modules}


def test_an_image_is_a_function_of_its_inputs_and_the_data_key(folder: Path, image: bytes):
    assert build.build(folder, data_key=KEY) == image
    other = build.build(folder, data_key=bytes(32))
    assert measure_image(Image.parse(other)) != measure_image(Image.parse(image))
    rows = diff.diff(Image.parse(image), Image.parse(other))
    assert {row["name"] for row in rows} == {
        "encrypted.check",
        "code/algo.py (encrypted)",
        "code/helper.py (encrypted)",
        "files/model.bin (encrypted)",
    }


def test_a_change_of_encrypted_code_changes_the_measurement_and_diff_names_the_part(
    folder: Path, tmp_path: Path, image: bytes
):
    changed = _with(folder, tmp_path, algo_py=ALGO + "# changed\n")
    other = build.build(changed, data_key=KEY)
    a, b = Image.parse(image), Image.parse(other)
    assert measure_image(a) != measure_image(b)
    (row,) = diff.diff(a, b)
    assert (row["what"], row["name"], row["measured"]) == ("file", "code/algo.py (encrypted)", True)


def test_inspect_names_what_cannot_be_read(
    image: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = inspect.describe(Image.parse(image))
    assert [row["name"] for row in found["files"] if row.get("encrypted")] == [
        "code/algo.py",
        "code/helper.py",
        "files/model.bin",
    ]
    assert [row["name"] for row in found["trusted_base"]["encrypted"]] == ["algo", "helper"]
    assert found["options"]["encrypted.key"] == "https://vault.example/keys/algo"
    (tmp_path / "x.enclave").write_bytes(image)
    assert cli.main(["inspect", str(tmp_path / "x.enclave")]) == 0
    said = capsys.readouterr().out
    assert "encrypted code, which only its owner can read: algo, helper" in said
    assert "files/model.bin  (encrypted)" in said


def test_the_command_makes_the_data_key_once_and_keeps_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    key, out = tmp_path / "algo.key", tmp_path / "x.enclave"
    command = ["build", str(folder), "-o", str(out), "--data-key-file", str(key), "--json"]
    assert cli.main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["encrypted"] == ["code/algo.py", "code/helper.py", "files/model.bin"]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    first = out.read_bytes(), key.read_bytes()
    assert len(first[1]) == 32
    assert cli.main(command) == 0
    capsys.readouterr()
    assert (out.read_bytes(), key.read_bytes()) == first
    key.chmod(0o644)
    assert cli.main(command) == 0
    assert "others may read" in capsys.readouterr().err
    key.write_bytes(bytes(31))
    assert cli.main(command) == 2


@pytest.fixture(params=["early", "late"])
def refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of a place that is not there, by the look before the work, or without it."""
    if request.param == "early":
        return "no such directory: {folder}\n"
    monkeypatch.setattr("pyenclave.cli._targets.check_target", lambda *_args, **_named: None)
    return "No such file or directory: {path}\n"


def test_a_build_that_fails_leaves_no_new_key(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: str
):
    plain = tmp_path / "plain.py"
    plain.write_text("import pyenclave\n\n\n@pyenclave.ecall\ndef f() -> int:\n    return 1\n")
    key, out = tmp_path / "algo.key", tmp_path / "x.enclave"
    tail = ["--data-key-file", str(key)]
    assert cli.main(["build", str(plain), "-o", str(out), *tail]) == 2
    assert "a data key is given" in capsys.readouterr().err
    out = tmp_path / "no" / "x"
    assert cli.main(["build", str(folder), "-o", str(out), *tail]) == 2
    assert refused.format(folder=out.parent, path=out) in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["plain.py"]


def test_a_key_that_cannot_be_kept_leaves_no_image(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: str
):
    """Nobody could open it."""
    key, out = tmp_path / "no" / "algo.key", tmp_path / "x.enclave"
    assert cli.main(["build", str(folder), "-o", str(out), "--data-key-file", str(key)]) == 2
    assert refused.format(folder=key.parent, path=key) in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_an_image_without_encrypted_parts_is_what_it_was(built: bytes):
    assert b"encrypted" not in Image.parse(built).info.to_bytes()
