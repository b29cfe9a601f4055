/* One step of AdamSN or Adafactor on float32 matrices, each number read as few times as it can be.
 *
 * Built and called by cpu_optimizers.py. A call takes all matrices of a group, one after the other,
 * and every thread a run of each one's row tiles. Sums are taken within a tile, then over tiles in
 * their order, so a step gives the same bits with any number of threads.
 */
#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline)) /* for constants to reach the loops */
#define BLOCK 32 /* numbers that share a scale of 8-bit momentum: quantized_state.py */
#define RUN 16   /* blocks that are averaged together */
#define GOLDEN 0x9e3779b9u

typedef struct {
    float *param;           /* (rows, columns) */
    const float *grad;      /* (rows, columns) */
    void *momentum;         /* (rows, columns) float32 or int8, or null */
    uint16_t *scales;       /* bfloat16, one for each BLOCK of an 8-bit momentum */
    float *row, *column;    /* second moments: (rows), Adafactor's also (columns) */
    int64_t rows, columns, tile; /* tile: rows of one */
} Matrix;

typedef struct {
    float fresh;         /* the momentum's 1 - beta */
    float share;         /* of the gradient in the update, the momentum having the rest */
    float decay, rate;   /* p <- decay p - rate update */
    int32_t bits;        /* of the momentum: 0 (none), 8 or 32 */
    uint32_t step;       /* the dither of 8 bits follows from it and the scales */
} Step;

