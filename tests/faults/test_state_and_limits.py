"""
State directories in disorder, full disks, missing rights and little memory: a typed error soon,
or a fallback that is reported; never a hang and never a silent new root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyenclave._platform.client import PlatformClient, local_platform_root
from pyenclave.errors import (
    EcallError,
    EnclaveError,
    LaunchError,
    LaunchRefusedError,
    PlatformUnavailableError,
    SealingError,
)
from pyenclave.host import Enclave

ROUND_TRIP = """
def once():
    with Enclave(IMAGE, quiet=True) as enclave:
        assert enclave.call("double", 21) == 42
        with PlatformClient.connect() as platform:
            ephemeral = platform.hello.ephemeral
        kept = outcome(lambda: enclave.call("keep", b"x").hex())
        counted = outcome(lambda: enclave.call("count"))
        return [ephemeral, kept, counted]
from pyenclave._platform.client import PlatformClient
answer(outcome(once))
"""


def in_time(action: Callable[[], Any], seconds: float = 20.0) -> EnclaveError:
    """Run what must fail with one of our errors, and soon."""
    begin = time.monotonic()
    with pytest.raises(EnclaveError) as caught:
        action()
    assert time.monotonic() - begin < seconds
    return caught.value


def launch(image: bytes) -> None:
    with Enclave(image, quiet=True) as enclave:
        enclave.call("double", 1)


# ---- policy and root ---------------------------------------------------------------------------


def test_launch_policies_refuse_by_name(platform: PlatformClient, state: Path, images: Any) -> None:
    """A wrong signer, a security version that went back, debug, unsigned, a broken policy."""
    policy = state / "launch-policy.toml"

    def rule(text: str) -> None:
        policy.write_text(text)
        policy.chmod(0o600)

    rule(f'[[signer]]\nmrsigner = "{images.mrsigner.hex()}"\nsecurity_version = 2\n')
    launch(images.signed)
    for image, reason in ((images.older, "went back"), (images.foreign, "no rule for this signer")):
        error = in_time(lambda image=image: launch(image))  # type: ignore[misc]
        assert isinstance(error, LaunchRefusedError)
        assert reason in str(error)
    rule("allow_unsigned = false\n")
    assert "allow_unsigned" in str(in_time(lambda: launch(images.unsigned)))
    rule("allow_debug = false\n")
    assert "allow_debug" in str(in_time(lambda: Enclave(images.signed, debug=True).start()))
    rule('require = ["unobtainium"]\n')
    assert "unobtainium" in str(in_time(lambda: launch(images.signed)))
    for broken in ("allow_debug = 1\n", "allow_dbug = true\n", "[[signer]]\n", "\0", "a = ["):
        rule(broken)
        assert "launch-policy.toml" in str(in_time(lambda: launch(images.signed)))
    rule("")
    policy.chmod(0o666)
    assert isinstance(in_time(lambda: launch(images.signed)), LaunchError)
    policy.unlink()
    launch(images.signed)


def test_a_stale_root_opens_nothing_and_says_so(
    state: Path, images: Any, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sealed under one root, opened under another: refused, and evidence differs too."""
    with Enclave(images.signed, quiet=True) as enclave:
        blob = enclave.call("keep", b"old")
    old = local_platform_root()
    family.check_gone()
    aside = state.with_name("aside")
    shutil.copytree(state, aside)
    (state / "root").unlink()
    with Enclave(images.signed, quiet=True) as enclave:
        with pytest.raises(EcallError):
            enclave.call("recall", blob)
        assert local_platform_root() != old, "the old certificate would be believed"
    family.check_gone()
    monkeypatch.setenv("PYENCLAVE_STATE", str(aside))
    with Enclave(images.signed, quiet=True) as enclave:
        assert enclave.call("recall", blob) == b"old"
    assert local_platform_root() == old


def damage_root(state: Path, data: bytes, mode: int = 0o600) -> None:
    (state / "root").write_bytes(data)
    (state / "root").chmod(mode)


DAMAGES: dict[str, Callable[[Path, bytes], Any]] = {
    "empty": lambda s, d: damage_root(s, b""),
    "short": lambda s, d: damage_root(s, d[:-1]),
    "flipped": lambda s, d: damage_root(s, d[:20] + bytes([d[20] ^ 1]) + d[21:]),
    "long": lambda s, d: damage_root(s, d + b"\0"),
    "readable": lambda s, d: damage_root(s, d, 0o644),
    "directory": lambda s, d: ((s / "root").unlink(), (s / "root").mkdir()),
    "link": lambda s, d: ((s / "root").unlink(), (s / "root").symlink_to(s / "elsewhere")),
    "fifo": lambda s, d: ((s / "root").unlink(), os.mkfifo(s / "root", 0o600)),
    "open": lambda s, d: s.chmod(0o777),
}


