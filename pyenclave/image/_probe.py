"""
The fresh process that takes the closure of an entry; run by ``closure.py`` as ``python -c``.

It is started as a zygote is, and imports what a zygote and a worker import, then the entry. It
only looks: names and paths go back, hashes are taken by the parent. Until the first snapshot it
may import nothing that is not built in or frozen, and all through nothing that would not also be
inside: what it needs itself is imported last. The request comes by marshal, which is built in.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any


def _mapped() -> "dict[str, bool]":
    """Return {path: whether it is mapped executable} of every mapped file."""
    files: dict[str, bool] = {}
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            fields = line.rstrip(b"\n").split(None, 5)
            if len(fields) == 6 and fields[5].startswith(b"/"):
                path = fields[5].decode("utf-8", "surrogateescape")
                files[path] = files.get(path, False) or b"x" in fields[1]
    return files


def _modules() -> "dict[str, tuple[str, str]]":
    """Return {name: (kind, path)} of every imported module that comes from a file."""
    from _frozen_importlib_external import EXTENSION_SUFFIXES, PathFinder

    found: dict[str, tuple[str, str]] = {}
    for key, module in list(sys.modules.items()):
        own: Any = getattr(module, "__spec__", None)
        # What has no spec of its own was made by another module, which is in the list itself.
        specs = [] if own is None else [own]
        if key != "__main__" and getattr(own, "name", None) != key:
            # Some put an object of their own, or another module, in a module's place (cryptography
            # does, to warn of deprecated names; collections.abc does from Python 3.13 on): the
            # file is that under which it was imported. Without a package around it, a dotted name
            # (typing.io) is no file, and its last part another.
            parent, _, _ = key.rpartition(".")
            path = getattr(sys.modules.get(parent), "__path__", None)
            if path is not None or not parent:
                specs.append(PathFinder.find_spec(key, path))
        for spec in specs:
            name = getattr(spec, "name", None)
            if not isinstance(name, str) or spec.origin in ("built-in", "frozen"):
                continue
            if not getattr(spec, "has_location", False):
                if "Namespace" in type(spec.loader).__name__:
                    found[name] = ("namespace", "")
            elif spec.origin.endswith(tuple(EXTENSION_SUFFIXES)):
                found[name] = ("extension", spec.origin)
            else:
                # By its file: a module may call itself a package afterwards, as six does. What is
                # imported as `package.__init__` is a module of the same file.
                stem = spec.origin.rpartition("/")[2].partition(".")[0]
                last = name.rpartition(".")[2]
                found[name] = ("package" if stem == "__init__" != last else "module", spec.origin)
    return found


class _Reads:
    """Notes which files are opened for reading; what is mapped is known without it."""

    def __init__(self) -> None:
        self.paths: dict[str, None] = {}
        self.on = False

    def __call__(self, event: str, arguments: "tuple[Any, ...]") -> None:
        if self.on and event == "open":
            path, _, flags = arguments
            if isinstance(path, str) and path.startswith("/") and not flags & 3:
                self.paths[path] = None


class _Refused:
    """Refuses those of pyenclave's own modules that never run inside."""

    def __init__(self, allowed: "list[str]") -> None:
        self.allowed = allowed

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        parts = name.split(".")
        if parts[0] == "pyenclave" and len(parts) > 1 and parts[1] not in self.allowed:
            raise ImportError(f"{name} does not run inside an enclave", name=name)


