"""
The pytest plugin: fixtures for projects that use enclaves (docs/testing.md).

pytest loads this module in every project where pyenclave is installed, so it imports nothing of
the package: a fixture does, when a test asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyenclave.host.enclave import Enclave
    from pyenclave.testing.clock import Clock
    from pyenclave.testing.fake import FakeEnclave
    from pyenclave.testing.hosts import HostileHost, Loss
    from pyenclave.testing.places import EnclavePlatform
    from pyenclave.testing.samples import Sample


@pytest.fixture(scope="session")
def enclave_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnclavePlatform]:
    """A platform with its own root, for the whole session; ``PYENCLAVE_STATE`` names it."""
    from pyenclave.testing.places import EnclavePlatform

    state = tmp_path_factory.mktemp("enclaves") / "state"
    platform = EnclavePlatform(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", os.fspath(state))
        yield platform
    platform.close()


@pytest.fixture(scope="session")
def enclave_image() -> Callable[[Any], bytes]:
    """``enclave_image(source)``: the image of a module, function, file or folder, built once."""
    from pyenclave.testing.places import image_of

    return image_of


@pytest.fixture
def enclave_from(
    enclave_platform: EnclavePlatform, enclave_image: Callable[[Any], bytes]
) -> Iterator[Callable[..., Enclave]]:
    """``enclave_from(source, **options)``: a started enclave, new for this test."""
    from pyenclave.host.enclave import Enclave
    from pyenclave.testing.places import end_quietly

    made: list[Enclave] = []

    def make(source: Any, **options: Any) -> Enclave:
        given = {"state": enclave_platform.state, "quiet": True, **options}
        made.append(Enclave(enclave_image(source), **given).start())
        return made[-1]

    yield make
    for enclave in reversed(made):
        end_quietly(enclave)


@pytest.fixture
def fake_enclave_from() -> Iterator[Callable[..., FakeEnclave]]:
    """``fake_enclave_from(module)``: no enclave, no protection: its functions in this process."""
    from pyenclave.testing.fake import FakeEnclave
    from pyenclave.testing.places import end_quietly

    made: list[FakeEnclave] = []

    def make(entry: Any, **options: Any) -> FakeEnclave:
        made.append(FakeEnclave(entry, **options).start())
        return made[-1]

    yield make
    for enclave in reversed(made):
        end_quietly(enclave)


def _is_handle(source: Any) -> bool:
    return hasattr(type(source), "parameter_types")


@pytest.fixture
def hostile_host(enclave_from: Callable[..., Enclave]) -> Callable[..., HostileHost]:
    """``hostile_host(enclave_or_source)``: the ring in an attacker's hands."""
    from pyenclave.testing.hosts import HostileHost

    def make(source: Any, **options: Any) -> HostileHost:
        return HostileHost(source if _is_handle(source) else enclave_from(source, **options))

    return make


@pytest.fixture
def poisoned_enclave(enclave_from: Callable[..., Enclave]) -> Callable[..., Any]:
    """``poisoned_enclave(enclave_or_source)``: a handle whose enclave destroyed itself."""
    from pyenclave.testing.hosts import poison

    def make(source: Any, **options: Any) -> Any:
        enclave = source if _is_handle(source) else enclave_from(source, **options)
        poison(enclave)
        return enclave

    return make


@pytest.fixture
def lost_enclave(enclave_from: Callable[..., Enclave]) -> Iterator[Callable[..., Any]]:
    """``lost_enclave(enclave_or_source, when="before")``: lost before, during or after a call."""
    from pyenclave.testing.hosts import Loss

    losses: list[Loss] = []

    def make(source: Any, when: Any = "before", **options: Any) -> Any:
        enclave = source if _is_handle(source) else enclave_from(source, **options)
        losses.append(Loss(enclave, when))
        return enclave

    yield make
    for loss in losses:
        loss.cancel()


@pytest.fixture
def enclave_clock() -> Clock:
    """A clock that stands still: ``verify(..., at=enclave_clock.now())``."""
    from pyenclave.testing.clock import Clock

    return Clock()


@pytest.fixture
def synthetic_evidence(enclave_clock: Clock) -> Callable[..., Sample]:
    """``synthetic_evidence("sgx", nonce=…)``: evidence of a chip that is made of software."""
    from pyenclave.testing.samples import sample

    def make(kind: str, *, nonce: bytes = bytes(range(32))) -> Sample:
        return sample(kind, enclave_clock.now(), nonce)

    return make
