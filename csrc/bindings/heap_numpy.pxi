# NumPy's arrays in a heap: its allocator protocol (NEP 49), without NumPy's headers.
#
# We build with the limited API and without NumPy. Its C API is a capsule with an array of pointers
# whose order is part of NumPy's ABI (numpy/__multiarray_api.h): 0 is PyArray_GetNDArrayCVersion,
# 211 PyArray_GetNDArrayCFeatureVersion, 304 PyDataMem_SetHandler, 305 PyDataMem_GetHandler. The
# last two are there from feature version 0xf (NumPy 1.22) on, in NumPy 1 and 2 alike; the ABI
# version is looked at before any other pointer is used.
cdef extern from *:
    """
    #include <sys/mman.h>

    /* numpy/ndarraytypes.h: PyDataMemAllocator and PyDataMem_Handler, version 1. */
    typedef struct {
        char name[127];
        uint8_t version;
        struct {
            void *ctx;
            void *(*malloc)(void *ctx, size_t size);
            void *(*calloc)(void *ctx, size_t nelem, size_t elsize);
            void *(*realloc)(void *ctx, void *ptr, size_t new_size);
            void (*free)(void *ctx, void *ptr, size_t size);
        } allocator;
    } arena_numpy;

    /* The ranges of one heap. NumPy calls with the GIL or without. */
    typedef struct {
        pye_heap *heap;
        uint8_t *base;
        pye_extents *extents;
        size_t size; /* of the metadata */
        pthread_mutex_t lock;
        uint64_t refused; /* allocations for which there was no room */
        int closed;
    } arena;

    static int arena_usable(const arena *a)
    {
        uint64_t page;
        int32_t error;
        return pye_heap_live(a->heap) && !__atomic_load_n(&a->closed, __ATOMIC_RELAXED) &&
               pye_heap_poisoned(a->heap, &page, &error) == PYE_OK;
    }

    /* Memory of the heap is never touched with the lock held: it may fault. */
    static void *arena_malloc(void *ctx, size_t size)
    {
        arena *a = ctx;
        uint64_t offset, given;
        pye_status rc;
        if (!arena_usable(a)) {
            return NULL;
        }
        pthread_mutex_lock(&a->lock);
        rc = pye_extents_take(a->extents, &offset, &given, size == 0 ? 1 : size);
        a->refused += rc != PYE_OK;
        pthread_mutex_unlock(&a->lock);
        return rc == PYE_OK ? a->base + offset : NULL;
    }

    static void *arena_calloc(void *ctx, size_t nelem, size_t elsize)
    {
        size_t size;
        void *data;
        if (__builtin_mul_overflow(nelem, elsize, &size)) {
            return NULL;
        }
        data = arena_malloc(ctx, size);
        if (data != NULL && size <= PYE_EXTENT_SMALL) {
            memset(data, 0, size); /* whole pages are zeros already */
        }
        return data;
    }

    /* Pages that became free are emptied before anyone can take them. */
    static void arena_settle(arena *a, const pye_extent *freed)
    {
        pye_status rc = PYE_OK;
        if (freed->length == 0) {
            return;
        }
        if (pye_heap_discard(a->heap, freed->offset / 4096, freed->length / 4096) != PYE_OK) {
            return; /* the heap has ended: they stay nobody's */
        }
        pthread_mutex_lock(&a->lock);
        rc = pye_extents_settle(a->extents, freed);
        pthread_mutex_unlock(&a->lock);
        (void)rc;
    }

    static void arena_free(void *ctx, void *data, size_t size)
    {
        arena *a = ctx;
        pye_extent freed = {0, 0};
        pye_status rc;
        (void)size; /* what NumPy says; the extents know better */
        if (data == NULL || !pye_heap_live(a->heap)) {
            return;
        }
        pthread_mutex_lock(&a->lock);
        rc = pye_extents_give(a->extents, &freed, (uint64_t)((uint8_t *)data - a->base));
        pthread_mutex_unlock(&a->lock);
        if (rc == PYE_OK) {
            arena_settle(a, &freed);
        }
    }

    static void *arena_realloc(void *ctx, void *data, size_t size)
    {
        arena *a = ctx;
        uint64_t given, old;
        pye_extent freed;
        pye_status rc;
        void *moved;
        if (data == NULL) {
            return arena_malloc(ctx, size);
        }
        if (!arena_usable(a)) {
            return NULL;
        }
        pthread_mutex_lock(&a->lock);
        rc = pye_extents_find(a->extents, &old, (uint64_t)((uint8_t *)data - a->base));
        if (rc == PYE_OK) {
            rc = pye_extents_resize(a->extents, &given, &freed,
                                    (uint64_t)((uint8_t *)data - a->base), size == 0 ? 1 : size);
        }
        pthread_mutex_unlock(&a->lock);
        if (rc == PYE_OK) {
            arena_settle(a, &freed);
            return data;
        }
        moved = rc == PYE_E_LIMIT ? arena_malloc(ctx, size) : NULL;
        if (moved != NULL) {
            memcpy(moved, data, old < size ? old : size);
            arena_free(ctx, data, 0);
        }
        return moved;
    }

    static arena *arena_new(pye_heap *heap, uint64_t num_pages)
    {
        arena *a = PyMem_Malloc(sizeof(arena));
        void *memory;
        if (a == NULL) {
            return NULL;
        }
        memset(a, 0, sizeof(*a));
        a->heap = heap;
        a->base = pye_heap_base(heap);
        a->size = pye_extents_size(num_pages);
        memory = a->size == 0 ? MAP_FAILED
                              : mmap(NULL, a->size, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || pthread_mutex_init(&a->lock, NULL) != 0) {
            if (memory != MAP_FAILED) {
                munmap(memory, a->size);
            }
            PyMem_Free(a);
            return NULL;
        }
        a->extents = memory;
        if (pye_extents_init(a->extents, num_pages) != PYE_OK) {
            munmap(memory, a->size);
            PyMem_Free(a);
            return NULL;
        }
        return a;
    }

    static void arena_drop(arena *a)
    {
        if (a != NULL) {
            munmap(a->extents, a->size);
            PyMem_Free(a);
        }
    }

    static void arena_figures(arena *a, uint64_t *taken, uint64_t *largest, uint64_t *refused)
    {
        pthread_mutex_lock(&a->lock);
        *taken = pye_extents_taken(a->extents);
        *largest = pye_extents_largest(a->extents);
        *refused = a->refused;
        pthread_mutex_unlock(&a->lock);
    }

    static void arena_capsule_drop(PyObject *capsule)
    {
        arena_numpy *handler = PyCapsule_GetPointer(capsule, "mem_handler");
        PyObject *owner = PyCapsule_GetContext(capsule);
        PyMem_Free(handler);
        Py_XDECREF(owner);
    }

    /* A capsule that NumPy takes as a handler. Each array that it makes keeps the capsule, which
     * keeps `owner`, and so the heap. */
    static PyObject *arena_capsule(arena *a, PyObject *owner)
    {
        PyObject *capsule;
        arena_numpy *handler = PyMem_Malloc(sizeof(arena_numpy));
        if (handler == NULL) {
            return PyErr_NoMemory();
        }
        memset(handler, 0, sizeof(*handler));
        strcpy(handler->name, "pyenclave sealed heap");
        handler->version = 1;
        handler->allocator.ctx = a;
        handler->allocator.malloc = arena_malloc;
        handler->allocator.calloc = arena_calloc;
        handler->allocator.realloc = arena_realloc;
        handler->allocator.free = arena_free;
        capsule = PyCapsule_New(handler, "mem_handler", arena_capsule_drop);
        if (capsule == NULL || PyCapsule_SetContext(capsule, owner) != 0) {
            if (capsule == NULL) {
                PyMem_Free(handler);
            }
            Py_XDECREF(capsule);
            return NULL;
        }
        Py_INCREF(owner);
        return capsule;
    }

    static PyObject *numpy_call_set(void **api, PyObject *handler)
    {
        return ((PyObject *(*)(PyObject *))api[304])(handler == Py_None ? NULL : handler);
    }

    static int numpy_is_known(void **api)
    {
        const unsigned abi = ((unsigned (*)(void))api[0])();
        return (abi == 0x01000009 || abi == 0x02000000) &&
               ((unsigned (*)(void))api[211])() >= 0xf;
    }
    """
    ctypedef struct arena:
        int closed
    arena *arena_new(pye_heap *heap, uint64_t num_pages) noexcept
    void arena_drop(arena *a) noexcept
    void arena_figures(arena *a, uint64_t *taken, uint64_t *largest, uint64_t *refused) noexcept
    object arena_capsule(arena *a, object owner)
    object numpy_call_set(void **api, object handler)
    int numpy_is_known(void **api) noexcept
    void *capsule_pointer "PyCapsule_GetPointer"(object capsule, const char *name) except NULL
    bint PyCapsule_IsValid(object capsule, const char *name)

