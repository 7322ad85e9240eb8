"""
The table of benchmark rows, and how they are run.

A row is a dictionary ``{"name", "value", "unit", "peer", "peer_value", "ratio"}``; ``ratio`` is
above 1 where ours is better. Subject and peer are interleaved in one process, with the same
inputs, through the public interface, all checks on, and their results are compared.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pyenclave import _core
from pyenclave._native import cpu_features

__all__ = ["machine", "names", "run"]

Row = dict[str, Any]

# Row → the module and function that measures it (one function may give several rows).
_ROWS: dict[str, tuple[str, str]] = {
    "seal_page": ("sealing", "seal_page"),
    "open_page": ("sealing", "open_page"),
    "seal_pages_64": ("sealing", "seal_pages_64"),
    "mrenclave": ("measuring", "mrenclave"),
    "measure_1gib": ("measuring_large", "measure_1gib"),
    "snp_digest": ("launch_digest", "snp_digest"),
    "ecall_worker": ("calls", "ecall_worker"),
    "ecall_python": ("calls", "ecall_python"),
    "ecall_sleeping": ("calls", "ecall_sleeping"),
    "ecall_counted": ("counting", "ecall_counted"),
    "ecall_async": ("async_calls", "ecall_async"),
    "ecall_map_256": ("calls", "ecall_map_256"),
    "ecall_array": ("calls", "ecall_array"),
    "launch_zygote": ("launching", "launch_zygote"),
    "launch_pool": ("launching", "launch_pool"),
    "fastapi_overhead": ("serving", "fastapi_overhead"),
    "verify_sgx_quote": ("verifying", "verify_sgx_quote"),
    "verify_sgx_quote_known": ("verifying", "verify_sgx_quote_known"),
    "verify_tdx_quote": ("verifying", "verify_tdx_quote"),
    "verify_tdx_quote_known": ("verifying", "verify_tdx_quote_known"),
    "verify_snp_report": ("verifying", "verify_snp_report"),
    "verify_batch": ("verifying", "verify_batch"),
    "import_attestation": ("verifying", "import_attestation"),
}


def names() -> list[str]:
    """Return the names of all rows, in the order in which they run."""
    return list(_ROWS)


def run(
    only: tuple[str, ...], *, progress: Callable[[str], None]
) -> Iterator[tuple[str, list[Row]]]:
    """
    Run the rows named in *only* (none: all).

    Raises:
        ValueError: A name is not a row's.
    """
    unknown = sorted(set(only) - set(_ROWS))
    if unknown:
        raise ValueError(f"no such row: {', '.join(unknown)} (see bench --list)")
    for name in only or tuple(_ROWS):
        progress(f"measuring {name}")
        module, function = _ROWS[name]
        measured = getattr(import_module(f"pyenclave.benchmarks.{module}"), function)()
        yield name, measured if isinstance(measured, list) else [measured]


def machine() -> dict[str, Any]:
    """Describe what was measured on."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "features": list(cpu_features()),
        "kernels": {"gcm": _core.Gcm(bytes(32)).implementation},
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
