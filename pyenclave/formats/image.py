"""
The image file: pages that are measured as SGX measures, a SIGSTRUCT, a checksum.

``docs/formats/image.md`` has the layout byte by byte. Positions are never stored: they follow from
the lengths, so an image has no place for what is neither measured, signed nor required to be zero.
Reading is for untrusted input: lengths are checked before any work is done with them.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pyenclave.errors import ImageError
from pyenclave.formats.lock import MAX_LOCK, Lock
from pyenclave.formats.sgx import Sigstruct

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "CODE",
    "FLAGS_R",
    "FLAGS_RW",
    "FLAGS_RX",
    "FLAGS_TCS",
    "MAGIC",
    "MAX_IMAGE",
    "MAX_SHARED",
    "MAX_THREADS",
    "PAGE",
    "SIGSTRUCT_SIZE",
    "EncryptedParts",
    "FileEntry",
    "Image",
    "ImageInfo",
    "assemble",
    "with_sigstruct",
]

MAGIC = b"PYENCIMG"
FORMAT_VERSION = 1
PAGE = 4096
SSA_FRAME_SIZE = 1  # pages
SIGSTRUCT_SIZE = 1808
TRAILER_SIZE = 32
TAIL = SIGSTRUCT_SIZE + TRAILER_SIZE

MAX_IMAGE = 1 << 30
MAX_INFO = 4 * 1024 * 1024
MAX_FILES = 4096
MAX_OCALLS = 4096
MAX_THREADS = 256
MAX_SHARED = 16 << 30  # bytes of memory that host and enclave both map
MIN_PART = 56  # bytes of an encrypted file without content
_CHECK = re.compile(r"[0-9a-f]{64}")
CODE = "code/"  # where encrypted modules are among the files

RELEASE_KEYS = ("attestation", "ca", "vault")
MAX_RELEASE_TEXT = 64 << 10  # characters

# SECINFO.FLAGS (specification 2.6): R = 1, W = 2, X = 4, page type REG = 0x200, TCS = 0x100.
FLAGS_R = 0x201
FLAGS_RW = 0x203
FLAGS_RX = 0x205
FLAGS_TCS = 0x100

# magic, version, SSA frame size in pages, enclave size, stored pages, info length, lock length
_HEADER = struct.Struct("<8sIIQQQQ")
_ZERO_PAGE = memoryview(bytes(PAGE))


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the image; its pages lie in the order of the entries."""

    name: str
    size: int
    executable: bool


