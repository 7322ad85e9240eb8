"""
The table of benchmark rows, and how they are run.

``pyenclave.benchmarks.rows`` says what a row is. Subject and peer are interleaved in one process,
with the same inputs, through the public interface, all checks on, and their results are compared.
``docs/benchmarks.md`` describes every row.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from pyenclave import _core
from pyenclave._native import cpu_features
from pyenclave.benchmarks import in_c
from pyenclave.benchmarks.rows import AbsentError, Row

__all__ = ["machine", "names", "run", "select", "source"]

# Row → the module and function that measures it (one function may give several rows).
_ROWS: dict[str, tuple[str, str]] = {
    "seal_page": ("sealing", "seal_page"),
    "open_page": ("sealing", "open_page"),
    "seal_pages_64": ("sealing", "seal_pages_64"),
    "seal_64": ("sealing", "seal_64"),
    "seal_pages_ipsec": ("sealing_more", "seal_pages_ipsec"),
    "seal_pages_dram": ("sealing_more", "seal_pages_dram"),
    "seal_pages_2threads": ("sealing_more", "seal_pages_2threads"),
    "seal_many_keys": ("sealing_more", "seal_many_keys"),
    "fault_seq": ("paging", "fault_seq"),
    "fault_random": ("paging", "fault_random"),
    "scan_open": ("paging_scan", "scan_open"),
    "prefetch": ("paging_scan", "prefetch"),
    "scan_evicting": ("paging_scan", "scan_evicting"),
    "evict": ("paging_scan", "evict"),
    "random_update": ("paging_arrays", "random_update"),
    "numpy_sum": ("paging_arrays", "numpy_sum"),
    "matmul_blocked": ("paging_arrays", "matmul_blocked"),
    "sort": ("paging_arrays", "sort"),
    "file_seq_read": ("filing", "file_seq_read"),
    "file_seq_write": ("filing", "file_seq_write"),
    "parquet": ("filing", "parquet"),
    "mrenclave": ("measuring", "mrenclave"),
    "mrenclave_16": ("measuring", "mrenclave_16"),
    "sha384_pages": ("measuring", "sha384_pages"),
    "measure_1gib": ("measuring_large", "measure_1gib"),
    "snp_digest": ("launch_digest", "snp_digest"),
    "ecall_worker": ("calls", "ecall_worker"),
    "ecall_python": ("calls", "ecall_python"),
    "ecall_sleeping": ("sleeping", "ecall_sleeping"),
    "ecall_counted": ("counting", "ecall_counted"),
    "ecall_async": ("async_calls", "ecall_async"),
    "ecall_map_256": ("calls", "ecall_map_256"),
    "ecall_array": ("calls", "ecall_array"),
    "protected_call": ("protecting", "protected_call"),
    "launch_zygote": ("launching", "launch_zygote"),
    "launch_pool": ("launching", "launch_pool"),
    "fastapi_overhead": ("serving", "fastapi_overhead"),
    "attest": ("releasing", "attest"),
    "release": ("releasing", "release"),
    "key_get": ("releasing", "key_get"),
    "verify_sgx_quote": ("verifying", "verify_sgx_quote"),
    "verify_sgx_quote_known": ("verifying", "verify_sgx_quote_known"),
    "verify_tdx_quote": ("verifying", "verify_tdx_quote"),
    "verify_tdx_quote_known": ("verifying", "verify_tdx_quote_known"),
    "verify_snp_report": ("verifying", "verify_snp_report"),
    "verify_batch": ("verifying", "verify_batch"),
    "import_attestation": ("verifying", "import_attestation"),
}

# Row → modules that its peer or the row itself needs, with the names they are installed by. A row
# without its peer is measured against something else, or not at all.
_PEERS: dict[str, dict[str, str]] = {
    "snp_digest": {"sevsnpmeasure": "sev-snp-measure"},
    "fastapi_overhead": {"fastapi": "fastapi", "uvicorn": "uvicorn"},
    "attest": {"sqlalchemy": "sqlalchemy", "uvicorn": "uvicorn"},
    "release": {"sqlalchemy": "sqlalchemy", "uvicorn": "uvicorn"},
    "key_get": {"sqlalchemy": "sqlalchemy", "uvicorn": "uvicorn"},
    "verify_sgx_quote": {"dcap_qvl": "dcap-qvl"},
    "verify_sgx_quote_known": {"dcap_qvl": "dcap-qvl"},
    "verify_tdx_quote": {"dcap_qvl": "dcap-qvl"},
    "verify_tdx_quote_known": {"dcap_qvl": "dcap-qvl"},
}


def names() -> list[str]:
    """Return the names of all rows, in the order in which they run."""
    return list(_ROWS)


def source(name: str) -> str:
    """Return the file that makes row *name*, relative to the project."""
    return f"pyenclave/benchmarks/{_ROWS[name][0]}.py"


def select(patterns: Sequence[str]) -> list[str]:
    """
    Return the rows that *patterns* name, in the order in which they run.

    Args:
        patterns: Names, or shell patterns of names (``ecall_*``); none: all rows. A way of a row
            (``ecall_worker/c_ring``) names its row: they are measured together.

    Raises:
        ValueError: One of them names no row; the message says which come near.
    """
    if not patterns:
        return names()
    chosen: set[str] = set()
    for pattern in patterns:
        base = pattern.partition("/")[0]
        found = {name for name in _ROWS if fnmatchcase(name, base)}
        if not found:
            near = difflib.get_close_matches(base, _ROWS, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no such row: {pattern!r}{hint} (bench --list names them)")
        chosen |= found
    return [name for name in _ROWS if name in chosen]


def run(
    chosen: Sequence[str], *, progress: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[str, list[Row]]]:
    """
    Measure the rows *chosen*, one after the other.

    A row that fails does not end the others: it becomes a row with ``error``. One whose means are
    not installed becomes a row with ``absent``.

    Yields:
        Each row's name, and what was measured for it.
    """
    for number, name in enumerate(chosen, 1):
        progress(f"{number}/{len(chosen)} measuring {name}")
        yield name, _measure(name)


def _measure(name: str) -> list[Row]:
    module, function = _ROWS[name]
    absent = [
        installed
        for needed, installed in _PEERS.get(name, {}).items()
        if importlib.util.find_spec(needed) is None
    ]
    try:
        measured = getattr(import_module(f"pyenclave.benchmarks.{module}"), function)()
    except AbsentError as error:
        return [{"name": name, "absent": list(error.names)}]
    except ModuleNotFoundError as error:
        missing = (error.name or "?").partition(".")[0]
        if missing == "pyenclave":
            return [_failed(name, error)]
        return [{"name": name, "absent": [missing]}]
    except Exception as error:  # whatever it was: what other rows gave is not lost for one
        return [_failed(name, error)]
    rows: list[Row] = measured if isinstance(measured, list) else [measured]
    if not rows:
        return [{"name": name, "absent": absent}]
    if absent:
        return [{**row, "absent": absent} for row in rows]
    if "native" in rows[0]:
        return rows
    try:
        return [{**rows[0], **in_c.beside(rows[0])}, *rows[1:]]
    except AbsentError:  # without a compiler there is no figure in C
        return rows
    except Exception as error:
        return [*rows, _failed(f"{name}/in_c", error)]


def _failed(name: str, error: Exception) -> Row:
    return {"name": name, "error": f"{type(error).__name__}: {error}"}


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
        "kernels": {
            "gcm": _core.Gcm(bytes(32)).implementation,
            "sha256": _core.sha256_variant(),
            "sha256_lanes": _core.sgx_many_variant(),
            "sha384_lanes": _core.snp_variant(),
        },
        "cycles": in_c.counts_cycles(),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
