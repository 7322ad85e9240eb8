"""
The attackers of the demo, each a program of its own.

``python -m pyenclave.demo.attacks NAME`` reads one JSON order on standard input and answers with
one JSON object: ``outcome`` is ``succeeded`` or ``refused``, ``detail`` says how. The same
program runs against the enclave and against the unprotected copy.
"""

from __future__ import annotations

__all__: list[str] = []
