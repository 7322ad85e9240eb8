/* protected_library.c - a library behind a protection key, as test_protected.py needs it. */
#define _GNU_SOURCE
#include <pyenclave_protected.h>
#include <pyenclave_trusted.h>

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

PYE_PROTECTED_MEMORY;

static uint8_t kept[64] = "as it was loaded";
static uint8_t blank[8192];
static uint8_t *taken;

static pye_status answer(uint8_t *out, size_t *out_len, const void *data, size_t len)
{
    if (len > *out_len) {
        return PYE_ECALL_TOO_LONG;
    }
    memcpy(out, data, len);
    *out_len = len;
    return PYE_ECALL_OK;
}

PYE_ECALL(echo)
{
    return answer(out, out_len, in, in_len);
}

/* Keeps the input in every place that is behind the key. */
PYE_ECALL(keep)
{
    volatile uint8_t local[64];

    if (in_len > sizeof(kept)) {
        return PYE_ECALL_TOO_LONG;
    }
    if (taken == NULL) {
        taken = pye_protected_take(sizeof(kept));
    }
    memcpy(kept, in, in_len);
    memcpy(blank + 4000, in, in_len);
    for (size_t i = 0; i < in_len; i++) {
        local[i] = in[i];
    }
    if (taken != NULL) {
        memcpy(taken, in, in_len);
    }
    const uint64_t places[] = {(uintptr_t)kept, (uintptr_t)(blank + 4000), (uintptr_t)taken,
                               (uintptr_t)local, (uintptr_t)in, (uintptr_t)out};
    return answer(out, out_len, places, sizeof(places));
}

PYE_ECALL(kept)
{
    (void)in;
    (void)in_len;
    return answer(out, out_len, kept, sizeof(kept));
}

/* Takes memory until there is none; answers how many bytes there were. */
PYE_ECALL(take_all)
{
    uint64_t total = 0;
    size_t one = 4096;

    (void)in;
    (void)in_len;
    while (pye_protected_take(one) != NULL) {
        total += one;
    }
    return answer(out, out_len, &total, sizeof(total));
}

/* Answers with the status that the input names; the room is full of what must not come out. */
PYE_ECALL(status)
{
    int32_t status;

    if (in_len != sizeof(status)) {
        return PYE_ECALL_ARGUMENT;
    }
    memcpy(&status, in, sizeof(status));
    memset(out, 0x5a, *out_len);
    return status;
}

/* Says that it answered one byte more than there is room for. */
PYE_ECALL(too_much)
{
    (void)in;
    (void)in_len;
    memset(out, 0x5a, *out_len);
    *out_len += 1;
    return PYE_ECALL_OK;
}

/* Answers what the room held, which is what the last call on this stack left there. */
PYE_ECALL(leftover)
{
    (void)in;
    (void)in_len;
    (void)out;
    *out_len = 1000;
    return PYE_ECALL_OK;
}

/* Waits until there is a byte in the pipe that the input names, so calls can overlap. */
PYE_ECALL(wait)
{
    int fds[2];
    char byte = 'w';

    if (in_len != sizeof(fds)) {
        return PYE_ECALL_ARGUMENT;
    }
    memcpy(fds, in, sizeof(fds));
    if (write(fds[1], &byte, 1) != 1 || read(fds[0], &byte, 1) != 1) {
        return PYE_ECALL_USER;
    }
    return answer(out, out_len, &byte, 1);
}

/* Sends this thread the signal that the input names, and counts on on its own stack. */
PYE_ECALL(signal)
{
    volatile uint8_t mine[512];
    int number;
    uint64_t sum = 0;

    if (in_len != sizeof(number)) {
        return PYE_ECALL_ARGUMENT;
    }
    memcpy(&number, in, sizeof(number));
    for (size_t i = 0; i < sizeof(mine); i++) {
        mine[i] = (uint8_t)i;
    }
    if (syscall(SYS_tgkill, syscall(SYS_getpid), syscall(SYS_gettid), number) != 0) {
        return PYE_ECALL_USER;
    }
    for (size_t i = 0; i < sizeof(mine); i++) {
        sum += mine[i];
    }
    return answer(out, out_len, &sum, sizeof(sum));
}

/* Adds up its input a hundred times, so that signals come meanwhile. */
PYE_ECALL(busy)
{
    uint64_t sum = 0;

    for (int round = 0; round < 100; round++) {
        for (size_t i = 0; i < in_len; i++) {
            sum += *(const volatile uint8_t *)(in + i);
        }
    }
    return answer(out, out_len, &sum, sizeof(sum));
}

static void step(uint64_t depth)
{
    volatile uint8_t page[4096];

    page[0] = (uint8_t)depth;
    if (depth != 0) {
        step(depth - 1);
    }
    page[1] = page[0];
}

/* Uses as many pages of stack as the input says. */
PYE_ECALL(deep)
{
    uint64_t depth;

    if (in_len != sizeof(depth)) {
        return PYE_ECALL_ARGUMENT;
    }
    memcpy(&depth, in, sizeof(depth));
    step(depth);
    return answer(out, out_len, &depth, sizeof(depth));
}