def test_a_damaged_state_is_named_and_never_replaced(state: Path, family: Any) -> None:
    with PlatformClient.connect() as platform:
        before = platform.root()
    family.check_gone()
    whole = (state / "root").read_bytes()
    for name, damage in DAMAGES.items():
        damage(state, whole)
        error = in_time(lambda: PlatformClient.connect().close())
        assert isinstance(error, PlatformUnavailableError), name
        assert str(state) in str(error), name
        state.chmod(0o700)
        if (state / "root").is_dir():
            (state / "root").rmdir()
        else:
            (state / "root").unlink()
        damage_root(state, whole)
    with PlatformClient.connect() as platform:
        assert not platform.hello.ephemeral
        assert platform.root() == before


def test_damaged_counters_are_refused_and_calls_go_on(
    platform: PlatformClient, state: Path, images: Any
) -> None:
    with Enclave(images.signed, quiet=True) as enclave:
        assert enclave.call("count") == 1
        for name in ("counters", "counters.mark"):
            whole = (state / name).read_bytes()
            for bad in (b"", whole[:-1], whole[:9] + bytes([whole[9] ^ 1]) + whole[10:]):
                (state / name).write_bytes(bad)
                assert isinstance(in_time(lambda: enclave.call("count")), EcallError)
                assert enclave.call("double", 3) == 6
            (state / name).write_bytes(whole)
        assert enclave.call("count") == 1


# ---- rights and space --------------------------------------------------------------------------


def check_ephemeral(outcome: dict[str, Any]) -> None:
    """Calls work; the root is said to be ephemeral, and sealing under it is refused."""
    assert "value" in outcome, outcome
    ephemeral, kept, counted = outcome["value"]
    assert ephemeral
    assert "EnclaveError" in kept["error"], kept
    assert "EnclaveError" in counted["error"], counted


def test_a_state_directory_without_the_right_to_write_is_ephemeral(
    program: Callable[..., Any], state: Path, images: Any
) -> None:
    state.mkdir(mode=0o500)
    check_ephemeral(program("ordinary()\n" + ROUND_TRIP, images.signed))


def test_a_state_directory_that_cannot_be_made_is_ephemeral(
    program: Callable[..., Any], state: Path, images: Any
) -> None:
    state.parent.joinpath("shut").mkdir(mode=0o500)
    place = str(state.parent / "shut" / "state")
    check_ephemeral(program("ordinary()\n" + ROUND_TRIP, images.signed, PYENCLAVE_STATE=place))
    assert not Path(place).exists()


@pytest.fixture
def small_disk(tmp_path: Path, family: Any) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    family.check_gone()
    subprocess.run(["umount", str(folder)], check=True)


def fill_up(folder: Path) -> Path:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def test_a_disk_that_is_full_from_the_start_is_ephemeral(
    program: Callable[..., Any], small_disk: Path, images: Any
) -> None:
    place = small_disk / "state"
    place.mkdir(mode=0o700)
    fill_up(small_disk)
    check_ephemeral(program(ROUND_TRIP, images.signed, PYENCLAVE_STATE=str(place)))
    assert not (place / "root").exists()


def test_a_disk_that_fills_up_costs_counters_only(
    small_disk: Path,
    images: Any,
    family: Any,
    monkeypatch: pytest.MonkeyPatch,
    helpers: Any,
) -> None:
    monkeypatch.setenv("PYENCLAVE_STATE", str(small_disk / "state"))
    with Enclave(images.signed, quiet=True) as enclave:
        assert enclave.call("count") == 1
        filler = fill_up(small_disk)
        assert isinstance(in_time(lambda: enclave.call("count")), EcallError)
        assert enclave.call("recall", enclave.call("keep", b"still")) == b"still"
        with PlatformClient.connect() as second:
            assert second.hello.level == "embedded"
        filler.unlink()
        assert enclave.call("count") == 1
    family.check_gone()
    assert helpers.strange_files(small_disk / "state") == []


def test_a_file_size_limit_is_a_typed_error(program: Callable[..., Any], images: Any) -> None:
    """Even memory files have a size, and the limit is for them too."""
    for size in (0, 4096, 300_000):
        outcome = program(f"limit('FSIZE', {size})\n" + ROUND_TRIP, images.signed)
        if "error" in outcome:
            assert "EnclaveError" in outcome["error"], outcome
        assert outcome["seconds"] < 30


