"""
The same as plain.py over sealed files: ``python sealed.py FLIGHTS.parquet.sealed``.

``(umask 077; head -c 32 /dev/urandom > data.key)`` makes the key, and
``pyenclave seal FLIGHTS.parquet --key-file data.key`` the file. Neither the table nor the result is
on the disk in the clear. Needs ``pip install 'pyenclave[fsspec]' pandas pyarrow``.
"""

from __future__ import annotations

import sys

import pandas as pd

COLUMNS = ["carrier", "arr_delay"]
KEY = {"sealed": {"key_file": "data.key"}}  # 1


def main(path: str) -> None:
    flights = pd.read_parquet(f"sealed::file://{path}", columns=COLUMNS, storage_options=KEY)  # 2
    delays = flights.groupby("carrier")["arr_delay"].agg(["count", "mean"])
    delays.to_csv("sealed::file://delays.csv.sealed", storage_options=KEY)  # 3
    print(delays.sort_values("mean").round(2).to_string())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(f"usage: python {sys.argv[0]} FLIGHTS", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
