"""Roles: who may do what, and what the catalogue's users try with them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from pyenclave.errors import ServiceError
from pyenclave.services.identity.caller import Caller
from pyenclave.services.identity.rbac import PART, Rbac
from pyenclave.services.identity.roles import BUILT_IN, Role, canonical_action, covers, role_named
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.storage.tables import audit
from pyenclave.services.storage.transaction import Transaction

T = TypeVar("T")
KEYS = "Microsoft.KeyVault/vaults/keys/"
ALICE = Caller("tenant-a", "alice", None, "user", "00", 2e9)
TWIN = Caller("tenant-b", "alice", None, "user", "00", 2e9)


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """One database in memory."""
    db = Database.open("sqlite://", parts=[PART])
    yield db
    db.close()


@pytest.fixture
def do(database: Database) -> Iterator[Callable[[Callable[[Transaction], Any]], Any]]:
    """Run a work, and take all assignments away afterwards."""
    rbac = Rbac()

    def run(work: Callable[[Transaction], T]) -> T:
        return database.submit(work).result(20)

    yield run

    def clean(tx: Transaction) -> None:
        for tenant in ("tenant-a", "tenant-b"):
            for held in rbac.assignments(tx, tenant=tenant):
                rbac.remove(tx, held.name, tenant=tenant, scope=held.scope)
        for role in rbac.roles(tx):
            if not role.built_in:
                rbac.undefine(tx, role.id)

    run(clean)


def may(do: Any, caller: Caller, action: str, scope: str = "/keys/k") -> bool:
    try:
        do(lambda tx: Rbac().check(tx, caller, action, scope))
    except ServiceError as error:
        if (error.status, error.error_code, error.inner) != (403, "Forbidden", "ForbiddenByRbac"):
            raise
        return False
    return True


def give(do: Any, role: str, scope: str = "/", principal: str = "alice") -> Any:
    return do(
        lambda tx: Rbac().assign(tx, principal=principal, role=role, tenant="tenant-a", scope=scope)
    )


def test_without_an_assignment_nothing_is_allowed(do: Any) -> None:
    """Default deny; the refusal names the action and the roles that would do."""
    assert not may(do, ALICE, KEYS + "read")
    with pytest.raises(ServiceError, match="Key Vault Crypto Service Release User") as caught:
        do(lambda tx: Rbac().check(tx, ALICE, KEYS + "release/action", "/keys/k"))
    assert "oid=alice" in caught.value.message


def _write(database: Path, *statements: str) -> None:
    """Write as one does who has the database and not its secrets."""
    connection = sqlite3.connect(database)
    for statement in (*statements, "UPDATE audit_head SET generation = generation + 1"):
        connection.execute(statement)
    connection.commit()
    connection.close()


def _failures(db: Database) -> list[str]:
    rows = db.submit(lambda tx: tx.connection.execute(select(audit.c.body)).scalars().all())
    return [body for body in rows.result(20) if '"failed"' in body]


ROLE = "aaaaaaaa-0000-4000-8000-00000000000a"
ADMIN = "00482a5a-887f-4fb3-b363-3b7fe8e74483"
INTO = "INSERT INTO role_assignments SELECT 'x', tenant, "
FORGED = {
    "new": "INSERT INTO role_assignments "
    f"VALUES ('x', 'tenant-a', 'eve', '{ADMIN}', '/', '', '', '')",
    "without a seal": f"{INTO} 'eve', role, '/', created, '', NULL FROM role_assignments",
    "another's seal": f"{INTO} 'eve', role, scope, created, created_by, seal FROM role_assignments",
    "a seal of bytes": f"{INTO} 'eve', role, '/', created, '', x'00ff' FROM role_assignments",
    "a role of bytes": f"{INTO} 'eve', x'00', '/', 7, 7, 10000000000000 FROM role_assignments",
    "another person": "UPDATE role_assignments SET principal = 'eve'",
    "another tenant": "UPDATE role_assignments SET tenant = 'tenant-b', principal = 'eve'",
    "another role": f"UPDATE role_assignments SET role = '{ADMIN}' WHERE principal = 'bob'",
    "another place": "UPDATE role_assignments SET scope = '/' WHERE principal = 'bob'",
    "a wider role": "UPDATE role_definitions SET body = replace(body, 'keys/read', '*')",
    "another's body": "UPDATE role_definitions SET body = (SELECT max(body) FROM role_definitions)",
    "no JSON": "UPDATE role_definitions SET body = '{'",
}


@pytest.mark.parametrize("how", FORGED)
def test_a_row_that_somebody_else_wrote_grants_nothing(tmp_path: Path, how: str) -> None:
    """SQL alone gives nobody a right; it is told once, and whoever else has rights keeps them."""
    with Database.open(f"sqlite:///{tmp_path / 'v.db'}", parts=[PART], durability="normal") as db:
        rbac = Rbac()

        def do(work: Callable[[Transaction], Any]) -> Any:
            return db.submit(work).result(20)

        def allowed(caller: Caller, action: str, scope: str = "/keys/k") -> bool:
            try:
                do(lambda tx: rbac.check(tx, caller, action, scope))
            except ServiceError as error:
                if error.status != 403:
                    raise
                return False
            return True

        for name, action in ((ROLE, KEYS + "read"), (ROLE[:-1] + "b", "z")):
            do(
                lambda tx, n=name, a=action: rbac.define(
                    tx, n, role_name=n, description="", data_actions=[a]
                )
            )
        bob, eve = (Caller("tenant-a", name, None, "user", "00", 2e9) for name in ("bob", "eve"))
        for who, role, scope in (("bob", ROLE, "/keys/k"), ("alice", "Key Vault Reader", "/")):
            do(
                lambda tx, w=who, r=role, s=scope: rbac.assign(
                    tx, principal=w, role=r, tenant="tenant-a", scope=s
                )
            )
        assert allowed(bob, KEYS + "read")
        assert not allowed(bob, KEYS + "read", "/")
        statement = FORGED[how]
        if statement.startswith(INTO):
            statement += " WHERE principal = 'alice'"
        if "principal = 'eve'" in statement:
            statement += " WHERE principal = 'bob'"
        _write(tmp_path / "v.db", statement)
        for caller in (bob, eve, Caller("tenant-b", "eve", None, "user", "00", 2e9)):
            for _ in range(2):
                assert not allowed(caller, KEYS + "sign/action")
                assert not allowed(caller, KEYS + "read", "/")
                assert caller is bob or not allowed(caller, KEYS + "read")
        assert allowed(ALICE, KEYS + "read")
        told = _failures(db)
        assert len(told) == len(set(told)) == (2 if how == "no JSON" else 1)
        assert "the stored row is as it was written" in told[0]
        # What is given again takes the place of what does not open.
        if "role_assignments" in statement:
            give(do, "Key Vault Reader", principal="eve")
            assert allowed(eve, KEYS + "read")
            assert not allowed(eve, KEYS + "sign/action")


def test_rows_from_before_the_seals_grant_nothing_until_they_are_given_again(
    tmp_path: Path,
) -> None:
    """The step does not seal what it finds, also if somebody set the version back for it."""
    url, secrets = f"sqlite:///{tmp_path / 'v.db'}", Secrets(tmp_path / "secrets")
    with Database.open(url, parts=[PART], secrets=secrets, durability="normal") as db:
        db.submit(lambda tx: Rbac().bootstrap(tx, ["tenant-a/alice", "tenant-a/bob"])).result(20)
    _write(
        tmp_path / "v.db",
        "ALTER TABLE role_assignments DROP COLUMN seal",
        "ALTER TABLE role_definitions DROP COLUMN seal",
        "UPDATE storage_parts SET version = 1 WHERE name = 'identity'",
    )
    bob = Caller("tenant-a", "bob", None, "user", "00", 2e9)
    with Database.open(url, parts=[PART], secrets=secrets, durability="normal") as db:

        def do(work: Callable[[Transaction], Any]) -> Any:
            return db.submit(work).result(20)

        assert not may(do, ALICE, KEYS + "read")
        do(lambda tx: Rbac().bootstrap(tx, ["tenant-a/alice"]))
        assert may(do, ALICE, KEYS + "read")
        assert not may(do, bob, KEYS + "read")
        assert len(do(lambda tx: Rbac().assignments(tx, tenant="tenant-a"))) == 2
    # Without the step, another time: the column is there.
    _write(tmp_path / "v.db", "UPDATE storage_parts SET version = 1 WHERE name = 'identity'")
    Database.open(url, parts=[PART], secrets=secrets, durability="normal").close()


def test_a_role_with_many_stars_is_no_bomb() -> None:
    """As a regular expression with backtracking this one would take years."""
    role = Role(id="", name="", description="", data_actions=("*a" * 256 + "b",))
    assert not role.allows("a" * 2000)
    assert role.allows("a" * 2000 + "b")


@given(st.text("aB/*", max_size=12), st.text("aB/", max_size=12))
def test_a_star_is_any_text(pattern: str, action: str) -> None:
    """As a regular expression says it, whatever the case."""
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), action, re.IGNORECASE)
    role = Role(id="", name="", description="", data_actions=(pattern.swapcase(),))
    assert role.allows(action) is (expected is not None)


GRANTS = {
    "Key Vault Administrator": {"read", "create/action", "release/action", "purge/action"},
    "Key Vault Crypto Officer": {"read", "create/action", "release/action", "purge/action"},
    "Key Vault Crypto User": {"read", "sign/action", "wrap/action", "update/action"},
    "Key Vault Crypto Service Encryption User": {"read", "wrap/action", "unwrap/action"},
    "Key Vault Crypto Service Release User": {"release/action"},
    "Key Vault Reader": {"read"},
    "Attestation Contributor": set(),
    "Attestation Reader": set(),
}
EVERY = {"read", "create/action", "release/action", "purge/action", "sign/action", "delete"} | {
    *("wrap/action", "unwrap/action", "update/action", "backup/action", "rotate/action")
}


@pytest.mark.parametrize("name", GRANTS)
def test_a_built_in_role_allows_what_azure_says(do: Any, name: str) -> None:
    """Data actions of the published roles; none can manage roles but the administrator."""
    give(do, name)
    allowed = {word for word in EVERY if may(do, ALICE, KEYS + word)}
    wanted = GRANTS[name]
    if name in ("Key Vault Administrator", "Key Vault Crypto Officer"):
        wanted = EVERY
    if name == "Key Vault Crypto User":
        wanted = wanted | {"unwrap/action", "backup/action"}
    assert allowed == wanted
    manages = may(do, ALICE, "Microsoft.KeyVault/vaults/roleAssignments/write", "/")
    assert manages == (name == "Key Vault Administrator")


def test_every_built_in_role_is_tried_and_found_by_name_and_guid() -> None:
    """The table above is complete; GUIDs are unique."""
    assert {role.name for role in BUILT_IN.values()} == set(GRANTS)
    for guid, role in BUILT_IN.items():
        assert role_named(guid.upper()) is role
        assert role_named(role.name.upper()) is role


def test_an_assignment_holds_for_its_tenant_and_scope_only(do: Any) -> None:
    """Same object id in another tenant, another key, a longer name: nothing."""
    give(do, "Key Vault Crypto User", "/keys/k")
    assert may(do, ALICE, KEYS + "read")
    assert not may(do, TWIN, KEYS + "read")
    assert not may(do, ALICE, KEYS + "read", "/keys/kk")
    assert not may(do, ALICE, KEYS + "read", "/keys")
    assert not may(do, ALICE, KEYS + "read", "/")


@pytest.mark.parametrize(
    ("held", "wanted", "expected"),
    [
        ("/", "/", True),
        ("/", "/keys/a", True),
        ("/keys", "/keys/a", True),
        ("/keys", "/", False),
        ("/keys/a", "/keys/a", True),
        ("/keys/a", "/keys/a/version", True),
        ("/keys/a", "/keys/ab", False),
        ("/keys/ab", "/keys/a", False),
        ("/keys/a", "/keys/A", False),
    ],
)
def test_scopes_cover_what_is_below_them(held: str, wanted: str, expected: bool) -> None:
    """Segment by segment."""
    assert covers(held, wanted) is expected


def test_a_role_that_is_taken_away_ends_at_once(do: Any) -> None:
    """What was cached before the removal is not used after it."""
    given = give(do, "Key Vault Reader")
    assert may(do, ALICE, KEYS + "read")
    do(lambda tx: Rbac().remove(tx, given.name, tenant="tenant-a", scope="/"))
    assert not may(do, ALICE, KEYS + "read")


def test_a_role_that_was_given_after_a_refusal_holds_at_once(do: Any) -> None:
    """Refusals are not remembered either."""
    assert not may(do, ALICE, KEYS + "read")
    give(do, "Key Vault Reader")
    assert may(do, ALICE, KEYS + "read")


def test_a_custom_role_allows_what_it_lists_less_what_it_excludes(do: Any) -> None:
    """Also in Managed HSM's words; a change holds at once."""
    name = "aaaaaaaa-0000-4000-8000-000000000001"

    def define(tx: Transaction, *actions: str) -> None:
        Rbac().define(
            tx,
            name,
            role_name="Mine",
            description="",
            data_actions=actions,
            not_data_actions=["Microsoft.KeyVault/managedHsm/keys/deletedKeys/delete"],
        )

    do(lambda tx: define(tx, "Microsoft.KeyVault/managedHsm/keys/*"))
    give(do, name)
    assert may(do, ALICE, KEYS + "sign/action")
    assert not may(do, ALICE, KEYS + "purge/action")
    assert not may(do, ALICE, "Microsoft.KeyVault/vaults/roleAssignments/write", "/")
    do(lambda tx: define(tx, "Microsoft.KeyVault/managedHsm/keys/read/action"))
    assert may(do, ALICE, KEYS + "read")
    assert not may(do, ALICE, KEYS + "sign/action")


