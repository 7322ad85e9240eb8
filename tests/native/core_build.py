"""Build the C core by itself, with any compiler and flags, for programs that prove it right."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
Text = str | tuple[str, ...]
INCLUDES = ("-I", str(CSRC / "include"), "-I", str(CSRC / "src"))


def compiler(*names: str) -> str:
    """Return the first of *names* (none: ``CC``, cc, gcc) that is installed, or skip the test."""
    for name in names or (os.environ.get("CC", ""), "cc", "gcc"):
        if name and (found := shutil.which(shlex.split(name)[0])):
            return found
    pytest.skip(f"none of these compilers is installed: {', '.join(names) or 'cc, gcc'}")


def sources(*folders: str) -> list[Path]:
    """Return the C files of *folders* below ``csrc/src`` (none: of all)."""
    found = sorted(CSRC.glob("src/**/*.c"))
    return [file for file in found if not folders or file.parent.name in folders]


def broken(folder: Path, file: str, old: Text, new: Text) -> Path:
    """Copy ``csrc/src`` below *folder* with a fault in it; return the copy.

    *file* is relative to ``csrc/src``; each text of *old*, which must be there once, is replaced by
    that of *new*. Compile with ``-iquote`` and the copy, so that its headers come first.
    """
    source = folder / "src"
    shutil.copytree(CSRC / "src", source)
    plant(source / file, old, new)
    return source


def plant(path: Path, old: Text, new: Text) -> None:
    """Put a fault into a file: replace texts, each of which must be there once."""
    text = path.read_text("utf-8")
    olds, news = ((one,) if isinstance(one, str) else one for one in (old, new))
    for before, after in zip(olds, news, strict=True):
        assert text.count(before) == 1, f"{path.name} has {text.count(before)} of: {before}"
        text = text.replace(before, after)
    path.write_text(text, "utf-8")


def objects(
    folder: Path, files: Sequence[Path], flags: Sequence[str], *, cc: str | None = None
) -> list[Path]:
    """Compile *files* into *folder*, two at a time; return the object files."""
    chosen = cc or compiler()
    folder.mkdir(parents=True, exist_ok=True)

    def one(file: Path) -> Path:
        target = folder / f"{file.parent.name}-{file.stem}.o"
        command = [chosen, "-std=gnu11", *INCLUDES, *flags, "-c", str(file), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, files))


def program(
    target: Path,
    files: Sequence[Path],
    flags: Sequence[str],
    *,
    link: Sequence[str] = (),
    cc: str | None = None,
) -> Path:
    """Compile and link *files* into *target* (a program; ``-shared`` in *link*: a library)."""
    chosen = cc or compiler()
    parts = objects(target.parent / f"{target.name}.o", files, flags, cc=chosen)
    command = [chosen, *map(str, parts), *link, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return target
