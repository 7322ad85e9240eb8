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
    ctypedef struct pye_sgx_run:
        const uint8_t *pages
        size_t num_pages
        uint64_t offset
        uint64_t flags
    ctypedef struct pye_sgx_job:
        pye_sgx_measure *ctx
        const pye_sgx_run *runs
        size_t num_runs
    pye_status pye_sgx_add_many(const pye_sgx_job *jobs, size_t num_jobs)
    const char *pye_sgx_many_variant()
    pye_status pye_sgx_digest(const pye_sgx_measure *ctx, uint8_t *out)

from cpython.mem cimport PyMem_Calloc, PyMem_Free


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


cdef int get_run(pye_sgx_run *run, Py_buffer *view, tuple item) except -1:
    """Fill in one (offset, flags, content); `view` is held until the caller releases it."""
    if len(item) != 3:
        raise ValueError(f"a run is (offset, flags, content), not {len(item)} items")
    offset, flags, content = item
    run.offset = offset
    run.flags = flags
    if content is None:
        run.num_pages = 1
        return 0
    PyObject_GetBuffer(content, view, PyBUF_SIMPLE)
    if view.len % PYE_SGX_PAGE_SIZE != 0:
        raise ValueError(f"{view.len} bytes are not whole pages of 4096")
    run.num_pages = <size_t>view.len // PYE_SGX_PAGE_SIZE
    # an empty buffer may have no address, which would mean that nothing is measured
    run.pages = <const uint8_t *>view.buf if view.len != 0 else <const uint8_t *>b""
    return 0


def sgx_add_many(jobs) -> None:
    """
    Add pages to several measurements, side by side.

    `jobs` are pairs of an SgxMeasurement, each of which occurs once, and its runs of pages: tuples
    of offset, flags and content, as `add_pages` takes them; None for one page that is not measured.
    If anything is refused, nothing is added to any.
    """
    cdef list listed = [(measurement, [tuple(run) for run in runs]) for measurement, runs in jobs]
    cdef size_t num_jobs = len(listed), num_runs = 0, taken = 0, i, distinct
    cdef pye_sgx_job *c_jobs = NULL
    cdef pye_sgx_run *c_runs = NULL
    cdef Py_buffer *views = NULL
    cdef SgxMeasurement one
    cdef pye_status rc = PYE_OK
    for measurement, runs in listed:
        if not isinstance(measurement, SgxMeasurement):
            raise TypeError(f"sgx_add_many: {type(measurement).__name__} is no SgxMeasurement")
        num_runs += len(runs)
    distinct = len({id(measurement) for measurement, _ in listed})
    if distinct != num_jobs:
        raise ValueError("sgx_add_many: a measurement occurs twice")
    try:
        c_jobs = <pye_sgx_job *>PyMem_Calloc(num_jobs + 1, sizeof(pye_sgx_job))
        c_runs = <pye_sgx_run *>PyMem_Calloc(num_runs + 1, sizeof(pye_sgx_run))
        views = <Py_buffer *>PyMem_Calloc(num_runs + 1, sizeof(Py_buffer))
        if c_jobs == NULL or c_runs == NULL or views == NULL:
            raise MemoryError()
        num_runs = 0
        for i in range(num_jobs):
            measurement, runs = listed[i]
            one = measurement
            c_jobs[i].ctx = &one.ctx
            c_jobs[i].runs = &c_runs[num_runs]
            c_jobs[i].num_runs = len(runs)
            for run in runs:
                num_runs += 1
                get_run(&c_runs[num_runs - 1], &views[num_runs - 1], run)
        for i in range(num_jobs):
            one = listed[i][0]
            take_object(&one.taken, "a measurement")
            taken += 1
        with nogil:
            rc = pye_sgx_add_many(c_jobs, num_jobs)
    finally:
        for i in range(taken):
            one = listed[i][0]
            pye_object_release(&one.taken)
        if views != NULL:
            for i in range(num_runs):
                PyBuffer_Release(&views[i])  # one that was not filled in releases nothing
        PyMem_Free(views)
        PyMem_Free(c_runs)
        PyMem_Free(c_jobs)
    if rc != PYE_OK:
        fail(rc, f"sgx_add_many: {num_jobs} measurements")


def sgx_many_variant() -> str:
    """Name of the code that sgx_add_many is given now."""
    return pye_sgx_many_variant().decode()
