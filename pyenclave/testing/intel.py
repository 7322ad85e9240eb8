"""Synthetic Intel platforms: root, PCK, collateral, and quotes of enclaves and TDs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from pyenclave.formats import der
from pyenclave.formats.dcap import CERTIFICATION_PCK_CHAIN, Quote, TdQuote
from pyenclave.formats.sgx import Attributes, ReportBody
from pyenclave.formats.tdx import TdReportBody
from pyenclave.testing.certificates import Authority, Extension, Key, certificate, crl, name, pem

__all__ = ["IntelPlatform"]

_ARC: Final = "1.2.840.113741.1.13.1"
_QE_MRSIGNER: Final = bytes.fromhex(
    "8c4f5775d796503e96137f77c68a829a0056ac8ded70140b081b094490c57bff"
)
_TD_QE_MRSIGNER: Final = bytes.fromhex(
    "dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5"
)
_QE_ATTRIBUTES: Final = Attributes(flags=0x11, xfrm=0xE7)
_COMPONENTS: Final = (6, 6, 2, 2, 3, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0)
_TD_SVN: Final = bytes((4, 1, 2, *bytes(13)))
Tee = Literal["sgx", "tdx"]


def _name(common: str) -> bytes:
    return name(CN=common, O="Intel Corporation", L="Santa Clara", ST="CA", C="US")


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _tlv(arc: str, value: bytes) -> bytes:
    return der.encode_sequence(der.encode_oid(f"{_ARC}.{arc}"), value)


class IntelPlatform:
    """
    A machine with its provisioning certificate, quoting enclave and the vendor's collateral.

    Args:
        now: When collateral was issued (a day before) and until when it holds (29 days after).
        fmspc: Platform family, 6 bytes.
        components: The PCK's 16 SGX TCB components.
        pce_svn: Its PCESVN.
        pce_id: Its PCEID, 2 bytes.
        ca: Which authority issues the PCK certificate.
        pck_changes: Fields of the SGX extension by the last arcs of their identifier (``"4"`` is
            the FMSPC): another DER value, or None to leave it out.
        pck_fields: Further arguments of `certificates.certificate` for the PCK certificate.
    """

    def __init__(
        self,
        now: datetime,
        *,
        fmspc: bytes = bytes.fromhex("00a06f000000"),
        components: Sequence[int] = _COMPONENTS,
        pce_svn: int = 13,
        pce_id: bytes = bytes(2),
        ca: Literal["platform", "processor"] = "platform",
        pck_changes: Mapping[str, bytes | None] | None = None,
        **pck_fields: Any,
    ) -> None:
        self.now = now
        self.fmspc = fmspc
        self.components = tuple(components)
        self.pce_svn = pce_svn
        self.pce_id = pce_id
        self.root_ca = Authority.root(_name("Intel SGX Root CA"), Key.ec())
        self.pck_ca = self.root_ca.issue(_name(f"Intel SGX PCK {ca.capitalize()} CA"), Key.ec())
        self.tcb_key = Key.ec()
        self.tcb_signing = self.make_tcb_signing()
        self.key = Key.ec()
        self.attestation_key = Key.ec()
        self.pck = self.make_pck(pck_changes or {}, **pck_fields)

    @property
    def root(self) -> bytes:
        """The root, PEM: what a test pins."""
        return pem(self.root_ca.der)

    # ---- certificates ------------------------------------------------------------------------

    def make_tcb_signing(self, **changes: Any) -> bytes:
        """Make the certificate that TCB info and QE identity are signed with."""
        values: dict[str, Any] = {
            "subject": _name("Intel SGX TCB Signing"),
            "issuer": self.root_ca.subject,
            "key": self.tcb_key,
            "signer": self.root_ca.key,
            "ca": False,
            "usages": ("digitalSignature", "nonRepudiation"),
        }
        return certificate(**(values | changes))

    def sgx_extension(self, changes: Mapping[str, bytes | None]) -> Extension:
        """Return the extension of the PCK certificate (Intel's PCK certificate specification)."""
        tcb = [
            *(
                (f"2.{index + 1}", der.encode_integer(svn))
                for index, svn in enumerate(self.components)
            ),
            ("2.17", der.encode_integer(self.pce_svn)),
            ("2.18", der.encode_octet_string(bytes(self.components))),
        ]
        inner = [_tlv(arc, v) for arc, old in tcb if (v := changes.get(arc, old)) is not None]
        fields = [
            ("1", der.encode_octet_string(bytes(16))),
            ("2", der.encode_sequence(*inner)),
            ("3", der.encode_octet_string(self.pce_id)),
            ("4", der.encode_octet_string(self.fmspc)),
            ("5", der.encode_integer(1, tag=der.ENUMERATED)),
            ("6", der.encode_octet_string(bytes(16))),
            (
                "7",
                der.encode_sequence(
                    *(_tlv(f"7.{n}", der.encode_boolean(n == 1)) for n in (1, 2, 3))
                ),
            ),
        ]
        outer = [_tlv(arc, v) for arc, old in fields if (v := changes.get(arc, old)) is not None]
        return _ARC, False, der.encode_sequence(*outer)

    def make_pck(self, changes: Mapping[str, bytes | None], **fields: Any) -> bytes:
        """Make a PCK certificate; see the arguments of the class."""
        values: dict[str, Any] = {
            "subject": _name("Intel SGX PCK Certificate"),
            "issuer": self.pck_ca.subject,
            "key": self.key,
            "signer": self.pck_ca.key,
            "ca": False,
            "usages": ("digitalSignature", "nonRepudiation"),
            "extensions": [self.sgx_extension(changes)],
        }
        return certificate(**(values | fields))

    @property
    def pck_chain(self) -> bytes:
        """PCK, its authority and the root, PEM."""
        return pem(self.pck) + pem(self.pck_ca.der) + pem(self.root_ca.der)

    # ---- collateral --------------------------------------------------------------------------

    def _dates(self) -> dict[str, Any]:
        return {
            "issueDate": _time(self.now - timedelta(days=1)),
            "nextUpdate": _time(self.now + timedelta(days=29)),
        }

    def tcb_level(
        self,
        status: str = "UpToDate",
        *,
        components: Sequence[int] | None = None,
        pce_svn: int | None = None,
        td_components: Sequence[int] | None = None,
        date: str = "2024-03-13T00:00:00Z",
        advisories: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return one TCB level; by default the platform's own is the level."""
        svns = self.components if components is None else components
        tcb: dict[str, Any] = {
            "sgxtcbcomponents": [{"svn": svn} for svn in svns],
            "pcesvn": self.pce_svn if pce_svn is None else pce_svn,
        }
        if td_components is not None:
            tcb["tdxtcbcomponents"] = [{"svn": svn} for svn in td_components]
        level: dict[str, Any] = {"tcb": tcb, "tcbDate": date, "tcbStatus": status}
        return level | ({"advisoryIDs": list(advisories)} if advisories else {})

    def tcb_info(self, tee: Tee = "sgx", **changes: Any) -> dict[str, Any]:
        """Return the TCB info, unsigned; *changes* are its members."""
        zero48, zero8 = "0" * 96, "0" * 16
        info: dict[str, Any] = {
            "id": tee.upper(),
            "version": 3,
            **self._dates(),
            "fmspc": self.fmspc.hex(),
            "pceId": self.pce_id.hex(),
            "tcbType": 0,
            "tcbEvaluationDataNumber": 17,
        }
        if tee == "tdx":
            module: dict[str, Any] = {
                "mrsigner": zero48,
                "attributes": zero8,
                "attributesMask": "F" * 16,
            }
            level = {
                "tcb": {"isvsvn": 4},
                "tcbDate": "2024-03-13T00:00:00Z",
                "tcbStatus": "UpToDate",
            }
            info |= {
                "tdxModule": module,
                "tdxModuleIdentities": [{"id": "TDX_01", **module, "tcbLevels": [level]}],
                "tcbLevels": [self.tcb_level(td_components=(4, 1, 2, *bytes(13)))],
            }
        else:
            info["tcbLevels"] = [self.tcb_level()]
        return info | changes

    def qe_identity(self, tee: Tee = "sgx", **changes: Any) -> dict[str, Any]:
        """Return the identity of the quoting enclave, unsigned; *changes* are its members."""
        level = {"tcb": {"isvsvn": 8}, "tcbDate": "2024-03-13T00:00:00Z", "tcbStatus": "UpToDate"}
        identity: dict[str, Any] = {
            "id": "QE" if tee == "sgx" else "TD_QE",
            "version": 2,
            **self._dates(),
            "tcbEvaluationDataNumber": 17,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11000000000000000000000000000000",
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": (_QE_MRSIGNER if tee == "sgx" else _TD_QE_MRSIGNER).hex().upper(),
            "isvprodid": 1 if tee == "sgx" else 2,
            "tcbLevels": [level],
        }
        return identity | changes

    def signed(
        self, member: str, value: Mapping[str, Any] | bytes, *, key: Key | None = None
    ) -> bytes:
        """Sign TCB info (member ``tcbInfo``) or QE identity (``enclaveIdentity``) as the PCS."""
        inner = (
            value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
        )
        signature = (key or self.tcb_key).sign_raw(inner).hex().encode()
        return b'{"%s":%s,"signature":"%s"}' % (member.encode(), inner, signature)

    def pck_crl(self, **changes: Any) -> bytes:
        """Make the CRL of the PCK's authority; *changes* as in `certificates.crl`."""
        return self._crl(self.pck_ca, changes)

    def root_crl(self, **changes: Any) -> bytes:
        """Make the root's CRL."""
        return self._crl(self.root_ca, changes)

    def _crl(self, authority: Authority, changes: Mapping[str, Any]) -> bytes:
        values: dict[str, Any] = {
            "issuer": authority.subject,
            "signer": authority.key,
            "this_update": self.now - timedelta(days=1),
            "next_update": self.now + timedelta(days=29),
        }
        return crl(**(values | dict(changes)))

    def endorsements(
        self,
        tee: Tee = "sgx",
        *,
        tcb_info: Mapping[str, Any] | None = None,
        qe_identity: Mapping[str, Any] | None = None,
        leave_out: Iterable[str] = (),
        **files: bytes,
    ) -> dict[str, bytes]:
        """
        Return the whole collateral by file name.

        Args:
            tee: Of the quote.
            tcb_info: Changed members of the TCB info.
            qe_identity: Changed members of the QE identity.
            leave_out: Names that are not there.
            files: Other bytes for files, by names with ``_`` for ``-`` and without their ending.
        """
        signing = pem(self.tcb_signing) + pem(self.root_ca.der)
        made = {
            "tcb-info.json": self.signed("tcbInfo", self.tcb_info(tee, **(tcb_info or {}))),
            "tcb-info-issuer-chain.pem": signing,
            "qe-identity.json": self.signed(
                "enclaveIdentity", self.qe_identity(tee, **(qe_identity or {}))
            ),
            "qe-identity-issuer-chain.pem": signing,
            "pck-crl.der": self.pck_crl(),
            "pck-crl-issuer-chain.pem": pem(self.pck_ca.der) + pem(self.root_ca.der),
            "root-ca-crl.der": self.root_crl(),
        }
        for label, data in files.items():
            known = next(n for n in made if n.rpartition(".")[0] == label.replace("_", "-"))
            made[known] = data
        return {n: data for n, data in made.items() if n not in set(leave_out)}

    # ---- quotes ------------------------------------------------------------------------------

    def _certified(self, tee: Tee, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a quote that certify the attestation key."""
        auth = bytes(range(32))
        digest = hashlib.sha256(self.attestation_key.point + auth).digest()
        qe = ReportBody(
            attributes=_QE_ATTRIBUTES,
            mrenclave=hashlib.sha256(b"quoting enclave").digest(),
            mrsigner=_QE_MRSIGNER if tee == "sgx" else _TD_QE_MRSIGNER,
            isv_prod_id=1 if tee == "sgx" else 2,
            isv_svn=8,
            report_data=digest + bytes(32),
        )
        qe = replace(qe, **changes)
        return {
            "signature": bytes(64),
            "attestation_key": self.attestation_key.point,
            "qe_report": qe,
            "qe_report_signature": self.key.sign_raw(qe.to_bytes()),
            "qe_auth_data": auth,
            "certification_type": CERTIFICATION_PCK_CHAIN,
            "certification_data": self.pck_chain + b"\0",
        }

    def enclave_quote(
        self,
        *,
        version: Literal[3, 4, 5] = 3,
        qe: Mapping[str, Any] | None = None,
        quote: Mapping[str, Any] | None = None,
        **body: Any,
    ) -> bytes:
        """
        Return a quote of an enclave.

        Args:
            version: Of the quote.
            qe: Fields of the QE's report.
            quote: Fields of `formats.dcap.Quote`, set before it is signed; with ``signature`` it
                is not signed.
            body: Fields of the enclave's report.
        """
        fields: dict[str, Any] = {
            "attributes": Attributes(flags=0x05, xfrm=0xE7),
            "mrenclave": bytes(range(32)),
            "mrsigner": bytes(range(32, 64)),
            "cpu_svn": bytes(self.components),
        }
        values: dict[str, Any] = {
            "version": version,
            "report_body": ReportBody(**(fields | body)),
            **self._certified("sgx", qe or {}),
            **(quote or {}),
        }
        return self._signed_quote(Quote(**values), quote or {})

    def td_quote(
        self,
        *,
        version: Literal[4, 5] = 4,
        qe: Mapping[str, Any] | None = None,
        quote: Mapping[str, Any] | None = None,
        **body: Any,
    ) -> bytes:
        """
        Return a quote of a TD; version 5 with a body of TDX 1.5.

        Args:
            version: Of the quote.
            qe: Fields of the QE's report.
            quote: Fields of `formats.dcap.TdQuote`; with ``signature`` it is not signed.
            body: Fields of the TD's report.
        """
        fields: dict[str, Any] = {
            "tee_tcb_svn": _TD_SVN,
            "td_attributes": (1 << 28).to_bytes(8, "little"),  # SEPT_VE_DISABLE
            "xfam": bytes.fromhex("e702060000000000"),
            "mr_td": bytes(range(48)),
            "mr_seam": bytes(range(48, 96)),
        }
        if version == 5:
            fields |= {"tee_tcb_svn2": _TD_SVN, "mr_service_td": bytes(48)}
        values: dict[str, Any] = {
            "version": version,
            "report_body": TdReportBody(**(fields | body)),
            **self._certified("tdx", qe or {}),
            **(quote or {}),
        }
        return self._signed_quote(TdQuote(**values), quote or {})

    def _signed_quote(self, quote: Any, given: Mapping[str, Any]) -> bytes:
        if "signature" in given:
            return bytes(quote.to_bytes())
        signature = self.attestation_key.sign_raw(quote.signed_bytes)
        return bytes(replace(quote, signature=signature).to_bytes())
