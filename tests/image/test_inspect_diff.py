"""Explaining an image, and naming what makes two differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest

from pyenclave.formats.image import FileEntry, Image, assemble, with_sigstruct
from pyenclave.image import sign
from pyenclave.image.diff import diff
from pyenclave.image.inspect import describe, flags_text
from pyenclave.measurement.image import measure_image


def changed(built: bytes, **changes: object) -> Image:
    """Return the image with other members of its info."""
    image = Image.parse(built)
    files = {name: bytes(content) for name, content in image.files.items()}
    return Image.parse(assemble(msgspec.structs.replace(image.info, **changes), image.lock, files))


def with_lock(built: bytes, **changes: object) -> Image:
    image = Image.parse(built)
    files = {name: bytes(content) for name, content in image.files.items()}
    return Image.parse(assemble(image.info, msgspec.structs.replace(image.lock, **changes), files))


@pytest.mark.parametrize(
    ("changes", "what", "name"),
    [
        ({"name": "other"}, "option", "enclave.name"),
        ({"product_id": 8}, "option", "enclave.product_id"),
        ({"security_version": 4}, "option", "enclave.security_version"),
        ({"debug": True}, "option", "enclave.debug"),
        ({"threads": 5}, "option", "enclave.threads"),
        ({"sealed_memory": 1}, "option", "memory.sealed"),
        ({"message_limit": 1}, "option", "memory.message"),
        ({"shared_memory": 4096}, "option", "memory.shared"),
        ({"blas_threads": 2}, "option", "runtime.blas_threads"),
        ({"jit": True}, "option", "runtime.jit"),
        ({"seal": {"policy": "unique"}}, "option", "seal.policy"),
        ({"seal": {}}, "option", "seal.policy"),
        ({"ocalls": ({"name": "log", "allow": ()},)}, "ocall", "log"),
        ({"functions": ({"name": "score", "kind": "x"},)}, "function", "score"),
        ({"entry_kind": "native"}, "entry", "kind"),
        ({"entry_module": "other"}, "entry", "module"),
    ],
)
def test_each_option_is_named_alone(
    built: bytes, changes: dict[str, object], what: str, name: str
) -> None:
    first, second = Image.parse(built), changed(built, **changes)
    (row,) = diff(first, second)
    assert (row["what"], row["name"], row["measured"]) == (what, name, True)
    assert row["a"] != row["b"]
    assert measure_image(first) != measure_image(second)


def test_a_changed_file_is_named_by_its_hashes(built: bytes) -> None:
    image = Image.parse(built)
    files = {name: bytes(content) for name, content in image.files.items()}
    files["files/model.bin"] = bytes(len(files["files/model.bin"]))
    (row,) = diff(image, Image.parse(assemble(image.info, image.lock, files)))
    assert (row["what"], row["name"]) == ("file", "files/model.bin")
    assert row["b"] == hashlib.sha256(files["files/model.bin"]).hexdigest()


def test_an_added_file_is_named(built: bytes) -> None:
    image = Image.parse(built)
    files = {name: bytes(content) for name, content in image.files.items()} | {"files/new": b"x"}
    entries = (*image.info.files, FileEntry(name="files/new", size=1, executable=False))
    info = msgspec.structs.replace(image.info, files=entries)
    rows = diff(image, Image.parse(assemble(info, image.lock, files)))
    assert {"what": "file", "name": "files/new"}.items() <= rows[0].items()
    assert rows[0]["a"] is None


def test_a_changed_module_library_and_bootstrap_file_are_named(built: bytes) -> None:
    lock = Image.parse(built).lock
    other = "0" * 64
    for member, what, key in (
        ("modules", "module", "name"),
        ("libraries", "library", "soname"),
        ("bootstrap", "bootstrap", "path"),
    ):
        items = getattr(lock, member)
        new = (msgspec.structs.replace(items[0], sha256=other), *items[1:])
        (row,) = diff(Image.parse(built), with_lock(built, **{member: new}))
        assert (row["what"], row["name"], row["b"]) == (what, getattr(items[0], key), other)
        (row,) = diff(Image.parse(built), with_lock(built, **{member: items[:-1], "preload": ()}))[
            -1:
        ]
        assert row["b"] is None


def test_another_python_is_named(built: bytes) -> None:
    (row,) = diff(Image.parse(built), with_lock(built, python="cpython-3.12.0 x"))
    assert (row["what"], row["name"]) == ("option", "python")


def test_a_signature_differs_without_being_measured(built: bytes, key: bytes) -> None:
    rows = diff(Image.parse(built), Image.parse(sign.sign(built, key)))
    assert {row["name"] for row in rows} == {"MRSIGNER", "DATE", "SIGSTRUCT"}
    assert not any(row["measured"] for row in rows)


def test_equal_images_do_not_differ(built: bytes, key: bytes) -> None:
    assert diff(Image.parse(built), Image.parse(built)) == []
    signed = sign.sign(built, key)
    assert diff(Image.parse(signed), Image.parse(signed)) == []


def test_the_description_is_json_and_true(built: bytes, key: bytes) -> None:
    image = Image.parse(sign.sign(built, key))
    found = json.loads(json.dumps(describe(image)))
    assert found["mrenclave"] == measure_image(image).hex()
    assert found["signature"] == "holds"
    assert found["mrsigner"] == hashlib.sha256(image.sigstruct_bytes[128:512]).hexdigest()
    assert (found["product_id"], found["security_version"]) == (7, 3)
    assert [function["name"] for function in found["functions"]] == ["score"]
    for row in found["files"]:
        assert row["sha256"] == hashlib.sha256(image.files[row["name"]]).hexdigest()
    assert sum(row["pages"] for row in found["pages"]) == len(list(image.pages()))


def test_the_trusted_base_is_the_whole_lock(built: bytes) -> None:
    image = Image.parse(built)
    base = describe(image)["trusted_base"]
    assert {m["name"] for m in base["modules"]} == {
        m.name for m in image.lock.modules if m.kind != "namespace"
    }
    assert [lib["name"] for lib in base["libraries"]] == [x.soname for x in image.lock.libraries]
    assert len(base["bootstrap"]) == len(image.lock.bootstrap)
    assert base["entry"]["path"] == "entry/score.py"
    assert base["bytes"] > 10 << 20
    assert all(row["size"] > 0 for row in (*base["libraries"], *base["bootstrap"]))


def test_a_signature_that_does_not_hold_is_said_not_hidden(built: bytes, key: bytes) -> None:
    image = Image.parse(sign.sign(built, key))
    broken = bytearray(image.sigstruct_bytes)
    broken[600] ^= 1
    found = describe(Image.parse(with_sigstruct(image, bytes(broken))))
    assert found["signature"].startswith("does not hold")
    assert found["mrsigner"] is None


def test_flags_are_written_as_people_write_them() -> None:
    assert [flags_text(flags) for flags in (0x201, 0x205, 0x203, 0x100)] == [
        "R-- REG", "R-X REG", "RW- REG", "--- TCS",
    ]  # fmt: skip


def test_describing_needs_no_files_of_this_machine(built: bytes, tmp_path: Path) -> None:
    lock = Image.parse(built).lock
    moved = with_lock(
        built,
        libraries=tuple(
            msgspec.structs.replace(x, path=f"abs:{tmp_path}/x") for x in lock.libraries
        ),
    )
    assert describe(moved)["trusted_base"]["libraries"]
