/* A decode step's blocks in one call, products on weights packed for it, and the draw: for processors with 512-bit
   registers.

   packed.py says for which models; what a block computes is in ../decoder.py, and tests hold the two together.
   A number of the model is a float or, in `narrow` models, a bfloat16. Products and keys take 32 bits at a time, one
   float or two bfloat16 that one instruction multiplies and adds up, so that one loop serves both: a `word`. Sums are in
   float32 and run over the words in order, whatever the rows around: rows are independent of each other to the bit, and
   threads, which share panels of a product and rows of attention, change nothing either. */

#include <stdint.h>

enum { FLOAT32 = 1, BFLOAT16 = 2 };

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)

int64_t packed_precisions(void) { return 0; }
void packed_pack(const int64_t *a) { (void)a; }
void packed_multiply(const int64_t *a) { (void)a; }
int64_t packed_room(const int64_t *a) { (void)a; return 0; }
void packed_step(const int64_t *a) { (void)a; }
void packed_draw(const int64_t *a) { (void)a; }

#else

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

/* What is not a product: kernels.c. */
void norm_float32(const int64_t *a);
void norm_bfloat16(const int64_t *a);
void rotate_float32(const int64_t *a);
void rotate_bfloat16(const int64_t *a);

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define PANEL 32         /* outputs of a product taken together: two registers of sums for each row */
#define TILE 14          /* rows taken together: 28 registers of sums, 2 of weights and 1 of inputs, of 32 */
#define ROWS_AT_ONCE 224 /* of a product, so that its inputs stay in the second-level cache for all panels */
#define QUERIES 4        /* heads that share a key taken together */

/* Where a processor multiplies whole tiles of bfloat16 (AMX), oneDNN does so and is left to it. */
int64_t packed_precisions(void) {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return FLOAT32 | BFLOAT16;
#else
    return FLOAT32;
#endif
}

INLINE __m512 add_product(const int narrow, __m512 sum, int32_t left, __m512i right) {
#ifdef __AVX512BF16__
    if (narrow) return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
#endif
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(left)), _mm512_castsi512_ps(right), sum);
}

INLINE __m512 widened(__m256i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

/* To the nearest, ties to even. */
INLINE __m256i narrowed(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

INLINE __m512 rounded(const int narrow, __m512 x) { return narrow ? widened(narrowed(x)) : x; }

/* 16 numbers of the model, `at` of them after a place; those beyond the mask are not touched. */
INLINE __m512 load(const int narrow, const void *from, int64_t at, __mmask16 mask) {
    if (narrow) return widened(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at));
    return _mm512_maskz_loadu_ps(mask, (const float *)from + at);
}

INLINE void store(const int narrow, void *to, int64_t at, __m512 x, __mmask16 mask) {
    if (narrow) _mm256_mask_storeu_epi16((uint16_t *)to + at, mask, narrowed(x));
    else _mm512_mask_storeu_ps((float *)to + at, mask, x);
}

INLINE const void *number(const int narrow, const void *from, int64_t at) {
    return (const char *)from + at * (narrow ? 2 : 4);
}

/* e^x as kernels.c has it. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693145752f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.98756915e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.39819995e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.33345191e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16657962e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.66666657e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Weights into panels of (words, PANEL). a: addresses of the weights of each output, outputs, words, where to */
void packed_pack(const int64_t *a) {
    const int64_t *rows = (const int64_t *)a[0];
    const int64_t outputs = a[1], words = a[2];
    int32_t *to = (int32_t *)a[3];
    for (int64_t n = 0; n < outputs; n += PANEL, to += PANEL * words)
        for (int64_t i = 0; i < PANEL; i += 8) {
            /* Outputs beyond the last repeat it; nobody looks at them. */
            int64_t from[8];
            for (int64_t j = 0; j < 8; j++) from[j] = rows[n + i + j < outputs ? n + i + j : outputs - 1];
            const __m512i place = _mm512_loadu_si512(from);
            for (int64_t k = 0; k < words; k++)
                _mm256_storeu_si256((__m256i *)(to + k * PANEL + i),
                                    _mm512_i64gather_epi32(_mm512_add_epi64(place, _mm512_set1_epi64(4 * k)), NULL, 1));
        }
}

/* What becomes of the outputs of a product: they are stored, added to what is there, or taken as 16 gates and 16 ups of
   which silu(gate) up is stored; or stored as floats, rounded first as the model's numbers are. */
enum { STORED, ADDED, GATED, WIDENED };

INLINE void sums_of(const int narrow, const int rows, const int32_t *x, int64_t stride, const int32_t *panel,
                    int64_t words, const char *next, int64_t lines, float *out) {
    __m512 sum[TILE][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++) {
        const __m512i left = _mm512_loadu_si512(panel + k * PANEL), right = _mm512_loadu_si512(panel + k * PANEL + LANES);
        if (k < lines) _mm_prefetch(next + 64 * k, _MM_HINT_T1);
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            sum[i][0] = add_product(narrow, sum[i][0], x[i * stride + k], left);
            sum[i][1] = add_product(narrow, sum[i][1], x[i * stride + k], right);
        }
    }
    for (int i = 0; i < rows; i++) {
        _mm512_storeu_ps(out + i * PANEL, sum[i][0]);
        _mm512_storeu_ps(out + i * PANEL + LANES, sum[i][1]);
    }
}

