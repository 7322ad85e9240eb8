"""The TPM client: what a TPM may answer, and a software TPM with two other clients beside it."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import socket
import subprocess
import threading
import tty

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import TpmError
from pyenclave.formats import tpm_wire as wire
from pyenclave.formats.tpm import PcrSelection
from pyenclave.testing.vtpm import AK_HANDLE
from pyenclave.tpm import OWNER, Tpm, connect

ALL = (PcrSelection("sha256", tuple(range(24))),)
OK, SESSIONS = 0x8001, 0x8002


def answer(body: bytes = b"", *, code: int = 0, tag: int = OK, size: int | None = None) -> bytes:
    total = 10 + len(body) if size is None else size
    return tag.to_bytes(2, "big") + total.to_bytes(4, "big") + code.to_bytes(4, "big") + body


def with_session(parameters: bytes) -> bytes:
    return answer(len(parameters).to_bytes(4, "big") + parameters + b"\0\0\1\0\0", tag=SESSIONS)


class Scripted:
    """A TPM that says what it is told."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.commands: list[bytes] = []
        self.closed = False

    def exchange(self, command: bytes, timeout: float) -> bytes:
        assert timeout > 0
        self.commands.append(command)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def close(self) -> None:
        self.closed = True

    fileno = None


def client(*answers: bytes, **options: object) -> Tpm:
    waited: list[float] = []
    options.setdefault("sleep", waited.append)
    return Tpm(Scripted(*answers), **options)  # type: ignore[arg-type]


# ---- hostile answers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "size"),
        (b"\x80\x01", "size"),
        (answer(size=9), "size"),
        (answer(size=5000), "size"),
        (answer(b"xx", size=11), "size"),
        (answer(tag=0x8003), "tag"),
        (answer(tag=0x00C4, code=0x1E), "TPM 1.2"),
        (answer(b"x", code=0x101), "ten bytes"),
        (answer(tag=SESSIONS), "sessions as in the command"),
        (answer(b"\0\x05abc"), "cut off"),
        (answer(b"\xff\xff"), "size of public area"),
    ],
)
def test_a_malformed_answer_is_a_typed_error_that_names_what_is_wrong(data, words):
    with pytest.raises(TpmError, match=words):
        client(data).nv_public(0x01400001)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (answer(b"\0\0"), "sessions as in the command"),
        (answer(b"\0\0\0\xff", tag=SESSIONS), "cut off"),
        (answer(b"\0\0\0\0", tag=SESSIONS), "nonce of a password session"),
        (answer(b"\0\0\0\0\0\1N\1\0\0", tag=SESSIONS), "no nonce"),
        (answer(b"\0\0\0\0\0\0\1\0\1A", tag=SESSIONS), "no acknowledgement"),
        (answer(b"\0\0\0\0\0\0\1\0\0+", tag=SESSIONS), "follow the end"),
        (with_session(b"+"), "follow the end"),
    ],
)
def test_a_malformed_session_area_is_refused(data, words):
    with pytest.raises(TpmError, match=words):
        client(data).nv_increment(0x01800000)


def nv_public(size: int = 64, index: int = 0x01400001, attributes: int = 0x60006) -> bytes:
    public = wire.NvPublic(index=index, attributes=attributes, size=size)
    return answer(wire.sized(public.to_bytes()) + wire.sized(public.name))


def test_the_public_area_of_another_index_is_refused():
    with pytest.raises(TpmError, match="another NV index"):
        client(nv_public()).nv_public(0x01400002)


def test_an_index_with_a_wrong_name_is_refused():
    data = bytearray(nv_public())
    data[-1] ^= 1
    with pytest.raises(TpmError, match="name of an NV index"):
        client(bytes(data)).nv_public(0x01400001)


def test_fewer_bytes_than_were_asked_for_are_refused_and_not_asked_for_for_ever():
    buffer = answer(b"\0" + b"".join(n.to_bytes(4, "big") for n in (6, 1, 0x12C, 1024)))
    tpm = client(nv_public(), buffer, with_session(wire.sized(b"")))
    with pytest.raises(TpmError, match="another number of bytes"):
        tpm.nv_read(0x01400001)


def test_more_bytes_than_were_asked_for_are_refused():
    buffer = answer(b"\0" + b"".join(n.to_bytes(4, "big") for n in (6, 1, 0x12C, 1024)))
    tpm = client(nv_public(), buffer, with_session(wire.sized(bytes(65))))
    with pytest.raises(TpmError, match="size of NV data"):
        tpm.nv_read(0x01400001)


