"""Launching, with fake zygotes: policy, protocol faults, descriptors, ends."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from pyenclave._memfd import seal
from pyenclave._platform.ahead import MOST
from pyenclave._platform.client import PlatformClient
from pyenclave._platform.drafts import Drafts
from pyenclave._platform.probe import refuse_unless_held
from pyenclave._platform.root import PlatformRoot
from pyenclave.calls import ring as ring_module
from pyenclave.errors import (
    ArgumentError,
    EnclaveError,
    EnclaveLostError,
    ImageError,
    LaunchError,
    LaunchRefusedError,
    RuntimeLockError,
)
from pyenclave.formats import messages
from pyenclave.formats.dcap import Quote
from pyenclave.formats.record import ProtectionBit, ProtectionRecord
from pyenclave.formats.sgx import FLAG_DEBUG, ReportBody

Launch = Callable[..., tuple[messages.Launched, int]]

AHEAD = MOST + 1  # threads that wait for enclaves to come, and the one that makes them


def ended(pidfd: int, seconds: float = 20.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def fds_of(client: PlatformClient) -> int:
    return len(os.listdir(f"/proc/{client.hello.pid}/fd"))


def threads_of(client: PlatformClient) -> int:
    return len(os.listdir(f"/proc/{client.hello.pid}/task"))


def settles(read: Callable[[], int], most: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if read() <= most:
            return True
        time.sleep(0.02)
    return False


def wait_for(client: PlatformClient, enclave_id: bytes, state: str) -> messages.WhyReply:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        why = client.why(enclave_id)
        if why.state == state:
            return why
        time.sleep(0.01)
    raise AssertionError(f"still {why}")


def memfd(data: bytes, seals: int, *, size: int | None = None) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, data)
    if size is not None:
        os.ftruncate(fd, size)
    seal(fd, seals)
    return fd


@pytest.mark.parametrize(
    ("behaviour", "error", "text"),
    [
        ("dies", LaunchError, "worker ended while it started"),
        ("dies before it is ready", LaunchError, "worker ended while it started"),
        ("garbage", LaunchError, "broke the control protocol: malformed"),
        ("early running", LaunchError, "expected Shut; found Ready"),
        ("never shut", LaunchError, "expected Shut; found Closed"),
        ("shut twice", LaunchError, "expected Closed; found Shut"),
        ("dies when shut", LaunchError, "worker ended while it started"),
        ("many bits", LaunchError, "too many protection bits"),
        ("ending", ImageError, "the entry raised ImportError"),
        ("no worker", LaunchError, "clone: no memory"),
        ("no thread", LaunchError, "no thread for another enclave"),
        ("other runtime", RuntimeLockError, "the runtime differs"),
    ],
)
def test_a_worker_that_fails_is_a_typed_error_and_leaves_nothing(
    client: PlatformClient, launch: Launch, behaviour: str, error: type[EnclaveError], text: str
) -> None:
    fds, threads = fds_of(client), threads_of(client)
    with pytest.raises(error, match=text) as caught:
        launch(client, behaviour=behaviour)
    assert type(caught.value) is error
    if isinstance(caught.value, RuntimeLockError):
        assert caught.value.files == ("site:numpy/__init__.py changed",)
    assert settles(lambda: fds_of(client), fds)
    assert settles(lambda: threads_of(client), threads + AHEAD)
    assert client.list() == ()


def test_a_worker_that_says_nothing_holds_up_nobody_else(
    client: PlatformClient, state_path: Path, launch: Launch
) -> None:
    with PlatformClient.connect(state_path) as other:

        def attempt() -> None:
            with pytest.raises(EnclaveError):
                launch(other, behaviour="silent")

        thread = threading.Thread(target=attempt)
        thread.start()
        started = time.monotonic()
        launched, _ = launch(client, behaviour="good")
        assert time.monotonic() - started < 30  # the other would be given twice that
        client.close_enclave(launched.enclave_id)
        # What hosts do when they end: the connection goes while a launch is under way.
        other._channel._sock.shutdown(socket.SHUT_RDWR)
        thread.join(30)
        assert not thread.is_alive()


def test_a_zygote_that_takes_long_does_not_keep_the_platform_alive(
    client: PlatformClient,
) -> None:
    image = memfd(json.dumps({"behaviour": "slow zygote"}).encode(), ALL)
    ring = ring_module.create(1)
    client._channel.send(messages.Launch(), (image, ring))
    time.sleep(0.3)
    platform = os.pidfd_open(client.hello.pid)
    client.close()
    assert ended(platform, 20)
    for fd in (image, ring, platform):
        os.close(fd)


def test_an_enclave_gets_an_identity_from_the_platform_alone(
    client: PlatformClient, launch: Launch, tmp_path: Path
) -> None:
    told = tmp_path / "identity"
    launched, pidfd = launch(
        client, behaviour=f"tells {told}", code=7, product_id=300, security_version=9
    )
    assert not ended(pidfd, 0)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (told.exists() and told.stat().st_size == 400):
        time.sleep(0.01)
    body = ReportBody.from_bytes(told.read_bytes()[:384])
    assert told.read_bytes()[384:] == launched.enclave_id
    assert body.mrenclave == launched.mrenclave == bytes([7]) * 32
    assert body.mrsigner == launched.mrsigner == bytes(32)
    assert (body.isv_prod_id, body.isv_svn, body.report_data) == (300, 9, bytes(64))
    assert launched.debug
    assert body.attributes.flags == 0x1 | 0x4 | FLAG_DEBUG
    assert body.config_id == hashlib.sha256(launched.record).digest() + bytes(32)
    record = ProtectionRecord.from_bytes(launched.record)
    assert record.enclave_id == launched.enclave_id.hex()
    assert (record.level, record.tee, record.debug) == ("embedded", "none", True)
    client.close_enclave(launched.enclave_id)
    assert ended(pidfd, 0)


def test_a_workers_word_on_what_is_seen_outside_is_ignored(
    client: PlatformClient, launch: Launch
) -> None:
    # The fake worker is an ordinary process: anybody of the user may read it.
    launched, _ = launch(client, behaviour="liar")
    record = ProtectionRecord.from_bytes(launched.record)
    for name in ("dumpable_off", "seccomp", "no_new_privs", "pidns"):
        expected = name == "no_new_privs"  # inherited from the platform
        assert record.bits[name].by == "outside"
        assert bool(record.bits[name].value) is expected, name
    assert record.bits["landlock"].by == "inside"
    assert record.bits["landlock"].value == 7
    assert not record.holds("mdwe")
    assert not record.holds("secretmem")
    assert not record.holds("no such bit")


def test_a_production_worker_without_walls_is_refused_and_killed(
    client: PlatformClient, launch: Launch
) -> None:
    fds = fds_of(client)
    with pytest.raises(LaunchRefusedError, match="without dumpable_off, seccomp"):
        launch(client, behaviour="liar", signed=True)
    assert settles(lambda: fds_of(client), fds)


def test_each_record_is_signed_over_what_was_found_at_its_own_launch() -> None:
    """A record is signed ahead as the last one was; another finding is never given out so."""
    root = PlatformRoot(bytearray(range(32)), level="embedded", ephemeral=True)
    made = Drafts(root)
    wishes = [
        SimpleNamespace(judged=SimpleNamespace(info=SimpleNamespace(jit=False)), debug=debug)
        for debug in (False, True)
    ]
    held = {name: ProtectionBit(value=True, by="outside") for name in ("seccomp", "locked")}
    findings = [
        held,
        held,
        {**held, "locked": ProtectionBit(value=1, by="outside")},  # equal to True, not the same
        {**held, "locked": ProtectionBit(value=False, by="outside")},
        {**held, "locked": ProtectionBit(value=True, by="inside")},
        {"seccomp": held["seccomp"]},
        {},
        held,
    ]
    drafts = []
    for number, bits in enumerate(findings):
        expected = findings[number - 1] if number else {}
        drafts.append(made.draft(wishes[number == 7], expected))
        enclave_id = drafts[-1].enclave_id
        data = made.sign_record(wishes[0], drafts[-1], bits)
        record = ProtectionRecord.from_bytes(data)
        assert {name: (bit.value, bit.by) for name, bit in record.bits.items()} == {
            name: (bit.value, bit.by) for name, bit in bits.items()
        }
        assert [type(bit.value) for bit in record.bits.values()] == [
            type(bits[name].value) for name in record.bits
        ]
        assert (record.enclave_id, record.debug) == (enclave_id.hex(), False)
        r, s = record.signature[:32], record.signature[32:]
        der = encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
        key = root.attestation_key.public_key()
        key.verify(der, record.signed_bytes(), ec.ECDSA(hashes.SHA256()))
        # Signed ahead is used when, and only when, it is the same to the last byte.
        assert (drafts[-1].signature == record.signature) is (number == 1)
    assert len({draft.enclave_id for draft in drafts}) == len(findings)
    root.close()


@pytest.mark.parametrize("bit", ["mdwe", "pidns", "no such bit"])
def test_a_required_bit_that_does_not_hold_refuses_the_launch(
    client: PlatformClient, launch: Launch, bit: str
) -> None:
    with pytest.raises(LaunchRefusedError, match=f"without {bit}"):
        launch(client, options={"require": ("landlock", bit)})
    launched, _ = launch(client, options={"require": ("landlock",)})
    assert launched.debug


def test_a_required_bit_that_there_is_not_is_told_from_one_that_is_missing() -> None:
    bits: dict[str, bool | int] = {"seccomp": True, "netns": False}
    with pytest.raises(LaunchRefusedError, match="None is called seccmp: there are netns"):
        refuse_unless_held(bits, ("seccmp",), debug=True)
    with pytest.raises(LaunchRefusedError, match=r"without netns\..*pyenclave doctor"):
        refuse_unless_held(bits, ("netns",), debug=True)


@pytest.mark.parametrize(
    ("image", "debug", "text"),
    [
        ({"signed": False}, False, "unsigned image starts only as debug"),
        ({"signed": True, "debug": False}, True, "manifest does not allow debug"),
    ],
)
def test_debug_rules(
    client: PlatformClient, launch: Launch, image: dict[str, Any], debug: bool, text: str
) -> None:
    with pytest.raises(LaunchRefusedError, match=text):
        launch(client, options={"debug": debug}, **image)


def test_a_signed_image_starts_as_debug_only_when_asked(
    client: PlatformClient, launch: Launch
) -> None:
    launched, _ = launch(client, options={"debug": True}, signed=True)
    assert launched.debug
    with pytest.raises(LaunchRefusedError, match="lacks a required protection"):
        launch(client, signed=True)  # production: and the fake worker has no walls


POLICY = f"""
allow_unsigned = false
[[signer]]
mrsigner = "{"01" * 32}"
product_id = 1
security_version = 5
"""


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ({"signed": True, "security_version": 4}, "security version went back"),
        ({"signed": True, "security_version": 5, "product_id": 2}, "no rule for this signer"),
        ({"signed": True, "security_version": 5, "signer": 2}, "no rule for this signer"),
        ({"signed": False}, "allow_unsigned"),
    ],
)
def test_the_policy_file_decides_who_starts(
    client: PlatformClient, state_path: Path, launch: Launch, image: dict[str, Any], text: str
) -> None:
    options = {"debug": True}
    launched, _ = launch(client, options=options, signed=True, security_version=1)
    client.close_enclave(launched.enclave_id)
    policy = state_path / "launch-policy.toml"
    policy.write_text(POLICY)
    policy.chmod(0o600)
    launched, _ = launch(client, options=options, signed=True, security_version=5)
    client.close_enclave(launched.enclave_id)
    with pytest.raises(LaunchRefusedError, match=text):
        launch(client, options=options, **image)


def test_a_broken_policy_file_starts_nothing(
    client: PlatformClient, state_path: Path, launch: Launch
) -> None:
    policy = state_path / "launch-policy.toml"
    policy.touch(0o600)
    deep, long = f"require = {'[' * 5000}", f"allow_debug = {'1' * 5000}"
    texts = ("allow_debug = 1", "allow_debgu = true", "[[[", "require = [1]", "\udcff", deep, long)
    for text in texts:
        policy.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(LaunchRefusedError, match=r"launch-policy\.toml is not a valid policy"):
            launch(client)
    policy.write_text("")
    policy.chmod(0o666)
    with pytest.raises(LaunchError, match="open to other users"):
        launch(client)


def test_why_tells_how_each_enclave_ended(client: PlatformClient, launch: Launch) -> None:
    poisoned, poisoned_fd = launch(client, behaviour="poisons")
    assert wait_for(client, poisoned.enclave_id, "poisoned").reason == "sequence number went back"
    assert ended(poisoned_fd)
    killed, killed_fd = launch(client)
    assert client.why(killed.enclave_id) == messages.WhyReply(state="running", reason="")
    signal.pidfd_send_signal(killed_fd, signal.SIGKILL)
    assert wait_for(client, killed.enclave_id, "lost").reason == "the worker ended"
    closed, _ = launch(client)
    client.close_enclave(closed.enclave_id)
    client.close_enclave(closed.enclave_id)
    assert client.why(closed.enclave_id).state == "closed"
    strange, strange_fd = launch(client, behaviour="hello")
    assert "may not send Hello" in wait_for(client, strange.enclave_id, "lost").reason
    assert ended(strange_fd)
    with pytest.raises(ArgumentError, match="no such enclave"):
        client.why(b"x" * 16)
    with pytest.raises(ArgumentError, match="no such enclave"):
        client.close_enclave(b"x" * 16)


def test_another_host_can_list_and_kill_but_not_ask_why(
    client: PlatformClient, state_path: Path, launch: Launch
) -> None:
    launched, pidfd = launch(client, name="scoring")
    with PlatformClient.connect(state_path) as other:
        (row,) = other.list()
        assert (row.enclave_id, row.name, row.pid) == (launched.enclave_id, "scoring", launched.pid)
        with pytest.raises(ArgumentError):
            other.why(launched.enclave_id)
        with pytest.raises(ArgumentError):
            other.close_enclave(launched.enclave_id)
        other.kill(launched.enclave_id)
        assert other.list() == ()
    assert ended(pidfd, 0)
    assert "killed on request" in client.why(launched.enclave_id).reason


def test_enclaves_end_with_their_host(
    client: PlatformClient, state_path: Path, launch: Launch
) -> None:
    fds, threads = fds_of(client), threads_of(client)
    other = PlatformClient.connect(state_path)
    pidfds = [launch(other)[1] for _ in range(3)]
    assert len(client.list()) == 3
    other.close()
    assert all(ended(pidfd, 20) for pidfd in pidfds)
    assert settles(lambda: fds_of(client), fds)
    assert settles(lambda: threads_of(client), threads + AHEAD)


def test_many_launches_keep_descriptors_and_threads_constant(
    client: PlatformClient, launch: Launch
) -> None:
    def one() -> None:
        launched, _ = launch(client)
        client.close_enclave(launched.enclave_id)

    one()
    fds, threads = fds_of(client), threads_of(client)
    for _ in range(12):
        one()
    assert settles(lambda: fds_of(client), fds)
    assert settles(lambda: threads_of(client), threads + AHEAD)


def test_a_flooding_worker_that_does_not_read_is_ended(
    client: PlatformClient, launch: Launch
) -> None:
    launched, pidfd = launch(client, behaviour="floods")
    assert client.list()
    assert ended(pidfd, 30)
    assert wait_for(client, launched.enclave_id, "lost").reason


SEAL, SHRINK, GROW, WRITE = 1, 2, 4, 8
ALL = SEAL | SHRINK | GROW | WRITE


def descriptors(kind: str, tmp_path: Path) -> int:
    if kind == "pipe":
        read, write = os.pipe()
        os.close(write)
        return read
    if kind == "socket":
        left, right = socket.socketpair()
        right.close()
        return left.detach()
    if kind == "plain file":
        path = tmp_path / "plain"
        path.write_bytes(b"{}")
        return os.open(path, os.O_RDWR)
    if kind == "directory":
        return os.open(tmp_path, os.O_RDONLY)
    if kind == "empty":
        return memfd(b"", ALL)
    if kind == "unsealed":
        return memfd(b"{}", 0)
    if kind == "no WRITE":
        return memfd(b"{}", ALL & ~WRITE)
    if kind == "no SHRINK":
        return memfd(b"{}", ALL & ~SHRINK)
    if kind == "huge":
        return memfd(b"{}", ALL, size=1 << 40)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["pipe", "socket", "plain file", "directory", "empty", "unsealed", "no SHRINK", "huge"],
)
@pytest.mark.parametrize("place", ["image", "ring"])
def test_bnd_19_wrong_descriptors_are_refused_by_name_and_closed(
    client: PlatformClient, tmp_path: Path, kind: str, place: str
) -> None:
    good = {
        "image": memfd(json.dumps({}).encode(), ALL),
        "ring": ring_module.create(1),
    }
    before = fds_of(client)
    bad = descriptors(kind, tmp_path)
    given = {**good, place: bad}
    try:
        with pytest.raises(ArgumentError, match=f"of the {place}"):
            client.launch(given["image"], given["ring"])
    finally:
        for fd in (bad, *good.values()):
            os.close(fd)
    assert settles(lambda: fds_of(client), before)


def test_bnd_19_an_image_that_can_still_be_written_is_refused(
    client: PlatformClient, tmp_path: Path
) -> None:
    image, ring = descriptors("no WRITE", tmp_path), ring_module.create(1)
    with pytest.raises(ArgumentError, match="of the image"):
        client.launch(image, ring)
    os.close(image)
    os.close(ring)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_bnd_19_a_launch_takes_exactly_two_descriptors(client: PlatformClient, count: int) -> None:
    before = fds_of(client)
    fd = memfd(b"{}", ALL)
    client._channel.send(messages.Launch(), (fd,) * count)
    answer, _ = client._channel.receive(30)
    os.close(fd)
    assert isinstance(answer, messages.Failure)
    assert answer.code == "call.argument"
    assert settles(lambda: fds_of(client), before)


def answers_of(path: Path) -> list[messages.Message]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        data, found = path.read_bytes() if path.exists() else b"", []
        while data:
            size = int.from_bytes(data[:4], "little")
            if len(data) < 4 + size:
                break
            found.append(messages.decode(data[4 : 4 + size]))
            data = data[4 + size :]
        if len(found) == 12:
            return found
        time.sleep(0.02)
    raise AssertionError(f"only {found}")


def test_a_worker_gets_what_it_may_have_and_typed_refusals_for_the_rest(
    client: PlatformClient, launch: Launch, tmp_path: Path
) -> None:
    out = tmp_path / "answers"
    launched, _ = launch(client, behaviour=f"asks {out}")
    key, signer, report_key, short, report, verified, bad_report, quote, counter, *odd = answers_of(
        out
    )
    eaten, marked, badly_marked = odd
    assert isinstance(key, messages.KeyReply)
    assert len(key.key) == 32
    for answer, code, text in (
        (signer, "sealing", "unsigned"),
        (report_key, "sealing", "INVALID_KEYNAME"),
        (short, "attestation.format", "512"),
        (bad_report, "attestation.format", "64"),
        (eaten, "sealing", "unknown operation"),
        (marked, "sealing", "only an increment"),
        (badly_marked, "sealing", "a mark of 32 bytes"),
    ):
        assert isinstance(answer, messages.Failure)
        assert answer.code == code
        assert text in answer.message
    assert isinstance(report, messages.ReportReply)
    assert isinstance(verified, messages.Ok)
    assert isinstance(counter, messages.CounterValue)
    assert counter.value == 0
    assert isinstance(quote, messages.QuoteReply)
    parsed = Quote.from_bytes(quote.quote)
    assert parsed.report_body.report_data == b"q" * 64
    assert parsed.report_body.mrenclave == launched.mrenclave
    # The record and the quote are by one key, and the key by the chain.
    record = ProtectionRecord.from_bytes(launched.record)
    point = b"\x04" + parsed.attestation_key
    public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    r, s = record.signature[:32], record.signature[32:]
    der = encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
    public.verify(der, record.signed_bytes(), ec.ECDSA(hashes.SHA256()))
    chain = x509.load_pem_x509_certificates(parsed.certification_data)
    assert chain[2] == x509.load_der_x509_certificate(client.root().certificate)


def test_an_ephemeral_platform_refuses_to_seal_unless_asked(
    tmp_path: Path, fake_bootstrap: str, launch: Launch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with PlatformClient.connect(blocked / "state") as client:
        launched, _ = launch(client, behaviour=f"asks {tmp_path / 'refused'}")
        assert ProtectionRecord.from_bytes(launched.record).ephemeral
        answers = answers_of(tmp_path / "refused")
        for answer in (answers[0], answers[8]):
            assert isinstance(answer, messages.Failure)
            assert "ephemeral" in answer.message
        assert isinstance(answers[7], messages.QuoteReply)
        launch(client, behaviour=f"asks {tmp_path / 'asked'}", options={"allow_ephemeral": True})
        answers = answers_of(tmp_path / "asked")
        assert isinstance(answers[0], messages.KeyReply)
        assert isinstance(answers[8], messages.CounterValue)


def test_enclaves_end_when_the_platform_is_killed_and_the_next_launch_works(
    state_path: Path, fake_bootstrap: str, launch: Launch
) -> None:
    with PlatformClient.connect(state_path) as client:
        _, pidfd = launch(client)
        os.kill(client.hello.pid, signal.SIGKILL)
        assert ended(pidfd, 20)  # the fake worker sees its channel's end
        with pytest.raises(EnclaveLostError):
            client.list()
    with PlatformClient.connect(state_path) as client:
        launched, _ = launch(client)
        assert client.why(launched.enclave_id).state == "running"


def test_bytes_that_are_no_image_are_refused(client: PlatformClient) -> None:
    image, ring = memfd(b"no image", ALL), ring_module.create(1)
    with pytest.raises(ImageError):
        client.launch(image, ring)
    os.close(image)
    os.close(ring)
