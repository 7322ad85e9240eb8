"""Sealed memory in real enclaves: what it may ask of the kernel, and how it ends when changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyenclave import trusted
from pyenclave.errors import EcallError, EnclavePoisonedError, ManifestError, NotInEnclaveError
from pyenclave.host import Enclave
from pyenclave.image import build
from pyenclave.image.manifest import Manifest

ENTRY = """
import numpy as np

from pyenclave import _core, trusted

PAGES = []
KEPT = []


@trusted.on_start
def begin() -> None:
    if trusted.identity().name == "at_start":
        KEPT.append(trusted.heap.zeros(10))


@trusted.ecall
def sums(mib: int) -> list[float]:
    with trusted.heap.numpy():
        array = np.arange(mib << 17, dtype=np.float64)
        KEPT.append(array)
        found = [float(array.sum()), float((array * 2.0)[::-1][0])]
    assert array in trusted.heap
    return found


@trusted.ecall
def figures() -> list[str]:
    stats = trusted.heap.stats
    return [trusted.heap.mechanism, str(stats.resident_peak), repr(trusted.heap)]


@trusted.ecall
def spoil() -> float:
    trusted.heap.evict()
    trusted.heap._pages._cipher(3)[9] ^= 1
    try:
        return float(KEPT[0].sum())
    except BaseException:
        return 0.0


@trusted.ecall
def make(mechanism: str) -> list[str]:
    pages = _core.Pages(64 << 20, 1 << 20, mechanism=mechanism)
    PAGES.append(pages)
    view = memoryview(pages)
    for at in range(0, 16 << 20, 4096):
        view[at : at + 8] = at.to_bytes(8, "little")
    right = all(
        int.from_bytes(view[at : at + 8], "little") == at for at in range(0, 16 << 20, 4096)
    )
    return [pages.mechanism, str(pages.stats()["resident_peak"] * 4096), str(right)]


@trusted.ecall
def tamper(what: str, explicit: bool) -> int:
    pages = PAGES[-1]
    pages.evict()
    if what == "page":
        pages._cipher(7)[100] ^= 1
    elif what == "swap":
        one, two = pages._cipher(7), pages._cipher(8)
        one[:], two[:] = bytes(two), bytes(one)
    elif what == "replay":
        old, meta = bytes(pages._cipher(7)), pages._meta(7)
        memoryview(pages)[7 * 4096] = 1
        pages.evict()
        pages._cipher(7)[:] = old
    try:
        if explicit:
            pages.prefetch(7 * 4096, 4096)
            return 1
        return memoryview(pages)[7 * 4096]
    except BaseException:
        return 2
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The entry, and a state directory of its own."""
    folder = tmp_path_factory.mktemp("heap")
    path = folder / "heap_of_test.py"
    path.write_text(ENTRY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(folder / "state"))
        yield path


@pytest.fixture
def launch(script: Path) -> Callable[..., Enclave]:
    """Make an enclave of the entry, with so much sealed memory."""

    def make(sealed: int | str = "1 MiB") -> Enclave:
        return Enclave(_image(script, sealed), quiet=True)

    return make


@functools.cache
def _image(script: Path, sealed: int | str) -> bytes:
    return build.build_script(script, sealed_memory=sealed)


@pytest.mark.parametrize("mechanism", ["auto", "userfaultfd", "mprotect"])
def test_sealed_memory_works_behind_the_closed_sandbox(
    launch: Callable[..., Enclave], mechanism: str
) -> None:
    """Sixteen times as much as may be plaintext, by each mechanism; the best one by itself."""
    with launch() as enclave:
        taken, peak, right = enclave.make(mechanism)
        assert right == "True"
        assert int(peak) <= 1 << 20
        assert taken == ("userfaultfd" if mechanism == "auto" else mechanism)
        # The bits mean what they meant: the filter was tried once more, from inside.
        for name in ("seccomp", "mdwe", "no_new_privs"):
            assert enclave.info.protections[name], name


def test_the_trusted_heap_holds_more_than_may_be_plaintext(launch: Callable[..., Enclave]) -> None:
    """Real arrays, with NumPy's own temporaries, of many times the manifest's limit."""
    with launch() as enclave:
        count = 32 << 17
        assert enclave.sums(32) == [count * (count - 1) / 2, 2.0 * (count - 1)]
        mechanism, peak, shown = enclave.figures()
        assert mechanism == "userfaultfd"
        assert int(peak) <= 1 << 20
        assert "1.0 MiB resident" in shown


def test_a_changed_page_of_the_trusted_heap_ends_the_enclave(
    launch: Callable[..., Enclave],
) -> None:
    """In the middle of a NumPy loop; nothing after it runs."""
    with launch() as enclave:
        enclave.sums(4)
        with pytest.raises(EnclavePoisonedError, match="sealed memory was changed"):
            enclave.spoil()


def test_the_trusted_heap_is_there_in_enclaves_that_ask_for_it(
    launch: Callable[..., Enclave], tmp_path: Path
) -> None:
    """Not outside, not without the manifest's word, not while the entry is imported."""
    with pytest.raises(NotInEnclaveError):
        trusted.heap.zeros(3)
    assert repr(trusted.heap) == "<trusted.heap>"
    with launch(0) as enclave, pytest.raises(EcallError, match="no sealed memory"):
        enclave.sums(1)
    early = tmp_path / "early.py"
    early.write_text(
        "from pyenclave import trusted\n"
        "try:\n    trusted.heap.zeros(3)\nexcept Exception as error:\n    WHY = str(error)\n\n"
        "@trusted.ecall\ndef why() -> str:\n    return WHY\n"
    )
    with Enclave.from_file(early, sealed_memory="1 MiB", quiet=True) as enclave:
        assert "on_start" in enclave.why()
    at_start = tmp_path / "at_start.py"
    at_start.write_text(ENTRY)
    with Enclave.from_file(at_start, sealed_memory="1 MiB", quiet=True) as enclave:
        assert "trusted.heap: <SealedHeap" in enclave.figures()[2]


