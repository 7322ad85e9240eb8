"""``pyenclave debug``: a terminal for the debugger of a debug enclave."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any, Final, Protocol

from pyenclave.cli import output, processes
from pyenclave.errors import ArgumentError, EnclaveStateError
from pyenclave.formats import debugging
from pyenclave.formats.messages import EnclaveInfo

__all__ = ["add_commands"]

_MAX_LINE: Final = 8 * 1024  # characters
_DELIMITERS: Final = " \t\n`@#$%^&*()=+[{]}\\|;:'\",<>?"
_SLICE_MS: Final = 100


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``debug``."""
    debug = subparsers.add_parser(
        "debug",
        help="attach pdb to a debug enclave",
        description="Attach to a debug enclave and wait until it stops at breakpoint(). The "
        "commands are pdb's; q or Ctrl-D detaches and lets the function go on, Ctrl-C detaches "
        "while it runs. A debugger reads everything inside.",
    )
    debug.add_argument(
        "enclave",
        nargs="?",
        metavar="ENCLAVE",
        help="identity (or its beginning), name or pid; by default the one there is",
    )
    debug.add_argument(
        "--list", action="store_true", help="show which debug enclaves run, and which stopped"
    )
    debug.set_defaults(function=_debug)


def _debug(args: argparse.Namespace) -> int:
    if args.list and args.enclave:
        raise ArgumentError("--list takes no enclave")
    if args.json and not args.list:
        raise ArgumentError("--json goes with --list only: a debugger talks with people")
    client, enclaves = processes.running()
    with client or contextlib.nullcontext():
        if args.list:
            return _list([info for info in enclaves if info.debug], as_json=args.json)
        info = _choose(enclaves, args.enclave)
        if client is None:
            raise AssertionError("an enclave without a platform")
        with socket.socket(fileno=client.attach(info.enclave_id)) as sock:
            name = f"{output.line(info.name)} ({info.enclave_id.hex()[:12]})"
            stopped = info.debugger == "stopped"
            _note(f"attached to {name}" + ("" if stopped else "; waiting for a breakpoint"))
            return _Dialogue(sock, _terminal()).run()


def _choose(enclaves: Sequence[EnclaveInfo], word: str | None) -> EnclaveInfo:
    """Return the enclave that is meant: of several, the one that stopped."""
    if word is None:
        found = [info for info in enclaves if info.debug]
    else:
        found = [info for info in enclaves if processes.matches(info, word)]
    if not found:
        which = "no debug enclave is running" if word is None else "no running enclave matches"
        raise ArgumentError(which, found=word, advice="See 'pyenclave debug --list'.")
    stopped = [info for info in found if info.debugger == "stopped"]
    for group in (found, stopped):
        if len(group) == 1:
            return group[0]
    raise ArgumentError(
        "several enclaves could be meant",
        found=", ".join(f"{info.name} {info.enclave_id.hex()[:12]}" for info in found[:8]),
        advice="Give the identity of one.",
    )


def _list(enclaves: Sequence[EnclaveInfo], *, as_json: bool) -> int:
    rows = [processes.row(info) for info in enclaves]
    if as_json:
        output.print_json({"enclaves": rows})
    elif not rows:
        output.say("no debug enclave is running")
    else:
        output.say(
            output.table(
                [
                    (
                        str(row["enclave_id"])[:12],
                        row["name"],
                        row["pid"],
                        row["debugger"] or "running",
                        f"{row['seconds']} s",
                    )
                    for row in rows
                ],
                header=("ENCLAVE", "NAME", "PID", "STATE", "AGE"),
            )
        )
    return 0


def _note(text: str) -> None:
    output.tell(f"[{output.line(text)}]")


class _EndedError(Exception):
    """The enclave's end of the connection is closed."""


# ---- the dialogue --------------------------------------------------------------------------------


class _Asker(Protocol):
    """Where lines come from."""

    def ask(self, prompt: str, dialogue: _Dialogue) -> str | None:
        """Return a line without its end, None at the end of input. Raises _EndedError."""


