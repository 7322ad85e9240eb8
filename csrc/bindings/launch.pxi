# launch: the measurements of virtual machines.

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_VM_PAGE_SIZE
    ctypedef struct pye_snp_measure:
        uint8_t *digest
        uint64_t num_pages
    ctypedef struct pye_tdx_measure:
        pass
    void pye_snp_begin(pye_snp_measure *ctx, const uint8_t *start)
    pye_status pye_snp_add_pages(pye_snp_measure *ctx, const uint8_t *pages, size_t num_pages,
                                 uint64_t gpa, uint32_t page_type)
    pye_status pye_snp_add_empty(pye_snp_measure *ctx, uint64_t num_pages, uint64_t gpa,
                                 uint32_t page_type)
    pye_status pye_snp_add_same(pye_snp_measure *ctx, const uint8_t *page, uint64_t count,
                                uint64_t gpa, uint32_t page_type)
    void pye_snp_page_digests(uint8_t *out, const uint8_t *pages, size_t num_pages)
    const char *pye_snp_variant()
    void pye_tdx_begin(pye_tdx_measure *ctx)
    pye_status pye_tdx_add_pages(pye_tdx_measure *ctx, uint64_t num_pages, uint64_t gpa)
    pye_status pye_tdx_extend(pye_tdx_measure *ctx, const uint8_t *pages, size_t num_pages,
                              uint64_t gpa, int add)
    void pye_tdx_digest(const pye_tdx_measure *ctx, uint8_t *out)


cdef size_t whole_pages(Py_buffer *view) except? 0xffffffff:
    if view.len % PYE_VM_PAGE_SIZE != 0:
        raise ValueError(f"{view.len} bytes are not whole pages of 4096")
    return <size_t>view.len // PYE_VM_PAGE_SIZE


@cython.final
cdef class SnpMeasurement:
    """
    An SEV-SNP launch digest (firmware ABI 1.55, 8.17.2), begun at zeros or at `start`.

    Guest-physical addresses are multiples of 4096. A wrong one, or a page type that does not fit,
    raises ValueError and changes nothing.
    """

    cdef pye_snp_measure ctx
    cdef int taken

    def __cinit__(self, start=None):
        cdef Py_buffer view
        if start is None:
            pye_snp_begin(&self.ctx, NULL)
            return
        PyObject_GetBuffer(start, &view, PyBUF_SIMPLE)
        try:
            if view.len != PYE_SHA384_SIZE:
                raise ValueError(f"a launch digest has 48 bytes, not {view.len}")
            pye_snp_begin(&self.ctx, <const uint8_t *>view.buf)
        finally:
            PyBuffer_Release(&view)

    @property
    def num_pages(self) -> int:
        """How many pages were measured so far."""
        return self.ctx.num_pages

    def add_pages(self, data, uint64_t gpa, uint32_t page_type=1) -> None:
        """Measure the pages that `data` holds with their content, ascending from `gpa`."""
        cdef Py_buffer view
        cdef pye_status rc
        cdef size_t num_pages
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            num_pages = whole_pages(&view)
            take_object(&self.taken, "this measurement")
            with nogil:
                rc = pye_snp_add_pages(&self.ctx, <const uint8_t *>view.buf, num_pages, gpa,
                                       page_type)
            pye_object_release(&self.taken)
        finally:
            PyBuffer_Release(&view)
        if rc != PYE_OK:
            fail(rc, f"add_pages: {num_pages} pages of type {page_type} at {gpa:#x}")

    def add_empty(self, uint64_t num_pages, uint64_t gpa, uint32_t page_type) -> None:
        """Measure pages of a type whose content does not count, ascending from `gpa`."""
        cdef pye_status rc
        take_object(&self.taken, "this measurement")
        with nogil:
            rc = pye_snp_add_empty(&self.ctx, num_pages, gpa, page_type)
        pye_object_release(&self.taken)
        if rc != PYE_OK:
            fail(rc, f"add_empty: {num_pages} pages of type {page_type} at {gpa:#x}")

    def add_same(self, page, uint64_t count, uint64_t gpa, uint32_t page_type) -> None:
        """Measure one page `count` times at the same address."""
        cdef Py_buffer view
        cdef pye_status rc
        PyObject_GetBuffer(page, &view, PyBUF_SIMPLE)
        try:
            if view.len != PYE_VM_PAGE_SIZE:
                raise ValueError(f"one page has 4096 bytes, not {view.len}")
            take_object(&self.taken, "this measurement")
            with nogil:
                rc = pye_snp_add_same(&self.ctx, <const uint8_t *>view.buf, count, gpa, page_type)
            pye_object_release(&self.taken)
        finally:
            PyBuffer_Release(&view)
        if rc != PYE_OK:
            fail(rc, f"add_same: a page of type {page_type} at {gpa:#x}")

    def digest(self) -> bytes:
        """The launch digest of the pages so far; more may follow."""
        cdef uint8_t out[48]
        take_object(&self.taken, "this measurement")
        memcpy(out, self.ctx.digest, PYE_SHA384_SIZE)
        pye_object_release(&self.taken)
        return PyBytes_FromStringAndSize(<char *>out, PYE_SHA384_SIZE)


