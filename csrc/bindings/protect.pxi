# Protected libraries: native functions of this process behind a protection key (docs/protected.md).

cdef extern from *:
    """
    #include <dlfcn.h>
    #if defined(__linux__)
    #include <link.h>
    /* What is added to the addresses of the object's file. */
    static int protect_base(void *handle, size_t *base)
    {
        struct link_map *map;
        if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0) {
            return 0;
        }
        *base = (size_t)map->l_addr;
        return 1;
    }
    #else
    static int protect_base(void *handle, size_t *base)
    {
        (void)handle;
        (void)base;
        return 0;
    }
    #endif
    /* Whether `address` is of the object whose first segment lies at `start`. */
    static int protect_is_of(const void *address, size_t start)
    {
        Dl_info info;
        return dladdr(address, &info) != 0 && (size_t)info.dli_fbase == start;
    }
    """
    bint protect_base(void *handle, size_t *base) nogil
    bint protect_is_of(const void *address, size_t start) nogil
    int RTLD_NOLOAD
    void *RTLD_DEFAULT

cdef extern from "<dlfcn.h>" nogil:
    int dlclose(void *handle)

cdef extern from "<unistd.h>" nogil:
    int close_descriptor "close"(int fd)

cdef extern from "Python.h":
    object PyCFunction_NewEx(PyMethodDef *method, object owner, PyObject *module)
    enum:
        METH_O

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_PROTECT_LEAVE_SIGNALS
        PYE_PROTECT_MAX_RANGES
        PYE_PROTECT_MAX_FUNCTIONS
    ctypedef struct pye_protect:
        pass
    ctypedef struct pye_protect_range:
        uint64_t address
        uint64_t size
    ctypedef struct pye_protect_sizes:
        uint64_t memory
        uint64_t stack
        uint64_t message
        uint32_t slots
        uint32_t flags
    ctypedef struct pye_protect_arena:
        pass
    pye_status pye_protect_new(pye_protect **out, const pye_protect_sizes *sizes,
                               const pye_protect_range *ranges, uint32_t num_ranges,
                               const uint64_t *functions, uint32_t num_functions,
                               pye_protect_arena *arena)
    pye_status pye_protect_free(pye_protect *protect, int at_exit)
    pye_status pye_protect_take(pye_protect *protect, uint32_t *out_slot)
    void pye_protect_give(pye_protect *protect, uint32_t slot)
    pye_status pye_protect_run(pye_protect *protect, uint32_t slot, uint32_t function,
                               pye_status *answer, uint8_t *out, size_t out_room, size_t *out_len,
                               const uint8_t *data, size_t in_len)
    pye_status pye_protect_answer(pye_protect *protect, uint32_t slot, uint8_t *out, size_t length)

cdef enum:
    PROTECT_SMALL = 256  # an answer up to this is copied while the key is open anyway