/* `outputs` are those from n on that the weights have; out and its stride as the mode has them. */
INLINE void finish(const int narrow, int64_t mode, const float *sums, const float *bias, int64_t rows, void *out,
                   int64_t stride, int64_t n, int64_t outputs) {
    for (int64_t i = 0; i < rows; i++) {
        __m512 x[2];
        for (int c = 0; c < 2; c++) {
            x[c] = _mm512_loadu_ps(sums + i * PANEL + c * LANES);
            if (bias) x[c] = _mm512_add_ps(x[c], _mm512_loadu_ps(bias + n + c * LANES));
            x[c] = rounded(narrow, x[c]);
        }
        if (mode == GATED) {
            const __m512 one = _mm512_set1_ps(1.0f);
            const __m512 inverse = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x[0])));
            const __m512 active = rounded(narrow, _mm512_div_ps(x[0], inverse));
            store(narrow, out, i * stride + n / 2, _mm512_mul_ps(active, x[1]), 0xffff);
            continue;
        }
        for (int c = 0; c < 2; c++) {
            const int64_t left = outputs - c * LANES, at = i * stride + n + c * LANES;
            const __mmask16 mask = left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
            if (mode == WIDENED) {
                _mm512_mask_storeu_ps((float *)out + at, mask, x[c]);
                continue;
            }
            if (mode == ADDED) x[c] = _mm512_add_ps(x[c], load(narrow, out, at, mask));
            store(narrow, out, at, x[c], mask);
        }
    }
}

struct product {
    const void *x;
    const int32_t *weight;
    const float *bias; /* padded to whole panels, or 0 */
    void *out;
    int64_t mode, rows, words, outputs, x_stride, out_stride; /* strides in numbers of what lies there */
};

/* Part of a parallel region, if there is one, whose threads do not wait for each other at its end. While a panel is
   multiplied, parts of the next one are fetched: one part for each tile of rows. */
INLINE void multiply_as(const int narrow, const struct product *p) {
    const int64_t panels = (p->outputs + PANEL - 1) / PANEL, stride = narrow ? p->x_stride / 2 : p->x_stride;
    for (int64_t start = 0; start < p->rows; start += ROWS_AT_ONCE) {
        const int64_t count = p->rows - start < ROWS_AT_ONCE ? p->rows - start : ROWS_AT_ONCE;
        const int64_t tiles = (count + TILE - 1) / TILE, lines = (2 * p->words + tiles - 1) / tiles;
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < panels; n++) {
            const int32_t *panel = p->weight + n * PANEL * p->words;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t from = count * t / tiles, rows = count * (t + 1) / tiles - from;
                const int32_t *x = (const int32_t *)p->x + (start + from) * stride;
                const char *next = (const char *)(panel + PANEL * p->words) + 64 * lines * t;
                float sums[TILE * PANEL];
#define CASE(COUNT)                                                                                                    \
    case COUNT: sums_of(narrow, COUNT, x, stride, panel, p->words, next, lines, sums); break;
                switch (rows) {
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
                    CASE(13) CASE(14)
                }
#undef CASE
                char *out = (char *)p->out + (start + from) * p->out_stride * (narrow && p->mode != WIDENED ? 2 : 4);
                finish(narrow, p->mode, sums, p->bias, rows, out, p->out_stride, n * PANEL, p->outputs - n * PANEL);
            }
        }
    }
}

static void multiply_float32(const struct product *p) { multiply_as(0, p); }
static void multiply_bfloat16(const struct product *p) { multiply_as(1, p); }
static void begin_multiply(int64_t narrow, const struct product *p) {
    if (narrow) multiply_bfloat16(p);
    else multiply_float32(p);
}

static void multiply(int64_t narrow, const struct product *p) {
    begin_multiply(narrow, p);
#pragma omp barrier
}

