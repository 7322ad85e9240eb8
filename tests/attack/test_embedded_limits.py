"""
What embedded mode does *not* hold, each shown, so that SECURITY.md cannot claim it.

The other direction (what is refused) is beside this file. Where a flaw listed here gets repaired,
its test fails, and SECURITY.md is to be changed with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pyenclave
from pyenclave import image as images
from pyenclave._native import drop_capabilities, pidfd_open, pidfd_steal
from pyenclave._platform.counters import CounterStore
from pyenclave._platform.keys import Keys
from pyenclave._platform.quote import Quoter
from pyenclave._platform.root import PlatformRoot
from pyenclave._platform.state import State
from pyenclave.demo.scan import search_process
from pyenclave.errors import EnclaveLostError
from pyenclave.formats.dcap import Quote
from pyenclave.formats.evidence import Evidence, bound_report_data
from pyenclave.formats.sealed import SealedHeader
from pyenclave.formats.sgx import KeyRequest, ReportBody
from pyenclave.host import Enclave
from pyenclave.image import build, sign
from pyenclave.sealed import blob
from pyenclave.sealed.provision import RuntimeKey

pytestmark = pytest.mark.attack

ENTRY = '''
import pyenclave
from pyenclave import trusted

kept = []

@pyenclave.ecall
def take(ciphertext: bytes) -> bytes:
    """Take a secret, and show it (that is this code's decision)."""
    kept.append(trusted.receive(ciphertext))
    return kept[-1]

@pyenclave.ecall
def keep(note: bytes) -> bytes:
    return trusted.seal(note)

@pyenclave.ecall
def alike() -> list[int]:
    """What a fork shares with its siblings."""
    return [hash("a text"), id(None), id(trusted)]
'''
MANIFEST = """[enclave]
name = "limits"
entry = "limits.py"
product_id = 3
security_version = 1
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A signed image."""
    folder = tmp_path_factory.mktemp("limits")
    (folder / "limits.py").write_text(ENTRY)
    (folder / "enclave.toml").write_text(MANIFEST)
    return sign.sign(build.build(folder / "enclave.toml"), images.keygen())


@pytest.fixture
def no_yama() -> None:
    """Yama keeps programs of one user apart by itself, as far as its scope says."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() != "0":
        pytest.skip("Yama refuses this attack on this machine")


@pytest.fixture
def stolen_root(state: Path) -> Callable[[], PlatformRoot]:
    """The platform's keys, made from the file that every program of this user can read."""

    def steal() -> PlatformRoot:
        with State.open(str(state)) as opened:
            secret, _ = opened.load_root()
        return PlatformRoot(secret, level="embedded", ephemeral=False)

    return steal


def test_X2_with_the_root_secret_opens_what_an_enclave_sealed(
    image: bytes, state: Path, stolen_root: Callable[[], PlatformRoot]
) -> None:
    """A2, A3: sealed data is as secret as the root file, which is this user's."""
    with Enclave(image) as enclave:
        sealed = enclave.call("keep", b"a sealed note")
        info = enclave.info
        nonce = bytes(32)
        quoted = Quote.from_bytes(Evidence.from_bytes(enclave.attest(nonce=nonce)).quote)
    keys, body = Keys(stolen_root()), quoted.report_body
    opened = blob.open_blob(
        sealed,
        identity=blob.SealingIdentity(
            mrenclave=info.mrenclave,
            mrsigner=info.mrsigner,
            product_id=info.product_id,
            security_version=info.security_version,
            cpu_svn=SealedHeader.from_bytes(sealed).cpu_svn,
            debug=False,
        ),
        key_provider=lambda request: keys.get_key(KeyRequest.from_bytes(request), body),
    )
    assert opened.data == b"a sealed note"


def test_X2_with_the_root_secret_forges_evidence_that_an_owner_accepts(
    image: bytes, state: Path, stolen_root: Callable[[], PlatformRoot]
) -> None:
    """A6, A2: evidence of embedded mode is as good as the root file; the key is the thief's."""
    policy = pyenclave.AppraisalPolicy.from_image(image, dangerous_allow_software=True)
    nonce = secrets.token_bytes(32)
    with Enclave(image) as enclave:
        true = Evidence.from_bytes(enclave.attest(nonce=nonce))
    body: ReportBody = Quote.from_bytes(true.quote).report_body
    own = RuntimeKey()
    data = bound_report_data(nonce=nonce, runtime_key=own.public, user_data=b"")
    forged = replace(
        true, quote=Quoter(stolen_root()).quote(body, data), runtime_key=own.public, user_data=b""
    ).to_bytes()
    roots = [pyenclave.local_platform_root()]
    result = pyenclave.verify(forged, policy=policy, nonce=nonce, roots=roots)
    assert (result.accepted, result.identified, result.fresh) == (True, True, True)


@pytest.fixture
def host(image: bytes, state: Path) -> Iterator[tuple[int, bytes]]:
    """An ordinary service of this user that sends a secret *argument* in clear."""
    secret = secrets.token_bytes(48)
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                drop_capabilities()
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, as every service is
            with Enclave(image) as enclave:
                enclave.call("keep", secret)
                os.write(writable, b"x")
                while True:
                    signal.pause()
        finally:
            os._exit(1)
    os.close(writable)
    assert os.read(readable, 1) == b"x"
    os.close(readable)
    yield pid, secret
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_X2_takes_the_ring_of_a_host_and_reads_a_call(
    no_yama: None, host: tuple[int, bytes], as_user: Callable[..., Any]
) -> None:
    """A5: the host is an ordinary process; what it sends in clear is this user's to read."""
    pid, secret = host

    def attack() -> bool:
        pidfd = pidfd_open(pid)
        for name in os.listdir(f"/proc/{pid}/fd"):
            if "pyenclave-ring" in os.readlink(f"/proc/{pid}/fd/{name}"):
                taken = pidfd_steal(pidfd, int(name))
                return secret in os.pread(taken, os.fstat(taken).st_size, 0)
        return False

    assert as_user(attack) is True


def test_X3_PRC_04_who_opens_a_zygote_before_it_is_hardened_keeps_its_memory(
    no_yama: None, image: bytes, state: Path, tmp_path: Path
) -> None:
    """A1, A4: between exec and hardening the zygote is open, and an open descriptor stays open."""
    ready = tmp_path / "ready"
    launched = tmp_path / "launched"
    place = state

    def opened() -> tuple[int, int] | None:
        for name in os.listdir("/proc"):
            if not name.isdecimal():
                continue
            try:
                if b"pyenclave/_worker/boot.py" not in Path(f"/proc/{name}/cmdline").read_bytes():
                    continue
                parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
                if os.fsencode(place) not in Path(f"/proc/{parent}/cmdline").read_bytes():
                    continue  # of another platform
                return int(name), os.open(f"/proc/{name}/mem", os.O_RDWR)
            except OSError:
                continue
        return None

    def attack() -> list[bool]:
        # Attackers race; here the platform's start is watched until the descriptor is had.
        ready.touch()
        found = None
        deadline = time.monotonic() + 60
        while found is None and time.monotonic() < deadline and not launched.exists():
            found = opened()
        if found is None:
            return []
        pid, memory = found
        regions = open(f"/proc/{pid}/maps", encoding="ascii")  # noqa: SIM115 - held open on purpose
        while not launched.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
            late = True
        except OSError:
            late = False
        regions.seek(0)
        heap = next(line for line in regions if "[heap]" in line)
        start = int(heap.split("-")[0], 16)
        byte = os.pread(memory, 1, start)
        return [late, len(byte) == 1, os.pwrite(memory, byte, start) == 1]

    for turn in range(20):  # on a busy machine it may come too late
        place = state / str(turn)
        place.mkdir(mode=0o700, parents=True)
        ready.unlink(missing_ok=True)
        launched.unlink(missing_ok=True)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                if os.geteuid() == 0:
                    drop_capabilities()
                os.write(writer, json.dumps(attack()).encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writer)
        try:
            while not ready.exists():
                time.sleep(0.01)
            with Enclave(image, state=place):
                launched.touch()
                with open(reader, "rb") as answer:
                    found = answer.read()
        finally:
            launched.touch()
            os.waitpid(pid, 0)
        if found != b"[]":
            break
    # Opening late is refused, what was opened early still works.
    assert json.loads(found or "null") == [False, True, True]


def test_X2_can_end_a_worker_and_X1_cannot(
    image: bytes, state: Path, need_root: None, as_user: Callable[..., Any], other_user: int
) -> None:
    """A7."""

    def kill() -> bool:
        try:
            os.kill(pid, signal.SIGKILL)
        except PermissionError:
            return False
        return True

    with Enclave(image) as enclave:
        pid = enclave.info.pid
        assert as_user(kill, uid=other_user) is False
        assert enclave.ping(b"alive") == b"alive"
        assert as_user(kill) is True
        with pytest.raises(EnclaveLostError):
            enclave.ping(b"", timeout=10)


def test_X5_root_reads_a_secret_in_the_worker(
    need_root: None, as_user: Callable[..., Any], worker: Any
) -> None:
    """A1: root is not an ordinary user."""
    pattern = worker.secret[::-1]

    def scan() -> int:
        return sum(search_process(worker.pid, [pattern])[1].values())

    assert as_user(scan, privileged=True) >= 1


def test_X2_a_state_directory_that_was_put_back_whole_is_not_noticed(tmp_path: Path) -> None:
    """A3: without hardware, counters are as fresh as the directory."""
    folder, copy = tmp_path / "state", tmp_path / "copy"
    owner = bytes(range(32))

    def store(state: State) -> CounterStore:
        secret, _ = state.load_root()
        root = PlatformRoot(secret, level="embedded", ephemeral=False)
        return CounterStore(state, root.derive("counters", 32), os.urandom)

    with State.open(str(folder)) as state:
        counter, _ = store(state).create(owner)
        assert store(state).increment(owner, counter) == 1
    shutil.copytree(folder, copy)
    with State.open(str(folder)) as state:
        assert store(state).increment(owner, counter) == 2
    shutil.rmtree(folder)
    copy.rename(folder)
    with State.open(str(folder)) as state:
        assert store(state).read(owner, counter).value == 1


def test_siblings_of_one_zygote_share_addresses_and_hash_seed(image: bytes, state: Path) -> None:
    """A fork does not make them anew; SECURITY.md names them."""
    with Enclave(image) as one, Enclave(image) as other:
        assert one.info.enclave_id != other.info.enclave_id
        assert one.call("alike") == other.call("alike")


def test_anybody_can_send_a_secret_and_send_it_again(image: bytes, state: Path) -> None:
    """HPKE's base mode: ``receive`` says neither who sent a secret nor when."""
    policy = pyenclave.AppraisalPolicy.from_image(image, dangerous_allow_software=True)
    with Enclave(image) as enclave:
        nonce = bytes(32)
        evidence = enclave.attest(nonce=nonce)
        roots = [pyenclave.local_platform_root()]
        result = pyenclave.verify(evidence, policy=policy, nonce=nonce, roots=roots)
        ciphertext = result.encrypt(b"of the host itself")
        assert enclave.call("take", ciphertext) == b"of the host itself"
        assert enclave.call("take", ciphertext) == b"of the host itself"
