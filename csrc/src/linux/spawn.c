/* spawn.c - one clone into new namespaces that leaves the C library consistent.
 *
 * glibc's fork cannot take namespace flags, and after a bare clone system call its cached thread
 * id is the parent's. CLONE_CHILD_SETTID has the kernel write the id of the child where the cache
 * is. That address is what the kernel clears at thread exit (PR_GET_TID_ADDRESS), or else the only
 * word of the thread descriptor that holds the id in this process and in a forked child. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#if defined(__linux__)

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "linux/namespaces.h"

#define PR_GET_TID_ADDRESS_NUMBER 40
/* Size of the part of the thread descriptor that is searched; glibc's is 2304 bytes or more. */
#define DESCRIPTOR_SIZE 2048
#define MAX_CANDIDATES 8

static const char *const files[PYE_NUM_NS] = {
    "/proc/self/ns/user", "/proc/self/ns/net", "/proc/self/ns/pid",   "/proc/self/ns/mnt",
    "/proc/self/ns/ipc",  "/proc/self/ns/uts", "/proc/self/ns/cgroup",
};
static const int clone_flags[PYE_NUM_NS] = {
    CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWNS,
    CLONE_NEWIPC,  CLONE_NEWUTS, CLONE_NEWCGROUP,
};

uint64_t pye_namespace_id(size_t index)
{
    struct stat found;

    return index < PYE_NUM_NS && stat(files[index], &found) == 0 ? (uint64_t)found.st_ino : 0;
}

static int flags_of(uint32_t namespaces)
{
    int flags = 0;

    for (size_t i = 0; i < PYE_NUM_NS; i++) {
        flags |= (namespaces >> i & 1) != 0 ? clone_flags[i] : 0;
    }
    return flags;
}

static pid_t thread_id(void)
{
    return (pid_t)syscall(SYS_gettid);
}

/* Whether `address` is inside this thread's descriptor and holds its id. */
static int is_tid_address(uintptr_t address)
{
    const uintptr_t self = (uintptr_t)pthread_self();

    return address >= self && address < self + DESCRIPTOR_SIZE && address % sizeof(pid_t) == 0 &&
           *(volatile pid_t *)address == thread_id();
}

/* In a forked child, where the C library has put the child's id into its descriptor: which one
 * candidate follows? Exits with its index, or MAX_CANDIDATES. */
static void judge_candidates(const uintptr_t *candidates, int count)
{
    const pid_t mine = thread_id();
    int index = MAX_CANDIDATES;

    for (int i = 0; i < count; i++) {
        if (*(volatile pid_t *)candidates[i] == mine) {
            index = index == MAX_CANDIDATES ? i : MAX_CANDIDATES + 1;
        }
    }
    _exit(index < MAX_CANDIDATES ? index : MAX_CANDIDATES);
}

static uintptr_t search_tid_address(void)
{
    const uintptr_t self = (uintptr_t)pthread_self();
    uintptr_t candidates[MAX_CANDIDATES];
    int count = 0;
    int status;
    pid_t child;

    for (uintptr_t at = self; at < self + DESCRIPTOR_SIZE; at += sizeof(pid_t)) {
        if (is_tid_address(at)) {
            if (count == MAX_CANDIDATES) {
                return 0;
            }
            candidates[count++] = at;
        }
    }
    if (count == 0) {
        return 0;
    }
    child = fork();
    if (child == 0) {
        judge_candidates(candidates, count);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) ||
        WEXITSTATUS(status) >= count) {
        return 0;
    }
    return candidates[WEXITSTATUS(status)];
}

static uintptr_t find_tid_address(uint32_t flags)
{
    uintptr_t address = 0;

    if ((flags & PYE_SPAWN_NO_TID_PRCTL) == 0 &&
        prctl(PR_GET_TID_ADDRESS_NUMBER, &address, 0L, 0L, 0L) == 0 && is_tid_address(address)) {
        return address;
    }
    return search_tid_address();
}

/* The child's first steps, on every way: tie its life to the parent's. */
static void begin_child(pye_spawned *out, int parent_pidfd)
{
    if (PYE_GUARD(pye_harden_parent_death(SIGKILL, parent_pidfd) != PYE_OK)) {
        _exit(1);
    }
    (void)close(parent_pidfd);
    out->pid = 0;
    out->pidfd = -1;
}

