"""
Make the golden files: one of each kind that pyenclave keeps, from fixed inputs.

``python tests/golden/make.py`` writes those that are missing and never replaces one: what a release
once wrote must open for ever. All but ``secret.hpke``, sealed files and streams, the backup of a
vault's key and the signature in ``audit-log.jsonl`` (fresh randomness) come out the same each time,
and ``tests/test_golden.py`` holds that too.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tempfile
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.serialization import Encoding

from pyenclave._platform.counters import CounterStore, MemoryFiles
from pyenclave._platform.keys import Keys
from pyenclave._platform.quote import Quoter
from pyenclave._platform.root import PlatformRoot
from pyenclave.cli._listing import ListedFile, Listing, list_text
from pyenclave.formats import audit_log as audit
from pyenclave.formats import jose
from pyenclave.formats.evidence import Evidence, bound_report_data, provision_info
from pyenclave.formats.image import EncryptedParts, FileEntry, Image, ImageInfo, assemble
from pyenclave.formats.lock import Lock, LockedFile, LockedLibrary, LockedModule
from pyenclave.formats.machine import MachineEvidence
from pyenclave.formats.record import ProtectionBit, ProtectionRecord
from pyenclave.formats.sgx import Attributes, KeyRequest, ReportBody
from pyenclave.formats.wrapped import PLACE_SIZE, Envelope
from pyenclave.measurement.image import measure_image
from pyenclave.sealed import SealPolicy, blob, parts, provision
from pyenclave.sealed.envelope import seal_envelope
from pyenclave.sealed.envelope_keys import SharedKey
from pyenclave.sealed.file import open_sealed
from pyenclave.sealed.stream import open_stream
from pyenclave.services.audit.event import Event, body_of
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.vault.backup import pack
from pyenclave.services.vault.durations import Duration
from pyenclave.services.vault.records import KeyRecord
from pyenclave.services.vault.rotation_policy import RotationPolicy

HERE = Path(__file__).resolve().parent
# Evidence joins these when PLATFORM_SVN is raised: the platform signs its version.
NOT_REPEATABLE = {
    "secret.hpke",
    "data.sealed-file",
    "data.sealed-stream",
    "data.encrypted-file",
    "data.wrapped-file",
    "folder.list",
    "moved.sealed-file",
    "audit-log.jsonl",
    "vault-key.backup",
}

ROOT_SECRET = hashlib.sha256(b"golden root secret of nobody").digest()
PLAINTEXT = b"what was sealed by the first release opens for ever\n"
AAD = b"golden"
BINDING = blob.CounterBinding(counter_id=bytes(range(16)), value=5)
COUNTER_MARK = bytes(range(32, 64))
SECRET = b"a secret sent to the golden enclave\n"
NONCE = bytes(range(32))
USER_DATA = b"user data of the golden enclave"
ENCLAVE_ID = "000102030405060708090a0b0c0d0e0f"
ENTRY = b"import pyenclave\n\n\n@pyenclave.ecall\ndef double(x: int) -> int:\n    return 2 * x\n"
MODEL = bytes(range(256))


AUDITED = (
    Event("Microsoft.KeyVault/vaults/keys/create/action", "allowed", "owner", "/keys/golden/1"),
    Event(
        "Microsoft.KeyVault/vaults/keys/release/action",
        "refused",
        "é",
        "/keys/golden/1",
        rule="policy",
        condition="x-ms-sgx-is-debuggable",
        expected=False,
        found=True,
        claims={"b": [1, 2.5, None], "a": "\n"},
        evidence_digest="ab" * 32,
        token_id="token",
        request_id="request",
        details={"nonce": b"\x00\xff"},
    ),
    Event("audit/prune", "failed"),
)


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lock() -> Lock:
    """A small lock list with an entry of every kind; nothing on any machine fits it."""
    return Lock(
        python="cpython-3.11.7 cpython-311-x86_64-linux-gnu",
        bootstrap=(LockedFile(path="base:bin/python3.11", sha256=_hex("python"), size=10),),
        modules=(
            LockedModule(name="a", kind="package", path="site:a/__init__.py", sha256=_hex("a")),
            LockedModule(
                name="a.b",
                kind="extension",
                path="site:a/b.abi3.so",
                sha256=_hex("a.b"),
                size=20,
                needs=("libc.so.6", "libd.so.1"),
            ),
            LockedModule(name="c", kind="namespace", path="", sha256=""),
            LockedModule(name="json", kind="module", path="stdlib:json.py", sha256=_hex("json")),
        ),
        libraries=(
            LockedLibrary(
                soname="libd.so.1", path="abs:/usr/lib/libd.so.1", sha256=_hex("d"), needs=()
            ),
        ),
        preload=("json", "a"),
    )


def image(*, encrypted: bool = False) -> bytes:
    """An unsigned image with a Python entry and a file; or with a module and the file encrypted."""
    files = {"entry/golden.py": ENTRY, "files/model.bin": MODEL}
    hidden: EncryptedParts | None = None
    if encrypted:
        part_root = parts.root_of(ROOT_SECRET)
        files["code/algo.py"] = ENTRY
        names = ("code/algo.py", "files/model.bin")
        files |= {name: parts.encrypt(part_root, name, files[name]) for name in names}
        hidden = EncryptedParts(
            check=parts.check_value(part_root).hex(), files=names, key=VAULT_KEY.kid
        )
    info = ImageInfo(
        name="golden",
        product_id=7,
        security_version=3,
        debug=False,
        threads=2,
        entry_kind="python",
        entry_module="golden",
        entry_file="entry/golden.py",
        functions=(
            {
                "name": "double",
                "kind": "python",
                "params": [{"name": "x", "type": "int", "default": False, "keyword": False}],
                "returns": "int",
            },
        ),
        sealed_memory=64 << 20,
        message_limit=16 << 20,
        ocalls=(),
        blas_threads=1,
        jit=False,
        seal={"policy": "signer"},
        files=tuple(
            FileEntry(name=name, size=len(data), executable=name.startswith("entry/"))
            for name, data in sorted(files.items())
        ),
        encrypted=hidden,
    )
    return assemble(info, lock(), files)


def root() -> PlatformRoot:
    """The platform of the golden files."""
    return PlatformRoot(bytearray(ROOT_SECRET), level="embedded", ephemeral=False)


def state_root() -> bytes:
    """The file ``root`` of its state directory."""
    body = b"PYEROOT\x01" + ROOT_SECRET
    return body + hashlib.sha256(body).digest()


def record() -> bytes:
    """A signed protection record."""
    unsigned = ProtectionRecord(
        level="embedded",
        tee="none",
        platform_svn=1,
        ephemeral=False,
        debug=False,
        jit=False,
        enclave_id=ENCLAVE_ID,
        bits={
            "seccomp": ProtectionBit(value=True, by="outside"),
            "landlock_abi": ProtectionBit(value=7, by="inside"),
            "mdwe": ProtectionBit(value=False, by="inside"),
        },
    )
    signature = root().sign(unsigned.signed_bytes())
    return msgspec.structs.replace(unsigned, signature=signature).to_bytes()


def body() -> ReportBody:
    """Identity of the golden enclave; a signer is made up, for the image has none."""
    return ReportBody(
        cpu_svn=struct.pack("<H14x", 1),
        attributes=Attributes(flags=5, xfrm=3),
        mrenclave=measure_image(Image.parse(image())),
        mrsigner=hashlib.sha256(b"golden signer").digest(),
        isv_prod_id=7,
        isv_svn=3,
        config_id=hashlib.sha256(record()).digest() + bytes(32),
    )


def runtime_key() -> tuple[hpke.MLKEM768X25519PrivateKey, bytes]:
    """The enclave's runtime key: private and public."""
    post_quantum = mlkem.MLKEM768PrivateKey.from_seed_bytes(bytes(range(64)))
    classic = x25519.X25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = post_quantum.public_key().public_bytes_raw() + classic.public_key().public_bytes_raw()
    return hpke.MLKEM768X25519PrivateKey(post_quantum, classic), public


