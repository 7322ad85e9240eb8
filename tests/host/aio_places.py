"""What tests of the handle for asyncio share."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from pathlib import Path

ENTRY = Path(__file__).with_name("aio_entry.py")


async def eventually(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.005)


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def tasks():
    return len(os.listdir("/proc/self/task"))


def resources():
    """How many descriptors and threads there are, without what nobody has any more."""
    gc.collect()
    return descriptors() + tasks()


def lanes_of(enclave):
    return enclave._engine.lanes


def in_child(child):
    """Run *child* in a fork and return the text that it returns."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        text = "nothing"
        try:
            text = child()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text
