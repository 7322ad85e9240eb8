"""
A FastAPI service with a pool of enclaves: ``uvicorn app:app --workers 4``.

The pool is made in the lifespan, so each worker process has its own. What can go wrong has an
answer of its own: busy or late 503, bad values 422; a call whose enclave was lost before it began
is tried again by the pool, one that may have begun is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

import pyenclave
from pyenclave import telemetry
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallTimeoutError,
    EcallError,
    EnclaveStateError,
    LaunchError,
)

SCORING = Path(__file__).with_name("scoring.py")


class Applicant(BaseModel):
    income: float
    debt: float


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with pyenclave.AsyncEnclavePool.from_file(SCORING, size=2) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/score")
async def score(applicant: Applicant, request: Request) -> dict[str, float]:
    pool = request.app.state.pool
    return {"score": await pool.options(timeout=2).score(applicant.income, applicant.debt)}


@app.get("/metrics")
async def metrics() -> Response:
    return Response(telemetry.render(), media_type="text/plain; version=0.0.4")


@app.get("/healthz")
async def health(request: Request) -> dict[str, str]:
    await request.app.state.pool.options(timeout=1).score(1.0, 0.0)
    return {"status": "ok"}


@app.exception_handler(BusyError)
@app.exception_handler(CallTimeoutError)
@app.exception_handler(EnclaveStateError)
@app.exception_handler(LaunchError)
async def unavailable(request: Request, error: pyenclave.errors.EnclaveError) -> JSONResponse:
    return JSONResponse({"error": error.code}, status_code=503, headers={"Retry-After": "1"})


@app.exception_handler(ArgumentError)
@app.exception_handler(EcallError)
async def refused(request: Request, error: pyenclave.errors.EnclaveError) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=422)
