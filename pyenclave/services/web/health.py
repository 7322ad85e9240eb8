"""
``/health`` and ``/health/live``: whether a service is to be sent requests, and whether it runs.

Anybody may ask, and learns one word. What is looked at is looked at once a second, however many
ask, so that nobody keeps a database busy by asking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from pyenclave.errors import EnclaveError
from pyenclave.services.web.call import Answer, Call
from pyenclave.services.web.kit import Service
from pyenclave.services.web.logs import clean, logger

__all__ = ["LIVE", "READY", "add_health", "described"]

READY: Final = "/health"
LIVE: Final = "/health/live"
_KEPT_SECONDS: Final = 1.0
_PROBE_SECONDS: Final = 3.0  # a probe of Kubernetes waits one second unless it is told otherwise


class _Health:
    def __init__(self, name: str, probe: Callable[[], Awaitable[object]] | None) -> None:
        self._name = name
        self._probe = probe
        self._good: bool | None = None
        self._until = float("-inf")
        self._look: asyncio.Task[bool] | None = None

    async def live(self, call: Call) -> Answer:
        """Answer ``GET /health/live``: the event loop turns."""
        del call
        return Answer({"status": "live"})

    async def ready(self, call: Call) -> Answer:
        """Answer ``GET /health``."""
        del call
        if self._probe is None or await self._is_good():
            return Answer({"status": "ready"})
        return Answer({"status": "not ready"}, status=503, headers={"retry-after": "1"})

    async def _is_good(self) -> bool:
        loop = asyncio.get_running_loop()
        if self._good is not None and loop.time() < self._until:
            return self._good
        if self._look is None:
            self._look = loop.create_task(self._looked())
        # Whoever asks first may leave; the others wait for the same look.
        return await asyncio.shield(self._look)

    async def _looked(self) -> bool:
        why: object = None
        try:
            if self._probe is None:
                raise AssertionError("checked by ready()")
            async with asyncio.timeout(_PROBE_SECONDS):
                await self._probe()
        except TimeoutError:
            why = f"no answer in {_PROBE_SECONDS:g} s"
        except EnclaveError as error:
            why = error
        finally:
            self._look = None
        good = why is None
        if good != self._good:  # a change is told once, not each second
            if why is not None:
                logger.error("%s is not ready: %s", self._name, clean(why))
            elif self._good is not None:
                logger.info("%s is ready again", self._name)
        self._good = good
        self._until = asyncio.get_running_loop().time() + _KEPT_SECONDS
        return good


def add_health(service: Service, probe: Callable[[], Awaitable[object]] | None = None) -> None:
    """
    Add the routes to *service*.

    Args:
        service: The service.
        probe: Returns if requests can be served, else raises EnclaveError; None: they always can.

    """
    health = _Health(service.name, probe)
    for method in ("GET", "HEAD"):
        service.route(method, READY, health.ready, anonymous=True, api_versions=())
        service.route(method, LIVE, health.live, anonymous=True, api_versions=())


def described() -> dict[str, Any]:
    """Return the routes as paths of an OpenAPI document."""

    def words(*names: str) -> dict[str, Any]:
        schema = {
            "type": "object",
            "properties": {"status": {"type": "string", "enum": list(names)}},
            "required": ["status"],
        }
        return {"content": {"application/json": {"schema": schema}}}

    ready = {
        "200": {"description": "Requests are served", **words("ready")},
        "503": {"description": "Not now"},
    }
    live = {"200": {"description": "It runs", **words("live")}}
    refused = {
        status: {"description": "Refused"}
        for status in ("400", "405", "408", "413", "414", "415", "429", "431")
    }
    found: dict[str, Any] = {}
    for path, answers in ((READY, ready), (LIVE, live)):
        operation = {"security": [], "responses": {**answers, **refused}}
        found[path] = {"get": operation, "head": operation}
    return found