# ---- memory ------------------------------------------------------------------------------------


def test_too_little_memory_is_a_typed_error(program: Callable[..., Any], images: Any) -> None:
    """The host has what it needs; platform, zygote and worker get less and less."""
    source = """
import gc
for more in (10, 100, 220, 420, 620, 900):
    here = int(open("/proc/self/statm").read().split()[0]) * 4096
    results.append(in_child(more << 20, here))
answer(results)
"""
    helper = """
results = []
def in_child(more, here):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        limit("AS", max(more, here + (8 << 20)) if more < here else more)
        os.write(write, json.dumps(outcome(once)).encode())
        os._exit(0)
    os.close(write)
    data = b"".join(iter(lambda: os.read(read, 65536), b""))
    os.close(read)
    os.waitpid(pid, 0)
    return json.loads(data or b'{"error": ["nothing"], "seconds": 0}')
def once():
    with Enclave(IMAGE, quiet=True) as enclave:
        return enclave.call("double", 4)
"""
    outcomes = program(helper + source, images.signed, seconds=90)
    for outcome in outcomes:
        if "error" in outcome:
            assert {"EnclaveError", "MemoryError"} & set(outcome["error"]), outcome
        assert outcome["seconds"] < 20, outcome
    assert "error" in outcomes[0], "the limit does not limit"


def test_memory_that_is_not_there_is_an_error_of_the_call(
    platform: PlatformClient, images: Any
) -> None:
    with Enclave(images.signed, quiet=True) as enclave:
        error = in_time(lambda: enclave.call("fill", 1 << 60))
        assert isinstance(error, EcallError)
        assert error.type == "MemoryError"
        assert enclave.call("double", 2) == 4


def test_no_descriptors_left_is_a_typed_error(program: Callable[..., Any], images: Any) -> None:
    source = """
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = [os.dup(0) for _ in range(64 - len(os.listdir("/proc/self/fd")) + 1)]
results = []
for spare in range(1, 24):
    os.close(held.pop()) if held else None
    results.append(outcome(lambda: Enclave(IMAGE, quiet=True).start().call("double", 1)))
answer(results)
"""
    outcomes = program(source, images.signed)
    for outcome in outcomes:
        if "error" in outcome:
            assert "EnclaveError" in outcome["error"], outcome
        assert outcome["seconds"] < 30
    assert "error" in outcomes[0]
    assert "value" in outcomes[-1], "with descriptors again it works"


@pytest.mark.parametrize("most", [24, 64])
def test_a_limit_of_open_files_is_named(
    program: Callable[..., Any], images: Any, most: int
) -> None:
    """The platform and the zygote inherit a hard limit; what they fail by names none."""
    source = f"limit('NOFILE', {most})\nanswer(outcome(lambda: Enclave(IMAGE, quiet=True).start()))"
    outcome = program(source, images.signed)
    assert "LaunchError" in outcome["error"], outcome
    assert "ulimit -Hn" in outcome["text"]


def test_sealing_errors_keep_their_kind(images: Any, platform: PlatformClient) -> None:
    """What the platform refuses reaches the host as the function's error, with its class named."""
    with Enclave(images.signed, quiet=True) as enclave:
        blob = bytearray(enclave.call("keep", b"x"))
        blob[-1] ^= 1
        error = in_time(lambda: enclave.call("recall", bytes(blob)))
        assert isinstance(error, EcallError | SealingError)
        assert "Unseal" in f"{type(error).__name__} {getattr(error, 'type', '')}"


def test_what_a_killed_platform_was_writing_is_swept_away(state: Path, family: Any) -> None:
    """Old files on their way are removed; new ones may be another's, and nothing else goes."""
    state.mkdir(mode=0o700)
    old = [".root-0123456789abcdef", ".counters.mark-0123456789abcdef", ".try-12-01234567"]
    kept = [".root-fedcba9876543210", ".hidden", "mine", ".root-0123"]
    for name in (*old, *kept):
        (state / name).write_bytes(b"")
        (state / name).chmod(0o600)
        age = 0 if name == kept[0] else 3600
        os.utime(state / name, (time.time() - age, time.time() - age))
    PlatformClient.connect().close()
    assert [name for name in old if (state / name).exists()] == []
    assert [name for name in kept if not (state / name).exists()] == []
    for name in kept:
        (state / name).unlink()
