# How an ended heap's error reaches the thread that touched it (ARCHITECTURE.md, sealed memory).
#
# Before the fault handler lets the thread read zeros it calls `note_zeros` in it, in a signal
# handler at an instruction that reads or writes an array: no lock of the C library or of Python is
# held by that instruction. The interpreter is given a trace function for this thread that raises at
# its next bytecode, whatever that is; the one that was there (a debugger's, coverage's) is put back
# then. Asynchronous exceptions (PyThreadState_SetAsyncExc) are looked for only at calls and at the
# ends of loops, so `try: x = a[0]` would be left before; they are what is used where there is no
# PyEval_SetTrace. Not both: CPython 3.11 never forgets that one was taken back, and then loops for
# ever at the beginning of a function that is traced.
#
# A thread that has the GIL does so itself. Any other leaves a note to the guard thread and waits,
# a second at most, until the guard has the GIL and has done it in its place: when C code takes the
# GIL again, the error is there already. A thread that Python does not know (a thread pool of
# OpenBLAS) has no bytecode; then it is raised in the threads that use the heap.
cdef extern from *:
    """
    #include <dlfcn.h>
    #include <pthread.h>
    #include <sched.h>
    #include <signal.h>
    #include <string.h>
    #include <unistd.h>
    #include "pyenclave.h"

    #define NOTE_HEAPS 64
    #define NOTE_SLOTS 64
    #define NOTE_WAIT_MS 1000
    #define NOTE_AGAIN_NS 100000000 /* a thread is told anew if it goes on for so long */
    #define NOTE_LATE_NS 10000000000 /* the same, if the guard is still to tell it */

    typedef int (*note_trace)(PyObject *, PyFrameObject *, int, PyObject *);
    /* Of a slot. ORPHAN: the thread gave up waiting. */
    enum { NOTE_FREE, NOTE_FILLING, NOTE_READY, NOTE_SERVING, NOTE_DONE, NOTE_ORPHAN };

    static struct {
        /* In no limited API; every CPython since 3.9 exports the first, and one of the second. */
        void (*set_trace)(note_trace, PyObject *);
        PyThreadState *(*current)(void);
        pid_t guard; /* the process in which the guard thread runs */
    } note_python;

    static struct {
        pye_heap *heap;
        PyObject *errors[3]; /* poisoned, closed, forked */
        PyObject *threads;   /* a set of thread identifiers */
    } note_heaps[NOTE_HEAPS];

    static struct {
        uint32_t state;
        uint32_t place; /* in note_heaps */
        uint32_t which;
        unsigned long thread;
        PyThreadState *python; /* NULL: Python does not know the thread */
    } note_slots[NOTE_SLOTS];

    static uint32_t note_bell;
    static uint32_t note_stay; /* pages of zeros stay shown */
    static char note_hides;    /* they are being hidden: no heap goes meanwhile */
    /* Until when this thread was told: it may touch thousands of pages before it looks. */
    static __thread uint64_t note_until __attribute__((tls_model("initial-exec")));

    static void note_forget(void)
    {
        note_until = 0;
        heap_step_again();
    }

    /* note_stop raises at the next bytecode; see the top. argument: (error, old trace, frame, place of
     * the heap). Pages of zeros that stayed shown go now, so that whoever reads next is noticed: making
     * the exception runs Python code, which may hand over the GIL. */
    static int note_stop(PyObject *argument, PyFrameObject *frame, int event, PyObject *what)
    {
        PyObject *error = PyTuple_GetItem(argument, 0);
        PyObject *old = PyTuple_GetItem(argument, 1);
        PyObject *traced = PyTuple_GetItem(argument, 2);
        unsigned long place = PyLong_AsUnsignedLong(PyTuple_GetItem(argument, 3));
        pye_heap *heap = place < NOTE_HEAPS
                             ? __atomic_load_n(&note_heaps[place].heap, __ATOMIC_ACQUIRE)
                             : NULL;
        PyObject *set, *done;
        (void)frame;
        (void)event;
        (void)what;
        Py_INCREF(argument); /* taking the function off drops it */
        if (heap != NULL) {
            pye_heap_conceal(heap);
        }
        if (PyObject_SetAttrString(traced, "f_trace_opcodes", Py_False) != 0) {
            PyErr_Clear();
        }
        set = PySys_GetObject("settrace");
        done = set == NULL ? NULL : PyObject_CallFunctionObjArgs(set, old, NULL);
        if (done == NULL) {
            PyErr_Clear();
        }
        Py_XDECREF(done);
        note_forget();
        PyErr_SetNone(error);
        Py_DECREF(argument);
        return -1;
    }

    /* note_raise has `error` raised in the thread of the current thread state, which is `thread`. */
    static void note_raise(PyObject *error, unsigned long thread, uint32_t place)
    {
        PyObject *type, *value, *traceback;
        PyObject *get, *old, *frame, *argument, *number;
        int collects, is_set = 0;
        PyErr_Fetch(&type, &value, &traceback);
        collects = PyGC_Disable(); /* no finalizer runs inside somebody's loop */
        frame = (PyObject *)PyEval_GetFrame();
        get = PySys_GetObject("gettrace");
        old = get == NULL || frame == NULL ? NULL : PyObject_CallNoArgs(get);
        if (old != NULL && PyTuple_Check(old)) {
            is_set = 1; /* it is told already, and still reads on */
        } else if (old != NULL && note_python.set_trace != NULL) {
            number = PyLong_FromUnsignedLong(place);
            argument = number == NULL ? NULL : PyTuple_Pack(4, error, old, frame, number);
            Py_XDECREF(number);
            if (argument != NULL &&
                PyObject_SetAttrString(frame, "f_trace_opcodes", Py_True) == 0) {
                note_python.set_trace(note_stop, argument);
                is_set = 1;
            }
            Py_XDECREF(argument);
        }
        Py_XDECREF(old);
        if (!is_set) {
            PyErr_Clear();
            PyThreadState_SetAsyncExc(thread, error);
        }
        if (collects) {
            PyGC_Enable();
        }
        PyErr_Restore(type, value, traceback);
    }

    /* note_serve does what a slot asks for, with the GIL. */
    static void note_serve(uint32_t i, int waits)
    {
        PyObject *error = note_heaps[note_slots[i].place].errors[note_slots[i].which];
        PyObject *threads = note_heaps[note_slots[i].place].threads;
        PyObject *list;
        Py_ssize_t n;
        if (error == NULL) {
            return; /* the heap is gone, and with it everything that lay in it */
        }
        if (note_slots[i].python != NULL) {
            if (waits) {
                PyThreadState *mine = PyThreadState_Swap(note_slots[i].python);
                note_raise(error, note_slots[i].thread, note_slots[i].place);
                PyThreadState_Swap(mine);
            } else {
                PyThreadState_SetAsyncExc(note_slots[i].thread, error);
            }
            return;
        }
        list = PySequence_List(threads);
        for (n = 0; list != NULL && n < PyList_Size(list); n++) {
            PyThreadState_SetAsyncExc(PyLong_AsUnsignedLong(PyList_GetItem(list, n)), error);
        }
        Py_XDECREF(list);
        PyErr_Clear();
    }

    /* note_stays has what was shown hidden soon; from a signal handler. */
    static void note_stays(void)
    {
        if (__atomic_exchange_n(&note_stay, 1, __ATOMIC_SEQ_CST) == 0 &&
            pye_wake_futex(&note_stay) != PYE_OK) {
            return; /* it goes when somebody is told */
        }
    }

    static void note_enter(void)
    {
        /* In a forked child there is no hider, which may have been at it. */
        while (note_python.guard == getpid() &&
               __atomic_test_and_set(&note_hides, __ATOMIC_ACQUIRE)) {
            sched_yield();
        }
    }

    static void note_exit(void)
    {
        __atomic_clear(&note_hides, __ATOMIC_RELEASE);
    }

    /* note_hider is a thread that hides what stays shown of all heaps, without the GIL, for which the
     * guard may have to wait. Who still reads there faults once more. */
    static void *note_hider(void *unused)
    {
        for (;;) {
            uint32_t i;
            if (!__atomic_exchange_n(&note_stay, 0, __ATOMIC_SEQ_CST)) {
                if (pye_wait_futex(&note_stay, 0, 3600000) == PYE_E_OS) {
                    return unused;
                }
                continue;
            }
            note_enter();
            for (i = 0; i < NOTE_HEAPS; i++) {
                pye_heap *heap = __atomic_load_n(&note_heaps[i].heap, __ATOMIC_ACQUIRE);
                if (heap != NULL) {
                    pye_heap_conceal(heap);
                }
            }
            note_exit();
        }
    }

    static void *note_guard(void *unused)
    {
        for (;;) {
            const uint32_t seen = __atomic_load_n(&note_bell, __ATOMIC_SEQ_CST);
            PyGILState_STATE held;
            uint32_t i;
            int any = 0;
            for (i = 0; i < NOTE_SLOTS; i++) {
                const uint32_t state = __atomic_load_n(&note_slots[i].state, __ATOMIC_SEQ_CST);
                any |= state == NOTE_READY || state == NOTE_ORPHAN;
            }
            if (!any) {
                if (pye_wait_futex(&note_bell, seen, 3600000) == PYE_E_OS) {
                    return unused;
                }
                continue;
            }
            held = PyGILState_Ensure();
            for (i = 0; i < NOTE_SLOTS; i++) {
                uint32_t state = NOTE_READY;
                if (__atomic_compare_exchange_n(&note_slots[i].state, &state, NOTE_SERVING, 0,
                                                __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
                    note_serve(i, 1);
                    __atomic_store_n(&note_slots[i].state, NOTE_DONE, __ATOMIC_SEQ_CST);
                    if (pye_wake_futex(&note_slots[i].state) != PYE_OK) {
                        continue; /* who waits looks by itself, soon */
                    }
                } else if (state == NOTE_ORPHAN) {
                    note_serve(i, 0);
                    __atomic_store_n(&note_slots[i].state, NOTE_FREE, __ATOMIC_SEQ_CST);
                }
            }
            PyGILState_Release(held);
        }
    }

    /* note_start starts the guard and the hider of this process; 0: they run. */
    static int note_start(void)
    {
        pthread_t thread;
        pthread_attr_t attributes;
        sigset_t all, before;
        int failed;
        if (note_python.guard == getpid()) {
            return 0;
        }
        if (note_python.guard != 0) { /* a forked child: whoever waited is not here */
            memset(note_slots, 0, sizeof(note_slots));
            note_stay = 0;
            note_exit();
        }
        if (pthread_attr_init(&attributes) != 0) {
            return -1;
        }
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* no signal of the process is for it */
        failed = pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) ||
                 pthread_create(&thread, &attributes, note_hider, NULL) ||
                 pthread_create(&thread, &attributes, note_guard, NULL);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        if (failed) {
            return -1;
        }
        note_python.guard = getpid();
        return 0;
    }

    /* note_leave has the guard raise the error in this thread, and waits until it has. 1: it will. */
    static int note_leave(uint32_t place, uint32_t which, PyThreadState *python)
    {
        uint32_t i, state = NOTE_FREE, waited = 0;
        if (note_start() != 0) {
            return 0;
        }
        for (i = 0; i < NOTE_SLOTS; i++, state = NOTE_FREE) {
            if (__atomic_compare_exchange_n(&note_slots[i].state, &state, NOTE_FILLING, 0,
                                            __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
                break;
            }
        }
        if (i == NOTE_SLOTS) {
            return 0; /* 64 threads at once: told at its next fault */
        }
        note_slots[i].place = place;
        note_slots[i].which = which;
        note_slots[i].python = python;
        note_slots[i].thread = PyThread_get_thread_ident();
        __atomic_store_n(&note_slots[i].state, NOTE_READY, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&note_bell, 1, __ATOMIC_SEQ_CST);
        if (pye_wake_futex(&note_bell) != PYE_OK) {
            waited = NOTE_WAIT_MS;
        }
        for (;;) {
            state = __atomic_load_n(&note_slots[i].state, __ATOMIC_SEQ_CST);
            if (state == NOTE_DONE) {
                __atomic_store_n(&note_slots[i].state, NOTE_FREE, __ATOMIC_SEQ_CST);
                return 0;
            }
            /* Who holds the GIL may wait for this very thread. */
            if (waited >= NOTE_WAIT_MS && state == NOTE_READY &&
                __atomic_compare_exchange_n(&note_slots[i].state, &state, NOTE_ORPHAN, 0,
                                            __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
                return 1;
            }
            if (pye_wait_futex(&note_slots[i].state, state, 10) != PYE_OK) {
                waited += 10;
            }
        }
    }

    /* note_zeros: this thread will read zeros in `heap`; heap_handler.h says for which reasons. */
    static int note_zeros(pye_heap *heap, int reason)
    {
        const uint32_t which = reason == HEAP_NOTE_CLOSED   ? 1
                               : reason == HEAP_NOTE_FORKED ? 2
                                                            : 0;
        PyThreadState *python;
        uint32_t place = 0;
        int late = 0, alone;
        if (!Py_IsInitialized()) {
            return 1;
        }
        python = PyGILState_GetThisThreadState();
        alone = python != NULL && note_python.current != NULL && note_python.current() == python;
        if (pye_clock_ns() < note_until) {
            return alone;
        }
        while (place < NOTE_HEAPS &&
               __atomic_load_n(&note_heaps[place].heap, __ATOMIC_ACQUIRE) != heap) {
            place++;
        }
        if (place == NOTE_HEAPS) {
            return 1;
        }
        if (alone) {
            note_raise(note_heaps[place].errors[which], PyThread_get_thread_ident(), place);
        } else {
            /* What stays shown from before goes: nobody reads it while this thread waits. */
            pye_heap_conceal(heap);
            late = note_leave(place, which, python) && python != NULL;
        }
        note_until = pye_clock_ns() + (late ? NOTE_LATE_NS : NOTE_AGAIN_NS);
        return alone;
    }

    static int note_register(pye_heap *heap, PyObject *errors, PyObject *threads)
    {
        uint32_t place = 0;
        int i;
        atomic_store(&heap_note, note_zeros);
        atomic_store(&heap_stays, note_stays);
        *(void **)&note_python.set_trace = dlsym(RTLD_DEFAULT, "PyEval_SetTrace");
        *(void **)&note_python.current = dlsym(RTLD_DEFAULT, "PyThreadState_GetUnchecked");
        if (note_python.current == NULL) {
            *(void **)&note_python.current = dlsym(RTLD_DEFAULT, "_PyThreadState_UncheckedGet");
        }
        while (place < NOTE_HEAPS && note_heaps[place].heap != NULL) {
            place++;
        }
        if (place == NOTE_HEAPS || note_start() != 0) {
            return -1;
        }
        for (i = 0; i < 3; i++) {
            note_heaps[place].errors[i] = PyTuple_GetItem(errors, i);
            Py_XINCREF(note_heaps[place].errors[i]);
        }
        Py_INCREF(threads);
        note_heaps[place].threads = threads;
        __atomic_store_n(&note_heaps[place].heap, heap, __ATOMIC_RELEASE);
        return 0;
    }

    static void note_unregister(pye_heap *heap)
    {
        uint32_t place;
        int i;
        for (place = 0; place < NOTE_HEAPS; place++) {
            if (note_heaps[place].heap == heap) {
                note_enter();
                __atomic_store_n(&note_heaps[place].heap, NULL, __ATOMIC_RELEASE);
                note_exit();
                for (i = 0; i < 3; i++) {
                    Py_CLEAR(note_heaps[place].errors[i]);
                }
                Py_CLEAR(note_heaps[place].threads);
            }
        }
    }
    """
    void note_forget() noexcept
    int note_register(pye_heap *heap, object errors, object threads) noexcept
    void note_unregister(pye_heap *heap) noexcept


def heap_errors(Pages pages, tuple errors, set threads):
    """
    Say what is raised in a thread that touches `pages` when they have ended.

    `errors` are three classes, each made without arguments: for a heap that was poisoned, that was
    closed, and that belongs to the parent of this process. `threads` holds the identifiers of those
    that use the heap: they are told of a fault in a thread that is not Python's.
    """
    if len(errors) != 3 or not all(isinstance(error, type) for error in errors):
        raise TypeError("three classes of exceptions")
    note_unregister(pages.heap)
    if note_register(pages.heap, errors, threads) != 0:
        fail(PYE_E_LIMIT, "the thread that reports faults")


def heap_front():
    """Put the fault handler in front again; for after somebody set one of his own."""
    cdef pye_status rc = heap_handlers()
    if rc != PYE_OK:
        fail(rc, "the fault handler of sealed memory")


def heap_told():
    """An error of an ended heap has reached this thread: it is told again of the next fault."""
    note_forget()
