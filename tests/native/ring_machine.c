/* ring_machine.c - see ring_machine.h. */
#define _GNU_SOURCE
#include "ring_machine.h"

#include "call/lane.h"
#include "ring_hooks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <ucontext.h>

enum {
    /* Words: the states of both sides, then both headers. */
    HOST_ASLEEP, HOST_CPU, WORKER_ASLEEP, WORKER_CPU, WORKER_TAKEN, REQUEST, REPLY = REQUEST + 4,
    WORDS = REPLY + 4,
    /* Writes and reads of each line of each slot: knowledge only, the bytes are where they are. */
    LINES = (AREA + PLACES * RING_SLOT / 2 + LINE - 1) / LINE,
    WROTE = WORDS, READ = WROTE + 2 * LINES, KNOWN = READ + 2 * LINES,
    MOST_VALUES = 200, STACK = 65536, MOST_CHOICES = 65536, MOST_EVENTS = 8192, SLEEP_OUTSIDE = 1
};
_Static_assert(KNOWN <= 32, "a view is four words");

typedef struct {
    uint8_t at[32];
} view;

typedef struct {
    uint64_t value;
    view known;
} message;

enum status { READY, ASLEEP, WOKEN, TIMED_OUT, ENDED, DEAD };

typedef struct {
    jmp_buf context;
    ucontext_t start;
    int started;
    enum status status;
    int sleeps_on;
    view now; /* what it may not be given less than */
    uint64_t past; /* hash of what it was given since it was settled */
    uint8_t fetched[4 + LINES]; /* since this side's last frame: header words, lines */
    const uint8_t *buffer;
    size_t buffer_len;
    pye_lane *lane;
    uint8_t stack[STACK] __attribute__((aligned(64)));
} actor;

typedef struct {
    uint8_t who, what, where;
    uint64_t value;
} event;

ring_app app;
const ring_case *current;

static actor actors[ACTORS];
static int self;
static jmp_buf machine;
static ucontext_t machine_start;
static message values[WORDS][MOST_VALUES];
static uint8_t last[32]; /* the newest of each word and line */
static const view nothing;
static view common;      /* of sequentially consistent operations */
static uint32_t timeouts_left, kills_left, writes_left;
static uint64_t ticks;
static uint8_t ring[PYE_RING_PAGE * 2] __attribute__((aligned(4096)));
static uint8_t *const base = ring + PYE_RING_PAGE;

/* The path of this run: what was chosen of how many, and how much of it is repeated. */
static struct {
    uint16_t taken, of;
} path[MOST_CHOICES];
static size_t path_len, path_at;
static event events[MOST_EVENTS];
static size_t num_events;
static uint64_t *seen_states;
static size_t seen_cap, seen_num;
static ring_result result;

/* ---- telling ---- */

static void note(int what, int where, uint64_t value)
{
    if (num_events < MOST_EVENTS) {
        events[num_events++] = (event){(uint8_t)self, (uint8_t)what, (uint8_t)where, value};
    }
}

enum { LOADS, STORES, FENCE, WAITS, WAKES, COPIES_IN, COPIES_OUT, TIMES_OUT, DIES, HOSTILE, SETTLES };

void ring_violation(const char *format, ...)
{
    static const char *const whats[] = {"loads", "stores", "fence", "waits", "wakes", "reads line",
                                        "writes line", "times out", "dies", "hostile", "--"};
    static const char *const words[] = {
        "host asleep", "host cpu", "worker asleep", "worker cpu", "worker taken",
        "request sequence", "request length", "request total", "request offset",
        "reply sequence", "reply length", "reply total", "reply offset"};
    va_list arguments;

    for (size_t i = 0; i < num_events; i++) {
        const event *e = &events[i];
        fprintf(stderr, "  %s %s %s %llx\n", e->who == HOST ? "host  " : "worker", whats[e->what],
                e->where < WORDS ? words[e->where] : "", (unsigned long long)e->value);
    }
    printf("VIOLATION in %s: ", current->name);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    exit(1);
}

/* ---- choosing ---- */

