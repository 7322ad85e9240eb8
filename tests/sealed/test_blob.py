"""Data sealing: threat catalogue SEA-01 … SEA-11 over a model of the platform's key derivation."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import struct
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from two_keys import two_key_ciphertext

from pyenclave.errors import EnclaveLostError, SealingError, SealLimitError, UnsealError
from pyenclave.formats import sealed as fmt
from pyenclave.sealed import SealPolicy, _aead, blob

ROOT = hashlib.sha256(b"root of the model platform").digest()
SECRET = bytes(range(32))
UNIQUE, SIGNER, ANY = SealPolicy.unique, SealPolicy.signer, SealPolicy.dangerous_any_enclave


def identity(**changes: object) -> blob.SealingIdentity:
    values: dict[str, object] = {
        "mrenclave": b"\x11" * 32,
        "mrsigner": b"\x22" * 32,
        "product_id": 7,
        "security_version": 3,
        "cpu_svn": struct.pack("<H14x", 5),
        "debug": False,
    }
    return blob.SealingIdentity(**(values | changes))  # type: ignore[arg-type]


def platform(who: blob.SealingIdentity, root: bytes = ROOT) -> blob.KeyProvider:
    """EGETKEY for *who*: the dependency structure of the notes on keys, 6.1."""

    def derive(request: bytes) -> bytes:
        assert len(request) == 512
        name, policy, svn = struct.unpack_from("<HHH", request)
        cpu_svn, masks, key_id = request[8:24], request[24:40], request[40:72]
        assert name == 4
        assert not any(request[78:])
        if svn > who.security_version or cpu_svn > who.cpu_svn:
            raise SealingError("the requested version is above the own one")
        attributes = struct.pack("<Q", 5 | (2 if who.debug else 0))
        info = b"".join(
            (
                struct.pack("<HHHH", name, policy, svn, who.product_id),
                cpu_svn,
                masks,
                attributes,
                request[72:76],
                key_id,
                who.mrenclave if policy & 1 else bytes(32),
                who.mrsigner if policy & 2 else bytes(32),
            )
        )
        return hmac.digest(root, info, "sha256")

    return derive


def seal(data: bytes = b"secret data", who: blob.SealingIdentity | None = None, **options) -> bytes:
    who = who or identity()
    options.setdefault("policy", SIGNER)
    options.setdefault("key_provider", platform(who))
    options.setdefault("secret", SECRET)
    return blob.seal(data, identity=who, **options)


def unseal(sealed: bytes, who: blob.SealingIdentity | None = None, **options) -> bytes:
    who = who or identity()
    options.setdefault("key_provider", platform(who))
    return blob.open_blob(sealed, identity=who, **options).data


@pytest.mark.parametrize("policy", SealPolicy)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 100_003])
def test_what_was_sealed_opens_for_the_same_enclave(policy: SealPolicy, size: int):
    data = bytes(i & 255 for i in range(size))
    sealed = seal(data, policy=policy)
    assert unseal(sealed) == data
    assert len(sealed) == fmt.HEADER_SIZE + size + fmt.TAG_SIZE


@pytest.mark.parametrize(("sealed_at", "opened_at"), list(itertools.product(range(4), repeat=2)))
@pytest.mark.parametrize("policy", SealPolicy)
def test_sea_01_an_older_enclave_never_opens_newer_data(sealed_at, opened_at, policy):
    sealed = seal(who=identity(security_version=sealed_at), policy=policy)
    opener = identity(security_version=opened_at)
    if opened_at >= sealed_at:
        assert unseal(sealed, opener) == b"secret data"
    else:
        with pytest.raises(UnsealError, match="newer security version"):
            unseal(sealed, opener)


def test_sea_01_the_platform_refuses_even_when_the_header_check_is_gone(monkeypatch):
    monkeypatch.setattr(blob, "_check_identity", lambda header, who: SIGNER)
    sealed = seal(who=identity(security_version=4))
    with pytest.raises(UnsealError, match="platform refuses"):
        unseal(sealed, identity(security_version=3))


def test_sea_01_a_lowered_version_in_the_header_gives_another_key():
    sealed = bytearray(seal(who=identity(security_version=4)))
    struct.pack_into("<H", sealed, 14, 3)
    with pytest.raises(UnsealError, match="not authentic"):
        unseal(bytes(sealed), identity(security_version=3))


def test_sea_01_a_newer_platform_reads_older_data_and_not_the_other_way():
    old, new = identity(cpu_svn=bytes([1]) + bytes(15)), identity(cpu_svn=bytes([2]) + bytes(15))
    assert unseal(seal(who=old), new) == b"secret data"
    with pytest.raises(UnsealError, match="platform refuses"):
        unseal(seal(who=new), old)


def test_data_can_be_left_open_for_older_versions_but_never_for_newer_than_oneself():
    sealed = seal(who=identity(security_version=3), min_version=1)
    assert unseal(sealed, identity(security_version=1)) == b"secret data"
    with pytest.raises(UnsealError, match="newer security version"):
        unseal(sealed, identity(security_version=0))
    for impossible in (4, -1):
        with pytest.raises(ValueError, match="min_version"):
            seal(min_version=impossible)


def test_data_of_versions_no_longer_trusted_is_refused_when_asked():
    sealed = seal(who=identity(security_version=1))
    assert unseal(sealed, min_version=1) == b"secret data"
    with pytest.raises(UnsealError, match="no longer accepted"):
        unseal(sealed, min_version=2)


@pytest.mark.parametrize(("was", "becomes"), list(itertools.permutations(SealPolicy, 2)))
def test_sea_02_a_blob_of_one_policy_does_not_open_as_another(was, becomes):
    sealed = bytearray(seal(policy=was))
    struct.pack_into("<H", sealed, 12, becomes.value)
    sealed[96:128] = identity().under(becomes)
    with pytest.raises(UnsealError, match="not authentic"):
        unseal(bytes(sealed))


@pytest.mark.parametrize(
    ("policy", "change", "opens"),
    [
        (UNIQUE, {"mrenclave": b"\x12" * 32}, False),
        (UNIQUE, {"mrsigner": b"\x23" * 32}, True),
        (SIGNER, {"mrenclave": b"\x12" * 32}, True),
        (SIGNER, {"mrsigner": b"\x23" * 32}, False),
        (SIGNER, {"mrsigner": bytes(32)}, False),
        (SIGNER, {"product_id": 8}, False),
        (UNIQUE, {"product_id": 8}, False),
        (ANY, {"mrenclave": b"\x12" * 32, "mrsigner": b"\x23" * 32}, True),
    ],
)
def test_sea_02_each_policy_binds_what_it_names(policy, change, opens, monkeypatch):
    sealed = seal(policy=policy)
    other = identity(**change)
    if opens:
        assert unseal(sealed, other) == b"secret data"
        return
    with pytest.raises(UnsealError, match="another"):
        unseal(sealed, other)
    # The header's comparison only explains; the key refuses without it.
    monkeypatch.setattr(blob, "_check_identity", lambda header, who: policy)
    with pytest.raises(UnsealError, match="not authentic"):
        unseal(sealed, other)


def test_sea_02_an_unsigned_image_cannot_seal_to_its_signer():
    with pytest.raises(SealingError, match="signed image"):
        seal(who=identity(mrsigner=bytes(32)), policy=SIGNER)
    assert unseal(
        seal(who=identity(mrsigner=bytes(32)), policy=UNIQUE), identity(mrsigner=bytes(32))
    )


def test_sea_03_every_bit_of_the_header_is_authenticated():
    sealed = seal(aad=b"context", counter=blob.CounterBinding(counter_id=b"c" * 16, value=9))
    for position in range(fmt.HEADER_SIZE * 8):
        mutant = bytearray(sealed)
        mutant[position // 8] ^= 1 << position % 8
        with pytest.raises(UnsealError):
            unseal(bytes(mutant), aad=b"context")


def test_sea_03_every_bit_of_ciphertext_and_tag_is_authenticated():
    sealed = seal()
    for position in range(fmt.HEADER_SIZE * 8, len(sealed) * 8):
        mutant = bytearray(sealed)
        mutant[position // 8] ^= 1 << position % 8
        with pytest.raises(UnsealError, match="not authentic"):
            unseal(bytes(mutant))


@pytest.mark.parametrize("name", ["cpu_svn", "attribute_mask", "misc_mask", "key_id"])
def test_sea_03_header_fields_are_bound_even_under_an_unchanged_key(name):
    """The commitment and the tag bind the header, not only the key derivation."""
    constant = lambda request: bytes(32)  # noqa: E731
    sealed = seal(key_provider=constant)
    header, body = fmt.split(sealed)
    value = getattr(header, name)
    changed = value ^ 1 if isinstance(value, int) else bytes([value[0] ^ 1]) + value[1:]
    mutant = replace(header, **{name: changed}).to_bytes() + bytes(body)
    assert unseal(sealed, key_provider=constant) == b"secret data"
    with pytest.raises(UnsealError, match="not authentic"):
        unseal(mutant, key_provider=constant)


def test_sea_04_additional_data_is_not_confused_with_data_or_with_none():
    constant = {"key_provider": lambda request: bytes(32), "random": bytes}
    blobs = {
        (aad, data): seal(data, aad=aad, **constant)
        for aad, data in [
            (b"ab", b"c"),
            (b"a", b"bc"),
            (b"", b"abc"),
            (None, b"abc"),
            (b"abc", b""),
        ]
    }
    tags = [sealed[-16:] for sealed in blobs.values()]
    assert len(set(tags)) == len(tags)
    for (aad, data), sealed in blobs.items():
        for other, _ in blobs:
            if other == aad:
                opened = unseal(sealed, aad=other, key_provider=constant["key_provider"])
                assert opened == data
            else:
                with pytest.raises(UnsealError, match="not authentic"):
                    unseal(sealed, aad=other, key_provider=constant["key_provider"])


def test_sea_04_additional_data_and_plaintext_cannot_be_swapped():
    sealed = seal(b"B" * 20, aad=b"A" * 20)
    with pytest.raises(UnsealError):
        unseal(sealed, aad=b"B" * 20)


def test_sea_05_a_repeated_random_generator_never_gives_one_key_for_two_messages():
    requests: list[bytes] = []

    def watch(request: bytes) -> bytes:
        requests.append(request[40:72])
        return platform(identity())(request)

    stuck = {"random": lambda size: b"\xaa" * size, "key_provider": watch}
    messages = [(b"one", None), (b"two", None), (b"one", b""), (b"one", b"x"), (b"on", b"ex")]
    sealed = [seal(data, aad=aad, **stuck) for data, aad in messages]
    assert len(set(requests)) == len(messages)
    assert seal(b"one", **stuck) == sealed[0]  # the same message: the same blob, nothing is learnt


def test_sea_05_nor_for_one_message_under_two_headers():
    """The header is additional data, so another header needs another key."""
    requests: set[bytes] = set()

    def watch(request: bytes) -> bytes:
        requests.add(request[40:72])
        return platform(identity())(request)

    stuck = {"random": lambda size: b"\xaa" * size, "key_provider": watch}
    counters = [
        None,
        *(blob.CounterBinding(counter_id=bytes(16), value=value) for value in (1, 2, 3)),
    ]
    counters.append(blob.CounterBinding(counter_id=b"\x01" * 16, value=1))
    for counter in counters:
        seal(b"one", counter=counter, **stuck)
    assert len(requests) == len(counters)


def test_sea_05_the_keyid_is_new_each_time_and_differs_between_launches():
    assert len({fmt.split(seal())[0].key_id for _ in range(64)}) == 64
    stuck = {"random": bytes}
    one = fmt.split(seal(**stuck))[0].key_id
    other = fmt.split(seal(secret=b"\x01" * 32, **stuck))[0].key_id
    assert one != other


def test_sea_05_a_missing_hedging_secret_is_refused():
    with pytest.raises(ValueError, match="hedging"):
        seal(secret=b"short")


def test_sea_06_debug_and_production_share_nothing(monkeypatch):
    debug, production = identity(debug=True), identity()
    for sealer, opener in ((debug, production), (production, debug)):
        sealed = seal(who=sealer)
        with pytest.raises(UnsealError, match="debug and production"):
            unseal(sealed, opener)
    assert unseal(seal(who=debug), debug) == b"secret data"
    monkeypatch.setattr(blob, "_check_identity", lambda header, who: SIGNER)
    with pytest.raises(UnsealError, match="not authentic"):
        unseal(seal(who=debug), production)


def test_sea_07_derived_keys_are_pairwise_different():
    seen: set[bytes] = set()
    for i in range(256):
        keys = blob._expand(hashlib.sha256(bytes([i])).digest())
        assert len(keys[0]) == len(keys[1]) == 32
        seen.update(keys)
    assert len(seen) == 512


def test_sea_07_the_derivation_is_hkdf_and_pinned():
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    def hkdf(info: bytes) -> bytes:
        return HKDF(hashes.SHA256(), 32, b"pyenclave/blob/1", info).derive(bytes(32))

    expected = (hkdf(b"pyenclave/blob/1/encrypt"), hkdf(b"pyenclave/blob/1/commit"))
    assert blob._expand(bytes(32)) == expected


def test_sea_07_a_platform_key_of_another_size_is_refused():
    with pytest.raises(SealingError, match="wrong size"):
        seal(key_provider=lambda request: bytes(16))


def test_sea_08_nothing_is_decrypted_before_the_commitment_holds(monkeypatch):
    def never(*_: object) -> bytes:
        raise AssertionError("decrypted an unauthenticated blob")

    sealed = bytearray(seal())
    sealed[200] ^= 1
    monkeypatch.setattr(_aead, "decrypt", never)
    with pytest.raises(UnsealError, match="not authentic"):
        unseal(bytes(sealed))


@pytest.mark.parametrize("offset", [8, 20, 22, 152, 160])
@pytest.mark.parametrize("delta", [-1, 1, None])
def test_sea_09_every_length_and_flag_field_off_by_one_zero_or_max_is_refused(offset, delta):
    sealed = bytearray(seal(aad=b"context"))
    width = 8 if offset >= 152 else 2
    old = int.from_bytes(sealed[offset : offset + width], "little")
    top = (1 << 8 * width) - 1
    for value in {0, top, top >> 1} if delta is None else {(old + delta) & top}:
        if value == old:
            continue
        sealed[offset : offset + width] = value.to_bytes(width, "little")
        with pytest.raises(UnsealError):
            unseal(bytes(sealed), aad=b"context")


def test_sea_09_every_truncation_and_any_trailing_byte_is_refused():
    sealed = seal()
    for size in range(len(sealed)):
        with pytest.raises(UnsealError):
            unseal(sealed[:size])
    with pytest.raises(UnsealError):
        unseal(sealed + b"\x00")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_sea_09_arbitrary_bytes_are_refused_with_a_typed_error(data: bytes):
    for candidate in (data, fmt.MAGIC + data, seal()[:180] + data):
        with pytest.raises(UnsealError):
            unseal(candidate)


def test_sea_10_a_blob_crafted_for_two_keys_opens_under_one_only():
    """Plain GCM falls to the attack (shown); the commitment refuses it."""
    platform_keys = (b"\x01" * 32, b"\x02" * 32)
    header, _ = fmt.split(seal(b"A" * 16, key_provider=lambda request: platform_keys[0]))
    head = header.to_bytes()
    ciphers = tuple(blob._expand(key)[0] for key in platform_keys)
    crafted = two_key_ciphertext(ciphers, head)  # type: ignore[arg-type]
    opened = [AESGCM(key).decrypt(bytes(12), crafted, head) for key in ciphers]
    assert opened[0] != opened[1]

    assert unseal(head + crafted, key_provider=lambda request: platform_keys[0]) == opened[0]
    with pytest.raises(UnsealError, match="not authentic"):
        unseal(head + crafted, key_provider=lambda request: platform_keys[1])


def test_sea_11_the_counter_of_a_blob_is_reported_and_bound():
    sealed = seal(counter=blob.CounterBinding(counter_id=b"i" * 16, value=41))
    opened = blob.open_blob(sealed, identity=identity(), key_provider=platform(identity()))
    assert (opened.header.counter_id, opened.header.counter_value) == (b"i" * 16, 41)
    plain = blob.open_blob(seal(), identity=identity(), key_provider=platform(identity()))
    assert plain.header.counter_id is None


def test_sea_12_an_opened_blob_does_not_show_its_data():
    opened = blob.open_blob(
        seal(b"planted"), identity=identity(), key_provider=platform(identity())
    )
    assert "planted" not in repr(opened)
    assert opened.data == b"planted"


def test_failures_of_key_commitment_additional_data_and_tag_read_the_same():
    sealed = seal(aad=b"right")
    flipped = sealed[:-1] + bytes([sealed[-1] ^ 1])
    commitment = sealed[:200] + bytes([sealed[200] ^ 1]) + sealed[201:]
    attempts = [
        (sealed, {"aad": b"wrong"}),
        (sealed, {"aad": b"longer than it was"}),
        (sealed, {"aad": b"right", "key_provider": platform(identity(), b"another root")}),
        (flipped, {"aad": b"right"}),
        (commitment, {"aad": b"right"}),
    ]
    texts = set()
    for candidate, options in attempts:
        with pytest.raises(UnsealError) as caught:
            unseal(candidate, **options)
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_a_lost_platform_is_not_reported_as_a_bad_blob():
    def gone(request: bytes) -> bytes:
        raise EnclaveLostError("the peer is gone")

    with pytest.raises(EnclaveLostError):
        unseal(seal(), key_provider=gone)


def test_too_much_data_is_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(fmt, "MAX_DATA", 10)
    with pytest.raises(SealLimitError):
        seal(b"x" * 11)
    with pytest.raises(SealLimitError):
        seal(b"x", aad=b"x" * 11)
    assert unseal(seal(b"x" * 10)) == b"x" * 10
