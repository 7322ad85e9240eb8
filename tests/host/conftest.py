"""
Enclaves for event loops, as most tests of them want them.

Modules about something else have fixtures of these names of their own.
"""

from __future__ import annotations

import pytest
from aio_places import ENTRY

from pyenclave.host.aio import AsyncEnclave
from pyenclave.host.enclave import Enclave


@pytest.fixture(scope="session")
def image():
    """One thread."""
    from pyenclave.image.build import build_script

    return build_script(ENTRY)


@pytest.fixture(scope="session")
def wide_image(tmp_path_factory):
    """Four threads."""
    from pyenclave.image.build import build

    folder = tmp_path_factory.mktemp("wide")
    (folder / "aio_entry.py").write_text(ENTRY.read_text())
    manifest = folder / "enclave.toml"
    manifest.write_text(
        '[enclave]\nname = "wide"\nentry = "aio_entry.py"\nproduct_id = 1\n'
        "security_version = 1\nthreads = 4\n"
    )
    return build(manifest)


@pytest.fixture(scope="module")
def state(tmp_path_factory, image):
    """A state directory whose platform and zygote stay warm."""
    path = tmp_path_factory.mktemp("state")
    with Enclave(image, state=path, quiet=True):
        yield path


@pytest.fixture
def make(image, state):
    def make(**options):
        return AsyncEnclave(options.pop("image", image), state=state, quiet=True, **options)

    return make
