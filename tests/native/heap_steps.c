/* heap_steps.c - how an ended heap is read that Python does not read it by: by one instruction that
 * touches several pages, by who steps through himself, under a tracer. test_heap_steps.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096

/* open_pages counts the pages that can be read: the kernel looks, and nobody faults. */
int open_pages(const uint8_t *memory, int num)
{
    int ends[2];
    int found = 0;

    if (pipe(ends) != 0) {
        return -1;
    }
    for (int i = 0; i < num; i++) {
        uint8_t taken;

        if (write(ends[1], memory + (size_t)i * PAGE, 1) == 1) {
            found += read(ends[0], &taken, 1) == 1;
        }
    }
    (void)close(ends[0]);
    (void)close(ends[1]);
    return found;
}

uint64_t read_words(const volatile uint64_t *words, size_t num)
{
    uint64_t sum = 0;

    for (size_t i = 0; i < num; i++) {
        sum += words[i];
    }
    return sum;
}

/* read_and_look reads, and says at once how many of the pages are open then. */
void read_and_look(const uint64_t *words, size_t num, int *out_open)
{
    (void)read_words(words, num);
    *out_open = open_pages((const uint8_t *)words, (int)(num * 8 / PAGE));
}

/* gather reads eight numbers with one instruction. */
__attribute__((target("avx2"))) int gather(const int32_t *base, const int32_t index[8])
{
    int32_t out[8];
    int sum = 0;
    const __m256i found =
        _mm256_i32gather_epi32(base, _mm256_loadu_si256((const __m256i *)index), 4);

    _mm256_storeu_si256((__m256i *)out, found);
    for (int i = 0; i < 8; i++) {
        sum |= out[i];
    }
    return sum;
}

/* straddle reads eight bytes that lie in two pages. */
uint64_t straddle(const uint8_t *end_of_page)
{
    uint64_t word;

    __asm__ volatile("movq (%1), %0" : "=r"(word) : "r"(end_of_page - 4) : "memory");
    return word;
}

/* copy moves bytes with one instruction. */
void copy(uint8_t *to, const uint8_t *from, size_t size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

void breakpoint_here(void)
{
    __asm__ volatile("int3");
}

volatile uint64_t traps;
volatile uint64_t flags_seen; /* in the contexts of the traps */

static void on_trap(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    traps += info->si_code == TRAP_TRACE;
    flags_seen += info->si_code <= 0;
}

void count_traps(void)
{
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};

    (void)sigaction(SIGTRAP, &action, NULL);
}

/* step_by_myself reads four words with the trap flag set, and returns how many traps that made. */
uint64_t step_by_myself(const uint64_t *words)
{
    uint64_t found;

    traps = 0;
    __asm__ volatile("subq $128, %%rsp\n\t" /* the red zone */
                     "pushfq\n\t"
                     "orq $0x100, (%%rsp)\n\t"
                     "popfq\n\t"
                     "movq (%1), %0\n\t"
                     "nop\n\t"
                     "addq 8(%1), %0\n\t"
                     "addq 4088(%1), %0\n\t"
                     "addq 4092(%1), %0\n\t"
                     "pushfq\n\t"
                     "andq $~0x100, (%%rsp)\n\t"
                     "popfq\n\t"
                     "addq $128, %%rsp"
                     : "=&r"(found)
                     : "r"(words)
                     : "memory", "cc");
    return traps + found;
}

static const uint64_t *read_by_signal;
volatile uint64_t signals;

static void on_alarm(int number)
{
    (void)number;
    signals++;
    (void)read_words(read_by_signal, 2);
}

/* read_in_signals has SIGALRM's handler read two words. */
void read_in_signals(const uint64_t *words)
{
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};

    read_by_signal = words;
    (void)sigaction(SIGALRM, &action, NULL);
}

/* trace runs a program under a tracer that keeps SIGTRAP to itself, as debuggers do, or hands on
 * (`all`) every signal. It returns the program's exit status, or 99 if it is stepped for ever. */
int trace(char *const arguments[], int all)
{
    const pid_t pid = fork();
    int status;
    int begun = 0;

    if (pid == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0) {
            (void)execv(arguments[0], arguments);
        }
        _exit(98);
    }
    for (int kept = 0; kept < 1000;) {
        if (waitpid(pid, &status, 0) != pid) {
            return 97;
        }
        if (!WIFSTOPPED(status)) {
            return WIFEXITED(status) ? WEXITSTATUS(status) : 96;
        }
        const int number = WSTOPSIG(status);
        const int keeps = number == SIGTRAP && (!all || !begun);

        begun = 1; /* the first one is of execve */
        kept += keeps;
        if (ptrace(PTRACE_CONT, pid, NULL, (long)(keeps ? 0 : number)) != 0) {
            return 95;
        }
    }
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, &status, 0);
    return 99;
}
