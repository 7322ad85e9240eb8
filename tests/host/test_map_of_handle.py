"""``Enclave.map`` over a real enclave; tests/calls/test_batches.py tries all that it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyenclave.errors import ArgumentError, CallTimeoutError, EcallError, EnclaveClosedError
from pyenclave.host.enclave import Enclave
from pyenclave.image.build import build_script

ENTRY = Path(__file__).with_name("trusted_entry.py")


@pytest.fixture(scope="module")
def enclave(tmp_path_factory, used):
    state = used(tmp_path_factory.mktemp("state"))
    with Enclave(build_script(ENTRY), state=state, quiet=True) as one:
        yield one


def test_a_map_works_through_the_sandbox(enclave):
    assert list(enclave.map("double", range(2000))) == [2 * i for i in range(2000)]
    arrays = [np.full(i, 1.5) for i in range(10)]
    for array, result in zip(arrays, enclave.map("twice", arrays), strict=True):
        assert (result == array * 2).all()
    counted = {function.name: function for function in enclave.stats.functions}
    assert counted["double"].calls == 2000


def test_errors_are_raised_or_returned(enclave):
    found = list(enclave.map("fail", ["a", "b"], errors="return"))
    assert [error.type for error in found] == ["LookupError"] * 2
    with pytest.raises(EcallError):
        next(enclave.map("fail", ["a"]))
    with pytest.raises(ValueError, match="errors"):
        enclave.map("fail", ["a"], errors="ignore")
    with pytest.raises(ArgumentError, match="takes no argument"):
        enclave.map("end", [1])


def test_options_of_a_map(enclave):
    assert list(enclave.options(timeout=20).map("double", [1, 2])) == [2, 4]
    with pytest.raises(CallTimeoutError):
        list(enclave.options(timeout=0.05).map("sleep", [1.0]))


def test_a_map_of_a_closed_enclave_is_refused(tmp_path):
    with Enclave(build_script(ENTRY), state=tmp_path, quiet=True) as one:
        results = one.map("double", range(100_000))
        next(results)
    with pytest.raises(EnclaveClosedError):
        list(results)
    with pytest.raises(EnclaveClosedError):
        list(one.map("double", [1]))
