"""The issuer of our own kind of evidence."""

from __future__ import annotations

import pytest
from issuer_pyenclave import Issuer


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    return Issuer()