cdef void **_numpy_api = NULL


@cython.final
cdef class Arena:
    """Hands out ranges of the heap `pages` to NumPy; it and each of its arrays keep the heap."""

    cdef arena *ranges
    cdef readonly Pages pages

    def __cinit__(self, Pages pages not None):
        self.pages = pages
        self.ranges = arena_new(pages.heap, pages.length // 4096)
        if self.ranges == NULL:
            raise MemoryError("the ranges of a sealed heap")

    def __dealloc__(self):
        arena_drop(self.ranges)

    def handler(self):
        """A new handler for `numpy_handler`."""
        return arena_capsule(self.ranges, self)

    def close(self):
        """Hand out nothing more."""
        self.ranges.closed = 1

    def figures(self):
        """Bytes that are taken, the longest range that could be, and how often there was none."""
        cdef uint64_t taken = 0, largest = 0, refused = 0
        arena_figures(self.ranges, &taken, &largest, &refused)
        return taken, largest, refused


def numpy_handler(handler):
    """Let NumPy take memory from `handler` (None: as at first) in this context; return the old."""
    global _numpy_api
    # NumPy 1 takes whatever it is given, and can make no array then.
    if handler is not None and not PyCapsule_IsValid(handler, "mem_handler"):
        raise TypeError(f"an allocator of NumPy's is a capsule, not {type(handler).__name__}")
    if _numpy_api == NULL:
        _numpy_api = numpy_pointers()
    return numpy_call_set(_numpy_api, handler)


cdef void **numpy_pointers() except NULL:
    import numpy
    core = getattr(numpy, "_core", None) or numpy.core
    cdef void **api = <void **>capsule_pointer(core._multiarray_umath._ARRAY_API, NULL)
    if not numpy_is_known(api):
        raise ImportError(
            f"NumPy {numpy.__version__} has an interface in C that pyenclave does not know")
    return api
