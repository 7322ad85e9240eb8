"""Launch digests and MRTD: refusals, a slow reference, another project's tool."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave.errors import MeasurementError
from pyenclave.measurement import _launch, sev, tdx, vmsa
from pyenclave.measurement.ovmf import Firmware, SevLayout, SevSection

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., bytearray]

SECTIONS = [(0x800000, 0x3000, 1), (0x80D000, 4096, 2), (0x80E000, 4096, 3), (0x80F000, 4096, 4)]
HASHES = (0x810000, 4096, 16)
DEBIAN = Path("/usr/share/ovmf/OVMF.fd")


@pytest.fixture(params=["native", "python"])
def chain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the chains."""
    if request.param == "python":
        monkeypatch.setattr(_launch, "snp_chain", _launch.PurePythonSnp)
        monkeypatch.setattr(_launch, "tdx_chain", _launch.PurePythonTdx)
    return request.param


# ---- refusals ---------------------------------------------------------------------------------


def test_arguments_that_cannot_be_are_refused(firmware: Build) -> None:
    data = firmware(sev=SECTIONS)
    good: dict[str, Any] = {"vcpus": 1, "vcpu_type": "EPYC"}
    for wrong in (
        {"vcpus": 0},
        {"vcpus": -1},
        {"vcpus": 1 << 20},
        {"vcpu_type": None},
        {"vcpu_sig": 1},
        {"vcpu_type": None, "vcpu_sig": 1 << 32},
        {"vmm": "xen"},
        {"guest_features": -1},
        {"guest_features": 1 << 64},
        {"ovmf_hash": bytes(32)},
        {"initrd": b""},
        {"append": "x"},
        {"kernel": b"", "append": "a\0b"},
        {"kernel": b"", "append": "\udcff"},
    ):
        with pytest.raises(ValueError, match=r"."):
            sev.snp_launch_digest(data, **(good | wrong))
    for missing in ({}, {"layout": SevLayout(())}, {"ovmf_hash": bytes(48)}):
        with pytest.raises(ValueError, match="without a firmware"):
            sev.snp_launch_digest(None, **good, **missing)  # type: ignore[arg-type]


