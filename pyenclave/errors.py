"""The tree of errors.

Each class has a stable ``code``, listed with cause and cure in ``docs/errors.md``. An error that
comes from a check carries what was checked, what was expected and what was found. Impossible
arguments (a wrong type, a negative size) are the builtin ``TypeError`` and ``ValueError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pyenclave.attestation.result import AttestationResult

__all__ = [
    "AppraisalError",
    "ArgumentError",
    "AttestationError",
    "AuditError",
    "BindingError",
    "BusyError",
    "CallError",
    "CallTimeoutError",
    "CollateralError",
    "ConfigurationError",
    "EcallError",
    "EnclaveClosedError",
    "EnclaveError",
    "EnclaveLostError",
    "EnclavePoisonedError",
    "EnclaveStateError",
    "EvidenceFormatError",
    "FileBusyError",
    "ImageError",
    "KeyReleaseError",
    "LaunchError",
    "LaunchRefusedError",
    "ManifestError",
    "MeasurementError",
    "NotInEnclaveError",
    "OcallError",
    "PlatformUnavailableError",
    "ProtectionError",
    "ProviderError",
    "RemoteServiceError",
    "ReportRaceError",
    "RollbackError",
    "RuntimeLockError",
    "SealLimitError",
    "SealingError",
    "ServiceError",
    "SignatureError",
    "StorageError",
    "TpmError",
    "UnknownFunctionError",
    "UnsealError",
    "by_code",
    "not_built",
]


class EnclaveError(Exception):
    """
    Base of every error of this package.

    Args:
        message: One sentence for people; it names the check that failed.
        expected: What the check wanted, when there is such a value.
        found: What it found instead.
        advice: What to do about it.

    """

    code: ClassVar[str] = "enclave"

    def __init__(
        self,
        message: str = "",
        *,
        expected: object = None,
        found: object = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.found = found
        self.advice = advice

    def __str__(self) -> str:
        parts = [self.message or self.code]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        text = "; ".join(parts)
        return f"{text}. {self.advice}" if self.advice else text


class ImageError(EnclaveError):
    """An image, or what it is built from, is not usable."""

    code = "image"


class ManifestError(ImageError):
    """``enclave.toml`` is wrong: the message names the table, the key and the value."""

    code = "image.manifest"


class ConfigurationError(ManifestError):
    """Settings of a service are wrong: the message names the table, the key and the value."""

    code = "configuration"


class SignatureError(ImageError):
    """The signature of an image does not hold, or is missing where one is needed."""

    code = "image.signature"


class RuntimeLockError(ImageError):
    """
    The runtime differs from the image's lock list.

    Attributes:
        files: One line a file that is missing, changed or not listed.

    """

    code = "image.runtime_lock"

    def __init__(self, message: str = "", *, files: tuple[str, ...] = (), **details: Any) -> None:
        super().__init__(message, **details)
        self.files = tuple(files)

    def shown(self) -> tuple[str, ...]:
        """Return the lines that the message has below it: the first of *files*."""
        more = (f"… and {len(self.files) - 20} more",) if len(self.files) > 20 else ()
        return self.files[:20] + more

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *self.shown()])


class LaunchError(EnclaveError):
    """
    An enclave could not be started.

    Attributes:
        type: Name of the class of the exception that a ``trusted.on_start`` function raised;
            empty if it was something else.

    """

    code = "launch"

    def __init__(
        self,
        message: str = "",
        *,
        type: str = "",  # noqa: A002 - as EcallError has it
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.type = type


class LaunchRefusedError(LaunchError):
    """The platform's LaunchPolicy refuses the image, or a demanded protection is not there."""

    code = "launch.refused"


class PlatformUnavailableError(LaunchError):
    """The platform process cannot be reached or started."""

    code = "launch.platform"


class ProtectionError(EnclaveError):
    """This machine gives no protection key, or a library cannot be put behind one."""

    code = "protection"


class EnclaveStateError(EnclaveError):
    """The handle or object is not in a state that allows this."""

    code = "state"


class EnclaveClosedError(EnclaveStateError):
    """The enclave was closed, or not yet started."""

    code = "state.closed"