def test_words_of_managed_hsm_mean_the_vaults() -> None:
    """And no other word changes."""
    prefix = "Microsoft.KeyVault/managedHsm/"
    assert canonical_action(prefix + "keys/create") == KEYS + "create/action"
    assert canonical_action(prefix + "keys/release/action") == KEYS + "release/action"
    assert canonical_action(KEYS + "read") == KEYS + "read"
    assert canonical_action("Microsoft.Attestation/x") == "Microsoft.Attestation/x"


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"role": "No Such Role"}, 404),
        ({"role": "../" + "0" * 36}, 404),
        ({"scope": "/keys/a/b"}, 400),
        ({"scope": "keys"}, 400),
        ({"scope": "/keys/../x"}, 400),
        ({"scope": ""}, 400),
        ({"principal": ""}, 400),
        ({"principal": "a b"}, 400),
        ({"principal": "x" * 300}, 400),
        ({"name": "not a guid"}, 400),
        ({"name": "{00000000-0000-4000-8000-000000000001}"}, 400),
    ],
)
def test_a_malformed_assignment_is_refused(do: Any, values: dict[str, str], status: int) -> None:
    """Names, scopes and principals have one form."""
    full = {"principal": "alice", "role": "Key Vault Reader", "tenant": "tenant-a"} | values
    with pytest.raises(ServiceError) as caught:
        do(lambda tx: Rbac().assign(tx, **full))
    assert caught.value.status == status


