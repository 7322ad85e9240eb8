"""The debugger's end of the conversation, with an enclave that may say anything."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from pyenclave.cli.debug import _Dialogue, _Lines
from pyenclave.errors import EnclaveStateError
from pyenclave.formats import debugging


class Answers:
    """Lines that were thought of before."""

    def __init__(self, *lines: str | None) -> None:
        self.lines = list(lines)
        self.prompts: list[str] = []

    def ask(self, prompt: str, dialogue: _Dialogue) -> str | None:
        self.prompts.append(prompt)
        return self.lines.pop(0)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


Ends = tuple[socket.socket, socket.socket]


def send(sock: socket.socket, *packets: debugging.Packet) -> None:
    for packet in packets:
        sock.send(debugging.encode(packet))


def test_lines_are_asked_for_and_answered(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    ours, enclave = ends
    asker = Answers("p 1", "\udcff", None)
    for text in ("one\n", "two\n", ""):
        send(enclave, debugging.Said(text=text), debugging.Asks(prompt="(Pdb) "))
    send(enclave, debugging.Goes(), debugging.Ends(reason="over"))
    assert _Dialogue(ours, asker).run() == 0
    assert asker.prompts == ["(Pdb) "] * 3
    got = [debugging.decode(enclave.recv(70000)) for _ in range(3)]
    assert got == [debugging.Line(text=text) for text in ("p 1", "\\udcff", None)]
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\n"
    assert shown.err.endswith("[over]\n")


def test_nothing_of_the_enclave_can_steer_the_terminal(
    ends: Ends, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, enclave = ends
    nasty = "\x1b]0;x\x07\r\x9b31m\u202e"
    asker = Answers("")
    send(
        enclave,
        debugging.Said(text=nasty),
        debugging.Asks(prompt=nasty + "\n"),
        debugging.Ends(reason=nasty + "\n"),
    )
    assert _Dialogue(ours, asker).run() == 0
    shown = capsys.readouterr()
    for text in (shown.out, shown.err.rstrip("\n"), *asker.prompts):
        assert text
        assert text.isprintable()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        os.urandom(100),
        b"\x81" * 60000,
        b"x" * (debugging.MAX_PACKET + 1),
        debugging.encode(debugging.Line(text="x")),
        debugging.encode(debugging.Complete(line="", begin=0, end=0)),
        debugging.encode(debugging.Choices(words=("x",))),
    ],
)
def test_what_is_no_packet_of_an_enclave_is_a_typed_error(ends: Ends, data: bytes) -> None:
    ours, enclave = ends
    enclave.send(data)
    with pytest.raises(EnclaveStateError):
        _Dialogue(ours, Answers()).run()


def test_the_end_of_the_enclave_is_the_end(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    ours, enclave = ends
    enclave.close()
    assert _Dialogue(ours, Answers()).run() == 0
    assert "the enclave ended" in capsys.readouterr().err


def test_the_enclave_ends_while_a_line_is_waited_for(
    ends: Ends, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, enclave = ends
    read, write = os.pipe()
    try:
        send(enclave, debugging.Asks(prompt="(Pdb) "))
        timer = threading.Timer(0.2, enclave.close)
        timer.start()
        assert _Dialogue(ours, _Lines(read)).run() == 0
        timer.join()
        assert "the enclave ended" in capsys.readouterr().err
    finally:
        os.close(read)
        os.close(write)


def test_lines_of_a_pipe_come_one_by_one(ends: Ends) -> None:
    ours, enclave = ends
    read, write = os.pipe()
    os.write(write, b"one\ntwo\r\n\n\xff\nlast")
    os.close(write)
    try:
        send(enclave, *[debugging.Asks(prompt="")] * 6, debugging.Ends(reason=""))
        assert _Dialogue(ours, _Lines(read)).run() == 0
    finally:
        os.close(read)
    got = [debugging.decode(enclave.recv(70000)) for _ in range(6)]
    texts = [packet.text for packet in got if isinstance(packet, debugging.Line)]
    assert texts == ["one", "two", "", "\\xff", "last", None]


def test_choices_that_are_no_words_are_not_offered(ends: Ends) -> None:
    ours, enclave = ends
    send(enclave, debugging.Choices(words=("fine", "\x1b[2J", "a\nb")))
    assert _Dialogue(ours, Answers()).choices("p f", 2, 3) == ("fine",)
    assert debugging.decode(enclave.recv(70000)) == debugging.Complete(line="p f", begin=2, end=3)
