"""
Pack this Python, the project and its tests for an emulated machine that has protection keys.

    python tests/native/protected_guest.py FILE FOLDER TEST ...

writes the initial file system of a kernel into FILE: what the tests import, the shared libraries
that it needs, the ready-made libraries of FOLDER (``protected_files.py``), and, from
``FOLDER/broken``, cores with a fault in them. Its first program runs the tests, then once more with
each broken core, when a test has to fail, and with each check of the core switched off; it says
``protected: passed`` and switches off.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from proof_state import SIZE

ROOT = Path(__file__).resolve().parents[2]

# Plugins take a minute to load in emulation; these are what the tests and the mutants need.
ALONE = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_PLUGINS": "pytest_timeout,_hypothesis_pytestplugin",
}

# What runs as process 1 of the emulated machine.
INIT = """#!{python} -I
import ctypes, os, pathlib, subprocess, sys, traceback
libc = ctypes.CDLL(None, use_errno=True)
for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")):
    os.makedirs(place, exist_ok=True)
    libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None)
os.environ |= {environment!r}
good = []
def tests(label, package, *more):
    print(f"\\n== {{label}}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600",
               "--color=no",
               "-c", "{root}/pyproject.toml", "--rootdir", "{root}", *more]
    environment = os.environ | {{"PYTHONPATH": package}}
    return subprocess.run(command, env=environment, cwd="/tmp").returncode
try:
    print(os.uname().release, [word for word in open("/proc/cpuinfo").read().split() if word in
          ("pku", "ospke")][:2], flush=True)
    good.append(tests("the tests", "{package}", *{tests!r}) == 0)
    proof = pathlib.Path("{folder}/proof/package")
    core = proof / "pyenclave/libpyenclave_proof.so"
    if proof.is_dir():
        print("\\n== every check is needed", flush=True)
        pathlib.Path("/tmp/state").write_bytes(bytes({state}))
        environment = os.environ | {{"PYTHONPATH": str(proof), "PYE_PROOF_HOME": str(proof),
                                    "PYE_PROOF_STATE": "/tmp/state"}}
        command = [sys.executable, "{root}/tests/native/mutants.py", "--only", "linux/protect",
                   "--patience", "10", "--verbose", *{tests!r}]
        good.append(subprocess.run(command, env=environment).returncode == 0)
    for broken in sorted(pathlib.Path("{folder}/broken").glob("*.so")):
        core.write_bytes(broken.read_bytes())
        code = tests(f"broken: {{broken.stem}}", str(proof), "--tb=line", {tests!r}[0], "-k",
                     broken.with_suffix(".txt").read_text())
        # A test failed, or the process died of a signal; not: there was no such test.
        good.append(code == 0 if broken.stem == "none" else code == 1 or code < 0)
        print("broken:", broken.stem, "as it should be" if good[-1] else "NOT NOTICED", flush=True)
except BaseException:
    traceback.print_exc()
    good.append(False)
finally:
    print("protected:", "passed" if good and all(good) else "FAILED", flush=True)
    os.sync()
    libc.reboot(0x4321FEDC)
"""


def loaded(tests: list[str]) -> set[Path]:
    """Return the files that Python has open or imported once the tests are collected."""
    script = (
        "import sys, pytest\n"
        "code = pytest.main(['-q', '--collect-only', *sys.argv[1:]])\n"
        "files = {getattr(m, '__file__', None) for m in list(sys.modules.values())}\n"
        "print('\\n'.join(f'LOADED {f}' for f in files if f))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ALONE,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return {Path(name) for name in re.findall(r"^LOADED (.*)$", done.stdout, re.M)}


def needed(objects: set[Path]) -> set[Path]:
    """Return the shared libraries that *objects* need, the loader included."""
    found = set()
    for path in objects:
        done = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False)
        found |= {Path(name) for name in re.findall(r"(/\S+) \(0x", done.stdout)}
    return found


def everything(folder: Path, tests: list[str]) -> set[Path]:
    """Return every file that the machine shall have, at the place where it is here."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    site = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    found = {Path(sys.executable), Path(sys.executable).resolve(), ROOT / "pyproject.toml"}
    found |= {Path(sys.prefix) / "pyvenv.cfg"} & {Path(sys.prefix) / "pyvenv.cfg"}
    trees = {folder, ROOT / "tests" / "native", ROOT / "pyenclave", ROOT / "csrc"}
    found |= {ROOT / "tests" / "conftest.py"}
    for path in loaded(tests):
        place = next((folder for folder in site if path.is_relative_to(folder)), None)
        if place is not None:
            top = place / path.relative_to(place).parts[0]
            trees |= {top, *place.glob(f"{top.name}.libs"), *place.glob(f"{top.name}-*.dist-info")}
        else:
            found.add(path)
    trees |= {path for path in stdlib.iterdir() if path.name not in {"test", "site-packages"}
              and not path.name.startswith("config-")}  # fmt: skip
    for tree in trees:
        found |= (
            {path for path in tree.rglob("*") if not path.is_dir()} if tree.is_dir() else {tree}
        )
    found = {path for path in found if path.is_file() and "__pycache__" not in path.parts}
    objects = {
        path for path in found if ".so" in path.name or path == Path(sys.executable).resolve()
    }
    return found | needed(objects)


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """Return a cpio archive ("newc") of paths, modes and contents; folders are made up."""
    parts = {str(parent): (0o40755, b"") for name in files for parent in Path(name).parents}
    parts.pop(".", None)
    parts |= files
    out = bytearray()
    rows = [(name, *parts[name]) for name in sorted(parts)]
    for number, (name, mode, data) in enumerate([*rows, ("TRAILER!!!", 0, b"")], 1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def main(target: str, where: str, *tests: str) -> None:
    """Write the archive *target* of the tests and of the folder *where*."""
    folder = Path(where).resolve()
    places = [str(Path(test).resolve()) for test in tests]
    files: dict[str, tuple[int, bytes]] = {}
    for path in everything(folder, places):
        mode = 0o100755 if os.access(path, os.X_OK) else 0o100644
        files[str(path.absolute()).lstrip("/")] = (mode, path.read_bytes())
    init = INIT.format(
        python=Path(sys.executable).resolve(), root=ROOT, tests=places, folder=folder, state=SIZE,
        package=Path(__import__("pyenclave").__file__).parents[1],
        environment={
            "PATH": "/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8", "PYTHONSAFEPATH": "1",
            **ALONE, "PYTHONDONTWRITEBYTECODE": "1", "PYENCLAVE_PROTECTED_FILES": str(folder),
        },
    ).replace("sys.executable", repr(str(Path(sys.executable).absolute())))  # fmt: skip
    files["init"] = (0o100755, init.encode())
    Path(target).write_bytes(archive(files))


if __name__ == "__main__":
    main(*sys.argv[1:])
