"""``pyenclave doctor``: what this machine gives, each protection tried, and what is open."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

from pyenclave import __version__, _core, _native
from pyenclave._platform.client import PlatformClient
from pyenclave.cli import output
from pyenclave.cli._remedies import in_container, remedies
from pyenclave.errors import EnclaveError
from pyenclave.formats.record import ProtectionRecord
from pyenclave.host import Enclave
from pyenclave.providers import probe
from pyenclave.sealed.heap import SealedHeap

__all__ = ["add_commands"]

# What each mechanism stops, in the words of SECURITY.md.
_MEANING = {
    "dumpable_off": "other programs reading or tracing the worker; core files",
    "untraced": "a debugger that was there before",
    "seccomp": "system calls outside a short list",
    "no_new_privs": "gaining privileges",
    "pidns": "seeing or signalling other processes",
    "netns": "any network",
    "userns": "rights of the user outside the worker",
    "no_capabilities": "privileges, those over its own namespaces included",
    "mountns": "changing mounts that others see",
    "ipcns": "System V and POSIX queues of others",
    "utsns": "changing the host's name",
    "cgroupns": "seeing the control groups of others",
    "landlock_abi": "version of Landlock in use",
    "landlock": "opening files, connecting, signalling out",
    "mdwe": "new executable memory",
    "secretmem": "reading keys even for most of the kernel (memfd_secret)",
    "locked": "key memory reaching swap (locked, or memfd_secret)",
    "nodump": "core files",
    "mappings": "code that is not on the lock list",
}
_DEVICES = {
    "sev-snp": ("/dev/sev-guest",),
    "tdx": ("/dev/tdx_guest", "/dev/tdx-guest"),
    "sgx": ("/dev/sgx_enclave", "/dev/attestation/quote"),
    "nitro": ("/dev/nsm",),
    "configfs-tsm": ("/sys/kernel/config/tsm/report",),
    "tpm": ("/dev/tpmrm0",),
}
_KINDS = {1: "memfd_secret", 2: "locked memory", 3: "NOT LOCKED: it may reach swap"}
_NOT_PROTECTED = (
    "root on this machine, and its operator: they read and change everything",
    "hostile programs of this user: the platform's root is this user's file (embedded mode)",
    "a program of this user that was there before the worker and races its start",
    "ordinary Python objects inside the worker beyond the process wall; they are not erased",
    "cache, power and timing channels; lengths and access patterns of what crosses the boundary",
    "rollback of the whole state directory: no hardware counter holds it",
    "availability: whoever may signal the worker can end it",
)


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor``."""
    doctor = subparsers.add_parser(
        "doctor", help="show what this machine gives, and what is not protected"
    )
    doctor.set_defaults(function=_doctor)


def _kernels() -> dict[str, str]:
    with_key = _core.Gcm(bytes(32))
    return {
        "aes-gcm": with_key.implementation,
        "sha-256": _core.sha256_variant(),
        "sha-256 of several": _core.sgx_many_variant(),
        "sha-384 of several": _core.snp_variant(),
    }


def _secret_memory() -> str:
    """Make a page of secret memory and return the kind that the kernel gave."""
    with _core.SecretMemory(4096) as memory:
        return _KINDS[memory.kind]


def _sealed_memory() -> dict[str, Any]:
    """Make a small heap of sealed memory: how pages are shown here, and whether they are locked."""
    try:
        with SealedHeap(1 << 20, 1 << 19) as heap:
            heap.zeros(1)
            return {"mechanism": heap.mechanism, "locked": heap.stats.locked_bytes > 0}
    except (EnclaveError, OSError, MemoryError) as error:
        return {"error": {"code": getattr(error, "code", "os"), "message": str(error)}}


def _tried() -> dict[str, Any]:
    """Launch a small enclave and return its record's bits, or why it could not start."""
    script = Path(__file__).with_name("_probe_enclave.py")
    try:
        with Enclave.from_file(script, quiet=True) as enclave:
            enclave.call("answer", 41)
            record = ProtectionRecord.from_bytes(enclave.info.record)
            bits = {name: {"value": bit.value, "by": bit.by} for name, bit in record.bits.items()}
            return {"bits": bits, "level": enclave.info.level}
    except (EnclaveError, OSError) as error:
        return {"error": {"code": getattr(error, "code", "os"), "message": str(error)}}


