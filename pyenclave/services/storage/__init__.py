"""
Storage of the services: SQLite or PostgreSQL, group commit, schema steps, protected secrets.

`Database` runs works (functions of a `Transaction`); a `Part` is what a service keeps in it.
"""

try:
    import sqlalchemy  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'the services need {error.name}: pip install "pyenclave[services]"', name=error.name
    ) from None

from pyenclave.services.storage.database import Database
from pyenclave.services.storage.part import Part, create_tables
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.storage.tables import metadata
from pyenclave.services.storage.transaction import Refused, Transaction

__all__ = ["Database", "Part", "Refused", "Secrets", "Transaction", "create_tables", "metadata"]
