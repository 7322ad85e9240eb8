"""Building: what is refused, and that the same inputs give the same bytes anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyenclave.errors import ImageError, ManifestError
from pyenclave.formats.image import Image
from pyenclave.image import build
from pyenclave.measurement.image import measure_image

ROOT = Path(build.__file__).parents[2]
ECALL = "import pyenclave\n@pyenclave.ecall\n"


def script(tmp_path: Path, text: str, name: str = "score.py") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1\n\nimport absent_module\n", r"score\.py:3: .*absent_module.*installed in"),
        ("def f(:\n", r"score\.py:1: SyntaxError"),
        ("\n1 / 0\n", r"score\.py:2: ZeroDivisionError"),
        ("raise SystemExit(3)\n", r"score\.py:1: SystemExit"),
        ("raise KeyboardInterrupt\n", r"score\.py:1: KeyboardInterrupt"),
        ("import os\nos._exit(0)\n", "ended early"),
        ("import os\nos.kill(os.getpid(), 9)\n", "ended early"),
        ("from pyenclave import Enclave\n", r"score\.py:1: .*does not run inside.*__main__"),
        ("import pyenclave.image\n", "does not run inside"),
        ("x = 1\n", "no function can be called"),
        (ECALL + "def f(x) -> int: return 1\n", "annotation"),
        (ECALL + "def call(x: int) -> int: return 1\n", "call"),
        (ECALL + "def attest() -> int: return 1\n", "attest"),
        (ECALL + "def _hidden() -> int: return 1\n", "_hidden"),
    ],
)
def test_an_entry_that_cannot_run_inside_is_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ImageError, match=f"(?s){named}"):
        build.build_script(script(tmp_path, text))


@pytest.mark.parametrize("name", ["json.py", "os.py", "numpy.py", "pyenclave.py", "msgspec.py"])
def test_an_entry_called_like_a_module_of_the_runtime_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="of the runtime"):
        build.build_script(script(tmp_path, ECALL + "def f() -> int: return 1\n", name))


@pytest.mark.parametrize("name", ["a-b.py", "1.py", "class.py", "a b.py"])
def test_an_entry_whose_name_is_no_module_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="not that of a module"):
        build.build_script(script(tmp_path, "", name))


def test_a_module_beside_the_entry_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "package").mkdir()
    for name in ("helper", "package.part"):
        path = script(tmp_path, f"import {name}\n")
        with pytest.raises(ImageError, match=r"beside the entry.*one file"):
            build.build_script(path)


def test_an_environment_variable_is_not_there_and_the_refusal_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "planted")
    path = script(tmp_path, "import os\ntoken = os.environ['API_TOKEN']\n")
    with pytest.raises(ImageError, match=r"score\.py:2: KeyError.*no environment") as caught:
        build.build_script(path)
    assert "planted" not in str(caught.value)


def test_what_is_no_script_is_refused_with_what_to_do(project: Path, tmp_path: Path) -> None:
    """A folder, a manifest or an image, where one Python file is wanted."""
    for path in (project, project / "enclave.toml"):
        with pytest.raises(ImageError, match=r"one Python file.*pyenclave build"):
            build.build_script(path)
    image = tmp_path / "score.enclave"
    image.write_bytes(build.build(project))
    with pytest.raises(ImageError, match="image already: Enclave"):
        build.build_script(image)
    with pytest.raises(ImageError, match=r"not an enclave image.*from_file"):
        Image.parse(script(tmp_path, "x = 1\n").read_bytes())


def test_an_absent_entry_or_file_is_named(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.py is not a file"):
        build.build_script(tmp_path / "absent.py")
    shutil.copytree(project, tmp_path / "p")
    (tmp_path / "p/model.bin").unlink()
    with pytest.raises(ImageError, match=r"\[files\] model\.bin"):
        build.build(tmp_path / "p")


def test_an_extra_that_is_not_there_is_named(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "p")
    with (tmp_path / "p/enclave.toml").open("a") as file:
        file.write('[runtime]\nextra = ["no_such_module"]\n')
    with pytest.raises(ImageError, match=r"\[runtime\] extra .*no_such_module"):
        build.build(tmp_path / "p")


def test_a_lock_that_lacks_a_module_is_refused(project: Path, built: bytes) -> None:
    lock = Image.parse(built).lock
    less = type(lock)(
        python=lock.python,
        bootstrap=lock.bootstrap,
        modules=tuple(m for m in lock.modules if m.name not in ("numpy", *lock.preload)),
        libraries=lock.libraries,
        preload=(),
    )
    with pytest.raises(ImageError, match=r"(?s)not every module.*numpy"):
        build.build(project, lock=less)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.enclave").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - the kernel's words differ
        build.write_image(tmp_path / "x.enclave", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["x.enclave"]


BUILD = """
import hashlib, locale, os, sys
locale.setlocale(locale.LC_ALL, "")
os.umask(int(sys.argv[2], 8))
from pyenclave.image import build
build.build(sys.argv[1], out=sys.argv[3])
"""


@pytest.mark.no_asan(reason="the other process gets an environment of its own")
@pytest.mark.parametrize(
    ("umask", "environment"),
    [
        ("077", {"LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "1"}),
        (
            "000",
            {
                "LC_ALL": "POSIX",
                "TZ": "America/St_Johns",
                "PYTHONHASHSEED": "4711",
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONOPTIMIZE": "2",
                "OMP_NUM_THREADS": "7",
                "COLUMNS": "33",
            },
        ),
    ],
)
def test_two_builds_in_two_folders_give_the_same_bytes(
    project: Path, built: bytes, tmp_path: Path, umask: str, environment: dict[str, str]
) -> None:
    folder = tmp_path / "another folder, é"
    shutil.copytree(project, folder)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    out = tmp_path / "out.enclave"
    subprocess.run(
        [sys.executable, "-c", BUILD, str(folder), umask, str(out)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        cwd=tmp_path,
        check=True,
    )
    assert out.read_bytes() == built
    assert out.stat().st_mode & 0o777 == 0o666 & ~int(umask, 8)


def test_no_path_of_the_build_is_in_the_image(built: bytes, project: Path) -> None:
    assert str(project).encode() not in built
    assert str(ROOT).encode() not in built
    assert str(Path.home()).encode() + b"/" not in built


def test_the_image_says_what_the_manifest_says(built: bytes) -> None:
    image = Image.parse(built)
    info = image.info
    assert (info.name, info.product_id, info.security_version) == ("scoring", 7, 3)
    assert (info.entry_kind, info.entry_module, info.entry_file) == (
        "python", "score", "entry/score.py",
    )  # fmt: skip
    assert [function["name"] for function in info.functions] == ["score"]
    assert set(image.files) == {"entry/score.py", "files/model.bin"}
    assert not image.signed


def test_a_changed_input_changes_the_measurement(
    project: Path, built: bytes, tmp_path: Path
) -> None:
    first = measure_image(Image.parse(built))
    shutil.copytree(project, tmp_path / "p")
    (tmp_path / "p/model.bin").write_bytes(b"other")
    assert measure_image(Image.parse(build.build(tmp_path / "p"))) != first


def test_a_lock_of_another_runtime_is_taken_as_it_is(project: Path, built: bytes) -> None:
    lock = Image.parse(built).lock
    data = build.build(project, lock=lock.to_bytes())
    assert data == built


def test_a_script_needs_no_manifest(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        ECALL + "def double(x: int) -> int: return 2 * x\n"
        "print('noise')\n"
        "if __name__ == '__main__':\n    raise RuntimeError('run as __main__')\n",
        "hello.py",
    )
    info = Image.parse(build.build(path)).info
    assert (info.name, info.entry_module, info.debug) == ("hello", "hello", True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_native_entry_brings_its_functions_and_libraries(tmp_path: Path) -> None:
    (tmp_path / "add.c").write_text(
        "#include <pyenclave_trusted.h>\n"
        "PYE_ECALL(add) { (void)in; (void)in_len; (void)out; *out_len = 0; return 0; }\n"
        "PYE_ECALL(score) { (void)in; (void)in_len; (void)out; *out_len = 0; return 0; }\n"
    )
    include = Path(build.__file__).parents[1] / "include"
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-I{include}", "-o", str(tmp_path / "libadd.so"),
         str(tmp_path / "add.c")],
        check=True,
    )  # fmt: skip
    manifest = '[enclave]\nname = "n"\nnative = "libadd.so"\nproduct_id = 1\nsecurity_version = 1\n'
    (tmp_path / "enclave.toml").write_text(manifest + '[ecalls]\nscore = "f8 -> f8"\n')
    image = Image.parse(build.build(tmp_path))
    assert [function["name"] for function in image.info.functions] == ["add", "score"]
    assert image.info.entry_kind == "native"
    assert not any("libadd" in library.path for library in image.lock.libraries)
    (tmp_path / "enclave.toml").write_text(manifest + '[ecalls]\nabsent = "f8 -> f8"\n')
    with pytest.raises(ManifestError, match=r"absent.*no such function"):
        build.build(tmp_path)
    (tmp_path / "enclave.toml").write_text(manifest + '[ecalls]\nscore = "f8"\n')
    with pytest.raises(ManifestError, match="score"):
        build.build(tmp_path)
    (tmp_path / "libadd.so").write_bytes(b"not an object")
    with pytest.raises(ImageError, match="not a shared object"):
        build.build(tmp_path)
