/* proof_core.c - what the core's test build has beside the core (docs/proofs.md).
 *
 * 1. Every check (base/check.h) notes that it fired; the one that is chosen does not stop anything.
 * 2. Every allocation and every system call of the core comes through here (the linker's --wrap)
 *    and can be made to fail: the n-th from now on, with any errno.
 *
 * Both are steered through one page of memory, shared by all processes of a test: the file named by
 * PYE_PROOF_STATE, or memory that children inherit. tests/native/proof_state.py knows its layout. */
#define _GNU_SOURCE
#include "base/check.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_CHECKS 4000
#define ARMED_CALLS 1       /* allocations and system calls are counted */
#define ARMED_COMPARISONS 2 /* memcmp is counted: one that fails finds a difference */
#define ARMED_SYSCONF 3     /* sysconf is counted: one that fails does not know the answer */
#define LIE -1

typedef struct {
    uint32_t mutant;  /* the check that must not stop; 0: none */
    uint32_t armed;   /* whether calls are counted */
    int32_t owner;    /* whose calls: a thread, or 0 for all threads and processes */
    uint32_t fail_at; /* the one that fails; 0: none */
    int32_t error;    /* its errno; 0: the one that is usual for it; LIE: none, but nothing is done */
    uint32_t calls;   /* counted so far */
    uint32_t failed;  /* how many failed */
    int32_t live;     /* allocations of the core that were not freed */
    char name[32];    /* of the first that failed */
    uint32_t also;    /* bit n: so does the one that comes n + 1 later */
    uint32_t reserved[15];
    uint8_t fired[MAX_CHECKS];
} proof_state;

_Static_assert(sizeof(proof_state) == 128 + MAX_CHECKS, "tests/native/proof_state.py");

extern pye_check_site __start_pye_checks[];
extern pye_check_site __stop_pye_checks[];

static proof_state *state;

/* ---- checks ---- */

static int compare_sites(const void *a, const void *b)
{
    const pye_check_site *x = *(pye_check_site *const *)a;
    const pye_check_site *y = *(pye_check_site *const *)b;
    const int order = strcmp(x->file, y->file);

    return order != 0 ? order : (x->line > y->line) - (x->line < y->line);
}

__attribute__((constructor)) static void begin(void)
{
    static pye_check_site *sorted[MAX_CHECKS];
    const char *path = getenv("PYE_PROOF_STATE");
    const char *mutant = getenv("PYE_MUTATE");
    const size_t count = (size_t)(__stop_pye_checks - __start_pye_checks);
    uint32_t number = 0;
    int fd = -1;

    if (path != NULL) {
        fd = open(path, O_RDWR | O_CLOEXEC);
    }
    state = mmap(NULL, sizeof(*state), PROT_READ | PROT_WRITE,
                 fd >= 0 ? MAP_SHARED : MAP_SHARED | MAP_ANONYMOUS, fd, 0);
    if (fd >= 0) {
        (void)close(fd);
    }
    if (state == MAP_FAILED || count >= MAX_CHECKS) {
        (void)fprintf(stderr, "proof_core: no state or too many checks\n");
        abort();
    }
    for (size_t i = 0; i < count; i++) {
        sorted[i] = &__start_pye_checks[i];
    }
    qsort(sorted, count, sizeof(sorted[0]), compare_sites);
    for (size_t i = 0; i < count; i++) { /* one check of an inline function is one check */
        number += i == 0 || compare_sites(&sorted[i - 1], &sorted[i]) != 0;
        sorted[i]->number = number;
    }
    if (mutant != NULL) {
        state->mutant = (uint32_t)strtoul(mutant, NULL, 10);
    }
}

/* For ctypes: the checks of this build. */
size_t pye_proof_checks(const pye_check_site **first)
{
    *first = __start_pye_checks;
    return (size_t)(__stop_pye_checks - __start_pye_checks);
}

proof_state *pye_proof_state(void)
{
    return state;
}

int pye_check_stops(const pye_check_site *site)
{
    __atomic_store_n(&state->fired[site->number], 1, __ATOMIC_RELAXED);
    return __atomic_load_n(&state->mutant, __ATOMIC_RELAXED) != site->number;
}

/* ---- calls that fail ---- */

long __real_syscall(long number, ...);

