# Rings: the two ends of a lane, and the loops around them. What is decided from shared memory is
# decided in csrc/src/call; here buffers are held, the GIL is dropped, and Python is called.

cdef extern from "<sched.h>" nogil:
    int sched_getcpu()

cdef extern from "<dlfcn.h>" nogil:
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *name)
    char *dlerror()
    int RTLD_NOW
    int RTLD_LOCAL

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_SIDE_HOST
        PYE_SIDE_WORKER
        PYE_FRAME_CALL
        PYE_FRAME_PING
        PYE_FRAME_ATTEST
        PYE_FRAME_RESULT
        PYE_FRAME_ERROR
    ctypedef struct pye_lane_header:
        uint32_t sequence
        uint16_t kind
        uint16_t index
        uint32_t length
        uint32_t lane
        uint64_t total
        uint64_t offset
    ctypedef struct pye_wait_ops:
        pye_status (*wait)(uint32_t *word, uint32_t expected, uint32_t timeout_ms) noexcept
        pye_status (*wake)(uint32_t *word) noexcept
        void (*yield_ "yield")() noexcept
        int (*cpu)() noexcept
    ctypedef struct pye_lane:
        pass
    size_t pye_ring_size(uint32_t lanes, uint32_t slot_size)
    pye_status pye_lane_new(pye_lane **out, void *memory, size_t memory_len, uint32_t lanes,
                            uint32_t slot_size, uint32_t number, uint32_t side, uint64_t limit,
                            const pye_wait_ops *ops)
    void pye_lane_free(pye_lane *lane)
    pye_status pye_lane_write(pye_lane *lane, uint16_t kind, uint16_t index,
                              const pye_segment *segments, size_t num, uint32_t slice_ms)
    pye_status pye_lane_wait(pye_lane *lane, pye_lane_header *out, uint32_t slice_ms)
    pye_status pye_lane_read(pye_lane *lane, uint8_t *out, size_t out_len, uint32_t slice_ms)
    pye_status pye_lane_drain(pye_lane *lane, uint32_t slice_ms)
    const char *pye_lane_broken(const pye_lane *lane)
    int pye_lane_idle(const pye_lane *lane)
    void pye_lane_wake(pye_lane *lane)
    int pye_lane_peer_asleep(const pye_lane *lane)
    pye_status pye_native_call(void *function, uint8_t *out, size_t out_cap, size_t *out_len,
                               const uint8_t *in_, size_t in_len)

cdef extern from *:
    """
    #include <pthread.h>
    /* Held only around a few instructions; free-threaded builds need it, others hardly notice. */
    #define PYE_SET(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define PYE_GET(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define PYE_SWAP(p, from, to) __extension__ ({ int from_ = (from); \
        __atomic_compare_exchange_n((p), &from_, (to), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); })
    """
    void PYE_SET(int *p, int v) noexcept nogil
    int PYE_GET(int *p) noexcept nogil
    bint PYE_SWAP(int *p, int before, int after) noexcept nogil

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

from time import monotonic as _monotonic

cdef enum:
    SLICE_MS = 100          # no wait is longer, so that no peer's death hangs the other
    FREE = 0                # states of a lane of the host
    BUSY = 1
    LATE = 2                # its caller gave up; the call still runs

cdef pye_wait_ops WAIT_OPS
WAIT_OPS.wait = pye_wait_futex
WAIT_OPS.wake = pye_wake_futex
WAIT_OPS.yield_ = pye_wait_yield
WAIT_OPS.cpu = sched_getcpu


def ring_size(uint32_t lanes, uint32_t slot_size) -> int:
    """Size in bytes of a ring, or 0 if there is no such ring."""
    return pye_ring_size(lanes, slot_size)


# ---- the host's side ---------------------------------------------------------------------------

