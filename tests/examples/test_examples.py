"""Each program of examples/, run as its first lines say."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyenclave

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCORE = pytest.approx(0.7310585)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Copy an example somewhere else: it needs nothing of the checkout."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # as a user has it

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
        return folder

    return copy


@contextlib.contextmanager
def serving(folder: Path, *command: str, ready: str) -> Iterator[subprocess.Popen[str]]:
    """Run a server until the block ends; it must say *ready*, and end by itself at SIGTERM."""
    server = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = []
    try:
        assert server.stdout is not None
        for line in server.stdout:
            said.append(line)
            if ready in line:
                break
        else:
            pytest.fail("".join(said))
        server.said = said  # type: ignore[attr-defined]
        yield server
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate(timeout=60)
        assert server.returncode in (0, -signal.SIGTERM), rest
        assert "Traceback" not in rest
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def ask(url: str, body: dict[str, float] | None = None) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)  # it says that it listens a little before it does
    pytest.fail(f"no answer from {url}")


def check_scores(url: str) -> None:
    status, body = ask(f"{url}/score?income=4000&debt=1000")
    assert status == 200, body
    assert json.loads(body)["score"] == SCORE
    assert ask(f"{url}/score?income=0&debt=1")[0] in (422, 503)
    assert ask(f"{url}/score?income=much")[0] == 400


def test_fastapi(here: Callable[[str], Path], free_port: Callable[[], int]) -> None:
    for name in ("fastapi", "uvicorn", "httpx"):
        pytest.importorskip(name)
    folder = here("fastapi_app")
    port = free_port()
    command = ("-m", "uvicorn", "app:app", "--port", str(port))
    with serving(folder, *command, ready="startup complete"):
        url = f"http://127.0.0.1:{port}"
        status, body = ask(f"{url}/score", {"income": 4000, "debt": 1000})
        assert status == 200, body
        assert json.loads(body)["score"] == SCORE
        status, body = ask(f"{url}/score", {"income": 0, "debt": 1000})
        assert (status, b"income must be above 0" in body) == (422, True)
        assert b"pyenclave_calls_total" in ask(f"{url}/metrics")[1]


def test_the_tests_of_the_fastapi_app(here: Callable[[str], Path]) -> None:
    for name in ("fastapi", "httpx"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_app.py"]
    done = subprocess.run(
        command, cwd=here("fastapi_app"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_evidence_middleware(here: Callable[[str], Path], free_port: Callable[[], int]) -> None:
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name)
    port, nonce = free_port(), os.urandom(32)
    command = ("-m", "uvicorn", "app:app", "--port", str(port))
    with serving(here("evidence_middleware"), *command, ready="startup complete"):
        url = f"http://127.0.0.1:{port}/.well-known/pyenclave/evidence"
        status, evidence = ask(f"{url}?nonce={nonce.hex()}")
        assert status == 200
        for wrong in ("", "?nonce=00", "?nonce=zz" + 32 * "00", "?nonce=" + 65 * "00"):
            assert ask(url + wrong)[0] == 400
        policy = pyenclave.AppraisalPolicy.any_code(dangerous_allow_software=True, allow_debug=True)
        roots = [pyenclave.local_platform_root()]
        result = pyenclave.verify(evidence, policy=policy, nonce=nonce, roots=roots)
        assert result.fresh
        with pytest.raises(pyenclave.errors.AppraisalError, match="nonce"):
            pyenclave.verify(evidence, policy=policy, nonce=bytes(32), roots=roots)


def test_django(here: Callable[[str], Path]) -> None:
    pytest.importorskip("django")
    with serving(here("django_view"), "app.py", "0", ready="listening on") as server:
        port = server.said[-1].split()[-1]  # type: ignore[attr-defined]
        check_scores(f"http://127.0.0.1:{port}")


def test_flask_under_gunicorn(here: Callable[[str], Path], free_port: Callable[[], int]) -> None:
    pytest.importorskip("flask")
    pytest.importorskip("gunicorn")
    port = free_port()
    command = ("-m", "gunicorn", "--config", "gunicorn.conf.py", "-b", f"127.0.0.1:{port}")
    with serving(here("flask_gunicorn"), *command, "app:app", ready="Booting worker"):
        check_scores(f"http://127.0.0.1:{port}")


def test_asyncio_service(here: Callable[[str], Path]) -> None:
    with serving(here("asyncio_service"), "service.py", "0", ready="listening on") as server:
        port = int(server.said[-1].split()[-1])  # type: ignore[attr-defined]
        with socket.create_connection(("127.0.0.1", port), 20) as sock, sock.makefile("rb") as file:
            for line, key in (
                (b'{"income": 4000, "debt": 1000}', "score"),
                (b'{"income": 0, "debt": 1000}', "error"),
                (b"nonsense", "error"),
            ):
                sock.sendall(line + b"\n")
                assert key in json.loads(file.readline())


def test_parquet_batch(here: Callable[[str], Path]) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("tqdm")
    folder = here("parquet_batch")
    rows = 200_000
    columns = {
        "income": pa.array([4000.0] * rows),
        "debt": pa.array([float(i % 4000) for i in range(rows)]),
    }
    pq.write_table(pa.table(columns), folder / "in.parquet")
    command = [sys.executable, "batch.py", "in.parquet", "out.parquet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "200000 rows scored\n"
    scores = pq.read_table(folder / "out.parquet")["score"]
    assert len(scores) == rows
    assert scores[1000].as_py() == SCORE
    assert not (folder / "out.parquet.part").exists()


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("sealed_files/plain.py", "pandas"),
        ("sealed_files/sealed.py", "pandas"),
        ("parquet_batch/batch.py", "pyarrow"),
        ("container/service.py", ""),
    ],
)
def test_without_its_argument_an_example_says_what_it_wants(name: str, needs: str) -> None:
    """What somebody types first."""
    if needs:
        pytest.importorskip(needs)
    for more in ([], ["1", "2", "3", "4"]):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *more],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: python ")
        assert len(done.stderr.splitlines()) == 1


def test_native_library(here: Callable[[str], Path]) -> None:
    folder = here("native_library")
    subprocess.run(
        ["make", f"PYTHON={sys.executable}"], cwd=folder, check=True, capture_output=True
    )
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=folder, check=True, capture_output=True, text=True
    )
    assert done.stdout == "[0.73105858]\n"


@pytest.mark.long
def test_key_release(
    here: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=here("key_release"),
        check=False,
        capture_output=True,
        text=True,
    )
    said = ["longest name: 5", "another image: release.refused, Forbidden"]
    assert done.stdout.splitlines() == said, done.stderr


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "package", "said"),
    [("sklearn_model", "sklearn", "accuracy 0.99"), ("torch_model", "torch", "accuracy 1.0")],
)
def test_models(here: Callable[[str], Path], name: str, package: str, said: str) -> None:
    pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "model.py"], cwd=here(name), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
