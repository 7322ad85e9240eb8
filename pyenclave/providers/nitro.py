"""
Evidence of an AWS Nitro enclave, from its security module behind ``/dev/nsm``.

One ioctl carries a request and its answer, both CBOR (the project's notes on evidence providers,
1.8; aws-nitro-enclaves-nsm-api, ``src/driver``).
"""

from __future__ import annotations

import ctypes
import errno
import hmac
import os
import struct
from collections.abc import Callable
from typing import Any, Final

from pyenclave.errors import BindingError, EvidenceFormatError, ProviderError
from pyenclave.formats import cbor
from pyenclave.formats.nitro import NitroDocument
from pyenclave.providers.evidence import Evidence, malformed

__all__ = ["DEVICE", "NSM_IOCTL", "Ioctl", "describe_pcr", "evidence", "random", "request"]

DEVICE: Final = "/dev/nsm"
NSM_IOCTL: Final = 0xC0200A00  # _IOWR(0x0A, 0, struct nsm_message)
_MESSAGE: Final = struct.Struct("@QQQQ")  # address and length: of the request, of the answer
_MAX_REQUEST: Final = 0x1000
_MAX_RESPONSE: Final = 0x3000
_MAX_FIELD: Final = 1024
_NAME: Final = "Nitro security module"
_ERRORS: Final = {
    "InvalidArgument": "an argument is not allowed",
    "InvalidIndex": "there is no such PCR",
    "InvalidResponse": "it failed inside",
    "ReadOnlyIndex": "the PCR is locked",
    "InvalidOperation": "not possible now",
    "BufferTooSmall": "the answer is larger than the interface",
    "InputTooLarge": "the request is too large",
    "InternalError": "it failed inside",
}

Ioctl = Callable[[int, int, bytearray], Any]
"""As `fcntl.ioctl`: descriptor, number, and the message, which it may change."""


def request(message: object, *, device: str = DEVICE, ioctl: Ioctl | None = None) -> Any:
    """
    Send one request and return the answer, both as Python values.

    Args:
        message: A text, or a map with one member.
        device: The device.
        ioctl: Does the call, for tests; then *device* need not be there.

    Raises:
        ProviderError: No device, the module refuses, or the answer is malformed.
        ValueError: The request is too large.

    """
    data = cbor.dumps(message)
    if len(data) > _MAX_REQUEST:
        raise ValueError(f"a request has at most {_MAX_REQUEST} bytes, not {len(data)}")
    answer = _call(data, device, ioctl)
    try:
        value = cbor.loads(answer, f"answer of the {_NAME}", form="definite")
    except EvidenceFormatError as error:
        raise malformed(_NAME, error) from None
    if isinstance(value, dict) and value.keys() == {"Error"}:
        name = str(value["Error"])[:40]
        raise ProviderError(
            f"{_NAME}: {_ERRORS.get(name, 'it refuses')} ({name})",
            advice="Fields of an attestation document have at most 1,024 bytes."
            if name in ("InputTooLarge", "InvalidArgument")
            else None,
        )
    return value


def _call(data: bytes, device: str, ioctl: Ioctl | None) -> bytes:
    given = ctypes.create_string_buffer(data, len(data))
    taken = ctypes.create_string_buffer(_MAX_RESPONSE)
    message = bytearray(
        _MESSAGE.pack(ctypes.addressof(given), len(data), ctypes.addressof(taken), _MAX_RESPONSE)
    )
    fd = -1
    try:
        if ioctl is None:
            from fcntl import ioctl as call

            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        else:
            call = ioctl  # type: ignore[assignment]
        call(fd, NSM_IOCTL, message)
    except OSError as error:
        advice = {
            errno.ENOENT: "This is no Nitro enclave: /dev/nsm is there inside one only.",
            errno.EMSGSIZE: "The request or its answer is larger than the driver takes.",
            errno.EACCES: "Run this as root.",
            errno.ENOTTY: f"{device} is no security module.",
        }.get(error.errno or 0)
        raise ProviderError(f"{device}: {error.strerror}", advice=advice) from None
    finally:
        if fd >= 0:
            os.close(fd)
    address, size, answered, length = _MESSAGE.unpack(message)
    same = (ctypes.addressof(given), len(data), ctypes.addressof(taken))
    if (address, size, answered) != same or not 0 < length <= _MAX_RESPONSE:
        raise ProviderError(
            f"{_NAME}: the answer's length is wrong",
            expected=f"1 to {_MAX_RESPONSE} bytes in our buffer",
            found=length,
        )
    return taken.raw[:length]


