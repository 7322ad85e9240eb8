"""What commands do with names of no file: FIFOs, devices, sockets, folders, endless files."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyenclave.cli
from pyenclave._files import open_file, read_file
from pyenclave._https import _context as tls_context
from pyenclave.cli import main
from pyenclave.collateral.http import Client
from pyenclave.errors import CollateralError
from pyenclave.image import build, keygen, sign

PLACE = Path(pyenclave.cli.__file__).resolve().parents[2]
SCRIPT = """
import pyenclave


@pyenclave.ecall
def greet(name: str) -> str:
    return "hail " + name
"""

# Command lines that read a file, each with {bad} in the place of the one that is tried, and whose
# other files are good as far as they are read before it.
ROWS = """
keygen -o new.pem --passphrase-file {bad}
build {bad} -o out
build hail.py -o out --lock {bad}
build hail.py -o out --data-key-file {bad}
sign {bad} --key key.pem
sign hail.enclave --key {bad}
sign hail.enclave --key key.pem --passphrase-file {bad}
sign hail.enclave --public-key {bad} --signature key.pem
sign hail.enclave --public-key key.pem --signature {bad}
inspect {bad}
diff {bad} hail.enclave
diff hail.enclave {bad}
stubs {bad}
run {bad} greet
measure sgx {bad}
measure sgx hail.enclave --sigstruct {bad}
measure snp --vcpus 1 --firmware {bad}
measure snp --vcpus 1 --firmware hail.py --kernel {bad}
measure snp --vcpus 1 --firmware hail.py --kernel hail.py --initrd {bad}
measure snp --vcpus 1 --firmware hail.py --svsm {bad}
measure sev-es --vcpus 1 --firmware {bad}
measure sev-es --vcpus 1 --firmware hail.py --kernel {bad}
measure sev-es --vcpus 1 --firmware hail.py --kernel hail.py --initrd {bad}
measure sev --firmware {bad}
measure sev --firmware hail.py --kernel {bad}
measure sev --firmware hail.py --kernel hail.py --initrd {bad}
measure tdx --firmware {bad}
measure eventlog {bad}
measure eventlog eventlog --expect {bad}
measure eif {bad}
measure diff {bad} hail.enclave
measure diff hail.enclave {bad}
verify {bad}
verify hail.enclave --endorsements {bad}
verify hail.enclave --policy {bad}
verify hail.enclave --root {bad}
collateral fetch {bad} -o out
collateral show {bad}
collateral check {bad}
collateral check endorsements --root {bad}
policy explain {bad}
policy render {bad} --tee sgx
policy from-image {bad} --azure-attestation-policy
policy sign {bad} --type SgxEnclave --key key.pem --certificate key.pem
policy sign policy --type SgxEnclave --key {bad} --certificate key.pem
policy sign policy --type SgxEnclave --key key.pem --certificate {bad}
policy sign --add-signer {bad} --key key.pem --certificate key.pem
policy sign --remove-signer {bad} --key key.pem --certificate key.pem
audit verify --database {bad}
audit verify --database log --key {bad}
audit verify --database log --checkpoint {bad}
audit show --database {bad}
audit show --database log --key {bad}
audit show --database log --checkpoint {bad}
audit follow key --database {bad}
audit follow key --database log --attestation {bad}
audit follow key --database log --key {bad}
audit follow key --database log --checkpoint {bad}
audit follow key --database log --attestation log --attestation-key {bad}
audit follow key --database log --attestation log --attestation-checkpoint {bad}
audit export --database {bad}
audit checkpoint --database {bad}
audit key --database {bad}
audit prune --database {bad} --before 2000-01-01T00:00:00Z -o out
audit prune --database log.db --before 2000-01-01T00:00:00Z -o out --key {bad}
audit prune --database log.db --before 2000-01-01T00:00:00Z -o out --checkpoint {bad}
seal {bad} --key-file key -o out
seal hail.py --key-file {bad} -o out
seal hail.py --signing-key {bad} -o out
unseal {bad} --key-file key -o out
unseal sealed --key-file {bad} -o out
info {bad}
reseal {bad} --key-file key --new-key-file key
reseal sealed --key-file {bad} --new-key-file key
reseal sealed --key-file key --new-key-file {bad}
reseal sealed --image {bad} --dry-run
encrypt {bad} --public-key public.pem --key https://v.example/keys/k/1 -o out
encrypt hail.py --public-key {bad} --key https://v.example/keys/k/1 -o out
decrypt {bad} --private-key private.pem -o out
serve attestation --config {bad}
serve attestation --dev --root {bad}
serve attestation --dev --collateral {bad}
serve vault --config {bad}
vault rotate-kek --config {bad}
vault keks --config {bad}
vault rotate-secrets --config {bad}
bench seal_page --from {bad}
bench --compare {bad} run.json
bench --compare run.json {bad}
"""

# Arguments that name files that are read, by how the help calls them.
READ = {"FILE", "PEM", "IMAGE", "EVIDENCE", "PATH", "BUNDLE|DIR", "DIR|BUNDLE", "CERTIFICATE"}
READ |= {"URL|FILE", "FILE|strict|permissive", "RUN.json", "A", "B", "VALUE", "WHERE"}
# Written, or read where this table does not come to it.
ELSE = {"output", "digest_out", "message_out", "write_lock", "root_out", "device", "plot"}
ELSE_OF = {
    ("collateral fetch", "ca"),  # read once a service is asked: see the test of both clients
    ("audit prune", "secrets"),  # refused as it is in the tests of storage: not only ours
    ("reseal", "signing_key"),  # as of seal
    ("reseal", "new_signing_key"),
    ("unseal", "signing_key"),
    ("encrypt", "ca"),  # read once a vault is asked
    ("encrypt", "token_file"),
    ("encrypt", "private_key"),
    ("decrypt", "ca"),
    ("decrypt", "token_file"),
    ("decrypt", "private_key"),  # after the file's form: as of encrypt
    ("serve vault", "backend"),
    ("serve platform", "warm"),  # after a platform is started; as of run
}

# Runs every line in turn: one that waits for ever, or takes a terabyte, ends this process.
RUNNER = """
import contextlib, io, json, resource, shlex, sys
import pyenclave.cli
from pyenclave._native import drop_capabilities
drop_capabilities()  # which has root refused what its owner may not read
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    print(line, file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = pyenclave.cli.main(shlex.split(line))
    print(json.dumps([line, code, err.getvalue()]), flush=True)
"""


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Return each command that has no subcommands, by name."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in below:
        for name, inner in action.choices.items():
            yield from leaves(inner, (*words, name))
    if not below:
        yield " ".join(words), parser


def reads(action: argparse.Action) -> bool:
    names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
    plain = action.metavar is None and action.dest in {"image", "a", "b", "source"}
    return (plain or not READ.isdisjoint(names)) and action.dest not in ELSE


def tried(name: str, parser: argparse.ArgumentParser) -> set[str]:
    found = set()
    for line in ROWS.strip().splitlines():
        if f"{line} ".startswith(f"{name} "):
            values = vars(parser.parse_args(line[len(name) :].split()))
            for dest, value in values.items():
                if value == "{bad}" or (isinstance(value, list) and "{bad}" in value):
                    found.add(dest)
    return found


def test_every_argument_that_names_a_file_is_tried() -> None:
    left = []
    for name, parser in leaves(pyenclave.cli._parser(None)):
        have = tried(name, parser)
        left += [
            (name, action.dest)
            for action in parser._actions
            if reads(action) and action.dest not in have and (name, action.dest) not in ELSE_OF
        ]
    assert left == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read."""
    pytest.importorskip("sqlalchemy", reason="audit logs need the extra services")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    from pyenclave.services.audit import Event
    from pyenclave.services.storage import Database, Secrets

    folder = tmp_path_factory.mktemp("place")
    (folder / "hail.py").write_text(SCRIPT)
    key = keygen()
    (folder / "hail.enclave").write_bytes(sign.sign(build.build_script(folder / "hail.py"), key))
    (folder / "key.pem").write_bytes(key)
    (folder / "key").write_bytes(bytes(32))
    (folder / "key").chmod(0o600)
    # One event of a log with SHA-1 only: register, type, digest, no data.
    (folder / "eventlog").write_bytes(bytes([0] * 4 + [8] + [0] * 27))
    (folder / "policy").write_text(
        "version= 1.0; authorizationrules{ => permit(); }; issuancerules{};"
    )
    private = rsa.generate_private_key(65537, 2048)
    (folder / "private.pem").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "public.pem").write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    (folder / "endorsements").mkdir()
    (folder / "endorsements" / "vek.der").write_bytes(b"none")
    assert main(["seal", str(folder / "hail.py"), "--key-file", str(folder / "key"), "-o",
                 str(folder / "sealed")]) == 0  # fmt: skip
    run = {"machine": {}, "results": [], "when": "", "version": "0"}
    (folder / "run.json").write_text(json.dumps(run))
    with Database.open(
        f"sqlite:///{folder / 'log.db'}", parts=[], secrets=Secrets(folder / "secrets")
    ) as db:
        db.submit(lambda tx: tx.audit(Event("keys/read", "allowed", caller="bob"))).result()
    assert main(["audit", "export", "--database", str(folder / "log.db"), "-o",
                 str(folder / "log")]) == 0  # fmt: skip
    return folder


