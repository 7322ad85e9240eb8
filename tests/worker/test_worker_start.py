"""What a worker is like when it has closed its sandbox, and before it has any key."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import pyenclave
from pyenclave import _native
from pyenclave._platform.probe import probe_worker
from pyenclave._worker import main as worker_main
from pyenclave._worker import rehearsal
from pyenclave._worker.importer import Locked
from pyenclave.errors import CallTimeoutError, EnclaveStateError, LaunchError
from pyenclave.formats import messages
from pyenclave.formats.lock import START_ENVIRONMENT
from pyenclave.trusted import _runtime, _state

CALL = "@pyenclave.ecall\ndef answer() -> str:\n"
# What an entry finds at import crosses in the text of an exception: nothing else is needed.
TELL = "raise RuntimeError('<<' + json.dumps(found) + '>>')\n"


@pytest.fixture
def told(launching, zygotes, base):
    """Run code as an entry and return what it puts into `found`."""

    def run(code: str, *, debug: bool = True):
        data = launching.make(base, code + TELL, functions=False)
        with launching.Launched(zygotes, data, debug=debug) as worker:
            message = worker.first()
        assert isinstance(message, messages.Ending)
        match = re.search(r"<<(.*)>>", message.message)
        assert match, message
        return json.loads(match[1])

    return run


def test_a_worker_closes_its_sandbox_and_then_serves(launching, zygotes, base) -> None:
    """The whole start, with every protection that this kernel has tried from inside."""
    image = launching.make(base, CALL + "    return 'served'\n")
    with launching.Launched(zygotes, image) as worker:
        closed = worker.run()
        assert closed.inside["mappings"] is True
        assert closed.inside["dumpable_off"] is True
        assert closed.inside["seccomp"] is True
        assert closed.inside["no_new_privs"] is True
        assert worker.function("answer")() == "served"


def test_imports_after_the_sandbox_closed_come_from_the_lock(launching, zygotes, base) -> None:
    """A module of the lock that nobody imported before, an extension too, needs no open."""
    source = (
        CALL + "    import sys\n"
        "    before = [name in sys.modules for name in ('colorsys', 'cmath')]\n"
        "    import cmath, colorsys\n"
        "    return f'{before} {colorsys.rgb_to_hsv(0, 0, 1)[2]} {cmath.sqrt(-1)}'\n"
    )
    image = launching.make(base, source)
    with launching.Launched(zygotes, image) as worker:
        worker.run()
        assert worker.function("answer")() == "[False, False] 1 1j"


def test_an_unlisted_import_in_a_closed_worker_is_an_import_error(launching, zygotes, base) -> None:
    """The lock is the world; asking whether a module exists is no error."""
    source = (
        CALL + "    import importlib.util\n"
        "    assert importlib.util.find_spec('chess_engine') is None\n"
        "    try:\n"
        "        import mailbox\n"
        "    except ImportError as error:\n"
        "        return f'{type(error).__name__}: {error}'\n"
        "    return 'imported'\n"
    )
    image = launching.make(base, source)
    with launching.Launched(zygotes, image) as worker:
        worker.run()
        answer = worker.function("answer")()
    assert "UnlistedImportError" in answer
    assert "mailbox" in answer


def test_an_entry_that_imports_what_is_not_locked_is_refused(launching, zygotes, base) -> None:
    """The refusal names the module."""
    image = launching.make(base, "import mailbox\n" + CALL + "    return ''\n", functions=False)
    with launching.Launched(zygotes, image) as worker:
        ending = worker.first()
    assert isinstance(ending, messages.Ending)
    assert ending.code == "image.runtime_lock"
    assert "mailbox" in ending.message
    assert ending.files == ("mailbox",)


def test_an_image_with_another_lock_than_its_zygote_is_refused(launching, zygotes, base) -> None:
    """The worker itself compares, whatever the platform handed it."""
    other = launching.replace(base, libraries=base.libraries[1:])
    zygote = zygotes.get(base.to_bytes(), debug=True)
    ours, theirs = launching.Channel.pair()
    fd = launching.sealed_memfd("image", launching.make(other, CALL + "    return ''\n"))
    ring_fd = launching.ring.create(1)
    with ours, theirs:
        launching.give_output(ours)
        spawned = zygote.spawn(image_fd=fd, ring_fd=ring_fd, channel_fd=theirs.fileno(), debug=True)
        spawned.forget()
        theirs.close()
        ending, _ = ours.receive(20)
    for number in (fd, ring_fd, spawned.pidfd):
        os.close(number)
    assert isinstance(ending, messages.Ending)
    assert ending.code == "image.runtime_lock"


@pytest.mark.parametrize("kind", ["file", "unsealed", "pipe"])
def test_an_image_that_could_change_is_refused(
    launching, zygotes, base, tmp_path, kind: str
) -> None:
    """Only a write-sealed memfd is mapped."""
    data = launching.make(base, CALL + "    return ''\n")
    if kind == "file":
        (tmp_path / "image").write_bytes(data)
        fd = os.open(tmp_path / "image", os.O_RDWR)
    elif kind == "unsealed":
        fd = os.memfd_create("image")
        os.write(fd, data)
    else:
        fd, write = os.pipe()
        os.close(write)
    ring_fd = launching.ring.create(1)
    ours, theirs = launching.Channel.pair()
    with ours, theirs:
        zygote = zygotes.get(base.to_bytes(), debug=True)
        launching.give_output(ours)
        spawned = zygote.spawn(image_fd=fd, ring_fd=ring_fd, channel_fd=theirs.fileno(), debug=True)
        spawned.forget()
        theirs.close()
        ending, _ = ours.receive(20)
    for number in (fd, ring_fd, spawned.pidfd):
        os.close(number)
    assert isinstance(ending, messages.Ending)


def test_siblings_never_share_random_bytes(told) -> None:
    """Each generator, in workers of one zygote that are all process 1 of their namespaces."""
    code = (
        "import json, os, random, secrets, tempfile, uuid, numpy\n"
        "from cryptography.hazmat.primitives.asymmetric import x25519\n"
        "names = tempfile._get_candidate_names()\n"
        "found = [os.getpid(), random.getrandbits(128), random.Random().random(),\n"
        "  float(numpy.random.random()), int(numpy.random.default_rng().integers(1 << 62)),\n"
        "  secrets.token_hex(16), os.urandom(16).hex(), str(uuid.uuid4()), next(names),\n"
        "  x25519.X25519PrivateKey.generate().private_bytes_raw().hex()]\n"
    )
    rows = [told(code) for _ in range(3)]
    assert {row[0] for row in rows} == {1}
    for column in list(zip(*rows, strict=True))[1:]:
        assert len(set(column)) == len(rows), column


@pytest.mark.no_asan(reason="a sanitizer build lets its own variables through")
def test_nothing_of_the_hosts_environment_or_folder_gets_in(told) -> None:
    """Environment, working folder, umask, search path."""
    found = told(
        "import json, os, sys\n"
        "mask = os.umask(0)\n"
        "found = [dict(os.environ), os.getcwd(), mask, sys.path, sys.argv]\n"
    )
    assert set(found[0]) <= set(START_ENVIRONMENT)
    assert found[1:4] == ["/", 0o077, []]
    assert found[4] == ["-c"]


@pytest.mark.parametrize("debug", [True, False])
def test_no_process_has_a_script_run_inside_and_nothing_is_compiled(told, debug) -> None:
    """CPython's remote debugging (PEP 768) and its JIT are off, whatever it was built with."""
    found = told(
        "import json, sys\n"
        "scripts = getattr(sys, 'is_remote_debug_enabled', bool)()\n"
        "jit = getattr(sys, '_jit', None)\n"
        "found = [scripts, jit is not None and jit.is_enabled()]\n",
        debug=debug,
    )
    assert found == [False, False]


