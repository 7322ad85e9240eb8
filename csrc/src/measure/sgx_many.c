/* sgx_many.c - several MRENCLAVEs at once.
 *
 * One measurement is one chain of SHA-256, which no code makes shorter; several go side by side,
 * each in a lane of a vector, page by page. A lane that is done takes the next measurement. What
 * is left when there are too few for the lanes goes in pairs.
 *
 * Seventeen of a page's 81 blocks are records. If all lanes have a page at the same place, as
 * enclaves of one layout do, a record is the same block for every lane: its schedule is computed
 * once, those of the sixteen EEXTENDs of a page at once. */
#include "base/check.h"
#include "crypto/sha256_lanes.h"
#include "measure/sgx_records.h"

#define MAX_LANES PYE_SHA256_MAX_LANES

_Static_assert(CHUNKS == PYE_SHA256_MAX_LANES, "the records of a page's chunks are its columns");

/* One measurement on its way: the run it is in, and the page of that run that comes next. */
typedef struct {
    pye_sgx_measure *ctx;
    const pye_sgx_run *run;
    const pye_sgx_run *end;
    size_t page;
} walk;

/* A measurement that occurs in a job is marked, so that a second job with it is seen. Neither form
 * of the mark is a chunk's offset. */
static void flip_mark(pye_sgx_measure *ctx)
{
    ctx->next_chunk ^= 1;
}

static int marked(const pye_sgx_measure *ctx)
{
    return ctx->next_chunk == (NO_CHUNK ^ 1) || ctx->next_chunk % PYE_SGX_CHUNK_SIZE == 1;
}

static pye_status check_job(const pye_sgx_job *job)
{
    PYE_REFUSE_IF(job->ctx == NULL || (job->runs == NULL && job->num_runs != 0), PYE_E_ARGUMENT);
    PYE_REFUSE_IF(marked(job->ctx), PYE_E_ARGUMENT);
    PYE_TRY(pye_sgx_check_pages(job->ctx, 0, 0, PYE_SGX_REG));
    for (size_t i = 0; i < job->num_runs; i++) {
        const pye_sgx_run *run = &job->runs[i];

        PYE_TRY(pye_sgx_check_pages(job->ctx, run->num_pages, run->offset, run->flags));
    }
    return PYE_OK;
}

static uint64_t page_offset(const walk *w)
{
    return w->run->offset + w->page * PYE_SGX_PAGE_SIZE;
}

static const uint8_t *page_content(const walk *w)
{
    return w->run->pages + w->page * PYE_SGX_PAGE_SIZE;
}

static void end_page(walk *w)
{
    w->ctx->sha.total += BLOCKS_A_PAGE * PYE_SHA256_BLOCK_SIZE;
    w->ctx->num_pages++;
    w->page++;
}

/* The pages of the run that comes next are not measured: one block each, not worth a lane. */
static int skips(const walk *w)
{
    return w->run != w->end && (w->run->pages == NULL || w->page == w->run->num_pages);
}

/* skip goes on to the next page that is measured, and returns 0 if there is none. The state is in
 * the context. */
static int skip(walk *w)
{
    for (; skips(w); w->run++, w->page = 0) {
        if (w->run->pages == NULL) {
            pye_sgx_take_unmeasured(w->ctx, w->run->num_pages, w->run->offset, w->run->flags);
            w->ctx->num_pages += w->run->num_pages;
        }
    }
    return w->run != w->end;
}

static int next_walk(walk *w, const pye_sgx_job **jobs, const pye_sgx_job *end)
{
    while (*jobs != end) {
        const pye_sgx_job *job = (*jobs)++;

        *w = (walk){job->ctx, job->runs, job->runs + job->num_runs, 0};
        if (skip(w)) {
            return 1;
        }
    }
    return 0;
}

/* ---- in lanes ---- */

typedef struct {
    const pye_sha256_lanes_code *code;
    pye_sha256_lanes state;
    pye_sha256_words words; /* of the records */
    walk walks[MAX_LANES];
    size_t num; /* how many lanes have a measurement: the first ones */
} lanes;