def test_firmware_that_does_not_fit_the_question_is_refused(firmware: Build) -> None:
    with pytest.raises(MeasurementError, match="unknown vCPU type"):
        sev.snp_launch_digest(firmware(sev=SECTIONS), vcpus=1, vcpu_type="EPYC-Naples")
    with pytest.raises(MeasurementError, match="not one for SEV-SNP"):
        sev.snp_launch_digest(firmware(), vcpus=1, vcpu_type="EPYC")
    with pytest.raises(MeasurementError, match="not whole pages"):
        sev.snp_launch_digest(firmware(16383, sev=SECTIONS), vcpus=1, vcpu_type="EPYC")
    with pytest.raises(MeasurementError, match="further processors"):
        sev.snp_launch_digest(firmware(sev=SECTIONS, reset=None), vcpus=2, vcpu_type="EPYC")
    with pytest.raises(MeasurementError, match="further processors"):
        sev.sev_es_launch_digest(firmware(reset=None), vcpus=2, vcpu_type="EPYC")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sev": SECTIONS, "hashes": (0x810C00, 1024)}, "no kernel-hashes section"),
        ({"sev": [HASHES], "hashes": None}, "does not check one"),
        ({"sev": [HASHES], "hashes": (0, 1024)}, "does not check one"),
        ({"sev": [(0x810000, 8192, 16)], "hashes": (0x810C00, 1024)}, "one page"),
        ({"sev": [HASHES], "hashes": (0x810F60, 1024)}, "crosses a page"),
    ],
)
def test_a_kernel_that_the_firmware_cannot_check_is_refused(
    firmware: Build, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(MeasurementError, match=match):
        sev.snp_launch_digest(firmware(**changes), vcpus=1, vcpu_type="EPYC", kernel=b"k")


def test_a_kernel_for_sev_needs_a_place_for_its_hashes(firmware: Build) -> None:
    for changes in ({}, {"hashes": (0, 1024)}):
        with pytest.raises(MeasurementError, match="does not check one"):
            sev.sev_launch_digest(firmware(**changes), kernel=b"")
        with pytest.raises(MeasurementError, match="does not check one"):
            sev.sev_es_launch_digest(firmware(**changes), vcpus=1, vcpu_type="EPYC", kernel=b"")


def test_an_svsm_image_must_be_one(firmware: Build) -> None:
    data = firmware(sev=SECTIONS)
    with pytest.raises(MeasurementError, match="no entry point"):
        sev.svsm_launch_digest(data, data, vcpus=1, vcpu_type="EPYC")
    with pytest.raises(MeasurementError, match="no entry point"):
        sev.svsm_launch_digest(data, firmware(svsm=1 << 20), vcpus=1, vcpu_type="EPYC")
    for wrong in (-4096, 1, 1 << 32):
        with pytest.raises(ValueError, match="vars_size"):
            sev.svsm_launch_digest(data, data, vcpus=1, vcpu_type="EPYC", vars_size=wrong)


@pytest.mark.parametrize("name", ["PurePythonSnp", "SnpMeasurement"])
def test_a_chain_refuses_what_is_no_page(name: str) -> None:
    value = getattr(_launch, name, None) or getattr(_core, name)
    with pytest.raises(ValueError, match="48 bytes"):
        value(bytes(32))
    chain = value()
    for attempt in (
        lambda: chain.add_pages(bytes(4095), 0),
        lambda: chain.add_pages(bytes(4096), 1),
        lambda: chain.add_pages(bytes(8192), (1 << 52) - 4096),
        lambda: chain.add_pages(bytes(4096), 0, _launch.PAGE_ZERO),
        lambda: chain.add_empty(1, 2048, _launch.PAGE_ZERO),
        lambda: chain.add_empty(1, 0, _launch.PAGE_NORMAL),
        lambda: chain.add_empty(1, 0, 7),
        lambda: chain.add_empty((1 << 40) + 1, 0, _launch.PAGE_ZERO),
        lambda: chain.add_same(bytes(8192), 1, 0, _launch.PAGE_VMSA),
        lambda: chain.add_same(bytes(4096), 1, 5, _launch.PAGE_VMSA),
        lambda: chain.add_same(bytes(4096), 1, 0, _launch.PAGE_CPUID),
    ):
        with pytest.raises(ValueError, match=r"."):
            attempt()
    assert chain.digest() == bytes(48)


@pytest.mark.parametrize("name", ["PurePythonTdx", "TdxMeasurement"])
def test_an_mrtd_refuses_what_is_no_page(name: str) -> None:
    chain = (getattr(_launch, name, None) or getattr(_core, name))()
    for attempt in (
        lambda: chain.extend(bytes(4095), 0),
        lambda: chain.extend(bytes(4096), 1),
        lambda: chain.add_and_extend(bytes(4096), 1 << 52),
        lambda: chain.add_pages(1, 4095),
        lambda: chain.add_pages(2, (1 << 52) - 4096),
    ):
        with pytest.raises(ValueError, match=r"."):
            attempt()
    assert chain.digest() == hashlib.sha384().digest()


# ---- a slow reference -------------------------------------------------------------------------


def link(value: bytes, contents: bytes, page_type: int, gpa: int) -> bytes:
    info = value + contents + struct.pack("<HBBIQ", 0x70, page_type, 0, 0, gpa)
    assert len(info) == 0x70
    return hashlib.sha384(info).digest()


def by_hand(
    data: bytes, sections: list[tuple[int, int, int]], vmm: str, pages: list[bytes]
) -> bytes:
    value = bytes(48)
    for at in range(0, len(data), 4096):
        contents = hashlib.sha384(data[at : at + 4096]).digest()
        value = link(value, contents, 1, (1 << 32) - len(data) + at)
    late = [s for s in sections if s[2] == 3 and vmm == "ec2"]
    for gpa, size, kind in [s for s in sections if s not in late] + late:
        page_type = {1: 4 if vmm == "gce" else 3, 2: 5, 3: 6, 4: 3, 16: 3}[kind]
        for at in range(0, size, 4096):
            value = link(value, bytes(48), page_type, gpa + at)
    for page in pages:
        value = link(value, hashlib.sha384(page).digest(), 2, 0xFFFFFFFFF000)
    return value


@pytest.mark.parametrize("vmm", ["qemu", "ec2", "gce"])
def test_an_snp_digest_equals_the_chain_by_hand(firmware: Build, chain: str, vmm: vmsa.Vmm) -> None:
    data = firmware(sev=[*SECTIONS, HASHES])
    pages = [
        vmsa.vmsa_page(eip, vmm=vmm, signature=0xA00F11, guest_features=0x21)
        for eip in (vmsa.BOOT_EIP, 0x80B004, 0x80B004)
    ]
    found = sev.snp_launch_digest(data, vcpus=3, vcpu_sig=0xA00F11, vmm=vmm, guest_features=0x21)
    assert found == by_hand(bytes(data), [*SECTIONS, HASHES], vmm, pages), chain


def test_an_ovmf_hash_stands_for_the_firmwares_pages(firmware: Build, chain: str) -> None:
    data = firmware(sev=SECTIONS)
    whole = sev.snp_launch_digest(data, vcpus=2, vcpu_type="EPYC-Rome")
    start = sev.ovmf_hash(data)
    for source, layout in ((data, None), (None, Firmware(data).sev)):
        found = sev.snp_launch_digest(
            source, layout=layout, ovmf_hash=start, vcpus=2, vcpu_type="EPYC-Rome"
        )
        assert found == whole, chain


@pytest.mark.parametrize("two_pass", [False, True])
def test_an_mrtd_equals_the_records_by_hand(firmware: Build, chain: str, two_pass: bool) -> None:
    sections = [
        (4096, 8192, 0xFFFFD000, 8192, 0, 1),
        (0, 4096, 0xFFFFC000, 4096, 1, 0),
        (0, 0, 0x809000, 8192, 2, 0),
        (0, 0, 0x100000000, 8192, 4, 2),
    ]
    data = bytes(firmware(tdx=sections))
    stream = b""
    for offset, _, address, size, _, attributes in sections:
        added, extended = [], []
        for at in range(0, size, 4096):
            record = b"MEM.PAGE.ADD".ljust(16, b"\0") + struct.pack("<Q", address + at)
            added.append(record.ljust(128, b"\0") if attributes & 2 == 0 else b"")
            chunks = b""
            for c in range(at, at + 4096, 256) if attributes & 1 else ():
                record = b"MR.EXTEND".ljust(16, b"\0") + struct.pack("<Q", address + c)
                chunks += record.ljust(128, b"\0") + data[offset + c : offset + c + 256]
            extended.append(chunks)
        if two_pass:
            stream += b"".join(added) + b"".join(extended)
        else:
            stream += b"".join(a + e for a, e in zip(added, extended, strict=True))
    wanted = hashlib.sha384(stream).digest()
    assert tdx.mrtd(data, two_pass=two_pass) == wanted, chain


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0xFFFFFFDF, 0], ids=["best", "no avx512", "portable"])
def test_page_digests_do_not_depend_on_the_cpu(mask: int) -> None:
    generator = hashlib.shake_128(b"pages").digest(27 * 4096)
    _core.cpu_set_mask(mask)
    try:
        for count in [*range(18), 27]:
            for shift in (0, 1) if count < 27 else (0,):
                data = generator[shift * 7 :][: count * 4096]
                wanted = b"".join(
                    hashlib.sha384(data[at : at + 4096]).digest()
                    for at in range(0, len(data), 4096)
                )
                assert _core.snp_page_digests(data) == wanted, (count, _core.snp_variant())
    finally:
        _core.cpu_set_mask(0xFFFFFFFF)
    with pytest.raises(ValueError, match="whole pages"):
        _core.snp_page_digests(bytes(100))


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0xFFFFFFDF, 0], ids=["best", "no avx512", "portable"])
def test_pages_of_padding_among_others_keep_their_digests(mask: int) -> None:
    """Pages of one repeated word take a short cut; nearly such pages must not."""
    kinds = [bytes(4096), b"\xff" * 4096, b"8 bytes!" * 512, bytes(4095) + b"\1"]
    kinds += [b"\1" + bytes(4095), bytes(8) + b"\1" + bytes(4087), bytes(range(256)) * 16]
    generator = random.Random(13)
    _core.cpu_set_mask(mask)
    try:
        for count in range(1, 150, 7):
            pages = [generator.choice(kinds) for _ in range(count)]
            wanted = b"".join(hashlib.sha384(page).digest() for page in pages)
            assert _core.snp_page_digests(b"".join(pages)) == wanted
            native, python = _core.SnpMeasurement(), _launch.PurePythonSnp()
            for chain in (native, python):
                chain.add_pages(b"".join(pages), 4096)
            assert native.digest() == python.digest()
    finally:
        _core.cpu_set_mask(0xFFFFFFFF)


