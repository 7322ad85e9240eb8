"""
A service under load and under attack: ``python soak.py [--seconds N] [--no-kills] [--json]``.

Four uvicorn workers of examples/fastapi_app, each with a pool of two enclaves, answer wrk. Every
two seconds something is killed with SIGKILL: an enclave's worker, the platform, or a process of
the service. After each the service must answer 200 again; how long that took is noted. At the end
nothing may be left: no process, and no more memory or descriptors than after the first seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fastapi_app"
WORKERS = 4
BODY = json.dumps({"income": 4000, "debt": 1000})
SCRIPT = f"""
wrk.method = "POST"
wrk.body = '{BODY}'
wrk.headers["Content-Type"] = "application/json"
local seen = {{}}
local threads = {{}}
function setup(thread) table.insert(threads, thread) end
function init() counts = "" ; table_of = {{}} end
function response(status)
  table_of[status] = (table_of[status] or 0) + 1
  local parts = {{}}
  for key, value in pairs(table_of) do table.insert(parts, key .. "=" .. value) end
  counts = table.concat(parts, " ")
end
function done(summary, latency, requests)
  for _, thread in ipairs(threads) do io.write("STATUS " .. thread:get("counts") .. "\\n") end
  io.write(string.format("P50 %f\\nP99 %f\\n", latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass
class Process:
    """One line of /proc."""

    pid: int
    parent: int
    kind: str  # service, platform, zygote or worker


@dataclass
class Found:
    """What the run showed."""

    seconds: float = 0.0
    requests: int = 0
    per_second: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    recovery_s: list[float] = field(default_factory=list)
    recovery_by_kind: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read().replace(b"\0", b" ").decode("utf-8", "replace")
    return ""


def processes(mark: str) -> list[Process]:
    """Find the service's processes and those of its platform, by the run's state directory."""
    everything: dict[int, tuple[int, str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            status = _read(f"/proc/{name}/stat")
            if status and ") Z" not in status:
                parent = int(status.rpartition(")")[2].split()[1])
                everything[int(name)] = (parent, _read(f"/proc/{name}/cmdline"))
    found = []
    for pid, (parent, command) in everything.items():
        if "pyenclave._platform.main" in command and mark in command:
            found.append(Process(pid, parent, "platform"))
        elif "uvicorn" in command and mark in command:
            found.append(Process(pid, parent, "service"))
    platforms = {one.pid for one in found if one.kind == "platform"}
    services = {one.pid for one in found if one.kind == "service"}
    for pid, (parent, command) in everything.items():
        if parent in platforms and "boot.py" in command:
            found.append(Process(pid, parent, "zygote"))
        elif parent in services and "spawn_main" in command:
            found.append(Process(pid, parent, "service"))
    zygotes = {one.pid for one in found if one.kind == "zygote"}
    for pid, (parent, _) in everything.items():
        if parent in zygotes:
            found.append(Process(pid, parent, "worker"))
    return found


def totals(mark: str) -> dict[str, int]:
    """Count processes, descriptors and proportional memory (KiB) of the whole."""
    here = processes(mark)
    memory = descriptors = 0
    for one in here:
        for line in _read(f"/proc/{one.pid}/smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                memory += int(line.split()[1])
        with contextlib.suppress(OSError):
            descriptors += len(os.listdir(f"/proc/{one.pid}/fd"))
    return {"processes": len(here), "descriptors": descriptors, "memory_kib": memory}


def once(port: int) -> bool:
    """Whether one request on a new connection is answered by 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("POST", "/score", BODY, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def recovered(port: int, limit: float = 30) -> float:
    """Return how long it takes until 8 requests in a row are answered by 200."""
    start, good, since = time.monotonic(), 0, 0.0
    while time.monotonic() - start < limit:
        if once(port):
            since = since if good else time.monotonic()
            good += 1
            if good == 8:
                return since - start
        else:
            good = 0
            time.sleep(0.01)
    return limit


def kill_one(mark: str, kinds: list[str]) -> str:
    """Kill a random process of one of *kinds*; return which."""
    here = processes(mark)
    random.shuffle(kinds)
    for kind in kinds:
        those = [one for one in here if one.kind == kind]
        if kind == "service":  # not the supervisor, whose work it is to replace the others
            oldest = min((one.pid for one in those), default=0)
            those = [one for one in those if one.pid != oldest]
        if those:
            with contextlib.suppress(ProcessLookupError):
                os.kill(random.choice(those).pid, signal.SIGKILL)
            return kind
    return "nothing"


def soak(seconds: float, *, kills: bool, connections: int = 32) -> Found:
    """Run the whole and return what was found."""
    found = Found(seconds=seconds)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        script = Path(folder, "wrk.lua")
        script.write_text(SCRIPT)
        log = Path(folder, "service.log").open("wb")  # noqa: SIM115 - closed below
        service = subprocess.Popen(
            [
                *(sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)),
                *("--workers", str(WORKERS), "--log-level", "warning", "--no-access-log"),
                *("--app-dir", str(EXAMPLE), "--header", f"x-run:{folder}"),
            ],
            env={**os.environ, "PYENCLAVE_STATE": folder + "/state"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            if recovered(port, 60) >= 60:
                raise SystemExit(Path(folder, "service.log").read_text())
            time.sleep(2)
            _load(found, port, script, folder, connections, kills=kills)
        finally:
            service.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.wait(15)
            deadline = time.monotonic() + 10
            while processes(folder) and time.monotonic() < deadline:
                time.sleep(0.1)
            found.left = [f"{one.kind} {one.pid}" for one in processes(folder)]
            with contextlib.suppress(ProcessLookupError):
                os.killpg(service.pid, signal.SIGKILL)
            log.close()
    return found


def _load(
    found: Found, port: int, script: Path, mark: str, connections: int, *, kills: bool
) -> None:
    wrk = shutil.which("wrk")
    if wrk is None:
        raise SystemExit("wrk is not installed")
    warm = [wrk, "-t1", f"-c{connections}", "-d3s", "-s", str(script)]
    subprocess.run([*warm, f"http://127.0.0.1:{port}/score"], check=True, capture_output=True)
    time.sleep(1)
    found.first = totals(mark)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(2):
            kind = kill_one(mark, ["worker", "worker", "platform", "service"])
            found.kills[kind] = found.kills.get(kind, 0) + 1
            seconds = round(recovered(port), 3)
            found.recovery_s.append(seconds)
            found.recovery_by_kind.setdefault(kind, []).append(seconds)
            print(f"killed {kind}: answered again after {seconds:.3f} s", file=sys.stderr)

    thread = threading.Thread(target=disturb)
    if kills:
        thread.start()
    command = [wrk, "-t1", f"-c{connections}", f"-d{found.seconds:.0f}s", "--timeout", "10s"]
    done = subprocess.run(
        [*command, "-s", str(script), f"http://127.0.0.1:{port}/score"],
        check=True,
        capture_output=True,
        text=True,
    )
    stop.set()
    if kills:
        thread.join()
    recovered(port)
    time.sleep(2)
    found.last = totals(mark)
    found.requests = int(re.search(r"(\d+) requests in", done.stdout)[1])  # type: ignore[index]
    found.per_second = float(re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)[1])  # type: ignore[index]
    found.p50_ms = float(re.search(r"P50 ([\d.]+)", done.stdout)[1]) / 1000  # type: ignore[index]
    found.p99_ms = float(re.search(r"P99 ([\d.]+)", done.stdout)[1]) / 1000  # type: ignore[index]
    for status, count in re.findall(r"(\d{3})=(\d+)", done.stdout):
        found.statuses[status] = found.statuses.get(status, 0) + int(count)


def summary(seconds: list[float]) -> dict[str, float]:
    """Return how often, the median and the worst."""
    if not seconds:
        return {"times": 0}
    return {
        "times": len(seconds),
        "median": statistics.median(seconds),
        "worst": max(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--no-kills", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    found = soak(options.seconds, kills=not options.no_kills)
    result: dict[str, Any] = dict(vars(found))
    result["recovery_s"] = summary(found.recovery_s)
    result["recovery_by_kind"] = {
        kind: summary(seconds) for kind, seconds in sorted(found.recovery_by_kind.items())
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
