"""``pyenclave audit follow``: one key through two logs, of which anybody may have written parts."""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from pyenclave.cli import main
from pyenclave.services.audit import Event
from pyenclave.services.audit.follow import follow
from pyenclave.services.audit.happenings import KeyName
from pyenclave.services.audit.reader import open_log
from pyenclave.services.storage import Database, Secrets

V1, V2 = "1" * 32, "2" * 32
OWNER, OPERATOR = "tenant/owner", "tenant/operator"
POLICY = "ab" * 32
CODE = {"x-ms-sgx-mrenclave": "c0de" * 16, "x-ms-sgx-mrsigner": "51" * 32}
OTHER = {"x-ms-sgx-mrenclave": "bad0" * 16, "x-ms-sgx-mrsigner": "51" * 32}
ROLE = "Microsoft.KeyVault/providers/Microsoft.Authorization/roleDefinitions/"
RELEASE_USER = ROLE + "08bbd89e-9f13-488c-ac41-acfcb10c90ab"


def made(version: str = V1, policy: str = POLICY, action: str = "keys/create") -> Event:
    details = {"kty": "RSA-HSM", "policy": policy, "policy_text": "https://a: x equals 1"}
    return Event(
        action, "allowed", caller=OWNER, resource=f"/keys/model/{version}", details=details
    )


def released(
    token: str, *, claims: dict[str, Any] | None = None, policy: str = POLICY, version: str = V1,
    refused: str = "",
) -> Event:  # fmt: skip
    return Event(
        "keys/release",
        "refused" if refused else "allowed",
        caller=OPERATOR,
        resource=f"/keys/model/{version}",
        rule=f"release policy {policy}",
        condition=refused,
        expected=["x equals 1"] if refused else None,
        found={"x": 2} if refused else None,
        claims=claims or CODE,
        evidence_digest="d1" * 32,
        token_id=token,
        details={"enc": "RSA_AES_KEY_WRAP_256", "authority": "https://a", "transfer_key": "77"},
    )


def attested(token: str, claims: dict[str, Any] | None = None) -> Event:
    return Event(
        "attestation/attest/PyEnclave",
        "allowed" if token else "refused",
        resource="/attest/PyEnclave",
        claims=claims or CODE,
        evidence_digest="e1" * 32,
        token_id=token,
        rule="policy P rule 1:1 permit",
        condition="" if token else "no rule permits",
    )


def write(url: str, events: Sequence[Event], *, every: int = 1_000, begin: int = 0) -> None:
    """Write a log, a row a second; its end is signed."""
    moment = dt.datetime(2026, 7, 1, 12, tzinfo=dt.UTC) + dt.timedelta(seconds=begin)

    def clock() -> dt.datetime:
        nonlocal moment
        moment += dt.timedelta(seconds=1)
        return moment

    place = Path(url.removeprefix("sqlite:///") + ".secrets")
    secrets = Secrets(place) if url.startswith("sqlite") else Secrets.ephemeral()
    with Database.open(
        url,
        parts=[],
        secrets=secrets,
        clock=clock,
        checkpoint_rows=every,
        durability="normal",
    ) as db:
        for event in events:
            db.submit(lambda tx, event=event: tx.audit(event)).result()


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    return tmp_path / "vault.db"


@pytest.fixture
def attestation(tmp_path: Path) -> Path:
    return tmp_path / "attestation.db"


LIFE = (
    Event("keys/create", "allowed", caller=OWNER, resource="/keys/model2/" + V1),
    made(),
    Event(
        "roleAssignments/write", "allowed", caller=OWNER, resource="/keys/model g-1",
        details={"principal": "operator", "role": RELEASE_USER},
    ),
    Event("keys/read", "allowed", caller=OWNER, resource="/keys/model"),
    Event("keys/read", "allowed", caller=OPERATOR, resource="/keys/model"),
    released("t1"),
    released("t2", claims=OTHER, refused="policy.claims"),
    Event(
        "keys/release", "refused", caller="tenant/eve", resource="/keys/model",
        condition="role assignment", expected="keys/release/action", token_id="evestoken",
    ),
    Event("keys/rotate", "allowed", caller=OWNER, resource=f"/keys/model/{V2}",
          details={"kty": "RSA-HSM", "policy": POLICY, "after": V1}),
    Event("vault/kek/moved", "allowed", caller="vault", resource="/", details={"moved": 3}),
    Event("keys/read", "refused", caller="tenant/eve", resource="/keys/other"),
    Event("roleAssignments/delete", "allowed", caller=OWNER, resource="/keys/model g-1"),
    Event("keys/delete", "allowed", caller=OWNER, resource="/keys/model", details={"purge": 9}),
)  # fmt: skip


