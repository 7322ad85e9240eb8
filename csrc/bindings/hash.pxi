# hash: SHA-2, HMAC, HKDF, CMAC.
from cpython.bytes cimport PyBytes_AsString

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_SHA256_SIZE
        PYE_SHA384_SIZE
        PYE_SHA512_SIZE
        PYE_CMAC_SIZE
        PYE_CMAC_KEY_SIZE
        PYE_HKDF_SHA256_MAX
    ctypedef struct pye_sha256_ctx:
        pass
    ctypedef struct pye_sha512_ctx:
        pass
    void pye_sha256_init(pye_sha256_ctx *ctx)
    void pye_sha256_update(pye_sha256_ctx *ctx, const void *data, size_t length)
    void pye_sha256_final(pye_sha256_ctx *ctx, uint8_t *out)
    void pye_sha256(uint8_t *out, const void *data, size_t length)
    const char *pye_sha256_variant()
    void pye_sha384_init(pye_sha512_ctx *ctx)
    void pye_sha512_init(pye_sha512_ctx *ctx)
    void pye_sha512_update(pye_sha512_ctx *ctx, const void *data, size_t length)
    void pye_sha512_final(pye_sha512_ctx *ctx, uint8_t *out)
    void pye_sha384(uint8_t *out, const void *data, size_t length)
    void pye_sha512(uint8_t *out, const void *data, size_t length)
    void pye_hmac_sha256(uint8_t *out, const void *key, size_t key_len, const void *data,
                         size_t length)
    pye_status pye_hkdf_sha256_expand(uint8_t *out, size_t out_len, const void *prk,
                                      size_t prk_len, const void *info, size_t info_len)
    pye_status pye_hkdf_sha256(uint8_t *out, size_t out_len, const void *secret,
                               size_t secret_len, const void *salt, size_t salt_len,
                               const void *info, size_t info_len)
    void pye_aes128_cmac(uint8_t *out, const uint8_t *key, const void *data, size_t length)
    pye_status pye_hash_self_test()

# An object whose call may run without the GIL is taken for the length of the call, so that a
# second thread gets an error in place of a mixed-up state.
cdef extern from * nogil:
    """
    static inline int pye_object_take(int *taken)
    {
        return __atomic_exchange_n(taken, 1, __ATOMIC_ACQUIRE) == 0;
    }
    static inline void pye_object_release(int *taken)
    {
        __atomic_store_n(taken, 0, __ATOMIC_RELEASE);
    }
    """
    bint pye_object_take(int *taken)
    void pye_object_release(int *taken)

cdef enum:
    # Below this many bytes a hash takes less than a microsecond: keeping the GIL is cheaper.
    HASH_NOGIL_FROM = 2048


cdef int take_object(int *taken, str what) except -1:
    if not pye_object_take(taken):
        raise _errors.BusyError(f"{what} is in use by another thread")
    return 0


