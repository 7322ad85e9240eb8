"""
The trusted code of the demo: scores applicants that the host cannot read.

It runs inside the enclave. The host gives it ciphertext only; the keys come from the owner,
encrypted to this launch's runtime key. Applicants are kept in sealed memory: of however many rows,
no more than the manifest's limit is plaintext at a time.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave import trusted

_KEYS = struct.Struct("<32s32s")
_keys: dict[str, AESGCM] = {}
_model: list[npt.NDArray[np.float64]] = []
_table: list[npt.NDArray[np.float64]] = []  # every applicant scored so far, in sealed memory


def _open(name: str, blob: bytes, label: bytes) -> npt.NDArray[np.float64]:
    """Decrypt *blob* (12-byte nonce, ciphertext, tag) into sealed memory: its numbers."""
    if name not in _keys:
        raise trusted.PublicError("no keys yet: the owner sends them after verifying evidence")
    count = max(0, len(blob) - 28) // 8
    plain: npt.NDArray[np.float64] = trusted.heap.empty(count)
    try:
        if not count or len(blob) != 28 + 8 * count:
            raise InvalidTag
        _keys[name].decrypt_into(blob[:12], memoryview(blob)[12:], label, plain.data.cast("B"))
    except InvalidTag:
        raise trusted.PublicError(
            f"the {name} is not authentic: it was changed or mislabelled"
        ) from None
    return plain


def _scores(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    bias, weights = _model[0][0], _model[0][1:]
    result: npt.NDArray[np.float64] = 1.0 / (1.0 + np.exp(-(rows[:, 1:] @ weights + bias)))
    return result


@trusted.ecall
def receive_keys(ciphertext: bytes) -> int:
    """Take the owner's keys (encrypted to this enclave) and return how many there are."""
    table, model = _KEYS.unpack(trusted.receive(ciphertext))
    _keys["table"], _keys["model"] = AESGCM(table), AESGCM(model)
    return len(_keys)


@trusted.ecall
def load_model(blob: bytes) -> int:
    """Decrypt the model and return its number of weights."""
    _model[:] = [_open("model", blob, b"model")]
    _table.clear()
    return len(_model[0]) - 1


@trusted.ecall
def score(blob: bytes, chunk: int) -> npt.NDArray[np.float64]:
    """Score one encrypted chunk of applicants: the chance that each credit goes bad."""
    if not _model:
        raise trusted.PublicError("no model is loaded")
    with trusted.heap.numpy():  # what NumPy computes on the way is in sealed memory too
        rows = _open("table", blob, b"table %d" % chunk).reshape(-1, len(_model[0]))
        _table.append(rows)
        return _scores(rows)


@trusted.ecall
def accuracy() -> float:
    """Return the share of applicants scored so far whose outcome was predicted."""
    count = right = 0
    with trusted.heap.numpy():  # all rows once more, most of which are ciphertext by now
        for rows in _table:
            count += len(rows)
            right += int(((_scores(rows) > 0.5) == (rows[:, 0] > 0.5)).sum())
    return right / count if count else 0.0


@trusted.ecall
def memory() -> list[int]:
    """Return bytes of the applicants in sealed memory, and the most that ever was plaintext."""
    return [sum(rows.nbytes for rows in _table), trusted.heap.stats.resident_peak]


@trusted.ecall
def new_counter() -> bytes:
    """Create a monotonic counter and return its identity."""
    return trusted.Counter.create().counter_id


@trusted.ecall
def remember(note: bytes, counter: bytes) -> bytes:
    """Seal a note to this enclave's signer and product, as the newest under a counter."""
    return trusted.seal(note, policy=trusted.SealPolicy.signer, counter=trusted.Counter(counter))


@trusted.ecall
def recall(blob: bytes, counter: bytes) -> int:
    """Open a sealed note and return its length: the host never sees its content."""
    return len(trusted.unseal(blob, counter=trusted.Counter(counter)))
