"""
The one TPM 2.0 client: NV indices and counters, public keys, quotes and PCRs, without libtss2.

It speaks to a device of Linux (``/dev/tpmrm0``) or to the socket of a software TPM (swtpm), with
passwords, which are empty on every cloud's vTPM. What the TPM answers is read strictly and within
bounds: under a hypervisor, the other side is not this machine's own.

The TCG's TPM 2.0 Library, part 3; the project's notes on real parts.
"""

from __future__ import annotations

from pyenclave.tpm.client import OWNER, Quoted, Tpm
from pyenclave.tpm.transport import DEFAULT_DEVICE, Transport, connect, lock_file

__all__ = ["DEFAULT_DEVICE", "OWNER", "Quoted", "Tpm", "Transport", "connect", "lock_file"]
