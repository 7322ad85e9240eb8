# Sealed memory: a heap's address range, and the process's handler of its faults.
cdef extern from "heap_handler.h" nogil:
    ctypedef struct pye_heap:
        pass
    enum:
        PYE_HEAP_AUTO
        PYE_HEAP_USERFAULTFD
        PYE_HEAP_MPROTECT
        PYE_HEAP_LOCK_NONE
        PYE_HEAP_LOCK_ALL
        PYE_HEAP_LOCK_SHOWN
        PYE_HEAP_MIN_RESIDENT
        PYE_HEAP_MAX_WINDOW
        HEAP_NOTE_POISONED
        HEAP_NOTE_CLOSED
        HEAP_NOTE_FORKED
    const uint64_t PYE_HEAP_MAX_PAGES
    const uint64_t PYE_HEAP_TREE_ABOVE
    const uint64_t PYE_TREE_MAX_CACHE
    ctypedef struct pye_heap_options:
        uint64_t capacity_pages
        uint64_t resident_pages
        uint32_t mechanism
        uint32_t read_ahead
        int32_t fd
        uint32_t require_locked
        uint64_t tree_above
        uint32_t tree_cache
    ctypedef struct pye_heap_stats:
        uint64_t faults
        uint64_t write_faults
        uint64_t zero_pages
        uint64_t pages_in
        uint64_t pages_out
        uint64_t reseals
        uint64_t evictions
        uint64_t batches
        uint64_t clean_drops
        uint64_t read_ahead
        uint64_t read_ahead_hits
        uint64_t prefetched
        uint64_t discarded
        uint64_t resident
        uint64_t resident_peak
        uint64_t resident_limit
        uint64_t pinned
        uint64_t locked
        uint64_t capacity
        uint64_t tree_levels
        uint64_t nodes_in
        uint64_t nodes_out
        uint64_t helped
        uint64_t metadata_bytes
    pye_status pye_heap_new(pye_heap **out, const pye_heap_options *options)
    pye_status pye_heap_close(pye_heap *heap)
    void pye_heap_conceal(pye_heap *heap)
    void pye_heap_free(pye_heap *heap)
    int pye_heap_live(const pye_heap *heap)
    void *pye_heap_base(const pye_heap *heap)
    uint32_t pye_heap_mechanism(const pye_heap *heap)
    uint32_t pye_heap_locks(const pye_heap *heap)
    pye_status pye_heap_prefetch(pye_heap *heap, uint64_t *shown, uint64_t first, uint64_t num)
    pye_status pye_heap_evict(pye_heap *heap, uint64_t *evicted, uint64_t first, uint64_t num)
    pye_status pye_heap_pin(pye_heap *heap, uint64_t first, uint64_t num)
    pye_status pye_heap_unpin(pye_heap *heap, uint64_t first, uint64_t num)
    pye_status pye_heap_discard(pye_heap *heap, uint64_t first, uint64_t num)
    pye_status pye_heap_hire(pye_heap *heap)
    void pye_heap_help(pye_heap *heap) nogil
    void pye_heap_dismiss(pye_heap *heap)
    pye_status pye_heap_poisoned(const pye_heap *heap, uint64_t *page, int32_t *error)
    pye_status pye_heap_stats_read(pye_heap *heap, pye_heap_stats *out)
    uint8_t *pye_heap_frame(const pye_heap *heap, uint64_t page)
    pye_status pye_heap_meta(pye_heap *heap, uint64_t *version, uint8_t *tag, uint64_t page)
    pye_status pye_heap_set_meta(pye_heap *heap, uint64_t page, uint64_t version,
                                 const uint8_t *tag)
    pye_status pye_heap_skip(pye_heap *heap, uint64_t next_version)
    uint8_t *pye_heap_nodes(const pye_heap *heap, size_t *size)
    pye_status heap_handlers()
    pye_status heap_table_add(pye_heap *heap, size_t size)
    void heap_table_remove(const pye_heap *heap)
    enum:
        HEAP_LAST_WORDS
    void heap_end_with(int fd, const uint8_t *message, uint32_t size)
    void heap_end_if_armed()

