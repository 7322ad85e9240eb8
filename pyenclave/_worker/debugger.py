"""
pdb in a debug enclave, whose input and output are ``pyenclave debug``.

``breakpoint()``, ``pdb.set_trace()`` and ``pdb.post_mortem()`` stop in it, if there is a debugger
(``debugdesk``). Only images that allow debug have this module and pdb on their lock lists.
"""

from __future__ import annotations

import contextlib
import linecache
import pdb
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

from pyenclave._worker.debugdesk import Desk, GoneError, log, the_desk
from pyenclave._worker.dispatch import current_note
from pyenclave.formats import debugging

__all__ = ["Debugger", "halt"]

_WORDS: Final = 200
_OWN: Final = "pyenclave._worker."


# ---- streams -------------------------------------------------------------------------------------


class _Output:
    """What pdb prints to: kept until the debugger is asked for a line, or the turn ends."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self) -> None:
        self._text = ""

    def write(self, text: str) -> int:
        self._text += text
        if len(self._text) > debugging.MAX_TEXT:
            self._send_all()
        return len(text)

    def flush(self) -> None:
        """Keep the text: what follows the last end of a line may be a prompt."""

    def isatty(self) -> bool:
        return False

    def take_prompt(self) -> str:
        """Send all lines, and return what follows the last."""
        lines, end, prompt = self._text.rpartition("\n")
        self._text = lines + end
        self.send()
        return prompt[-debugging.MAX_TEXT :]

    def send(self) -> None:
        """Send all that there is."""
        desk = the_desk()
        while self._text and desk.mine and desk.session is not None:
            part, self._text = (
                self._text[: debugging.MAX_TEXT],
                self._text[debugging.MAX_TEXT :],
            )
            try:
                desk.session.send(debugging.Said(text=part))
            except GoneError:
                self._text = ""

    def _send_all(self) -> None:
        if the_desk().mine:
            self.send()
        else:
            self._text = self._text[-debugging.MAX_TEXT :]


class _Input:
    """Where pdb reads lines from: the debugger. At its end, and without one, there are none."""

    encoding = "utf-8"
    errors = "strict"

    def __init__(self, owner: Debugger, out: _Output) -> None:
        self._owner = owner
        self._out = out

    def isatty(self) -> bool:
        return False

    def readline(self, _size: int = -1) -> str:
        desk = the_desk()
        prompt = self._out.take_prompt()
        session = desk.session
        if not desk.mine or session is None:
            return ""
        try:
            session.send(debugging.Asks(prompt=prompt))
            while True:
                packet = session.receive()
                if isinstance(packet, debugging.Line):
                    text = packet.text
                    return "" if text is None else text.partition("\n")[0] + "\n"
                if not isinstance(packet, debugging.Complete):
                    log(f"the debugger is detached: it sent {type(packet).__name__}")
                    raise GoneError
                words = self._owner.choices(packet.line, packet.begin, packet.end)
                session.send(debugging.Choices(words=words))
        except GoneError:
            desk.drop()
            return ""


# ---- the debugger --------------------------------------------------------------------------------


class Debugger(pdb.Pdb):
    """
    pdb, with ``pyenclave debug`` for its terminal; in a debug worker ``pdb.Pdb`` is this class.

    Quitting, or losing the debugger, lets the trusted function go on; nothing raises ``BdbQuit``.
    Stepping ends with the trusted function: what called it is not the enclave's own code.
    """

    def __init__(
        self,
        completekey: str = "tab",
        stdin: Any = None,
        stdout: Any = None,
        skip: Any = None,
        **options: Any,
    ) -> None:
        self._nested = stdin is not None  # the command ``debug`` makes it: q ends only that
        self._stepping = False
        if stdin is None:
            stdout = _Output()
            stdin = _Input(self, stdout)
        # What a terminal or a home would be needed for is off.
        options = {name: value for name, value in options.items() if name == "mode"}
        if sys.version_info >= (3, 14):
            options["backend"] = "settrace"  # what set_trace below does, whatever the default is
        super().__init__(
            completekey, stdin, stdout, skip=skip, nosigint=True, readrc=False, **options
        )

    # ---- stopping -------------------------------------------------------------------------------

    def set_trace(self, frame: FrameType | None = None, **_: Any) -> None:
        """Stop at the next line of *frame*, the caller's by default, if there is a debugger."""
        frame = frame or sys._getframe(1)  # noqa: SLF001 - as pdb does
        desk = the_desk()
        if desk.mine:
            return  # within a command of the debugger
        _keep_source(frame)
        if not desk.enter(_place(frame)):
            return
        desk.leave(stepping=True)
        self.reset()
        self.botframe = _bottom(frame)
        each: FrameType | None = frame
        while each is not None:
            each.f_trace = self.trace_dispatch
            each = None if each is self.botframe else each.f_back
        self.set_step()
        sys.settrace(self.trace_dispatch)

    def interaction(self, frame: FrameType | None, *what: Any) -> None:
        """Talk with the debugger about *frame*, or about a traceback."""
        with self._talk(frame) as there:
            if there:
                super().interaction(frame, *what)

    def bp_commands(self, frame: FrameType) -> Any:
        """Run the commands of a breakpoint of the debugger's."""
        if getattr(self, "currentbp", 0) not in self.commands:
            return 1
        if sys.version_info >= (3, 14):
            return super().bp_commands(frame)  # which has them run by the interaction that follows
        with self._talk(frame) as there:
            return super().bp_commands(frame) if there else None

    @contextlib.contextmanager
    def _talk(self, frame: FrameType | None) -> Iterator[bool]:
        desk = the_desk()
        if frame is not None:
            _keep_source(frame)
        if not desk.enter("pdb.post_mortem()" if frame is None else _place(frame)):
            self._let_go()
            yield False
            return
        try:
            if frame is not None and not self._nested:
                self.botframe = _bottom(frame)
            if thread := desk.other_thread():
                self.message(f"--- thread {thread} ---")
            if note := current_note():
                self.message(f"[{note}]")
            yield True
        finally:
            self._leave(desk, stepping=self._stepping and frame is not None)

    def _leave(self, desk: Desk, *, stepping: bool) -> None:
        if isinstance(self.stdout, _Output):
            self.stdout.send()
            if not stepping and desk.session is not None:
                try:
                    desk.session.send(debugging.Goes())
                except GoneError:
                    desk.drop()
        desk.leave(stepping=stepping)

    def dispatch_return(self, frame: FrameType, arg: Any) -> Any:
        """End stepping with the function that the host called."""
        result = super().dispatch_return(frame, arg)
        if frame is self.botframe and self._stepping and not self._nested:
            self.set_continue()
            desk = the_desk()
            desk.give_up()
            if desk.session is not None:
                with contextlib.suppress(GoneError):
                    desk.session.send(debugging.Goes())
        return result

    def set_step(self) -> None:
        """Stop at the next line."""
        self._stepping = True
        super().set_step()

    def set_next(self, frame: FrameType) -> None:
        """Stop at the next line of *frame*."""
        self._stepping = True
        super().set_next(frame)

    def set_return(self, frame: FrameType) -> None:
        """Stop when *frame* returns."""
        self._stepping = True
        super().set_return(frame)

    def set_until(self, frame: FrameType, lineno: int | None = None) -> None:
        """Stop at a later line of *frame*."""
        self._stepping = True
        super().set_until(frame, lineno)

    def set_continue(self) -> None:
        """Stop only at breakpoints."""
        self._stepping = False
        super().set_continue()

    def _let_go(self) -> None:
        self.cmdqueue.clear()  # commands of a breakpoint at which nobody is there
        self.clear_all_breaks()
        self.set_continue()

    # ---- commands -------------------------------------------------------------------------------

    def do_quit(self, arg: str) -> Any:
        """q(uit) | exit

        Detach: the trusted function goes on, without the breakpoints that were set here.
        """
        if self._nested:
            return super().do_quit(arg)
        self._let_go()
        the_desk().drop("detached; the function goes on")
        return True

    do_q = do_quit
    do_exit = do_quit

    def do_EOF(self, arg: str) -> Any:  # noqa: N802 - pdb's name
        """EOF

        Detach, as q does.
        """
        return self.do_quit(arg)

    def do_run(self, arg: str) -> None:
        """Not in an enclave: the host calls its functions."""
        self.error("an enclave cannot be restarted from inside")

    do_restart = do_run

    def do_interact(self, arg: str) -> None:
        """Start an interpreter with the names of the current scope; Ctrl-D ends it."""
        import code

        frame = self.curframe
        if frame is None:
            return
        reader, writer = self.stdin, self.stdout
        console = code.InteractiveConsole({**frame.f_globals, **self.curframe_locals})

        def ask(prompt: str = "") -> str:
            writer.write(prompt)
            line: str = reader.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")

        console.raw_input = ask  # type: ignore[method-assign] # as the class means it to be
        console.write = writer.write  # type: ignore[method-assign, assignment]
        printed, sys.stdout = sys.stdout, writer
        try:
            with contextlib.suppress(SystemExit):
                console.interact(banner="*interactive*", exitmsg="")
        finally:
            sys.stdout = printed

    # ---- help -----------------------------------------------------------------------------------

    def lookupmodule(self, filename: str) -> str | None:
        """Return the file of a loaded module by its path, its last part or the module's name."""
        names = {filename, f"{filename}.py"}
        for name, module in sorted(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if isinstance(path, str) and (
                name == filename or path in names or path.rpartition("/")[2] in names
            ):
                _keep_lines(path, vars(module))
                return path
        return None

    def choices(self, line: str, begin: int, end: int) -> tuple[str, ...]:
        """Return how the word between *begin* and *end* of *line* may go on."""
        left = len(line) - len(line.lstrip())
        line, begin, end = line[left:], begin - left, end - left
        if not 0 <= begin <= end <= len(line):
            return ()
        complete: Any = self.completenames
        if begin:
            command = self.parseline(line)[0]
            complete = getattr(self, f"complete_{command}", None) or self._complete_expression
        elif any(mark in line for mark in ".[("):
            complete = self._complete_expression
        words: list[str] = []
        # Attributes of trusted objects are looked at: they may raise what they like.
        with contextlib.suppress(Exception):
            words = [word for word in complete(line[begin:end], line, begin, end) if word]
        return tuple(word[:256] for word in words[:_WORDS])


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}()"


