"""Sealed files through fsspec: chained URLs, listings, keys that are kept to themselves."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import pickle
import secrets
import traceback

import pytest

fsspec = pytest.importorskip("fsspec", minversion="2025.10")

from pyenclave.errors import UnsealError  # noqa: E402
from pyenclave.sealed._held import HeldKey, read_key_file  # noqa: E402
from pyenclave.sealed._remote import RangeReader  # noqa: E402
from pyenclave.sealed.file import open_sealed  # noqa: E402
from pyenclave.sealed.fsspec import SealedFileSystem  # noqa: E402

KEY = secrets.token_bytes(32)
OPTIONS = {"sealed": {"key": KEY}}


@pytest.fixture(autouse=True)
def registered():
    """As the entry point of an installed package does."""
    fsspec.register_implementation("sealed", SealedFileSystem, clobber=True)
    yield
    SealedFileSystem.clear_instance_cache()
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    """A folder on the disk, read and changed in place, and one that stands for another machine."""
    place = tmp_path if request.param == "file" else f"/{tmp_path.name}"
    return f"sealed::{request.param}://{place}"


def write(url: str, data: bytes, **options: object) -> None:
    with fsspec.open(url, "wb", **(options or OPTIONS)) as file:
        file.write(data)


def read(url: str, **options: object) -> bytes:
    with fsspec.open(url, "rb", **(options or OPTIONS)) as file:
        return file.read()


def test_the_entry_point_names_the_class():
    import tomllib
    from pathlib import Path

    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]["fsspec.specs"]
    assert points == {"sealed": f"{SealedFileSystem.__module__}:SealedFileSystem"}


def test_what_is_written_comes_back_and_is_ciphertext_below(url):
    data = b"planted secret " * 30_000
    write(f"{url}/a/b.bin", data)
    assert read(f"{url}/a/b.bin") == data
    below = fsspec.open(f"{url.removeprefix('sealed::')}/a/b.bin", "rb")
    with below as file:
        assert b"planted secret" not in file.read()


def test_a_local_file_is_an_ordinary_sealed_file(tmp_path):
    write(f"sealed::file://{tmp_path}/x", b"data")
    with open_sealed(tmp_path / "x", key=KEY) as file:
        assert file.read() == b"data"


def test_text_and_compression_work(url):
    for compression in (None, "gzip"):
        with fsspec.open(f"{url}/t", "wt", compression=compression, **OPTIONS) as file:
            file.write("zwei\nZeilen äöü\n")
        with fsspec.open(f"{url}/t", "rt", compression=compression, **OPTIONS) as file:
            assert file.readlines() == ["zwei\n", "Zeilen äöü\n"]


def test_seek_append_and_change(url):
    fs, path = fsspec.url_to_fs(f"{url}/x", **OPTIONS)
    data = bytearray(os.urandom(300_000))
    fs.pipe_file(path, bytes(data))
    with fs.open(path, "ab") as file:
        file.write(b"more")
    data += b"more"
    with fs.open(path, "r+b") as file:
        file.seek(5000)
        file.write(b"CHANGED")
    data[5000:5007] = b"CHANGED"
    with fs.open(path) as file:
        for at, length in ((299_990, 100), (0, 10), (4999, 9), (4096, 8192), (400_000, 5)):
            file.seek(at)
            assert file.read(length) == data[at : at + length]
        assert file.seek(-4, os.SEEK_END) == len(data) - 4
    assert fs.cat_file(path, start=5000, end=5007) == b"CHANGED"
    assert fs.tail(path, 4) == b"more"


def test_exclusive_and_missing_files(url):
    fs, path = fsspec.url_to_fs(f"{url}/x", **OPTIONS)
    with pytest.raises(FileNotFoundError):
        fs.open(path)
    with pytest.raises(FileNotFoundError):
        fs.open(path, "r+b")
    with fs.open(path, "xb") as file:
        file.write(b"first")
    with pytest.raises(FileExistsError):
        fs.open(path, "xb")
    assert fs.cat_file(path) == b"first"


def test_sizes_are_those_of_the_plaintext(url):
    fs, root = fsspec.url_to_fs(url, **OPTIONS)
    sizes = {f"{root}/d/{n}": n * 1000 for n in range(7)}
    for path, size in sizes.items():
        fs.pipe_file(path, bytes(size))
    fs.mkdir(f"{root}/d/sub")
    for path, size in sizes.items():
        info = fs.info(path)
        assert (info["size"], info["type"], info["sealed"]) == (size, "file", True)
        assert info["sealed_size"] >= size + 8192
    assert {i["name"]: i["size"] for i in fs.ls(f"{root}/d") if i["type"] == "file"} == sizes
    assert {n: i["size"] for n, i in fs.find(f"{root}/d", detail=True).items()} == sizes
    assert fs.du(f"{root}/d") == sum(sizes.values())
    assert sorted(fs.glob(f"{root}/d/[0-3]")) == sorted(sizes)[:4]
    ((_, folders, files),) = fs.walk(f"{root}/d", maxdepth=1)
    assert (folders, sorted(files)) == (["sub"], [str(n) for n in range(7)])
    assert fs.isdir(f"{root}/d")
    assert fs.isfile(f"{root}/d/3")


def test_files_are_moved_copied_and_removed(url):
    fs, root = fsspec.url_to_fs(url, **OPTIONS)
    fs.pipe_file(f"{root}/a", b"data")
    fs.copy(f"{root}/a", f"{root}/b")
    fs.mv(f"{root}/a", f"{root}/c")
    assert not fs.exists(f"{root}/a")
    assert fs.cat_file(f"{root}/b") == fs.cat_file(f"{root}/c") == b"data"
    fs.rm_file(f"{root}/b")
    fs.makedirs(f"{root}/d/e")
    fs.pipe_file(f"{root}/d/e/f", b"")
    fs.rm(f"{root}/d", recursive=True)
    assert [name.rpartition("/")[2] for name in fs.ls(root, detail=False)] == ["c"]


def test_another_key_or_name_and_files_that_are_not_sealed_are_refused(url):
    write(f"{url}/x", b"data")
    write(f"{url}/named", b"data", sealed={"key": KEY, "name": b"july"})
    with fsspec.open(f"{url.removeprefix('sealed::')}/plain", "wb") as file:
        file.write(b"plaintext " * 2000)
    for path, options in (
        ("x", {"key": bytes(32)}),
        ("x", {"key": KEY, "name": b"june"}),
        ("named", {"key": KEY}),
        ("plain", {"key": KEY}),
    ):
        with pytest.raises(UnsealError):
            read(f"{url}/{path}", sealed=options)
    fs, root = fsspec.url_to_fs(url, **OPTIONS)
    found = {i["name"].rpartition("/")[2]: (i["sealed"], i["size"]) for i in fs.ls(root)}
    assert found == {"x": (True, 4), "named": (False, None), "plain": (False, None)}
    with pytest.raises(UnsealError):
        fs.info(f"{root}/plain")
    assert fs.exists(f"{root}/plain")


def test_every_changed_byte_below_is_refused_or_changes_nothing(tmp_path):
    fs = fsspec.filesystem("memory")
    write("sealed::memory://f", b"x" * 5000)
    good = fs.cat_file("/f")
    refused = 0
    for at in range(0, len(good), 61):
        fs.pipe_file("/f", good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            assert read("sealed::memory://f") == b"x" * 5000
        except UnsealError:
            refused += 1
    assert refused > 60


def test_what_fails_is_not_sent_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fs, path = fsspec.url_to_fs("sealed::memory://x", **OPTIONS)
    fs.pipe_file(path, b"old")
    with pytest.raises(ZeroDivisionError), fs.open(path, "wb") as file:  # noqa: PT012
        file.write(b"by half")
        raise ZeroDivisionError
    assert fs.cat_file(path) == b"old"

    def full(*arguments, **options):
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(fs.fs, "put_file", full)
        file = fs.open(path, "wb")
        file.write(b"never sent")
        with pytest.raises(OSError, match="no space"):
            file.close()
        assert file.closed
    assert fs.cat_file(path) == b"old"
    assert list(tmp_path.iterdir()) == []


def test_what_waits_to_be_sent_is_ciphertext(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with fsspec.open("sealed::memory://x", "wb", **OPTIONS) as file:
        file.write(b"planted secret " * 100_000)
        (aside,) = tmp_path.iterdir()
        assert b"planted secret" not in aside.read_bytes()


def test_a_transaction_is_all_or_nothing(url):
    fs, root = fsspec.url_to_fs(url, **OPTIONS)
    fs.pipe_file(f"{root}/a", b"old")
    with pytest.raises(ZeroDivisionError), fs.transaction:  # noqa: PT012
        fs.pipe_file(f"{root}/a", b"new")
        fs.pipe_file(f"{root}/b", b"new")
        raise ZeroDivisionError
    assert fs.cat_file(f"{root}/a") == b"old"
    assert not fs.exists(f"{root}/b")
    with fs.transaction:
        fs.pipe_file(f"{root}/a", b"new")
        assert fs.cat_file(f"{root}/a") == b"old"
    assert fs.cat_file(f"{root}/a") == b"new"


@pytest.mark.parametrize("change", [-1, 1])
def test_an_answer_of_another_length_is_an_error(change):
    reader = RangeReader(lambda start, stop: bytes(stop - start + change), 5000, 1000)
    with pytest.raises(OSError, match="asked for"):
        reader.read(10)


def test_ranges_in_order_are_asked_for_in_few_requests():
    data = os.urandom(100_000)
    asked = []

    def fetch(start, stop):
        asked.append((start, stop))
        return data[start:stop]

    reader = io.BufferedReader(RangeReader(fetch, len(data), 1000), 500)
    assert reader.read() == data
    assert len(asked) < 20
    del asked[:]
    for at in (90_001, 5, 50_500):
        reader.seek(at)
        assert reader.read(20) == data[at : at + 20]
    assert sum(stop - start for start, stop in asked) <= 6000


# ---- keys --------------------------------------------------------------------------------------


def forms(key: bytes) -> list[bytes]:
    import base64

    return [
        key,
        repr(key).encode()[2:-1],
        key.hex().encode(),
        key.hex().upper().encode(),
        base64.b64encode(key),
        str(list(key)).encode()[1:-1],
    ]


def test_sea_12_no_text_token_or_pickle_has_the_key(url, caplog):
    """What fsspec, dask and logs make of a file system, and what an error's traceback shows."""
    caplog.set_level(logging.DEBUG)
    write(f"{url}/x", b"data")
    fs, path = fsspec.url_to_fs(f"{url}/x", **OPTIONS)
    shown = [
        repr(fs),
        str(fs),
        fs.to_json(),
        json.dumps(fs.to_dict()),
        fs._fs_token,
        str(fs.__dask_tokenize__()),
        repr(fs.storage_options),
        str(vars(fs)),
        repr(SealedFileSystem._cache),
        fs.unstrip_protocol(path),
        repr(fs.info(path)),
        repr(fs.open(path)),
        repr(fsspec.open(f"{url}/x", **OPTIONS)),
        caplog.text,
    ]
    for value in (fs, fs._key, fs.storage_options, fs.open(path), fsspec.open(url, **OPTIONS)):
        with pytest.raises(TypeError, match=r"pickled|key"):
            pickle.dumps(value)
    try:
        fs.open(path, name=b"wrong")
    except UnsealError:
        report = traceback.TracebackException(*__import__("sys").exc_info(), capture_locals=True)
        shown.append("".join(line for line in report.format() if "pyenclave/sealed/fsspec" in line))
        shown.append("".join(report.format_exception_only()))
    for text in shown:
        for form in forms(KEY):
            assert form not in text.encode("utf-8", "surrogateescape"), text[:200]


