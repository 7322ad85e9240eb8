"""Appraisal policies: which evidence a relying party accepts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Self

from pyenclave._files import read_file
from pyenclave.attestation.references import (
    GivenReferences,
    GivenRegisters,
    Reference,
    references,
    registers,
)

__all__ = ["ANY", "LEVELS", "NAMES_CODE", "TCB_STATUSES", "AppraisalPolicy"]

LEVELS: Final = ("embedded", "service")  # weakest first
ANY: Final = "any"  # in accepted_advisories
MAX_FILE: Final = 1 << 20  # bytes of a policy file

# Best first. Revoked, and a platform that matches no level, are never genuine.
TCB_STATUSES: Final = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
TCB_COMPONENTS: Final = ("bootloader", "tee", "snp", "microcode", "fmc")
_SNP_PLATFORM_BITS: Final = (
    "smt_en",
    "tsme_en",
    "ecc_en",
    "rapl_dis",
    "ciphertext_hiding_dram_en",
    "alias_check_complete",
    "sev_tio_en",
)
_SNP_POLICY_BITS: Final = (
    "smt",
    "migrate_ma",
    "debug",
    "single_socket",
    "cxl_allow",
    "mem_aes_256_xts",
    "rapl_dis",
    "ciphertext_hiding_dram",
    "page_swap_disable",
)

SGX_ATTRIBUTES: Final = (
    "debug",
    "mode64bit",
    "provision_key",
    "einittoken_key",
    "kss",
    "aex_notify",
)
PRODUCT_LINES: Final = ("milan", "genoa", "turin")

# Reference values: field → sizes in bytes, and whether zero can be meant.
REFERENCES: Final[Mapping[str, tuple[tuple[int, ...], bool]]] = MappingProxyType(
    {
        "mrenclave": ((32,), False),
        "mrsigner": ((32,), False),
        "mrtd": ((48,), False),
        "launch_digest": ((48,), False),
        "id_key_digest": ((48,), False),
        "author_key_digest": ((48,), False),
        "mr_seam": ((48,), False),
        "mr_config_id": ((48,), True),
        "mr_owner": ((48,), True),
        "mr_owner_config": ((48,), True),
        "mr_service_td": ((48,), True),
        "xfam": ((8,), False),
        "config_id": ((64,), True),
        "isv_ext_prod_id": ((16,), True),
        "isv_family_id": ((16,), True),
        "xfrm": ((8,), False),
        "ppid": ((16,), False),
        "fmspc": ((6,), False),
        "host_data": ((32,), True),
        "family_id": ((16,), True),
        "image_id": ((16,), True),
        "chip_id": ((8, 64), False),
        "rim": ((32, 48, 64), False),
        "rpv": ((64,), True),
        "implementation_id": ((32,), False),
    }
)
# Tables of registers: field → sizes, highest number, and those that are zero only in a debug or
# unmeasured launch.
REGISTERS: Final[Mapping[str, tuple[tuple[int, ...], int, tuple[int, ...]]]] = MappingProxyType(
    {
        "rtmrs": ((48,), 3, ()),
        "pcrs": ((32, 48, 64), 31, (0, 1, 2)),
        "rems": ((32, 48, 64), 3, ()),
        "gpu_measurements": ((48,), 254, ()),
    }
)
# Limits: field → largest value.
NUMBERS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "product_id": 0xFFFF,
        "min_security_version": 0xFFFF,
        "min_config_svn": 0xFFFF,
        "min_platform_svn": 0xFFFF,
        "max_vmpl": 3,
        "min_guest_svn": 0xFFFFFFFF,
        "min_tcb_evaluation_number": 0xFFFFFFFF,
        "max_age": 100 * 366 * 86400,
    }
)
SWITCHES: Final = (
    "allow_debug",
    "allow_jit",
    "allow_migration_agent",
    "allow_masked_chip_id",
    "allow_unknown_td_features",
    "dangerous_allow_software",
    "accept_any_code",
    "require_collateral",
)
EAR_TIERS: Final = ("none", "affirming", "warning", "contraindicated")
# Lists of words: field → the words there are; None: any text.
WORDS: Final[Mapping[str, tuple[str, ...] | None]] = MappingProxyType(
    {
        "required_bits": None,
        "tcb_statuses": TCB_STATUSES,
        "accepted_advisories": None,
        "required_attributes": SGX_ATTRIBUTES,
        "forbidden_attributes": SGX_ATTRIBUTES,
        "product_lines": PRODUCT_LINES,
        "required_policy_bits": _SNP_POLICY_BITS,
        "forbidden_policy_bits": _SNP_POLICY_BITS,
        "required_platform_bits": _SNP_PLATFORM_BITS,
        "issuers": None,
        "ear_tiers": EAR_TIERS,
    }
)
# Fields that name code: a policy has one of them, or is `any_code`.
NAMES_CODE: Final = (
    "mrenclave",
    "mrsigner",
    "mrtd",
    "launch_digest",
    "id_key_digest",
    "author_key_digest",
    "rim",
    "pcrs",
    "gpu_measurements",
    "claims",
)


def _words(name: str, values: Any, known: tuple[str, ...] | None) -> tuple[str, ...]:
    if not isinstance(values, list | tuple | set | frozenset):
        raise TypeError(f"{name} is a sequence of names, not {type(values).__name__}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise TypeError(f"{name}: {value!r} is not a name")
        if known is not None and value not in known:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}")
    return tuple(values)


def _number(name: str, value: int | None, largest: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {type(value).__name__} is not int")
    if not 0 <= value <= largest:
        raise ValueError(f"{name}: {value} is not between 0 and {largest}")


def _tcb(given: Any) -> Mapping[str, int] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"min_tcb maps components to numbers; {type(given).__name__} does not")
    if not given:
        raise ValueError("min_tcb: an empty table demands nothing; leave it out instead")
    for name, value in given.items():
        if name not in TCB_COMPONENTS:
            raise ValueError(f"min_tcb: {name!r} is none of {', '.join(TCB_COMPONENTS)}")
        if value is None:
            raise TypeError(f"min_tcb.{name}: None is not int")
        _number(f"min_tcb.{name}", value, 255)
    return MappingProxyType(dict(given))


def _claims(given: Any) -> Mapping[str, tuple[str | int | bool, ...]] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"claims maps names to values; {type(given).__name__} does not")
    if not given:
        raise ValueError("claims: an empty table demands nothing; leave it out instead")
    found: dict[str, tuple[str | int | bool, ...]] = {}
    for name, value in given.items():
        if not isinstance(name, str) or not all(name.split(".")):
            raise ValueError(f"claims: {name!r} is no dotted name")
        listed = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not listed:
            raise ValueError(f"claims.{name}: an empty list would accept nothing")
        for item in listed:
            if not isinstance(item, str | int):
                raise TypeError(
                    f"claims.{name}: {type(item).__name__} is no text, number, true or false"
                )
        found[name] = listed
    return MappingProxyType(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppraisalPolicy:
    """
    Reference values and limits. What is None is not compared; what weakens is off.

    A policy names code identity, or is `any_code`. A reference value is bytes, a `Reference`
    (bytes with a validity window), or several of them: one must match.

    Attributes:
        mrenclave: SGX and pyenclave: accepted measurements, 32 bytes each.
        mrsigner: SGX and pyenclave: accepted signers, 32 bytes each; needs ``product_id``.
        product_id: Demanded ISVPRODID.
        min_security_version: Lowest accepted ISVSVN.
        config_id: SGX: CONFIGID, 64 bytes.
        isv_ext_prod_id: SGX: ISVEXTPRODID, 16 bytes.
        isv_family_id: SGX: ISVFAMILYID, 16 bytes.
        min_config_svn: SGX: lowest accepted CONFIGSVN.
        xfrm: SGX: ATTRIBUTES.XFRM, the processor's extended state, 8 bytes as in the report.
        required_attributes: SGX: ATTRIBUTES that must be set.
        forbidden_attributes: SGX: ATTRIBUTES that must not be.
        ppid: SGX and TDX: accepted platforms by the PPID of their PCK certificates, 16 bytes.
        fmspc: SGX and TDX: accepted families of platforms, 6 bytes.
        mrtd: TDX: measurement of the firmware, 48 bytes.
        rtmrs: TDX: run-time register 0 to 3 → 48 bytes.
        mr_seam: TDX: measurement of the TDX module, 48 bytes.
        mr_config_id: TDX: MRCONFIGID, 48 bytes.
        mr_owner: TDX: MROWNER, 48 bytes.
        mr_owner_config: TDX: MROWNERCONFIG, 48 bytes.
        mr_service_td: TDX 1.5: MRSERVICETD, 48 bytes.
        xfam: TDX: XFAM, the processor's extended state, 8 bytes as in the report.
        sept_ve_disable: TDX: demanded value of the attribute SEPT_VE_DISABLE.
        allow_unknown_td_features: TDX: accept attributes, XFAM bits and report bodies that this
            version does not know.
        launch_digest: SEV-SNP: MEASUREMENT, 48 bytes.
        host_data: SEV-SNP: HOST_DATA, 32 bytes.
        id_key_digest: SEV-SNP: digest of the key that signed the ID block, 48 bytes.
        author_key_digest: SEV-SNP: digest of the author key, 48 bytes.
        family_id: SEV-SNP: FAMILY_ID, 16 bytes.
        image_id: SEV-SNP: IMAGE_ID, 16 bytes.
        chip_id: SEV-SNP: accepted chips, 64 bytes; of Turin the first 8 will do.
        product_lines: SEV-SNP: accepted lines of processors (milan, genoa, turin).
        max_vmpl: SEV-SNP: highest (weakest) privilege level that may have asked.
        min_guest_svn: SEV-SNP: lowest accepted GUEST_SVN.
        min_tcb: SEV-SNP: component (bootloader, tee, snp, microcode, fmc) → lowest version.
        required_policy_bits: SEV-SNP: bits of the guest policy that must be set.
        forbidden_policy_bits: SEV-SNP: bits that must not be.
        required_platform_bits: SEV-SNP: bits of PLATFORM_INFO that must be set.
        allow_migration_agent: SEV-SNP and TDX: accept guests whose memory a migration agent (a
            migration TD) may get.
        allow_masked_chip_id: SEV-SNP: accept reports of a VCEK that do not name their chip.
        rim: Arm CCA: initial measurement of the realm, 32, 48 or 64 bytes.
        rems: Arm CCA: extensible measurement 0 to 3 → 32, 48 or 64 bytes.
        rpv: Arm CCA: personalization value of the realm, 64 bytes.
        implementation_id: Arm CCA: which implementation of the platform, 32 bytes.
        gpu_measurements: NVIDIA: index 1 to 254 → 48 bytes.
        pcrs: Nitro and vTPM: register → 32, 48 or 64 bytes.
        tcb_statuses: Intel: accepted statuses of the TCB.
        accepted_advisories: Intel: with a status other than UpToDate, the platform's advisories
            must be among these; ``("any",)`` accepts all.
        min_tcb_evaluation_number: Intel: lowest tcbEvaluationDataNumber of the collateral.
        require_collateral: Intel: all of the collateral must have been given.
        ear_tiers: Attestation results: accepted tiers of every appraisal.
        issuers: Tokens: accepted issuers, compared exactly.
        audience: Tokens: the audience that a token must name: this relying party.
        claims: Tokens: dotted name → accepted value or values.
        max_age: Tokens, documents: largest age in seconds.
        min_level: pyenclave: ``embedded`` or ``service``.
        required_bits: pyenclave: protection bits that must have held at launch.
        min_platform_svn: pyenclave: lowest accepted security version of the platform.
        allow_debug: Accept debug enclaves and VMs: whoever runs the machine reads their memory.
        allow_jit: pyenclave: accept images that may make written memory executable.
        dangerous_allow_software: Accept a platform without TEE hardware: whoever controls the
            machine can forge its evidence.
        accept_any_code: Do not compare code identity; set by `any_code`.
    """

    mrenclave: GivenReferences = None
    mrsigner: GivenReferences = None
    product_id: int | None = None
    min_security_version: int | None = None
    config_id: GivenReferences = None
    isv_ext_prod_id: GivenReferences = None
    isv_family_id: GivenReferences = None
    min_config_svn: int | None = None
    xfrm: GivenReferences = None
    required_attributes: tuple[str, ...] = ()
    forbidden_attributes: tuple[str, ...] = ()
    ppid: GivenReferences = None
    fmspc: GivenReferences = None
    mrtd: GivenReferences = None
    rtmrs: GivenRegisters = field(default=None, hash=False)
    mr_seam: GivenReferences = None
    mr_config_id: GivenReferences = None
    mr_owner: GivenReferences = None
    mr_owner_config: GivenReferences = None
    mr_service_td: GivenReferences = None
    xfam: GivenReferences = None
    sept_ve_disable: bool | None = None
    allow_unknown_td_features: bool = False
    launch_digest: GivenReferences = None
    host_data: GivenReferences = None
    id_key_digest: GivenReferences = None
    author_key_digest: GivenReferences = None
    family_id: GivenReferences = None
    image_id: GivenReferences = None
    chip_id: GivenReferences = None
    product_lines: tuple[str, ...] = ()
    max_vmpl: int | None = None
    min_guest_svn: int | None = None
    min_tcb: Mapping[str, int] | None = field(default=None, hash=False)
    required_policy_bits: tuple[str, ...] = ()
    forbidden_policy_bits: tuple[str, ...] = ()
    required_platform_bits: tuple[str, ...] = ()
    allow_migration_agent: bool = False
    allow_masked_chip_id: bool = False
    rim: GivenReferences = None
    rems: GivenRegisters = field(default=None, hash=False)
    rpv: GivenReferences = None
    implementation_id: GivenReferences = None
    gpu_measurements: GivenRegisters = field(default=None, hash=False)
    pcrs: GivenRegisters = field(default=None, hash=False)
    tcb_statuses: tuple[str, ...] = ("UpToDate",)
    accepted_advisories: tuple[str, ...] = ()
    min_tcb_evaluation_number: int | None = None
    require_collateral: bool = True
    ear_tiers: tuple[str, ...] = ("affirming",)
    issuers: tuple[str, ...] = ()
    audience: str | None = None
    claims: Mapping[str, Any] | None = field(default=None, hash=False)
    max_age: int | None = None
    min_level: str = "embedded"
    required_bits: tuple[str, ...] = ()
    min_platform_svn: int = 0
    allow_debug: bool = False
    allow_jit: bool = True
    dangerous_allow_software: bool = False
    accept_any_code: bool = False

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, (sizes, zero) in REFERENCES.items():
            put(name, references(name, getattr(self, name), sizes, allow_zero=zero))
        for name, (sizes, highest, never) in REGISTERS.items():
            given = getattr(self, name)
            put(name, registers(name, given, sizes, highest=highest, never_zero=never))
        for name, largest in NUMBERS.items():
            _number(name, getattr(self, name), largest)
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False")
        if self.sept_ve_disable is not None and not isinstance(self.sept_ve_disable, bool):
            raise TypeError("sept_ve_disable is True, False or None")
        for name, known in WORDS.items():
            put(name, _words(name, getattr(self, name), known))
        if self.audience is not None:
            _words("audience", (self.audience,), None)
        put("min_tcb", _tcb(self.min_tcb))
        put("claims", _claims(self.claims))
        self._check_sense()

    def _check_sense(self) -> None:
        """Refuse what contradicts itself or accepts more than it says."""
        if self.min_level not in LEVELS:
            raise ValueError(f"min_level: {self.min_level!r} is none of {', '.join(LEVELS)}")
        if self.min_platform_svn is None:
            raise TypeError("min_platform_svn: NoneType is not int")
        for name in ("tcb_statuses", "ear_tiers"):
            if not getattr(self, name):
                raise ValueError(f"{name}: an empty list would accept nothing")
        if ANY in self.accepted_advisories and len(self.accepted_advisories) > 1:
            raise ValueError(f"accepted_advisories: {ANY!r} stands alone")
        for what, name in (("policy bits", "policy_bits"), ("attributes", "attributes")):
            required = set(getattr(self, f"required_{name}"))
            both = required & set(getattr(self, f"forbidden_{name}"))
            if both:
                raise ValueError(f"{what} {', '.join(sorted(both))} are required and forbidden")
            if "debug" in required and not self.allow_debug:
                raise ValueError(f"required_{name}: debug contradicts allow_debug = false")
        for name in ("pcrs", "gpu_measurements"):
            if getattr(self, name) is not None and not any(
                any(item.value) for values in self.registers(name).values() for item in values
            ):
                raise ValueError(f"{name}: a register that is not zero says which code is meant")
        named = [name for name in NAMES_CODE if getattr(self, name) is not None]
        if not named and not self.accept_any_code:
            raise ValueError(
                f"a policy names code: one of {', '.join(NAMES_CODE)}; "
                "AppraisalPolicy.any_code() accepts whatever runs"
            )
        if named and self.accept_any_code:
            raise ValueError(f"accept_any_code contradicts {', '.join(named)}")
        if self.mrenclave is None and self.mrsigner is not None and self.product_id is None:
            raise ValueError("mrsigner needs product_id: a signer may sign other products too")

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and other processes have it: the tables are views, which do not pickle."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain = {n: dict(v) if isinstance(v, Mapping) else v for n, v in values.items()}
        return _restore, (type(self), plain)

    def reference(self, name: str) -> tuple[Reference, ...]:
        """Return the reference values of field *name*; empty if it is not compared."""
        if name not in REFERENCES:
            raise KeyError(name)
        return getattr(self, name) or ()

    def accepted(self, name: str, at: datetime) -> tuple[bytes, ...]:
        """Return the values of field *name* that hold at *at*; empty if none does."""
        return tuple(item.value for item in self.reference(name) if item.holds_at(at))

    def registers(self, name: str) -> Mapping[int, tuple[Reference, ...]]:
        """Return the registers of field *name* (rtmrs, pcrs); empty if they are not compared."""
        if name not in REGISTERS:
            raise KeyError(name)
        return getattr(self, name) or MappingProxyType({})

    def unaccepted_advisories(self, advisories: Iterable[str]) -> tuple[str, ...]:
        """Return those of a platform's *advisories* that are not accepted, sorted."""
        if ANY in self.accepted_advisories:
            return ()
        return tuple(sorted(set(advisories) - set(self.accepted_advisories)))

    @property
    def measurements(self) -> tuple[bytes, ...]:
        """The accepted MRENCLAVEs, whatever their windows; empty if not compared."""
        return tuple(item.value for item in self.reference("mrenclave"))

    @property
    def signers(self) -> tuple[bytes, ...]:
        """The accepted MRSIGNERs, whatever their windows; empty if not compared."""
        return tuple(item.value for item in self.reference("mrsigner"))

    @classmethod
    def any_code(cls, **options: Any) -> Self:
        """Accept whatever code runs: the result is never `identified`."""
        return cls(accept_any_code=True, **options)

    @classmethod
    def strict(cls) -> Self:
        """Genuine, no debug, TCB up to date, no software platform; any code."""
        return cls.any_code()

    @classmethod
    def permissive(cls) -> Self:
        """Genuine is enough."""
        return cls.any_code(
            allow_debug=True,
            allow_migration_agent=True,
            allow_masked_chip_id=True,
            allow_unknown_td_features=True,
            dangerous_allow_software=True,
            tcb_statuses=TCB_STATUSES,
            accepted_advisories=(ANY,),
            ear_tiers=EAR_TIERS,
            require_collateral=False,
        )

    @classmethod
    def from_image(
        cls,
        image: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        any_version_of_signer: bool = False,
        **options: Any,
    ) -> Self:
        """
        Make a policy from an image file that the relying party itself holds.

        Measurement, signer, product and security version of the image become reference values.

        Args:
            image: Path, or the bytes of the image.
            any_version_of_signer: Leave the measurement out: later (not older) versions of the
                same signer and product are accepted too. Signed images only.
            options: Further fields of the policy.

        Raises:
            ImageError: Not a valid image, or its signature does not hold.
            ValueError: The image is not signed and *any_version_of_signer* is asked for.

        """
        from pyenclave.formats.image import MAX_IMAGE, Image
        from pyenclave.measurement.image import verify_image

        data = (
            bytes(image)
            if isinstance(image, bytes | bytearray | memoryview)
            else read_file(image, limit=MAX_IMAGE)
        )
        signed = verify_image(Image.parse(data))
        is_signed = any(signed.mrsigner)
        if any_version_of_signer and not is_signed:
            raise ValueError("an unsigned image is identified by its measurement only")
        values: dict[str, Any] = {
            "product_id": signed.product_id,
            "min_security_version": signed.security_version,
        }
        if not any_version_of_signer:
            values["mrenclave"] = signed.mrenclave
        if is_signed:
            values["mrsigner"] = signed.mrsigner
        return cls(**(values | options))

    def with_options(self, **changes: Any) -> Self:
        """Return a copy with *changes*."""
        return replace(self, **changes)

    @classmethod
    def from_text(cls, text: str, *, form: str) -> Self:
        """
        Read a policy from JSON or TOML: the fields' names, digests in hexadecimal digits.

        A reference value may also be a table ``{value, not_before, not_after}`` with RFC 3339
        times.

        Args:
            text: The text.
            form: ``json`` or ``toml``.

        Raises:
            ValueError: Too large, not well-formed, an unknown or doubled field, or a wrong value.

        """
        from pyenclave.attestation import policy_text

        if len(text) > MAX_FILE:
            raise ValueError(f"policy: more than {MAX_FILE} characters")
        values = policy_text.values_of(text, form=form)
        known = {item.name for item in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"policy: unknown field {name!r}{policy_text.hint(name, known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"policy: {error}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """
        Read a policy file: TOML if its name ends in ``.toml``, else JSON.

        Raises:
            OSError: The file cannot be read, or is too large.
            ValueError: It is no policy.

        """
        from pathlib import Path

        path = Path(path)
        data = read_file(path, limit=MAX_FILE)
        form = "toml" if path.suffix == ".toml" else "json"
        return cls.from_text(data.decode("utf-8"), form=form)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as `from_text` reads them."""
        from pyenclave.attestation import policy_text

        return policy_text.plain(self)

    def to_text(self, *, form: str = "toml") -> str:
        """
        Return the policy as JSON or TOML, as `from_text` reads it.

        Raises:
            ValueError: *form* is neither ``json`` nor ``toml``.

        """
        from pyenclave.attestation import policy_text

        return policy_text.text_of(self, form=form)

    def describe(self, *, at: datetime | None = None) -> tuple[str, ...]:
        """
        Say in sentences what is demanded and what is not.

        Args:
            at: Say of each reference value whether it is accepted at this time.

        """
        from pyenclave.attestation import policy_words

        return policy_words.describe(self, at=at)


def _restore(cls: type[AppraisalPolicy], values: dict[str, Any]) -> AppraisalPolicy:
    return cls(**values)
