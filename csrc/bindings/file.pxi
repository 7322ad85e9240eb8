# Sealed files: pages between a descriptor and memory, and the columns of a tree's nodes.
#
# A page is opened while it is still in the cache that its read filled, and written while it is in
# the one that its sealing filled: by some, that is twice as fast as the two steps one by one.
cdef extern from *:
    """
    #include <errno.h>
    #include <unistd.h>

    #define PYE_FILE_GROUP 32

    /* read_group fills `out` from `at`; 0 at the end of the file, -1 on failure. */
    static int pye_file_read(int fd, uint8_t *out, size_t len, uint64_t at)
    {
        while (len > 0) {
            const ssize_t got = pread(fd, out, len, (off_t)at);

            if (got < 0 && errno == EINTR) {
                continue;
            }
            if (got <= 0) {
                return got == 0 ? 0 : -1;
            }
            out += got;
            at += (uint64_t)got;
            len -= (size_t)got;
        }
        return 1;
    }

    static int pye_file_write(int fd, const uint8_t *data, size_t len, uint64_t at)
    {
        while (len > 0) {
            const ssize_t put = pwrite(fd, data, len, (off_t)at);

            if (put < 0 && errno == EINTR) {
                continue;
            }
            if (put <= 0) {
                errno = put == 0 ? ENOSPC : errno;
                return -1;
            }
            data += put;
            at += (uint64_t)put;
            len -= (size_t)put;
        }
        return 1;
    }

    /* The end of the entries from `entry` on whose slots, versions and salts follow each other. */
    static size_t pye_node_run(const uint64_t *slots, size_t entry, size_t fanout, uint64_t units)
    {
        const uint64_t *versions = slots + fanout;
        const uint64_t *salts = slots + 2 * fanout;
        size_t i = entry + 1;

        if (slots[entry] == 0) {
            while (i < fanout && slots[i] == 0) {
                i++;
            }
            return i;
        }
        while (i < fanout && slots[i] == slots[i - 1] + 1 &&
               versions[i] == versions[i - 1] + units && salts[2 * i] == salts[2 * i - 2] &&
               salts[2 * i + 1] == salts[2 * i - 1]) {
            i++;
        }
        return i;
    }
    """
    enum:
        PYE_FILE_GROUP
    int pye_file_read(int fd, uint8_t *out, size_t length, uint64_t at) nogil
    int pye_file_write(int fd, const uint8_t *data, size_t length, uint64_t at) nogil
    size_t pye_node_run(const uint64_t *slots, size_t entry, size_t fanout, uint64_t units) nogil


def read_pages(PageKey key not None, int fd, uint64_t at, tags, out, uint64_t version,
               uint64_t address, uint32_t flags, uint8_t type):
    """
    Read n sealed pages of consecutive versions from `fd` at `at` and open them into `out`.

    Return False, with `out` zeroed, where the file ends before; raise UnsealError likewise.
    """
    cdef Py_buffer t, o
    cdef pye_page_info info
    cdef pye_status rc = PYE_OK
    cdef size_t done = 0, pages, count
    cdef int got = 1
    if not pye_secmem_live(key.key):
        refuse_forked("page key")
    two_buffers(tags, &t, out, &o, PyBUF_WRITABLE)
    if o.len == 0 or o.len % PAGE != 0 or t.len != o.len // PAGE * 16:
        PyBuffer_Release(&o)
        PyBuffer_Release(&t)
        raise ValueError("read_pages: tags and out do not fit each other")
    pages = <size_t>o.len // PAGE
    info.flags = flags
    info.type = type
    with nogil:
        while done < pages and rc == PYE_OK:
            count = min(pages - done, <size_t>PYE_FILE_GROUP)
            got = pye_file_read(fd, <uint8_t *>o.buf + done * PAGE, count * PAGE,
                                at + done * PAGE)
            if got <= 0:
                break
            info.address = address + done * PAGE
            rc = pye_pages_open(key.key, <uint8_t *>o.buf + done * PAGE,
                                <const uint8_t *>o.buf + done * PAGE,
                                <const uint8_t *>t.buf + done * 16, NULL, version + done, count,
                                &info)
            done += count
        if got <= 0 or rc != PYE_OK:
            pye_wipe(o.buf, <size_t>o.len)
    PyBuffer_Release(&o)
    PyBuffer_Release(&t)
    if got < 0:
        fail(PYE_E_OS, "read_pages")
    if rc != PYE_OK:
        fail(rc, "read_pages")
    return got > 0


