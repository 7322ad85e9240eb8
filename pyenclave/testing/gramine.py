"""A double of Gramine's pseudo-files: a folder, with any synthetic chip behind it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pyenclave.testing.intel import IntelPlatform

__all__ = ["GramineFolder"]

_USER_DATA = 64


class GramineFolder:
    """
    ``/dev/attestation``: what ``quote`` reads as is made when it is opened.

    It is a pipe, and a thread writes into it what fits ``user_report_data`` at that moment.

    Args:
        folder: An empty folder.
        quote: Makes the quote of 64 bytes of report data.
        kind: The attestation type; with ``none`` there is no file ``quote``.
    """

    def __init__(
        self, folder: str | os.PathLike[str], quote: Callable[[bytes], bytes], *, kind: str = "dcap"
    ) -> None:
        self.folder = Path(folder)
        self.quote = quote
        (self.folder / "keys").mkdir(parents=True)
        (self.folder / "attestation_type").write_bytes(kind.encode())
        for name, content in {
            "user_report_data": bytes(_USER_DATA),
            "target_info": bytes(512),
            "my_target_info": bytes(range(256)) * 2,
            "report": bytes(432),
            "keys/_sgx_mrenclave": bytes(range(16)),
        }.items():
            (self.folder / name).write_bytes(content)
        self._pipe = self.folder / "quote"
        self._thread: threading.Thread | None = None
        if kind != "none":
            os.mkfifo(self._pipe)
            self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ended = False

    @classmethod
    def sgx(cls, folder: str | os.PathLike[str], platform: IntelPlatform) -> Self:
        """Put an Intel platform behind it."""
        return cls(folder, lambda data: platform.enclave_quote(report_data=data))

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._thread is not None:
            reader = os.open(self._pipe, os.O_RDONLY | os.O_NONBLOCK)  # lets the writer go on
            self._thread.join(10)
            os.close(reader)

    def _serve(self) -> None:
        while True:
            fd = os.open(self._pipe, os.O_WRONLY)  # waits for a reader
            try:
                if self._ended:
                    return
                # The next reader gets a pipe of its own, or this one would read the next quote too.
                new = self._pipe.with_name("quote.new")
                os.mkfifo(new)
                os.replace(new, self._pipe)
                data = (self.folder / "user_report_data").read_bytes()
                # Gramine cuts what is longer and pads what is shorter, without a word.
                quote = self.quote(data[:_USER_DATA].ljust(_USER_DATA, b"\0"))
                with contextlib.suppress(BrokenPipeError):
                    os.write(fd, quote)
            finally:
                os.close(fd)