/* a: narrow, threads, and a product's fields in their order */
void packed_multiply(const int64_t *a) {
    const struct product p = {(const void *)a[2], (const int32_t *)a[3], (const float *)a[4], (void *)a[5],
                              a[6], a[7], a[8], a[9], a[10], a[11]};
#pragma omp parallel num_threads((int)a[1]) if (a[1] > 1)
    multiply(a[0], &p);
}

/* One layer; packed.py fills these in, field by field. */
struct layer {
    const void *norm;
    const int32_t *qkv;
    const float *qkv_bias;
    const void *turn; /* weights of the norms of queries and keys, or 0 */
    const int32_t *out;
    const float *out_bias;
    const void *mlp_norm;
    const int32_t *router;  /* 0: one MLP and no experts */
    const int64_t *experts; /* weights of gate and up and of down, of each expert */
    const int32_t *gate_up;
    const float *gate_up_bias;
    const int32_t *down;
    const float *down_bias;
    int64_t inner, window;
    const int64_t *bases; /* keys, values and stride of each pool of prompts */
    const float *preamble_keys, *preamble_values;
    /* Of each row's own tokens: keys (places, kv heads, blocks of LANES tokens, words, LANES), values (places, kv heads,
       tokens, size). */
    void *keys, *values;
};

struct model {
    int64_t narrow, layers, hidden, heads, kv_heads, size;
    int64_t experts, top, renormalise; /* experts of a layer and of a token; whether the shares of these add up to 1 */
    const struct layer *layer;
    const float *numbers;
};

enum { SCALING, EPSILON, TURN_EPSILON }; /* of a model's numbers */

struct batch {
    int64_t rows, threads;
    void *hidden; /* (rows, hidden): the residual stream */
    const void *cosine, *sine; /* (rows, size) */
    const int64_t *own; /* tokens of its own that a row has before this one */
    const int64_t *order; /* rows by their prompts, whose keys then stay in the cache for all samples */
    const int64_t *pool, *slot, *prompt; /* of each row's prompt: where it is, and its tokens */
    const int64_t *place; /* of each row's own tokens */
    int64_t preamble, preamble_stride, length, longest;
    int64_t *chosen; /* (layers with experts, rows, top), or 0 */
    void *scratch;
};

/* Keys and values of one stretch of a row's context, the tokens from `first` to `last` visible. The words of a key are
   `stride` words apart, a block of LANES keys `block` words after the one before. What is likely to be read next lies
   `ahead` bytes further on. */
struct stretch {
    int narrow;
    const void *keys, *values;
    int64_t stride, block, first, last, ahead;
};

INLINE void block_scores(const int narrow, const int queries, const int blocks, const int32_t *query, int64_t words,
                         const int32_t *keys, int64_t stride, int64_t block, int64_t ahead, float *scores,
                         int64_t room) {
    __m512 sum[QUERIES][4];
    for (int r = 0; r < queries; r++)
        for (int b = 0; b < blocks; b++) sum[r][b] = _mm512_setzero_ps();
    for (int64_t d = 0; d < words; d++) {
        __m512i key[4];
        for (int b = 0; b < blocks; b++) {
            key[b] = _mm512_loadu_si512(keys + b * block + d * stride);
            if (ahead) _mm_prefetch((const char *)(keys + b * block + d * stride) + ahead, _MM_HINT_T1);
        }
        for (int r = 0; r < queries; r++)
            for (int b = 0; b < blocks; b++) sum[r][b] = add_product(narrow, sum[r][b], query[r * words + d], key[b]);
    }
    for (int r = 0; r < queries; r++)
        for (int b = 0; b < blocks; b++) _mm512_storeu_ps(scores + r * room + b * LANES, sum[r][b]);
}

INLINE void stretch_scores(const int narrow, const int queries, const int32_t *query, int64_t words,
                           const struct stretch *c, float *scores, int64_t room) {
    const int32_t *keys = c->keys;
    const int64_t to = (c->last + LANES - 1) / LANES;
    int64_t b = c->first / LANES;
    for (; b + 4 <= to; b += 4, scores += 4 * LANES)
        block_scores(narrow, queries, 4, query, words, keys + b * c->block, c->stride, c->block, c->ahead, scores,
                     room);
    for (; b + 2 <= to; b += 2, scores += 2 * LANES)
        block_scores(narrow, queries, 2, query, words, keys + b * c->block, c->stride, c->block, c->ahead, scores,
                     room);
    for (; b < to; b++, scores += LANES)
        block_scores(narrow, queries, 1, query, words, keys + b * c->block, c->stride, c->block, c->ahead, scores,
                     room);
}