def evidence() -> bytes:
    """Bound evidence."""
    _, public = runtime_key()
    data = bound_report_data(nonce=NONCE, runtime_key=public, user_data=USER_DATA)
    return Evidence(
        quote=Quoter(root()).quote(body(), data),
        record=record(),
        runtime_key=public,
        user_data=USER_DATA,
        nonce=NONCE,
    ).to_bytes()


def machine() -> bytes:
    """What a machine below says; the report in it is no chip's."""
    files = {"ark.pem": b"-----BEGIN CERTIFICATE-----\n", "vek.der": bytes(range(48))}
    return MachineEvidence(evidence=bytes(range(256)) * 4, files=files).to_bytes()


def key_provider(request: bytes) -> bytes:
    """What the platform answers to the golden enclave."""
    return Keys(root()).get_key(KeyRequest.from_bytes(request), body())


def identity() -> blob.SealingIdentity:
    """The golden enclave, as one who seals."""
    who = body()
    return blob.SealingIdentity(
        mrenclave=who.mrenclave,
        mrsigner=who.mrsigner,
        product_id=who.isv_prod_id,
        security_version=who.isv_svn,
        cpu_svn=who.cpu_svn,
        debug=False,
    )


def sealed(
    policy: SealPolicy,
    data: bytes = PLAINTEXT,
    *,
    aad: bytes = AAD,
    counter: blob.CounterBinding | None = BINDING,
) -> bytes:
    """A sealed blob."""
    return blob.seal(
        data,
        identity=identity(),
        policy=policy,
        key_provider=key_provider,
        secret=bytes(range(32)),
        aad=aad,
        counter=counter,
        random=bytes,
    )