cdef extern from "Python.h":
    int PyBuffer_FillInfo(Py_buffer *view, object exporter, void *memory, Py_ssize_t length,
                          int readonly, int flags) except -1
    object PyMemoryView_FromMemory(char *memory, Py_ssize_t size, int flags)

import os as _os

_MECHANISMS = {
    "auto": PYE_HEAP_AUTO, "userfaultfd": PYE_HEAP_USERFAULTFD, "mprotect": PYE_HEAP_MPROTECT,
}


def heap_ends(fd, bytes message not None):
    """
    Have this process send `message` on `fd` and end when a heap of it is found poisoned.

    For enclaves: no code goes on with the zeros that it reads instead, and nobody can catch this.
    """
    cdef uint64_t descriptor = number(fd, "fd", 0x7fffffff)
    if not 0 < len(message) <= HEAP_LAST_WORDS:
        wrong_length("message", HEAP_LAST_WORDS, len(message))
    heap_end_with(<int>descriptor, <const uint8_t *><const char *>message, <uint32_t>len(message))


cdef uint64_t heap_pages(object value, str name) except? 0xffffffffffffffff:
    cdef uint64_t size = number(value, name, PYE_HEAP_MAX_PAGES * PAGE)
    if size % PAGE:
        raise ValueError(f"{name}: expected a multiple of {PAGE}, found {value}")
    return size // PAGE


