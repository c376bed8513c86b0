/* Products of few rows with bfloat16 weights [N, K] as they lie in a model file: bound by reading the weights.

   Products and sums are float32, each row's in the same order however many rows there are. The plain twin is
   torch's linear, which also takes over beyond a few rows. */

#include "kernels.h"

#define CHANNELS 4 /* output channels at a time: their sums hide each other's latency */
#define ROWS 4

AVX512 INLINE void dots(const int rows, Floats x, const uint16_t *w, Floats out, int64_t row, int64_t channel, int64_t n,
                        int64_t k) {
    __m512 sum[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sum[r][c] = _mm512_setzero_ps();
    const int64_t whole = k / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        __m512 a[ROWS];
        for (int r = 0; r < rows; r++) a[r] = load(x, (row + r) * k + i);
        for (int c = 0; c < CHANNELS; c++) {
            _mm_prefetch(w + (channel + c + CHANNELS) * k + i, _MM_HINT_T1);
            const __m512 b = load_bf16(w + (channel + c) * k + i);
            for (int r = 0; r < rows; r++) sum[r][c] = _mm512_fmadd_ps(a[r], b, sum[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) {
            const float total = _mm512_reduce_add_ps(sum[r][c]);
            const int64_t to = (row + r) * n + channel + c;
            if (out.is_bf16)
                ((uint16_t *)out.data)[to] = round_bf16(total);
            else
                ((float *)out.data)[to] = total;
        }
}

/* out [M, N] = x [M, K] w^T; N a multiple of 4, K of 16. */
AVX512 EXPORT void cabochon_bf16_linear(Floats x, const uint16_t *w, Floats out, int64_t m, int64_t n, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t channel = 0; channel < n; channel += CHANNELS)
        for (int64_t row = 0; row < m; row += ROWS) switch (m - row) {
                case 1: dots(1, x, w, out, row, channel, n, k); break;
                case 2: dots(2, x, w, out, row, channel, n, k); break;
                case 3: dots(3, x, w, out, row, channel, n, k); break;
                default: dots(4, x, w, out, row, channel, n, k);
            }
}

EXPORT int cabochon_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}