/* out += weights times values, `columns` registers of each value. */
INLINE void mix_columns(const int narrow, const int queries, const int columns, const float *weights, int64_t room,
                        const struct stretch *c, int64_t size, int64_t d, float *out) {
    __m512 sum[QUERIES][4];
    for (int r = 0; r < queries; r++)
        for (int j = 0; j < columns; j++) sum[r][j] = _mm512_loadu_ps(out + r * size + d + j * LANES);
    for (int64_t t = c->first; t < c->last; t++, weights++) {
        __m512 value[4];
        for (int j = 0; j < columns; j++) value[j] = load(narrow, c->values, t * size + d + j * LANES, 0xffff);
        if (c->ahead)
            for (int j = 0; j < columns; j += narrow ? 2 : 1)
                _mm_prefetch((const char *)number(narrow, c->values, t * size + d + j * LANES) + c->ahead, _MM_HINT_T1);
        for (int r = 0; r < queries; r++)
            for (int j = 0; j < columns; j++)
                sum[r][j] = _mm512_fmadd_ps(_mm512_set1_ps(weights[r * room]), value[j], sum[r][j]);
    }
    for (int r = 0; r < queries; r++)
        for (int j = 0; j < columns; j++) _mm512_storeu_ps(out + r * size + d + j * LANES, sum[r][j]);
}

INLINE void mix(const int narrow, const int queries, const float *weights, int64_t room, const struct stretch *c,
                int64_t size, float *out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) mix_columns(narrow, queries, 4, weights, room, c, size, d, out);
    for (; d < size; d += LANES) mix_columns(narrow, queries, 1, weights, room, c, size, d, out);
}

/* Attention of a few queries to three stretches, joined by one softmax. `query` as the model has it, `query_float` in
   float32; scores: (QUERIES, room); out: (QUERIES, size) in float32. */
INLINE void attend_queries(const int narrow, const int queries, const void *query, const float *query_float,
                           const struct stretch context[3], int64_t size, float scaling, float *scores, int64_t room,
                           float *out) {
    int64_t total = 0;
    for (int i = 0; i < 3; i++) {
        const struct stretch *c = context + i;
        if (c->first >= c->last) continue;
        const int64_t start = c->first / LANES * LANES, stop = (c->last + LANES - 1) / LANES * LANES;
        if (narrow && c->narrow) stretch_scores(1, queries, query, size / 2, c, scores + total, room);
        else stretch_scores(0, queries, (const int32_t *)query_float, size, c, scores + total, room);
        for (int r = 0; r < queries; r++) {
            float *hidden = scores + r * room + total - start;
            for (int64_t t = start; t < c->first; t++) hidden[t] = -1e30f;
            for (int64_t t = c->last; t < stop; t++) hidden[t] = -1e30f;
        }
        total += stop - start;
    }
    float sums[QUERIES];
    for (int r = 0; r < queries; r++) {
        float *score = scores + r * room;
        __m512 most = _mm512_loadu_ps(score), sum = _mm512_setzero_ps();
        for (int64_t t = LANES; t < total; t += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(score + t));
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        for (int64_t t = 0; t < total; t += LANES) {
            const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(score + t), top);
            const __m512 weight = exponential(_mm512_mul_ps(below, _mm512_set1_ps(scaling)));
            _mm512_storeu_ps(score + t, weight);
            sum = _mm512_add_ps(sum, weight);
        }
        sums[r] = _mm512_reduce_add_ps(sum);
    }
    memset(out, 0, sizeof(float) * (size_t)(queries * size));
    total = 0;
    for (int i = 0; i < 3; i++) {
        const struct stretch *c = context + i;
        if (c->first >= c->last) continue;
        const int64_t start = c->first / LANES * LANES;
        const float *weights = scores + total + c->first - start;
        if (narrow && c->narrow) mix(1, queries, weights, room, c, size, out);
        else mix(0, queries, weights, room, c, size, out);
        total += (c->last + LANES - 1) / LANES * LANES - start;
    }
    for (int r = 0; r < queries; r++)
        for (int64_t d = 0; d < size; d += LANES) {
            const __m512 x = _mm512_loadu_ps(out + r * size + d);
            _mm512_storeu_ps(out + r * size + d, _mm512_div_ps(x, _mm512_set1_ps(sums[r])));
        }
}

static int64_t room_of_scores(const struct batch *b) { return b->longest + 3 * 2 * LANES; }

/* Floats that a thread's attention takes beside the step's own arrays. */
static int64_t room_of_thread(const struct model *m, const struct batch *b) {
    return QUERIES * (room_of_scores(b) + 2 * m->size);
}