def test_what_is_pickled_with_a_key_file_has_its_path_only(tmp_path):
    (tmp_path / "key").write_bytes(KEY)
    options = {"sealed": {"key_file": str(tmp_path / "key")}}
    write(f"sealed::file://{tmp_path}/x", b"data", **options)
    fs, path = fsspec.url_to_fs(f"sealed::file://{tmp_path}/x", **options)
    pickled = pickle.dumps(fs)
    assert not any(form in pickled for form in forms(KEY))
    again = pickle.loads(pickled)
    assert again.cat_file(path) == b"data"
    made = fsspec.AbstractFileSystem.from_json(fs.to_json())
    assert made.cat_file(path) == b"data"
    file = pickle.loads(pickle.dumps(fsspec.open(f"sealed::file://{tmp_path}/x", **options)))
    with file as stream:
        assert stream.read() == b"data"


def test_one_key_makes_one_file_system_and_another_key_another(tmp_path):
    a, _ = fsspec.url_to_fs(f"sealed::file://{tmp_path}/a", **OPTIONS)
    b, _ = fsspec.url_to_fs(f"sealed::file://{tmp_path}/b", sealed={"key": bytearray(KEY)})
    c, _ = fsspec.url_to_fs(f"sealed::file://{tmp_path}/a", sealed={"key": bytes(32)})
    assert a is b
    assert a._fs_token != c._fs_token
    assert len(SealedFileSystem._cache) == 2
    token = a._fs_token
    SealedFileSystem.clear_instance_cache()
    del a, b
    gc.collect()
    again, _ = fsspec.url_to_fs(f"sealed::file://{tmp_path}/a", **OPTIONS)
    assert again._fs_token == token  # the same in every process's threads, as fsspec has it


