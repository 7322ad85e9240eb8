"""``pyenclave vault``: what the operator of a key vault does beside serving it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import getpass
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyenclave._platform.state import State
from pyenclave.cli import output
from pyenclave.errors import ArgumentError, ConfigurationError

if TYPE_CHECKING:
    from pyenclave.services.storage.secrets import Secrets
    from pyenclave.services.vault.desk import Desk
    from pyenclave.services.web.config import ServiceConfig

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

T = TypeVar("T")

__all__ = ["add_commands"]

# What a missing extra is missing first.
_OF_THE_EXTRA = frozenset({"sqlalchemy", "starlette", "uvicorn", "httptools", "jmespath"})
_URL = "https://127.0.0.1:1"  # nothing listens, and no key's identifier is shown


def add_commands(subparsers: Subparsers) -> None:
    """Add ``vault`` and its actions."""
    vault = subparsers.add_parser(
        "vault", help="replace the key-encryption key or the secrets of a vault"
    )
    actions = vault.add_subparsers(dest="action", metavar="ACTION", required=True)
    rotate = _action(
        actions,
        "rotate-kek",
        "make a new key-encryption key and move every key to it, while the vault runs; or end "
        "such a rotation that was stopped",
    )
    rotate.add_argument(
        "--destroy-old",
        action="store_true",
        help="destroy older key-encryption keys that no key needs: backups of keys that were made "
        "under them cannot be restored any more. Refused while there are damaged rows",
    )
    rotate.add_argument(
        "--give-up",
        metavar="NAME/VERSION",
        action="append",
        default=[],
        help="with --destroy-old: a damaged row that need not open any more, ever; repeatable",
    )
    rotate.set_defaults(function=_rotate)
    keks = _action(actions, "keks", "list the key-encryption keys, and how many keys each wraps")
    keks.set_defaults(function=_keks)
    secrets = _action(
        actions,
        "rotate-secrets",
        "put a fresh key into the secrets file of a vault or attestation service and move all that "
        "its database protects to it, while the service runs; or end such a rotation that was "
        "stopped",
        backend=False,
    )
    secrets.add_argument(
        "--destroy-old",
        action="store_true",
        help="destroy older keys that nothing in the database needs: backups of keys, and copies "
        "of the database, that were made under them cannot be used any more",
    )
    secrets.add_argument(
        "--this-database-only",
        action="store_true",
        help="with --destroy-old, of a database on a server: no other database is used with this "
        "secrets file",
    )
    secrets.set_defaults(function=_rotate_secrets, backend=None)


def _action(
    actions: Subparsers, name: str, what: str, *, backend: bool = True
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    action.add_argument("--dev", action="store_true", help="of serve vault --dev")
    action.add_argument("--config", metavar="FILE", help="settings of the vault, TOML")
    action.add_argument("--database", metavar="URL", help="another database than the settings'")
    if backend:
        action.add_argument(
            "--backend", metavar="BACKEND", help="another backend than the settings'"
        )
    action.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object on stdout"
    )
    return action


def _config(args: argparse.Namespace) -> ServiceConfig:
    if args.dev == (args.config is not None):
        found = "both" if args.dev else "neither"
        raise ArgumentError("which vault?", expected="either --dev or --config FILE", found=found)
    if args.dev:
        from pyenclave.services.web.development import development

        with State.open() as state:
            folder = state.path
        config = development("vault", folder, url=_URL).config
        database = os.path.join(folder, "dev", "vault.db")
        if args.database is None and args.backend is None and not os.path.exists(database):
            raise ConfigurationError(
                "there is no database of a development vault yet",
                expected=database,
                advice="pyenclave serve vault --dev makes it; --config FILE names another vault.",
            )
    else:
        from pyenclave.services.web.config import load

        config = load(args.config)
    named = {"database": args.database, "backend": args.backend}
    return config.replace(**{name: value for name, value in named.items() if value is not None})


def _with_desk(args: argparse.Namespace, work: Callable[[Desk, ServiceConfig], Awaitable[T]]) -> T:
    async def run() -> T:
        from pyenclave.services.vault.configured import desk_of

        config = _config(args)
        async with desk_of(config) as desk:
            return await work(desk, config)

    with _extra():
        return asyncio.run(run())


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _OF_THE_EXTRA:
            raise
        raise ModuleNotFoundError(
            f'the vault needs {error.name}: pip install "pyenclave[services]"', name=error.name
        ) from None


def _secrets_of(config: ServiceConfig) -> Secrets | None:
    """Return the secrets of a database on a server; of a SQLite file they are beside it."""
    from pyenclave.services.storage.engines import parse_url, sqlite_path
    from pyenclave.services.storage.secrets import Secrets
    from pyenclave.services.vault.configured import SECRETS

    path = sqlite_path(parse_url(config.database))
    there = Path(config.state_dir) / SECRETS if path is None else Path(f"{path}.secrets")
    if not there.exists():
        raise ConfigurationError("the secrets file is not there", expected=str(there))
    return Secrets(there) if path is None else None


def _rotate_secrets(args: argparse.Namespace) -> int:
    progress = output.Progress(quiet=args.json)
    with _extra():
        from pyenclave.services.rotation import parts_of, rotate_secrets
        from pyenclave.services.storage import Database

        config = _config(args)
        shared = not config.database.startswith("sqlite")
        if args.destroy_old and shared and not args.this_database_only:
            raise ConfigurationError(
                "other databases may be used with this secrets file; theirs would be lost",
                advice="Is there none, say so: --this-database-only.",
            )
        secrets = _secrets_of(config)
        parts = parts_of(config.database, secrets)
        with Database.open(config.database, parts=parts, secrets=secrets, existing=True) as db:
            done = rotate_secrets(
                db,
                parts,
                destroy=args.destroy_old,
                caller=getpass.getuser(),
                progress=lambda moved: progress.step(f"{moved:,} moved"),
            )
    progress.done()
    code = 1 if done.damaged else 0
    if args.json:
        output.print_json(dataclasses.asdict(done))
        return code
    how = "the rotation that was stopped is ended" if done.resumed else "made"
    output.say(f"key {done.key} of the secrets: {how}; {done.moved:,} rows moved to it")
    if done.resumed:
        output.say("no new key was made: run it once more for one")
    for key in done.destroyed:
        output.say(f"destroyed {key}")
    for key in done.kept:
        output.say(f"kept      {key}: it opens backups that were made under it (--destroy-old)")
    for row in done.damaged:
        output.say(f"DAMAGED   {output.line(row)}: not moved; it does not open")
    return code


def _rotate(args: argparse.Namespace) -> int:
    if args.give_up and not args.destroy_old:
        raise ArgumentError("--give-up goes with --destroy-old: nothing else is lost")
    progress = output.Progress(quiet=args.json)

    async def work(desk: Desk, config: ServiceConfig) -> dict[str, Any]:
        from pyenclave.services.vault.rewrapping import rotate_kek
        from pyenclave.services.vault.users import FILE, other_users

        if args.destroy_old and (others := other_users(desk.db, config.state_dir)):
            raise ConfigurationError(
                "other vaults were served with these key-encryption keys; theirs would be lost",
                expected="this database only",
                found=f"logs {', '.join(others[:5])}",
                advice=f"Is such a database gone for good, take its line out of {FILE} in "
                f"{config.state_dir}.",
            )
        done = await rotate_kek(
            desk,
            destroy=args.destroy_old,
            give_up=args.give_up,
            caller=getpass.getuser(),
            progress=lambda moved: progress.step(f"{moved:,} keys moved"),
        )
        return {
            "kek": done.kek,
            "resumed": done.resumed,
            "moved": done.moved,
            "destroyed": list(done.destroyed),
            "kept": list(done.kept),
            "damaged": list(done.damaged),
        }

    done = _with_desk(args, work)
    progress.done()
    code = 1 if done["damaged"] else 0
    if args.json:
        output.print_json(done)
        return code
    how = "the rotation that was stopped is ended" if done["resumed"] else "made"
    output.say(f"key-encryption key {done['kek']}: {how}; {done['moved']:,} keys moved to it")
    for kek in done["destroyed"]:
        output.say(f"destroyed {kek}")
    for kek in done["kept"]:
        output.say(f"kept      {kek}: it opens backups that were made under it (--destroy-old)")
    for key in done["damaged"]:
        output.say(f"DAMAGED   {output.line(key)}: not moved; its row is not as the vault wrote it")
    return code


def _keks(args: argparse.Namespace) -> int:
    async def work(desk: Desk, _config: ServiceConfig) -> list[dict[str, Any]]:
        from pyenclave.services.vault import keks
        from pyenclave.services.vault.rewrapping import backend_of

        there = await backend_of(desk).keks()
        newest = there[-1:]
        states, used = await desk.db.run(lambda tx: (keks.states(tx), keks.in_use(tx)))
        listed = [*there, *(kek for kek in {**states, **used} if kek not in there)]
        return [
            {
                "kek": kek.hex(),
                "state": states.get(kek, "current" if kek in newest else "older"),
                "wraps": kek in newest,
                "keys": used.get(kek, 0),
                "there": kek in there,
            }
            for kek in listed
        ]

    found = _with_desk(args, work)
    lost = [kek["kek"] for kek in found if kek["keys"] and not kek["there"]]
    if args.json:
        output.print_json({"keks": found})
    elif not found:
        output.say("no key-encryption key yet: the first key of the vault makes it")
    else:
        rows = [
            (
                kek["kek"],
                "LOST" if kek["kek"] in lost else kek["state"],
                f"{kek['keys']:,}",
                "wraps" if kek["wraps"] else "",
            )
            for kek in found
        ]
        output.say(output.table(rows, header=("key-encryption key", "state", "keys", "")))
    return 1 if lost else 0
