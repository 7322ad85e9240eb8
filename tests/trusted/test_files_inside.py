"""Sealed files that trusted code opens, in real enclaves: the host keeps bytes, and no key."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pyenclave
from pyenclave.errors import EcallError, ManifestError, NotInEnclaveError, OcallError
from pyenclave.formats.image import Image
from pyenclave.host import Enclave
from pyenclave.host.files import LentFiles
from pyenclave.image import build, inspect, keys, sign
from pyenclave.image.manifest import Manifest, load
from pyenclave.sealed.file_store import FileStore

ENTRY = """
import pyenclave
from pyenclave import trusted

KEPT = []


def opened(path: str, mode: str, policy: str, counter: bytes, name: bytes = b""):
    return trusted.open_sealed(
        path,
        mode,
        key=trusted.SealPolicy[policy] if policy else None,
        name=name,
        counter=trusted.Counter(counter) if counter else None,
    )


@trusted.ecall
def save(path: str, data: bytes, policy: str, counter: bytes) -> None:
    with opened(path, "wb", policy, counter) as file:
        file.write(data)


@trusted.ecall
def read(path: str, counter: bytes) -> bytes:
    with opened(path, "rb", "", counter) as file:
        return file.read()


@trusted.ecall
def change(path: str, offset: int, data: bytes, counter: bytes) -> int:
    with opened(path, "r+b", "", counter) as file:
        file.seek(offset)
        file.write(data)
        file.commit()
        return file.size


@trusted.ecall
def append(path: str, data: bytes, counter: bytes) -> None:
    with opened(path, "ab", "", counter) as file:
        file.write(data)


@trusted.ecall
def outer(path: str, data: bytes) -> bytes:
    with pyenclave.open_sealed(path, "wb", key=trusted.SealPolicy.signer) as file:
        file.write(data)
    with pyenclave.open_sealed(path, key=trusted.SealPolicy.signer) as file:
        return file.read()


@trusted.ecall
def text(path: str, name: bytes) -> str:
    with opened(path, "w", "unique", b"", name) as file:
        file.write("Grüße")
    with opened(path, "r", "", b"", name) as file:
        return file.read()


@trusted.ecall
def keep(path: str) -> int:
    KEPT.append(opened(path, "r+b", "", b""))
    return KEPT[-1].write(b"kept")


@trusted.ecall
def raw(path: str, key: bytes, data: bytes) -> bytes:
    with trusted.open_sealed(path, "w+b", key=key) as file:
        file.write(data)
        file.seek(0)
        return file.read()


@trusted.ecall
def speed(path: str, size: int, write: bool) -> int:
    buffer = memoryview(bytearray(1 << 20))
    if write:
        with opened(path, "wb", "", b"") as file:
            for _ in range(size >> 20):
                file.write(buffer)
        return size
    with opened(path, "rb", "", b"") as file:
        return sum(file.readinto(buffer) for _ in range(size >> 20))


@trusted.ecall
def counter() -> bytes:
    return trusted.Counter.create().id


@trusted.ecall
def advance(counter: bytes, to: int, mark: bytes) -> int:
    trusted.Counter(counter).advance(to, mark)
    return trusted.Counter(counter).reading().value
"""

PLAIN = b"a plain row of a plain table, which the host must never see; " * 200


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """Two versions of one signer, a debug one, and the first one of another signer."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "files_of_test.py").write_text(ENTRY)
    key, other = keys.keygen(), keys.keygen()
    made: dict[str, bytes] = {}
    for version in (1, 2):
        manifest = Manifest(
            name="files",
            entry=Path(folder / "files_of_test.py"),
            product_id=9,
            security_version=version,
            debug=version == 1,
            sealed_files=("data", "more"),
        )
        image = build.build_manifest(manifest)
        made[f"v{version}"] = sign.sign(image, key)
        if version == 1:
            made["other"] = sign.sign(image, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(folder / "state"))
        yield made


