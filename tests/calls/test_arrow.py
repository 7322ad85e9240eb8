"""Arrow tables and record batches as arguments and results."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import sys
from typing import Any

import numpy as np
import pytest

from pyenclave.calls.signature import Signature
from pyenclave.errors import ArgumentError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")


def signature(annotation: Any, returns: Any = None) -> Signature:
    def f(x):
        return x

    f.__qualname__ = "f"
    f.__annotations__ = {"x": annotation, "return": returns}
    return Signature.of(f)


def there_and_back(annotation: Any, value: Any) -> Any:
    inside = signature(annotation)
    outside = Signature.from_wire(json.loads(json.dumps(inside.to_wire())))
    return inside.request_plan.decode(outside.request_plan.encode((value,)))[0]


TABLE = pa.table(
    {
        "null": pa.nulls(2),
        "bool": [True, None],
        "u8": pa.array([0, 255], pa.uint8()),
        "f2": pa.array([np.float16(0.5), None], pa.float16()),
        "text": ["ü", None],
        "large": pa.array(["a", "b"], pa.large_string()),
        "view": pa.array(["a long string of a view", "b"], pa.string_view()),
        "bytes": [b"\0", b""],
        "fixed": pa.array([b"ab", b"cd"], pa.binary(2)),
        "dec": [decimal.Decimal("1.10"), None],
        "day": [dt.date(2026, 1, 2), None],
        "at": pa.array([dt.datetime(2026, 1, 2), None], pa.timestamp("ns", "Europe/Berlin")),
        "time": [dt.time(1, 2, 3), None],
        "long": [dt.timedelta(seconds=5), None],
        "words": pa.array(["x", "x"]).dictionary_encode(),
        "list": [[1, 2], None],
        "pair": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2)),
        "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        "struct": [{"a": 1, "b": [None]}, None],
    }
)


@pytest.mark.parametrize(
    "table",
    [TABLE, TABLE.slice(1), TABLE.slice(0, 0), pa.concat_tables([TABLE] * 3), pa.table({}),
     pa.table({"x": np.arange(100_000.0)}).slice(7, 11)],
)  # fmt: skip
def test_tables_of_any_schema_cross(table):
    back = there_and_back(pa.Table, table)
    assert back.equals(table)
    assert back.schema == table.schema
    back.validate(full=True)


def test_record_batches_cross_as_one():
    batch = TABLE.to_batches()[0]
    assert there_and_back(pa.RecordBatch, batch).equals(batch)
    inside = signature(pa.RecordBatch)
    for count in (0, 2):
        frame = signature(pa.Table).request_plan.encode((TABLE.schema.empty_table()
                if count == 0 else pa.concat_tables([TABLE] * count),))  # fmt: skip
        with pytest.raises(ArgumentError, match="record batch"):
            inside.request_plan.decode(frame)


def test_values_are_read_where_they_lie():
    table = pa.table({"x": np.arange(1000.0)})
    back = there_and_back(pa.Table, table)
    column = back["x"].chunk(0).to_numpy(zero_copy_only=True)
    assert (column == np.arange(1000.0)).all()


def test_metadata_of_the_schema_does_not_cross():
    """It tells pandas which classes to rebuild."""
    table = TABLE.replace_schema_metadata({"pandas": "{}", "k": "v"})
    assert there_and_back(pa.Table, table).schema.metadata is None


@pytest.mark.parametrize("value", [None, [], {"x": [1]}, b"bytes", TABLE.to_batches()[0], 5])
def test_SER_04_something_else_is_refused_with_advice(value):
    with pytest.raises(ArgumentError, match="from_pandas"):
        there_and_back(pa.Table, value)


def test_a_table_inside_another_type_is_refused_at_build():
    for annotation in (list[pa.Table], pa.Table | None, dict[str, pa.RecordBatch]):
        with pytest.raises(ArgumentError, match="not inside another type"):
            signature(annotation)
    with pytest.raises(ArgumentError, match=r"pyarrow\.Table and pyarrow\.RecordBatch cross"):
        signature(pa.Array)
    for wire in (["arrow", "Array"], ["arrow"], ["list", ["arrow", "Table"]]):
        with pytest.raises(ArgumentError):
            Signature.from_wire({"name": "f", "kind": "python", "params": [], "returns": wire})


def test_SER_04_values_that_do_not_hold_together_are_refused_without_their_text():
    """An index of a dictionary beyond it, and text that is no UTF-8: Arrow alone sees those."""
    inside = signature(pa.Table)
    table = pa.table({"d": pa.array(["SECRET", "b", "SECRET"]).dictionary_encode()})
    frame = bytearray(inside.request_plan.encode((table,)))
    indices = np.array([0, 1, 0], "<i4").tobytes()
    at = bytes(frame).index(indices)
    frame[at + 4 : at + 8] = (77).to_bytes(4, "little")
    for wrong in (frame, inside.request_plan.encode((table,)).replace(b"SECRET", b"\xff\xfeCRET")):
        with pytest.raises(ArgumentError, match="do not hold together") as caught:
            inside.request_plan.decode(wrong)
        assert "CRET" not in str(caught.value)


def test_without_pyarrow_a_host_says_so(monkeypatch):
    wire = signature(pa.Table, pa.Table).to_wire()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outside = Signature.from_wire(wire)
    with pytest.raises(ArgumentError, match="pyarrow is not here"):
        outside.request_plan.encode((TABLE,))


@pytest.mark.no_asan  # its processes start without the sanitizer's runtime
def test_a_real_enclave_takes_and_gives_tables(tmp_path):
    from pyenclave.host.enclave import Enclave

    entry = tmp_path / "tables.py"
    entry.write_text(
        "from __future__ import annotations\n"
        "import pyarrow as pa\n"
        "import pyarrow.acero\n"  # group_by imports it when it is called
        "import pyenclave\n"
        "@pyenclave.ecall\n"
        "def sums(table: pa.Table, by: str) -> pa.Table:\n"
        "    return table.group_by(by, use_threads=False).aggregate([('x', 'sum')])\n"
        "@pyenclave.ecall\n"
        "def rows(batch: pa.RecordBatch) -> int:\n"
        "    return batch.num_rows\n"
    )
    table = pa.table({"k": ["a", "b", "a"], "x": [1, 2, 3]})
    with Enclave.from_file(entry, state=tmp_path / "state", quiet=True) as enclave:
        back = enclave.sums(table, by="k")
        assert sorted(back.to_pylist(), key=str) == [{"k": "a", "x_sum": 4}, {"k": "b", "x_sum": 2}]
        assert enclave.rows(table.to_batches()[0]) == 3
        with pytest.raises(ArgumentError):
            enclave.sums({"k": []}, by="k")
        big = pa.table({"k": ["a"] * 300_000, "x": np.arange(300_000)})
        assert enclave.sums(big, "k")["x_sum"].to_pylist() == [sum(range(300_000))]
