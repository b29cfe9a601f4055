/* A decoding step on the CPU in one call; called by step_cpu.py.
 *
 * Weights and caches are bfloat16 (`half`) or float32, weights 4-bit codes too; whatever is computed
 * is float32. B rows, C width, H heads over G key heads of D numbers, S slots of the cache.
 */
#include "linear_cpu.h"

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
    Norm q_norm, k_norm; /* of each head, over D numbers; weights may be null */
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

/* y (n, C) = norm(x), which may be x */
static void norm_rows(const Model *model, const Norm *norm, const float *x, float *y, int64_t n,
                      int64_t C) {
    for (; n > 0; n--, x += C, y += C) {
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
        if (block->q_norm.weight) {
            norm_rows(model, &block->q_norm, q, q, H / G, D);
            norm_rows(model, &block->k_norm, k, k, 1, D);
        }
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
    const int64_t B = model->B, C = model->C, HD = model->H * model->D, half = model->half;
    const int64_t wide = model->blocks->c_attn.N, fc = model->blocks->c_fc.N;
    const int64_t room = B * (wide > fc ? wide : fc);
    float *stream = malloc(4 * (B * (2 * C + HD) + room));
    float *normed = stream + B * C, *mixed = normed + B * C, *h = mixed + B * HD;
    for (int64_t i = 0; i < B * C; i += 16) _mm512_storeu_ps(stream + i, load16(x, i, half));
    for (const Block *block = model->blocks; block < model->blocks + model->L; block++) {
        norm_rows(model, &block->ln_1, stream, normed, B, C);
        linear(&block->c_attn, normed, h, B, half, 0, 0);
        attention(model, block, h, mixed, positions, apart, cos, sin);
        linear(&block->c_proj, mixed, stream, B, half, 0, 1);
        norm_rows(model, &block->ln_2, stream, normed, B, C);
        linear(&block->c_fc, normed, h, B, half, 0, 0);
        activate(model, h);
        linear(&block->mlp_proj, h, stream, B, half, 0, 1);
    }
    norm_rows(model, &model->ln_f, stream, normed, B, C);
    linear(&model->head, normed, logits, B, half, 0, 0);
    free(stream);
}
