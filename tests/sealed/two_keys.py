"""One AES-GCM ciphertext that opens under two keys: GCM alone commits to none (SEA-10)."""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def _multiply(x: int, y: int) -> int:
    """Multiply in GF(2^128) with GCM's bit order (NIST SP 800-38D, 6.3)."""
    z = 0
    for i in range(127, -1, -1):
        if y >> i & 1:
            z ^= x
        x = (x >> 1) ^ (0xE1 << 120 if x & 1 else 0)
    return z


def _invert(x: int) -> int:
    result, power = 1 << 127, x
    for _ in range(127):  # x^(2^128 - 2)
        power = _multiply(power, power)
        result = _multiply(result, power)
    return result


def two_key_ciphertext(keys: tuple[bytes, bytes], aad: bytes) -> bytes:
    """One ciphertext block and a tag that hold under both keys, nonce zero."""

    def block(key: bytes, value: bytes) -> int:
        encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        return int.from_bytes(encryptor.update(value), "big")

    lengths = struct.pack(">QQ", 8 * len(aad), 128)
    padded = aad + bytes(-len(aad) % 16)
    constant = square = 0
    terms = []
    for key in keys:
        h = block(key, bytes(16))
        blocks = [padded[i : i + 16] for i in range(0, len(padded), 16)]
        digest = 0
        for part in [*blocks, bytes(16), lengths]:  # the ciphertext block is zero here
            digest = _multiply(digest ^ int.from_bytes(part, "big"), h)
        mask = digest ^ block(key, bytes(12) + b"\x00\x00\x00\x01")
        terms.append((mask, _multiply(h, h)))
        constant ^= mask
        square ^= terms[-1][1]
    ciphertext = _multiply(constant, _invert(square))
    tag = terms[0][0] ^ _multiply(ciphertext, terms[0][1])
    return ciphertext.to_bytes(16, "big") + tag.to_bytes(16, "big")
