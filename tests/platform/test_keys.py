"""EGETKEY and EREPORT: separation, order of versions, refusals."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from cryptography.hazmat.primitives import cmac, hashes
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pyenclave._platform.keys import Keys, attributes, cpu_svn, dependencies
from pyenclave._platform.report import make_report, verify_report
from pyenclave._platform.root import PlatformRoot
from pyenclave.errors import EvidenceFormatError, SealingError, UnsealError
from pyenclave.formats.sgx import (
    FLAG_DEBUG,
    FLAG_EINITTOKEN_KEY,
    FLAG_KSS,
    FLAG_PROVISION_KEY,
    Attributes,
    KeyRequest,
    Report,
    ReportBody,
    TargetInfo,
)

SECRET = bytes(range(32))
MRENCLAVE, MRSIGNER, NOISVPRODID, CONFIGID, FAMILY, EXT = 1, 2, 4, 8, 16, 32


def root(level: str = "embedded", secret: bytes = SECRET) -> PlatformRoot:
    return PlatformRoot(bytearray(secret), level=level, ephemeral=False)


def identity(**changes: Any) -> ReportBody:
    base = ReportBody(
        cpu_svn=cpu_svn(),
        attributes=attributes(debug=False),
        mrenclave=b"E" * 32,
        mrsigner=b"S" * 32,
        isv_prod_id=3,
        isv_svn=5,
    )
    return dataclasses.replace(base, **changes)


def kss(**changes: Any) -> ReportBody:
    flags = attributes(debug=False).flags | FLAG_KSS
    values: dict[str, Any] = {
        "attributes": Attributes(flags=flags, xfrm=0x3),
        "config_svn": 4,
        "config_id": b"C" * 64,
        "isv_family_id": b"F" * 16,
        "isv_ext_prod_id": b"X" * 16,
    }
    return identity(**{**values, **changes})


def seal(**changes: Any) -> KeyRequest:
    return KeyRequest(**{"key_name": 4, "key_policy": MRSIGNER, **changes})


@pytest.mark.parametrize(
    ("request_changes", "body", "text"),
    [
        ({"key_name": 5}, identity(), "INVALID_KEYNAME"),
        ({"key_name": 0xFFFF}, identity(), "INVALID_KEYNAME"),
        ({"key_name": 0}, identity(), "INVALID_ATTRIBUTE"),
        ({"key_name": 1}, identity(), "INVALID_ATTRIBUTE"),
        ({"key_name": 2}, identity(), "INVALID_ATTRIBUTE"),
        ({"key_policy": 0x40}, identity(), "#GP: reserved"),
        ({"key_policy": 0x8000}, kss(), "#GP: reserved"),
        ({"key_policy": NOISVPRODID}, identity(), "KSS"),
        ({"key_policy": CONFIGID}, identity(), "KSS"),
        ({"key_policy": FAMILY}, identity(), "KSS"),
        ({"key_policy": EXT}, identity(), "KSS"),
        ({"config_svn": 1}, identity(config_svn=1), "KSS"),
        ({"config_svn": 5}, kss(), "CONFIGSVN"),
        ({"isv_svn": 6}, identity(), "INVALID_ISVSVN"),
        ({"isv_svn": 0xFFFF}, identity(), "INVALID_ISVSVN"),
        ({"cpu_svn": b"\xff" * 16}, identity(), "INVALID_CPUSVN"),
        ({"cpu_svn": cpu_svn(2)}, identity(), "INVALID_CPUSVN"),
        ({"cpu_svn": b"\0" * 15 + b"\1"}, identity(), "INVALID_CPUSVN"),
        ({"key_policy": MRSIGNER}, identity(mrsigner=bytes(32)), "unsigned"),
        ({"key_policy": MRSIGNER | MRENCLAVE}, identity(mrsigner=bytes(32)), "unsigned"),
    ],
)
def test_a_request_that_egetkey_refuses_is_refused(
    request_changes: dict[str, Any], body: ReportBody, text: str
) -> None:
    with pytest.raises(SealingError, match=text):
        dependencies(seal(**request_changes), body)


def test_reserved_bytes_of_a_request_must_be_zero() -> None:
    data = seal().to_bytes()
    reserved = [6, 7, *range(78, 512)]
    for at in reserved:
        changed = bytearray(data)
        changed[at] = 1
        with pytest.raises(EvidenceFormatError):
            KeyRequest.from_bytes(bytes(changed))


def test_every_difference_gives_another_key() -> None:
    """Root, level, debug, policy, mask, SVN, key id, identity: pairwise different keys."""
    debug = attributes(debug=True)
    cases: list[tuple[str, PlatformRoot, KeyRequest, ReportBody]] = [
        ("plain", root(), seal(), identity()),
        ("other root", root(secret=b"r" * 32), seal(), identity()),
        ("other level", root("service"), seal(), identity()),
        ("debug", root(), seal(), identity(attributes=debug)),
        ("debug, mask all", root(), seal(attribute_mask=ALL), identity(attributes=debug)),
        ("mask all", root(), seal(attribute_mask=ALL), identity()),
        ("mask flags", root(), seal(attribute_mask=FLAGS), identity()),
        ("mask debug", root(), seal(attribute_mask=Attributes(flags=FLAG_DEBUG)), identity()),
        ("unique", root(), seal(key_policy=MRENCLAVE), identity()),
        ("both", root(), seal(key_policy=MRENCLAVE | MRSIGNER), identity()),
        ("any", root(), seal(key_policy=0), identity()),
        ("other code", root(), seal(key_policy=MRENCLAVE), identity(mrenclave=b"e" * 32)),
        ("other signer", root(), seal(), identity(mrsigner=b"s" * 32)),
        ("other product", root(), seal(), identity(isv_prod_id=4)),
        ("any, other product", root(), seal(key_policy=0), identity(isv_prod_id=4)),
        ("key id", root(), seal(key_id=b"k" * 32), identity()),
        ("misc mask", root(), seal(misc_mask=1), identity()),
        ("cpu svn", root(), seal(cpu_svn=cpu_svn(1)), identity()),
        ("kss", root(), seal(attribute_mask=ALL), kss()),
    ]
    cases += [(f"svn {n}", root(), seal(isv_svn=n), identity()) for n in range(1, 6)]
    cases += [
        (f"kss policy {bits:#x}", root(), seal(key_policy=bits, attribute_mask=ALL), kss())
        for bits in range(64)
        if bits != MRSIGNER
    ]
    policy = MRSIGNER | CONFIGID
    cases += [
        (f"config svn {n}", root(), seal(key_policy=policy, config_svn=n, misc_mask=2), kss())
        for n in range(5)
    ]
    seen: dict[bytes, str] = {}
    for name, platform, request, body in cases:
        key = Keys(platform).get_key(request, body)
        assert len(key) == 32
        assert key not in seen, f"{name} has the key of {seen[key]}"
        seen[key] = name


ALL = Attributes(flags=(1 << 64) - 1, xfrm=(1 << 64) - 1)
FLAGS = Attributes(flags=(1 << 64) - 1)


def test_what_a_key_does_not_bind_does_not_change_it() -> None:
    keys = Keys(root())
    signer = keys.get_key(seal(), identity())
    assert signer == keys.get_key(seal(), identity(mrenclave=b"new" + b"E" * 29))
    assert signer == keys.get_key(seal(), identity(isv_svn=900))  # migration forward
    assert signer == keys.get_key(seal(), identity(report_data=b"d" * 64, config_id=b"c" * 64))
    assert signer == Keys(root()).get_key(seal(), identity())
    unique = keys.get_key(seal(key_policy=MRENCLAVE), identity())
    assert unique == keys.get_key(seal(key_policy=MRENCLAVE), identity(mrsigner=b"s" * 32))


@pytest.mark.parametrize("sealed", range(7))
@pytest.mark.parametrize("own", range(7))
def test_sea_01_older_code_never_gets_the_key_of_newer(sealed: int, own: int) -> None:
    keys = Keys(root())
    if sealed > own:
        with pytest.raises(SealingError, match="INVALID_ISVSVN"):
            keys.get_key(seal(isv_svn=sealed), identity(isv_svn=own))
    else:
        key = keys.get_key(seal(isv_svn=sealed), identity(isv_svn=own))
        assert key == keys.get_key(seal(isv_svn=sealed), identity(isv_svn=sealed))


def test_sea_06_no_mask_lets_debug_and_production_share_a_key() -> None:
    keys = Keys(root())
    debug = identity(attributes=attributes(debug=True))
    for policy, mask in itertools.product(range(4), (Attributes(), ALL, Attributes(flags=1))):
        request = seal(key_policy=policy, attribute_mask=mask)
        assert keys.get_key(request, debug) != keys.get_key(request, identity())


@pytest.mark.parametrize("name", [0, 1, 2, 3])
def test_enclaves_get_seal_keys_only(name: int) -> None:
    flags = attributes(debug=False).flags | FLAG_PROVISION_KEY | FLAG_EINITTOKEN_KEY
    strong = identity(attributes=Attributes(flags=flags, xfrm=3))
    with pytest.raises(SealingError, match="INVALID_KEYNAME"):
        Keys(root()).get_key(seal(key_name=name), strong)
    assert len(Keys(root()).get_key_128(seal(key_name=name), strong)) == 16


def test_the_256_bit_key_is_hkdf_over_the_documented_structure() -> None:
    """Computed again with an independent implementation of HKDF."""
    request = seal(key_policy=3, isv_svn=2, key_id=bytes(range(32)), attribute_mask=FLAGS)
    body = identity()
    structure = bytearray(432)
    structure[0:2] = (4).to_bytes(2, "little")
    structure[2:4] = (3).to_bytes(2, "little")
    structure[4:6] = (2).to_bytes(2, "little")
    structure[6:8] = (3).to_bytes(2, "little")
    structure[32:40] = (0x5).to_bytes(8, "little")
    structure[48:56] = b"\xff" * 8
    structure[68:72] = b"\xff" * 4
    structure[112:144] = b"E" * 32
    structure[144:176] = b"S" * 32
    structure[240:272] = bytes(range(32))
    assert dependencies(request, body) == bytes(structure)
    info = bytes(structure) + (8).to_bytes(4, "little") + b"embedded" + b"\0"
    expected = HKDF(hashes.SHA256(), 32, b"pyenclave/seal/1", info).derive(SECRET)
    assert Keys(root()).get_key(request, body) == expected


def test_the_128_bit_key_is_the_cmac_of_the_structure() -> None:
    platform = root()
    mac = cmac.CMAC(AES(platform.derive("egetkey/4", 16)))
    mac.update(dependencies(seal(), identity()))
    assert Keys(platform).get_key_128(seal(), identity()) == mac.finalize()


def report(keys: Keys, target: ReportBody, data: bytes = b"d" * 64) -> Report:
    sender = identity(mrenclave=b"A" * 32)
    return make_report(keys, sender, target=TargetInfo.of(target), data=data, key_id=b"i" * 32)


def test_only_its_target_verifies_a_report() -> None:
    keys = Keys(root())
    target = identity(config_id=b"c" * 64)
    made = report(keys, target)
    verify_report(keys, target, Report.from_bytes(made.to_bytes()))
    others = [
        identity(config_id=b"C" * 64),
        identity(config_id=b"c" * 64, mrenclave=b"e" * 32),
        identity(config_id=b"c" * 64, attributes=attributes(debug=True)),
        identity(config_id=b"c" * 64, misc_select=1),
        identity(config_id=b"c" * 64, config_svn=1),
    ]
    for other in others:
        with pytest.raises(UnsealError, match="MAC of the report"):
            verify_report(keys, other, made)
    for elsewhere in (root("service"), root(secret=b"x" * 32)):
        with pytest.raises(UnsealError):
            verify_report(Keys(elsewhere), target, made)


def test_any_flipped_byte_of_a_report_is_refused() -> None:
    keys = Keys(root())
    target = identity()
    data = report(keys, target).to_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises((UnsealError, EvidenceFormatError)):
            verify_report(keys, target, Report.from_bytes(bytes(changed)))


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_has_64_bytes(size: int) -> None:
    with pytest.raises(EvidenceFormatError):
        report(Keys(root()), identity(), bytes(size))


def test_the_root_secret_is_wiped_once_keys_are_derived() -> None:
    secret = bytearray(SECRET)
    PlatformRoot(secret, level="embedded", ephemeral=False)
    assert secret == bytes(32)
