"""One HTTP answer from bytes: cut anywhere, doubled, in two ways at once."""

from __future__ import annotations

import itertools

import pytest

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.http_answer import MAX_HEAD, AnswerReader, http_date

HEAD = b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nServer: x\r\n"
WHOLE = {
    "length": (HEAD + b"Content-Length: 7\r\n\r\nkeys:{}", b"keys:{}"),
    "empty": (HEAD + b"Content-Length: 0\r\n\r\n", b""),
    "chunks": (
        HEAD + b"Transfer-Encoding: Chunked\r\n\r\n5\r\nkeys:\r\n2;x=y\r\n{}\r\n0\r\n\r\n",
        b"keys:{}",
    ),
    "end": (HEAD + b"\r\nkeys:{}", b"keys:{}"),
}


def read(
    data: bytes, *, size: int = 1 << 16, ended: bool = True, limit: int = 1 << 10
) -> AnswerReader:
    """Feed *data* in pieces."""
    reader = AnswerReader(limit)
    for at in range(0, len(data), size):
        reader.feed(data[at : at + size])
    if ended:
        reader.end()
    return reader


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 99 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"http/1.1 200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        HEAD + b" folded: x\r\n\r\n",
        HEAD + b"Name : x\r\n\r\n",
        HEAD + b"Name\r\n\r\n",
        HEAD + b"Name: a\nb: c\r\n\r\n",
        HEAD + b"Name: \0\r\n\r\n",
        HEAD + b"Content-Length: 7\r\nContent-Length: 7\r\n\r\nkeys:{}",
        HEAD + b"Content-Length: 7, 7\r\n\r\nkeys:{}",
        HEAD + b"Content-Length: +7\r\n\r\nkeys:{}",
        HEAD + b"Content-Length: 07\r\n\r\nkeys:{}",
        HEAD + b"Content-Length: 0x7\r\n\r\nkeys:{}",
        HEAD + b"Content-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: 0\r\n\r\n",
        HEAD + b"Date: Sun, 06 Nov 1994 08:49:38 GMT\r\n\r\n",
        HEAD + b"Content-Length: 1025\r\n\r\n",
        HEAD + b"\r\n" + bytes(1025),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n401\r\n" + bytes(1025) + b"\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n 1\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nTrailer: x\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 300,
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * MAX_HEAD + b"\r\n\r\n",
        b"x" * (MAX_HEAD + 1),
        WHOLE["length"][0] + b"x",
        WHOLE["length"][0] + WHOLE["length"][0],
        WHOLE["chunks"][0] + b"x",
    ],
    ids=lambda data: data[-40:],
)
@pytest.mark.parametrize("size", [1, 1 << 16])
def test_an_answer_that_could_be_read_in_two_ways_is_refused(data: bytes, size: int) -> None:
    """Smuggling, folding, wrong versions, trailers, too much; in one piece and byte by byte."""
    with pytest.raises(EvidenceFormatError, match="HTTP answer"):
        read(data, size=size)


@pytest.mark.parametrize("kind", ["length", "chunks", "end"])
def test_an_answer_that_is_cut_is_not_complete(kind: str) -> None:
    """At every byte; only the end of a connection that ends orderly says that there is no more."""
    data, _ = WHOLE[kind]
    head = data.index(b"\r\n\r\n") + 4
    for at in range(len(data)):
        assert not read(data[:at], ended=False).complete
        if kind != "end" or at < head:
            with pytest.raises(EvidenceFormatError, match="cut off"):
                read(data[:at])


@pytest.mark.parametrize(("kind", "size"), [*itertools.product(WHOLE, [1, 2, 3, 17, 1 << 16])])
def test_an_answer_comes_in_any_pieces(kind: str, size: int) -> None:
    """Each form of body."""
    data, body = WHOLE[kind]
    reader = read(data, size=size, ended=kind == "end")
    assert (reader.status, reader.complete, reader.body) == (200, True, body)
    assert reader.headers["server"] == "x"
    assert http_date(reader.headers["date"]) == 784111777


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sun, 6 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 UTC",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun, 06 nov 1994 08:49:37 GMT",
        "Sun, 06 ovD 1994 08:49:37 GMT",
        "Sun, 31 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 24:49:37 GMT",
        "Sun, 06 Nov 0000 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 GMT ",
    ],
)
def test_a_date_of_another_form_is_none(text: str) -> None:
    """Only the form that is sent; no month by chance."""
    assert http_date(text) is None
