"""The example of docs/containers.md: what its files say, and its service in such a container."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINED = Path(__file__).with_name("contained.py")
EXAMPLE = ROOT / "examples" / "container"


def _dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (EXAMPLE / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_dockerfile_ends_without_compiler_root_or_shell_form() -> None:
    steps = _dockerfile()
    last = max(place for place, (word, _) in enumerate(steps) if word == "FROM")
    final = steps[last:]
    assert sum(word == "FROM" for word, _ in steps) == 2
    assert not any("gcc" in rest for _, rest in final)
    (user,) = [rest for word, rest in final if word == "USER"]
    assert user.split(":")[0].isdigit()
    assert int(user.split(":")[0]) > 0
    (command,) = [rest for word, rest in final if word == "CMD"]
    assert json.loads(command)[0] == "python"  # signals reach it: no shell in between


def test_what_the_dockerfile_copies_exists_and_builds_a_wheel() -> None:
    copied: set[str] = set()
    for word, rest in _dockerfile():
        if word == "COPY" and not rest.startswith("--from"):
            copied.update(rest.split()[:-1])
    for path in copied:
        assert (ROOT / path).exists(), path
    assert {"pyproject.toml", "setup.py", "csrc", "pyenclave"} <= copied


def test_the_manifest_is_what_kubernetes_takes_and_restricted_wants() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    documents = list(yaml.safe_load_all((EXAMPLE / "kubernetes.yaml").read_text()))
    pod = documents[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["args"] == json.loads(dict(_dockerfile())["CMD"])
    validate = pytest.importorskip("kubernetes_validate", reason="no schemas of Kubernetes here")
    for document in documents:
        validate.validate(document, validate.latest_version(), strict=True)


def test_the_service_runs_and_ends_as_an_orchestrator_wants(
    profile: Path, open_folder: Path
) -> None:
    tmp_path = open_folder
    for name in ("service.py", "scoring.py", "enclave.toml"):
        (tmp_path / name).write_bytes((EXAMPLE / name).read_bytes())
    image = tmp_path / "scoring.unsigned"
    build = [sys.executable, "-m", "pyenclave", "build", "enclave.toml", "-o", image.name]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "state").mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "PYENCLAVE_STATE": str(tmp_path / "state" / "pyenclave"),
        **{key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ},
    }
    options = ["--reach", os.path.realpath(sys.base_prefix), f"--writable={tmp_path}/state"]
    command = [sys.executable, str(tmp_path / "service.py"), str(image), "0"]
    service = subprocess.Popen(
        [sys.executable, CONTAINED, profile, "--no-new-privileges", *options, "--", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert service.stdout is not None
        line = service.stdout.readline()
        assert line.startswith("listening on "), service.communicate()[1]
        url = f"http://127.0.0.1:{line.split()[-1]}"
        with urllib.request.urlopen(f"{url}/score?income=4000&debt=1000", timeout=10) as answer:
            assert json.load(answer) == {"score": 0.75}
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{url}/score?income=much", timeout=10)
        # The engine signals the first process of the container, which is the service itself.
        (inner,) = _children(service.pid)
        os.kill(inner, signal.SIGTERM)
        service.wait(10)
        assert service.returncode == 0
    finally:
        service.kill()
        service.communicate()


def _children(pid: int) -> list[int]:
    return [int(item) for item in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
