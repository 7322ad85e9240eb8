"""
The trusted code of the demo: scores applicants that the host cannot read.

It runs inside the enclave. The host gives it ciphertext only; the keys come from the owner,
encrypted to this launch's runtime key.
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
_tally = {"rows": 0, "right": 0}


def _open(name: str, blob: bytes, label: bytes) -> npt.NDArray[np.float64]:
    """Decrypt *blob* (12-byte nonce, ciphertext, tag) and return its numbers."""
    if name not in _keys:
        raise trusted.PublicError("no keys yet: the owner sends them after verifying evidence")
    try:
        plain = _keys[name].decrypt(blob[:12], blob[12:], label)
    except InvalidTag:
        raise trusted.PublicError(
            f"the {name} is not authentic: it was changed or mislabelled"
        ) from None
    return np.frombuffer(plain, dtype=np.float64)


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
    _tally.update(rows=0, right=0)
    return len(_model[0]) - 1


@trusted.ecall
def score(blob: bytes, chunk: int) -> npt.NDArray[np.float64]:
    """Score one encrypted chunk of applicants: the chance that each credit goes bad."""
    if not _model:
        raise trusted.PublicError("no model is loaded")
    bias, weights = _model[0][0], _model[0][1:]
    rows = _open("table", blob, b"table %d" % chunk).reshape(-1, len(weights) + 1)
    scores: npt.NDArray[np.float64] = 1.0 / (1.0 + np.exp(-(rows[:, 1:] @ weights + bias)))
    _tally["rows"] += len(scores)
    _tally["right"] += int(((scores > 0.5) == (rows[:, 0] > 0.5)).sum())
    return scores


@trusted.ecall
def accuracy() -> float:
    """Return the share of applicants scored so far whose outcome was predicted."""
    return _tally["right"] / _tally["rows"] if _tally["rows"] else 0.0


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
