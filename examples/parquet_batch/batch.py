"""
Score a Parquet file in an enclave: ``python batch.py IN.parquet OUT.parquet``.

Rows cross packed, many to a call, and are read and written piece by piece: memory stays small
whatever the file's size. The result is written beside and renamed, so half a file is never left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import pyenclave

ROWS = 65_536  # of a piece


def pieces(file: pq.ParquetFile) -> Iterator[npt.NDArray[np.float64]]:
    for batch in file.iter_batches(ROWS, columns=["income", "debt"]):
        yield np.column_stack([batch.column(0).to_numpy(), batch.column(1).to_numpy()])


def main(source: str, target: str) -> None:
    file = pq.ParquetFile(source)
    part = Path(f"{target}.part")
    schema = pa.schema([("score", pa.float64())])
    trusted = Path(__file__).with_name("batch_scoring.py")
    with (
        pyenclave.Enclave.from_file(trusted) as enclave,
        pq.ParquetWriter(part, schema) as writer,
        tqdm(total=file.metadata.num_rows, unit="rows", disable=not sys.stderr.isatty()) as bar,
    ):
        for scores in enclave.map("score_all", pieces(file)):
            writer.write_batch(pa.record_batch([pa.array(scores)], schema=schema))
            bar.update(len(scores))
    os.replace(part, target)
    print(f"{file.metadata.num_rows} rows scored")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(f"usage: python {sys.argv[0]} IN.parquet OUT.parquet", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