@settings(max_examples=40, deadline=None)
@given(
    pages=st.integers(1, 70),
    seed=st.binary(max_size=4),
    gpa=st.integers(0, (1 << 40) - 80).map(lambda page: page * 4096),
    empty=st.tuples(st.integers(0, 20), st.integers(3, 6)),
    same=st.integers(0, 5),
    start=st.one_of(st.none(), st.binary(min_size=48, max_size=48)),
)
def test_native_and_python_chains_are_the_same(
    pages: int, seed: bytes, gpa: int, empty: tuple[int, int], same: int, start: bytes | None
) -> None:
    data = hashlib.shake_128(seed).digest(pages * 4096)
    native, python = _core.SnpMeasurement(start), _launch.PurePythonSnp(start)
    for value in (native, python):
        value.add_pages(data, gpa)
        value.add_empty(empty[0], gpa, empty[1])
        value.add_same(data[:4096], same, gpa, 2)
    assert native.digest() == python.digest()
    assert native.num_pages == pages + empty[0] + same
    mrtds = _core.TdxMeasurement(), _launch.PurePythonTdx()
    for mrtd in mrtds:
        mrtd.add_pages(same, gpa)
        mrtd.add_and_extend(data, gpa)
        mrtd.extend(data[: 2 * 4096], gpa)
    assert mrtds[0].digest() == mrtds[1].digest()


