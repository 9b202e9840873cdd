/* What stands between the matrix products of a decode step, on a CPU: norms, rotary embedding, gated activation, and
   attention of one new token per row to [preamble | prompt | suffix] (../cache.py says how those lie).

   native.py compiles this file for the machine it runs on. Every function does what a few lines of torch in
   ../decoder.py and ../layouts.py do, which run where there is no compiler; tests hold the two together. Rows are
   independent of each other, so that the number of threads changes no bit. Each takes one array of 64-bit numbers:
   addresses, sizes and strides, in elements. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16 /* floats of a vector register; the cache's rows are padded to it */

/* e^x to about 1 unit in the last place: x = n log 2 + r, a polynomial of r, n into the exponent. Below -87 it stays at
   1e-38, which is nothing beside the weight of 1 that the largest score has. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -0.693145752f, x);
    r = fmaf(n, -1.42860677e-6f, r);
    float p = 1.98756915e-4f;
    p = fmaf(p, r, 1.39819995e-3f);
    p = fmaf(p, r, 8.33345191e-3f);
    p = fmaf(p, r, 4.16657962e-2f);
    p = fmaf(p, r, 1.66666657e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r * r, r) + 1.0f;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    return p * power.f;
}

static inline float from_bfloat16(uint16_t x) {
    union { uint32_t i; float f; } bits = {(uint32_t)x << 16};
    return bits.f;
}

static inline uint16_t to_bfloat16(float x) {
    union { float f; uint32_t i; } bits = {x};
    return (uint16_t)((bits.i + 0x7fff + ((bits.i >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

static inline float same(float x) { return x; }

/* The elementwise kernels once for each precision of the model. */
#define KERNELS(NAME, T, LOAD, STORE)                                                                                  \
    /* out = round(x / sqrt(mean(x^2) + epsilon)) weight; a: x, weight, out, rows, size, epsilon */                    \
    void norm_##NAME(const int64_t *a) {                                                                               \
        const T *x = (const T *)a[0], *weight = (const T *)a[1];                                                       \
        T *out = (T *)a[2];                                                                                            \
        const int64_t rows = a[3], size = a[4];                                                                        \
        const float epsilon = *(const float *)a[5];                                                                    \
        for (int64_t i = 0; i < rows; i++, x += size, out += size) {                                                   \
            float sum = 0.0f;                                                                                          \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < size; j++) sum += LOAD(x[j]) * LOAD(x[j]);  \
            const float factor = 1.0f / sqrtf(sum / (float)size + epsilon);                                            \
            for (int64_t j = 0; j < size; j++) out[j] = STORE(LOAD(STORE(LOAD(x[j]) * factor)) * LOAD(weight[j]));     \
        }                                                                                                              \
    }                                                                                                                  \
    /* Queries and keys in place: normed per head where a weight is given, then turned.                                \
       a: x, rows, stride of rows, heads, size, cos, sin (rows, size), weight (heads, size) or 0, epsilon */           \
    void rotate_##NAME(const int64_t *a) {                                                                             \
        const int64_t rows = a[1], stride = a[2], heads = a[3], size = a[4], half = size / 2;                          \
        const T *cosine = (const T *)a[5], *sine = (const T *)a[6];                                                    \
        for (int64_t i = 0; i < rows; i++) {                                                                           \
            const T *c = cosine + i * size, *s = sine + i * size;                                                      \
            const T *weight = (const T *)a[7];                                                                         \
            T *x = (T *)a[0] + i * stride;                                                                             \
            for (int64_t h = 0; h < heads; h++, x += size) {                                                           \
                if (weight) {                                                                                          \
                    float sum = 0.0f;                                                                                  \
                    _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < size; j++) sum +=                   \
                        LOAD(x[j]) * LOAD(x[j]);                                                                       \
                    const float factor = 1.0f / sqrtf(sum / (float)size + *(const float *)a[8]);                       \
                    for (int64_t j = 0; j < size; j++)                                                                 \
                        x[j] = STORE(LOAD(STORE(LOAD(x[j]) * factor)) * LOAD(weight[j]));                              \
                    weight += size;                                                                                    \
                }                                                                                                      \
                for (int64_t j = 0; j < half; j++) {                                                                   \
                    const float first = LOAD(x[j]), second = LOAD(x[j + half]);                                        \
                    x[j] = STORE(first * LOAD(c[j]) + second * LOAD(s[j]));                                            \
                    x[j + half] = STORE(second * LOAD(c[j + half]) + first * LOAD(s[j + half]));                       \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    /* out = silu(gate) up; a: gate and up side by side (rows, 2 size), out (rows, size), rows, size */                \
    void gate_##NAME(const int64_t *a) {                                                                               \
        const int64_t rows = a[2], size = a[3];                                                                        \
        for (int64_t i = 0; i < rows; i++) {                                                                           \
            const T *gate = (const T *)a[0] + 2 * i * size, *up = gate + size;                                         \
            T *out = (T *)a[1] + i * size;                                                                             \
            for (int64_t j = 0; j < size; j++) {                                                                       \
                const float g = LOAD(gate[j]);                                                                         \
                out[j] = STORE(LOAD(STORE(g / (1.0f + exponential(-g)))) * LOAD(up[j]));                               \
            }                                                                                                          \
        }                                                                                                              \
    }

KERNELS(float32, float, same, same)
KERNELS(bfloat16, uint16_t, from_bfloat16, to_bfloat16)

/* Tokens taken at a time, so that their keys and values stay in the first-level cache for all heads that share them. */
#define TOKENS 64

#define SCORE(WIDTH)                                                                                                   \
    for (int64_t r = 0; r < repeats; r++) {                                                                            \
        const float *q = query + r * size;                                                                             \
        float sum[WIDTH] = {0};                                                                                        \
        for (int64_t d = 0; d < size; d++)                                                                             \
            for (int j = 0; j < WIDTH; j++) sum[j] += q[d] * keys[d * stride + t + j];                                 \
        memcpy(scores + r * room + t, sum, sizeof sum);                                                                \
    }

/* Scores of some queries with `count` keys, a multiple of LANES, that lie transposed. */
static inline void scores_of(const float *query, int64_t repeats, const float *keys, int64_t stride, int64_t size,
                             int64_t count, float *scores, int64_t room) {
    int64_t t = 0;
    for (; t + TOKENS <= count; t += TOKENS) SCORE(TOKENS)
    for (; t + 2 * LANES <= count; t += 2 * LANES) SCORE(2 * LANES)
    for (; t < count; t += LANES) SCORE(LANES)
}

/* out += sum of weight[t] value[t] for some rows of weights, `size` a multiple of LANES. */
static inline void mix(const float *weights, int64_t room, int64_t repeats, const float *values, int64_t size,
                       int64_t count, float *out) {
    for (int64_t start = 0; start < count; start += TOKENS) {
        const int64_t stop = start + TOKENS < count ? start + TOKENS : count;
        for (int64_t r = 0; r < repeats; r++) {
            const float *weight = weights + r * room;
            int64_t d = 0;
            for (; d + 4 * LANES <= size; d += 4 * LANES) {
                float sum[4 * LANES], *to = out + r * size + d;
                memcpy(sum, to, sizeof sum);
                for (int64_t t = start; t < stop; t++)
                    for (int j = 0; j < 4 * LANES; j++) sum[j] += weight[t] * values[t * size + d + j];
                memcpy(to, sum, sizeof sum);
            }
            for (; d < size; d += LANES) {
                float even[LANES], odd[LANES] = {0}, *to = out + r * size + d; /* two sums: one would wait for itself */
                memcpy(even, to, sizeof even);
                int64_t t = start;
                for (; t + 2 <= stop; t += 2)
                    for (int j = 0; j < LANES; j++) {
                        even[j] += weight[t] * values[t * size + d + j];
                        odd[j] += weight[t + 1] * values[(t + 1) * size + d + j];
                    }
                if (t < stop)
                    for (int j = 0; j < LANES; j++) even[j] += weight[t] * values[t * size + d + j];
                for (int j = 0; j < LANES; j++) to[j] = even[j] + odd[j];
            }
        }
    }
}

/* Keys and values of one stretch of a row's context, those from `first` to `last` visible. */
struct stretch {
    const float *keys, *values;
    int64_t stride, first, last;
};

enum {
    QUERY, KEY, VALUE, OUT, QUERY_STRIDE, KEY_STRIDE, VALUE_STRIDE, ROWS, KV_HEADS, REPEATS, SIZE, SCALING, WINDOW,
    THREADS, KEYS, VALUES, LENGTH, OWN, ORDER, POOL, SLOT, PROMPT, BASES, PREAMBLE_KEYS, PREAMBLE_VALUES,
    PREAMBLE_STRIDE, PREAMBLE, LONGEST
};

/* Store the new key and value of each row and attend. Rows come in the order of their prompts, so that a prompt's keys
   are in the processor's cache for all its samples. BASES: keys, values and stride of each pool. Returns how many threads
   found no memory, whose rows are then missing. */
int64_t attend(const int64_t *a) {
    const int64_t heads = a[KV_HEADS], repeats = a[REPEATS], size = a[SIZE], length = a[LENGTH];
    const int64_t room = a[LONGEST] + 3 * 2 * LANES, window = a[WINDOW];
    const float scaling = *(const float *)a[SCALING];
    int64_t without = 0;
#pragma omp parallel num_threads((int)a[THREADS]) reduction(+ : without) if (a[THREADS] > 1)
    {
        float *scores = malloc(sizeof(float) * (size_t)(repeats * (room + size)));
        float *query = scores == NULL ? NULL : scores + repeats * room;
        without += scores == NULL;
#pragma omp for schedule(static)
        for (int64_t place = 0; place < a[ROWS]; place++) {
            if (scores == NULL) continue; /* every thread must come by the loop */
            const int64_t row = ((const int64_t *)a[ORDER])[place], own = ((const int64_t *)a[OWN])[row];
            const int64_t prompt = ((const int64_t *)a[PROMPT])[row], slot = ((const int64_t *)a[SLOT])[row];
            const int64_t *base = (const int64_t *)a[BASES] + 3 * ((const int64_t *)a[POOL])[row];
            const int64_t before = a[PREAMBLE], at = before + prompt + own;
            const int64_t oldest = window && at >= window ? at - window + 1 : 0;
            for (int64_t h = 0; h < heads; h++) {
                const int64_t cell = (row * heads + h) * size * length, there = (slot * heads + h) * size * base[2];
                const float *key = (const float *)a[KEY] + row * a[KEY_STRIDE] + h * size;
                const float *value = (const float *)a[VALUE] + row * a[VALUE_STRIDE] + h * size;
                float *keys = (float *)a[KEYS] + cell, *values = (float *)a[VALUES] + cell;
                for (int64_t d = 0; d < size; d++) keys[d * length + own] = key[d];
                memcpy(values + own * size, value, sizeof(float) * (size_t)size);
                const struct stretch context[3] = {
                    {(const float *)a[PREAMBLE_KEYS] + h * size * a[PREAMBLE_STRIDE],
                     (const float *)a[PREAMBLE_VALUES] + h * size * a[PREAMBLE_STRIDE], a[PREAMBLE_STRIDE], oldest, before},
                    {(const float *)base[0] + there, (const float *)base[1] + there, base[2],
                     oldest > before ? oldest - before : 0, prompt},
                    {keys, values, length, oldest > before + prompt ? oldest - before - prompt : 0, own + 1},
                };
                const float *given = (const float *)a[QUERY] + row * a[QUERY_STRIDE] + h * repeats * size;
                float *out = (float *)a[OUT] + (row * heads + h) * repeats * size;
                for (int64_t d = 0; d < repeats * size; d++) query[d] = given[d] * scaling;
                int64_t total = 0;
                for (int i = 0; i < 3; i++) {
                    const struct stretch *c = context + i;
                    if (c->first >= c->last) continue;
                    const int64_t start = c->first / LANES * LANES;
                    const int64_t count = (c->last - start + LANES - 1) / LANES * LANES;
                    scores_of(query, repeats, c->keys + start, c->stride, size, count, scores + total, room);
                    for (int64_t r = 0; r < repeats; r++) {
                        float *hidden = scores + r * room + total;
                        for (int64_t t = 0; t < c->first - start; t++) hidden[t] = -1e30f;
                        for (int64_t t = c->last - start; t < count; t++) hidden[t] = -1e30f;
                    }
                    total += count;
                }
                for (int64_t r = 0; r < repeats; r++) {
                    float *score = scores + r * room, top = -1e30f, sum = 0.0f;
#pragma omp simd reduction(max : top)
                    for (int64_t t = 0; t < total; t++) top = score[t] > top ? score[t] : top;
#pragma omp simd reduction(+ : sum)
                    for (int64_t t = 0; t < total; t++) sum += score[t] = exponential(score[t] - top);
                    query[r] = sum; /* the queries are not needed again */
                }
                memset(out, 0, sizeof(float) * (size_t)(repeats * size));
                total = 0;
                for (int i = 0; i < 3; i++) {
                    const struct stretch *c = context + i;
                    if (c->first >= c->last) continue;
                    const int64_t start = c->first / LANES * LANES;
                    mix(scores + total + c->first - start, room, repeats, c->values + c->first * size, size,
                        c->last - c->first, out);
                    total += (c->last - start + LANES - 1) / LANES * LANES;
                }
                for (int64_t r = 0; r < repeats; r++)
                    for (int64_t d = 0; d < size; d++) out[r * size + d] /= query[r];
            }
        }
        free(scores);
    }
    return without;
}
