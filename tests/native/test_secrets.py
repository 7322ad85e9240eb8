"""CRY-02 and CRY-06: secrets decide no branch or index, and stay in no register or stack frame.

For AES-GCM, MACs, hashes, key derivation, comparison and opening. valgrind takes secrets for
undefined memory and reports each branch and each address that depends on one. A check that never
reports anything proves nothing, so the core is also built with one leak at a time, of the kinds
that such code is known for, and each must be reported, by its name.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import core_build
import pytest
from borders import gcm_implementations

from pyenclave._ffi import lib

# The programs are built without sanitizers, and valgrind does not run beside theirs.
pytestmark = pytest.mark.no_asan(reason="programs of its own, built as the core is shipped")

FLAGS = ["-O3", "-g", "-DPYE_SECRETS_CHECK"]
# What valgrind runs of x86: neither SHA-NI nor VAES nor AVX-512.
KNOWN = lib.PYE_CPU_SSSE3 | lib.PYE_CPU_AESNI | lib.PYE_CPU_PCLMUL
KNOWN |= lib.PYE_CPU_AVX | lib.PYE_CPU_AVX2 | lib.PYE_CPU_BMI2
OWN = core_build.ROOT / "tests/native"
GCM = gcm_implementations()
UNKNOWN = ("vaes",)  # implementations that valgrind cannot run


@dataclass(frozen=True)
class Leak:
    """One place in the core made to depend on a secret; what it computes stays right."""

    file: str
    old: str
    new: str
    what: str  # what secrets_kdf has to do to meet it
    where: str  # the function that valgrind has to name
    also: tuple[str, ...] = ()  # files that include it


LEAKS = {
    "AES with the S-box as a table": Leak(
        "crypto/aes_portable.c",
        "static uint32_t sub_word(uint32_t word)\n{",
        "static uint32_t slow_word(uint32_t word);\n"
        "static uint32_t sub_word(uint32_t word)\n{\n"
        "    static uint8_t table[256];\n"
        "    for (uint32_t i = 0; i < 256 && table[255] == 0; i++) {\n"
        "        table[i] = (uint8_t)slow_word(i);\n    }\n"
        "    return table[word & 255] | (uint32_t)table[word >> 8 & 255] << 8 |\n"
        "           (uint32_t)table[word >> 16 & 255] << 16 | (uint32_t)table[word >> 24] << 24;\n"
        "}\n\nstatic uint32_t slow_word(uint32_t word)\n{",
        "cmac",
        "aes_portable_init",
    ),
    "GHASH with a table": Leak(
        "crypto/ghash_portable.c",
        "const uint64_t bit = UINT64_C(0) - ((a >> i) & 1);",
        "static const volatile uint64_t masks[2] = {0, UINT64_MAX};\n"
        "        const uint64_t bit = masks[(a >> i) & 1];",
        "open",
        "ghash_portable_block",
    ),
    "CMAC's subkey with a table": Leak(
        "crypto/cmac.c",
        "const uint8_t carry = (uint8_t)(0u - (uint32_t)(x[0] >> 7));",
        "static const volatile uint8_t masks[2] = {0, 255};\n"
        "    const uint8_t carry = masks[x[0] >> 7];",
        "cmac",
        "pye_aes128_cmac",
    ),
    "HMAC that looks at the zeros at a key's end": Leak(
        "crypto/hmac.c",
        "    if (key_len > sizeof(pad)) {",
        "    while (key_len != 0 && key_len <= sizeof(pad) &&\n"
        "           ((const uint8_t *)key)[key_len - 1] == 0) {\n"
        "        key_len--;\n    }\n    if (key_len > sizeof(pad)) {",
        "hkdf",
        "pye_hmac_sha256_init",
    ),
    "a comparison that ends at the first difference": Leak(
        "base/wipe.c",
        "        difference |= (uint32_t)(x[i] ^ y[i]);",
        "        if (x[i] != y[i]) {\n            return 0;\n        }",
        "equal",
        "pye_ct_equal",
    ),
    "opening with memcmp": Leak(
        "crypto/gcm_impl.h",
        "    memcpy(x, a, sizeof(x));",
        "    if (memcmp(a, b, 16) != 0) {\n        return 0;\n    }\n    memcpy(x, a, sizeof(x));",
        "open",
        "pye_page_open",
        also=("crypto/gcm.c", "page/page.c"),
    ),
}


def core_files() -> list[Path]:
    """The core without ECDSA, which sees public data only (its header says so) and no secret."""
    unneeded = ("ecdsa", "p256")
    chosen = core_build.sources("base", "crypto", "page")
    return [file for file in chosen if not file.stem.startswith(unneeded)]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The core's object files, by source, optimised as the core is."""
    if not Path("/usr/include/valgrind/memcheck.h").exists():
        pytest.skip("needs valgrind's headers")
    folder = tmp_path_factory.mktemp("kdf")
    files = core_files()
    made = core_build.objects(folder, files, FLAGS)
    names = [str(file.relative_to(core_build.CSRC / "src")) for file in files]
    return dict(zip(names, made, strict=True))


