"""
Flask under gunicorn: ``gunicorn --config gunicorn.conf.py app:app``.

With ``--preload`` this module is imported before gunicorn forks. Nothing here opens an enclave;
``post_worker_init`` in gunicorn.conf.py does, once in each worker.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flask import Flask, Response, jsonify, request

import pyenclave
from pyenclave.errors import ArgumentError, BusyError, CallTimeoutError, EcallError

app = Flask(__name__)


@cache
def enclave() -> pyenclave.Enclave:
    """This process's own enclave, launched at the first call."""
    return pyenclave.Enclave.from_file(Path(__file__).with_name("scoring.py")).start()


@app.get("/score")
def score() -> tuple[Response, int]:
    try:
        income, debt = float(request.args["income"]), float(request.args["debt"])
    except (KeyError, ValueError):
        return jsonify(error="income and debt are wanted, as numbers"), 400
    try:
        return jsonify(score=enclave().options(timeout=2).score(income, debt)), 200
    except (BusyError, CallTimeoutError):
        return jsonify(error="busy"), 503
    except (ArgumentError, EcallError) as error:
        return jsonify(error=str(error)), 422
