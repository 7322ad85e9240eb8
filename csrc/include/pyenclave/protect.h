/* protect.h - native functions of this process behind a protection key of the CPU (x86-64, PKU).
 *
 * docs/protected.md says what this stops, and first what it does not. The key is shut in every
 * thread; pye_protect_run opens it for the calling thread, for one call. */
#ifndef PYENCLAVE_PROTECT_H
#define PYENCLAVE_PROTECT_H

#include "pyenclave/base.h"

#define PYE_PROTECT_MAX_SLOTS 64
#define PYE_PROTECT_MAX_RANGES 16
#define PYE_PROTECT_MAX_FUNCTIONS 1024
#define PYE_PROTECT_PAGE 4096

/* Flags. Signals are not blocked during calls: who calls sees to it that none comes, or that each
 * handler has a stack of its own (SA_ONSTACK); else the process ends. That includes the signals
 * that the C library keeps for itself, which only the kernel's own call can block. */
#define PYE_PROTECT_LEAVE_SIGNALS 1

typedef struct pye_protect pye_protect;

/* Whole pages of this process that are readable and writable: a library's data. */
typedef struct {
    uint64_t address;
    uint64_t size;
} pye_protect_range;

/* Bytes, rounded up to pages: each from 1 to 2^30, `memory` from 0. `slots`: calls at a time. */
typedef struct {
    uint64_t memory;
    uint64_t stack;
    uint64_t message;
    uint32_t slots;
    uint32_t flags;
} pye_protect_sizes;

/* What a library finds in its own `pye_protected_memory` (pyenclave_protected.h). */
typedef struct {
    uint64_t start;
    uint64_t size;
    uint64_t used;
} pye_protect_arena;

/* pye_protect_new takes a protection key and puts behind it: the `ranges`, with a copy of what they
 * hold now, the table of `functions` (addresses, of pyenclave_trusted.h's kind), `memory` bytes for
 * the library, told in `arena` (in one of the ranges; NULL: to nobody), and for each slot a stack
 * and two buffers between guard pages. In a forked child memory, stacks and buffers are absent.
 * What is behind the key is not in core dumps.
 * PYE_E_UNSUPPORTED: CPU or kernel have no protection keys. PYE_E_LIMIT: all keys of the process
 * are taken. PYE_E_ARGUMENT, PYE_E_LENGTH, PYE_E_ALIGNMENT, PYE_E_NO_MEMORY, PYE_E_DENIED,
 * PYE_E_OS. On failure nothing is changed. */
PYE_MUST_USE pye_status pye_protect_new(pye_protect **out, const pye_protect_sizes *sizes,
                                        const pye_protect_range *ranges, uint32_t num_ranges,
                                        const uint64_t *functions, uint32_t num_functions,
                                        pye_protect_arena *arena);
/* pye_protect_free wipes memory, stacks and buffers, gives `ranges` what they held at the
 * beginning, makes them ordinary again, and gives the key back. PYE_E_BUSY: a slot is taken, and
 * nothing was done; but with `at_exit` the ranges are ordinary, with what they hold, for the
 * destructors of a process that ends. In a forked child slots do not count. NULL: nothing to do. */
PYE_MUST_USE pye_status pye_protect_free(pye_protect *protect, int at_exit);

/* pye_protect_take takes a free slot. PYE_E_BUSY: there is none. Thread-safe. */
PYE_MUST_USE pye_status pye_protect_take(pye_protect *protect, uint32_t *out_slot);
/* pye_protect_give gives a slot back. */
void pye_protect_give(pye_protect *protect, uint32_t slot);

/* pye_protect_run calls function `function` on the slot's stack with a copy of `in`. The function's
 * status goes to `answer` (PYE_E_LENGTH where it answers more than there is room for), the length
 * of what it answers to `out_len`, and if that is at most `out_room` the bytes to `out`; otherwise
 * pye_protect_answer has them until the slot is given back. Registers that the call may change are
 * zero before the key is shut, and signals are blocked meanwhile. PYE_E_LENGTH: `in` is longer
 * than a message; PYE_E_ARGUMENT: no such slot or function, or `in` or `out` lie behind the key,
 * where nothing is read or written for a caller; PYE_E_OS, PYE_E_DENIED: signals could not be
 * blocked. Nothing was called then. `out` must not be a sealed heap's, whose pages come by a
 * signal, and a function must not call into its own library. */
PYE_MUST_USE pye_status pye_protect_run(pye_protect *protect, uint32_t slot, uint32_t function,
                                        pye_status *answer, uint8_t *out, size_t out_room,
                                        size_t *out_len, const uint8_t *in, size_t in_len);
/* pye_protect_answer copies the first `len` bytes of the slot's answer. PYE_E_LENGTH: more than
 * was answered by the slot's last call; PYE_E_ARGUMENT: no such slot, or `out` lies behind the
 * key. */
PYE_MUST_USE pye_status pye_protect_answer(pye_protect *protect, uint32_t slot, uint8_t *out,
                                           size_t len);

#endif
