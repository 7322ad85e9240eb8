"""
Collateral of the service: read from folders and bundles, or fetched from a caching service; kept.

Nothing is fetched for evidence that is not genuine without collateral, at most one fetch runs for a
platform family at a time, and a family that is not to be had is not asked for again for a while: a
stranger who posts quotes makes no traffic.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from pyenclave.attestation import AppraisalPolicy, Endorsements, appraise, kind_of
from pyenclave.attestation.policy import TCB_STATUSES
from pyenclave.errors import CollateralError, EnclaveError
from pyenclave.formats import jsonstrict
from pyenclave.formats.dcap import CERTIFICATION_PCK_CHAIN, TdQuote, read_quote
from pyenclave.formats.evidence import Evidence
from pyenclave.formats.machine import MachineEvidence
from pyenclave.formats.pck import PckExtension
from pyenclave.formats.x509 import Certificate, Crl
from pyenclave.services.attestation.verification import Prepared

__all__ = ["Collateral", "Fetch", "family_of", "from_pccs"]

Family = tuple[str, str]  # sgx or tdx, and FMSPC in hexadecimal digits
Fetch = Callable[[bytes, Mapping[str, bytes]], Awaitable[Mapping[str, bytes]]]
_EMPTY: Final = Endorsements()
_LOOK: Final = 10.0  # seconds between looks at folders
_FRESH: Final = 6 * 3600.0  # after which what was fetched is fetched again, beside the requests
_STALE: Final = 24 * 3600.0  # after which requests wait for that
_RETRY: Final = 60.0  # seconds before what failed is tried again
# Evidence of machines that vouch for a platform of ours.
_MACHINES: Final = ("sev-snp-report", "tdx-quote", "azure-hcl-snp", "azure-hcl-tdx")
_MAX_FAMILIES: Final = 1024
_MAX_FOLDERS: Final = 4096
_WITHOUT: Final = AppraisalPolicy.any_code(
    allow_debug=True,
    allow_migration_agent=True,
    tcb_statuses=TCB_STATUSES,
    accepted_advisories=("any",),
    require_collateral=False,
)


@dataclass(slots=True)
class _Fetched:
    endorsements: Endorsements
    at: float


@lru_cache(maxsize=1024)
def _fmspc(chain: bytes) -> str:
    pck = Certificate.from_pem_chain(chain)[0]
    return PckExtension.from_certificate(pck).fmspc.hex()


def _quote_of(prepared: Prepared) -> bytes:
    return prepared.files.get("td-quote.bin", prepared.data)


def family_of(quote: bytes) -> Family:
    """
    Return the platform family of a quote.

    Raises:
        EvidenceFormatError: The quote or its certificate cannot be read.
        CollateralError: It carries no certificate.

    """
    read = read_quote(quote)
    if read.certification_type != CERTIFICATION_PCK_CHAIN:
        raise CollateralError(
            "the quote does not carry its PCK certificate",
            expected=f"certification data of type {CERTIFICATION_PCK_CHAIN}",
            found=f"type {read.certification_type}",
        )
    tee = "tdx" if isinstance(read, TdQuote) else "sgx"
    return tee, _fmspc(bytes(read.certification_data))


class Collateral:
    """
    What the vendors say, by platform family.

    Args:
        paths: Folders and bundles. A folder holds one family's files, or folders and bundles that
            do. They are read again when they change.
        fetch: Fetches what a quote needs; None: what is not in *paths* is not to be had.
        roots: Further roots, to tell genuine quotes before anything is fetched.
        clock: Seconds that only ever grow.

    Raises:
        CollateralError: A path holds something else.
        OSError: It cannot be read.

    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]] = (),
        *,
        fetch: Fetch | None = None,
        roots: Sequence[bytes] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(Path(path) for path in paths)
        self._fetch = fetch
        self._roots = tuple(roots)
        self._clock = clock
        self._given: dict[Family, Endorsements] = {}
        self._crls: dict[bytes, Endorsements] = {}
        self._only: dict[str, Endorsements] = {}
        self._fetched: dict[Family, _Fetched] = {}
        self._running: dict[Family, asyncio.Task[Endorsements]] = {}
        self._failed: dict[Family, tuple[float, CollateralError]] = {}
        self._seen: Any = None
        self._looked = -_LOOK
        self.baselines: dict[str, tuple[tuple[int, str], ...]] = {}
        self._look(first=True)

    @property
    def fetches(self) -> bool:
        """Whether what is missing is fetched."""
        return self._fetch is not None

    # ---- files -------------------------------------------------------------------------------

    def _places(self) -> list[Path]:
        found: list[Path] = []
        for path in self._paths:
            if not path.is_dir():
                found.append(path)
                continue
            entries = sorted(path.iterdir())[:_MAX_FOLDERS]
            if any(entry.name in ("tcb-info.json", "crl.der") for entry in entries):
                found.append(path)
            found += [e for e in entries if e.is_dir() or e.suffix == ".bundle"]
        return found

    def _state(self, places: Sequence[Path]) -> tuple[Any, ...]:
        state: list[Any] = []
        for place in places:
            files = sorted(place.iterdir()) if place.is_dir() else [place]
            for file in files:
                found = file.stat()
                state.append((str(file), found.st_mtime_ns, found.st_size))
        return tuple(state)

    def _look(self, *, first: bool = False) -> None:
        self._looked = self._clock()
        if not self._paths:
            return
        try:
            places = self._places()
            state = self._state(places)
            if state == self._seen:
                return
            self._read(places)
            self._seen = state
        except (OSError, EnclaveError):
            # Half of an update: what was read before stays until it is whole.
            if first:
                raise

    def _read(self, places: Sequence[Path]) -> None:
        given: dict[Family, Endorsements] = {}
        crls: dict[bytes, Endorsements] = {}
        baselines: dict[str, set[tuple[int, str]]] = {}
        for place in places:
            files = Endorsements.from_path(place)
            info = files.get("tcb-info.json")
            crl = files.get("crl.der")
            if info is not None:
                family, number, issued = _tcb_info(info, str(place))
                given[family] = files
                baselines.setdefault(family[0], set()).add((number, issued))
            elif crl is not None:
                crls[Crl.from_bytes(crl).issuer] = Endorsements.of({"crl.der": crl})
        self._given, self._crls = given, crls
        self.baselines = {tee: tuple(sorted(found)) for tee, found in baselines.items()}
        by_tee: dict[str, list[Endorsements]] = {}
        for (tee, _), found in given.items():
            by_tee.setdefault(tee, []).append(found)
        self._only = {tee: found[0] for tee, found in by_tee.items() if len(found) == 1}

    # ---- what a request needs ----------------------------------------------------------------

    async def of(self, prepared: Prepared, at: datetime) -> Endorsements:
        """
        Return what judging *prepared* needs beside what came with it.

        Raises:
            CollateralError: It is not to be had.
            EvidenceFormatError: The evidence cannot be read.

        """
        now = self._clock()
        if now - self._looked >= _LOOK:
            self._look()
        kind = prepared.kind
        if kind == "pyenclave":
            return await self._machine(prepared, at)
        if kind in ("sev-snp-report", "azure-hcl-snp"):
            return self._amd(prepared)
        if kind not in ("sgx-quote", "tdx-quote", "azure-hcl-tdx"):
            return _EMPTY
        if self._fetch is None:
            # With one family given, whether it is the quote's is a check of verification.
            only = self._only.get("sgx" if kind == "sgx-quote" else "tdx")
            if only is not None:
                return only
        quote = _quote_of(prepared)
        family = family_of(quote)
        found = self._given.get(family)
        if found is not None:
            return found
        if self._fetch is None:
            raise CollateralError(
                f"the service has no collateral of this platform family ({family[1]})",
                expected=", ".join(sorted({fmspc for _, fmspc in self._given})) or "some",
                found=family[1],
                advice="Whoever runs the service gives it: --collateral.",
            )
        return await self._network(family, quote, prepared, now, at)

    async def _machine(self, prepared: Prepared, at: datetime) -> Endorsements:
        """Return what judging the machine below a platform needs; fresh files go before its own."""
        data = Evidence.from_bytes(prepared.data).machine
        if data is None:
            return _EMPTY
        machine = MachineEvidence.from_bytes(data)
        kind = kind_of(machine.evidence)
        if kind not in _MACHINES:
            return _EMPTY  # verification says what is wrong with it
        inner = replace(prepared, kind=kind, data=machine.evidence, files=machine.files)
        try:
            return await self.of(inner, at)
        except CollateralError:
            return _EMPTY  # what came along may do; that it holds is a check of verification

    def _amd(self, prepared: Prepared) -> Endorsements:
        ark = prepared.files.get("ark.pem")
        if ark is None or not self._crls:
            return _EMPTY
        issuer = Certificate.from_pem_chain(ark, limit=1)[0].subject
        return self._crls.get(issuer, _EMPTY)

    async def _network(
        self, family: Family, quote: bytes, prepared: Prepared, now: float, at: datetime
    ) -> Endorsements:
        kept = self._fetched.get(family)
        if kept is not None and now - kept.at < _FRESH:
            return kept.endorsements
        task = self._running.get(family)
        if task is None:
            failed = self._failed.get(family)
            if failed is not None and now - failed[0] < _RETRY:
                if kept is not None:
                    return kept.endorsements
                raise failed[1]
            self._demand_genuine(quote, at)
            task = asyncio.create_task(self._get(family, quote, prepared.files))
            self._running[family] = task
            task.add_done_callback(lambda done: self._ended(family, done))
        if kept is not None and now - kept.at < _STALE:
            return kept.endorsements
        # Shielded: one client that leaves must not take it from the others that wait.
        return await asyncio.shield(task)

    def _demand_genuine(self, quote: bytes, at: datetime) -> None:
        result = appraise(quote, policy=_WITHOUT, freshness="not_checked", roots=self._roots, at=at)
        if not result.genuine:
            raise CollateralError(
                "the quote is not genuine, so nothing is fetched for it",
                found=", ".join(result.refused_by),
            )

    async def _get(self, family: Family, quote: bytes, files: Mapping[str, bytes]) -> Endorsements:
        del family
        if self._fetch is None:
            raise CollateralError("nothing is fetched here")
        return Endorsements.of(await self._fetch(quote, files))

    def _ended(self, family: Family, task: asyncio.Task[Endorsements]) -> None:
        self._running.pop(family, None)
        if task.cancelled():
            return
        error = task.exception()
        table: dict[Family, Any] = self._fetched if error is None else self._failed
        if family not in table and len(table) >= _MAX_FAMILIES:
            table.pop(next(iter(table)))
        if error is None:
            self._fetched[family] = _Fetched(task.result(), self._clock())
            self._failed.pop(family, None)
        else:
            told = (
                error
                if isinstance(error, CollateralError)
                else CollateralError("the collateral cannot be fetched")
            )
            self._failed[family] = (self._clock(), told)

    async def close(self) -> None:
        """End what is being fetched."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tcb_info(data: bytes, what: str) -> tuple[Family, int, str]:
    value = jsonstrict.object_of(data, what, error=CollateralError)
    info = value.get("tcbInfo")
    if not isinstance(info, dict):
        raise CollateralError(f"{what}: no TCB info", expected="tcbInfo")
    tee, fmspc = str(info.get("id", "SGX")).lower(), str(info.get("fmspc", "")).lower()
    number, issued = info.get("tcbEvaluationDataNumber"), info.get("issueDate")
    if tee not in ("sgx", "tdx") or len(fmspc) != 12 or type(number) is not int:
        raise CollateralError(f"{what}: no TCB info", expected="id, fmspc, evaluation number")
    return (tee, fmspc), number, str(issued)[:40]


def from_pccs(address: str, cache: str | os.PathLike[str] | None) -> Fetch:
    """
    Return what fetches from Intel's service or a caching one at *address*, through a cache.

    Args:
        address: ``https://…``; ``intel`` for Intel's own.
        cache: Folder of the cache; None keeps nothing on disk.
    """
    from pyenclave.collateral.cache import Cache
    from pyenclave.collateral.fetcher import Fetcher
    from pyenclave.collateral.pcs import IntelSource
    from pyenclave.collateral.plan import Sources, fetch

    intel = IntelSource() if address == "intel" else IntelSource(base=address, caching=True)
    sources = Sources(intel=intel)
    fetcher = Fetcher(cache=None if cache is None else Cache(cache))

    async def get(quote: bytes, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        found = await fetch(quote, beside=dict(files), sources=sources, fetcher=fetcher)
        return {name: data for name, data in found.files.items() if name not in files}

    return get
