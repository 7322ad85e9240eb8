"""Compiled code that one zygote made and the next one is given."""

from __future__ import annotations

import contextlib
import hashlib
import json
import marshal
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyenclave._core import hmac_sha256
from pyenclave._platform.codecache import CodeCache
from pyenclave._platform.state import State
from pyenclave._platform.zygotes import Zygotes
from pyenclave.errors import LaunchError, RuntimeLockError
from pyenclave.formats import messages
from pyenclave.formats.lock import Lock, Roots

KEY = bytes(range(32))
TELL = "raise RuntimeError('<<' + json.dumps(found) + '>>')\n"
# Was it compiled here, or is it what the platform handed over? And what does it do?
LOOK = (
    "import json, colorsys\n"
    "from pyenclave._worker.importer import state\n"
    "known = [e for e in state().modules.values() if e.compiled is not None]\n"
    "place = state().modules['colorsys'].compiled\n"
    "found = [len(known), place is not None and place[1] > 0, hasattr(colorsys, 'FORGED'),"
    " colorsys.rgb_to_hsv(0, 0, 1)]\n"
)
SOUND = pytest.approx([2 / 3, 1.0, 1])
Rows = dict[str, tuple[str, bytes]]


def read(data: bytes) -> tuple[bytes, Rows]:
    """Take a file apart: what is before the table, and source hash and code of each module."""
    lock, size = (int.from_bytes(data[at : at + 4], "little") for at in (40, 44))
    code = data[48 + lock + size : -32]
    rows: Rows = {}
    for line in data[48 + lock : 48 + lock + size].decode().splitlines():
        name, digest, first, length = line.split("\t")
        rows[name] = (digest, code[int(first) : int(first) + int(length)])
    return data[: 48 + lock], rows


def write(head: bytes, rows: Rows, *, table: bytes | None = None, key: bytes = KEY) -> bytes:
    """Put a file together again, as somebody does who has the key."""
    lines, code = b"", b""
    for name, (digest, piece) in rows.items():
        lines += f"{name}\t{digest}\t{len(code)}\t{len(piece)}\n".encode()
        code += piece
    lines = lines if table is None else table
    data = head[:44] + len(lines).to_bytes(4, "little") + head[48:] + lines + code
    return data + hmac_sha256(key, data)


@contextlib.contextmanager
def zygotes_of(folder: Path, *, key: bytes = KEY, roots: Roots | None = None) -> Iterator[Zygotes]:
    """Zygotes that keep compiled code in *folder*."""
    with State.open(str(folder)) as state:
        found = Zygotes(roots or Roots.of_this_process(), codes=CodeCache(state, key, "tests"))
        try:
            yield found
        finally:
            found.close()


def file_in(folder: Path) -> Path | None:
    files = list(folder.glob("code-*"))
    return files[0] if files else None


def wait_for(condition: Callable[[], bool], seconds: float = 45) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def look(launching: Any, zygotes: Zygotes, lock: Lock, *, code: str = LOOK) -> Any:
    """Launch a worker that tells what it sees."""
    data = launching.make(lock, code + TELL, functions=False)
    with launching.Launched(zygotes, data) as worker:
        ending = worker.first()
    assert isinstance(ending, messages.Ending)
    match = re.search(r"<<(.*)>>", ending.message)
    assert match, ending
    return json.loads(match[1])


@pytest.fixture(scope="module")
def kept(base: Lock, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes, list[int]]:
    """Name and bytes of the file that a debug zygote left; how many modules it had each time."""
    folder = tmp_path_factory.mktemp("kept") / "state"
    sources = sum(module.kind in ("module", "package") for module in base.modules)
    sizes: list[int] = []

    def complete() -> bool:
        path = file_in(folder)
        if path is not None:
            size = len(read(path.read_bytes())[1])
            if size not in sizes:
                sizes.append(size)
        return sources in sizes

    with zygotes_of(folder) as zygotes:
        zygotes.get(base.to_bytes(), debug=True)
        assert wait_for(complete), sizes
        path = file_in(folder)
        assert path is not None
        return path.name, path.read_bytes(), sizes


