"""
Arrow tables and record batches: one IPC stream, read where it lies.

pyarrow is optional, and inside an enclave it is there only if the entry imports it, which puts it
on the lock list. Arrow's reader is native code that reads what the other side wrote, so that a
stream is looked at before (`pyenclave.formats.arrow_ipc`) and every value after
(``validate(full=True)``).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np

from pyenclave.errors import ArgumentError
from pyenclave.formats import arrow_ipc

__all__ = ["ARROW_KINDS", "ArrowDetail", "kind_of"]

ARROW_KINDS = ("Table", "RecordBatch")


def kind_of(annotation: object) -> str | None:
    """Return which of ``ARROW_KINDS`` an annotation is, or None. Does not import pyarrow."""
    module = sys.modules.get("pyarrow")
    if module is None:
        return None
    return next((kind for kind in ARROW_KINDS if annotation is getattr(module, kind, ())), None)


def _pyarrow(name: str) -> Any:
    try:
        # By name: type checkers of who uses this package need not know pyarrow.
        import_module("pyarrow.ipc")
        return import_module("pyarrow")
    except ImportError:
        raise ArgumentError(
            f"{name} is Arrow data, and pyarrow is not here",
            advice="Install pyarrow; inside an enclave, import it in the entry.",
        ) from None


class ArrowDetail:
    """
    How a table or a record batch crosses: what a frame plan asks for.

    Args:
        kind: One of ``ARROW_KINDS``.

    """

    item_size = 1

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def prepare(self, value: Any, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return the stream of *value*, and its length as a shape."""
        pyarrow = _pyarrow(name)
        if not isinstance(value, getattr(pyarrow, self.kind)):
            raise ArgumentError(
                f"{name} does not fit its type",
                expected=f"pyarrow.{self.kind}",
                found=type(value).__name__,
                advice="pyarrow.Table.from_pandas(frame), or frame.to_arrow() of polars.",
            )
        # Metadata of the schema is the other side's word on how to rebuild classes of pandas.
        value = value.replace_schema_metadata(None)
        sink = pyarrow.BufferOutputStream()
        options = pyarrow.ipc.IpcWriteOptions(compression=None, use_threads=False)
        try:
            with pyarrow.ipc.new_stream(sink, value.schema, options=options) as writer:
                writer.write(value)
        except pyarrow.ArrowException as error:
            raise ArgumentError(f"{name} cannot be written as Arrow IPC: {error}") from None
        stream = np.frombuffer(sink.getvalue(), np.uint8)
        arrow_ipc.scan(stream.data)
        return stream, stream.shape

    def restore(self, data: np.ndarray, shape: tuple[int, ...]) -> Any:
        """Return what the stream holds; its buffers are those of *data*."""
        if len(shape) != 1:
            raise ArgumentError("malformed frame: Arrow data has one dimension")
        found = arrow_ipc.scan(data.data)
        pyarrow = _pyarrow("a value")
        if self.kind == "RecordBatch" and found.batches != 1:
            raise ArgumentError("a record batch wanted", expected=1, found=found.batches)
        try:
            reader = pyarrow.ipc.open_stream(
                pyarrow.BufferReader(pyarrow.py_buffer(data)),
                options=pyarrow.ipc.IpcReadOptions(use_threads=False),
            )
            value = (
                reader.read_next_batch() if self.kind == "RecordBatch" else reader.read_all()
            ).replace_schema_metadata(None)
            value.validate(full=True)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError, ValueError, TypeError):
            # Its text may quote values.
            raise ArgumentError("Arrow data: its values do not hold together") from None
        return value
