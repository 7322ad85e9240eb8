/* paging_steps.c - what the steps of a fault and of an eviction cost, each alone; see paging.py.
 *
 * Frames are those of a heap: a memory file that is mapped twice, its view watched by userfaultfd.
 * Of each step the fastest of many short rounds counts, by the page, so that neighbours and
 * interrupts fall out. What a pager takes beyond their sum is its own.
 *
 *   paging_steps [view|alias]    that mapping is locked in memory */
#define _GNU_SOURCE
#include "pyenclave/page.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

#define PAGE 4096ul
#define PAGES 32768ul /* 128 MiB: beyond the caches */
#define GROUP 256u    /* pages of a round */
#define ROUNDS 128u   /* rounds that cover all pages once */
#define TURNS 5u

static uint8_t *view, *alias, *plain;
static uint8_t (*tags)[PYE_PAGE_TAG_SIZE];
static uint64_t versions[PAGES];
static uint32_t shuffled[PAGES];
static pye_page_key *key;
static int uffd, pidfd;
static const char *locked = "";
static volatile uint64_t sink;

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void must(int good, const char *what)
{
    if (!good) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        exit(errno == ENOSYS || errno == EPERM || errno == EINVAL ? 77 : 1);
    }
}

static pye_page_info info_of(uint32_t page)
{
    return (pye_page_info){.address = page * PAGE, .flags = 3, .type = 2};
}

static int show(uint32_t page, uint32_t num)
{
    struct uffdio_continue c = {.range = {(uint64_t)(uintptr_t)(view + page * PAGE), num * PAGE}};

    return ioctl(uffd, UFFDIO_CONTINUE, &c) == 0;
}

static void on_fault(int number, siginfo_t *what, void *context)
{
    (void)number;
    (void)context;
    must(show((uint32_t)(((uintptr_t)what->si_addr - (uintptr_t)view) / PAGE), 1), "CONTINUE");
}

static int advice(void)
{
    return *locked != 0 ? MADV_DONTNEED_LOCKED : MADV_DONTNEED;
}

static void hide_all(void)
{
    must(madvise(view, PAGES * PAGE, advice()) == 0, "madvise");
}

static void set_up(void)
{
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MINOR_SHMEM |
                                         UFFD_FEATURE_MISSING_SHMEM};
    struct uffdio_register watch = {.mode = UFFDIO_REGISTER_MODE_MISSING |
                                            UFFDIO_REGISTER_MODE_MINOR};
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    const uint8_t secret[32] = {1}, name[16] = {0};
    const int fd = memfd_create("steps", MFD_CLOEXEC);

    must(fd >= 0 && ftruncate(fd, PAGES * PAGE) == 0, "memfd_create");
    view = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    alias = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    plain = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(view != MAP_FAILED && alias != MAP_FAILED && plain != MAP_FAILED, "mmap");
    (void)madvise(plain, PAGES * PAGE, MADV_NOHUGEPAGE);
    if (*locked != 0) {
        uint8_t *const which = strcmp(locked, "view") == 0 ? view : alias;

        must(mlock2(which, PAGES * PAGE, MLOCK_ONFAULT) == 0, "mlock2");
    }
    memset(alias, 1, PAGES * PAGE);
    memset(plain, 1, PAGES * PAGE);
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    must(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0, "userfaultfd");
    watch.range.start = (uint64_t)(uintptr_t)view;
    watch.range.len = PAGES * PAGE;
    must(ioctl(uffd, UFFDIO_REGISTER, &watch) == 0, "UFFDIO_REGISTER");
    pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    sigfillset(&action.sa_mask);
    must(sigaction(SIGBUS, &action, NULL) == 0, "sigaction");
    key = aligned_alloc(64, pye_page_key_size());
    tags = malloc(PAGES * PYE_PAGE_TAG_SIZE);
    must(key != NULL && tags != NULL, "memory");
    must(pye_page_key_init(key, secret, sizeof(secret), name, UINT32_MAX) == PYE_OK, "key");
    for (uint32_t i = 0; i < PAGES; i++) {
        shuffled[i] = i;
    }
    for (uint32_t i = PAGES - 1; i > 0; i--) {
        const uint32_t j = (uint32_t)(((uint64_t)rand() << 16 ^ (uint64_t)rand()) % (i + 1));
        const uint32_t other = shuffled[i];

        shuffled[i] = shuffled[j];
        shuffled[j] = other;
    }
}

