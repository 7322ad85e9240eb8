"""
Run a command as a container engine would: its system call filter, capabilities, mounts and user.

Used as a program by the tests, as root: ``contained.py PROFILE [options] -- COMMAND...``. PROFILE
is an engine's published seccomp profile, read as the engine reads it. What an engine also does and
this does not: a root file system of its own, control groups, network, AppArmor or SELinux.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import subprocess
import sys
from typing import Any

_SECCOMP = ctypes.CDLL("libseccomp.so.2", use_errno=True)
_SECCOMP.seccomp_init.restype = ctypes.c_void_p
_SECCOMP.seccomp_init.argtypes = [ctypes.c_uint32]
_SECCOMP.seccomp_load.argtypes = [ctypes.c_void_p]
_SECCOMP.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
_SECCOMP.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVS = 3  # SCMP_FLTATR_CTL_NNP
_OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
# What Docker and containerd leave to a container's bounding set; an ordinary user in it has none
# of them in effect.
CAPABILITIES = (
    "chown,dac_override,fowner,fsetid,kill,setgid,setuid,setpcap,net_bind_service,net_raw,"
    "sys_chroot,mknod,audit_write,setfcap"
)
_MASKED = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware")
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class _Compare(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def _applies(rule: dict[str, Any], capabilities: set[str]) -> bool:
    """Whether the engine takes this rule on x86-64 with these capabilities."""
    only, never = rule.get("includes") or {}, rule.get("excludes") or {}
    if only.get("arches") and "amd64" not in only["arches"]:
        return False
    if "amd64" in (never.get("arches") or ()):
        return False
    if any(name not in capabilities for name in only.get("caps") or ()):
        return False
    if any(name in capabilities for name in never.get("caps") or ()):
        return False
    if only.get("minKernel"):
        wanted = tuple(map(int, only["minKernel"].split(".")[:2]))
        release = tuple(map(int, os.uname().release.split(".")[:2]))
        return release >= wanted
    return True


def load_filter(profile: dict[str, Any]) -> None:
    """Install the profile's filter; this process needs CAP_SYS_ADMIN or no_new_privs."""
    action = {"SCMP_ACT_ALLOW": _ALLOW, "SCMP_ACT_ERRNO": _ERRNO}
    default = action[profile["defaultAction"]]
    if default == _ERRNO:
        default |= profile.get("defaultErrnoRet", errno.EPERM)
    context = _SECCOMP.seccomp_init(default)
    _SECCOMP.seccomp_attr_set(context, _NO_NEW_PRIVS, 0)
    for arch in (0x40000003, 0x4000003E):  # i386 and x32, as the profiles' archMap
        _SECCOMP.seccomp_arch_add(context, arch)
    capabilities = {f"CAP_{name.upper()}" for name in CAPABILITIES.split(",")}
    for rule in profile["syscalls"]:
        if not _applies(rule, capabilities):
            continue
        what = action[rule["action"]]
        if what == _ERRNO:
            what |= rule.get("errnoRet") or errno.EPERM
        if what == default:
            continue
        compares = [
            _Compare(item["index"], _OPERATORS[item["op"]], item["value"], item.get("valueTwo", 0))
            for item in rule.get("args") or ()
        ]
        for name in rule["names"]:
            number = _SECCOMP.seccomp_syscall_resolve_name(name.encode())
            if number == -1:
                continue  # this library is older than the profile
            array = (_Compare * len(compares))(*compares)
            _SECCOMP.seccomp_rule_add_array(
                ctypes.c_void_p(context), ctypes.c_uint32(what), number, len(compares), array
            )
    if _SECCOMP.seccomp_load(context) != 0:
        sys.exit("the filter cannot be installed")


def _mount(*arguments: str, check: bool = True) -> None:
    subprocess.run(["mount", *arguments], check=check, stderr=None if check else subprocess.DEVNULL)


def _mounts(writable: list[str]) -> None:
    """Make the file system read-only but for *writable*, and hide what engines hide."""
    _mount("-t", "proc", "proc", "/proc")
    with open("/proc/self/mounts", encoding="utf-8") as file:
        points = [line.split()[1] for line in file]
    for point in points:
        if not point.startswith(("/proc", "/dev")):
            _mount("-o", "remount,ro,bind", point, check=False)
    for path in _READ_ONLY:
        if os.path.exists(path):
            _mount("--bind", path, path)
            _mount("-o", "remount,ro,bind", path)
    for path in _MASKED:
        if os.path.isdir(path):
            _mount("-t", "tmpfs", "-o", "ro,size=0", "tmpfs", path, check=False)
        elif os.path.exists(path):
            _mount("--bind", "/dev/null", path)
    _mount("-t", "tmpfs", "-o", "noexec,nosuid,nodev,size=64m", "shm", "/dev/shm")
    for path in writable:
        _mount("-t", "tmpfs", "-o", "nosuid,nodev,mode=1777", "tmpfs", path)


def _uncover(path: str) -> None:
    """Make *path* reachable for any user, as if it lay in an image: only it is left of its top."""
    top = "/" + path.split("/")[1]
    if os.stat(top).st_mode & 0o001:
        return
    kept = "/mnt"
    _mount("--bind", path, kept)
    _mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", top)
    os.makedirs(path, exist_ok=True)
    _mount("--bind", kept, path)
    subprocess.run(["umount", kept], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("profile")
    parser.add_argument("--uid", type=int, default=1000730000 % 2**31)
    parser.add_argument("--writable", action="append", default=[], help="a tmpfs there")
    parser.add_argument("--reach", help="a folder of the interpreter that is closed to others")
    parser.add_argument("--no-new-privileges", action="store_true")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    if not options.inner:
        namespaces = ["--mount", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child"]
        again = [sys.executable, __file__, "--inner", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", *namespaces, *again])
    with open(options.profile, encoding="utf-8") as file:
        profile = json.load(file)
    _mount("--make-rprivate", "/")
    if options.reach:
        _uncover(options.reach)
    _mounts(options.writable)
    os.chdir("/")
    load_filter(profile)
    command = [
        "setpriv",
        f"--reuid={options.uid}",
        "--regid=0",
        "--clear-groups",
        "--inh-caps=-all",
        f"--bounding-set=-all,{','.join('+' + name for name in CAPABILITIES.split(','))}",
        *(["--no-new-privs"] if options.no_new_privileges else []),
        *options.command,
    ]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
