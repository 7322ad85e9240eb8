"""Native parts of the build. Everything declarative is in pyproject.toml."""

import os
import sysconfig
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# CPython 3.11 is the first release whose limited API has the buffer protocol.
# Free-threaded builds older than 3.15 have no limited API at all.
LIMITED_API = "0x030b0000"
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
SANITIZE = os.environ.get("PYENCLAVE_SANITIZE") == "1"
COVERAGE = os.environ.get("PYENCLAVE_COVERAGE") == "1"
WERROR = os.environ.get("PYENCLAVE_WERROR") == "1"
# Of the target, not of this machine: _PYTHON_HOST_PLATFORM names it in a cross build
# (docs/aarch64.md). An image of several machines at once (universal2) gets neither's flags.
MACHINE = sysconfig.get_platform().rpartition("-")[2].lower()
PROTECT = {
    "x86_64": ["-fcf-protection"],
    "amd64": ["-fcf-protection"],
    "aarch64": ["-mbranch-protection=standard"],
    "arm64": ["-mbranch-protection=standard"],
}

WARN = [
    "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wvla", "-Wundef", "-Wconversion",
    "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wpointer-arith", "-Wcast-qual",
    "-Wwrite-strings", "-Wformat=2", *(["-Werror"] if WERROR else []),
]  # fmt: skip
HARDEN = [
    "-fvisibility=hidden", "-fstack-protector-strong", "-fstack-clash-protection",
    *PROTECT.get(MACHINE, []),
    "-fno-strict-overflow", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2",
]  # fmt: skip
# -fno-wrapv: Python's own flags contain -fwrapv, which hides signed overflow from UBSan.
SAN = [
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer",
    "-fno-wrapv", "-UNDEBUG",
]  # fmt: skip
# Fortified string functions hide overflows from ASan, so the sanitizer build goes without. Reports
# need lines, not variables, which take the compiler minutes to follow through generated code.
OPT = (
    ["-O1", "-g1", *SAN, "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0"] if SANITIZE else ["-O3", "-g0"]
)
if COVERAGE:  # of the core only; tests/native/coverage.ld says what is done to the counters
    OPT = ["-O1", "-g0"]
COV = ["--coverage", "-fprofile-update=atomic", "-fdata-sections"] if COVERAGE else []
# Zig's linker has no --exclude-libs; what is not to be seen is hidden when it is compiled, too.
EXCLUDE = [] if "zig" in os.environ.get("CC", "") else ["-Wl,--exclude-libs,ALL"]
LINK = ["-Wl,-z,relro,-z,now,-z,noexecstack", *EXCLUDE]

HEADERS = sorted(
    [*glob("csrc/include/**/*.h", recursive=True), *glob("csrc/src/**/*.h", recursive=True)]
)
SOURCES = sorted(glob("csrc/src/**/*.c", recursive=True))
BINDINGS = sorted(f for f in glob("csrc/bindings/*") if os.path.isfile(f))


class BuildExt(build_ext):
    """Give both binding modules the same flags, and build the core first."""

    def run(self):
        self.run_command("build_clib")
        super().run()

    def build_extensions(self):
        # Some Pythons put an rpath to their own prefix into every extension.
        self.compiler.linker_so = [
            arg for arg in self.compiler.linker_so if not arg.startswith("-Wl,-rpath")
        ]
        super().build_extensions()

    def build_extension(self, ext):
        ext.libraries = ["pyenclave_core"]
        ext.include_dirs = ["csrc/include", "csrc/bindings"]
        ext.depends = [*HEADERS, *SOURCES, *BINDINGS]
        # gnu11, not c11: generated code uses alloca and asm.
        ext.extra_compile_args = ["-std=gnu11", *HARDEN, *OPT]
        ext.extra_link_args = [*LINK, *(SAN if SANITIZE else [])]
        if COVERAGE:
            ext.extra_link_args += ["--coverage", "-Wl,-T,tests/native/coverage.ld"]
        if LIMITED:
            ext.define_macros.append(("Py_LIMITED_API", LIMITED_API))
        super().build_extension(ext)


core = (
    "pyenclave_core",
    {
        "sources": SOURCES,
        "include_dirs": ["csrc/include", "csrc/src"],
        "cflags": ["-std=c11", "-fPIC", *WARN, *HARDEN, *OPT, *COV],
        "obj_deps": {"": HEADERS},
    },
)
hot = Extension(
    "pyenclave._core",
    ["csrc/bindings/_core.pyx"],
    depends=[*HEADERS, *BINDINGS],
    py_limited_api=LIMITED,
)

setup(
    libraries=[core],
    ext_modules=cythonize(
        [hot],
        build_dir="build/cython",
        include_path=["csrc/bindings"],
        compiler_directives={
            "language_level": 3,
            # The interpreter's lock guards lanes, heaps and notes: nothing was tried without it.
            "freethreading_compatible": False,
            "boundscheck": False,
            "wraparound": False,
        },
    ),
    cffi_modules=["csrc/bindings/ffi_build.py:ffi"],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