HERE, THERE = "https://vault.example", "https://other.example:8443"


def _in_vault(event: Event, address: str) -> Event:
    return structs.replace(event, details={**event.details, "vault": address})


@pytest.mark.parametrize(
    ("said", "asked", "code", "word"),
    [
        ((HERE, HERE), HERE, 0, ""),
        ((HERE, HERE), "https://VAULT.example:443", 0, ""),
        ((HERE, HERE), "https://vault.example:444", 1, "this log is of vault.example"),
        ((HERE, HERE), THERE, 1, "this log is of vault.example"),
        ((THERE, HERE), HERE, 0, "the vault was other.example:8443, too"),
        ((), HERE, 0, "no row says the vault's address: vault.example was not compared"),
        ((HERE, HERE), "", 0, ""),
    ],
)
def test_the_host_of_a_url_is_compared(
    vault: Path,
    capsys: pytest.CaptureFixture[str],
    said: tuple[str, ...],
    asked: str,
    code: int,
    word: str,
) -> None:
    """The log of another vault may have a key of that name; it is not the one that was meant."""
    events = [made(), released("t1")]
    if said:
        events = [_in_vault(event, place) for event, place in zip(events, said, strict=True)]
    # Another key of the same log, in a vault of another name, says nothing of this one.
    elsewhere = structs.replace(made(), resource=f"/keys/model2/{V1}")
    write(f"sqlite:///{vault}", [*events, _in_vault(elsewhere, "https://third.example")])
    key = f"{asked}/keys/model" if asked else "model"
    found, told = ask(capsys, key, "--database", vault)
    summary = told["summary"]
    assert found == code
    assert told["holds"] is (code == 0)
    lines = [*summary["contradictions"], *(n for n in summary["notes"] if "vault" in n)]
    assert [word in line for line in lines] == [True] * bool(word)


@pytest.fixture
def both(vault: Path, attestation: Path) -> tuple[Path, Path]:
    write(f"sqlite:///{vault}", LIFE, every=4)
    write(
        f"sqlite:///{attestation}",
        # The last one is refused code that has nothing to do with this key.
        [
            attested("t1"),
            attested("t2", OTHER),
            attested("t3"),
            attested("", OTHER),
            attested("", {"x-ms-sgx-mrenclave": "f0" * 32, "x-ms-sgx-mrsigner": "f1" * 32}),
        ],
        begin=3_600,
    )
    return vault, attestation


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["audit", "follow", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["audit", "follow", *map(str, arguments)])
    found = capsys.readouterr()
    return code, found.out, found.err


def change(file: Path, *statements: str) -> None:
    with sqlite3.connect(file) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def what(found: dict[str, Any]) -> list[str]:
    return [
        item["what"] if item["decision"] == "allowed" else f"{item['decision']} {item['what']}"
        for item in found["happenings"]
    ]


