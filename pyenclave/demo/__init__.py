"""
The main job, end to end: a lender's applicants are scored where nobody can look.

Owner, host and enclave are three processes (``owner``, ``service``, ``scoring``), the attackers
programs of their own (``attacks``); ``director`` starts them and tells what happened.
"""

from __future__ import annotations

__all__: list[str] = []
