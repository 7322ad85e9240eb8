"""Fixtures of the worker's tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pyenclave._platform.zygotes import Zygotes
from pyenclave.formats.lock import Lock, Roots

if not sys.platform.startswith("linux"):
    collect_ignore_glob = ["test_*"]


def _helper() -> ModuleType:
    """Load the helper beside this file, which import mode importlib leaves off the path."""
    name = "pyenclave_test_launching"
    if name not in sys.modules:
        path = Path(__file__).with_name("launching.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def launching() -> ModuleType:
    """The helper that plays the platform."""
    return _helper()


@pytest.fixture(scope="session")
def zygotes() -> Iterator[Zygotes]:
    """Zygotes shared by the tests that do not end them."""
    found = Zygotes(Roots.of_this_process())
    yield found
    found.close()


@pytest.fixture(scope="session")
def base(launching: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Lock:
    """A lock with all that the tests' entries import."""
    source = (
        "import json, os, random, secrets, tempfile, uuid, signal, sys, importlib.util\n"
        "import numpy, threading, time, linecache, traceback, colorsys, cmath\n"
        "from cryptography.hazmat.primitives.asymmetric import x25519\n"
        "@pyenclave.ecall\n"
        "def nothing() -> int:\n"
        "    return 0\n"
    )
    return launching.take_lock(tmp_path_factory.mktemp("base"), source)
