/* await.c - looking for the other side's next frame, sleeping until it comes, and being woken. */
#include "call/lane.h"

pye_status pye_lane_await(pye_lane *lane, uint32_t slice_ms)
{
    uint32_t *word = word_at(lane->in, 0);
    const uint32_t seen = lane->seen;

    if (slice_ms == 0) {
        return PYE_E_TIMEOUT;
    }
    const uint32_t cpu = (uint32_t)lane->ops.cpu() + 1; /* 0: not known */
    if (cpu != lane->cpu) {
        lane->cpu = cpu;
        __atomic_store_n(word_at(lane->mine, STATE_CPU), cpu, __ATOMIC_RELAXED);
    }
    /* A lie about the CPU or about sleeping costs the liar's own call time, nothing else. */
    const int near =
        lane->rest ||
        (cpu != 0 && __atomic_load_n(word_at(lane->theirs, STATE_CPU), __ATOMIC_RELAXED) == cpu);
    spin_state *spin = lane->bulk ? &lane->spin_bulk : &lane->spin;
    const uint64_t start = spin_clock();
    if (!near && spin_until_changed(spin, word, seen, start)) {
        return PYE_OK;
    }
    /* On one core sleeping is what lets the other side run: a scheduler may well pick who yields
     * again, and each such yield costs as much as the sleep. */
    for (int i = 0; i < SPIN_YIELDS && !near; i++) {
        lane->ops.yield();
        if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen) {
            spin_learn(spin, start);
            return PYE_OK;
        }
    }
    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 1, __ATOMIC_SEQ_CST);
    pye_status rc = PYE_OK;
    if (__atomic_load_n(word, __ATOMIC_SEQ_CST) == seen) {
        rc = lane->ops.wait(word, seen, slice_ms);
    }
    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 0, __ATOMIC_RELAXED);
    if (!lane->rest) { /* a wait that was known to be long teaches nothing */
        spin_learn(spin, start);
    }
    if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen) {
        lane->rest = 0;
        return PYE_OK;
    }
    /* Woken to look around, or interrupted: for the caller both are the end of a slice. */
    return rc == PYE_OK ? PYE_E_TIMEOUT : rc;
}

void pye_lane_rest(pye_lane *lane)
{
    lane->rest = 1;
}

int pye_lane_look(pye_lane *lane, uint64_t *ticks)
{
    uint32_t *word = word_at(lane->in, 0);
    const uint32_t seen = lane->seen;

    if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen) {
        return 1;
    }
    if (*ticks == 0) {
        return 0;
    }
    const uint32_t cpu = (uint32_t)lane->ops.cpu() + 1;
    if (cpu != lane->cpu) {
        lane->cpu = cpu;
        __atomic_store_n(word_at(lane->mine, STATE_CPU), cpu, __ATOMIC_RELAXED);
    }
    if (cpu != 0 && __atomic_load_n(word_at(lane->theirs, STATE_CPU), __ATOMIC_RELAXED) == cpu) {
        *ticks = 0; /* the other side runs when this one sleeps, not before */
        return 0;
    }
    const spin_state spin = {.budget = *ticks};
    const uint64_t start = spin_clock();
    const int came = spin_until_changed(&spin, word, seen, start);
    const uint64_t spent = spin_clock() - start;
    *ticks = came && spent < *ticks ? *ticks - spent : 0;
    return came;
}

int pye_lane_arm(pye_lane *lane, uint32_t **word, uint32_t *seen)
{
    *word = word_at(lane->in, 0);
    *seen = lane->seen;
    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 1, __ATOMIC_SEQ_CST);
    /* Either this load sees what came, or who sends it sees that this side sleeps. */
    if (__atomic_load_n(*word, __ATOMIC_SEQ_CST) == *seen) {
        return 0;
    }
    pye_lane_disarm(lane);
    return 1;
}

void pye_lane_disarm(pye_lane *lane)
{
    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 0, __ATOMIC_RELAXED);
}

void pye_lane_wake(pye_lane *lane)
{
    pye_status rc = lane->ops.wake(word_at(lane->in, 0));
    (void)rc; /* the waiter looks around every slice anyway */
}

int pye_lane_peer_asleep(const pye_lane *lane)
{
    return __atomic_load_n(word_at(lane->theirs, STATE_ASLEEP), __ATOMIC_RELAXED) != 0;
}
