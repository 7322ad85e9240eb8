# Page sealing: 4096-byte pages under a key that owns its counter.
cdef extern from "<unistd.h>" nogil:
    int getentropy(void *buffer, size_t length)

cdef extern from "Python.h":
    unsigned long long long_value "PyLong_AsUnsignedLongLong"(object value) noexcept
    void *error_set "PyErr_Occurred"() noexcept
    void clear_error "PyErr_Clear"() noexcept

cdef extern from "pyenclave.h" nogil:
    ctypedef struct pye_page_key:
        pass
    ctypedef struct pye_page_info:
        uint64_t address
        uint32_t flags
        uint8_t type
    pye_status pye_page_key_init(pye_page_key *key, const uint8_t *secret, size_t secret_len,
                                 const uint8_t *enclave, uint32_t allowed)
    void pye_page_key_destroy(pye_page_key *key)
    uint64_t pye_page_key_sealed(const pye_page_key *key)
    const char *pye_page_key_implementation(const pye_page_key *key)
    pye_status pye_page_key_skip(pye_page_key *key, uint64_t next_version)
    pye_status pye_page_seal(pye_page_key *key, uint8_t *out, uint8_t *tag, uint64_t *version,
                             const uint8_t *data, const pye_page_info *info)
    pye_status pye_page_open(pye_page_key *key, uint8_t *out, const uint8_t *data,
                             const uint8_t *tag, uint64_t version, const pye_page_info *info)
    pye_status pye_pages_seal(pye_page_key *key, uint8_t *out, uint8_t *tags,
                              uint64_t *first_version, const uint8_t *data, size_t num_pages,
                              const pye_page_info *first)
    pye_status pye_pages_open(pye_page_key *key, uint8_t *out, const uint8_t *data,
                              const uint8_t *tags, const uint64_t *versions,
                              uint64_t first_version, size_t num_pages,
                              const pye_page_info *first)

cdef enum:
    PAGE = 4096
    SEALED = 4112


cdef uint64_t number(object value, str name, uint64_t largest) except? 0xffffffffffffffff:
    """An unsigned integer of an argument."""
    cdef uint64_t result
    if not isinstance(value, int):
        value = value.__index__()
    result = long_value(value)
    if result > largest or (result == 0xffffffffffffffff and error_set() != NULL):
        clear_error()
        raise ValueError(f"{name}: expected 0 … {largest}, found {value}")
    return result


# The defaults, which are most calls' values: comparing pointers saves three conversions.
cdef object _ZERO = 0
cdef object _ORDINARY = 2


