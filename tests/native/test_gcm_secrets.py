"""CRY-02 and CRY-06: secrets decide no branch or index, and stay in no register or stack frame."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pyenclave import _core
from pyenclave._ffi import lib

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=gnu11", "-O3", "-g", "-I", str(ROOT / "csrc/include"), "-I", str(ROOT / "csrc/src")]
IMPLEMENTATION = {
    "portable": lib.PYE_GCM_PORTABLE,
    "aesni": lib.PYE_GCM_AESNI,
    "vaes512": lib.PYE_GCM_VAES512,
}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program, built as the core is: from the same sources, optimised."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/usr/include/valgrind/memcheck.h").exists():
        pytest.skip("needs a C compiler and valgrind's headers")
    sources = [
        ROOT / "tests/native/secrets_gcm.c",
        *(ROOT / "csrc/src/base").glob("*.c"),
        *(ROOT / "csrc/src/crypto").glob("gcm*.c"),
        *(ROOT / "csrc/src/crypto").glob("*_portable.c"),
        ROOT / "csrc/src/page/page.c",
    ]
    wide = ["-mavx512f"] if "vaes512" in _core.gcm_implementations() else []
    folder = tmp_path_factory.mktemp("secrets")
    objects = []
    for source in dict.fromkeys(sources):
        target = folder / f"{source.stem}.o"
        own = wide if source.name == "secrets_gcm.c" else []
        subprocess.run([compiler, *FLAGS, *own, "-c", str(source), "-o", str(target)], check=True)
        objects.append(str(target))
    subprocess.run([compiler, *objects, "-o", str(folder / "secrets_gcm")], check=True)
    return folder / "secrets_gcm"


@pytest.mark.parametrize("name", list(IMPLEMENTATION))
def test_CRY_06_no_secret_stays_in_registers_or_on_the_stack(program: Path, name: str) -> None:
    if name not in _core.gcm_implementations():
        pytest.skip(f"this CPU does not offer {name}")
    done = subprocess.run(
        [program, "wipe", str(IMPLEMENTATION[name])], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["portable", "aesni"])
def test_CRY_02_no_branch_or_index_depends_on_a_secret(program: Path, name: str) -> None:
    """Keys and plaintext are undefined memory to valgrind (which does not know the wide code)."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("valgrind is not installed")
    if name not in _core.gcm_implementations():
        pytest.skip(f"this CPU does not offer {name}")
    command = [valgrind, "--quiet", "--error-exitcode=9", program, "ct", str(IMPLEMENTATION[name])]
    # The program is built without sanitizers, and valgrind does not run beside theirs.
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    assert done.stderr == ""
    assert done.returncode == 0