/* Store the new key and value of a row and attend; qkv: its queries, keys and values, turned. */
INLINE void attend_row(const int narrow, const struct model *m, const struct layer *l, const struct batch *b,
                       int64_t row, const void *qkv, float *scratch, void *out) {
    const int64_t size = m->size, words = narrow ? size / 2 : size, repeats = m->heads / m->kv_heads;
    const int64_t before = b->preamble, own = b->own[row], prompt = b->prompt[row], at = before + prompt + own;
    const int64_t oldest = l->window && at >= l->window ? at - l->window + 1 : 0;
    const int64_t *base = l->bases + 3 * b->pool[row];
    const int64_t room = room_of_scores(b);
    float *query_float = scratch + QUERIES * room, *mixed = query_float + QUERIES * size;
    for (int64_t h = 0; h < m->kv_heads; h++) {
        const int64_t cell = (b->place[row] * m->kv_heads + h) * b->length;
        const int64_t there = (b->slot[row] * m->kv_heads + h) * size * base[2];
        const int32_t *key = number(narrow, qkv, (m->heads + h) * size);
        int32_t *keys = (int32_t *)l->keys + cell * words;
        char *values = (char *)l->values + cell * words * 4;
        for (int64_t d = 0; d < words; d++) keys[own / LANES * LANES * words + d * LANES + own % LANES] = key[d];
        memcpy(values + own * words * 4, number(narrow, qkv, (m->heads + m->kv_heads + h) * size), (size_t)(4 * words));
        const struct stretch context[3] = {
            {0, l->preamble_keys + h * size * b->preamble_stride, l->preamble_values + h * size * b->preamble_stride,
             b->preamble_stride, LANES, oldest, before, 0},
            {0, (const float *)base[0] + there, (const float *)base[1] + there, base[2], LANES,
             oldest > before ? oldest - before : 0, prompt, 0},
            {narrow, keys, values, LANES, LANES * words, oldest > before + prompt ? oldest - before - prompt : 0,
             own + 1, b->length * words * 4},
        };
        for (int64_t r = 0; r < repeats; r += QUERIES) {
            const int64_t count = repeats - r < QUERIES ? repeats - r : QUERIES, first = (h * repeats + r) * size;
            const void *query = number(narrow, qkv, first);
            for (int64_t d = 0; d < count * size; d += LANES)
                _mm512_storeu_ps(query_float + d, load(narrow, query, d, 0xffff));
#define CASE(COUNT)                                                                                                    \
    case COUNT:                                                                                                        \
        attend_queries(narrow, COUNT, query, query_float, context, size, m->numbers[SCALING], scratch, room, mixed);   \
        break;
            switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
            for (int64_t d = 0; d < count * size; d += LANES)
                store(narrow, out, first + d, _mm512_loadu_ps(mixed + d), 0xffff);
        }
    }
}

static void attend_float32(const struct model *m, const struct layer *l, const struct batch *b, int64_t row,
                           const void *qkv, float *scratch, void *out) {
    attend_row(0, m, l, b, row, qkv, scratch, out);
}

static void attend_bfloat16(const struct model *m, const struct layer *l, const struct batch *b, int64_t row,
                            const void *qkv, float *scratch, void *out) {
    attend_row(1, m, l, b, row, qkv, scratch, out);
}

static void norm_row(const struct model *m, const void *x, const void *weight, void *out) {
    const int64_t a[] = {(int64_t)x, (int64_t)weight, (int64_t)out, 1, m->hidden, (int64_t)(m->numbers + EPSILON)};
    if (m->narrow) norm_bfloat16(a);
    else norm_float32(a);
}

static void turn_row(const struct model *m, const struct layer *l, const struct batch *b, int64_t row, void *qkv) {
    const int64_t narrow = m->narrow, at = row * m->size;
    const int64_t a[] = {(int64_t)qkv, 1, 0, m->heads + m->kv_heads, m->size, (int64_t)number(narrow, b->cosine, at),
                         (int64_t)number(narrow, b->sine, at), (int64_t)l->turn, (int64_t)(m->numbers + TURN_EPSILON)};
    if (narrow) rotate_bfloat16(a);
    else rotate_float32(a);
}

struct workspace {
    void *normed, *wide, *mixed;
    float *threads;
    void *gathered;            /* (rows, top, hidden): inputs of the experts, those of one expert side by side */
    float *shares, *weights;   /* of all experts; of those of each row */
    int64_t *picked, *places;  /* experts of each row; where its inputs were gathered */
    int64_t *ends;             /* of each expert's inputs */
};

