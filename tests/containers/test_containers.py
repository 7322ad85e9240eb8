"""Inside a container of Docker's and of Podman's defaults, emulated with their own profiles."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyenclave.cli._remedies import in_container, remedies

CONTAINED = Path(__file__).with_name("contained.py")
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "containers.md"
NAMESPACES = ("userns", "pidns", "netns", "mountns", "ipcns", "utsns", "cgroupns")

SERVICE = """
import json, sys
import pyenclave
from pyenclave import errors, trusted

@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x

@pyenclave.ecall
def keep(data: bytes) -> bytes:
    return trusted.seal(data)

if __name__ == "__main__":
    with pyenclave.Enclave.from_file(__file__, quiet=True) as enclave:
        try:
            sealed = len(enclave.keep(b"data")) > 4
        except errors.EcallError as error:
            sealed = error.type
        print(json.dumps([enclave.double(21), dict(enclave.info.protections), sealed]))
"""


def contained(profile: Path, *command: str, options: tuple[str, ...] = ()) -> Any:
    """Run Python with *command* in the container and return its JSON."""
    prefix = os.path.realpath(sys.base_prefix)
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nowhere"}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    for option in options:
        if option.startswith("--state="):
            environment["PYENCLAVE_STATE"] = option.removeprefix("--state=")
    options = tuple(item for item in options if not item.startswith("--state="))
    done = subprocess.run(
        [
            *(sys.executable, str(CONTAINED), str(profile), "--reach", prefix, *options, "--"),
            *(sys.executable, *command),
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def script(open_folder: Path) -> str:
    path = open_folder / "service.py"
    path.write_text(SERVICE)
    return str(path)


def test_the_emulation_confines(profile: Path) -> None:
    """What a container forbids is forbidden: else the tests below would show nothing."""
    attempt = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
def tried(what):
    try:
        what()
    except OSError as error:
        return error.errno
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
print(json.dumps({
    "uid": os.getuid(),
    "capabilities": int(status["CapEff"], 16),
    "filtered": status["Seccomp"].strip(),
    "root": tried(lambda: open("/x", "w")),
    "tmp": tried(lambda: open("/tmp/x", "w")),
    "bpf": libc.syscall(321, 0, 0, 0),
    "pid": os.getpid(),
}))
"""
    found = contained(profile, "-c", attempt)
    assert found["uid"] > 2**16
    assert found["capabilities"] == 0
    assert found["filtered"] == "2"
    assert found["root"] == found["tmp"] == 30  # EROFS
    assert found["bpf"] == -1
    assert found["pid"] < 20


@pytest.mark.parametrize("privileges", [(), ("--no-new-privileges",)], ids=["plain", "nnp"])
def test_an_enclave_works_without_rights_home_or_a_file_to_write(
    profile: Path, script: str, privileges: tuple[str, ...]
) -> None:
    answer, bits, sealed = contained(profile, script, options=privileges)
    assert answer == 42
    assert sealed == "SealingError"  # the root is gone with the container: refused, not lost
    for name in ("seccomp", "no_new_privs", "landlock", "mdwe", "mappings", "dumpable_off"):
        assert bits[name], name
    # Podman's filter lets a user make namespaces, Docker's does not: the bits say which.
    assert {bits[name] for name in NAMESPACES} == {
        "containers" in str(profile) or "podman" in profile.name
    }


def test_with_a_volume_for_its_state_an_enclave_seals(
    profile: Path, script: str, open_folder: Path
) -> None:
    volume = open_folder / "state"
    volume.mkdir()
    options = (f"--writable={volume}", f"--state={volume}/pyenclave")
    _, _, sealed = contained(profile, script, options=options)
    assert sealed is True


def test_doctor_says_what_is_missing_and_how_to_add_it(profile: Path) -> None:
    report = contained(profile, "-m", "pyenclave", "doctor", "--json")
    missing = {item["missing"]: item["advice"] for item in report["remedies"]}
    assert "PYENCLAVE_STATE" in missing.pop("a root that stays")
    if not all(report["enclave"]["bits"][name]["value"] for name in NAMESPACES):
        advice = missing.pop(", ".join(NAMESPACES))
        assert "seccomp" in advice
        assert "docs/containers.md" in advice
    assert not missing


def test_the_profile_of_the_docs_gives_every_namespace(
    profile: Path, script: str, tmp_path: Path
) -> None:
    widen = re.search(r"```python\n(# widen.py.*?)```", PAGE.read_text(), re.DOTALL)
    assert widen is not None
    (tmp_path / "widen.py").write_text(widen[1])
    wider = tmp_path / "wider.json"
    with wider.open("w") as file:
        subprocess.run(
            [sys.executable, str(tmp_path / "widen.py"), str(profile)], stdout=file, check=True
        )
    _, bits, _ = contained(wider, script)
    assert all(bits[name] for name in NAMESPACES)
    # Nothing else was opened.
    before, after = json.loads(profile.read_text()), json.loads(wider.read_text())
    assert {key: after[key] for key in after if key != "syscalls"} == {
        key: before[key] for key in before if key != "syscalls"
    }


# ---- advice ------------------------------------------------------------------------------------

REPORT: dict[str, Any] = {
    "enclave": {"bits": {}},
    "memory_lock_limit": {"soft": 8 << 20},
    "platform": {"ephemeral": False},
}


def _advice(files: dict[str, str], container: str | None = None, **bits: bool) -> dict[str, str]:
    report = {**REPORT, "enclave": {"bits": {name: {"value": on} for name, on in bits.items()}}}
    found = remedies(report, read=files.get, container=container)
    return {item["missing"]: item["advice"] for item in found}


@pytest.mark.parametrize(
    ("files", "container", "word"),
    [
        ({"/proc/sys/user/max_user_namespaces": "0"}, None, "max_user_namespaces"),
        ({"/proc/sys/kernel/unprivileged_userns_clone": "0"}, None, "unprivileged_userns_clone"),
        ({"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"}, None, "AppArmor"),
        ({"/proc/self/status": "Seccomp:\t2"}, None, "seccomp="),
        ({}, "Docker", "seccomp="),
        ({"/proc/self/mountinfo": "1 2 0:5 / /proc rw - proc proc rw"}, None, "chroot"),
        ({"/proc/self/mountinfo": "1 2 0:5 / / rw - ext4 /dev/x rw"}, None, "log"),
        ({}, None, "log"),
    ],
)
def test_the_reason_for_missing_namespaces_is_looked_for(
    files: dict[str, str], container: str | None, word: str
) -> None:
    (advice,) = _advice(files, container, userns=False, netns=True).values()
    assert word in advice


@pytest.mark.parametrize(
    ("bit", "word"),
    [("landlock", "lsm="), ("mdwe", "6.3"), ("secretmem", "secretmem.enable"), ("locked", "limit")],
)
def test_each_missing_mechanism_has_a_remedy(bit: str, word: str) -> None:
    assert word in _advice({}, **{bit: False})[bit]
    assert _advice({}, **{bit: True}) == {}


def test_a_container_is_recognised_by_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert in_container(lambda path: False) is None
    assert in_container(lambda path: path == "/.dockerenv") == "Docker"
    assert in_container(lambda path: path == "/run/.containerenv") == "Podman"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert in_container(lambda path: False) == "Kubernetes"
