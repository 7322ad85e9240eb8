/* loops.c - the level "native": functions of the core, called again and again without Python.
 *
 * They are called through pointers that cffi gives, so what runs is the code of the extension
 * module, not a copy built here with other flags. bench/levels.py declares these functions. */
#define _GNU_SOURCE
#include "pyenclave.h"

#include <linux/perf_event.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOP(call)                                                                                 \
    pye_status status = PYE_OK;                                                                    \
    for (size_t i = 0; i < count && status == PYE_OK; i++) {                                       \
        status = (call);                                                                           \
    }                                                                                              \
    return status

/* loop_cycles returns a descriptor that counts the core cycles of this thread outside the kernel,
 * or -1 where nothing counts them. A read of 8 bytes gives the count. */
int loop_cycles(void)
{
    struct perf_event_attr what;

    memset(&what, 0, sizeof(what));
    what.size = sizeof(what);
    what.type = PERF_TYPE_HARDWARE;
    what.config = PERF_COUNT_HW_CPU_CYCLES;
    what.exclude_kernel = 1;
    what.exclude_hv = 1;
    return (int)syscall(SYS_perf_event_open, &what, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
}

/* loop_cpu is what lanes ask for the number of their processor. */
int loop_cpu(void)
{
    return sched_getcpu();
}

pye_status loop_page_seal(__typeof__(&pye_page_seal) seal, pye_page_key *key, uint8_t *out,
                          uint8_t *tag, uint64_t *version, const uint8_t *in,
                          const pye_page_info *info, size_t count)
{
    LOOP(seal(key, out, tag, version, in, info));
}

pye_status loop_page_open(__typeof__(&pye_page_open) open, pye_page_key *key, uint8_t *out,
                          const uint8_t *in, const uint8_t *tag, uint64_t version,
                          const pye_page_info *info, size_t count)
{
    LOOP(open(key, out, in, tag, version, info));
}

pye_status loop_pages_seal(__typeof__(&pye_pages_seal) seal, pye_page_key *key, uint8_t *out,
                           uint8_t *tags, uint64_t *first, const uint8_t *in, size_t num_pages,
                           const pye_page_info *info, size_t count)
{
    LOOP(seal(key, out, tags, first, in, num_pages, info));
}

/* A key that seals one message: made, used, wiped. */
pye_status loop_message(__typeof__(&pye_gcm_init) init, __typeof__(&pye_gcm_seal) seal,
                        __typeof__(&pye_gcm_wipe) wipe, pye_gcm_key *key, const uint8_t *secret,
                        uint8_t *out, uint8_t *tag, const uint8_t *iv, const uint8_t *data,
                        size_t data_len, size_t count)
{
    pye_status status = PYE_OK;

    for (size_t i = 0; i < count && status == PYE_OK; i++) {
        status = init(key, secret, 32, PYE_GCM_ANY);
        if (status == PYE_OK) {
            status = seal(key, out, tag, iv, data, data_len, NULL, 0);
            wipe(key);
        }
    }
    return status;
}

pye_status loop_mrenclave(__typeof__(&pye_sgx_create) create, __typeof__(&pye_sgx_add_pages) add,
                          __typeof__(&pye_sgx_digest) digest, uint8_t *out, const uint8_t *pages,
                          size_t num_pages, uint64_t size, size_t count)
{
    pye_status status = PYE_OK;
    pye_sgx_measure ctx;

    for (size_t i = 0; i < count && status == PYE_OK; i++) {
        status = create(&ctx, size, 1);
        if (status == PYE_OK) {
            status = add(&ctx, pages, num_pages, 0, PYE_SGX_REG | PYE_SGX_R | PYE_SGX_W, 1);
        }
        if (status == PYE_OK) {
            status = digest(&ctx, out);
        }
    }
    return status;
}

pye_status loop_snp(__typeof__(&pye_snp_begin) begin, __typeof__(&pye_snp_add_pages) add,
                    uint8_t *out, const uint8_t *pages, size_t num_pages, uint64_t gpa,
                    size_t count)
{
    pye_status status = PYE_OK;
    pye_snp_measure ctx;

    for (size_t i = 0; i < count && status == PYE_OK; i++) {
        begin(&ctx, NULL);
        status = add(&ctx, pages, num_pages, gpa, PYE_SNP_NORMAL);
        memcpy(out, ctx.digest, sizeof(ctx.digest));
    }
    return status;
}

/* Calls of native function 0 on a lane of the host; the answer's bytes go to `out`. */
pye_status loop_calls(__typeof__(&pye_lane_write) write, __typeof__(&pye_lane_wait) wait,
                      __typeof__(&pye_lane_read) read, pye_lane *lane, uint8_t *out, size_t len,
                      const uint8_t *data, size_t count)
{
    const pye_segment segment = {data, len};
    pye_lane_header header;
    pye_status status = PYE_OK;

    for (size_t i = 0; i < count && status == PYE_OK; i++) {
        status = write(lane, PYE_FRAME_CALL, 0, &segment, 1, 1000);
        if (status == PYE_OK) {
            status = wait(lane, &header, 1000);
        }
        if (status == PYE_OK) {
            status = header.total == len ? read(lane, out, len, 1000) : PYE_E_LENGTH;
        }
    }
    return status;
}
