"""
The ring explored: lane.c and await.c in every order that threads, time and memory allow.

ring_machine.h says how: the sources of the lane themselves are built so that each access to shared
memory stops, and a machine tries, depth first, who goes on, which of the values that a weakly
ordered processor may still give a load gives, which slices end, when the worker dies, and what a
hostile writer writes. Each fault below is put into the sources and must be found.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import core_build
import pytest
import ring_faults
from ring_faults import ASLEEP, FENCE, PUBLISH, SLICE, TELL, TOTAL

# The programs are built by the tests themselves, with the flags that they need.
pytestmark = pytest.mark.no_asan

HERE = Path(__file__).parent
# So that fragments come round to where the first one lay, and short messages lie there, too.
SMALL = ["-DPLACES=4", "-DAREA=64"]
OWN = ("lane", "await", "copy", "note")  # the sources whose accesses are hooked
BOUND = 10_000  # states of a case in the gate; .ci/long goes on to the end of nearly all


def build(folder: Path, source: Path, parts: list[Path]) -> Path:
    """Build the explorer of the lane whose sources are in *source*/call."""
    flags = ["-O1", "-Wall", "-Werror", "-Wno-psabi", *SMALL, f"-iquote{source}", f"-I{HERE}"]
    hooks = [*flags, "-include", str(HERE / "ring_hooks.h")]
    files = [source / "call" / f"{name}.c" for name in OWN]
    lane = core_build.objects(folder / "lane", files, hooks)
    link = [str(part) for part in (*lane, *parts)]
    target = folder / "ring_explore"
    subprocess.run([core_build.compiler(), *link, "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = [HERE / "ring_machine.c", HERE / "ring_explore.c"]
    flags = ["-O2", "-ftree-vectorize", "-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE", *SMALL]
    return core_build.objects(tmp_path_factory.mktemp("machine"), files, flags)


@pytest.fixture(scope="module")
def explorer(machine: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("explorer"), core_build.CSRC / "src", machine)


def explore(program: Path, states: int, *cases: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(states), *cases]
    # Coroutines on stacks of their own are nothing for a sanitizer that is only preloaded.
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean)


def test_no_order_loses_a_wake_up_mixes_answers_or_reads_a_header_twice(explorer: Path) -> None:
    done = explore(explorer, BOUND)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    found = re.fullmatch(r"(\d+) cases, (\d+) states", lines[-1])
    assert found
    assert int(found[1]) == len(lines) - 1 >= 30
    assert int(found[2]) > 250_000


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_no_order_does_so_far_beyond_the_gate_s_bound(explorer: Path) -> None:
    done = explore(explorer, 3_000_000)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    print(done.stdout)


# ---- what is broken is found -------------------------------------------------------------------

# name: file, what is replaced, by what, the case that finds it, what it finds
FAULTS: dict[str, tuple[str, ring_faults.Text, ring_faults.Text, str, str]] = {
    "no fence between publishing and looking who sleeps": (
        "frame.h", FENCE, "", "calls-near", "a wake-up is lost"),
    "who sleeps is looked at before publishing": (
        "frame.h", (PUBLISH, f"if ({ASLEEP})"),
        (f"const int asleep = {ASLEEP};\n{PUBLISH}", "if (asleep)"),
        "calls-near", "a wake-up is lost"),
    "nobody says that he sleeps": (
        "await.c", TELL + "    pye_status rc", "    pye_status rc", "calls", "a wake-up is lost"),
    "an armed side does not say that it sleeps": (
        "await.c", TELL + "    /* Either", "    /* Either", "async", "a wake-up is lost"),
    "sleeping on what is there, not on what was seen": (
        "await.c", "lane->ops.wait(word, seen, slice_ms)",
        "lane->ops.wait(word, __atomic_load_n(word, __ATOMIC_RELAXED), slice_ms)",
        "calls-near", "a wake-up is lost"),
    "nobody is woken": (
        "frame.h", "lane->ops.wake(word_at(lane->out, 0))", "PYE_OK", "calls", "a wake-up is lost"),
    "publishing without release": (
        "frame.h", PUBLISH, PUBLISH.replace("RELEASE", "RELAXED"), "calls-near", "."),
    "taking without acquire": (
        "frame.h", "__atomic_load_n(long_at(lane->in, 0), __ATOMIC_ACQUIRE)",
        "__atomic_load_n(long_at(lane->in, 0), __ATOMIC_RELAXED)", "calls-near", "."),
    "the sequence is published before the rest of the header": (
        "frame.h", (TOTAL, FENCE), ("", FENCE + TOTAL), "fragments-back", "."),
    "a word of the header is read twice": (
        "frame.h", ".length = (uint32_t)second",
        ".length = (uint32_t)__atomic_load_n(long_at(lane->in, 8), __ATOMIC_RELAXED)",
        "calls", "read twice"),
    "the payload is read twice": (
        "lane.c", "        lane->received += lane->length;\n",
        "        scatter(head, head_len, body, lane->received, lane->in + lane->in_at,\n"
        "                lane->length);\n"
        "        lane->received += lane->length;\n",
        "calls", "read twice"),
    "all fragments in one place": (
        "lane.h", "return end < PLACES * lane->half ? end : 0;", "return 0 * end;",
        "fragments-back", "a race"),
    "what was stored ahead and dropped counts as sent": (
        "lane.c", "    lane->out_at = at;\n",
        "    lane->out_at = at;\n    lane->out_next = payload_after(lane, at, length);\n",
        "given-up-piece", "."),
    "a payload goes on beyond the end of the area": (
        "lane.h", "length > PLACES * lane->half - next ? 0 : next", "next",
        "pieces", "beside the payload"),
    "what a long message left is wiped together with the short one": (
        "frame.h", "lane->dirty > end ? lane->dirty : end", "lane->dirty", "pieces", "."),
    "the worker does not say that it took a call": (
        "lane.c", "if (!lane->host) { /* before", "if (0) { /* before",
        "killed", "told that it did not"),
    "a read that goes on after a slice begins with zeroes": (
        "lane.c", SLICE, "if (0) {", "slices-fragments", "."),
    "a dropped message counts as begun": (
        "lane.c", "undo(lane, lane->writing);", ";", "given-up-fragments", "."),
    "a broken lane goes on": (
        "lane.h", "    lane->phase = BROKEN;\n", "", "hostile", "."),
    "a fragment may announce another total": (
        "lane.c", "header.total != lane->total || ", "", "hostile-back", "beside its buffer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_the_explorer_finds(fault: str, machine: list[Path], tmp_path: Path) -> None:
    file, old, new, case, what = FAULTS[fault]
    program = build(tmp_path, ring_faults.broken_source(tmp_path, file, old, new), machine)
    done = explore(program, 100_000, case)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"VIOLATION in {case}: .*{what}", done.stdout), done.stdout
