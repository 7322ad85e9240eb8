"""
The bounded fuzzing of the gate: the same changed inputs for every reader in every run.

``FUZZ_SEED`` tries others. What coverage finds is looked for by hand: docs/fuzzing.md.
"""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path

import fuzz_reads
import fuzz_targets
import pytest
from fuzz_guard import FindingError, bound_memory, examine, limits, reduced
from fuzz_mutate import MAX_SIZE, Mutator
from fuzz_seeds import Corpus
from fuzz_targets import TARGETS, Target

import pyenclave
from pyenclave.attestation import detect, kinds
from pyenclave.errors import EnclaveError, EvidenceFormatError

NUMBER = int(os.environ.get("FUZZ_SEED", "1"))
PACKAGE = Path(pyenclave.__file__).parent
# Modules of formats without a reader of whole inputs, and what tries them.
PARTS = {
    "_binary": "the layouts of dcap, sgx, snp, tdx",
    "_ecdsa": "appraisal",
    "audit_chain": "audit-log",
    "ear": "jose, jose-claims",
    "eventlog_data": "measure-replay",
    "release_decision": "appraise-akv-release-policy, jose, and the vault's own tests",
    "release_policy": "policy-release",
    "retry_after": "the tests of both HTTP clients: one short header",
    "jwa": "the vault's own tests: it reads nothing whole",
}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    folder = Path(os.environ.get("PYENCLAVE_VECTORS", PACKAGE.parent.parent / "shared/vectors"))
    return Corpus(folder if folder.is_dir() else None)


# ---- the guard finds what it is there to find -----------------------------------------------


def nest(data: bytes) -> None:
    nest(data)


def spin(_data: bytes) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda data: data[1 << 20], "IndexError"),
        (lambda _: bytearray(768 << 20), "MemoryError"),
        (nest, "RecursionError"),
    ],
)
def test_an_undocumented_error_is_a_finding(read: object, what: str) -> None:
    with pytest.raises(FindingError, match=what), limits():
        examine(Target("broken", read, "", (EvidenceFormatError,)), b"input")  # type: ignore[arg-type]


def test_an_input_that_takes_too_long_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz_guard.CPU_SECONDS", 0.2)
    with pytest.raises(FindingError, match="of processor"), limits():
        examine(Target("slow", spin, ""), b"input")


def test_what_is_written_otherwise_than_it_was_read_is_a_finding() -> None:
    class Lossy:
        @staticmethod
        def to_bytes() -> bytes:
            return b"other"

    target = Target("lossy", fuzz_reads.stable(lambda data: Lossy()), "")
    with pytest.raises(FindingError, match="UnstableError"), limits():
        examine(target, b"input")


def test_a_finding_is_made_shorter() -> None:
    def read(data: bytes) -> None:
        if b"\x7f" in data:
            raise KeyError(data)

    target = Target("long", read, "")
    with limits():
        assert reduced(target, bytes(range(200)) * 20) == b"\x7f"
        assert not examine(Target("none", _refuse, ""), b"")


def _refuse(_data: bytes) -> None:
    raise EvidenceFormatError("no")


def test_the_same_number_gives_the_same_inputs() -> None:
    first, second, other = (
        [*Mutator([b"abc" * 40, bytes(300)], number).inputs(200)] for number in (7, 7, 8)
    )
    assert first == second != other
    assert len({*first}) > 150
    assert all(len(data) <= MAX_SIZE for data in first)


# ---- nothing is left out ----------------------------------------------------------------------


def test_every_module_of_formats_is_fuzzed() -> None:
    used = {
        alias.name
        for module in (fuzz_reads, fuzz_targets)
        for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "pyenclave.formats"
        for alias in node.names
    }
    modules = {path.stem for path in (PACKAGE / "formats").glob("*.py")} - {"__init__"}
    missing = modules - used - set(PARTS)
    assert not missing, f"add a Target to tests/fuzz/fuzz_targets.py for {sorted(missing)}"


def test_every_reader_accepts_a_seed_also_without_the_vectors() -> None:
    """A reader that refuses all seeds is not tried beyond its first check."""
    own = Corpus(None)
    with limits():
        blind = [
            target.name
            for target in TARGETS.values()
            if not any(examine(target, seed) for seed in own.get(target.seeds))
        ]
    assert not blind


def test_every_kind_of_evidence_is_appraised(corpus: Corpus) -> None:
    reached = set()
    for target in TARGETS.values():
        if target.name.startswith("appraise-"):
            for seed in corpus.get(target.seeds):
                try:
                    reached.add(detect.kind_of(target.frame(seed)))
                except EnclaveError:
                    continue
    assert set(kinds.available()) <= reached


# ---- the fuzzing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_refuses_changed_bytes_in_the_documented_ways_only(
    name: str, corpus: Corpus
) -> None:
    target = TARGETS[name]
    accepted = tried = 0
    start = time.process_time()
    with limits():
        for data in Mutator(corpus.get(target.seeds), NUMBER).inputs(target.rounds):
            accepted += examine(target, data)
            tried += 1
            if tried % 1024 == 0:
                bound_memory()
    spent = time.process_time() - start
    print(f"seed {NUMBER}: {tried} inputs, {accepted} accepted, {spent:.2f} s")
    assert tried > target.rounds
