"""
The C core on AArch64, cross-compiled and emulated: the instruction sets of its own files.

The whole native test program runs there in ``.ci/aarch64``; docs/aarch64.md.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import aarch64_tools
import core_build
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC

# Emulated programs do not run with the sanitizers' libraries preloaded.
pytestmark = pytest.mark.no_asan

FLAGS = [
    "-O2", "-mbranch-protection=standard", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wvla",
    "-Wundef", "-Wconversion", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wpointer-arith",
    "-Wcast-qual", "-Wwrite-strings", "-Wformat=2", "-Werror",
]  # fmt: skip
FEATURES = {"max": "aes pmull sha2 sha512", "cortex-a57": "aes pmull sha2"}
MASKS = {"armv8": "ffffffff", "portable": "0"}
# All but one of the two that AES-GCM needs, and all but SHA-256's.
PARTS = {
    "no pmull": ("fdffffff", "portable", "armv8"),
    "no sha2": ("fbffffff", "armv8", "portable"),
}


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The core's object files, every file of it, compiled without a warning."""
    aarch64_tools.need()
    folder = tmp_path_factory.mktemp("aarch64")
    return core_build.objects(
        folder, core_build.sources(), FLAGS, cc=core_build.compiler(aarch64_tools.COMPILER)
    )