@pytest.mark.parametrize("mechanism", ["auto", "userfaultfd"])
def test_who_did_not_ask_for_sealed_memory_has_none(
    launch: Callable[..., Enclave], mechanism: str
) -> None:
    """What its pager asks of the kernel is refused."""
    with launch(0) as enclave, pytest.raises(EcallError, match="refused permission"):
        enclave.make(mechanism)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("what", ["page", "swap", "replay"])
@pytest.mark.parametrize("mechanism", ["userfaultfd", "mprotect"])
def test_PAG_01_a_changed_page_ends_the_enclave(
    launch: Callable[..., Enclave], mechanism: str, what: str, explicit: bool
) -> None:
    """Changed, swapped or put back: trusted code cannot catch it and go on with zeros."""
    if (mechanism, what) == ("mprotect", "swap"):
        pytest.skip("tried by the other mechanism")
    with launch() as enclave:
        assert enclave.make(mechanism)[2] == "True"
        for _ in range(2):  # for ever, with the reason
            with pytest.raises(EnclavePoisonedError, match="sealed memory was changed"):
                enclave.tamper(what, explicit)


def test_a_native_image_has_no_sealed_memory(tmp_path: Path) -> None:
    """There is no way to it from C yet: asking is refused, not ignored."""
    library = tmp_path / "libx.so"
    library.write_bytes(b"\x7fELF" + bytes(60))
    for asked in ({"sealed": 1 << 20}, {"sealed_files": ("data",)}):
        manifest = Manifest(
            name="x", entry=library, native=True, product_id=1, security_version=1, **asked
        )  # type: ignore[arg-type]
        with pytest.raises(ManifestError, match="is for Python entries"):
            build.build_manifest(manifest)


def test_the_handler_takes_no_impossible_last_words() -> None:
    """What is sent is at most a kilobyte, and something."""
    from pyenclave import _core

    for message in (b"", bytes(1025)):
        with pytest.raises(ValueError, match="message"):
            _core.heap_ends(1, message)
    wrong: Any = "text"
    with pytest.raises(TypeError):
        _core.heap_ends(1, wrong)
