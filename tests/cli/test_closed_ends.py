"""
Every command with ends that are closed, full or left: no traceback, no lost output, no wrong file.

The commands come from the parser, so that new ones are tried too. Each runs in a child of one
process that has imported them all, and ends as the interpreter does.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyenclave.cli
from pyenclave.image import build, keygen, sign

PLACE = Path(pyenclave.cli.__file__).resolve().parents[2]
SCRIPT = """
import pyenclave


@pyenclave.ecall
def greet(name: str) -> str:
    return "hail " + name
"""

# Of commands that do something without an argument: what has them end at once.
ENDS_AT_ONCE = {
    "doctor": ["--nothing"],
    "demo": ["--rows", "-1"],
    "evidence": ["-o", "nowhere/x", "--nonce", "no digits"],
    "reseal": ["nowhere/x", "--key-file", "nowhere/x"],
    "bench": ["no_such_row"],
    "serve platform": ["--config", "nowhere"],
    "serve attestation": ["--config", "nowhere"],
    "serve vault": ["--config", "nowhere"],
    "serve identity": ["--nothing"],
    "top": ["--nothing"],
    "ps": [],
    "kill": ["nobody"],
    "logs": ["nobody"],
    "debug": ["nobody"],
}
# What has an answer, with an image, a key and a kept run beside it.
ANSWERS = [
    "inspect hail.enclave",
    "inspect hail.enclave --json",
    "diff hail.enclave hail.enclave",
    "stubs hail.enclave",
    "sign hail.enclave --key key.pem -o signed",
    "keygen -o new.pem",
    "measure sgx hail.enclave",
    "policy explain strict",
    "policy from-image hail.enclave --azure-attestation-policy",
    "bench --from run.json",
    "bench --from run.json --json",
    "ps",
    "ps --json",
    "logs",
    "debug --list",
]
DEADLINE = 60  # seconds, for one command
WRITES = {"keygen": "new.pem", "sign": "signed"}

RUNNER = """
import contextlib, gc, importlib, json, os, pkgutil, sys
import pyenclave.cli
pyenclave.cli._parser(None)
for place in ("attestation", "collateral", "formats", "image", "measurement"):
    package = importlib.import_module(f"pyenclave.{place}")
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        with contextlib.suppress(ImportError):
            importlib.import_module(found.name)
gc.freeze()

def through(fd):
    wrong = "strict" if fd == 1 else "backslashreplace"
    return open(fd, "w", buffering=-1 if fd == 1 else 1, encoding="utf-8", errors=wrong,
                closefd=False)

def child(case, ends):
    # As a shell and the interpreter have it: what is closed is None.
    for fd, kind in enumerate(case["ends"]):
        if kind == "closed":
            os.close(fd)
            continue
        source = {"pipe": ends.get(fd), "null": None, "full": None, "left": None}[kind]
        if kind == "null":
            source = os.open("/dev/null", os.O_RDONLY)
        elif kind == "full":
            source = os.open("/dev/full", os.O_WRONLY)
        elif kind == "left":
            reader, source = os.pipe()
            os.close(reader)
        os.dup2(source, fd)
    os.closerange(3, 64)
    kinds = case["ends"]
    sys.stdin = None if kinds[0] == "closed" else open(0, closefd=False)
    sys.stdout = None if kinds[1] == "closed" else through(1)
    sys.stderr = None if kinds[2] == "closed" else through(2)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.chdir(case["folder"])
    for name, value in case["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.exit(pyenclave.cli.main([os.fsdecode(bytes.fromhex(word)) for word in case["words"]]))

for text in sys.stdin:
    case = json.loads(text)
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        child(case, {1: out[1], 2: err[1]})
    os.close(out[1])
    os.close(err[1])
    told = []
    for end in (out[0], err[0]):
        with open(end, "rb") as file:
            told.append(file.read().decode("utf-8", "surrogateescape"))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, *told]), flush=True)
