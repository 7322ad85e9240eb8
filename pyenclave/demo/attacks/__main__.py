"""Run one attack as a program: ``python -m pyenclave.demo.attacks NAME < order.json``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from pyenclave._native import drop_capabilities
from pyenclave.demo.attacks import memory, tamper


def main(name: str) -> int:
    """Run the attack *name* with the order on standard input."""
    if os.geteuid() == 0:
        drop_capabilities()
    order = json.load(sys.stdin)
    attack = memory.ATTACKS[name] if name in memory.ATTACKS else tamper.ATTACKS[name]
    outcome = attack(order)
    json.dump(dataclasses.asdict(outcome), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