/* One clone. Returns as fork does; in the child the C library's state is as after fork. */
static pid_t clone_once(int flags, uintptr_t tid_address, int *pidfd)
{
    const unsigned long all = (unsigned long)(flags | CLONE_PIDFD | CLONE_CHILD_SETTID |
                                              CLONE_CHILD_CLEARTID | SIGCHLD);
    void *robust_list = NULL;
    size_t robust_len = 0;
    pid_t pid;

    /* A forked child has no robust list until the C library sets it again. */
    (void)syscall(SYS_get_robust_list, 0, &robust_list, &robust_len);
#if defined(__x86_64__)
    pid = (pid_t)syscall(SYS_clone, all, NULL, pidfd, tid_address, 0);
#else
    pid = (pid_t)syscall(SYS_clone, all, NULL, pidfd, 0, tid_address);
#endif
    if (pid == 0 && robust_list != NULL) {
        (void)syscall(SYS_set_robust_list, robust_list, robust_len);
    }
    return pid;
}

/* Refusals that fewer namespaces may cure; others (no memory, too many processes) are failures. */
static int is_refusal(int error)
{
    return error == EPERM || error == EACCES || error == EINVAL || error == ENOSYS ||
           error == ENOSPC || error == EUSERS;
}

/* Which sets of namespaces to try, best first. Returns how many. */
static int attempts_of(uint32_t namespaces, uint32_t attempts[3])
{
    int count = 0;

    attempts[count++] = namespaces;
    if ((namespaces & PYE_NS_USER) != 0 && namespaces != PYE_NS_USER) {
        attempts[count++] = namespaces & ~(uint32_t)PYE_NS_USER;
    }
    if (namespaces != 0) {
        attempts[count++] = 0;
    }
    return count;
}

static pye_status spawn_clone(pye_spawned *out, uint32_t namespaces, uintptr_t tid_address,
                              int parent_pidfd)
{
    uint32_t attempts[3];
    const int count = attempts_of(namespaces, attempts);

    for (int i = 0; i < count; i++) {
        int pidfd = -1;
        const pid_t pid = clone_once(flags_of(attempts[i]), tid_address, &pidfd);

        if (pid < 0) {
            if (i + 1 < count && is_refusal(errno)) {
                continue;
            }
            return pye_os_status(errno);
        }
        out->namespaces = attempts[i];
        out->way = attempts[i] != 0 || namespaces == 0 ? PYE_SPAWN_CLONE : PYE_SPAWN_FORK;
        if (pid == 0) {
            begin_child(out, parent_pidfd);
        } else {
            out->pid = pid;
            out->pidfd = pidfd;
        }
        return PYE_OK;
    }
    return PYE_E_OS;
}

/* One read of a pipe's message; a signal in between is none of its business. */
static ssize_t read_whole(int fd, void *out, size_t len)
{
    ssize_t got;

    do {
        got = read(fd, out, len);
    } while (got < 0 && errno == EINTR);
    return got;
}

typedef struct {
    int64_t pid; /* of the worker, or -errno */
    uint32_t namespaces;
    uint32_t reserved;
} middle_report;

/* The process in the middle: enters the namespaces, forks the worker into them, reports, ends. */
static void run_middle(pye_spawned *out, uint32_t namespaces, const int report[2],
                       const int go[2], int parent_pidfd)
{
    middle_report said = {0, 0, 0};
    uint32_t attempts[3];
    const int count = attempts_of(namespaces, attempts);
    pid_t pid;
    char byte;

    (void)close(report[0]);
    (void)close(go[1]);
    for (int i = 0; i < count; i++) {
        if (unshare(flags_of(attempts[i])) == 0) {
            said.namespaces = attempts[i];
            break;
        }
    }
    pid = fork();
    if (pid == 0) {
        (void)close(report[1]);
        /* Parent death counts from the real maker, so wait until the middle is reaped. */
        if (PYE_GUARD(read_whole(go[0], &byte, 1) != 1)) {
            _exit(1);
        }
        (void)close(go[0]);
        out->namespaces = said.namespaces;
        begin_child(out, parent_pidfd);
        return;
    }
    said.pid = pid > 0 ? pid : -errno;
    (void)!write(report[1], &said, sizeof(said));
    _exit(0);
}