@pytest.mark.skipif(
    not sysconfig.get_config_var("PY_HAVE_PERF_TRAMPOLINE"), reason="this Python has none"
)
@pytest.mark.parametrize("debug", [True, False])
def test_trampolines_for_perf_are_refused(launching, zygotes, base, debug) -> None:
    """CPython writes and executes them for each function, from Python 3.12 on."""
    code = (
        "import sys\n"
        "sys.activate_stack_trampoline('perf')\n"
        "def called() -> int:\n"
        "    return 1\n"
        "called()\n"
    )
    data = launching.make(base, code, functions=False)
    with launching.Launched(zygotes, data, debug=debug) as worker:
        message = worker.first()
    assert isinstance(message, messages.Ending)
    assert message.code == "image.runtime_lock"
    assert "executable without a file" in message.files[0]


def test_a_worker_has_only_the_descriptors_that_it_needs(told) -> None:
    """Null, null, null, sources, channel, ring, image, own mappings: and nothing else.

    Where libffi made a page for callbacks (trampolines.py), an empty pipe lies under its number.
    """
    found = told(
        "import json, os\n"
        "links = {}\n"
        "for name in map(str, range(4096)):\n"
        "    try:\n"
        "        links[name] = os.readlink('/proc/self/fd/' + name)\n"
        "    except OSError:\n"
        "        pass\n"
        "found = links\n",
        debug=False,
    )
    for number in "012":
        assert found.pop(number) == "/dev/null"
    kinds = sorted(re.sub(r"\[\d+\]| \(deleted\)|/\d+", "", link) for link in found.values())
    if sys.version_info >= (3, 14) and "pipe:" in kinds:
        kinds.remove("pipe:")
    # That of the image is the duplicate that its mapping keeps.
    assert kinds == [
        "/memfd:pyenclave-ring",
        "/memfd:pyenclave-sources",
        "/memfd:test-image",
        "/proc/maps",
        "socket:",
    ]