@cython.final
cdef class Pages:
    """
    An address range of `capacity` bytes of which at most `resident` are plaintext at a time.

    It is a buffer of zeros that may be read and written by any thread; csrc/include/pyenclave/heap.h
    says what happens meanwhile. While views of it exist, close() leaves the range reserved.
    """

    cdef pye_heap *heap
    cdef size_t length
    cdef object __weakref__

    def __cinit__(self, capacity, resident, *, fd=-1, require_locked=False, mechanism="auto",
                  read_ahead=0, tree_above=None, tree_cache=0):
        cdef pye_heap_options options
        cdef pye_status rc
        if mechanism not in _MECHANISMS:
            raise ValueError(
                f"mechanism: expected one of {', '.join(_MECHANISMS)}, found {mechanism!r}")
        options.capacity_pages = heap_pages(capacity, "capacity")
        options.resident_pages = heap_pages(resident, "resident")
        options.mechanism = _MECHANISMS[mechanism]
        options.read_ahead = <uint32_t>number(read_ahead, "read_ahead", PYE_HEAP_MAX_WINDOW)
        options.fd = -1 if fd == -1 else <int32_t>number(fd, "fd", 0x7fffffff)
        options.require_locked = bool(require_locked)
        options.tree_above = PYE_HEAP_TREE_ABOVE
        if tree_above is not None:
            options.tree_above = number(tree_above, "tree_above", 0xffffffffffffffff) // PAGE
        options.tree_cache = <uint32_t>number(tree_cache, "tree_cache", PYE_TREE_MAX_CACHE)
        if options.capacity_pages == 0:
            raise ValueError("capacity: expected at least one page, found 0")
        if options.resident_pages < PYE_HEAP_MIN_RESIDENT:
            raise ValueError(
                f"resident: expected at least {PYE_HEAP_MIN_RESIDENT * PAGE}, found {resident}")
        with nogil:
            rc = pye_heap_new(&self.heap, &options)
        if rc != PYE_OK:
            fail(rc, "sealed heap")
        self.length = <size_t>options.capacity_pages * PAGE
        rc = heap_handlers()
        if rc == PYE_OK:
            rc = heap_table_add(self.heap, self.length)
        if rc != PYE_OK:
            fail(rc, "sealed heap: the fault handler")

    def __dealloc__(self):
        if self.heap != NULL:
            heap_table_remove(self.heap)
            note_unregister(self.heap)
            pye_heap_free(self.heap)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if not pye_heap_live(self.heap):
            fail(PYE_E_FORKED, "sealed heap")
        PyBuffer_FillInfo(buffer, self, pye_heap_base(self.heap), <Py_ssize_t>self.length, 0, flags)

    cdef int check(self, pye_status rc, str what) except -1:
        # Somebody may have put a handler of his own in the place of ours since (faulthandler).
        if rc == PYE_OK:
            rc = heap_handlers()
        if rc == PYE_E_POISONED:
            heap_end_if_armed()
            raise _errors.SealingError(
                f"{what}: the heap is poisoned: {self.poisoned}",
                advice="what it held is gone; make a new heap and read the data again")
        if rc != PYE_OK:
            fail(rc, what)
        return 0

    @property
    def address(self):
        """Where the range begins."""
        return <size_t>pye_heap_base(self.heap) if pye_heap_live(self.heap) else 0

    @property
    def capacity(self):
        """Bytes of the range."""
        return self.length

    @property
    def mechanism(self):
        """How pages are shown and hidden: "userfaultfd", or "mprotect"."""
        return "mprotect" if pye_heap_mechanism(self.heap) == PYE_HEAP_MPROTECT else "userfaultfd"

    @property
    def lock(self):
        """How resident pages are kept out of swap: "all" by one lock, "shown" each, or "none"."""
        locks = pye_heap_locks(self.heap)
        return ("all" if locks == PYE_HEAP_LOCK_ALL else
                "shown" if locks == PYE_HEAP_LOCK_SHOWN else "none")

    @property
    def poisoned(self):
        """Why the heap has been poisoned, or None."""
        cdef uint64_t page = 0
        cdef int32_t error = 0
        cdef pye_status rc
        if not pye_heap_live(self.heap):
            return None
        rc = pye_heap_poisoned(self.heap, &page, &error)
        if rc == PYE_OK:
            return None
        text = pye_status_message(rc).decode()
        cause = "" if error == 0 else f", {_os.strerror(error)}"
        return f"{text} ({pye_status_name(rc).decode()}{cause}), noticed at page {page} or after it"

    def prefetch(self, offset, length):
        """Show pages before they are touched, as far as there is room; how many were brought."""
        cdef uint64_t first = heap_pages(offset, "offset")
        cdef uint64_t num = heap_pages(length, "length")
        cdef uint64_t shown = 0
        cdef pye_status rc
        with nogil:
            rc = pye_heap_prefetch(self.heap, &shown, first, num)
        self.check(rc, "prefetch")
        return shown

    def evict(self, offset=0, length=None):
        """Seal and hide what is resident of a range (all of it) and not pinned; how many pages."""
        cdef uint64_t first = heap_pages(offset, "offset")
        cdef uint64_t num = heap_pages(self.length - first * PAGE if length is None else length,
                                        "length")
        cdef uint64_t evicted = 0
        cdef pye_status rc
        with nogil:
            rc = pye_heap_evict(self.heap, &evicted, first, num)
        self.check(rc, "evict")
        return evicted

    def pin(self, offset, length):
        """Show pages and keep them until unpin() was called as often."""
        cdef uint64_t first = heap_pages(offset, "offset")
        cdef uint64_t num = heap_pages(length, "length")
        cdef pye_status rc
        with nogil:
            rc = pye_heap_pin(self.heap, first, num)
        self.check(rc, "pin")

    def unpin(self, offset, length):
        """Undo one pin()."""
        cdef pye_status rc = pye_heap_unpin(self.heap, heap_pages(offset, "offset"),
                                            heap_pages(length, "length"))
        self.check(rc, "unpin")

    def discard(self, offset, length):
        """Free pages: they are zeros when they are touched again."""
        cdef uint64_t first = heap_pages(offset, "offset")
        cdef uint64_t num = heap_pages(length, "length")
        cdef pye_status rc
        with nogil:
            rc = pye_heap_discard(self.heap, first, num)
        self.check(rc, "discard")

    def hire(self):
        """Say that a thread comes for help(): of many pages that are brought it opens half."""
        cdef pye_status rc = pye_heap_hire(self.heap)
        try:
            self.check(rc, "hire")
        except BaseException:
            if rc == PYE_OK:  # nobody would come, nor dismiss
                self.dismiss()
                self.help()
            raise

    def help(self):
        """Be the thread of hire(), until dismiss()."""
        with nogil:
            pye_heap_help(self.heap)

    def dismiss(self):
        """Let help() return; it may not have begun yet."""
        pye_heap_dismiss(self.heap)

    def stats(self):
        """Counters, in pages where nothing else is said (csrc/include/pyenclave/heap.h)."""
        cdef pye_heap_stats s
        self.check(pye_heap_stats_read(self.heap, &s), "stats")
        return {
            "faults": s.faults, "write_faults": s.write_faults, "zero_pages": s.zero_pages,
            "pages_in": s.pages_in, "pages_out": s.pages_out, "reseals": s.reseals,
            "evictions": s.evictions, "batches": s.batches, "clean_drops": s.clean_drops,
            "read_ahead": s.read_ahead, "read_ahead_hits": s.read_ahead_hits,
            "prefetched": s.prefetched, "discarded": s.discarded, "resident": s.resident,
            "resident_peak": s.resident_peak, "resident_limit": s.resident_limit,
            "pinned": s.pinned, "locked": s.locked, "capacity": s.capacity, "metadata_bytes": s.metadata_bytes,
            "tree_levels": s.tree_levels, "nodes_in": s.nodes_in, "nodes_out": s.nodes_out,
            "helped": s.helped,
        }

    def close(self):
        """Hide and wipe every page and destroy the key. May be called twice."""
        cdef pye_status rc
        with nogil:
            rc = pye_heap_close(self.heap)
        if rc != PYE_OK and rc != PYE_E_FORKED:
            fail(rc, "close")

    def conceal(self):
        """Hide the zeros that were shown since the heap ended: the next access is told again."""
        pye_heap_conceal(self.heap)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __reduce_ex__(self, protocol):
        raise TypeError("sealed memory cannot be pickled or copied")

    def _cipher(self, page):
        """The frame of a page as it is in memory now (tests of tampering)."""
        cdef uint8_t *frame = pye_heap_frame(self.heap, number(page, "page", PYE_HEAP_MAX_PAGES))
        if frame == NULL:
            raise ValueError(f"page: there is no frame of {page}")
        return PyMemoryView_FromMemory(<char *>frame, PAGE, 0x200)

    def _nodes(self):
        """The storage of the version tree's nodes as it is now; None without one (tests)."""
        cdef size_t size = 0
        cdef uint8_t *nodes = NULL
        if pye_heap_live(self.heap):
            nodes = pye_heap_nodes(self.heap, &size)
        if nodes == NULL:
            return None
        return PyMemoryView_FromMemory(<char *>nodes, <Py_ssize_t>size, 0x200)

    def _meta(self, page):
        """The version and the tag of a page (tests)."""
        cdef uint64_t version = 0
        cdef uint8_t tag[16]
        self.check(pye_heap_meta(self.heap, &version, tag,
                                 number(page, "page", PYE_HEAP_MAX_PAGES)), "meta")
        return version, PyBytes_FromStringAndSize(<char *>tag, 16)

    def _set_meta(self, page, version, bytes tag not None):
        """Overwrite the version and the tag of a page (tests)."""
        if len(tag) != 16:
            wrong_length("tag", 16, len(tag))
        self.check(pye_heap_set_meta(self.heap, number(page, "page", PYE_HEAP_MAX_PAGES),
                                     number(version, "version", 0xffffffffffffffff),
                                     <const uint8_t *><const char *>tag), "set meta")

    def _skip(self, next_version):
        """Give up all versions of the key below `next_version` (tests of the limit)."""
        self.check(pye_heap_skip(self.heap,
                                 number(next_version, "version", 0xffffffffffffffff)), "skip")

