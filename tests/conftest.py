"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import pyenclave

# Timings never fail a test: a busy machine is no bug.
settings.register_profile("pyenclave", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pyenclave")

# Tests start programs of their own. They must find the same pyenclave: the installed one by
# itself, a checkout's (python -m pytest) by its path.
_HOME = Path(pyenclave.__file__).resolve().parent.parent
if _HOME.name != "site-packages":
    os.environ["PYTHONPATH"] = str(_HOME)
# Nor may they find the checkout's sources because they run in its folder.
os.environ["PYTHONSAFEPATH"] = "1"

if os.environ.get("PYENCLAVE_COVERAGE") == "1":
    import counters

    if not counters.share_all():
        raise RuntimeError("PYENCLAVE_COVERAGE is set, and this build has no counters")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of test vectors that nobody of this project made."""
    folder = Path(os.environ.get("PYENCLAVE_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not folder.is_dir():
        pytest.skip(f"test vectors are not at {folder} (set PYENCLAVE_VECTORS)")
    return folder
