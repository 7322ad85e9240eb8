"""
A plain asyncio server: a line of JSON in, a line out. ``python service.py [PORT]``.

Lines are at most 64 KiB, a client may be silent for 30 s, a call takes at most 2 s. At SIGTERM no
more clients are taken, those that are served finish within 5 s, then the enclave ends.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pyenclave
from pyenclave.errors import EnclaveError

SCORING = Path(__file__).with_name("scoring.py")
IDLE, CALL, DRAIN = 30, 2, 5  # seconds


async def answer(enclave: pyenclave.AsyncEnclave, line: bytes) -> dict[str, object]:
    try:
        asked = json.loads(line)
        income, debt = float(asked["income"]), float(asked["debt"])
    except (ValueError, KeyError, TypeError):
        return {"error": "an object with the numbers income and debt is wanted"}
    try:
        return {"score": await enclave.options(timeout=CALL).score(income, debt)}
    except EnclaveError as error:
        return {"error": error.code}


async def main(port: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    clients: set[asyncio.Task[None]] = set()

    async with pyenclave.AsyncEnclave.from_file(SCORING) as enclave:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            clients.add(task)
            try:
                while line := await asyncio.wait_for(reader.readline(), IDLE):
                    writer.write(json.dumps(await answer(enclave, line)).encode() + b"\n")
                    await writer.drain()
            except (TimeoutError, ConnectionError, ValueError):
                pass  # silent, gone, or a line without end
            finally:
                clients.discard(task)
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", port, limit=64 * 1024)
        print(f"listening on {server.sockets[0].getsockname()[1]}", flush=True)
        await stop.wait()
        server.close()
        if clients:
            _, late = await asyncio.wait(clients, timeout=DRAIN)
            for task in late:
                task.cancel()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 8000))