static void load_lane(lanes *l, size_t lane)
{
    for (size_t i = 0; i < 8; i++) {
        l->state.h[i][lane] = l->walks[lane].ctx->sha.h[i];
    }
}

static void store_lane(lanes *l, size_t lane)
{
    for (size_t i = 0; i < 8; i++) {
        l->walks[lane].ctx->sha.h[i] = l->state.h[i][lane];
    }
}

static uint32_t word_of(const char *four)
{
    uint32_t x;

    memcpy(&x, four, sizeof(x));
    return __builtin_bswap32(x);
}

/* Put a record into a column; words from 6 on are zero for all of them. */
static void put_column(pye_sha256_words *words, size_t column, const char tag[8], uint64_t a,
                       uint64_t b)
{
    words->w[0][column] = word_of(tag);
    words->w[1][column] = word_of(tag + 4);
    words->w[2][column] = __builtin_bswap32((uint32_t)a);
    words->w[3][column] = __builtin_bswap32((uint32_t)(a >> 32));
    words->w[4][column] = __builtin_bswap32((uint32_t)b);
    words->w[5][column] = __builtin_bswap32((uint32_t)(b >> 32));
}

static int same_place(const lanes *l)
{
    for (size_t i = 1; i < l->num; i++) {
        if (page_offset(&l->walks[i]) != page_offset(&l->walks[0])) {
            return 0;
        }
    }
    return 1;
}

/* A record that differs from lane to lane. */
static void take_records(lanes *l, const char tag[8], uint64_t chunk)
{
    memset(l->words.w[6], 0, 10 * sizeof(l->words.w[6]));
    for (size_t i = 0; i < l->code->lanes; i++) {
        const walk *w = &l->walks[i < l->num ? i : 0];
        const uint64_t flags = tag == tag_eadd ? w->run->flags : 0;

        put_column(&l->words, i, tag, page_offset(w) + chunk * PYE_SGX_CHUNK_SIZE, flags);
    }
    l->code->own(&l->state, &l->words);
}

/* Take one page into every lane. */
static void take_pages(lanes *l)
{
    const int same = same_place(l);
    const uint8_t *data[MAX_LANES];

    for (size_t i = 0; i < MAX_LANES; i++) {
        data[i] = page_content(&l->walks[i < l->num ? i : 0]);
    }
    take_records(l, tag_eadd, 0);
    if (same) {
        memset(l->words.w[6], 0, 10 * sizeof(l->words.w[6]));
        for (size_t i = 0; i < CHUNKS; i++) {
            put_column(&l->words, i, tag_eextend,
                       page_offset(&l->walks[0]) + i * PYE_SGX_CHUNK_SIZE, 0);
        }
        l->code->expand(&l->words);
        l->code->columns(&l->state, &l->words, data, BLOCKS_A_CHUNK);
    }
    for (uint32_t chunk = 0; !same && chunk < CHUNKS; chunk++) {
        take_records(l, tag_eextend, chunk);
        l->code->blocks(&l->state, data, BLOCKS_A_CHUNK);
        for (size_t i = 0; i < MAX_LANES; i++) {
            data[i] += PYE_SGX_CHUNK_SIZE;
        }
    }
}

/* Go on to the next pages; lanes that are done take the next jobs, or the last lane's walk. */
static void step_lanes(lanes *l, const pye_sgx_job **jobs, const pye_sgx_job *end)
{
    for (size_t i = 0; i < l->num; i++) {
        walk *w = &l->walks[i];

        end_page(w);
        if (!skips(w)) {
            continue;
        }
        store_lane(l, i);
        if (skip(w) || next_walk(w, jobs, end)) {
            load_lane(l, i);
            continue;
        }
        l->num--;
        if (i != l->num) {
            store_lane(l, l->num);
            *w = l->walks[l->num];
            load_lane(l, i);
            i--; /* its page is still to be ended */
        }
    }
}

/* ---- in pairs ---- */

/* Whether two measurements may go side by side: both were begun for the same code. */
static int match(const walk *a, const walk *b)
{
    return a->ctx->sha.variant == b->ctx->sha.variant;
}