def test_a_reviewer_sees_the_whole_way_in_order(
    both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vault, attestation = both
    code, found = ask(capsys, "model", "--database", vault, "--attestation", attestation)
    assert code == 0
    assert (found["format"], found["holds"]) == ("pyenclave-audit-follow-1", True)
    assert what(found) == [
        "created", "role_given", "token", "released", "token", "refused released",
        "refused released", "rotated", "kek", "role_taken", "deleted", "refused no_token",
    ]  # fmt: skip
    facts = {item["what"]: item["facts"] for item in found["happenings"]}
    assert facts["created"]["policy_text"] == "https://a: x equals 1"
    release = found["happenings"][3]
    assert release["caller"] == OPERATOR
    assert release["facts"] == {
        "policy": POLICY, "token": "t1", "token_digest": "d1" * 32, "authority": "https://a",
        "algorithm": "RSA_AES_KEY_WRAP_256", "transfer_key": "77", "attested_by": 1,
        "evidence_digest": "e1" * 32,
        "evidence": {"mrenclave": "c0de" * 16, "mrsigner": "51" * 32},
    }  # fmt: skip
    refused = found["happenings"][5]["facts"]
    assert (refused["condition"], refused["expected"]) == ("policy.claims", ["x equals 1"])
    assert refused["found"] == {"x": 2}
    assert facts["no_token"]["related_by"] == ["mrenclave " + "bad0" * 16, "mrsigner " + "51" * 32]
    # Who lost which role is in the row that gave it.
    assert facts["role_taken"]["principal"] == "operator"
    (reads,) = found["routine"]
    assert (reads["action"], reads["count"], reads["callers"]) == (
        "keys/read", 2, [OPERATOR, OWNER],
    )  # fmt: skip
    summary = found["summary"]
    assert summary["tokens"] == {"shown": 2, "issued": 3}
    assert summary["unjoined"] == summary["contradictions"] == []
    assert any("before the token was read" in note for note in summary["notes"])
    assert found["logs"]["vault"]["signed"] == 13
    code, out, err = told(capsys, "model", "--database", vault, "--attestation", attestation)
    assert (code, err) == (0, "")
    assert "role             Key Vault Crypto Service Release User" in out
    assert "  KEK moved  " in out
    assert out.endswith("verdict      holds\n")
    _, brief, _ = told(
        capsys, "model", "--database", vault, "--attestation", attestation, "--brief"
    )
    assert len(brief.splitlines()) < len(out.splitlines())
    assert "refused: release" in brief
    assert "found            x 2" in brief


def test_a_version_is_followed_alone_and_reads_one_by_one(
    both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vault, _ = both
    url = f"https://vault.example:8443/keys/model/{V2}"
    _, found = ask(capsys, url, "--database", vault, "--all")
    assert what(found) == [
        "role_given", "read", "read", "refused released", "rotated", "kek", "role_taken", "deleted",
    ]  # fmt: skip
    assert found["routine"] == []
    assert any("no row tells of its creation" in note for note in found["summary"]["notes"])


@pytest.mark.parametrize(
    ("statements", "marked"),
    [
        (["UPDATE audit SET body = replace(body, 'operator', 'eve') WHERE seq = 6"], {6}),
        (["DELETE FROM audit WHERE seq = 7"], set()),
        (["UPDATE audit SET body = 'x' WHERE seq = 6"], set()),
        (["DELETE FROM audit WHERE seq > 11"], set()),
    ],
)
def test_a_changed_log_is_followed_with_its_rows_marked_and_does_not_hold(
    both: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    statements: list[str],
    marked: set[int],
) -> None:
    vault, attestation = both
    change(vault, *statements)
    code, found = ask(capsys, "model", "--database", vault, "--attestation", attestation)
    assert (code, found["holds"], found["logs"]["vault"]["intact"]) == (1, False, False)
    wrong = {
        item["seq"]
        for item in found["happenings"]
        if item["service"] == "vault" and not item["verified"]
    }
    assert marked <= wrong
    code, out, err = told(capsys, "model", "--database", vault, "--attestation", attestation)
    assert code == 1
    assert "DOES NOT VERIFY, rows" in out
    assert out.endswith("DOES NOT HOLD\n")
    assert found["logs"]["vault"]["findings"][0]["message"] in err
    if marked:
        assert "DOES NOT VERIFY" in next(line for line in out.splitlines() if "RELEASED" in line)


def test_a_changed_attestation_log_does_not_hold_either(
    both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vault, attestation = both
    change(attestation, "UPDATE audit SET body = replace(body, 'c0de', 'bad0') WHERE seq = 1")
    code, found = ask(capsys, "model", "--database", vault, "--attestation", attestation)
    assert (code, found["holds"]) == (1, False)
    assert found["logs"]["vault"]["intact"] is True
    (token, *_) = [item for item in found["happenings"] if item["what"] == "token"]
    assert token["verified"] is False


def test_rows_after_the_last_checkpoint_are_not_signed(
    vault: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(f"sqlite:///{vault}", LIFE, every=4)
    change(vault, "DELETE FROM audit_checkpoints WHERE seq > 8")
    code, found = ask(capsys, "model", "--database", vault)
    assert code == 0
    assert {item["seq"] for item in found["happenings"] if not item["signed"]} == {9, 10, 12, 13}
    assert found["summary"]["unsigned"] == 4
    _, out, _ = told(capsys, "model", "--database", vault)
    assert sum(line.endswith("not signed") for line in out.splitlines()) == 4


@pytest.mark.parametrize(
    ("vaults", "attestations", "said"),
    [
        ([made(), released("t1", policy="cd" * 32)], [attested("t1")], "released under the policy"),
        (
            [made(policy="cd" * 32), released("t1")],
            [attested("t1")],
            f"the log has {'cd' * 32} for that version",
        ),
        (
            [
                made(),
                made(policy="cd" * 32, action="keys/update"),
                released("t1", policy=POLICY),
            ],
            [attested("t1")],
            "released under the policy",
        ),
        ([made(), released("t1")], [attested("t1", OTHER)], "mrenclave is c0de"),
    ],
)
def test_what_cannot_both_be_true_is_a_verdict(
    vault: Path,
    attestation: Path,
    capsys: pytest.CaptureFixture[str],
    vaults: list[Event],
    attestations: list[Event],
    said: str,
) -> None:
    """Chains that verify say only that nobody changed them; services may still disagree."""
    write(f"sqlite:///{vault}", vaults)
    write(f"sqlite:///{attestation}", attestations)
    code, found = ask(capsys, "model", "--database", vault, "--attestation", attestation)
    assert (code, found["holds"]) == (1, False)
    (contradiction,) = found["summary"]["contradictions"]
    assert said in contradiction
    code, _, err = told(capsys, "model", "--database", vault, "--attestation", attestation)
    assert code == 1
    assert contradiction in err


def test_what_cannot_be_joined_is_said_with_the_reason(
    vault: Path, attestation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A token without an id of its own is named by its digest.
    rows = [made(), released("t1"), released("gone"), released("d1" * 32)]
    write(f"sqlite:///{vault}", rows)
    write(f"sqlite:///{attestation}", [attested("gone"), attested("t1")], every=1)
    code, found = ask(capsys, "model", "--database", vault)
    assert code == 0
    assert {entry["why"] for entry in found["summary"]["unjoined"]} == {
        "no log of an attestation service was given"
    }
    cut = tmp_path / "later.jsonl"
    with open_log(str(attestation)) as log, cut.open("wb") as file:
        from pyenclave.services.audit.reader import write_export

        write_export(log, file, after=1)
    _, found = ask(capsys, "model", "--database", vault, "--attestation", cut)
    assert [(entry["token"], entry["why"]) for entry in found["summary"]["unjoined"]] == [
        ("gone", "it may be in the first 1 rows, which were cut off the log"),
        ("d1" * 32, "the token has no id (jti)"),
    ]
    assert any("begins at row 2" in note for note in found["summary"]["notes"])
    other = tmp_path / "other.db"
    write(f"sqlite:///{other}", [attested("t9")])
    _, found = ask(capsys, "model", "--database", vault, "--attestation", other)
    assert "has no such token" in found["summary"]["unjoined"][0]["why"]


def test_services_that_share_a_database_need_no_second_name(
    database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(database_url, [made(), attested("t1"), released("t1"), attested("t2")])
    code, found = ask(capsys, "model", "--database", database_url)
    assert code == 0
    assert what(found) == ["created", "token", "released"]
    assert found["happenings"][2]["facts"]["attested_by"] == 2


def test_a_token_stands_before_its_use_whatever_the_clocks_say(
    vault: Path, attestation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(f"sqlite:///{vault}", [made(), released("t1")])
    write(f"sqlite:///{attestation}", [attested("t1")], begin=3600)
    _, found = ask(capsys, "model", "--database", vault, "--attestation", attestation)
    assert what(found) == ["created", "token", "released"]


def test_other_pins_and_checkpoints_of_either_log_are_refused(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault, attestation = both
    pins, kept = {}, {}
    for name, file in (("vault", vault), ("attestation", attestation)):
        assert main(["audit", "key", "--database", str(file)]) == 0
        pins[name] = tmp_path / f"{name}.pem"
        pins[name].write_text(capsys.readouterr().out)
        assert main(["audit", "checkpoint", "--database", str(file)]) == 0
        kept[name] = tmp_path / f"{name}.checkpoint"
        kept[name].write_text(capsys.readouterr().out)
    names = ("model", "--database", vault, "--attestation", attestation)
    code, found = ask(
        capsys, *names, "--key", pins["vault"], "--attestation-key", pins["attestation"],
        "--checkpoint", kept["vault"], "--attestation-checkpoint", kept["attestation"],
    )  # fmt: skip
    assert code == 0
    assert [found["logs"][name]["pinned"] for name in pins] == [True, True]
    for wrong in (
        ("--key", pins["attestation"]),
        ("--attestation-key", pins["vault"]),
        ("--checkpoint", kept["attestation"]),
        ("--attestation-checkpoint", kept["vault"]),
    ):
        code, found = ask(capsys, *names, *wrong)
        assert (code, found["holds"]) == (1, False), wrong


def test_hostile_rows_stay_on_their_lines(vault: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[31m\n2026-01-01 RELEASED"
    write(
        f"sqlite:///{vault}",
        [
            made(),
            Event("keys/release", "refused", caller=f"t/{evil}", resource="/keys/model",
                  condition=evil, expected={evil: evil}, found=[evil], rule=evil,
                  claims={evil: {"x-ms-sgx-mrenclave": [evil]}}, token_id=evil,
                  evidence_digest=evil, details={evil: evil, "enc": {"a": evil}}),
            Event("roleAssignments/write", "allowed", caller=evil, resource=f"/keys/model {evil}",
                  details={"principal": [evil], "role": {"a": 1}}),
            Event(evil, "allowed", caller=evil, resource="/keys/model/../x"),
        ],
    )  # fmt: skip
    code, out, err = told(capsys, "model", "--database", vault, "--all")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert not any(line.startswith("2026-01-01") for line in out.splitlines())
    assert ask(capsys, "model", "--database", vault, "--all")[0] == 0


def test_long_logs_keep_the_life_and_the_last_of_the_rest(
    vault: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [made(), *(released(f"t{n}") for n in range(20)), made(V2, action="keys/rotate")]
    write(f"sqlite:///{vault}", rows)
    _, found = ask(capsys, "model", "--database", vault, "--last", 5)
    assert what(found) == ["created", *["released"] * 5, "rotated"]
    assert [item["seq"] for item in found["happenings"]] == [1, 17, 18, 19, 20, 21, 22]
    assert found["summary"]["left_out"] == 15
    assert any("15 older rows" in note for note in found["summary"]["notes"])


@pytest.mark.parametrize(
    "text",
    ["", "a b", "model/1", "https://v/secrets/model", "../x", "a" * 128, "model/" + "Z" * 32],
)
def test_what_is_no_key_is_refused(
    text: str, vault: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="not a key"):
        KeyName.read(text)
    write(f"sqlite:///{vault}", [made()])
    code, _, err = told(capsys, text, "--database", vault)
    assert code == 2
    assert "not a key" in err


def test_a_key_that_no_row_names_is_told_so(
    both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = told(capsys, "mode", "--database", both[0])
    assert (code, out) == (1, "")
    assert err == "pyenclave: the log has no row of the key mode\n"


def test_memory_is_bounded_by_what_is_kept(vault: Path) -> None:
    """The reader keeps no more than it says, however many rows a log has."""
    write(f"sqlite:///{vault}", [made(), *(released(f"t{n}") for n in range(50))])
    for limit in (1, 10):
        with open_log(str(vault)) as log:
            assert len(follow(log, KeyName("model"), limit=limit).happenings) == limit + 1