def write_pages(PageKey key not None, int fd, uint64_t at, pages, tags, scratch,
                uint64_t address, uint32_t flags, uint8_t type):
    """
    Seal n pages, their tags to `tags`, write them to `fd` at `at`, and return the first version.

    The others follow it: another thread that seals with `key` meanwhile makes this fail. `scratch`
    holds ciphertext on its way, 32 pages or more.
    """
    cdef Py_buffer p, t, s
    cdef pye_page_info info
    cdef pye_status rc = PYE_OK
    cdef size_t done = 0, total, count
    cdef uint64_t first = 0, version = 0
    cdef int put = 1
    if not pye_secmem_live(key.key):
        refuse_forked("page key")
    PyObject_GetBuffer(pages, &p, PyBUF_SIMPLE)
    try:
        two_buffers(tags, &t, scratch, &s, PyBUF_WRITABLE)
    except BaseException:
        PyBuffer_Release(&p)
        raise
    if (p.len == 0 or p.len % PAGE != 0 or t.len != p.len // PAGE * 16 or t.readonly
            or s.len < PYE_FILE_GROUP * PAGE):
        PyBuffer_Release(&s)
        PyBuffer_Release(&t)
        PyBuffer_Release(&p)
        raise ValueError("write_pages: pages, tags and scratch do not fit each other")
    total = <size_t>p.len // PAGE
    info.flags = flags
    info.type = type
    with nogil:
        while done < total:
            count = min(total - done, <size_t>PYE_FILE_GROUP)
            info.address = address + done * PAGE
            rc = pye_pages_seal(key.key, <uint8_t *>s.buf, <uint8_t *>t.buf + done * 16, &version,
                                <const uint8_t *>p.buf + done * PAGE, count, &info)
            if rc != PYE_OK:
                break
            if done == 0:
                first = version
            elif version != first + done:
                rc = PYE_E_BUSY
                break
            put = pye_file_write(fd, <const uint8_t *>s.buf, count * PAGE, at + done * PAGE)
            if put <= 0:
                break
            done += count
    PyBuffer_Release(&s)
    PyBuffer_Release(&t)
    PyBuffer_Release(&p)
    if put <= 0:
        fail(PYE_E_OS, "write_pages")
    if rc != PYE_OK:
        fail(rc, "write_pages")
    return first


cdef int node_buffer(object node, Py_buffer *view, size_t entry, size_t count, size_t fanout,
                     int flags) except -1:
    PyObject_GetBuffer(node, view, flags)
    if (<size_t>view.len // 32 < fanout or entry >= fanout or count > fanout - entry
            or <size_t>view.buf % 8 != 0):
        PyBuffer_Release(view)
        raise ValueError("node: the entries are not in it")
    return 0


def node_run(node, size_t entry, size_t fanout, uint64_t units):
    """The end of the entries from `entry` on that one read and one key open, or that are holes."""
    cdef Py_buffer view
    cdef size_t end
    node_buffer(node, &view, entry, 1, fanout, PyBUF_SIMPLE)
    end = pye_node_run(<const uint64_t *>view.buf, entry, fanout, units)
    PyBuffer_Release(&view)
    return end


def node_blank(node, size_t entry, size_t count, size_t fanout):
    """Whether `count` entries are all holes."""
    cdef Py_buffer view
    cdef uint64_t seen = 0
    cdef size_t i
    node_buffer(node, &view, entry, count, fanout, PyBUF_SIMPLE)
    for i in range(entry, entry + count):
        seen |= (<const uint64_t *>view.buf)[i]
    PyBuffer_Release(&view)
    return seen == 0


def node_fill(node, size_t entry, size_t count, size_t fanout, uint64_t units, uint64_t slot,
              uint64_t version, salt):
    """Give `count` entries consecutive slots (0: leave them) and versions, and one salt."""
    cdef Py_buffer view, s
    cdef uint64_t *words
    cdef uint64_t two[2]
    cdef size_t i
    PyObject_GetBuffer(salt, &s, PyBUF_SIMPLE)
    if s.len != 16:
        PyBuffer_Release(&s)
        wrong_length("salt", 16, s.len)
    memcpy(two, s.buf, 16)
    PyBuffer_Release(&s)
    node_buffer(node, &view, entry, count, fanout, PyBUF_WRITABLE)
    words = <uint64_t *>view.buf
    for i in range(count):
        if slot != 0:
            words[entry + i] = slot + i
        words[fanout + entry + i] = version + i * units
        words[2 * fanout + 2 * (entry + i)] = two[0]
        words[2 * fanout + 2 * (entry + i) + 1] = two[1]
    PyBuffer_Release(&view)
