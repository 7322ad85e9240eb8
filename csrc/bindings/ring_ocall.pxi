# Ocalls seen from the host: which there are, what crosses for them, and where they run.

cdef enum:
    LEVELS = 9              # PYE_LANE_MAX_DEPTH, and 0, which none is

cdef struct Handler:        # of the ocall that came when so many calls were under way
    unsigned long thread    # that runs it, or 0
    int users               # `more` when it began
    uint64_t stream         # the stream that it has open on its lane, or 0

cdef struct Handling:
    int more                # threads that use the lane besides its caller: those of handlers
    unsigned long owner     # thread that has the lane
    # By level, not as a stack: one whose nested call was given up may end before the one within.
    Handler[LEVELS] levels


cdef uint32_t level_of(Handling *of, unsigned long thread) noexcept:
    """The innermost level whose handler runs in that thread, or 0."""
    cdef uint32_t level = LEVELS - 1
    while level and of.levels[level].thread != thread:
        level -= 1
    return level


@cython.final
cdef class OcallTable:
    """
    The host functions of one image: ``(name, arguments, result, handler, keywords)`` each, in the
    order of the image. ``keywords`` are the names of the parameters given by keyword, which come
    last; ``limit`` caps what crosses.

    What turns messages into calls and back is here, whoever waits in between.
    """

    cdef readonly tuple entries
    cdef uint32_t num
    cdef uint64_t limit

    def __init__(self, tuple entries not None, uint64_t limit):
        self.entries = entries
        self.num = <uint32_t>len(entries)
        self.limit = limit

    def __len__(self):
        return <Py_ssize_t>self.num

    cdef tuple request(self, uint32_t index, object data):
        """
        Return ``(handler, args, kwargs)`` for the bytearray of an OCALL.

        The index is checked by the caller. ArgumentError: the bytes do not fit the signature.
        """
        name, arguments, result, handler, keywords = self.entries[index]
        values = (<Plan>arguments).get(<const uint8_t *>PyByteArray_AsString(data),
                                       <size_t>PyByteArray_Size(data), data)
        if not keywords:
            return handler, values, {}
        count = len(values) - len(keywords)
        return handler, values[:count], dict(zip(keywords, values[count:]))

    cdef int response(self, Message *m, uint32_t index, object value) except -1:
        """Make an OCALL_RESULT of what a handler returned. ArgumentError: it does not fit."""
        name, arguments, result, handler, keywords = self.entries[index]
        (<Plan>result).put(m, (value,))
        (<Plan>result).finish(m)
        if m.total > self.limit:
            raise _errors.ArgumentError(
                f"what the host function {name} returned is too long",
                expected=f"at most {self.limit} bytes", found=m.total,
                advice="Raise [memory] message in enclave.toml.")
        return 0


cdef bytes ocall_failure(object error):
    """
    The payload of OCALL_ERROR: the name of the exception's class, and never its text.

    It is not empty: an empty one says that the caller gave up.
    """
    name = type(error).__name__.encode("ascii", "replace")
    return name if 0 < len(name) <= 128 else b"Exception"
