"""The corpus, continued: logs, firmware, programs, images, our own files, policies."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import fuzz_sealed
from fuzz_seeds import NOW, SEEDS, TESTS, Corpus, Maker, from_tests, seeds

# ---- event logs, firmware, images -----------------------------------------------------------


@seeds("eventlog")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield _legacy_log()
    yield b'[{"imr":0,"event_type":4,"digest":"%s","event":"x","event_payload":"00"}]' % (
        b"00" * 48
    )
    logs = ("tpm-pcr-*/*.bin", "tdx-rtmr-*/*.bin", "tdx-rtmr-*/*.json")
    yield from corpus.files("attestation/*/ccel.bin", "attestation/*/eventlog.bin")
    yield from corpus.files(*(f"measurement/{pattern}" for pattern in logs))


def _legacy_log() -> bytes:
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 1)
    spec += struct.pack("<HH", 0x0C, 48) + b"\0"
    log = struct.pack("<II20sI", 0, 3, bytes(20), len(spec)) + spec
    for index, kind, data in (
        (1, 4, bytes(4)),
        (1, 0x80000001, bytes(16) + struct.pack("<QQ", 2, 1) + "ab".encode("utf-16-le") + b"\1"),
        (2, 0x80000003, bytes(16) + struct.pack("<QQ", 16, 0) + bytes(16)),
        (3, 0x0D, b"kernel_cmdline: quiet\0"),
    ):
        log += struct.pack("<IIIH", index, kind, 1, 0x0C) + bytes(48)
        log += struct.pack("<I", len(data)) + data
    return log + b"\xff" * 64


@seeds("ccel-table")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield b"CCEL" + struct.pack("<IBB", 56, 1, 0) + bytes(26) + struct.pack("<BBHQQ", 2, 0, 0, 1, 2)
    yield from corpus.files("measurement/*/ccel_table.bin")


@seeds("firmware")
def _(corpus: Corpus) -> Iterator[bytes]:
    build = from_tests("measurement/conftest.py").build
    pages = [(0x800000, 0x9000, 1), (0x80A000, 0x1000, 3), (0x80B000, 0x1000, 2)]
    pages.append((0x810000, 0x1000, 0x10))
    yield bytes(build(8192, sev=pages, hashes=(0x810C00, 0x400), svsm=0x100))
    td = [(0, 8192, (1 << 32) - 8192, 8192, 0, 1), (0, 0, 0x809000, 0x2000, 2, 0)]
    yield bytes(build(8192, tdx=td))
    yield bytes(build(4096))
    yield from corpus.files("measurement/_common/ovmf_*")


@seeds("eif")
def _(corpus: Corpus) -> Iterator[bytes]:
    sections = [(1, b"kernel"), (2, b"quiet"), (5, b"{}"), (3, b"init"), (3, b"app")]
    offsets, body = [], b""
    for kind, data in sections:
        offsets.append(548 + len(body))
        body += struct.pack(">HHQ", kind, 0, len(data)) + data
    head = b".eif" + struct.pack(">HHQQHH", 4, 0, 1 << 28, 2, 0, len(sections))
    head += struct.pack(">32Q", *offsets, *[0] * (32 - len(sections)))
    sizes = [len(data) for _, data in sections]
    head += struct.pack(">32Q", *sizes, *[0] * (32 - len(sections)))
    yield head + bytes(8) + body
    yield from corpus.files("measurement/nitro-eif-*/image.eif")


def checked_eif(data: bytes) -> bytes:
    """Return *data* with a CRC-32 that holds."""
    if len(data) < 548:
        return data
    crc = zlib.crc32(data[548:], zlib.crc32(data[:544]))
    return data[:544] + struct.pack(">I", crc) + data[548:]


@seeds("sigstruct")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield from corpus.files("measurement/sgx-sigstruct-*/*.bin", "measurement/sgx-sigstruct-*/*.s*")
    yield from corpus.files("measurement/sgx-sigstruct-*/*.css")
    yield corpus.signature


@seeds("sgx-file")
def _(corpus: Corpus) -> Iterator[bytes]:
    made = corpus.enclaves
    text = made.Seg(0, b"\x90" * 5000, 6000, 5)
    data = made.Seg(0x3000, b"d" * 100, 9000, 6)
    table = [(0x10, 0, 0x10000, 0, 0x203), ("group", 1, 2, 0x10000)]
    plain = made.Sdk(segments=[text, data], size=1 << 20)
    yield made.sdk_file(plain)
    yield made.sdk_file(
        made.Sdk(
            segments=[text, data],
            size=1 << 20,
            table=[(1, 4, 0x10000, 0, 0x203), (3, 2, 0x20000, 0xCCCCCCCC, 0x203), table[1]],
            patches=[(1, 8, b"patch")],
            relocations=[(0x3008, 8)],
            blocks=2,
        )
    )
    yield made.oe_file(
        made.Oe(
            segments=[made.Seg(0, bytes(0x2000), 0x2000, 5), made.Seg(0x3000, bytes(500), 900, 6)],
            info_at=0x800,
            rela_dyn=[(0x3010, 8, 0x1000)],
            symbols={"_start": 0x1040},
        )
    )
    yield made.stream(1 << 16, 1, [(0, 0x205, bytes(4096), True), (4096, 0x203, b"", False)])
    yield (TESTS / "golden" / "image.bin").read_bytes()
    yield from corpus.files("measurement/sgx-sgxs-*/*.sgxs")
    yield corpus.signature


@seeds("elf")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield from corpus.get("sgx-file")[:3]
    strings = b"\0libx.so.1\0libc.so.6\0"
    dynamic = struct.pack("<10Q", 14, 1, 1, 11, 5, 0x300, 10, len(strings), 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0x400, 0x400, 4096)
    load += struct.pack("<IIQQQQQQ", 2, 6, 0x200, 0x200, 0, len(dynamic), len(dynamic), 8)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    data = bytearray((head + load).ljust(0x400, b"\0"))
    data[0x200 : 0x200 + len(dynamic)] = dynamic
    data[0x300 : 0x300 + len(strings)] = strings
    yield bytes(data)


@seeds("elf-protect")
def _(corpus: Corpus) -> Iterator[bytes]:
    """A library with one trusted function, code, RELRO and a page of variables."""
    yield from corpus.get("elf")
    strings = b"\0pye_ecall_f\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x12, 0, 1, 0x1400, 1)
    dynamic = struct.pack("<12Q", 5, 0x300, 10, len(strings), 6, 0x340, 11, 24, 4, 0x380, 0, 0)
    segments = (
        (1, 4, 0, 0, 0x400, 0x400),
        (1, 5, 0x400, 0x1400, 0x10, 0x10),
        (1, 6, 0x500, 0x2500, len(dynamic), 0x1300),
        (2, 6, 0x500, 0x2500, len(dynamic), len(dynamic)),
        (0x6474E551, 6, 0, 0, 0, 0),
        (0x6474E552, 4, 0x500, 0x2500, len(dynamic), 0xB00),
    )
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56,
        len(segments), 0, 0, 0,
    )  # fmt: skip
    for kind, flags, offset, start, filesz, memsz in segments:
        head += struct.pack("<IIQQQQQQ", kind, flags, offset, start, 0, filesz, memsz, 4096)
    data = bytearray(head.ljust(0x600, b"\0"))
    for at, part in (
        (0x300, strings), (0x340, symbols), (0x380, struct.pack("<5I", 1, 2, 1, 0, 0)),
        (0x400, b"\x31\xc0\xc3"), (0x500, dynamic),
    ):  # fmt: skip
        data[at : at + len(part)] = part
    yield bytes(data)


# ---- our own --------------------------------------------------------------------------------


def _golden(*names: str) -> Maker:
    return lambda _corpus: [(TESTS / "golden" / name).read_bytes() for name in names]


SEEDS["image"] = _golden("image.bin", "encrypted-image.bin")
SEEDS["lock"] = _golden("lock.json")
SEEDS["record"] = _golden("record.bin")


@seeds("evidence")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield corpus.issuer.evidence()
    yield (TESTS / "golden" / "evidence.bin").read_bytes()


@seeds("machine")
def _(corpus: Corpus) -> Iterator[bytes]:
    from pyenclave.formats.machine import MachineEvidence

    for report in corpus.get("snp-report")[:2]:
        yield MachineEvidence(evidence=report).to_bytes()
        yield MachineEvidence(evidence=report, files={"ark.pem": b"a", "vek.der": b"v"}).to_bytes()
    yield (TESTS / "golden" / "machine.bin").read_bytes()


@seeds("image-info")
def _(_corpus: Corpus) -> Iterator[bytes]:
    from pyenclave.formats.image import Image

    for name in ("image.bin", "encrypted-image.bin"):
        yield Image.parse((TESTS / "golden" / name).read_bytes()).info.to_bytes()


@seeds("sealed")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield (TESTS / "golden" / "signer.sealed").read_bytes()
    yield (TESTS / "golden" / "unique.sealed").read_bytes()


@seeds("sealed-file")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield (TESTS / "golden" / "data.sealed-file").read_bytes()
    moved = (TESTS / "golden" / "moved.sealed-file").read_bytes()
    yield moved
    yield moved[4096:]


@seeds("sealed-stream")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield (TESTS / "golden" / "data.sealed-stream").read_bytes()


@seeds("sealed-node")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield fuzz_sealed.node()
    yield bytes(4096)


@seeds("folder-list")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield (TESTS / "golden" / "folder-list.json").read_bytes()
    yield b'{"version":1,"files":{"../a":{"id":"00","size":0}},"folders":["/"]}'


@seeds("wrapped")
def _(_corpus: Corpus) -> Iterator[bytes]:
    from pyenclave.formats.wrapped import PLACE_SIZE, Envelope

    blob = (TESTS / "golden" / "signer.sealed").read_bytes()
    yield Envelope(2, blob).to_bytes() + bytes(PLACE_SIZE)
    yield Envelope(2, blob).to_bytes() + Envelope(3, blob).to_bytes()
    yield (TESTS / "golden" / "data.wrapped-file").read_bytes()
    of_vault = (TESTS / "golden" / "key.envelope").read_bytes()
    yield of_vault + bytes(PLACE_SIZE)
    yield of_vault + Envelope(3, blob).to_bytes()


@seeds("key-envelope")
def _(_corpus: Corpus) -> Iterator[bytes]:
    from pyenclave.formats.wrapped import newest

    yield newest((TESTS / "golden" / "key.envelope").read_bytes() + bytes(4096)).blob


@seeds("audit-log")
def _(_corpus: Corpus) -> Iterator[bytes]:
    whole = (TESTS / "golden" / "audit-log.jsonl").read_bytes()
    yield whole
    lines = whole.splitlines(keepends=True)
    yield b"".join(lines[:2] + lines[3:])
    yield b"".join([*lines[:2], lines[3], lines[2], *lines[4:]])


@seeds("bundle")
def _(corpus: Corpus) -> Iterator[bytes]:
    from pyenclave.formats.bundle import Bundle

    yield Bundle({"vek.der": corpus.amd.vek, "ask.pem": b"x"}, NOW).to_bytes()


@seeds("message")
def _(_corpus: Corpus) -> Iterator[bytes]:
    from pyenclave.formats import messages

    for message in (
        messages.Hello(),
        messages.Launch(require=("sandbox",), debug=True),
        messages.Close(enclave_id=bytes(16)),
        messages.WhyReply(state="lost", reason="x"),
        messages.Failure(code="launch", message="x"),
    ):
        yield messages.encode(message)


@seeds("debugging")
def _(_corpus: Corpus) -> Iterator[bytes]:
    from pyenclave.formats import debugging

    for packet in (
        debugging.Said(text="> entry.py(3)half()"),
        debugging.Asks(prompt="(Pdb) "),
        debugging.Choices(words=("x", "y")),
        debugging.Goes(),
        debugging.Ends(reason="it ended"),
        debugging.Line(text=None),
        debugging.Complete(line="p x", begin=2, end=3),
    ):
        yield debugging.encode(packet)


@seeds("policy-toml")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield (
        b'mrenclave = ["' + b"00" * 32 + b'"]\nallow_debug = true\n'
        b'mrtd = [{value = "' + b"11" * 48 + b'", not_after = 2027-01-31T00:00:00Z}]\n'
        b'[pcrs]\n0 = "' + b"22" * 32 + b'"\n[min_tcb]\nsnp = 1\n'
    )
    yield b'claims = {"a.b" = [1, "x", true]}\nissuers = ["https://x"]\n'


@seeds("policy-json")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield b'{"mrenclave":["' + b"00" * 32 + b'"],"allow_debug":true,"rtmrs":{"1":"' + b"1" * 96
    yield b'{"claims":{"a.b":[1]},"min_tcb":{"snp":1},"tcb_statuses":["UpToDate"]}'


@seeds("azure-policy")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield (
        b"version= 1.2;\nconfigurationrules{};\nauthorizationrules {\n"
        b'c:[type=="x-ms-sgx-is-debuggable", value==false] && [type=="a", issuer=="CustomClaim"]'
        b" => permit();\n};\nissuancerules {\n"
        b'c1:[type=="x"] => issue(type="y", value=c1.value);\n'
        b'c:[type=="boot"] => add(type="e", value=JmesPath(c.value, "Events[?a==`1`]|[0]"));\n'
        b'=> issue(type="z", value=AppendString("a", "b"));\n};\n'
    )
    yield (
        b"version=1.0;authorizationrules{=>permit();};"
        b'issuancerules{c:[type=="a"]=>issue(claim=c);};'
    )


@seeds("release-policy")
def _(corpus: Corpus) -> Iterator[bytes]:
    yield (
        b'{"version":"1.0.0","anyOf":[{"authority":"https://x.attest.azure.net","allOf":['
        b'{"claim":"x-ms-sgx-is-debuggable","equals":"false"},'
        b'{"anyOf":[{"claim":"a.b","equals":1},{"claim":"c","equals":true}]}]}]}'
    )
    yield (
        b'{"key":{"authority":{"endpoint":"x.attest.azure.net"}},'
        b'"claims":[[{"claim":"a","exists":true}]]}'
    )
    yield from corpus.files("attestation/akv-release-policy*/policy.json")