"""


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Any]:
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in below:
        for name, inner in action.choices.items():
            yield from leaves(inner, (*words, name))
    if not below:
        yield words, parser


def failing(words: tuple[str, ...], parser: argparse.ArgumentParser) -> list[str]:
    """Return the command with what it needs, of which nothing is there."""
    line = list(words)
    name = " ".join(words)
    if name in ENDS_AT_ONCE:
        return line + ENDS_AT_ONCE[name]
    for action in parser._actions:
        if not action.required and (action.option_strings or action.nargs == "?"):
            continue
        value = str(next(iter(action.choices))) if action.choices else "nowhere/x"
        if action.type not in (None, str):
            value = "1"
        line += [action.option_strings[-1], value] if action.option_strings else [value]
    return line


LEAVES = list(leaves(pyenclave.cli._parser(None)))
HELP = [[*words, "--help"] for words, _ in LEAVES]
FAILING = [failing(words, parser) for words, parser in LEAVES]
ANSWERING = [line.split() for line in ANSWERS]
LINES = HELP + FAILING + ANSWERING


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "hail.py").write_text(SCRIPT)
    key = keygen()
    (folder / "hail.enclave").write_bytes(sign.sign(build.build_script(folder / "hail.py"), key))
    (folder / "key.pem").write_bytes(key)
    row = {"name": "row", "value": 1.0, "unit": "ns", "peer": "x", "peer_value": 2.0,
           "ratio": 2.0, "better": "less"}  # fmt: skip
    run = {"machine": {}, "results": [row], "when": "", "version": "0"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


class Runner:
    """The process whose children run commands."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
                "PYTHONPATH": str(PLACE),
                "PYENCLAVE_STATE": str(folder / "state"),
                **environment,
            },
        )

    def run(
        self, line: list[str | bytes], *ends: str, **environment: str | None
    ) -> tuple[int, str, str]:
        for name in WRITES.values():
            (self.folder / name).unlink(missing_ok=True)
        case = {
            "words": [os.fsencode(word).hex() for word in line],
            "ends": ends or ("null", "pipe", "pipe"),
            "folder": str(self.folder),
            "environment": environment,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(case), file=self.process.stdin, flush=True)
        assert select.select([self.process.stdout], [], [], DEADLINE)[0], f"it hangs: {case}"
        code, out, err = json.loads(self.process.stdout.readline())
        return code, out, err


@pytest.fixture(scope="module")
def runner(place: Path) -> Iterator[Runner]:
    found = Runner(place)
    yield found
    found.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def plain(runner: Runner) -> dict[str, tuple[int, str, str]]:
    """What each command says where nothing is amiss."""
    return {" ".join(line): runner.run(list(line)) for line in LINES}


def same(line: list[str], found: str, wanted: str) -> bool:
    """Whether both say the same; a new key is another each time."""
    return found == wanted or (line[0] == "keygen" and found.startswith(wanted[:20]))


def one_error(text: str) -> bool:
    lines = [row for row in text.splitlines() if not row.startswith(("usage:", " "))]
    return len(lines) == 1 and lines[0].startswith("pyenclave: ")


def test_nothing_is_amiss_where_nothing_is(plain: dict[str, tuple[int, str, str]]) -> None:
    wrong = []
    for name, (code, out, err) in plain.items():
        good = code == 0 and out and not err
        bad = code in (1, 2) and one_error(err)
        nothing = name in ("ps", "kill nobody", "logs", "debug --list") and code in (0, 1)
        if not (good or nothing if name.endswith("--help") or name in ANSWERS else bad or nothing):
            wrong.append((name, code, out[:200], err[:300]))
    assert not wrong, "\n".join(map(str, wrong))


