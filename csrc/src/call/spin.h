/* spin.h - looking at a word before sleeping on it: how long is learnt from how long it took. */
#ifndef PYE_SRC_CALL_SPIN_H
#define PYE_SRC_CALL_SPIN_H

#include <stdint.h>

/* In ticks of spin_clock, SPIN_RATE a second or near it: about 60 us and 2 us at 2 to 3 GHz. Waking a sleeping core costs 5 to
 * 13 us, so looking for less than a few times that is cheaper than sleeping. */
#define SPIN_LONGEST 150000u
#define SPIN_SHORTEST 5000u
#define SPIN_RATE 2500000000u
/* Then this often another thread may have the core, before sleeping. */
#define SPIN_YIELDS 2
#ifndef SPIN_LOOKS
#define SPIN_LOOKS 64
#endif

typedef struct {
    uint64_t budget;
    uint64_t longest;
} spin_state;

static inline void spin_init(spin_state *spin)
{
    spin->budget = SPIN_LONGEST;
    spin->longest = SPIN_LONGEST;
}

/* What waits from now on are worth at most. What was learnt stays. */
static inline void spin_set_longest(spin_state *spin, uint64_t longest)
{
    if (spin->budget == spin->longest || spin->budget > longest) {
        spin->budget = longest;
    }
    spin->longest = longest;
}

static inline uint64_t spin_clock(void)
{
#if defined(SPIN_CLOCK) /* tests */
    return SPIN_CLOCK();
#elif defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t ticks;
    uint64_t frequency; /* 20 to 100 MHz on many machines, 1 GHz from Armv8.6 on */
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(ticks));
    __asm__ volatile("mrs %0, cntfrq_el0" : "=r"(frequency));
    return ticks * (frequency - 1 < SPIN_RATE ? SPIN_RATE / frequency : 1);
#else
    return 0;
#endif
}

/* On AArch64 not WFE: its wake-up is bounded only by an event stream that the kernel may have
 * switched off, and hypervisors trap it. */
static inline void spin_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* After a wait that did not end while spinning: what came soon is worth spinning for next time,
 * what took long is not. */
static inline void spin_learn(spin_state *spin, uint64_t start)
{
    if (spin_clock() - start < spin->longest) {
        spin->budget = spin->longest;
    } else {
        spin->budget = spin->budget / 2 < SPIN_SHORTEST ? SPIN_SHORTEST : spin->budget / 2;
    }
}

/* Returns 1 as soon as the word is no longer `seen`, 0 when the budget is used up. */
static inline int spin_until_changed(const spin_state *spin, uint32_t *word, uint32_t seen,
                                     uint64_t start)
{
    do {
        /* Plain loads answer faster than PAUSE, which a hypervisor may also trap. */
        for (int i = 0; i < SPIN_LOOKS; i++) {
            if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen) {
                return 1;
            }
        }
        spin_pause();
    } while (spin_clock() - start < spin->budget);
    return 0;
}

#endif
