"""Delays of flights by carrier: ``python plain.py FLIGHTS.parquet``."""

from __future__ import annotations

import sys

import pandas as pd

COLUMNS = ["carrier", "arr_delay"]


def main(path: str) -> None:
    flights = pd.read_parquet(path, columns=COLUMNS)
    delays = flights.groupby("carrier")["arr_delay"].agg(["count", "mean"])
    delays.to_csv("delays.csv")
    print(delays.sort_values("mean").round(2).to_string())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(f"usage: python {sys.argv[0]} FLIGHTS", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
