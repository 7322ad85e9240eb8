"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
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

# Who starts the suite in the background (nohup, &) has these ignored, and what is ignored is
# inherited: a test that sends one would wait for ever.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

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
