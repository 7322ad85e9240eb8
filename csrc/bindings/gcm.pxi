# AES-GCM, and the memory that its keys live in.
cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND
from cpython.bytes cimport PyBytes_AsString

include "fastcall.pxi"

cdef extern from "pyenclave.h" nogil:
    ctypedef struct pye_gcm_key:
        pass
    enum:
        PYE_GCM_PORTABLE
        PYE_GCM_AESNI
        PYE_GCM_VAES512
        PYE_GCM_VAES256
        PYE_GCM_ARMV8
    uint32_t pye_gcm_implementations()
    pye_status pye_gcm_self_test(uint32_t implementation)
    size_t pye_gcm_key_size()
    pye_status pye_gcm_init(pye_gcm_key *key, const uint8_t *secret, size_t secret_len,
                            uint32_t allowed)
    void pye_gcm_wipe(pye_gcm_key *key)
    const char *pye_gcm_implementation(const pye_gcm_key *key)
    pye_status pye_gcm_seal(const pye_gcm_key *key, uint8_t *out, uint8_t *tag, const uint8_t *iv,
                            const uint8_t *data, size_t data_len, const uint8_t *aad,
                            size_t aad_len)
    pye_status pye_gcm_open(const pye_gcm_key *key, uint8_t *out, const uint8_t *iv,
                            const uint8_t *data, size_t data_len, const uint8_t *tag,
                            const uint8_t *aad, size_t aad_len)
    size_t pye_page_key_size()

cdef extern from *:
    """
    #include <stdint.h>

    /* Memory for keys is secret memory, whose making costs a dozen system calls: what is freed is
     * wiped and kept for the next key. All pieces have one size. */
    #define PYE_KEYS_KEPT 8
    static void *pye_keys_kept[PYE_KEYS_KEPT];

    static pye_status pye_key_memory_new(void **out, size_t size, uint32_t *kind)
    {
        for (int i = 0; i < PYE_KEYS_KEPT; i++) {
            void *p = __atomic_exchange_n(&pye_keys_kept[i], NULL, __ATOMIC_ACQ_REL);

            if (p != NULL && pye_secmem_live(p)) {
                *out = p;
                *kind = *(uint32_t *)p;
                *(uint32_t *)p = 0;
                return PYE_OK;
            }
            pye_secmem_free(p, size); /* of a parent process: only the address range is here */
        }
        return pye_secmem_new(out, size, kind);
    }

    static void pye_key_memory_free(void *p, size_t size, uint32_t kind)
    {
        if (pye_secmem_live(p)) {
            pye_wipe(p, size);
            *(uint32_t *)p = kind;
            for (int i = 0; i < PYE_KEYS_KEPT; i++) {
                void *none = NULL;

                if (__atomic_compare_exchange_n(&pye_keys_kept[i], &none, p, 0, __ATOMIC_ACQ_REL,
                                                __ATOMIC_RELAXED)) {
                    return;
                }
            }
        }
        pye_secmem_free(p, size);
    }

    /* A guard counts the calls under way, so that a close from another thread lets them finish. */
    #define PYE_GUARD_ENDED (UINT64_C(1) << 63)

    static int pye_guard_enter(uint64_t *guard)
    {
        uint64_t seen = __atomic_load_n(guard, __ATOMIC_RELAXED);

        /* Who is refused was never counted: the last of those inside would not know to be it. */
        do {
            if (seen & PYE_GUARD_ENDED) {
                return 0;
            }
        } while (!__atomic_compare_exchange_n(guard, &seen, seen + 1, 1, __ATOMIC_ACQUIRE,
                                              __ATOMIC_RELAXED));
        return 1;
    }

    /* Both tell whether it is now up to the caller to wipe. */
    static int pye_guard_leave(uint64_t *guard)
    {
        return __atomic_fetch_sub(guard, 1, __ATOMIC_ACQ_REL) == (PYE_GUARD_ENDED | 1);
    }

    static int pye_guard_end(uint64_t *guard)
    {
        return __atomic_fetch_or(guard, PYE_GUARD_ENDED, __ATOMIC_ACQ_REL) == 0;
    }
    """
    pye_status pye_key_memory_new(void **out, size_t size, uint32_t *kind)
    void pye_key_memory_free(void *p, size_t size, uint32_t kind)
    bint pye_guard_enter(uint64_t *guard) noexcept nogil
    bint pye_guard_leave(uint64_t *guard) noexcept nogil
    bint pye_guard_end(uint64_t *guard) noexcept nogil

cdef extern from "Python.h":
    # The same function without Cython's raising, so that the hot path saves no exception state.
    int try_get_buffer "PyObject_GetBuffer"(object exporter, Py_buffer *view, int flags) noexcept

# Slowest first.
cdef tuple _GCM_NAMES = (
    ("portable", PYE_GCM_PORTABLE),
    ("aesni", PYE_GCM_AESNI),
    ("vaes256", PYE_GCM_VAES256),
    ("vaes512", PYE_GCM_VAES512),
    ("armv8", PYE_GCM_ARMV8),
)

