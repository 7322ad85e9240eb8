"""Lazy imports (PEP 810) inside: what the build found is there, everything else is refused."""

from __future__ import annotations

import sys

import pytest

from pyenclave.image.build import build_script

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 15), reason="this Python has no lazy imports"
)

SOURCE = """
import dataclasses, sys, traceback
lazy import colorsys
lazy import not_there_at_all
import pyenclave

@dataclasses.dataclass
class Point:
    x: list[int]

@pyenclave.ecall
def listed() -> list[str]:
    before = "colorsys" in sys.modules
    return [str(before), str(colorsys.rgb_to_hsv(0, 0, 0)), str("colorsys" in sys.modules)]

@pyenclave.ecall
def unlisted() -> str:
    try:
        return str(not_there_at_all)
    except ImportError as error:
        return f"{type(error).__name__}: {error}: {error.__cause__}"

@pyenclave.ecall
def of_the_library() -> list[str]:
    try:
        raise ValueError("shown")
    except ValueError:
        return [str(dataclasses.asdict(Point([1]))), traceback.format_exc().splitlines()[-1]]
"""


def test_lazy_imports_are_done_in_a_closed_worker(launching, zygotes, tmp_path) -> None:
    path = tmp_path / "lazy_entry.py"
    path.write_text(SOURCE)
    with launching.Launched(zygotes, build_script(path)) as worker:
        worker.run()
        assert worker.function("listed")() == ["False", "(0.0, 0.0, 0)", "True"]
        refused = worker.function("unlisted")()
        assert "unlisted import: the image's lock has no module 'not_there_at_all'" in refused
        assert worker.function("of_the_library")() == ["{'x': [1]}", "ValueError: shown"]