def test_an_index_that_no_password_reads_is_refused_before_it_is_tried():
    with pytest.raises(TpmError, match="ownerread or authread"):
        client(nv_public(attributes=0x6)).nv_read(0x01400001)


def pcrs(values: list[bytes], *, counter: int = 1, bits: bytes = b"\xff\0\0") -> bytes:
    selection = b"\0\0\0\1\0\x0b\x03" + bits
    listed = len(values).to_bytes(4, "big") + b"".join(wire.sized(item) for item in values)
    return answer(counter.to_bytes(4, "big") + selection + listed)


def test_pcrs_that_change_for_ever_end_in_an_error():
    calls = iter(range(1000))

    class Changing(Scripted):
        def exchange(self, command: bytes, timeout: float) -> bytes:
            return pcrs([bytes(32)] * 8, counter=next(calls))

    with pytest.raises(TpmError, match="faster than they can be read"):
        Tpm(Changing(b"")).pcr_read(ALL)


@pytest.mark.parametrize(
    "data",
    [pcrs([]), pcrs([bytes(32)] * 7), pcrs([bytes(32)] * 9), pcrs([b""] * 8, bits=b"\0\0\0")],
)
def test_pcr_values_that_are_not_those_asked_for_are_refused(data):
    with pytest.raises(TpmError):
        client(data).pcr_read(ALL)


def test_a_pcr_that_was_not_asked_for_is_refused():
    with pytest.raises(TpmError, match="not asked for"):
        client(pcrs([bytes(32)] * 8)).pcr_read((PcrSelection("sha256", (23,)),))


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_whatever_a_tpm_answers_is_a_result_or_a_typed_error(data):
    """Fuzzed bodies in well-formed frames, and fuzzed frames."""
    for reply in (data, answer(data), with_session(data)):
        tpm = client(reply)
        for call in (
            lambda tpm=tpm: tpm.nv_public(0x01400001),
            lambda tpm=tpm: tpm.nv_read(0x01400001),
            lambda tpm=tpm: tpm.nv_increment(0x01400001),
            lambda tpm=tpm: tpm.read_public(AK_HANDLE),
            lambda tpm=tpm: tpm.quote(AK_HANDLE, b"nonce", ALL),
            lambda tpm=tpm: tpm.pcr_read(ALL),
        ):
            with contextlib.suppress(TpmError):
                call()


@given(st.integers(0, 0xFFFFFFFF))
@settings(max_examples=300)
def test_every_response_code_has_words(code):
    name, text = wire.words(code)
    assert name
    assert hex(code) in text


@pytest.mark.parametrize(
    ("code", "name", "text"),
    [
        (0x18B, "TPM_RC_HANDLE", "handle 1: there is no such object"),
        (0x28B, "TPM_RC_HANDLE", "handle 2: there is no such object"),
        (0x9A2, "TPM_RC_BAD_AUTH", "session 1: the authorisation is wrong"),
        (0x1C4, "TPM_RC_VALUE", "parameter 1: out of range"),
        (0xAC4, "TPM_RC_VALUE", "parameter 10: out of range"),
        (0x14A, "TPM_RC_NV_UNINITIALIZED", "never written"),
        (0x922, "TPM_RC_RETRY", "send it again"),
        (0xB0143, "TPM_RC_COMMAND_CODE", "layer 11 above the TPM"),
        (0x500, "unknown", "vendor"),
        (0x1E, "unknown", "TPM 1.2"),
    ],
)
def test_response_codes_are_named_in_words(code, name, text):
    found, words = wire.words(code)
    assert found == name
    assert text in words


# ---- busy, late, gone -------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(wire.RETRIED))
def test_a_busy_tpm_is_asked_again_and_not_for_ever(code):
    transport = Scripted(answer(code=code))
    waited: list[float] = []
    tpm = Tpm(transport, attempts=4, sleep=waited.append)
    with pytest.raises(TpmError, match="busy for too long") as caught:
        tpm.nv_exists(0x01400001)
    assert caught.value.rc == code
    assert len(transport.commands) == 4
    assert waited == sorted(waited)
    assert len(waited) == 3


def test_a_tpm_that_was_busy_once_answers_the_same_command():
    tpm = client(answer(code=0x922), nv_public())
    assert tpm.nv_public(0x01400001).size == 64
    commands = tpm._transport.commands
    assert commands[0] == commands[1]


