/* pager_file.c - the file of a heap that has one: where its cold pages are.
 *
 * Page i lies at 4096 * (1 + i); what is before is its maker's, what is behind the last one is the
 * version tree's (pager_tree.c). The file is hostile: whatever it
 * says is opened like any page, in a frame of our own that nobody else can change meanwhile. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include "linux/pager.h"

#include <unistd.h>

#define PLACE(page) ((off_t)(((uint64_t)(page) + 1) * PYE_PAGE_SIZE))

pye_status pager_file_get(const pye_heap *heap, uint8_t *out, size_t size, uint64_t page)
{
    size_t done = 0;

    while (done < size) {
        const ssize_t got = pread(heap->fd, out + done, size - done, PLACE(page) + (off_t)done);

        PYE_REFUSE_IF(got == 0, PYE_E_AUTH); /* it was cut short */
        if (got > 0) {
            done += (size_t)got;
        } else {
            PYE_REFUSE_IF(errno != EINTR, pye_os_status(errno));
        }
    }
    return PYE_OK;
}

pye_status pager_file_read(pye_heap *heap, uint32_t page, uint32_t num)
{
    PYE_TRY(pager_populate(heap, page, num));
    return pager_file_get(heap, pager_frame(heap, page), (size_t)num * PYE_PAGE_SIZE, page);
}

pye_status pager_file_put(const pye_heap *heap, const uint8_t *in, size_t size, uint64_t page)
{
    size_t done = 0;

    while (done < size) {
        const ssize_t put = pwrite(heap->fd, in + done, size - done, PLACE(page) + (off_t)done);

        if (put > 0) {
            done += (size_t)put;
        } else {
            PYE_REFUSE_IF(put == 0 || errno != EINTR, put == 0 ? PYE_E_OS : pye_os_status(errno));
        }
    }
    return PYE_OK;
}

/* run_of returns how many pages follow each other from `pages[0]` on. */
static uint32_t run_of(const uint32_t *pages, uint32_t num)
{
    uint32_t run = 1;

    while (run < num && pages[run] == pages[0] + run) {
        run++;
    }
    return run;
}

pye_status pager_file_write(pye_heap *heap, const uint32_t *pages, uint32_t num)
{
    for (uint32_t run; num != 0; pages += run, num -= run) {
        run = run_of(pages, num);
        PYE_TRY(pager_file_put(heap, pager_frame(heap, pages[0]), (size_t)run * PYE_PAGE_SIZE,
                               pages[0]));
    }
    return PYE_OK;
}

pye_status pager_file_drop(pye_heap *heap, const uint32_t *pages, uint32_t num)
{
    for (uint32_t run; num != 0; pages += run, num -= run) {
        run = run_of(pages, num);
        PYE_TRY(pager_remove(heap, pages[0], run));
    }
    return PYE_OK;
}

void pager_file_forget(const pye_heap *heap, uint64_t page, uint64_t num)
{
    /* FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE: room for others, where the file system can. */
    (void)fallocate(heap->fd, 3, PLACE(page), (off_t)num * PYE_PAGE_SIZE);
}

#else
typedef int pye_pager_file_is_for_linux; /* ISO C wants a declaration */
#endif
