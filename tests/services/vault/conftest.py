"""What tests of the vault share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyenclave.services.vault.backends._image import enclave_image


@pytest.fixture(scope="session")
def enclave_state(tmp_path_factory: pytest.TempPathFactory, used: Callable[[Path], Path]) -> Path:
    """A state directory in which the vault's enclave is built: requests do not wait for that."""
    folder = used(tmp_path_factory.mktemp("vault"))
    enclave_image(folder)
    return folder
