/* landlock.c - everything that Landlock can forbid is forbidden, but reading /dev/urandom.
 * The numbers are those of linux/landlock.h, which older system headers lack. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#if defined(__linux__)

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define CREATE_RULESET_VERSION 1u
#define RULE_PATH_BENEATH 1u
#define ACCESS_READ_FILE (UINT64_C(1) << 2)

/* struct landlock_ruleset_attr; it grew by one member with ABI 4 and one with ABI 6. */
typedef struct {
    uint64_t handled_access_fs;
    uint64_t handled_access_net;
    uint64_t scoped;
} ruleset_attr;

_Static_assert(sizeof(ruleset_attr) == 24, "struct landlock_ruleset_attr of ABI 6");

static uint64_t low_bits(unsigned int count)
{
    return (UINT64_C(1) << count) - 1;
}

/* struct landlock_path_beneath_attr */
typedef struct {
    uint64_t allowed_access;
    int32_t parent_fd;
} __attribute__((packed)) path_beneath_attr;

_Static_assert(sizeof(path_beneath_attr) == 12, "struct landlock_path_beneath_attr");

/* Libraries seed their generators from here while they are loaded (torch does). What the kernel
 * gives is no file of anybody; a name that leads elsewhere gets no rule. */
static void allow_urandom(int ruleset)
{
    path_beneath_attr rule = {ACCESS_READ_FILE, -1};
    struct stat status;
    const int fd = open("/dev/urandom", O_PATH | O_CLOEXEC);

    if (fd < 0) {
        return;
    }
    if (fstat(fd, &status) == 0 && S_ISCHR(status.st_mode) && status.st_rdev == makedev(1, 9)) {
        rule.parent_fd = fd;
        /* Without it the name stays closed, which is safe. */
        (void)syscall(PYE_NR_LANDLOCK_ADD_RULE, ruleset, RULE_PATH_BENEATH, &rule, 0);
    }
    (void)close(fd);
}

pye_status pye_sandbox_landlock(uint32_t *out_abi)
{
    ruleset_attr attr = {0, 0, 0};
    pye_status rc;
    size_t size;
    int fd;
    const long abi = syscall(PYE_NR_LANDLOCK_CREATE, NULL, 0, CREATE_RULESET_VERSION);

    *out_abi = 0;
    if (PYE_GUARD(abi < 1)) {
        /* EOPNOTSUPP: built in but switched off at boot. */
        return abi < 0 && errno == EOPNOTSUPP ? PYE_E_UNSUPPORTED : pye_os_status(errno);
    }
    /* File access: 13 rights at first, then REFER (2), TRUNCATE (3), IOCTL_DEV (5). */
    attr.handled_access_fs = low_bits(abi >= 5 ? 16 : abi >= 3 ? 15 : abi >= 2 ? 14 : 13);
    size = sizeof(attr.handled_access_fs);
    if (abi >= 4) {
        attr.handled_access_net = low_bits(2); /* TCP bind and connect */
        size += sizeof(attr.handled_access_net);
    }
    if (abi >= 6) {
        attr.scoped = low_bits(2); /* abstract sockets and signals */
        size += sizeof(attr.scoped);
    }
    fd = (int)syscall(PYE_NR_LANDLOCK_CREATE, &attr, size, 0);
    PYE_REFUSE_IF(fd < 0, pye_os_status(errno));
    allow_urandom(fd);
    rc = pye_os_result(syscall(PYE_NR_LANDLOCK_RESTRICT, fd, 0));
    (void)close(fd);
    if (rc == PYE_OK) {
        *out_abi = (uint32_t)abi;
    }
    return rc;
}

#endif