def test_a_rehearsal_goes_through_and_leaves_nothing(base) -> None:
    """A spare ignores its failure, which would only make every launch slower."""
    locked = Locked(b"", base.to_bytes())
    locked.locks[base.digest] = base
    data = rehearsal.rehearsal_image(locked)
    locked.snapshot = _native.mapping_text()  # this process is no zygote
    rings = Path("/proc/self/maps").read_text(encoding="utf-8").count("pyenclave-ring")
    rehearsal.rehearse(data, locked)
    gc.collect()  # what earlier tests left may be closed at any time
    before = os.listdir("/proc/self/fd"), dict(locked.__dict__), sorted(sys.modules)
    rehearsal.rehearse(data, locked)
    assert (os.listdir("/proc/self/fd"), dict(locked.__dict__), sorted(sys.modules)) == before
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert "pyenclave-re" not in maps
    assert maps.count("pyenclave-ring") <= rings
    assert _state.link() is None
    assert not _state.entered()
    with pytest.raises(EnclaveStateError):
        _runtime.current()


def test_signals_are_as_a_fresh_process_has_them(launching, zygotes, base) -> None:
    """Odd dispositions and masks of whoever started the platform do not get in."""
    image = launching.make(base, CALL + "    return ''\n")
    with launching.Launched(zygotes, image) as worker:
        worker.run()
        status = Path(f"/proc/{worker.pid}/status").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(Sig\w+):\s*([0-9a-f]+)$", status, re.MULTILINE))
    assert int(found["SigBlk"], 16) == 0
    ignored = {number + 1 for number in range(64) if int(found["SigIgn"], 16) >> number & 1}
    assert ignored == {2, 13, 25}  # INT, PIPE, XFSZ


@pytest.mark.parametrize(
    "deed",
    [
        "os.close(os.open(SECRET, os.O_RDONLY))",
        "os.close(os.open(SECRET, os.O_WRONLY))",
        "os.chmod(SECRET, 0o644)",
        "os.utime(SECRET, (0, 0))",
        "os.setxattr(SECRET, 'user.mark', b'1')",
        "os.chmod(os.path.dirname(SECRET), 0o755)",
        "socket.socket(socket.AF_UNIX).connect(SECRET + '.sock')",
        "os.unlink(SECRET)",
        "os.listdir(os.path.dirname(SECRET))",
        "os.close(os.open(os.path.dirname(SECRET) + '/planted', os.O_CREAT | os.O_WRONLY))",
        "os.close(os.open('/proc/self/maps', os.O_RDONLY))",
        "os.execv('/bin/true', ['true'])",
    ],
)
def test_code_of_an_image_reaches_no_file_of_the_user_while_it_loads(
    launching, zygotes, base, tmp_path, deed: str
) -> None:
    """
    The root secret is such a file: a hostile image must not take it before the sandbox closes.

    The same deed outside, by the same user, succeeds.
    """
    secret = tmp_path / "root"
    secret.write_text("the platform's root", encoding="utf-8")
    code = f"import os, socket\nSECRET = {str(secret)!r}\n{deed}\n"
    with socket.socket(socket.AF_UNIX) as bus:
        bus.bind(f"{secret}.sock")
        bus.listen()
        before = secret.stat(), tmp_path.stat()
        image = launching.make(base, code, functions=False)
        with launching.Launched(zygotes, image) as worker:
            ending = worker.first()
        assert isinstance(ending, messages.Ending)
        assert "PermissionError" in ending.message
        assert (secret.stat(), tmp_path.stat()) == before
        assert secret.read_text(encoding="utf-8") == "the platform's root"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thread_that_an_entry_starts_is_in_the_sandbox_too(launching, zygotes, base) -> None:
    """Whatever runs before the sandbox closes is under it afterwards."""
    source = (
        "import threading\n"
        "go, told = threading.Event(), []\n"
        "def attempt() -> None:\n"
        "    go.wait()\n"
        "    import os\n"
        "    opens, asks = lambda: os.open('/', 0), lambda: os.getpgid(0)\n"
        "    for deed in (opens, asks, lambda: os.memfd_create('x')):\n"
        "        try:\n"
        "            deed()\n"
        "            told.append('done')\n"
        "        except OSError as error:\n"
        "            told.append(type(error).__name__)\n"
        "thread = threading.Thread(target=attempt, daemon=True)\n"
        "thread.start()\n" + CALL + "    go.set()\n    thread.join(5)\n    return str(told)\n"
    )
    image = launching.make(base, source)
    with launching.Launched(zygotes, image) as worker:
        closed = worker.run()
        assert closed.inside["landlock"] is True
        assert worker.function("answer")() == str(["PermissionError"] * 3)


