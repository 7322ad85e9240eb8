"""
The control plane of the native core: features and system mechanisms, through cffi.

This is the only module that imports ``_ffi``. The data plane is ``_core``.
"""

from __future__ import annotations

from pyenclave._ffi import ffi, lib

__all__ = ["cpu_features"]

# ---- features --------------------------------------------------------------------------------


def cpu_features() -> tuple[str, ...]:
    """Return the names of the CPU features that the core may use, in the order of their bits."""
    word = lib.pye_cpu_features()
    names = (lib.pye_cpu_feature_name(1 << bit) for bit in range(32) if word >> bit & 1)
    return tuple(ffi.string(name).decode() for name in names if name != ffi.NULL)


# ---- sandbox and processes -------------------------------------------------------------------


# ---- secret memory ---------------------------------------------------------------------------