class _Hidden:
    """Imports modules of the image that are encrypted: not before the entry is there."""

    def __init__(self, modules: "list[dict[str, Any]]") -> None:
        self.modules = {module["module"]: module for module in modules}
        self.open = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> "Any":
        from _frozen_importlib import ModuleSpec

        if name not in self.modules:
            return None
        if not self.open:
            raise ImportError(
                f"{name} is encrypted: import it inside a function, after trusted.unlock()",
                name=name,
            )
        shown = self.modules[name]["shown"]
        return ModuleSpec(name, self, origin=shown)  # type: ignore[arg-type] # has the protocol

    def create_module(self, spec: "Any") -> None:
        return None

    def exec_module(self, module: "ModuleType") -> None:
        found = self.modules[module.__name__]
        module.__file__ = found["shown"]
        code = compile(found["source"], found["shown"], "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102 - the purpose


def _lazy() -> "dict[tuple[str, str], Any]":
    """Return every lazy import (PEP 810) that was not done yet, by module and name."""
    import types

    kind = getattr(types, "LazyImportType", None)
    # Looked at in the dictionaries only: who reads such a name elsewhere has it imported.
    return {
        (key, name): value
        for key, module in list(sys.modules.items())
        if kind is not None and isinstance(module, types.ModuleType)
        for name, value in list(vars(module).items())
        if type(value) is kind
    }


def _follow_lazy(known: "set[tuple[str, str]]") -> None:
    """Do every lazy import that is not among the *known* ones, and those that follow from it."""
    while found := {place: value for place, value in _lazy().items() if place not in known}:
        for place, value in found.items():
            known.add(place)
            try:  # noqa: SIM105 - contextlib might not be inside
                value.resolve()
            except Exception:  # noqa: S110 - it fails inside as well, where it is used
                pass


def _failure(error: BaseException, step: str, shown: str) -> "dict[str, Any]":
    """Describe an exception by its type, its text and its line in the entry."""
    line = 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == shown:
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == shown:
        line = error.lineno or 0
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return {
        "step": step,
        "type": type(error).__name__,
        "text": text,
        "line": line,
        "missing": (error.name or "") if isinstance(error, ImportError) else "",
    }


def _preload() -> "list[str]":
    """Return what the zygote imports; the worker's package says it."""
    # By name: this process looks at the worker, the builder does not depend on it.
    worker = __import__("pyenclave._worker", fromlist=["PRELOAD"])
    return list(worker.PRELOAD)


def _use_lazily() -> None:
    """Do once what a worker does at its start and in its calls, for what is imported on the way."""
    import numpy as np
    from cryptography.hazmat.primitives import hpke
    from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key = hpke.MLKEM768X25519PrivateKey(
        mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()
    )
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    suite.decrypt(suite.encrypt(b"x", key.public_key()), key)
    cipher = AESGCM(AESGCM.generate_key(256))
    cipher.decrypt(bytes(12), cipher.encrypt(bytes(12), b"x", None), None)
    repr(np.arange(4.0).reshape(2, 2) @ np.eye(2))
    np.random.default_rng(1).standard_normal(4).sum()
    try:  # noqa: SIM105 - contextlib might not be inside
        np.zeros(2) + np.zeros(3)
    except ValueError:
        pass
    try:  # noqa: SIM105
        bytes([200]).decode("ascii")
    except UnicodeDecodeError:
        pass


def _import_entry(entry: "dict[str, Any]") -> "ModuleType":
    """Execute a Python entry as the worker does: under its stem, never as ``__main__``."""
    from _frozen_importlib import ModuleSpec

    module = type(sys)(entry["module"])
    module.__file__ = entry["shown"]
    module.__spec__ = ModuleSpec(entry["module"], None, origin=entry["shown"])
    sys.modules[entry["module"]] = module
    code = compile(entry["source"], entry["shown"], "exec", dont_inherit=True)
    exec(code, module.__dict__)  # noqa: S102 - the purpose
    return module


def _map_entry(entry: "dict[str, Any]") -> None:
    """Map a native entry, so that the libraries it needs are mapped too."""
    import _imp
    from _frozen_importlib import ModuleSpec

    before = _mapped()
    try:
        # create_dynamic is the one dlopen that is built in. It maps, then misses PyInit_….
        _imp.create_dynamic(ModuleSpec(entry["module"], None, origin=entry["path"]))
    except ImportError:
        if set(_mapped()) <= set(before):
            raise


def _run(request: "dict[str, Any]") -> "dict[str, Any]":
    import gc

    gc.disable()  # until the runtime is imported: all of it stays
    step = "worker"
    result: dict[str, Any] = {
        "bootstrap_files": _mapped(),
        "bootstrap_modules": _modules(),
        "functions": [],
        "ocalls": [],
    }
    sys.path[:] = request["path"]
    reads = _Reads()
    sys.addaudithook(reads)
    sys.meta_path.insert(0, _Refused(request["allowed"]))
    hidden = _Hidden(request["hidden"])
    entry = request["entry"]
    shown = entry["shown"] if entry else ""
    try:
        result["preload"] = _preload()
        # Inside there is no terminal, whose library the debugger would take along from here.
        sys.modules["readline"] = None  # type: ignore[assignment] # as the import system has it
        for name in [*result["preload"], *request["lazy"]]:
            __import__(name)
        del sys.modules["readline"]
        _use_lazily()
        # Those of the standard library's own modules were imports inside functions before.
        known = {place for place in _lazy() if place[0].split(".")[0] in sys.stdlib_module_names}
        gc.freeze()
        gc.enable()
        reads.on = True
        step = "extra"
        for name in request["extra"]:
            __import__(name)
        for name in hidden.modules:
            if name in sys.modules or (entry and name == entry["module"]):
                step = f"hidden {hidden.modules[name]['shown']}"
                raise ImportError(f"the name {name} is that of another module inside")
        sys.meta_path.insert(0, hidden)
        step = "entry"
        if entry and entry["module"] in sys.modules:
            raise ImportError(f"the name {entry['module']} is that of a module of the runtime")
        if entry and entry["native"]:
            _map_entry(entry)
        elif entry:
            module = _import_entry(entry)
            step = "functions"
            describe = __import__(request["describe"], fromlist=["functions_of"])
            reads.on = False
            result["functions"] = list(describe.functions_of(module))
            describe = __import__(request["describe_ocalls"], fromlist=["ocalls_of"])
            result["ocalls"] = list(describe.ocalls_of(module))
            reads.on = hidden.open = True
            for name, found in hidden.modules.items():
                step, shown = f"hidden {found['shown']}", found["shown"]
                __import__(name)
        _follow_lazy(known)
    except BaseException as error:
        return {"error": _failure(error, step, shown), "message": getattr(error, "message", "")}
    if entry:
        sys.modules.pop(entry["module"], None)
    for name in hidden.modules:
        sys.modules.pop(name, None)
    reads.on = False
    result["read"] = list(reads.paths)
    result["modules"] = _modules()
    result["files"] = _mapped()
    return result


def main() -> None:
    import marshal
    import posix

    # What the entry prints must not mix with the result.
    out = posix.dup(1)
    posix.dup2(2, 1)
    result = _run(marshal.loads(sys.stdin.buffer.read()))  # noqa: S302 - the parent wrote it
    import json

    with open(out, "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(result, file)
        file.flush()
        # Threads and exit handlers of the entry have no say any more.
        posix._exit(0)  # noqa: SLF001


if __name__ == "__main__":
    main()