def secret() -> bytes:
    """What a relying party sent to the golden enclave."""
    _, public = runtime_key()
    info = provision_info(report_body=body().to_bytes(), runtime_key=public, info=b"golden")
    return provision.encrypt(SECRET, public_key=public, info=info)


def counters() -> dict[str, bytes]:
    """A store of counters: one counter, incremented twice, a blob the second time; its mark."""
    files = MemoryFiles()
    store = CounterStore(files, root().derive("counters", 32), lambda size: bytes(range(size)))
    made, _ = store.create(bytes(range(32)))
    store.increment(bytes(range(32)), made)
    store.increment(bytes(range(32)), made, 1, COUNTER_MARK)
    return {name: files.read_file(name) or b"" for name in ("counters", "counters.mark")}


def file_content() -> bytes:
    """What the sealed file holds: some text, a hole, some text beyond the first leaf."""
    return PLAINTEXT + bytes(90 * 4096 - len(PLAINTEXT)) + PLAINTEXT


def sealed_file() -> bytes:
    """A sealed file of two commits."""
    place = io.BytesIO()
    with open_sealed(place, "wb", key=ROOT_SECRET, name=b"golden") as file:
        file.write(b"the first commit\n" * 20)
        file.commit()
        file.seek(0)
        file.truncate()
        file.write(PLAINTEXT)
        file.seek(90 * 4096)
        file.write(PLAINTEXT)
    return place.getvalue()


class GoldenCounter:
    """A counter that nobody puts back."""

    def __init__(self, name: bytes, value: int = 0) -> None:
        self.id, self.value = name, value

    def read(self) -> int:
        """Return the value."""
        return self.value

    def advance(self, to: int) -> None:
        """Make *to* the value."""
        self.value = to


def moved_file() -> bytes:
    """A sealed file whose last commit bound it to another counter, of value 6 then."""
    place = io.BytesIO()
    with open_sealed(
        place, "wb", key=ROOT_SECRET, name=b"golden", counter=GoldenCounter(b"before", 2)
    ) as file:
        file.write(PLAINTEXT)
        file.commit()
        file.bind(GoldenCounter(b"after", 5))
    return place.getvalue()


def wrapped_file() -> bytes:
    """A sealed file whose key is sealed to an enclave, as `pyenclave seal` makes it."""
    key, place = bytes(range(32)), io.BytesIO()
    with open_sealed(place, "wb", key=key) as file:
        file.write(PLAINTEXT)
    bound = b"pyenclave/envelope/1" + bytes([True, False]) + AAD
    envelope = Envelope(2, sealed(SealPolicy.signer, key, aad=bound, counter=None))
    return envelope.to_bytes() + bytes(PLACE_SIZE) + place.getvalue()


def listing() -> Listing:
    """The list of a folder, with a name that is no UTF-8."""
    files = {
        "a.csv": ListedFile("00" * 16, 41),
        "été/\udcff": ListedFile("ff" * 16, 1 << 40, executable=True),
    }
    return Listing(1, files, ["empty", "été"])


def sealed_list() -> bytes:
    """That list, sealed with a key."""
    place = io.BytesIO()
    name = b"pyenclave/list\0golden"
    with open_sealed(place, "wb", key=ROOT_SECRET, name=name) as file:
        file.write(list_text(listing()))
    return place.getvalue()


VAULT_KEY = SharedKey("https://vault.example/keys/golden/" + "0a" * 16, ROOT_SECRET)


def encrypted_file() -> bytes:
    """A sealed file under a data key that a vault's key wraps."""
    place = io.BytesIO()
    with open_sealed(place, "wb", key=VAULT_KEY, name=b"golden") as file:
        file.write(PLAINTEXT)
    return place.getvalue()