INLINE uint32_t mix(uint32_t x) { /* a bijection that changes half of the bits, each for each */
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

INLINE float load_bf16(uint16_t high) {
    const uint32_t bits = (uint32_t)high << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint16_t store_bf16(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE float capped(float x, float most) { return x > most ? most : x; } /* nan stays nan */

INLINE float sum_squares(const float *x, int64_t n) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = 0; j < n; j++) s += x[j] * x[j];
    return s;
}

/* The dither v of momentum.py: its first word for a block of this scale; all in a block. */
INLINE uint32_t dither_word(uint16_t scale, uint32_t step) { return mix(scale + step * GOLDEN); }

/* Sixteen numbers at once; gcc 12 by itself takes four where bytes come in. */
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef int8_t B16 __attribute__((vector_size(16)));
#define LOAD(to, from) memcpy(&(to), from, sizeof(to))
#define STORE(to, from) memcpy(to, &(from), sizeof(from))
#define FLOATS(x) __builtin_convertvector(x, F16)

INLINE F16 dither16(uint32_t word, U16 lanes) {
    return FLOATS((I16)(word + lanes) >> 8) * 0x1p-24f;
}

/* Up to RUN blocks of 8-bit momentum m: m <- (1 - fresh) m + fresh x, kept rounded without bias.
 *
 * Scales and the words of their dithers are worked out for all blocks at once: one after the other
 * each would wait for the last, and for a division. */
INLINE void average8(const float *restrict x, float *restrict m, int8_t *restrict codes,
                     uint16_t *restrict scales, int blocks, float fresh, uint32_t step) {
    uint32_t word[RUN];
    float scale[RUN], most[RUN], inverse[RUN];
    U16 lanes[2];
    for (int j = 0; j < BLOCK; j++) lanes[j / 16][j % 16] = j * GOLDEN;
#pragma omp simd
    for (int b = 0; b < blocks; b++) {
        word[b] = dither_word(scales[b], step - 1);
        scale[b] = load_bf16(scales[b]);
    }
    for (int b = 0; b < blocks; b++) {
        I16 top = {0}; /* floats' bits without the sign, as ordered as their sizes are */
        for (int half = 0; half < 2; half++) {
            const int at = b * BLOCK + half * 16;
            int32_t wide[16];
            I16 code;
            F16 fed;
            for (int j = 0; j < 16; j++) wide[j] = codes[at + j];
            LOAD(code, wide);
            LOAD(fed, x + at);
            F16 old = (FLOATS(code) - dither16(word[b], lanes[half])) * scale[b];
            old = (F16)((I16)old & (code >= -127)); /* the lowest code is zero's */
            const F16 now = old + fresh * (fed - old);
            const I16 size = (I16)now & 0x7fffffff, more = size > top;
            top = (size & more) | (top & ~more);
            STORE(m + at, now);
        }
        float tops[16], largest = 0;
        STORE(tops, top);
#pragma omp simd reduction(max : largest)
        for (int j = 0; j < 16; j++) largest = tops[j] > largest ? tops[j] : largest;
        most[b] = largest;
    }
#pragma omp simd
    for (int b = 0; b < blocks; b++) {
        scales[b] = store_bf16(most[b] * ((1 + 0x1p-7f) / 127)); /* up: |m| / scale <= 127 */
        word[b] = dither_word(scales[b], step);
        const float new = load_bf16(scales[b]);
        inverse[b] = 1 / (new > FLT_MIN ? new : FLT_MIN);
    }
    for (int b = 0; b < blocks; b++)
        for (int half = 0; half < 2; half++) {
            const int at = b * BLOCK + half * 16;
            F16 now;
            LOAD(now, m + at);
            const I16 zero = now == 0;
            now = now * inverse[b] + dither16(word[b], lanes[half]) + 0.5f;
            I16 whole = __builtin_convertvector(now, I16); /* towards zero; nan: the least int */
            whole += FLOATS(whole) > now;                  /* -1 where that was up */
            whole = (whole & ~zero) | (zero & -128);
            const B16 code = __builtin_convertvector(whole, B16); /* in [-128, 127]; nan: 0 */
            STORE(codes + at, code);
        }
}

/* Ask memory for n numbers that are soon to be read; a few beyond the end do no harm. */
INLINE void fetch(const float *x, int64_t n) {
    for (int64_t j = 0; j < n; j += 16) __builtin_prefetch(x + j);
}

/* p <- decay p - rate (m + share (x - m)) of row i, m the momentum of x, or x itself.
 * x = g w k; w null: x = g. */
INLINE void move_row(const Matrix *t, int64_t i, const float *restrict w, float k, float rate,
                     const Step *s, int bits) {
    const int64_t C = t->columns;
    const float *restrict g = t->grad + i * C;
    float *restrict p = t->param + i * C;
    const float fresh = s->fresh, share = s->share, decay = s->decay;
    if (bits == 8) {
        int8_t *codes = (int8_t *)t->momentum + i * C;
        uint16_t *scales = t->scales + i * (C / BLOCK);
        for (int64_t b = 0; b < C; b += RUN * BLOCK) {
            const int n = C - b < RUN * BLOCK ? C - b : RUN * BLOCK;
            float x[RUN * BLOCK], m[RUN * BLOCK];
            fetch(p + b, n); /* while momentum is worked out */
            for (int j = 0; j < n; j++) x[j] = w ? g[b + j] * w[b + j] * k : g[b + j];
            average8(x, m, codes + b, scales + b / BLOCK, n / BLOCK, fresh, s->step);
            for (int j = 0; j < n; j++)
                p[b + j] = p[b + j] * decay - rate * (m[j] + share * (x[j] - m[j]));
        }
        return;
    }
    float *restrict m = bits ? (float *)t->momentum + i * C : 0;
#pragma omp simd
    for (int64_t j = 0; j < C; j++) {
        float x = w ? g[j] * w[j] * k : g[j];
        if (bits) {
            m[j] += fresh * (x - m[j]);
            x = m[j] + share * (x - m[j]);
        }
        p[j] = p[j] * decay - rate * x;
    }
}

INLINE void move_any(const Matrix *t, int64_t i, const float *w, float k, float rate,
                     const Step *s) {
    if (s->bits == 0) move_row(t, i, w, k, rate, s, 0);
    else if (s->bits == 8) move_row(t, i, w, k, rate, s, 8);
    else move_row(t, i, w, k, rate, s, 32);
}

/* This thread's share of n: [first, last). */
INLINE void share(int64_t n, int64_t *first, int64_t *last) {
    const int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
    *first = n * id / all;
    *last = n * (id + 1) / all;
}

/* ---- AdamSN, one second moment a row: adamsn.py ----
 *
 * v <- v + fresh2 (N - v), N the sum of g^2 over a row, or their mean
 * p <- decay p - rate (m + share (g - m)) / (sqrt(v / correction2) + eps)
 */
INLINE float row_rate(float *v, float square, float fresh2, float correction2, float eps,
                      const Step *s) {
    *v += fresh2 * (capped(square, FLT_MAX) - *v);
    return s->rate * (1 / (sqrtf(*v / correction2) + eps));
}

/* Rows [first, last) of BLOCK numbers each, with 8-bit momentum, RUN rows together. */
static void adamsn_blocks(const Matrix *t, int64_t first, int64_t last, const Step *s, float fresh2,
                          float correction2, float eps, float factor) {
    for (int64_t i = first; i < last; i += RUN) {
        const int n = last - i < RUN ? last - i : RUN;
        const float *restrict g = t->grad + i * BLOCK;
        float *restrict p = t->param + i * BLOCK;
        float m[RUN * BLOCK], rate[RUN];
        fetch(p, n * BLOCK); /* while momentum is worked out */
        for (int r = 0; r < n; r++) rate[r] = sum_squares(g + r * BLOCK, BLOCK) * factor;
#pragma omp simd
        for (int r = 0; r < n; r++)
            rate[r] = row_rate(t->row + i + r, rate[r], fresh2, correction2, eps, s);
        average8(g, m, (int8_t *)t->momentum + i * BLOCK, t->scales + i, n, s->fresh, s->step);
        for (int j = 0; j < n * BLOCK; j++)
            p[j] = p[j] * s->decay - rate[j / BLOCK] * (m[j] + s->share * (g[j] - m[j]));
    }
}

void adamsn(const Matrix *matrices, int64_t count, const Step *s, float fresh2, float correction2,
            float eps, int32_t mean, int32_t threads) {
#pragma omp parallel num_threads(threads)
    for (const Matrix *t = matrices; t < matrices + count; t++) {
        int64_t first, last;
        share(t->rows, &first, &last);
        const float factor = mean ? 1.0f / t->columns : 1;
        if (s->bits == 8 && t->columns == BLOCK) {
            adamsn_blocks(t, first, last, s, fresh2, correction2, eps, factor);
            continue;
        }
        for (int64_t i = first; i < last; i++) {
            fetch(t->grad + (i + 1) * t->columns, t->columns); /* the next row's */
            const float square = sum_squares(t->grad + i * t->columns, t->columns) * factor;
            const float rate = row_rate(t->row + i, square, fresh2, correction2, eps, s);
            move_any(t, i, 0, 1, rate, s);
        }
    }
}

/* ---- Adafactor: adafactor.py ----
 *
 * R, C <- averages of the rows' and columns' means of g^2;  U = g / sqrt(R C' / mean R);
 * p <- decay p - rate U / max(1, RMS(U) / clip)
 *
 * Three passes over g, forwards, backwards, forwards: each begins with what is still in cache.
 */
INLINE void factor_sums(const Matrix *t, int64_t n, float *restrict total, float *part,
                        float fresh2, float eps1, float most) {
    const int64_t C = t->columns, end = (n + 1) * t->tile;
    memset(total, 0, C * sizeof(float));
    *part = 0;
    for (int64_t i = n * t->tile; i < (end < t->rows ? end : t->rows); i++) {
        const float *restrict g = t->grad + i * C;
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t j = 0; j < C; j++) {
            const float square = g[j] * g[j];
            s += square;
            total[j] += square;
        }
        t->row[i] += fresh2 * (capped(s / C + eps1, most) - t->row[i]);
        *part += t->row[i];
    }
}

