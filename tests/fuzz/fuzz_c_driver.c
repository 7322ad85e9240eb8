/* fuzz_c_driver.c - tries the seeds of a target, changed at random, where libFuzzer is not there.
 * usage: TARGET RUNS SEED | TARGET --seeds FOLDER | TARGET FILE */
#include "fuzz_c.h"

enum { MOST = 4096 };

static uint64_t state;

static uint32_t next(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static size_t change(uint8_t *data, size_t size)
{
    static const uint8_t likely[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0x20, 0x40, 0x7f, 0x80, 0xff};
    const size_t at = size > 0 ? next() % size : 0;

    switch (next() % 7) {
    case 0: /* a bit */
        if (size > 0) {
            data[at] ^= (uint8_t)(1u << next() % 8);
        }
        break;
    case 1: /* a byte */
        if (size > 0) {
            data[at] = next() % 2 ? likely[next() % sizeof(likely)] : (uint8_t)next();
        }
        break;
    case 2: /* cut */
        return at;
    case 3: { /* some bytes more */
        const size_t more = 1 + next() % 16;
        if (size + more <= MOST) {
            memmove(data + at + more, data + at, size - at);
            for (size_t i = 0; i < more; i++) {
                data[at + i] = (uint8_t)(next() % 2 ? next() : next() % 8);
            }
            return size + more;
        }
        break;
    }
    case 4: { /* some less */
        const size_t less = 1 + next() % 16;
        if (less < size - at) {
            memmove(data + at, data + at + less, size - at - less);
            return size - less;
        }
        break;
    }
    case 5: { /* a piece again */
        const size_t len = size > 0 ? next() % 64 % size : 0;
        const size_t from = size > len ? next() % (size - len) : 0;
        if (size + len <= MOST && len > 0) {
            uint8_t piece[64];
            memcpy(piece, data + from, len);
            memmove(data + at + len, data + at, size - at);
            memcpy(data + at, piece, len);
            return size + len;
        }
        break;
    }
    default: { /* a piece of another seed behind */
        uint8_t other[MOST];
        const size_t len = fuzz_seed(next() % 16, other, sizeof(other));
        if (len > 0 && at + len <= MOST) {
            memcpy(data + at, other, len);
            return at + len > size ? at + len : size;
        }
        break;
    }
    }
    return size;
}

/* The input is in memory of its own, so that a byte beyond it is seen. */
static void one(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);

    if (copy == NULL) {
        exit(2);
    }
    if (size > 0) {
        memcpy(copy, data, size);
    }
    (void)LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

int main(int argc, char **argv)
{
    uint8_t data[MOST];
    unsigned seeds = 0;

    while (fuzz_seed(seeds, data, sizeof(data)) > 0) {
        seeds++;
    }
    if (argc == 3 && strcmp(argv[1], "--seeds") == 0) {
        for (unsigned i = 0; i < seeds; i++) {
            char name[4096];
            const size_t size = fuzz_seed(i, data, sizeof(data));
            (void)snprintf(name, sizeof(name), "%s/seed-%u", argv[2], i);
            FILE *file = fopen(name, "wb");
            if (file == NULL || fwrite(data, 1, size, file) != size || fclose(file) != 0) {
                return 2;
            }
        }
        return 0;
    }
    if (argc == 2) {
        FILE *file = fopen(argv[1], "rb");
        if (file == NULL) {
            return 2;
        }
        const size_t size = fread(data, 1, sizeof(data), file);
        (void)fclose(file);
        one(data, size);
        return 0;
    }
    if (argc != 3) {
        return 2;
    }
    const unsigned long long runs = strtoull(argv[1], NULL, 10);
    state = strtoull(argv[2], NULL, 10) * 2 + 1;
    for (unsigned long long i = 0; i < runs; i++) {
        size_t size = fuzz_seed(i < seeds ? (unsigned)i : next() % seeds, data, sizeof(data));
        for (uint32_t k = i < seeds ? 0 : 1 + next() % 12; k > 0; k--) {
            size = change(data, size);
        }
        one(data, size);
    }
    printf("%u seeds, %llu runs\n", seeds, runs);
    return 0;
}