def sha256(data) -> bytes:
    """SHA-256 of `data`."""
    cdef Py_buffer view
    cdef uint8_t out[32]
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len >= HASH_NOGIL_FROM:
            with nogil:
                pye_sha256(out, view.buf, <size_t>view.len)
        else:
            pye_sha256(out, view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return PyBytes_FromStringAndSize(<char *>out, PYE_SHA256_SIZE)


def sha384(data) -> bytes:
    """SHA-384 of `data`."""
    cdef Py_buffer view
    cdef uint8_t out[48]
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            pye_sha384(out, view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return PyBytes_FromStringAndSize(<char *>out, PYE_SHA384_SIZE)


def sha512(data) -> bytes:
    """SHA-512 of `data`."""
    cdef Py_buffer view
    cdef uint8_t out[64]
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            pye_sha512(out, view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return PyBytes_FromStringAndSize(<char *>out, PYE_SHA512_SIZE)


def sha256_variant() -> str:
    """Name of the SHA-256 implementation that is chosen now."""
    return pye_sha256_variant().decode()


@cython.final
cdef class Sha256:
    """SHA-256 over data that comes in parts."""

    cdef pye_sha256_ctx ctx
    cdef int taken

    def __cinit__(self, data=b""):
        pye_sha256_init(&self.ctx)

    def __init__(self, data=b""):
        self.update(data)

    def __dealloc__(self):
        pye_wipe(&self.ctx, sizeof(self.ctx))

    def update(self, data) -> None:
        """Take more data."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            take_object(&self.taken, "this hash")
            if view.len >= HASH_NOGIL_FROM:
                with nogil:
                    pye_sha256_update(&self.ctx, view.buf, <size_t>view.len)
            else:
                pye_sha256_update(&self.ctx, view.buf, <size_t>view.len)
            pye_object_release(&self.taken)
        finally:
            PyBuffer_Release(&view)

    def digest(self) -> bytes:
        """The digest of the data so far; more may follow."""
        cdef pye_sha256_ctx copy
        cdef uint8_t out[32]
        take_object(&self.taken, "this hash")
        copy = self.ctx
        pye_object_release(&self.taken)
        pye_sha256_final(&copy, out)
        return PyBytes_FromStringAndSize(<char *>out, PYE_SHA256_SIZE)

    def copy(self) -> Sha256:
        """An independent object with the same data behind it."""
        cdef Sha256 other = Sha256.__new__(Sha256)
        take_object(&self.taken, "this hash")
        other.ctx = self.ctx
        pye_object_release(&self.taken)
        return other


@cython.final
cdef class Sha384:
    """SHA-384 over data that comes in parts."""

    cdef pye_sha512_ctx ctx
    cdef int taken

    def __cinit__(self, data=b""):
        pye_sha384_init(&self.ctx)

    def __init__(self, data=b""):
        self.update(data)

    def __dealloc__(self):
        pye_wipe(&self.ctx, sizeof(self.ctx))

    def update(self, data) -> None:
        """Take more data."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            take_object(&self.taken, "this hash")
            with nogil:
                pye_sha512_update(&self.ctx, view.buf, <size_t>view.len)
            pye_object_release(&self.taken)
        finally:
            PyBuffer_Release(&view)

    def digest(self) -> bytes:
        """The digest of the data so far; more may follow."""
        cdef pye_sha512_ctx copy
        cdef uint8_t out[64]
        take_object(&self.taken, "this hash")
        copy = self.ctx
        pye_object_release(&self.taken)
        pye_sha512_final(&copy, out)
        return PyBytes_FromStringAndSize(<char *>out, PYE_SHA384_SIZE)

    def copy(self) -> Sha384:
        """An independent object with the same data behind it."""
        cdef Sha384 other = Sha384.__new__(Sha384)
        take_object(&self.taken, "this hash")
        other.ctx = self.ctx
        pye_object_release(&self.taken)
        return other


def hmac_sha256(key, data) -> bytes:
    """HMAC-SHA-256 of `data` under `key` (RFC 2104). Compare with `hmac.compare_digest`."""
    cdef Py_buffer key_view
    cdef Py_buffer view
    cdef uint8_t out[32]
    PyObject_GetBuffer(key, &key_view, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                pye_hmac_sha256(out, key_view.buf, <size_t>key_view.len, view.buf,
                                <size_t>view.len)
        finally:
            PyBuffer_Release(&view)
    finally:
        PyBuffer_Release(&key_view)
    return PyBytes_FromStringAndSize(<char *>out, PYE_SHA256_SIZE)


cdef bytes hkdf_output(Py_ssize_t length):
    if length < 1 or length > PYE_HKDF_SHA256_MAX:
        raise ValueError(f"HKDF length is 1 to {PYE_HKDF_SHA256_MAX} bytes, not {length}")
    return PyBytes_FromStringAndSize(NULL, length)


def hkdf_sha256(secret, salt, info, Py_ssize_t length) -> bytes:
    """HKDF-SHA-256 (RFC 5869), extract then expand; `length` is 1 to 8160 bytes."""
    cdef Py_buffer views[3]
    cdef int held = 0
    cdef pye_status rc
    cdef bytes out = hkdf_output(length)
    try:
        for item in (secret, salt, info):
            PyObject_GetBuffer(item, &views[held], PyBUF_SIMPLE)
            held += 1
        rc = pye_hkdf_sha256(<uint8_t *>PyBytes_AsString(out), <size_t>length,
                             views[0].buf, <size_t>views[0].len,
                             views[1].buf, <size_t>views[1].len,
                             views[2].buf, <size_t>views[2].len)
    finally:
        while held:
            held -= 1
            PyBuffer_Release(&views[held])
    if rc != PYE_OK:
        fail(rc, "hkdf_sha256")
    return out


def hkdf_expand(prk, info, Py_ssize_t length) -> bytes:
    """HKDF-Expand alone (RFC 5869, 2.3); `prk` is uniformly random and has 32 bytes or more."""
    cdef Py_buffer views[2]
    cdef int held = 0
    cdef pye_status rc
    cdef bytes out = hkdf_output(length)
    try:
        for item in (prk, info):
            PyObject_GetBuffer(item, &views[held], PyBUF_SIMPLE)
            held += 1
        rc = pye_hkdf_sha256_expand(<uint8_t *>PyBytes_AsString(out), <size_t>length,
                                    views[0].buf, <size_t>views[0].len,
                                    views[1].buf, <size_t>views[1].len)
    finally:
        while held:
            held -= 1
            PyBuffer_Release(&views[held])
    if rc != PYE_OK:
        fail(rc, "hkdf_expand: prk is shorter than 32 bytes")
    return out


def aes128_cmac(key, data) -> bytes:
    """AES-128-CMAC of `data` (RFC 4493). Compare with `hmac.compare_digest`."""
    cdef Py_buffer key_view
    cdef Py_buffer view
    cdef uint8_t out[16]
    PyObject_GetBuffer(key, &key_view, PyBUF_SIMPLE)
    try:
        if key_view.len != PYE_CMAC_KEY_SIZE:
            raise ValueError(f"an AES-128-CMAC key has 16 bytes, not {key_view.len}")
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                pye_aes128_cmac(out, <const uint8_t *>key_view.buf, view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)
    finally:
        PyBuffer_Release(&key_view)
    return PyBytes_FromStringAndSize(<char *>out, PYE_CMAC_SIZE)


# A core whose hashes are wrong on this machine must not be used at all.
if pye_hash_self_test() != PYE_OK:
    raise ImportError("pyenclave: a hash gave a wrong known answer on this CPU")