cdef class HostLanes:
    """
    All lanes of a ring, for callers of several threads.

    ``memory`` is the mapped ring; ``token`` one byte of memory that a fork wipes. ``guard()`` is
    called at least every 100 ms of waiting and raises when there is nothing to wait for any more;
    ``broken(check)`` when the worker broke the protocol, and returns the exception to raise;
    ``error(data)`` returns the exception that an error frame describes.
    """

    cdef Py_buffer memory
    cdef Py_buffer token
    cdef bint held
    cdef pye_lane **lanes
    cdef int *states
    cdef uint32_t num
    cdef int closed
    cdef int waiting
    cdef int queue_limit
    cdef object guard
    cdef object broken
    cdef object error
    cdef object condition

    def __cinit__(self):
        self.held = False
        self.lanes = NULL
        self.states = NULL
        self.num = 0

    def __init__(self, memory, token, uint32_t lanes, uint32_t slot_size, uint64_t limit,
                 guard, broken, error, condition, int queue_limit):
        cdef uint32_t i
        if self.held:
            raise TypeError("HostLanes is made once")
        if limit > <uint64_t>PY_SSIZE_T_MAX // 2:
            raise ValueError("the message limit is too large")
        PyObject_GetBuffer(memory, &self.memory, PyBUF_WRITABLE)
        try:
            PyObject_GetBuffer(token, &self.token, PyBUF_WRITABLE)
        except BaseException:
            PyBuffer_Release(&self.memory)
            raise
        self.held = True
        if self.token.len < 1:
            raise ValueError("the token is empty")
        (<uint8_t *>self.token.buf)[0] = 1
        self.guard = guard
        self.broken = broken
        self.error = error
        self.condition = condition
        self.queue_limit = queue_limit
        self.lanes = <pye_lane **>calloc(lanes if lanes else 1, sizeof(pye_lane *))
        self.states = <int *>calloc(lanes if lanes else 1, sizeof(int))
        if self.lanes == NULL or self.states == NULL:
            raise MemoryError()
        for i in range(lanes):
            status = pye_lane_new(&self.lanes[i], self.memory.buf, <size_t>self.memory.len, lanes,
                                  slot_size, i, PYE_SIDE_HOST, limit, &WAIT_OPS)
            if status != PYE_OK:
                fail(status, "ring")
            self.num = i + 1
        if lanes == 0:
            fail(PYE_E_ARGUMENT, "ring")

    def __dealloc__(self):
        cdef uint32_t i
        if self.lanes != NULL:
            for i in range(self.num):
                pye_lane_free(self.lanes[i])
        free(self.lanes)
        free(self.states)
        if self.held:
            PyBuffer_Release(&self.memory)
            PyBuffer_Release(&self.token)

    def __reduce__(self):
        raise TypeError("a ring cannot be pickled or copied")

    def close(self) -> None:
        """Refuse new calls and let waiting ones look around. May be called twice."""
        cdef uint32_t i
        PYE_SET(&self.closed, 1)
        if (<uint8_t *>self.token.buf)[0] == 1:
            for i in range(self.num):
                pye_lane_wake(self.lanes[i])

    @property
    def busy(self) -> int:
        """How many lanes have a call under way, given up ones included."""
        self.reclaim()
        return sum(PYE_GET(&self.states[i]) != FREE for i in range(self.num))

    def asleep(self, uint32_t lane) -> bool:
        """Whether the worker's thread of a lane says that it sleeps (benchmarks)."""
        if lane >= self.num:
            raise IndexError(lane)
        return pye_lane_peer_asleep(self.lanes[lane]) != 0

    cdef int check(self) except -1:
        if (<uint8_t *>self.token.buf)[0] != 1:
            raise _errors.EnclaveStateError(
                "this handle belongs to the process that made it, not to a forked child",
                advice="Open the enclave after forking.")
        if PYE_GET(&self.closed):
            self.guard()
            raise _errors.EnclaveClosedError("the enclave was closed")
        return 0

    cdef int reclaim(self) except -1:
        """Free the lanes whose given-up calls have returned."""
        cdef uint32_t i
        cdef pye_status status
        for i in range(self.num):
            if PYE_SWAP(&self.states[i], LATE, BUSY):
                status = pye_lane_drain(self.lanes[i], 0)
                PYE_SET(&self.states[i], FREE if status == PYE_OK else LATE)
                if status == PYE_E_PROTOCOL:
                    raise self.broken(pye_lane_broken(self.lanes[i]).decode())
        return 0

    cdef int acquire(self, double deadline) except -1:
        """Return the number of a lane that is now the caller's."""
        cdef uint32_t i
        for i in range(self.num):
            if PYE_SWAP(&self.states[i], FREE, BUSY):
                return <int>i
        return self.queue(deadline)

    cdef int queue(self, double deadline) except -1:
        cdef uint32_t i
        cdef double left
        condition = self.condition
        with condition:
            if self.waiting >= self.queue_limit:
                raise _errors.BusyError(
                    "too many calls wait for this enclave", expected=f"at most {self.queue_limit}",
                    advice="Give the image more threads, or call from fewer.")
            self.waiting += 1
            try:
                while True:
                    self.check()
                    self.reclaim()
                    for i in range(self.num):
                        if PYE_SWAP(&self.states[i], FREE, BUSY):
                            return <int>i
                    left = SLICE_MS / 1000.0
                    if deadline >= 0:
                        left = min(left, deadline - <double>_monotonic())
                        if left <= 0:
                            raise _errors.CallTimeoutError(
                                "the deadline passed before the call could begin")
                    # A given-up call is noticed by looking only: look sooner.
                    for i in range(self.num):
                        if PYE_GET(&self.states[i]) == LATE:
                            left = min(left, 0.002)
                    condition.wait(left)
                    self.guard()
            finally:
                self.waiting -= 1

    cdef int release(self, int lane) except -1:
        cdef pye_lane *this = self.lanes[lane]
        PYE_SET(&self.states[lane], FREE if pye_lane_idle(this) else LATE)
        if self.waiting:
            with self.condition:
                self.condition.notify()
        return 0

    cdef int look(self, double deadline, bint started) except -1:
        """Between two slices of waiting: is there still something to wait for?"""
        PyErr_CheckSignals()
        try:
            self.guard()
            if PYE_GET(&self.closed):
                self.check()
        except _errors.EnclaveLostError as error:
            error.started = started
            raise
        if deadline >= 0 and <double>_monotonic() >= deadline:
            raise _errors.CallTimeoutError(
                "the deadline passed" if started else "the deadline passed while sending",
                advice="The call may still run; its lane is free again when it returns.")
        return 0

    cdef uint32_t slice(self, double deadline) except? 0xffffffff:
        cdef double left
        if deadline < 0:
            return SLICE_MS
        left = (deadline - <double>_monotonic()) * 1000
        if left >= SLICE_MS:
            return SLICE_MS
        return 1 if left < 1 else <uint32_t>left

    cdef object exchange(self, int number, uint16_t kind, uint16_t index, pye_segment *segments,
                         size_t num, double deadline, int want, Plan plan):
        """
        Send a message and return the answer: as bytes (want 0) or decoded by `plan` (want 1).

        The caller owns the lane. If this raises while the worker still has the call, the lane
        stays late until the call returns (see `release`).
        """
        cdef pye_lane *lane = self.lanes[number]
        cdef pye_lane_header header
        cdef pye_status status
        cdef uint32_t wait_ms = self.slice(deadline)
        cdef bint sent = False
        cdef uint8_t[SMALL] small
        cdef uint8_t *data
        cdef size_t total
        cdef object owner
        with nogil:
            status = pye_lane_write(lane, kind, index, segments, num, wait_ms)
            if status == PYE_OK:
                sent = True
                status = pye_lane_wait(lane, &header, wait_ms)
        while status == PYE_E_TIMEOUT:
            self.look(deadline, sent)
            wait_ms = self.slice(deadline)
            with nogil:
                if not sent:
                    status = pye_lane_write(lane, kind, index, segments, num, wait_ms)
                    if status == PYE_OK:
                        sent = True
                if sent:
                    status = pye_lane_wait(lane, &header, wait_ms)
        if status != PYE_OK:
            self.give_up(lane, status)
        total = <size_t>header.total
        if header.kind == PYE_FRAME_RESULT and want == 1 and not plan.arrays and total <= SMALL:
            status = pye_lane_read(lane, small, total, wait_ms)
            if status == PYE_OK:
                return self.decode(plan, small, total, None)
            self.give_up(lane, status)
        if header.kind == PYE_FRAME_RESULT and want == 1:
            owner = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>total)
            data = <uint8_t *>PyByteArray_AsString(owner)
        else:
            owner = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
            data = <uint8_t *><char *>owner
        if header.length == header.total and total <= 4096:
            status = pye_lane_read(lane, data, total, wait_ms)
        else:
            status = PYE_E_TIMEOUT
            while status == PYE_E_TIMEOUT:
                with nogil:
                    status = pye_lane_read(lane, data, total, wait_ms)
                if status == PYE_E_TIMEOUT:
                    self.look(deadline, True)
                    wait_ms = self.slice(deadline)
        if status != PYE_OK:
            self.give_up(lane, status)
        if header.kind == PYE_FRAME_ERROR:
            raise self.error(owner)
        if want == 0:
            return owner
        return self.decode(plan, data, total, owner)

    cdef object decode(self, Plan plan, const uint8_t *data, size_t total, object owner):
        try:
            return (<tuple>plan.get(data, total, owner))[0]
        except _errors.ArgumentError as error:
            raise _errors.CallError(
                f"the enclave's answer does not fit the signature: {error.message}") from None

    cdef int give_up(self, pye_lane *lane, pye_status status) except -1:
        if status == PYE_E_PROTOCOL:
            raise self.broken(pye_lane_broken(lane).decode())
        fail(status, "call")
        return 0

    def request(self, uint16_t kind, data, double timeout=-1) -> bytes:
        """Send a control frame (PING, ATTEST) or a raw call and return the raw answer."""
        return self.raw_call(kind, 0, data, timeout)

    def raw_call(self, uint16_t kind, uint16_t index, data, double timeout=-1) -> bytes:
        """Call by number with bytes, whatever the signature (control frames, tests)."""
        cdef Py_buffer view
        cdef pye_segment segment
        cdef int number
        cdef double deadline = -1
        if timeout >= 0:
            deadline = <double>_monotonic() + timeout
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            segment.data = <const uint8_t *>view.buf
            segment.len = <size_t>view.len
            self.check()
            number = self.acquire(deadline)
            try:
                return self.exchange(number, kind, index, &segment, 1, deadline, 0, None)
            finally:
                self.release(number)
        finally:
            PyBuffer_Release(&view)


