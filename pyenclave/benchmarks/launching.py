"""Rows of launches: a hardened worker, from the request to its first answer; cold and warm."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pyenclave.benchmarks.rows import scratch, spread
from pyenclave.host import Enclave, EnclavePool
from pyenclave.host._reserve import Reserve
from pyenclave.image import build, keys, sign

__all__ = ["launch_pool", "launch_zygote"]

_ROUNDS = 15
_LAUNCHES = 4  # a round, between two runs of the peer


def _image() -> bytes:
    """Return a signed image: a service's enclave starts as production, not as debug."""
    image = build.build_script(Path(__file__).with_name("_echo.py"))
    return sign.sign(image, keys.keygen())


def launch_zygote() -> dict[str, Any]:
    """
    Launch an enclave with NumPy loaded and take its first answer, against a fresh interpreter.

    The zygote is warm: it was started by a launch before the first round. The bits that were
    probed for the last launch are printed beside the figure.
    """
    ours: list[float] = []
    theirs: list[float] = []
    bits: dict[str, Any] = {}
    with scratch() as folder:
        image = _image()
        with Enclave(image, state=folder / "state", quiet=True) as first:
            if first.call("add", 1, 2.0) != 3.0:
                raise AssertionError("the enclave gave a wrong answer")
            for _ in range(_ROUNDS):
                for _ in range(_LAUNCHES):
                    enclave = Enclave(image, state=folder / "state", quiet=True)
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
        **spread(ours, theirs),
        "bits": bits,
        "note": f"probed bits {json.dumps(bits)}",
    }


def launch_pool() -> dict[str, Any]:
    """
    Take fresh enclaves of a pool whose platform keeps warm workers, against launches without.

    In each round four are taken one after the other, each up to its first answer, once all four
    are warm; then four are launched as in ``launch_zygote``, into the same platform. The figure
    is of fresh enclaves: identity, record, ring and keys are given at the hand-out, and each is
    ended afterwards.
    """
    ours: list[float] = []
    theirs: list[float] = []
    bits: dict[str, Any] = {}
    with scratch() as folder:
        image = _image()
        state = folder / "state"
        with EnclavePool(image, state=state, size=1, warm=_LAUNCHES, quiet=True) as pool:
            reserve = pool._reserve  # noqa: SLF001 - whether it is full is nobody else's business
            if reserve is None:
                raise AssertionError("the pool keeps no warm workers")
            for _ in range(_ROUNDS):
                _fill(reserve)
                for _ in range(_LAUNCHES):
                    start = time.perf_counter_ns()
                    with pool.enclave(fresh=True) as enclave:
                        answer = enclave.call("add", 40, 2.0)
                        ours.append((time.perf_counter_ns() - start) / 1e3)
                        if answer != 42.0:
                            raise AssertionError("the enclave gave a wrong answer")
                        bits = dict(enclave.info.protections)
                    del enclave  # its ring is unmapped now, and not within the next one's time
                _fill(reserve)
                for _ in range(_LAUNCHES):
                    one = Enclave(image, state=state, quiet=True)
                    start = time.perf_counter_ns()
                    one.start()
                    answer = one.call("add", 40, 2.0)
                    theirs.append((time.perf_counter_ns() - start) / 1e3)
                    if answer != 42.0:
                        raise AssertionError("the enclave gave a wrong answer")
                    one.close()
    value, peer = statistics.median(ours), statistics.median(theirs)
    return {
        "name": "launch_pool",
        "value": value,
        "unit": "us",
        "peer": "launch_zygote",
        "peer_value": peer,
        "ratio": peer / value,
        **spread(ours, theirs),
        "bits": bits,
        "note": f"probed bits {json.dumps(bits)}",
    }


def _fill(reserve: Reserve) -> None:
    """Wait until all warm workers are there and nothing else is being started."""
    deadline = time.monotonic() + 60
    while reserve.told().ready < _LAUNCHES:
        if time.monotonic() > deadline:
            raise AssertionError("the warm workers do not come")
        time.sleep(0.01)
    time.sleep(0.05)
