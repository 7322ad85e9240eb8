/* waking.c - what sleeping and waking cost, with nothing else done: on one processor the least that a call
 * to a sleeping worker can take, and a pipe's; to an idle processor the least that a step of a launch can.
 * In ticks of the time stamp counter; x86-64, Linux.
 *   cc -O2 -o waking bench/waking.c && ./waking [CPU [ANOTHER]] */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum { ROUNDS = 4000, FEW = 400, PAGES = 512, REQUEST = 0, REPLY = 16, HOST_ASLEEP = 32, WORKER_ASLEEP = 48 };

static uint32_t *words; /* shared */
static uint64_t ticks[ROUNDS];
static long slice_ns; /* of a wait; 0: no timeout */
static int yields;    /* the host gives the processor away once before it sleeps */
static long slept;

static void wake(uint32_t *word)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void post(int word, int asleep)
{
    __atomic_fetch_add(&words[word], 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&words[asleep], __ATOMIC_SEQ_CST)) {
        wake(&words[word]);
    }
}

static void await(int word, uint32_t seen, int asleep)
{
    const struct timespec slice = {0, slice_ns};

    if (yields && asleep == HOST_ASLEEP) {
        (void)sched_yield();
    }
    while (__atomic_load_n(&words[word], __ATOMIC_SEQ_CST) == seen) {
        __atomic_store_n(&words[asleep], 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&words[word], __ATOMIC_SEQ_CST) == seen) {
            slept += asleep == HOST_ASLEEP;
            (void)syscall(SYS_futex, &words[word], FUTEX_WAIT, seen, slice_ns ? &slice : NULL, NULL,
                          0);
        }
        __atomic_store_n(&words[asleep], 0, __ATOMIC_SEQ_CST);
    }
}

static int compare(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static void tell(const char *what)
{
    qsort(ticks, ROUNDS, sizeof(ticks[0]), compare);
    printf("%-44s %6llu (%llu to %llu)  host slept in %3.0f %%\n", what,
           (unsigned long long)ticks[ROUNDS / 2], (unsigned long long)ticks[ROUNDS / 4],
           (unsigned long long)ticks[3 * ROUNDS / 4], 100.0 * (double)slept / ROUNDS);
}

static void by_futex(const char *what, long slice, int yielding)
{
    slice_ns = slice;
    yields = yielding;
    slept = 0;
    memset(words, 0, 4096);
    const pid_t pid = fork();
    if (pid == 0) {
        for (uint32_t seen = 0;; seen++) {
            await(REQUEST, seen, WORKER_ASLEEP);
            post(REPLY, HOST_ASLEEP);
        }
    }
    for (uint32_t i = 0; i < ROUNDS; i++) {
        while (!__atomic_load_n(&words[WORKER_ASLEEP], __ATOMIC_SEQ_CST)) {
            (void)sched_yield();
        }
        const uint64_t start = __rdtsc();
        post(REQUEST, WORKER_ASLEEP);
        await(REPLY, i, HOST_ASLEEP);
        ticks[i] = __rdtsc() - start;
    }
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, NULL, 0);
    tell(what);
}

static int by_pipe(void)
{
    int there[2];
    int back[2];
    char data[64] = {0};

    slept = 0;
    if (pipe(there) != 0 || pipe(back) != 0) {
        return 1;
    }
    const pid_t pid = fork();
    if (pid == 0) {
        while (read(there[0], data, sizeof(data)) > 0 && write(back[1], data, sizeof(data)) > 0) {
        }
        _exit(0);
    }
    for (int i = 0; i < ROUNDS; i++) {
        (void)sched_yield();
        const uint64_t start = __rdtsc();
        if (write(there[1], data, sizeof(data)) < 0 || read(back[0], data, sizeof(data)) < 0) {
            return 1;
        }
        ticks[i] = __rdtsc() - start;
    }
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, NULL, 0);
    tell("a pipe, 64 bytes");
    return 0;
}

static int pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return sched_setaffinity(0, sizeof(set), &set);
}

static uint32_t pages[PAGES][1024];

/* A word of each page, each naming the next, in an order that nothing foresees; the ticks it took. */
static uint64_t follow(void)
{
    const uint64_t start = __rdtsc();
    uint32_t page = 0;

    for (uint32_t i = 0; i < PAGES; i++) {
        page = *(volatile uint32_t *)&pages[page][16 * (page % 61)];
    }
    return __rdtsc() - start;
}

