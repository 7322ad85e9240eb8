"""Programs of the fuzz targets in C: with the driver of the gate, or with libFuzzer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import core_build

HERE = Path(__file__).resolve().parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv"]
FLAGS = ["-O1", "-g1", "-Wall", "-Werror", f"-I{HERE}"]


@dataclass(frozen=True)
class Target:
    """A target: its file, sources of the core under the sanitizers, and inputs in the gate."""

    file: str
    sources: tuple[str, ...]
    runs: int
    kernels: bool = False  # links the kernels, as gcc builds them: no target is for what is in them
    plain: tuple[str, ...] = ()  # more of the core, by gcc and without the sanitizers
    cpu: str = ""  # a flag of /proc/cpuinfo without which nothing is there to be tried


LANE = ("call/lane", "call/await", "call/copy", "call/note")
PAGER = ("base/*", "page/*", "linux/pager*", "linux/secmem")
TARGETS = {
    "host": Target("lane", LANE, 20_000),
    "worker": Target("lane", LANE, 20_000),
    "batch": Target("readers", ("call/batch",), 40_000),
    "msgpack": Target("readers", ("call/msgpack",), 100_000),
    "page": Target("readers", ("base/*", "page/*"), 1_000, kernels=True),
    "epoch": Target("heap", ("base/*", "page/*"), 500, kernels=True),
    "extents": Target("heap", ("page/extents",), 10_000),
    "tree": Target("tree", ("base/*", "page/*"), 2_000, kernels=True),
    "file": Target("file", PAGER, 300, kernels=True),
    "measure": Target("readers", ("base/*", "measure/sgx*"), 10_000, kernels=True),
    "launch": Target("public", ("base/*", "measure/snp", "measure/tdx"), 500, kernels=True),
    "p256": Target(
        "public", ("base/*", "crypto/ecdsa"), 200, plain=("crypto/p256_ifma",), cpu="avx512ifma"
    ),  # its intrinsics take half a minute and fifty times as long under the sanitizers
}  # fmt: skip


def missing(name: str) -> str:
    """Return what this CPU has not and the target needs, or nothing."""
    flag = TARGETS[name].cpu
    return "" if not flag or flag in Path("/proc/cpuinfo").read_text().split() else flag


def kernels(folder: Path, *flags: str) -> list[Path]:
    """Compile ciphers and hashes, by gcc and without the sanitizers."""
    used = ("gcm", "aes", "ghash", "sha256", "sha512", "hkdf", "hmac")
    files = [file for file in core_build.sources("crypto") if file.stem.startswith(used)]
    return core_build.objects(folder, files, flags)


def program(
    folder: Path, name: str, crypto: list[Path], source: Path | None = None, clang: str = ""
) -> Path:
    """Build a target with the driver, or with libFuzzer where *clang* is given."""
    target = TARGETS[name]
    sanitize = [SANITIZE[0].replace("=", "=fuzzer,") if clang else SANITIZE[0], *SANITIZE[1:]]
    flags = [*FLAGS, *sanitize, f"-DFUZZ_{name.upper()}"]
    copy = [] if source is None else [f"-iquote{source}"]
    files = [HERE / f"fuzz_c_{target.file}.c"]
    if not clang:
        files.append(HERE / "fuzz_c_driver.c")
    root = source or core_build.CSRC / "src"
    for pattern in target.sources:
        files += sorted(root.glob(f"{pattern}.c"))
    parts = list(crypto) if target.kernels else []
    if target.plain:
        plain = [root / f"{file}.c" for file in target.plain]
        parts += core_build.objects(folder / f"{name}.plain", plain, ["-O1", *copy])
    return core_build.program(
        folder / f"fuzz_{name}", files, [*flags, *copy], link=[*sanitize, *map(str, parts)],
        cc=clang or None,
    )  # fmt: skip