@pytest.fixture(scope="module")
def enclaves(
    images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """One enclave of each image, all of them lent one folder and one file."""
    folder = tmp_path_factory.mktemp("lent")
    lent = pyenclave.lend_files(data=folder, more=folder / "more.sealed")
    with (
        Enclave(images["v1"], ocalls=lent) as v1,
        Enclave(images["v2"], ocalls=lent) as v2,
        Enclave(images["other"], ocalls=lent) as other,
        Enclave(images["v1"], ocalls=lent, debug=True) as debug,
    ):
        yield SimpleNamespace(v1=v1, v2=v2, other=other, debug=debug, folder=folder, lent=lent)


_numbers = itertools.count()


@pytest.fixture
def place(enclaves: SimpleNamespace) -> SimpleNamespace:
    """A file of its own: its name inside, and where it is."""
    name = f"file-{next(_numbers)}"
    return SimpleNamespace(name=f"data/{name}", path=enclaves.folder / name)


def refused_with(kind: str, call: Any, *arguments: Any) -> None:
    with pytest.raises((EcallError, OcallError)) as caught:
        call(*arguments)
    assert caught.value.type == kind, caught.value


def test_SEA_01_an_older_version_never_opens_what_a_newer_one_sealed(enclaves, place) -> None:
    """Every pair of versions, by signer."""
    enclaves.v1.save(place.name, PLAIN, "signer", b"")
    assert enclaves.v2.read(place.name, b"") == PLAIN
    place.path.unlink()
    enclaves.v2.save(place.name, PLAIN, "signer", b"")
    assert enclaves.v2.read(place.name, b"") == PLAIN
    refused_with("UnsealError", enclaves.v1.read, place.name, b"")


def test_SEA_02_a_file_opens_for_whom_it_was_sealed_only(enclaves, place) -> None:
    """By signer for the signer's enclaves, by measurement for the same enclave."""
    enclaves.v1.save(place.name, PLAIN, "signer", b"")
    refused_with("UnsealError", enclaves.other.read, place.name, b"")
    place.path.unlink()
    enclaves.v1.save(place.name, PLAIN, "unique", b"")
    assert enclaves.v1.read(place.name, b"") == PLAIN
    refused_with("UnsealError", enclaves.v2.read, place.name, b"")
    # As in SGX, a measurement is the same whoever signed it.
    assert enclaves.other.read(place.name, b"") == PLAIN


def test_SEA_06_debug_and_production_share_no_file(enclaves, place) -> None:
    """In both directions."""
    enclaves.v1.save(place.name, PLAIN, "signer", b"")
    refused_with("UnsealError", enclaves.debug.read, place.name, b"")
    place.path.unlink()
    enclaves.debug.save(place.name, PLAIN, "signer", b"")
    refused_with("UnsealError", enclaves.v1.read, place.name, b"")


def test_SEA_07_a_files_key_is_no_blobs_key(enclaves, place) -> None:
    """The key in front of a file is bound to being that: under another name it does not open."""
    assert enclaves.v1.text(place.name, b"a") == "Grüße"
    refused_with("UnsealError", enclaves.v1.read, place.name, b"")


def test_SEA_03_every_byte_before_the_file_is_authenticated(enclaves, place) -> None:
    """Whatever is changed there, the file does not open."""
    enclaves.v1.save(place.name, PLAIN, "signer", b"")
    good = place.path.read_bytes()
    for at in (*range(0, 280, 7), 281, 300, 4095):
        place.path.write_bytes(good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :])
        refused_with("UnsealError", enclaves.v1.read, place.name, b"")
    for size in (0, 100, 4096, 5000):
        place.path.write_bytes(good[:size])
        refused_with("UnsealError", enclaves.v1.read, place.name, b"")
    place.path.write_bytes(good)
    assert enclaves.v1.read(place.name, b"") == PLAIN


