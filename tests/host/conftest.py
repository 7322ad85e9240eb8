"""
Enclaves for event loops and for pools, as most tests of them want them.

Modules about something else have fixtures of these names of their own.
"""

from __future__ import annotations

import contextlib

import pytest
from aio_places import ENTRY
from pool_places import ENTRY as POOL_ENTRY

from pyenclave.host.aio import AsyncEnclave
from pyenclave.host.enclave import Enclave
from pyenclave.host.pool import EnclavePool


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
def state(tmp_path_factory, image, used):
    """A state directory whose platform and zygote stay warm."""
    path = used(tmp_path_factory.mktemp("state"))
    with Enclave(image, state=path, quiet=True):
        yield path


@pytest.fixture
def make(image, state):
    def make(**options):
        return AsyncEnclave(options.pop("image", image), state=state, quiet=True, **options)

    return make


@pytest.fixture(scope="session")
def pool_image():
    from pyenclave.image.build import build_script

    return build_script(POOL_ENTRY)


@pytest.fixture(scope="module")
def pool_state(tmp_path_factory, pool_image, used):
    """A state directory whose platform and zygote stay warm."""
    path = used(tmp_path_factory.mktemp("state"))
    with Enclave(pool_image, state=path, quiet=True):
        yield path


@pytest.fixture
def make_pool(pool_image, pool_state):
    with contextlib.ExitStack() as stack:

        def make_pool(**options):
            pool = EnclavePool(pool_image, state=pool_state, quiet=True, **options)
            return stack.enter_context(pool)

        yield make_pool
