"""CRY-02 and CRY-06: secrets decide no branch or index, and stay in no register or stack frame."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import core_build
import pytest

from pyenclave import _core
from pyenclave._ffi import lib

FLAGS = ["-O3", "-g"]
IMPLEMENTATION = {
    "portable": lib.PYE_GCM_PORTABLE,
    "aesni": lib.PYE_GCM_AESNI,
    "vaes256": lib.PYE_GCM_VAES256,
    "vaes512": lib.PYE_GCM_VAES512,
    "armv8": lib.PYE_GCM_ARMV8,
}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program, built as the core is: from the same sources, optimised."""
    if not Path("/usr/include/valgrind/memcheck.h").exists():
        pytest.skip("needs valgrind's headers")
    own = core_build.ROOT / "tests/native/secrets_gcm.c"
    files = [
        file
        for file in core_build.sources("base", "crypto", "page")
        if file.parent.name != "crypto"
        or file.stem.startswith("gcm")
        or file.stem.endswith("_portable")
    ]
    wide = ["-mavx512f"] if "vaes512" in _core.gcm_implementations() else []
    folder = tmp_path_factory.mktemp("secrets")
    parts = core_build.objects(folder / "core", files, FLAGS)
    return core_build.program(
        folder / "secrets_gcm", [own], [*FLAGS, *wide], link=list(map(str, parts))
    )


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