/* scratch: tiles (columns + 2) + columns numbers, for the most of each that a matrix has; clip
 * infinite: none */
void adafactor(const Matrix *matrices, int64_t count, const Step *s, float *scratch,
               int64_t most_tiles, int64_t most_columns, float fresh2, float eps1, float most,
               float clip, int32_t threads) {
    /* Apart, so that sums of a matrix can begin while others still write the one before, for which
     * they need the first two. */
    float *weight = scratch, *squares = weight + most_columns, *parts = squares + most_tiles;
    float *totals = parts + most_tiles; /* (tiles, columns) */
#pragma omp parallel num_threads(threads)
    for (const Matrix *t = matrices; t < matrices + count; t++) {
        const int64_t C = t->columns, tiles = (t->rows + t->tile - 1) / t->tile;
        int64_t first, last, from, to;
        share(tiles, &first, &last);
        share(C, &from, &to);
        for (int64_t n = first; n < last; n++)
            factor_sums(t, n, totals + n * C, parts + n, fresh2, eps1, most);
#pragma omp barrier
        float mean = 0;
        for (int64_t n = 0; n < tiles; n++) mean += parts[n];
        mean /= t->rows;
        for (int64_t j = from; j < to; j++) weight[j] = 0;
        for (int64_t n = 0; n < tiles; n++)
            for (int64_t j = from; j < to; j++) weight[j] += totals[n * C + j];
        for (int64_t j = from; j < to; j++) {
            t->column[j] += fresh2 * (capped(weight[j] / t->rows + eps1, most) - t->column[j]);
            weight[j] = 1 / sqrtf(t->column[j]);
        }
#pragma omp barrier
        float shrink = 1;
        if (clip < INFINITY) {
            for (int64_t n = last - 1; n >= first; n--) {
                const int64_t end = (n + 1) * t->tile < t->rows ? (n + 1) * t->tile : t->rows;
                squares[n] = 0;
                for (int64_t i = end - 1; i >= n * t->tile; i--) {
                    const float *restrict g = t->grad + i * C;
                    float u = 0;
#pragma omp simd reduction(+ : u)
                    for (int64_t j = 0; j < C; j++) u += (g[j] * weight[j]) * (g[j] * weight[j]);
                    squares[n] += u / C * (mean / t->row[i]);
                }
            }
#pragma omp barrier
            float square = 0;
            for (int64_t n = 0; n < tiles; n++) square += squares[n];
            const float excess = sqrtf(square / t->rows) / clip;
            shrink = excess < 1 ? 1 : 1 / excess; /* nan stays nan */
        }
        const int64_t end = last * t->tile < t->rows ? last * t->tile : t->rows;
        for (int64_t i = first * t->tile; i < end; i++)
            move_any(t, i, weight, sqrtf(mean / t->row[i]) * shrink, s->rate, s);
    }
}