def _platform_state() -> dict[str, Any]:
    try:
        with PlatformClient.connect() as client:
            hello = client.hello
            return {"level": hello.level, "ephemeral": hello.ephemeral}
    except (EnclaveError, OSError) as error:
        return {"error": {"code": getattr(error, "code", "os"), "message": str(error)}}


def _tee() -> dict[str, Any]:
    present = {
        name: [path for path in paths if os.path.exists(path)] for name, paths in _DEVICES.items()
    }
    found = {name: paths for name, paths in present.items() if paths}
    seen = probe()
    chosen = seen.finding
    return {
        "tee": chosen.tee,
        "provider": seen.chosen,
        "provider_reason": chosen.reason,
        "providers": [
            {"name": item.provider, "usable": item.usable, "reason": item.reason}
            for item in seen.findings
        ],
        "devices": found,
        "note": "pyenclave evidence asks this provider; enclaves themselves are of the software "
        "platform",
    }


def _doctor(args: argparse.Namespace) -> int:
    soft, hard = _native.memory_lock_limit()
    report: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu_features": list(_native.cpu_features()),
        "kernels": _kernels(),
        "secret_memory": _secret_memory(),
        "memory_lock_limit": {"soft": soft, "hard": hard},
        "sealed_memory": _sealed_memory(),
        "platform": _platform_state(),
        "enclave": _tried(),
        **_tee(),
        "not_protected": list(_NOT_PROTECTED),
    }
    report["container"] = in_container()
    report["remedies"] = remedies(report, container=report["container"])
    failed = "error" in report["enclave"] or "error" in report["platform"]
    if args.json:
        output.print_json(report)
        return 1 if failed else 0
    _print(report)
    return 1 if failed else 0


def _print(report: dict[str, Any]) -> None:
    output.say(
        f"pyenclave {report['version']}, Python {report['python']}, Linux {report['kernel']}"
    )
    output.say(f"CPU        {' '.join(report['cpu_features']) or 'no special instructions'}")
    output.say(
        "kernels    " + ", ".join(f"{name}: {kind}" for name, kind in report["kernels"].items())
    )
    limit = report["memory_lock_limit"]["soft"]
    output.say(
        f"memory     secret memory: {report['secret_memory']}; "
        f"lock limit {'none' if limit is None else f'{limit:,} bytes'}"
    )
    heap = report["sealed_memory"]
    if "error" in heap:
        output.say(f"           sealed arrays: not here: {heap['error']['message']}")
    else:
        locked = "may be locked" if heap["locked"] else "NOT locked: may reach swap"
        output.say(f"           sealed arrays: {heap['mechanism']}; a small heap's pages {locked}")
    state = report["platform"]
    if "error" in state:
        output.say(
            f"platform   {output.paint('not available', 'red')}: {state['error']['message']}"
        )
    else:
        kept = "EPHEMERAL (in memory only)" if state["ephemeral"] else "a file of this user"
        output.say(f"platform   level {state['level']}; root: {kept}")
    if report["container"]:
        output.say(f"container  {report['container']}")
    devices = ", ".join(report["devices"]) or "none found"
    output.say(f"TEE        {report['tee']} (devices: {devices})")
    output.say(f"evidence   of provider {report['provider']}: {report['provider_reason']}")
    for item in report["providers"]:
        if item["name"] != report["provider"]:
            usable = "usable too: " if item["usable"] else "not "
            output.say(f"           {usable}{item['name']}: {item['reason']}")
    output.say()
    enclave = report["enclave"]
    if "error" in enclave:
        output.say(
            f"{output.paint('no enclave starts here', 'red')}: {enclave['error']['message']}"
        )
    else:
        output.say("protections of an enclave launched just now, each tried:")
        for name, bit in sorted(enclave["bits"].items()):
            value, by = bit["value"], bit["by"]
            mark = output.paint("yes", "green") if value else output.paint("NO ", "red")
            level = f" ({value})" if value is not True and value else ""
            output.say(f"  {mark} {name:<15} {by:<8} {_MEANING.get(name, '')}{level}")
    if report["remedies"]:
        output.say()
        output.say("missing here, and how to add it:")
        for item in report["remedies"]:
            output.say(f"  - {item['missing']}: {item['advice']}")
    output.say()
    output.say("NOT protected at this level:")
    for line in report["not_protected"]:
        output.say(f"  - {line}")
