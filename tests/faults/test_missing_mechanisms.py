"""
Kernels and limits without some mechanism: reported and refused where required, or a typed error.

Each is played by the real thing: a seccomp filter that makes the system call fail as on such a
kernel, or a lowered limit, in a process that then starts platform, zygote and worker.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers are of x86-64")

MEMFD_SECRET = 447
LANDLOCK = (444, 445, 446)
SECCOMP = 317
CLONE = 56
CLONE3 = 435
UNSHARE = 272
PRCTL = 157
MDWE = 65
NEW_NAMESPACES = 0x7E020000

# Launch in production, then again requiring the bit that is missing, and once more as debug.
LAUNCH = """
def once(**options):
    with Enclave(IMAGE, quiet=True, **options) as enclave:
        assert enclave.call("double", 21) == 42
        assert enclave.call("recall", enclave.call("keep", b"kept")) == b"kept"
        return dict(enclave.info.protections)
first = outcome(once)
answer([first, *(outcome(lambda: once(require=[name])) for name in {required!r})])
"""


def launch(
    program: Callable[..., Any], image: bytes, handicap: str, required: tuple[str, ...]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    first, *refused = program(handicap + LAUNCH.format(required=required), image)
    return first, refused


def check(first: dict[str, Any], refused: list[dict[str, Any]], missing: tuple[str, ...]) -> None:
    assert "value" in first, first
    bits = first["value"]
    assert [name for name in missing if bits.get(name)] == []
    for name, outcome in zip(missing, refused, strict=True):
        assert outcome["error"][0] == "LaunchRefusedError", (name, outcome)
        assert name in outcome["text"]
        assert outcome["seconds"] < 30


def test_with_everything_there_every_bit_can_be_required(
    program: Callable[..., Any], images: Any
) -> None:
    """So the refusals below are due to what is missing."""
    names = (
        "secretmem",
        "landlock",
        "seccomp",
        "pidns",
        "netns",
        "userns",
        "mdwe",
        "locked",
        "no_capabilities",
    )
    first, required = launch(program, images.signed, "", names)
    if not all(first["value"].get(name) for name in names):
        pytest.skip(f"this machine lacks some: {first['value']}")
    assert all("value" in outcome for outcome in required), required


def test_PRC_10_a_kernel_without_memfd_secret(program: Callable[..., Any], images: Any) -> None:
    handicap = f"deny([{MEMFD_SECRET}], {errno.ENOSYS})\n"
    first, refused = launch(program, images.signed, handicap, ("secretmem",))
    check(first, refused, ("secretmem",))
    assert first["value"]["locked"], "8 MiB of locked memory are enough for a worker"


def test_PRC_10_a_kernel_without_landlock(program: Callable[..., Any], images: Any) -> None:
    handicap = f"deny({list(LANDLOCK)}, {errno.EOPNOTSUPP})\n"
    check(*launch(program, images.signed, handicap, ("landlock",)), ("landlock",))


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSPC])
def test_PRC_10_a_kernel_without_namespaces(
    program: Callable[..., Any], images: Any, error: int
) -> None:
    handicap = (
        f"deny([{UNSHARE}], {error})\ndeny([{CLONE3}], {errno.ENOSYS})\n"
        f"deny_if({CLONE}, 0, {NEW_NAMESPACES}, {error})\n"
    )
    names = ("pidns", "netns", "userns")
    check(*launch(program, images.signed, handicap, names), names)


def test_PRC_10_a_kernel_without_mdwe(program: Callable[..., Any], images: Any) -> None:
    handicap = f"deny_if({PRCTL}, 0, 0, {errno.EINVAL}, value={MDWE})\n"
    check(*launch(program, images.signed, handicap, ("mdwe",)), ("mdwe",))


def test_PRC_10_a_kernel_without_seccomp_starts_no_production_enclave(
    program: Callable[..., Any], images: Any
) -> None:
    """Without the filter the worker is no sandbox: refused outright, and debug says so."""
    source = f"deny([{SECCOMP}], {errno.ENOSYS})\n" + (
        "def once(debug):\n"
        "    with Enclave(IMAGE, debug=debug, quiet=True) as enclave:\n"
        "        return enclave.info.protections['seccomp']\n"
        "answer([outcome(lambda: once(False)), outcome(lambda: once(True))])\n"
    )
    production, debug = program(source, images.signed)
    assert production["error"][0] == "LaunchRefusedError", production
    assert debug["value"] is False, debug


@pytest.mark.parametrize("size", [8 << 20, 0])
def test_PRC_10_little_memory_that_may_be_locked(
    program: Callable[..., Any], images: Any, size: int
) -> None:
    """An ordinary user may lock 8 MiB; less is reported, not hidden."""
    first, refused = launch(
        program, images.signed, f"ordinary(); limit('MEMLOCK', {size})\n", ("locked",)
    )
    if size == 0:
        check(first, refused, ("locked",))
        assert not first["value"]["secretmem"]
    else:
        assert "value" in first, first
        if size >= 8 << 20:
            assert first["value"]["locked"]
            assert "value" in refused[0]


def test_PRC_10_all_of_them_missing_at_once(program: Callable[..., Any], images: Any) -> None:
    handicap = (
        "ordinary(); limit('MEMLOCK', 0)\n"
        f"deny([{MEMFD_SECRET}, {UNSHARE}, {CLONE3}, *{list(LANDLOCK)}], {errno.ENOSYS})\n"
        f"deny_if({CLONE}, 0, {NEW_NAMESPACES}, {errno.EPERM})\n"
    )
    names = ("secretmem", "landlock", "pidns", "netns", "userns", "locked")
    check(*launch(program, images.signed, handicap, names), names)