static int choose(size_t of)
{
    if (of <= 1) {
        return 0;
    }
    if (path_at == path_len) {
        if (path_len == MOST_CHOICES) {
            ring_violation("a run that does not end");
        }
        path[path_len].taken = 0;
        path[path_len++].of = (uint16_t)of;
    }
    if (path[path_at].of != of) {
        ring_violation("the same run went another way (%u, %zu): what is hashed is not all",
                       path[path_at].of, of);
    }
    return path[path_at++].taken;
}

/* Give the machine its turn. */
static void stop(void)
{
    const int me = self;

    if (_setjmp(actors[me].context) == 0) {
        _longjmp(machine, 1);
    }
    self = me;
}

static void mix(uint64_t *hash, uint64_t value)
{
    const __uint128_t product = (__uint128_t)(*hash ^ value) * 0x9e3779b97f4a7c15u;
    *hash = (uint64_t)product ^ (uint64_t)(product >> 64) ^ 0x2545f4914f6cdd1du;
}

static void mix_bytes(uint64_t *hash, const void *data, size_t len)
{
    const uint8_t *at = data;

    for (; len >= 8; len -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        mix(hash, word);
    }
    for (; len > 0; len--, at++) {
        mix(hash, *at);
    }
}

/* ---- memory ---- */

static void join(view *into, const view *from)
{
    for (size_t i = 0; i < sizeof(into->at); i++) {
        if (into->at[i] < from->at[i]) {
            into->at[i] = from->at[i];
        }
    }
}

static int is_shared(const void *at)
{
    return (uintptr_t)at - (uintptr_t)ring < sizeof(ring);
}

