"""Many enclaves alive at once: time, memory of each, and whether everything is given back."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from pyenclave._platform.client import PlatformClient
from pyenclave.host import Enclave
from pyenclave.image.build import build_script


def pss(pid: int) -> int:
    """Return a process's proportional set size in KiB; shared pages count for their share."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0  # production workers show it to nobody but root
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def available() -> int:
    """Return MemAvailable in KiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    raise AssertionError("no MemAvailable")


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alive(count: int) -> None:
    """Hold *count* enclaves at once, call each, and end them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 4 * count + 256)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    script = Path(__file__).resolve().parents[2] / "pyenclave" / "benchmarks" / "_echo.py"
    image = build_script(str(script))
    with tempfile.TemporaryDirectory(prefix="pyenclave-many-") as folder:
        first = Enclave(image, state=folder, quiet=True).start()
        client = PlatformClient.connect(folder)
        platform = client.hello.pid
        before, fds, tasks, own = (
            available(),
            descriptors(platform),
            threads(platform),
            descriptors(os.getpid()),
        )
        begun = time.monotonic()
        enclaves, slow = [first], 0.0
        for number in range(1, count):
            at = time.monotonic()
            enclaves.append(Enclave(image, state=folder, quiet=True).start())
            slow = max(slow, time.monotonic() - at)
            if number % 100 == 0:
                print(f"{number}: {time.monotonic() - begun:.1f} s", flush=True)
        seconds = time.monotonic() - begun
        for number, enclave in enumerate(enclaves):
            if enclave.call("add", number, 1.0) != number + 1.0:
                raise AssertionError("a wrong answer")
        if len(client.list()) != count:
            raise AssertionError(f"{len(client.list())} of {count} are listed")
        used = before - available()
        sample = [pss(enclave.info.pid) for enclave in enclaves[:: max(1, count // 50)]]
        pids = [enclave.info.pid for enclave in enclaves]
        busy = sum(map(cpu, pids))
        time.sleep(5)
        busy = (sum(map(cpu, pids)) - busy) / 5
        print(
            f"{count} enclaves in {seconds:.1f} s ({1e3 * seconds / count:.1f} ms each, the "
            f"slowest {1e3 * slow:.0f} ms)\n"
            f"memory: PSS of a worker {statistics.median(sample) / 1024:.2f} MiB (median), "
            f"{used / 1024 / count:.2f} MiB less available for each, the kernel's part included\n"
            f"platform: PSS {pss(platform) / 1024:.1f} MiB, "
            f"{(threads(platform) - tasks) / count:.2f} threads and "
            f"{(descriptors(platform) - fds) / count:.2f} descriptors for each; "
            f"host: {(descriptors(os.getpid()) - own) / count:.2f} descriptors for each\n"
            f"idle, they take {100 * busy:.1f} % of one processor",
            flush=True,
        )
        begun = time.monotonic()
        for enclave in enclaves[1:]:
            enclave.close()
        print(f"closed in {time.monotonic() - begun:.1f} s", flush=True)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and descriptors(platform) > fds + 16:
            time.sleep(0.1)
        left = descriptors(platform) - fds, threads(platform) - tasks
        first.close()
        client.close()
        if left[0] > 16 or left[1] > 8:
            raise AssertionError(f"{left[0]} descriptors and {left[1]} threads are left")


def launches(count: int) -> None:
    """Launch and end *count* enclaves one after the other; nothing may grow."""
    script = Path(__file__).resolve().parents[2] / "pyenclave" / "benchmarks" / "_echo.py"
    image = build_script(str(script))
    with (
        tempfile.TemporaryDirectory(prefix="pyenclave-many-") as folder,
        Enclave(image, state=folder, quiet=True),
        PlatformClient.connect(folder) as client,
    ):
        platform = client.hello.pid
        marks = []
        for number in range(count + 1):
            with Enclave(image, state=folder, quiet=True) as enclave:
                if enclave.call("add", number, 1.0) != number + 1.0:
                    raise AssertionError("a wrong answer")
            if number in (count // 10, count):
                time.sleep(1)
                marks.append(
                    {
                        "platform": (descriptors(platform), threads(platform), pss(platform)),
                        "host": (
                            descriptors(os.getpid()),
                            threads(os.getpid()),
                            pss(os.getpid()),
                        ),
                    }
                )
                print(number, marks[-1], flush=True)
        for who in ("platform", "host"):
            early, late = marks[0][who], marks[-1][who]
            if late[0] > early[0] + 8 or late[1] > early[1] + 4:
                raise AssertionError(f"{who}: descriptors or threads grew: {early} {late}")
            if late[2] > early[2] * 1.15 + 4096:
                raise AssertionError(f"{who}: memory grew: {early[2]} KiB to {late[2]} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alive", type=int, default=0)
    parser.add_argument("--launches", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.alive:
        alive(chosen.alive)
    if chosen.launches:
        launches(chosen.launches)


if __name__ == "__main__":
    sys.exit(main())
