"""A vault in a process of its own, to be killed: ``vault_process.py FOLDER URL SECRETS``."""

from __future__ import annotations

import sys
from pathlib import Path

from vault_parts import MemoryBackend, Table, Tokens

from pyenclave.services.storage import Database, Secrets
from pyenclave.services.vault.service import Vault
from pyenclave.services.vault.tables import PART
from pyenclave.services.web.run import Server


def main(folder: Path, url: str, secrets: Path) -> None:
    """Serve until the end, and say where."""
    db = Database.open(url, parts=[PART], secrets=Secrets(secrets))
    vault = Vault(db, backend=MemoryBackend(b"k" * 32), rights=Table(), authenticator=Tokens())
    server = Server(vault.service)
    vault.place.base = server.listen()
    (folder / "ca.pem").write_bytes(server.ca_pem or b"")
    server.run(lambda url: print(url, flush=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
