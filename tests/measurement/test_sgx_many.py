"""MRENCLAVEs of several enclaves in one call: the same values, the same refusals, by name."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pyenclave.errors import MeasurementError
from pyenclave.measurement import _records, sgx

RW = 0x203
SIZE = 1 << 20


@pytest.fixture(params=["native", "portable"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the extension modules."""
    if request.param == "portable":
        monkeypatch.setattr(_records, "NATIVE", False)
    elif not _records.NATIVE:
        pytest.skip("the extension modules are not built")
    return str(request.param)


def layout(seed: int) -> list[tuple[int, int, bytes | None]]:
    data = random.Random(seed).randbytes
    return [
        (0, RW, data(8192)),
        (0x4000, 0x205, data(4096 * (seed % 3))),
        (0x9000, RW, None),
        (0x3000, RW, data(4096)),
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((0x1000, RW, bytes(4096)), "twice"),
        ((0x9000, RW, None), "twice"),
        ((1, RW, bytes(4096)), "ALIGNMENT"),
        ((SIZE, RW, bytes(4096)), "ARGUMENT"),
        ((0xA000, 0x202, bytes(4096)), "ARGUMENT"),
        ((0xA000, RW, bytes(100)), "whole pages"),
        ((-4096, RW, bytes(4096)), "cannot be built"),
    ],
)
def test_a_refusal_names_the_enclave_and_the_reason(
    recorder: str, wrong: Any, message: str
) -> None:
    enclaves: list[tuple[list[Any], int]] = [(layout(i), SIZE) for i in range(5)]
    enclaves[3][0].append(wrong)
    with pytest.raises(MeasurementError, match=f"enclave 3: .*{message}"):
        sgx.measure_many(enclaves)


@pytest.mark.parametrize("size", [0, 4096, SIZE + 1, -1, 1 << 64])
def test_a_size_that_hardware_refuses_is_refused(recorder: str, size: int) -> None:
    with pytest.raises(MeasurementError, match="enclave 1"):
        sgx.measure_many([([], SIZE), ([], size)])


def test_many_are_measured_as_each_alone(recorder: str) -> None:
    enclaves = [(iter(layout(i)), SIZE << (i % 2)) for i in range(19)]
    wanted = [sgx.measure_pages(layout(i), size=SIZE << (i % 2)) for i in range(19)]
    assert sgx.measure_many(iter(enclaves)) == wanted
    assert len(set(wanted)) == 19


def test_the_ssa_frame_is_that_of_every_enclave(recorder: str) -> None:
    wanted = sgx.measure_pages([], size=SIZE, ssa_frame_size=3)
    assert sgx.measure_many([([], SIZE)] * 2, ssa_frame_size=3) == [wanted] * 2
    assert sgx.measure_many([]) == []
