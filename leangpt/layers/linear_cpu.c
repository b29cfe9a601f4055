/* A decoding step on the CPU in one call, and 4-bit matrix-vector products by themselves.
 *
 * Built by cpu_kernels.py, called by it and by cpu_decode.py. Weights and caches are bfloat16
 * (`half`) or float32, or 4-bit codes; whatever is computed is float32. Threads: OpenMP's.
 *
 * B rows, C width, H heads over G key heads of D numbers, S slots of the cache.
 */
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

/* e^x for x <= 0: 2^n (a polynomial of the rest), to 2e-7 of it; 0 at -infinity */
INLINE __m512 exp16(__m512 x) {
    x = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-200)), _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(x, 8);
    const __m512 f = _mm512_sub_ps(x, n); /* in [-1/2, 1/2] */
    static const float c[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                              2.4022651e-1f, 6.9314718e-1f, 1.0f};
    __m512 p = _mm512_set1_ps(c[0]);
    for (int i = 1; i < 7; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(p, n);
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

void int4_rows(const void *x, void *y, const Linear *f, int64_t M, int64_t half) {
    float *wide = malloc(4 * M * f->K);
    for (int64_t i = 0; i < M * f->K; i += 16) _mm512_storeu_ps(wide + i, load16(x, i, half));
    linear(f, wide, y, M, half, half, 0);
    free(wide);
}

/* ---- attention of one query a head ---- */

#define KEYS 64 /* looked at in one go, then merged by online softmax (arXiv 1805.02867) */
#define AHEAD 24 /* rows between the one in use and the one asked for */
#define WIDEST 256

/* q (D,) over n rows of keys and values -> out (D,) */
INLINE void attend_one(const float *q, const void *k, const void *v, float *out, int64_t n,
                       const int D, const int half) {
    __m512 a[WIDEST / 16], mixed[WIDEST / 16];
    const __m512 scale = _mm512_set1_ps(1 / sqrtf(D));
    const int64_t row = D * (half ? 2 : 4); /* bytes */
    for (int i = 0; i < D / 16; i++) {
        a[i] = _mm512_mul_ps(_mm512_loadu_ps(q + 16 * i), scale);
        mixed[i] = _mm512_setzero_ps();
    }
    float top = -INFINITY, total = 0;
    for (int64_t start = 0; start < n; start += KEYS) {
        const int count = n - start < KEYS ? n - start : KEYS;
        float p[KEYS];
        for (int j = 0; j < count; j++) {
            soon((const char *)k + (start + j + AHEAD) * row, row);
            __m512 dot = _mm512_mul_ps(a[0], load16(k, (start + j) * D, half));
            for (int i = 1; i < D / 16; i++)
                dot = _mm512_fmadd_ps(a[i], load16(k, (start + j) * D + 16 * i, half), dot);
            p[j] = _mm512_reduce_add_ps(dot);
        }
        for (int j = count; j < KEYS; j++) p[j] = -INFINITY;
        __m512 most = _mm512_set1_ps(top), sum = _mm512_setzero_ps();
        for (int j = 0; j < KEYS; j += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(p + j));
        const float new_top = _mm512_reduce_max_ps(most);
        for (int j = 0; j < KEYS; j += 16) {
            const __m512 e = exp16(_mm512_sub_ps(_mm512_loadu_ps(p + j), _mm512_set1_ps(new_top)));
            _mm512_storeu_ps(p + j, e);
            sum = _mm512_add_ps(sum, e);
        }
        const float shrink = expf(top - new_top);
        total = total * shrink + _mm512_reduce_add_ps(sum);
        for (int i = 0; i < D / 16; i++) mixed[i] = _mm512_mul_ps(mixed[i], _mm512_set1_ps(shrink));
        top = new_top;
        for (int j = 0; j < count; j++) {
            soon((const char *)v + (start + j + AHEAD) * row, row);
            for (int i = 0; i < D / 16; i++)
                mixed[i] = _mm512_fmadd_ps(_mm512_set1_ps(p[j]),
                                           load16(v, (start + j) * D + 16 * i, half), mixed[i]);
        }
    }
    for (int i = 0; i < D / 16; i++)
        _mm512_storeu_ps(out + 16 * i, _mm512_div_ps(mixed[i], _mm512_set1_ps(total)));
}

/* rope's rotation of n heads x (n, D) by cos and sin (D / 2,) */
static void rotate(float *x, int64_t n, int64_t D, const float *cos, const float *sin) {
    for (float *head = x; head < x + n * D; head += D)
        for (int64_t i = 0; i < D / 2; i++) {
            const float a = head[i], b = head[i + D / 2];
            head[i] = a * cos[i] - b * sin[i];
            head[i + D / 2] = b * cos[i] + a * sin[i];
        }
}

/* ---- the model ---- */

enum { LAYERNORM, RMSNORM };
enum { GELU, GELU_TANH, SWIGLU };

typedef struct {
    const void *weight, *bias; /* bias may be null */
} Norm;

typedef struct {
    Norm ln_1, ln_2;
    Linear c_attn, c_proj, c_fc, mlp_proj;
    void *keys, *values; /* (B, G, S, D) */
} Block;

typedef struct {
    int64_t L, B, C, H, G, D, S, inner, half, norm, mlp;
    double eps;
    const Block *blocks;
    Norm ln_f;
    Linear head;
} Model;

/* y (B, C) = norm(x) */
static void norm_rows(const Model *model, const Norm *norm, const float *x, float *y) {
    const int64_t C = model->C;
    for (int64_t b = 0; b < model->B; b++, x += C, y += C) {
        __m512 sum = _mm512_setzero_ps(), squares = sum;
        for (int64_t i = 0; i < C; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
        const float mean = model->norm == LAYERNORM ? _mm512_reduce_add_ps(sum) / C : 0;
        for (int64_t i = 0; i < C; i += 16) {
            const __m512 a = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(mean));
            squares = _mm512_fmadd_ps(a, a, squares);
        }
        const float scale = 1 / sqrtf(_mm512_reduce_add_ps(squares) / C + (float)model->eps);
        for (int64_t i = 0; i < C; i += 16) {
            __m512 a = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(mean));
            a = _mm512_mul_ps(_mm512_mul_ps(a, _mm512_set1_ps(scale)),
                              load16(norm->weight, i, model->half));
            if (norm->bias) a = _mm512_add_ps(a, load16(norm->bias, i, model->half));
            _mm512_storeu_ps(y + i, a);
        }
    }
}

