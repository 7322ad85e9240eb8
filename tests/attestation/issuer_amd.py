"""Synthetic AMD chips with flaws, for the tests of every kind of evidence that has one inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from pyenclave.attestation import AppraisalPolicy
from pyenclave.formats import der
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.certificates import Key, certificate, crl, name

AT = datetime(2026, 7, 1, tzinfo=UTC)
DAY = timedelta(days=1)
NONCE = bytes(range(1, 33))
DIGEST = bytes(range(48))  # what AmdChip's reports measure
ALGORITHM = "rsa-pss-sha384"
FORGER = 2  # number of an RSA key that AMD does not have


@dataclass
class Made:
    """A chip, the files beside its reports, and the root that a relying party pins."""

    chip: AmdChip
    files: dict[str, bytes]
    root: bytes


Build = Callable[[], Made]


def amd_name(common: str) -> bytes:
    return name(
        OU="Engineering",
        C="US",
        L="Santa Clara",
        ST="CA",
        O="Advanced Micro Devices",
        CN=common,
    )


def ca(place: str, made: AmdChip, changes: Mapping[str, Any]) -> bytes:
    above = made.ark
    own = made.ark if place == "ark" else made.ask
    fields: dict[str, Any] = {
        "subject": own.subject,
        "issuer": above.subject,
        "key": own.key,
        "signer": above.key,
        "algorithm": ALGORITHM,
        "serial": 0x10000 if place == "ark" else 0x10001,
        "ca": True,
        "usages": ("keyCertSign", "cRLSign"),
    }
    return certificate(**(fields | changes))


@cache
def genuine(product: str = "milan", signer: str = "vcek") -> Made:
    return make(product, signer)


def make(product: str = "milan", signer: str = "vcek", **changes: Any) -> Made:
    """
    Return a chip; *changes* by place (``ark``, ``ask``, ``vek``) are arguments of `certificate`.

    ``chip`` are arguments of `AmdChip`, ``crl`` those of `crl`, ``files`` replace whole files.
    """
    chip = AmdChip(product, signer=signer, **changes.get("chip", {}))  # type: ignore[arg-type]
    vek = chip.vek
    if "vek" in changes:
        fields: dict[str, Any] = {
            "subject": amd_name("SEV-VCEK" if signer == "vcek" else "SEV-VLEK"),
            "issuer": chip.ask.subject,
            "key": chip.key,
            "signer": chip.ask.key,
            "algorithm": ALGORITHM,
            "serial": 0,
            "key_ids": False,
        }
        extensions = chip._extensions(changes.get("extensions", {}))
        more = changes["vek"].get("extensions", [])
        vek = certificate(**(fields | changes["vek"] | {"extensions": [*extensions, *more]}))
    ark, ask = (ca(place, chip, changes.get(place, {})) for place in ("ark", "ask"))
    revocation: dict[str, Any] = {
        "issuer": chip.ark.subject,
        "signer": chip.ark.key,
        "algorithm": ALGORITHM,
    }
    files = {
        "vek.der": vek,
        "ask.pem": ask,
        "ark.pem": ark,
        "crl.der": crl(**(revocation | changes.get("crl", {}))),
    }
    files |= changes.get("files", {})
    return Made(chip, {key: data for key, data in files.items() if data is not None}, ark)


def maker(product: str = "milan", signer: str = "vcek", **changes: Any) -> Build:
    return cache(lambda: make(product, signer, **changes))


def forger() -> Key:
    return Key.rsa(index=FORGER)


def forged(place: str) -> Build:
    """The certificate of *place* is signed by somebody else."""
    return cache(lambda: make(**{place: {"signer": forger(), "key_ids": False}}))


def policy(**changes: Any) -> AppraisalPolicy:
    return AppraisalPolicy(**({"launch_digest": DIGEST} | changes))


@dataclass
class Flaw:
    """A chip or report with one thing wrong, or a policy that one thing offends."""

    check: str
    build: Build = genuine
    report: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    edit: Callable[[bytes], bytes] = lambda data: data  # of the signed report
    key: Callable[[], Key | None] = lambda: None  # signs the report in the chip's stead

    def signed(self, report_data: bytes) -> bytes:
        chip = self.build().chip
        fields = {"report_data": report_data} | dict(self.report)
        return self.edit(chip.report(key=self.key(), **fields))


def product_text(text: str) -> dict[str, Any]:
    return {"vek": {}, "extensions": {"2": der.encode_text(text, tag=0x16)}}


def flipped(offset: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


_UNKNOWN = [("1.3.6.1.4.1.99999.1", True, b"\x05\x00")]
_CSP = ("1.3.6.1.4.1.3704.1.5", False, der.encode_text("CN=x", tag=0x16))

FLAWS = [
    Flaw("report.format", report={"version": 6}),
    Flaw("report.format", report={"signature_algo": 2}),
    Flaw("report.format", report={"policy": 1 << 16}),
    Flaw("report.format", report={"policy": 1 << 17 | 1 << 40}),
    Flaw("report.format", edit=flipped(0x2D0)),
    Flaw("report.format", edit=flipped(0x49F)),
    Flaw("report.product", report={"cpuid_fam": 0x17, "cpuid_mod": 1}),
    Flaw("report.product", report={"cpuid_mod": 0x20}),
    Flaw("chain.format", maker(files={"vek.der": None})),
    Flaw("chain.format", maker(files={"vek.der": b"\x30\x03\x02\x01\x00"})),
    Flaw("vek.format", maker(chip={"changes": {"3.8": None}})),
    Flaw("vek.format", maker(chip={"changes": {"3.8": der.encode_integer(256)}})),
    Flaw("vek.format", maker(chip={"changes": {"3.8": b"\x02\x01\xdb"}})),  # negative
    Flaw("vek.format", maker(chip={"changes": {"3.8": b"\x02\x02\x00\x18"}})),  # not minimal
    Flaw("vek.format", maker(chip={"changes": {"2": None}})),
    Flaw("vek.format", maker(chip={"changes": {"4": bytes(63)}})),
    Flaw("vek.format", maker(chip={"changes": {"4": None}})),
    Flaw("vek.format", maker(chip={"more": [_CSP]})),
    Flaw("chain.names", maker(vek={"issuer": amd_name("SEV-Genoa")})),
    Flaw("chain.names", maker(ask={"issuer": amd_name("ARK-Genoa")})),
    Flaw(
        "chain.names",
        maker(
            vek={"issuer": amd_name("SEV-VLEK-Milan")}, ask={"subject": amd_name("SEV-VLEK-Milan")}
        ),
    ),
    Flaw("chain.algorithms", maker(vek={"algorithm": "rsa-pkcs1-sha256"})),
    Flaw("chain.algorithms", maker(ask={"algorithm": "rsa-pkcs1-sha256"})),
    Flaw("chain.constraints", maker(vek={"ca": True})),
    Flaw("chain.constraints", maker(ask={"ca": False})),
    Flaw("chain.constraints", maker(ask={"ca": None})),
    Flaw("chain.constraints", maker(ark={"ca": None})),
    Flaw("chain.constraints", maker(ark={"path_length": 0})),
    Flaw("chain.constraints", maker(vek={"extensions": _UNKNOWN})),
    Flaw("chain.constraints", maker(ask={"extensions": _UNKNOWN})),
    Flaw("chain.key_usage", maker(ask={"usages": ("cRLSign",)})),
    Flaw("chain.key_usage", maker(ask={"usages": None})),
    Flaw("chain.key_usage", maker(vek={"usages": ("keyCertSign", "digitalSignature")})),
    Flaw("chain.key_usage", maker(vek={"usages": ("keyEncipherment",)})),
    Flaw("chain.validity", maker(vek={"not_after": AT - DAY})),
    Flaw("chain.validity", maker(vek={"not_before": AT + DAY})),
    Flaw("chain.validity", maker(ask={"not_after": AT - DAY})),
    Flaw("chain.validity", maker(ark={"not_before": AT + DAY})),
    Flaw("chain.signatures", forged("vek")),
    Flaw("chain.signatures", forged("ask")),
    Flaw("chain.signatures", forged("ark")),
    Flaw(
        "vek.kind",
        maker(signer="vlek", extensions={"4": bytes(range(1, 65)), "5": None}, vek={}),
        {"key_info": 0, "chip_id": bytes(range(1, 65))},
    ),
    Flaw("vek.product", maker(**product_text("Genoa-B0")), {"version": 2}),
    Flaw("crl", maker(crl={"revoked": (0x10001,)})),
    Flaw("crl", maker(crl={"revoked": (5, 0x10000)})),
    Flaw("crl", maker(crl={"next_update": AT - DAY})),
    Flaw("crl", maker(crl={"this_update": AT + DAY})),
    Flaw("crl", maker(crl={"next_update": None})),
    Flaw("crl", maker(crl={"issuer": amd_name("ARK-Genoa")})),
    Flaw("crl", cache(lambda: make(crl={"signer": forger(), "key_id": False}))),
    Flaw("crl", maker(files={"crl.der": b""})),
    Flaw("crl", maker(files={"crl.der": b"not a list"})),
    Flaw("report.signature", key=lambda: Key.ec("P-384")),
    Flaw("report.signature", edit=flipped(0x90)),
    Flaw("report.signature", edit=lambda data: data[:0x2A0] + bytes(0x200)),
    Flaw("report.signature", edit=lambda d: d[:0x2A0] + b"\xff" * 48 + d[0x2A0 + 48 :]),
    Flaw("vek.signer", report={"key_info": 1 << 2}),
    Flaw("vek.signer", lambda: genuine(signer="vlek"), {"key_info": 0, "chip_id": b"\x01" * 64}),
    Flaw("vek.line", report={"cpuid_mod": 0x11}),
    *(
        Flaw("vek.tcb", report={"reported_tcb": flipped(place)(bytes((4, 0, 0, 0, 0, 0, 24, 219)))})
        for place in range(8)
    ),
    *(
        Flaw(
            "vek.tcb",
            lambda: genuine("turin"),
            {"reported_tcb": flipped(place)(bytes((1, 1, 1, 2, 0, 0, 0, 81)))},
        )
        for place in range(8)
    ),
    Flaw("vek.hwid", report={"chip_id": bytes(range(2, 66))}),
    Flaw("vek.hwid", report={"chip_id": bytes(range(1, 64)) + b"\0"}),
    Flaw("vek.hwid", lambda: genuine("turin"), {"chip_id": bytes(range(1, 9)) + b"\1" * 56}),
    Flaw("vek.hwid", lambda: genuine("turin"), {"chip_id": bytes(range(1, 8)) + bytes(57)}),
    Flaw("guest.debug", report={"policy": 1 << 17 | 1 << 19}),
    Flaw("guest.migration", report={"policy": 1 << 17 | 1 << 18}),
    Flaw("guest.vmpl", report={"vmpl": 1}, policy={"max_vmpl": 0}),
    Flaw("guest.vmpl", report={"vmpl": 3}, policy={"max_vmpl": 2}),
    Flaw("guest.policy", report={"policy": 3 << 16}, policy={"forbidden_policy_bits": ("smt",)}),
    Flaw("guest.policy", policy={"required_policy_bits": ("smt", "single_socket")}),
    Flaw("guest.svn", report={"guest_svn": 6}, policy={"min_guest_svn": 7}),
    Flaw("platform.bits", policy={"required_platform_bits": ("alias_check_complete",)}),
    Flaw("platform.chip", report={"chip_id": bytes(64)}),
    Flaw("platform.chip_id", policy={"chip_id": b"\x5a" * 64}),
    Flaw("platform.chip_id", policy={"chip_id": bytes(range(1, 9))}),
    Flaw(
        "platform.chip_id",
        report={"chip_id": bytes(64)},
        policy={"chip_id": bytes(range(1, 65)), "allow_masked_chip_id": True},
    ),
    Flaw("platform.chip_id", lambda: genuine("turin"), policy={"chip_id": bytes(range(1, 65))}),
    Flaw("platform.line", policy={"product_lines": ("genoa", "turin")}),
    Flaw("tcb.minimum", policy={"min_tcb": {"snp": 25}}),
    Flaw("tcb.minimum", policy={"min_tcb": {"microcode": 220, "bootloader": 1}}),
    Flaw("tcb.minimum", policy={"min_tcb": {"fmc": 0}}),
    Flaw(
        "tcb.minimum",
        report={"committed_tcb": bytes((4, 0, 0, 0, 0, 0, 23, 255))},
        policy={"min_tcb": {"snp": 24}},
    ),
    Flaw(
        "tcb.minimum",
        report={"current_tcb": bytes((3, 0, 0, 0, 0, 0, 255, 255))},
        policy={"min_tcb": {"bootloader": 4}},
    ),
    Flaw("tcb.minimum", lambda: genuine("turin"), policy={"min_tcb": {"tee": 2}}),
    Flaw("code.launch_digest", report={"measurement": b"\x01" + DIGEST[1:]}),
    Flaw("code.id_key_digest", policy={"id_key_digest": b"\x5a" * 48}),
    Flaw(
        "code.author_key_digest",
        report={"author_key_digest": b"\x5b" * 48, "key_info": 1},
        policy={"author_key_digest": b"\x5a" * 48},
    ),
    # The field says nothing unless AUTHOR_KEY_EN says that it does.
    Flaw(
        "code.author_key_digest",
        report={"author_key_digest": b"\x5a" * 48},
        policy={"author_key_digest": b"\x5a" * 48},
    ),
    Flaw("guest.family_id", policy={"family_id": b"\x5a" * 16}),
    Flaw("guest.image_id", report={"image_id": b"\x5b" * 16}, policy={"image_id": bytes(16)}),
    Flaw("guest.host_data", policy={"host_data": b"\x5a" * 32}),
]
# Without these nothing can be read that the other checks judge.
STRUCTURAL = {"report.format", "chain.format", "vek.format"}
