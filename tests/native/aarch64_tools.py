"""The cross compiler and the emulator that the tests for AArch64 use, on any other machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import core_build
import pytest

COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
# One CPU with every instruction that we use, one with those of Armv8.0 only.
CPUS = ("max", "cortex-a57")


def need() -> None:
    """Skip the test where the tools are absent (Debian: gcc-aarch64-linux-gnu, qemu-user)."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator runs programs of Linux only")
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def build(target: Path, files: Sequence[Path], flags: Sequence[str]) -> Path:
    """Compile and link *files* for AArch64 into the static program *target*."""
    return core_build.program(target, files, flags, link=["-static", "-pthread"], cc=COMPILER)


def run(
    program: Path, *arguments: str, cpu: str = "max", text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run *program* on an emulated *cpu* with *text* as its standard input."""
    command = [EMULATOR, "-cpu", cpu, str(program), *arguments]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=90
    )