class EncryptedParts(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """
    The ``[encrypted]`` table.

    Attributes:
        check: Commits to the data key: 64 hexadecimal digits (``sealed.parts.check_value``).
        files: Names of the files that are encrypted, sorted.
        key: Identifier of the vault's key that gives the data key, if the manifest names one.

    """

    check: str
    files: tuple[str, ...]
    key: str = ""

    @property
    def modules(self) -> dict[str, str]:
        """The file of each encrypted module, by the module's name."""
        return {
            name.removeprefix(CODE).removesuffix(".py"): name
            for name in self.files
            if name.startswith(CODE)
        }


class ImageInfo(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """
    What the enclave is; measured.

    Attributes:
        name: Name of the enclave, for people.
        product_id: ISVPRODID, 0 to 65535.
        security_version: ISVSVN, 0 to 65535.
        debug: Whether a signed image may be launched as debug.
        threads: Ring lanes and TCS pages.
        entry_kind: ``python`` or ``native``.
        entry_module: The name under which a Python entry is imported (a native one: its stem).
        entry_file: The entry's name in ``files``.
        functions: The ecalls, as ``calls.signature`` describes them.
        sealed_memory: Limit of plaintext in sealed arrays, in bytes.
        message_limit: Limit of one call's encoded arguments or result, in bytes.
        ocalls: Declared host functions, as ``calls.ocalls`` describes them, sorted by name.
        blas_threads: Threads of the linear algebra library inside.
        jit: Whether writable-executable memory is allowed inside.
        seal: The ``[seal]`` table.
        files: The image's files, sorted by name.
        shared_memory: Bytes of memory that host and enclave both map, for arrays; whole pages.
            Absent where it is 0, so that images without are what they were.
        release: The ``[release]`` table, with the text of its authorities; None where there is
            none, and absent then.
        encrypted: What opens only after the data key was released; absent where there is none.

    """

    name: str
    product_id: int
    security_version: int
    debug: bool
    threads: int
    entry_kind: Literal["python", "native"]
    entry_module: str
    entry_file: str
    functions: tuple[dict[str, Any], ...]
    sealed_memory: int
    message_limit: int
    ocalls: tuple[dict[str, Any], ...]
    blas_threads: int
    jit: bool
    seal: dict[str, Any]
    files: tuple[FileEntry, ...]
    shared_memory: int = 0
    release: dict[str, str] | None = None
    encrypted: EncryptedParts | None = None

    def to_bytes(self) -> bytes:
        """Return the canonical JSON: sorted keys, no spaces, UTF-8."""
        return msgspec.json.encode(self, order="sorted")

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> ImageInfo:
        """
        Read the info pages; untrusted input.

        Raises:
            ImageError: The bytes are not the canonical form of a valid info.

        """
        try:
            info = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ImageError(f"malformed image info: {error}") from None
        info.check()
        if info.to_bytes() != data:
            raise ImageError("image info is not in its canonical form")
        return info

    def check(self) -> None:
        """
        Check every member's range and form.

        Raises:
            ImageError: The first member that is not as it must be.

        """
        _check_range("product_id", self.product_id, 0, 0xFFFF)
        _check_range("security_version", self.security_version, 0, 0xFFFF)
        _check_range("threads", self.threads, 1, MAX_THREADS)
        _check_range("sealed_memory", self.sealed_memory, 0, 1 << 48)
        _check_range("message_limit", self.message_limit, 1, 1 << 40)
        _check_range("shared_memory", self.shared_memory, 0, MAX_SHARED)
        if self.shared_memory % PAGE:
            raise ImageError(
                "image info: shared_memory is not whole pages",
                expected=f"a multiple of {PAGE}",
                found=self.shared_memory,
            )
        _check_range("blas_threads", self.blas_threads, 1, 1024)
        if not self.name or len(self.name) > 64 or not self.name.isprintable():
            raise ImageError("image info: name is not a short printable text")
        if not self.entry_module.isidentifier() or len(self.entry_module) > 128:
            raise ImageError("image info: entry_module is not an identifier")
        names = [file.name for file in self.files]
        if len(names) > MAX_FILES:
            raise ImageError("image has too many files", expected=MAX_FILES, found=len(names))
        if any(before >= after for before, after in pairwise(names)):
            raise ImageError("files of the image are not sorted or not unique")
        for file in self.files:
            _check_file(file)
        if self.entry_file not in names:
            raise ImageError("entry is not among the files of the image", found=self.entry_file)
        functions = [function.get("name") for function in self.functions]
        if not all(isinstance(name, str) for name in functions):
            raise ImageError("image info: a function has no name")
        if len(set(functions)) != len(functions):
            raise ImageError("image info: two functions have one name")
        _check_ocalls(self.ocalls, set(functions))
        for key, value in (self.release or {}).items():
            if key not in RELEASE_KEYS or len(value) > MAX_RELEASE_TEXT:
                raise ImageError("image info: release is malformed", found=repr(key[:40]))
        _check_encrypted(self)


_decoder = msgspec.json.Decoder(ImageInfo, strict=True)


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ImageError(
            f"image info: {what} is out of range", expected=f"{low} to {high}", found=value
        )


def _check_encrypted(info: ImageInfo) -> None:
    parts = info.encrypted
    code = {file.name for file in info.files if file.name.startswith(CODE)}
    if parts is None:
        if code:
            raise ImageError(
                "image has code beside its entry that is not encrypted", found=min(code)
            )
        return
    if not _CHECK.fullmatch(parts.check):
        raise ImageError("image info: encrypted.check is not 64 hexadecimal digits")
    if len(parts.key) > 1024 or not parts.key.isprintable() or not parts.key.isascii():
        raise ImageError("image info: encrypted.key is not a printable identifier")
    if not parts.files or any(before >= after for before, after in pairwise(parts.files)):
        raise ImageError("encrypted files of the image are none, not sorted or not unique")
    files = {file.name: file for file in info.files}
    for name in parts.files:
        if name not in files or name == info.entry_file or files[name].executable:
            raise ImageError("an encrypted file is not among those of the image", found=name)
        if files[name].size < MIN_PART:
            raise ImageError("an encrypted file is too short to be one", found=name)
    if missing := code - set(parts.files):
        raise ImageError(
            "image has code beside its entry that is not encrypted", found=min(missing)
        )
    for module, name in parts.modules.items():
        if not module.isidentifier() or len(module) > 128 or not name.endswith(".py"):
            raise ImageError("an encrypted module has no name that can be imported", found=name)
        if module == info.entry_module or info.entry_kind != "python":
            raise ImageError("an encrypted module takes the entry's place", found=name)


def _check_ocalls(ocalls: tuple[dict[str, Any], ...], functions: set[Any]) -> None:
    if len(ocalls) > MAX_OCALLS:
        raise ImageError("image has too many ocalls", expected=MAX_OCALLS, found=len(ocalls))
    names = [ocall.get("name") for ocall in ocalls]
    if not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ImageError("image info: an ocall has no name")
    if any(before >= after for before, after in pairwise(names)):  # type: ignore[operator]
        raise ImageError("ocalls of the image are not sorted or not unique")
    for ocall in ocalls:
        allow = ocall.get("allow")
        if not isinstance(allow, list | tuple) or not all(isinstance(x, str) for x in allow):
            raise ImageError(f"image info: ocall {ocall['name']} has no list of what it allows")
        if any(before >= after for before, after in pairwise(allow)):
            raise ImageError(f"image info: what ocall {ocall['name']} allows is not sorted")
        for name in allow:
            if name not in functions:
                raise ImageError(
                    f"image info: ocall {ocall['name']} allows a function that is not there",
                    found=name,
                )


def _check_file(file: FileEntry) -> None:
    parts = file.name.split("/")
    plain = len(parts) >= 2 and not any(part in ("", ".", "..") for part in parts)
    if not plain or len(file.name) > 255 or not file.name.isprintable():
        raise ImageError("name of an image's file is not a plain path", found=repr(file.name))
    _check_range(f"size of {file.name}", file.size, 0, MAX_IMAGE)


def _pages(size: int) -> int:
    return -(-size // PAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """A run of stored pages of one kind."""

    page: int  # index of its first page
    size: int  # content in bytes; the rest of the last page is zero
    flags: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where everything lies; a function of the lengths alone."""

    info: _Section
    lock: _Section
    files: tuple[_Section, ...]
    stored: int  # pages in the file
    threads: int

    @property
    def size(self) -> int:
        """Enclave size: the power of two that holds all pages, TCS and SSA of each thread too."""
        total = (self.stored + self.threads * (1 + SSA_FRAME_SIZE)) * PAGE
        return 1 << (total - 1).bit_length()


def _layout(info_len: int, lock_len: int, info: ImageInfo) -> _Layout:
    at = 1
    sections: list[_Section] = []
    sizes = [(info_len, FLAGS_R), (lock_len, FLAGS_R)]
    sizes += [(file.size, FLAGS_RX if file.executable else FLAGS_R) for file in info.files]
    for size, flags in sizes:
        sections.append(_Section(page=at, size=size, flags=flags))
        at += _pages(size)
    return _Layout(
        info=sections[0],
        lock=sections[1],
        files=tuple(sections[2:]),
        stored=at,
        threads=info.threads,
    )


def _tcs(own: int, entry: int) -> memoryview:
    """
    Return a TCS page (specification 2.6).

    Args:
        own: Offset of the TCS page; its SSA frame is the next page.
        entry: OENTRY, the offset of the entry's first page.

    """
    page = bytearray(PAGE)
    # OSSA @16, CSSA @24, NSSA @28, OENTRY @32, FSLIMIT @64, GSLIMIT @68; all else zero.
    struct.pack_into("<QIIQ", page, 16, own + PAGE, 0, 1, entry)
    struct.pack_into("<II", page, 64, 0xFFFFFFFF, 0xFFFFFFFF)
    return memoryview(page).toreadonly()


class Image:
    """
    A parsed image: structure and checksum hold; the signature is not judged here.

    Attributes:
        data: The whole file.
        info: What the enclave is.
        lock: The lock list.
        lock_bytes: Its canonical bytes.
        lock_digest: SHA-256 of these.
        files: Content by name, views into ``data``.
        sigstruct_bytes: The 1808 bytes of the signature, empty for an unsigned image.
        sha256: The trailer: SHA-256 of everything before it.
        size: Enclave size in bytes, a power of two.
        ssa_frame_size: Pages of an SSA frame, for ECREATE.

    """

    __slots__ = (
        "_layout",
        "data",
        "files",
        "info",
        "lock",
        "lock_bytes",
        "lock_digest",
        "sha256",
        "sigstruct_bytes",
        "size",
        "ssa_frame_size",
    )

    def __init__(
        self,
        data: memoryview,
        info: ImageInfo,
        lock_bytes: bytes,
        layout: _Layout,
        locks: Mapping[bytes, Lock],
    ):
        self.data = data
        self.info = info
        self.lock_bytes = lock_bytes
        self.lock_digest = hashlib.sha256(lock_bytes).digest()
        known = locks.get(self.lock_digest)
        self.lock = Lock.from_bytes(lock_bytes) if known is None else known
        self._layout = layout
        self.files: Mapping[str, memoryview] = {
            file.name: _content(data, section)
            for file, section in zip(info.files, layout.files, strict=True)
        }
        signature = bytes(data[-TAIL:-TRAILER_SIZE])
        self.sigstruct_bytes = signature if any(signature) else b""
        self.sha256 = bytes(data[-TRAILER_SIZE:])
        self.size = layout.size
        self.ssa_frame_size = SSA_FRAME_SIZE

    @classmethod
    def parse(cls, data: Buffer, *, locks: Mapping[bytes, Lock] | None = None) -> Image:
        """
        Read an image; untrusted input that must not change meanwhile.

        Args:
            data: The whole file. Views into it are kept.
            locks: Locks that were read before, by digest: reading one takes milliseconds.

        Returns:
            The image. Its signature, if any, is not judged (``measurement.image.verify_image``).

        Raises:
            ImageError: The bytes are not an image, or were changed; the check is named.

        """
        view = memoryview(data).toreadonly().cast("B")
        info_len, lock_len, size = _read_header(view)
        found = hashlib.sha256(view[:-TRAILER_SIZE]).digest()
        if found != view[-TRAILER_SIZE:]:
            raise ImageError(
                "image was changed: its checksum does not hold",
                expected=view[-TRAILER_SIZE:].hex(),
                found=found.hex(),
            )
        info = ImageInfo.from_bytes(view[PAGE : PAGE + info_len])
        layout = _layout(info_len, lock_len, info)
        stored = (len(view) - TAIL) // PAGE
        if layout.stored != stored:
            raise ImageError(
                "files of the image do not fill its pages", expected=layout.stored, found=stored
            )
        if layout.size != size:
            raise ImageError("enclave size is wrong", expected=layout.size, found=size)
        for section in (layout.info, layout.lock, *layout.files):
            _check_padding(view, section)
        return cls(view, info, bytes(_content(view, layout.lock)), layout, locks or {})

    @property
    def signed(self) -> bool:
        """Whether the image has a SIGSTRUCT."""
        return bool(self.sigstruct_bytes)

    @property
    def sigstruct(self) -> Sigstruct | None:
        """
        The signature, None for an unsigned image; its form is checked, nothing more.

        Raises:
            SignatureError: The bytes are not a SIGSTRUCT.

        """
        return Sigstruct.from_bytes(self.sigstruct_bytes) if self.signed else None

    @property
    def stored_bytes(self) -> memoryview:
        """The stored pages: all that is measured and in the file."""
        return self.data[:-TAIL]

    def runs(self) -> Iterator[tuple[int, int, memoryview]]:
        """
        Iterate over runs of neighbouring pages with equal flags, exactly as they are measured.

        Yields:
            (offset from the enclave's base, SECINFO.FLAGS, whole pages), in the order of EADD.

        """
        layout = self._layout
        start, flags = 0, FLAGS_R
        for section in layout.files:
            if section.flags != flags and _pages(section.size):
                yield start, flags, self.data[start : section.page * PAGE]
                start, flags = section.page * PAGE, section.flags
        yield start, flags, self.data[start : layout.stored * PAGE]
        entry = self.entry_offset
        for thread in range(layout.threads):
            offset = (layout.stored + thread * (1 + SSA_FRAME_SIZE)) * PAGE
            yield offset, FLAGS_TCS, _tcs(offset, entry)
            for frame in range(SSA_FRAME_SIZE):
                yield offset + (1 + frame) * PAGE, FLAGS_RW, _ZERO_PAGE

    def pages(self) -> Iterator[tuple[int, int, memoryview]]:
        """
        Iterate over the pages exactly as they are measured.

        Yields:
            (offset from the enclave's base, SECINFO.FLAGS, the page), in the order of EADD.

        """
        for start, flags, run in self.runs():
            for at in range(0, len(run), PAGE):
                yield start + at, flags, run[at : at + PAGE]

    @property
    def entry_offset(self) -> int:
        """Offset of the entry's first page."""
        return self.offset_of(self.info.entry_file)

    def offset_of(self, name: str) -> int:
        """Return the offset of a file's first page; KeyError if there is no such file."""
        for file, section in zip(self.info.files, self._layout.files, strict=True):
            if file.name == name:
                return section.page * PAGE
        raise KeyError(name)

    def sections(self) -> tuple[tuple[str, int, int, int], ...]:
        """Return (what, offset, content length, flags) of all that is stored, in order."""
        layout = self._layout
        named = [("header", _Section(page=0, size=PAGE, flags=FLAGS_R))]
        named += [("info", layout.info), ("lock", layout.lock)]
        named += [(f.name, s) for f, s in zip(self.info.files, layout.files, strict=True)]
        return tuple((what, s.page * PAGE, s.size, s.flags) for what, s in named)

    def __repr__(self) -> str:
        signed = "signed" if self.signed else "unsigned"
        return f"<Image {self.info.name!r} {signed} sha256={self.sha256.hex()[:16]}…>"


def _content(view: memoryview, section: _Section) -> memoryview:
    return view[section.page * PAGE : section.page * PAGE + section.size]


def _is_zero(view: memoryview) -> bool:
    """Whether all of less than a page is zero; a hundred times faster than any()."""
    return view == _ZERO_PAGE[: len(view)]


def _check_padding(view: memoryview, section: _Section) -> None:
    end = (section.page + _pages(section.size)) * PAGE
    if not _is_zero(view[section.page * PAGE + section.size : end]):
        raise ImageError("padding of a page is not zero", found=f"before offset {end:#x}")


def _read_header(view: memoryview) -> tuple[int, int, int]:
    """Check all lengths; return those of info and lock, and the enclave's size."""
    if len(view) < len(MAGIC) or view[: len(MAGIC)] != MAGIC:
        raise ImageError(
            "not an enclave image",
            expected=f"magic {MAGIC!r}",
            found=repr(bytes(view[:8])),
            advice="`pyenclave build` makes one; from_file() launches a Python file as it is.",
        )
    if not PAGE + TAIL <= len(view) <= MAX_IMAGE:
        raise ImageError(
            "image is cut off or too long",
            expected=f"{PAGE + TAIL} to {MAX_IMAGE} bytes",
            found=len(view),
        )
    _, version, ssa, size, stored, info_len, lock_len = _HEADER.unpack_from(view)
    if version != FORMAT_VERSION:
        raise ImageError(
            "image has another format version",
            expected=FORMAT_VERSION,
            found=version,
            advice="Build it again with this release.",
        )
    if ssa != SSA_FRAME_SIZE:
        raise ImageError("SSA frame size is not known", expected=SSA_FRAME_SIZE, found=ssa)
    if len(view) != stored * PAGE + TAIL:
        raise ImageError(
            "image is cut off or has trailing bytes",
            expected=f"{stored * PAGE + TAIL} bytes",
            found=len(view),
        )
    if not 0 < info_len <= MAX_INFO or not 0 < lock_len <= MAX_LOCK:
        raise ImageError("info or lock list is empty or too long", found=(info_len, lock_len))
    if 1 + _pages(info_len) + _pages(lock_len) > stored:
        raise ImageError("info and lock list do not fit the image", found=(info_len, lock_len))
    if not _is_zero(view[_HEADER.size : PAGE]):
        raise ImageError("header page: a reserved byte is not zero")
    return info_len, lock_len, size


def assemble(info: ImageInfo, lock: Lock, files: Mapping[str, bytes]) -> bytes:
    """
    Write an unsigned image.

    Args:
        info: What the enclave is; its ``files`` must describe *files*.
        lock: The lock list.
        files: Content by name.

    Returns:
        The bytes of the image: the same for the same arguments, always.

    Raises:
        ImageError: *info* or *lock* is not valid, or the image would be too large.

    """
    info.check()
    lock.check()
    if {file.name: file.size for file in info.files} != {n: len(c) for n, c in files.items()}:
        raise ValueError("info.files does not describe the files")
    info_bytes, lock_bytes = info.to_bytes(), lock.to_bytes()
    if len(info_bytes) > MAX_INFO or len(lock_bytes) > MAX_LOCK:
        raise ImageError("info or lock list is too long", found=(len(info_bytes), len(lock_bytes)))
    layout = _layout(len(info_bytes), len(lock_bytes), info)
    if layout.stored * PAGE + TAIL > MAX_IMAGE:
        raise ImageError(
            "image is too large", expected=f"<= {MAX_IMAGE}", found=layout.stored * PAGE + TAIL
        )
    header = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        SSA_FRAME_SIZE,
        layout.size,
        layout.stored,
        len(info_bytes),
        len(lock_bytes),
    )
    contents = (header, info_bytes, lock_bytes, *(files[file.name] for file in info.files))
    return _finish(b"".join(_padded(contents)), bytes(SIGSTRUCT_SIZE))


def _padded(contents: Iterable[bytes]) -> Iterator[bytes]:
    for content in contents:
        yield content
        yield bytes(-len(content) % PAGE)


def with_sigstruct(image: Image, sigstruct: bytes) -> bytes:
    """
    Return *image* with another SIGSTRUCT; zero bytes make it unsigned.

    Args:
        image: The image, signed or not.
        sigstruct: 1808 bytes.

    Returns:
        The bytes of the new image.

    """
    if len(sigstruct) != SIGSTRUCT_SIZE:
        raise ValueError(f"a SIGSTRUCT has {SIGSTRUCT_SIZE} bytes, not {len(sigstruct)}")
    return _finish(bytes(image.stored_bytes), sigstruct)


def _finish(stored: bytes, sigstruct: bytes) -> bytes:
    body = stored + sigstruct
    return body + hashlib.sha256(body).digest()
