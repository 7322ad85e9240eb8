"""``pyenclave measure sgx`` and ``measure diff``: exit codes, JSON, what is named."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from pyenclave.cli import main
from pyenclave.errors import MeasurementError
from pyenclave.formats.sgx import Attributes, Sigstruct
from pyenclave.measurement import difference, sgx, sigstruct
from pyenclave.measurement.explain import explain, page_digests
from pyenclave.measurement.sgx_file import measure_sgx


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=3, key_size=3072)


def signature(key: rsa.RSAPrivateKey, mrenclave: bytes, **fields: Any) -> bytes:
    modulus = key.public_key().public_numbers().n.to_bytes(384, "little")
    value = Sigstruct(
        attributes=Attributes(flags=4, xfrm=3),
        attribute_mask=Attributes(flags=(1 << 64) - 1, xfrm=3),
        mrenclave=mrenclave,
        modulus=modulus,
        **fields,
    )
    signed = key.sign(sgx.sign_message(value), padding.PKCS1v15(), SHA256())[::-1]
    q1, q2 = sgx.compute_q1_q2(modulus, signed)
    return dataclasses.replace(value, signature=signed, q1=q1, q2=q2).to_bytes()


def enclave(make: SimpleNamespace, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "segments": [
            make.Seg(0, random.Random(1).randbytes(5000), 5000, 5),
            make.Seg(0x3000, b"data" * 100, 9000, 6),
        ],
        "table": [(1, 4, 0x10000, 0, 0x203), (3, 2, 0x20000, 0xCCCCCCCC, 0x203)],
    }
    return make.Sdk(**(arguments | changes))


def signed(make: SimpleNamespace, key: rsa.RSAPrivateKey, **changes: Any) -> bytes:
    own = enclave(make, **changes)
    own.sigstruct = signature(key, make.sdk_mrenclave(own), isv_svn=3)
    data: bytes = make.sdk_file(own)
    return data


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", b"\x7fELF", bytes(1808), b"PYENCIMG", b"ECREATE\0"])
def test_what_cannot_be_measured_is_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    code, found = run(capsys, "measure", "sgx", put(tmp_path, "f", data))
    assert code in (1, 2)
    assert set(found) == {"error"}


def test_a_folder_a_pipe_and_a_missing_file_are_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", "/dev/zero"):
        code, found = run(capsys, "measure", "sgx", path)
        assert (code, set(found)) == (2, {"error"})


def test_a_changed_enclave_exits_with_1_and_still_says_what_it_is(
    make: SimpleNamespace,
    key: rsa.RSAPrivateKey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = bytearray(signed(make, key))
    data[data.index(b"datadata")] ^= 1
    code, found = run(capsys, "measure", "sgx", put(tmp_path, "f", bytes(data)))
    assert code == 1
    assert found["matches_sigstruct"] is False
    assert found["signature_valid"] is True
    assert found["mrenclave"] != found["signed_mrenclave"]
    assert any("another enclave" in text for text in found["warnings"])
    assert main(["measure", "sgx", str(tmp_path / "f")]) == 1
    assert "holds, but for another enclave" in capsys.readouterr().out


def test_a_broken_signature_exits_with_1(
    make: SimpleNamespace,
    key: rsa.RSAPrivateKey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = signed(make, key)
    at = data.index(bytes.fromhex("06000000e100000000000100"))
    for place, value in ((1026, "signature_valid"), (1040, "q1_q2_valid"), (1424, "q1_q2_valid")):
        bad = bytearray(data)
        bad[at + place] ^= 1
        code, found = run(capsys, "measure", "sgx", put(tmp_path, "f", bytes(bad)))
        assert (code, found[value]) == (1, False)
    unreadable = bytearray(data)
    unreadable[at + 44] = 1  # reserved
    code, found = run(capsys, "measure", "sgx", put(tmp_path, "f", bytes(unreadable)))
    assert code == 1
    assert "mrsigner" not in found
    assert any("cannot be read" in text for text in found["warnings"])


# ---- what is right -------------------------------------------------------------------------------


def test_a_signed_enclave(
    make: SimpleNamespace,
    key: rsa.RSAPrivateKey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = put(tmp_path, "f", signed(make, key))
    code, found = run(capsys, "measure", "sgx", path)
    assert code == 0
    assert found["mrenclave"] == make.sdk_mrenclave(enclave(make)).hex()
    assert (found["isvsvn"], found["matches_sigstruct"], found["warnings"]) == (3, True, [])
    assert main(["measure", "--json", "sgx", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["measure", "sgx", str(path), "--explain"]) == 0
    text = capsys.readouterr().out
    assert found["mrenclave"] in text
    assert "fill 0xcccccccc" in text


def test_a_sigstruct_beside_the_file_counts_in_place_of_its_own(
    make: SimpleNamespace,
    key: rsa.RSAPrivateKey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = put(tmp_path, "f", signed(make, key))
    mrenclave = make.sdk_mrenclave(enclave(make))
    beside = put(tmp_path, "s", signature(key, mrenclave, isv_prod_id=9))
    code, found = run(capsys, "measure", "sgx", path, "--sigstruct", beside)
    assert (code, found["isvprodid"]) == (0, 9)
    beside = put(tmp_path, "s", signature(key, bytes(32)))
    assert run(capsys, "measure", "sgx", path, "--sigstruct", beside)[0] == 1
    assert run(capsys, "measure", "sgx", beside, "--sigstruct", beside)[0] == 2


def test_debug_and_the_public_test_key_are_warned_about(
    key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sigstruct.examine(signature(key, bytes(32)))
    assert plain.warnings() == []
    monkeypatch.setitem(sigstruct.PUBLIC_TEST_SIGNERS, plain.mrsigner.hex(), "this test's key")
    assert "this test's key" in plain.warnings()[0]
    free = dataclasses.replace(
        plain,
        sigstruct=dataclasses.replace(
            plain.sigstruct, attribute_mask=Attributes(flags=(1 << 64) - 3, xfrm=3)
        ),
    )
    assert any("debug" in text for text in free.warnings())


def test_explain_covers_every_page_once_and_coalesces(make: SimpleNamespace) -> None:
    own = enclave(make)
    layout = measure_sgx(make.sdk_file(own)).layout
    assert layout is not None
    rows = explain(layout)
    assert sum(row["pages"] for row in rows) == len(make.sdk_pages(own))
    assert [(row["offset"], row["pages"], row["flags"], row["measured"], row["content"])
            for row in rows] == [
        (0, 2, "R-X", "all", "data"),
        (0x3000, 1, "RW-", "all", "data"),
        (0x4000, 2, "RW-", "all", "zero"),
        (0x10000, 4, "RW-", "none", "zero"),
        (0x20000, 2, "RW-", "all", "fill 0xcccccccc"),
    ]  # fmt: skip
    pages = [(at, flags, bool(chunks)) for at, flags, chunks, _ in page_digests(layout)]
    assert pages == [(at, flags, measured) for at, flags, _, measured in make.sdk_pages(own)]


# ---- diff ----------------------------------------------------------------------------------------


def test_diff_of_equal_files_is_empty(make: SimpleNamespace, key: rsa.RSAPrivateKey) -> None:
    data = signed(make, key)
    assert difference.diff(data, data) == []


def test_diff_names_the_page_of_a_changed_byte(
    make: SimpleNamespace,
    key: rsa.RSAPrivateKey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a = signed(make, key)
    b = bytearray(a)
    b[b.index(b"datadata") + 5] ^= 1
    rows = difference.diff(a, bytes(b))
    assert [(row.what, row.name.split()[0]) for row in rows] == [("page", "0x3000")]
    assert "0x3005" in str(rows[0].a)
    code, found = run(
        capsys, "measure", "diff", put(tmp_path, "a", a), put(tmp_path, "b", bytes(b))
    )
    assert code == 0
    assert (found["same"], found["same_measurement"]) == (False, False)
    assert found["differences"][0]["what"] == "page"
    assert main(["measure", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "different measurements" in capsys.readouterr().out


def test_diff_names_fields_of_the_signature_as_not_measured(
    make: SimpleNamespace, key: rsa.RSAPrivateKey
) -> None:
    own = enclave(make)
    files = []
    for svn in (1, 2):
        own.sigstruct = signature(key, make.sdk_mrenclave(own), isv_svn=svn)
        files.append(make.sdk_file(own))
    rows = difference.diff(*files)
    assert [(row.name, row.a, row.b, row.measured) for row in rows] == [("isvsvn", 1, 2, False)]


def test_diff_names_size_heap_and_flags(make: SimpleNamespace) -> None:
    a = make.sdk_file(enclave(make))
    table = [(1, 6, 0x10000, 0, 0x203), (3, 2, 0x20000, 0, 0x201)]
    b = make.sdk_file(enclave(make, table=table, size=1 << 25))
    rows = {row.name.split()[0]: (row.a, row.b) for row in difference.diff(a, b)}
    assert rows["enclave_size"] == (1 << 24, 1 << 25)
    assert rows["0x14000-0x16000"] == (None, "RW- not measured")
    assert rows["0x20000-0x22000"] == ("RW- measured, fill 0xcccccccc", "R-- measured")


def test_diff_tells_another_order_of_the_same_pages(make: SimpleNamespace) -> None:
    table = [(3, 1, 0x10000, 0, 0x203), (3, 1, 0x20000, 0, 0x203)]
    a = make.sdk_file(enclave(make, table=table))
    b = make.sdk_file(enclave(make, table=table[::-1]))
    rows = difference.diff(a, b)
    assert [row.name for row in rows] == ["order"]


def test_diff_of_many_pages_is_bounded(make: SimpleNamespace) -> None:
    tables = [[(3, 1, 0x100000 + at * 0x2000, fill, 0x203) for at in range(200)] for fill in (1, 2)]
    rows = difference.diff(*(make.sdk_file(enclave(make, table=table)) for table in tables))
    assert len(rows) == 65
    assert "136 more" in rows[-1].name


def test_diff_of_different_kinds_is_refused(make: SimpleNamespace) -> None:
    with pytest.raises(MeasurementError, match="no kind"):
        difference.diff(make.sdk_file(enclave(make)), b"something")


def test_diff_refuses_kinds_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    other = difference.FileKind("other", "nowhere", lambda data: bytes(data[:1]) == b"o")
    monkeypatch.setattr(difference, "KINDS", [*difference.KINDS, other])
    with pytest.raises(MeasurementError, match="different kinds"):
        difference.diff(b"ECREATE\0", b"other")


# ---- the command is quick ------------------------------------------------------------------------


def test_measuring_loads_little(make: SimpleNamespace, tmp_path: Path) -> None:
    """Under 0.2 s for a small file: nothing heavy is imported on the way."""
    path = put(tmp_path, "f", make.sdk_file(enclave(make)))
    script = (
        "import sys\nfrom pyenclave.cli import main\n"
        f"main(['measure', 'sgx', {str(path)!r}, '--json'])\n"
        "print(*(name for name in ('numpy', 'cryptography', 'msgspec', 'asyncio', 'cffi')"
        " if name in sys.modules))\n"
    )
    lines = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert json.loads(lines[0])["kind"] == "sgx-sdk-elf"
    assert lines[1] == ""


def test_a_pyenclave_image_is_measured_as_the_launch_does(
    make: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The golden image of the formats."""
    from pyenclave.formats.image import Image
    from pyenclave.measurement.image import measure_image

    path = Path(__file__).resolve().parents[2] / "golden" / "image.bin"
    data = path.read_bytes()
    code, found = run(capsys, "measure", "sgx", path)
    assert code == 0
    assert found["kind"] == "pyenclave"
    assert found["mrenclave"] == measure_image(Image.parse(data)).hex()
    assert run(capsys, "measure", "diff", path, path)[1]["same"] is True
    bad = bytearray(data)
    bad[5000] ^= 1
    assert run(capsys, "measure", "sgx", put(tmp_path, "f", bytes(bad)))[0] == 1
