"""The functions of `pyenclave.trusted`; each works inside an enclave only, but for the marks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from pyenclave.errors import RollbackError
from pyenclave.sealed.policy import SealPolicy
from pyenclave.trusted import _life
from pyenclave.trusted._lookup import annotated_names
from pyenclave.trusted._state import EnclaveIdentity, current

if TYPE_CHECKING:
    from pyenclave.formats.sealed import SealedHeader
    from pyenclave.formats.sgx import ReportBody
    from pyenclave.sealed.counter import Reading

__all__ = [
    "Counter",
    "EnclaveIdentity",
    "PublicError",
    "SealPolicy",
    "attest",
    "ecall",
    "identity",
    "receive",
    "report",
    "seal",
    "set_user_data",
    "target_info",
    "unseal",
    "verify_report",
]

Buffer = bytes | bytearray | memoryview
F = TypeVar("F", bound=Callable[..., Any])
_NONE = object()


class PublicError(Exception):
    """
    An error whose text may leave the enclave. Of all others only the type's name crosses.

    A subclass declares fields by annotations; they are given by keyword and cross as well, as plain
    values: at the host they are ``EcallError.fields``. Text and fields are cut at 4096 bytes each:
    longer text ends there, longer fields do not cross.

        class QuotaError(trusted.PublicError):
            limit: int
            unit: str = "calls"

        raise QuotaError("that is enough for today", limit=5)

    Args:
        args: The text, as for any exception.
        fields: Values of the declared fields.

    Raises:
        TypeError: A field is not declared, or one without a default is missing.

    """

    public = True

    def __init__(self, *args: object, **fields: Any) -> None:
        super().__init__(*args)
        declared = self._declared()
        unknown = [name for name in fields if name not in declared]
        missing = [name for name in declared if name not in fields and not hasattr(self, name)]
        if unknown or missing:
            what = f"has no field {unknown[0]}" if unknown else f"needs its field {missing[0]}"
            raise TypeError(f"{type(self).__name__} {what}")
        self.__dict__.update(fields)

    @classmethod
    def _declared(cls) -> list[str]:
        found: dict[str, None] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, PublicError):
                found.update(dict.fromkeys(annotated_names(base)))
        return [name for name in found if name[0] != "_"]

    def public_fields(self) -> dict[str, Any]:
        """Return the declared fields and their values, which cross with the text."""
        return {name: getattr(self, name) for name in self._declared()}


@overload
def ecall(function: F, /) -> F: ...


@overload
def ecall(*, private: bool = ...) -> Callable[[F], F]: ...


def ecall(function: Any = _NONE, /, *, private: bool = False) -> Any:
    """
    Mark *function* as callable from outside the enclave.

    It stays an ordinary function: in the host and in unit tests it simply runs.

    Args:
        function: A plain function. One annotated ``-> Iterator[T]`` gives its items one by one.
        private: Callable only from the handler of an ocall that allows it.

    Raises:
        TypeError: *function* is not a plain function.

    """
    if function is _NONE:
        return lambda inner: _mark(inner, private=bool(private))
    return _mark(function, private=bool(private))


def _mark(function: Any, *, private: bool) -> Any:
    if not isinstance(function, FunctionType):
        raise TypeError(f"ecall marks functions, not {type(function).__name__}")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"ecall: {function.__qualname__} is async; trusted functions are plain ones, and the "
            "host may await them"
        )
    if _life.START in function.__dict__ or _life.STOP in function.__dict__:
        raise TypeError(f"ecall: {function.__qualname__} runs at start or stop; make two of it")
    if "__pyenclave_ocall__" in function.__dict__:
        raise TypeError(f"ecall: {function.__qualname__} is a function of the host; make two of it")
    function.__dict__["__pyenclave_ecall__"] = True
    if private:
        function.__dict__["__pyenclave_private__"] = True
    return function


def identity() -> EnclaveIdentity:
    """Return what this enclave is."""
    return current().identity


def _optional(data: Buffer | None) -> bytes | None:
    return None if data is None else bytes(data)


class Counter:
    """
    A monotonic counter that the platform keeps for this enclave's signer and product.

    Args:
        counter_id: The 16 bytes of an existing counter.

    """

    def __init__(self, counter_id: bytes) -> None:
        if len(counter_id) != 16:
            raise ValueError(f"a counter's identity has 16 bytes, not {len(counter_id)}")
        self.counter_id = bytes(counter_id)

    @classmethod
    def create(cls) -> Self:
        """Create a counter; it starts at the platform's first value."""
        return cls(current().counter("create").counter_id)

    @property
    def id(self) -> bytes:
        """The same 16 bytes, as sealed files ask for them (`pyenclave.sealed.counter.Counter`)."""
        return self.counter_id

    def read(self) -> int:
        """Return the value."""
        return current().counter("read", self.counter_id).value

    def reading(self) -> Reading:
        """Return the value, and the mark of what was committed with it."""
        from pyenclave.sealed.counter import Reading

        now = current().counter("read", self.counter_id)
        return Reading(now.value, now.mark)

    def advance(self, to: int, mark: bytes = b"") -> None:
        """
        Make *to* the value, durably, as a sealed file does that is bound to this counter.

        Args:
            to: The new value, or the one that it has already.
            mark: Names the state that becomes the newest one; 32 bytes.

        Raises:
            RollbackError: The value is more than *to*, or another state was committed with it.
            SealLimitError: *to* is too far away.

        """
        from pyenclave.sealed.counter import check_step

        while True:
            now = self.reading()
            if not check_step(now, to, mark):
                return
            last = now.value + 1 == to
            try:
                current().counter("increment", self.counter_id, now.value, mark if last else b"")
            except RollbackError:
                # Another enclave of this signer was faster; who is right the values say.
                if self.reading().value == now.value:
                    raise

    def increment(self, *, expected: int | None = None, blob: Buffer | None = None) -> int:
        """
        Add one, durably, and return the new value.

        Args:
            expected: Refuse unless this is the value before.
            blob: What ``seal(…, counter=…, advance=False)`` returned: it becomes the newest blob,
                for good and alone. It is not authenticated here; one that comes from outside is
                given to `unseal` instead, which does both. Without it **no** blob is the newest
                one afterwards: all that were sealed under the counter until now are refused.

        Raises:
            RollbackError: The value is not the expected one; *blob* is bound to another counter or
                value, or another blob was made the newest one in its place.
            UnsealError: *blob* is no sealed blob.

        """
        mark = b""
        if blob is not None:
            from pyenclave.formats import sealed

            header, _ = sealed.split(bytes(blob))
            _check_bound(header, self)
            before = header.counter_value - 1
            if expected not in (None, before):
                raise RollbackError(
                    "the blob was sealed for another value of its counter",
                    expected=expected,
                    found=before,
                )
            expected, mark = before, header.commitment
        return current().counter("increment", self.counter_id, expected, mark).value

    def destroy(self) -> None:
        """Destroy the counter; what was sealed under it never opens again."""
        current().counter("destroy", self.counter_id)

    def __repr__(self) -> str:
        return f"Counter({self.counter_id.hex()})"


