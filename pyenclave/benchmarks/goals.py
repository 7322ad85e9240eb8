"""
What each row shall reach: the only place where goals are written.

A goal is the least ratio. Those of work that is all instructions were set on a core of the class
VAES-512; on other classes they are shown and not judged. ``docs/benchmarks.md`` says where the
limit of each row is.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

__all__ = ["GOALS", "Goal", "Verdict", "judge"]


class Goal(NamedTuple):
    """
    The least ratio of a row.

    Attributes:
        ratio: It; for what crosses processors, between near ones.
        far: The least ratio between far processors, where that is another.
        wide: It was set on a core of the class VAES-512.
        peer: It holds against a peer whose name begins so; against others nothing is judged.
    """

    ratio: float
    far: float | None = None
    wide: bool = False
    peer: str = ""


class Verdict(NamedTuple):
    """A row's goal, and whether it is met; None: this machine or peer is not what it is about."""

    goal: float
    met: bool | None


GOALS: Final[dict[str, Goal]] = {
    "seal_page": Goal(3.8, wide=True),
    "open_page": Goal(4.2, wide=True),
    "seal_pages_64": Goal(5.0, wide=True),
    "seal_64": Goal(4.5, wide=True),
    "seal_pages_ipsec": Goal(1.4, wide=True),
    "seal_pages_dram/16": Goal(0.8),
    "seal_pages_dram/64": Goal(0.8),
    "seal_pages_2threads": Goal(1.65),
    "seal_pages_2threads/cryptography": Goal(20, wide=True),
    "fault_seq": Goal(2),
    "fault_seq/p99": Goal(2),
    "fault_seq/other_core": Goal(2),
    "fault_seq/1gib": Goal(2),
    "fault_seq/1gib/p99": Goal(2),
    "fault_random": Goal(2),
    "fault_random/p99": Goal(2),
    "fault_random/other_core": Goal(2),
    "fault_random/1gib": Goal(2),
    "fault_random/1gib/p99": Goal(2),
    "fault_random/fault_seq": Goal(1 / 1.5),
    "fault_random/fault_seq/p99": Goal(1 / 1.5),
    "scan_open": Goal(0.28, wide=True),
    "scan_open/helper": Goal(0.28, wide=True),
    "prefetch": Goal(0.65, wide=True),
    "prefetch/helper": Goal(0.65, wide=True),
    "scan_evicting": Goal(0.37, wide=True),
    "evict": Goal(0.63, wide=True),
    "random_update": Goal(4),
    "numpy_sum": Goal(1 / 6),
    "matmul_blocked": Goal(1 / 1.15),
    "sort": Goal(1 / 3),
    "file_seq_read": Goal(0.6, wide=True),
    "file_seq_read/cryptography": Goal(5, wide=True),
    "file_seq_write": Goal(0.6, wide=True),
    "file_seq_write/cryptography": Goal(5, wide=True),
    "parquet": Goal(1 / 1.25),
    "mrenclave": Goal(0.97),
    "mrenclave_16": Goal(3.0, wide=True),
    "sha384_pages": Goal(4.5, wide=True),
    "measure_1gib": Goal(0.9),
    "snp_digest": Goal(3.0, peer="sev-snp-measure"),
    "ecall_worker": Goal(60, far=18),
    "ecall_worker/ProcessPoolExecutor": Goal(250, far=70),
    "ecall_worker/c_ring": Goal(1 / 1.6),
    "ecall_python": Goal(10),
    "ecall_python/in_process": Goal(1 / 2),
    "ecall_sleeping": Goal(1 / 0.95),
    "ecall_sleeping/multiprocessing": Goal(4),
    "ecall_counted": Goal(0.99),
    "ecall_map_256": Goal(15, far=10),
    "ecall_async": Goal(5),
    "ecall_async/ProcessPoolExecutor": Goal(8),
    "ecall_async/64": Goal(5),
    "ecall_async/64/ProcessPoolExecutor": Goal(8),
    "ecall_array": Goal(0.45),
    "ecall_array/out": Goal(0.45),
    "ecall_array/shared": Goal(0.55),
    "protected_call": Goal(1 / 1.2),
    "launch_zygote": Goal(60),
    "launch_pool": Goal(10),
    "fastapi_overhead": Goal(0.85),
    "attest": Goal(1),
    "attest/p99": Goal(0.1),
    "release": Goal(1),
    "release/p99": Goal(0.1),
    "key_get": Goal(1),
    "key_get/p99": Goal(0.1),
    "verify_sgx_quote": Goal(3, peer="dcap-qvl"),
    "verify_sgx_quote_known": Goal(5, peer="dcap-qvl"),
    "verify_tdx_quote": Goal(3, peer="dcap-qvl"),
    "verify_tdx_quote_known": Goal(5, peer="dcap-qvl"),
    "verify_snp_report": Goal(0.85),
    "import_attestation": Goal(1),
}


def judge(row: dict[str, Any], *, wide: bool) -> Verdict | None:
    """
    Compare a measured row with its goal.

    Args:
        row: The row.
        wide: The machine is of the class VAES-512.

    Returns:
        None if the row has no goal.
    """
    goal = GOALS.get(row["name"])
    if goal is None:
        return None
    least = goal.far if goal.far is not None and row.get("cores") == "far" else goal.ratio
    ratio = row.get("ratio")
    judged = (wide or not goal.wide) and str(row.get("peer", "")).startswith(goal.peer)
    return Verdict(least, ratio >= least if judged and ratio is not None else None)
