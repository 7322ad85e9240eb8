"""
The audit log: every decision, in order, in the transaction that it belongs to.

`Event` is what services write (`Transaction.audit`).
"""

from pyenclave.services.audit.event import Decision, Event

__all__ = ["Decision", "Event"]