/* 1 / (1 + e^-z), by way of e^-|z| */
INLINE __m512 sigmoid16(__m512 z) {
    const __m512 one = _mm512_set1_ps(1);
    const __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(z)));
    const __mmask16 negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_div_ps(_mm512_mask_blend_ps(negative, one, e), _mm512_add_ps(one, e));
}

/* the normal distribution function to 1e-7: Abramowitz and Stegun 7.1.26 */
INLINE __m512 normal16(__m512 x) {
    static const float c[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f,
                              0.254829592f};
    const __m512 one = _mm512_set1_ps(1), z = _mm512_abs_ps(x);
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.23164189f), one));
    __m512 p = _mm512_set1_ps(c[0]);
    for (int i = 1; i < 5; i++) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c[i]));
    const __m512 e = exp16(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-0.5f)));
    p = _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(e, _mm512_set1_ps(0.5f))); /* at -|x| */
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(negative, _mm512_sub_ps(one, p), p);
}

/* h (B, inner), or (B, 2 inner) for swiglu, -> (B, inner) at the start of h */
static void activate(const Model *model, float *h) {
    const int64_t inner = model->inner;
    for (int64_t b = 0; b < model->B; b++)
        for (int64_t i = 0; i < inner; i += 16) {
            const float *from = h + b * inner * (model->mlp == SWIGLU ? 2 : 1) + i;
            const __m512 x = _mm512_loadu_ps(from);
            __m512 y;
            if (model->mlp == GELU) {
                y = normal16(x);
            } else if (model->mlp == GELU_TANH) { /* (1 + tanh u) / 2 = sigmoid(2 u) */
                const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f));
                y = sigmoid16(_mm512_mul_ps(_mm512_fmadd_ps(cube, x, x),
                                            _mm512_set1_ps(1.5957691f)));
            } else {
                y = _mm512_mul_ps(sigmoid16(x), _mm512_loadu_ps(from + inner));
            }
            _mm512_storeu_ps(h + b * inner + i, _mm512_mul_ps(x, y));
        }
}