static void tell_few(const char *what, uint64_t *found)
{
    qsort(found, FEW, sizeof(found[0]), compare);
    printf("%-44s %6llu (%llu to %llu)\n", what, (unsigned long long)found[FEW / 2],
           (unsigned long long)found[FEW / 4], (unsigned long long)found[3 * FEW / 4]);
}

/* Waking who sleeps on a processor that had nothing to do for five milliseconds: how long the call takes
 * that wakes it, how long until it runs, and what its own memory costs it then, once and again. */
static int across(int other)
{
    const struct timespec idle = {0, 5000000};
    volatile uint64_t *told = (volatile uint64_t *)&words[128];
    static uint64_t found[4][FEW];

    for (uint32_t i = 0; i < PAGES; i++) {
        pages[i][16 * (i % 61)] = (i * 5 + 167) % PAGES; /* visits each once */
    }
    slice_ns = 0;
    memset(words, 0, 4096);
    const pid_t pid = fork();
    if (pid == 0) {
        if (pin(other) != 0) {
            _exit(1);
        }
        for (uint32_t seen = 0;; seen++) {
            await(REQUEST, seen, WORKER_ASLEEP);
            told[0] = __rdtsc();
            told[1] = follow();
            told[2] = follow();
            __atomic_fetch_add(&words[REPLY], 1, __ATOMIC_SEQ_CST);
        }
    }
    for (uint32_t i = 0; i < FEW; i++) {
        (void)nanosleep(&idle, NULL);
        while (!__atomic_load_n(&words[WORKER_ASLEEP], __ATOMIC_SEQ_CST)) {
        }
        const uint64_t start = __rdtsc();
        post(REQUEST, WORKER_ASLEEP);
        found[0][i] = __rdtsc() - start;
        while (__atomic_load_n(&words[REPLY], __ATOMIC_SEQ_CST) == i) {
        }
        found[1][i] = told[0] - start;
        found[2][i] = told[1] / PAGES;
        found[3][i] = told[2] / PAGES;
    }
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, NULL, 0);
    tell_few("to an idle processor: the call that wakes", found[0]);
    tell_few("until the woken runs", found[1]);
    tell_few("a word of a page of its own, then", found[2]);
    tell_few("the same once more", found[3]);
    return 0;
}

/* The least of forty turns. */
#define LEAST(what, call)                                                                          \
    do {                                                                                           \
        uint64_t least = UINT64_MAX;                                                               \
        for (int turn = 0; turn < 40; turn++) {                                                    \
            const uint64_t start = __rdtsc();                                                      \
            for (int i = 0; i < 1000; i++) {                                                       \
                (void)(call);                                                                      \
            }                                                                                      \
            const uint64_t took = (__rdtsc() - start) / 1000;                                      \
            least = took < least ? took : least;                                                   \
        }                                                                                          \
        printf("%-44s %6llu\n", what, (unsigned long long)least);                                  \
    } while (0)

int main(int argc, char **argv)
{
    const struct timespec slice = {0, 100000000};
    const int fd = memfd_create("waking", 0);
    if (pin(argc > 1 ? atoi(argv[1]) : 0) != 0 || fd < 0 || ftruncate(fd, 4096) != 0) {
        return 1;
    }
    words = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (words == MAP_FAILED) {
        return 1;
    }
    words[0] = 0;
    LEAST("a system call that does nothing", syscall(SYS_getppid));
    LEAST("a wake of nobody", syscall(SYS_futex, words, FUTEX_WAKE, 1, NULL, NULL, 0));
    LEAST("a wait that does not sleep",
          syscall(SYS_futex, words, FUTEX_WAIT, 1, NULL, NULL, 0));
    LEAST("the same, with a timeout", syscall(SYS_futex, words, FUTEX_WAIT, 1, &slice, NULL, 0));
    for (int i = 0; i < 3; i++) {
        if (by_pipe() != 0) {
            return 1;
        }
        by_futex("a futex, slices of 100 ms", 100000000, 0);
        by_futex("a futex, no timeout", 0, 0);
        by_futex("a futex, the host yields first", 100000000, 1);
    }
    return argc > 2 ? across(atoi(argv[2])) : 0;
}