static size_t slot_at(int slot)
{
    const size_t stride = (AREA + PLACES * RING_SLOT / 2 + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return PYE_LANE_STATE_SIZE + (size_t)slot * stride;
}

static int word_of(const void *at)
{
    const size_t offset = (size_t)((const uint8_t *)at - base);

    if (offset == 0 || offset == 4) {
        return (int)(HOST_ASLEEP + offset / 4);
    }
    if (offset == 128 || offset == 132) {
        return (int)(WORKER_ASLEEP + (offset - 128) / 4);
    }
    if (offset == 192) {
        return WORKER_TAKEN;
    }
    for (int slot = 0; slot < 2; slot++) {
        const size_t in = offset - slot_at(slot);
        if (offset >= slot_at(slot) && in < 32 && in % 8 == 0) {
            return REQUEST + 4 * slot + (int)(in / 8);
        }
    }
    ring_violation("an access beside all words, at %zd", (ssize_t)offset);
}

static int owner_of(int word)
{
    return word < WORKER_ASLEEP || (word >= REQUEST && word < REPLY) ? HOST : WORKER;
}

static uint64_t load(int word, int order)
{
    actor *me = &actors[self];
    size_t oldest = me->now.at[word];
    size_t options[MOST_VALUES] = {0};
    size_t num = 0;

    if (order == __ATOMIC_SEQ_CST && common.at[word] > oldest) {
        oldest = common.at[word];
    }
    /* Of equal values the oldest: who was given it may still be given all that follows. */
    for (size_t at = oldest; at <= last[word]; at++) {
        size_t k = 0;
        while (k < num && values[word][options[k]].value != values[word][at].value) {
            k++;
        }
        if (k == num) {
            options[num++] = at;
        }
    }
    const size_t which = options[choose(num)];
    me->now.at[word] = (uint8_t)which;
    if (order != __ATOMIC_RELAXED) {
        join(&me->now, &values[word][which].known);
    }
    return values[word][which].value;
}

static void store(int word, uint64_t value, const view *known)
{
    if (last[word] == MOST_VALUES - 1) {
        ring_violation("a run that writes for ever");
    }
    message *m = &values[word][++last[word]];
    m->value = value;
    m->known = *known;
    m->known.at[word] = last[word];
    actors[self].now.at[word] = last[word];
}

static void fence(void)
{
    actor *me = &actors[self];

    join(&me->now, &common);
    common = me->now;
}

uint64_t hook_load(const void *at, size_t size, int order)
{
    actor *me = &actors[self];

    if (!is_shared(at)) {
        return size == 4 ? *(const uint32_t *)at : *(const uint64_t *)at;
    }
    const int word = word_of(at);
    if (owner_of(word) == self) {
        ring_violation("a side reads back what it wrote, where the other side may change it");
    }
    if (me->lane != NULL && me->lane->phase == BROKEN) {
        ring_violation("a broken lane looks at shared memory");
    }
    if (word >= REQUEST && size == 8 && ++me->fetched[(word - REQUEST) % 4] > 1) {
        ring_violation("word %d of one header is read twice", (word - REQUEST) % 4);
    }
    mix(&me->past, (uint64_t)LOADS << 32 | (uint32_t)(order << 8 | word));
    stop();
    const uint64_t value = size == 4 ? (uint32_t)load(word, order) : load(word, order);
    mix(&me->past, value);
    note(LOADS, word, value);
    return value;
}

void hook_store(void *at, size_t size, uint64_t value, int order)
{
    actor *me = &actors[self];

    if (!is_shared(at)) {
        memcpy(at, &value, size);
        return;
    }
    const int word = word_of(at);
    if (owner_of(word) != self) {
        ring_violation("a side writes what belongs to the other");
    }
    if (word == REQUEST || word == REPLY) {
        memset(me->fetched, 0, sizeof(me->fetched));
    }
    if (order == __ATOMIC_SEQ_CST) {
        mix(&me->past, (uint64_t)STORES << 32 | (uint32_t)word);
        stop();
    }
    store(word, value, order == __ATOMIC_RELAXED ? &nothing : &me->now);
    if (order == __ATOMIC_SEQ_CST) {
        common.at[word] = last[word];
    }
    note(STORES, word, value);
}

void hook_fence(int order)
{
    actor *me = &actors[self];

    if (order != __ATOMIC_SEQ_CST) {
        ring_violation("a fence that this machine does not know");
    }
    mix(&me->past, (uint64_t)FENCE << 32);
    stop();
    fence();
    note(FENCE, WORDS, 0);
}

/* The `len` bytes at `at` of a slot's payload are read or written by the actor that runs. */
static void touch(const uint8_t *at, size_t len, int writes)
{
    actor *me = &actors[self];
    const int slot = writes ? self : !self;
    const size_t from = (size_t)(at - (base + slot_at(slot)));
    const size_t end = AREA + PLACES * RING_SLOT / 2;

    if (at < base + slot_at(slot) + PYE_LANE_HEADER_SIZE || len > end || from > end - len) {
        ring_violation("%s %zu bytes beside the payload", writes ? "writes" : "reads", len);
    }
    for (size_t line = from / LINE; line * LINE < from + len; line++) {
        const int wrote = WROTE + slot * LINES + (int)line;
        const int read = READ + slot * LINES + (int)line;

        if (current->writes == 0 && me->now.at[wrote] != last[wrote]) {
            ring_violation("a race: line %zu is %s while it is written", line,
                           writes ? "written" : "read");
        }
        if (writes && current->writes == 0 && me->now.at[read] != last[read]) {
            ring_violation("a race: line %zu is written while it is read", line);
        }
        if (!writes && ++me->fetched[4 + line] > 1) {
            ring_violation("line %zu of one frame is read twice", line);
        }
        const int which = writes ? wrote : read;
        if (last[which] == UINT8_MAX) {
            ring_violation("a run that copies for ever");
        }
        me->now.at[which] = ++last[which];
        note(writes ? COPIES_OUT : COPIES_IN, WORDS, line);
    }
}

void hook_copy(void *to, const void *from, size_t len)
{
    const actor *me = &actors[self];

    if (len == 0) {
        return;
    }
    if (is_shared(to)) {
        touch(to, len, 1);
    }
    if (is_shared(from)) {
        if ((uintptr_t)to - (uintptr_t)me->buffer > me->buffer_len ||
            len > me->buffer_len - ((uintptr_t)to - (uintptr_t)me->buffer)) {
            ring_violation("a payload is copied beside its buffer");
        }
        if (current->writes > 0) {
            mix(&actors[self].past, (uint64_t)COPIES_IN << 32);
            stop();
        }
        touch(from, len, 0);
    }
    memcpy(to, from, len);
    if (is_shared(from)) {
        mix_bytes(&actors[self].past, to, len);
    }
}

void hook_fill(void *to, int value, size_t len)
{
    if (len > 0 && is_shared(to)) {
        touch(to, len, 1);
    }
    memset(to, value, len);
}

uint64_t hook_clock(void)
{
    ticks += (uint64_t)1 << 32; /* each wait is longer than what is worth looking for */
    return ticks;
}

/* ---- waiting ---- */

/* futex(2): both have a full fence; the word is compared when nothing can come between. */
static pye_status sleep_on(uint32_t *at, uint32_t expected, uint32_t timeout_ms)
{
    actor *me = &actors[self];
    const int word = word_of(at);

    (void)timeout_ms;
    mix(&me->past, (uint64_t)WAITS << 32);
    stop();
    fence();
    const uint32_t found = (uint32_t)load(word, __ATOMIC_RELAXED);
    note(WAITS, word, found);
    mix(&me->past, found);
    if (found != expected) {
        return PYE_OK;
    }
    me->status = ASLEEP;
    me->sleeps_on = word;
    stop();
    const pye_status rc = me->status == TIMED_OUT ? PYE_E_TIMEOUT : PYE_OK;
    me->status = READY;
    mix(&me->past, (uint64_t)rc);
    return rc;
}

static pye_status wake(uint32_t *at)
{
    const int word = word_of(at);

    mix(&actors[self].past, (uint64_t)WAKES << 32);
    stop();
    fence();
    note(WAKES, word, 0);
    for (int i = 0; i < ACTORS; i++) {
        if (actors[i].status == ASLEEP && actors[i].sleeps_on == word) {
            actors[i].status = WOKEN;
        }
    }
    return PYE_OK;
}

static void yield(void)
{
}

static int processor(void)
{
    return current->processor[self];
}

/* ---- for the actors ---- */

pye_lane *ring_lane(void)
{
    return actors[self].lane;
}

int ring_self(void)
{
    return self;
}

int ring_killed(void)
{
    return actors[WORKER].status == DEAD;
}

void ring_step(void)
{
    mix(&actors[self].past, (uint64_t)SETTLES << 32);
    stop();
}

void ring_reaped(void)
{
    memcpy(actors[self].now.at, last, sizeof(last));
}

void ring_settle(uint32_t label)
{
    actor *me = &actors[self];

    me->past = label;
    me->buffer_len = 0;
    note(SETTLES, WORDS, label);
}

void ring_expect(const void *buffer, size_t len)
{
    actors[self].buffer = buffer;
    actors[self].buffer_len = len;
}

int ring_sleep(uint32_t *word, uint32_t seen)
{
    return sleep_on(word, seen, SLEEP_OUTSIDE) == PYE_E_TIMEOUT;
}

/* ---- states ---- */

/* Knowledge counts only as far as it still tells values apart: from what all know on. */
static void mix_view(uint64_t *hash, const view *known, const uint8_t *all)
{
    uint8_t back[32];

    for (int i = 0; i < 32; i++) {
        const uint8_t at = known->at[i] < all[i] ? all[i] : known->at[i];
        back[i] = (uint8_t)(i < WORDS ? last[i] - at : at != last[i]);
    }
    mix_bytes(hash, back, sizeof(back));
}

static uint64_t state_hash(void)
{
    uint64_t hash = 0;
    uint8_t all[32];

    for (int i = 0; i < 32; i++) {
        all[i] = last[i];
        for (int k = 0; k < ACTORS; k++) {
            if (i < WORDS && actors[k].now.at[i] < all[i] && actors[k].status < ENDED) {
                all[i] = actors[k].now.at[i];
            }
        }
    }
    for (int k = 0; k < ACTORS; k++) {
        const actor *one = &actors[k];
        pye_lane lane = *one->lane;

        memset(&lane.spin, 0, sizeof(lane.spin)); /* how long: the clock makes all waits long */
        memset(&lane.spin_bulk, 0, sizeof(lane.spin_bulk));
        lane.copy.began = lane.piece.began = 0; /* all are too short to be timed */
        mix_bytes(&hash, &lane, sizeof(lane));
        mix(&hash, one->past);
        mix(&hash, (uint64_t)one->status << 8 | (uint64_t)one->sleeps_on);
        mix_bytes(&hash, one->fetched, sizeof(one->fetched));
        mix_view(&hash, &one->now, all);
    }
    mix_view(&hash, &common, all);
    for (int i = 0; i < WORDS; i++) {
        mix(&hash, last[i] - all[i]);
        for (size_t at = all[i]; at <= last[i]; at++) {
            mix(&hash, values[i][at].value);
            mix_view(&hash, &values[i][at].known, all);
        }
    }
    mix_bytes(&hash, base, PYE_RING_PAGE / 4);
    mix_bytes(&hash, &app, sizeof(app));
    mix(&hash, (uint64_t)timeouts_left << 32 | kills_left << 16 | writes_left);
    return hash ? hash : 1;
}

/* Returns whether the state is new. */
static int remember(uint64_t hash)
{
    if (seen_num * 2 >= seen_cap) {
        const size_t cap = seen_cap ? seen_cap * 2 : 1u << 16;
        uint64_t *more = calloc(cap, sizeof(*more));
        if (more == NULL) {
            ring_violation("no memory for the states");
        }
        for (size_t i = 0; i < seen_cap; i++) {
            size_t at = seen_states[i] & (cap - 1);
            while (seen_states[i] != 0 && more[at] != 0) {
                at = (at + 1) & (cap - 1);
            }
            if (seen_states[i] != 0) {
                more[at] = seen_states[i];
            }
        }
        free(seen_states);
        seen_states = more;
        seen_cap = cap;
    }
    size_t at = hash & (seen_cap - 1);
    for (; seen_states[at] != 0; at = (at + 1) & (seen_cap - 1)) {
        if (seen_states[at] == hash) {
            return 0;
        }
    }
    seen_states[at] = hash;
    seen_num++;
    return 1;
}

/* ---- runs ---- */

static void start(void)
{
    current->actor[self]();
    actors[self].status = ENDED;
    _longjmp(machine, 1);
}

static void resume(int who)
{
    actor *one = &actors[who];

    self = who;
    if (_setjmp(machine) != 0) {
        return;
    }
    if (one->started) {
        _longjmp(one->context, 1);
    }
    one->started = 1;
    (void)getcontext(&one->start);
    one->start.uc_stack.ss_sp = one->stack;
    one->start.uc_stack.ss_size = STACK;
    makecontext(&one->start, start, 0);
    (void)swapcontext(&machine_start, &one->start);
}

static const pye_wait_ops ops = {sleep_on, wake, yield, processor};

static void begin(void)
{
    memset(ring, 0, sizeof(ring));
    memset(last, 0, sizeof(last));
    memset(&common, 0, sizeof(common));
    memset(&app, 0, sizeof(app));
    for (int i = 0; i < WORDS; i++) {
        memset(&values[i][0], 0, sizeof(values[i][0]));
    }
    for (int i = 0; i < ACTORS; i++) {
        actor *one = &actors[i];
        pye_lane_free(one->lane);
        memset(one, 0, offsetof(actor, stack));
        if (pye_lane_new(&one->lane, ring, sizeof(ring), 1, RING_SLOT, 0,
                         i == HOST ? PYE_SIDE_HOST : PYE_SIDE_WORKER, current->limit[i],
                         &ops) != PYE_OK) {
            ring_violation("no lane");
        }
    }
    timeouts_left = current->timeouts;
    kills_left = current->kills;
    writes_left = current->writes;
    ticks = 0;
    path_at = 0;
    num_events = 0;
}

/* What a hostile writer may do at once: words of either header, or of the states. */
typedef struct {
    int8_t header; /* 0 the state words, else the number of 64-bit words that follow `first` */
    uint8_t word;
    uint64_t change[3];
    uint8_t how[3]; /* 0 add, 1 set */
} burst;

static const burst bursts[] = {
    {1, 0, {1}, {0}}, {1, 0, {(uint64_t)-1}, {0}},                    /* sequence */
    {1, 0, {(uint64_t)1 << 32}, {0}}, {1, 0, {(uint64_t)128 << 32}, {0}}, /* kind */
    {1, 0, {(uint64_t)1 << 48}, {0}},                                 /* index */
    {1, 1, {8}, {0}}, {1, 1, {0xffffffff}, {1}}, {1, 1, {(uint64_t)1 << 32}, {0}},
    {1, 2, {8}, {0}}, {1, 2, {0}, {1}}, {1, 2, {UINT64_MAX}, {1}}, {1, 2, {RING_SLOT + 8}, {1}},
    {1, 3, {8}, {0}}, {1, 3, {UINT64_MAX - 15}, {1}},
    {2, 1, {8, 8}, {0, 0}}, {2, 1, {RING_SLOT / 2, RING_LIMIT}, {1, 1}},
    {3, 1, {RING_SLOT, RING_SLOT, 0}, {1, 1, 1}}, {3, 1, {0, 0, 0}, {1, 1, 1}},
    {3, 1, {RING_SLOT / 2, RING_SLOT * 2, RING_SLOT / 2}, {1, 1, 1}},
    {0, HOST_ASLEEP, {1}, {1}}, {0, HOST_ASLEEP, {0}, {1}},
    {0, WORKER_ASLEEP, {1}, {1}}, {0, WORKER_ASLEEP, {0}, {1}},
    {0, HOST_CPU, {7}, {1}}, {0, WORKER_CPU, {1}, {1}}, {0, WORKER_TAKEN, {9}, {1}},
};
enum { BURSTS = sizeof(bursts) / sizeof(bursts[0]) };

static void write_hostile(int which)
{
    const burst *b = &bursts[which % BURSTS];
    const int slot = which / BURSTS;
    const int num = b->header == 0 ? 1 : b->header;

    for (int i = 0; i < num; i++) {
        const int word = b->header == 0 ? b->word : REQUEST + 4 * slot + b->word + i;
        const uint64_t old = values[word][last[word]].value;

        self = owner_of(word);
        const view now = actors[self].now;
        store(word, b->how[i] == 0 ? old + b->change[i] : b->change[i], &nothing);
        actors[self].now = now;
        note(HOSTILE, word, values[word][last[word]].value);
    }
}

static void act(int which)
{
    for (int i = 0; i < ACTORS; i++) {
        if (actors[i].status == READY || actors[i].status == WOKEN) {
            if (which-- == 0) {
                resume(i);
                return;
            }
        }
        if (actors[i].status == ASLEEP && (timeouts_left > 0 || ring_killed())) {
            if (which-- == 0) {
                timeouts_left -= timeouts_left > 0 && !ring_killed() ? 1 : 0;
                actors[i].status = TIMED_OUT;
                self = i;
                note(TIMES_OUT, WORDS, 0);
                resume(i);
                return;
            }
        }
    }
    if (kills_left > 0 && actors[WORKER].status < ENDED && which-- == 0) {
        kills_left--;
        actors[WORKER].status = DEAD;
        self = WORKER;
        note(DIES, WORDS, 0);
        return;
    }
    writes_left--;
    write_hostile(which);
}

static size_t count_actions(void)
{
    size_t num = 0;
    int alive = 0;

    for (int i = 0; i < ACTORS; i++) {
        num += actors[i].status == READY || actors[i].status == WOKEN ||
               (actors[i].status == ASLEEP && (timeouts_left > 0 || ring_killed()));
        alive |= actors[i].status == READY || actors[i].status == WOKEN;
    }
    num += kills_left > 0 && actors[WORKER].status < ENDED;
    /* Where nobody is awake a write is seen by nobody; state words have no second slot. */
    return num + (writes_left > 0 && alive ? (size_t)BURSTS + 19 : 0);
}

static void run(void)
{
    begin();
    for (;;) {
        if (path_at == path_len) {
            if (!remember(state_hash())) {
                return;
            }
            result.states++;
        }
        const size_t num = count_actions();
        if (num == 0) {
            break;
        }
        act(choose(num));
    }
    result.ends++;
    if (current->writes == 0 && actors[HOST].status != ENDED) {
        ring_violation("a wake-up is lost: both sides sleep, and the host's call is not over");
    }
}

ring_result ring_explore(const ring_case *with, uint64_t most)
{
    current = with;
    memset(&result, 0, sizeof(result));
    memset(seen_states, 0, seen_cap * sizeof(*seen_states));
    seen_num = 0;
    path_len = 0;
    do {
        run();
        result.runs++;
        while (path_len > 0 && path[path_len - 1].taken + 1 == path[path_len - 1].of) {
            path_len--;
        }
        if (path_len == 0) {
            result.complete = 1;
            return result;
        }
        path[path_len - 1].taken++;
    } while (result.states < most);
    return result;
}