/* q of qkv (B, (H + 2 G) D) over the cache, k and v stored in it first -> y (B, H D) */
static void attention(const Model *model, const Block *block, float *qkv, float *y,
                      const int64_t *positions, int64_t apart, const float *cos, const float *sin) {
    const int64_t H = model->H, G = model->G, D = model->D, S = model->S, half = model->half;
    const int64_t row = S * D * (half ? 2 : 4);
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < model->B * G; pair++) {
        const int64_t b = pair / G, g = pair % G, position = positions[b * apart];
        const int64_t seen = position + 1 < S ? position + 1 : S;
        float *q = qkv + b * (H + 2 * G) * D + g * (H / G) * D;
        float *k = qkv + b * (H + 2 * G) * D + (H + g) * D, *v = k + G * D;
        char *keys = (char *)block->keys + pair * row, *values = (char *)block->values + pair * row;
        if (cos) {
            const float *c = cos + b * apart * D / 2, *s = sin + b * apart * D / 2;
            rotate(q, H / G, D, c, s);
            rotate(k, 1, D, c, s);
        }
        for (int64_t i = 0; i < D; i++) {
            store(keys, position % S * D + i, k[i], half);
            store(values, position % S * D + i, v[i], half);
        }
        for (int64_t h = 0; h < H / G; h++, q += D) {
            float *out = y + (b * H + g * (H / G) + h) * D;
            if (half && D == 64) attend_one(q, keys, values, out, seen, 64, 1);
            else if (half) attend_one(q, keys, values, out, seen, D, 1);
            else if (D == 64) attend_one(q, keys, values, out, seen, 64, 0);
            else attend_one(q, keys, values, out, seen, D, 0);
        }
    }
}

/* One token a row: embedded x (B, C) -> logits (B, V) float32.
 *
 * positions: of each row's token, or of all where apart = 0 (else 1); cos and sin: rope's for
 * them, (B, D / 2) or (1, D / 2), or null.
 */
void decode(const Model *model, const void *x, float *logits, const int64_t *positions,
            int64_t apart, const float *cos, const float *sin) {
    const int64_t B = model->B, C = model->C, half = model->half;
    const int64_t wide = model->blocks->c_attn.N, fc = model->blocks->c_fc.N;
    const int64_t room = B * (wide > fc ? wide : fc);
    float *stream = malloc(4 * (3 * B * C + room));
    float *normed = stream + B * C, *mixed = normed + B * C, *h = mixed + B * C;
    for (int64_t i = 0; i < B * C; i += 16) _mm512_storeu_ps(stream + i, load16(x, i, half));
    for (const Block *block = model->blocks; block < model->blocks + model->L; block++) {
        norm_rows(model, &block->ln_1, stream, normed);
        linear(&block->c_attn, normed, h, B, half, 0, 0);
        attention(model, block, h, mixed, positions, apart, cos, sin);
        linear(&block->c_proj, mixed, stream, B, half, 0, 1);
        norm_rows(model, &block->ln_2, stream, normed);
        linear(&block->c_fc, normed, h, B, half, 0, 0);
        activate(model, h);
        linear(&block->mlp_proj, h, stream, B, half, 0, 1);
    }
    norm_rows(model, &model->ln_f, stream, normed);
    linear(&model->head, normed, logits, B, half, 0, 0);
    free(stream);
}