def test_the_host_sees_no_plaintext(enclaves, place) -> None:
    """Nothing of it is in what the host keeps, nor do two files of one content look alike."""
    enclaves.v1.save(place.name, PLAIN, "signer", b"")
    stored = place.path.read_bytes()
    assert len(stored) > len(PLAIN)
    assert not any(PLAIN[at : at + 8] in stored for at in range(61))
    enclaves.v1.save(f"{place.name}-again", PLAIN, "signer", b"")
    again = Path(f"{place.path}-again").read_bytes()
    first, second = (
        {data[at : at + 16] for at in range(8192, len(data) - 16, 64)} for data in (stored, again)
    )
    assert first & second <= {bytes(16)}


def test_SEA_11_an_older_copy_of_a_file_with_a_counter_is_refused(enclaves, place) -> None:
    """With the platform's counter; without one it opens, as the documentation says."""
    counter = enclaves.v1.counter()
    enclaves.v1.save(place.name, PLAIN, "signer", counter)
    old = place.path.read_bytes()
    assert enclaves.v1.change(place.name, 5, b"new", counter) == len(PLAIN)
    new = place.path.read_bytes()
    place.path.write_bytes(old)
    refused_with("RollbackError", enclaves.v1.read, place.name, counter)
    refused_with("RollbackError", enclaves.v1.read, place.name, b"")
    place.path.unlink()
    refused_with("FileNotFoundError", enclaves.v1.read, place.name, counter)
    refused_with("RollbackError", enclaves.v1.append, place.name, b"", counter)
    place.path.write_bytes(new)
    assert enclaves.v2.read(place.name, counter) == PLAIN[:5] + b"new" + PLAIN[8:]


def test_a_counter_inside_advances_as_files_need_it(enclaves) -> None:
    """The same value again is nothing, less is a rollback, another mark another state."""
    counter, mark = enclaves.v1.counter(), bytes(range(32))
    assert enclaves.v1.advance(counter, 2, mark) == 2
    assert enclaves.v2.advance(counter, 2, mark) == 2
    assert enclaves.v1.advance(counter, 2, b"") == 2
    refused_with("RollbackError", enclaves.v1.advance, counter, 1, b"")
    refused_with("RollbackError", enclaves.v1.advance, counter, 2, bytes(32))
    refused_with("SealLimitError", enclaves.v1.advance, counter, 19, b"")
    assert enclaves.v1.advance(counter, 3, b"") == 3


def test_pyenclave_open_sealed_takes_a_policy_inside_only(enclaves, place) -> None:
    """The same lines do the same inside, and are refused by name outside."""
    assert enclaves.v1.outer(place.name, PLAIN) == PLAIN
    with pytest.raises(NotInEnclaveError):
        pyenclave.open_sealed(place.path, key=pyenclave.SealPolicy.signer)
    with pytest.raises(NotInEnclaveError):
        pyenclave.trusted.open_sealed("data")


def test_a_file_under_a_key_of_ones_own_opens_outside_too(enclaves, place) -> None:
    """32 bytes as key: then the file is as any other."""
    key = os.urandom(32)
    assert enclaves.v1.raw(place.name, key, PLAIN) == PLAIN
    with pyenclave.open_sealed(place.path, key=key) as file:
        assert file.read() == PLAIN
    refused_with("UnsealError", enclaves.v1.read, place.name, b"")


def test_a_single_file_is_lent_under_its_name(enclaves) -> None:
    """Without a folder."""
    enclaves.v1.save("more", PLAIN, "", b"")
    assert (enclaves.folder / "more.sealed").exists()
    assert enclaves.v2.read("more", b"") == PLAIN


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nothing", "SealingError"),
        ("", "SealingError"),
        ("../data", "SealingError"),
        ("data/none", "FileNotFoundError"),
        ("data/..", "PermissionError"),
        ("data/../more.sealed", "PermissionError"),
        ("data/a/b", "PermissionError"),
        ("data/.hidden", "PermissionError"),
        ("data/" + "x" * 300, "FileNotFoundError"),
        ("data/a\x00b", "FileNotFoundError"),
        ("data/link", "PermissionError"),
    ],
)
def test_names_that_were_not_lent_are_refused(enclaves, name: str, kind: str) -> None:
    """By the enclave, which has a list, and by the host, which does not trust it."""
    link = enclaves.folder / "link"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    refused_with(kind, enclaves.v1.read, name, b"")


