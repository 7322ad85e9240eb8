"""The image of the vault's enclave, and its sealed key-encryption keys, in the state directory."""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pyenclave._files import read_file
from pyenclave._platform.state import State
from pyenclave.errors import EvidenceFormatError, ImageError, PlatformUnavailableError
from pyenclave.formats import jose, jsonstrict
from pyenclave.formats.image import Image
from pyenclave.image import build, keys, sign
from pyenclave.image.manifest import Manifest
from pyenclave.measurement.image import verify_image
from pyenclave.measurement.sgx import mrsigner

__all__ = [
    "KEKS",
    "MESSAGE",
    "THREADS",
    "SealedKek",
    "enclave_image",
    "load_keks",
    "remove_keks",
    "store_keks",
]

THREADS: Final = 4
MESSAGE: Final = 1 << 20  # bytes of one call: a few fields of at most 64 KiB
KEKS: Final = "vault-keks.json"
_PRODUCT: Final = 0x5646
_VERSION: Final = 2  # 2: the enclave decides releases itself
_KEY: Final = "vault-signing-key.pem"
_IMAGE: Final = "vault.enclave"
_LOCK: Final = "vault.lock"
_ROOTS: Final = "vault-authorities.pem"
_ROOTS_INSIDE: Final = "authorities.pem"
_MAX_ROOTS: Final = 4 << 20
# Where systems keep the authorities of TLS in one file; OpenSSL's own word comes first.
_BUNDLES: Final = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
_CERTIFICATE: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----\r?\n[A-Za-z0-9+/=\r\n]+-----END CERTIFICATE-----"
)
_ENTRY: Final = Path(__file__).with_name("_enclave.py")
_MAX_KEKS_FILE: Final = 256 << 10
_BUILDING: Final = 120.0  # seconds that another process may take to build the image


@contextmanager
def _locked(path: str | os.PathLike[str] | None) -> Iterator[State]:
    with State.open(None if path is None else os.fspath(path)) as state:
        if not state.writable:
            raise PlatformUnavailableError(
                f"state directory {state.path} is not writable",
                advice="The vault's enclave and its sealed keys are kept there.",
            )
        with state.lock(_LOCK, timeout=_BUILDING):
            yield state


