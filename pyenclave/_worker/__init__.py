"""The enclave process: boot, locked importer, zygote, worker, dispatch."""

from __future__ import annotations

__all__ = ["PRELOAD"]

# What a zygote imports before it forks, so that no worker pays for it. Part of every lock.
PRELOAD = (
    "pyenclave._worker.boot",
    "pyenclave._worker.importer",
    "pyenclave._worker.zygote",
    "pyenclave._worker.main",
    "pyenclave._worker.dispatch",
    "msgspec",
    "msgspec.json",
    "msgspec.msgpack",
    "numpy",
    "numpy.random",
    "numpy.linalg",
    "numpy.fft",
    "numpy.typing",
    "cryptography.hazmat.primitives.hpke",
    "pyenclave.trusted",
)
