# Shared by all parts of _core: buffers and the one function that turns a status into an exception.
cimport cython
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset, strcmp

cdef extern from "pyenclave.h" nogil:
    ctypedef int32_t pye_status
    enum:
        PYE_OK
        PYE_E_ARGUMENT
        PYE_E_LENGTH
        PYE_E_ALIGNMENT
        PYE_E_OVERLAP
        PYE_E_STATE
        PYE_E_CLOSED
        PYE_E_FORKED
        PYE_E_BUSY
        PYE_E_POISONED
        PYE_E_PEER_LOST
        PYE_E_TIMEOUT
        PYE_E_PROTOCOL
        PYE_E_AUTH
        PYE_E_LIMIT
        PYE_E_NO_MEMORY
        PYE_E_OS
        PYE_E_RANDOM
        PYE_E_DENIED
        PYE_E_UNSUPPORTED
        PYE_E_SELF_TEST
    const char *pye_status_name(pye_status status)
    const char *pye_status_message(pye_status status)
    void pye_wipe(void *data, size_t length)
    uint32_t pye_cpu_features()
    void pye_cpu_set_mask(uint32_t mask)

cdef extern from *:
    """
    #if defined(__SANITIZE_ADDRESS__)
    #define PYE_SANITIZED 1
    #else
    #define PYE_SANITIZED 0
    #endif
    """
    enum:
        PYE_SANITIZED

from pyenclave import errors as _errors

# Whether this is a sanitizer build (PYENCLAVE_SANITIZE in setup.py): never one that is shipped.
SANITIZED = PYE_SANITIZED == 1


cdef int fail(pye_status status, str what) except -1:
    """Raise the exception that belongs to `status`; `what` names the operation."""
    cdef int saved = errno
    name = pye_status_name(status).decode()
    text = f"{what}: {pye_status_message(status).decode()} ({name})"
    if status == PYE_E_AUTH:
        raise _errors.UnsealError(text)
    if status == PYE_E_LIMIT:
        raise _errors.SealLimitError(text)
    if status == PYE_E_NO_MEMORY:
        raise MemoryError(text)
    if status == PYE_E_OS or status == PYE_E_DENIED or status == PYE_E_RANDOM:
        raise OSError(saved, text)
    if status == PYE_E_POISONED:
        raise _errors.EnclavePoisonedError(text)
    if status == PYE_E_PEER_LOST:
        raise _errors.EnclaveLostError(text)
    if status == PYE_E_CLOSED:
        raise _errors.EnclaveClosedError(text)
    if status == PYE_E_TIMEOUT:
        raise _errors.CallTimeoutError(text)
    if status == PYE_E_BUSY:
        raise _errors.BusyError(text)
    if status < PYE_E_STATE:
        raise ValueError(text)
    raise _errors.EnclaveStateError(text)


def cpu_features() -> int:
    """The CPU feature word that this module's handles are chosen by."""
    return pye_cpu_features()


def cpu_set_mask(uint32_t mask) -> None:
    """Let handles made from now on see only the features in `mask` (tests)."""
    pye_cpu_set_mask(mask)