def _bottom(frame: FrameType) -> FrameType:
    """Return the frame of the function that the host called, or a thread began with."""
    while (
        frame.f_back is not None
        and not str(frame.f_back.f_globals.get("__name__")).startswith(_OWN)
        and frame.f_back.f_globals.get("__name__") != "threading"
    ):
        frame = frame.f_back
    return frame


def _keep_source(frame: FrameType) -> None:
    each: FrameType | None = frame
    while each is not None:
        _keep_lines(each.f_code.co_filename, each.f_globals)
        each = each.f_back


def _keep_lines(filename: str, names: dict[str, Any]) -> None:
    """Give linecache the source of a module of the image, which no file has."""
    if linecache.cache.get(filename, ())[2:3]:
        return
    source = getattr(names.get("__loader__"), "get_source", None)
    if source is None or names.get("__file__") != filename:
        return
    with contextlib.suppress(ImportError, SyntaxError, UnicodeDecodeError):
        text = source(str(names.get("__name__"))) or ""
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)


_own = threading.local()


def halt(frame: FrameType, *, header: object = None) -> None:
    """
    Stop at the next line of *frame*, which called ``breakpoint()``, if there is a debugger.

    Args:
        frame: The caller's.
        header: A line to be shown first.

    """
    debugger: Debugger | None = getattr(_own, "debugger", None)
    if debugger is None:
        # One a thread, so that what was displayed and aliased stays.
        debugger = _own.debugger = Debugger()
    if header is not None and not the_desk().mine:
        debugger.message(str(header))
    debugger.set_trace(frame)


pdb.Pdb = Debugger  # type: ignore[assignment, misc] # what pdb itself makes from here on
