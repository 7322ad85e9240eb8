/* note.c - the id of a call, shown to the other side for its log. */
#include "base/check.h"
#include "call/lane.h"

#include <string.h>

static int is_note_byte(uint8_t byte)
{
    return (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z') ||
           (byte >= '0' && byte <= '9') || byte == '.' || byte == '_' || byte == ':' ||
           byte == '-';
}

static size_t note_length(const uint8_t *note, size_t len)
{
    size_t used = 0;

    while (used < len && is_note_byte(note[used])) {
        used++;
    }
    return used;
}

pye_status pye_lane_note_set(pye_lane *lane, const uint8_t *note, size_t len)
{
    uint8_t line[PYE_LANE_NOTE_SIZE] = {0};

    PYE_REFUSE_IF(len > sizeof(line) || note_length(note, len) != len, PYE_E_ARGUMENT);
    if (len > 0) {
        memcpy(line, note, len);
    }
    for (size_t i = 0; i < sizeof(line); i += 8) {
        uint64_t word;
        memcpy(&word, line + i, 8);
        __atomic_store_n(long_at(lane->mine, STATE_NOTE + i), word, __ATOMIC_RELAXED);
    }
    return PYE_OK;
}

size_t pye_lane_note_get(const pye_lane *lane, uint8_t out[PYE_LANE_NOTE_SIZE])
{
    size_t used;

    for (size_t i = 0; i < PYE_LANE_NOTE_SIZE; i += 8) {
        const uint64_t word =
            __atomic_load_n(long_at(lane->theirs, STATE_NOTE + i), __ATOMIC_RELAXED);
        memcpy(out + i, &word, 8);
    }
    used = note_length(out, PYE_LANE_NOTE_SIZE);
    if (PYE_GUARD(used < PYE_LANE_NOTE_SIZE && out[used] != 0)) {
        used = 0;
    }
    memset(out + used, 0, PYE_LANE_NOTE_SIZE - used);
    return used;
}