def test_a_lost_enclave_leaves_no_lock(images, enclaves, place) -> None:
    """What an enclave has open ends with it, however it ends; nothing uncommitted is there."""
    enclaves.v1.save(place.name, PLAIN, "signer", b"")
    with Enclave(images["v1"], ocalls=enclaves.lent) as lost:
        assert lost.keep(place.name) == 4
        refused_with("FileBusyError", enclaves.v1.keep, place.name)
        os.kill(lost.info.pid, 9)
        with pytest.raises(pyenclave.errors.EnclaveLostError):
            lost.read(place.name, b"")
        assert enclaves.v2.read(place.name, b"") == PLAIN
        assert enclaves.v2.change(place.name, 0, b"A", b"") == len(PLAIN)


class _Hostile(LentFiles):
    """A host that answers what it likes."""

    answer: Any = None

    def _read(self, handle: int, offset: int, size: int) -> bytes:
        data = super()._read(handle, offset, size)
        return data if self.answer is None else self.answer(data, offset, size)

    def fresh(self) -> LentFiles:
        copy = _Hostile(self._paths)
        copy.answer = self.answer
        return copy


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda data, offset, size: data + b"x", "OSError"),
        (lambda data, offset, size: data[: len(data) // 2 + 1], None),
        (lambda data, offset, size: b"", "UnsealError"),
        (lambda data, offset, size: bytes(len(data)), "UnsealError"),
        (
            lambda data, offset, size: data[: max(0, 12288 - offset)].ljust(len(data), b"\0"),
            "UnsealError",
        ),
        (lambda data, offset, size: "text", "OSError"),
    ],
)
def test_PAG_10_a_host_that_answers_otherwise_gets_typed_errors(
    images, enclaves, place, answer: Any, kind: str | None
) -> None:
    """More, less, nothing, zeros, another type: never wrong data."""
    enclaves.v1.save(place.name, PLAIN, "signer", b"")
    hostile = _Hostile({"data": str(enclaves.folder), "more": "/nowhere"})
    hostile.answer = answer
    with Enclave(images["v1"], ocalls=hostile.handlers()) as enclave:
        if kind is None:
            assert enclave.read(place.name, b"") == PLAIN
        else:
            refused_with(kind, enclave.read, place.name, b"")


def test_an_image_says_which_files_it_may_be_lent(images, tmp_path: Path) -> None:
    """They are measured, and shown; without handlers there is no launch."""
    assert inspect.options(Image.parse(images["v1"]))["seal.files"] == ["data", "more"]
    with pytest.raises(OcallError, match="pyenclave_file_open"), Enclave(images["v1"]):
        pass
    entry = tmp_path / "entry.py"
    entry.write_text(ENTRY)
    head = f'[enclave]\nname = "n"\nentry = "{entry}"\nproduct_id = 1\nsecurity_version = 1\n'
    for wrong in ('["../data"]', '"data"', "[1]", '["a b"]', '[""]'):
        (tmp_path / "enclave.toml").write_text(f"{head}[seal]\nfiles = {wrong}\n")
        with pytest.raises(ManifestError, match=r"\[seal\] files"):
            load(tmp_path)
    (tmp_path / "enclave.toml").write_text(f'{head}[seal]\nfiles = ["b", "a"]\n')
    assert load(tmp_path).sealed_files == ("a", "b")


