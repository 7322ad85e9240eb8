"""
Real servers run the very files of docs/deploying.md; nothing of them is left behind.

gunicorn, uvicorn and Flask come with the extra ``integration``; celery and ipykernel are large and
belong to ``.ci/long``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyenclave._platform.client import PlatformClient

DOCS = Path(__file__).resolve().parents[2] / "docs" / "deploying.md"
FILES = dict(
    re.findall(r"<!-- file: ([\w.]+) -->\n```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
)


@pytest.fixture
def state(state: Path, used: Callable[[Path], Path]) -> Path:
    """One that was used before: the first start of all is not what is tried here."""
    return used(state)


def needs(*modules: str) -> Any:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture
def folder(state: Path, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the documentation's files and an image."""
    place = tmp_path / "service"
    place.mkdir()
    for name, text in FILES.items():
        (place / name).write_text(text)
    (place / "scoring.enclave").write_bytes(images.signed)
    monkeypatch.setenv("SCORING_IMAGE", str(place / "scoring.enclave"))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
    )
    monkeypatch.setenv("HOME", str(place))  # for what servers put there
    return place


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


class Server:
    """A server on a port of its own."""

    def __init__(self, folder: Path, port: int, *command: str) -> None:
        self.port = port
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [part.replace("PORT", str(self.port)) for part in command],
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def get(self, path: str) -> tuple[int, str]:
        try:
            url = f"http://127.0.0.1:{self.port}{path}"
            with urllib.request.urlopen(url, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def ready(self, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                self.get("/")
                return
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


@pytest.fixture
def serve(folder: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(*command: str) -> Server:
        made.append(Server(folder, free_port(), *command))
        return made[-1]

    yield start
    for server in made:
        server.end()


def children(pid: int, helpers: Any) -> list[int]:
    return [p.pid for p in helpers.descendants(pid) if p.parent == pid]


def check_serves(server: Server) -> None:
    for number in range(10):
        status, text = server.get(f"/double/{number}")
        assert (status, text) == (200, str(2 * number)), server.log.read_text()[-4000:]


GUNICORN = (sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:PORT", "--workers", "2")


@needs("gunicorn", "flask")
@pytest.mark.parametrize("preload", [True, False])
def test_gunicorn_with_the_documented_hooks(
    serve: Callable[..., Server], state: Path, helpers: Any, preload: bool
) -> None:
    """Each worker has an enclave of its own; a killed worker's ends and the next one gets one."""
    flags = ("--preload",) if preload else ()
    server = serve(*GUNICORN, *flags, "--config", "gunicorn.conf.py", "wsgi:app")
    server.ready()
    check_serves(server)
    with PlatformClient.connect(state, start=False) as platform:
        helpers.until(lambda: len(platform.list()) == 2, 20, "an enclave in each worker")
        first = {row.enclave_id for row in platform.list()}
        os.kill(children(server.process.pid, helpers)[0], signal.SIGKILL)
        helpers.until(
            lambda: len(ids := {row.enclave_id for row in platform.list()}) == 2 and ids != first,
            20,
            "the next worker's enclave",
        )
    check_serves(server)
    assert server.end() == 0


@needs("gunicorn", "flask")
def test_gunicorn_with_an_enclave_that_was_started_before_the_fork_says_what_to_do(
    serve: Callable[..., Server], folder: Path
) -> None:
    (folder / "gunicorn.conf.py").unlink()
    (folder / "enclaves.py").write_text(FILES["enclaves.py"] + "enclave.start()\n")
    server = serve(*GUNICORN, "--preload", "wsgi:app")
    server.ready()
    status, _ = server.get("/double/1")
    assert status == 500
    log = server.log.read_text()
    assert "EnclaveStateError" in log
    assert "not to a forked child" in log
    assert "docs/deploying.md" in log


@needs("gunicorn", "flask")
def test_gunicorn_without_preload_starts_at_import(
    serve: Callable[..., Server], folder: Path
) -> None:
    (folder / "gunicorn.conf.py").unlink()
    (folder / "enclaves.py").write_text(FILES["enclaves.py"] + "enclave.start()\n")
    server = serve(*GUNICORN, "wsgi:app")
    server.ready()
    check_serves(server)


@needs("gunicorn", "flask")
def test_gunicorn_with_a_lazy_handle(serve: Callable[..., Server], folder: Path) -> None:
    """Under --preload, with a call in the master as well: each process has its own."""
    (folder / "gunicorn.conf.py").unlink()
    (folder / "wsgi.py").write_text(
        FILES["wsgi.py"]
        .replace("from enclaves import enclave\n", "from lazily import enclave\n")
        .replace("enclave.double", "enclave().double")
        + "\nassert enclave().double(1) == 2\n"
    )
    server = serve(*GUNICORN, "--preload", "wsgi:app")
    server.ready()
    check_serves(server)


@needs("uvicorn", "starlette")
def test_uvicorn_with_two_workers(serve: Callable[..., Server], state: Path, helpers: Any) -> None:
    server = serve(
        sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", "PORT",
        "--workers", "2", "asgi:app",
    )  # fmt: skip
    server.ready()
    check_serves(server)
    with PlatformClient.connect(state, start=False) as platform:
        helpers.until(lambda: len(platform.list()) == 2, 20, "an enclave in each worker")
    server.end()


def test_a_pool_of_processes_as_documented(folder: Path) -> None:
    done = run_python(folder, "batch.py")
    assert done.stdout.strip() == str([2 * number for number in range(10)]), done.stderr[-3000:]


def test_the_supervisor_loop_as_documented(folder: Path) -> None:
    """The platform is killed between two calls: the second never began, and is repeated."""
    program = (
        "import os, signal, supervise\n"
        "from pyenclave._platform.client import PlatformClient\n"
        "for number in range(3):\n"
        "    assert supervise.score(number) == 2 * number\n"
        "    pid = supervise._enclave.info.pid\n"
        "    fd = os.pidfd_open(pid)\n"
        "    with PlatformClient.connect(start=False) as client:\n"
        "        os.kill(client.hello.pid, signal.SIGKILL)\n"
        "    __import__('select').select([fd], [], [], 30)\n"
        "assert supervise.score(21) == 42\n"
        "print('recovered')\n"
    )
    done = run_python(folder, "-c", program)
    assert done.stdout.strip() == "recovered", done.stderr[-3000:]


# ---- large: .ci/long ----------------------------------------------------------------------------


@pytest.mark.long
@needs("celery")
def test_celery_with_its_prefork_pool(
    folder: Path, monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    """The filesystem broker needs no server."""
    for name in ("queue", "results"):
        (folder / name).mkdir()
    monkeypatch.setenv("BROKER", "filesystem://")
    monkeypatch.setenv("BACKEND", f"file://{folder}/results")
    monkeypatch.setenv("QUEUE", str(folder / "queue"))
    monkeypatch.setenv("C_FORCE_ROOT", "1")
    with (folder / "celery.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "--app", "tasks", "worker", "--pool", "prefork",
             "--concurrency", "2", "--without-gossip", "--without-mingle", "--loglevel", "INFO"],
            cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip
    client = (
        "from tasks import double\n"
        "waiting = [double.delay(number) for number in range(10)]\n"
        "print([one.get(timeout=30) for one in waiting])\n"
    )
    try:
        done = run_python(folder, "-c", client)
        log_text = (folder / "celery.log").read_text()
        assert done.stdout.strip() == str([2 * number for number in range(10)]), (
            done.stderr[-2000:] + log_text[-3000:]
        )
        with PlatformClient.connect(state, start=False) as platform:
            assert len(platform.list()) == 2
    finally:
        worker.terminate()
        worker.wait(30)


KERNEL = """
import os, sys
from jupyter_client.manager import start_new_kernel

def run(client, code):
    answers = []
    def hook(message):
        content = message["content"]
        if message["msg_type"] == "stream": answers.append(content["text"])
        if message["msg_type"] == "error": answers.append(content["ename"])
    client.execute_interactive(code, output_hook=hook, timeout=40)
    return "".join(answers).strip()

start = '''
import os, pyenclave
enclave = pyenclave.Enclave(os.environ["SCORING_IMAGE"], quiet=True).start()
print(enclave.double(21))
'''
manager, client = start_new_kernel(kernel_name="python3")
assert run(client, start) == "42"
client.execute("enclave.nap(60.0)")  # a call is under way when the kernel is restarted
manager.restart_kernel(now=True)
client.wait_for_ready(timeout=40)
assert run(client, "enclave") == "NameError"
assert run(client, start) == "42"
manager.shutdown_kernel(now=True)
print("restarted")
"""


@pytest.mark.long
@needs("ipykernel", "jupyter_client")
def test_a_notebooks_kernel_is_restarted_during_a_call(folder: Path) -> None:
    done = run_python(folder, "-c", KERNEL)
    assert done.stdout.strip() == "restarted", done.stderr[-3000:]


REPL = """
import os, sys, pyenclave
enclave = pyenclave.Enclave(os.environ["SCORING_IMAGE"], quiet=True).start()
print(enclave.double(21), flush=True)
enclave.nap(60.0)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interpreter_that_is_restarted_during_a_call_leaves_nothing(
    folder: Path, state: Path, helpers: Any, how: int
) -> None:
    """What a notebook's restart does, without a notebook."""
    with PlatformClient.connect(state) as platform:
        for _ in range(2):
            repl = subprocess.Popen(
                [sys.executable, "-c", REPL],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert repl.stdout is not None
            assert repl.stdout.readline() == "42\n"
            (row,) = platform.list()
            worker = os.pidfd_open(row.pid)
            repl.send_signal(how)
            repl.communicate(timeout=60)
            helpers.until(lambda: platform.list() == (), 2, "its enclave ends")
            os.close(worker)
