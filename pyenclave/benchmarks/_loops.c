/* _loops.c - functions of the core, called again and again without Python.
 *
 * Compiled when it is needed (in_c.py), so it brings no code into the package's own modules and
 * needs no header of theirs. The functions are called through pointers into the extension module:
 * what runs is the code that users run. Structures are void here; cffi knows them. */
#define _GNU_SOURCE
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__has_include)
#if __has_include(<linux/perf_event.h>)
#include <linux/perf_event.h>
#endif
#endif

typedef int32_t pye_status;

/* loop_cycles returns a descriptor that counts the core cycles of this thread outside the kernel,
 * or -1 where nothing counts them. A read of 8 bytes gives the count. */
pye_status loop_cycles(void)
{
#if defined(PERF_FLAG_FD_CLOEXEC)
    struct perf_event_attr what;

    memset(&what, 0, sizeof(what));
    what.size = sizeof(what);
    what.type = PERF_TYPE_HARDWARE;
    what.config = PERF_COUNT_HW_CPU_CYCLES;
    what.exclude_kernel = 1;
    what.exclude_hv = 1;
    return (int)syscall(SYS_perf_event_open, &what, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
#else
    return -1;
#endif
}

/* loop_cpu is what lanes ask for the number of their processor. */
pye_status loop_cpu(void)
{
    return sched_getcpu();
}

pye_status loop_page_seal(pye_status (*seal)(void *, uint8_t *, uint8_t *, uint64_t *,
                                             const uint8_t *, const void *),
                          void *key, uint8_t *out, uint8_t *tag, uint64_t *version,
                          const uint8_t *in, const void *info, size_t count)
{
    pye_status status = 0;

    for (size_t i = 0; i < count && status == 0; i++) {
        status = seal(key, out, tag, version, in, info);
    }
    return status;
}

pye_status loop_page_open(pye_status (*open)(void *, uint8_t *, const uint8_t *, const uint8_t *,
                                             uint64_t, const void *),
                          void *key, uint8_t *out, const uint8_t *in, const uint8_t *tag,
                          uint64_t version, const void *info, size_t count)
{
    pye_status status = 0;

    for (size_t i = 0; i < count && status == 0; i++) {
        status = open(key, out, in, tag, version, info);
    }
    return status;
}

pye_status loop_pages_seal(pye_status (*seal)(void *, uint8_t *, uint8_t *, uint64_t *,
                                              const uint8_t *, size_t, const void *),
                           void *key, uint8_t *out, uint8_t *tags, uint64_t *first,
                           const uint8_t *in, size_t num_pages, const void *info, size_t count)
{
    pye_status status = 0;

    for (size_t i = 0; i < count && status == 0; i++) {
        status = seal(key, out, tags, first, in, num_pages, info);
    }
    return status;
}

/* A key that seals one message: made, used, wiped. */
pye_status loop_message(pye_status (*init)(void *, const uint8_t *, size_t, uint32_t),
                        pye_status (*seal)(const void *, uint8_t *, uint8_t *, const uint8_t *,
                                           const uint8_t *, size_t, const uint8_t *, size_t),
                        void (*wipe)(void *), void *key, const uint8_t *secret, uint32_t allowed,
                        uint8_t *out, uint8_t *tag, const uint8_t *iv, const uint8_t *data,
                        size_t data_len, size_t count)
{
    pye_status status = 0;

    for (size_t i = 0; i < count && status == 0; i++) {
        status = init(key, secret, 32, allowed);
        if (status == 0) {
            status = seal(key, out, tag, iv, data, data_len, NULL, 0);
            wipe(key);
        }
    }
    return status;
}

pye_status loop_mrenclave(pye_status (*create)(void *, uint64_t, uint32_t),
                          pye_status (*add)(void *, const uint8_t *, size_t, uint64_t, uint64_t,
                                            int),
                          pye_status (*digest)(const void *, uint8_t *), void *ctx, uint8_t *out,
                          const uint8_t *pages, size_t num_pages, uint64_t flags, uint64_t size,
                          size_t count)
{
    pye_status status = 0;

    for (size_t i = 0; i < count && status == 0; i++) {
        status = create(ctx, size, 1);
        if (status == 0) {
            status = add(ctx, pages, num_pages, 0, flags, 1);
        }
        if (status == 0) {
            status = digest(ctx, out);
        }
    }
    return status;
}

pye_status loop_snp(void (*begin)(void *, const uint8_t *),
                    pye_status (*add)(void *, const uint8_t *, size_t, uint64_t, uint32_t),
                    void *ctx, const uint8_t *pages, size_t num_pages, uint64_t gpa, uint32_t type,
                    size_t count)
{
    pye_status status = 0;

    for (size_t i = 0; i < count && status == 0; i++) {
        begin(ctx, NULL);
        status = add(ctx, pages, num_pages, gpa, type);
    }
    return status;
}

pye_status loop_digests(void (*digests)(uint8_t *, const uint8_t *, size_t), uint8_t *out,
                        const uint8_t *pages, size_t num_pages, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        digests(out, pages, num_pages);
    }
    return 0;
}

/* Messages of `kind` to function 0 on a lane of the host; the answer's bytes go to `out`. `segment`
 * is the message, of as many bytes as the answer must have. */
pye_status loop_calls(pye_status (*write)(void *, uint16_t, uint16_t, const void *, size_t,
                                          uint32_t),
                      pye_status (*wait)(void *, void *, uint32_t),
                      pye_status (*read)(void *, uint8_t *, size_t, uint32_t), void *lane,
                      uint32_t kind, const void *segment, void *header, uint8_t *out, size_t len,
                      size_t count)
{
    pye_status status = 0;

    for (size_t i = 0; i < count && status == 0; i++) {
        status = write(lane, (uint16_t)kind, 0, segment, 1, 1000);
        if (status == 0) {
            status = wait(lane, header, 1000);
        }
        if (status == 0) {
            status = read(lane, out, len, 1000); /* which refuses another length */
        }
    }
    return status;
}