def test_a_key_is_32_bytes_and_there_is_one(tmp_path):
    for options, error in (
        ({}, TypeError),
        ({"key": KEY, "key_file": "x"}, TypeError),
        ({"key": KEY.hex()}, TypeError),
        ({"key": KEY[:31]}, ValueError),
        ({"key": 5}, TypeError),
        ({"key_file": str(tmp_path / "none")}, OSError),
    ):
        with pytest.raises(error):
            fsspec.open(f"sealed::file://{tmp_path}/x", "wb", sealed=options)
    with pytest.raises(TypeError, match="which file system"):
        SealedFileSystem(key=KEY)
    for size in (0, 31, 33):
        (tmp_path / "key").write_bytes(bytes(size))
        with pytest.raises(ValueError, match="32"):
            read_key_file(tmp_path / "key")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="regular"):
        read_key_file(tmp_path / "pipe")


def test_held_keys_compare_and_copy_without_showing():
    import copy

    key, other = HeldKey(KEY), HeldKey(bytes(32))
    assert key == HeldKey(memoryview(KEY))
    assert key != other
    assert key != KEY
    assert copy.deepcopy({"key": key})["key"] is key
    assert len(key.fingerprint) == 16
    assert key.fingerprint not in (KEY.hex(), other.fingerprint)


def test_a_counter_is_not_advanced_before_the_file_is_in_its_place(tmp_path):
    """Were it, a file that never gets there would leave none that the counter accepts."""
    from pyenclave.sealed.counter import FileCounter

    counter = FileCounter(tmp_path / "counter")
    options = {"mode": "wb", "counter": counter}
    with pytest.raises(ValueError, match="in place"):
        SealedFileSystem(fsspec.filesystem("memory"), key=KEY).open("/x", **options)
    local = SealedFileSystem(fsspec.filesystem("file"), key=KEY)
    with pytest.raises(ValueError, match="in place"):
        local.open(str(tmp_path / "x"), autocommit=False, **options)
    assert counter.read() == 0
    with local.open(str(tmp_path / "x"), **options) as file:
        file.write(b"dated")
    assert counter.read() == 1
    with local.open(str(tmp_path / "x"), counter=counter) as file:
        assert file.read() == b"dated"