# ---- processors and kernels -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("EPYC", 0x800F12),
        ("EPYC-v4", 0x800F12),
        ("EPYC-IBPB", 0x800F12),
        ("EPYC-Rome-v3", 0x830F10),
        ("EPYC-Milan-v2", 0xA00F11),
        ("EPYC-Genoa", 0xA10F10),
        ("EPYC-Turin", 0xB00F00),
    ],
)
def test_a_vcpu_type_has_its_signature(name: str, signature: int) -> None:
    assert vmsa.vcpu_signature(name) == signature


def test_a_signature_is_made_of_family_model_and_stepping() -> None:
    assert vmsa.cpu_signature(25, 17, 0) == 0xA10F10
    assert vmsa.cpu_signature(6, 0x8F, 8) == 0x806F8 & 0xFFFF0FFF | 0x600
    for wrong in ((271, 0, 0), (-1, 0, 0), (25, 256, 0), (25, 0, 16)):
        with pytest.raises(ValueError, match="no processor"):
            vmsa.cpu_signature(*wrong)


def test_the_kernel_hashes_table_has_its_layout() -> None:
    table = sev.KernelHashes.of(b"kernel", None, "é").table()
    assert (len(table), table[16:18]) == (176, b"\xa8\0")
    digests = [table[at : at + 32] for at in (36, 86, 136)]
    assert digests == [
        hashlib.sha256("é".encode() + b"\0").digest(),
        hashlib.sha256(b"").digest(),
        hashlib.sha256(b"kernel").digest(),
    ]
    with pytest.raises(ValueError, match="32 bytes"):
        sev.KernelHashes(b"", bytes(32), bytes(32))


# ---- a second opinion -------------------------------------------------------------------------


def oracle_digest(path: Path, mode: str, kwargs: dict[str, Any]) -> bytes:
    guest = pytest.importorskip("sevsnpmeasure.guest", reason="sev-snp-measure is not installed")
    from sevsnpmeasure.sev_mode import SevMode
    from sevsnpmeasure.vcpu_types import CPU_SIGS
    from sevsnpmeasure.vmm_types import VMMType

    return bytes(
        guest.calc_launch_digest(
            SevMode.from_str(mode),
            kwargs.get("vcpus", 1),
            CPU_SIGS[kwargs.get("vcpu_type", "EPYC")],
            str(path),
            kwargs.get("kernel"),
            kwargs.get("initrd"),
            kwargs.get("append"),
            kwargs.get("guest_features", 1),
            vmm_type={"qemu": VMMType.QEMU, "ec2": VMMType.ec2, "gce": VMMType.gce}[
                kwargs.get("vmm", "qemu")
            ],
        )
    )


