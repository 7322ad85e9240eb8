"""Call the native library: ``make && python use.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import pyenclave

if __name__ == "__main__":
    with pyenclave.Enclave(Path(__file__).with_name("score.unsigned")) as enclave:
        print(enclave.score(np.array([4000.0, 1000.0])))