# The implementations whose known answers came out right; tested once, when the module is loaded.
cdef uint32_t _gcm_tested = 0
for _, _implementation in _GCM_NAMES:
    if pye_gcm_self_test(_implementation) == PYE_OK:
        _gcm_tested |= _implementation

# Letting other threads run costs some hundred nanoseconds; below this it would be most of the call.
cdef enum:
    GIL_RELEASE_LEN = 131072


def gcm_implementations() -> tuple:
    """The AES-GCM implementations that this CPU offers and that passed their test, fastest last."""
    cdef uint32_t usable = pye_gcm_implementations() & _gcm_tested
    return tuple(name for name, bit in _GCM_NAMES if usable & bit)


cdef int wrong_length(str what, object expected, object found) except -1:
    raise ValueError(f"{what}: expected {expected} bytes, found {found}")


cdef int refuse_forked(str what) except -1:
    raise _errors.EnclaveStateError(
        f"{what}: the key belongs to the process that made it, not to a forked child",
        advice="make a new key after the fork",
    )


cdef object _EMPTY = b""


cdef inline int two_buffers(object first, Py_buffer *f, object second, Py_buffer *s,
                            int second_flags) except -1:
    """Both buffers, the first to be read, or neither."""
    if try_get_buffer(first, f, PyBUF_SIMPLE) != 0:
        return -1
    if try_get_buffer(second, s, second_flags) != 0:
        PyBuffer_Release(f)
        return -1
    return 0


cdef inline object not_none(object out):
    if out is None:
        raise TypeError("out: a writable buffer is required, not None")
    return out


@cython.final
cdef class Gcm:
    """AES-GCM under one key, 96-bit IVs and 128-bit tags. The caller never repeats an IV."""

    cdef pye_gcm_key *key
    cdef uint32_t memory_kind
    cdef uint64_t guard

    def __cinit__(self, key):
        cdef Py_buffer view
        cdef pye_status rc
        cdef void *memory = NULL
        PyObject_GetBuffer(key, &view, PyBUF_SIMPLE)
        try:
            if view.len != 16 and view.len != 32:
                wrong_length("AES-GCM key", "16 or 32", view.len)
            rc = pye_key_memory_new(&memory, pye_page_key_size(), &self.memory_kind)
            if rc != PYE_OK:
                fail(rc, "AES-GCM key")
            self.key = <pye_gcm_key *>memory
            rc = pye_gcm_init(self.key, <const uint8_t *>view.buf, <size_t>view.len, _gcm_tested)
            if rc != PYE_OK:
                fail(rc, "AES-GCM key")
        finally:
            PyBuffer_Release(&view)

    def __dealloc__(self):
        if self.key != NULL:
            pye_key_memory_free(self.key, pye_page_key_size(), self.memory_kind)

    cdef int enter(self) except -1:
        if not pye_secmem_live(self.key):
            refuse_forked("AES-GCM")
        if not pye_guard_enter(&self.guard):
            fail(PYE_E_CLOSED, "AES-GCM")
        return 0

    cdef void leave(self) noexcept:
        if pye_guard_leave(&self.guard):
            pye_gcm_wipe(self.key)

    cdef pye_status call(self, bint opening, uint8_t *out, uint8_t *tag, Py_buffer *iv,
                         const uint8_t *data, size_t data_len, Py_buffer *aad) noexcept nogil:
        if opening:
            return pye_gcm_open(self.key, out, <const uint8_t *>iv.buf, data, data_len, tag,
                                <const uint8_t *>aad.buf, <size_t>aad.len)
        return pye_gcm_seal(self.key, out, tag, <const uint8_t *>iv.buf, data, data_len,
                            <const uint8_t *>aad.buf, <size_t>aad.len)

    cdef object run(self, bint opening, object iv, object data, object into, object aad):
        """Seal or open `data`; the result goes to `into`, or is returned as bytes if it is None."""
        cdef Py_buffer i, d, o, a
        cdef object result = None
        cdef pye_status rc = PYE_E_LENGTH
        cdef Py_ssize_t data_len, out_len
        cdef uint8_t *out
        cdef uint8_t *tag
        two_buffers(iv, &i, data, &d, PyBUF_SIMPLE)
        memset(&a, 0, sizeof(a))  # a view without object is empty, and its release does nothing
        memset(&o, 0, sizeof(o))
        try:
            if aad is not _EMPTY:
                PyObject_GetBuffer(aad, &a, PyBUF_SIMPLE)
            if i.len != 12:
                wrong_length("IV", 12, i.len)
            if opening and d.len < 16:
                wrong_length("sealed data", "at least 16", d.len)
            data_len = d.len - 16 if opening else d.len
            out_len = data_len if opening else data_len + 16
            if into is None:
                result = PyBytes_FromStringAndSize(NULL, out_len)
                out = <uint8_t *>PyBytes_AsString(result)
            else:
                PyObject_GetBuffer(into, &o, PyBUF_WRITABLE)
                if o.len != out_len:
                    wrong_length("out", out_len, o.len)
                out = <uint8_t *>o.buf
            tag = <uint8_t *>d.buf + data_len if opening else out + data_len
            self.enter()
            if data_len < GIL_RELEASE_LEN:
                rc = self.call(opening, out, tag, &i, <const uint8_t *>d.buf, <size_t>data_len, &a)
            else:
                with nogil:
                    rc = self.call(opening, out, tag, &i, <const uint8_t *>d.buf,
                                   <size_t>data_len, &a)
            self.leave()
        finally:
            PyBuffer_Release(&o)
            PyBuffer_Release(&a)
            PyBuffer_Release(&d)
            PyBuffer_Release(&i)
        if rc != PYE_OK:
            fail(rc, "open" if opening else "seal")
        return result

    def seal(self, iv, data, aad=b""):
        """Return ciphertext and tag of `data`."""
        return self.run(False, iv, data, None, aad)

    def open(self, iv, sealed, aad=b""):
        """Return the data of `sealed` (ciphertext and tag), or raise UnsealError."""
        return self.run(True, iv, sealed, None, aad)

    def seal_into(self, iv, data, out, aad=b""):
        """Write ciphertext and tag of `data` to `out`, which may begin with `data` itself."""
        return self.run(False, iv, data, not_none(out), aad)

    def open_into(self, iv, sealed, out, aad=b""):
        """Write the data of `sealed` to `out`, or zero it and raise UnsealError."""
        return self.run(True, iv, sealed, not_none(out), aad)

    @property
    def implementation(self):
        """Name of the implementation; "none" after close() and in a forked child."""
        if not pye_secmem_live(self.key):
            return "none"
        return pye_gcm_implementation(self.key).decode()

    @property
    def locked(self):
        """Whether the key's memory cannot reach swap."""
        return self.memory_kind != PYE_SECMEM_UNLOCKED

    def close(self):
        """Wipe the key. Calls under way in other threads finish first. May be called twice."""
        if pye_guard_end(&self.guard) and pye_secmem_live(self.key):
            pye_gcm_wipe(self.key)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        return f"<Gcm {self.implementation}>"

    def __reduce_ex__(self, protocol):
        raise TypeError("a key cannot be pickled or copied")