/* ---- steps: each does pages `first` to `first` + GROUP, in order or shuffled ---- */

static uint32_t place(uint32_t i, int mixed)
{
    return mixed ? shuffled[i] : i;
}

static void touch(uint32_t first, uint32_t mixed)
{
    for (uint32_t i = first; i < first + GROUP; i++) {
        sink += *(volatile uint64_t *)(view + place(i, (int)mixed) * PAGE);
    }
}

static void show_in_runs(uint32_t first, uint32_t run)
{
    for (uint32_t i = first; i < first + GROUP; i += run) {
        must(show(i, run), "CONTINUE");
    }
}

static void show_each(uint32_t first, uint32_t mixed)
{
    for (uint32_t i = first; i < first + GROUP; i++) {
        must(show(place(i, (int)mixed), 1), "CONTINUE");
    }
}

static void hide_in_runs(uint32_t first, uint32_t run)
{
    for (uint32_t i = first; i < first + GROUP; i += run) {
        must(madvise(view + i * PAGE, run * PAGE, advice()) == 0, "madvise");
    }
}

static void hide_list(uint32_t first, uint32_t num)
{
    struct iovec list[GROUP];

    for (uint32_t at = first; at < first + GROUP; at += num) {
        for (uint32_t i = 0; i < num; i++) {
            list[i] = (struct iovec){view + shuffled[at + i] * PAGE, PAGE};
        }
        must(syscall(SYS_process_madvise, pidfd, list, (size_t)num, advice(), 0) ==
                 (long)(num * PAGE),
             "process_madvise");
    }
}

static void seal_run(uint32_t first, uint32_t run)
{
    for (uint32_t i = first; i < first + GROUP; i += run) {
        const pye_page_info info = info_of(i);
        uint8_t *const frame = alias + i * PAGE;
        uint64_t version = 0;

        must(pye_pages_seal(key, frame, tags[i], &version, frame, run, &info) == PYE_OK, "seal");
        for (uint32_t k = 0; k < run; k++) {
            versions[i + k] = version + k;
        }
    }
}

static void open_run(uint32_t first, uint32_t run)
{
    for (uint32_t i = first; i < first + GROUP; i += run) {
        const pye_page_info info = info_of(i);
        uint8_t *const frame = alias + i * PAGE;

        must(pye_pages_open(key, frame, frame, tags[i], &versions[i], 0, run, &info) == PYE_OK,
             "open");
    }
}

static void seal_jobs(uint32_t first, uint32_t num)
{
    pye_page_job jobs[GROUP];

    for (uint32_t at = first; at < first + GROUP; at += num) {
        for (uint32_t i = 0; i < num; i++) {
            const uint32_t page = shuffled[at + i];
            uint8_t *const frame = alias + page * PAGE;

            jobs[i] = (pye_page_job){
                .in = frame, .out = frame, .tag = tags[page], .info = info_of(page)};
        }
        must(pye_page_jobs_seal(key, jobs, num) == PYE_OK, "seal");
        for (uint32_t i = 0; i < num; i++) {
            versions[shuffled[at + i]] = jobs[i].version;
        }
    }
}

static void open_each(uint32_t first, uint32_t mixed)
{
    for (uint32_t i = first; i < first + GROUP; i++) {
        const uint32_t page = place(i, (int)mixed);
        const pye_page_info info = info_of(page);
        uint8_t *const frame = alias + page * PAGE;

        must(pye_page_open(key, frame, frame, tags[page], versions[page], &info) == PYE_OK, "open");
    }
}

