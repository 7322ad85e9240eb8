"""The pytest plugin: what docs/testing.md shows runs, and who does not use it pays nothing."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest

import pyenclave
from pyenclave import errors, trusted
from pyenclave.testing import plugin
from pyenclave.testing.clock import Clock
from pyenclave.testing.fake import AsyncFakeEnclave, FakeEnclave
from pyenclave.testing.hosts import HostileHost, Loss, poison
from pyenclave.testing.places import EnclavePlatform, image_of

ROOT = Path(__file__).resolve().parents[2]
FILES = re.compile(r"<!-- file: ([\w.]+) -->\n```python\n(.*?)```", re.DOTALL)
# An installed package's plugin is found by pytest itself.
INSTALLED = any(entry.name == "pyenclave" for entry in entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "pyenclave.testing.plugin")

ENTRY = """
import time

import pyenclave
from pyenclave import trusted


@pyenclave.ocall
def ask(question: str) -> str: ...


@trusted.on_start
def begin() -> None:
    global answer
    answer = 42


@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x


@pyenclave.ecall
def asks(question: str) -> str:
    return ask(question) + "!"


@pyenclave.ecall
def loaded() -> int:
    return answer


@pyenclave.ecall
def fail() -> int:
    raise ValueError("secret text")


@pyenclave.ecall
def nap(seconds: float) -> int:
    time.sleep(seconds)
    return 1


@pyenclave.ecall
def count() -> int:
    return trusted.Counter.create().increment()


@pyenclave.ecall
def report() -> bool:
    made = trusted.report(trusted.target_info(), b"data")
    return trusted.verify_report(made).report_data[:4] == b"data"