cdef _Names _seal_names = _Names("seal", ("iv", "data", "aad"), 2, 3)
cdef _Names _open_names = _Names("open", ("iv", "sealed", "aad"), 2, 3)
cdef _Names _seal_into_names = _Names("seal_into", ("iv", "data", "out", "aad"), 3, 4)
cdef _Names _open_into_names = _Names("open_into", ("iv", "sealed", "out", "aad"), 3, 4)


cdef inline object or_else(PyObject *value, object default):
    return default if value == NULL else <object>value


cdef object fast_seal(Gcm self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames):
    cdef PyObject *v[FAST_MAX]
    take_arguments(_seal_names, v, args, nargs, kwnames)
    return self.run(False, <object>v[0], <object>v[1], None, or_else(v[2], _EMPTY))


cdef object fast_open(Gcm self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames):
    cdef PyObject *v[FAST_MAX]
    take_arguments(_open_names, v, args, nargs, kwnames)
    return self.run(True, <object>v[0], <object>v[1], None, or_else(v[2], _EMPTY))


cdef object fast_seal_into(Gcm self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames):
    cdef PyObject *v[FAST_MAX]
    take_arguments(_seal_into_names, v, args, nargs, kwnames)
    return self.run(False, <object>v[0], <object>v[1], not_none(<object>v[2]),
                    or_else(v[3], _EMPTY))


cdef object fast_open_into(Gcm self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames):
    cdef PyObject *v[FAST_MAX]
    take_arguments(_open_into_names, v, args, nargs, kwnames)
    return self.run(True, <object>v[0], <object>v[1], not_none(<object>v[2]),
                    or_else(v[3], _EMPTY))


cdef PyMethodDef _gcm_methods[4]
put_method(Gcm, &_gcm_methods[0], "seal", <void *>fast_seal,
           b"seal($self, iv, data, aad=b'')\n--\n\nReturn ciphertext and tag of `data`.")
put_method(Gcm, &_gcm_methods[1], "open", <void *>fast_open,
           b"open($self, iv, sealed, aad=b'')\n--\n\n"
           b"Return the data of `sealed` (ciphertext and tag), or raise UnsealError.")
put_method(Gcm, &_gcm_methods[2], "seal_into", <void *>fast_seal_into,
           b"seal_into($self, iv, data, out, aad=b'')\n--\n\n"
           b"Write ciphertext and tag of `data` to `out`, which may begin with `data` itself.")
put_method(Gcm, &_gcm_methods[3], "open_into", <void *>fast_open_into,
           b"open_into($self, iv, sealed, out, aad=b'')\n--\n\n"
           b"Write the data of `sealed` to `out`, or zero it and raise UnsealError.")