cdef class HostCall:
    """
    A trusted function, callable from the host.

    ``bind(args, kwargs)`` orders arguments where there are keywords or defaults. ``native``: the
    argument's bytes cross as they are; ``element`` then is the dtype that the answer gets.
    """

    cdef HostLanes lanes
    cdef uint16_t index
    cdef Plan arguments
    cdef Plan result
    cdef bint native
    cdef int wanted
    cdef object element
    cdef object bind
    cdef double timeout
    cdef bint has_out
    cdef readonly str __name__
    cdef readonly str __doc__

    def __init__(self, HostLanes lanes, uint16_t index, str name, str doc, Plan arguments,
                 Plan result, bind, *, bint native=False, element=None, double timeout=-1,
                 bint has_out=False):
        self.lanes = lanes
        self.index = index
        self.__name__ = name
        self.__doc__ = doc
        self.arguments = arguments
        self.result = result
        self.native = native
        self.wanted = arguments.wanted[0] if native and arguments.num == 1 else 0
        self.element = element
        self.bind = bind
        self.timeout = timeout
        self.has_out = has_out
        if native and arguments.num != 1:
            raise ValueError("a native function takes one argument")

    def __reduce__(self):
        raise TypeError("a trusted function's handle cannot be pickled or copied")

    def __repr__(self):
        return f"<trusted function {self.__doc__}>"

    def __call__(self, *args, **kwargs):
        cdef double deadline = -1
        cdef object out = None
        if kwargs:
            if self.has_out:
                out = kwargs.pop("out", None)
            args = self.bind(args, kwargs)
        elif PyTuple_Size(args) != self.arguments.num:
            args = self.bind(args, kwargs)
        if self.timeout >= 0:
            deadline = <double>_monotonic() + self.timeout
        self.lanes.check()
        if out is not None:
            check_out(out)
        if self.native:
            value = self.call_native(<object>PyTuple_GetItem(args, 0), deadline)
            if self.element is not None:
                value = native_array(value, self.element)
        else:
            value = self.call_python(args, deadline)
        if out is None:
            return value
        return fill_out(out, value)

    cdef object call_python(self, tuple args, double deadline):
        cdef Message m
        cdef int number
        message_init(&m)
        try:
            # All of the caller's code (buffers, __index__) runs here, before a lane is taken.
            self.arguments.put(&m, args)
            self.arguments.finish(&m)
            number = self.lanes.acquire(deadline)
            try:
                return self.lanes.exchange(number, <uint16_t>PYE_FRAME_CALL, self.index, m.segments,
                                           m.num_segments, deadline, 1, self.result)
            finally:
                self.lanes.release(number)
        finally:
            message_clear(&m)

    cdef object call_native(self, object value, double deadline):
        cdef Py_buffer view
        cdef pye_segment segment
        cdef int number
        if self.wanted:
            value = native_argument(value, self.wanted)
        elif not PyObject_CheckBuffer(value):
            raise argument_error("argument data", "bytes or a contiguous buffer", type_name(value))
        try:
            PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        except (BufferError, ValueError) as error:
            raise argument_error(
                "argument data", "contiguous bytes", str(error),
                "Use numpy.ascontiguousarray(...) on it.") from None
        try:
            segment.data = <const uint8_t *>view.buf
            segment.len = <size_t>view.len
            number = self.lanes.acquire(deadline)
            try:
                return self.lanes.exchange(number, <uint16_t>PYE_FRAME_CALL, self.index, &segment,
                                           1, deadline, 0, None)
            finally:
                self.lanes.release(number)
        finally:
            PyBuffer_Release(&view)