@pytest.fixture(scope="session")
def gcm_program(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide = ["-mavx512f"] if "vaes512" in GCM else []
    target = tmp_path_factory.mktemp("gcm") / "secrets_gcm"
    link = list(map(str, parts.values()))
    return core_build.program(target, [OWN / "secrets_gcm.c"], [*FLAGS, *wide], link=link)


@pytest.fixture(scope="session")
def kdf_main(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kdf-main")
    return core_build.objects(folder, [OWN / "secrets_kdf.c"], FLAGS)[0]


def watched(program: Path, what: str, number: int) -> tuple[int, str]:
    """Run under valgrind."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("valgrind is not installed")
    command = [valgrind, "--quiet", "--error-exitcode=9", program, what, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr + done.stdout


def linked(target: Path, main: Path, parts: dict[str, Path]) -> Path:
    return core_build.program(target, [], [], link=[str(main), *map(str, parts.values())])


@pytest.mark.parametrize("name", list(GCM))
def test_CRY_06_no_secret_stays_in_registers_or_on_the_stack(gcm_program: Path, name: str) -> None:
    done = subprocess.run(
        [gcm_program, "wipe", str(GCM[name])], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("name", [name for name in GCM if not name.startswith(UNKNOWN)])
def test_CRY_02_gcm_has_no_branch_or_index_that_depends_on_a_secret(
    gcm_program: Path, name: str
) -> None:
    """Keys and plaintext are undefined memory."""
    assert watched(gcm_program, "ct", GCM[name]) == (0, "")


@pytest.mark.parametrize("mask", [0, KNOWN], ids=["portable", "vectors"])
def test_CRY_02_no_branch_or_index_depends_on_a_secret(
    parts: dict[str, Path], kdf_main: Path, tmp_path: Path, mask: int
) -> None:
    """Keys, messages and computed tags are undefined memory."""
    assert watched(linked(tmp_path / "secrets_kdf", kdf_main, parts), "all", mask) == (0, "")


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_of_a_known_kind_is_reported(
    parts: dict[str, Path], kdf_main: Path, tmp_path: Path, name: str
) -> None:
    leak = LEAKS[name]
    source = core_build.CSRC / "src"
    text = (source / leak.file).read_text()
    assert text.count(leak.old) == 1, f"{leak.file} was changed: this leak must be written anew"
    changed = tmp_path / leak.file
    changed.parent.mkdir()
    changed.write_text(text.replace(leak.old, leak.new))
    affected = [name for name in (leak.file, *leak.also) if name.endswith(".c")]
    files = [changed if name == leak.file else source / name for name in affected]
    # The changed header is found before the core's own.
    made = core_build.objects(tmp_path / "o", files, [*FLAGS, "-iquote", str(tmp_path)])
    leaky = {**parts, **dict(zip(affected, made, strict=True))}
    code, said = watched(linked(tmp_path / "leaky", kdf_main, leaky), leak.what, 0)
    assert code == 9, f"valgrind did not see it: {said}"
    assert leak.where in said
