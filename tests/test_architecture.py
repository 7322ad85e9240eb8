"""The import arrows, and the modules that run inside an enclave (design, section 9)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyenclave
from pyenclave.image.closure import ALLOWED

PACKAGE = Path(pyenclave.__file__).parent

# Layer of each part. A module imports from parts with a smaller number, or from its own part.
LAYERS = {
    # The design's layer 0, in the order in which its members build on each other.
    "errors": -2,
    "_locks": -2,
    "_memfd": -2,
    "_files": -2,
    "_core": -1,
    "_ffi": -1,
    "_native": 0,
    "formats": 1,
    "measurement": 2,
    "sealed": 2,
    "calls": 2,
    "tpm": 2,
    "image": 3,
    "attestation": 3,
    "providers": 3,
    "trusted": 3,
    "_worker": 4,
    "_platform": 4,
    "collateral": 4,
    "_https": 4,
    "vault_client": 5,
    "host": 5,
    "telemetry": 5,
    "services": 6,
    "testing": 6,
    "benchmarks": 7,
    "demo": 7,
    "cli": 8,
    "__main__": 9,
}
TRUSTED_BASE = {
    "errors",
    "_locks",
    "_memfd",
    "_native",
    "_core",
    "_ffi",
    "formats",
    "calls",
    "sealed",
    "trusted",
    "_worker",
}


def part_of(module: str) -> str:
    """Return the part of pyenclave that *module* (a dotted name) belongs to."""
    return module.split(".")[1] if module.count(".") else ""


def imports_of(path: Path) -> set[str]:
    """Return the pyenclave modules that a source file imports, wherever in the file."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "pyenclave":
                found |= {f"pyenclave.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return {name for name in found if name.startswith("pyenclave.")}


SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts != ("__init__.py",)
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_arrow_points_down(path: Path) -> None:
    """A module imports only from its own part or from parts of a smaller number."""
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for name in imports_of(path):
        target = part_of(name)
        if target in pyenclave.__all__ and target not in LAYERS:
            continue  # a public name of the package itself, checked where it is defined
        assert target in LAYERS, f"{relative} imports {name}, which has no layer"
        allowed = target == own or LAYERS[target] < LAYERS[own]
        assert allowed, f"{relative} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[target]})"


def test_only_native_imports_the_cffi_module() -> None:
    """The control plane has one door."""
    for path in SOURCES:
        if path.name != "_native.py":
            assert "pyenclave._ffi" not in imports_of(path), path


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.relative_to(PACKAGE).parts[0].removesuffix(".py") in TRUSTED_BASE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_trusted_base_imports_nothing_outside_itself(path: Path) -> None:
    """Of pyenclave's own modules the worker can reach only those of the trusted base."""
    for name in imports_of(path):
        assert part_of(name) in TRUSTED_BASE, f"{path.relative_to(PACKAGE)} imports {name}"


def test_the_worker_really_loads_only_the_trusted_base() -> None:
    """What a fresh interpreter holds after importing the worker's main module."""
    script = (
        "import sys, pyenclave._worker.main\n"
        "print(*sorted(m for m in sys.modules if m.startswith('pyenclave.')))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {part_of(name) for name in loaded} <= TRUSTED_BASE
    assert "pyenclave._worker.main" in loaded


def test_the_builder_accepts_the_same_trusted_base() -> None:
    """What is built may import what this file lets the worker reach."""
    assert set(ALLOWED) == TRUSTED_BASE


def test_importing_the_package_does_no_work() -> None:
    """``import pyenclave`` loads neither NumPy nor any part of the package."""
    script = "import sys, pyenclave\nprint(*sorted(m for m in sys.modules))\n"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "numpy" not in loaded
    assert [name for name in loaded if name.startswith("pyenclave.")] == []


def test_every_public_name_can_be_reached() -> None:
    """The table of public names in ``__init__`` holds."""
    for name in pyenclave.__all__:
        assert getattr(pyenclave, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    """A misspelt name fails as it does in any module."""
    with pytest.raises(AttributeError, match="Encave"):
        pyenclave.Encave  # noqa: B018


# What runs in a process whose main thread Ctrl-C interrupts anywhere.
HOSTS = ("_https.py", "telemetry.py", "vault_client.py", "_platform/client.py")
HOSTS += ("_platform/endpoint.py", "_platform/taking.py")
HOST_FOLDERS = ("host", "sealed", "calls", "attestation", "collateral", "providers", "tpm", "cli")


def has_unsure_locks(tree: ast.AST) -> list[str]:
    """Return what a module takes of `threading` that Ctrl-C may leave taken."""
    names = {"Lock", "RLock", "Condition", "allocate_lock"}
    modules = {"threading", "_thread"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            found += [item.name for item in node.names if item.name in names]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            if isinstance(of, ast.Name) and of.id in modules and node.func.attr in names:
                found.append(f"{node.func.attr} in line {node.lineno}")
    return found


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in SOURCES
        if p.relative_to(PACKAGE).parts[0] in HOST_FOLDERS
        or p.relative_to(PACKAGE).as_posix() in HOSTS
    ],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_hosts_take_locks_that_ctrl_c_gives_back(path: Path) -> None:
    """On CPython 3.14 others may stay taken between a `with` and its block."""
    found = has_unsure_locks(ast.parse(path.read_text("utf-8")))
    # The gate of a call that waits: of that call alone, and never taken by `with`.
    gates = ["Lock in line"] if path.relative_to(PACKAGE).as_posix() == "host/pool.py" else []
    assert [text.rsplit(" ", 1)[0] for text in found] == gates, "use pyenclave._locks"


def test_unsure_locks_are_found() -> None:
    """The test above can fail."""
    for text in ("import threading\nx = threading.Lock()", "from _thread import RLock"):
        assert len(has_unsure_locks(ast.parse(text))) == 1


# What speaks TLS, HTTP or to other machines. `socket` itself is there for the platform's line.
NETWORK = {
    "aiohttp",
    "asyncio",
    "ftplib",
    "http",
    "httpx",
    "requests",
    "smtplib",
    "socketserver",
    "ssl",
    "urllib",
    "urllib3",
    "xmlrpc",
}


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.relative_to(PACKAGE).parts[0].removesuffix(".py") in TRUSTED_BASE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_network_client_is_in_the_trusted_base(path: Path) -> None:
    """The host relays; nothing that runs inside imports what speaks to other machines."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] not in NETWORK, f"{path.relative_to(PACKAGE)}: {name}"
