"""
A Django view that calls an enclave: ``python app.py``, or ``gunicorn app:application``.

A handle belongs to the process that opened it, so it is made at the first request, after the
server has forked, and never at import.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

import pyenclave
from pyenclave.errors import ArgumentError, BusyError, EcallError, EnclaveLostError

settings.configure(
    DEBUG=False,
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="x" * 50,
)
django.setup()


@cache
def enclave() -> pyenclave.Enclave:
    return pyenclave.Enclave.from_file(Path(__file__).with_name("scoring.py")).start()


def score(request: HttpRequest) -> JsonResponse:
    try:
        income, debt = float(request.GET["income"]), float(request.GET["debt"])
    except (KeyError, ValueError):
        return JsonResponse({"error": "income and debt are wanted, as numbers"}, status=400)
    try:
        return JsonResponse({"score": enclave().options(timeout=2).score(income, debt)})
    except BusyError:
        return JsonResponse({"error": "busy"}, status=503, headers={"Retry-After": "1"})
    except (ArgumentError, EcallError) as error:
        return JsonResponse({"error": str(error)}, status=422)
    except EnclaveLostError:
        enclave.cache_clear()  # the next request launches another
        return JsonResponse({"error": "the enclave was lost"}, status=503)


urlpatterns = [path("score", score)]
application = get_wsgi_application()

if __name__ == "__main__":
    from wsgiref.simple_server import make_server

    with make_server(
        "127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 8000, application
    ) as server:
        print(f"listening on {server.server_port}", flush=True)
        server.serve_forever()
