"""``pyenclave vault``: as an operator rotates the key-encryption key, and is killed meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_backend_pkcs11 import MODULE
from test_vault_keks import add, macs_of, rows_of
from vault_parts import Table

from pyenclave.cli import main
from pyenclave.services.storage import Database
from pyenclave.services.vault import keks, users
from pyenclave.services.vault.backends import open_backend
from pyenclave.services.vault.backends._image import KEKS
from pyenclave.services.vault.decisions import Decisions
from pyenclave.services.vault.desk import Desk
from pyenclave.services.vault.records import Place, Retention
from pyenclave.services.vault.store import KeyStore
from pyenclave.services.vault.tables import PART, versions


class Operated:
    """A vault with keys in it, and the options that name it."""

    def __init__(self, folder: Path, state: Path, backend: str) -> None:
        self.url = f"sqlite:///{folder}/vault.db"
        self.state = state
        self.backend = backend
        self.options = ("--dev", "--database", self.url, "--backend", backend)

    def work(self, what: Any) -> Any:
        """Run *what* with the vault's desk."""

        async def run() -> Any:
            backend = open_backend(self.backend, self.state)
            with Database.open(self.url, parts=[PART]) as db:
                try:
                    return await what(
                        Desk(
                            db=db,
                            store=KeyStore(db.secrets, Retention()),
                            decisions=Decisions(Table()),
                            backend=backend,
                            secrets=db.secrets,
                            place=Place("https://vault.example"),
                        )
                    )
                finally:
                    await backend.close()

        return asyncio.run(run())

    def fill(self, count: int) -> dict[tuple[str, str], bytes]:
        """Make keys, and return what each says."""

        async def work(desk: Desk) -> dict[tuple[str, str], bytes]:
            for number in range(count):
                await add(desk, f"k{number}", f"{number:032x}")
            return await said(desk)

        found: dict[tuple[str, str], bytes] = self.work(work)
        return found


async def said(desk: Desk) -> dict[tuple[str, str], bytes]:
    """Return what each key says: a MAC, or a block that a token's AES key encrypts."""
    if desk.backend.name == "enclave":
        return await macs_of(desk)
    records = await desk.db.run(lambda tx: desk.store.page_of_all(tx, ("", ""), 500))
    found = {}
    for record in records:
        fields = {"value": bytes(16), "iv": bytes(16)}
        answer = await desk.backend.perform(
            record.wrapped, record.context(), "encrypt", "A256CBC", fields
        )
        found[record.name, record.version] = answer["value"]
    return found