@cython.final
cdef class PageKey:
    """Seals pages of 4096 bytes. The key counts the versions; the caller keeps them."""

    cdef pye_page_key *key
    cdef uint32_t memory_kind

    def __cinit__(self, key=None, *, enclave=b"\0" * 16):
        cdef uint8_t fresh[32]
        cdef Py_buffer k, e
        cdef pye_status rc
        cdef void *memory = NULL
        PyObject_GetBuffer(enclave, &e, PyBUF_SIMPLE)
        try:
            if e.len != 16:
                wrong_length("enclave", 16, e.len)
            rc = pye_key_memory_new(&memory, pye_page_key_size(), &self.memory_kind)
            if rc != PYE_OK:
                fail(rc, "page key")
            self.key = <pye_page_key *>memory
            if key is None:
                if getentropy(fresh, sizeof(fresh)) != 0:
                    fail(PYE_E_RANDOM, "page key")
                rc = pye_page_key_init(self.key, fresh, sizeof(fresh), <const uint8_t *>e.buf,
                                       _gcm_tested)
                pye_wipe(fresh, sizeof(fresh))
            else:
                PyObject_GetBuffer(key, &k, PyBUF_SIMPLE)
                if k.len != 16 and k.len != 32:
                    rc = PYE_E_LENGTH
                else:
                    rc = pye_page_key_init(self.key, <const uint8_t *>k.buf, <size_t>k.len,
                                           <const uint8_t *>e.buf, _gcm_tested)
                PyBuffer_Release(&k)
            if rc != PYE_OK:
                fail(rc, "page key")
        finally:
            PyBuffer_Release(&e)

    def __dealloc__(self):
        if self.key != NULL:
            pye_key_memory_free(self.key, pye_page_key_size(), self.memory_kind)

    cdef int info(self, pye_page_info *info, object address, object flags,
                  object type) except -1:
        if not pye_secmem_live(self.key):
            refuse_forked("page key")
        info.address = 0
        info.flags = 0
        info.type = 2
        if address is not _ZERO:
            info.address = number(address, "address", 0xffffffffffffffff)
        if flags is not _ZERO:
            info.flags = <uint32_t>number(flags, "flags", 0xffffffff)
        if type is not _ORDINARY:
            info.type = <uint8_t>number(type, "type", 0xff)
        return 0

    cdef object do_seal_page(self, object page, object out, pye_page_info *info):
        cdef Py_buffer p, o
        cdef uint64_t version = 0
        cdef pye_status rc
        two_buffers(page, &p, out, &o, PyBUF_WRITABLE)
        if p.len == PAGE and o.len == SEALED:
            rc = pye_page_seal(self.key, <uint8_t *>o.buf, <uint8_t *>o.buf + PAGE, &version,
                               <const uint8_t *>p.buf, info)
        else:
            rc = PYE_E_LENGTH
        PyBuffer_Release(&o)
        PyBuffer_Release(&p)
        if rc != PYE_OK:
            if rc == PYE_E_LENGTH:
                wrong_length("page and out", "4096 and 4112", f"{p.len} and {o.len}")
            fail(rc, "seal_page")
        return version

    cdef object do_open_page(self, object sealed, object out, uint64_t version,
                             pye_page_info *info):
        cdef Py_buffer p, o
        cdef pye_status rc
        two_buffers(sealed, &p, out, &o, PyBUF_WRITABLE)
        if p.len == SEALED and o.len == PAGE:
            rc = pye_page_open(self.key, <uint8_t *>o.buf, <const uint8_t *>p.buf,
                               <const uint8_t *>p.buf + PAGE, version, info)
        else:
            rc = PYE_E_LENGTH
        PyBuffer_Release(&o)
        PyBuffer_Release(&p)
        if rc != PYE_OK:
            if rc == PYE_E_LENGTH:
                wrong_length("sealed and out", "4112 and 4096", f"{p.len} and {o.len}")
            fail(rc, "open_page")
        return None

    def seal_page(self, page, out, *, address=0, flags=0, type=2):
        """Seal 4096 bytes to `out` (4112: ciphertext and tag) and return the version."""
        cdef pye_page_info info
        self.info(&info, address, flags, type)
        return self.do_seal_page(page, out, &info)

    def open_page(self, sealed, out, version, *, address=0, flags=0, type=2):
        """Open 4112 bytes to `out` (4096), or zero it and raise UnsealError."""
        cdef pye_page_info info
        self.info(&info, address, flags, type)
        return self.do_open_page(sealed, out, number(version, "version", 0xffffffffffffffff),
                                 &info)

    def seal_pages(self, pages, out, tags, *, address=0, flags=0, type=2):
        """Seal n pages to `out`, their tags (16 bytes each) to `tags`; return the first version."""
        cdef Py_buffer p, o, t
        cdef pye_page_info info
        cdef uint64_t version = 0
        cdef pye_status rc
        self.info(&info, address, flags, type)
        PyObject_GetBuffer(pages, &p, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(out, &o, PyBUF_WRITABLE)
            try:
                PyObject_GetBuffer(tags, &t, PyBUF_WRITABLE)
                try:
                    check_batch(&p, &o, &t)
                    with nogil:
                        rc = pye_pages_seal(self.key, <uint8_t *>o.buf, <uint8_t *>t.buf, &version,
                                            <const uint8_t *>p.buf, <size_t>p.len // PAGE, &info)
                finally:
                    PyBuffer_Release(&t)
            finally:
                PyBuffer_Release(&o)
        finally:
            PyBuffer_Release(&p)
        if rc != PYE_OK:
            fail(rc, "seal_pages")
        return version

    def open_pages(self, sealed, tags, out, *, version, address=0, flags=0, type=2):
        """Open n pages; `version` is that of the first, or one of each (64-bit integers)."""
        cdef Py_buffer p, o, t, v
        cdef pye_page_info info
        cdef uint64_t first = 0
        cdef const uint64_t *versions = NULL
        cdef pye_status rc
        self.info(&info, address, flags, type)
        if isinstance(version, int):
            first = number(version, "version", 0xffffffffffffffff)
            version = b""
        elif isinstance(version, (list, tuple)):
            version = _array("Q", version)
        PyObject_GetBuffer(version, &v, PyBUF_ND | PyBUF_FORMAT)
        try:
            PyObject_GetBuffer(sealed, &p, PyBUF_SIMPLE)
            try:
                PyObject_GetBuffer(tags, &t, PyBUF_SIMPLE)
                try:
                    PyObject_GetBuffer(out, &o, PyBUF_WRITABLE)
                    try:
                        check_batch(&p, &o, &t)
                        if v.len != 0 or v.itemsize != 1:
                            check_versions(&v, p.len // PAGE)
                            versions = <const uint64_t *>v.buf
                        with nogil:
                            rc = pye_pages_open(self.key, <uint8_t *>o.buf, <const uint8_t *>p.buf,
                                                <const uint8_t *>t.buf, versions, first,
                                                <size_t>p.len // PAGE, &info)
                    finally:
                        PyBuffer_Release(&o)
                finally:
                    PyBuffer_Release(&t)
            finally:
                PyBuffer_Release(&p)
        finally:
            PyBuffer_Release(&v)
        if rc != PYE_OK:
            fail(rc, "open_pages")

    def _skip(self, next_version):
        """Give up all versions below `next_version` (tests of the limit; it only moves forward)."""
        cdef uint64_t version = number(next_version, "version", 0xffffffffffffffff)
        cdef pye_status rc = PYE_E_FORKED
        if pye_secmem_live(self.key):
            rc = pye_page_key_skip(self.key, version)
        if rc != PYE_OK:
            fail(rc, "skip")

    @property
    def pages_sealed(self):
        """How many versions have been given out; 0 in a forked child."""
        if not pye_secmem_live(self.key):
            return 0
        return pye_page_key_sealed(self.key)

    @property
    def implementation(self):
        """Name of the AES-GCM implementation; "none" after close() and in a forked child."""
        if not pye_secmem_live(self.key):
            return "none"
        return pye_page_key_implementation(self.key).decode()

    @property
    def locked(self):
        """Whether the key's memory cannot reach swap."""
        return self.memory_kind != PYE_SECMEM_UNLOCKED

    def close(self):
        """Wipe the key. Calls under way in other threads finish first. May be called twice."""
        if pye_secmem_live(self.key):
            pye_page_key_destroy(self.key)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        return f"<PageKey {self.implementation}, {self.pages_sealed} pages sealed>"

    def __reduce_ex__(self, protocol):
        raise TypeError("a key cannot be pickled or copied")


cdef _Names _seal_page_names = _Names(
    "seal_page", ("page", "out", "address", "flags", "type"), 2, 2)
cdef _Names _open_page_names = _Names(
    "open_page", ("sealed", "out", "version", "address", "flags", "type"), 3, 3)


cdef object fast_seal_page(PageKey self, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames):
    cdef PyObject *v[FAST_MAX]
    cdef pye_page_info info
    take_arguments(_seal_page_names, v, args, nargs, kwnames)
    self.info(&info, or_else(v[2], _ZERO), or_else(v[3], _ZERO), or_else(v[4], _ORDINARY))
    return self.do_seal_page(<object>v[0], <object>v[1], &info)


cdef object fast_open_page(PageKey self, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames):
    cdef PyObject *v[FAST_MAX]
    cdef pye_page_info info
    take_arguments(_open_page_names, v, args, nargs, kwnames)
    self.info(&info, or_else(v[3], _ZERO), or_else(v[4], _ZERO), or_else(v[5], _ORDINARY))
    return self.do_open_page(<object>v[0], <object>v[1],
                             number(<object>v[2], "version", 0xffffffffffffffff), &info)


cdef PyMethodDef _page_methods[2]
put_method(PageKey, &_page_methods[0], "seal_page", <void *>fast_seal_page,
           b"seal_page($self, page, out, *, address=0, flags=0, type=2)\n--\n\n"
           b"Seal 4096 bytes to `out` (4112: ciphertext and tag) and return the version.")
put_method(PageKey, &_page_methods[1], "open_page", <void *>fast_open_page,
           b"open_page($self, sealed, out, version, *, address=0, flags=0, type=2)\n--\n\n"
           b"Open 4112 bytes to `out` (4096), or zero it and raise UnsealError.")


from array import array as _array


cdef int check_batch(Py_buffer *pages, Py_buffer *out, Py_buffer *tags) except -1:
    if pages.len == 0 or pages.len % PAGE != 0:
        wrong_length("pages", "a multiple of 4096", pages.len)
    if out.len != pages.len:
        wrong_length("out", pages.len, out.len)
    if tags.len != pages.len // PAGE * 16:
        wrong_length("tags", pages.len // PAGE * 16, tags.len)
    return 0


cdef int check_versions(Py_buffer *versions, Py_ssize_t num_pages) except -1:
    cdef bytes form = b"B" if versions.format == NULL else <bytes>versions.format
    if form.lstrip(b"@=<") not in (b"Q", b"L", b"q", b"l") or versions.itemsize != 8:
        raise TypeError(f"version: expected 64-bit integers, found format {form.decode()!r}")
    if versions.len != 8 * num_pages:
        wrong_length("version", 8 * num_pages, versions.len)
    if <size_t>versions.buf % 8 != 0:
        raise ValueError("version: the array is not aligned to 8 bytes")
    return 0
