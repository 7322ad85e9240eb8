"""What was done to an audit log is named: rows changed, removed, reordered, put in, cut off."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.errors import AuditError
from pyenclave.formats import jose
from pyenclave.formats.audit_chain import Report, verify_chain
from pyenclave.formats.audit_log import (
    CHECKPOINT_TYPE,
    Checkpoint,
    Exported,
    PublicKey,
    Row,
    Start,
    checkpoint_line,
    fields_of,
    genesis,
    head_line,
    key_line,
    read_export,
    row_hash,
    row_line,
)

LOG = bytes(range(16))
START = Start(LOG, 0, genesis(LOG))
PRIVATE = ec.generate_private_key(ec.SECP256R1())
KEY = PublicKey(PRIVATE.public_key())
KEYS = {KEY.kid: KEY}


def chain(bodies: Iterable[bytes], start: Start = START) -> list[Row]:
    rows, digest = [], start.hash
    for seq, body in enumerate(bodies, start.seq + 1):
        digest = row_hash(digest, seq, body)
        rows.append(Row(seq, body, digest))
    return rows


def log(count: int = 200) -> list[Row]:
    return chain(b'{"n":%d}' % number for number in range(count))


def signed(row: Row, *, log: bytes = LOG, key: Any = PRIVATE, **other: Any) -> Checkpoint:
    claims = {
        "at": "2026-07-01T00:00:00Z",
        "hash": row.hash.hex(),
        "log": log.hex(),
        "seq": row.seq,
    }
    kid = PublicKey(key.public_key()).kid
    token = jose.sign(claims | other, key=key, kid=kid, typ=CHECKPOINT_TYPE)
    return Checkpoint.from_text(token)


def renumber(rows: list[Row], first: int = 1) -> list[Row]:
    return [replace(row, seq=seq) for seq, row in enumerate(rows, first)]


def found(rows: list[Any], **options: Any) -> list[tuple[str, int, int]]:
    report = verify_chain(rows, start=START, keys=KEYS, **options)
    assert report.intact is (not report.findings)
    return [(finding.kind, finding.first, finding.last) for finding in report.findings]


def test_an_untouched_log_is_intact() -> None:
    rows = log()
    report = verify_chain(rows, start=START, keys=KEYS, head=(200, rows[-1].hash))
    assert report.intact
    assert (report.rows, report.last, report.hash) == (200, 200, rows[-1].hash)
    assert verify_chain([], start=START, keys=KEYS, head=(0, START.hash)).intact


@pytest.mark.parametrize("at", [1, 2, 17, 63, 64, 65, 150, 199, 200])
def test_a_changed_row_is_named(at: int) -> None:
    rows = log()
    rows[at - 1] = replace(rows[at - 1], body=b'{"n":"other"}')
    assert found(rows) == [("changed", at, at)]


@pytest.mark.parametrize("at", [1, 17, 64, 199])
def test_a_row_changed_with_its_hash_is_named_beside_the_next(at: int) -> None:
    rows = log()
    body = b'{"n":"other"}'
    before = rows[at - 2].hash if at > 1 else START.hash
    rows[at - 1] = Row(at, body, row_hash(before, at, body))
    report = verify_chain(rows, start=START, keys=KEYS)
    ((kind, first, text),) = [(f.kind, f.first, f.message) for f in report.findings]
    assert (kind, first) == ("changed", at + 1)
    assert text == f"row {at + 1} was changed, or row {at} together with its hash"


def test_a_row_whose_text_and_hash_are_nonsense_is_named_alone() -> None:
    rows = log()
    rows[16] = Row(17, b"{}", bytes(32))
    assert found(rows) == [("changed", 17, 17)]
    rows = log()
    rows[16] = replace(rows[16], hash=bytes(32))
    assert found(rows) == [("changed", 17, 17)]


@pytest.mark.parametrize(("first", "last"), [(1, 1), (17, 17), (17, 30), (1, 100), (60, 190)])
def test_removed_rows_are_named(first: int, last: int) -> None:
    rows = log()
    del rows[first - 1 : last]
    assert found(rows) == [("removed", first, last)]


@pytest.mark.parametrize(("first", "last"), [(1, 1), (17, 17), (17, 30), (150, 190)])
def test_removed_rows_are_named_after_renumbering(first: int, last: int) -> None:
    rows = log()
    del rows[first - 1 : last]
    assert found(renumber(rows)) == [("removed", first, last)]


@pytest.mark.parametrize("at", [1, 17, 64, 199])
def test_exchanged_rows_are_named(at: int) -> None:
    rows = log()
    rows[at - 1], rows[at] = rows[at], rows[at - 1]
    expected = [("reordered", at, at + 1)]
    assert found(rows) == expected  # as lines of a file
    assert found(renumber(rows)) == expected  # as rows of a table


def test_exchanged_texts_are_named() -> None:
    rows = log()
    one, two = rows[16], rows[20]
    rows[16], rows[20] = replace(one, body=two.body), replace(two, body=one.body)
    assert found(rows) == [("reordered", 17, 21)]


def test_a_row_that_was_moved_is_named() -> None:
    rows = log()
    rows.insert(40, rows.pop(16))
    assert found(renumber(rows)) == [("reordered", 17, 41)]


@pytest.mark.parametrize("at", [1, 17, 100, 200])
def test_a_row_that_was_put_in_is_named(at: int) -> None:
    rows = log()
    before = rows[at - 2].hash if at > 1 else START.hash
    foreign = b'{"n":"foreign"}'
    junk = [*rows[: at - 1], Row(at, foreign, bytes(32)), *rows[at - 1 :]]
    assert found(renumber(junk)) == [("inserted", at, at)]
    fitting = Row(at, foreign, row_hash(before, at, foreign))
    forged = [*rows[: at - 1], fitting, *rows[at - 1 :]]
    if at < 200:
        assert found(renumber(forged)) == [("inserted", at, at)]
    else:  # nothing follows the row after it
        assert found(renumber(forged)) == [("changed", 201, 201)]


def test_a_cut_tail_is_named_by_the_head_or_by_a_checkpoint_kept_elsewhere() -> None:
    rows = log()
    assert found(rows[:150], head=(200, rows[-1].hash)) == [("cut", 151, 200)]
    kept = signed(rows[179])
    assert found(rows[:150], head=(150, rows[149].hash), kept=[kept]) == [("cut", 151, 180)]
    assert found(rows[:150], head=(150, rows[149].hash)) == []  # nobody can know
    assert found([], kept=[kept]) == [("cut", 1, 180)]


def test_rows_after_the_head_are_named() -> None:
    rows = log()
    assert found(rows, head=(198, rows[197].hash)) == [("inserted", 199, 200)]
    assert found(rows, head=(200, bytes(32))) == [("changed", 200, 200)]


def test_a_chain_computed_anew_is_named_by_the_checkpoints() -> None:
    rows = log()
    stream = [*rows[:50], signed(rows[49]), *rows[50:100], signed(rows[99]), *rows[100:]]
    assert found(stream) == []
    forged = chain([*(row.body for row in rows[:60]), b"{}", *(row.body for row in rows[61:])])
    stream = [*forged[:50], signed(rows[49]), *forged[50:100], signed(rows[99]), *forged[100:]]
    kept = [signed(rows[149]), signed(rows[199])]
    report = verify_chain(stream, start=START, keys=KEYS, kept=kept)
    ((kind, first, last),) = [(f.kind, f.first, f.last) for f in report.findings]
    assert (kind, first, last) == ("changed", 51, 100)
    assert (report.signed, report.checkpoints) == (50, 1)


def test_checkpoints_of_other_keys_and_other_logs_do_not_count() -> None:
    rows = log()
    foreign = ec.generate_private_key(ec.SECP256R1())
    assert found([*rows, signed(rows[99], key=foreign)]) == [("checkpoint", 100, 100)]
    assert found([*rows, signed(rows[99], log=bytes(16))]) == [("checkpoint", 100, 100)]
    report = verify_chain(rows, start=START, keys={}, kept=[signed(rows[99])])
    assert [f.kind for f in report.findings] == ["checkpoint"]
    # Keys of the log itself count only where none is pinned.
    own = PublicKey(foreign.public_key())
    stream = [own, *rows, signed(rows[199], key=foreign)]
    assert found(stream) == [("checkpoint", 200, 200)]
    assert verify_chain(stream, start=START).intact


def test_every_bit_of_a_checkpoint_is_signed() -> None:
    good = signed(log()[99])
    for at in range(0, len(good.text), 7):
        changed = good.text[:at] + ("A" if good.text[at] != "A" else "B") + good.text[at + 1 :]
        with contextlib.suppress(AuditError):
            assert not Checkpoint.from_text(changed).verify(KEYS)


def test_a_pruned_log_begins_at_a_checkpoint() -> None:
    rows = log()
    start = Start(LOG, 100, rows[99].hash)
    later = rows[100:]
    assert verify_chain([signed(rows[99]), *later], start=start, keys=KEYS).intact
    assert verify_chain(later, start=start, keys=KEYS, kept=[signed(rows[149])]).intact
    for items in (later, [signed(rows[50]), *later]):
        report = verify_chain(items, start=start, keys=KEYS)
        assert [(f.kind, f.first, f.last) for f in report.findings] == [("removed", 1, 100)]
    wrong = replace(start, hash=bytes(32))
    report = verify_chain([signed(rows[99]), *later], start=wrong, keys=KEYS)
    assert [f.kind for f in report.findings][:1] == ["changed"]


def test_whatever_is_done_at_random_is_noticed() -> None:
    rng = random.Random(7)
    rows = log(120)
    operations: list[Callable[[list[Row], int], None]] = [
        lambda r, i: r.pop(i) and None,  # type: ignore[func-returns-value]
        lambda r, i: r.insert(i, r[rng.randrange(len(r))]),
        lambda r, i: r.__setitem__(i, replace(r[i], body=b"{}")),
        lambda r, i: r.__setitem__(i, replace(r[i], hash=rng.randbytes(32))),
        lambda r, i: r.insert(i, r.pop(rng.randrange(len(r)))),
    ]
    for _ in range(300):
        forged = list(rows)
        for _ in range(rng.randrange(1, 5)):
            rng.choice(operations)(forged, rng.randrange(len(forged) - 1))
        if rng.random() < 0.5:
            forged = renumber(forged)
        if forged != rows:
            assert found(forged, head=(120, rows[-1].hash)) != []


def lines(rows: list[Row]) -> list[bytes]:
    return [
        head_line(START),
        key_line(KEY),
        *map(row_line, rows),
        checkpoint_line(signed(rows[-1])),
    ]


def read(*of: bytes) -> Exported:
    return read_export(io.BytesIO(b"\n".join(of) + b"\n"))


def test_an_export_is_read_as_it_was_written() -> None:
    rows = log(5)
    exported = read(*lines(rows))
    items = list(exported.items)
    assert exported.start == START
    assert [item for item in items if isinstance(item, Row)] == rows
    assert [item.kid for item in items if isinstance(item, PublicKey)] == [KEY.kid]
    exported = read(*lines(rows))
    report = verify_chain(exported.items, start=exported.start)
    assert (report.intact, report.signed) == (True, 5)


def test_lines_that_cannot_be_read_are_named() -> None:
    for line in (b"", b"{}", b"[]", b'{"seq":2}', b"x" * 100_000, b'{"key":"-----"}', b"\xff"):
        changed = lines(log(5))
        changed[3] = line
        exported = read(*changed)
        report = verify_chain(exported.items, start=exported.start)
        assert [f.kind for f in report.findings] == ["malformed", "removed"], line[:20]
        assert report.findings[0].message == "line 4 cannot be read"


@pytest.mark.parametrize("first", [b"", b"{}", b"\x00", head_line(START)[:-1], b"[" * 100_000])
def test_what_is_no_export_is_refused(first: bytes) -> None:
    with pytest.raises(AuditError, match=r"not an exported audit log|first line"):
        read(first)


def test_a_body_is_read_strictly() -> None:
    assert fields_of(Row(1, b'{"a":1}', b"")) == {"a": 1}
    for body in (b"", b"[]", b'{"a":1,"a":2}', b'{"a":NaN}'):
        with pytest.raises(AuditError):
            fields_of(Row(1, body, b""))


def test_a_report_stays_small() -> None:
    rows = [replace(row, body=b"{}") for row in log(500)]
    report: Report = verify_chain(rows, start=START, keys=KEYS)
    assert len(report.findings) == 100
    assert report.more > 0