/* Lays out what a step takes from a place in memory, or from none; returns its bytes. */
static int64_t lay_out(const struct model *m, const struct batch *b, char *at, struct workspace *w) {
    int64_t wide = (m->heads + 2 * m->kv_heads) * m->size, mixed = m->heads * m->size;
    for (int64_t i = 0; i < m->layers; i++) {
        const int64_t inner = m->layer[i].inner * (m->layer[i].router ? m->top : 1);
        wide = inner > wide ? inner : wide;
    }
    const int64_t gathered = m->top * m->hidden, bytes = m->narrow ? 2 : 4;
    mixed = gathered > mixed ? gathered : mixed;
    const int64_t sizes[] = {b->rows * m->hidden * bytes, b->rows * wide * bytes, b->rows * mixed * bytes,
                             b->threads * room_of_thread(m, b) * (int64_t)sizeof(float), b->rows * gathered * bytes,
                             b->rows * m->experts * (int64_t)sizeof(float), b->rows * m->top * (int64_t)sizeof(float),
                             b->rows * m->top * 8, b->rows * m->top * 8, m->experts * 8};
    char *places[10];
    int64_t total = 0;
    for (int i = 0; i < 10; i++) {
        places[i] = at ? at + total : NULL;
        total += (sizes[i] + 63) / 64 * 64;
    }
    *w = (struct workspace){places[0], places[1], places[2], (float *)places[3], places[4], (float *)places[5],
                            (float *)places[6], (int64_t *)places[7], (int64_t *)places[8], (int64_t *)places[9]};
    return total;
}

/* Bytes of scratch memory of a step. a: model, batch */
int64_t packed_room(const int64_t *a) {
    struct workspace w;
    return lay_out((const struct model *)a[0], (const struct batch *)a[1], NULL, &w);
}

#define ROW(ARRAY, WIDTH, INDEX) ((void *)number(narrow, ARRAY, (INDEX) * (WIDTH)))

INLINE __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : (1u << count) - 1; }

/* The experts of a row, likeliest first, and their weights. share: the router's outputs, which are used up. */
static void pick(const struct model *m, float *share, int64_t *picked, float *weight) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 most = lowest, sum = _mm512_setzero_ps();
    for (int64_t e = 0; e < m->experts; e += LANES)
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(lowest, first_lanes(m->experts - e), share + e));
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t e = 0; e < m->experts; e += LANES) {
        const __mmask16 mask = first_lanes(m->experts - e);
        const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, share + e), top);
        /* What is not a number must not be lost: the exponential would bound it. */
        const __m512 x = _mm512_mask_mov_ps(exponential(below), _mm512_cmp_ps_mask(below, below, _CMP_UNORD_Q), below);
        _mm512_mask_storeu_ps(share + e, mask, x);
        sum = _mm512_mask_add_ps(sum, mask, sum, x);
    }
    const float total = _mm512_reduce_add_ps(sum);
    float kept = 0.0f;
    for (int64_t e = 0; e < m->experts; e++) share[e] /= total;
    for (int64_t k = 0; k < m->top; k++) {
        int64_t best = 0;
        for (int64_t e = 1; e < m->experts; e++) best = share[e] > share[best] ? e : best;
        picked[k] = best;
        kept += weight[k] = share[best];
        share[best] = -1.0f;
    }
    for (int64_t k = 0; m->renormalise && k < m->top; k++) weight[k] /= kept;
}

/* x += the weighted outputs of a row's experts, likeliest first, rounded as ../decoder.py rounds them. */
INLINE void combine_row(const int narrow, const struct model *m, const struct workspace *w, int64_t row, void *x) {
    for (int64_t d = 0; d < m->hidden; d += LANES) {
        const __mmask16 mask = first_lanes(m->hidden - d);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = row * m->top; k < (row + 1) * m->top; k++) {
            const __m512 weight = rounded(narrow, _mm512_set1_ps(w->weights[k]));
            const __m512 output = load(narrow, w->mixed, w->places[k] * m->hidden + d, mask);
            sum = _mm512_add_ps(sum, rounded(narrow, _mm512_mul_ps(weight, output)));
        }
        store(narrow, x, d, _mm512_add_ps(load(narrow, x, d, mask), rounded(narrow, sum)), mask);
    }
}

static void combine(const struct model *m, const struct workspace *w, int64_t row, void *x) {
    if (m->narrow) combine_row(1, m, w, row, x);
    else combine_row(0, m, w, row, x);
}

