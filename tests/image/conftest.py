"""A built image and a key, made once: building imports numpy in a fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyenclave.image import build, keys

SCORE = """\
import pyenclave


@pyenclave.ecall
def score(rows: bytes, limit: int = 3) -> int:
    return len(rows)


if __name__ == "__main__":
    raise SystemExit("the entry was run as __main__")
"""
MANIFEST = """\
[enclave]
name = "scoring"
entry = "score.py"
product_id = 7
security_version = 3
threads = 2

[files]
"model.bin" = "model.bin"
"""


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest, an entry and a file."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "score.py").write_text(SCORE)
    (folder / "enclave.toml").write_text(MANIFEST)
    (folder / "model.bin").write_bytes(bytes(range(256)) * 20)
    return folder


@pytest.fixture(scope="session")
def built(project: Path) -> bytes:
    """The image of ``project``."""
    return build.build(project)


@pytest.fixture(scope="session")
def key() -> bytes:
    """A signing key."""
    return keys.keygen()