static pye_status spawn_double_fork(pye_spawned *out, uint32_t namespaces, int parent_pidfd)
{
    pye_status rc = PYE_E_OS;
    middle_report said = {0, 0, 0};
    int report[2] = {-1, -1};
    int go[2] = {-1, -1};
    int status;
    pid_t middle;

    out->way = namespaces != 0 ? PYE_SPAWN_DOUBLE_FORK : PYE_SPAWN_FORK;
    /* The worker becomes this process's child when the middle ends. */
    PYE_REQUIRE(prctl(PR_SET_CHILD_SUBREAPER, 1L, 0L, 0L, 0L) == 0, pye_os_status(errno));
    PYE_REQUIRE(pipe2(report, O_CLOEXEC) == 0, pye_os_status(errno));
    PYE_REQUIRE(pipe2(go, O_CLOEXEC) == 0, pye_os_status(errno));
    middle = fork();
    PYE_REQUIRE(middle >= 0, pye_os_status(errno));
    if (middle == 0) {
        run_middle(out, namespaces, report, go, parent_pidfd);
        return PYE_OK; /* the worker */
    }
    (void)close(report[1]);
    report[1] = -1;
    if (PYE_GUARD(read_whole(report[0], &said, sizeof(said)) != (ssize_t)sizeof(said))) {
        said.pid = -EIO;
    }
    while (waitpid(middle, &status, 0) < 0 && errno == EINTR) {
    }
    if (PYE_GUARD(said.pid <= 0)) {
        errno = (int)-said.pid;
        rc = pye_os_status(errno);
        goto done;
    }
    out->pid = said.pid;
    out->namespaces = said.namespaces;
    PYE_CHECK(pye_pidfd_open(&out->pidfd, said.pid));
    PYE_REQUIRE(write(go[1], "g", 1) == 1, pye_os_status(errno));
done:
    for (int i = 0; i < 2; i++) {
        if (report[i] >= 0) {
            (void)close(report[i]);
        }
        if (go[i] >= 0) {
            (void)close(go[i]);
        }
    }
    if (rc != PYE_OK && said.pid > 0) { /* nobody let it go, so it ends */
        const int saved = errno;

        while (waitpid((pid_t)said.pid, &status, 0) < 0 && errno == EINTR) {
        }
        if (out->pidfd >= 0) {
            (void)close(out->pidfd);
        }
        out->pidfd = -1;
        out->pid = 0;
        errno = saved;
    }
    return rc;
}

pye_status pye_spawn_worker(pye_spawned *out, uint32_t namespaces, uint32_t flags)
{
    pye_status rc;
    uint32_t threads;
    uintptr_t tid_address = 0;
    int self = -1;

    memset(out, 0, sizeof(*out));
    out->pidfd = -1;
    PYE_REFUSE_IF((namespaces & ~(uint32_t)PYE_NS_ALL) != 0 ||
                      (flags & ~(uint32_t)(PYE_SPAWN_NO_CLONE | PYE_SPAWN_NO_TID_PRCTL)) != 0,
                  PYE_E_ARGUMENT);
    PYE_TRY(pye_harden_threads(&threads));
    PYE_REFUSE_IF(threads != 1, PYE_E_STATE);
    out->outer_pid = getpid();
    for (size_t i = 0; i < PYE_NUM_NS; i++) {
        out->outer_ns[i] = pye_namespace_id(i);
    }
    PYE_TRY(pye_pidfd_open(&self, getpid()));
    if ((flags & PYE_SPAWN_NO_CLONE) == 0) {
        tid_address = find_tid_address(flags);
    }
    rc = tid_address != 0 ? spawn_clone(out, namespaces, tid_address, self)
                          : spawn_double_fork(out, namespaces, self);
    if (out->pid != 0 || rc != PYE_OK) {
        (void)close(self); /* the child has closed its own */
    }
    return rc;
}

#endif
