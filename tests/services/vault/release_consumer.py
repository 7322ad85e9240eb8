"""A consumer of released keys, from the notes (10.2), with nothing of ours."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.x509.verification import PolicyBuilder, Store
from vault_parts import b64, unb64


def _unwrap_kwp(kek: bytes, wrapped: bytes) -> bytes:
    """RFC 5649, by AES on single blocks: every byte of the integrity value counts."""
    cipher = Cipher(algorithms.AES(kek), modes.ECB()).decryptor()
    blocks = [wrapped[at : at + 8] for at in range(0, len(wrapped), 8)]
    if len(blocks) == 2:
        plain = cipher.update(wrapped)
        a, rest = plain[:8], [plain[8:]]
    else:
        a, rest = blocks[0], blocks[1:]
        for j in range(5, -1, -1):
            for i in range(len(rest), 0, -1):
                t = len(rest) * j + i
                block = (int.from_bytes(a, "big") ^ t).to_bytes(8, "big") + rest[i - 1]
                plain = cipher.update(block)
                a, rest[i - 1] = plain[:8], plain[8:]
    length = int.from_bytes(a[4:], "big")
    data = b"".join(rest)
    if a[:4] != b"\xa6\x59\x59\xa6" or not 0 <= len(data) - length < 8 or any(data[length:]):
        raise ValueError("integrity value")
    return data[:length]


@dataclasses.dataclass
class Released:
    """What a consumer makes of an answer."""

    header: dict[str, Any]
    payload: dict[str, Any]
    material: bytes


_HASH: dict[str, hashes.HashAlgorithm] = {
    "CKM_RSA_AES_KEY_WRAP": hashes.SHA1(),
    "RSA_AES_KEY_WRAP_256": hashes.SHA256(),
    "RSA_AES_KEY_WRAP_384": hashes.SHA384(),
}


def consume(
    jws: str, *, enc: str, transfer: rsa.RSAPrivateKey, root: bytes, host: str = "localhost"
) -> Released:
    """Verify and open an answer, of a signer under *root* (PEM), as a confidential sidecar does."""
    first, second, third = jws.split(".")
    header, payload = json.loads(unb64(first)), json.loads(unb64(second))
    assert header["alg"] == "RS256"
    chain = [x509.load_der_x509_certificate(base64.b64decode(item)) for item in header["x5c"]]
    assert header["x5t#S256"] == b64(chain[0].fingerprint(hashes.SHA256()))
    store = Store([x509.load_pem_x509_certificate(root)])
    name = x509.DNSName(host)
    PolicyBuilder().store(store).build_server_verifier(name).verify(chain[0], chain[1:])
    public = chain[0].public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    public.verify(unb64(third), f"{first}.{second}".encode(), padding.PKCS1v15(), hashes.SHA256())
    assert payload["request"]["enc"] == enc
    inner = json.loads(unb64(payload["response"]["key"]["key"]["key_hsm"]))
    assert inner["schema_version"] == "1.0"
    assert inner["header"] == {"kid": "transfer", "alg": "dir", "enc": enc}
    ciphertext = unb64(inner["ciphertext"])
    size = transfer.key_size // 8  # public clients write 256 here
    digest = _HASH[enc]
    once = transfer.decrypt(ciphertext[:size], padding.OAEP(padding.MGF1(digest), digest, None))
    assert len(once) == 32
    return Released(header, payload, _unwrap_kwp(once, ciphertext[size:]))