@pytest.fixture(scope="session")
def program(core: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = core_build.ROOT / "tests/native/core_answers.c"
    target = tmp_path_factory.mktemp("answers") / "core_answers"
    return core_build.program(
        target,
        [own],
        ["-O1"],
        link=[*map(str, core), "-static", "-pthread"],
        cc=core_build.compiler(aarch64_tools.COMPILER),
    )


def ask(program: Path, questions: list[str], *, cpu: str = "max") -> list[str]:
    """The core's answers, one a question."""
    done = aarch64_tools.run(program, cpu=cpu, text="\n".join(questions) + "\n")
    assert (done.returncode, done.stderr) == (0, "")
    answers = [line.strip() for line in done.stdout.splitlines()]
    assert len(answers) == len(questions)
    return answers


def words(*parts: bytes | str) -> str:
    return " ".join(p if isinstance(p, str) else p.hex() or "-" for p in parts)


def gcm_answer(key: bytes, iv: bytes, aad: bytes, data: bytes, name: str) -> str:
    out = AESGCM(key).encrypt(iv, data, aad)
    return f"{out[:-16].hex()} {out[-16:].hex()} {name}".strip()


def lengths() -> Iterator[int]:
    """Every length up to five blocks, and those around the ends of batches of eight."""
    yield from range(4 * 16 + 16)
    for whole in (128, 256, 384, 1024, 4096):
        yield from (whole - 17, whole - 16, whole - 1, whole, whole + 1, whole + 16, whole + 127)


@pytest.mark.parametrize("cpu", aarch64_tools.CPUS)
def test_what_the_kernel_lists_is_found_and_a_mask_hides_it(program: Path, cpu: str) -> None:
    shown, hidden, partly = ask(
        program, ["features ffffffff", "features 0", "features fdffffff"], cpu=cpu
    )
    assert shown == f"{FEATURES[cpu]} armv8"
    assert hidden == "portable"
    assert partly == f"{FEATURES[cpu].replace('pmull ', '')} armv8"


@pytest.mark.parametrize("cpu", aarch64_tools.CPUS)
def test_the_self_tests_hold_with_and_without_the_instructions(program: Path, cpu: str) -> None:
    assert ask(program, ["selftest ffffffff", "selftest 0"], cpu=cpu) == ["ok", "ok"]


@pytest.mark.parametrize("name", MASKS)
def test_gcm_of_every_length_equals_another_library(program: Path, name: str) -> None:
    """And what was sealed opens, in place too; what was changed in any part does not."""
    rng = random.Random(7)
    questions, expected = [], []
    for length in lengths():
        for key_len in (16, 32):
            key, iv = rng.randbytes(key_len), rng.randbytes(12)
            aad, data = rng.randbytes(length * 3 % 301), rng.randbytes(length)
            questions.append(f"gcm {MASKS[name]} {words(key, iv, aad, data)}")
            expected.append(gcm_answer(key, iv, aad, data, name))
    assert ask(program, questions) == expected


@pytest.mark.parametrize("name", MASKS)
def test_wycheproof_gcm(program: Path, vectors: Path, name: str) -> None:
    questions, expected = [], []
    file = next((vectors / "crypto").rglob("aes_gcm_test.json"))
    for group in json.loads(file.read_text())["testGroups"]:
        if (group["ivSize"], group["tagSize"]) != (96, 128) or group["keySize"] == 192:
            continue
        for test in group["tests"]:
            key, iv, aad, data = (
                bytes.fromhex(test[field]) for field in ("key", "iv", "aad", "msg")
            )
            answer = f"{test['ct']} {test['tag']} {name}".strip()
            questions.append(f"gcm {MASKS[name]} {words(key, iv, aad, data)}")
            # What is said to be wrong must not be what we make.
            expected.append((answer, test["result"] == "valid"))
    assert len(questions) > 70
    found = ask(program, questions)
    assert all(
        (answer == wanted) == valid for answer, (wanted, valid) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", MASKS)
def test_pages_equal_docs_formats_page_md(program: Path, name: str) -> None:
    rng = random.Random(11)
    questions, expected = [], []
    for count, address, flags, kind in ((1, 0, 0, 2), (3, 2**63, 2**32 - 1, 255), (8, 4096, 7, 0)):
        for key_len in (16, 32):
            key, enclave = rng.randbytes(key_len), rng.randbytes(16)
            data = rng.randbytes(4096 * count)
            parts = []
            for i in range(count):
                version = 1 + i
                header = (
                    b"PYEPAGE1" + enclave + (address + 4096 * i).to_bytes(8, "little")
                    + version.to_bytes(8, "little") + flags.to_bytes(4, "little")
                    + bytes([kind]) + bytes(19)
                )  # fmt: skip
                iv = version.to_bytes(8, "big") + bytes(4)
                sealed = AESGCM(key).encrypt(iv, data[4096 * i : 4096 * (i + 1)], header)
                parts += [sealed[:-16].hex(), sealed[-16:].hex()]
            question = words(key, enclave, str(address), str(flags), str(kind), data)
            questions.append(f"page {MASKS[name]} {question}")
            expected.append(" ".join([*parts, name]))
    assert ask(program, questions) == expected


@pytest.mark.parametrize(("mask", "gcm", "sha"), PARTS.values(), ids=PARTS)
def test_a_missing_instruction_takes_only_what_needs_it(
    program: Path, mask: str, gcm: str, sha: str
) -> None:
    sealed, hashed = ask(
        program, [f"gcm {mask} {bytes(16).hex()} {bytes(12).hex()} - -", f"hash {mask} 61"]
    )
    assert sealed == gcm_answer(bytes(16), bytes(12), b"", b"", gcm)
    assert hashed.split()[-1] == sha


@pytest.mark.parametrize("cpu", aarch64_tools.CPUS)
@pytest.mark.parametrize("name", MASKS)
def test_sha_2_of_every_length_equals_another_library(program: Path, name: str, cpu: str) -> None:
    """The Cortex-A57 has no SHA-512 instructions: there the portable code is taken."""
    rng = random.Random(13)
    messages = [rng.randbytes(length) for length in (*range(300), 4095, 4096, 10_000)]
    expected = [
        " ".join(
            [hashlib.new(kind, message).hexdigest() for kind in ("sha256", "sha384", "sha512")]
            + [name]
        )
        for message in messages
    ]
    questions = [f"hash {MASKS[name]} {words(message)}" for message in messages]
    assert ask(program, questions, cpu=cpu) == expected


@pytest.mark.parametrize("name", MASKS)
def test_hmac_and_cmac_of_every_length_equal_another_library(program: Path, name: str) -> None:
    rng = random.Random(17)
    questions, expected = [], []
    for length in range(100):
        key, message = rng.randbytes(16), rng.randbytes(length)
        questions.append(f"hmac {MASKS[name]} {words(key, message)}")
        expected.append(hmac.digest(key, message, "sha256").hex())
        questions.append(f"cmac {MASKS[name]} {words(key, message)}")
        other = CMAC(AES(key))
        other.update(message)
        expected.append(other.finalize().hex())
    assert ask(program, questions) == expected


def test_a_ring_between_two_threads_brings_every_message_whole(program: Path) -> None:
    """Emulation shows wrong lengths and lost wake-ups, but not a missing barrier."""
    assert ask(program, ["ring 0 3000"]) == ["3000"]


@pytest.mark.parametrize("implementation", ["1", "16"], ids=["portable", "armv8"])
def test_CRY_06_no_secret_stays_in_registers_or_on_the_stack_of_aarch64(
    core: list[Path], tmp_path: Path, implementation: str
) -> None:
    if not Path("/usr/include/valgrind/memcheck.h").exists():
        pytest.skip("needs valgrind's headers")
    program = core_build.program(
        tmp_path / "secrets_gcm",
        [core_build.ROOT / "tests/native/secrets_gcm.c"],
        ["-O2", "-DNVALGRIND", "-idirafter", "/usr/include"],
        link=[*map(str, core), "-static", "-pthread"],
        cc=core_build.compiler(aarch64_tools.COMPILER),
    )
    done = aarch64_tools.run(program, "wipe", implementation)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- the bindings' own C -------------------------------------------------------------------------

HANDLER = r"""
#define _GNU_SOURCE
#include "heap_handler.h"

int main(int argc, char **argv)
{
    ucontext_t context = {0};
    siginfo_t info = {.si_signo = SIGBUS};

    (void)argv;
    if (argc == 1) {
        return 0;
    }
    heap_end_with(2, (const uint8_t *)"", 0);
    heap_on_signal(argc, &info, &context);
    heap_step_again();
    heap_stays_shown();
    atomic_store(&heap_note, NULL);
    heap_table_remove(heap_find(0));
    return heap_handlers() + heap_table_add(NULL, 0);
}
"""


def test_the_fault_handler_of_sealed_heaps_compiles(core: list[Path], tmp_path: Path) -> None:
    """With what it has for this CPU alone, which is not what it has for others."""
    source = tmp_path / "handler.c"
    source.write_text(HANDLER)
    program = core_build.program(
        tmp_path / "handler",
        [source],
        [*FLAGS, f"-I{core_build.ROOT}/csrc/bindings"],
        link=[*map(str, core), "-static", "-pthread"],
        cc=core_build.compiler(aarch64_tools.COMPILER),
    )
    assert aarch64_tools.run(program).returncode == 0


@pytest.mark.slow
def test_what_cython_makes_of_the_bindings_compiles(tmp_path: Path) -> None:
    pytest.importorskip("Cython")
    aarch64_tools.need()
    made = tmp_path / "_core.c"
    bindings = core_build.ROOT / "csrc/bindings"
    cython = [sys.executable, "-m", "cython", "-3", "-I", str(bindings), "-o", str(made)]
    subprocess.run([*cython, str(bindings / "_core.pyx")], check=True, cwd=core_build.ROOT)
    headers = [core_build.ROOT / "csrc/include", bindings, sysconfig.get_path("include")]
    # As .ci/aarch64 compiles it, but for the code, which takes minutes.
    flags = ["-std=gnu11", "-mbranch-protection=standard", "-Wall", "-Werror", "-fsyntax-only"]
    command = [aarch64_tools.COMPILER, *flags, *(f"-I{folder}" for folder in headers)]
    subprocess.run([*command, "-DPy_LIMITED_API=0x030b0000", str(made)], check=True)
