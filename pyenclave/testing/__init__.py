"""
For tests: chips that are made of nothing but software.

A synthetic chip signs evidence of any kind, with any field and any flaw, under a root of its own.
No verifier of this package knows such a root: a test hands it over (``roots=[chip.root]``), and
nothing outside a test should. Nothing in the package imports this one.
"""

from __future__ import annotations
