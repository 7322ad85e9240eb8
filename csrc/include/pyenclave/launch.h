/*
 * launch.h - launch measurements of virtual machines: SEV-SNP's launch digest and TDX's MRTD.
 *
 * SNP: a chain of SHA-384, one link a page over the 112 bytes of PAGE_INFO (SEV-SNP firmware ABI
 * 1.55, 8.17.2). TDX: one SHA-384 over the records of TDH.MEM.PAGE.ADD and TDH.MR.EXTEND (Intel
 * TDX module ABI). Guest-physical addresses are multiples of 4096 (PYE_E_ALIGNMENT), and no page
 * ends above 2^52 (PYE_E_ARGUMENT).
 *
 * A context is a plain struct as in hash.h: no allocation, copied by assignment, one thread at a
 * time. Nothing in it is secret. A refused call changes nothing.
 */
#ifndef PYENCLAVE_LAUNCH_H
#define PYENCLAVE_LAUNCH_H

#include "pyenclave/base.h"
#include "pyenclave/hash.h"

#define PYE_VM_PAGE_SIZE 4096

/* Page types of PAGE_INFO. The content of the first two is measured. */
#define PYE_SNP_NORMAL 1
#define PYE_SNP_VMSA 2
#define PYE_SNP_ZERO 3
#define PYE_SNP_UNMEASURED 4
#define PYE_SNP_SECRETS 5
#define PYE_SNP_CPUID 6

typedef struct {
    uint8_t digest[PYE_SHA384_SIZE];
    uint64_t num_pages; /* measured so far */
} pye_snp_measure;

/* pye_snp_begin starts a chain: at zeros if `start` is NULL, else at the digest there. */
void pye_snp_begin(pye_snp_measure *ctx, const uint8_t *start);

/* pye_snp_add_pages measures `num_pages` pages with their content, ascending from `gpa`.
 * `page_type` is PYE_SNP_NORMAL or PYE_SNP_VMSA (PYE_E_ARGUMENT). */
PYE_MUST_USE pye_status pye_snp_add_pages(pye_snp_measure *ctx, const uint8_t *pages,
                                          size_t num_pages, uint64_t gpa, uint32_t page_type);

/* pye_snp_add_empty measures pages whose content does not count: any other page type. */
PYE_MUST_USE pye_status pye_snp_add_empty(pye_snp_measure *ctx, uint64_t num_pages, uint64_t gpa,
                                          uint32_t page_type);

/* pye_snp_add_same measures one page `count` times at one address, hashing it once: the save
 * areas of processors that start alike. */
PYE_MUST_USE pye_status pye_snp_add_same(pye_snp_measure *ctx,
                                         const uint8_t page[PYE_VM_PAGE_SIZE], uint64_t count,
                                         uint64_t gpa, uint32_t page_type);

/* pye_snp_page_digests writes the SHA-384 of each page, one after the other, several at a time
 * where the CPU can. The result does not depend on the CPU. */
void pye_snp_page_digests(uint8_t *out, const uint8_t *pages, size_t num_pages);
/* pye_snp_variant returns the name of the implementation that is used now. */
const char *pye_snp_variant(void);

typedef struct {
    pye_sha512_ctx sha;
} pye_tdx_measure;

void pye_tdx_begin(pye_tdx_measure *ctx);

/* pye_tdx_add_pages: TDH.MEM.PAGE.ADD of `num_pages` pages ascending from `gpa`. */
PYE_MUST_USE pye_status pye_tdx_add_pages(pye_tdx_measure *ctx, uint64_t num_pages, uint64_t gpa);

/* pye_tdx_extend: TDH.MR.EXTEND of the sixteen chunks of each page; with `add` not 0, each page's
 * TDH.MEM.PAGE.ADD before its chunks. */
PYE_MUST_USE pye_status pye_tdx_extend(pye_tdx_measure *ctx, const uint8_t *pages,
                                       size_t num_pages, uint64_t gpa, int add);

/* pye_tdx_digest writes MRTD of what was measured so far; `ctx` can go on. */
void pye_tdx_digest(const pye_tdx_measure *ctx, uint8_t out[PYE_SHA384_SIZE]);

#endif
