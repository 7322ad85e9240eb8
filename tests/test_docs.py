"""The documents are true: tests that they name exist, links resolve, examples run."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from pyenclave import errors
from pyenclave.calls import signature
from pyenclave.cli import _COMMANDS, _parser
from pyenclave.formats.record import ProtectionRecord
from pyenclave.image import manifest

ROOT = Path(__file__).resolve().parent.parent
DOCS = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BY_NAME = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
SECURITY = (ROOT / "SECURITY.md").read_text("utf-8")
REFERENCE = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
FENCE = re.compile(r"^(<!-- example: ([\w-]+) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def block(mark: str) -> str:
    """Return the part of SECURITY.md between a mark and its end."""
    return SECURITY.split(f"<!-- {mark} -->\n")[1].split("<!-- end -->")[0]


def items(text: str) -> list[str]:
    return [" ".join(item.split()) for item in re.split(r"^- ", text, flags=re.MULTILINE)[1:]]


@cache
def names_of_tests(path: Path) -> frozenset[str]:
    tree = ast.parse(text_of(path))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


# ---- SECURITY.md ------------------------------------------------------------------------------


@BY_NAME
def test_every_test_that_is_named_exists(path: Path) -> None:
    """A renamed or removed test takes its sentence with it."""
    text = text_of(path)
    for file, name in REFERENCE.findall(text):
        assert (ROOT / file).is_file(), f"{path.name}: {file}"
        assert name in names_of_tests(ROOT / file), f"{path.name}: {file}::{name}"
    if path.name == "SECURITY.md":
        assert len(set(REFERENCE.findall(text))) > 80
        # Nothing that looks like a reference escaped the pattern.
        assert text.count("::test_") == len(REFERENCE.findall(text))


def test_tests_that_are_named_can_be_collected() -> None:
    """A name in the source is not yet a test that runs: pytest must find each."""
    wanted = {"::".join(pair) for pair in REFERENCE.findall(SECURITY)}
    files = sorted({name.partition("::")[0] for name in wanted})
    done = subprocess.run(
        # -P: an installed package is not to be hidden by the checkout's sources. Nothing is run, so
        # that no assertion need be compiled to explain itself.
        [sys.executable, "-P", "-m", "pytest", "-q", "--collect-only", "--assert=plain", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    found = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    # Without the demo's data its tests are skipped as a file.
    missing = {name for name in wanted - found if not name.startswith("tests/demo/")}
    assert missing == set()


def test_every_cell_of_the_matrix_is_explained() -> None:
    """Attackers × assets: each cell has its item, with a test or the words that none is claimed."""
    table = re.search(r"^\| \| A1 memory.*?\n\n", SECURITY, flags=re.MULTILINE | re.DOTALL)
    assert table
    assets = [cell.split()[0] for cell in table[0].splitlines()[0].split("|")[2:-1]]
    verdicts = {}
    for row in table[0].splitlines()[2:]:
        if row:
            attacker, *cells = (cell.strip() for cell in row.split("|")[1:-1])
            verdicts |= {f"{attacker}-{a}": c for a, c in zip(assets, cells, strict=True)}
    explained = {}
    for item in items(block("cells")):
        name = re.match(r"\*\*(X\d+-A\d)\*\* ", item)
        assert name, item[:60]
        explained[name[1]] = item
    assert set(explained) == {name for name, cell in verdicts.items() if cell != "–"}
    for name, cell in verdicts.items():
        if cell == "–":
            continue
        item = explained[name]
        assert REFERENCE.search(item) or "ot claimed" in item, name
        says_no = item.removeprefix(f"**{name}** ").startswith("No")
        assert says_no == cell.startswith("no"), f"{name}: the table says {cell!r}"
        assert not cell.startswith("yes") or REFERENCE.search(item), name


def test_every_claim_names_its_test() -> None:
    """What is said to hold has a test beside it."""
    claims = items(block("each with its test"))
    assert len(claims) > 15
    for claim in claims:
        assert REFERENCE.search(claim), claim[:80]


def test_levels_that_are_not_built_claim_nothing() -> None:
    """The table of levels says which of its five are not built, and what was not tried."""
    rows = re.findall(r"^\| (`\w+`|confidential VM|SGX)[^\n]*\|$", SECURITY, flags=re.MULTILINE)
    assert len(rows) == 5
    for line in SECURITY.splitlines():
        if re.match(r"\| (`service`|SGX)", line):
            assert "not built" in line
        if line.startswith("| confidential VM"):
            assert "never in a real VM" in line


# ---- links and lists ---------------------------------------------------------------------------


@BY_NAME
def test_links_inside_the_repository_resolve(path: Path) -> None:
    text = re.sub(FENCE, "", text_of(path))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        file = target.partition("#")[0]
        assert not file or (path.parent / file).exists(), f"{path.name}: {target}"


def test_every_format_is_linked_from_the_index() -> None:
    index = text_of(ROOT / "docs/formats/README.md")
    for path in (ROOT / "docs/formats").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in index, path.name


def test_every_golden_file_is_opened() -> None:
    opened = text_of(ROOT / "tests/test_golden.py")
    for path in (ROOT / "tests/golden").iterdir():
        if path.suffix not in (".py", ".md") and path.is_file():
            assert f'"{path.name}"' in opened, path.name


def test_every_command_is_mentioned_in_the_readme() -> None:
    text = text_of(ROOT / "README.md")
    commands = re.search(r"## Commands\n(.*?)\n## ", text, flags=re.DOTALL)
    assert commands
    words = set(re.findall(r"[a-z]+", commands[1]))
    assert set(_COMMANDS) <= words


def test_every_action_of_a_command_is_mentioned_in_the_readme() -> None:
    listed = dict(re.findall(r"`(\w+) ([\w|-]+)`", text_of(ROOT / "README.md")))
    (commands,) = (a for a in _parser(None)._actions if isinstance(a.choices, dict))
    for name, parser in commands.choices.items():
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert set(listed.pop(name).split("|")) == set(action.choices), name
    assert not [name for name, words in listed.items() if name in _COMMANDS and "|" in words]


def test_every_key_of_the_manifest_is_described_with_its_default() -> None:
    """docs/manifest.md has each table and key that the reader knows, and no other."""
    text = text_of(ROOT / "docs/manifest.md")
    rows = re.findall(r"^\| (`?\w*`?) ?\| ([^|]+) \| [^|]+ \| ([^|]+) \|", text, re.MULTILINE)
    tables: dict[str, dict[str, str]] = {}
    table = ""
    for name, key, default in rows:
        if key in ("Key", "---"):
            continue
        table = name.strip("`") or table
        tables.setdefault(table, {})[key.strip("`")] = default.strip().strip("`").strip('"')
    assert set(tables) == set(manifest._TABLES)
    source = text_of(Path(manifest.__file__))
    known = set(re.findall(r'\.(?:need|take|number|flag|size|pages)\(\s*"(\w+)"', source))
    known |= {"entry", "native"}
    described = {key for name in tables for key in tables[name]}
    assert known <= described
    defaults = manifest.Manifest.__dataclass_fields__
    for table, key, field in (
        ("enclave", "debug", "debug"),
        ("enclave", "threads", "threads"),
        ("memory", "sealed", "sealed"),
        ("memory", "message", "message"),
        ("runtime", "blas_threads", "blas_threads"),
        ("runtime", "jit", "jit"),
        ("seal", "policy", "seal_policy"),
    ):
        said = tables[table][key]
        value = defaults[field].default
        if isinstance(value, bool):
            assert said == str(value).lower(), key
        elif table == "memory":
            assert manifest.parse_size(int(said) if said.isdigit() else said) == value, key
        else:
            assert said == str(value), key


@pytest.mark.usefixtures("used_state")
def test_every_protection_bit_of_an_enclave_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/formats/record.md has the bits that a launch really shows."""
    import pyenclave

    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    script = tmp_path / "bits.py"
    script.write_text("import pyenclave\n@pyenclave.ecall\ndef f() -> None: ...\n")
    with pyenclave.Enclave.from_file(script, quiet=True) as enclave:
        record = ProtectionRecord.from_bytes(enclave.info.record)
    page = text_of(ROOT / "docs/formats/record.md")
    described = {}
    for names, by in re.findall(r"^\| (`[^|]+) \| (outside|inside) \|", page, re.MULTILINE):
        described |= dict.fromkeys(re.findall(r"`(\w+)`", names), by)
    assert described == {name: bit.by for name, bit in record.bits.items()}


