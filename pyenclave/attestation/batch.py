"""
Appraise many pieces of evidence with several processes; the order stays, errors stand in place.

What all have in common (policy, endorsements, roots, time) goes to each process once, when it
starts. Processes are spawned, so a program that uses them has its entry under
``if __name__ == "__main__":``, and what takes long is to start them: keep an `Appraisers` open
where batches come one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from pyenclave.attestation.appraise import Buffer, Freshness, Given, Root, appraise, given, pinned
from pyenclave.attestation.endorsements import Endorsements
from pyenclave.attestation.policy import AppraisalPolicy
from pyenclave.attestation.result import AttestationResult, Check, Claims
from pyenclave.errors import EnclaveError

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

__all__ = ["Appraisers", "Item", "Outcome", "appraise_many"]

_MAX_CHUNK: Final = 128
_PER_WORKER: Final = 4  # parts that each process gets, so that none waits long for the other

Outcome: TypeAlias = "AttestationResult | EnclaveError | TypeError | ValueError"
_Told: TypeAlias = "tuple[str, tuple[Check, ...], datetime, bytes | None, bytes | None]"


@dataclass(frozen=True, slots=True)
class Item:
    """
    One piece of evidence, and what it alone is judged by; see `appraise`.

    Attributes:
        evidence: The evidence.
        nonce: What was sent to this one.
        user_data: What measured code must have put into it.
        report_data: The exact report data that is expected of it.
    """

    evidence: Buffer
    nonce: Buffer | None = None
    user_data: Buffer | None = None
    report_data: Buffer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Common:
    policy: AppraisalPolicy
    freshness: Freshness
    endorsements: Endorsements
    roots: tuple[bytes, ...]
    at: datetime | None

    def judge(self, item: Item) -> AttestationResult:
        return appraise(
            item.evidence,
            policy=self.policy,
            nonce=item.nonce,
            freshness=self.freshness,
            endorsements=self.endorsements,
            roots=self.roots,
            at=self.at,
            user_data=item.user_data,
            report_data=item.report_data,
        )

    def outcome(self, item: Item) -> Outcome:
        try:
            return self.judge(item)
        except (EnclaveError, TypeError, ValueError) as error:
            return error


_common: _Common | None = None  # of a process of `Appraisers`


def _begin(common: _Common) -> None:
    global _common  # noqa: PLW0603
    _common = common


def _work(items: list[Item], at: datetime) -> list[_Told | EnclaveError | TypeError | ValueError]:
    """Judge *items* in a process of the pool; claims are told where they are asked for."""
    if _common is None:
        raise RuntimeError("the process was not prepared")
    common = replace(_common, at=at)
    told: list[_Told | EnclaveError | TypeError | ValueError] = []
    for item in items:
        found = common.outcome(item)
        if isinstance(found, AttestationResult):
            body, key = found._report_body, found._runtime_key  # noqa: SLF001
            told.append((found.kind, found.checks, found.at, key, body))
        else:
            told.append(found)
    return told


class Appraisers:
    """
    Processes that appraise; use it as a context manager.

    Args:
        policy: As in `appraise`; so are *freshness*, *endorsements* and *roots*.
        workers: How many processes; None: one for each usable core; 1: none, only this one.
        freshness: ``required`` needs a nonce with each item.
        endorsements: Of all the evidence.
        roots: Pinned roots besides the vendors' own.

    Raises:
        OSError: The folder of endorsements cannot be read.
        TypeError: An argument has an impossible type.
        ValueError: An argument has an impossible value.
    """

    def __init__(
        self,
        *,
        policy: AppraisalPolicy,
        workers: int | None = None,
        freshness: Freshness = "required",
        endorsements: Given | None = None,
        roots: Iterable[Root] = (),
    ) -> None:
        if not isinstance(policy, AppraisalPolicy):
            raise TypeError(f"policy is an AppraisalPolicy, not {type(policy).__name__}")
        if freshness not in ("required", "not_checked"):
            raise ValueError(f"freshness is 'required' or 'not_checked', not {freshness!r}")
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int)):
            raise TypeError(f"workers is an int, not {type(workers).__name__}")
        self.workers = _usable_cores() if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers: at least 1, not {workers}")
        self._common = _Common(
            policy=policy,
            freshness=freshness,
            endorsements=given(endorsements),
            roots=pinned(roots),
            at=None,
        )
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def appraise(
        self, items: Iterable[Buffer | Item], *, at: datetime | None = None
    ) -> list[Outcome]:
        """
        Appraise *items*, all at the same time *at* (default now).

        Returns:
            For each item, in their order: its result or, where `appraise` raises for it alone
            (unknown evidence, no nonce, an impossible length), that error.

        Raises:
            BrokenProcessPool: A process died.
            ValueError: A time without a zone.

        """
        moment = datetime.now(UTC) if at is None else at
        if moment.tzinfo is None:
            raise ValueError("at: a time without a zone is ambiguous")
        listed = [item if isinstance(item, Item) else Item(item) for item in items]
        common = replace(self._common, at=moment)
        if self.workers == 1 or len(listed) < 2:
            return [common.outcome(item) for item in listed]
        size = min(_MAX_CHUNK, max(1, len(listed) // (self.workers * _PER_WORKER)))
        parts = [
            [_sendable(item) for item in listed[at : at + size]]
            for at in range(0, len(listed), size)
        ]
        pool = self._started()
        futures = [pool.submit(_work, part, moment) for part in parts]
        told = [entry for future in futures for entry in future.result()]
        return [_received(common, item, entry) for item, entry in zip(listed, told, strict=True)]

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self._common,),
            )
        return self._pool


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sendable(item: Item) -> Item:
    """Return *item* with views as bytes, which alone can be sent."""
    values: dict[str, Any] = {}
    for name in Item.__slots__:
        value = getattr(item, name)
        values[name] = bytes(value) if isinstance(value, memoryview | bytearray) else value
    return Item(**values)


def _received(
    common: _Common, item: Item, told: _Told | EnclaveError | TypeError | ValueError
) -> Outcome:
    if not isinstance(told, tuple):
        return told
    kind, checks, at, key, body = told
    # The same evidence judged by the same says the same; most callers never ask.
    return AttestationResult(
        kind=kind,
        checks=checks,
        claims=Claims(lambda: common.judge(item).claims),
        at=at,
        _runtime_key=key,
        _report_body=body,
    )


def appraise_many(
    items: Iterable[Buffer | Item],
    *,
    policy: AppraisalPolicy,
    workers: int | None = None,
    freshness: Freshness = "required",
    endorsements: Given | None = None,
    roots: Iterable[Root] = (),
    at: datetime | None = None,
) -> list[Outcome]:
    """
    Appraise many pieces of evidence, with all cores.

    Args:
        items: Evidence, or `Item` where a piece has a nonce or expectations of its own.
        policy: As in `appraise`; so are *freshness*, *endorsements* and *roots*.
        workers: How many processes; None: one for each usable core; 1: none, only this one.
        freshness: ``required`` needs a nonce with each item.
        endorsements: Of all the evidence.
        roots: Pinned roots besides the vendors' own.
        at: When validity is judged, for all alike; default now.

    Returns:
        A result or an error for each item, in their order; see `Appraisers.appraise`.

    Raises:
        BrokenProcessPool: A process died.
        OSError: The folder of endorsements cannot be read.
        TypeError: An argument has an impossible type.
        ValueError: An argument has an impossible value.

    """
    with Appraisers(
        policy=policy,
        workers=workers,
        freshness=freshness,
        endorsements=endorsements,
        roots=roots,
    ) as appraisers:
        return appraisers.appraise(items, at=at)
