"""The record stream in Python: the same values and refusals as the native core's."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave.measurement._records import PortableMeasurement


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["pages", "filled", "unmeasured", "not measured"]),
            st.integers(-1, 20),
            st.integers(0, 300),
            st.sampled_from([0x203, 0x205, 0x100, 0x201, 0x204, 0x202, 0x101, 0x300, 0]),
        ),
        max_size=8,
    ),
    frame=st.integers(0, 3),
    size=st.sampled_from([0, 4096, 8192, 1 << 16, 1 << 20, (1 << 20) + 4096, 1 << 63]),
)
def test_both_streams_agree(parts: list[tuple[str, int, int, int]], frame: int, size: int) -> None:
    sides = []
    for kind in (_core.SgxMeasurement, PortableMeasurement):
        outcome: list[object] = []
        try:
            recorder = kind(size, frame)
        except (ValueError, OverflowError) as error:
            sides.append([type(error)])
            continue
        for what, page, pages, flags in parts:
            offset = page * 4096 + (1 if pages == 7 else 0)
            try:
                if what == "filled":
                    recorder.add_filled(pages, offset, flags, 0xCCCCCC00 + pages)
                elif what == "unmeasured":
                    recorder.add_unmeasured(pages, offset, flags)
                else:
                    data = random.Random(pages).randbytes(4096 * (pages % 4))
                    recorder.add_pages(data, offset, flags, what == "pages")
            except (ValueError, OverflowError) as error:
                outcome.append(type(error))
            outcome.append((recorder.num_pages, recorder.digest()))
        sides.append(outcome)
    assert sides[0] == sides[1]


def test_half_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="whole pages"):
        PortableMeasurement(1 << 20).add_pages(bytes(4095), 0, 0x203)


def test_measuring_works_without_the_native_modules() -> None:
    """As on a system for which there are none."""
    script = (
        "import sys\n"
        "sys.modules['pyenclave._core'] = None\n"
        "sys.modules['pyenclave._ffi'] = None\n"
        "from pyenclave.measurement import _records, sgx\n"
        "from pyenclave.measurement.sgx_file import measure_sgx\n"
        "assert not _records.NATIVE\n"
        "pages = [(0, 0x203, bytes(8192)), (8192, 0x203, None)]\n"
        "print(sgx.measure_pages(pages, size=1 << 20).hex())\n"
        "print(sgx.mrsigner(bytes(384)).hex())\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    recorder = _core.SgxMeasurement(1 << 20)
    recorder.add_filled(2, 0, 0x203)
    recorder.add_unmeasured(1, 8192, 0x203)
    assert found == [recorder.digest().hex(), _core.sha256(bytes(384)).hex()]