def test_an_assignment_is_made_once(do: Any) -> None:
    """The same again is the same; another under its name is a conflict."""
    name = "aaaaaaaa-0000-4000-8000-000000000002"

    def assign(principal: str, chosen: str | None) -> Any:
        return do(
            lambda tx: Rbac().assign(
                tx,
                principal=principal,
                role="Key Vault Reader",
                tenant="tenant-a",
                name=chosen,
            )
        )

    first = assign("alice", name)
    assert assign("alice", name) == assign("alice", None) == first
    for principal, chosen in (("bob", name), ("alice", name[:-1] + "3")):
        with pytest.raises(ServiceError) as caught:
            assign(principal, chosen)
        assert caught.value.status == 409


def test_built_in_roles_and_roles_in_use_stay(do: Any) -> None:
    """Nobody widens a built-in role, or pulls a role from under its holders."""
    name = "aaaaaaaa-0000-4000-8000-000000000004"
    values: dict[str, Any] = {"description": "", "data_actions": ["*"]}
    for chosen, role_name in ((next(iter(BUILT_IN)), "X"), (name, "key vault reader")):
        with pytest.raises(ServiceError) as caught:
            do(lambda tx, c=chosen, r=role_name: Rbac().define(tx, c, role_name=r, **values))
        assert caught.value.status == 409
    with pytest.raises(ServiceError) as caught:
        do(lambda tx: Rbac().undefine(tx, next(iter(BUILT_IN))))
    assert caught.value.status == 409
    do(lambda tx: Rbac().define(tx, name, role_name="X", **values))
    held = give(do, name)
    with pytest.raises(ServiceError) as caught:
        do(lambda tx: Rbac().undefine(tx, name))
    assert caught.value.status == 409
    do(lambda tx: Rbac().remove(tx, held.name, tenant="tenant-a", scope="/"))


