"""Sealed files and streams for the fuzzer: whole ones, and what is inside under seals that hold."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from pyenclave.formats.sealed_file import MAC_OFFSET, MAC_SIZE, Geometry
from pyenclave.sealed.file_crypto import FileKeys, key_root
from pyenclave.sealed.file_engine import SealedEngine
from pyenclave.sealed.file_space import Space
from pyenclave.sealed.file_store import ObjectStore
from pyenclave.sealed.file_tree import Node
from pyenclave.sealed.stream import StreamReader

KEY = hashlib.sha256(b"golden root secret of nobody").digest()
NAME = b"golden"
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "data.sealed-file"


def signed(data: bytes) -> bytes:
    """A file whose headers have MACs that hold, whatever else they say."""
    changed = bytearray(data)
    for place in (0, 4096):
        part = changed[place : place + 4096]
        if len(part) == 4096:
            part[MAC_OFFSET : MAC_OFFSET + MAC_SIZE] = bytes(MAC_SIZE)
            mac = FileKeys(key_root(KEY), bytes(part[16:32])).header_mac(part)
            changed[place + MAC_OFFSET : place + MAC_OFFSET + MAC_SIZE] = mac
    return bytes(changed)


def read_whole(data: bytes) -> object:
    """Open a file and read its begin and end."""
    file = SealedEngine(ObjectStore(io.BytesIO(data)), key=KEY, name=NAME)
    try:
        out = bytearray(70_000)
        file.read_into(0, memoryview(out))
        file.read_into(max(0, file.size - 9000), memoryview(out))
        return file.header
    finally:
        file.close()


def node() -> bytes:
    """The first leaf of the golden file."""
    file = SealedEngine(ObjectStore(io.BytesIO(GOLDEN.read_bytes())), key=KEY, name=NAME)
    leaf = file._tree.leaf(0)
    assert leaf is not None
    return bytes(leaf.data)


def read_node(data: bytes) -> object:
    """A node, and a page of the free list, that say anything at all."""
    page = data[:4096].ljust(4096, b"\0")
    file = SealedEngine(ObjectStore(io.BytesIO(GOLDEN.read_bytes())), key=KEY, name=NAME)
    try:
        header = file.header
        space = Space(2, header.end, header.free, header.free_slots, lambda _: page)
        if header.free.slot:
            space._load_chain()
        file._tree._nodes[1, 0] = Node(Geometry.of(4096), 1, 0, bytearray(page))
        out = bytearray(85 * 4096)
        file.read_into(0, memoryview(out))
        return None
    finally:
        file.close()


def read_stream(data: bytes) -> object:
    """A whole stream."""
    reader = StreamReader(io.BytesIO(data), key=KEY, name=NAME)
    while reader.read(1 << 16):
        pass
    return None
