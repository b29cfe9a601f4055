/* Steps of rounding float32 weights to 4 bits: what int4_rounding.py does to one group of inputs.
 *
 * Built and called by cpu_rounding.py. Arrays are (group, n): an input's weights in all n rows
 * together, n a multiple of LANES; so many rows go through the steps side by side, in registers.
 * Codes are floats from -8 to 7.
 */
#include <float.h>
#include <omp.h>
#include <stdint.h>

#define LANES 16
#define MOST 128 /* inputs in a group */
#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * LANES)));

typedef struct {
    int64_t group, n; /* inputs; rows */
    int32_t threads;
} Sizes;

INLINE V pick(I mask, V a, V b) { return (V)((mask & (I)a) | (~mask & (I)b)); }
INLINE V least(V a, V b) { return pick(a < b, a, b); }
INLINE V most(V a, V b) { return pick(a > b, a, b); }
INLINE V fill(float x) { return x - (V){0}; }

INLINE V bfloat16(V x) { /* to nearest, ties to even */
    const I bits = (I)x;
    return (V)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
}

INLINE V storable(V scale) { return bfloat16(most(scale, fill(1e-8f))); }

INLINE V nearest(V x) { /* the code: to nearest, ties to even, by making the last bit worth 1 */
    x = most(least(x, fill(7)), fill(-8));
    return (x + 0x1.8p23f) - 0x1.8p23f;
}

INLINE V *at(float *x, int64_t j, int64_t i, int64_t n) { return (V *)(x + j * n + i); }

/* The scale and zero (n) of weights x: clipping ranges `shrink` of the full one, each refitted to
 * its codes by least squares; h (group), of sum 1: how much an input's squared error counts. */
void fit(Sizes *size, float *x, const float *h, const float *shrink, int64_t shrinks,
         int64_t refits, float *scale, float *zero) {
    const int64_t group = size->group, n = size->n;
#pragma omp parallel for num_threads(size->threads)
    for (int64_t i = 0; i < n; i += LANES) {
        V w[MOST], c[MOST], low = fill(FLT_MAX), high = fill(-FLT_MAX), mean = fill(0);
        V best = fill(FLT_MAX), best_s = fill(0), best_z = fill(0);
        for (int64_t j = 0; j < group; j++) {
            w[j] = *at(x, j, i, n);
            low = least(low, w[j]), high = most(high, w[j]);
            mean += h[j] * w[j];
        }
        for (int64_t k = 0; k < shrinks; k++) {
            const V step = (high - low) * (shrink[k] / 15);
            V s = storable(step), z = bfloat16((low + high) * (shrink[k] / 2) + step / 2);
            for (int64_t round = 0;; round++) {
                V mean_c = fill(0), cc = fill(0), cx = fill(0), error = fill(0);
                for (int64_t j = 0; j < group; j++) {
                    c[j] = nearest((w[j] - z) / s);
                    mean_c += h[j] * c[j];
                    const V off = c[j] * s + z - w[j];
                    error += h[j] * off * off;
                }
                if (round == refits) {
                    const I better = error < best;
                    best = pick(better, error, best);
                    best_s = pick(better, s, best_s), best_z = pick(better, z, best_z);
                    break;
                }
                for (int64_t j = 0; j < group; j++) {
                    const V centred = h[j] * (c[j] - mean_c);
                    cx += centred * w[j], cc += centred * c[j];
                }
                const V slope = cx / cc;
                const V kept = pick(slope > 0, slope, s); /* not where all codes are equal */
                s = storable(kept), z = bfloat16(mean - kept * mean_c);
            }
        }
        *at(scale, 0, i, n) = best_s, *at(zero, 0, i, n) = best_z;
    }
}

/* GPTQ's step: weights x -> codes, and errors over the diagonal of spread (group, group). */
void compensate(Sizes *size, float *x, const float *spread, float *scale, float *zero,
                float *codes, float *errors) {
    const int64_t group = size->group, n = size->n;
#pragma omp parallel for num_threads(size->threads)
    for (int64_t i = 0; i < n; i += LANES) {
        V w[MOST];
        const V s = *at(scale, 0, i, n), z = *at(zero, 0, i, n);
        for (int64_t j = 0; j < group; j++) w[j] = *at(x, j, i, n);
        for (int64_t j = 0; j < group; j++) {
            const float *row = spread + j * group;
            const V c = nearest((w[j] - z) / s), error = (w[j] - (c * s + z)) / row[j];
            for (int64_t k = j + 1; k < group; k++) w[k] -= row[k] * error;
            *at(codes, j, i, n) = c, *at(errors, j, i, n) = error;
        }
    }
}

/* Coordinate descent: scale and zero, then code after code, in place; lost (group, n): what
 * rounding takes from the weights. own (group, group): the inputs' second moments;
 * pull (group, n): half of the slope of the error by each rounded weight, downwards. */
void descend(Sizes *size, const float *own, float *pull, float *lost, float *codes, float *scale,
             float *zero) {
    const int64_t group = size->group, n = size->n;
    float one = 0, sums[MOST] = {0};
    for (int64_t j = 0; j < group; j++)
        for (int64_t k = 0; k < group; k++) {
            sums[j] += own[j * group + k];
            one += own[j * group + k];
        }
#pragma omp parallel for num_threads(size->threads)
    for (int64_t i = 0; i < n; i += LANES) {
        V c[MOST], here[MOST], moved[MOST], pulled[MOST];
        V s = *at(scale, 0, i, n), z = *at(zero, 0, i, n);
        V cc = fill(0), c1 = fill(0), rc = fill(0), r1 = fill(0), gain = fill(0);
        for (int64_t j = 0; j < group; j++) {
            c[j] = *at(codes, j, i, n), here[j] = *at(pull, j, i, n);
            c1 += sums[j] * c[j], rc += c[j] * here[j], r1 += here[j];
        }
        for (int64_t j = 0; j < group; j++) {
            V sum = fill(0);
            for (int64_t k = 0; k < group; k++) sum += own[j * group + k] * c[k];
            pulled[j] = sum, cc += c[j] * sum;
        }
        const V determinant = cc * one - c1 * c1; /* the normal equations of both changes */
        const V new_s = storable(s + (one * rc - c1 * r1) / determinant);
        const V new_z = bfloat16(z + (cc * r1 - c1 * rc) / determinant);
        for (int64_t j = 0; j < group; j++) {
            moved[j] = c[j] * (new_s - s) + (new_z - z);
            pulled[j] = pulled[j] * (new_s - s) + sums[j] * (new_z - z);
            gain += moved[j] * (pulled[j] - 2 * here[j]);
        }
        const I better = gain < 0; /* never where determinant is 0 */
        for (int64_t j = 0; j < group; j++) {
            moved[j] = pick(better, moved[j], fill(0));
            here[j] -= pick(better, pulled[j], fill(0));
        }
        s = pick(better, new_s, s), z = pick(better, new_z, z);
        for (int64_t j = 0; j < group; j++) {
            const float *row = own + j * group;
            const V now = c[j] * s + z;
            const V code = nearest((now + here[j] / row[j] - z) / s), change = code * s + z - now;
            for (int64_t k = j + 1; k < group; k++) here[k] -= row[k] * change;
            *at(codes, j, i, n) = code;
            *at(lost, j, i, n) -= moved[j] + change;
        }
        *at(scale, 0, i, n) = s, *at(zero, 0, i, n) = z;
    }
}
