"""The picture of a run is well-formed and says what the run says; nothing escapes into it."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pyenclave.benchmarks.kept import Run
from pyenclave.benchmarks.plot import svg
from pyenclave.benchmarks.rows import figures

MACHINE: dict[str, Any] = {"cpu": "A <CPU> & more", "cores": 2, "kernels": {"gcm": "vaes512"}}
NAMESPACE = "{http://www.w3.org/2000/svg}"


def run_of(*rows: dict[str, Any], when: str = "2026-11-22T12:00Z") -> Run:
    return Run(MACHINE, list(rows), when, "0.1.0")


def drawn(*arguments: Any, **more: Any) -> ET.Element:
    return ET.fromstring(svg(*arguments, **more))


def texts(root: ET.Element) -> str:
    return "\n".join("".join(item.itertext()) for item in root.iter(f"{NAMESPACE}text"))


def of_class(root: ET.Element, tag: str, kind: str) -> list[ET.Element]:
    return [item for item in root.iter(NAMESPACE + tag) if item.get("class") == kind]


def bars_of(root: ET.Element) -> list[ET.Element]:
    return [item for item in root.iter(f"{NAMESPACE}rect") if item.get("height") == "14"]


FAST = figures("seal_page", [100.0, 101.0], [500.0, 520.0], peer="cryptography")
SLOW = figures("mrenclave", [2.0], [1.0], peer="hashlib", unit="GB/s")


def test_each_row_is_a_bar_with_peer_figures_and_verdict() -> None:
    root = drawn(run_of(FAST, SLOW))
    words = texts(root)
    for told in ("seal_page", "against cryptography", "5.07×goal met: 3.8×", "hashlib"):
        assert told in words, told
    assert "below its goal: 0.97×" in words
    fast, slow = (float(bar.get("x", "")) for bar in bars_of(root))
    one = float(of_class(root, "line", "one")[0].get("x1", ""))
    assert fast == pytest.approx(one, abs=0.2)
    assert slow < one  # what is slower than its peer goes to the left


def test_a_bar_is_as_long_as_the_logarithm_of_its_ratio() -> None:
    rows = [figures(name, [1.0], [ratio], peer="p") for name, ratio in (("a", 10.0), ("b", 100.0))]
    ten, hundred = (float(bar.get("width", "")) for bar in bars_of(drawn(run_of(*rows))))
    assert hundred == pytest.approx(2 * ten, rel=0.01)


def test_the_caption_names_machine_version_and_date() -> None:
    words = texts(drawn(run_of(FAST)))
    assert "A <CPU> & more, 2 cores, vaes512 kernels; pyenclave 0.1.0; 2026-11-22 12:00Z" in words


def test_a_row_that_failed_or_was_not_measured_says_so() -> None:
    root = drawn(
        run_of({"name": "a", "error": "OSError: gone"}, {"name": "b", "absent": ["uvicorn"]})
    )
    assert "failed: OSError: gone" in texts(root)
    assert "not measured; absent: uvicorn" in texts(root)


def test_another_run_is_marked_where_both_have_the_row() -> None:
    then = run_of(figures("seal_page", [100.0], [200.0], peer="cryptography"), when="2026-01-02")
    root = drawn(run_of(FAST, SLOW), then=then)
    assert len(of_class(root, "circle", "then")) == 2  # one row, and the legend
    assert "the run of 2026-01-02" in texts(root)


def test_microseconds_are_written_as_people_write_them() -> None:
    words = texts(drawn(run_of(figures("launch_pool", [20.0], [40.0], peer="p", unit="us"))))
    assert "20.0 against 40.0 µs" in words
    assert not re.search(r"\bus\b", words)


def test_a_launch_is_titled_with_its_protections() -> None:
    bits = {"seccomp": True, "mdwe": False, "landlock_abi": 7}
    root = drawn(run_of(FAST, figures("launch_pool", [20.0], [40.0], peer="p", bits=bits)))
    (launch,) = root.iter(f"{NAMESPACE}g")
    title = launch.find(f"{NAMESPACE}title")
    assert title is not None
    assert title.text == "probed protections: seccomp yes, mdwe no, landlock_abi 7"
    assert "launch_pool" in texts(launch)
    assert len(bars_of(launch)) == 1


def test_nothing_of_a_run_becomes_markup() -> None:
    bad = '"><script>alert(1)</script>\x00\x1b]]>&'
    row = {**figures("x", [1.0], [2.0], peer=bad, unit=bad, cores=bad), "name": bad}
    row["bits"] = {bad: True}
    run = Run(
        {"cpu": bad, "cores": bad, "kernels": bad}, [row, {"name": bad, "error": bad}], bad, bad
    )
    root = drawn(run, then=run)
    assert not list(root.iter(f"{NAMESPACE}script"))
    assert "<script" not in svg(run)


def test_long_texts_are_cut() -> None:
    row = figures("x" * 2000, [1.0], [2.0], peer="y" * 2000)
    assert max(len(line) for line in texts(drawn(run_of(row))).splitlines()) <= 200


@pytest.mark.parametrize("ratio", [1e-300, 1e-6, 1.0, 1e6, 1e300])
def test_every_ratio_lies_on_the_axis(ratio: float) -> None:
    root = drawn(run_of(figures("x", [1.0], [ratio], peer="p")))
    (bar,) = bars_of(root)
    left, width = float(bar.get("x", "")), float(bar.get("width", ""))
    assert 330 <= left <= left + width <= 722


def test_an_empty_run_is_a_picture() -> None:
    assert drawn(Run({}, [])).tag == f"{NAMESPACE}svg"


def test_light_and_dark_have_the_same_colours_named() -> None:
    style = svg(run_of(FAST)).split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    named = {
        name for name in re.findall(r"\.(\w+) \{", light) if name not in ("title", "name", "plain")
    }
    assert named <= set(re.findall(r"\.(\w+) \{", dark))
