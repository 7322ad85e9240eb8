"""
Enclave images: manifest, lock list, build, signature.

``build.build`` makes an image, ``sign.sign`` signs it, ``inspect.describe`` explains it and
``diff.diff`` says why two differ; ``lock.check`` compares a lock list with this machine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyenclave.image.build import build_script as build_script
    from pyenclave.image.inspect import describe as describe
    from pyenclave.image.keys import keygen as keygen

_PUBLIC = {
    "build_script": "pyenclave.image.build",
    "describe": "pyenclave.image.inspect",
    "keygen": "pyenclave.image.keys",
}

__all__ = ["build_script", "describe", "keygen"]


def __getattr__(name: str) -> Any:
    # Lazy: a platform that only checks locks need not load the signer's libraries.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pyenclave.image' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
