/* ring_hooks.h - included before everything else when the lane's sources are built for the explorer:
 * each access to shared memory, and each look at the clock, goes through the machine. */
#ifndef RING_HOOKS_H
#define RING_HOOKS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

uint64_t hook_load(const void *at, size_t size, int order);
void hook_store(void *at, size_t size, uint64_t value, int order);
void hook_fence(int order);
void hook_copy(void *to, const void *from, size_t len);
void hook_fill(void *to, int value, size_t len);
uint64_t hook_clock(void);

#ifndef RING_MACHINE_H
#define __atomic_load_n(at, order) ((__typeof__(*(at) + 0))hook_load((at), sizeof(*(at)), (order)))
#define __atomic_store_n(at, value, order)                                                         \
    hook_store((at), sizeof(*(at)), (uint64_t)(value), (order))
#define __atomic_thread_fence(order) hook_fence(order)
#define memcpy(to, from, len) hook_copy((to), (from), (len))
#define memset(to, value, len) hook_fill((to), (value), (len))
#define SPIN_CLOCK() hook_clock()
#define SPIN_LOOKS 1
#endif

#endif