cdef object native_argument(object value, int wanted):
    """An array of the wanted element type, contiguous."""
    need_numpy()
    dtype = dtype_of_code[wanted]
    if not isinstance(value, np_ndarray) or value.dtype != dtype:
        raise argument_error(
            "argument data", f"a NumPy array of {dtype}", getattr(value, "dtype", type_name(value)),
            f"Convert it: numpy.asarray(..., dtype='{dtype}').")
    return np_contiguous(value)


cdef object native_array(bytes value, str element):
    import numpy
    if len(value) % numpy.dtype(element).itemsize:
        raise _errors.CallError(
            f"the enclave's answer of {len(value)} bytes is not whole elements of {element}")
    return numpy.frombuffer(bytearray(value), element)


cdef int check_out(object out) except -1:
    need_numpy()
    if not isinstance(out, np_ndarray):
        raise TypeError(f"out must be a NumPy array, not {type_name(out)}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    return 0


cdef object fill_out(object out, object value):
    if not isinstance(value, np_ndarray):
        raise TypeError(f"out is for functions that return an array, not {type_name(value)}")
    if value.dtype != out.dtype or value.shape != out.shape:
        raise argument_error(
            "out", f"{value.dtype} of shape {value.shape}", f"{out.dtype} of shape {out.shape}")
    out[...] = value
    return out


# ---- the worker's side -------------------------------------------------------------------------

cdef class NativeLibrary:
    """A shared object of trusted code. It stays loaded for the life of the process."""

    cdef void *handle
    cdef readonly str path

    def __cinit__(self, str path not None):
        encoded = path.encode()
        cdef const char *name = encoded
        with nogil:
            self.handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)
        if self.handle == NULL:
            raise _errors.ImageError(f"the native library cannot be loaded: {dlerror().decode()}")
        self.path = path

    def address(self, str name) -> int:
        """Address of ``pye_ecall_<name>``, or 0."""
        return <size_t>dlsym(self.handle, f"pye_ecall_{name}".encode())


