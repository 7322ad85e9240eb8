/* ring_machine.h - a machine that runs the two ends of one lane, and whoever disturbs them, in every
 * order, under a memory model that is weaker than that of any processor they run on.
 *
 * Order. Each actor is a coroutine. Before each operation whose place among those of the others
 * matters it stops, and the machine tries every actor (and timeout, kill, hostile write) in turn,
 * depth first. Stores that are not sequentially consistent need no stop: who loads may always be
 * given an older value, so a store that happens early allows all that a late one would.
 *
 * Memory. Each word has all values it ever had, in order. An actor knows, for each word, the oldest
 * value that it may still be given; a relaxed load picks any from there on; an acquiring one learns
 * what the releasing store's owner knew; sequentially consistent fences and accesses share one
 * such knowledge. (The view machine of C11 without load buffering, as RC11 has it, and weaker: fences
 * pass nothing on to relaxed accesses. All of x86-64 and of aarch64 is in it but loads that a later
 * store of the same side overtakes; a lane tells the other side nothing but by a release, which
 * none of its loads comes after.) Payloads are ordinary memory: an access that
 * is not ordered with a conflicting one is a race, and reported.
 *
 * States that were seen are not gone through again. What an actor does next is a function of what
 * it was given since it was last settled, and of the private lane: that is what is hashed. */
#ifndef RING_MACHINE_H
#define RING_MACHINE_H

#include <stddef.h>
#include <stdint.h>

enum { HOST, WORKER, ACTORS };
enum { RING_SLOT = 96, RING_LIMIT = 480 };

typedef struct {
    const char *name;
    void (*actor[ACTORS])(void);
    int processor[ACTORS]; /* equal ones: each side sleeps at once; -1: not known */
    uint32_t timeouts;     /* slices that may end early in one run */
    uint32_t kills;        /* 1: the worker may die at any step */
    uint32_t writes;       /* bursts of hostile writes in one run */
    uint64_t limit[ACTORS];
    uint64_t plan; /* for the actors */
} ring_case;

/* What the actors share with the checks; hashed with every state, zeroed before each run. */
typedef struct {
    uint32_t begun[8];    /* times that trusted code got the call with that number */
    uint32_t answered[8]; /* times that the host got its right answer */
    uint32_t ended[ACTORS];
    uint32_t local[ACTORS][8];
    uint64_t data[ACTORS][RING_LIMIT / 8];
} ring_app;

extern ring_app app;
extern const ring_case *current;

struct pye_lane;
struct pye_lane *ring_lane(void); /* of the actor that runs */
int ring_self(void);
int ring_killed(void); /* whether the worker is dead */
void ring_step(void);   /* others may come between, or the worker may die */
void ring_reaped(void);  /* the running actor learns all, as of a process that has ended */
void ring_settle(uint32_t label);
void ring_expect(const void *buffer, size_t len); /* where payloads may be copied to */
int ring_sleep(uint32_t *word, uint32_t seen);    /* futex wait outside of the lane */
_Noreturn void ring_violation(const char *format, ...) __attribute__((format(printf, 1, 2)));

typedef struct {
    uint64_t states;
    uint64_t runs;
    uint64_t ends; /* runs that came to their end, in a state that was new */
    int complete;  /* 0: stopped at `most` states */
} ring_result;
ring_result ring_explore(const ring_case *with, uint64_t most);

#endif