def test_a_role_is_assigned_only_where_it_may_be(do: Any) -> None:
    """assignableScopes."""
    name = "aaaaaaaa-0000-4000-8000-000000000005"
    do(
        lambda tx: Rbac().define(
            tx, name, role_name="X", description="", data_actions=["*"], scopes=["/keys/a"]
        )
    )
    give(do, name, "/keys/a")
    with pytest.raises(ServiceError):
        give(do, name, "/keys/b")
    with pytest.raises(ServiceError):
        give(do, name, "/")


def test_the_configurations_administrators_are_there_from_the_start(do: Any) -> None:
    """TENANT/OBJECT_ID, once, however often the service starts."""
    for _ in range(2):
        do(lambda tx: Rbac().bootstrap(tx, ["tenant-a/alice", "https://issuer.example/x/bob"]))
    assert may(do, ALICE, "Microsoft.KeyVault/vaults/roleAssignments/write", "/")
    assert may(do, ALICE, "Microsoft.Attestation/attestationProviders/attestation/write", "/")
    assert len(do(lambda tx: Rbac().assignments(tx, tenant="tenant-a"))) == 2
    with pytest.raises(ServiceError):
        do(lambda tx: Rbac().bootstrap(tx, ["alice"]))
    for held in do(lambda tx: Rbac().assignments(tx, tenant="https://issuer.example/x")):
        do(
            lambda tx, n=held.name: Rbac().remove(
                tx, n, tenant="https://issuer.example/x", scope="/"
            )
        )