/* One product of each expert that has rows, whose inputs lie side by side. */
static void multiply_experts(const struct model *m, const struct layer *l, const struct workspace *w, int64_t which,
                             const void *x, int64_t inputs, void *out, int64_t outputs, int64_t mode) {
    const int64_t narrow = m->narrow;
    for (int64_t e = 0, from = 0; e < m->experts; from = w->ends[e++]) {
        const struct product p = {ROW(x, inputs, from), (const int32_t *)l->experts[2 * e + which], NULL,
                                  ROW(out, outputs, from), mode, w->ends[e] - from, inputs / (narrow ? 2 : 1),
                                  mode == GATED ? 2 * outputs : outputs, inputs, outputs};
        begin_multiply(narrow, &p);
    }
#pragma omp barrier
}

/* x += a mixture of experts. `chosen`: where the experts of the rows are told, or 0. */
static void add_mixture(const struct model *m, const struct layer *l, const struct batch *b, const struct workspace *w,
                        int64_t *chosen) {
    const int64_t narrow = m->narrow, hidden = m->hidden, top = m->top;
    const struct product route = {w->normed, l->router, NULL, w->shares, WIDENED, b->rows, hidden / (narrow ? 2 : 1),
                                  m->experts, hidden, m->experts};
    multiply(narrow, &route);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->rows; i++) pick(m, w->shares + i * m->experts, w->picked + i * top, w->weights + i * top);
#pragma omp single
    {
        int64_t before = 0;
        memset(w->ends, 0, sizeof(int64_t) * (size_t)m->experts);
        for (int64_t i = 0; i < b->rows * top; i++) w->ends[w->picked[i]]++;
        for (int64_t e = 0; e < m->experts; e++) {
            const int64_t count = w->ends[e];
            w->ends[e] = before;
            before += count;
        }
        for (int64_t i = 0; i < b->rows * top; i++) w->places[i] = w->ends[w->picked[i]]++;
        if (chosen) memcpy(chosen, w->picked, sizeof(int64_t) * (size_t)(b->rows * top));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->rows * top; i++)
        memcpy(ROW(w->gathered, hidden, w->places[i]), ROW(w->normed, hidden, i / top),
               (size_t)(hidden * (narrow ? 2 : 4)));
    multiply_experts(m, l, w, 0, w->gathered, hidden, w->wide, l->inner, GATED);
    multiply_experts(m, l, w, 1, w->wide, l->inner, w->mixed, hidden, STORED);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->rows; i++) combine(m, w, i, ROW(b->hidden, hidden, i));
}

/* x += attention, x += MLP. Part of a parallel region, if there is one. */
static void add_block(const struct model *m, const struct layer *l, const struct batch *b, const struct workspace *w,
                      float *scratch, int64_t *chosen) {
    const int64_t narrow = m->narrow, hidden = m->hidden, per_word = narrow ? 2 : 1;
    const int64_t wide = (m->heads + 2 * m->kv_heads) * m->size, inner = m->heads * m->size;
    const struct product qkv = {w->normed, l->qkv, l->qkv_bias, w->wide, STORED, b->rows, hidden / per_word, wide,
                                hidden, wide};
    const struct product out = {w->mixed, l->out, l->out_bias, b->hidden, ADDED, b->rows, inner / per_word, hidden,
                                inner, hidden};
    const struct product gate_up = {w->normed, l->gate_up, l->gate_up_bias, w->wide, GATED, b->rows,
                                    hidden / per_word, 2 * l->inner, hidden, l->inner};
    const struct product down = {w->wide, l->down, l->down_bias, b->hidden, ADDED, b->rows, l->inner / per_word,
                                 hidden, l->inner, hidden};
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->rows; i++)
        norm_row(m, ROW(b->hidden, hidden, i), l->norm, ROW(w->normed, hidden, i));
    multiply(narrow, &qkv);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->rows; i++) {
        const int64_t row = b->order[i];
        turn_row(m, l, b, row, ROW(w->wide, wide, row));
        if (narrow) attend_bfloat16(m, l, b, row, ROW(w->wide, wide, row), scratch, ROW(w->mixed, inner, row));
        else attend_float32(m, l, b, row, ROW(w->wide, wide, row), scratch, ROW(w->mixed, inner, row));
    }
    multiply(narrow, &out);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->rows; i++)
        norm_row(m, ROW(b->hidden, hidden, i), l->mlp_norm, ROW(w->normed, hidden, i));
    if (l->router) {
        add_mixture(m, l, b, w, chosen);
        return;
    }
    multiply(narrow, &gate_up);
    multiply(narrow, &down);
}

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

