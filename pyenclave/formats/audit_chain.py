"""
Verifying the chain of an audit log, and saying what happened to it.

Rows are read once, in order, with a look ahead of some dozens. While each row follows the one
before, nothing is guessed. Where one does not, the rows around it tell what was done: a row that
fits under another number was moved, one that nothing follows was put in, a number that is absent
was taken out, and where the stored hashes go on around a row, that row was changed. Who can write
the database can also compute the chain anew from the row that he changed; only a checkpoint tells,
and it names the rows between it and the last that holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from pyenclave.formats.audit_log import MAX_KEYS, Checkpoint, PublicKey, Row, Start, row_hash

__all__ = ["Finding", "Item", "Report", "verify_chain"]

Kind = Literal["changed", "removed", "reordered", "inserted", "cut", "checkpoint", "malformed"]

_AHEAD: Final = 64  # rows that are looked at to explain one that does not fit
_MAX_FINDINGS: Final = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing that is wrong.

    Attributes:
        kind: What was done.
        first: The first row that it concerns, by the number it was written with.
        last: The last one.
        message: One sentence.

    """

    kind: Kind
    first: int
    last: int
    message: str


# What a log is made of, as it is read: an `int` is the number of a line that cannot be read, a
# `Finding` something that its reader noticed.
Item: TypeAlias = Row | Checkpoint | PublicKey | Finding | int


@dataclass(slots=True)
class Report:
    """
    What verifying gave.

    Attributes:
        start: Where the rows began.
        rows: How many were read.
        last: Number of the last row (the start's, if there is none).
        hash: Its hash.
        findings: What is wrong; empty if nothing is. The first hundred.
        more: How many further findings there were.
        checkpoints: How many signed checkpoints hold.
        signed: The last row that a checkpoint covers.
        newest: The newest checkpoint that holds: keep it elsewhere.
        keys: Kids of the keys whose signatures held.

    """

    start: Start
    rows: int = 0
    last: int = 0
    hash: bytes = b""
    findings: list[Finding] = field(default_factory=list)
    more: int = 0
    checkpoints: int = 0
    signed: int = 0
    newest: Checkpoint | None = None
    keys: set[str] = field(default_factory=set)

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def add(self, kind: Kind, first: int, last: int, message: str) -> None:
        """Note a finding."""
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(Finding(kind, first, last, message))
        else:
            self.more += 1


def verify_chain(
    items: Iterable[Item],
    *,
    start: Start,
    keys: Mapping[str, PublicKey] | None = None,
    kept: Sequence[Checkpoint] = (),
    head: tuple[int, bytes] | None = None,
) -> Report:
    """
    Verify a log.

    Args:
        items: Rows in the order in which they are stored, each checkpoint after its row at the
            earliest; keys before the checkpoints; numbers of lines that cannot be read.
        start: What the first row follows. One that is not the log's own beginning must be covered
            by a checkpoint.
        keys: Keys that may sign checkpoints, by kid. ``None``: those that the log itself names,
            which whoever changed it may have put there.
        kept: Checkpoints that were kept elsewhere.
        head: Number and hash of the last row, as the database's head row has it.

    """
    walk = _Walk(items, start, keys, kept)
    walk.run()
    walk.end(head)
    return walk.report