def test_retries_end_with_the_timeout():
    now = [0.0]
    transport = Scripted(answer(code=0x922))

    def sleep(seconds: float) -> None:
        now[0] += 40

    tpm = Tpm(transport, timeout=30, sleep=sleep, clock=lambda: now[0])
    with pytest.raises(TpmError, match="busy"):
        tpm.nv_exists(0x01400001)
    assert len(transport.commands) == 1


@pytest.fixture
def silent(tmp_path):
    """A socket whose other end does what `act` says."""
    path = str(tmp_path / "tpm")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    kept = []

    def run(act) -> str:
        def serve() -> None:
            peer, _ = listener.accept()
            kept.append(peer)
            act(peer)

        threading.Thread(target=serve, daemon=True).start()
        return path

    yield run
    listener.close()
    for peer in kept:
        peer.close()


def test_a_tpm_that_never_answers_ends_in_time_and_is_not_used_again(silent):
    transport = connect(silent(lambda peer: peer.recv(100)))
    with pytest.raises(TpmError, match="did not answer in time"):
        transport.exchange(wire.command(0x169, (0x01400001,)), 0.05)
    with pytest.raises(TpmError, match="closed"):
        transport.exchange(wire.command(0x169, (0x01400001,)), 0.05)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"\x80\x01\0\0", "middle of an answer"),
        (answer(b"abc", size=14), "middle of an answer"),
        (answer(size=1 << 30), "the size"),
        (answer(b"abc", size=10), "bytes follow"),
    ],
)
def test_a_cut_or_overlong_answer_is_refused(silent, sent, words):
    def act(peer) -> None:
        peer.recv(100)
        peer.sendall(sent)
        peer.close()

    transport = connect(silent(act))
    with pytest.raises(TpmError, match=words):
        transport.exchange(wire.command(0x169, (1,)), 5)


def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_one(silent):
    ready = threading.Event()

    def act(peer) -> None:
        peer.sendall(answer())
        ready.set()

    transport = connect(silent(act))
    assert ready.wait(10)
    with pytest.raises(TpmError, match="nobody asked for"):
        transport.exchange(wire.command(0x169, (1,)), 5)


def test_an_answer_in_pieces_is_put_together(silent):
    def act(peer) -> None:
        peer.recv(100)
        for byte in answer(b"hello"):
            peer.sendall(bytes([byte]))

    transport = connect(silent(act))
    assert transport.exchange(wire.command(0x169, (1,)), 10) == answer(b"hello")
    transport.close()
    transport.close()


