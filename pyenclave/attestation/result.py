"""Attestation results: what was checked, how it came out, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, NoReturn

from pyenclave.errors import AppraisalError
from pyenclave.formats.evidence import provision_info

__all__ = ["IDENTITIES", "AttestationResult", "Check", "Claims"]

Outcome = Literal["passed", "failed", "skipped"]
Part = Literal["evidence", "policy"]

# Checks ``code.X`` whose passing says which code runs. Product and version numbers alone do not,
# nor does a run-time register without the measurement that it starts from. Evidence inside
# evidence has a prefix before ``code``.
IDENTITIES: Final = frozenset(
    {
        "author_key_digest",
        "container_image",
        "gpu_measurements",
        "id_key_digest",
        "launch_digest",
        "mrenclave",
        "mrsigner",
        "mrtd",
        "pcrs",
        "rim",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """
    One check of an appraisal.

    Attributes:
        name: Stable name, ``group.what``.
        outcome: ``skipped`` means that the check was not asked for, or could not be reached.
        expected: What was wanted, for people.
        found: What there was.
        advice: What to do about it.
        part: ``evidence`` (is it genuine?) or ``policy`` (is it what I want?).
        asked: False for a check that was not asked for; one that failed or could not be reached
            refuses the evidence.
    """

    name: str
    outcome: Outcome
    expected: str | None = None
    found: str | None = None
    advice: str | None = None
    part: Part = "evidence"
    asked: bool = True

    @property
    def holds(self) -> bool:
        """Whether the check does not stand in the way: passed, or not asked for."""
        return self.outcome == "passed" or (self.outcome == "skipped" and not self.asked)

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        names = ("name", "outcome", "expected", "found", "advice")
        return {name: getattr(self, name) for name in names}


class Claims(Mapping[str, Any]):
    """
    What evidence says, put together when it is first looked at.

    Most relying parties look at the verdict only, and telling the claims of known evidence takes
    as long as half of its checks.

    Args:
        tell: Gives the claims; it runs once, and afterwards nothing of the evidence is kept.
    """

    __slots__ = ("_tell", "_told")

    def __init__(self, tell: Callable[[], Mapping[str, Any]]) -> None:
        self._tell: Callable[[], Mapping[str, Any]] | None = tell
        self._told: dict[str, Any] = {}

    def _all(self) -> dict[str, Any]:
        tell = self._tell
        if tell is not None:
            self._told = dict(tell())
            self._tell = None
        return self._told

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def told(self) -> dict[str, Any]:
        """Return a dict of all; sooner than dict() does, which asks for each by its name."""
        return dict(self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._all(),)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationResult:
    """
    The outcome of an appraisal. Its verdicts follow from its checks; without checks it refuses.

    Attributes:
        kind: Kind of evidence; ours is ``pyenclave``.
        checks: Every check, in order.
        claims: What the evidence says. It means something only if `genuine`.
        at: The time at which validity was judged.
    """

    kind: str
    checks: tuple[Check, ...]
    claims: Mapping[str, Any]
    at: datetime
    _runtime_key: bytes | None = field(default=None, repr=False)
    _report_body: bytes | None = field(default=None, repr=False)

    def _named_code(self) -> list[tuple[Check, str]]:
        """Return the checks of code with what they compare: ``snp.code.launch_digest``."""
        split = ((check, *f".{check.name}".rpartition(".code.")) for check in self.checks)
        return [(check, what) for check, _, code, what in split if code]

    @property
    def genuine(self) -> bool:
        """Every signature holds up to a pinned root and nothing contradicts it."""
        found = False
        for check in self.checks:
            if check.part == "evidence":
                found = True
                if check.outcome != "passed" and not check.holds:
                    return False
        return found

    @property
    def accepted(self) -> bool:
        """Genuine, and the policy holds."""
        found = False
        # `holds` in place: there are some forty checks, and this is asked of every result.
        for check in self.checks:
            if check.outcome != "passed" and (check.outcome != "skipped" or check.asked):
                return False
            if not found and check.part == "evidence":
                found = True
        return found

    @property
    def identified(self) -> bool:
        """Genuine, and a measurement or signer was demanded and matched."""
        code = self._named_code()
        return (
            self.genuine
            and all(check.holds for check, _ in code)
            and any(
                check.outcome == "passed"
                and what in IDENTITIES
                and not check.name.startswith("machine.")  # below the enclave: not its identity
                for check, what in code
            )
        )

    @property
    def fresh(self) -> bool:
        """Genuine, and made for the nonce that was given."""
        return self.genuine and any(
            check.name == "nonce" and check.outcome == "passed" for check in self.checks
        )

    @property
    def refused_by(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.outcome == "failed")

    def __bool__(self) -> NoReturn:
        raise TypeError("an attestation result is not a yes or no: ask for .accepted or .genuine")

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values, as ``pyenclave verify --json`` prints it."""
        return {
            "kind": self.kind,
            "genuine": self.genuine,
            "accepted": self.accepted,
            "identified": self.identified,
            "fresh": self.fresh,
            "checks": [check.to_json() for check in self.checks],
            "claims": dict(self.claims),
        }

    def encrypt(
        self,
        secret: bytes | bytearray | memoryview,
        *,
        info: bytes = b"",
        dangerous_allow_unidentified: bool = False,
        dangerous_allow_stale: bool = False,
    ) -> bytes:
        """
        Encrypt *secret* so that only the attested launch of this enclave can open it.

        Evidence of kind ``pyenclave`` only. HPKE with ML-KEM-768 + X25519 to the runtime key; the
        enclave's whole identity is bound. Inside, ``trusted.receive(ciphertext, info=…)`` opens
        it. The message carries no counter: an enclave that must not take it twice says so in
        *info*.

        Args:
            secret: What to send.
            info: Bound; the enclave must name the same bytes.
            dangerous_allow_unidentified: Send although no code identity was demanded.
            dangerous_allow_stale: Send although the evidence is not shown to be fresh.

        Raises:
            AppraisalError: The evidence is not accepted, not identified or not fresh, or binds no
                runtime key.
            TypeError: The secret is not bytes.
            ValueError: The runtime key is no usable key.

        """
        from pyenclave.sealed.provision import encrypt

        if not isinstance(secret, bytes | bytearray | memoryview):
            raise TypeError(f"a secret is bytes, not {type(secret).__name__}")
        for holds, what, advice in (
            (self.accepted, "accepted", None),
            (
                self.identified or dangerous_allow_unidentified,
                "identified",
                "Name the code in the policy: from_image(…), mrenclave= or mrsigner=.",
            ),
            (
                self.fresh or dangerous_allow_stale,
                "fresh",
                "Verify it with the nonce that you sent.",
            ),
        ):
            if not holds:
                raise AppraisalError(
                    f"no secret is sent: the evidence is not {what}",
                    result=self,
                    advice=advice,
                )
        if self.kind != "pyenclave":
            raise AppraisalError(
                f"no secret is sent: evidence of kind {self.kind} binds no runtime key",
                result=self,
                advice="Bind a key of your own into the report data, or use a pyenclave enclave.",
            )
        if self._runtime_key is None or self._report_body is None:
            raise AppraisalError(
                "no secret is sent: the evidence binds no runtime key",
                result=self,
                advice="Raw evidence has none; use the host's enclave.attest(nonce=…).",
            )
        context = provision_info(
            report_body=self._report_body, runtime_key=self._runtime_key, info=info
        )
        return encrypt(bytes(secret), public_key=self._runtime_key, info=context)