def test_an_entry_cannot_take_the_name_of_a_locked_module(launching, zygotes, base) -> None:
    """An image made by hand with such a stem ends before it runs."""
    data = launching.make(base, CALL + "    return ''\n", entry_module="json")
    with launching.Launched(zygotes, data) as worker:
        ending = worker.first()
    assert isinstance(ending, messages.Ending)
    assert ending.code == "image"
    assert "json" in ending.message


def test_the_text_of_an_entrys_error_names_its_type(launching, zygotes, base) -> None:
    """Before there is a key, the reason of a failed start is told in full."""
    data = launching.make(base, "1 / 0\n", functions=False)
    with launching.Launched(zygotes, data) as worker:
        ending = worker.first()
        assert launching.ended(worker.spawned.pidfd, 20)
    assert "ZeroDivisionError" in ending.message


@pytest.mark.no_asan(reason="its runtime answers munlockall without asking the kernel")
def test_what_is_tried_from_outside_is_as_it_was_when_the_worker_shut_itself(
    launching, zygotes, base
) -> None:
    """The platform tries a worker while that checks its mappings; nothing can be undone later."""
    source = (
        "import ctypes\n" + CALL + "    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    deeds = [(libc.prctl, 4, 1), (libc.prctl, 0x59616D61, -1), (libc.prctl, 38, 0),\n"
        "             (libc.prctl, 22, 0), (libc.ptrace, 0), (libc.unshare, 0x10000000),\n"
        "             (libc.prctl, 4, 1, 0, 0, 0), (libc.seteuid, 0), (libc.munlockall,)]\n"
        "    return str([deed(*rest) for deed, *rest in deeds])\n"
    )
    image = launching.make(base, source)
    with launching.Launched(zygotes, image) as worker:
        assert isinstance(worker.next(), messages.Shut)
        found = [probe_worker(worker.pid, worker.spawned.pidfd)]
        assert isinstance(worker.next(), messages.Closed)
        found.append(probe_worker(worker.pid, worker.spawned.pidfd))
        worker.ready()
        worker.identify()
        assert worker.function("answer")() == str([-1] * 9)
        found.append(probe_worker(worker.pid, worker.spawned.pidfd))
    assert found[0] == found[1] == found[2]
    assert {name for name, held in found[0].items() if held} >= {"seccomp", "no_new_privs"}


def test_a_worker_is_shut_before_it_says_so_and_has_no_identity_yet(
    launching, zygotes, base
) -> None:
    """Shut, Closed, Ready, in this order; and without an identity it serves nothing."""
    with launching.Launched(zygotes, launching.make(base, CALL + "    return ''\n")) as worker:
        assert isinstance(worker.next(), messages.Shut)
        status = Path(f"/proc/{worker.pid}/status").read_text(encoding="utf-8")
        assert "Seccomp:\t2" in status
        assert "Seccomp_filters:\t2" in status  # that of loading, and the last
        closed = worker.next()
        assert isinstance(closed, messages.Closed)
        assert closed.inside["mappings"] is True
        assert len(worker.ready().runtime_public_key) == 1216
        with pytest.raises(TimeoutError):
            worker.channel.receive(0.3)
        with pytest.raises(CallTimeoutError):
            worker.function("answer", timeout=0.3)()
        worker.identify()
        assert worker.function("answer")() == ""


