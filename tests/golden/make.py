"""
Make the golden files: one of each kind that pyenclave keeps, from fixed inputs.

``python tests/golden/make.py`` writes those that are missing and never replaces one: what a release
once wrote must open for ever. All but ``secret.hpke`` (HPKE has fresh randomness) come out the
same each time, and ``tests/test_golden.py`` holds that too.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.serialization import Encoding

from pyenclave._platform.counters import CounterStore, MemoryFiles
from pyenclave._platform.keys import Keys
from pyenclave._platform.quote import Quoter
from pyenclave._platform.root import PlatformRoot
from pyenclave.formats.evidence import Evidence, bound_report_data, provision_info
from pyenclave.formats.image import FileEntry, Image, ImageInfo, assemble
from pyenclave.formats.lock import Lock, LockedFile, LockedLibrary, LockedModule
from pyenclave.formats.record import ProtectionBit, ProtectionRecord
from pyenclave.formats.sgx import Attributes, KeyRequest, ReportBody
from pyenclave.measurement.image import measure_image
from pyenclave.sealed import SealPolicy, blob, provision

HERE = Path(__file__).resolve().parent
# Evidence joins these when PLATFORM_SVN is raised: the platform signs its version.
NOT_REPEATABLE = {"secret.hpke"}

ROOT_SECRET = hashlib.sha256(b"golden root secret of nobody").digest()
PLAINTEXT = b"what was sealed by the first release opens for ever\n"
AAD = b"golden"
COUNTER_MARK = bytes(range(32, 64))
SECRET = b"a secret sent to the golden enclave\n"
NONCE = bytes(range(32))
USER_DATA = b"user data of the golden enclave"
ENCLAVE_ID = "000102030405060708090a0b0c0d0e0f"
ENTRY = b"import pyenclave\n\n\n@pyenclave.ecall\ndef double(x: int) -> int:\n    return 2 * x\n"
MODEL = bytes(range(256))


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


def image() -> bytes:
    """An unsigned image with a Python entry and a file."""
    files = {"entry/golden.py": ENTRY, "files/model.bin": MODEL}
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


def sealed(policy: SealPolicy) -> bytes:
    """A sealed blob."""
    return blob.seal(
        PLAINTEXT,
        identity=identity(),
        policy=policy,
        key_provider=key_provider,
        secret=bytes(range(32)),
        aad=AAD,
        counter=blob.CounterBinding(counter_id=bytes(range(16)), value=5),
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


def everything() -> dict[str, bytes]:
    """Every golden file by its name."""
    return {
        "image.bin": image(),
        "lock.json": lock().to_bytes(),
        "unique.sealed": sealed(SealPolicy.unique),
        "signer.sealed": sealed(SealPolicy.signer),
        "evidence.bin": evidence(),
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