def compare(path: Path, tmp_path: Path, kernel: bool) -> int:
    data = path.read_bytes()
    named = {}
    if kernel:
        for name in ("kernel", "initrd"):
            (tmp_path / name).write_bytes(name.encode() * 1000)
            named[name] = str(tmp_path / name)
        named["append"] = "root=/dev/vda quiet é"
    ours: dict[str, Any] = {
        name: Path(value).read_bytes() if name != "append" else value
        for name, value in named.items()
    }
    count = 0
    for vcpu_type in ("EPYC", "EPYC-v3", "EPYC-Rome-v2", "EPYC-Milan", "EPYC-Genoa", "EPYC-Turin"):
        for vcpus in (1, 2, 7):
            for vmm in ("qemu", "ec2", "gce"):
                common: dict[str, Any] = {"vcpus": vcpus, "vcpu_type": vcpu_type, "vmm": vmm}
                for features in (0, 1, 0x21) if vcpus == 2 else (1,):
                    more = common | {"guest_features": features}
                    wanted = oracle_digest(path, "snp", more | named)
                    assert sev.snp_launch_digest(data, **more, **ours) == wanted, more
                    count += 1
                wanted = oracle_digest(path, "seves", common | named)
                assert sev.sev_es_launch_digest(data, **common, **ours) == wanted, common
                count += 1
    assert sev.sev_launch_digest(data, **ours) == oracle_digest(path, "sev", named)
    return count + 1


def test_sev_snp_measure_agrees_on_firmware_made_here(firmware: Build, tmp_path: Path) -> None:
    path = tmp_path / "firmware.fd"
    path.write_bytes(firmware(sev=[*SECTIONS, HASHES], hashes=(0x810C00, 1024)))
    assert compare(path, tmp_path, kernel=False) == 145
    assert compare(path, tmp_path, kernel=True) == 145


def test_sev_snp_measure_agrees_on_debians_ovmf(tmp_path: Path, vectors: Path) -> None:
    path = DEBIAN if DEBIAN.is_file() else vectors / "measurement/_common/debian_OVMF.fd"
    assert compare(path, tmp_path, kernel=False) == 145


def test_sev_snp_measure_agrees_on_a_guest_under_svsm(firmware: Build, tmp_path: Path) -> None:
    guest = pytest.importorskip("sevsnpmeasure.guest", reason="sev-snp-measure is not installed")
    (tmp_path / "fw").write_bytes(firmware())
    image = firmware(32768, sev=[*SECTIONS, HASHES], svsm=0x1234, fill=3)
    (tmp_path / "svsm").write_bytes(image)
    for vcpus, vars_size in ((1, 0), (4, 8192)):
        wanted = guest.svsm_calc_launch_digest(
            vcpus, 0xA00F11, str(tmp_path / "fw"), vars_size, str(tmp_path / "svsm"), False
        )
        found = sev.svsm_launch_digest(
            firmware(), image, vcpus=vcpus, vcpu_sig=0xA00F11, vars_size=vars_size
        )
        assert found == wanted


def test_the_steps_end_in_the_digest_and_name_what_is_measured(firmware: Build) -> None:
    data = firmware(sev=[*SECTIONS, HASHES])
    steps = sev.snp_steps(data, vcpus=2, vcpu_type="EPYC")
    assert [step.name for step in steps] == [
        "firmware",
        "memory",
        "secrets",
        "CPUID",
        "SVSM calling area",
        "kernel hashes",
        "boot processor",
        "other processors",
    ]
    assert steps[0].digest == sev.ovmf_hash(data)
    assert steps[-1].digest == sev.snp_launch_digest(data, vcpus=2, vcpu_type="EPYC")
    assert steps[1] == sev.LaunchStep("memory", 3, 0x800000, 3, steps[1].digest)
    assert SevSection(*SECTIONS[0]).name == "memory"