static void permit_in_runs(uint32_t first, uint32_t run)
{
    for (uint32_t i = first; i < first + GROUP; i += run) {
        must(mprotect(plain + i * PAGE, run * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
    }
}

static void forbid_in_runs(uint32_t first, uint32_t run)
{
    for (uint32_t i = first; i < first + GROUP; i += run) {
        must(mprotect(plain + i * PAGE, run * PAGE, PROT_NONE) == 0, "mprotect");
    }
}

static void copy_run(uint32_t first, uint32_t num)
{
    (void)num;
    memcpy(plain + first * PAGE, alias + first * PAGE, GROUP * PAGE);
}

static void look(uint32_t first, uint32_t num)
{
    (void)num;
    for (uint32_t i = first; i < first + GROUP; i++) {
        sink += *(volatile uint64_t *)(alias + i * PAGE);
    }
}

/* ---- measuring ---- */

typedef void step(uint32_t first, uint32_t number);

typedef struct {
    const char *name;
    step *before, *work;
    uint32_t before_number, number;
} line;

static void measure(const line *what)
{
    double least = 1e18, middle[ROUNDS];

    for (uint32_t turn = 0; turn < TURNS; turn++) {
        hide_all();
        for (uint32_t round = 0; round < ROUNDS; round++) {
            const uint32_t first = round * GROUP;

            if (what->before != NULL) {
                what->before(first, what->before_number);
            }
            const double start = now();
            what->work(first, what->number);
            middle[round] = (now() - start) / GROUP;
            least = middle[round] < least ? middle[round] : least;
        }
    }
    printf("%s\t%.0f\n", what->name, least);
}

static const line LINES[] = {
    {"signal, CONTINUE, back; in order", NULL, touch, 0, 0},
    {"signal, CONTINUE, back; anywhere", NULL, touch, 0, 1},
    {"CONTINUE 1 page a call, in order", NULL, show_each, 0, 0},
    {"CONTINUE 1 page a call, anywhere", NULL, show_each, 0, 1},
    {"CONTINUE 16 pages a call", NULL, show_in_runs, 0, 16},
    {"CONTINUE 64 pages a call", NULL, show_in_runs, 0, 64},
    {"CONTINUE 256 pages a call", NULL, show_in_runs, 0, 256},
    {"DONTNEED 1 page a call", show_in_runs, hide_in_runs, 256, 1},
    {"DONTNEED 64 pages a call", show_in_runs, hide_in_runs, 256, 64},
    {"DONTNEED 256 pages a call", show_in_runs, hide_in_runs, 256, 256},
    {"DONTNEED list of 64 anywhere", show_each, hide_list, 1, 64},
    {"DONTNEED list of 128 anywhere", show_each, hide_list, 1, 128},
    {"seal 64 in a run, in place", look, seal_run, 0, 64},
    {"seal 64 anywhere, in place", look, seal_jobs, 0, 64},
    {"open 64 in a run, in place", seal_run, open_run, 64, 64},
    {"open 1 page, in order, in place", seal_run, open_each, 64, 0},
    {"open 1 page, anywhere, in place", seal_jobs, open_each, 64, 1},
    {"mprotect to none, 64 pages a call", permit_in_runs, forbid_in_runs, 256, 64},
    {"mprotect to read-write, 64 pages a call", forbid_in_runs, permit_in_runs, 256, 64},
    {"mprotect to read-write, 256 pages a call", forbid_in_runs, permit_in_runs, 256, 256},
    {"copy, out of cache", NULL, copy_run, 0, 0},
};

int main(int argc, char **argv)
{
    locked = argc > 1 ? argv[1] : "";
    set_up();
    for (uint32_t i = 0; i < PAGES; i += GROUP) {
        seal_run(i, 64);
    }
    for (size_t i = 0; i < sizeof(LINES) / sizeof(LINES[0]); i++) {
        measure(&LINES[i]);
    }
    return 0;
}
