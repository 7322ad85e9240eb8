"""Synthetic Nitro hosts: a root of their own, and attestation documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from pyenclave.formats import cbor
from pyenclave.formats.nitro import NitroPayload
from pyenclave.testing.certificates import Authority, Key, certificate, name, pem

__all__ = ["NitroHost"]


class NitroHost:
    """
    A host whose security module signs documents.

    Args:
        now: When documents are made; their certificate holds three hours from then.
    """

    def __init__(self, now: datetime) -> None:
        self.now = now
        root = name(C="US", O="Amazon", OU="AWS", CN="aws.nitro-enclaves")
        self.authority = Authority.root(root, Key.ec("P-384"), algorithm="ecdsa-sha384")
        self.regional = self.authority.issue(
            name(C="US", O="Amazon", OU="AWS", CN="region.aws.nitro-enclaves"),
            Key.ec("P-384"),
            algorithm="ecdsa-sha384",
            path_length=1,
        )
        self.instance = self.regional.issue(
            name(C="US", O="Amazon", OU="AWS", CN="i-0000.region.aws.nitro-enclaves"),
            Key.ec("P-384"),
            algorithm="ecdsa-sha384",
        )
        self.key = Key.ec("P-384")
        self.leaf = self.make_leaf()

    @property
    def root(self) -> bytes:
        """The root, PEM: what a test pins."""
        return pem(self.authority.der)

    def make_leaf(self, **changes: Any) -> bytes:
        """Make the certificate of the key that signs documents; *changes* as in `certificate`."""
        values: dict[str, Any] = {
            "subject": name(C="US", O="Amazon", OU="AWS", CN="i-0000-enc0000.region.aws"),
            "issuer": self.instance.subject,
            "key": self.key,
            "signer": self.instance.key,
            "algorithm": "ecdsa-sha384",
            "not_before": self.now - timedelta(seconds=3),
            "not_after": self.now + timedelta(hours=3),
            "ca": False,
            "usages": ("digitalSignature", "nonRepudiation"),
        }
        return certificate(**(values | changes))

    def payload(self, **changes: Any) -> NitroPayload:
        """Return the content of a document; *changes* are fields of `NitroPayload`."""
        pcrs: Mapping[int, bytes] = {
            index: bytes([index + 1]) * 48 if index in (0, 1, 2, 4) else bytes(48)
            for index in range(16)
        }
        plain = NitroPayload(
            module_id="i-0000-enc0000",
            digest="SHA384",
            timestamp=int(self.now.timestamp() * 1000),
            pcrs=pcrs,
            certificate=self.leaf,
            cabundle=(self.authority.der, self.regional.der, self.instance.der),
        )
        return replace(plain, **changes)

    def document(self, *, tagged: bool = False, key: Key | None = None, **changes: Any) -> bytes:
        """
        Return a signed document.

        Args:
            tagged: Whether tag 18 is in front; the hardware leaves it out.
            key: Another key that signs it.
            changes: Fields of `NitroPayload`.
        """
        return self.sign(self.payload(**changes).to_bytes(), tagged=tagged, key=key)

    def sign(
        self,
        payload: bytes,
        *,
        tagged: bool = False,
        key: Key | None = None,
        header: bytes | None = None,
    ) -> bytes:
        """Sign any bytes as the payload of a document, under any protected *header*."""
        protected = cbor.dumps({1: -35}) if header is None else header
        signed = cbor.dumps(["Signature1", protected, b"", payload])
        signature = (key or self.key).sign_raw(signed)
        item: object = [protected, {}, payload, signature]
        return cbor.dumps(cbor.Tag(18, item) if tagged else item)
