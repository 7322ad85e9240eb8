/*
 * measure.h - MRENCLAVE: the SHA-256 over the records of an SGX launch.
 *
 * One 64-byte ECREATE record, then for each page one EADD record and, if it is measured, sixteen
 * EEXTEND records, each followed by its 256 bytes of content (Intel SDM vol. 3D, ECREATE, EADD,
 * EEXTEND). The order of the calls is the order of the records; only the canonical order is
 * accepted. Offsets and sizes are in bytes from the enclave's base.
 *
 * A context is a plain struct as in hash.h: no allocation, copied by assignment, one thread at a
 * time. Nothing in it is secret. A refused call changes nothing; a refused pye_sgx_create leaves a
 * context to which nothing can be added.
 */
#ifndef PYENCLAVE_MEASURE_H
#define PYENCLAVE_MEASURE_H

#include "pyenclave/base.h"
#include "pyenclave/hash.h"

#define PYE_SGX_PAGE_SIZE 4096
#define PYE_SGX_CHUNK_SIZE 256
#define PYE_SGX_MIN_SIZE 8192

/* SECINFO.FLAGS (SDM vol. 3D, 35.11). */
#define PYE_SGX_R 0x1
#define PYE_SGX_W 0x2
#define PYE_SGX_X 0x4
#define PYE_SGX_TCS 0x100
#define PYE_SGX_REG 0x200

typedef struct {
    pye_sha256_ctx sha;
    uint64_t size;       /* of the enclave; 0 before ECREATE */
    uint64_t next_chunk; /* where the next EEXTEND has to be; UINT64_MAX when none may follow */
    uint64_t num_pages;  /* added so far */
} pye_sgx_measure;

/* pye_sgx_create begins with the ECREATE record. `size` is a power of two from 8192 on
 * (PYE_E_LENGTH), `ssa_frame_size` counts pages and is not 0 (PYE_E_ARGUMENT). */
PYE_MUST_USE pye_status pye_sgx_create(pye_sgx_measure *ctx, uint64_t size,
                                       uint32_t ssa_frame_size);

/* pye_sgx_add adds the EADD record of one page. `offset` is a multiple of 4096 (PYE_E_ALIGNMENT)
 * below the enclave's size (PYE_E_ARGUMENT); `flags` are PYE_SGX_REG with R, RW, RX, RWX, X or
 * nothing, or PYE_SGX_TCS alone (PYE_E_ARGUMENT). PYE_E_STATE before pye_sgx_create, or while
 * the page before has some of its chunks measured but not all. */
PYE_MUST_USE pye_status pye_sgx_add(pye_sgx_measure *ctx, uint64_t offset, uint64_t flags);

/* pye_sgx_extend measures one chunk of the page that was added last. The sixteen chunks come in
 * ascending order: PYE_E_STATE for another offset than the next one. */
PYE_MUST_USE pye_status pye_sgx_extend(pye_sgx_measure *ctx, uint64_t offset,
                                       const uint8_t chunk[PYE_SGX_CHUNK_SIZE]);

/* pye_sgx_add_pages adds `num_pages` consecutive pages with their records; the content is at
 * `pages` if `measured`, else `pages` is not read and may be NULL. Checks as pye_sgx_add; all
 * pages lie inside the enclave. */
PYE_MUST_USE pye_status pye_sgx_add_pages(pye_sgx_measure *ctx, const uint8_t *pages,
                                          size_t num_pages, uint64_t offset, uint64_t flags,
                                          int measured);

/* pye_sgx_add_filled adds `num_pages` measured pages whose every 32-bit word is `word`, without
 * the pages having to exist anywhere. */
PYE_MUST_USE pye_status pye_sgx_add_filled(pye_sgx_measure *ctx, uint32_t word, size_t num_pages,
                                           uint64_t offset, uint64_t flags);

/* Consecutive pages of one enclave. */
typedef struct {
    const uint8_t *pages; /* NULL: added, but not measured */
    size_t num_pages;
    uint64_t offset;
    uint64_t flags;
} pye_sgx_run;

typedef struct {
    pye_sgx_measure *ctx;
    const pye_sgx_run *runs;
    size_t num_runs;
} pye_sgx_job;

/* pye_sgx_add_many adds the runs of each job to its measurement, in their order, as pye_sgx_add_pages
 * does. Measurements go side by side: sixteen take two fifths of the time that they take one after
 * the other, and less the more of them add pages at the same offsets. Each measurement occurs in one
 * job only (PYE_E_ARGUMENT). If anything is refused, nothing is added to any. */
PYE_MUST_USE pye_status pye_sgx_add_many(const pye_sgx_job *jobs, size_t num_jobs);
/* pye_sgx_many_variant names the code for sixteen measurements: "avx512", "avx2", "sha-ni" (four at
 * once), "pairs" (of the SHA extensions), or "none" where one goes after the other. */
const char *pye_sgx_many_variant(void);

/* pye_sgx_digest writes the MRENCLAVE of what was added so far; `ctx` can go on. PYE_E_STATE
 * before pye_sgx_create or inside a page; `out` is zeroed then. */
PYE_MUST_USE pye_status pye_sgx_digest(const pye_sgx_measure *ctx, uint8_t out[PYE_SHA256_SIZE]);

#endif
