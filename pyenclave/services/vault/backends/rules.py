"""What no update and no release of a key may do, for backends that are no enclave of ours."""

from __future__ import annotations

from pyenclave.errors import ServiceError
from pyenclave.formats.jwa import AlgorithmError
from pyenclave.formats.key_context import KeyContext

__all__ = ["check_rebind", "check_released"]


def check_rebind(old: KeyContext, new: KeyContext) -> None:
    """
    Refuse a new context that is not that of an update.

    Raises:
        AlgorithmError: Another key, another kind, another exportability.
        ServiceError: 403: an immutable policy is replaced.

    """
    if (old.name, old.version) != (new.name, new.version):
        raise AlgorithmError("a key keeps its name and version")
    if old.kty != new.kty or old.exportable != new.exportable:
        raise AlgorithmError("a key keeps its kind, and whether it is exportable")
    if old.immutable and (new.policy_hash != old.policy_hash or not new.immutable):
        raise ServiceError(
            "the key's release policy is immutable", status=403, error_code="Forbidden"
        )


def check_released(context: KeyContext) -> None:
    """
    Refuse to release a key that was not made for it.

    Raises:
        ServiceError: 403.

    """
    if not context.exportable or not context.kty.endswith("-HSM"):
        raise ServiceError("the key is not exportable", status=403, error_code="Forbidden")
