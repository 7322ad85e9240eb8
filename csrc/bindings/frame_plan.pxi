# Plans: how the values of one signature cross, decided once.

@cython.final
cdef class Missing:
    """The value of a parameter that the caller left out."""


MISSING = Missing()
# Names of the module are looked up each time; this is the same object at once.
cdef object missing_mark = MISSING


@cython.final
cdef class Plan:
    """How the values of one signature cross: a code for each, decided once.

    ``codes``: n None, b bool, i int, f float, s str, y bytes, A array, D what the signature
    describes (records, Arrow tables), M MessagePack.
    ``details``: for A the element type's code (0 any); for D an object with ``item_size`` (bytes),
    ``prepare(value, name)`` and ``restore(data, shape)``; for M a pair (encode, decode).
    ``optional``: values may be left out (MISSING).
    """

    cdef bytes codes_object
    cdef const char *codes
    cdef int num
    cdef bint arrays
    cdef bint optional
    cdef bint plain         # nbifsy only, and none left out: neither arrays nor any class's code
    cdef tuple names
    cdef tuple details
    cdef int[256] wanted

    def __init__(self, bytes codes, tuple names, tuple details, bint optional=False):
        if len(codes) > 255 or len(names) != len(codes) or len(details) != len(codes):
            raise ValueError("codes, names and details must be of one length, at most 255")
        if optional and len(codes) > MAX_OPTIONAL:
            raise ValueError(f"at most {MAX_OPTIONAL} parameters where some may be left out")
        if codes.count(b"A") + codes.count(b"D") > MAX_ARRAYS:
            raise ValueError(f"at most {MAX_ARRAYS} arrays")
        self.codes_object = codes
        self.codes = <const char *>codes
        self.num = <int>len(codes)
        self.arrays = b"A" in codes or b"D" in codes
        self.optional = optional
        self.plain = not self.arrays and not optional and b"M" not in codes
        self.names = names
        self.details = details
        for i in range(self.num):
            if codes[i] not in b"nbifsyADM":
                raise ValueError(f"unknown code {codes[i:i + 1]!r}")
            if codes[i:i + 1] == b"D" and not 0 < details[i].item_size <= MAX_ITEM_SIZE:
                raise ValueError(f"an element has 1 to {MAX_ITEM_SIZE} bytes")
            self.wanted[i] = details[i] if codes[i:i + 1] == b"A" else 0
            if not 0 <= self.wanted[i] < NUM_TYPES:
                raise ValueError("unknown element type")

    cdef int put(self, Message *m, tuple values) except -1:
        """Encode `values`; on failure the message is cleared by the caller."""
        cdef int i
        cdef uint32_t present = 0
        cdef uint32_t head
        cdef size_t where = 0
        cdef uint8_t *at
        if PyTuple_Size(values) != self.num:
            raise TypeError(f"{self.num} values wanted, {len(values)} given")
        if self.arrays:
            room(m, 4)
        if m.shared.placed and not m.fills:
            at = room(m, 16)
            memcpy(at, &m.shared.place, 8)
            memcpy(at + 8, &m.shared.room, 8)
        if self.optional:
            where = m.length
            room(m, 4)
        for i in range(self.num):
            value = <object>PyTuple_GetItem(values, i)
            if value is missing_mark:
                if not self.optional:
                    raise TypeError(f"{self.names[i]} is missing")
                continue
            present |= (<uint32_t>1) << (i & 31)
            self.put_value(m, i, value)
        if self.optional:
            memcpy(m.data + where, &present, 4)
        if self.arrays:
            if m.length > 0xffffffff:
                raise argument_error(
                    "the arguments", "less than 4 GiB beside the arrays", m.length)
            head = <uint32_t>m.length
            memcpy(m.data, &head, 4)
        return 0

    cdef int put_plain(self, Message *m, PyObject *const *values) except -1:
        """As `put`, of a plain plan: as many values as it has."""
        cdef int i
        for i in range(self.num):
            if values[i] == <PyObject *>missing_mark:
                raise TypeError(f"{self.names[i]} is missing")
            self.put_value(m, i, <object>values[i])
        self.finish(m)
        return 0

    cdef int put_value(self, Message *m, int i, object value) except -1:
        cdef char code = self.codes[i]
        cdef Py_ssize_t size
        cdef const char *text
        cdef Py_buffer view
        cdef uint8_t *at
        if put_exact(m, code, value):
            return 0
        if code == c"i":
            put_int(m, value, self.names[i])
        elif code == c"f":
            put_float(m, value, self.names[i])
        elif code == c"s":
            if not isinstance(value, str):
                raise argument_error(self.names[i], "str", type_name(value))
            try:
                text = PyUnicode_AsUTF8AndSize(value, &size)
            except UnicodeEncodeError:
                raise argument_error(
                    self.names[i], "text", "a lone surrogate",
                    "Send what is not text as bytes.") from None
            put_bytes(m, text, <size_t>size)
        elif code == c"y":
            if not PyObject_CheckBuffer(value):
                raise argument_error(self.names[i], "bytes", type_name(value))
            try:
                PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
            except (BufferError, ValueError) as error:
                raise argument_error(
                    self.names[i], "contiguous bytes", str(error)) from None
            try:
                put_bytes(m, view.buf, <size_t>view.len)
            finally:
                PyBuffer_Release(&view)
        elif code == c"A":
            put_array(m, value, self.wanted[i], self.names[i])
        elif code == c"D":
            put_described(m, value, self.details[i], self.names[i])
        elif code == c"b":
            if value is not True and value is not False:
                raise argument_error(self.names[i], "bool", type_name(value))
            at = room(m, 1)
            at[0] = 1 if value is True else 0
        elif code == c"n":
            if value is not None:
                raise argument_error(self.names[i], "None", type_name(value))
        else:
            try:
                packed = (<tuple>self.details[i])[0](value)
            except _errors.ArgumentError:
                raise
            except OverflowError:
                raise argument_error(
                    self.names[i],
                    "ints from -2**63 to 2**64-1, and times of the years 1 to 9999 in UTC",
                    "one beyond", "Send larger numbers as bytes or str.") from None
            except Exception as error:
                raise argument_error(self.names[i], "a value that crosses", error) from None
            if pye_msgpack_check(<const uint8_t *><char *>packed, <size_t>len(packed),
                                 MAX_DEPTH) != PYE_OK:
                raise argument_error(
                    self.names[i],
                    f"at most {MAX_DEPTH} levels of nesting and {MAX_ITEMS} values", "more",
                    "Send many numbers as a NumPy array.")
            put_bytes(m, <char *>packed, <size_t>len(packed))
        return 0

    cdef void finish(self, Message *m) noexcept:
        """Lay out head, padding and arrays as segments."""
        cdef int i
        cdef size_t pad
        m.segments[0].data = m.data
        m.segments[0].len = m.length
        m.num_segments = 1
        m.total = m.length
        for i in range(m.num_views):
            if (m.far >> i) & 1:
                continue
            pad = <size_t>((ALIGN - m.total % ALIGN) % ALIGN)
            m.segments[m.num_segments].data = ZEROES
            m.segments[m.num_segments].len = pad
            m.segments[m.num_segments + 1].data = <const uint8_t *>m.views[i].buf
            m.segments[m.num_segments + 1].len = <size_t>m.views[i].len
            m.num_segments += 2
            m.total += pad + <size_t>m.views[i].len

    cdef tuple get(self, const uint8_t *data, size_t length, object owner, Shared *shared=NULL,
                   Scratch scratch=None):
        """
        Decode private bytes. `owner` is the bytearray that holds them, where arrays do.

        `shared` says what the frame may name of shared memory; arrays there are copied to `scratch`.
        """
        cdef Reader r
        cdef int i
        cdef char code
        cdef uint32_t present = 0xffffffff
        cdef uint32_t head
        cdef size_t size
        cdef const uint8_t *at
        cdef PyObject *value
        cdef pye_status status
        if self.plain and (shared == NULL or not shared.placed):
            return self.get_tuple(data, length)
        reader_init(&r, data, length)
        r.shared = shared
        r.scratch = <PyObject *>scratch
        if self.arrays:
            memcpy(&head, take(&r, 4), 4)
            if head > length or head < r.at:
                raise bad_frame("its head is longer than it")
            r.length = head
            r.tail = head
        if shared != NULL and shared.placed:
            at = take(&r, 16)
            memcpy(&shared.place, at, 8)
            memcpy(&shared.room, at + 8, 8)
            if not is_within(shared.place, shared.room, shared.size) or (
                    shared.room == 0 and shared.place):
                raise bad_frame("the place of its result is not in the shared memory")
        if self.optional:
            memcpy(&present, take(&r, 4), 4)
            if self.num < 32 and present >> self.num:
                raise bad_frame("it has more values than the signature")
        values = []
        for i in range(self.num):
            if not (present >> (i & 31)) & 1 and self.optional:
                values.append(missing_mark)
                continue
            code = self.codes[i]
            if code == c"A":
                values.append(get_array(&r, self.wanted[i], owner))
            elif code == c"D":
                values.append(get_described(&r, self.details[i], owner))
            elif code != c"M":
                value = get_plain(&r, code)
                try:
                    values.append(<object>value)
                finally:
                    Py_DECREF(value)
            else:
                at = take_bytes(&r, &size)
                status = pye_msgpack_check(at, size, MAX_DEPTH)
                if status == PYE_E_LIMIT:
                    raise bad_frame(f"{self.names[i]} nests deeper than {MAX_DEPTH}, or has more "
                                    f"than {MAX_ITEMS} values")
                if status != PYE_OK:
                    raise bad_frame(f"{self.names[i]} is not one MessagePack value")
                packed = PyBytes_FromStringAndSize(<char *>at, <Py_ssize_t>size)
                try:
                    values.append((<tuple>self.details[i])[1](packed))
                except _errors.ArgumentError:
                    raise
                except Exception as error:
                    # What a class's own check says may hold secrets; what msgspec says is types.
                    said = "its class refuses the value" if error.__cause__ else str(error)
                    raise _errors.ArgumentError(
                        f"{self.names[i]} does not fit its type: {said}") from None
        if r.at != r.length or (r.tail != r.total if self.arrays else False):
            raise bad_frame("bytes are left over")
        return tuple(values)

    cdef tuple get_tuple(self, const uint8_t *data, size_t length):
        """As `get`, for a plain plan: nobody's code runs while the tuple is being filled."""
        cdef Reader r
        cdef int i
        reader_init(&r, data, length)
        values = new_tuple(self.num)
        for i in range(self.num):
            give_item(values, i, get_plain(&r, self.codes[i]))
        if r.at != r.length:
            raise bad_frame("bytes are left over")
        return <tuple>values

    cdef object get_one(self, const uint8_t *data, size_t length, object owner):
        """Decode a frame of one value."""
        cdef Reader r
        cdef PyObject *value
        if not self.plain or self.num != 1:
            return (<tuple>self.get(data, length, owner))[0]
        reader_init(&r, data, length)
        value = get_plain(&r, self.codes[0])
        if r.at != r.length:
            Py_DECREF(value)
            raise bad_frame("bytes are left over")
        result = <object>value
        Py_DECREF(value)
        return result

    def encode(self, tuple values) -> bytes:
        """Return the frame of `values` in one piece (tests, and what is not hot)."""
        cdef Message m
        cdef size_t i
        message_init(&m)
        try:
            self.put(&m, values)
            self.finish(&m)
            return b"".join([
                PyBytes_FromStringAndSize(<char *>m.segments[i].data, <Py_ssize_t>m.segments[i].len)
                for i in range(m.num_segments)])
        finally:
            message_clear(&m)

    def decode(self, data) -> tuple:
        """Return the values in the frame `data`. ArgumentError: it is not such a frame."""
        owner = bytearray(data)
        return self.get(<const uint8_t *>PyByteArray_AsString(owner),
                        <size_t>PyByteArray_Size(owner), owner)


def msgpack_check(data, uint32_t max_depth=MAX_DEPTH) -> bool:
    """Whether `data` is exactly one MessagePack value, not nested deeper than `max_depth`."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return pye_msgpack_check(<const uint8_t *>view.buf, <size_t>view.len, max_depth) == PYE_OK
    finally:
        PyBuffer_Release(&view)
