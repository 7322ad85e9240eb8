"""What evidence of our own kind says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pyenclave.attestation import kinds
from pyenclave.attestation.case import gathered, judged_at
from pyenclave.attestation.checks import NotReachedError
from pyenclave.attestation.pyenclave_case import Case, machine_checks

__all__ = ["claims", "runtime_binding"]


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the evidence says, as far as it can be read; binary values as hex."""
    return gathered(
        case,
        judged_at,
        _quote_claims,
        _record_claims,
        _container_claims,
        _chain_claims,
        _machine_claims,
    )


def runtime_binding(case: Case) -> tuple[bytes | None, bytes | None]:
    """Return runtime key and report body, for `AttestationResult.encrypt`."""
    try:
        return case.container.runtime_key, case.body.to_bytes()
    except NotReachedError:  # the checks say what could not be read
        return None, None


def _quote_claims(case: Case) -> dict[str, Any]:
    quote, body = case.quote, case.body
    return {
        "quote_version": 3,
        "att_key_type": 2,
        "cert_data_type": quote.certification_type,
        "mrenclave": body.mrenclave.hex(),
        "mrsigner": body.mrsigner.hex(),
        "isv_prod_id": body.isv_prod_id,
        "isv_svn": body.isv_svn,
        "debug": body.attributes.debug,
        "attributes": body.attributes.to_bytes().hex(),
        "misc_select": body.misc_select,
        "cpu_svn": body.cpu_svn.hex(),
        "config_id": body.config_id.hex(),
        "config_svn": body.config_svn,
        "isv_ext_prod_id": body.isv_ext_prod_id.hex(),
        "isv_family_id": body.isv_family_id.hex(),
        "report_data": body.report_data.hex(),
    }


def _record_claims(case: Case) -> dict[str, Any]:
    record = case.record
    return {
        "level": record.level,
        "tee": _proven_tee(case),
        "platform_svn": record.platform_svn,
        "ephemeral": record.ephemeral,
        "jit": record.jit,
        "enclave_id": record.enclave_id,
        "bits": {
            name: {"value": bit.value, "by": bit.by} for name, bit in sorted(record.bits.items())
        },
    }


def _proven_tee(case: Case) -> str:
    """Return the TEE that the machine's evidence proves; without proof there is none."""
    checks = machine_checks(case)
    proven = [check for check in checks if check.part == "evidence"]
    return case.record.tee if proven and all(check.holds for check in proven) else "none"


def _machine_claims(case: Case) -> dict[str, Any]:
    if case.container.machine is None:
        return {}
    inner = case.machine
    kind = kinds.load(inner.read_kind())
    return {"machine": {"kind": kind.name, **kind.claims(inner.inner(kind.case, kind.name))}}


def _container_claims(case: Case) -> dict[str, Any]:
    parts = case.container
    found: dict[str, Any] = {"raw": parts.raw}
    if parts.runtime_key is not None and parts.user_data is not None and parts.nonce is not None:
        found |= {
            "nonce": parts.nonce.hex(),
            "user_data": parts.user_data.hex(),
            "runtime_key_sha256": hashlib.sha256(parts.runtime_key).hexdigest(),
        }
    return found


def _chain_claims(case: Case) -> dict[str, Any]:
    root = case.chain[-1]
    return {
        "root_sha256": root.sha256.hex(),
        "root_name": root.subject_text,
    }
