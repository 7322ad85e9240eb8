"""The API inside an enclave, against a model of the platform at the other end of the channel."""

from __future__ import annotations

import ast
import inspect
import pickle
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from pyenclave import trusted
from pyenclave.errors import (
    ArgumentError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
    EvidenceFormatError,
    NotInEnclaveError,
    SealingError,
    UnsealError,
)
from pyenclave.formats import evidence as evidence_format
from pyenclave.formats import messages
from pyenclave.formats.sealed import split
from pyenclave.formats.sgx import Attributes, ReportBody, TargetInfo
from pyenclave.sealed import provision
from pyenclave.trusted import SealPolicy, _runtime, _state

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


def test_async_functions_cannot_be_trusted_functions():
    async def later() -> int:
        return 1

    async def items():
        yield 1

    for wrong in (later, items):
        with pytest.raises(TypeError, match="async"):
            trusted.ecall(wrong)


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
def test_a_malformed_identity_is_refused(model, changes):
    platform = model()
    with pytest.raises(EnclaveStateError):
        _runtime.start(platform.worker, platform.identity(**changes), None)  # type: ignore[arg-type]
    assert _state.runtime is None


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
    platform = inside()
    assert trusted.target_info() == TargetInfo.of(platform.body).to_bytes()


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
def test_the_image_chooses_the_default_policy(model, named, signed, policy):
    class Info:
        name, seal = "image", named

    platform = model(mrsigner=b"\x22" * 32 if signed else bytes(32))
    runtime = _runtime.Runtime(platform.worker, platform.identity(), Info())  # type: ignore[arg-type]
    assert runtime.default_policy is policy


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
    platform = inside()
    other = TargetInfo.of(replace(platform.body, mrenclave=b"\x33" * 32)).to_bytes()
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
    assert (parts.nonce, parts.user_data, parts.record) == (
        b"n" * 32,
        b"model 7",
        b"a signed record",
    )
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


def _encrypt(body: ReportBody, secret: bytes, *, info: bytes = b"") -> bytes:
    key = _runtime.current().key.public
    context = evidence_format.provision_info(
        report_body=body.to_bytes(), runtime_key=key, info=info
    )
    return provision.encrypt(secret, public_key=key, info=context)


def test_a_secret_sent_to_this_launch_opens(inside):
    body = inside().body
    assert trusted.receive(_encrypt(body, b"key")) == b"key"
    assert trusted.receive(_encrypt(body, b"", info=b"ctx"), info=b"ctx") == b""


def test_a_secret_for_another_launch_identity_or_context_does_not_open(inside):
    body = inside().body
    of_the_old_launch = _encrypt(body, b"key")
    inside()
    candidates = [
        of_the_old_launch,
        _encrypt(replace(body, isv_svn=2), b"key"),
        _encrypt(replace(body, attributes=Attributes(flags=7, xfrm=3)), b"key"),
        _encrypt(body, b"key", info=b"other"),
        _encrypt(body, b"key")[:-1],
        b"",
    ]
    whole = bytearray(_encrypt(body, b"key"))
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
    body = inside().body
    runtime = _runtime.current()
    ciphertext = _encrypt(body, b"key")
    _runtime.stop()
    with pytest.raises(UnsealError, match="wiped"):
        runtime.receive(ciphertext, b"")
    with pytest.raises(EnclaveClosedError):
        _ = runtime.secret
    _runtime.stop()  # may be called twice
