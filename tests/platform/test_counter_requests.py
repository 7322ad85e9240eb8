"""What the platform answers to a worker's requests for counters, by what the worker is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from pyenclave._platform import counters as counters_module
from pyenclave._platform.counters import CounterStore, MemoryFiles
from pyenclave._platform.root import PlatformRoot
from pyenclave._platform.service import Enclave, Facts, Services
from pyenclave.calls.channel import Channel
from pyenclave.errors import RollbackError, SealingError, SealLimitError
from pyenclave.formats.messages import CounterRequest, CounterValue
from pyenclave.formats.sgx import Attributes, ReportBody


@pytest.fixture
def services() -> Services:
    root = PlatformRoot(bytearray(32), level="embedded", ephemeral=False)
    return Services(root, CounterStore(MemoryFiles(), bytes(32), os.urandom))


Make = Callable[..., Enclave]


@pytest.fixture
def enclave() -> Iterator[Make]:
    """A function that makes what the platform knows about a worker."""
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(contextlib.closing(end)) for end in Channel.pair()]
        yield lambda number, **what: known(number, ends[0], **what)


def known(number: int, channel: Channel, *, signed: bool, debug: bool) -> Enclave:
    body = ReportBody(
        cpu_svn=bytes(16),
        attributes=Attributes(flags=7 if debug else 5, xfrm=3),
        mrenclave=number.to_bytes(32, "big"),
        mrsigner=b"s" * 32 if signed else bytes(32),
        isv_prod_id=number if signed else 0,
    )
    facts = Facts(
        enclave_id=bytes(16),
        name="test",
        pid=1,
        debug=debug,
        body=body,
        record=b"",
        runtime_public_key=b"",
        may_seal=True,
        started=0.0,
    )
    return Enclave(facts, pidfd=-1, channel=channel, host_pid=1)


def ask(services: Services, asker: Enclave, request: CounterRequest) -> CounterValue:
    answer = services.answer(asker, request)
    assert isinstance(answer, CounterValue)
    return answer


CREATE = CounterRequest(operation="create")


@pytest.mark.parametrize(
    ("signed", "debug"), [(False, True), (True, True), (False, False)], ids=str
)
def test_debug_and_unsigned_enclaves_leave_production_its_counters(
    services: Services,
    enclave: Make,
    monkeypatch: pytest.MonkeyPatch,
    signed: bool,
    debug: bool,
) -> None:
    monkeypatch.setattr(counters_module, "MAX_TOTAL", 3)
    monkeypatch.setattr(counters_module, "MAX_TOTAL_DEBUG", 3)
    refused = 0
    for number in range(6):
        try:
            ask(services, enclave(number, signed=signed, debug=debug), CREATE)
        except SealLimitError:
            refused += 1
    assert refused == 3
    production = enclave(7, signed=True, debug=False)
    for _ in range(3):
        assert ask(services, production, CREATE).value == 0
    with pytest.raises(SealLimitError, match="of production enclaves"):
        ask(services, production, CREATE)


def test_the_answer_names_the_blob_that_was_committed(services: Services, enclave: Make) -> None:
    asker = enclave(1, signed=True, debug=False)
    made = ask(services, asker, CREATE)
    assert (made.value, made.mark) == (0, b"")

    def commit(mark: bytes) -> CounterRequest:
        return CounterRequest(
            operation="increment", counter_id=made.counter_id, expected=0, mark=mark
        )

    for _ in range(2):
        answer = ask(services, asker, commit(b"1" * 32))
        assert (answer.value, answer.mark) == (1, b"1" * 32)
    with pytest.raises(RollbackError):
        ask(services, asker, commit(b"2" * 32))
    read = CounterRequest(operation="read", counter_id=made.counter_id)
    assert ask(services, asker, read) == answer


@pytest.mark.parametrize("operation", ["create", "read", "increment", "destroy", "eat"])
@pytest.mark.parametrize(
    ("mark", "expected"), [(b"m" * 31, 0), (b"m" * 33, 0), (b"m" * 32, None), (b"m" * 60_000, 0)]
)
def test_a_mark_that_fits_no_request_is_a_typed_refusal(
    services: Services, enclave: Make, operation: str, mark: bytes, expected: int | None
) -> None:
    asker = enclave(1, signed=True, debug=False)
    made = ask(services, asker, CREATE).counter_id
    request = CounterRequest(operation=operation, counter_id=made, mark=mark, expected=expected)
    with pytest.raises(SealingError):
        services.answer(asker, request)
    read = ask(services, asker, CounterRequest(operation="read", counter_id=made))
    assert (read.value, read.mark) == (0, b"")