/* All blocks of one new token for each row, on the residual stream in place. a: model, batch */
void packed_step(const int64_t *a) {
    const struct model *m = (const struct model *)a[0];
    const struct batch *b = (const struct batch *)a[1];
    struct workspace w;
    lay_out(m, b, b->scratch, &w);
#pragma omp parallel num_threads((int)b->threads) if (b->threads > 1)
    for (int64_t i = 0, mixtures = 0; i < m->layers; i++) {
        int64_t *chosen = b->chosen ? b->chosen + mixtures * b->rows * m->top : NULL;
        add_block(m, m->layer + i, b, &w, w.threads + omp_get_thread_num() * room_of_thread(m, b), chosen);
        mixtures += m->layer[i].router != NULL;
    }
}

#define DRAWN 1024 /* tokens whose weights are summed before one is looked for among them; a multiple of LANES */

/* (x - top) / temperature of 16 logits, those beyond the mask at minus infinity. */
INLINE __m512 below_top(const float *logits, int64_t v, int64_t vocabulary, __m512 top, __m512 temperature) {
    const __mmask16 mask = vocabulary - v >= LANES ? 0xffff : (1u << (vocabulary - v)) - 1;
    const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), mask, logits + v);
    return _mm512_div_ps(_mm512_sub_ps(x, top), temperature);
}

/* e^x, and 0 where that is nothing beside the weight of 1 that the likeliest token has. */
INLINE __m512 weight_of(__m512 x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ), exponential(x));
}

/* The first token whose cumulative weight exceeds uniform x total, and its log-probability. Sums are in float64: beside a
   weight of 1 a float32 sum loses those of many unlikely tokens. */
static void draw_row(const float *logits, int64_t vocabulary, float temperature, double uniform, double *sums,
                     int64_t *token, float *logprob) {
    const __m512 heat = _mm512_set1_ps(temperature), lowest = _mm512_set1_ps(-INFINITY);
    __m512 most = lowest;
    for (int64_t v = 0; v < vocabulary; v += LANES) {
        const __mmask16 mask = vocabulary - v >= LANES ? 0xffff : (1u << (vocabulary - v)) - 1;
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(lowest, mask, logits + v));
    }
    const float highest = _mm512_reduce_max_ps(most);
    const __m512 top = _mm512_set1_ps(highest);
    __mmask16 unordered = 0;
    double total = 0.0;
    for (int64_t start = 0; start < vocabulary; start += DRAWN) {
        const int64_t stop = start + DRAWN < vocabulary ? start + DRAWN : vocabulary;
        __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
        for (int64_t v = start; v < stop; v += LANES) {
            const __m512 x = below_top(logits, v, vocabulary, top, heat), weight = weight_of(x);
            unordered |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
            low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(weight)));
            high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(weight, 1)));
        }
        sums[start / DRAWN] = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
        total += sums[start / DRAWN];
    }
    *token = vocabulary - 1;
    *logprob = NAN;
    if (unordered) return; /* something was not a number, and the log-probability says so */
    /* Rounding may leave something of the threshold beyond the last: the last that weighs anything is drawn then. */
    double left = uniform * total;
    int64_t block = 0, drawn = -1;
    const int64_t blocks = (vocabulary + DRAWN - 1) / DRAWN;
    int64_t last = blocks - 1;
    while (sums[last] == 0.0) last--;
    for (; block < last && left >= sums[block]; block++) left -= sums[block];
    while (sums[block] == 0.0) block++;
    float found = 0.0f;
    for (int64_t v = block * DRAWN; v < (block + 1) * DRAWN && v < vocabulary; v += LANES) {
        float x[LANES], weight[LANES];
        const __m512 below = below_top(logits, v, vocabulary, top, heat);
        _mm512_storeu_ps(x, below);
        _mm512_storeu_ps(weight, weight_of(below));
        for (int64_t i = 0; i < LANES; i++) {
            if (weight[i] == 0.0f) continue;
            drawn = v + i;
            found = x[i];
            if (left < (double)weight[i]) goto done;
            left -= (double)weight[i];
        }
    }
done:
    *token = drawn;
    *logprob = (float)((double)found - log(total));
}

/* a: logits, rows, vocabulary, temperature, uniforms (rows), scratch of a float64 for each DRAWN tokens of each row,
   tokens (rows), log-probabilities (rows), threads */
void packed_draw(const int64_t *a) {
    const int64_t vocabulary = a[2], blocks = (vocabulary + DRAWN - 1) / DRAWN;
#pragma omp parallel for num_threads((int)a[8]) schedule(static) if (a[8] > 1)
    for (int64_t i = 0; i < a[1]; i++)
        draw_row((const float *)a[0] + i * vocabulary, vocabulary, *(const float *)a[3], ((const double *)a[4])[i],
                 (double *)a[5] + i * blocks, (int64_t *)a[6] + i, (float *)a[7] + i);
}

#endif
