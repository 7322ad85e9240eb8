"""
Starlette middleware that serves evidence: ``uvicorn app:app``.

``GET /.well-known/pyenclave/evidence?nonce=HEX`` answers with evidence over the caller's nonce,
which proves that it is fresh. The caller verifies it and encrypts to the key in it; the host that
runs this middleware learns nothing from either.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import pyenclave
from pyenclave.errors import BusyError, CallTimeoutError, EnclaveError

SCORING = Path(__file__).with_name("scoring.py")
PATH = "/.well-known/pyenclave/evidence"


class EvidenceMiddleware:
    """Answers for one path; everything else goes on to the application."""

    def __init__(self, app: ASGIApp, path: str = PATH) -> None:
        self.app = app
        self.path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self.path:
            response = await self.evidence(Request(scope, receive))
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def evidence(self, request: Request) -> Response:
        if request.method != "GET":
            return PlainTextResponse("GET is wanted", 405, headers={"Allow": "GET"})
        text = request.query_params.get("nonce", "")
        try:
            nonce = bytes.fromhex(text) if len(text) <= 128 else b""
        except ValueError:
            nonce = b""
        if not 16 <= len(nonce) <= 64:
            return PlainTextResponse("nonce: 16 to 64 bytes in hexadecimal are wanted", 400)
        enclave: pyenclave.AsyncEnclave = request.app.state.enclave
        try:
            evidence = await enclave.options(timeout=5).attest(nonce)
        except (BusyError, CallTimeoutError):
            return PlainTextResponse("busy", 503, headers={"Retry-After": "1"})
        return Response(
            evidence.to_bytes(),
            media_type="application/octet-stream",
            headers={"Cache-Control": "no-store"},
        )


async def score(request: Request) -> Response:
    try:
        income, debt = (float(request.query_params[name]) for name in ("income", "debt"))
    except (KeyError, ValueError):
        return JSONResponse({"error": "income and debt are wanted, as numbers"}, 400)
    try:
        return JSONResponse({"score": await request.app.state.enclave.score(income, debt)})
    except EnclaveError as error:
        return JSONResponse({"error": error.code}, 503)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with pyenclave.AsyncEnclave.from_file(SCORING) as enclave:
        app.state.enclave = enclave
        yield


app = Starlette(
    routes=[Route("/score", score)], middleware=[Middleware(EvidenceMiddleware)], lifespan=lifespan
)
