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
    "launch_zygote": Goal(60),
    "launch_pool": Goal(10),
    "fastapi_overhead": Goal(0.85),
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
