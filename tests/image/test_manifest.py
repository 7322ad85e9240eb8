"""The manifest: everything that is wrong is refused by table, key and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyenclave.errors import ManifestError
from pyenclave.image.manifest import DEFAULT_MESSAGE, DEFAULT_SEALED, OcallEntry, load, parse_size

ENCLAVE = '[enclave]\nname = "a"\nentry = "score.py"\nproduct_id = 1\nsecurity_version = 2\n'


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "enclave.toml"
    path.write_text(text)
    return load(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (ENCLAVE + "[network]\nhost = 1\n", r"\[network\]"),
        ("name = 'x'\n" + ENCLAVE, "name = 'x'"),
        (ENCLAVE + "thread = 4\n", r"\[enclave\] thread is not a known key"),
        (ENCLAVE + "threads = 0\n", r"\[enclave\] threads"),
        (ENCLAVE + "threads = 257\n", "found 257"),
        (ENCLAVE + "threads = true\n", "found True"),
        (ENCLAVE + 'threads = "4"\n', "threads"),
        (ENCLAVE + "threads = 1.5\n", "threads"),
        (ENCLAVE + "debug = 1\n", r"\[enclave\] debug"),
        (ENCLAVE.replace("= 1\n", "= 65536\n"), "product_id"),
        (ENCLAVE.replace("= 1\n", "= -1\n"), "product_id"),
        (ENCLAVE.replace("product_id = 1\n", ""), "product_id is missing"),
        (ENCLAVE.replace("product_id", "produkt_id"), "product_id is missing.*found produkt_id"),
        (ENCLAVE.replace("security_version = 2\n", ""), "security_version is missing"),
        (ENCLAVE.replace('entry = "score.py"\n', ""), "entry is missing"),
        (ENCLAVE.replace('name = "a"\n', ""), "name is missing"),
        (ENCLAVE.replace('"a"', '""'), "name"),
        (ENCLAVE.replace('"a"', '"\\u001b[31m"'), "name"),
        (ENCLAVE.replace("score.py", "libscore.so"), "a Python file"),
        (ENCLAVE + 'native = "libscore.so"\n', "not both"),
        (ENCLAVE + '[memory]\nsealed = "64 MB"\n', r"\[memory\] sealed.*64 MB"),
        (ENCLAVE + "[memory]\nsealed = -1\n", "sealed"),
        (ENCLAVE + '[memory]\nsealed = "252 KiB"\n', r"\[memory\] sealed.*whole pages"),
        (ENCLAVE + "[memory]\nsealed = 1048577\n", r"\[memory\] sealed.*whole pages"),
        (ENCLAVE + '[memory]\nsealed = "65 TiB"\n', r"\[memory\] sealed.*64 TiB"),
        (ENCLAVE + "[memory]\nmessage = 100\n", r"\[memory\] message"),
        (ENCLAVE + '[memory]\nmessage = "3 TiB"\n', "message"),
        (ENCLAVE + '[memory]\nshared = "17 GiB"\n', r"\[memory\] shared"),
        (ENCLAVE + "[memory]\nshared = 4097\n", "whole pages"),
        (ENCLAVE + "[memory]\nshared = true\n", "whole pages"),
        (ENCLAVE + "[memory]\nheap = 1\n", r"\[memory\] heap"),
        (ENCLAVE + '[files]\n"../x" = "a"\n', r"\[files\] \.\./x"),
        (ENCLAVE + '[files]\n"/etc/x" = "a"\n', r"\[files\] /etc/x"),
        (ENCLAVE + "[files]\na = 1\n", r"\[files\] a"),
        (ENCLAVE + "[files]\na = ''\n", r"\[files\] a"),
        (ENCLAVE + "[runtime]\njit = 'yes'\n", r"\[runtime\] jit"),
        (ENCLAVE + "[runtime]\nblas_threads = 0\n", "blas_threads"),
        (ENCLAVE + "[runtime]\nextra = 'json'\n", "extra"),
        (ENCLAVE + "[runtime]\nextra = ['a-b']\n", "extra"),
        (ENCLAVE + "[runtime]\nextra = [1]\n", "extra"),
        (ENCLAVE + "[seal]\npolicy = 'dangerous_any_enclave'\n", r"\[seal\] policy"),
        (ENCLAVE + "[seal]\nkey = 'x'\n", r"\[seal\] key"),
        (ENCLAVE + "[ecalls]\na = 'bytes -> bytes'\n", r"\[ecalls\] is for native"),
        (ENCLAVE + "[ocalls]\na = 1\n", r"\[ocalls\] a"),
        (ENCLAVE + "[ocalls]\na = ''\n", r"\[ocalls\] a"),
        (ENCLAVE + "[ocalls]\n'a-b' = '() -> int'\n", r"\[ocalls\] a-b"),
        (ENCLAVE + "[ocalls]\na = {allow = []}\n", r"\[ocalls\] a"),
        (ENCLAVE + "[ocalls]\na = {signature = 5}\n", r"\[ocalls\] a"),
        (ENCLAVE + "[ocalls]\na = {signature = '() -> int', allow = 'x'}\n", r"\[ocalls\] a"),
        (ENCLAVE + "[ocalls]\na = {signature = '() -> int', allow = ['a.b']}\n", r"\[ocalls\] a"),
        (ENCLAVE + "[ocalls]\na = {signature = '() -> int', alow = []}\n", r"\[ocalls\] a"),
        ("enclave = 1\n", r"\[enclave\] is not a table"),
        ("[enclave\n", "is not TOML"),
        ("", "entry is missing"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ManifestError, match=named):
        read(tmp_path, text)


def test_a_manifest_that_is_no_text_or_too_long_is_refused(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"#" * (1 << 20) + b"\n\n"):
        (tmp_path / "enclave.toml").write_bytes(content)
        with pytest.raises(ManifestError):
            load(tmp_path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ManifestError, match=r"enclave\.toml: cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    "value", ["64", "64 mib", "64MB", "-1 MiB", "1.5 MiB", " 1 B", "", -1, True, None, 1.0]
)
def test_sizes_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="MiB"):
        parse_size(value)


def test_sizes_are_bytes_or_binary_units() -> None:
    assert [parse_size(v) for v in (0, 5, "7 B", "2KiB", "64 MiB", "1 GiB", "1 TiB")] == [
        0, 5, 7, 2048, 64 << 20, 1 << 30, 1 << 40,
    ]  # fmt: skip


def test_the_smallest_manifest_has_safe_defaults(tmp_path: Path) -> None:
    manifest = load(tmp_path) if read(tmp_path, ENCLAVE) else None
    assert manifest is not None
    assert manifest.entry == tmp_path / "score.py"
    assert (manifest.debug, manifest.jit, manifest.native) == (False, False, False)
    assert (manifest.threads, manifest.blas_threads) == (1, 1)
    assert (manifest.sealed, manifest.message) == (DEFAULT_SEALED, DEFAULT_MESSAGE)
    assert manifest.sealed == 0  # who does not ask has no pager, and what it needs stays closed
    assert manifest.shared == 0
    assert (manifest.files, manifest.ocalls, manifest.ecalls, manifest.extra) == ({}, {}, {}, ())


def test_a_whole_manifest_is_read(tmp_path: Path) -> None:
    (tmp_path / "enclave.toml").write_text(
        '[enclave]\nname = "n"\nnative = "lib/libscore.so"\nproduct_id = 65535\n'
        "security_version = 0\ndebug = true\nthreads = 256\n"
        '[memory]\nsealed = "1 GiB"\nmessage = 4096\nshared = "16 MiB"\n'
        '[files]\nb = "x/b"\n"d/a" = "a"\n'
        '[runtime]\nblas_threads = 4\njit = true\nextra = ["numpy.ma", "json", "json"]\n'
        '[seal]\npolicy = "unique"\n[ecalls]\nscore = "f8 -> f8"\n'
        '[ocalls]\nlog = "(text: str) -> None"\n'
        'fetch = {signature = "() -> int", allow = ["b", "a", "b"]}\n'
    )
    manifest = load(tmp_path)
    assert manifest.native
    assert manifest.entry == tmp_path / "lib/libscore.so"
    assert (manifest.sealed, manifest.message, manifest.threads) == (1 << 30, 4096, 256)
    assert manifest.shared == 16 << 20
    assert manifest.files == {"b": tmp_path / "x/b", "d/a": tmp_path / "a"}
    assert manifest.extra == ("json", "numpy.ma")
    assert manifest.ecalls == {"score": "f8 -> f8"}
    assert manifest.ocalls == {
        "fetch": OcallEntry(signature="() -> int", allow=("a", "b")),
        "log": OcallEntry(signature="(text: str) -> None"),
    }
    assert (manifest.seal_policy, manifest.jit, manifest.blas_threads) == ("unique", True, 4)