class _Walk:
    """
    The state of one verification.

    Numbers are those that rows were written with; where rows were put in or taken out and the rest
    was renumbered, *offset* is what the stored number is more.
    """

    def __init__(
        self,
        items: Iterable[Item],
        start: Start,
        keys: Mapping[str, PublicKey] | None,
        kept: Sequence[Checkpoint],
    ) -> None:
        self._kept = list(kept)  # until the log has named its keys
        self.report = Report(start, last=start.seq, hash=start.hash)
        self._items = iter(items)
        self._pinned = keys is not None
        self._keys = dict(keys or {})
        self._ahead: deque[Row] = deque()
        self._ended = False
        self._number = start.seq
        self._hash = start.hash
        self._offset = 0
        self._stored = start.seq  # number of the last row as it is stored
        self._expected: dict[int, list[Checkpoint]] = {}
        self._strays: deque[bytes] = deque(maxlen=_AHEAD)  # bodies that stood elsewhere
        self._diverged = False
        self._blind = False  # the last row's hash is not the one that the next was made with
        self._base_held = start.whole

    # -- checkpoints -----------------------------------------------------------------------------

    def expect(self, checkpoint: Checkpoint) -> None:
        """Hold the chain against *checkpoint* where it comes to its row."""
        report, seq = self.report, checkpoint.seq
        if checkpoint.log != report.start.log:
            text = f"the checkpoint of row {seq} is of another log"
        elif not checkpoint.verify(self._keys):
            text = f"the checkpoint of row {seq} is not signed by a known key"
        elif seq < report.start.seq:
            return  # of rows that are no longer here
        elif seq == self._number:
            self._hold(checkpoint)
            return
        elif seq < self._number:
            text = f"the checkpoint of row {seq} does not stand where it was written"
        else:
            self._expected.setdefault(seq, []).append(checkpoint)
            return
        report.add("checkpoint", seq, seq, text)

    def _hold(self, checkpoint: Checkpoint) -> None:
        report = self.report
        if checkpoint.hash == self._hash:
            report.checkpoints += 1
            report.signed = max(report.signed, checkpoint.seq)
            report.newest = checkpoint
            report.keys.add(checkpoint.token.kid or "")
            self._base_held = True
            self._diverged = False
        elif checkpoint.seq == report.start.seq:
            text = f"the log does not begin with the row {checkpoint.seq} that was signed"
            report.add("changed", checkpoint.seq, checkpoint.seq, text)
        elif not self._diverged:
            self._diverged = True  # once: what comes after depends on it
            first = max(report.signed, report.start.seq) + 1
            report.add(
                "changed",
                first,
                checkpoint.seq,
                f"of rows {first} to {checkpoint.seq} some are not what was signed on"
                f" {checkpoint.at}: the chain was computed anew",
            )

    # -- rows ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Read everything."""
        while self._fill():
            row = self._ahead[0]
            if row.seq - self._offset == self._number + 1 and self._fits(row):
                self._ahead.popleft()
                self._accept(row, self._number + 1)
            else:
                self._explain()

    def _fill(self) -> bool:
        if len(self._ahead) <= _AHEAD // 2 and not self._ended:
            while len(self._ahead) < _AHEAD:
                item = next(self._items, None)
                if not isinstance(item, PublicKey):
                    kept, self._kept = self._kept, []
                    for checkpoint in kept:
                        self.expect(checkpoint)
                if item is None:
                    self._ended = True
                    break
                if isinstance(item, Row):
                    self._ahead.append(item)
                    self.report.rows += 1
                elif isinstance(item, Checkpoint):
                    self.expect(item)
                elif isinstance(item, PublicKey):
                    if not self._pinned and len(self._keys) < MAX_KEYS:
                        self._keys[item.kid] = item
                elif isinstance(item, Finding):
                    self.report.add(item.kind, item.first, item.last, item.message)
                else:
                    self.report.add("malformed", 0, 0, f"line {item} cannot be read")
        return bool(self._ahead)

    def _fits(self, row: Row) -> bool:
        return _follows(self._hash, self._number + 1, row)

    def _accept(self, row: Row, number: int) -> None:
        self._number, self._hash, self._stored = number, row.hash, row.seq
        for checkpoint in self._expected.pop(number, ()):
            self._hold(checkpoint)

    def _explain(self) -> None:
        """Say what is wrong with the row at hand, and go on behind it."""
        if any(self._fits(row) for row in self._ahead):
            self._reorder()
            return
        row, wanted, report = self._ahead[0], self._number + 1, self.report
        number = row.seq - self._offset
        if number <= self._number:
            self._ahead.popleft()
            report.add("inserted", row.seq, row.seq, f"a row {row.seq} was put in where none was")
            return
        if number > wanted:
            report.add("removed", wanted, number - 1, f"{_rows(wanted, number - 1)} taken out")
        elif self._blind:
            pass  # nothing is left to hold it against
        elif any(_follows(self._hash, wanted, Row(0, body, row.hash)) for body in self._strays):
            pass  # told of when its text was met elsewhere
        elif other := self._whose_text(row, wanted):
            self._strays.append(row.body)
            self._strays.append(other.body)
            report.add(
                "reordered", wanted, other.seq - self._offset,
                f"row {wanted} has its text at row {other.seq - self._offset}: they were exchanged",
            )  # fmt: skip
        else:
            number = self._changed_or_renumbered(row, number)
        self._ahead.popleft()
        blind, self._blind = self._blind, False
        if not blind and self._ahead and self._ahead[0].seq == row.seq + 1:
            self._blind = not _follows(row.hash, number + 1, self._ahead[0])
        self._accept(row, number)

    def _whose_text(self, row: Row, wanted: int) -> Row | None:
        """Return the later row that has the text which belongs to this row's hash."""
        for other in list(self._ahead)[1:]:
            if row_hash(self._hash, wanted, other.body) == row.hash:
                return other
        return None

    def _changed_or_renumbered(self, row: Row, number: int) -> int:
        """Tell a changed row from rows taken out or put in before it; return its true number."""
        following = self._ahead[1] if len(self._ahead) > 1 else None
        if following is not None and following.seq == row.seq + 1:
            for shift in _SHIFTS:
                if number + shift > 0 and _follows(row.hash, number + shift + 1, following):
                    break
            else:
                shift = 0
            self._offset -= shift
            if shift > 0:
                self.report.add(
                    "removed", number, number + shift - 1,
                    f"{_rows(number, number + shift - 1)} taken out, and the rest renumbered",
                )  # fmt: skip
                return number + shift
            if shift < 0:
                self.report.add(
                    "inserted", row.seq + shift, row.seq - 1,
                    f"{_rows(row.seq + shift, row.seq - 1)} put in, and the rest renumbered",
                )  # fmt: skip
                return number + shift
        before = f", or row {number - 1} together with its hash" if number > 1 else ""
        self.report.add("changed", number, number, f"row {number} was changed{before}")
        return number

    def _reorder(self) -> None:
        """Follow the chain through the rows ahead in whatever order it finds them."""
        waiting = list(enumerate(self._ahead))
        taken: list[int] = []
        first = self._number + 1
        while True:
            at = next((i for i, (_, row) in enumerate(waiting) if self._fits(row)), None)
            if at is None:
                break
            index, row = waiting.pop(at)
            taken.append(index)
            self._accept(row, self._number + 1)
            if not waiting or waiting[0][0] > max(taken):
                break  # in order again
        reach = max(taken)
        strays = [row for index, row in waiting if index < reach]
        self._ahead = deque(row for index, row in waiting if index > reach)
        if taken != sorted(taken):
            last = first + len(taken) - 1
            self.report.add("reordered", first, last, f"{_rows(first, last)} put in another order")
        else:
            # Rows that were put in may have pushed the numbers of the others on.
            self._offset = self._stored - self._number
            if not strays:
                text = f"row {first} and those after it were given other numbers"
                self.report.add("changed", first, first, text)
        for row in strays:
            self.report.add("inserted", row.seq, row.seq, f"a row {row.seq} was put in")

    # -- the end ---------------------------------------------------------------------------------

    def end(self, head: tuple[int, bytes] | None) -> None:
        """Hold the end against the head row and the checkpoints that are left."""
        report = self.report
        report.last, report.hash = self._number, self._hash
        lost = [seq for seq in self._expected if seq > self._number]
        beyond = max(lost, default=0)
        if head is not None:
            seq, digest = head
            beyond = max(beyond, seq - self._offset)
            if seq < self._stored:
                report.add(
                    "inserted", seq + 1, self._stored,
                    f"{_rows(seq + 1, self._stored)} put in after the end",
                )  # fmt: skip
            elif seq == self._stored and digest != self._hash and not report.findings:
                report.add("changed", seq, seq, f"row {seq} is not what the head row says")
        if beyond > self._number:
            first = self._number + 1
            report.add("cut", first, beyond, f"{_rows(first, beyond)} missing at the end")
        if not self._base_held and report.signed == 0:
            last = report.start.seq
            text = f"rows 1 to {last} are not here, and no checkpoint says what they were"
            if last == 0:
                text = "the log does not begin as one of its id does"
            report.add("removed", min(1, last), last, text)


_SHIFTS: Final = (0, *(sign * step for step in range(1, _AHEAD + 1) for sign in (1, -1)))


def _follows(previous: bytes, number: int, row: Row) -> bool:
    return row_hash(previous, number, row.body) == row.hash


def _rows(first: int, last: int) -> str:
    return f"row {first} was" if first == last else f"rows {first} to {last} were"