def seal(
    data: Buffer,
    *,
    policy: SealPolicy | None = None,
    aad: Buffer | None = None,
    min_version: int | None = None,
    counter: Counter | None = None,
    advance: bool = True,
) -> bytes:
    """
    Seal *data* so that only the right enclaves of this platform open it.

    Args:
        data: The plaintext.
        policy: Who may open. Default: the image's ``[seal]`` policy, which is the signer's
            unless it says otherwise; for an unsigned image only the same measurement.
        aad: Additional data, authenticated and not stored; `unseal` needs the same.
        min_version: Lowest security version that may open; default the own one.
        counter: Make this blob the newest one under a counter; older ones are refused then.
        advance: Move the counter at once. With False the blob is *pending*: store it durably
            first, then call ``counter.increment(blob=…)``, and a crash between the two loses
            nothing, because `unseal` of a pending blob makes it the newest one too. Of several
            blobs that are pending at once only the first that is committed ever opens.

    Raises:
        NotInEnclaveError: Outside an enclave.
        SealingError: The policy needs a signed image, or the platform refuses.

    """
    from pyenclave.sealed import blob

    runtime = current()
    binding, before = None, 0
    if counter is not None:
        before = counter.read()
        binding = blob.CounterBinding(counter_id=counter.counter_id, value=before + 1)
    sealed = blob.seal(
        data,
        identity=runtime.sealing,
        policy=runtime.default_policy if policy is None else policy,
        key_provider=runtime.derive_key,
        secret=runtime.secret,
        aad=_optional(aad),
        min_version=min_version,
        counter=binding,
    )
    if counter is not None and advance:
        counter.increment(blob=sealed)
    return sealed


