/* Long vectors of float32 or bfloat16, each read once. On the thread that calls: callers have threads of their own. */

#include <math.h>

#include "kernels.h"

#define MOST 4 /* vectors at once: as many as leave registers for their sums */
#define PAIRS (MOST * (MOST + 1) / 2)

/* The products of `count` vectors (a constant once inlined) with each other. */
AVX512 INLINE void pairs(const int count, const Floats *x, int64_t n, double *out) {
    __m512d sum[PAIRS][2];
    for (int i = 0; i < PAIRS; i++) sum[i][0] = sum[i][1] = _mm512_setzero_pd();
    for (int64_t i = 0; i < n; i += LANES) {
        const __mmask16 lanes = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        __m512d half[MOST][2];
        for (int v = 0; v < count; v++) {
            const __m512 values = n - i < LANES ? load_some(x[v], i, lanes) : load(x[v], i);
            half[v][0] = _mm512_cvtps_pd(_mm512_castps512_ps256(values));
            half[v][1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1));
        }
        for (int v = 0, pair = 0; v < count; v++)
            for (int u = 0; u <= v; u++, pair++)
                for (int h = 0; h < 2; h++) sum[pair][h] = _mm512_fmadd_pd(half[v][h], half[u][h], sum[pair][h]);
    }
    for (int i = 0; i < count * (count + 1) / 2; i++) out[i] = _mm512_reduce_add_pd(_mm512_add_pd(sum[i][0], sum[i][1]));
}

/* out: the lower triangle, row by row, of the inner products of up to MOST vectors of n numbers, in float64. */
AVX512 EXPORT void cabochon_inner_products(const Floats *x, int64_t count, int64_t n, double *out) {
    switch (count) {
        case 1: pairs(1, x, n, out); break;
        case 2: pairs(2, x, n, out); break;
        case 3: pairs(3, x, n, out); break;
        default: pairs(4, x, n, out);
    }
}

/* out [n] = sum over the vectors, first to last, of factor times vector; gives whether its sum is a number: 1 or 0. */
AVX512 EXPORT int cabochon_weighted_sum(const Floats *x, const float *factor, int64_t count, int64_t n, Floats out) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
        const __mmask16 lanes = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        __m512 total = _mm512_mul_ps(load_some(x[0], i, lanes), _mm512_set1_ps(factor[0]));
        for (int64_t v = 1; v < count; v++)
            total = _mm512_fmadd_ps(load_some(x[v], i, lanes), _mm512_set1_ps(factor[v]), total);
        sum = _mm512_add_ps(sum, total);
        store_some(out, i, total, lanes);
    }
    return isfinite(_mm512_reduce_add_ps(sum)) ? 1 : 0;
}

/* *out = the sum of magnitudes, in float64. */
AVX512 EXPORT void cabochon_magnitudes(Floats x, int64_t n, double *out) {
    __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int64_t i = 0; i < n; i += LANES) {
        const __mmask16 lanes = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        const __m512 size = _mm512_abs_ps(load_some(x, i, lanes));
        sum[0] = _mm512_add_pd(sum[0], _mm512_cvtps_pd(_mm512_castps512_ps256(size)));
        sum[1] = _mm512_add_pd(sum[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(size, 1)));
    }
    *out = _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1]));
}

/* out [n] = x where its random bits lie below a limit, else 0 times x, which tells what is not finite. */
AVX512 EXPORT void cabochon_keep(const float *x, const int16_t *bits, int64_t below, int64_t n, float *out) {
    const __m512i limit = _mm512_set1_epi32((int32_t)below);
    for (int64_t i = 0; i < n; i += LANES) {
        const __mmask16 lanes = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        const __m512 values = _mm512_maskz_loadu_ps(lanes, x + i);
        const __m512i drawn = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(lanes, bits + i));
        const __mmask16 dropped = _mm512_cmp_epi32_mask(drawn, limit, _MM_CMPINT_NLT);
        _mm512_mask_storeu_ps(out + i, lanes, _mm512_mask_mul_ps(values, dropped, values, _mm512_setzero_ps()));
    }
}