@pytest.fixture
def enclave(
    enclave_state: Path, tmp_path: Path, used_state: Path, monkeypatch: pytest.MonkeyPatch
) -> Operated:
    """With key-encryption keys of its own: other tests need theirs."""
    state = used_state
    for name in ("vault.enclave", "vault-signing-key.pem"):
        shutil.copy(enclave_state / name, state / name)
        (state / name).chmod(0o600)
    monkeypatch.setenv("PYENCLAVE_STATE", str(state))
    return Operated(tmp_path, state, "enclave")


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operated:
    """A token of its own; every use of it is in a process of its own, as SoftHSM is set up once."""
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    if not MODULE or shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM is not installed (apt-get install softhsm2)")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "state").mkdir(mode=0o700)
    conf, pin = tmp_path / "softhsm2.conf", tmp_path / "pin"
    conf.write_text(f"directories.tokendir = {tmp_path}/tokens\nlog.level = ERROR\n")
    pin.write_text("8352")
    pin.chmod(0o600)
    monkeypatch.setenv("SOFTHSM2_CONF", str(conf))
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    command = ("softhsm2-util", "--init-token", "--free", "--label", "t", "--so-pin", "1234")
    subprocess.run([*command, "--pin", "8352"], check=True, capture_output=True)
    uri = f"pkcs11:token=t?module-path={MODULE}&pin-source=file:{pin}"
    return Operated(tmp_path, tmp_path / "state", uri)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["vault", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_an_operator_rotates_looks_and_destroys(
    enclave: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    before = enclave.fill(3)
    code, listed = run(capsys, "keks", *enclave.options)
    (old,) = [kek["kek"] for kek in listed["keks"]]
    assert (code, listed["keks"][0]["keys"], listed["keks"][0]["wraps"]) == (0, 3, True)
    code, done = run(capsys, "rotate-kek", *enclave.options)
    assert (code, done["moved"], done["resumed"]) == (0, 3, False)
    assert (done["kept"], done["destroyed"]) == ([old], [])
    # Another vault was served with this state directory: its keys may need the old one.
    place = enclave.state / users.FILE
    place.write_text("ab" * 16 + "\n")
    place.chmod(0o600)
    code, error = run(capsys, "rotate-kek", *enclave.options, "--destroy-old")
    assert (code, error["error"]["code"]) == (2, "configuration")
    assert "ab" * 16 in error["error"]["message"]
    assert enclave.work(said) == before
    place.unlink()
    assert main(["vault", "rotate-kek", *enclave.options, "--destroy-old"]) == 0
    out = capsys.readouterr().out
    assert f"destroyed {old}\n" in out
    code, listed = run(capsys, "keks", *enclave.options)
    assert [(kek["state"], kek["keys"], kek["there"]) for kek in listed["keks"]] == [
        ("current", 3, True),
        ("destroyed", 0, False),
        ("destroyed", 0, False),
    ]
    assert enclave.work(said) == before


def test_looking_at_key_encryption_keys_makes_none(
    enclave: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    with Database.open(enclave.url, parts=[PART]):
        pass
    assert run(capsys, "keks", *enclave.options) == (0, {"keks": []})
    assert main(["vault", "keks", *enclave.options]) == 0
    assert "no key-encryption key yet" in capsys.readouterr().out
    assert not (enclave.state / KEKS).exists()
    before = enclave.fill(1)
    code, listed = run(capsys, "keks", *enclave.options)
    assert (code, len(listed["keks"]), listed["keks"][0]["keys"]) == (0, 1, 1)
    assert enclave.work(said) == before


def test_looking_at_a_tokens_pairs_makes_none(token: Operated) -> None:
    """And the first rotation of a fresh token makes one pair, not two."""
    with Database.open(token.url, parts=[PART]):
        pass
    look = [sys.executable, "-m", "pyenclave", "vault", "keks", *token.options, "--json"]
    for _ in range(2):
        done = subprocess.run(look, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == {"keks": []}
    subprocess.run(command(token), capture_output=True, check=True)
    done = subprocess.run(look, capture_output=True, text=True, check=True)
    assert [kek["state"] for kek in json.loads(done.stdout)["keks"]] == ["current"]
    before = in_process(token, "place.fill(1)")
    assert in_process(token, "place.work(said)") == before


def test_a_damaged_row_is_given_up_by_its_name_only(
    enclave: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    enclave.fill(2)
    with Database.open(enclave.url, parts=[PART]) as db:
        bad = versions.update().where(versions.c.name == "k1").values(wrapped=b"x")
        db.submit(lambda tx: tx.connection.execute(bad)).result()
    name = f"k1/{1:032x}"
    code, told = run(capsys, "rotate-kek", *enclave.options, "--destroy-old")
    assert (code, name in told["error"]["message"]) == (1, True)
    code, told = run(capsys, "rotate-kek", *enclave.options, "--give-up", name)
    assert (code, "--destroy-old" in told["error"]["message"]) == (2, True)
    code, told = run(capsys, "rotate-kek", *enclave.options, "--destroy-old", "--give-up", name)
    assert (code, told["damaged"], len(told["destroyed"]), told["kept"]) == (1, [name], 1, [])


def test_wrong_use_of_the_command_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    for arguments, text in (
        (("rotate-kek",), "found neither"),
        (("keks", "--dev", "--config", "x"), "found both"),
        (("keks", "--dev"), "pyenclave serve vault --dev makes it"),
        (("keks", "--dev", "--backend", "nothing"), "no such key backend"),
    ):
        code, found = run(capsys, *arguments)
        assert (code, text in found["error"]["message"]) == (2, True), found
    assert not (tmp_path / "state" / "dev" / "vault.db").exists()


def in_process(place: Operated, what: str) -> Any:
    """Ask a process of its own: SoftHSM reads its settings once."""
    here = Path(__file__).parent
    script = (
        "import sys, json\n"
        f"sys.path.insert(0, {str(here)!r})\n"
        "from pathlib import Path\n"
        "from test_vault_command import Operated, said, keks\n"
        f"place = Operated(Path({place.url.removeprefix('sqlite:///')!r}).parent,"
        f" Path({str(place.state)!r}), {place.backend!r})\n"
        f"found = {what}\n"
        "print(json.dumps({str(k): v.hex() if isinstance(v, bytes) else v"
        " for k, v in found.items()}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command(place: Operated, *more: str) -> list[str]:
    return [sys.executable, "-m", "pyenclave", "vault", "rotate-kek", *place.options, *more]


def used_by_row(place: Operated) -> dict[str, int]:
    with Database.open(place.url, parts=[PART]) as db:
        return {kek.hex(): count for kek, count in db.submit(keks.in_use).result().items()}


@pytest.mark.long
def test_a_token_is_rotated_by_the_command(token: Operated) -> None:
    before = in_process(token, "place.fill(2)")
    done = subprocess.run(
        [*command(token), "--destroy-old", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["moved"], len(told["destroyed"]), told["kept"]) == (2, 1, [])
    assert in_process(token, "place.work(said)") == before
    assert used_by_row(token) == {told["kek"]: 2}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["enclave", "token"])
def test_a_rotation_is_killed_again_and_again(which: str, request: pytest.FixtureRequest) -> None:
    """At random moments, with --destroy-old: every key opens after each kill, none is lost."""
    place: Operated = request.getfixturevalue(which)
    count, kills, ended = 200, 0, 0
    before = in_process(place, f"place.fill({count})")
    quick = time.monotonic()
    subprocess.run(command(place, "--destroy-old"), capture_output=True, check=True)
    whole = time.monotonic() - quick
    while kills < 25:
        with subprocess.Popen(
            command(place, "--destroy-old"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            assert process.stderr is not None
            if kills % 5:  # while keys are being moved, or soon after
                for _ in range(random.randint(1, 4)):
                    process.stderr.readline()
                time.sleep(random.random() / 20)
            else:
                time.sleep(random.uniform(whole / 4, whole))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            else:
                assert process.returncode == 0
                ended += 1
        assert in_process(place, "place.work(said)") == before
    subprocess.run(command(place, "--destroy-old"), capture_output=True, check=True)
    assert in_process(place, "place.work(said)") == before
    ((_, rows),) = used_by_row(place).items()
    assert rows == count
    made = [row for row in rows_of(place.url) if row["action"] == "vault/kek/made"]
    moved = [row for row in rows_of(place.url) if row["action"] == "vault/kek/moved"]
    assert len(made) == len(moved)
    resumed = sum(row["details"]["resumed"] for row in moved)
    print(
        f"{which}: {kills} kills of rotate-kek over {count} keys, {ended + 2} ended, "
        f"{resumed} resumed, 0 keys lost"
    )
