"""A client with a cache: what all sources fetch through."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyenclave.collateral.cache import Cache
from pyenclave.collateral.http import Client, Response
from pyenclave.errors import CollateralError

__all__ = ["Fetcher"]

_DAY = 86_400.0


@dataclass(slots=True)
class Fetcher:
    """
    Fetches through a cache.

    Attributes:
        client: How to ask the network.
        cache: Where answers are kept; None keeps none.
        offline: Ask the cache only.
        keep: Seconds for which an answer is used again. Vendors' collateral changes about once a
            month; a day is what their own clients take.
        allow_older: Take collateral that is older than what was seen before.
        roots: Roots beside Intel's own (DER or PEM) whose collateral is remembered as seen.
    """

    client: Client = field(default_factory=Client)
    cache: Cache | None = None
    offline: bool = False
    keep: float = _DAY
    allow_older: bool = False
    roots: tuple[bytes, ...] = ()

    async def get(
        self,
        url: str,
        *,
        max_size: int,
        headers: Mapping[str, str] | None = None,
        keep: float | None = None,
    ) -> Response:
        """
        Get *url* from the cache or the network.

        Raises:
            CollateralError: It is not to be had.

        """
        if self.cache is not None and (kept := self.cache.get(url)) is not None:
            return kept
        if self.offline:
            raise CollateralError(
                f"{url.partition('?')[0]}: not in the cache, and the network is not asked",
                advice="Fetch once with the network.",
            )
        answer = await self.client.get(url, max_size=max_size, headers=headers)
        if self.cache is not None:
            self.cache.put(url, answer, seconds=self.keep if keep is None else keep)
        return answer

    async def get_all(self, *wanted: tuple[str, int, float | None]) -> list[Response]:
        """
        Get several at once; if one fails, the others are ended before the error is raised.

        Args:
            wanted: Address, size limit, and seconds to keep it (None: the usual).

        Raises:
            CollateralError: One is not to be had.

        """
        tasks = [
            asyncio.ensure_future(self.get(url, max_size=size, keep=keep))
            for url, size, keep in wanted
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def check_not_older(self, family: str, number: int, *, signed: bool) -> None:
        """Refuse what is older than what was seen, where there is a cache that remembers it."""
        if self.cache is not None and not self.allow_older:
            self.cache.check_not_older(family, number, remember=signed)
