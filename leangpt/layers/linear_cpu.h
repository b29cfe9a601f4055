/* Products of a few rows with a linear layer's weights, for linear_cpu.c and decoding/step_cpu.c.
 *
 * Weights are bfloat16 (`half`) or float32, or 4-bit codes; whatever is computed is float32.
 * Threads: OpenMP's.
 */
#ifndef LINEAR_CPU_H
#define LINEAR_CPU_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline)) /* for constants to reach the loops */

typedef uint16_t bf16; /* the high half of a float32 */

/* x[i : i + 16] */
INLINE __m512 load16(const void *x, int64_t i, int half) {
    if (!half) return _mm512_loadu_ps((const float *)x + i);
    __m256i raw = _mm256_loadu_si256((const __m256i *)((const bf16 *)x + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

static inline float load(const void *x, int64_t i, int half) {
    if (!half) return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const bf16 *)x)[i] << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline void store(void *y, int64_t i, float value, int half) {
    if (!half) {
        ((float *)y)[i] = value;
        return;
    }
    uint32_t bits; /* to the nearest bfloat16, ties to even */
    memcpy(&bits, &value, 4);
    ((bf16 *)y)[i] = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* Ask for memory that will be wanted soon. The processor fetches ahead by itself, but not past the
 * end of a page of 4 KB, and needs a few misses to see that a row goes on: half the time of a step.
 * Past a tensor's end this asks for what nobody wants, which is no error.
 */
INLINE void soon(const void *x, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)x + i, _MM_HINT_T0);
}

/* ---- linear layers ---- */

typedef struct {
    const void *weight, *scale_zero, *bias; /* bias may be null */
    int64_t N, K, group;                    /* N outputs, K inputs; group 0: weight is (N, K) */
} Linear;

/* 4-bit products. A group's inputs become 16-bit integers q = 256 high + low with one scale t for
 * the group (their rounding, 2^-16 of the group's largest, is far below bfloat16's), so that its
 * sum of codes times inputs is exact in integers, four inputs of 16 rows an instruction:
 *
 *     y += t (scale (sum code q - 8 sum q) + zero sum q)
 *
 * weight: blocks of 16 rows, the last may have fewer; then 8 inputs at a time; then 4 bytes a row:
 * byte j has input j in its low half and input j + 4 in its high half.
 */
typedef struct {
    int8_t *high;
    uint8_t *low;
    float *t;
    int32_t *sum;
} Integers;

static void to_integers(const float *x, int64_t n, int64_t group, Integers to) {
    for (int64_t k = 0; k < n; k += group) {
        __m512 most = _mm512_setzero_ps(), bad = most; /* bad: NaN if an input is, or is infinite */
        for (int64_t i = k; i < k + group; i += 16) {
            const __m512 a = _mm512_loadu_ps(x + i);
            most = _mm512_max_ps(most, _mm512_abs_ps(a));
            bad = _mm512_fmadd_ps(a, _mm512_setzero_ps(), bad);
        }
        const float top = _mm512_reduce_max_ps(most);
        const __m512 up = _mm512_set1_ps(top > 0 ? 32767 / top : 0);
        __m512i total = _mm512_setzero_si512();
        for (int64_t i = k; i < k + group; i += 16) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), up));
            total = _mm512_add_epi32(total, q);
            _mm_storeu_si128((__m128i *)(to.high + i),
                             _mm512_cvtepi32_epi8(_mm512_srai_epi32(q, 8)));
            _mm_storeu_si128((__m128i *)(to.low + i), _mm512_cvtepi32_epi8(q));
        }
        to.t[k / group] = top / 32767 + _mm512_reduce_add_ps(bad);
        to.sum[k / group] = _mm512_reduce_add_epi32(total);
    }
}

