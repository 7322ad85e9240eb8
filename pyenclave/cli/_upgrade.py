"""``pyenclave reseal --dry-run``: what an upgrade would make unreadable. Only headers are read."""

from __future__ import annotations

import argparse
import os
from typing import Any

from pyenclave._files import read_file
from pyenclave.cli import _headers, _sealers, output
from pyenclave.cli._folders import LIST, SUFFIX
from pyenclave.cli._tree import Tree
from pyenclave.errors import EnclaveError
from pyenclave.formats.image import MAX_IMAGE, Image
from pyenclave.formats.sealed import SealedHeader
from pyenclave.measurement.image import SignedIdentity, verify_image
from pyenclave.sealed.policy import SealPolicy

__all__ = ["dry_run", "hindrances"]

_ADVICE = {
    "code": "reseal with --policy signer, before the upgrade",
    "signer": "reseal with --new-signing-key, while the old key is there",
    "svn": "keep the security version, or raise it",
}


def hindrances(header: SealedHeader, image: SignedIdentity) -> list[str]:
    """Return what keeps an enclave of *image* from opening data with this header."""
    policy = SealPolicy(header.key_policy)
    found = []
    if policy is SealPolicy.unique and header.identity != image.mrenclave:
        found.append("its measurement is another (code)")
    if policy is SealPolicy.signer and header.identity != image.mrsigner:
        found.append("its signer is another (signer)")
    if header.product_id != image.product_id:
        found.append(f"its product is {image.product_id}, not {header.product_id}")
    if header.security_version > image.security_version:
        found.append(
            f"its security version {image.security_version} is below "
            f"{header.security_version} (svn)"
        )
    if header.debug != (not image.signed):
        found.append("one is debug, the other production")
    return found


def _judge(fd: int, path: str, image: SignedIdentity | None) -> dict[str, Any]:
    """Return the JSON object of a file."""
    form = _sealers.form_of(fd)
    header = _headers.envelope_of(fd, form)
    result: dict[str, Any] = {"file": path, "form": _headers.FORMS.get(form)}
    if header is None:
        if not form:
            raise EnclaveError("this is no sealed file")
        # A key: neither code nor signer nor version has a part in it.
        return result | {"policy": None, "unreadable_after": [], "needs_version": None}
    policy = SealPolicy(header.key_policy)
    after = []
    if policy is SealPolicy.unique:
        after.append("code")
    if policy is SealPolicy.signer:
        after.append("signer")
    if header.security_version:
        after.append("svn")
    result |= {
        "policy": policy.name,
        "unreadable_after": after,
        "needs_version": header.security_version,
    }
    if image is not None:
        result["hindered_by"] = hindrances(header, image)
    return result


def dry_run(args: argparse.Namespace) -> int:
    """Name what becomes unreadable, and how; 1 if ``--image`` could not open all of it."""
    image = None
    if args.image is not None:
        image = verify_image(Image.parse(read_file(args.image, limit=MAX_IMAGE)))
    files: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    folder = os.path.isdir(args.file)
    parent, name = (args.file, "") if folder else os.path.split(os.path.abspath(args.file))
    with Tree(parent) as tree:
        names = (
            [p.path for p in tree.scan().files if p.path.endswith(SUFFIX) or p.path == LIST]
            if folder
            else [name]
        )
        for path in names:
            shown = path if folder else args.file
            fd = -1
            try:
                fd = tree.open(path)
                files.append(_judge(fd, shown, image))
            except (EnclaveError, OSError) as error:
                code = error.code if isinstance(error, EnclaveError) else "unreadable"
                failed.append({"file": shown, "code": code, "message": str(error)})
            finally:
                if fd >= 0:
                    os.close(fd)
    hindered = [item["file"] for item in files if item.get("hindered_by")]
    result = {
        "files": files,
        "failed": failed,
        "unreadable_after": {
            change: [item["file"] for item in files if change in item["unreadable_after"]]
            for change in ("code", "signer", "svn")
        },
    }
    if image is not None:
        result["unreadable_by_image"] = hindered
    if args.json:
        output.print_json(result)
    else:
        _show(files, failed, image is not None)
    return 2 if failed else int(bool(hindered))


def _show(files: list[dict[str, Any]], failed: list[dict[str, str]], judged: bool) -> None:
    lines = {
        "code": "other code (a new measurement)",
        "signer": "another signer",
        "svn": "a lower security version than theirs",
    }
    for change, what in lines.items():
        names = [item for item in files if change in item["unreadable_after"]]
        output.say(f"unreadable after {what}: {len(names) or 'none'}")
        for item in names:
            needs = f"  (needs {item['needs_version']})" if change == "svn" else ""
            output.say(f"  {output.line(item['file'])}{needs}")
        if names:
            output.say(f"  → {_ADVICE[change]}")
    if judged:
        hindered = [item for item in files if item.get("hindered_by")]
        output.say(f"the image will not open: {len(hindered) or 'none'}")
        for item in hindered:
            output.say(f"  {output.line(item['file'])}: {'; '.join(item['hindered_by'])}")
    for item in failed:
        output.say(f"{output.line(item['file'])}: [{item['code']}] {item['message']}")
