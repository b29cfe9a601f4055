/* 4-bit products of a few rows by themselves; called by linear_cpu.py. */
#include "linear_cpu.h"

/* y (M, N) = f(x (M, K)), both bfloat16 if half, else float32 */
void int4_rows(const void *x, void *y, const Linear *f, int64_t M, int64_t half) {
    float *wide = malloc(4 * M * f->K);
    for (int64_t i = 0; i < M * f->K; i += 16) _mm512_storeu_ps(wide + i, load16(x, i, half));
    linear(f, wide, y, M, half, half, 0);
    free(wide);
}