@pytest.mark.parametrize(
    "changes", [{"seed": b"short"}, {"body": bytes(383)}, {"debug": False}], ids=str
)
def test_a_worker_that_cannot_take_its_identity_says_so_and_ends(
    launching, zygotes, base, changes: dict[str, object]
) -> None:
    """Whatever fails between identity and the first lane is told by its name; nothing is served."""
    image = launching.make(base, CALL + "    return ''\n")
    with launching.Launched(zygotes, image) as worker:
        assert isinstance(worker.first(), messages.Closed)
        worker.ready()
        worker.identify(**changes)
        ending = worker.first()
        assert isinstance(ending, messages.Ending), ending
        assert ending.code == EnclaveStateError.code
        assert "identity message" in ending.message
        assert launching.ended(worker.spawned.pidfd, 20)


def test_a_worker_runs_only_when_its_runtime_is_there(
    launching, zygotes, base, monkeypatch
) -> None:
    """In the source: its key, then the identity, randomness of the platform's, the runtime."""
    order: list[str] = []
    ours, theirs = launching.Channel.pair()
    image = launching.Image.parse(launching.make(base, CALL + "    return ''\n"))
    with ours, theirs:
        worker = worker_main.Worker(SimpleNamespace(debug=True))
        worker.connect(theirs, -1)
        send = theirs.send
        monkeypatch.setattr(worker_main, "reseed_openssl", lambda seed: order.append("reseed"))
        monkeypatch.setattr(
            worker_main._runtime, "start", lambda *rest: (order.append("start"), b"key")[1]
        )
        monkeypatch.setattr(
            theirs, "send", lambda message: (order.append(type(message).__name__), send(message))
        )
        ours.send(launching.identity(debug=True))
        worker.take_identity(image.info, SimpleNamespace(memory=None))
    assert order == ["Ready", "reseed", "start"]
    assert worker.running


def test_a_worker_ends_when_its_channel_closes(launching, zygotes, base) -> None:
    """Waiting for calls or for its identity."""
    image = launching.make(base, CALL + "    return ''\n")
    for serving in (True, False):
        worker = launching.Launched(zygotes, image)
        if serving:
            worker.run()
        else:
            assert isinstance(worker.first(), messages.Closed)
        begun = time.monotonic()
        worker.close()
        assert time.monotonic() - begun < 20


def test_lanes_are_threads_that_were_there_before_the_sandbox_closed(
    launching, zygotes, base
) -> None:
    """A worker of four lanes has four threads, all behind the filter."""
    data = launching.make(base, CALL + "    return ''\n", threads=4)
    with launching.Launched(zygotes, data) as worker:
        worker.run()
        tasks = list(Path(f"/proc/{worker.pid}/task").iterdir())
        assert len(tasks) == 4
        for task in tasks:
            assert "Seccomp:\t2" in (task / "status").read_text()


def test_blas_threads_are_raised_after_the_fork(launching, zygotes, base) -> None:
    """The zygote has one thread; the image's number is there when the worker is closed."""
    data = launching.make(base, CALL + "    return ''\n", blas_threads=2)
    if not any("openblas" in library.soname for library in base.libraries):
        pytest.skip("this NumPy does not use OpenBLAS")
    with launching.Launched(zygotes, data) as worker:
        worker.run()
        assert len(list(Path(f"/proc/{worker.pid}/task").iterdir())) == 2


def test_debug_and_production_never_share_a_zygote(launching, zygotes, base) -> None:
    """Two processes; and one refuses the other's requests."""
    debug = zygotes.get(base.to_bytes(), debug=True)
    production = zygotes.get(base.to_bytes(), debug=False)
    assert debug.pid != production.pid
    with pytest.raises(LaunchError, match="never share"):
        production.spawn(image_fd=0, ring_fd=0, channel_fd=0, debug=True)


def test_a_broken_ring_poisons_the_worker(launching, zygotes, base) -> None:
    """The reason is its last word, and the process ends."""
    with launching.Launched(zygotes, launching.make(base, CALL + "    return ''\n")) as worker:
        worker.run()
        with launching.ring.map_ring(worker.ring_fd, 1) as memory:
            deadline = time.monotonic() + 20
            while not launching.ended(worker.spawned.pidfd, 0) and time.monotonic() < deadline:
                memory[:] = b"\xff" * len(memory)
        last = worker.first()
        assert isinstance(last, messages.Poisoned), last
        assert last.reason
        assert launching.ended(worker.spawned.pidfd, 20)


