"""The API inside an enclave, against a model of the platform at the other end of the channel."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import hmac
import inspect
import pickle
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pyenclave import trusted
from pyenclave.calls.channel import Channel
from pyenclave.errors import (
    ArgumentError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
    EvidenceFormatError,
    NotInEnclaveError,
    RollbackError,
    SealingError,
    UnsealError,
)
from pyenclave.formats import evidence as evidence_format
from pyenclave.formats import messages
from pyenclave.formats.sealed import split
from pyenclave.formats.sgx import Attributes, KeyRequest, ReportBody, TargetInfo
from pyenclave.sealed import provision
from pyenclave.trusted import SealPolicy, _runtime, _state

RECORD = b"a signed record"


def report_body(**changes: object) -> ReportBody:
    debug = changes.pop("debug", False)
    values: dict[str, object] = {
        "cpu_svn": struct.pack("<H14x", 1),
        "attributes": Attributes(flags=7 if debug else 5, xfrm=3),
        "mrenclave": b"\x11" * 32,
        "mrsigner": b"\x22" * 32,
        "config_id": hashlib.sha256(RECORD).digest() + bytes(32),
        "isv_prod_id": 7,
        "isv_svn": 3,
    }
    return ReportBody(**(values | changes))  # type: ignore[arg-type]


class ModelPlatform:
    """Answers one worker; keys, reports and counters as the platform has them."""

    def __init__(self, body: ReportBody) -> None:
        self.body = body
        self.worker, self.end = Channel.pair()
        self.counters: dict[bytes, tuple[int, bytes]] = {}  # value, mark of the newest blob
        self.answer_with: messages.Message | None = None
        self.requests: list[messages.Message] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.worker.close()
        self.thread.join(2)
        self.end.close()

    def _serve(self) -> None:
        with contextlib.suppress(EnclaveLostError, OSError, ValueError):
            while True:
                message, _ = self.end.receive()
                self.requests.append(message)
                self.end.send(self.answer_with or self._answer(message))

    def _answer(self, message: messages.Message) -> messages.Message:
        match message:
            case messages.KeyRequestMessage(request=raw):
                request = KeyRequest.from_bytes(raw)
                if request.isv_svn > self.body.isv_svn:
                    return messages.Failure(code="sealing", message="INVALID_ISVSVN (64)")
                identity = self.body.mrenclave if request.key_policy & 1 else b""
                identity += self.body.mrsigner if request.key_policy & 2 else b""
                info = raw + identity + bytes([self.body.attributes.debug])
                return messages.KeyReply(key=hmac.digest(b"root", info, "sha256"))
            case messages.QuoteRequest(data=data):
                return messages.QuoteReply(quote=b"quote over " + data)
            case messages.ReportRequest(target=target, data=data):
                body = self.body.to_bytes()[:320] + data
                mac = hmac.digest(b"report" + target, body, "md5")
                return messages.ReportReply(report=body + bytes(32) + mac)
            case messages.VerifyReport(report=report):
                target = TargetInfo.of(self.body).to_bytes()
                mac = hmac.digest(b"report" + target, report[:384], "md5")
                if hmac.compare_digest(mac, report[416:]):
                    return messages.Ok()
                return messages.Failure(code="attestation", message="the MAC does not hold")
            case messages.CounterRequest():
                return self._count(message)
        raise AssertionError(message)

    def _count(self, asked: messages.CounterRequest) -> messages.Message:
        name, operation = asked.counter_id, asked.operation
        if operation == "create":
            name = len(self.counters).to_bytes(16, "big")
            self.counters[name] = (0, b"")
        elif name not in self.counters:
            return messages.Failure(code="sealing.rollback", message="no such counter")
        value, mark = self.counters[name]
        if operation == "increment":
            done = asked.mark and (value - 1, mark) == (asked.expected, asked.mark)
            if not done:
                if asked.expected not in (None, value):
                    return messages.Failure(code="sealing.rollback", message="another value")
                value, mark = self.counters[name] = (value + 1, asked.mark)
        elif operation == "destroy":
            del self.counters[name]
        return messages.CounterValue(counter_id=name, value=value, mark=mark)

    def identity(self, **changes: object) -> messages.Identity:
        values: dict[str, object] = {
            "enclave_id": b"e" * 16,
            "body": self.body.to_bytes(),
            "debug": self.body.attributes.debug,
            "level": "embedded",
            "record": RECORD,
            "seed": bytes(32),
        }
        return messages.Identity(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def inside() -> Iterator[object]:
    """A function that makes this process the enclave with the given identity."""
    platforms: list[ModelPlatform] = []

    def become(**changes: object) -> ModelPlatform:
        _runtime.stop()
        platform = ModelPlatform(report_body(**changes))
        if platforms:
            platform.counters = platforms[-1].counters
        platforms.append(platform)
        _runtime.start(platform.worker, platform.identity(), None)  # type: ignore[arg-type]
        return platform

    yield become
    _runtime.stop()
    for platform in platforms:
        platform.close()


# ---- outside ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: trusted.seal(b""),
        lambda: trusted.unseal(b""),
        lambda: trusted.attest(bytes(64)),
        lambda: trusted.receive(b""),
        lambda: trusted.report(bytes(512)),
        lambda: trusted.verify_report(bytes(432)),
        lambda: trusted.set_user_data(b""),
        trusted.target_info,
        trusted.identity,
        trusted.Counter.create,
        lambda: trusted.Counter(bytes(16)).read(),
    ],
)
def test_outside_an_enclave_every_function_says_so(call):
    with pytest.raises(NotInEnclaveError, match="only inside"):
        call()


def test_importing_the_module_is_cheap_and_loads_no_cryptography():
    code = (
        "import sys, pyenclave.trusted; heavy = ('cryptography', 'numpy', 'msgspec');"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []


def test_a_marked_function_stays_an_ordinary_function():
    def double(x: int) -> int:
        return 2 * x

    assert trusted.ecall(double) is double
    assert double.__pyenclave_ecall__ is True
    assert double(21) == 42
    assert not hasattr(test_a_marked_function_stays_an_ordinary_function, "__pyenclave_ecall__")


@pytest.mark.parametrize("wrong", [int, 3, len, "name", None])
def test_only_functions_can_be_marked(wrong):
    with pytest.raises(TypeError, match="functions"):
        trusted.ecall(wrong)


def test_only_public_errors_are_public():
    assert trusted.PublicError.public is True
    assert not getattr(ValueError("x"), "public", False)


# ---- start ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"body": bytes(383)}, {"seed": bytes(31)}, {"debug": True}, {"body": b""}]
)
def test_a_malformed_identity_is_refused(changes):
    platform = ModelPlatform(report_body())
    with pytest.raises(EnclaveStateError):
        _runtime.start(platform.worker, platform.identity(**changes), None)  # type: ignore[arg-type]
    assert _state.runtime is None
    platform.close()


def test_a_process_is_one_enclave_only(inside):
    platform = inside()
    with pytest.raises(EnclaveStateError, match="already"):
        _runtime.start(platform.worker, platform.identity(), None)


def test_the_runtime_key_is_new_for_each_launch(inside):
    inside()
    first = _runtime.current().key.public
    inside()
    assert len(first) == evidence_format.RUNTIME_KEY_SIZE
    assert _runtime.current().key.public != first


def test_identity_says_what_the_platform_said(inside):
    inside(debug=True)
    identity = trusted.identity()
    assert (identity.mrenclave, identity.mrsigner) == (b"\x11" * 32, b"\x22" * 32)
    assert (identity.product_id, identity.security_version, identity.platform_svn) == (7, 3, 1)
    assert identity.debug
    assert identity.level == "embedded"


def test_target_info_is_the_one_of_the_specification(inside):
    inside()
    assert trusted.target_info() == TargetInfo.of(report_body()).to_bytes()


# ---- sealing ----------------------------------------------------------------------------------


def test_sealed_data_opens_in_the_next_launch(inside):
    inside()
    blob = trusted.seal(b"data", aad=b"for this")
    inside()
    assert trusted.unseal(blob, aad=b"for this") == b"data"


def test_sea_01_an_older_version_of_the_code_never_opens_newer_data(inside):
    inside(isv_svn=4)
    blob = trusted.seal(b"data")
    inside(isv_svn=3)
    with pytest.raises(UnsealError, match="newer"):
        trusted.unseal(blob)
    inside(isv_svn=5)
    assert trusted.unseal(blob) == b"data"


def test_sea_02_policies_open_for_whom_they_name(inside):
    inside()
    unique = trusted.seal(b"data", policy=SealPolicy.unique)
    signer = trusted.seal(b"data", policy=SealPolicy.signer)
    anyone = trusted.seal(b"data", policy=SealPolicy.dangerous_any_enclave)
    inside(mrenclave=b"\x33" * 32)
    assert trusted.unseal(signer) == b"data"
    with pytest.raises(UnsealError, match="another measurement"):
        trusted.unseal(unique)
    inside(mrenclave=b"\x33" * 32, mrsigner=b"\x44" * 32)
    assert trusted.unseal(anyone) == b"data"
    with pytest.raises(UnsealError, match="another signer"):
        trusted.unseal(signer)


def test_the_default_policy_is_the_signer_or_for_unsigned_images_the_measurement(inside):
    inside()
    assert split(trusted.seal(b""))[0].key_policy == SealPolicy.signer.value
    inside(mrsigner=bytes(32))
    assert split(trusted.seal(b""))[0].key_policy == SealPolicy.unique.value
    with pytest.raises(SealingError, match="signed image"):
        trusted.seal(b"", policy=SealPolicy.signer)


@pytest.mark.parametrize(
    ("named", "signed", "policy"),
    [
        ({"policy": "signer"}, True, SealPolicy.signer),
        ({"policy": "signer"}, False, SealPolicy.unique),
        ({"policy": "unique"}, True, SealPolicy.unique),
        ({}, True, SealPolicy.signer),
    ],
)
def test_the_image_chooses_the_default_policy(named, signed, policy):
    class Info:
        name, seal = "image", named

    platform = ModelPlatform(report_body(mrsigner=b"\x22" * 32 if signed else bytes(32)))
    runtime = _runtime.Runtime(platform.worker, platform.identity(), Info())  # type: ignore[arg-type]
    assert runtime.default_policy is policy
    platform.close()


def test_sea_06_debug_and_production_never_share_sealed_data(inside):
    inside(debug=True)
    blob = trusted.seal(b"data")
    inside()
    with pytest.raises(UnsealError, match="debug"):
        trusted.unseal(blob)


def test_a_refusal_of_the_platform_becomes_a_typed_error(inside):
    platform = inside()
    platform.answer_with = messages.Failure(code="sealing", message="the root is ephemeral")
    with pytest.raises(SealingError, match="ephemeral"):
        trusted.seal(b"data")


def test_a_key_of_another_size_is_refused(inside):
    platform = inside()
    platform.answer_with = messages.KeyReply(key=bytes(16))
    with pytest.raises(SealingError, match="wrong size"):
        trusted.seal(b"data")


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_sealed(inside, buffer):
    inside()
    blob = trusted.seal(buffer(b"data"), aad=buffer(b"aad"))
    assert trusted.unseal(buffer(blob), aad=buffer(b"aad")) == b"data"


# ---- counters ---------------------------------------------------------------------------------


def test_sea_11_only_the_newest_blob_of_a_counter_opens(inside):
    inside()
    counter = trusted.Counter.create()
    old = trusted.seal(b"100", counter=counter)
    new = trusted.seal(b"0", counter=counter)
    assert trusted.unseal(new, counter=counter) == b"0"
    with pytest.raises(RollbackError, match="newest"):
        trusted.unseal(old, counter=counter)
    with pytest.raises(RollbackError, match="newest"):
        trusted.unseal(old)  # a bound blob is always compared
    inside()
    assert trusted.unseal(new) == b"0"
    with pytest.raises(RollbackError):
        trusted.unseal(old)


def test_sea_11_a_crash_between_storing_and_incrementing_loses_nothing(inside):
    inside()
    counter = trusted.Counter.create()
    first = trusted.seal(b"first", counter=counter)
    stored = trusted.seal(b"second", counter=counter, advance=False)
    assert trusted.unseal(first) == b"first"  # the second is not the newest yet
    inside()  # the writer died here
    assert trusted.unseal(stored) == b"second"
    assert counter.read() == 2  # opening caught up
    with pytest.raises(RollbackError):
        trusted.unseal(first)


def test_sea_11_a_counter_that_was_rolled_back_is_noticed(inside):
    platform = inside()
    counter = trusted.Counter.create()
    for _ in range(3):
        blob = trusted.seal(b"data", counter=counter)
    _, mark = platform.counters[counter.counter_id]
    platform.counters[counter.counter_id] = (1, mark)
    with pytest.raises(RollbackError):
        trusted.unseal(blob)


def two_pending():
    """A counter, its newest blob, and two that were sealed for its next value."""
    counter = trusted.Counter.create()
    newest = trusted.seal(b"B0", counter=counter)
    first = trusted.seal(b"B1", counter=counter, advance=False)
    assert trusted.unseal(newest) == b"B0"  # the writer died and began again from what it had
    second = trusted.seal(b"B2", counter=counter, advance=False)
    return counter, newest, first, second


def test_sea_11_two_blobs_pending_at_once_are_never_both_the_newest(inside):
    inside()
    for commit in (
        lambda counter, blob: counter.increment(blob=blob),
        lambda counter, blob: trusted.unseal(blob, counter=counter),
    ):
        for winner in (0, 1):
            counter, newest, *pending = two_pending()
            commit(counter, pending[winner])
            assert counter.read() == 2
            for _ in range(2):
                assert trusted.unseal(pending[winner]) == (b"B1", b"B2")[winner]
                with pytest.raises(RollbackError, match="another one took its place"):
                    trusted.unseal(pending[1 - winner])
                with pytest.raises(RollbackError):
                    counter.increment(blob=pending[1 - winner])
                with pytest.raises(RollbackError, match="newest"):
                    trusted.unseal(newest)
                inside()
            assert counter.read() == 2


def test_sea_11_an_increment_without_a_blob_leaves_no_newest_blob(inside):
    inside()
    counter, *blobs = two_pending()
    assert counter.increment() == 2
    for blob in blobs:
        with pytest.raises(RollbackError, match="newest"):
            trusted.unseal(blob)
    last = trusted.seal(b"B3", counter=counter)
    assert trusted.unseal(last) == b"B3"


def test_a_pending_blob_is_not_committed_once_the_counter_went_on(inside):
    inside()
    counter, _, first, _ = two_pending()
    later = trusted.seal(b"B3", counter=counter)
    last = trusted.seal(b"B4", counter=counter)
    for blob in (first, later):
        with pytest.raises(RollbackError):
            trusted.unseal(blob)
        with pytest.raises(RollbackError):
            counter.increment(blob=blob)
    assert trusted.unseal(last) == b"B4"


def test_an_increment_with_its_blob_may_be_repeated_after_a_lost_answer(inside):
    inside()
    counter = trusted.Counter.create()
    blob = trusted.seal(b"data", counter=counter, advance=False)
    assert [counter.increment(blob=blob, expected=0) for _ in range(3)] == [1, 1, 1]
    assert trusted.unseal(blob) == b"data"


def test_two_threads_that_open_one_pending_blob_both_succeed(inside, monkeypatch):
    inside()
    counter, _, first, second = two_pending()
    runtime = _runtime.current()
    ask = runtime.counter

    def raced(operation, *arguments):
        reading = ask(operation, *arguments)
        if operation == "read":  # the other one is faster, between reading and committing
            monkeypatch.setattr(runtime, "counter", ask)
            assert trusted.unseal(first) == b"B1"
        return reading

    monkeypatch.setattr(runtime, "counter", raced)
    assert trusted.unseal(first) == b"B1"
    assert counter.read() == 2
    with pytest.raises(RollbackError):
        trusted.unseal(second)


def test_two_threads_that_open_two_pending_blobs_do_not_both_succeed(inside, monkeypatch):
    inside()
    _, _, first, second = two_pending()
    runtime = _runtime.current()
    ask = runtime.counter

    def raced(operation, *arguments):
        reading = ask(operation, *arguments)
        if operation == "read":
            monkeypatch.setattr(runtime, "counter", ask)
            assert trusted.unseal(first) == b"B1"
        return reading

    monkeypatch.setattr(runtime, "counter", raced)
    with pytest.raises(RollbackError):
        trusted.unseal(second)
    assert trusted.unseal(first) == b"B1"


def test_a_blob_that_does_not_belong_to_the_counter_does_not_move_it(inside):
    inside()
    counter, other = trusted.Counter.create(), trusted.Counter.create()
    bound = trusted.seal(b"data", counter=other, advance=False)
    pending = trusted.seal(b"data", counter=counter, advance=False)
    for blob, error in (
        (bound, RollbackError),
        (trusted.seal(b"unbound"), RollbackError),
        (pending[:-1], UnsealError),
        (b"", UnsealError),
        (pending[:144] + bytes(8) + pending[152:], RollbackError),  # value 0: before it is -1
    ):
        with pytest.raises(error):
            counter.increment(blob=blob)
    with pytest.raises(RollbackError, match="another value"):
        counter.increment(blob=pending, expected=1)
    assert (counter.read(), other.read()) == (0, 0)
    # A header that lies about its value commits nothing that opens: the mark covers the value.
    old = trusted.seal(b"old", counter=counter)
    trusted.seal(b"new", counter=counter)
    raised = old[:144] + (3).to_bytes(8, "little") + old[152:]
    assert counter.increment(blob=raised) == 3
    with pytest.raises(UnsealError):
        trusted.unseal(raised)
    with pytest.raises(RollbackError):
        trusted.unseal(old)


def test_sea_11_a_blob_of_another_or_no_counter_is_refused_where_one_is_named(inside):
    inside()
    one, other = trusted.Counter.create(), trusted.Counter.create()
    unbound = trusted.seal(b"data")
    bound = trusted.seal(b"data", counter=one)
    for blob in (unbound, bound):
        with pytest.raises(RollbackError, match="not bound"):
            trusted.unseal(blob, counter=other)


def test_two_writers_at_once_do_not_both_become_the_newest(inside, monkeypatch):
    inside()
    counter = trusted.Counter.create()
    monkeypatch.setattr(counter, "read", lambda: 0)
    trusted.seal(b"one", counter=counter)
    with pytest.raises(RollbackError):
        trusted.seal(b"two", counter=counter)


def test_a_destroyed_counter_opens_nothing(inside):
    inside()
    counter = trusted.Counter.create()
    blob = trusted.seal(b"data", counter=counter)
    counter.destroy()
    with pytest.raises(RollbackError):
        trusted.unseal(blob)


def test_a_counter_identity_of_another_size_is_refused():
    with pytest.raises(ValueError, match="16 bytes"):
        trusted.Counter(b"short")


# ---- reports ----------------------------------------------------------------------------------


def test_a_report_for_this_enclave_verifies_and_any_change_is_refused(inside):
    inside()
    report = trusted.report(trusted.target_info(), b"hello")
    assert len(report) == 432
    assert trusted.verify_report(report).report_data == b"hello" + bytes(59)
    for position in range(0, 384, 7):
        changed = bytearray(report)
        changed[position] ^= 1
        with pytest.raises(Exception, match="MAC"):
            trusted.verify_report(bytes(changed))


def test_a_report_for_another_enclave_is_refused(inside):
    inside()
    other = TargetInfo.of(report_body(mrenclave=b"\x33" * 32)).to_bytes()
    with pytest.raises(Exception, match="MAC"):
        trusted.verify_report(trusted.report(other, b"hello"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: trusted.report(bytes(511)),
        lambda: trusted.report(bytes(512), bytes(65)),
        lambda: trusted.attest(bytes(63)),
        lambda: trusted.set_user_data(bytes(16 * 1024 + 1)),
    ],
)
def test_impossible_sizes_are_refused_inside(inside, call):
    platform = inside()
    with pytest.raises(ValueError, match="bytes"):
        call()
    assert platform.requests == []


def test_a_report_of_another_size_is_malformed(inside):
    inside()
    with pytest.raises(EvidenceFormatError):
        trusted.verify_report(bytes(431))


# ---- evidence ---------------------------------------------------------------------------------


def test_evidence_binds_nonce_runtime_key_and_user_data(inside):
    inside()
    trusted.set_user_data(b"model 7")
    parts = evidence_format.Evidence.from_bytes(_runtime.current().attest(b"n" * 32))
    assert (parts.nonce, parts.user_data, parts.record) == (b"n" * 32, b"model 7", RECORD)
    assert parts.runtime_key == _runtime.current().key.public
    bound = evidence_format.bound_report_data(
        nonce=b"n" * 32, runtime_key=parts.runtime_key, user_data=b"model 7"
    )
    assert parts.quote == b"quote over " + bound


def test_raw_evidence_carries_exactly_the_given_report_data(inside):
    inside()
    parts = evidence_format.Evidence.from_bytes(trusted.attest(bytes(range(64))))
    assert parts.raw
    assert parts.quote == b"quote over " + bytes(range(64))


def test_an_endless_nonce_is_refused(inside):
    inside()
    with pytest.raises(ArgumentError, match="nonce"):
        _runtime.current().attest(bytes(1025))


# ---- provisioning -----------------------------------------------------------------------------


def _encrypt(secret: bytes, *, body: ReportBody | None = None, info: bytes = b"") -> bytes:
    key = _runtime.current().key.public
    context = evidence_format.provision_info(
        report_body=(body or report_body()).to_bytes(), runtime_key=key, info=info
    )
    return provision.encrypt(secret, public_key=key, info=context)


def test_a_secret_sent_to_this_launch_opens(inside):
    inside()
    assert trusted.receive(_encrypt(b"key")) == b"key"
    assert trusted.receive(_encrypt(b"", info=b"ctx"), info=b"ctx") == b""


def test_a_secret_for_another_launch_identity_or_context_does_not_open(inside):
    inside()
    of_the_old_launch = _encrypt(b"key")
    inside()
    candidates = [
        of_the_old_launch,
        _encrypt(b"key", body=report_body(isv_svn=2)),
        _encrypt(b"key", body=report_body(debug=True)),
        _encrypt(b"key", info=b"other"),
        _encrypt(b"key")[:-1],
        b"",
    ]
    whole = bytearray(_encrypt(b"key"))
    for position in range(0, len(whole), 101):
        changed = bytearray(whole)
        changed[position] ^= 1
        candidates.append(bytes(changed))
    for candidate in candidates:
        with pytest.raises(UnsealError, match="does not open"):
            trusted.receive(candidate)


@pytest.mark.parametrize("size", [0, 32, 1215, 1217])
def test_a_public_key_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match="1216"):
        provision.encrypt(b"", public_key=bytes(size), info=b"")


# ---- the line to the platform -----------------------------------------------------------------


def test_a_silent_platform_ends_in_a_typed_error_and_a_closed_line(inside, monkeypatch):
    platform = inside()
    monkeypatch.setattr(_runtime, "_TIMEOUT", 0.05)
    late = threading.Event()

    def answer(message: messages.Message) -> messages.Message:
        late.wait(5)
        return messages.QuoteReply(quote=b"of the question before")

    monkeypatch.setattr(platform, "_answer", answer)
    with pytest.raises(EnclaveLostError, match="does not answer"):
        trusted.attest(bytes(64))
    with pytest.raises(EnclaveLostError):
        trusted.attest(bytes(64))  # a late answer is never taken for this one
    late.set()


def test_a_platform_that_is_gone_ends_in_a_typed_error(inside):
    platform = inside()
    platform.end._sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(EnclaveLostError):
        trusted.seal(b"data")


def test_an_answer_of_another_kind_is_refused(inside):
    platform = inside()
    platform.answer_with = messages.Ok()
    with pytest.raises(EnclaveStateError, match="unexpected answer"):
        trusted.attest(bytes(64))


def test_threads_never_take_each_others_answers(inside):
    inside()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            data = bytes([number]) * 64
            parts = evidence_format.Evidence.from_bytes(trusted.attest(data))
            if parts.quote != b"quote over " + data:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


# ---- secrets do not leak ----------------------------------------------------------------------


def test_sea_12_no_secret_shows_in_repr_or_pickle(inside):
    inside()
    runtime = _runtime.current()
    text = repr(runtime) + repr(runtime.key) + repr(trusted.identity())
    assert runtime.secret.hex() not in text
    assert repr(runtime.secret) not in text
    for thing in (runtime, runtime.key):
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(thing)


def test_sea_12_a_failed_unseal_has_no_key_in_its_traceback_locals(inside):
    """What a log with locals shows of the frames of a refused blob holds no plaintext."""
    inside()
    blob = bytearray(trusted.seal(b"planted secret"))
    blob[-1] ^= 1
    with pytest.raises(UnsealError) as caught:
        trusted.unseal(bytes(blob))
    shown = "".join(
        repr(value)
        for frame in inspect.getinnerframes(caught.value.__traceback__)
        for name, value in frame.frame.f_locals.items()
        if name not in ("blob", "caught") and not frame.filename.endswith("test_trusted.py")
    )
    assert "planted" not in shown


def test_sea_12_after_stop_the_runtime_key_opens_nothing(inside):
    inside()
    runtime = _runtime.current()
    ciphertext = _encrypt(b"key")
    _runtime.stop()
    with pytest.raises(UnsealError, match="wiped"):
        runtime.receive(ciphertext, b"")
    with pytest.raises(EnclaveClosedError):
        _ = runtime.secret
    _runtime.stop()  # may be called twice
