"""A fault in a worker of a sanitizer build is reported, and ends the worker.

Runs in sanitizer builds only: ``.ci/run`` has a stage of them. docs/proofs.md.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyenclave
from pyenclave import _core
from pyenclave._platform.debuglog import find_logs
from pyenclave._platform.state import State
from pyenclave.errors import EnclaveLostError
from pyenclave.host import Enclave
from pyenclave.image.build import build
from pyenclave.image.keys import keygen
from pyenclave.image.sign import sign

pytestmark = pytest.mark.skipif(not _core.SANITIZED, reason="no sanitizer build")

C = """
#include <pyenclave_trusted.h>
#include <stdlib.h>
#include <string.h>

static size_t beyond; /* what it is, is known at run time only */

PYE_ECALL(fault)
{
    /* Volatile, so that the compiler does not know what it points to. */
    uint8_t *volatile memory = malloc(16);
    int number = 2147483647;

    if (memory == NULL || in_len != 1 || *out_len < 1) {
        free(memory);
        return PYE_ECALL_ARGUMENT;
    }
    memset(memory, 7, 16);
    *out_len = 1;
    beyond = in[0] == 1 ? 16 : 3;
    out[0] = memory[beyond];
    free(memory);
    if (in[0] == 2) {
        out[0] = memory[beyond];
    }
    number += in[0] == 3 ? (int)beyond : 0;
    out[0] ^= (uint8_t)(number >> 24 & 0x80);
    return PYE_ECALL_OK;
}
"""
MANIFEST = """
[enclave]
name = "faulty"
native = "libfaulty.so"
product_id = 1
security_version = 1
debug = true
[ecalls]
fault = "bytes -> bytes"
"""
REPORTS = {
    1: "AddressSanitizer: heap-buffer-overflow",
    2: "AddressSanitizer: heap-use-after-free",
    3: "signed integer overflow",
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.c").write_text(C)
    (folder / "enclave.toml").write_text(MANIFEST)
    command = [compiler, "-O1", "-g1", "-shared", "-fPIC", "-fsanitize=address,undefined",
               "-fno-sanitize-recover=undefined", "-fno-wrapv", f"-I{pyenclave.get_include()}",
               "-o", str(folder / "libfaulty.so"), str(folder / "faulty.c")]  # fmt: skip
    subprocess.run(command, check=True)
    return sign(build(folder / "enclave.toml"), keygen())


def log_of(state: Path, enclave_id: str) -> str:
    """Return what an enclave printed, once it has ended."""
    with State.open(str(state)) as opened:
        end = time.monotonic() + 20
        while True:
            (log,) = [log for log in find_logs(opened) if log.enclave_id == enclave_id]
            if not log.running or time.monotonic() > end:
                break
            time.sleep(0.02)
        return log.read(opened).decode(errors="replace")


@pytest.fixture(scope="module")
def state(image: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A platform that stays, so that only the first test pays for its start."""
    folder = tmp_path_factory.mktemp("state")
    with Enclave(image, debug=True, state=folder) as enclave:
        assert enclave.fault(b"\0") == b"\7"
        yield folder


@pytest.mark.parametrize("fault", sorted(REPORTS))
def test_a_fault_in_a_worker_is_reported_and_ends_it(image: bytes, state: Path, fault: int) -> None:
    with Enclave(image, debug=True, state=state) as enclave:
        enclave_id = enclave.info.enclave_id.hex()
        with pytest.raises(EnclaveLostError):
            enclave.fault(bytes([fault]))
    assert REPORTS[fault] in log_of(state, enclave_id)
