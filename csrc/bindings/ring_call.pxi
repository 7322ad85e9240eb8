# Trusted functions as callables of the host.

cdef extern from "host_call.h":
    ctypedef object (*host_call_function)(object call, PyObject *const *args, Py_ssize_t nargs,
                                          PyObject *kwnames)
    object host_call_type(host_call_function function)
    object host_call_new(object type, object call)


@cython.final
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
    cdef double kill_after
    cdef str note
    cdef bint has_out
    cdef bint placed        # its calls say where in shared memory the result goes
    cdef bint plain         # scalars, text and bytes go and come
    cdef readonly bint streams
    cdef readonly str __name__
    cdef readonly str __doc__

    def __init__(self, HostLanes lanes, uint16_t index, str name, str doc, Plan arguments,
                 Plan result, bind, *, bint native=False, element=None, double timeout=-1,
                 double kill_after=-1, bint has_out=False, bint streams=False,
                 str note=None):
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
        self.kill_after = kill_after
        self.note = note
        self.has_out = has_out
        self.streams = streams
        self.placed = lanes.shared_size and not native and has_place(result, streams)
        if native and arguments.num != 1:
            raise ValueError("a native function takes one argument")
        self.plain = not native and not streams and arguments.plain and result.plain

    def __reduce__(self):
        raise TypeError("a trusted function's handle cannot be pickled or copied")

    def __repr__(self):
        return f"<trusted function {self.__doc__}>"

    def quick(self):
        """The same function as an object that is called without a tuple of its arguments."""
        return host_call_new(quick_type, self)

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
            value = self.call_python(args, deadline, out)
        if out is None or value is out:
            return value
        return fill_out(out, value)

    cdef object call_python(self, tuple args, double deadline, object out):
        cdef Message m
        cdef bint fits = False
        message_init(&m)
        try:
            # All of the caller's code (buffers, __index__) runs here, before a lane is taken.
            self.prepare(&m, args, out)
            fits = True
            return self.cross(&m, deadline, out)
        finally:
            message_clear(&m)
            if not fits:
                pye_stats_event(self.lanes.counts, PYE_STATS_ARGUMENT)

    cdef object call_plain(self, PyObject *const *args, double deadline):
        """As call_python, without a tuple of the arguments."""
        cdef Message m
        cdef bint fits = False
        message_init(&m)
        try:
            self.arguments.put_plain(&m, args)
            fits = True
            return self.cross(&m, deadline, None)
        finally:
            message_clear(&m)
            if not fits:
                pye_stats_event(self.lanes.counts, PYE_STATS_ARGUMENT)

    cdef object cross(self, Message *m, double deadline, object out):
        """Send a call that is encoded, and return its answer or its stream."""
        cdef int number
        if PYE_GET(&self.lanes.handlers):
            number = self.lanes.nested(deadline)
            if number >= 0:
                if self.streams:
                    return self.open_stream(number, True, m, deadline)
                pin = self.lanes.pin(number, m, out)
                value = self.lanes.exchange(
                    number, <uint16_t>PYE_FRAME_CALL, self.index, m.segments, m.num_segments,
                    deadline, 1, self.result, out, &m.shared)
                self.lanes.unpin(number, pin)
                return value
        number = self.lanes.acquire(deadline)
        if self.note is not None:
            self.lanes.show(number, self.note)
        if self.streams:
            return self.open_stream(number, False, m, deadline)
        try:
            if not self.plain:
                self.lanes.pin(number, m, out)
            return self.lanes.exchange(number, <uint16_t>PYE_FRAME_CALL, self.index, m.segments,
                                       m.num_segments, deadline, 1, self.result, out, &m.shared)
        finally:
            self.lanes.release(number, self.kill_after)

    cdef int prepare(self, Message *m, tuple args, object out) except -1:
        """Encode a call. What lies in shared memory is named only, `out` too."""
        if self.lanes.shared_size:
            shared_init(&m.shared, self.lanes.shared_data, self.lanes.shared_size, self.placed)
            if self.placed and out is not None:
                place_result(self.lanes, self.result, out, &m.shared)
        self.arguments.put(m, args)
        self.arguments.finish(m)
        return 0

    cdef object open_stream(self, int number, bint nested, Message *m, double deadline):
        """Send the call of a function that streams; what it gives is asked for later."""
        stream = HostStream(self.lanes, number, nested, self.index, self.result, self.__doc__,
                            self.timeout, self.kill_after)
        try:
            self.lanes.pin(number, m, None)
            pye_stats_time(self.lanes.counts, <uint32_t>number, self.index)
            pye_stats_begin(self.lanes.counts, <uint32_t>number, self.index, m.segments,
                            m.num_segments)
            self.lanes.send(self.lanes.lanes[number], <uint16_t>PYE_FRAME_CALL, self.index,
                            m.segments, m.num_segments, deadline)
        except BaseException:
            (<HostStream>stream).finish()
            raise
        return stream

    cdef object call_native(self, object value, double deadline):
        cdef Py_buffer view
        cdef pye_segment segment
        cdef int number
        if self.wanted:
            value = native_argument(value, self.wanted)
        elif not PyObject_CheckBuffer(value):
            pye_stats_event(self.lanes.counts, PYE_STATS_ARGUMENT)
            raise argument_error("argument data", "bytes or a contiguous buffer", type_name(value))
        try:
            PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        except (BufferError, ValueError) as error:
            pye_stats_event(self.lanes.counts, PYE_STATS_ARGUMENT)
            raise argument_error(
                "argument data", "contiguous bytes", str(error),
                "Use numpy.ascontiguousarray(...) on it.") from None
        try:
            segment.data = <const uint8_t *>view.buf
            segment.len = <size_t>view.len
            if PYE_GET(&self.lanes.handlers):
                number = self.lanes.nested(deadline)
                if number >= 0:
                    return self.lanes.exchange(
                        number, <uint16_t>PYE_FRAME_CALL, self.index, &segment, 1, deadline, 0,
                        None)
            number = self.lanes.acquire(deadline)
            if self.note is not None:
                self.lanes.show(number, self.note)
            try:
                return self.lanes.exchange(number, <uint16_t>PYE_FRAME_CALL, self.index, &segment,
                                           1, deadline, 0, None)
            finally:
                self.lanes.release(number, self.kill_after)
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


cdef object call_quickly(object of, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames):
    """What the type of `HostCall.quick` calls: `nargs` arguments by place, the others by name."""
    cdef HostCall call = <HostCall>of
    cdef double deadline = -1
    if kwnames != NULL or nargs != call.arguments.num or call.element is not None or not (
            call.plain or call.native):
        positional = tuple([<object>args[i] for i in range(nargs)])
        if kwnames == NULL:
            return call(*positional)
        names = <tuple>kwnames
        return call(*positional, **{
            name: <object>args[nargs + i] for i, name in enumerate(names)})
    if call.timeout >= 0:
        deadline = <double>_monotonic() + call.timeout
    call.lanes.check()
    if call.native:
        return call.call_native(<object>args[0], deadline)
    return call.call_plain(args, deadline)


cdef object quick_type = host_call_type(call_quickly)