def unseal(
    blob: Buffer,
    *,
    aad: Buffer | None = None,
    counter: Counter | None = None,
    min_version: int = 0,
) -> bytes:
    """
    Open what `seal` returned.

    A blob that is bound to a counter is always compared with it; *counter* says that it must be
    bound, and to which one. Opening a pending blob (``advance=False``) commits it: it becomes the
    newest one, and older blobs and others that are pending for the same value are refused then.

    Args:
        blob: The sealed blob.
        aad: Exactly what was given to `seal`.
        counter: The counter that must date the blob.
        min_version: Blobs of lower security versions are refused.

    Raises:
        NotInEnclaveError: Outside an enclave.
        UnsealError: Not authentic, or for another identity or version.
        RollbackError: Not the newest blob of its counter, or not bound to *counter*.

    """
    from pyenclave.sealed.blob import open_blob

    runtime = current()
    opened = open_blob(
        blob,
        identity=runtime.sealing,
        key_provider=runtime.derive_key,
        aad=_optional(aad),
        min_version=min_version,
    )
    header = opened.header
    if counter is not None:
        _check_bound(header, counter)
    if header.counter_id is not None:
        _check_newest(header.counter_id, header.counter_value, header.commitment)
    return opened.data


def _check_bound(header: SealedHeader, counter: Counter) -> None:
    bound = header.counter_id
    if bound != counter.counter_id:
        raise RollbackError(
            "the blob is not bound to this counter",
            expected=counter.counter_id.hex(),
            found=bound.hex() if bound else "no counter",
        )


def _check_newest(counter_id: bytes, value: int, mark: bytes) -> None:
    """Refuse an authentic blob unless it is the newest one; commit it if it is pending."""
    now = current().counter("read", counter_id)
    if value == now.value + 1:
        # The writer stopped between storing the blob and incrementing. The platform lets one blob
        # have the value: if another thread was faster with another blob, this is refused.
        current().counter("increment", counter_id, now.value, mark)
    elif value != now.value:
        raise RollbackError(
            "the blob is not the newest one of its counter", expected=now.value, found=value
        )
    elif mark != now.mark:
        raise RollbackError(
            "the blob is not the newest one of its counter: another one took its place",
            expected=now.mark.hex() or "none",
            found=mark.hex(),
        )


def target_info() -> bytes:
    """Return the 512-byte TARGETINFO that lets other enclaves make reports for this one."""
    return current().target_info


def report(target_info: Buffer, data: Buffer = b"") -> bytes:
    """
    Return a 432-byte REPORT that the enclave named by *target_info* can verify.

    Args:
        target_info: What `target_info` returned inside that enclave, on the same platform.
        data: Up to 64 bytes; padded with zeros.

    """
    return current().report(bytes(target_info), bytes(data))


def verify_report(report: Buffer) -> ReportBody:
    """
    Check a REPORT that another enclave of this platform made for this one.

    Returns:
        The report's body: identity and data of the other enclave. Judging it is the caller's.

    Raises:
        EnclaveError: The MAC does not hold: changed, or made for another enclave or platform.

    """
    return current().verify_report(bytes(report))


def attest(report_data: Buffer) -> bytes:
    """
    Return raw evidence over 64 bytes of report data that this code chooses.

    Most code wants the host's ``enclave.attest(nonce=…)`` instead, which binds nonce, runtime key
    and user data. A relying party cannot encrypt to raw evidence.
    """
    return current().attest_raw(bytes(report_data))


def set_user_data(data: Buffer) -> None:
    """Bind *data* (at most 16 KiB, public) into all bound evidence from now on."""
    current().set_user_data(bytes(data))


def receive(ciphertext: Buffer, *, info: Buffer = b"") -> bytes:
    """
    Open a secret that a relying party encrypted with ``result.encrypt(secret, info=…)``.

    Raises:
        UnsealError: Not encrypted to this launch of this enclave, or with another *info*.

    """
    return current().receive(bytes(ciphertext), bytes(info))