def _signer(key: bytes) -> bytes:
    modulus = keys.load_private(key).public_key().public_numbers().n
    return mrsigner(modulus.to_bytes(keys.KEY_BITS // 8, "little"))


def _system_roots() -> bytes:
    """Return the certificates of the system's authorities as PEM; none where there is no file."""
    own = ssl.get_default_verify_paths().cafile
    for path in (*([own] if own else []), *_BUNDLES):
        try:
            data = read_file(path, limit=_MAX_ROOTS)
        except OSError:
            continue
        if found := _CERTIFICATE.findall(data):
            return b"\n".join(item.replace(b"\r", b"") for item in found) + b"\n"
    return b""


def _usable(data: bytes | None, key: bytes | None, roots: bytes) -> bytes | None:
    """Return the kept image if it is this version's and, where that is here, signed with *key*."""
    if data is None:
        return None
    try:
        image = Image.parse(data)
        signed = verify_image(image)
    except ImageError:
        return None
    same = (
        (signed.product_id, signed.security_version) == (_PRODUCT, _VERSION)
        and (key is None or signed.mrsigner == _signer(key))
        and bytes(image.files.get(f"files/{_ROOTS_INSIDE}", b"")) == roots
        and bytes(image.files.get(f"entry/{_ENTRY.name}", b"")) == _ENTRY.read_bytes()
        and (image.info.message_limit, image.info.threads) == (MESSAGE, THREADS)
    )
    return data if same else None


def enclave_image(path: str | os.PathLike[str] | None, *, rebuild: bool = False) -> bytes:
    """
    Return the vault's image, building it if there is none for this version.

    Args:
        path: The state directory.
        rebuild: Build it in any case: the runtime changed.

    Raises:
        PlatformUnavailableError: The state directory cannot be used, or the image must be built
            and its signing key was taken away.
        ImageError: It cannot be built.

    """
    with _locked(path) as state:
        key, data = state.read_file(_KEY), state.read_file(_IMAGE, limit=1 << 28)
        roots = _system_roots()
        usable = None if rebuild else _usable(data, key, roots)
        if usable is not None:
            return usable
        if key is None and data is not None:
            raise PlatformUnavailableError(
                "the vault's image is not of this version or system, and what signs it is not here",
                expected=f"{_KEY} in {state.path}",
                advice="Put it there for one start; another key could not open what is sealed.",
            )
        if key is None:
            keys.write_new(Path(state.path, _KEY), keys.keygen())
            key = state.read_file(_KEY) or b""
        state.replace_file(_ROOTS, roots)
        manifest = Manifest(
            name="pyenclave-vault",
            entry=_ENTRY,
            product_id=_PRODUCT,
            security_version=_VERSION,
            threads=THREADS,
            message=MESSAGE,
            files={_ROOTS_INSIDE: Path(state.path, _ROOTS)} if roots else {},
        )
        built = sign.sign(build.build_manifest(manifest), key)
        state.replace_file(_IMAGE, built)
        return built


@dataclass(frozen=True, slots=True)
class SealedKek:
    """A key-encryption key as the host keeps it: its id, and a blob for the enclave only."""

    id: bytes
    blob: bytes
    created: str


def _parse(data: bytes) -> tuple[SealedKek, ...]:
    document = jsonstrict.object_of(data, KEKS, max_size=_MAX_KEKS_FILE)
    listed = document.get("keks")
    if document.get("version") != 1 or not isinstance(listed, list) or not listed:
        raise EvidenceFormatError(f"{KEKS}: not of this version, or empty")
    found = []
    for item in listed:
        if not isinstance(item, dict) or set(item) != {"id", "created", "sealed"}:
            raise EvidenceFormatError(f"{KEKS}: not a key-encryption key")
        raw = [jose.b64url_decode(item[name], f"{KEKS}: {name}") for name in ("id", "sealed")]
        found.append(SealedKek(raw[0], raw[1], str(item["created"])))
    return tuple(found)


def load_keks(path: str | os.PathLike[str] | None) -> tuple[SealedKek, ...]:
    """
    Return the key-encryption keys, oldest first; none before the first start.

    Raises:
        EvidenceFormatError: The file is damaged. It is never replaced then: every key of the
            vault would be lost.
        PlatformUnavailableError: The state directory cannot be used.

    """
    with _locked(path) as state:
        data = state.read_file(KEKS, limit=_MAX_KEKS_FILE)
    return () if data is None else _parse(data)


def store_keks(
    path: str | os.PathLike[str] | None,
    known: Sequence[SealedKek],
    kek_id: bytes,
    blob: bytes,
) -> tuple[SealedKek, ...]:
    """
    Add a key-encryption key, durably.

    Args:
        path: The state directory.
        known: What the caller saw last: if another process was faster, nothing is written.
        kek_id: Its id.
        blob: Its sealed form.

    Returns:
        All that there are now; the last one is the current one.

    """
    with _locked(path) as state:
        data = state.read_file(KEKS, limit=_MAX_KEKS_FILE)
        there = () if data is None else _parse(data)
        if there != tuple(known):
            return there
        created = datetime.now(UTC).isoformat(timespec="seconds")
        there = (*there, SealedKek(kek_id, blob, created))
        state.replace_file(KEKS, _written(there))
    return there


def remove_keks(path: str | os.PathLike[str] | None, ids: Collection[bytes]) -> None:
    """
    Take key-encryption keys out, durably; those that are not there are no error.

    Args:
        path: The state directory.
        ids: Which; the last one of the file stays in any case.

    Raises:
        EvidenceFormatError: The file is damaged.
        PlatformUnavailableError: The state directory cannot be used.

    """
    with _locked(path) as state:
        data = state.read_file(KEKS, limit=_MAX_KEKS_FILE)
        there = () if data is None else _parse(data)
        kept = tuple(kek for kek in there if kek.id not in ids or kek is there[-1])
        if kept != there:
            state.replace_file(KEKS, _written(kept))


def _written(listed: Sequence[SealedKek]) -> bytes:
    document: dict[str, Any] = {
        "version": 1,
        "keks": [
            {
                "id": jose.b64url_encode(item.id),
                "created": item.created,
                "sealed": jose.b64url_encode(item.blob),
            }
            for item in listed
        ],
    }
    return json.dumps(document, indent=1).encode() + b"\n"
