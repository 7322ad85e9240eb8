"""
scikit-learn inside: trained and used where nobody else sees the data. ``python model.py``.

The import takes seconds in each launch; a pool keeps workers that have it behind them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import pyenclave
from pyenclave import trusted

Rows = npt.NDArray[np.float64]
models: list[Pipeline] = []


class NotTrained(trusted.PublicError):
    """No model yet."""


@pyenclave.ecall
def train(rows: Rows, labels: npt.NDArray[np.int64]) -> float:
    """Fit the model; return its accuracy on what it was fitted to."""
    models[:] = [make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, labels)]
    return float(models[0].score(rows, labels))


@pyenclave.ecall
def predict(rows: Rows) -> Rows:
    """Return the probability of class 1 for each row."""
    if not models:
        raise NotTrained("train first")
    result: Rows = models[0].predict_proba(rows)[:, 1]
    return result


def main() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(500, 4))
    labels = (rows[:, 0] + rows[:, 1] > 0).astype(np.int64)
    with pyenclave.Enclave.from_file(__file__) as enclave:
        print(f"accuracy {enclave.train(rows, labels):.3f}")
        print(f"first rows {np.round(enclave.predict(rows[:3]), 3).tolist()}")


if __name__ == "__main__":
    main()