@pytest.fixture
def folder(tmp_path: Path, kept: tuple[str, bytes, list[int]]) -> Path:
    """A state directory that has the file."""
    path = tmp_path / "state"
    path.mkdir(0o700)
    put(path, kept, kept[1])
    return path


def put(folder: Path, kept: tuple[str, bytes, list[int]], data: bytes) -> None:
    path = folder / kept[0]
    path.write_bytes(data)
    path.chmod(0o600)


def test_a_zygote_hands_over_what_it_compiled(base, kept) -> None:
    """Each source of the lock, those that nobody imported too, by the hash of its source."""
    _, data, sizes = kept
    head, rows = read(data)
    assert head[48:] == base.to_bytes()
    assert len(sizes) <= 2
    expected = {m.name: m.sha256 for m in base.modules if m.kind in ("module", "package")}
    assert {name: digest for name, (digest, _) in rows.items()} == expected
    module = next(m for m in base.modules if m.name == "colorsys")
    path = Roots.of_this_process().resolve(module.path)
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    found = marshal.loads(rows["colorsys"][1])
    assert found == code
    assert found.co_filename == path


def test_the_next_zygote_uses_it_and_works_as_before(launching, base, folder) -> None:
    """Nothing is compiled, all is verified, and nothing is stored again."""
    (path,) = folder.glob("code-*")
    with zygotes_of(folder) as zygotes:
        known, used, forged, result = look(launching, zygotes, base)
        before = path.stat()
        assert not wait_for(lambda: path.stat().st_ino != before.st_ino, 2)
    sources = sum(module.kind in ("module", "package") for module in base.modules)
    assert (known, used, forged) == (sources, True, False)
    assert result == SOUND


def test_what_has_the_key_and_the_hash_is_what_runs(launching, base, folder, kept) -> None:
    """So the key is all that stands between this file and the code that runs inside."""
    head, rows = read(kept[1])
    forged = marshal.dumps(compile("FORGED = 1\nrgb_to_hsv = max\n", "forged", "exec"))
    rows["colorsys"] = (rows["colorsys"][0], forged)
    put(folder, kept, write(head, rows))
    with zygotes_of(folder) as zygotes:
        assert look(launching, zygotes, base)[1:] == [True, True, 1]


def test_code_of_another_source_is_not_used(launching, base, folder, kept) -> None:
    """The zygote takes an entry only for the hash that it verified itself."""
    head, rows = read(kept[1])
    forged = marshal.dumps(compile("FORGED = 1\nrgb_to_hsv = max\n", "forged", "exec"))
    rows["colorsys"] = (hashlib.sha256(b"FORGED = 1").hexdigest(), forged)
    put(folder, kept, write(head, rows))
    with zygotes_of(folder) as zygotes:
        known, used, was_forged, result = look(launching, zygotes, base)
    assert known == len(rows) - 1
    assert (used, was_forged) == (False, False)
    assert result == SOUND


@pytest.mark.parametrize("killed", [False, True])
def test_code_that_no_zygote_starts_with_is_forgotten_unless_somebody_killed_it(
    launching, base, folder, kept, killed: bool
) -> None:
    """It must not refuse every launch of its lock to come."""
    head, rows = read(kept[1])
    source = "import os\nos.kill(os.getpid(), 9)" if killed else "raise RuntimeError('broken')"
    name = "pyenclave._worker.zygote"
    rows[name] = (rows[name][0], marshal.dumps(compile(source, "broken", "exec")))
    put(folder, kept, write(head, rows))
    with zygotes_of(folder) as zygotes:
        with pytest.raises(LaunchError):
            zygotes.get(base.to_bytes(), debug=True)
        assert (file_in(folder) is None) is not killed
        if not killed:
            assert look(launching, zygotes, base)[3] == SOUND


