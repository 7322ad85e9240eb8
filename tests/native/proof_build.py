"""The core's test build: one shared library, and both extension modules linked to it.

``proof_core.c`` says what that library can do. The package that results lies in a folder of its
own, beside copies of the Python files, so that tests run against it unchanged.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core_build import CSRC, INCLUDES, ROOT, compiler, objects, sources

LIBRARY = "libpyenclave_proof.so"
HERE = Path(__file__).resolve().parent
FLAGS = ("-DPYE_MUTATION", "-O1", "-g0", "-fPIC", "-fno-builtin-memcmp",
         f"-fmacro-prefix-map={CSRC}/src/=")  # fmt: skip


def _wrapped() -> list[str]:
    """Return the functions that ``proof_core.c`` stands in for."""
    text = (HERE / "proof_core.c").read_text("utf-8")
    found = re.findall(r"^(?:WRAP\([\w *]+, |WRAP_\w+\()(\w+),", text, re.MULTILINE)
    return sorted({*found, *re.findall(r"__wrap_(\w+)\(", text)})


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def _digest() -> str:
    seen = hashlib.sha256(sys.version.encode())
    for file in sorted([*CSRC.rglob("*.[ch]"), *CSRC.rglob("*.p*"), *HERE.glob("proof_*")]):
        if file.is_file() and file.suffix != ".pyc":
            seen.update(str(file).encode() + file.read_bytes())
    return seen.hexdigest()


def _library(work: Path, package: Path, cc: str) -> None:
    parts = objects(work / "core", [*sources(), HERE / "proof_core.c"], FLAGS, cc=cc)
    wraps = [f"-Wl,--wrap={name}" for name in _wrapped()]
    _run(cc, "-shared", *map(str, parts), *wraps, "-lpthread", f"-Wl,-soname,{LIBRARY}",
         "-o", str(package / LIBRARY))  # fmt: skip


def _module(work: Path, cc: str, name: str) -> Path:
    generated = work / f"{name}.c"
    if name == "_core":
        _run(sys.executable, "-m", "cython", "-3", "-Xfreethreading_compatible=True",
             "-Xboundscheck=False", "-Xwraparound=False", "-I", "csrc/bindings",
             "csrc/bindings/_core.pyx", "--module-name", "pyenclave._core",
             "-o", str(generated))  # fmt: skip
    else:
        script = (
            "import sys, runpy; runpy.run_path('csrc/bindings/ffi_build.py')"
            "['ffi'].emit_c_code(sys.argv[1])"
        )
        _run(sys.executable, "-c", script, str(generated))
    made = generated.with_suffix(".o")
    # As in setup.py: the wheels are built so, and generated code differs.
    limited = [] if sysconfig.get_config_var("Py_GIL_DISABLED") else ["-DPy_LIMITED_API=0x030b0000"]
    _run(cc, "-std=gnu11", *limited, "-O0", "-w", "-fPIC", *INCLUDES,
         "-I", str(CSRC / "bindings"), "-I", sysconfig.get_path("include"),
         "-c", str(generated), "-o", str(made))  # fmt: skip
    return made


def build(folder: Path) -> Path:
    """Build the package below *folder*, unless it is there; return the path to import from."""
    home = folder / "package"
    package = home / "pyenclave"
    stamp = folder / "stamp"
    digest = _digest()
    known = stamp.is_file() and stamp.read_text() == digest
    if not known:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        ROOT / "pyenclave",
        package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        dirs_exist_ok=True,
    )
    if not known:
        cc = compiler()
        work = folder / "work"
        work.mkdir()
        with ThreadPoolExecutor(1) as pool:
            modules = [pool.submit(_module, work, cc, name) for name in ("_core", "_ffi")]
            _library(work, package, cc)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        for made in modules:
            target = package / f"{made.result().stem}{suffix}"
            _run(cc, "-shared", str(made.result()), str(package / LIBRARY),
                 "-Wl,-rpath,$ORIGIN", "-o", str(target))  # fmt: skip
        stamp.write_text(digest)
    return home


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