static void point_walk(page_stream *stream, const walk *w)
{
    store64(stream->records[0] + 16, w->run->flags);
    point_stream(stream, page_offset(w), page_content(w), PYE_SGX_CHUNK_SIZE);
}

static void finish_walk(walk *w, page_stream *stream)
{
    do {
        point_walk(stream, w);
        pye_sha256_gather(w->ctx->sha.variant, w->ctx->sha.h, stream->blocks, BLOCKS_A_PAGE);
        end_page(w);
    } while (skip(w));
}

/* Take pages of both until the run of one is at its end. */
static void take_pairs(walk pair[2], page_stream streams[2])
{
    do {
        point_walk(&streams[0], &pair[0]);
        point_walk(&streams[1], &pair[1]);
        pye_sha256_gather2(pair[0].ctx->sha.variant, pair[0].ctx->sha.h, streams[0].blocks,
                           pair[1].ctx->sha.h, streams[1].blocks, BLOCKS_A_PAGE);
        end_page(&pair[0]);
        end_page(&pair[1]);
    } while (!skips(&pair[0]) && !skips(&pair[1]));
}

/* Finish `num` walks that were begun, and the jobs that are left. */
static void finish_in_pairs(const walk *walks, size_t num, const pye_sgx_job *jobs,
                            const pye_sgx_job *end)
{
    page_stream streams[2];
    walk pair[2];
    size_t have = 0;

    begin_stream(&streams[0], 0);
    begin_stream(&streams[1], 0);
    for (;;) {
        while (have < 2 && num != 0) {
            pair[have++] = walks[--num];
        }
        while (have < 2 && next_walk(&pair[have], &jobs, end)) {
            have++;
        }
        if (have == 0) {
            return;
        }
        if (have == 1 || !match(&pair[0], &pair[1])) {
            finish_walk(&pair[--have], &streams[0]);
            continue;
        }
        take_pairs(pair, streams);
        if (!skip(&pair[1])) {
            have = 1;
        }
        if (!skip(&pair[0])) {
            pair[0] = pair[1];
            have--;
        }
    }
}

const char *pye_sgx_many_variant(void)
{
    const pye_sha256_lanes_code *code = pye_sha256_lanes_select(MAX_LANES);

    if (code != NULL) {
        return code->name;
    }
    return pye_sha256_select() == PYE_SHA256_SHANI ? "pairs" : "none";
}

static void take_jobs(const pye_sgx_job *jobs, const pye_sgx_job *end)
{
    lanes l = {.code = pye_sha256_lanes_select((size_t)(end - jobs))};
    const size_t worth = l.code == NULL || pye_sha256_select() == PYE_SHA256_PORTABLE ? 2
                                                                                      : l.code->worth;

    while (l.code != NULL && l.num < l.code->lanes && next_walk(&l.walks[l.num], &jobs, end)) {
        load_lane(&l, l.num++);
    }
    while (l.num >= worth) {
        take_pages(&l);
        step_lanes(&l, &jobs, end);
    }
    for (size_t i = 0; i < l.num; i++) {
        store_lane(&l, i);
    }
    finish_in_pairs(l.walks, l.num, jobs, end);
}

pye_status pye_sgx_add_many(const pye_sgx_job *jobs, size_t num_jobs)
{
    pye_status rc = PYE_OK;
    size_t checked = 0;

    PYE_REQUIRE(jobs != NULL || num_jobs == 0, PYE_E_ARGUMENT);
    for (; checked < num_jobs; checked++) {
        PYE_CHECK(check_job(&jobs[checked]));
        flip_mark(jobs[checked].ctx);
    }
done:
    while (checked != 0) {
        flip_mark(jobs[--checked].ctx);
    }
    if (rc == PYE_OK && num_jobs != 0) {
        take_jobs(jobs, jobs + num_jobs);
        for (size_t i = 0; i < num_jobs; i++) {
            for (size_t run = 0; run < jobs[i].num_runs; run++) {
                if (jobs[i].runs[run].num_pages != 0) {
                    jobs[i].ctx->next_chunk = NO_CHUNK;
                }
            }
        }
    }
    return rc;
}
