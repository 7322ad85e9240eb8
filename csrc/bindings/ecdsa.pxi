# ecdsa: verification of ECDSA P-256. Public data only.
cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_P256_KEY_SIZE
        PYE_P256_SIGNATURE_SIZE
    ctypedef struct pye_p256_table:
        pass
    ctypedef struct pye_p256_claim:
        const uint8_t *key
        const pye_p256_table *table
        const uint8_t *signature
        const uint8_t *digest
    pye_p256_table *pye_p256_table_new(const uint8_t *key)
    void pye_p256_table_free(pye_p256_table *table)
    pye_status pye_p256_verify(uint8_t *verdicts, const pye_p256_table *generator,
                               const pye_p256_claim *claims, size_t count)
    pye_status pye_p256_self_test(const pye_p256_table *generator)

cdef enum:
    P256_MOST_CLAIMS = 16


@cython.final
cdef class P256Table:
    """Multiples of a public key; it is made by `P256Verifier.table`."""

    cdef pye_p256_table *table

    def __dealloc__(self):
        pye_p256_table_free(self.table)


cdef const uint8_t *sized_bytes(object value, Py_ssize_t size) except NULL:
    if type(value) is not bytes or len(<bytes>value) != size:
        raise ValueError(f"bytes of length {size}")
    return <const uint8_t *>PyBytes_AsString(value)


@cython.final
cdef class P256Verifier:
    """Verifies signatures with the multiples of the generator, after a test of itself."""

    cdef P256Table generator

    def __init__(self):
        cdef pye_status rc
        self.generator = P256Table.__new__(P256Table)
        with nogil:
            self.generator.table = pye_p256_table_new(NULL)
        if self.generator.table == NULL:
            fail(PYE_E_UNSUPPORTED, "P-256")
        with nogil:
            rc = pye_p256_self_test(self.generator.table)
        if rc != PYE_OK:
            fail(rc, "P-256")

    def table(self, key):
        """The table of a key (X and Y, 64 bytes); None if it is no point of the curve."""
        cdef const uint8_t *point = sized_bytes(key, PYE_P256_KEY_SIZE)
        cdef P256Table made = P256Table.__new__(P256Table)
        with nogil:
            made.table = pye_p256_table_new(point)
        return None if made.table == NULL else made

    def verify(self, claims) -> bytes:
        """One byte for each (key or its table, signature, data): 0 invalid, 1 valid, 2 in doubt."""
        cdef pye_p256_claim found[P256_MOST_CLAIMS]
        cdef uint8_t digests[P256_MOST_CLAIMS][32]
        cdef uint8_t verdicts[P256_MOST_CLAIMS]
        cdef tuple held = tuple(claims)  # what is used without the GIL stays alive
        cdef tuple claim
        cdef size_t count = <size_t>len(held), i
        cdef pye_status rc
        if self.generator is None:
            fail(PYE_E_STATE, "P-256")
        if count > P256_MOST_CLAIMS:
            raise ValueError(f"at most {P256_MOST_CLAIMS} signatures at once, not {count}")
        for i in range(count):
            claim = held[i]
            key, signature, data = claim
            if type(key) is P256Table:
                found[i].key = NULL
                found[i].table = (<P256Table>key).table
                if found[i].table == NULL:
                    raise ValueError("an empty table")
            else:
                found[i].key = sized_bytes(key, PYE_P256_KEY_SIZE)
                found[i].table = NULL
            found[i].signature = sized_bytes(signature, PYE_P256_SIGNATURE_SIZE)
            if type(data) is not bytes:
                raise TypeError("signed data is bytes")
            pye_sha256(digests[i], PyBytes_AsString(data), <size_t>len(<bytes>data))
            found[i].digest = digests[i]
        with nogil:
            rc = pye_p256_verify(verdicts, self.generator.table, found, count)
        if rc != PYE_OK:
            fail(rc, "P-256")
        return PyBytes_FromStringAndSize(<char *>verdicts, <Py_ssize_t>count)