/* out[0 : 16 R] of R blocks of `width` rows each (less than 16: R is 1), from row n on */
INLINE void int4_blocks(const int R, const int width, const Linear *f, int64_t n, Integers a,
                        float *out) {
    const uint8_t *codes = (const uint8_t *)f->weight + n * f->K / 2;
    const uint32_t *scale_zero = (const uint32_t *)f->scale_zero + n;
    const __mmask16 rows = (1 << width) - 1;
    const __m512i nibble = _mm512_set1_epi8(15), upper = _mm512_set1_epi32(-65536);
    __m512 y[R];
    for (int r = 0; r < R; r++) y[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < f->K / f->group; g++) {
        __m512i by_high[R], by_low[R];
        for (int r = 0; r < R; r++) by_high[r] = by_low[r] = _mm512_setzero_si512();
        for (int64_t k = g * f->group; k < (g + 1) * f->group; k += 8) {
            int32_t q[4];
            memcpy(q, a.high + k, 8);
            memcpy(q + 2, a.low + k, 8);
            const __m512i h0 = _mm512_set1_epi32(q[0]), h1 = _mm512_set1_epi32(q[1]);
            const __m512i l0 = _mm512_set1_epi32(q[2]), l1 = _mm512_set1_epi32(q[3]);
            for (int r = 0; r < R; r++) {
                const uint8_t *at = codes + r * 8 * f->K + k / 2 * width;
                soon(at + R * 8 * f->K, 64); /* the rows after these R blocks */
                const __m512i both = width == 16 ? _mm512_loadu_si512(at)
                                                 : _mm512_maskz_loadu_epi32(rows, at);
                const __m512i c0 = _mm512_and_si512(both, nibble);
                const __m512i c1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
                by_high[r] = _mm512_dpbusd_epi32(by_high[r], c0, h0);
                by_low[r] = _mm512_dpbusd_epi32(by_low[r], l0, c0);
                by_high[r] = _mm512_dpbusd_epi32(by_high[r], c1, h1);
                by_low[r] = _mm512_dpbusd_epi32(by_low[r], l1, c1);
            }
        }
        const __m512 t = _mm512_set1_ps(a.t[g]), tsum = _mm512_set1_ps(a.t[g] * (float)a.sum[g]);
        const __m512i eight = _mm512_set1_epi32(8 * a.sum[g]);
        for (int r = 0; r < R; r++) {
            const uint32_t *at = scale_zero + g * f->N + 16 * r;
            const __m512i sz = _mm512_maskz_loadu_epi32(rows, at);
            soon(at + 16 * R, 64);
            const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(sz, 16));
            const __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(sz, upper));
            const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(by_high[r], 8), by_low[r]);
            const __m512 part = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, eight));
            y[r] = _mm512_fmadd_ps(_mm512_mul_ps(part, t), scale, y[r]);
            y[r] = _mm512_fmadd_ps(tsum, zero, y[r]);
        }
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + 16 * r, y[r]);
}

static void int4_rows_of(const Linear *f, int64_t n, int64_t count, Integers a, float *out) {
    if (count == 64) {
        int4_blocks(4, 16, f, n, a, out);
        return;
    }
    for (; count >= 16; n += 16, count -= 16, out += 16) int4_blocks(1, 16, f, n, a, out);
    if (count) int4_blocks(1, count, f, n, a, out);
}

/* out[0 : count] of ordinary rows */
INLINE void plain_rows_of(const Linear *f, int64_t n, int64_t count, const float *x, float *out,
                          const int half) {
    for (int64_t first = 0; first < count; first += 4) {
        const int R = count - first < 4 ? count - first : 4;
        __m512 sum[4];
        for (int r = 0; r < 4; r++) sum[r] = _mm512_setzero_ps();
        const int64_t at = (n + first) * f->K;
        if (R == 4)
            for (int64_t k = 0; k < f->K; k += 16)
                for (int r = 0; r < 4; r++)
                    sum[r] = _mm512_fmadd_ps(_mm512_loadu_ps(x + k),
                                             load16(f->weight, at + r * f->K + k, half), sum[r]);
        else
            for (int r = 0; r < R; r++)
                for (int64_t k = 0; k < f->K; k += 16)
                    sum[r] = _mm512_fmadd_ps(_mm512_loadu_ps(x + k),
                                             load16(f->weight, at + r * f->K + k, half), sum[r]);
        for (int r = 0; r < R; r++) out[first + r] = _mm512_reduce_add_ps(sum[r]);
    }
}

/* y (M, N) = f(x (M, K)), y bfloat16 if half_y; add: y += f(x) */
static void linear(const Linear *f, const float *x, void *y, int64_t M, int half, int half_y,
                   int add) {
    const int64_t N = f->N, K = f->K, groups = f->group ? K / f->group : 0;
    char *room = f->group ? malloc(M * (8 * groups + 2 * K)) : NULL;
    const Integers all = {(int8_t *)(room + 8 * M * groups),
                          (uint8_t *)(room + 8 * M * groups + M * K), (float *)room,
                          (int32_t *)(room + 4 * M * groups)};
    if (f->group) to_integers(x, M * K, f->group, all);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n += 64) {
        const int64_t count = N - n < 64 ? N - n : 64;
        for (int64_t m = 0; m < M; m++) {
            float out[64];
            const Integers a = {all.high + m * K, all.low + m * K, all.t + m * groups,
                                all.sum + m * groups};
            if (f->group) int4_rows_of(f, n, count, a, out);
            else if (half) plain_rows_of(f, n, count, x + m * K, out, 1);
            else plain_rows_of(f, n, count, x + m * K, out, 0);
            for (int i = 0; i < count; i++) {
                if (f->bias) out[i] += load(f->bias, n + i, half);
                if (add) out[i] += ((float *)y)[m * N + n + i];
                store(y, m * N + n + i, out[i], half_y);
            }
        }
    }
    free(room);
}

#endif