/* Whether this call is the one that fails; then *error is its errno. */
static int fails_if(uint32_t armed, const char *name, int usual, int *error)
{
    if (state == NULL || __atomic_load_n(&state->armed, __ATOMIC_RELAXED) != armed) {
        return 0;
    }
    if (state->owner != 0 && state->owner != (int32_t)__real_syscall(SYS_gettid)) {
        return 0;
    }
    const uint32_t call = __atomic_add_fetch(&state->calls, 1, __ATOMIC_SEQ_CST);
    const uint32_t later = call - state->fail_at;
    if (state->fail_at == 0 || call < state->fail_at || later > 32 ||
        (later != 0 && (state->also >> (later - 1) & 1) == 0)) {
        return 0;
    }
    *error = state->error != 0 ? state->error : usual;
    if (__atomic_add_fetch(&state->failed, 1, __ATOMIC_SEQ_CST) == 1) {
        (void)snprintf(state->name, sizeof(state->name), "%s", name);
    }
    return 1;
}

static int fails(const char *name, int usual, int *error)
{
    return fails_if(ARMED_CALLS, name, usual, error);
}

#define WRAP(type, name, failure, usual, parameters, arguments)                                    \
    type __real_##name parameters;                                                                 \
    type __wrap_##name parameters;                                                                 \
    type __wrap_##name parameters                                                                  \
    {                                                                                              \
        int error;                                                                                 \
                                                                                                   \
        if (fails(#name, usual, &error)) {                                                         \
            errno = error;                                                                         \
            return failure;                                                                        \
        }                                                                                          \
        return __real_##name arguments;                                                            \
    }

/* The same for functions that return the error instead of setting errno. */
#define WRAP_PTHREAD(name, usual, parameters, arguments)                                           \
    int __real_##name parameters;                                                                  \
    int __wrap_##name parameters;                                                                  \
    int __wrap_##name parameters                                                                   \
    {                                                                                              \
        int error;                                                                                 \
                                                                                                   \
        return fails(#name, usual, &error) ? error : __real_##name arguments;                      \
    }

WRAP(void *, mmap, MAP_FAILED, ENOMEM,
     (void *at, size_t len, int access, int flags, int fd, off_t offset),
     (at, len, access, flags, fd, offset))
WRAP(int, mprotect, -1, ENOMEM, (void *at, size_t len, int access), (at, len, access))
WRAP(int, munlock, -1, ENOMEM, (const void *at, size_t len), (at, len))
WRAP(int, ftruncate, -1, EINVAL, (int fd, off_t len), (fd, len))
WRAP(int, open, -1, EMFILE, (const char *path, int flags, int mode), (path, flags, mode))
WRAP(int, pipe2, -1, EMFILE, (int fds[2], int flags), (fds, flags))
WRAP(int, stat, -1, ENOENT, (const char *path, struct stat *out), (path, out))
WRAP(int, fstat, -1, EIO, (int fd, struct stat *out), (fd, out))
WRAP(int, fcntl, -1, EMFILE, (int fd, int command, long argument), (fd, command, argument))
WRAP(ssize_t, pread, -1, EIO, (int fd, void *data, size_t len, off_t at), (fd, data, len, at))
WRAP(ssize_t, pwrite, -1, EIO, (int fd, const void *data, size_t len, off_t at),
     (fd, data, len, at))
WRAP(int, fallocate, -1, ENOSPC, (int fd, int mode, off_t at, off_t len), (fd, mode, at, len))
WRAP(ssize_t, write, -1, EPIPE, (int fd, const void *data, size_t len), (fd, data, len))
WRAP(int, poll, -1, ENOMEM, (struct pollfd * fds, nfds_t count, int ms), (fds, count, ms))
WRAP(int, socket, -1, EMFILE, (int domain, int type, int protocol), (domain, type, protocol))
WRAP(int, connect, -1, EACCES, (int fd, const struct sockaddr *to, socklen_t len), (fd, to, len))
WRAP(pid_t, fork, -1, EAGAIN, (void), ())
WRAP(pid_t, waitpid, -1, EINTR, (pid_t pid, int *status, int options), (pid, status, options))
WRAP(int, unshare, -1, EPERM, (int flags), (flags))
WRAP(int, kill, -1, EPERM, (pid_t pid, int number), (pid, number))
WRAP(int, getrlimit, -1, EINVAL, (int resource, struct rlimit *out), (resource, out))
WRAP(int, prctl, -1, EINVAL, (int option, long a, long b, long c, long d), (option, a, b, c, d))
WRAP(int, sigaction, -1, EINVAL,
     (int number, const struct sigaction *action, struct sigaction *old), (number, action, old))
WRAP(int, sigprocmask, -1, EINVAL, (int how, const sigset_t *set, sigset_t *old), (how, set, old))
WRAP(int, clock_gettime, -1, EINVAL, (clockid_t which, struct timespec *out), (which, out))
WRAP_PTHREAD(pthread_attr_init, ENOMEM, (pthread_attr_t * attributes), (attributes))
WRAP_PTHREAD(pthread_attr_setstacksize, EINVAL, (pthread_attr_t * attributes, size_t size),
             (attributes, size))
WRAP_PTHREAD(pthread_mutex_init, ENOMEM,
             (pthread_mutex_t * mutex, const pthread_mutexattr_t *attributes), (mutex, attributes))
WRAP_PTHREAD(pthread_create, EAGAIN,
             (pthread_t * thread, const pthread_attr_t *attributes, void *(*run)(void *),
              void *context),
             (thread, attributes, run, context))

/* Allocations are counted too: what a failed operation leaves behind shows in `live`. */
#define WRAP_ALLOCATION(name, parameters, arguments)                                               \
    void *__real_##name parameters;                                                                \
    void *__wrap_##name parameters;                                                                \
    void *__wrap_##name parameters                                                                 \
    {                                                                                              \
        int error;                                                                                 \
        void *made = NULL;                                                                         \
                                                                                                   \
        if (fails(#name, ENOMEM, &error)) {                                                        \
            errno = ENOMEM;                                                                        \
        } else {                                                                                   \
            made = __real_##name arguments;                                                        \
            __atomic_add_fetch(&state->live, made != NULL, __ATOMIC_SEQ_CST);                      \
        }                                                                                          \
        return made;                                                                               \
    }

WRAP_ALLOCATION(malloc, (size_t size), (size))
WRAP_ALLOCATION(calloc, (size_t count, size_t size), (count, size))
WRAP_ALLOCATION(aligned_alloc, (size_t align, size_t size), (align, size))

void __real_free(void *memory);
void __wrap_free(void *memory);
void __wrap_free(void *memory)
{
    __atomic_sub_fetch(&state->live, memory != NULL, __ATOMIC_SEQ_CST);
    __real_free(memory);
}

ssize_t __real_read(int fd, void *data, size_t len);
ssize_t __wrap_read(int fd, void *data, size_t len);
ssize_t __wrap_read(int fd, void *data, size_t len)
{
    int error;

    if (!fails("read", EIO, &error)) {
        return __real_read(fd, data, len);
    }
    if (error == LIE) { /* a file with something else in it */
        memset(data, 'x', len);
        return (ssize_t)len;
    }
    errno = error;
    return -1;
}

int __real_memcmp(const void *a, const void *b, size_t len);
int __wrap_memcmp(const void *a, const void *b, size_t len);
int __wrap_memcmp(const void *a, const void *b, size_t len)
{
    int error;

    return fails_if(ARMED_COMPARISONS, "memcmp", 0, &error) ? 1 : __real_memcmp(a, b, len);
}

/* The name of this one says what was advised. */
int __real_madvise(void *at, size_t len, int advice);
int __wrap_madvise(void *at, size_t len, int advice);
int __wrap_madvise(void *at, size_t len, int advice)
{
    char name[32];
    int error;

    (void)snprintf(name, sizeof(name), "madvise %d", advice);
    if (fails(name, ENOMEM, &error)) {
        errno = error;
        return -1;
    }
    return __real_madvise(at, len, advice);
}

int __real_ioctl(int fd, unsigned long request, void *argument);
int __wrap_ioctl(int fd, unsigned long request, void *argument);
int __wrap_ioctl(int fd, unsigned long request, void *argument)
{
    int error;

    if (fails("ioctl", EINVAL, &error)) {
        errno = error;
        return error == LIE ? 0 : -1; /* a lie: the answer is what was asked */
    }
    return __real_ioctl(fd, request, argument);
}

long __real_sysconf(int name);
long __wrap_sysconf(int name);
long __wrap_sysconf(int name)
{
    int error;

    return fails_if(ARMED_SYSCONF, "sysconf", EINVAL, &error) ? -1 : __real_sysconf(name);
}

/* Six arguments at most; what was not given is garbage that the kernel does not look at. */
long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f);
long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    char name[32];
    int error;

    (void)snprintf(name, sizeof(name), "syscall %ld", number);
    if (number != SYS_gettid && fails(name, ENOSYS, &error)) { /* that one cannot fail */
        errno = error;
        return error == LIE ? 0 : -1;
    }
    return __real_syscall(number, a, b, c, d, e, f);
}