cdef class FunctionTable:
    """
    The functions of an enclave by index: ``(address, function, arguments, result, missing,
    keywords)`` each; address 0 for Python functions; ``missing`` the defaults by position;
    ``keywords`` the names of the parameters given by keyword, which come last.
    """

    cdef readonly tuple entries
    cdef void **natives
    cdef uint32_t num

    def __cinit__(self, tuple entries not None):
        if len(entries) > 65536:
            raise ValueError("at most 65536 functions")
        self.entries = entries
        self.num = <uint32_t>len(entries)
        self.natives = <void **>calloc(len(entries) + 1, sizeof(void *))
        if self.natives == NULL:
            raise MemoryError()
        for i, entry in enumerate(entries):
            self.natives[i] = <void *><size_t>entry[0]

    def __dealloc__(self):
        free(self.natives)

    def __len__(self):
        return <Py_ssize_t>self.num


cdef enum:
    EVENT_LOOK = 1          # a slice of waiting is over
    EVENT_MESSAGE = 2       # a message for Python code, header in `header`
    EVENT_STATUS = 3        # a native function answered `native_status`
    EVENT_LIMIT = 4         # a message beyond the limit
    EVENT_BROKEN = 5
    EVENT_REPLY = 6         # the native reply is not yet taken


cdef class WorkerLane:
    """
    One lane, seen from inside.

    The buffers below are private: what the host sent is copied there before anything looks at it.
    """

    cdef Py_buffer memory
    cdef bint held
    cdef pye_lane *lane
    cdef uint8_t *in_raw
    cdef uint8_t *out_raw
    cdef uint8_t *in_data
    cdef uint8_t *out_data
    cdef size_t in_size
    cdef size_t out_size
    cdef size_t out_used
    cdef uint64_t limit
    cdef pye_lane_header header
    cdef pye_status native_status
    cdef pye_segment reply

    def __cinit__(self):
        self.held = False
        self.lane = NULL
        self.in_raw = NULL
        self.out_raw = NULL
        self.out_used = 0

    def __init__(self, memory, uint32_t lanes, uint32_t slot_size, uint32_t number,
                 uint64_t limit):
        if self.held:
            raise TypeError("WorkerLane is made once")
        if limit > <uint64_t>PY_SSIZE_T_MAX // 2:
            raise ValueError("the message limit is too large")
        PyObject_GetBuffer(memory, &self.memory, PyBUF_WRITABLE)
        self.held = True
        status = pye_lane_new(&self.lane, self.memory.buf, <size_t>self.memory.len, lanes,
                              slot_size, number, PYE_SIDE_WORKER, limit, &WAIT_OPS)
        if status != PYE_OK:
            fail(status, "ring")
        self.limit = limit
        self.in_size = slot_size
        self.out_size = <size_t>limit if limit > slot_size else slot_size
        self.in_raw = <uint8_t *>calloc(1, self.in_size + ALIGN)
        # Zero pages that nobody touched cost nothing: room for the longest answer.
        self.out_raw = <uint8_t *>calloc(1, self.out_size + ALIGN)
        if self.in_raw == NULL or self.out_raw == NULL:
            raise MemoryError()
        self.in_data = self.in_raw + (ALIGN - <size_t>self.in_raw % ALIGN) % ALIGN
        self.out_data = self.out_raw + (ALIGN - <size_t>self.out_raw % ALIGN) % ALIGN

    def __dealloc__(self):
        pye_lane_free(self.lane)
        if self.in_raw != NULL:
            pye_wipe(self.in_raw, self.in_size + ALIGN)
        if self.out_raw != NULL:
            pye_wipe(self.out_raw, self.out_used)
        free(self.in_raw)
        free(self.out_raw)
        if self.held:
            PyBuffer_Release(&self.memory)

    cdef int run(self, void **natives, uint32_t num) noexcept nogil:
        """Serve native functions and echoes until there is something for Python."""
        cdef pye_status status
        cdef uint32_t index
        cdef size_t length
        while True:
            status = pye_lane_wait(self.lane, &self.header, SLICE_MS)
            if status == PYE_E_LIMIT:
                return EVENT_LIMIT
            if status == PYE_E_TIMEOUT:
                return EVENT_LOOK
            if status != PYE_OK:
                return EVENT_BROKEN
            if self.header.total > self.in_size:
                return EVENT_MESSAGE
            status = pye_lane_read(self.lane, self.in_data, <size_t>self.header.total, SLICE_MS)
            if status != PYE_OK:  # one fragment: nothing to wait for
                return EVENT_BROKEN
            if self.header.kind == PYE_FRAME_PING:
                self.reply.data = self.in_data
                self.reply.len = <size_t>self.header.total
            elif self.header.kind == PYE_FRAME_CALL and self.header.index < num:
                # BND-08: a processor that guesses the branch above reads entry 0 at worst.
                index = pye_index_mask(self.header.index, num)
                if natives[index] == NULL:
                    return EVENT_MESSAGE
                if not self.native(natives[index], self.in_data, <size_t>self.header.total):
                    return EVENT_STATUS
            else:
                return EVENT_MESSAGE
            status = pye_lane_write(self.lane, <uint16_t>PYE_FRAME_RESULT, self.header.index,
                                    &self.reply, 1, SLICE_MS)
            if status == PYE_OK or status == PYE_E_CLOSED:
                self.forget()
                continue
            return EVENT_REPLY if status == PYE_E_TIMEOUT else EVENT_BROKEN

    cdef bint native(self, void *function, const uint8_t *data, size_t length) noexcept nogil:
        cdef size_t out_len = 0
        self.native_status = pye_native_call(function, self.out_data, self.out_size, &out_len,
                                             data, length)
        self.out_used = out_len
        self.reply.data = self.out_data
        self.reply.len = out_len
        return self.native_status == PYE_OK

    cdef void forget(self) noexcept nogil:
        """Zero the last native answer, so that no later one can contain it (BND-07)."""
        if self.out_used:
            memset(self.out_data, 0, self.out_used)
            self.out_used = 0

    cdef int poison(self) except -1:
        cdef const char *check = pye_lane_broken(self.lane)
        what = check.decode() if check != NULL else "state"
        raise _errors.EnclavePoisonedError(f"the host broke the call protocol: {what}")

    cdef bint send(self, uint16_t kind, pye_segment *segments, size_t num, object idle) except -1:
        """Send an answer; False if `idle` wants to end."""
        cdef pye_status status = PYE_E_TIMEOUT
        while True:
            with nogil:
                status = pye_lane_write(self.lane, kind, self.header.index, segments, num,
                                        SLICE_MS)
            if status == PYE_OK or status == PYE_E_CLOSED:
                return True
            if status != PYE_E_TIMEOUT:
                self.poison()
            if not idle():
                return False

    cdef bint send_bytes(self, uint16_t kind, bytes data, object idle) except -1:
        cdef pye_segment segment
        segment.data = <const uint8_t *><char *>data
        segment.len = <size_t>len(data)
        return self.send(kind, &segment, 1, idle)

    def serve(self, FunctionTable table not None, attest, describe, idle) -> None:
        """
        Serve until ``idle()``, called at least every 100 ms of waiting, returns False.

        ``attest(nonce)`` returns evidence; ``describe(exception, stage)`` the bytes of an error
        frame, where stage is "request" (the call was not made), "native" or "function".
        EnclavePoisonedError: the host broke the protocol, or trusted code found a broken MAC.
        """
        cdef int event
        cdef void **natives = table.natives
        cdef uint32_t num = table.num
        cdef bint more
        while True:
            with nogil:
                event = self.run(natives, num)
            if event == EVENT_LOOK:
                PyErr_CheckSignals()
                if not idle():
                    return
            elif event == EVENT_MESSAGE:
                if not self.answer(table, attest, describe, idle):
                    return
            elif event == EVENT_STATUS:
                if not self.send_bytes(<uint16_t>PYE_FRAME_ERROR,
                                       describe(self.native_error(), "native"), idle):
                    return
            elif event == EVENT_REPLY:
                if not idle():
                    return
                more = self.send(<uint16_t>PYE_FRAME_RESULT, &self.reply, 1, idle)
                self.forget()
                if not more:
                    return
            elif event == EVENT_LIMIT:
                error = _errors.ArgumentError(
                    "the message is too long", expected=f"at most {self.limit} bytes",
                    found=self.header.total, advice="Raise the image's message_limit.")
                if not self.send_bytes(<uint16_t>PYE_FRAME_ERROR, describe(error, "request"), idle):
                    return
            else:
                self.poison()

    cdef object native_error(self):
        if self.native_status == PYE_E_ARGUMENT:
            return _errors.ArgumentError("the native function refuses its input")
        if self.native_status == PYE_E_LENGTH:
            return _errors.ArgumentError(
                "the native function refuses a length", expected=f"an answer of at most {self.out_size}")
        return _errors.EcallError(
            type=f"status {self.native_status}")

    cdef bint answer(self, FunctionTable table, object attest, object describe,
                     object idle) except -1:
        """Handle the message that `header` announces; False if `idle` wants to end."""
        cdef Message m
        cdef pye_status status = PYE_OK
        cdef size_t total = <size_t>self.header.total
        cdef const uint8_t *data = self.in_data
        cdef uint8_t *large
        cdef uint32_t index
        cdef Plan plan
        cdef object owner = None
        cdef str stage = "request"
        if total > self.in_size:
            owner = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>total)
            large = <uint8_t *>PyByteArray_AsString(owner)
            data = large
            while True:
                with nogil:
                    status = pye_lane_read(self.lane, large, total, SLICE_MS)
                if status != PYE_E_TIMEOUT:
                    break
                if not idle():
                    return False
            if status == PYE_E_CLOSED:
                return True
            if status != PYE_OK:
                self.poison()
        message_init(&m)
        try:
            try:
                if self.header.kind == PYE_FRAME_CALL:
                    if self.header.index >= table.num:
                        raise _errors.UnknownFunctionError(
                            "no function has this number", expected=f"below {table.num}",
                            found=self.header.index)
                    index = pye_index_mask(self.header.index, table.num)
                    if table.natives[index] != NULL:  # only messages longer than a slot
                        with nogil:
                            self.native(table.natives[index], data, total)
                        stage = "native"
                        if self.native_status != PYE_OK:
                            raise self.native_error()
                        m.segments[0] = self.reply
                        m.num_segments = 1
                    else:
                        _, function, arguments, result, missing, keywords = table.entries[index]
                        plan = arguments
                        if plan.arrays and owner is None:
                            owner = PyByteArray_FromStringAndSize(
                                <char *>data, <Py_ssize_t>total)
                            data = <const uint8_t *>PyByteArray_AsString(owner)
                        values = plan.get(data, total, owner)
                        owner = None
                        if plan.optional:
                            values = fill_missing(values, missing)
                        stage = "function"
                        if keywords:
                            count = len(values) - len(keywords)
                            value = function(
                                *values[:count], **dict(zip(keywords, values[count:])))
                        else:
                            value = function(*values)
                        plan = result
                        try:
                            plan.put(&m, (value,))
                        except _errors.ArgumentError as error:
                            raise TypeError(str(error)) from None
                        plan.finish(&m)
                        if m.total > self.limit:
                            raise _errors.ArgumentError(
                                "the result is too long", expected=f"at most {self.limit} bytes",
                                found=m.total, advice="Raise the image's message_limit.")
                elif self.header.kind == PYE_FRAME_ATTEST:
                    if total > 1024:
                        raise _errors.ArgumentError(
                            "the nonce is too long", expected="at most 1024 bytes", found=total)
                    stage = "function"
                    answer = attest(PyBytes_FromStringAndSize(<char *>data, <Py_ssize_t>total))
                    m.segments[0].data = <const uint8_t *><char *>answer
                    m.segments[0].len = <size_t>len(answer)
                    m.num_segments = 1
                else:  # a long PING
                    m.segments[0].data = data
                    m.segments[0].len = total
                    m.num_segments = 1
            except _errors.EnclavePoisonedError:
                raise
            except BaseException as error:
                message_clear(&m)
                if isinstance(error, KeyboardInterrupt) and stage == "request":
                    raise
                return self.send_bytes(<uint16_t>PYE_FRAME_ERROR, describe(error, stage), idle)
            return self.send(<uint16_t>PYE_FRAME_RESULT, m.segments, m.num_segments, idle)
        finally:
            message_clear(&m)
            self.forget()


