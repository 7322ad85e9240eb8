"""What protection is missing on this machine, why, and how to add it; for ``doctor``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["in_container", "remedies"]

_NAMESPACES: Final = ("userns", "pidns", "netns", "mountns", "ipcns", "utsns", "cgroupns")
# What engines leave inside a container, by the engine's own documentation.
_MARKS: Final = {
    "/.dockerenv": "Docker",
    "/run/.containerenv": "Podman",
    "/var/run/secrets/kubernetes.io": "Kubernetes",
}
_SHORT: Final = 256 * 1024  # bytes; less cannot hold the keys of a few enclaves

_Read = Callable[[str], str | None]


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(64 * 1024).strip()
    except OSError:
        return None


def in_container(exists: Callable[[str], bool] = os.path.exists) -> str | None:
    """Return the engine that this process seems to run under, or None."""
    for path, name in _MARKS.items():
        if exists(path):
            return name
    return "Kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else None


def _why_no_namespaces(read: _Read, container: str | None) -> str:
    if read("/proc/sys/user/max_user_namespaces") == "0":
        return "This kernel is set to none: sysctl user.max_user_namespaces=15000."
    if read("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return "This kernel keeps them from users: sysctl kernel.unprivileged_userns_clone=1."
    if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor keeps them from programs without a profile: give the interpreter a profile "
            "with `userns,`, or sysctl kernel.apparmor_restrict_unprivileged_userns=0."
        )
    filtered = "Seccomp:\t2" in (read("/proc/self/status") or "")
    if container is not None or filtered:
        return (
            "A system call filter refuses unshare and clone, as Docker's and containerd's default "
            "does (Podman's allows them): run with a profile that also allows clone, clone3, "
            "unshare and setns (docs/containers.md makes one), as `--security-opt "
            "seccomp=FILE` or Kubernetes' seccompProfile type Localhost."
        )
    mounts = read("/proc/self/mountinfo")
    if mounts and not any(line.split(" ")[4:5] == ["/"] for line in mounts.splitlines()):
        # A chroot into a folder that is no mount; no engine does that.
        return (
            "In a chroot the kernel makes none: run in a container instead, or enter the folder "
            "by pivot_root, as systemd-nspawn and bwrap do."
        )
    return "The kernel refused to make a user namespace; its log may say why."


def remedies(
    report: Mapping[str, Any], *, read: _Read = _read, container: str | None = None
) -> list[dict[str, str]]:
    """
    Say how to add what is missing.

    Args:
        report: What ``doctor`` found.
        read: Returns the text of a system file, None where it cannot be read.
        container: The engine around this process, if there is one.

    Returns:
        For each thing that is missing its name and what to do.

    """
    bits = {name: bit["value"] for name, bit in report["enclave"].get("bits", {}).items()}
    found: list[dict[str, str]] = []

    def add(missing: str, advice: str) -> None:
        found.append({"missing": missing, "advice": advice})

    none = [name for name in _NAMESPACES if bits.get(name) is False]
    if none:
        add(", ".join(none), _why_no_namespaces(read, container))
    if bits.get("landlock") is False:
        add("landlock", "Linux 5.13 or newer, with landlock in the boot parameter lsm=.")
    if bits.get("mdwe") is False:
        add("mdwe", "Linux 6.3 or newer.")
    if bits.get("secretmem") is False:
        add("secretmem", "Linux 6.5 or newer, or the boot parameter secretmem.enable=1.")
    limit = report["memory_lock_limit"]["soft"]
    if bits.get("locked") is False or (limit is not None and limit < _SHORT):
        how = "`--ulimit memlock=8388608` for a container" if container else "limits.conf, memlock"
        add("locked", f"Raise the limit of lockable memory ({limit} bytes): {how}.")
    if report["platform"].get("ephemeral"):
        where = "a volume, mounted" if container else "a folder of this user"
        add(
            "a root that stays",
            f"Data sealing and counters are refused without it: set PYENCLAVE_STATE to {where} "
            "with mode 0700.",
        )
    return found
