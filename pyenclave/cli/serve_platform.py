"""
``pyenclave serve platform``: keep this user's platform running, so that no program waits for it.

A platform ends with its last host; this is a host that stays. It is the embedded platform that any
program of the user would have started, with the same root and no further rights.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any, Final

from pyenclave._platform.client import PlatformClient
from pyenclave._platform.endpoint import Endpoint, runtime_name
from pyenclave._platform.state import State
from pyenclave.calls.ocalls import Ocall
from pyenclave.cli import output
from pyenclave.errors import EnclaveError
from pyenclave.formats.image import Image
from pyenclave.formats.lock import Roots
from pyenclave.host import Enclave
from pyenclave.host._run import read_image
from pyenclave.image.build import build_script

__all__ = ["serve_platform"]

_LOOK: Final = 0.2  # seconds until a platform that ended is missed
_PAUSES: Final = (0.0, 0.5, 1.0, 2.0, 5.0)  # seconds before it is started again
_STEADY: Final = 60.0  # seconds after which one that ends counts as the first again


def serve_platform(warm: list[str], *, quiet: bool = False) -> int:
    """
    Keep a platform running until SIGTERM or Ctrl-C, and say on stdout when it is ready.

    Args:
        warm: Images or entries that are launched once, so that the platform has their runtime at
            hand, after each of its starts.
        quiet: Nothing on stderr but errors.

    Returns:
        The exit code: 0, since it ends when somebody wants it.

    Raises:
        EnclaveError: The platform does not start the first time, or an image is refused.
        OSError: An image cannot be read.

    """
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    client = _begin(warm)
    try:
        print(json.dumps(_line(client)), flush=True)
        failures = 0
        lived = 0.0
        while not end.wait(_LOOK):
            if not client.lost:
                lived += _LOOK
                continue
            client.close()
            failures = 0 if lived > _STEADY else failures
            if end.wait(_PAUSES[min(failures, len(_PAUSES) - 1)]):
                break
            failures, lived = failures + 1, 0.0
            client = _again(client, warm, quiet=quiet)
    finally:
        client.close()
    return 0


def _begin(warm: list[str]) -> PlatformClient:
    client = PlatformClient.connect()
    try:
        for path in warm:
            _warm(path)
    except BaseException:
        client.close()
        raise
    return client


def _warm(path: str) -> None:
    """Launch an image once, without its host functions: its zygote stays with the platform."""
    data = build_script(path) if path.endswith(".py") else read_image(path)

    def nobody(*arguments: object, **named: object) -> None:
        raise RuntimeError("this host calls nothing, so nothing asks it")

    ocalls = {Ocall.from_wire(item).name: nobody for item in Image.parse(data).info.ocalls}
    with Enclave(data, quiet=True, ocalls=ocalls):
        pass


def _again(client: PlatformClient, warm: list[str], *, quiet: bool) -> PlatformClient:
    """Start the platform that was lost; what fails now may work at the next attempt."""
    try:
        client = _begin(warm)
    except (EnclaveError, OSError) as error:
        output.note(f"the platform does not start: {error}")
    else:
        if not quiet:
            output.note(f"the platform had ended; pid {client.hello.pid} runs now")
    return client


def _line(client: PlatformClient) -> dict[str, Any]:
    with State.open() as state:
        folder = state.path
        name = Endpoint(state, runtime_name(sys.executable, Roots.of_this_process())).socket_name
    return {
        "url": f"unix:{folder}/{name}",
        "ca": f"{folder}/platform-root.pem",
        "token": None,
        "pid": client.hello.pid,
        "level": client.hello.level,
        "ephemeral": client.hello.ephemeral,
    }