cdef tuple fill_missing(tuple values, dict missing):
    filled = list(values)
    for i in range(len(filled)):
        if filled[i] is MISSING:
            if i not in missing:
                raise _errors.ArgumentError(f"argument {i + 1} is missing")
            filled[i] = missing[i]
    return tuple(filled)


# ---- measuring ---------------------------------------------------------------------------------

def ring_round_trips(HostLanes lanes not None, uint16_t kind, uint16_t index, data,
                     uint32_t count) -> float:
    """
    Make `count` calls on lane 0 from C and return the seconds taken: the ring without Python.

    The same lane functions as a call from Python; nothing is decoded, the answer is copied out.
    """
    cdef Py_buffer view
    cdef pye_segment segment
    cdef pye_lane_header header
    cdef pye_lane *lane
    cdef pye_status status = PYE_OK
    cdef uint8_t[SMALL] answer
    cdef uint32_t i
    lanes.check()
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if not PYE_SWAP(&lanes.states[0], FREE, BUSY):
            raise _errors.BusyError("lane 0 is in use")
        lane = lanes.lanes[0]
        segment.data = <const uint8_t *>view.buf
        segment.len = <size_t>view.len
        start = _monotonic()
        with nogil:
            for i in range(count):
                status = pye_lane_write(lane, kind, index, &segment, 1, SLICE_MS)
                if status != PYE_OK:
                    break
                status = pye_lane_wait(lane, &header, 1000)
                if status != PYE_OK:
                    break
                if header.total > SMALL:
                    status = PYE_E_LENGTH
                    break
                status = pye_lane_read(lane, answer, <size_t>header.total, SLICE_MS)
                if status != PYE_OK:
                    break
        seconds = _monotonic() - start
        lanes.release(0)
        if status != PYE_OK:
            lanes.give_up(lane, status)
        return seconds
    finally:
        PyBuffer_Release(&view)


def raw_spin(memory, bint first, uint32_t count) -> float:
    """
    Exchange one line with a peer `count` times and return the seconds: how near two cores are.

    Both sides map the same zero page; one is `first`. For benchmarks only.
    """
    cdef Py_buffer view
    cdef int *mine
    cdef int *theirs
    cdef uint32_t i
    cdef uint32_t low
    cdef uint32_t high
    cdef uint64_t spins
    PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
    try:
        if view.len < 256:
            raise ValueError("256 bytes wanted")
        mine = <int *>view.buf
        theirs = <int *>(<uint8_t *>view.buf + 128)
        if not first:
            mine, theirs = theirs, mine
        start = 0.0
        for part in range(2):  # the first exchange waits until the other side is there
            low = 1 if part == 0 else 2
            high = 1 if part == 0 else count
            start = _monotonic()
            with nogil:
                for i in range(low, high + 1):
                    if first:
                        PYE_SET(mine, <int>i)
                    spins = 0
                    while PYE_GET(theirs) != <int>i and spins < 1000000000:
                        spins += 1
                    if not first:
                        PYE_SET(mine, <int>i)
        return _monotonic() - start
    finally:
        PyBuffer_Release(&view)