@cython.final
cdef class TdxMeasurement:
    """
    MRTD: the records of TDH.MEM.PAGE.ADD and TDH.MR.EXTEND (Intel TDX module ABI).

    Guest-physical addresses are multiples of 4096; a wrong one raises ValueError and changes
    nothing.
    """

    cdef pye_tdx_measure ctx
    cdef int taken

    def __cinit__(self):
        pye_tdx_begin(&self.ctx)

    def add_pages(self, uint64_t num_pages, uint64_t gpa) -> None:
        """TDH.MEM.PAGE.ADD of pages ascending from `gpa`."""
        cdef pye_status rc
        take_object(&self.taken, "this measurement")
        with nogil:
            rc = pye_tdx_add_pages(&self.ctx, num_pages, gpa)
        pye_object_release(&self.taken)
        if rc != PYE_OK:
            fail(rc, f"add_pages: {num_pages} pages at {gpa:#x}")

    cdef _extend(self, data, uint64_t gpa, int add):
        cdef Py_buffer view
        cdef pye_status rc
        cdef size_t num_pages
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            num_pages = whole_pages(&view)
            take_object(&self.taken, "this measurement")
            with nogil:
                rc = pye_tdx_extend(&self.ctx, <const uint8_t *>view.buf, num_pages, gpa, add)
            pye_object_release(&self.taken)
        finally:
            PyBuffer_Release(&view)
        if rc != PYE_OK:
            fail(rc, f"extend: {num_pages} pages at {gpa:#x}")

    def extend(self, data, uint64_t gpa) -> None:
        """TDH.MR.EXTEND of every chunk of the pages that `data` holds."""
        self._extend(data, gpa, 0)

    def add_and_extend(self, data, uint64_t gpa) -> None:
        """Add each page of `data` and extend with its chunks before the next."""
        self._extend(data, gpa, 1)

    def digest(self) -> bytes:
        """MRTD so far; more may follow."""
        cdef uint8_t out[48]
        take_object(&self.taken, "this measurement")
        pye_tdx_digest(&self.ctx, out)
        pye_object_release(&self.taken)
        return PyBytes_FromStringAndSize(<char *>out, PYE_SHA384_SIZE)


def snp_page_digests(data) -> bytes:
    """The SHA-384 of each page of 4096 bytes, one after the other."""
    cdef Py_buffer view
    cdef size_t num_pages
    cdef bytes out
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        num_pages = whole_pages(&view)
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(num_pages * PYE_SHA384_SIZE))
        pye_snp_page_digests(<uint8_t *>PyBytes_AsString(out), <const uint8_t *>view.buf,
                             num_pages)
    finally:
        PyBuffer_Release(&view)
    return out


def snp_variant() -> str:
    """The name of the implementation that hashes pages now."""
    return pye_snp_variant().decode()