"""
PLAIN = "import pyenclave\n\n\n@pyenclave.ecall\ndef double(x: int) -> int:\n    return 2 * x\n"


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_examples_of_the_documentation_pass(tmp_path: Path) -> None:
    files = dict(FILES.findall((ROOT / "docs" / "testing.md").read_text("utf-8")))
    assert set(files) == {"scoring.py", "service.py", "test_service.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = run_pytest(tmp_path, *PLUGIN, "-W", "error")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{files['test_service.py'].count('def test_')} passed" in done.stdout


def test_a_project_that_does_not_use_it_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n\n\ndef test_nothing():\n"
        "    heavy = ('pyenclave.host', 'pyenclave._core', 'pyenclave.errors', 'numpy',\n"
        "             'cryptography', 'msgspec', 'multiprocessing')\n"
        "    assert 'pyenclave.testing.plugin' in sys.modules\n"
        "    assert [name for name in heavy if name in sys.modules] == []\n"
    )
    done = run_pytest(tmp_path, *PLUGIN, "-W", "error")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_the_plugin_is_registered() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert '[project.entry-points.pytest11]\npyenclave = "pyenclave.testing.plugin"' in text


def test_every_fixture_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "testing.md").read_text("utf-8")
    names = [
        name
        for name, value in vars(plugin).items()
        if not name.startswith("_") and "fixture" in type(value).__name__.lower()
    ]
    assert len(names) >= 9
    for name in names:
        assert f"| `{name}" in text, name


# ---- the fake ------------------------------------------------------------------------------------


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    path = tmp_path / "patient.py"
    path.write_text(ENTRY)
    return path


def test_a_fake_says_loudly_that_it_is_none(entry: Path) -> None:
    with FakeEnclave(entry, ocalls={"ask": str.upper}) as fake:
        assert "no protection" in repr(fake)
        assert "no protection" in fake.info.level
        assert fake.info.protections == {}
        assert fake.info.debug
        evidence = fake.attest(b"fresh nonce")
        policy = pyenclave.AppraisalPolicy.any_code(dangerous_allow_software=True, allow_debug=True)
        with pytest.raises(errors.AttestationError):
            pyenclave.verify(evidence, policy=policy, nonce=b"fresh nonce")


def test_a_fake_calls_as_an_enclave_does(entry: Path) -> None:
    with FakeEnclave(entry, ocalls={"ask": str.upper}, threads=2) as fake:
        assert (
            fake.double(21) == fake.call("double", 21) == fake.options(timeout=5).double(21) == 42
        )
        assert list(fake.map("double", range(100))) == [2 * x for x in range(100)]
        assert fake.asks("why") == "WHY!"
        assert fake.loaded() == 42
        assert fake.count() == 1
        assert fake.report()
        assert fake.ping(b"x") == b"x"
        assert fake.stats.calls >= 100
        assert set(fake.parameter_types("double")) == {"int"}
        with pytest.raises(errors.ArgumentError):
            fake.double("no number")
        with pytest.raises(errors.UnknownFunctionError):
            fake.call("nothing")
        with pytest.raises(errors.EcallError) as raised:
            fake.fail()
        assert raised.value.type == "ValueError"
        with pytest.raises(errors.CallTimeoutError):
            fake.options(timeout=0.05).nap(1.0)
    with pytest.raises(errors.EnclaveClosedError):
        fake.double(1)


def test_a_fake_has_the_limits_of_an_enclave(entry: Path) -> None:
    options = {"ocalls": {"ask": str.upper}, "message": 4096}
    with FakeEnclave(entry, **options) as fake, pytest.raises(errors.ArgumentError):
        fake.asks("x" * 5000)
    with FakeEnclave(entry, ocalls={"ask": str.upper}, threads=1, queue=0) as fake:
        thread = threading.Thread(target=fake.nap, args=(2.0,))
        thread.start()
        deadline = time.monotonic() + 30
        while not fake._run.lanes.busy:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(errors.BusyError):
            fake.double(1)
        thread.join()


def test_a_fake_for_asyncio(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(PLAIN)

    async def main() -> list[int]:
        async with AsyncFakeEnclave(path) as fake:
            return list(await asyncio.gather(*(fake.double(x) for x in range(50))))

    assert asyncio.run(main()) == [2 * x for x in range(50)]


def test_this_process_is_no_enclave_beside_a_fake(entry: Path) -> None:
    with FakeEnclave(entry, ocalls={"ask": str.upper}), pytest.raises(errors.NotInEnclaveError):
        trusted.seal(b"x")
    with pytest.raises(errors.NotInEnclaveError):
        trusted.seal(b"x")


def test_fakes_leave_nothing_behind(entry: Path) -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with FakeEnclave(entry, ocalls={"ask": str.upper}) as fake:
        fake.double(1)
    time.sleep(0.3)
    before = count()
    for _ in range(50):
        with FakeEnclave(entry, ocalls={"ask": str.upper}) as fake:
            fake.double(1)
    del fake
    deadline = time.monotonic() + 20
    while count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert count() <= before


def test_a_fake_can_be_poisoned_but_not_lost(entry: Path) -> None:
    with FakeEnclave(entry, ocalls={"ask": str.upper}) as fake:
        with pytest.raises(errors.EnclaveStateError, match="a fake has no worker"):
            Loss(fake, "before")
        assert isinstance(poison(fake), errors.EnclavePoisonedError)
        with pytest.raises(errors.EnclavePoisonedError):
            fake.double(1)


def test_a_start_function_that_refuses_is_a_launch_error(tmp_path: Path) -> None:
    path = tmp_path / "stubborn.py"
    path.write_text(
        PLAIN + "\n\nfrom pyenclave import trusted\n\n\n@trusted.on_start\n"
        "def begin() -> None:\n    raise ValueError('no model')\n"
    )
    with pytest.raises(errors.LaunchError, match="no model"):
        FakeEnclave(path).start()


@pytest.mark.parametrize("bad", [1, None, b"bytes", ["list"]])
def test_a_fake_is_of_a_module_or_a_file(bad: object) -> None:
    with pytest.raises(TypeError):
        FakeEnclave(bad)  # type: ignore[arg-type]


def test_a_fake_of_a_module(entry: Path) -> None:
    module = ModuleType("small")
    exec(textwrap.dedent(PLAIN), module.__dict__)
    with FakeEnclave(module) as fake:
        assert fake.call(module.double, 4) == 8


# ---- what happens to enclaves --------------------------------------------------------------------


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> EnclavePlatform:
    place = EnclavePlatform(tmp_path_factory.mktemp("enclaves") / "state")
    yield place
    place.close()


@pytest.fixture
def enclave(platform: EnclavePlatform, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "plain_fixture.py"
    path.write_text(PLAIN)
    with pyenclave.Enclave(image_of(path), state=platform.state, quiet=True) as one:
        assert one.double(1) == 2
        yield one


@pytest.mark.parametrize(
    ("lie", "check"),
    [
        ({"length": 1 << 30}, "length"),
        ({"claimed_lane": 7}, "lane"),
        ({"kind": 77}, "kind"),
        ({"sequence": 12345}, "sequence"),
        ({"offset": 5}, "offset"),
        ({"payload": b"x", "total": 2}, "fragment"),
    ],
)
def test_every_lie_in_a_header_poisons(enclave, lie: dict[str, object], check: str) -> None:
    host = HostileHost(enclave)
    host.send(**lie)
    assert check in str(host.poisoned())
    with pytest.raises(errors.EnclavePoisonedError):
        enclave.double(1)


def test_a_flipped_sequence_of_the_reply_poisons_the_handle(enclave) -> None:
    host = HostileHost(enclave)
    host.flip(host.reply())
    with pytest.raises(errors.EnclavePoisonedError):
        enclave.double(1)


def test_offsets_beyond_the_ring_are_refused(enclave) -> None:
    host = HostileHost(enclave)
    for wrong in (
        lambda: host.flip(len(host.memory)),
        lambda: host.flip(-1),
        lambda: host.scribble(len(host.memory) - 1, b"xx"),
        lambda: host.request(1),
    ):
        with pytest.raises(IndexError):
            wrong()


def test_a_platform_that_was_killed_starts_again(platform: EnclavePlatform, enclave) -> None:
    root, before = platform.root, platform.pid
    platform.kill()
    with pytest.raises(errors.EnclaveLostError) as lost:
        enclave.double(1)
    assert lost.value.started is False
    assert platform.pid != before
    assert platform.root == root


def test_a_loss_that_nothing_triggers_can_be_cancelled(enclave) -> None:
    loss = Loss(enclave, "during")
    loss.cancel()
    assert enclave.double(4) == 8
    with pytest.raises(ValueError, match="before, during or after"):
        Loss(enclave, "sometimes")  # type: ignore[arg-type]


def test_after_an_answer_the_next_call_is_lost(enclave) -> None:
    loss = Loss(enclave, "after")
    assert enclave.double(4) == 8
    loss.wait()
    with pytest.raises(errors.EnclaveLostError) as lost:
        enclave.double(1)
    assert lost.value.started is False


# ---- clock and images ----------------------------------------------------------------------------


def test_the_clock_goes_only_when_told() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    clock = Clock(at)
    assert clock.now() == clock() == at
    assert clock.step(days=1) == at + timedelta(days=1)
    assert clock.step(timedelta(hours=-24)) == at
    with pytest.raises(ValueError, match="zone"):
        clock.freeze(datetime(2026, 1, 1))
    with pytest.raises(TypeError):
        clock.step()


def test_an_image_is_built_again_only_when_its_file_changed(tmp_path: Path) -> None:
    path = tmp_path / "changing.py"
    path.write_text(PLAIN)
    first = image_of(path)
    assert image_of(path) is first
    path.write_text(PLAIN.replace("2 * x", "3 * x"))
    assert image_of(path) != first
    assert image_of(first) == first
    with pytest.raises(TypeError):
        image_of(3)
