"""What an image is, in full: explained for whoever has to decide whether to trust it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from pyenclave.errors import SignatureError
from pyenclave.formats.image import PAGE, Image
from pyenclave.formats.lock import Lock
from pyenclave.formats.sgx import Sigstruct
from pyenclave.measurement.image import measure_image, verify_image

__all__ = ["describe", "flags_text", "trusted_base"]


def flags_text(flags: int) -> str:
    """Return SECINFO.FLAGS as people write them, e.g. ``R-X REG``."""
    rights = "".join(
        letter if flags & bit else "-" for letter, bit in (("R", 1), ("W", 2), ("X", 4))
    )
    kinds = {0: "SECS", 1: "TCS", 2: "REG", 3: "VA", 4: "TRIM"}
    return f"{rights} {kinds.get(flags >> 8 & 0xFF, '?')}"


def describe(image: Image) -> dict[str, Any]:
    """
    Explain an image: identity, pages, files, options, functions and the trusted base.

    Args:
        image: A parsed image. Its signature need not hold; whether it does is part of the answer.

    Returns:
        A JSON-able description; its form is in ``docs/formats/image.md``.

    """
    info = image.info
    return {
        "name": info.name,
        **_identity(image),
        "product_id": info.product_id,
        "security_version": info.security_version,
        "sha256": image.sha256.hex(),
        "enclave_size": image.size,
        "ssa_frame_size": image.ssa_frame_size,
        "entry": {"kind": info.entry_kind, "module": info.entry_module, "file": info.entry_file},
        "options": options(image),
        "functions": [dict(function) for function in info.functions],
        "ocalls": [dict(ocall) for ocall in info.ocalls],
        "pages": _pages(image),
        "files": [
            {
                "name": file.name,
                "size": file.size,
                "executable": file.executable,
                **({"encrypted": True} if _is_encrypted(image, file.name) else {}),
                "sha256": hashlib.sha256(image.files[file.name]).hexdigest(),
            }
            for file in info.files
        ],
        "lock": {
            "digest": image.lock_digest.hex(),
            "python": image.lock.python,
            "preload": list(image.lock.preload),
        },
        "trusted_base": trusted_base(image),
    }


def _is_encrypted(image: Image, name: str) -> bool:
    parts = image.info.encrypted
    return parts is not None and name in parts.files


def _identity(image: Image) -> dict[str, Any]:
    found: dict[str, Any] = {"signed": image.signed, "signature": "none", "mrsigner": None}
    try:
        identity = verify_image(image)
    except SignatureError as error:
        found |= {"signature": f"does not hold: {error}"}
        return {"mrenclave": measure_image(image).hex(), **found}
    if image.signed:
        date = Sigstruct.from_bytes(image.sigstruct_bytes).date
        found |= {
            "signature": "holds",
            "mrsigner": identity.mrsigner.hex(),
            "date": f"{date >> 16:04x}-{date >> 8 & 0xFF:02x}-{date & 0xFF:02x}",
        }
    found["attributes"] = identity.attributes.to_bytes().hex()
    found["attribute_mask"] = identity.attribute_mask.to_bytes().hex()
    return {"mrenclave": identity.mrenclave.hex(), **found}


def options(image: Image) -> dict[str, Any]:
    """Return what the manifest decides, by ``table.key``."""
    info = image.info
    return {
        "enclave.name": info.name,
        "enclave.product_id": info.product_id,
        "enclave.security_version": info.security_version,
        "enclave.debug": info.debug,
        "enclave.threads": info.threads,
        "memory.sealed": info.sealed_memory,
        "memory.message": info.message_limit,
        "memory.shared": info.shared_memory,
        "runtime.blas_threads": info.blas_threads,
        "runtime.jit": info.jit,
        **{f"seal.{key}": value for key, value in sorted(info.seal.items())},
        **{f"release.{key}": value for key, value in sorted((info.release or {}).items())},
        **_encrypted(image),
    }


def _encrypted(image: Image) -> dict[str, Any]:
    parts = image.info.encrypted
    if parts is None:
        return {}
    return {
        "encrypted.check": parts.check,
        "encrypted.files": list(parts.files),
        "encrypted.key": parts.key,
    }


def _pages(image: Image) -> list[dict[str, Any]]:
    rows = [
        {
            "what": what,
            "offset": offset,
            "pages": -(-size // PAGE),
            "size": size,
            "flags": flags_text(flags),
        }
        for what, offset, size, flags in image.sections()
    ]
    stored = len(image.stored_bytes)
    for offset, flags, _ in image.pages():
        if offset >= stored:
            thread = (offset - stored) // PAGE // 2
            kind = "TCS" if flags & 0xFF00 == 0x100 else "SSA"
            rows.append(
                {
                    "what": f"{kind} of thread {thread}",
                    "offset": offset,
                    "pages": 1,
                    "size": PAGE,
                    "flags": flags_text(flags),
                }
            )
    return rows


def _total(rows: Iterable[dict[str, Any]]) -> int:
    return sum({row["path"]: row["size"] for row in rows}.values())


def trusted_base(image: Image) -> dict[str, Any]:
    """
    Return every file that runs inside an enclave of this image.

    Args:
        image: A parsed image.

    Returns:
        ``entry``, ``modules``, ``libraries``, ``bootstrap`` and ``data`` (each with path, hash
        and size in bytes), and sums; ``encrypted``, where there is code that nobody but the holder
        of its key can read (path, hash and size of the ciphertext).

    """
    lock: Lock = image.lock
    modules = [
        {"name": m.name, "kind": m.kind, "path": m.path, "sha256": m.sha256, "size": m.size}
        for m in lock.modules
        if m.kind != "namespace"
    ]
    libraries = [
        {"name": lib.soname, "path": lib.path, "sha256": lib.sha256, "size": lib.size}
        for lib in lock.libraries
    ]
    bootstrap = [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in lock.bootstrap]
    data = [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in lock.data]
    entry = image.files[image.info.entry_file]
    hidden = [
        {
            "name": name,
            "path": path,
            "sha256": hashlib.sha256(image.files[path]).hexdigest(),
            "size": len(image.files[path]),
        }
        for name, path in (image.info.encrypted.modules if image.info.encrypted else {}).items()
    ]
    others = {row["path"] for row in (*modules, *libraries, *bootstrap, *data)}
    return {
        **({"encrypted": hidden} if hidden else {}),
        "entry": {
            "name": image.info.entry_module,
            "path": image.info.entry_file,
            "sha256": hashlib.sha256(entry).hexdigest(),
            "size": len(entry),
        },
        "modules": modules,
        "libraries": libraries,
        "bootstrap": bootstrap,
        "data": data,
        "files": 1 + len(hidden) + len(others),
        "bytes": len(entry) + _total([*hidden, *modules, *libraries, *bootstrap, *data]),
    }
