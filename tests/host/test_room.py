"""Pools that are larger than anything they could run on."""

from __future__ import annotations

import asyncio
import resource

import pytest

from pyenclave import AsyncEnclavePool, EnclavePool
from pyenclave.errors import LaunchError
from pyenclave.host import _room
from pyenclave.host._limits import Limits

MANY = 10**6


def test_a_pool_of_a_million_is_refused_before_its_first_launch(pool_image, pool_state) -> None:
    for pool in (
        EnclavePool(pool_image, size=MANY, state=pool_state, quiet=True),
        EnclavePool(pool_image, size=1, max_size=MANY, state=pool_state, quiet=True),
    ):
        with pytest.raises(LaunchError, match="no room for so many enclaves") as caught:
            pool.start()
        assert caught.value.expected.startswith("at most ")
        assert caught.value.found == MANY
        assert pool.stats.launched == 0
        assert pool.stats.state == "closed"


def test_so_is_one_for_a_loop(pool_image, pool_state) -> None:
    async def body() -> None:
        pool = AsyncEnclavePool(pool_image, size=MANY, state=pool_state, quiet=True)
        with pytest.raises(LaunchError, match=r"size of the pool: .* no room"):
            await pool.start()
        assert pool.stats.launched == 0

    asyncio.run(body())


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with room for ten thousand, whose files the test changes."""
    files = {
        "proc/sys/kernel/pid_max": "32768\n",
        "proc/sys/kernel/threads-max": "192730\n",
        "proc/meminfo": "MemTotal: 67108864 kB\nMemFree: 1 kB\nSwapTotal: 0 kB\n",
        "proc/self/cgroup": "0::/user.slice/app.service\n",
        "sys/fs/cgroup/user.slice/pids.max": "max\n",
        "sys/fs/cgroup/user.slice/app.service/pids.max": "max\n",
        "sys/fs/cgroup/user.slice/app.service/memory.max": "max\n",
    }

    def write(**changed: str) -> None:
        for name, text in (files | changed).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    limits = {
        resource.RLIMIT_NOFILE: resource.RLIM_INFINITY,
        resource.RLIMIT_NPROC: resource.RLIM_INFINITY,
    }
    monkeypatch.setattr(_room.resource, "getrlimit", lambda kind: (limits[kind], -1))
    monkeypatch.setattr(_room.os, "getuid", lambda: 1000)

    class Machine:
        root = tmp_path
        set = staticmethod(write)

        def limit(self, kind: int, value: int) -> None:
            limits[kind] = value

        def check(self, size: int, lanes: int = 1) -> None:
            limits = Limits(size=size, max_size=size)
            _room.check(limits, lanes, tmp_path / "state", root=tmp_path)

    write()
    return Machine()


def refused(machine, fit: int, match: str, *, lanes: int = 1) -> None:
    machine.check(fit, lanes)
    with pytest.raises(LaunchError, match=match) as caught:
        machine.check(fit + 1, lanes)
    assert caught.value.expected == f"at most {fit}"
    assert caught.value.found == fit + 1


def test_the_most_of_a_platform(machine) -> None:
    refused(machine, 2048, "max_enclaves of launch-policy.toml is 2048")


def test_the_most_of_a_launch_policy(machine) -> None:
    (machine.root / "state").mkdir(mode=0o700)
    policy = machine.root / "state" / "launch-policy.toml"
    policy.touch(mode=0o600)
    policy.write_text("max_enclaves = 7\n")
    refused(machine, 7, "max_enclaves of launch-policy.toml is 7")
    policy.write_text("max_enclaves = oh\n")  # the platform's to refuse, at the first launch
    machine.check(8)


def test_open_files(machine) -> None:
    machine.limit(resource.RLIMIT_NOFILE, 64)
    refused(machine, 32, "RLIMIT_NOFILE, ulimit -n. is 64, of which an enclave takes 2")


def test_threads_of_the_user_but_not_of_root(machine, monkeypatch) -> None:
    machine.limit(resource.RLIMIT_NPROC, 100)
    refused(machine, 33, "RLIMIT_NPROC, ulimit -u. is 100, of which an enclave takes 3")
    refused(machine, 16, "RLIMIT_NPROC", lanes=4)
    monkeypatch.setattr(_room.os, "getuid", lambda: 0)
    machine.check(34)


@pytest.mark.parametrize("name", ["pid_max", "threads-max"])
def test_threads_of_the_machine(machine, name) -> None:
    machine.set(**{f"proc/sys/kernel/{name}": "300\n"})
    refused(machine, 100, f"kernel.{name}. is 300")


def test_memory_of_the_machine_with_its_swap(machine) -> None:
    machine.set(**{"proc/meminfo": "MemTotal: 524288 kB\nSwapTotal: 92160 kB\n"})
    refused(machine, 100, "the machine's memory with swap in bytes is ")


@pytest.mark.parametrize(
    ("group", "file", "text", "fit"),
    [
        ("user.slice/app.service", "pids.max", "12\n", 4),
        ("user.slice", "pids.max", "30\n", 10),
        ("", "memory.max", f"{60 << 20}\n", 10),  # as a container sees its own
    ],
)
def test_a_control_group_and_those_above_it(machine, group, file, text, fit) -> None:
    machine.set(**{f"sys/fs/cgroup/{group}/{file}": text})
    refused(machine, fit, f"{file} of its control group")


def test_control_groups_of_the_first_version(machine) -> None:
    machine.set(
        **{
            "proc/self/cgroup": "8:pids:/a/b\n4:memory:/elsewhere\n1:cpu,cpuacct:/\n0::/\n",
            "sys/fs/cgroup/pids/a/pids.max": "30\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{120 << 20}\n",
        }
    )
    refused(machine, 10, "pids.max of its control group")


def test_nothing_is_refused_for_what_cannot_be_read(machine) -> None:
    machine.set(
        **{
            "proc/meminfo": "MemTotal: what\n",
            "proc/self/cgroup": "0::/../../other\nno group\n",
            "proc/sys/kernel/pid_max": "",
        }
    )
    machine.check(2048)
