"""A heap against a reference pager that keeps everything (PAG-08): random steps, and threads.

``pager_model.c`` is the program; here it is built and run with every mechanism, with and without a
file.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from core_build import CSRC, program, sources

HERE = Path(__file__).parent
MECHANISMS = {"userfaultfd": 1, "mprotect": 2}
# So that the model's heap, which is small, has an order of its own for what sequences bring, and
# shares most steps with its helper.
SMALL = ("-DHEAP_KEEP=32", "-DHEAP_KEEP_ALL=64", "-DPAGER_SHARED=2")
# Of the ciphers and hashes, those that a heap uses.
CIPHERS = ("gcm", "ghash", "aes", "hkdf", "hmac", "sha256")


def build(folder: Path, flags: list[str]) -> Path:
    files = [
        file
        for file in sources("base", "crypto", "page", "linux")
        if file.parent.name != "crypto" or file.name.startswith(CIPHERS)
    ]
    flags = ["-Wall", "-Wextra", "-I", str(CSRC / "bindings"), *SMALL, *flags]
    return program(
        folder / "pager_model",
        [HERE / "pager_model.c", *files],
        flags,
        link=["-lpthread", *(flag for flag in flags if flag.startswith("-fsanitize"))],
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pager"), ["-O1"])


def run(
    model: Path,
    kind: str,
    steps: int,
    mechanism: str,
    file: Path | None,
    seed: int = 20,
    *,
    helped: bool = False,
) -> None:
    command = [str(model), kind, str(seed), str(steps), str(MECHANISMS[mechanism])]
    done = subprocess.run(
        [*command, "-" if file is None else str(file), *(["helped"] if helped else [])],
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{kind}: {steps} steps")


def test_pages_that_are_being_brought_never_make_way_for_themselves(tmp_path: Path) -> None:
    # Only what decides is linked: the rest of the file is dropped with what it refers to.
    made = program(
        tmp_path / "pager_way",
        [HERE / "pager_way.c", CSRC / "src/page/heap_queue.c"],
        ["-O0", "-ffunction-sections"],
        link=["-Wl,--gc-sections"],
    )
    for came in (0, 1 << 31, (1 << 31) + 1, (1 << 32) - 20):  # pages since the one that stayed
        done = subprocess.run([made, str(came)], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["5000"]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("kind", ["model", "threads"])
@pytest.mark.parametrize("helped", [False, True], ids=["alone", "helped"])
def test_pag_08_a_heap_is_as_ordinary_memory(
    model: Path, tmp_path: Path, kind: str, stored: bool, mechanism: str, helped: bool
) -> None:
    run(model, kind, 10_000, mechanism, tmp_path / "heap" if stored else None, helped=helped)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("kind", ["model", "threads"])
def test_pag_08_a_million_steps(
    model: Path, tmp_path: Path, kind: str, stored: bool, mechanism: str
) -> None:
    file = tmp_path / "heap" if stored else None
    for seed in range(4):
        run(model, kind, 250_000, mechanism, file, seed + 100, helped=seed % 2 == 1)


@pytest.mark.long
@pytest.mark.no_asan
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_pager_under_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    built = build(tmp_path, ["-O1", "-g", f"-fsanitize={sanitizer}"])
    for kind in ("model", "threads"):
        run(built, kind, 20_000, "userfaultfd", None)
        run(built, kind, 20_000, "userfaultfd", tmp_path / "heap")
        run(built, kind, 20_000, "userfaultfd", None, helped=True)
