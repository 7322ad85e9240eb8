"""A PostgreSQL server of the tests' own, for every service."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def _tools() -> Path | None:
    """Return the folder of the newest initdb and postgres."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    on_path = shutil.which("initdb")
    candidates = [
        *(path.parent for path in reversed(found)),
        *([Path(on_path).parent] if on_path else []),
    ]
    return next((path for path in candidates if (path / "postgres").exists()), None)


class Postgres:
    """A server in a folder of its own, on a Unix socket; an ordinary user runs it."""

    def __init__(self, tools: Path) -> None:
        self.tools = tools
        self.folder = Path(tempfile.mkdtemp(prefix="pg.", dir="/tmp"))
        self.user: dict[str, object] = {}
        if os.geteuid() == 0:  # the server refuses root
            names = ("postgres", "nobody")
            entry = next(
                e for n in names if (e := next((u for u in pwd.getpwall() if u.pw_name == n), None))
            )
            self.user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        self.folder.chmod(0o755)
        self.process: subprocess.Popen[bytes] | None = None
        self.count = 0
        self._run(
            "initdb",
            "-D",
            "data",
            "-A",
            "trust",
            "-U",
            "pyenclave",
            "--no-sync",
            "--wal-segsize=1",
            "-E",
            "UTF8",
            "--locale=C",
        )
        self.start()

    def _run(self, tool: str, *arguments: str) -> None:
        subprocess.run(
            [self.tools / tool, *arguments],
            cwd=self.folder,
            check=True,
            capture_output=True,
            timeout=60,
            **self.user,  # type: ignore[call-overload]
        )

    def _begin(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            options = [
                f"unix_socket_directories={self.folder}",
                "listen_addresses=",
                "fsync=off",
                "full_page_writes=off",
                "max_connections=40",
                "shared_buffers=16MB",
                "min_wal_size=2MB",
            ]
            return subprocess.Popen(
                [self.tools / "postgres", "-D", "data", *(f"-c{option}" for option in options)],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **self.user,  # type: ignore[call-overload]
            )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        psycopg = pytest.importorskip("psycopg")
        self.process = self._begin()
        give_up = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.dsn("postgres")).close()
            except psycopg.OperationalError:
                if time.monotonic() > give_up:
                    raise RuntimeError((self.folder / "log").read_text("utf-8")) from None
                if self.process.poll() is not None:  # one that was killed has not gone whole
                    self.process = self._begin()
                time.sleep(0.05)
            else:
                return

    def end(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """End it: SIGINT orderly, SIGQUIT at once, SIGKILL as a crash."""
        if self.process is not None:
            pids = [self.process.pid]
            if how == signal.SIGKILL:  # its children notice, but not at once
                children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children")
                pids += [int(pid) for pid in children.read_text("ascii").split()]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
            self.process.wait(30)
            self.process = None

    def dsn(self, database: str) -> str:
        return f"host={self.folder} user=pyenclave dbname={database}"

    def url(self, database: str) -> str:
        return f"postgresql://pyenclave@/{database}?host={self.folder}"

    def fresh(self) -> str:
        """Make an empty database and return its URL."""
        import psycopg

        self.count += 1
        name = f"test{os.getpid()}_{self.count}"
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
        return self.url(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server; ``postgres.fresh()`` gives the URL of an empty database."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra postgres)")
    tools = _tools()
    if tools is None:
        pytest.skip("no PostgreSQL server programs (apt-get install postgresql)")
    server = Postgres(tools)
    try:
        yield server
    finally:
        server.end()
        shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """URL of an empty PostgreSQL database."""
    return postgres.fresh()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/services.db"
    url: str = request.getfixturevalue("postgres_url")
    return url
