"""The untrusted side: handles on enclaves."""

from __future__ import annotations

from pyenclave.host.enclave import Enclave
from pyenclave.host.handle import EnclaveInfo, Evidence

__all__ = ["Enclave", "EnclaveInfo", "Evidence"]
