"""
The trusted code of ``demo --services``: it gets its key by proof and computes with what that opens.

Addresses and the vault's authority are in the image, measured; the host carries messages and files
and has neither the key nor what it opens.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from pyenclave import trusted
from pyenclave.errors import KeyReleaseError

KEY = "applicants"


def _open(name: str, key: trusted.ReleasedKey) -> npt.NDArray[np.float64]:
    """Return a table that the owner encrypted."""
    with trusted.open_sealed(name, key=key) as file:
        table: npt.NDArray[np.float64] = np.load(io.BytesIO(file.read()), allow_pickle=False)
    return table


@trusted.ecall
def score() -> dict[str, float]:
    """Return how many applicants were scored, and how often the model was right."""
    try:
        key = trusted.release_key(None, KEY)
    except KeyReleaseError as error:
        raise trusted.PublicError(f"{error.check}: {error}") from None
    table, model = _open("table", key), _open("model", key)
    chances = 1.0 / (1.0 + np.exp(-(table[:, 1:] @ model[1:] + model[0])))
    right = np.mean((chances > 0.5) == (table[:, 0] > 0.5))
    return {"applicants": float(len(table)), "accuracy": float(right)}
