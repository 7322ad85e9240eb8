"""
Collateral over the network: the only part of verification that has any.

Verification itself takes endorsements as bytes; here they are fetched from the vendors' services or
a cache of one's own, checked for being what was asked for, and put into one bundle.
"""

from __future__ import annotations
