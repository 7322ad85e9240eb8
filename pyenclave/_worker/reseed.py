"""
Fresh randomness after the fork.

Every worker of a zygote starts from the same memory, and in its own pid namespace every worker is
process 1: a generator that looks at the pid to notice a fork would give its siblings the same
numbers. So each generator that holds state is seeded again, by name, from the kernel.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any

__all__ = ["reseed", "reseed_openssl"]


def reseed() -> None:
    """Seed every generator of this process again."""
    random.seed()
    tempfile: Any = sys.modules.get("tempfile")
    if tempfile is not None:
        # It keeps a generator of its own, made again on the next use.
        vars(tempfile)["_name_sequence"] = None
    _reseed_numpy()
    reseed_openssl()


def _reseed_numpy() -> None:
    legacy: Any = sys.modules.get("numpy.random")
    if legacy is not None:
        # The global of numpy.random.seed() and numpy.random.rand(). Generators made by
        # default_rng() take their seeds from the kernel when they are made.
        numbers = memoryview(os.urandom(32)).cast("I")
        legacy.seed(list(numbers))


def reseed_openssl(extra: bytes = b"") -> None:
    """
    Stir both copies of OpenSSL; adding to the primary generator makes its children reseed.

    Args:
        extra: Further entropy (the platform's seed).

    """
    entropy = os.urandom(48) + extra
    rust: Any = sys.modules.get("cryptography.hazmat.bindings._rust")
    if rust is not None:
        rust._openssl.lib.RAND_add(entropy, len(entropy), float(len(entropy)))  # noqa: SLF001
    ssl: Any = sys.modules.get("_ssl")
    if ssl is not None:
        ssl.RAND_add(entropy, float(len(entropy)))
