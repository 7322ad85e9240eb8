"""Sealed memory inside: one heap an enclave, made when it is first used."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from pyenclave.errors import EnclaveStateError, SealingError
from pyenclave.trusted import _state

if TYPE_CHECKING:
    from pyenclave.sealed.heap import SealedHeap

__all__ = ["CAPACITY", "TrustedHeap", "heap"]

# Address space, not memory: a page takes memory when it is first written. Up to here versions of
# pages need no tree.
CAPACITY: Final = 64 << 30


class TrustedHeap:
    """
    The enclave's sealed memory (`pyenclave.SealedHeap`), as large as ``[memory] sealed`` says.

    At most so much of it is plaintext at any moment, in all arrays together; the rest is ciphertext
    in the worker's memory. A page that is changed from outside ends the enclave: the host gets
    EnclavePoisonedError.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: SealedHeap | None = None

    def _heap(self) -> SealedHeap:
        made = self._made
        return self._make() if made is None else made

    def _make(self) -> SealedHeap:
        if _state.runtime is None and _state.entered():
            raise EnclaveStateError(
                "there is no sealed memory while the entry is imported",
                advice="Make arrays in functions, for instance one marked with @trusted.on_start.",
            )
        limit = _state.current().sealed_memory
        if not limit:
            raise SealingError(
                "the image has no sealed memory",
                advice='Ask for it in the manifest: [memory] sealed = "64 MiB".',
            )
        from pyenclave.sealed.heap import SealedHeap

        with self._lock:
            if self._made is None:
                self._made = SealedHeap(CAPACITY, limit)
            return self._made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._heap(), name)

    def __contains__(self, array: Any) -> bool:
        return array in self._heap()

    def __repr__(self) -> str:
        return "<trusted.heap>" if self._made is None else f"<trusted.heap: {self._made!r}>"

    def __reduce__(self) -> str:
        raise TypeError("sealed memory cannot be pickled or copied")


heap: Final = TrustedHeap()