class EnclaveLostError(EnclaveStateError):
    """
    The worker ended. Sealed data brings the work back.

    Attributes:
        started: Whether the lost call may have begun inside (``None``: no call was under way).

    """

    code = "state.lost"

    def __init__(self, message: str = "", *, started: bool | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.started = started


class EnclavePoisonedError(EnclaveStateError):
    """The enclave destroyed itself after a protocol or integrity failure; the reason is named."""

    code = "state.poisoned"


class NotInEnclaveError(EnclaveStateError):
    """The function works only inside an enclave."""

    code = "state.not_in_enclave"


class CallError(EnclaveError):
    """A call did not give a result; the enclave lives on."""

    code = "call"


class UnknownFunctionError(CallError):
    """The enclave has no such function."""

    code = "call.unknown_function"


class ArgumentError(CallError):
    """An argument does not fit the function's signature, or a limit."""

    code = "call.argument"


class EcallError(CallError):
    """
    The trusted function raised.

    Attributes:
        type: Name of the exception's class inside.
        id: Correlation id, found in the logs of a debug enclave.
        public: Whether it is a ``trusted.PublicError``, whose text was meant for the host.
        fields: The declared fields of a public error, as plain values.

    """

    code = "call.ecall"

    def __init__(
        self,
        message: str = "",
        *,
        type: str = "",  # noqa: A002 - the contract's name
        id: str = "",  # noqa: A002
        public: bool = False,
        fields: dict[str, Any] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.type = type
        self.id = id
        self.public = public
        self.fields = {} if fields is None else fields


class OcallError(CallError):
    """
    A host function that the enclave called failed, or its answer was refused.

    Raised inside; if the trusted function lets it pass, the host gets it too, with what the handler
    raised as its cause.

    Attributes:
        type: Name of the class that the handler raised, as the host says it; may be empty.
        id: Correlation id under which a debug enclave's log has the traceback.
        from_host: Whether it was raised for an answer of the host, and not by trusted code itself.

    """

    code = "call.ocall"

    def __init__(
        self,
        message: str = "",
        *,
        type: str = "",  # noqa: A002 - the contract's name
        id: str = "",  # noqa: A002
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.type = type
        self.id = id
        self.from_host = False


class BusyError(CallError):
    """The handle's queue of calls is full."""

    code = "call.busy"


class CallTimeoutError(CallError, TimeoutError):
    """The deadline passed; the lane stays busy until the call returns."""

    code = "call.timeout"


class SealingError(EnclaveError):
    """Sealing or unsealing failed."""

    code = "sealing"


class UnsealError(SealingError):
    """The blob or page is not authentic for this key, identity or version."""

    code = "sealing.unseal"


class RollbackError(SealingError):
    """Older data than the trusted counter allows."""

    code = "sealing.rollback"


class SealLimitError(SealingError):
    """A key has sealed as much as it may, or a heap is full."""

    code = "sealing.limit"


class FileBusyError(SealingError):
    """Another opening holds the sealed file: it has many readers or one writer."""

    code = "sealing.busy"


class MeasurementError(EnclaveError):
    """A file cannot be measured."""

    code = "measurement"


class AttestationError(EnclaveError):
    """Base of what goes wrong with evidence."""

    code = "attestation"


class EvidenceFormatError(AttestationError):
    """The bytes are not evidence of a known kind, or are malformed."""

    code = "attestation.format"


class AppraisalError(AttestationError):
    """
    The evidence was refused.

    Attributes:
        result: The whole result, check by check.

    """

    code = "attestation.appraisal"

    def __init__(
        self, message: str = "", *, result: AttestationResult | None = None, **details: Any
    ) -> None:
        super().__init__(message, **details)
        self.result = result


class CollateralError(AttestationError):
    """Collateral is missing, expired or not authentic."""

    code = "attestation.collateral"


class StorageError(EnclaveError):
    """A database or secrets file of a service cannot be opened, or is of a newer schema."""

    code = "storage"


class AuditError(StorageError):
    """What is given is no audit log, no part of one, or of another log."""

    code = "storage.audit"


class ProviderError(AttestationError):
    """This machine gives no evidence: the device is not there, refuses, or answers wrongly."""

    code = "attestation.provider"


class BindingError(ProviderError):
    """
    What a device gave binds other data than was asked for: an old report, or another's.

    Attributes:
        evidence: What it gave (`providers.Evidence`), for whoever wants to look at it.

    """

    code = "attestation.binding"

    def __init__(self, message: str = "", *, evidence: Any = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.evidence = evidence


class ReportRaceError(ProviderError):
    """Somebody else wrote into our request each time; what came back may answer theirs."""

    code = "attestation.race"


class TpmError(EnclaveError):
    """
    A TPM refuses a command, answers wrongly, or not at all.

    Attributes:
        rc: Its response code, without the number of the handle or parameter; 0 if it gave none.

    """

    code = "tpm"

    def __init__(self, message: str = "", *, rc: int = 0, **details: Any) -> None:
        super().__init__(message, **details)
        self.rc = rc


class KeyReleaseError(EnclaveError):
    """
    A key was not released, or what was released is refused inside.

    Attributes:
        check: Name of the check that failed, such as ``answer.nonce``; see
            ``docs/key-release-inside.md``.
        status: The HTTP status where a service refused; 0 otherwise.
        error_code: The service's word, such as ``Forbidden``; empty where none was said.
        inner: Its inner word, such as ``ForbiddenByPolicy``.
        reference: Under which the service's audit log has the decision.
        transient: Whether the same may succeed later.

    What a service says came through the host, who may have said it instead. Text and attributes
    cross to the host like those of a `trusted.PublicError`: there is nothing of a key in them.
    """

    code = "key_release"
    public: ClassVar[bool] = True

    def __init__(
        self,
        message: str = "",
        *,
        check: str = "",
        status: int = 0,
        error_code: str = "",
        inner: str | None = None,
        reference: str | None = None,
        transient: bool = False,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.check = check
        self.status = status
        self.error_code = error_code
        self.inner = inner
        self.reference = reference
        self.transient = transient

    def public_fields(self) -> dict[str, Any]:
        """Return what crosses to the host beside the text."""
        return {
            "check": self.check,
            "status": self.status,
            "error_code": self.error_code,
            "inner": self.inner,
            "reference": self.reference,
            "transient": self.transient,
        }


class RemoteServiceError(EnclaveError):
    """
    A key vault or attestation service refused a request of a client, or gave no usable answer.

    Attributes:
        status: The HTTP status; 0 where there was no answer.
        error_code: The service's word, such as ``Forbidden``; ``NoAnswer``, ``BadAnswer`` and
            ``BadChallenge`` are the client's own.
        inner: Its inner word, such as ``ForbiddenByPolicy``.
        retry_after: Seconds after which to ask again, if it says so.
        reference: Under which the service's audit log has the decision.
        transient: Whether the same request may succeed later.

    """

    code = "remote_service"

    def __init__(
        self,
        message: str = "",
        *,
        status: int = 0,
        error_code: str = "",
        inner: str | None = None,
        retry_after: float | None = None,
        reference: str | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.status = status
        self.error_code = error_code
        self.inner = inner
        self.retry_after = retry_after
        self.reference = reference
        self.transient = status in (0, 408, 429, 500, 502, 503, 504)


class ServiceError(EnclaveError):
    """
    A service refuses a request, or cannot serve it.

    The message is sent to the caller; *expected* and *found* are not, they are for log and audit.

    Attributes:
        status: HTTP status of the answer.
        error_code: The stable word in the answer, as Azure has it ("BadParameter", "Forbidden").
        inner: A more exact word (`innererror.code`), if there is one.
        retry_after: Seconds after which to ask again.
        challenge: Value of the answer's ``WWW-Authenticate``.
        reference: Reference id of the audit row about it, once there is one.

    """

    code = "service"

    def __init__(
        self,
        message: str = "",
        *,
        status: int,
        error_code: str,
        inner: str | None = None,
        retry_after: float | None = None,
        challenge: str | None = None,
        **details: Any,
    ) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"an error's status is 400 to 599, not {status}")
        super().__init__(message, **details)
        self.status = status
        self.error_code = error_code
        self.inner = inner
        self.retry_after = retry_after
        self.challenge = challenge
        self.reference: str | None = None


def by_code() -> dict[str, type[EnclaveError]]:
    """Return every error class by its stable code."""
    found: dict[str, type[EnclaveError]] = {}
    pending: list[type[EnclaveError]] = [EnclaveError]
    while pending:
        cls = pending.pop()
        found[cls.code] = cls
        # Classes of other modules refine one of these for Python's sake and share its code.
        pending.extend(sub for sub in cls.__subclasses__() if sub.__module__ == __name__)
    return found


def not_built() -> str:
    """Say that the compiled core is not here, which a checkout is without; empty if it is."""
    from pathlib import Path

    here = Path(__file__).parent
    if any(here.glob("_core.*so")):
        return ""
    return (
        f"{here} is a checkout without its compiled core, and Python takes it before an installed "
        "pyenclave where it runs in that folder. Run in another one, or build the core: "
        "python setup.py build_ext --inplace"
    )
