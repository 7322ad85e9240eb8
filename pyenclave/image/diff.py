"""Why two images have different measurements: the file or option that made them differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pyenclave.formats.image import Image
from pyenclave.image.inspect import options

__all__ = ["diff"]


def _files(image: Image) -> dict[str, object]:
    parts = image.info.encrypted
    hidden = parts.files if parts is not None else ()
    return {
        f"{name} (encrypted)" if name in hidden else name: hashlib.sha256(content).hexdigest()
        for name, content in image.files.items()
    }


def _compare(
    what: str, a: Mapping[str, object], b: Mapping[str, object], *, measured: bool = True
) -> list[dict[str, Any]]:
    return [
        {"what": what, "name": name, "a": a.get(name), "b": b.get(name), "measured": measured}
        for name in sorted({*a, *b})
        if a.get(name) != b.get(name)
    ]


def diff(a: Image, b: Image) -> list[dict[str, Any]]:
    """
    Name what makes two images differ.

    Args:
        a: One image.
        b: The other.

    Returns:
        A row for each difference: ``what`` (``option``, ``entry``, ``function``, ``ocall``,
        ``file``, ``module``, ``library``, ``bootstrap``, ``data``, ``signature``), ``name``, the
        values ``a`` and ``b`` (None: absent there; files by SHA-256), and whether it is
        ``measured``. Empty exactly if the images are equal.

    """
    rows = _compare("option", options(a), options(b))
    rows += _compare(
        "entry",
        {"kind": a.info.entry_kind, "module": a.info.entry_module, "file": a.info.entry_file},
        {"kind": b.info.entry_kind, "module": b.info.entry_module, "file": b.info.entry_file},
    )
    rows += _compare(
        "function",
        {function["name"]: function for function in a.info.functions},
        {function["name"]: function for function in b.info.functions},
    )
    if [f["name"] for f in a.info.functions] != [f["name"] for f in b.info.functions] and not rows:
        rows += _compare(
            "function",
            {"order": [f["name"] for f in a.info.functions]},
            {"order": [f["name"] for f in b.info.functions]},
        )
    rows += _compare(
        "ocall",
        {ocall["name"]: ocall for ocall in a.info.ocalls},
        {ocall["name"]: ocall for ocall in b.info.ocalls},
    )
    rows += _compare("file", _files(a), _files(b))
    rows += _compare(
        "file",
        {f"{f.name} (executable)": f.executable for f in a.info.files},
        {f"{f.name} (executable)": f.executable for f in b.info.files},
    )
    rows += _lock(a, b)
    rows += _compare("signature", _signature(a), _signature(b), measured=False)
    return rows


def _lock(a: Image, b: Image) -> list[dict[str, Any]]:
    if a.lock_digest == b.lock_digest:
        return []
    rows = _compare("option", {"python": a.lock.python}, {"python": b.lock.python})
    rows += _compare("option", {"preload": a.lock.preload}, {"preload": b.lock.preload})
    for what, members in (
        ("module", ("modules", "name")),
        ("library", ("libraries", "soname")),
        ("bootstrap", ("bootstrap", "path")),
        ("data", ("data", "path")),
    ):
        lists, key = members
        both = [
            {getattr(item, key): item for item in getattr(image.lock, lists)} for image in (a, b)
        ]
        for row in _compare(what, *both):
            old, new = row["a"], row["b"]
            same = old is not None and new is not None and old.sha256 == new.sha256
            # The hash tells most; where it is equal, the whole entry does.
            for side in ("a", "b"):
                if row[side] is not None:
                    row[side] = repr(row[side]) if same else row[side].sha256
            rows.append(row)
    return rows


def _signature(image: Image) -> dict[str, object]:
    if not image.signed:
        return {}
    data = image.sigstruct_bytes
    return {
        "MRSIGNER": hashlib.sha256(data[128:512]).hexdigest(),
        "DATE": f"{int.from_bytes(data[20:24], 'little'):08x}",
        "SIGSTRUCT": hashlib.sha256(data).hexdigest(),
    }
