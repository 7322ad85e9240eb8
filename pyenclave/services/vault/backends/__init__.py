"""Keepers of private halves: an enclave of ours (the default), or a PKCS #11 token."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyenclave.errors import ConfigurationError

if TYPE_CHECKING:
    from pyenclave.formats.release_terms import ReleaseTerms
    from pyenclave.services.vault.backends.base import KeyBackend

__all__ = ["open_backend"]


def open_backend(
    config: str,
    state_dir: str | os.PathLike[str] | None = None,
    *,
    terms: ReleaseTerms | None = None,
) -> KeyBackend:
    """
    Return a key-encryption backend; it starts when it is first asked for something.

    Args:
        config: ``enclave``, or a PKCS #11 URI, as `pkcs11.from_config` reads it.
        state_dir: Where the enclave backend keeps its image and sealed key-encryption keys; None
            for the default state directory.
        terms: What the enclave backend binds exportable keys to: the attestation services. A
            token of PKCS #11 knows nothing of them: there the vault's process decides.

    Raises:
        ConfigurationError: *config* is not understood, or a PKCS #11 URI that is not usable.

    """
    kind, _, rest = config.partition(":")
    if kind == "enclave" and not rest:
        from pyenclave.services.vault.backends.enclave import EnclaveBackend

        return EnclaveBackend(state_dir, terms=terms)
    if kind == "pkcs11":
        from pyenclave.services.vault.backends.pkcs11 import from_config

        return from_config(rest)
    raise ConfigurationError(
        f"no such key backend: {config[:60]!r}", expected="enclave, or pkcs11:…"
    )