ENDS = {
    "no input": ("closed", "pipe", "pipe"),
    "no output": ("null", "closed", "pipe"),
    "no errors": ("null", "pipe", "closed"),
    "output alone": ("closed", "pipe", "closed"),
    "errors alone": ("closed", "closed", "pipe"),
    "nothing": ("closed", "closed", "closed"),
    "full": ("null", "full", "pipe"),
    "full errors": ("null", "pipe", "full"),
    "all full": ("null", "full", "full"),
    "left": ("null", "left", "pipe"),
    "left errors": ("null", "pipe", "left"),
    "all left": ("null", "left", "left"),
}


# Where every command fails too, or gives its help; elsewhere those that have an answer do.
FAILS = {"output alone", "full errors"}
HELPS = {"full"}


@pytest.mark.parametrize("ends", ENDS)
def test_ends_that_take_nothing(
    place: Path, runner: Runner, plain: dict[str, tuple[int, str, str]], ends: str
) -> None:
    _, output, errors = ENDS[ends]
    wrong = []
    more = (FAILING if ends in FAILS else []) + (HELP if ends in HELPS else [])
    for line in ANSWERING + more:
        code, out, err = plain[" ".join(line)]
        now = runner.run(list(line), *ENDS[ends])
        if output == "closed":
            good = now[0] == 2 and one_error(now[2] or "pyenclave: ")
        elif output == "pipe":
            good = now[0] == code and same(line, now[1], out)
        elif out:
            good = now[0] == (1 if output == "left" else 2)
        else:
            good = now[0] == code
        if errors == "pipe" and output == "pipe":
            good = good and now[2] == err
        if errors == "pipe" and output == "full" and out:
            good = good and one_error(now[2]) and "No space left on device" in now[2]
        if errors == "pipe" and output == "left" and out and "--json" not in line:
            good = good and now[2] == err
        name = WRITES.get(line[0])
        if name and (place / name).exists():  # nothing of ours was written into it
            text = (place / name).read_bytes()
            good = good and text.startswith((b"-----BEGIN", b"PYENCIMG"))
            good = good and b"MRSIGNER" not in text  # what base64 does not come upon by chance
        if not good:
            wrong.append((line, plain[" ".join(line)], now))
    assert not wrong, "\n".join(str(item)[:600] for item in wrong)


def test_names_that_are_no_text_in_a_locale_without_characters(place: Path) -> None:
    """C's locale, and an argument in bytes that nothing has as text."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    runner = Runner(place, **ascii_only)
    wrong = []
    for words, parser in LEAVES:
        line = [
            b"no\xff\xc3\xbc\n/x" if word == "nowhere/x" else word
            for word in failing(words, parser)
        ]
        code, out, err = runner.run(line)
        known = " ".join(words) in ("ps", "kill")
        if not (code in (1, 2) and one_error(err) and err.isascii()) and not known:
            wrong.append((line, code, out, err))
    runner.process.communicate(timeout=60)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    "environment",
    [
        {"TMPDIR": "/nowhere/at/all"},
        {"HOME": None, "XDG_STATE_HOME": "/nowhere/at/all", "PYENCLAVE_STATE": None},
        {"HOME": "/dev/null", "XDG_STATE_HOME": None, "PYENCLAVE_STATE": None},
        {"PATH": None},
    ],
    ids=["no TMPDIR", "no HOME", "HOME is no folder", "no PATH"],
)
def test_places_that_are_not_there(
    runner: Runner,
    plain: dict[str, tuple[int, str, str]],
    environment: dict[str, str | None],
) -> None:
    wrong = []
    for line in ANSWERING + (FAILING if environment.get("HOME", "") is None else []):
        now = runner.run(list(line), **environment)
        code, out, _ = plain[" ".join(line)]
        # What needs the state may say that it cannot be had.
        fine = now[0] == code and same(line, now[1], out)
        if not fine and not (now[0] in (1, 2) and one_error(now[2])):
            wrong.append((line, plain[" ".join(line)], now))
        if "Traceback" in now[2]:
            wrong.append((line, now))
    assert not wrong, "\n".join(str(item)[:600] for item in wrong)
