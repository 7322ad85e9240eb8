/* fuzz_c.h - what a fuzz target of the C core is: libFuzzer's entry, and seeds that it makes. */
#ifndef FUZZ_C_H
#define FUZZ_C_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Writes seed `which` to `out` and returns its length; 0 after the last. */
size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap);

#define FUZZ_CHECK(holds, what)                                                                    \
    do {                                                                                           \
        if (!(holds)) {                                                                            \
            fprintf(stderr, "FINDING %s:%d: %s\n", __FILE__, __LINE__, (what));                    \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* The input, taken from its front; zeroes behind its end. */
typedef struct {
    const uint8_t *at;
    size_t left;
} fuzz_input;

static inline uint64_t fuzz_take(fuzz_input *input, size_t bytes)
{
    uint64_t value = 0;

    for (size_t i = 0; i < bytes && input->left > 0; i++) {
        value |= (uint64_t)*input->at << (8 * i);
        input->at++;
        input->left--;
    }
    return value;
}

/* A number that is often one of those at which checks change their mind. */
static inline uint64_t fuzz_number(fuzz_input *input)
{
    static const uint64_t edges[] = {
        0, 1, 2, 7, 8, 31, 32, 63, 64, 65, 95, 96, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097,
        8192, 65535, 65536, 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000, INT64_MAX,
        (uint64_t)INT64_MAX + 1, UINT64_MAX - 4095, UINT64_MAX - 63, UINT64_MAX - 1, UINT64_MAX};
    const uint64_t how = fuzz_take(input, 1);

    return how < 192 ? edges[how % (sizeof(edges) / sizeof(edges[0]))] : fuzz_take(input, how % 9);
}

#endif
