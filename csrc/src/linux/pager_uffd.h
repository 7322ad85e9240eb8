/* pager_uffd.h - the kernel's interface of userfaultfd, which the system headers of the oldest
 * supported build system lack. Linux, include/uapi/linux/userfaultfd.h. */
#ifndef PYE_SRC_LINUX_PAGER_UFFD_H
#define PYE_SRC_LINUX_PAGER_UFFD_H

#include <stdint.h>
#include <sys/ioctl.h>

#define PYE_UFFD_USER_MODE_ONLY 1
#define PYE_UFFD_API 0xAA
#define PYE_UFFD_WP (UINT64_C(1) << 0)
#define PYE_UFFD_MISSING_SHMEM (UINT64_C(1) << 5)
#define PYE_UFFD_SIGBUS (UINT64_C(1) << 7)
#define PYE_UFFD_MINOR_SHMEM (UINT64_C(1) << 10)
#define PYE_UFFD_WP_SHMEM (UINT64_C(1) << 12)
#define PYE_UFFD_MODE_WP (UINT64_C(1) << 1)
#define PYE_UFFD_MODE_MISSING (UINT64_C(1) << 0)
#define PYE_UFFD_MODE_MINOR (UINT64_C(1) << 2)

typedef struct {
    uint64_t start;
    uint64_t len;
} uffd_range;

typedef struct {
    uint64_t api;
    uint64_t features;
    uint64_t ioctls;
} uffd_api;

typedef struct {
    uffd_range range;
    uint64_t mode;
    uint64_t ioctls; /* bit n: ioctl n works there */
} uffd_register;

typedef struct {
    uffd_range range;
    uint64_t mode;
    int64_t done; /* bytes, or a negative errno */
} uffd_pages;

/* Of CONTINUE: what is mapped cannot be written yet (Linux 6.4). */
#define PYE_UFFD_CONTINUE_WP (UINT64_C(1) << 1)

typedef struct {
    uffd_range range;
    uint64_t mode; /* 0: may be written from now on */
} uffd_protect;

#define PYE_UFFDIO_REGISTER _IOWR(PYE_UFFD_API, 0x00, uffd_register)
#define PYE_UFFDIO_ZEROPAGE _IOWR(PYE_UFFD_API, 0x04, uffd_pages)
#define PYE_UFFDIO_WRITEPROTECT _IOWR(PYE_UFFD_API, 0x06, uffd_protect)
#define PYE_UFFDIO_CONTINUE _IOWR(PYE_UFFD_API, 0x07, uffd_pages)
#define PYE_UFFDIO_API _IOWR(PYE_UFFD_API, 0x3F, uffd_api)
#define PYE_UFFD_CAN_ZEROPAGE (UINT64_C(1) << 0x04)
#define PYE_UFFD_CAN_CONTINUE (UINT64_C(1) << 0x07)

_Static_assert(sizeof(uffd_pages) == 32 && sizeof(uffd_register) == 32 && sizeof(uffd_api) == 24 &&
                   sizeof(uffd_protect) == 24,
               "as the kernel has them");

#endif
