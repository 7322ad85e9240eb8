"""``pyenclave seal``, ``unseal``, ``info`` and ``evidence`` with a real tool enclave."""

from __future__ import annotations

import json
import stat

import pytest

from pyenclave import cli
from pyenclave.cli import _tool
from pyenclave.errors import EcallError
from pyenclave.formats import wrapped
from pyenclave.formats.sealed import HEADER_SIZE
from pyenclave.host import Enclave
from pyenclave.image import build, keys, sign
from pyenclave.image.manifest import Manifest
from pyenclave.sealed import provision

BLOB_MAKER = """
from pyenclave import trusted


@trusted.ecall
def keep(data: bytes, aad: bytes) -> bytes:
    return trusted.seal(data, aad=aad)
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory, used):
    """One state directory for the whole module, so that the tool enclave is built once."""
    folder = used(tmp_path_factory.mktemp("state") / "state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(folder))
        yield folder


def run(capsys, *arguments: object) -> tuple[int, dict]:
    code = cli.main([*map(str, arguments), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return code, json.loads(lines[0])


@pytest.fixture
def sealed(state, tmp_path, capsys):
    plain = tmp_path / "plain"
    plain.write_bytes(b"planted secret " * 100)
    code, document = run(capsys, "seal", plain)
    assert (code, document["policy"]) == (0, "signer")
    return tmp_path / "plain.sealed"


def test_a_file_is_sealed_and_opened_again(sealed, capsys):
    assert b"planted secret" not in sealed.read_bytes()
    code, _ = run(capsys, "unseal", sealed, "-o", sealed.with_name("back"))
    assert code == 0
    back = sealed.with_name("back")
    assert back.read_bytes() == b"planted secret " * 100
    assert stat.S_IMODE(back.stat().st_mode) == 0o600


def test_nothing_is_overwritten_unless_forced(sealed, capsys):
    code, document = run(capsys, "unseal", sealed)
    assert code == 2
    assert "--force" in document["error"]["message"]
    sealed.with_name("plain").write_bytes(b"other")
    assert run(capsys, "unseal", sealed, "--force")[0] == 0
    assert sealed.with_name("plain").read_bytes() == b"planted secret " * 100
    assert run(capsys, "seal", sealed.with_name("plain"))[0] == 2


@pytest.mark.parametrize("place", ["envelope", "header", "page", "end"])
def test_a_changed_file_is_refused_with_exit_code_1(sealed, capsys, place):
    data = bytearray(sealed.read_bytes())
    at = {
        "envelope": 64 + 240,
        "header": wrapped.HEAD_SIZE + 40,
        "page": wrapped.HEAD_SIZE + 8192 + 99,
    }
    if place == "end":
        del data[-4096:]
    else:
        data[at[place]] ^= 1
    sealed.write_bytes(data)
    code, document = run(capsys, "unseal", sealed, "-o", sealed.with_name("back"))
    assert code == 1
    assert document["error"]["code"] == "sealing.unseal"
    assert not sealed.with_name("back").exists()
    assert not list(sealed.parent.glob(".*.part"))


def test_a_blob_of_the_first_releases_is_opened_and_sealed_anew(state, tmp_path, capsys):
    """The tool once made blobs; it still opens them, and bound data holds as before."""
    entry = tmp_path / "older.py"
    entry.write_text(BLOB_MAKER)
    if not (state / "tool-signing-key.pem").exists():
        keys.write_new(state / "tool-signing-key.pem", keys.keygen())
    manifest = Manifest(name="older", entry=entry, product_id=0x5045, security_version=1)
    image = sign.sign(build.build_manifest(manifest), (state / "tool-signing-key.pem").read_bytes())
    with Enclave(image) as enclave:
        old = tmp_path / "old.sealed"
        old.write_bytes(enclave.call("keep", b"from long ago", b"bound"))
    back = tmp_path / "back"
    assert run(capsys, "info", old)[1]["form"] == "sealed blob"
    assert run(capsys, "unseal", old, "-o", back)[0] == 1
    assert run(capsys, "reseal", old, "--aad", "bound")[0] == 0
    assert run(capsys, "unseal", old, "-o", back, "--aad", "bound")[0] == 0
    assert back.read_bytes() == b"from long ago"


def test_the_key_of_a_file_is_not_opened_for_the_host(sealed, capsys):
    """An envelope is a blob, but no function of the tool opens it as one."""
    envelope = wrapped.newest(sealed.read_bytes())
    with _tool.tool_enclave(quiet=True) as enclave:
        for aad in (b"", b"pyenclave/envelope/1\0\0", b"pyenclave/envelope/1\x00\x01"):
            for has_aad in (False, True):
                with pytest.raises(EcallError):
                    enclave.call("unseal_blob", envelope.blob, aad, has_aad)
                with pytest.raises(EcallError):
                    enclave.call("reseal_blob", envelope.blob, "signer", aad, has_aad)
        public, report = enclave.call("introduce", enclave.call("target"))
        own = provision.RuntimeKey().public
        with pytest.raises(EcallError):  # a key of the host's own, under the enclave's report
            enclave.call("hand_over", envelope.blob, b"", False, False, own, report)
        forged = bytearray(report)
        forged[64] ^= 1
        with pytest.raises(EcallError):
            enclave.call("hand_over", envelope.blob, b"", False, False, public, bytes(forged))
        assert enclave.call("hand_over", envelope.blob, b"", False, False, public, report)


def test_additional_data_is_bound(sealed, capsys):
    plain, bound = sealed.with_name("plain"), sealed.with_name("bound")
    assert run(capsys, "seal", plain, "-o", bound, "--aad", "invoice 7")[0] == 0
    back = sealed.with_name("back")
    for wrong in ((), ("--aad", "invoice 8"), ("--aad", "")):
        assert run(capsys, "unseal", bound, "-o", back, *wrong)[0] == 1
    assert run(capsys, "unseal", bound, "-o", back, "--aad", "invoice 7")[0] == 0


def test_a_blob_of_another_identity_is_refused_and_its_header_can_be_read(sealed, capsys, tmp_path):
    entry = tmp_path / "elsewhere.py"
    entry.write_text(
        "from pyenclave import trusted\n\n\n"
        "@trusted.ecall\ndef keep(data: bytes) -> bytes:\n    return trusted.seal(data)\n"
    )
    with Enclave.from_file(entry, quiet=True) as enclave:
        blob = enclave.call("keep", b"data")
    (tmp_path / "other.sealed").write_bytes(blob)
    code, document = run(capsys, "unseal", tmp_path / "other.sealed")
    assert code == 1
    assert "debug and production" in document["error"]["message"]
    code, document = run(capsys, "info", tmp_path / "other.sealed")
    assert (code, document["policy"], document["debug"]) == (0, "unique", True)
    assert len(document["mrenclave"]) == 64
    assert document["verified"] is False


def test_info_names_policy_and_signer(sealed, capsys):
    code, document = run(capsys, "info", sealed)
    assert code == 0
    assert (document["policy"], document["length"], document["generation"]) == ("signer", 1500, 1)
    assert document["form"] == "sealed file of an enclave"
    assert len(document["mrsigner"]) == 64
    assert document["mrenclave"] is None


@pytest.mark.parametrize("content", [b"", b"not a blob", b"PYESEAL\x01" + bytes(HEADER_SIZE)])
def test_what_is_no_blob_is_refused_without_launching_anything(
    content, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("pyenclave.cli._tool.tool_enclave", None)
    (tmp_path / "x.sealed").write_bytes(content)
    for command, exit_code in (("unseal", 1), ("info", 2)):
        code, document = run(capsys, command, tmp_path / "x.sealed")
        assert code == exit_code
        assert document["error"]["code"] == "sealing.unseal"


def test_the_tools_key_is_private_and_kept(sealed, state, capsys):
    key = state / "tool-signing-key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    (state / "tool.enclave").write_bytes(b"corrupt")
    back = sealed.with_name("back")
    assert run(capsys, "unseal", sealed, "-o", back)[0] == 0  # built anew, the same signer
    assert key.read_bytes() == before


def test_evidence_of_the_tool_enclave_verifies_against_the_enrolled_root(state, tmp_path, capsys):
    evidence, root = tmp_path / "evidence", tmp_path / "root.pem"
    nonce = "0123456789abcdef" * 2
    code, made = run(capsys, "evidence", "--nonce", nonce, "-o", evidence, "--root-out", root)
    assert code == 0
    policy = tmp_path / "policy.json"
    policy.write_text(
        json.dumps({"mrenclave": made["mrenclave"], "dangerous_allow_software": True})
    )
    code, document = run(
        capsys, "verify", evidence, "--root", root, "--nonce", nonce, "--policy", policy
    )
    assert code == 0
    assert document["identified"] is True
    assert document["fresh"] is True
    assert run(capsys, "evidence", "-o", evidence)[0] == 2  # never overwritten unasked
