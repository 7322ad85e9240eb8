"""``measure snp|sev-es|sev|tdx|eventlog|eif``: virtual machines, their logs, Nitro images."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from pyenclave.cli import output

if TYPE_CHECKING:
    from pyenclave.measurement.replay import Replay
    from pyenclave.measurement.replay_explain import Cause, Expected

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_measures"]

MAX_FIRMWARE = 256 << 20
MAX_LOG = 16 << 20


def add_measures(subparsers: Subparsers) -> None:
    """Add the subcommands of this module."""
    from pyenclave.cli.measure import leaf

    for name, what in (
        ("snp", "launch digest of a SEV-SNP guest"),
        ("sev-es", "launch digest of a SEV-ES guest"),
        ("sev", "launch digest of a SEV guest"),
    ):
        _sev_options(leaf(subparsers, name, help=what), name)

    command = leaf(subparsers, "tdx", help="MRTD of a TDX guest's firmware")
    command.add_argument("--firmware", required=True, metavar="FILE", help="the whole flash image")
    command.add_argument(
        "--two-pass",
        action="store_true",
        help="older QEMU: add all pages of a section before measuring them",
    )
    command.add_argument("--explain", action="store_true", help="list what was measured")
    command.set_defaults(function=_tdx)

    command = leaf(
        subparsers,
        "eventlog",
        help="PCRs or RTMRs that an event log gives",
        description="FILE is a TCG log of a TPM (/sys/kernel/security/tpm0/"
        "binary_bios_measurements), a CCEL of TDX (/sys/firmware/acpi/tables/data/CCEL), or "
        "dstack's JSON. Exit code 1: a register is not as --expect says.",
    )
    command.add_argument("file", metavar="FILE")
    command.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="VALUE",
        help="pcrN=HEX, rtmrN=HEX, BANK:N=HEX, or a JSON file with such values; repeatable",
    )
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--ccel", action="store_true", help="the registers are TDX's")
    kind.add_argument("--tpm", action="store_true", help="the registers are a TPM's")
    command.add_argument("--explain", action="store_true", help="list the events")
    command.set_defaults(function=_eventlog)

    command = leaf(
        subparsers,
        "eif",
        help="PCRs of a Nitro enclave image",
        description="Exit code 1: the image's signature does not hold.",
    )
    command.add_argument("file", metavar="FILE")
    command.add_argument("--explain", action="store_true", help="list the sections")
    command.set_defaults(function=_eif)


def _number(text: str) -> int:
    return int(text, 0)


def _sev_options(command: argparse.ArgumentParser, mode: str) -> None:
    add = command.add_argument
    add("--firmware", metavar="FILE", required=True, help="the firmware, variables included")
    add("--vcpus", type=_number, metavar="N", required=mode != "sev", help="virtual processors")
    add("--vcpu-type", metavar="TYPE", help="QEMU's model: EPYC-Milan, EPYC-v4, …")
    add("--vcpu-sig", type=_number, metavar="NUMBER", help="or its CPUID signature")
    add("--vmm", choices=("qemu", "ec2", "gce"), default="qemu", help="hypervisor (qemu)")
    add("--kernel", metavar="FILE", help="kernel of a direct boot")
    add("--initrd", metavar="FILE", help="its initial RAM disk")
    add("--append", metavar="TEXT", help="its command line")
    if mode == "snp":
        add("--svsm", metavar="FILE", help="Coconut SVSM image (QEMU)")
        add("--ovmf-vars-size", "--vars-size", type=_number, default=0, metavar="BYTES",
            help="size of the variable store below the firmware, with --svsm")  # fmt: skip
        add("--ovmf-hash", metavar="HEX", help="digest after the firmware's pages, in their place")
    # SEV and SEV-ES guests have no SEV_FEATURES; a script may give the option all the same.
    add("--guest-features", type=_number, default=1, metavar="NUMBER",
        help="SEV_FEATURES of the guest (1)" if mode == "snp" else argparse.SUPPRESS)  # fmt: skip
    add("--explain", action="store_true", help="list what was measured")
    command.set_defaults(function=_sev, mode=mode)


def _boot_file(path: str | None) -> bytes | None:
    """Read a kernel or RAM disk; the null device stands for an empty one."""
    from pyenclave._files import read_file
    from pyenclave.cli.measure import MAX_FILE

    if path is None:
        return None
    return b"" if path == os.devnull else read_file(path, limit=MAX_FILE)


def _sev(args: argparse.Namespace) -> int:
    from pyenclave._files import read_file
    from pyenclave.measurement import sev

    firmware = read_file(args.firmware, limit=MAX_FIRMWARE)
    if args.kernel is None and (args.initrd is not None or args.append):
        raise ValueError("--initrd and --append belong to a --kernel")
    boot: dict[str, Any] = {}
    if args.kernel is not None:
        boot = {
            "kernel": _boot_file(args.kernel),
            "initrd": _boot_file(args.initrd),
            "append": args.append,
        }
    processors = {
        "vcpus": args.vcpus,
        "vcpu_type": args.vcpu_type,
        "vcpu_sig": args.vcpu_sig,
    }
    rows: list[dict[str, Any]] = []
    if args.mode == "sev":
        digest = sev.sev_launch_digest(firmware, **boot)
        rows = _plain_rows(args, len(firmware))
    elif args.mode == "sev-es":
        digest = sev.sev_es_launch_digest(firmware, vmm=args.vmm, **processors, **boot)
        rows = _plain_rows(args, len(firmware))
    else:
        steps = _snp_steps(args, firmware, processors, boot)
        digest = steps[-1].digest
        rows = [step.to_json() for step in steps]
    kind = "snp-svsm" if args.mode == "snp" and args.svsm else args.mode
    result: dict[str, Any] = {"kind": f"{kind}-launch-digest", "launch_digest": digest.hex()}
    return _print(args, result, rows)


def _snp_steps(
    args: argparse.Namespace, firmware: bytes, processors: dict[str, Any], boot: dict[str, Any]
) -> Any:
    from pyenclave._files import read_file
    from pyenclave.measurement import sev

    if args.svsm:
        if boot or args.ovmf_hash or args.vmm != "qemu":
            raise ValueError("--svsm goes with QEMU, without --kernel and --ovmf-hash")
        image = read_file(args.svsm, limit=MAX_FIRMWARE)
        return sev.svsm_steps(firmware, image, vars_size=args.ovmf_vars_size, **processors)
    return sev.snp_steps(
        firmware,
        vmm=args.vmm,
        guest_features=args.guest_features,
        ovmf_hash=_hex(args.ovmf_hash) if args.ovmf_hash else None,
        **processors,
        **boot,
    )


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"not hex: {text!r}") from None


def _plain_rows(args: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """Say what the plain SHA-256 of SEV and SEV-ES is over."""
    rows = [{"name": "firmware", "bytes": size}]
    if args.kernel is not None:
        rows.append({"name": "kernel hashes", "bytes": 176})
    if args.mode == "sev-es":
        rows.append({"name": "processors", "bytes": 4096 * args.vcpus})
    return rows


def _tdx(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from pyenclave._files import read_file
    from pyenclave.measurement import tdx

    steps = tdx.mrtd_steps(read_file(args.firmware, limit=MAX_FIRMWARE), two_pass=args.two_pass)
    result = {
        "kind": "tdx-mrtd",
        "mrtd": steps[-1].digest.hex(),
        "two_pass": args.two_pass,
        "sections": [asdict(step.section) for step in steps],
    }
    return _print(args, result, [step.to_json() for step in steps])


def _eif(args: argparse.Namespace) -> int:
    from pyenclave._files import read_file
    from pyenclave.cli.measure import MAX_FILE
    from pyenclave.measurement.eif import Eif

    image = Eif(read_file(args.file, limit=MAX_FILE))
    rows = [section.to_json() for section in image.sections] if args.explain else []
    result = image.to_json()
    _print(args, result, rows)
    return 0 if result.get("signature_valid", True) else 1


def _print(args: argparse.Namespace, result: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """Print values, and with --explain the table of what was measured."""
    if args.json:
        output.print_json(result | ({"measured": rows} if args.explain else {}))
        return 0
    width = max(len(name) for name in result)
    for name, value in result.items():
        if not isinstance(value, list | dict):
            output.say(f"{name.ljust(width)}  {_plain(value)}")
    if args.explain and rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = [[_plain(row.get(name, ""), name) for name in names] for row in rows]
        output.say("")
        output.say(output.table(table, header=names))
    return 0


def _plain(value: object, name: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "gpa" and isinstance(value, int):
        return f"{value:#x}"
    text = str(value)
    return text[:24] + "…" if name in ("digest", "sha384") and len(text) > 24 else text


# ---- event logs -------------------------------------------------------------------------------


def _eventlog(args: argparse.Namespace) -> int:
    from pyenclave._files import read_file
    from pyenclave.measurement.replay import replay

    data = read_file(args.file, limit=MAX_LOG)
    result = replay(data, ccel=True if args.ccel else False if args.tpm else None)
    causes: list[Cause] = []
    if args.expect:
        from pyenclave.measurement.replay_explain import check

        causes = check(result, _expected(args.expect, ccel=result.ccel))
    if args.json:
        values = result.to_json()
        if args.expect:
            values |= {"as_expected": not causes, "causes": [cause.to_json() for cause in causes]}
        if args.explain:
            values["events"] = [event.to_json(ccel=result.ccel) for event in result.events]
        output.print_json(values)
    else:
        _say_log(result, args.explain)
        if args.expect and not causes:
            output.say("\nevery expected register has its value")
    for cause in causes if not args.json else ():
        output.say(f"\n{output.paint('differs', 'red')}  {cause.register} ({cause.bank})")
        output.say(f"  expected {cause.expected.hex()}")
        output.say(f"  found    {cause.found.hex()}")
        output.say(f"  {cause.text}")
    return 1 if causes else 0


def _expected(given: list[str], *, ccel: bool) -> list[Expected]:
    """Read what --expect was given: values, and files of them."""
    from pyenclave._files import read_file
    from pyenclave.errors import MeasurementError
    from pyenclave.formats import jsonstrict
    from pyenclave.measurement.replay_explain import read_expected

    found: list[Expected] = []
    for one in given:
        name, equals, value = one.partition("=")
        bank, colon, index = name.partition(":")
        if equals and colon:
            found += read_expected({"pcrs": {bank: {index: value}}}, ccel=ccel)
        elif equals:
            found += read_expected({name: value}, ccel=ccel)
        else:
            values = jsonstrict.loads(read_file(one, limit=1 << 20), one, MeasurementError)
            if isinstance(values, dict) and isinstance(values.get("expect"), dict):
                values = values["expect"]
            if not isinstance(values, dict):
                raise MeasurementError(f"{one}: not an object of expected values")
            found += read_expected(values, ccel=ccel)
    return found


def _say_log(result: Replay, events: bool) -> None:
    log = result.log
    kind = "TDX" if result.ccel else "TPM"
    output.say(f"{kind} log, {log.format}, {log.event_count} events, {log.end} bytes")
    if log.startup_locality is not None:
        output.say(f"startup locality {log.startup_locality}")
    for bank, registers in result.registers.items():
        for index, value in sorted(registers.items()):
            name = f"rtmr{index - 1}" if result.ccel else f"pcr{index}"
            output.say(f"{bank:7} {name:6} {value.hex()}")
    for bank in result.skipped_banks:
        output.say(f"{bank}: no such hash here, not replayed")
    for bank in result.incomplete_banks:
        output.say(f"{bank}: some events have no digest in this bank")
    if log.padding == "other":
        output.say(f"bytes follow the log's end at {log.end}; they are not part of it")
    if not events:
        return
    output.say("")
    rows = []
    for report in result.events:
        event = report.event
        text = report.decoded.text.replace("\n", " ")
        register = f"rtmr{event.index - 1}" if result.ccel and event.index else f"pcr{event.index}"
        rows.append(
            (
                event.number,
                register if event.extends else "-",
                event.name,
                report.covers,
                text if len(text) <= 100 else text[:99] + "…",
            )
        )
    output.say(output.table(rows, header=("event", "of", "type", "digest of", "says")))
