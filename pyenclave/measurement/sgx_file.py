"""
Measure a file of SGX, of whatever kind: the kind is found from its bytes.

Intel SDK enclaves, Open Enclave enclaves, SGXS streams, pyenclave images and bare SIGSTRUCTs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pyenclave.errors import MeasurementError, SignatureError
from pyenclave.formats.elf_enclave import EnclaveElf
from pyenclave.measurement import enclave
from pyenclave.measurement.enclave import Layout, Run
from pyenclave.measurement.sigstruct import Signed, examine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

__all__ = ["SgxMeasured", "measure_sgx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SgxMeasured:
    """
    What a file is measured as, and what its signature says.

    Attributes:
        kind: ``sgx-sdk-elf``, ``sgx-oe-elf``, ``sgx-sgxs``, ``pyenclave`` or ``sgx-sigstruct``.
        mrenclave: The measurement; of a bare SIGSTRUCT the one that it says.
        layout: The pages; None for a bare SIGSTRUCT.
        signed: The signature; None if there is none, or none that could be read.
        signed_mrenclave: What the SIGSTRUCT was made for; None without one.
        details: More fields, by the names that ``measure --json`` prints.
        warnings: What a relying party should know.

    """

    kind: str
    mrenclave: bytes
    layout: Layout | None
    signed: Signed | None
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    broken_signature: bool = False

    @property
    def signed_mrenclave(self) -> bytes | None:
        """The measurement for which the SIGSTRUCT was made."""
        return None if self.signed is None else self.signed.sigstruct.mrenclave

    @property
    def matches(self) -> bool | None:
        """Whether the SIGSTRUCT was made for this enclave; None without one, or only one."""
        if self.signed is None or self.layout is None:
            return None
        return self.signed_mrenclave == self.mrenclave

    @property
    def verified(self) -> bool:
        """Whether nothing contradicts: no signature, or one that holds and is this enclave's."""
        if self.broken_signature:
            return False
        return self.signed is None or (self.signed.valid and self.matches is not False)

    def claims(self) -> dict[str, Any]:
        """Return everything as one flat mapping for JSON; bytes are hex."""
        found: dict[str, Any] = {"kind": self.kind, "mrenclave": self.mrenclave.hex()}
        if self.signed is not None:
            found |= self.signed.claims()
        if self.matches is not None:
            found["signed_mrenclave"] = self.signed.sigstruct.mrenclave.hex() if self.signed else ""
            found["matches_sigstruct"] = self.matches
        if self.layout is not None:
            found["enclave_size"] = self.layout.size
            found["ssa_frame_size"] = self.layout.ssa_frame_size
            found["eadd_count"] = self.layout.eadd_count
            found["eextend_count"] = self.layout.eextend_count
        found |= self.details
        found["warnings"] = list(self.warnings)
        return found


def measure_sgx(
    data: Buffer, *, sigstruct: Buffer | None = None, size: int | None = None
) -> SgxMeasured:
    """
    Measure a file of SGX; untrusted input.

    Args:
        data: The whole file.
        sigstruct: A SIGSTRUCT beside it (1808 bytes), which is examined in place of the one inside.
        size: The enclave's size in bytes, for an SGXS stream that leaves it open.

    Returns:
        The measurement, and what the signature proves; see ``verified``.

    Raises:
        MeasurementError: The file is of no known kind, malformed, or too large.
        SignatureError: The bare or given SIGSTRUCT is malformed.
        ImageError: A pyenclave image is malformed.

    """
    view = memoryview(data).toreadonly().cast("B")
    kind = enclave.kind_of(view)
    if size is not None and kind != "sgx-sgxs":
        raise ValueError("a size is given for SGXS streams only")
    if kind == "elf":
        found = _elf(view)
    elif kind == "sgx-sgxs":
        found = _stream(view, size)
    elif kind == "pyenclave":
        found = _image(view)
    elif kind == "sgx-sigstruct":
        if sigstruct is not None:
            raise ValueError("the file is a SIGSTRUCT itself")
        signed = examine(view)
        return SgxMeasured(
            kind=kind,
            mrenclave=signed.sigstruct.mrenclave,
            layout=None,
            signed=signed,
            warnings=tuple(signed.warnings()),
        )
    else:
        raise MeasurementError(
            "not a file of SGX",
            expected="a signed ELF enclave, an SGXS stream, a pyenclave image or a SIGSTRUCT",
            found=f"a file that begins with {bytes(view[:8])!r}",
        )
    return _with_signature(found, sigstruct)


def _with_signature(found: SgxMeasured, given: Buffer | None) -> SgxMeasured:
    """Add what the signature says, the given one or the file's own."""
    warnings = list(found.warnings)
    own = found.layout.sigstruct if found.layout is not None else None
    if given is not None:
        signed: Signed | None = examine(given)
    elif own is None:
        warnings.append("not signed")
        return replace(found, warnings=tuple(warnings))
    else:
        try:
            signed = examine(own)
        except SignatureError as error:
            warnings.append(f"the SIGSTRUCT inside cannot be read: {error}")
            return replace(found, warnings=tuple(warnings), broken_signature=True)
    if signed is not None:
        warnings += signed.warnings()
        if signed.sigstruct.mrenclave != found.mrenclave:
            warnings.append("the SIGSTRUCT was made for another enclave, or the file was changed")
    return replace(found, signed=signed, warnings=tuple(warnings))