def _member(value: Any, outer: str, inner: str, kind: type) -> Any:
    found = value.get(outer) if isinstance(value, dict) and value.keys() == {outer} else None
    result = found.get(inner) if isinstance(found, dict) else None
    if not isinstance(result, kind):
        raise ProviderError(
            f"{_NAME}: the answer is another one",
            expected=f"{outer} with {inner}",
            found=type(value).__name__,
        )
    return result


def evidence(
    *,
    nonce: bytes = b"",
    user_data: bytes | None = None,
    public_key: bytes | None = None,
    device: str = DEVICE,
    ioctl: Ioctl | None = None,
) -> Evidence:
    """
    Make an attestation document of this enclave.

    Args:
        nonce: The relying party's challenge, up to 1,024 bytes.
        user_data: What else the document binds, up to 1,024 bytes.
        public_key: A key that answers may be encrypted to (AWS KMS), up to 1,024 bytes.
        device: The device.
        ioctl: Does the call, for tests.

    Raises:
        BindingError: The document has other fields than were asked for.
        ProviderError: There is none.
        ValueError: A field is too long, or there is nothing to bind.

    """
    fields = {"user_data": user_data, "nonce": nonce or None, "public_key": public_key}
    for name, value in fields.items():
        if value is not None and len(value) > _MAX_FIELD:
            raise ValueError(f"{name} has at most {_MAX_FIELD} bytes, not {len(value)}")
    if not any(fields.values()):
        raise ValueError("give a nonce or user data: evidence that binds nothing is old at once")
    answer = request({"Attestation": fields}, device=device, ioctl=ioctl)
    document = _member(answer, "Attestation", "document", bytes)
    try:
        payload = NitroDocument.from_bytes(document).payload
    except EvidenceFormatError as error:
        raise malformed(_NAME, error) from None
    found = Evidence(
        kind="nitro-document",
        evidence=document,
        nonce=nonce,
        user_data=user_data,
        provider="nitro",
    )
    for name, wanted in fields.items():
        given = getattr(payload, name)
        if not hmac.compare_digest(given or b"", wanted or b""):
            raise BindingError(
                f"{_NAME}: the document has another {name}",
                expected=(wanted or b"").hex() or "none",
                found=(given or b"").hex() or "none",
                advice="It answers another request, or is a recording.",
                evidence=found,
            )
    return found


def describe_pcr(
    index: int, *, device: str = DEVICE, ioctl: Ioctl | None = None
) -> tuple[bool, bytes]:
    """
    Return whether PCR *index* is locked, and its value.

    Raises:
        ProviderError: There is no such PCR, or no answer.

    """
    answer = request({"DescribePCR": {"index": index}}, device=device, ioctl=ioctl)
    lock: bool = _member(answer, "DescribePCR", "lock", bool)
    data: bytes = _member(answer, "DescribePCR", "data", bytes)
    return lock, data


def random(*, device: str = DEVICE, ioctl: Ioctl | None = None) -> bytes:
    """Return random bytes of the module, up to 256. Raises as :func:`describe_pcr`."""
    answer: bytes = _member(
        request("GetRandom", device=device, ioctl=ioctl), "GetRandom", "random", bytes
    )
    return answer
