"""``pyenclave debug`` on a terminal, with real enclaves that stop at breakpoints."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from pyenclave._platform.client import PlatformClient
from pyenclave._platform.debuglog import find_logs
from pyenclave._platform.state import State
from pyenclave.cli import main
from pyenclave.errors import BusyError, EcallError, EnclaveLostError, EnclaveStateError
from pyenclave.formats import debugging
from pyenclave.formats.image import Image
from pyenclave.host import Enclave
from pyenclave.image.build import build
from pyenclave.image.keys import keygen
from pyenclave.image.sign import sign

ENTRY = """
import os
import stat
import threading

import pyenclave


class Box:
    def __init__(self) -> None:
        self.colour_of_it = "red"
        self.nasty = "\\x1b[31m\\x07\\u202e"


@pyenclave.ecall
def half(x: int) -> int:
    box = Box()
    breakpoint()
    y = x * 10
    y = y + 1
    return y


@pyenclave.ecall
def twice(x: int) -> int:
    for step in range(2):
        breakpoint()
        x = x + step
    return x


@pyenclave.ecall
def by_pdb(x: int) -> int:
    import pdb
    pdb.set_trace()
    x = x + 5
    return x


@pyenclave.ecall
def after(x: int) -> str:
    import pdb
    try:
        return str(1 // x)
    except ZeroDivisionError as error:
        pdb.post_mortem(error.__traceback__)
        return "caught"


@pyenclave.ecall
def fails(x: int) -> int:
    breakpoint()
    x = x + 1
    raise ValueError(f"of {x}")


first, second = threading.Lock(), threading.Event()


@pyenclave.ecall
def waits_for_the_other() -> int:
    breakpoint()
    second.wait(60)
    return 1


@pyenclave.ecall
def the_other() -> int:
    breakpoint()
    second.set()
    return 2


@pyenclave.ecall
def plain(x: int) -> int:
    x = x + 1
    return x


@pyenclave.ecall
def sockets() -> int:
    found = 0
    for fd in range(4096):
        try:
            found += stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:
            pass
    return found


@pyenclave.ecall
def can_import(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True
"""
MANIFEST = """
[enclave]
name = "halting"
entry = "halting.py"
product_id = 1
security_version = 1
debug = true
threads = 2
"""
PROMPT = "(Pdb) "


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A signed image that may be launched either way."""
    folder = tmp_path_factory.mktemp("halting")
    (folder / "enclave.toml").write_text(MANIFEST)
    (folder / "halting.py").write_text(ENTRY)
    return sign(build(folder / "enclave.toml"), keygen())


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, used: Callable[[Path], Path]) -> Iterator[Path]:
    """One state directory, and one platform, for the module."""
    path = used(tmp_path_factory.mktemp("debugged") / "state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(path))
        patch.setenv("TERM", "dumb")
        yield path


@pytest.fixture
def enclave(image: bytes, state: Path) -> Iterator[Enclave]:
    with Enclave(image, debug=True) as enclave:
        yield enclave


class Call:
    """A call in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, *arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._result = function(*arguments)
        except BaseException as error:
            self._error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(30)
        assert self.over, "the call has not returned"
        if self._error is not None:
            raise self._error
        return self._result


class Screen:
    """``pyenclave debug`` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.text = ""
        self._shown = 0
        self._master, self._slave = pty.openpty()
        # Whoever leads a session and opens a terminal has it for its own: then keys are signals.
        command = [sys.executable, "-m", "pyenclave", "debug", *arguments]
        own = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(self._slave), *command]
        self.process = subprocess.Popen(own, start_new_session=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._close_slave()
        os.close(self._master)

    def _close_slave(self) -> None:
        # Not before the command has opened it: without anybody else it would be at its end.
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """Return what is shown up to *text*, since the last time."""
        deadline = time.monotonic() + seconds
        while True:
            place = self.text.find(text, self._shown)
            if place >= 0:
                start, self._shown = self._shown, place + len(text)
                return self.text[start : self._shown]
            assert time.monotonic() < deadline, f"no {text!r} in {self.text[self._shown :]!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    data = os.read(self._master, 65536)
                except OSError:
                    data = b""
                assert data, f"ended without {text!r}: {self.text[self._shown :]!r}"
                self._close_slave()
                self.text += data.decode("utf-8", "replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def enter(self, line: str, until: str = PROMPT) -> str:
        """Type a line, and return what is shown up to *until*."""
        self.type(line + "\n")
        return self.wait_for(until)

    def ends(self, code: int = 0) -> None:
        assert self.process.wait(30) == code, self.text


def id_of(enclave: Enclave) -> str:
    return enclave.info.enclave_id.hex()[:12]


def attached(enclave: Enclave) -> Screen:
    """A debugger that waits for a breakpoint."""
    screen = Screen(id_of(enclave))
    screen.wait_for("waiting for a breakpoint]")
    return screen


def log_of(enclave: Enclave, wanted: str = "") -> str:
    deadline = time.monotonic() + 30
    while True:
        with State.open() as state:
            logs = [log for log in find_logs(state) if log.enclave_id.startswith(id_of(enclave))]
            text = logs[0].read(state).decode() if logs else ""
        if wanted in text or time.monotonic() > deadline:
            return text
        time.sleep(0.02)


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(arguments) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["enclaves"]
    return found


def wait_until(test: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not test():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- stopping, looking, going on -----------------------------------------------------------------


def test_a_function_is_stopped_looked_at_stepped_and_goes_on(enclave: Enclave) -> None:
    with attached(enclave) as screen:
        call = Call(enclave.half, 4)
        assert "halting.py" in screen.wait_for(PROMPT)
        assert "\n4\n" in screen.enter("p x")
        assert "-> y = y + 1" in screen.enter("n")
        assert "\n40\n" in screen.enter("p y")
        assert "def half(x: int) -> int:" in screen.enter("ll")
        assert "half()" in screen.enter("w")
        screen.enter("y = 100")
        assert not call.over
        screen.enter("c", until="waiting for the next breakpoint]")
        assert call.result() == 101
        call = Call(enclave.half, 5)
        screen.wait_for(PROMPT)
        assert "\n5\n" in screen.enter("p x")
        screen.enter("c", until="waiting for the next breakpoint]")
        assert call.result() == 51


def test_a_breakpoint_says_in_the_log_what_to_run_and_waits_for_it(
    enclave: Enclave, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Call(enclave.half, 1)
    text = log_of(enclave, "waiting")
    command = re.search(r"waiting up to 60 s for: pyenclave debug ([0-9a-f]{12})\n", text)
    assert command is not None, text
    assert "/enclave/entry/halting.py:18 in half()" in text
    (row,) = rows(capsys, "debug", "--list", "--json")
    assert row["debugger"] == "stopped"
    with Screen(command[1]) as screen:
        screen.wait_for(PROMPT)
        assert rows(capsys, "ps", "--json")[0]["debugger"] == "attached"
        screen.enter("c", until="breakpoint]")
        assert call.result() == 11


def test_stepping_ends_with_the_function_and_the_next_call_is_not_stopped(
    enclave: Enclave,
) -> None:
    """What called the function is no code of the enclave."""
    with attached(enclave) as screen:
        call = Call(enclave.half, 1)
        screen.wait_for(PROMPT)
        for _ in range(3):
            screen.enter("s")
        assert "--Return--" in screen.text
        screen.enter("n", until="waiting for the next breakpoint]")
        assert call.result() == 11
        assert Call(enclave.plain, 1).result() == 2


def test_a_breakpoint_set_by_hand_holds_for_later_calls_until_it_is_cleared(
    image: bytes, state: Path
) -> None:
    with Enclave(image, debug=True) as enclave, attached(enclave) as screen:
        handle = enclave.options(timeout=60)
        call = Call(handle.half, 1)
        screen.wait_for(PROMPT)
        assert "Breakpoint 1 at /enclave/entry/halting.py" in screen.enter("b halting:20")
        screen.enter("c")
        assert "-> y = y + 1" in screen.text
        assert "Deleted breakpoint 1" in screen.enter("clear 1")
        screen.enter("c", until="next breakpoint]")
        assert call.result() == 11


def test_commands_of_a_breakpoint_are_run_where_it_stops(image: bytes, state: Path) -> None:
    with Enclave(image, debug=True) as enclave, attached(enclave) as screen:
        call = Call(enclave.options(timeout=60).half, 1)
        screen.wait_for(PROMPT)
        screen.enter("b halting:20")
        for line in ("commands 1", "silent", "p 'seen', x"):
            screen.enter(line, until="(com) ")
        screen.enter("end")
        shown = screen.enter("c")
        assert "('seen', 1)" in shown
        assert "-> y = y + 1" not in shown
        assert shown.count("next breakpoint]") == 1
        assert screen.enter("p y").startswith("p y\n10\n")
        screen.enter("c", until="next breakpoint]")
        assert call.result() == 11


def test_an_exception_is_shown_where_it_is_raised_and_crosses_as_ever(enclave: Enclave) -> None:
    with attached(enclave) as screen:
        call = Call(enclave.fails, 1)
        screen.wait_for(PROMPT)
        screen.enter("n")
        assert "ValueError: of 2" in screen.enter("n")
        screen.enter("c", until="next breakpoint]")
        with pytest.raises(EcallError, match="of 2") as caught:
            call.result()
        assert caught.value.type == "ValueError"


def test_pdb_set_trace_and_post_mortem_speak_to_the_same_terminal(enclave: Enclave) -> None:
    with attached(enclave) as screen:
        call = Call(enclave.by_pdb, 1)
        screen.wait_for(PROMPT)
        assert "-> return x" in screen.enter("n")
        screen.enter("c", until="next breakpoint]")
        assert call.result() == 6
        call = Call(enclave.after, 0)
        screen.wait_for("return str(1 // x)")
        screen.wait_for(PROMPT)
        assert "\n0\n" in screen.enter("p x")
        screen.enter("c", until="next breakpoint]")
        assert call.result() == "caught"


def test_interact_is_an_interpreter_that_ctrl_d_leaves(enclave: Enclave) -> None:
    with attached(enclave) as screen:
        call = Call(enclave.half, 6)
        screen.wait_for(PROMPT)
        screen.enter("interact", until=">>> ")
        screen.enter("for i in range(2):", until="... ")
        screen.enter("    print('seen', x + i)", until="... ")
        assert "seen 6\nseen 7\n" in screen.enter("", until=">>> ")
        screen.type("\x04")
        screen.wait_for(PROMPT)
        screen.enter("debug 1 + 1", until="((Pdb)) ")
        screen.enter("q")
        screen.enter("c", until="next breakpoint]")
        assert call.result() == 61


def test_words_are_completed(enclave: Enclave) -> None:
    pytest.importorskip("readline")
    with attached(enclave) as screen:
        call = Call(enclave.half, 1)
        screen.wait_for(PROMPT)
        screen.type("p box.colo\t")
        screen.wait_for("colour_of_it")
        assert "'red'" in screen.enter("")
        screen.enter("c", until="next breakpoint]")
        assert call.result() == 11


def test_a_script_can_debug_through_pipes(enclave: Enclave) -> None:
    call = Call(enclave.half, 7)
    log_of(enclave, "waiting")
    done = subprocess.run(
        [sys.executable, "-m", "pyenclave", "debug"],
        input="p x + 35\nn",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\n42\n" in done.stdout
    assert "-> y = y + 1" in done.stdout
    assert "detached" in done.stderr
    assert call.result() == 71


# ---- leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["q\n", "exit\n", "\x04"])
def test_leaving_lets_the_function_go_on_and_later_breakpoints_pass(
    enclave: Enclave, keys: str
) -> None:
    with attached(enclave) as screen:
        call = Call(enclave.twice, 1)
        screen.wait_for(PROMPT)
        screen.type(keys)
        screen.wait_for("detached; the function goes on]")
        screen.ends()
    assert call.result() == 2
    assert enclave.options(timeout=20).half(1) == 11


def test_ctrl_c_drops_a_line_and_detaches_while_the_function_runs(enclave: Enclave) -> None:
    with attached(enclave) as screen:
        call = Call(enclave.half, 1)
        screen.wait_for(PROMPT)
        screen.type("import os; os._exit(1)\x03")
        try:
            screen.wait_for(PROMPT, 3)
        except AssertionError:
            # Between readline's prompt and its wait, Python hears of a signal with the next key.
            screen.type("\x03")
            screen.wait_for(PROMPT)
        screen.enter("p x")
        screen.enter("c", until="waiting for the next breakpoint]")
        screen.type("\x03")
        screen.wait_for("detached")
        screen.ends()
    assert call.result() == 11
    assert enclave.options(timeout=20).half(2) == 21


def test_a_debugger_that_is_killed_at_its_prompt_lets_the_function_go_on(
    enclave: Enclave,
) -> None:
    with attached(enclave) as screen:
        call = Call(enclave.half, 1)
        screen.wait_for(PROMPT)
        screen.enter("b halting:20")
        screen.process.kill()
        assert call.result() == 11
    # Its breakpoint went with it.
    assert enclave.options(timeout=20).half(2) == 21
    with attached(enclave) as screen:
        call = Call(enclave.half, 3)
        screen.wait_for(PROMPT)
        screen.enter("q", until="goes on]")
    assert call.result() == 31


def test_nobody_comes_and_the_function_goes_on_for_good(
    image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said in the log, once: a breakpoint that was forgotten holds up one call."""
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYENCLAVE_BREAKPOINT_WAIT", "0.5")
    with Enclave(image, debug=True) as enclave:
        start = time.monotonic()
        assert enclave.twice(1) == 2
        assert time.monotonic() - start >= 0.5
        assert enclave.twice(1) == 2
        text = log_of(enclave, "nobody came")
        assert text.count("waiting up to 0.5 s") == 1
        assert text.count("nobody came") == 1


def test_deadlines_of_the_host_go_on(enclave: Enclave) -> None:
    from pyenclave.errors import CallTimeoutError

    with attached(enclave) as screen:
        call = Call(enclave.options(timeout=1).half, 1)
        screen.wait_for(PROMPT)
        with pytest.raises(CallTimeoutError):
            call.result()
        assert "\n1\n" in screen.enter("p x")


# ---- one at a time -------------------------------------------------------------------------------


def test_a_second_debugger_is_refused_until_the_first_left(enclave: Enclave) -> None:
    with attached(enclave) as screen:
        with Screen(id_of(enclave)) as other:
            other.wait_for("error [call.busy]: another debugger is attached")
            other.ends(1)
        call = Call(enclave.half, 1)
        screen.wait_for(PROMPT)
        with PlatformClient.connect(start=False) as client, pytest.raises(BusyError):
            client.attach(enclave.info.enclave_id)
        screen.enter("q", until="goes on]")
        screen.ends()
    assert call.result() == 11
    with PlatformClient.connect(start=False) as client:
        os.close(client.attach(enclave.info.enclave_id))


def test_two_threads_take_turns_also_if_one_waits_for_the_other(enclave: Enclave) -> None:
    """Stepping over a wait for a thread that stopped too does not hang the debugger."""
    with attached(enclave) as screen:
        one = Call(enclave.waits_for_the_other)
        screen.wait_for("second.wait(60)")
        screen.wait_for(PROMPT)
        other = Call(enclave.the_other)
        screen.type("n\n")
        screen.wait_for("--- thread")
        screen.wait_for("second.set()")
        screen.wait_for(PROMPT)
        screen.type("c\n")
        screen.wait_for("return 1")
        screen.wait_for(PROMPT)
        screen.enter("c", until="next breakpoint]")
        assert (one.result(), other.result()) == (1, 2)


# ---- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_prompt", [True, False])
def test_a_killed_worker_ends_the_command(image: bytes, state: Path, at_prompt: bool) -> None:
    with Enclave(image, debug=True) as enclave, attached(enclave) as screen:
        if at_prompt:
            call = Call(enclave.half, 1)
            screen.wait_for(PROMPT)
        os.kill(enclave.info.pid, signal.SIGKILL)
        screen.wait_for("[the enclave ended]")
        screen.ends()
        if at_prompt:
            with pytest.raises(EnclaveLostError):
                call.result()


@pytest.mark.parametrize("at_prompt", [True, False])
def test_a_killed_platform_ends_the_command_and_the_enclave(
    image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_prompt: bool
) -> None:
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    with Enclave(image, debug=True) as enclave, attached(enclave) as screen:
        if at_prompt:
            call = Call(enclave.half, 1)
            screen.wait_for(PROMPT)
        with PlatformClient.connect(start=False) as client:
            platform = client.hello.pid
        os.kill(platform, signal.SIGKILL)
        screen.wait_for("[the enclave ended]")
        screen.ends()
        if at_prompt:
            with pytest.raises(EnclaveLostError):
                call.result()


def test_closing_the_handle_ends_a_debugger_that_waits(image: bytes, state: Path) -> None:
    with Enclave(image, debug=True) as enclave, attached(enclave) as screen:
        enclave.close()
        screen.wait_for("[the enclave ended]")
        screen.ends()


# ---- hostile peers -------------------------------------------------------------------------------


def test_bytes_that_are_no_packet_lose_the_debugger_and_nothing_else(enclave: Enclave) -> None:
    line = debugging.encode(debugging.Line(text="p x"))
    hostile = [
        b"\x00",
        b"\xff" * 65536,
        b"\x81\xa1t\xa4said\xa4text\xa1x",
        line[:-1],
        line + b"\x00",
        debugging.encode(debugging.Ends(reason="x")),
        debugging.encode(debugging.Asks(prompt="x")),
        os.urandom(200),
    ]
    for data in hostile:
        with (
            PlatformClient.connect(start=False) as client,
            socket.socket(fileno=client.attach(enclave.info.enclave_id)) as sock,
        ):
            sock.setblocking(True)
            call = Call(enclave.half, 3)
            while not isinstance(debugging.decode(sock.recv(70000)), debugging.Asks):
                pass
            sock.send(data)
            assert call.result() == 31
        wait_until(lambda: not infos(enclave).debugger)
    assert log_of(enclave).count("the debugger is detached") == len(hostile)


def infos(enclave: Enclave) -> Any:
    with PlatformClient.connect(start=False) as client:
        (found,) = [x for x in client.list() if x.enclave_id == enclave.info.enclave_id]
        return found


def test_odd_lines_and_completions_are_answered(enclave: Enclave) -> None:
    """Control characters, half surrogates, lines in lines, places outside the line."""
    with (
        PlatformClient.connect(start=False) as client,
        socket.socket(fileno=client.attach(enclave.info.enclave_id)) as sock,
    ):
        sock.setblocking(True)
        call = Call(enclave.half, 3)

        def until(kind: type) -> Any:
            while not isinstance(packet := debugging.decode(sock.recv(70000)), kind):
                pass
            return packet

        until(debugging.Asks)
        for begin, end in ((0, 0), (-1, 5), (5, 1), (0, 10**9), (2, 2**62)):
            sock.send(debugging.encode(debugging.Complete(line="p box.", begin=begin, end=end)))
            until(debugging.Choices)
        for text in ("\x00", "p '\\ud800'", "p 1\nq", "x" * 30000, "p 'y' * 300000", "a.b.("):
            sock.send(debugging.encode(debugging.Line(text=text)))
            until(debugging.Asks)
        sock.send(debugging.encode(debugging.Line(text="c")))
        until(debugging.Goes)
        assert call.result() == 31


def test_what_the_enclave_prints_cannot_steer_the_terminal(enclave: Enclave) -> None:
    with attached(enclave) as screen:
        call = Call(enclave.half, 1)
        screen.wait_for(PROMPT)
        screen.enter("!print(box.nasty)")
        screen.enter("print(box.nasty)", until="\\x1b[31m\\x07\\u202e")
        assert "\x1b[31m" not in screen.text
        screen.enter("c", until="next breakpoint]")
        assert call.result() == 11


# ---- production ----------------------------------------------------------------------------------


def test_a_production_worker_has_no_socket_for_a_debugger_and_nobody_attaches(
    image: bytes, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Enclave(image, debug=True) as enclave:
        assert enclave.sockets() == 2  # to the platform, and for a debugger
    with Enclave(image, debug=False) as enclave:
        assert enclave.sockets() == 1
        assert enclave.options(timeout=20).half(1) == 11
        assert enclave.options(timeout=20).twice(1) == 2
        with PlatformClient.connect(start=False) as client:
            with pytest.raises(EnclaveStateError, match="a production enclave has no debugger"):
                client.attach(enclave.info.enclave_id)
            assert client.list()  # the connection goes on
        assert rows(capsys, "debug", "--list", "--json") == []
        assert main(["debug", id_of(enclave)]) == 1
        assert "a production enclave has no debugger" in capsys.readouterr().err


def test_an_image_that_does_not_allow_debug_has_no_debugger_on_its_list(
    image: bytes, tmp_path: Path, state: Path
) -> None:
    """The trusted base of production does not grow; unsigned, it says so at its breakpoint."""
    (tmp_path / "enclave.toml").write_text(MANIFEST.replace("debug = true", "debug = false"))
    (tmp_path / "halting.py").write_text(ENTRY)
    strict = build(tmp_path / "enclave.toml")
    listed = {module.name for module in Image.parse(image).lock.modules}
    left = listed - {module.name for module in Image.parse(strict).lock.modules}
    assert {"pdb", "bdb", "cmd", "pyenclave._worker.debugger"} <= left
    assert "readline" not in listed
    assert not {"pdb", "bdb", "pyenclave._worker.debugger"} & (listed - left)
    with Enclave(strict) as enclave:
        with pytest.raises(EcallError, match="no debugger on this image's lock list") as caught:
            enclave.half(1)
        assert caught.value.type == "EnclaveStateError"
        assert not enclave.can_import("pdb")
        assert enclave.plain(1) == 2


# ---- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("--json",), ("x", "--json"), ("x", "--list"), ("no such enclave",), ()]
)
def test_what_cannot_be_debugged_is_wrong_usage(
    state: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["debug", *arguments]) == 2


def test_of_several_enclaves_the_stopped_one_is_meant(
    image: bytes, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Enclave(image, debug=True) as one, Enclave(image, debug=True) as two:
        assert main(["debug", "halting"]) == 2
        assert id_of(one) in capsys.readouterr().err
        call = Call(two.half, 1)
        log_of(two, "waiting")
        with Screen("halting") as screen:
            screen.wait_for(f"attached to halting ({id_of(two)})")
            screen.wait_for(PROMPT)
            screen.enter("c", until="next breakpoint]")
            assert call.result() == 11
