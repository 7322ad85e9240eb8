# measure: MRENCLAVE.

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_SGX_PAGE_SIZE
        PYE_SGX_CHUNK_SIZE
    ctypedef struct pye_sgx_measure:
        uint64_t size
        uint64_t num_pages
    pye_status pye_sgx_create(pye_sgx_measure *ctx, uint64_t size, uint32_t ssa_frame_size)
    pye_status pye_sgx_add(pye_sgx_measure *ctx, uint64_t offset, uint64_t flags)
    pye_status pye_sgx_extend(pye_sgx_measure *ctx, uint64_t offset, const uint8_t *chunk)
    pye_status pye_sgx_add_pages(pye_sgx_measure *ctx, const uint8_t *pages, size_t num_pages,
                                 uint64_t offset, uint64_t flags, int measured)
    pye_status pye_sgx_add_filled(pye_sgx_measure *ctx, uint32_t word, size_t num_pages,
                                  uint64_t offset, uint64_t flags)
    pye_status pye_sgx_digest(const pye_sgx_measure *ctx, uint8_t *out)


@cython.final
cdef class SgxMeasurement:
    """
    The record stream behind MRENCLAVE (Intel SDM vol. 3D, ECREATE, EADD, EEXTEND).

    `size` is the enclave's size in bytes, a power of two from 8192 on; `ssa_frame_size` counts
    pages. Offsets are bytes from the enclave's base. What hardware would refuse raises ValueError,
    records out of order raise EnclaveStateError; a refused call changes nothing.
    """

    cdef pye_sgx_measure ctx
    cdef int taken

    def __cinit__(self, uint64_t size, uint32_t ssa_frame_size=1):
        cdef pye_status rc = pye_sgx_create(&self.ctx, size, ssa_frame_size)
        if rc != PYE_OK:
            fail(rc, f"ECREATE of {size} bytes, SSA frame of {ssa_frame_size} pages")

    @property
    def size(self) -> int:
        """The enclave's size in bytes."""
        return self.ctx.size

    @property
    def num_pages(self) -> int:
        """How many pages were added so far."""
        return self.ctx.num_pages

    def add_pages(self, data, uint64_t offset, uint64_t flags, bint measured=True) -> None:
        """Add the pages that `data` holds, from `offset` on, all with the same SECINFO flags."""
        cdef Py_buffer view
        cdef pye_status rc
        cdef size_t num_pages
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len % PYE_SGX_PAGE_SIZE != 0:
                raise ValueError(f"add_pages: {view.len} bytes are not whole pages of 4096")
            num_pages = <size_t>view.len // PYE_SGX_PAGE_SIZE
            take_object(&self.taken, "this measurement")
            with nogil:
                rc = pye_sgx_add_pages(&self.ctx, <const uint8_t *>view.buf, num_pages, offset,
                                       flags, measured)
            pye_object_release(&self.taken)
        finally:
            PyBuffer_Release(&view)
        if rc != PYE_OK:
            fail(rc, f"add_pages: {num_pages} pages at {offset:#x} with flags {flags:#x}")

    def add_unmeasured(self, uint64_t num_pages, uint64_t offset, uint64_t flags) -> None:
        """Add pages whose content is not measured (heap, in most layouts)."""
        cdef pye_status rc
        take_object(&self.taken, "this measurement")
        with nogil:
            rc = pye_sgx_add_pages(&self.ctx, NULL, num_pages, offset, flags, 0)
        pye_object_release(&self.taken)
        if rc != PYE_OK:
            fail(rc, f"add_unmeasured: {num_pages} pages at {offset:#x} with flags {flags:#x}")

    def add_filled(self, uint64_t num_pages, uint64_t offset, uint64_t flags,
                   uint32_t word=0) -> None:
        """Add measured pages whose every 32-bit word is `word`."""
        cdef pye_status rc
        take_object(&self.taken, "this measurement")
        with nogil:
            rc = pye_sgx_add_filled(&self.ctx, word, num_pages, offset, flags)
        pye_object_release(&self.taken)
        if rc != PYE_OK:
            fail(rc, f"add_filled: {num_pages} pages at {offset:#x} with flags {flags:#x}")

    def add(self, uint64_t offset, uint64_t flags) -> None:
        """One EADD record."""
        cdef pye_status rc
        take_object(&self.taken, "this measurement")
        rc = pye_sgx_add(&self.ctx, offset, flags)
        pye_object_release(&self.taken)
        if rc != PYE_OK:
            fail(rc, f"EADD at {offset:#x} with flags {flags:#x}")

    def extend(self, uint64_t offset, chunk) -> None:
        """One EEXTEND record and its 256 bytes, the next chunk of the page added last."""
        cdef Py_buffer view
        cdef pye_status rc
        PyObject_GetBuffer(chunk, &view, PyBUF_SIMPLE)
        try:
            if view.len != PYE_SGX_CHUNK_SIZE:
                raise ValueError(f"EEXTEND takes 256 bytes, not {view.len}")
            take_object(&self.taken, "this measurement")
            rc = pye_sgx_extend(&self.ctx, offset, <const uint8_t *>view.buf)
            pye_object_release(&self.taken)
        finally:
            PyBuffer_Release(&view)
        if rc != PYE_OK:
            fail(rc, f"EEXTEND at {offset:#x}")

    def digest(self) -> bytes:
        """MRENCLAVE of the pages so far; more may follow."""
        cdef uint8_t out[32]
        cdef pye_status rc
        take_object(&self.taken, "this measurement")
        rc = pye_sgx_digest(&self.ctx, out)
        pye_object_release(&self.taken)
        if rc != PYE_OK:
            fail(rc, "MRENCLAVE")
        return PyBytes_FromStringAndSize(<char *>out, PYE_SHA256_SIZE)

    def copy(self) -> SgxMeasurement:
        """An independent measurement that goes on from here (a common prefix hashed once)."""
        cdef SgxMeasurement other = SgxMeasurement.__new__(SgxMeasurement, 8192)
        take_object(&self.taken, "this measurement")
        other.ctx = self.ctx
        pye_object_release(&self.taken)
        return other