C = """
#include <pyenclave_trusted.h>
#include <string.h>
PYE_ECALL(backwards)
{
    if (*out_len < in_len) { return PYE_ECALL_TOO_LONG; }
    for (size_t i = 0; i < in_len; i++) { out[i] = in[in_len - 1 - i]; }
    *out_len = in_len;
    return PYE_ECALL_OK;
}
"""
MANIFEST = """
[enclave]
name = "native"
native = "libback.so"
product_id = 1
security_version = 1
[ecalls]
backwards = "bytes -> bytes"
"""


def test_a_native_entry_runs_from_its_own_sealed_memory(launching, zygotes, tmp_path) -> None:
    """The library is mapped from the image before the sandbox closes, never from a file."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "back.c").write_text(C)
    (tmp_path / "enclave.toml").write_text(MANIFEST)
    library = tmp_path / "libback.so"
    headers = f"-I{pyenclave.get_include()}"
    flags = ["-shared", "-fPIC", headers, "-o", str(library)]
    subprocess.run([compiler, *flags, str(tmp_path / "back.c")], check=True)
    image = launching.build(tmp_path / "enclave.toml")
    library.unlink()
    with launching.Launched(zygotes, image) as worker:
        worker.run()
        assert worker.function("backwards")(b"sealed") == b"delaes"


@pytest.mark.parametrize("debug", [True, False])
def test_lines_of_tracebacks_never_come_from_the_disk(told, debug: bool) -> None:
    """In debug they come from the verified sources; otherwise there are none."""
    found = told(
        "import json, linecache\n"
        "found = [linecache.getline(json.__file__, 1), linecache.getline('/etc/passwd', 1)]\n",
        debug=debug,
    )
    assert bool(found[0]) is debug
    assert found[1] == ""


def test_an_entry_reads_the_files_of_its_image_and_of_nothing_else(
    launching, zygotes, base
) -> None:
    """pkgutil and importlib.resources go through the loader."""
    data = launching.make(
        base,
        "@pyenclave.ecall\n"
        "def read(path: str) -> bytes:\n"
        "    try:\n"
        "        return __loader__.get_data(path)\n"
        "    except OSError as error:\n"
        "        return str(error).encode()\n",
    )
    with launching.Launched(zygotes, data) as worker:
        worker.run()
        read = worker.function("read")
        assert read("/enclave/entry/probe.py").startswith(launching.PREAMBLE.encode())
        assert b"not in the image" in read("/enclave/../etc/passwd")
        assert b"not in the image" in read("/etc/passwd")
        assert b"not in the image" in read("/enclave/entry/other.py")


def test_a_warm_worker_that_is_rung_for_nothing_waits_on(launching, zygotes, base) -> None:
    """Its bell is the host's to ring, often and for nothing; what it does then is forgotten."""
    source = (
        CALL + "    from pyenclave.trusted import _runtime\n"
        "    current = _runtime.current()\n"
        "    return current.identity.enclave_id.hex() + current.secret.hex()\n"
    )
    image = launching.make(base, source)
    seen = set()
    for _ in range(2):
        bell = os.eventfd(0, os.EFD_NONBLOCK)
        with launching.Launched(zygotes, image) as worker:
            assert isinstance(worker.first(), messages.Closed)
            worker.ready()
            worker.channel.send(messages.Soon(), (bell,))
            for _ in range(20):
                os.eventfd_write(bell, 1)
                deadline = time.monotonic() + 30
                while not taken(bell):  # nobody else takes it
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
            worker.channel.send(messages.Soon())
            os.eventfd_write(bell, 1)
            name = bytes(range(16))
            worker.identify(enclave_id=name)
            answer = worker.function("answer")()
            assert answer.startswith(name.hex())  # and not what it limbered up with
            seen.add(answer)
            os.eventfd_write(bell, 1)  # nobody hears it any more
            assert worker.function("answer")() == answer
        os.close(bell)
    assert len(seen) == 2


def taken(bell: int) -> bool:
    """Whether a ring was heard; it stays for who hears it."""
    return not select.select([bell], [], [], 0)[0]


def test_a_warm_worker_that_was_rung_ends_with_its_platform(launching, zygotes, base) -> None:
    image = launching.make(base, CALL + "    return ''\n")
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    with launching.Launched(zygotes, image) as worker:
        assert isinstance(worker.first(), messages.Closed)
        worker.ready()
        worker.channel.send(messages.Soon(), (bell,))
        os.eventfd_write(bell, 1)
        worker.channel.close()
        assert launching.ended(worker.spawned.pidfd, 30)
    os.close(bell)