def test_a_device_is_spoken_to_like_a_socket():
    """A terminal stands for /dev/tpmrm0: a character device that can be polled."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    path = os.ttyname(slave)

    def serve() -> None:
        os.read(master, 100)
        os.write(master, nv_public())

    threading.Thread(target=serve, daemon=True).start()
    with Tpm.open(path, timeout=10) as tpm:
        assert tpm.nv_public(0x01400001).size == 64
    os.close(slave)
    os.close(master)


def test_a_device_can_be_had_alone_and_is_waited_for_in_bounds():
    master, slave = pty.openpty()
    path = os.ttyname(slave)
    with Tpm.open(path) as first, Tpm.open(path) as second:
        with first.exclusive(), pytest.raises(TpmError, match="another process held"):  # noqa: SIM117
            with second.exclusive(0.02):
                pass
        with second.exclusive(0.02):
            pass
        with first.exclusive():
            first.close()  # the lock goes with the descriptor
        with second.exclusive(0.02):
            pass
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize("address", ["", "a\0b", "tabrmd:", "mssim:host=x", "swtpm:nonsense"])
def test_an_address_of_no_known_form_is_a_usage_error(address):
    with pytest.raises(ValueError, match=r"TPM|swtpm"):
        connect(address)


def test_a_device_that_is_not_there_or_not_ours_is_a_typed_error(tmp_path):
    with pytest.raises(TpmError, match="No such file"):
        connect(str(tmp_path / "tpmrm0"))
    with pytest.raises(TpmError, match="cannot be opened"):
        connect("127.0.0.1:1")


def test_a_command_that_no_tpm_takes_is_a_usage_error():
    with pytest.raises(ValueError, match="4096"):
        wire.command(0x137, parameters=bytes(5000))
    with pytest.raises(ValueError, match="64 bytes"):
        client(answer()).quote(AK_HANDLE, bytes(67), ALL)


# ---- a software TPM ---------------------------------------------------------------------------


def test_an_index_is_defined_written_read_and_removed(tpm):
    index = 0x01500001
    assert not tpm.nv_exists(index)
    tpm.nv_define(index, 2000)
    with pytest.raises(TpmError, match="never written") as caught:
        tpm.nv_read(index)
    assert caught.value.rc == wire.RC_NV_UNINITIALIZED
    with pytest.raises(TpmError, match="exists already") as caught:
        tpm.nv_define(index, 2000)
    assert caught.value.rc == wire.RC_NV_DEFINED
    data = bytes(range(250)) * 8
    tpm.nv_write(index, data)
    assert tpm.nv_read(index) == data
    tpm.nv_write(index, b"xyz", offset=1999 - 2)
    assert tpm.nv_read(index) == data[:-3] + b"xyz"
    with pytest.raises(TpmError, match="TPM_RC_NV_RANGE"):
        tpm.nv_write(index, b"xyz", offset=1999)
    tpm.nv_undefine(index)
    assert not tpm.nv_exists(index)
    with pytest.raises(TpmError, match="handle 1") as caught:
        tpm.nv_read(index)
    assert caught.value.rc == wire.RC_HANDLE


def test_an_index_with_a_password_wants_it(tpm):
    index = 0x01500002
    attributes = wire.NV_AUTHREAD | wire.NV_AUTHWRITE | wire.NV_NO_DA
    tpm.nv_define(index, 8, attributes, password=b"secret")
    tpm.nv_write(index, b"12345678", password=b"secret", by=index)
    assert tpm.nv_read(index, password=b"secret") == b"12345678"
    with pytest.raises(TpmError, match="session 1: the authorisation is wrong"):
        tpm.nv_read(index, password=b"guess")
    tpm.nv_undefine(index)


def test_a_counter_only_grows_even_if_it_is_made_anew(tpm):
    index = 0x01500003
    attributes = wire.NV_OWNERREAD | wire.NV_OWNERWRITE | wire.NV_COUNTER
    tpm.nv_define(index, 8, attributes)
    tpm.nv_increment(index)
    first = tpm.nv_counter(index)
    tpm.nv_increment(index)
    assert tpm.nv_counter(index) == first + 1
    tpm.nv_undefine(index)
    tpm.nv_define(index, 8, attributes)
    tpm.nv_increment(index)
    assert tpm.nv_counter(index) > first + 1
    with pytest.raises(TpmError, match="TPM_RC_ATTRIBUTES"):
        tpm.nv_write(index, bytes(8))
    tpm.nv_undefine(index)


def test_what_is_no_counter_is_none(tpm):
    tpm.nv_define(0x01500004, 8)
    tpm.nv_write(0x01500004, bytes(8))
    with pytest.raises(TpmError, match="no counter"):
        tpm.nv_counter(0x01500004)
    with pytest.raises(TpmError, match="TPM_RC_ATTRIBUTES"):
        tpm.nv_increment(0x01500004)
    tpm.nv_undefine(0x01500004)


def test_all_pcrs_are_read_though_a_tpm_gives_eight_at_a_time(tpm):
    values = tpm.pcr_read((PcrSelection("sha256", tuple(range(24))), PcrSelection("sha1", (0,))))
    assert set(values["sha256"]) == set(range(24))
    assert {len(item) for item in values["sha256"].values()} == {32}
    assert len(values["sha1"][0]) == 20


def test_a_quote_has_the_nonce_and_a_key_that_is_none_is_refused(tpm):
    assert tpm.quote(AK_HANDLE, b"n" * 64, ALL).attest.extra_data == b"n" * 64
    assert tpm.read_public(AK_HANDLE).bits == 2048
    with pytest.raises(TpmError, match="TPM_RC_HANDLE"):
        tpm.quote(0x81000099, b"n", ALL)


class Altered:
    """A TPM between us and the real one that changes answers, or sends old ones."""

    fileno = None

    def __init__(self, real, change) -> None:
        self.real = real
        self.change = change

    def exchange(self, command: bytes, timeout: float) -> bytes:
        return self.change(self.real.exchange(command, timeout))

    def close(self) -> None:
        pass


def test_a_quote_over_another_nonce_or_other_pcrs_is_refused(tpm):
    kept = []

    def old(answer: bytes) -> bytes:
        kept.append(answer)
        return kept[0]

    between = Tpm(Altered(tpm._transport, old))
    some = (PcrSelection("sha256", (0, 1, 2)),)
    between.quote(AK_HANDLE, b"nonce", some)
    with pytest.raises(TpmError, match="another nonce"):
        between.quote(AK_HANDLE, b"other", some)
    for pcrs in (ALL, (PcrSelection("sha1", (0, 1, 2)),)):
        with pytest.raises(TpmError, match="other PCRs"):
            between.quote(AK_HANDLE, b"nonce", pcrs)


def test_a_key_whose_name_is_not_its_own_is_refused(tpm):
    """Another modulus under the same name."""

    def other(answer: bytes) -> bytes:
        return answer[:200] + bytes([answer[200] ^ 1]) + answer[201:]

    with pytest.raises(TpmError, match="name of a key"):
        Tpm(Altered(tpm._transport, other)).read_public(AK_HANDLE)


def test_a_tpm_by_tcp_is_spoken_to_like_one_by_a_socket():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(100)
                peer.sendall(nv_public())

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        with Tpm.open(f"swtpm:host=127.0.0.1,port={port}") as tpm:
            assert tpm.nv_public(0x01400001).size == 64
        thread.join(10)


def test_threads_may_share_a_client(tpm):
    errors = []

    def work() -> None:
        try:
            for _ in range(20):
                assert len(tpm.pcr_read(ALL)["sha256"]) == 24
        except (AssertionError, TpmError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---- other clients see the same ---------------------------------------------------------------


@pytest.fixture
def tools(swtpm, tmp_path):
    """Run a program of tpm2-tools on the same TPM."""
    if shutil.which("tpm2_nvread") is None:
        pytest.skip("tpm2-tools are not installed")

    def run(*command: str) -> bytes:
        environment = {**os.environ, "TPM2TOOLS_TCTI": swtpm.address}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, check=True, timeout=60
        )
        return done.stdout

    return run


def test_tpm2_tools_read_what_we_wrote_and_we_what_they_wrote(swtpm, tools, tmp_path):
    index = "0x01500010"
    with swtpm.open() as tpm:
        tpm.nv_define(int(index, 0), 1500)
        tpm.nv_write(int(index, 0), b"ours" * 375)
    assert tools("tpm2_nvread", "-C", "o", index) == b"ours" * 375
    (tmp_path / "data").write_bytes(b"them" * 375)
    tools("tpm2_nvwrite", "-C", "o", "-i", "data", index)
    with swtpm.open() as tpm:
        assert tpm.nv_read(int(index, 0)) == b"them" * 375
        public = tpm.nv_public(int(index, 0))
    shown = tools("tpm2_nvreadpublic", index).decode()
    assert f"value: 0x{public.attributes:X}".lower() in shown.lower()
    assert f"name: {public.name.hex()}" in shown
    tools("tpm2_nvundefine", "-C", "o", index)


def test_tpm2_tools_check_our_quote_and_we_read_their_pcrs(swtpm, tools, tmp_path):
    with swtpm.open() as tpm:
        quoted = tpm.quote(AK_HANDLE, b"qualification", ALL)
        values = tpm.pcr_read(ALL)["sha256"]
    (tmp_path / "msg").write_bytes(quoted.message)
    (tmp_path / "sig").write_bytes(quoted.signature)
    tools("tpm2_readpublic", "-c", f"{AK_HANDLE:#x}", "-o", "ak.pem", "-f", "pem", "-Q")
    nonce = b"qualification".hex()
    tools("tpm2_checkquote", "-u", "ak.pem", "-m", "msg", "-s", "sig", "-q", nonce)
    tools("tpm2_pcrread", "sha256:all", "-o", "pcrs")
    assert (tmp_path / "pcrs").read_bytes() == b"".join(values[n] for n in range(24))


def test_tpm2_pytss_sees_the_same(swtpm):
    """tpm2-pytss wraps the TCG's own stack; it has to be compiled, so it is often not there."""
    pytss = pytest.importorskip("tpm2_pytss", reason="tpm2-pytss is not installed")
    index = 0x01500011
    with swtpm.open() as tpm:
        tpm.nv_define(index, 100)
        tpm.nv_write(index, b"w" * 100)
        public, name = tpm.nv_public(index), tpm.read_public(AK_HANDLE).name
    with pytss.ESAPI(swtpm.address) as esys:
        handle = esys.tr_from_tpmpublic(index)
        theirs, nv_name = esys.nv_read_public(handle)
        assert theirs.nvPublic.dataSize == public.size
        assert int(theirs.nvPublic.attributes) == public.attributes
        assert bytes(nv_name) == public.name
        assert bytes(esys.nv_read(handle, 100, auth_handle=pytss.ESYS_TR.OWNER)) == b"w" * 100
        key = esys.tr_from_tpmpublic(AK_HANDLE)
        assert bytes(esys.read_public(key)[1]) == name
    with swtpm.open() as tpm:
        tpm.nv_undefine(index)
        assert int(pytss.TPM2_RH.OWNER) == OWNER