@pytest.mark.parametrize("what", ["another key", "a flip in code", "a cut", "no file"])
def test_a_file_that_is_not_ours_is_removed_and_sources_are_compiled(
    launching, base, folder, kept, what: str
) -> None:
    """The launch goes on as without it."""
    head, rows = read(kept[1])
    forged = marshal.dumps(compile("FORGED = 1\nrgb_to_hsv = max\n", "forged", "exec"))
    if what == "another key":
        rows["colorsys"] = (rows["colorsys"][0], forged)
        put(folder, kept, write(head, rows, key=bytes(32)))
    elif what == "a flip in code":
        place = kept[1].index(rows["colorsys"][1]) + 40
        flipped = bytes([kept[1][place] ^ 1])
        put(folder, kept, kept[1][:place] + flipped + kept[1][place + 1 :])
    elif what == "a cut":
        put(folder, kept, kept[1][:-1])
    else:
        (folder / kept[0]).unlink()
    with zygotes_of(folder) as zygotes:
        zygotes.get(base.to_bytes(), debug=True)
        assert not (folder / kept[0]).exists()
        assert look(launching, zygotes, base)[1:] == [False, False, SOUND]


@pytest.mark.parametrize(
    "what", ["no marshal", "no code", "cut code", "a table of nonsense", "far"]
)
def test_nonsense_under_a_good_mac_never_fails_a_launch(
    launching, base, folder, kept, what: str
) -> None:
    """A flaw of the writer, say: sources are compiled."""
    head, rows = read(kept[1])
    digest, code = rows["colorsys"]
    table = None
    if what == "no marshal":
        rows["colorsys"] = (digest, b"\xff" * 100)
    elif what == "no code":
        rows["colorsys"] = (digest, marshal.dumps({"no": "code"}))
    elif what == "cut code":
        rows["colorsys"] = (digest, code[: len(code) // 2])
    elif what == "a table of nonsense":
        table = b"\xff\tx\n" * 1000
    else:
        table = f"colorsys\t{digest}\t{1 << 62}\t{1 << 62}\ncolorsys\t{digest}\t-9\t9\n".encode()
    put(folder, kept, write(head, rows, table=table))
    with zygotes_of(folder) as zygotes:
        found = look(launching, zygotes, base)
    assert found[2:] == [False, SOUND]


def test_a_changed_source_is_refused_by_name_with_its_code_at_hand(base, folder, kept) -> None:
    """The hash is taken of the file, whatever was compiled from it before."""
    roots = Roots.of_this_process()
    module = next(m for m in base.modules if m.name == "msgspec.json")
    target = folder.parent / "site" / module.path.removeprefix("site:")
    target.parent.mkdir(parents=True)
    shutil.copyfile(roots.resolve(module.path), target)
    changed = Roots(
        stdlib=roots.stdlib, base=roots.base, site=(str(folder.parent / "site"), *roots.site)
    )
    with target.open("ab") as file:
        file.write(b"\n")
    with zygotes_of(folder, roots=changed) as zygotes, pytest.raises(RuntimeLockError) as caught:
        zygotes.get(base.to_bytes(), debug=True)
    (line,) = caught.value.files
    assert str(target) in line
    assert re.search("expected [0-9a-f]{64}, found [0-9a-f]{64}", line)


def test_debug_and_production_never_share_code(base, folder, kept) -> None:
    """A production zygote beside a file of debug has compiled for itself, under another name."""
    with zygotes_of(folder) as zygotes:
        zygotes.get(base.to_bytes(), debug=False)
        assert wait_for(lambda: len(list(folder.glob("code-*"))) == 2)
    names = {path.name: path.read_bytes() for path in folder.glob("code-*")}
    assert names.pop(kept[0]) == kept[1]
    (production,) = names.values()
    assert production[8:40] != kept[1][8:40]


def test_a_worker_has_no_way_to_hand_over_code(launching, zygotes, base, tmp_path) -> None:
    """The zygote's socket for it is closed before the first line of an enclave."""
    code = (
        "import json, os\n"
        "found = sorted(os.readlink(f'/proc/self/fd/{n}').split(':')[0] for n in range(4096)"
        " if os.path.lexists(f'/proc/self/fd/{n}'))\n"
    )
    with zygotes_of(tmp_path / "state") as keeping:
        found = look(launching, keeping, base, code=code)
    without = look(launching, zygotes, base, code=code)
    # Its channel and, in debug, the way to a debugger; image, ring and sources.
    for kind, number in (("socket", 2), ("/memfd", 3)):
        assert found.count(kind) == without.count(kind) == number
