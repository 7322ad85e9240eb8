"""The untrusted side: handles on enclaves."""

from __future__ import annotations

from pyenclave.host.enclave import Enclave
from pyenclave.host.handle import EnclaveInfo, Evidence
from pyenclave.host.pool import EnclavePool, PoolStats

__all__ = ["Enclave", "EnclaveInfo", "EnclavePool", "Evidence", "PoolStats"]
