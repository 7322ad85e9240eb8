# Secret memory and waiting. What closes a process in goes through cffi (pyenclave/_native.py).

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_SECMEM_SECRET
        PYE_SECMEM_LOCKED
        PYE_SECMEM_UNLOCKED
    pye_status pye_secmem_new(void **out, size_t size, uint32_t *kind)
    void pye_secmem_free(void *memory, size_t size)
    int pye_secmem_live(const void *memory)
    pye_status pye_wait_futex(uint32_t *word, uint32_t expected, uint32_t timeout_ms)
    pye_status pye_wake_futex(uint32_t *word)
    void pye_wait_yield()
    ctypedef struct pye_spawned:
        int64_t pid
        int32_t pidfd
        uint32_t namespaces
        uint32_t way
        int64_t outer_pid
        uint64_t outer_ns[7]
    pye_status pye_spawn_worker(pye_spawned *out, uint32_t namespaces, uint32_t flags)

cdef extern from *:
    """
    #include <errno.h>
    static void set_errno(int value) { errno = value; }
    """
    void set_errno(int value)

cdef extern from "Python.h":
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Parent()
    void PyOS_AfterFork_Child()


@cython.final
cdef class SecretMemory:
    """Memory for secrets: read and written by copying, wiped when closed, absent after a fork."""

    cdef uint8_t *memory
    cdef size_t length
    cdef uint32_t secret_kind

    def __cinit__(self, Py_ssize_t size):
        cdef void *memory = NULL
        cdef uint32_t kind = 0
        if size <= 0:
            raise ValueError(f"size must be at least 1, not {size}")
        status = pye_secmem_new(&memory, <size_t>size, &kind)
        if status != PYE_OK:
            fail(status, "secret memory")
        self.memory = <uint8_t *>memory
        self.length = <size_t>size
        self.secret_kind = kind

    def __dealloc__(self):
        pye_secmem_free(self.memory, self.length)

    cdef int check(self, Py_ssize_t offset, Py_ssize_t size) except -1:
        if self.memory == NULL:
            fail(PYE_E_CLOSED, "secret memory")
        if not pye_secmem_live(self.memory):
            fail(PYE_E_FORKED, "secret memory")
        if offset < 0 or size < 0 or <size_t>offset > self.length \
                or <size_t>size > self.length - <size_t>offset:
            raise ValueError(
                f"bytes {offset} to {offset}+{size} are outside secret memory of {self.length}")
        return 0

    @property
    def kind(self) -> int:
        """1 secret (memfd_secret), 2 locked, 3 not locked."""
        return self.secret_kind

    def __len__(self):
        return <Py_ssize_t>self.length

    def write(self, Py_ssize_t offset, data) -> None:
        """Copy the bytes of `data` in at `offset`."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.check(offset, view.len)
            memcpy(self.memory + offset, view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    def read(self, Py_ssize_t offset, Py_ssize_t size) -> bytes:
        """Copy `size` bytes from `offset` out, into ordinary memory."""
        self.check(offset, size)
        return PyBytes_FromStringAndSize(<char *>self.memory + offset, size)

    def close(self) -> None:
        """Wipe and unmap. May be called twice."""
        cdef uint8_t *memory = self.memory
        self.memory = NULL
        pye_secmem_free(memory, self.length)

    def __enter__(self):
        self.check(0, 0)
        return self

    def __exit__(self, *exception):
        self.close()

    def __reduce__(self):
        raise TypeError("secret memory cannot be pickled or copied")


cdef uint32_t *futex_word(Py_buffer *view, Py_ssize_t offset) except NULL:
    if offset < 0 or view.len < 4 or offset > view.len - 4:
        raise ValueError(f"no 32-bit word at {offset} in a buffer of {view.len} bytes")
    if (<size_t>view.buf + <size_t>offset) % 4:
        raise ValueError(f"the word at {offset} is not aligned to 4 bytes")
    return <uint32_t *>(<uint8_t *>view.buf + offset)


def futex_wait(memory, Py_ssize_t offset, uint32_t expected, uint32_t timeout_ms) -> bool:
    """Sleep while the word at `offset` is `expected`. False: the time passed."""
    cdef Py_buffer view
    cdef uint32_t *word
    cdef pye_status status
    PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
    try:
        word = futex_word(&view, offset)
        with nogil:
            status = pye_wait_futex(word, expected, timeout_ms)
    finally:
        PyBuffer_Release(&view)
    if status != PYE_OK and status != PYE_E_TIMEOUT:
        fail(status, "futex wait")
    return status == PYE_OK


def futex_wake(memory, Py_ssize_t offset) -> None:
    """Wake every thread of any process that waits on the word at `offset`."""
    cdef Py_buffer view
    cdef pye_status status
    PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
    try:
        status = pye_wake_futex(futex_word(&view, offset))
    finally:
        PyBuffer_Release(&view)
    if status != PYE_OK:
        fail(status, "futex wake")


cdef extern from "<string.h>" nogil:
    void *memchr(const void *s, int c, size_t n)
    int memcmp(const void *a, const void *b, size_t n)


cdef uint64_t line_key(const char *line, const char *end) noexcept nogil:
    """The hexadecimal number that a line begins with; any number if it is none."""
    cdef uint64_t key = 0
    cdef char c
    while line < end:
        c = line[0]
        if c >= c'0' and c <= c'9':
            key = key << 4 | <uint64_t>(c - c'0')
        elif c >= c'a' and c <= c'f':
            key = key << 4 | <uint64_t>(c - c'a' + 10)
        else:
            break
        line += 1
    return key


cdef bint plain_memory(const char *line, const char *end) noexcept nogil:
    """
    Whether a line of /proc/self/maps is memory without a file that is not executable.

    "start-end rwxp offset major:minor inode   path": without a file the inode is 0 and there is no
    path, or it is the heap's or the stack's. A name that a program gave is not looked at here.
    """
    cdef const char *field = line
    cdef int fields = 0
    while fields < 4:
        field = <const char *>memchr(field, c' ', <size_t>(end - field))
        if field == NULL:
            return False
        field += 1
        fields += 1
        if fields == 1 and (end - field < 5 or field[4] != c' ' or field[2] != c'-'):
            return False
    if end - field < 1 or field[0] != c'0':
        return False
    field += 1
    if field < end and field[0] != c' ':
        return False
    while field < end and field[0] == c' ':
        field += 1
    if end - field == 6:
        return memcmp(field, b"[heap]", 6) == 0
    if end - field == 7:
        return memcmp(field, b"[stack]", 7) == 0
    return field == end


def new_lines(bytes before not None, bytes after not None, bint plain=True) -> list:
    """
    Lines of ``after`` that are not, byte for byte, lines of ``before``.

    Made for /proc/self/maps: a line of ``before`` is found only if both ascend by the number that
    each line begins with. What is not found is in the result, so disorder never hides a line.
    Without ``plain``, memory that has no file and is not executable is left out.
    """
    cdef const char *old = before
    cdef const char *old_end = old + len(before)
    cdef const char *new = after
    cdef const char *new_end = new + len(after)
    cdef const char *old_stop
    cdef const char *stop
    cdef uint64_t key
    cdef bint known
    found = []
    while new < new_end:
        stop = <const char *>memchr(new, c'\n', <size_t>(new_end - new))
        if stop == NULL:
            stop = new_end
        key = line_key(new, stop)
        known = False
        while old < old_end:
            old_stop = <const char *>memchr(old, c'\n', <size_t>(old_end - old))
            if old_stop == NULL:
                old_stop = old_end
            if old_stop - old == stop - new and memcmp(old, new, <size_t>(stop - new)) == 0:
                known = True
            elif line_key(old, old_stop) > key:
                break
            old = old_stop + (old_stop < old_end)
            if known:
                break
        if not known and (plain or not plain_memory(new, stop)):
            found.append(new[:stop - new])
        new = stop + (stop < new_end)
    return found


def spawn(uint32_t namespaces, uint32_t flags=0) -> tuple:
    """Make a child in new namespaces; returns in both processes, as os.fork does.

    (pid, pidfd, namespaces obtained, way, the maker's pid, inode numbers of its namespaces).
    """
    cdef pye_spawned spawned
    cdef pye_status status
    cdef int saved
    # As os.fork: the GIL is held throughout, and the interpreter mends itself on both sides.
    PyOS_BeforeFork()
    status = pye_spawn_worker(&spawned, namespaces, flags)
    saved = errno
    if status == PYE_OK and spawned.pid == 0:
        PyOS_AfterFork_Child()
    else:
        PyOS_AfterFork_Parent()
        if status != PYE_OK:
            set_errno(saved)
            fail(status, "spawn")
    return (spawned.pid, spawned.pidfd, spawned.namespaces, spawned.way, spawned.outer_pid,
            tuple([spawned.outer_ns[i] for i in range(7)]))