def key_envelope() -> bytes:
    """The place of such an envelope alone: of these bytes and no others."""
    made = VAULT_KEY.wrap(bytes(range(32)))
    return seal_envelope(bytes(range(32)), made, file_id=bytes(range(16))).to_bytes()


def audit_log() -> bytes:
    """An exported audit log of three rows and a checkpoint."""
    start = audit.Start(bytes(range(16)), 0, audit.genesis(bytes(range(16))))
    private = ec.derive_private_key(int.from_bytes(ROOT_SECRET) >> 1, ec.SECP256R1())
    key = audit.PublicKey(private.public_key())
    lines, row = [audit.head_line(start), audit.key_line(key)], audit.Row(0, b"", start.hash)
    for event in AUDITED:
        at, reference = f"2026-07-01T12:00:0{row.seq}.000000Z", f"{row.seq}" * 16
        body = body_of(event, at=at, reference=reference)
        row = audit.Row(row.seq + 1, body, audit.row_hash(row.hash, row.seq + 1, body))
        lines.append(audit.row_line(row))
    claims = {"at": at, "hash": row.hash.hex(), "log": start.log.hex(), "seq": row.seq}
    token = jose.sign(claims, key=private, kid=key.kid, typ=audit.CHECKPOINT_TYPE)
    lines.append(audit.checkpoint_line(audit.Checkpoint.from_text(token)))
    return b"\n".join(lines) + b"\n"


def vault_records() -> list[KeyRecord]:
    """Two versions of a key of a vault, the second with everything that there is."""
    first = KeyRecord(
        name="golden",
        version="0" * 32,
        kty="oct",
        key_ops=("wrapKey", "unwrapKey"),
        public={},
        wrapped=b"wrapped by a backend",
        size=256,
        created=1_782_907_200,
        updated=1_782_907_200,
    )
    second = KeyRecord(
        name="golden",
        version="1" * 32,
        kty="EC-HSM",
        key_ops=("sign",),
        public={"crv": "P-256", "x": "AQ", "y": "Ag"},
        wrapped=bytes(range(48)),
        enabled=False,
        created=1_782_907_201,
        updated=1_782_907_202,
        not_before=1,
        expires=4_000_000_000,
        exportable=True,
        release_policy=b"{}",
        immutable=True,
        tags={"owner": "bank"},
    )
    return [first, second]


def vault_backup() -> bytes:
    """A backup of that key."""
    expiry = RotationPolicy(expiry=Duration.parse("P90D"))
    with tempfile.TemporaryDirectory() as folder:
        return pack(vault_secrets(Path(folder)), vault_records(), expiry)


def vault_secrets(folder: Path) -> Secrets:
    """The secrets of the vault that made it."""
    path = folder / "secrets"
    path.touch(mode=0o600)
    path.write_text(f"pyenclave-secrets 1\n{ROOT_SECRET.hex()}\n")
    return Secrets(path)


def sealed_stream() -> bytes:
    """A sealed stream of three chunks."""
    out = io.BytesIO()
    with open_stream(out, "wb", key=ROOT_SECRET, name=b"golden", chunk_size=20) as stream:
        stream.write(PLAINTEXT)
    return out.getvalue()


def everything() -> dict[str, bytes]:
    """Every golden file by its name."""
    return {
        "image.bin": image(),
        "encrypted-image.bin": image(encrypted=True),
        "lock.json": lock().to_bytes(),
        "unique.sealed": sealed(SealPolicy.unique),
        "signer.sealed": sealed(SealPolicy.signer),
        "data.sealed-file": sealed_file(),
        "data.sealed-stream": sealed_stream(),
        "data.encrypted-file": encrypted_file(),
        "key.envelope": key_envelope(),
        "data.wrapped-file": wrapped_file(),
        "folder.list": sealed_list(),
        "folder-list.json": list_text(listing()),
        "moved.sealed-file": moved_file(),
        "audit-log.jsonl": audit_log(),
        "vault-key.backup": vault_backup(),
        "algo.part": parts.encrypt(parts.root_of(ROOT_SECRET), "code/algo.py", PLAINTEXT),
        "evidence.bin": evidence(),
        "machine.bin": machine(),
        "platform-root.pem": root().chain.root.public_bytes(Encoding.PEM),
        "record.bin": record(),
        "secret.hpke": secret(),
        "root": state_root(),
        **counters(),
    }


if __name__ == "__main__":
    for name, data in everything().items():
        if not (HERE / name).exists():
            (HERE / name).write_bytes(data)