class _Dialogue:
    """One debugger's conversation with its enclave."""

    def __init__(self, sock: socket.socket, asker: _Asker) -> None:
        sock.setblocking(True)
        self.sock = sock
        self._asker = asker

    def run(self) -> int:
        """Talk until one of the two leaves; return the exit code."""
        try:
            while True:
                packet = self._receive()
                match packet:
                    case debugging.Said(text=text):
                        print(output.printable(text), end="", flush=True)
                    case debugging.Asks(prompt=prompt):
                        self._answer(output.line(prompt))
                    case debugging.Goes():
                        _note("running; waiting for the next breakpoint")
                    case debugging.Ends(reason=reason):
                        if reason:
                            _note(reason)
                        return 0
                    case _:
                        raise EnclaveStateError(
                            "the enclave broke the debugger's protocol",
                            found=type(packet).__name__,
                        )
        except _EndedError:
            _note("the enclave ended")
        except KeyboardInterrupt:
            output.tell("")
            _note("detached; the function goes on")
        return 0

    def _answer(self, prompt: str) -> None:
        text = self._asker.ask(prompt, self)
        if text is not None:
            # What a terminal gives may have bytes that are no text.
            text = text[:_MAX_LINE].encode("utf-8", "backslashreplace").decode()
        self._send(debugging.Line(text=text))

    def choices(self, line: str, begin: int, end: int) -> tuple[str, ...]:
        """Ask how a word may go on; only while a line is asked for. Raises _EndedError."""
        self._send(debugging.Complete(line=line[:_MAX_LINE], begin=begin, end=end))
        packet = self._receive()
        if not isinstance(packet, debugging.Choices):
            raise _EndedError
        return tuple(word for word in packet.words if word.isprintable())

    def _send(self, packet: debugging.Packet) -> None:
        try:
            self.sock.send(debugging.encode(packet), socket.MSG_NOSIGNAL)
        except OSError:
            raise _EndedError from None

    def _receive(self) -> debugging.Packet:
        try:
            data = self.sock.recv(debugging.MAX_PACKET + 1)
        except OSError:
            raise _EndedError from None
        if not data:
            raise _EndedError
        return debugging.decode(data)


# ---- where lines come from -----------------------------------------------------------------------


def _terminal() -> _Asker:
    if sys.stdin is None or not sys.stdin.isatty():
        return _Lines(-1 if sys.stdin is None else sys.stdin.fileno())
    return _Terminal()


class _Lines:
    """Lines of a file or a pipe, so that a script can debug."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = b""

    def ask(self, prompt: str, dialogue: _Dialogue) -> str | None:
        print(prompt, end="", flush=True)
        while b"\n" not in self._data and len(self._data) < _MAX_LINE:
            poll = select.poll()
            poll.register(dialogue.sock, 0)
            if self._fd >= 0:
                poll.register(self._fd, select.POLLIN)
                if any(fd == dialogue.sock.fileno() for fd, _ in poll.poll()):
                    raise _EndedError
            data = os.read(self._fd, 4096) if self._fd >= 0 else b""
            if not data:
                break
            self._data += data
        print(flush=True)
        if not self._data:
            return None
        text, _, self._data = self._data.partition(b"\n")
        return text.decode("utf-8", "backslashreplace").rstrip("\r")


class _Terminal:
    """A terminal, with line editing, history and completion where readline is there."""

    def __init__(self) -> None:
        self._words: tuple[str, ...] = ()
        self._readline: ModuleType | None = None
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline

                readline.set_completer_delims(_DELIMITERS)
                libedit = "libedit" in (readline.__doc__ or "")
                readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
                self._readline = readline

    def ask(self, prompt: str, dialogue: _Dialogue) -> str | None:
        readline: Any = self._readline
        if readline is not None:
            readline.set_completer(lambda _, state: self._complete(readline, dialogue, state))
        while True:
            try:
                with _interrupted_at_end(dialogue.sock):
                    return input(prompt)
            except KeyboardInterrupt:
                print(flush=True)  # the line is dropped, as pdb does
            except EOFError:
                print(flush=True)
                return None

    def _complete(self, readline: Any, dialogue: _Dialogue, state: int) -> str | None:
        if state == 0:
            self._words = ()
            with contextlib.suppress(_EndedError, EnclaveStateError):
                self._words = dialogue.choices(
                    readline.get_line_buffer(), readline.get_begidx(), readline.get_endidx()
                )
        return self._words[state] if state < len(self._words) else None


@contextlib.contextmanager
def _interrupted_at_end(sock: socket.socket) -> Iterator[None]:
    """Raise _EndedError in the body, which waits for a terminal, when *sock*'s other end closes."""
    done = threading.Event()
    main = threading.get_ident()

    def end(_number: int, _frame: FrameType | None) -> None:
        if not done.is_set():
            raise _EndedError

    def watch() -> None:
        poll = select.poll()
        poll.register(sock, 0)
        while not done.is_set():
            if poll.poll(_SLICE_MS):
                signal.pthread_kill(main, signal.SIGUSR1)
                return

    before = signal.signal(signal.SIGUSR1, end)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        watcher.start()
        yield
    finally:
        done.set()
        if watcher.ident is not None:  # else it was interrupted before there was one
            watcher.join()
        signal.signal(signal.SIGUSR1, before)