def bad_of(kind: str, folder: Path) -> tuple[str, str]:
    """Make what is no file of use, and say what its refusal says."""
    path = folder / kind
    if kind == "fifo":
        os.mkfifo(path)
        return str(path), "found a named pipe"
    if kind == "device":
        return "/dev/zero", "found a device"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.path.relpath(path))
        return str(path), "found a socket"
    if kind == "folder":
        path.mkdir()
        return str(path), "Is a directory"
    if kind == "unreadable":
        path.touch(mode=0o000)
        return str(path), "Permission denied"
    with path.open("xb") as file:
        file.truncate(1 << 40)
    return str(path), "too long"


# What takes folders and files of any length, or says it in its own words.
FOLDERS = ("build {", "seal {", "unseal {", "reseal {", "encrypt {", "decrypt {", "bench")
ANY_LENGTH = ("seal {", "unseal {", "reseal {", "encrypt {", "decrypt {", "info {", "audit")
OWN_WORDS = (
    "no regular file",
    "is not a file",
    "regular",
    "is a folder",
    "cannot be read",
    "more than 32 bytes",
)


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder", "endless", "unreadable"])
def test_what_is_no_file_is_refused_by_name(place: Path, tmp_path: Path, kind: str) -> None:
    bad, words = bad_of(kind, tmp_path)
    lines = ROWS.strip().splitlines()
    if kind == "folder":
        lines = [x for x in lines if not x.startswith(FOLDERS) and "endorsements {" not in x]
        lines = [x for x in lines if "collateral {" not in x and not x.startswith("collateral ")]
    elif kind == "endless":
        lines = [x for x in lines if not x.startswith(ANY_LENGTH)]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([line.replace("{bad}", bad) for line in lines]),
        env={**os.environ, "PYTHONPATH": str(PLACE), "PYENCLAVE_STATE": str(tmp_path / "state")},
        cwd=place,
        capture_output=True,
        timeout=240,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(lines)
    wrong = [
        (line, code, text)
        for line, code, text in answers
        if code != (1 if kind == "endless" and line.startswith("run ") else 2)  # no image
        or "Traceback" in text
        or (words not in text and not any(word in text for word in OWN_WORDS))
        or bad not in text
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_pipe_of_the_shell_is_read(tmp_path: Path) -> None:
    """`<(…)` is /dev/fd/N in bash, and /proc/self/fd/N in zsh."""
    for name in ("/dev/fd/{}", "/proc/self/fd/{}"):
        reader, writer = os.pipe()
        try:
            os.write(writer, b"half")
            os.write(writer, b" and half")
            os.close(writer)
            assert read_file(name.format(reader), limit=13) == b"half and half"
        finally:
            os.close(reader)
    reader, writer = os.pipe()
    try:
        os.write(writer, bytes(100))  # whose writer stays
        with pytest.raises(OSError, match="it is too long; expected at most 99 bytes; found more"):
            read_file(f"/dev/fd/{reader}", limit=99)
        with pytest.raises(OSError, match="expected a file; found a pipe"):
            open_file(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
        os.close(writer)


def test_bash_gives_a_key_by_process_substitution(place: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" -m pyenclave sign hail.enclave --key <(cat key.pem) -o "$1"',
         sys.executable, str(tmp_path / "signed")],
        cwd=place, env={**os.environ, "PYTHONPATH": str(PLACE)}, capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "signed").exists()


def test_standard_input_is_read_by_its_name(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyenclave", "inspect", "/dev/stdin", "--json"],
        cwd=place, env={**os.environ, "PYTHONPATH": str(PLACE)}, timeout=120, check=False,
        input=(place / "hail.enclave").read_bytes(), capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "hail"


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder", "endless", "empty"])
def test_authorities_that_are_no_file_are_refused(tmp_path: Path, kind: str) -> None:
    """An empty file must not mean the system's authorities."""
    if kind == "empty":
        bad, words = str(tmp_path / "empty"), "[Cc]ertificate|start line"
        (tmp_path / "empty").write_bytes(b"")
    else:
        bad, words = bad_of(kind, tmp_path)
    with pytest.raises(CollateralError, match=words):
        Client(ca_file=bad).context()
    with pytest.raises(ValueError, match=f"ca: .*({words})"):
        tls_context(bad)


def test_what_became_a_pipe_meanwhile_is_waited_for_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    seen = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *_, **__: seen)
    with pytest.raises(OSError, match="found a named pipe"):
        open_file(path)


def test_files_of_proc_have_no_size_and_are_read() -> None:
    assert read_file("/proc/self/status", limit=1 << 20).startswith(b"Name:")
    with pytest.raises(OSError, match="found more"):
        read_file("/proc/self/status", limit=10)