@cython.final
cdef class ProtectedCode:
    """
    The functions `names` of a shared object, its data (`ranges` of address and size in the file,
    the lowest address of which is `first`), memory, stacks and buffers, behind one key. The
    `variables` (name and address in the file) are refused if the loader takes another object's. The
    descriptor `fd` of the file is its own from then on.
    """

    cdef object __weakref__
    cdef void *handle
    cdef int fd
    cdef pye_protect *protect
    cdef readonly tuple names
    cdef object gone  # makes the error for who calls what was closed
    cdef size_t limit

    def __cinit__(self, int fd, tuple names not None, tuple ranges not None,
                  tuple variables not None, uint64_t first, uint64_t memory, uint64_t stack,
                  uint64_t message, uint32_t slots, bint leave_signals):
        cdef pye_protect_range spans[PYE_PROTECT_MAX_RANGES]
        cdef uint64_t addresses[PYE_PROTECT_MAX_FUNCTIONS]
        cdef pye_protect_sizes sizes
        cdef pye_status status
        cdef size_t base = 0
        cdef size_t taken
        path = f"/proc/self/fd/{fd}".encode()
        cdef const char *name = path
        self.fd = fd
        if not 0 < len(names) <= PYE_PROTECT_MAX_FUNCTIONS:
            raise ValueError(f"1 to {PYE_PROTECT_MAX_FUNCTIONS} functions, not {len(names)}")
        if len(ranges) > PYE_PROTECT_MAX_RANGES:
            raise ValueError(f"at most {PYE_PROTECT_MAX_RANGES} ranges, not {len(ranges)}")
        with nogil:
            self.handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)
        if self.handle == NULL:
            why = dlerror().decode("utf-8", "replace")
            raise _errors.ImageError(f"the library cannot be loaded: {why}")
        if not protect_base(self.handle, &base):
            raise _errors.ImageError("the loader does not tell where the library is")
        for i, text in enumerate(names):
            addresses[i] = <size_t>dlsym(self.handle, f"pye_ecall_{text}".encode())
            # An indirect function, or a table that lies, may lead to another library's.
            if addresses[i] == 0 or not protect_is_of(<const void *><size_t>addresses[i],
                                                      base + first):
                raise _errors.ImageError(f"the library has no function {text!r}")
        for text, address in variables:
            encoded = (<str>text).encode()
            # Which one the loader has found: of all that are first in line, or the only one.
            taken = <size_t>dlsym(RTLD_DEFAULT, encoded)
            if taken == 0:
                taken = <size_t>dlsym(self.handle, encoded)
            if taken != base + <uint64_t>address:
                raise _errors.ProtectionError(
                    f"the library's variable {text!r} would be another object's of that name, "
                    "which no key protects",
                    advice="Make it static, or hidden (-fvisibility=hidden).")
        for i, (address, size) in enumerate(ranges):
            spans[i].address = base + <uint64_t>address
            spans[i].size = size
        sizes.memory, sizes.stack, sizes.message = memory, stack, message
        sizes.slots = slots
        sizes.flags = PYE_PROTECT_LEAVE_SIGNALS if leave_signals else 0
        status = pye_protect_new(&self.protect, &sizes, spans, <uint32_t>len(ranges), addresses,
                                 <uint32_t>len(names),
                                 <pye_protect_arena *>dlsym(self.handle, b"pye_protected_memory"))
        if status == PYE_E_UNSUPPORTED or status == PYE_E_LIMIT or status == PYE_E_DENIED:
            raise _errors.ProtectionError(
                f"no protection key: {pye_status_message(status).decode()}",
                expected="a key of this process that is free (pkey_alloc)",
                found=pye_status_name(status).decode())
        if status != PYE_OK:
            fail(status, "protected library")
        self.names = names
        self.limit = <size_t>message

    def __dealloc__(self):
        self.drop(pye_protect_free(self.protect, 0) == PYE_OK)

    cdef void drop(self, bint unload) noexcept:
        if unload and self.handle != NULL:
            dlclose(self.handle)
        if self.fd >= 0:
            close_descriptor(self.fd)
        self.protect, self.handle, self.fd = NULL, NULL, -1

    cdef object run(self, uint32_t index, object data):
        cdef uint8_t small[PROTECT_SMALL]
        cdef Py_buffer view
        cdef pye_status status, answer = PYE_E_STATE
        cdef size_t length = 0
        cdef uint32_t slot = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)  # may run Python code, which may close()
        try:
            if self.protect == NULL:
                raise self.gone()
            status = pye_protect_take(self.protect, &slot)  # with the GIL: close() looks at slots
            if status != PYE_OK:
                raise _errors.BusyError(
                    "every stack of the protected library is in use; load it with more threads")
            try:
                with nogil:
                    status = pye_protect_run(
                        self.protect, slot, index, &answer, small, sizeof(small), &length,
                        <const uint8_t *>view.buf, <size_t>view.len)
                if status == PYE_E_LENGTH:
                    raise _errors.ArgumentError("the input is longer than a message",
                                                expected=f"at most {self.limit}", found=view.len)
                if status == PYE_E_ARGUMENT:
                    raise _errors.ArgumentError("the input lies behind the library's own key")
                if status != PYE_OK:
                    fail(status, "protected call")
                if answer == PYE_OK and length > sizeof(small):
                    out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
                    status = pye_protect_answer(
                        self.protect, slot, <uint8_t *><char *>out, length)
                    if status != PYE_OK:
                        fail(status, "protected call")
                    return out
            finally:
                pye_protect_give(self.protect, slot)
        finally:
            PyBuffer_Release(&view)
        if answer == PYE_E_ARGUMENT:
            raise _errors.ArgumentError("the native function refuses its input")
        if answer == PYE_E_LENGTH:
            raise _errors.ArgumentError("the native function refuses a length",
                                        expected=f"an answer of at most {self.limit}")
        if answer != PYE_OK:
            raise _errors.EcallError(type=f"status {answer}")
        return PyBytes_FromStringAndSize(<char *>small, <Py_ssize_t>length)

    def function(self, str name not None):
        """The function `name` as a callable of one buffer that answers bytes."""
        cdef ProtectedFunction function = ProtectedFunction.__new__(ProtectedFunction)
        function.code = self
        function.index = <uint32_t>self.names.index(name)
        function.encoded = name.encode()
        function.method.ml_name = function.encoded
        function.method.ml_meth = <void *>protected_call
        function.method.ml_flags = METH_O
        function.method.ml_doc = NULL
        return PyCFunction_NewEx(&function.method, function, NULL)

    def close(self, gone, bint at_exit=False) -> None:
        """Wipe, give the key back and unload; who calls then gets what `gone()` makes."""
        cdef pye_status status
        if self.protect == NULL:
            return
        status = pye_protect_free(self.protect, at_exit)
        if status == PYE_E_BUSY:
            if at_exit:
                return
            raise _errors.BusyError("a call of the protected library is under way")
        if status != PYE_OK:
            fail(status, "closing the protected library")
        self.gone = gone
        self.drop(True)

    @property
    def closed(self) -> bool:
        return self.protect == NULL

    def fileno(self) -> int:
        """The descriptor of what was loaded, or -1."""
        return self.fd

    def __reduce__(self):
        raise TypeError("protected code cannot be pickled or copied")


@cython.final
cdef class ProtectedFunction:
    """What a function of protected code is bound to."""

    cdef ProtectedCode code
    cdef bytes encoded
    cdef uint32_t index
    cdef PyMethodDef method


cdef object protected_call(object function, object data):
    return (<ProtectedFunction>function).code.run((<ProtectedFunction>function).index, data)


def library_is_loaded(str path not None) -> bool:
    """Whether the loader knows an object by this path: it would not look at the file again."""
    cdef void *handle = dlopen(path.encode(), RTLD_NOW | RTLD_NOLOAD)
    if handle == NULL:
        return False
    dlclose(handle)
    return True
