"""The tool enclave: built when it is first needed, kept in the state directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pyenclave._platform.state import State
from pyenclave.cli import output
from pyenclave.errors import ArgumentError, ImageError, PlatformUnavailableError, RuntimeLockError
from pyenclave.formats.image import Image
from pyenclave.host import Enclave
from pyenclave.image import build, keys, sign
from pyenclave.image.manifest import Manifest
from pyenclave.measurement.image import verify_image
from pyenclave.measurement.sgx import mrsigner

__all__ = ["LIMIT", "read_file", "tool_enclave", "write_file"]

LIMIT: Final = 1 << 30  # bytes of one file
_MESSAGE: Final = LIMIT + (1 << 16)  # bytes of one call: a file and what is beside it
_PRODUCT: Final = 0x5045
_VERSION: Final = 1
_KEY: Final = "tool-signing-key.pem"
_IMAGE: Final = "tool.enclave"
_ENTRY: Final = Path(__file__).with_name("_tool_enclave.py")


def _build(key: bytes) -> bytes:
    manifest = Manifest(
        name="pyenclave-tool",
        entry=_ENTRY,
        product_id=_PRODUCT,
        security_version=_VERSION,
        message=_MESSAGE,
    )
    return sign.sign(build.build_manifest(manifest), key)


def _key(path: Path) -> bytes:
    if not path.exists():
        keys.write_new(path, keys.keygen())
    return path.read_bytes()


def _usable(path: Path, key: bytes) -> bytes | None:
    """Return the kept image if it is this version's and signed with *key*."""
    try:
        data = path.read_bytes()
        image = Image.parse(data)
        signed = verify_image(image)
    except (OSError, ImageError):
        return None
    modulus = keys.load_private(key).public_key().public_numbers().n
    own = mrsigner(modulus.to_bytes(keys.KEY_BITS // 8, "little"))
    identity = (own, _PRODUCT, _VERSION)
    same = (
        (signed.mrsigner, signed.product_id, signed.security_version) == identity
        and bytes(image.files.get(f"entry/{_ENTRY.name}", b"")) == _ENTRY.read_bytes()
        and image.info.message_limit == _MESSAGE
    )
    return data if same else None


def _image(*, rebuild: bool, quiet: bool) -> bytes:
    progress = output.Progress(quiet=quiet)
    with State.open() as state:
        if not state.writable:
            raise PlatformUnavailableError(
                f"state directory {state.path} is not writable",
                advice="The tool enclave's key is kept there; set PYENCLAVE_STATE.",
            )
        with state.lock("tool.lock"):
            key = _key(Path(state.path, _KEY))
            path = Path(state.path, _IMAGE)
            data = None if rebuild else _usable(path, key)
            if data is None:
                progress.step("building the tool enclave for this runtime (once)")
                data = _build(key)
                build.write_image(path, data)
                progress.done()
            return data


@contextlib.contextmanager
def tool_enclave(*, quiet: bool = False) -> Iterator[Enclave]:
    """Launch the tool enclave; it is built anew if the runtime changed since."""
    enclave = Enclave(_image(rebuild=False, quiet=quiet))
    try:
        enclave.start()
    except RuntimeLockError:
        enclave.close()
        enclave = Enclave(_image(rebuild=True, quiet=quiet))
        enclave.start()
    try:
        yield enclave
    finally:
        enclave.close()


def read_file(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """
    Read a whole file.

    Raises:
        ArgumentError: It is longer than *limit* bytes.

    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ArgumentError(f"{path} is too long", expected=f"at most {limit} bytes")
    return data


def write_file(path: str | os.PathLike[str], data: bytes, *, force: bool) -> None:
    """
    Write a file of mode 0600 as a whole: nobody ever sees a part of it.

    Raises:
        FileExistsError: It is there and *force* is not given.

    """
    target = Path(path)
    if not force and os.path.lexists(target):
        raise FileExistsError(17, "the file exists (--force replaces it)", str(target))
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if force:
            os.replace(aside, target)
        else:
            os.link(aside, target)  # fails if somebody made it meanwhile
            os.unlink(aside)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