# ---- each kind -----------------------------------------------------------------------------------


def _elf(view: memoryview) -> SgxMeasured:
    from pyenclave.measurement import oe, sgx_elf

    elf = EnclaveElf(view)
    sdk = elf.section(sgx_elf.METADATA_SECTION) is not None
    other = elf.section(oe.PROPERTIES_SECTION) is not None
    if sdk and other:
        raise MeasurementError(
            f"the file has both {sgx_elf.METADATA_SECTION} and {oe.PROPERTIES_SECTION}"
        )
    if sdk:
        return _sdk(elf)
    if other:
        layout = oe.layout(view)
        return SgxMeasured(
            kind=layout.kind,
            mrenclave=enclave.measure(layout),
            layout=layout,
            signed=None,
            details=layout.details,
        )
    raise MeasurementError(
        "the ELF file is no enclave of a known SDK",
        expected=f"a section {sgx_elf.METADATA_SECTION} or {oe.PROPERTIES_SECTION}",
        advice="Enclaves of Intel's SDK get it when they are signed: give the signed file.",
    )


def _sdk(elf: EnclaveElf) -> SgxMeasured:
    from pyenclave.measurement import sgx_elf

    start, blocks = sgx_elf.metadata_blocks(elf)
    layouts = [sgx_elf.layout(elf, block) for block in blocks]
    digests: list[bytes] = []
    for number, layout in enumerate(layouts):
        # The blocks of a file mostly lead to the same pages, which are hashed once.
        known = next((at for at in range(number) if _same(layouts[at], layout)), None)
        digests.append(enclave.measure(layout) if known is None else digests[known])
    rows = []
    warnings = []
    for block, digest in zip(blocks, digests, strict=True):
        svn = int.from_bytes(block.sigstruct[1026:1028], "little")
        rows.append(
            {
                "offset_in_note_desc": block.offset,
                "version": block.name,
                "size": len(block.data),
                "mrenclave": digest.hex(),
                "isvsvn": svn,
            }
        )
    if len(set(digests)) > 1:
        warnings.append(
            "the metadata blocks give different enclaves: which one the loader takes "
            "depends on the platform"
        )
    for block, digest in zip(blocks[1:], digests[1:], strict=True):
        if block.sigstruct[960:992] != digest:
            warnings.append(
                f"the SIGSTRUCT of metadata block {block.name} was made for another enclave"
            )
    return SgxMeasured(
        kind="sgx-sdk-elf",
        mrenclave=digests[0],
        layout=layouts[0],
        signed=None,
        details={"metadata_file_offset": start, "metadata_blocks": rows},
        warnings=tuple(warnings),
    )


def _same(a: Layout, b: Layout) -> bool:
    """Whether two layouts of one file are hashed alike, without hashing."""
    return (a.size, a.ssa_frame_size, len(a.runs)) == (
        b.size,
        b.ssa_frame_size,
        len(b.runs),
    ) and all(map(_same_run, a.runs, b.runs))


def _same_run(a: Run, b: Run) -> bool:
    if (a.offset, a.pages, a.flags, a.chunks) != (b.offset, b.pages, b.flags, b.chunks):
        return False
    if isinstance(a.content, int | None) or isinstance(b.content, int | None):
        return a.content == b.content
    # Comparing views is twenty times slower than comparing bytes.
    return bytes(a.content) == bytes(b.content)


def _stream(view: memoryview, size: int | None) -> SgxMeasured:
    from pyenclave.measurement.sgxs import Stream

    stream = Stream(view, size=size)
    layout = stream.layout()
    return SgxMeasured(
        kind=layout.kind,
        mrenclave=stream.mrenclave(),
        layout=layout,
        signed=None,
        details=layout.details,
    )


def _image(view: memoryview) -> SgxMeasured:
    from pyenclave.formats.image import Image
    from pyenclave.measurement.image import verify_image

    image = Image.parse(view)
    runs = []
    threads = 0
    for offset, flags, pages in image.runs():
        what = "image"
        if flags == 0x100:
            what, threads = f"thread {threads}, TCS", threads + 1
        elif threads:
            what = f"thread {threads - 1}, SSA"
        runs.append(Run(offset, len(pages) // enclave.PAGE_SIZE, flags, pages, what))
    layout = Layout(
        kind="pyenclave",
        size=image.size,
        ssa_frame_size=image.ssa_frame_size,
        runs=runs,
        sigstruct=bytes(image.sigstruct_bytes) if image.signed else None,
    )
    warnings = []
    try:
        verify_image(image)
    except SignatureError as error:
        warnings.append(str(error))
    return SgxMeasured(
        kind=layout.kind,
        mrenclave=enclave.measure(layout),
        layout=layout,
        signed=None,
        details={
            "name": image.info.name,
            "product_id": image.info.product_id,
            "security_version": image.info.security_version,
            "lock_digest": image.lock_digest.hex(),
        },
        warnings=tuple(warnings),
        broken_signature=bool(warnings),
    )
