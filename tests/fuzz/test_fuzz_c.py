"""
The readers of the C core with inputs that nobody meant, under AddressSanitizer and UBSan.

In the gate ``fuzz_c_driver.c`` changes seeds at random; with clang, coverage leads (marker
``long``: libFuzzer, ``FUZZ_SECONDS`` for each target). The same targets serve both. Readers that
are Python (images, SIGSTRUCT, manifests and all evidence) are in ``fuzz_targets.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import core_build
import fuzz_c_build
import pytest
from fuzz_c_build import TARGETS

# The programs are built by the tests themselves, with the flags that they need.
pytestmark = pytest.mark.no_asan


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=clean, cwd=folder
    )


@pytest.fixture(scope="module")
def crypto(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fuzz_c_build.kernels(tmp_path_factory.mktemp("crypto"), "-O0")


def build(
    folder: Path, name: str, crypto: list[Path], source: Path | None = None, clang: str = ""
) -> Path:
    if lacks := fuzz_c_build.missing(name):
        pytest.skip(f"this CPU has no {lacks}")
    return fuzz_c_build.program(folder, name, crypto, source, clang)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_reader_of_the_core_withstands_changed_seeds(
    name: str, crypto: list[Path], tmp_path: Path
) -> None:
    program = build(tmp_path, name, crypto)
    runs = TARGETS[name].runs
    done = run([str(program), str(runs), os.environ.get("FUZZ_SEED", "1")], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{runs} runs" in done.stdout


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("host", "call/lane.c", "header.total != lane->total || ", ""),
        ("worker", "call/lane.c", "header.total != lane->total || ", ""),
        ("host", "call/lane.h", "    lane->phase = BROKEN;\n", ""),
        ("host", "call/lane.c", "kind != lane->writing || total != lane->whole", "0"),
        ("batch", "call/batch.c", "PYE_REQUIRE(size <= len - at, PYE_E_ARGUMENT);", ""),
        ("msgpack", "call/msgpack.c", "PYE_REFUSE_IF(len > c->left, 0);", ""),
        ("page", "page/page.c", "!gcm_tag_equal(tag, computed))", "0)"),
        ("page", "page/page.c", "pye_wipe(out, PYE_PAGE_SIZE);\n        rc", "rc"),
        ("page", "page/page.c", "store_le(header + 24, info->address, 8)",
         "store_le(header + 24, 0, 8)"),
        ("page", "page/page.c", " | ((uint64_t)info->type << 32)", ""),
        ("measure", "measure/sgx.c", "PYE_REQUIRE(offset == ctx->next_chunk, PYE_E_STATE);", ""),
        ("measure", "measure/sgx.c", "num_pages > (ctx->size - offset)", "num_pages > ctx->size"),
        ("measure", "measure/sgx.c", "PYE_CHECK(pye_sgx_check_pages(ctx, 1, offset, flags));",
         "ctx->next_chunk = offset; PYE_CHECK(pye_sgx_check_pages(ctx, 1, offset, flags));"),
        ("measure", "measure/sgx.c", "        memset(out, 0, PYE_SHA256_SIZE);\n", ""),
        ("measure", "measure/sgx.c", "i < num_pages; i++) {\n            take_page",
         "i <= num_pages; i++) {\n            take_page"),
        ("tree", "page/tree_cache.c", "slot->children > 0 || ", ""),
        ("tree", "page/tree_cache.c", "    tree_mark_dirty(tree, slot->parent);\n", ""),
        ("epoch", "page/epoch.c", "pye_wipe(jobs[i].out, PYE_PAGE_SIZE);", ""),
        ("epoch", "page/epoch.c", "if (epoch != key->other) {", "if (key->other == NO_EPOCH) {"),
        ("extents", "page/extents.c", "PYE_REFUSE_IF(pages - old > more, PYE_E_LIMIT);", ""),
        ("extents", "page/extents.c", "if (after < e->num_pages && e->pages", "if (0 && e->pages"),
        ("file", "linux/pager_bring.c", "heap_queue_mark(&heap->queue, page + i, clean);",
         "heap_queue_mark(&heap->queue, page + i, 1);"),
        ("file", "linux/pager_range.c", "heap_meta_clear(&heap->meta, first, end - first)",
         "PYE_OK"),
        ("launch", "measure/snp.c", "(END_OF_MEMORY - gpa) / PAGE,",
         "(END_OF_MEMORY - gpa) / PAGE + 1,"),
        ("launch", "measure/tdx.c", "        pages += PAGE;\n        gpa += PAGE;\n",
         "        pages += PAGE;\n"),
        ("p256", "crypto/ecdsa.c", "place[held++] = i;", "place[held++] = turn / 2;"),
        ("p256", "crypto/p256_ifma.c", "PYE_GUARD(!in_range(claims[i].signature))", "0"),
    ],
    ids=["host: no bound", "worker: no bound", "host: goes on", "host: another message",
         "batch: no bound",
         "msgpack: no bound", "page: tag not compared", "page: not wiped", "page: address",
         "page: type", "measure: order", "measure: bound", "measure: half done",
         "measure: not wiped", "measure: a page too many", "tree: order", "tree: not stored",
         "epoch: not wiped", "epoch: another's key", "extents: no bound", "extents: not joined",
         "file: changes lost", "file: not forgotten", "launch: no bound", "launch: address",
         "p256: another's verdict", "p256: no range"],
)  # fmt: skip
def test_a_fault_in_the_core_is_found(
    tmp_path: Path, crypto: list[Path], name: str, file: str, old: str, new: str
) -> None:
    source = core_build.broken(tmp_path, file, old, new)
    program = build(tmp_path, name, crypto, source)
    # Inputs that cost more than the others find theirs within a few hundred.
    costly = {"page", "epoch", "file", "launch", "p256"}
    done = run([str(program), "2000" if name in costly else "200000", "1"], tmp_path)
    assert done.returncode != 0, done.stdout
    assert re.search("FINDING|AddressSanitizer|runtime error", done.stderr), done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.timeout(90_000)
@pytest.mark.parametrize("name", list(TARGETS))
def test_a_reader_of_the_core_withstands_libfuzzer(
    name: str, crypto: list[Path], tmp_path: Path
) -> None:
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("clang is not installed")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    maker = build(tmp_path / "maker", name, crypto)
    assert run([str(maker), "--seeds", str(corpus)], tmp_path).returncode == 0
    program = build(tmp_path, name, crypto, clang=clang)
    seconds = os.environ.get("FUZZ_SECONDS", "60")
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-print_final_stats=1", "-timeout=5"]
    done = run([str(program), *options, str(corpus)], tmp_path)
    found = [file.read_bytes().hex() for file in tmp_path.glob("*-*") if file.is_file()]
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{found}"
    last = [line for line in done.stderr.splitlines() if "cov:" in line][-1]
    executions = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    print(f"{name}: {seconds} s, {executions and executions[1]} executions,{last.split(' ', 1)[1]}")
