"""
pyenclave: confidential computing for Python.

Run trusted code in an enclave, prove what runs, and give keys only to code that proved itself.
Importing this package does no work: each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyenclave._platform.client import local_platform_root as local_platform_root
    from pyenclave.attestation import AppraisalPolicy as AppraisalPolicy
    from pyenclave.attestation import verify as verify
    from pyenclave.host import Enclave as Enclave
    from pyenclave.host import EnclavePool as EnclavePool
    from pyenclave.host.aio import AsyncEnclave as AsyncEnclave
    from pyenclave.host.aio_pool import AsyncEnclavePool as AsyncEnclavePool
    from pyenclave.host.files import lend_files as lend_files
    from pyenclave.host.protected import ProtectedLibrary as ProtectedLibrary
    from pyenclave.host.relay import relay as relay
    from pyenclave.sealed.file import open_sealed as open_sealed
    from pyenclave.sealed.heap import SealedHeap as SealedHeap
    from pyenclave.trusted import PublicError as PublicError
    from pyenclave.trusted import SealPolicy as SealPolicy
    from pyenclave.trusted import ecall as ecall
    from pyenclave.trusted import ocall as ocall

# The public names, and the module that each comes from.
_PUBLIC = {
    "AppraisalPolicy": "pyenclave.attestation",
    "AsyncEnclave": "pyenclave.host.aio",
    "AsyncEnclavePool": "pyenclave.host.aio_pool",
    "Enclave": "pyenclave.host",
    "EnclavePool": "pyenclave.host",
    "ProtectedLibrary": "pyenclave.host.protected",
    "PublicError": "pyenclave.trusted",
    "SealPolicy": "pyenclave.trusted",
    "SealedHeap": "pyenclave.sealed.heap",
    "ecall": "pyenclave.trusted",
    "lend_files": "pyenclave.host.files",
    "ocall": "pyenclave.trusted",
    "open_sealed": "pyenclave.sealed.file",
    "local_platform_root": "pyenclave._platform.client",
    "relay": "pyenclave.host.relay",
    "verify": "pyenclave.attestation",
}
_MODULES = ("attestation", "errors", "measurement", "sealed", "telemetry", "trusted")

__version__ = "0.1.0"
__all__ = [  # noqa: PLE0604 - computed from the table above
    *_PUBLIC,
    *_MODULES,
    "__version__",
    "get_include",
]


def get_include() -> str:
    """Return the folder of the C headers for native trusted code and protected libraries."""
    from pathlib import Path

    return str(Path(__file__).parent / "include")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        try:
            value = getattr(import_module(_PUBLIC[name]), name)
        except ImportError:
            why = import_module("pyenclave.errors").not_built()
            if why:
                raise ImportError(why) from None
            raise
    elif name in _MODULES:
        value = import_module(f"pyenclave.{name}")
    else:
        raise AttributeError(f"module 'pyenclave' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
