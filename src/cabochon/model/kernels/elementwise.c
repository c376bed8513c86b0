/* The small steps between matrix products, each in one call instead of eight: at one token a step, the calls
   themselves are what costs. Plain twins: RMSNorm, rotate and GeGLU in gemma2.py. */

#include <math.h>

#include "kernels.h"

/* out = x / sqrt(mean(x^2) + eps) * (1 + weight), rows of D (a multiple of 16), in float32 up to the last store. */
AVX512 EXPORT void cabochon_rms_norm(Floats x, Floats weight, Floats out, int64_t rows, int64_t d, float eps) {
#pragma omp parallel for schedule(static) if (rows * d > 65536)
    for (int64_t row = 0; row < rows; row++) {
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < d; i += LANES) {
            const __m512 value = load(x, row * d + i);
            sum[i / LANES % 2] = _mm512_fmadd_ps(value, value, sum[i / LANES % 2]);
        }
        const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / (float)d;
        const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean + eps)), one = _mm512_set1_ps(1.0f);
        for (int64_t i = 0; i < d; i += LANES)
            store(out, row * d + i,
                  _mm512_mul_ps(_mm512_mul_ps(load(x, row * d + i), factor), _mm512_add_ps(one, load(weight, i))));
    }
}

/* The pairs (i, i + H/2) of x [rows, heads, H] turned by cos, sin float32 [rows, H/2]; H a multiple of 32. out may be
   x. */
AVX512 EXPORT void cabochon_rotate(Floats x, Floats out, const float *cosine, const float *sine, int64_t rows, int64_t heads,
                                   int64_t size) {
    const int64_t half = size / 2;
#pragma omp parallel for schedule(static) if (rows * heads * size > 65536)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t first = (row * heads + head) * size + i;
                const __m512 c = _mm512_loadu_ps(cosine + row * half + i), s = _mm512_loadu_ps(sine + row * half + i);
                const __m512 a = load(x, first), b = load(x, first + half);
                store(out, first, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
                store(out, first + half, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
            }
}

/* out = gelu(gate) * up, the tanh form of GELU, which is x * sigmoid(2 u); n a multiple of 16. */
AVX512 EXPORT void cabochon_gelu_times(Floats gate, Floats up, Floats out, int64_t n) {
#pragma omp parallel for schedule(static) if (n > 65536)
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512 x = load(gate, i), cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        const __m512 u = _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x), _mm512_set1_ps(-1.59576912f));
        const __m512 share = _mm512_add_ps(_mm512_set1_ps(1), exponential(u)); /* 1 / sigmoid(2 u) */
        store(out, i, _mm512_mul_ps(_mm512_div_ps(x, share), load(up, i)));
    }
}
