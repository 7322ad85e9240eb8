"""``python -m pyenclave.testing FOLDER``: synthetic evidence of each kind, to try verifying on."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from pyenclave.testing import samples


def main(arguments: list[str] | None = None) -> int:
    """Write the samples; the exit code is 0, or 2 if they cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m pyenclave.testing",
        description="Makes evidence of each kind with chips of software, each under a root of its "
        "own: FOLDER/KIND has the evidence, its endorsements and the root. For trials only.",
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--nonce", metavar="HEX", required=True, help="8 to 64 bytes")
    options = parser.parse_args(arguments)
    try:
        made = samples.samples(datetime.now(UTC), bytes.fromhex(options.nonce))
        samples.write(options.folder, made)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for kind, sample in made.items():
        print(f"{options.folder}/{kind}/{sample.file}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
