"""Native trusted functions, called between two processes; some of them lie."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest

import pyenclave
from pyenclave.errors import ArgumentError, EcallError

SOURCE = r"""
#include <pyenclave_trusted.h>
#include <string.h>
PYE_ECALL(plus)
{
    for (size_t i = 0; i < in_len; i++) out[i] = (uint8_t)(in[i] + 1);
    *out_len = in_len;
    return PYE_ECALL_OK;
}
PYE_ECALL(lies)   /* says more than it wrote */
{
    (void)in; (void)in_len;
    memcpy(out, "12345678", 8);
    *out_len = 64;
    return PYE_ECALL_OK;
}
PYE_ECALL(beyond)
{
    (void)in; (void)in_len; (void)out;
    *out_len += 1;
    return PYE_ECALL_OK;
}
PYE_ECALL(refuses)
{
    (void)in; (void)out; (void)out_len;
    memset(out, 0x53, 64);
    return in_len ? 1042 : PYE_ECALL_ARGUMENT;
}
PYE_ECALL(half)
{
    double x[64];
    if (in_len > sizeof(x)) return PYE_ECALL_TOO_LONG;
    memcpy(x, in, in_len);
    for (size_t i = 0; i < in_len / 8; i++) x[i] /= 2;
    memcpy(out, x, in_len);
    *out_len = in_len;
    return PYE_ECALL_OK;
}
"""
NATIVE = {"plus": "", "lies": "", "beyond": "", "refuses": "", "half": "f8 -> f8"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    (folder / "lib.c").write_text(SOURCE)
    warn = ["-Wall", "-Wextra", "-Werror", "-Wpedantic"]
    include = ["-I", pyenclave.get_include()]
    files = ["-o", folder / "lib.so", folder / "lib.c"]
    command = ["gcc", "-std=c11", "-O2", *warn, "-shared", "-fPIC", *include, *files]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return str(folder / "lib.so")


def test_native_functions_get_bytes_and_arrays(pair, library):
    one = pair(library=library, native=NATIVE)
    assert one.plus(b"abc") == b"bcd"
    assert one.plus(bytearray(b"")) == b""
    assert one.plus(np.zeros(3, "u1")) == b"\1\1\1"
    data = os.urandom(300_000)
    assert one.plus(data) == bytes((np.frombuffer(data, "u1") + 1).astype("u1"))
    assert one.half(np.array([2.0, 4.0])).tolist() == [1.0, 2.0]
    for bad in (np.zeros(2, "f4"), [1.0], b"12345678"):
        with pytest.raises(ArgumentError):
            one.half(bad)
    for bad in ("text", 5, None, np.arange(8)[::2]):
        with pytest.raises(ArgumentError):
            one.plus(bad)
    with pytest.raises(ArgumentError, match="length"):
        one.half(np.zeros(65))


def test_BND_07_a_native_function_that_lies_gives_out_nothing_old(pair, library):
    one = pair(library=library, native=NATIVE)
    one.plus(b"\x52" * 4096)  # its answer, all 0x53, was in the buffer before
    assert one.lies(b"") == b"12345678" + bytes(56)
    with pytest.raises(EcallError, match="1042"):
        one.refuses(b"x")  # it wrote 64 bytes before it failed
    assert one.lies(b"") == b"12345678" + bytes(56)
    with pytest.raises(ArgumentError, match="refuses its input"):
        one.refuses(b"")
    with pytest.raises(ArgumentError, match="length"):
        one.beyond(b"")
    assert one.alive


@pytest.mark.parametrize("limit", [None, 1 << 22])
def test_BND_07_what_a_refusing_native_function_wrote_is_in_no_later_answer(pair, library, limit):
    one = pair(library=library, native=NATIVE, **({"limit": limit} if limit else {}))
    for data in (b"x", b""):
        with pytest.raises((EcallError, ArgumentError)):
            one.refuses(data)  # it filled its buffer with 0x53 first
        assert one.lies(b"") == b"12345678" + bytes(56)
