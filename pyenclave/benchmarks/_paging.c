/* _paging.c - what sealed memory is compared with, in C: the textbook's userfaultfd, whose faults a
 * thread answers, and the loop that times the faults of either.
 *
 * Compiled when it is needed (paging_peers.py). The peer opens its pages with the very function of
 * the core, called through a pointer, so that what differs is the way of a fault and not the cipher. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

enum { PAGE = 4096, EVENTS = 16 };

typedef struct {
    uint64_t address;
    uint32_t flags;
    uint8_t type;
} page_info;

typedef int32_t (*page_open)(void *key, uint8_t *out, const uint8_t *in, const uint8_t *tag,
                             uint64_t version, const page_info *info);

typedef struct {
    uint8_t *region; /* where the pages appear */
    size_t num_pages;
    page_open open;
    void *key;
    const uint8_t *sealed, *tags;
    uint64_t first_version; /* of page 0; page i has i more */
    uint8_t *frame;         /* the opened page, before the kernel copies it */
    int faults, stop, status;
    pthread_t thread;
} pager;

static int answer(pager *p, uint64_t address)
{
    size_t index = (size_t)((address - (uint64_t)(uintptr_t)p->region) / PAGE);
    const page_info info = {(uint64_t)index * PAGE, 0, 2};
    struct uffdio_copy copy = {
        .dst = (uint64_t)(uintptr_t)(p->region + index * PAGE),
        .src = (uint64_t)(uintptr_t)p->frame,
        .len = PAGE,
    };

    if (p->open(p->key, p->frame, p->sealed + index * PAGE, p->tags + 16 * index,
                p->first_version + index, &info) != 0) {
        return -EBADMSG;
    }
    return ioctl(p->faults, UFFDIO_COPY, &copy) != 0 && errno != EEXIST ? -errno : 0;
}

/* The loop of userfaultfd's manual page: wait, read, answer. A page that cannot be opened ends it, and
 * zeros take its place, so that who waits for it goes on to compare them. */
static void *serve(void *argument)
{
    pager *p = argument;
    struct pollfd wait[2] = {{.fd = p->faults, .events = POLLIN}, {.fd = p->stop, .events = POLLIN}};
    struct uffd_msg events[EVENTS];

    while (poll(wait, 2, -1) >= 0 || errno == EINTR) {
        if (wait[1].revents != 0) {
            break;
        }
        ssize_t got = read(p->faults, events, sizeof(events));
        for (ssize_t i = 0; i < got / (ssize_t)sizeof(events[0]); i++) {
            if (events[i].event != UFFD_EVENT_PAGEFAULT) {
                continue;
            }
            uint64_t address = events[i].arg.pagefault.address & ~(uint64_t)(PAGE - 1);
            int status = answer(p, address);
            if (status != 0) {
                struct uffdio_zeropage zero = {.range = {address, PAGE}};
                p->status = status;
                (void)ioctl(p->faults, UFFDIO_ZEROPAGE, &zero);
            }
        }
    }
    return NULL;
}

static int begin(pager *p)
{
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING};

    p->faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    p->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p->faults < 0 || p->stop < 0 || ioctl(p->faults, UFFDIO_API, &api) != 0) {
        return errno;
    }
    p->region = mmap(NULL, p->num_pages * PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p->region == MAP_FAILED) {
        p->region = NULL;
        return errno;
    }
    (void)madvise(p->region, p->num_pages * PAGE, MADV_NOHUGEPAGE);
    range.range.start = (uint64_t)(uintptr_t)p->region;
    range.range.len = p->num_pages * PAGE;
    if (ioctl(p->faults, UFFDIO_REGISTER, &range) != 0) {
        return errno;
    }
    p->frame = aligned_alloc(PAGE, PAGE);
    return p->frame == NULL ? ENOMEM : pthread_create(&p->thread, NULL, serve, p);
}

static void forget(pager *p)
{
    if (p->region != NULL) {
        munmap(p->region, p->num_pages * PAGE);
    }
    if (p->faults >= 0) {
        close(p->faults);
    }
    if (p->stop >= 0) {
        close(p->stop);
    }
    free(p->frame);
    free(p);
}

/* paging_start gives a pager whose pages open when they are touched, or an error number. */
int paging_start(void **out, size_t num_pages, void *open, void *key, const uint8_t *sealed,
                 const uint8_t *tags, uint64_t first_version)
{
    pager *p = calloc(1, sizeof(*p));
    int error;

    *out = NULL;
    if (p == NULL) {
        return ENOMEM;
    }
    p->num_pages = num_pages;
    p->open = (page_open)(uintptr_t)open;
    p->key = key;
    p->sealed = sealed;
    p->tags = tags;
    p->first_version = first_version;
    p->faults = p->stop = -1;
    error = begin(p);
    if (error != 0) {
        forget(p);
        return error;
    }
    *out = p;
    return 0;
}

uint64_t paging_region(void *argument)
{
    return (uint64_t)(uintptr_t)((pager *)argument)->region;
}

/* paging_move binds the thread that answers to one processor. */
int paging_move(void *argument, int processor)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET((size_t)processor, &set);
    return pthread_setaffinity_np(((pager *)argument)->thread, sizeof(set), &set);
}

/* paging_drop makes every page fault again. */
int paging_drop(void *argument)
{
    pager *p = argument;

    return madvise(p->region, p->num_pages * PAGE, MADV_DONTNEED) != 0 ? errno : 0;
}

/* paging_stop ends the thread; a page that it could not open is told now. */
int paging_stop(void *argument)
{
    pager *p = argument;
    int status;

    if (eventfd_write(p->stop, 1) != 0) {
        return errno; /* the thread still runs: what it uses is not freed */
    }
    pthread_join(p->thread, NULL);
    status = p->status;
    forget(p);
    return status;
}

static uint64_t now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

/* paging_touch reads the first word of each page of `order`, times each, and returns their sum. The
 * time of reading the clock is part of every figure, ours and theirs. */
uint64_t paging_touch(const uint8_t *base, const uint32_t *order, size_t count, uint32_t *ns)
{
    uint64_t sum = 0, before = now();

    for (size_t i = 0; i < count; i++) {
        sum += *(const volatile uint64_t *)(base + (size_t)order[i] * PAGE);
        uint64_t after = now();
        uint64_t taken = after - before;
        ns[i] = taken > UINT32_MAX ? UINT32_MAX : (uint32_t)taken;
        before = after;
    }
    return sum;
}
