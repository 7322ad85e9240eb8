"""Without the native core the same bytes come out, and the same errors."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pyenclave import _core
from pyenclave.errors import EnclaveStateError, SealLimitError, UnsealError
from pyenclave.sealed import file_portable
from pyenclave.sealed.file import open_sealed

KEY = bytes(range(32))
ID = b"sixteen bytes id"
INFO = {"address": 81920, "flags": 3, "type": 3}


def test_pages_are_the_same_bytes_both_ways() -> None:
    data = os.urandom(3 * 4096)
    sealed: list[tuple[bytes, bytes, int]] = []
    for kind in (_core.PageKey, file_portable.PageKey):
        key, out, tags = kind(KEY, enclave=ID), bytearray(3 * 4096), bytearray(48)
        key.seal_pages(bytes(4096), bytearray(4096), bytearray(16))
        first = key.seal_pages(data, out, tags, **INFO)
        sealed.append((bytes(out), bytes(tags), first))
        assert key.pages_sealed == 4
    assert sealed[0] == sealed[1]
    for kind in (_core.PageKey, file_portable.PageKey):
        key, out = kind(KEY, enclave=ID), bytearray(3 * 4096)
        key.open_pages(*sealed[0][:2], out, version=2, **INFO)
        assert out == data
        with pytest.raises(UnsealError):
            key.open_pages(*sealed[0][:2], out, version=3, **INFO)
        assert not any(out)
        key.close()
        with pytest.raises(EnclaveStateError):
            key.open_pages(*sealed[0][:2], out, version=2, **INFO)


def test_the_portable_key_has_the_same_limit() -> None:
    key = file_portable.PageKey(KEY, enclave=ID)
    key.pages_sealed = (1 << 36) - 1
    with pytest.raises(SealLimitError):
        key.seal_pages(bytes(8192), bytearray(8192), bytearray(32))


def test_messages_are_the_same_bytes_both_ways() -> None:
    out = [bytearray(116), bytearray(116)]
    for gcm, target in zip((_core.Gcm(KEY), file_portable.Gcm(KEY)), out, strict=True):
        gcm.seal_into(bytes(12), bytes(100), target, b"frame")
    assert out[0] == out[1]
    plain = bytearray(b"\xee" * 100)
    with pytest.raises(UnsealError):
        file_portable.Gcm(KEY).open_into(bytes(12), out[0], plain, b"other")
    assert not any(plain)


def test_nodes_are_read_and_written_alike() -> None:
    """Random columns with runs, holes and breaks of each kind."""
    choose = random.Random(5)
    for fanout, units in ((85, 1), (128, 2), (3, 1)):
        nodes = [bytearray(8 * 4 * fanout), bytearray(8 * 4 * fanout)]
        for _ in range(200):
            entry = choose.randrange(fanout)
            count = choose.randrange(1, fanout - entry + 1)
            slot = choose.choice((0, 2, choose.randrange(1 << 40)))
            salt = choose.choice((bytes(16), ID, bytes(15) + b"x"))
            version = choose.choice((1, 7, choose.randrange(1 << 36)))
            for part, node in zip((_core, file_portable), nodes, strict=True):
                part.node_fill(node, entry, count, fanout, units, slot, version, salt)
            if choose.random() < 0.3:
                for node in nodes:
                    node[8 * entry : 8 * (entry + count)] = bytes(8 * count)
            assert nodes[0] == nodes[1]
            for at in range(0, fanout, 3):
                found = _core.node_run(nodes[0], at, fanout, units)
                assert found == file_portable.node_run(nodes[1], at, fanout, units)
                assert at < found <= fanout
                blank = _core.node_blank(nodes[0], at, found - at, fanout)
                assert blank == file_portable.node_blank(nodes[1], at, found - at, fanout)


def test_impossible_entries_are_refused() -> None:
    node = bytearray(4096)
    for entry, count in ((85, 1), (84, 2), (0, 86)):
        with pytest.raises(ValueError, match="node"):
            _core.node_fill(node, entry, count, 85, 1, 5, 1, bytes(16))
        with pytest.raises(ValueError, match="node"):
            _core.node_blank(node, entry, count, 85)
    with pytest.raises(ValueError, match="node"):
        _core.node_run(bytes(100), 0, 85, 1)
    key = _core.PageKey(KEY, enclave=ID)
    for tags, size in ((16, 0), (16, 100), (15, 4096), (32, 4096)):
        with pytest.raises(ValueError, match="fit"):
            _core.read_pages(key, 0, 0, bytes(tags), bytearray(size), 1, 0, 0, 2)
        with pytest.raises(ValueError, match="fit"):
            _core.write_pages(key, 0, 0, bytes(size), bytearray(tags), bytearray(131072), 0, 0, 2)
    with pytest.raises(OSError, match="read_pages"):
        _core.read_pages(key, -1, 0, bytes(16), bytearray(4096), 1, 0, 0, 2)
    with pytest.raises(OSError, match="write_pages"):
        _core.write_pages(key, -1, 0, bytes(4096), bytearray(16), bytearray(131072), 0, 0, 2)


def test_a_file_opens_where_there_is_no_native_core(tmp_path: Path) -> None:
    """Another system, made by refusing to import the extensions: read and written there."""
    path = tmp_path / "file"
    with open_sealed(path, "wb", key=KEY) as file:
        file.write(b"of the core" * 1000)
    program = """
import sys
sys.modules["pyenclave._core"] = sys.modules["pyenclave._ffi"] = sys.modules["fcntl"] = None
import pyenclave
with pyenclave.open_sealed(sys.argv[1], "r+b", key=bytes(range(32))) as file:
    assert file.read() == b"of the core" * 1000
    file.write(b"and of others" * 1000)
from pyenclave.sealed import stream
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(_core.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
    with open_sealed(path, key=KEY) as file:
        assert file.read() == b"of the core" * 1000 + b"and of others" * 1000
