"""The server of the row ``fastapi_overhead``: a route that calls an enclave, one that does not."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pyenclave.benchmarks import _echo
from pyenclave.host.aio import AsyncEnclave
from pyenclave.image.build import build_script


async def serve() -> None:
    """Serve on a free port, which is printed, until stdin ends."""
    import fastapi
    import uvicorn

    script = Path(__file__).with_name("_echo.py")
    image = build_script(script)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="pyenclave-bench-") as folder:
            async with AsyncEnclave(image, state=folder + "/state", quiet=True) as enclave:
                app.state.enclave = enclave
                yield

    app = fastapi.FastAPI(lifespan=lifespan)

    @app.get("/enclave")
    async def inside(x: int, y: float) -> dict[str, float]:
        return {"sum": await app.state.enclave.add(x, y)}

    @app.get("/local")
    async def here(x: int, y: float) -> dict[str, float]:
        return {"sum": _echo.add(x, y)}

    config = uvicorn.Config(app, port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await task


if __name__ == "__main__":
    asyncio.run(serve())
