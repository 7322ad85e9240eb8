"""Arrow IPC streams: what is refused before Arrow's reader sees a byte."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest

from pyenclave.errors import ArgumentError
from pyenclave.formats import arrow_ipc
from pyenclave.formats.arrow_ipc import scan

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")


def stream(table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def plain():
    return pa.table(
        {
            "x": pa.array([1, 2, None], pa.int64()),
            "s": pa.array(["a", "ü", None]),
            "d": pa.array(["u", "v", "u"]).dictionary_encode(),
            "l": pa.array([[1.5], [], None], pa.list_(pa.float64())),
            "m": pa.array([{"k": 1, "v": "x"}] * 3, pa.struct({"k": pa.int8(), "v": pa.string()})),
        }
    )


def test_a_stream_says_what_it_has(plain):
    assert scan(stream(plain)) == arrow_ipc.Shape(fields=8, batches=1, rows=3)
    assert scan(stream(pa.table({}))) == arrow_ipc.Shape(fields=0, batches=0, rows=0)
    chunks = pa.concat_tables([plain, plain.slice(1), plain])
    assert scan(stream(chunks)).rows == 8


def test_BND_04_every_cut_and_every_added_byte_is_refused(plain):
    data = stream(plain)
    for size in range(len(data)):
        with pytest.raises(ArgumentError):
            scan(data[:size])
    for more in (b"\0", b"\0" * 8, data):
        with pytest.raises(ArgumentError, match="left over"):
            scan(data + more)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_SER_03_compressed_buffers_are_refused(codec):
    table = pa.table({"zeros": pa.array([0] * 1_000_000)})
    data = stream(table, compression=codec)
    assert len(data) < 100_000
    with pytest.raises(ArgumentError, match="compressed"):
        scan(data)


def test_SER_01_extension_types_are_refused_before_anything_rebuilds_them():
    class Mine(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.int64(), "pyenclave.test")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"state"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, state):
            raise AssertionError("it was rebuilt")

    pa.register_extension_type(Mine())
    try:
        column = pa.ExtensionArray.from_storage(Mine(), pa.array([1]))
        nested = pa.StructArray.from_arrays([column], ["inner"])
        for table in (pa.table({"x": column}), pa.table({"x": nested})):
            with pytest.raises(ArgumentError, match="extension type"):
                scan(stream(table))
    finally:
        pa.unregister_extension_type("pyenclave.test")


def test_types_that_say_more_rows_than_they_have_bytes_are_refused():
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])
    ends = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["x"]))
    for column, name in [(union, "union"), (ends[:5], "run-end"), (ends, "run-end")]:
        with pytest.raises(ArgumentError, match=name):
            scan(stream(pa.table({"x": column})))
    with pytest.raises(ArgumentError, match="more rows than its bytes"):
        scan(stream(pa.table({"x": pa.nulls(10_000_000)})))
    assert scan(stream(pa.table({"x": pa.nulls(65_536)}))).rows == 65_536


def test_SER_02_fields_and_levels_have_limits():
    kind = pa.int8()
    for _ in range(15):
        kind = pa.list_(kind)
    assert scan(stream(pa.table({"x": pa.array([], kind)}))).fields == 16
    with pytest.raises(ArgumentError, match="nest too deep"):
        scan(stream(pa.table({"x": pa.array([], pa.list_(kind))})))
    wide = {f"c{number}": pa.array([], pa.int8()) for number in range(4096)}
    assert scan(stream(pa.table(wide))).fields == 4096
    with pytest.raises(ArgumentError, match="too many"):
        scan(stream(pa.table({**wide, "one": pa.array([], pa.int8())})))


def test_numbers_of_the_metadata_are_checked():
    """Lengths of the batch, of its columns and of its buffers, each replaced by a lie."""
    data = stream(pa.table({"x": pa.array(range(77), pa.int64())}))
    places = [at for at in range(len(data) - 8) if data[at : at + 8] == struct.pack("<q", 77)]
    assert len(places) >= 2  # the batch's and the column's, and a value
    changed = 0
    for at in places:
        for lie in (-1, 2**31, 2**62, -(2**63)):
            wrong = data[:at] + struct.pack("<q", lie) + data[at + 8 :]
            try:
                scan(wrong)
            except ArgumentError:
                changed += 1
    assert changed >= 8
    body = struct.pack("<q", 77 * 8)
    for at in (at for at in range(len(data) - 8) if data[at : at + 8] == body):
        for lie in (-8, 2**20, 2**63 - 1):
            with pytest.raises(ArgumentError):
                scan(data[:at] + struct.pack("<q", lie) + data[at + 8 :])


def test_big_endian_streams_and_files_are_refused(plain):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, plain.schema) as writer:
        writer.write(plain)
    with pytest.raises(ArgumentError, match="no IPC stream"):
        scan(sink.getvalue().to_pybytes())
    for junk in (b"", b"PK\3\4" * 9, b"\xff" * 64, bytes(64), b"\xff\xff\xff\xff" + bytes(4)):
        with pytest.raises(ArgumentError):
            scan(junk)


def test_what_passes_is_decoded_or_refused_by_arrow_and_nothing_else_happens(plain):
    """The whole of what happens to a stream inside, with thousands of damaged ones."""
    from pyenclave.calls.arrow import ArrowDetail

    np = pytest.importorskip("numpy")
    data = stream(pa.concat_tables([plain, plain]))
    detail = ArrowDetail("Table")
    generator = random.Random(11)
    passed = 0
    for _ in range(4000):
        wrong = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 5))):
            at = generator.randrange(len(wrong))
            if generator.random() < 0.5:
                wrong[at] ^= 1 << generator.randrange(8)
            else:
                wrong[at : at + 4] = generator.choice((b"\xff" * 4, bytes(4), b"\1\0\0\0"))
        raw = np.frombuffer(wrong, np.uint8)
        try:
            table = detail.restore(raw, raw.shape)
        except ArgumentError:
            continue
        passed += 1
        with contextlib.suppress(ValueError):  # two fields of one name, or a date of no calendar
            table.to_pylist()
    assert 0 < passed < 4000
