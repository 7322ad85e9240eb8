/* copy.h - moving much data through a slot, in the way that is quicker on these two processors. */
#ifndef PYE_SRC_CALL_COPY_H
#define PYE_SRC_CALL_COPY_H

#include <stddef.h>
#include <stdint.h>

/* How a fragment is stored into the slot. A line that the other core still has costs a store 1 to
 * 30 ns, by how far apart the two cores are, and a virtual machine's are moved at any time; a store
 * past the caches costs 2 ns wherever they are, but then the reader fetches from memory. */
enum copy_way { COPY_CACHED, COPY_PAST, COPY_WAYS };

/* What one side of a lane learnt. Private; a peer that plays for time chooses a way, no more. */
typedef struct {
    uint64_t cost[COPY_WAYS]; /* ticks for each KiB, 0: not known */
    uint64_t began;           /* when the part that is measured began */
    uint32_t better;          /* the way that is taken */
    uint32_t way;             /* of the message under way */
    uint32_t until;           /* so many messages until the other way is tried */
    uint32_t pause;           /* so many after that, if it is not better */
} copy_choice;

void pye_copy_init(copy_choice *choice);

/* A message begins that is judged: of several fragments, or a long one of one piece. */
void pye_copy_choose(copy_choice *choice);

/* What is not timed of one piece: ticks for each KiB that its reader fetches from memory, not from
 * the other core's caches. */
#define COPY_UNSEEN 256

/* The rest of it is timed from now, `now` in ticks; and was `len` bytes, all written at `now`, of
 * which each KiB costs the reader `unseen` ticks more if it went past the caches. */
void pye_copy_began(copy_choice *choice, uint64_t now);
void pye_copy_ended(copy_choice *choice, uint64_t now, uint64_t len, uint64_t unseen);

/* `to` in a slot. Its stores are visible to who sees what is released after it. */
void pye_copy_into(uint8_t *to, const uint8_t *from, size_t len, uint32_t way);

/* `from` in a slot. */
void pye_copy_out(uint8_t *to, const uint8_t *from, size_t len);

/* Zeroes into a slot, past the caches where they are many. */
void pye_copy_zero(uint8_t *to, size_t len);

#endif
