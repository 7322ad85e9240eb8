"""``python -m pyenclave``: the same as the ``pyenclave`` command."""

from __future__ import annotations

import sys

from pyenclave.cli import main

if __name__ == "__main__":
    sys.exit(main())
