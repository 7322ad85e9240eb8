"""
The command line: ``pyenclave COMMAND``.

Exit codes: 0 done or accepted, 1 does not verify or is refused, 2 wrong usage or unreadable.
With ``--json`` exactly one JSON object goes to stdout and diagnostics go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from pyenclave import __version__, errors
from pyenclave.cli import output
from pyenclave.cli._ending import EndedError, Ending

__all__ = ["main"]

# Command → the module that adds it. Only the module of the command in use is imported.
_COMMANDS = {
    "doctor": "doctor",
    "keygen": "images",
    "build": "images",
    "sign": "images",
    "inspect": "images",
    "diff": "images",
    "stubs": "stubs",
    "run": "run",
    "measure": "measure",
    "evidence": "evidence",
    "verify": "verify",
    "collateral": "collateral",
    "policy": "policy",
    "audit": "audit",
    "seal": "sealing",
    "unseal": "sealing",
    "reseal": "resealing",
    "info": "sealing",
    "encrypt": "encrypting",
    "decrypt": "encrypting",
    "serve": "serve",
    "vault": "vault",
    "bench": "bench",
    "demo": "demo",
    "ps": "processes",
    "top": "top",
    "logs": "logs",
    "debug": "debug",
    "kill": "processes",
}

# What refuses gives 1; what cannot be read or is used wrongly gives 2.
_UNREADABLE = (
    errors.ManifestError,
    errors.EvidenceFormatError,
    errors.CollateralError,
    errors.MeasurementError,
    errors.ArgumentError,
    errors.UnknownFunctionError,
    errors.PlatformUnavailableError,
    errors.ProviderError,
    errors.TpmError,
    errors.StorageError,
)


def _no_answer(error: errors.EnclaveError) -> bool:
    """Whether a service was not reached, and so refused nothing."""
    return isinstance(error, errors.RemoteServiceError) and not error.status


def _unreadable(error: OSError, *, as_json: bool) -> int:
    if isinstance(error, BrokenPipeError):
        output.give_up(sys.stdout)  # its reader left; nothing more can be said to it
        return 1
    name = error.filename
    where = f": {os.fsdecode(name)}" if isinstance(name, str | bytes) and name else ""
    return output.report_error(
        "unreadable", f"{error.strerror or error}{where}", as_json=as_json, exit_code=2
    )


class _UsageError(Exception):
    """What the command line has wrong, and the parser that found it."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser = parser


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are for ``main`` to report."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(self, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse drops what nobody takes, and says that all is well.
        (file or sys.stderr).write(message)


def _parser(only: str | None, *, bare: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pyenclave",
        description="Confidential computing for Python: enclaves, sealing, attestation.",
        epilog="Each command has its own --help. Error codes are explained in docs/errors.md.",
    )
    parser.add_argument("--version", action="version", version=f"pyenclave {__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    modules = [_COMMANDS[only]] if only in _COMMANDS else list(dict.fromkeys(_COMMANDS.values()))
    for module in () if bare else modules:
        import_module(f"pyenclave.cli.{module}").add_commands(subparsers)
    for command in subparsers.choices.values():
        if not any("--json" in action.option_strings for action in command._actions):  # noqa: SLF001
            command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not output.ready():
        return 2
    ending = Ending()
    code = 2
    with ending, contextlib.suppress(EndedError):
        code = _reported(arguments)
    if ending.number is None:
        return code
    why = f"ended by {ending.number.name}"
    output.report_error("interrupted", why, as_json="--json" in arguments, exit_code=2)
    return ending.end()


def _reported(arguments: list[str]) -> int:
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # while a command's modules are imported, too
        as_json = "--json" in arguments
        return output.report_error("interrupted", "interrupted", as_json=as_json, exit_code=2)
    except ImportError:
        why = errors.not_built()
        if not why:
            raise
        return output.report_error("missing_extra", why, as_json="--json" in arguments, exit_code=2)


def _main(arguments: list[str]) -> int:
    only = next((word for word in arguments if not word.startswith("-")), None)
    try:
        # What is first ends the parsing: no command need be imported to tell the version.
        args = _parser(only, bare=arguments[:1] == ["--version"]).parse_args(arguments)
    except _UsageError as error:
        output.tell(error.parser.format_usage(), end="")
        as_json = "--json" in arguments
        return output.report_error("usage", str(error), as_json=as_json, exit_code=2)
    except OSError as error:  # of --help, where what is printed is not buffered
        return _unreadable(error, as_json=False)
    except SystemExit:  # --help and --version have printed; whether anybody took it shows here
        try:
            sys.stdout.flush()
        except OSError as error:
            return _unreadable(error, as_json=False)
        raise
    try:
        code: int = args.function(args)
        sys.stdout.flush()
    except errors.EnclaveError as error:
        rows = error.shown() if isinstance(error, errors.RuntimeLockError) else ()
        return output.report_error(
            error.code,
            errors.EnclaveError.__str__(error) if rows else str(error),
            rows=rows,
            as_json=args.json,
            exit_code=2 if isinstance(error, _UNREADABLE) or _no_answer(error) else 1,
        )
    except OSError as error:
        return _unreadable(error, as_json=args.json)
    except MemoryError as error:
        text = str(error) or "there is too little memory; look at its limit (ulimit -v)"
        return output.report_error("memory", text, as_json=args.json, exit_code=2)
    except (ValueError, TypeError) as error:
        return output.report_error("usage", str(error), as_json=args.json, exit_code=2)
    except ModuleNotFoundError as error:
        return output.report_error("missing_extra", str(error), as_json=args.json, exit_code=2)
    return code
