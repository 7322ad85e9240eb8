"""The engines' published seccomp profiles."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Where Debian's packages golang-github-containers-common and golang-github-docker-docker-dev have
# them. Nothing of them is in this project.
KNOWN = {
    "podman": "/usr/share/containers/seccomp.json",
    "docker": "/usr/share/gocode/src/github.com/docker/docker/profiles/seccomp/default.json",
}


@pytest.fixture(params=sorted(KNOWN))
def profile(request: pytest.FixtureRequest) -> Path:
    """The default seccomp profile of an engine, as it publishes it."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a container's mounts and filter")
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not installed")
    folder = os.environ.get("PYENCLAVE_SECCOMP_PROFILES", "/")
    for path in (Path(folder) / f"{request.param}.json", Path(folder + KNOWN[request.param])):
        if path.is_file():
            return path
    pytest.skip(f"the published profile of {request.param} is not here (.ci/run gets it)")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that a container's user can enter. Each pytest that starts closes its own again."""
    with tempfile.TemporaryDirectory(prefix="pyenclave-container-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
