"""The enclave's own code: loaded from the measured image and from nowhere else."""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from pyenclave._worker import dispatch
from pyenclave.errors import ImageError
from pyenclave.trusted import _state

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked
    from pyenclave.formats.image import Image

__all__ = ["ROOT", "EntryLoader", "load_entry", "set_blas_threads"]

# Where the image's files seem to lie, for __file__ and importlib.resources. No such folder exists.
ROOT = "/enclave"

# Names under which builds of OpenBLAS export the setter.
_BLAS_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


class EntryLoader(Loader):
    """
    Loads the entry and gives it the files of its image.

    Args:
        image: The measured image.
        code: The entry's code, if it was compiled before.

    """

    def __init__(self, image: Image, code: CodeType | None = None) -> None:
        self._image = image
        self._code = code
        self._source = bytes(image.files[image.info.entry_file])

    def create_module(self, spec: ModuleSpec) -> None:
        """Use the default module."""

    def exec_module(self, module: ModuleType) -> None:
        """Compile and run the measured source."""
        code = self.get_code(module.__name__) if self._code is None else self._code
        exec(code, module.__dict__)  # noqa: S102 - measured code

    def get_code(self, name: str) -> CodeType:
        """Return the entry's code."""
        path = f"{ROOT}/{self._image.info.entry_file}"
        code: CodeType = compile(self._source, path, "exec", dont_inherit=True)
        return code

    def get_source(self, name: str) -> str:
        """Return the entry's source, for tracebacks in debug."""
        return self._source.decode("utf-8-sig", "replace")

    def is_package(self, name: str) -> bool:
        """Return False: an entry is one module."""
        return False

    def get_data(self, path: str) -> bytes:
        """Return a file of the image by its path below ``ROOT``."""
        name = os.path.normpath(path).removeprefix(ROOT + "/")
        parts = _state.parts
        if parts is not None and name in parts:
            return parts.read(name)
        try:
            return bytes(self._image.files[name])
        except KeyError:
            raise FileNotFoundError(2, "not in the image", path) from None


def load_entry(image: Image, locked: Locked, code: CodeType | None = None) -> Any:
    """
    Import the entry under its stem, or map the native one.

    Args:
        image: The measured image.
        locked: What the zygote verified; none of it may be shadowed.
        code: The entry's code, if it was compiled before.

    Returns:
        The module, or a ``dispatch.NativeLibrary``.

    Raises:
        ImageError: The entry has the name of another module.
        Exception: Whatever the entry's own code raises.

    """
    info = image.info
    _state.enter()
    if info.entry_kind == "native":
        return dispatch.NativeLibrary(locked.map_bytes(bytes(image.files[info.entry_file])))
    name = info.entry_module
    if name in sys.stdlib_module_names or name in locked.modules or name in sys.modules:
        raise ImageError("the entry has the name of a module of the runtime", found=name)
    if info.encrypted is not None:
        _hide(image, locked)
    loader = EntryLoader(image, code)
    spec = ModuleSpec(name, loader, origin=f"{ROOT}/{info.entry_file}")
    spec.has_location = True
    module = ModuleType(name)
    module.__spec__ = spec
    module.__loader__ = loader
    module.__package__ = ""
    module.__file__ = spec.origin
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _hide(image: Image, locked: Locked) -> None:
    """Let encrypted modules be found; what is in them opens when the key is there."""
    from pyenclave.trusted._parts import Parts

    info = image.info.encrypted
    assert info is not None
    for name in info.modules:
        if name in sys.stdlib_module_names or name in locked.modules or name in sys.modules:
            raise ImageError("an encrypted module has the name of another one", found=name)
    _state.parts = Parts(info, image.files, ROOT)
    # Before the finder of locked modules, which refuses every name that it does not know.
    sys.meta_path.insert(0, _state.parts)


def set_blas_threads(count: int) -> None:
    """
    Give the linear algebra library *count* threads; there is one until then.

    Threads are made here, before the sandbox closes, and never by a fork's child that has one.
    """
    if count <= 1:
        return
    import _cffi_backend  # type: ignore[import-untyped]

    kind = _cffi_backend.new_function_type(
        (_cffi_backend.new_primitive_type("int"),), _cffi_backend.new_void_type(), False
    )
    locked = sys.modules["pyenclave._worker.importer"].state()
    for library in locked.libraries.values():
        if "openblas" not in library.name:
            continue
        # The loader knows the mapped object by this path, so nothing is opened.
        handle = _cffi_backend.load_library(f"/proc/self/fd/{library.place[0]}", os.RTLD_NOW)
        for setter in _BLAS_SETTERS:
            try:
                function = handle.load_function(kind, setter)
            except AttributeError:
                continue
            function(count)
            break