def test_only_paths_are_lent() -> None:
    """What is lent is looked at before anything starts."""
    with pytest.raises(ValueError, match="at least one"):
        pyenclave.lend_files()
    with pytest.raises(TypeError):
        pyenclave.lend_files(data=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a name is a text"):
        pyenclave.lend_files({1: "x"})  # type: ignore[dict-item]


def test_a_large_sealed_file_inside_is_written_and_read_whole(enclaves, place) -> None:
    """Many windows and crossings; how fast is printed, and fails nothing."""
    size = 64 << 20
    for write in (True, False):
        begun = time.perf_counter()
        assert enclaves.v1.speed(place.name, size, write) == size
        rate = size / (time.perf_counter() - begun) / 1e6
        print(f"{'write' if write else 'read'}: {rate:.0f} MB/s")


def test_files_that_are_in_use_are_not_closed_under_their_user(tmp_path: Path) -> None:
    """Closing waits: the descriptor's number could be another file's by then."""
    (tmp_path / "file").write_bytes(b"x" * 100)
    lent = LentFiles({"data": str(tmp_path / "file")})
    handle = lent._open("data", write=False, create=False, exclusive=False)
    with lent._store(handle) as store:
        assert isinstance(store, FileStore)
        assert lent._stores[handle].ends.taken_here()
    lent.close()
    with pytest.raises(OSError, match="no open file"):
        lent._read(handle, 0, 10)
    with pytest.raises(OSError, match="ended"):
        lent._open("data", write=False, create=False, exclusive=False)


def test_a_link_made_at_the_last_moment_leads_nowhere(tmp_path: Path, monkeypatch) -> None:
    """Between the look at a name and its opening somebody may put a link there."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"of the host")
    folder = tmp_path / "lent"
    folder.mkdir()
    (folder / "a").symlink_to(secret)
    lent = LentFiles({"data": str(folder)})
    monkeypatch.setattr(os.path, "islink", lambda path: False)
    for write in (False, True):
        with pytest.raises(OSError, match="symbolic links"):
            lent._open("data/a", write, False, False)


def test_PAG_10_what_the_host_lost_during_a_read_is_never_committed(monkeypatch) -> None:
    """A disk that is full for a moment: the read fails, and so does the commit after it."""
    from pyenclave.calls import files
    from pyenclave.sealed.file_engine import SealedEngine
    from pyenclave.trusted import _files

    disk, full = bytearray(), [False]

    def ask(self: Any, function: str, *values: Any) -> Any:
        if function.endswith("_read"):
            _, offset, size = values
            return bytes(disk[offset : offset + size])
        if function.endswith("_write"):
            if full[0]:
                raise OSError(28, "planted")
            _, offset, data = values
            disk.extend(bytes(max(0, offset + len(data) - len(disk))))
            disk[offset : offset + len(data)] = data
            return len(data)
        if function.endswith("_control") and values[1] == files.SIZE:
            return len(disk)
        return 1

    monkeypatch.setattr(_files._HostFile, "_ask", ask)
    limits = SimpleNamespace(message_limit=16 << 20)
    monkeypatch.setattr(_files._state, "current", lambda: limits)

    def opened(**options: Any) -> SealedEngine:
        store = _files._HostFile("data", write=True, create=True, exclusive=False)
        return SealedEngine(store, key=bytes(32), **options)

    with contextlib.closing(opened(write=True, create=True)) as file:
        file.write(0, memoryview(b"old" * 40960))
    file = opened(write=True)
    out = memoryview(bytearray(8192))
    file.write(0, memoryview(b"new" * 4096))
    full[0] = True
    with pytest.raises(OSError, match="planted"):
        file.read_into(65536, out)
    full[0] = False
    with pytest.raises(OSError, match="did not take"):
        file.commit()
    file.discard()
    file.write(0, memoryview(b"two" * 4096))
    file.commit()
    file.close()
    with contextlib.closing(opened()) as file:
        out = memoryview(bytearray(122880))
        assert file.read_into(0, out) == len(out)
    assert out == b"two" * 4096 + b"old" * (40960 - 4096)
