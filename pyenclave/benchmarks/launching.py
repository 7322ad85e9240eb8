"""Row ``launch_zygote``: a hardened worker, from the launch request to its first answer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pyenclave.host import Enclave
from pyenclave.image import build

__all__ = ["launch_zygote"]

_ROUNDS = 15
_LAUNCHES = 4  # a round, between two runs of the peer


def launch_zygote() -> dict[str, Any]:
    """
    Launch an enclave with NumPy loaded and take its first answer, against a fresh interpreter.

    The zygote is warm: it was started by a launch before the first round. The bits that were
    probed for the last launch are printed beside the figure.
    """
    ours: list[float] = []
    theirs: list[float] = []
    bits: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pyenclave-bench-") as folder:
        image = build.build_script(Path(__file__).with_name("_echo.py"))
        with Enclave(image, state=Path(folder) / "state", quiet=True) as first:
            if first.call("add", 1, 2.0) != 3.0:
                raise AssertionError("the enclave gave a wrong answer")
            for _ in range(_ROUNDS):
                for _ in range(_LAUNCHES):
                    enclave = Enclave(image, state=Path(folder) / "state", quiet=True)
                    start = time.perf_counter_ns()
                    enclave.start()
                    answer = enclave.call("add", 40, 2.0)
                    ours.append((time.perf_counter_ns() - start) / 1e3)
                    if answer != 42.0:
                        raise AssertionError("the enclave gave a wrong answer")
                    bits = dict(enclave.info.protections)
                    enclave.close()
                start = time.perf_counter_ns()
                subprocess.run(
                    [sys.executable, "-c", "import numpy"], check=True, env=dict(os.environ)
                )
                theirs.append((time.perf_counter_ns() - start) / 1e3)
    value, peer = statistics.median(ours), statistics.median(theirs)
    return {
        "name": "launch_zygote",
        "value": value,
        "unit": "us",
        "peer": "python -c 'import numpy'",
        "peer_value": peer,
        "ratio": peer / value,
        "bits": bits,
        "note": f"probed bits {json.dumps(bits)}",
    }