# ---- examples ----------------------------------------------------------------------------------


def blocks() -> list[pytest.param]:
    found = []
    for path in DOCS:
        for number, match in enumerate(FENCE.finditer(text_of(path))):
            name = f"{path.relative_to(ROOT)}-{number}-{match[3] or 'plain'}"
            found.append(pytest.param(match[3], match[4], id=name))
    return found


@pytest.mark.parametrize(("language", "text"), blocks())
def test_every_fenced_block_is_well_formed(language: str, text: str) -> None:
    """Those that can run do so below and in test_readme.py; all are at least parsed."""
    if language == "python":
        compile(text, "example", "exec")
    elif language == "toml":
        tomllib.loads(text)
    elif language == "json":
        json.loads(text)
    elif language == "sh":
        subprocess.run(["sh", "-n"], input=text.encode(), check=True)
    else:
        assert language in ("", "c", "text"), f"what is {language!r}?"


def example(page: str, name: str) -> str:
    for match in FENCE.finditer(text_of(ROOT / page)):
        if match[2] == name:
            return match[4]
    raise AssertionError(f"{page} has no example {name!r}")


def output_of(folder: Path) -> str:
    """Run ``call.py`` of *folder*, with a state directory of its own."""
    done = subprocess.run(
        [sys.executable, "call.py"],
        cwd=folder,
        env=os.environ | {"PYENCLAVE_STATE": str(folder / "state")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_native_example_compiles_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/native.md, as a reader would type it."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    page = "docs/native.md"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in (("python", ""), ("pyenclave", "-m pyenclave")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    (tmp_path / "half.c").write_text(example(page, "native-c"))
    (tmp_path / "enclave.toml").write_text(example(page, "native-toml"))
    (tmp_path / "call.py").write_text(example(page, "native-python"))
    script = "set -e\n" + example(page, "native-sh") + "python call.py\n"
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(example(page, "native-output"))


@pytest.mark.usefixtures("used_state")
@pytest.mark.parametrize("name", ["map", "aio", "shared"])
def test_the_examples_of_calls_run(tmp_path: Path, name: str) -> None:
    """docs/calls.md, as a reader would type it."""
    page = "docs/calls.md"
    (tmp_path / "batches.py").write_text(example(page, "map-entry"))
    (tmp_path / "arrays.py").write_text(example(page, "shared-entry"))
    (tmp_path / "call.py").write_text(example(page, f"{name}-python"))
    assert output_of(tmp_path) == example(page, f"{name}-output")


@pytest.mark.usefixtures("used_state")
def test_the_examples_of_trusted_code_run(tmp_path: Path) -> None:
    """docs/trusted-code.md, as a reader would type it."""
    page = "docs/trusted-code.md"
    (tmp_path / "model.py").write_text(example(page, "start-entry"))
    (tmp_path / "quota.py").write_text(example(page, "error-entry"))
    (tmp_path / "call.py").write_text(
        example(page, "error-python")
        + "with pyenclave.Enclave.from_file('model.py', quiet=True) as"
        " enclave:\n    assert enclave.predict(1.0, 2.0) == 1.75\n"
    )
    assert output_of(tmp_path) == example(page, "error-output")


@pytest.mark.usefixtures("used_state")
def test_the_example_of_ocalls_runs(tmp_path: Path) -> None:
    """docs/ocalls.md, as a reader would type it."""
    page = "docs/ocalls.md"
    (tmp_path / "scores.py").write_text(example(page, "ocall-entry"))
    (tmp_path / "call.py").write_text(example(page, "ocall-python"))
    assert output_of(tmp_path) == example(page, "ocall-output")


def test_the_manifest_example_is_one(tmp_path: Path) -> None:
    """docs/manifest.md: the first block is a valid manifest."""
    match = FENCE.search(text_of(ROOT / "docs/manifest.md"))
    assert match
    (tmp_path / "enclave.toml").write_text(match[4])
    assert manifest.load(tmp_path).threads == 2


def test_the_launch_policy_example_is_one() -> None:
    """docs/formats/state.md: the example's keys are those of the policy, no more and no less."""
    from pyenclave._platform.policy import LaunchPolicy, SignerRule

    blocks_of_page = FENCE.finditer(text_of(ROOT / "docs/formats/state.md"))
    (text,) = (match[4] for match in blocks_of_page if match[3] == "toml")
    values = tomllib.loads(text)
    assert set(values) == set(LaunchPolicy.__struct_fields__)
    assert set(values["signer"][0]) == set(SignerRule.__struct_fields__)


def test_the_example_of_types_crosses() -> None:
    """docs/types.md: its functions have signatures."""
    from types import ModuleType

    module = ModuleType("example_of_types")
    match = next(m for m in FENCE.finditer(text_of(ROOT / "docs/types.md")) if m[3] == "python")
    sys.modules[module.__name__] = module
    try:
        exec(compile(match[4], module.__name__, "exec"), module.__dict__)
        names = [item["name"] for item in signature.functions_of(module)]
    finally:
        del sys.modules[module.__name__]
    assert names == ["admit", "score"]


def test_error_codes_in_the_documents_exist() -> None:
    """A class named like an error is one of ours or Python's."""
    import builtins

    for path in DOCS:
        for name in re.findall(r"`(?:\w+\.)*(\w+Error)\b", text_of(path)):
            assert hasattr(errors, name) or hasattr(builtins, name) or name == "PublicError", (
                f"{path.name}: {name}"
            )


@pytest.mark.usefixtures("used_state")
def test_the_examples_of_watching_run(tmp_path: Path) -> None:
    """Counters, an id of the host's, and the text for Prometheus, as the page prints them."""
    page = "docs/observability.md"
    (tmp_path / "half.py").write_text(example(page, "watch-entry"))
    (tmp_path / "call.py").write_text(example(page, "watch-python"))
    assert output_of(tmp_path) == example(page, "watch-output")


def test_every_exported_name_is_described() -> None:
    """docs/observability.md has each family that telemetry exports, and each field of the stats."""
    from pyenclave import telemetry
    from pyenclave.calls.stats import EnclaveStats

    text = text_of(ROOT / "docs/observability.md")
    for family in telemetry.collect():
        name = family.name + ("_total" if family.kind == "counter" else "")
        assert f"`{name}`" in text, name
    for field in EnclaveStats.__dataclass_fields__:
        assert f"`{field}`" in text or field == "name", field
