/* A token drawn from a row of logits, whose probabilities are nowhere written down. */

#include "kernels.h"

#define BLOCK 1024 /* probabilities added up before they join a running sum */
#define LOG2_E 1.44269504f

/* What 16 tokens weigh: exp(scale (logit - top)) with `bits` = scale in bits; 0 where that is next to nothing. */
AVX512 INLINE __m512 weights(const float *logits, __m512 top, __m512 bits) {
    const __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(logits), top), bits);
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_set1_ps(-126), _CMP_GT_OQ), power_of_two(y));
}

AVX512 INLINE float largest(const float *logits, int64_t v) {
    __m512 top[4];
    for (int i = 0; i < 4; i++) top[i] = _mm512_loadu_ps(logits);
    for (int64_t i = 0; i < v; i += LANES) top[i / LANES % 4] = _mm512_max_ps(_mm512_loadu_ps(logits + i), top[i / LANES % 4]);
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
}

/* The first place of logits [V] whose running sum of exp(scale logit) is above `share` of the whole; V a multiple of
   16. sums: room for ceil(V / 1024). On the thread that calls: a row is too short to be shared out. */
AVX512 EXPORT int64_t cabochon_draw(const float *logits, int64_t v, float scale, double share, double *sums) {
    const __m512 top = _mm512_set1_ps(largest(logits, v)), bits = _mm512_set1_ps(scale * LOG2_E);
    const int64_t blocks = (v + BLOCK - 1) / BLOCK;
    double whole = 0;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t end = (b + 1) * BLOCK < v ? (b + 1) * BLOCK : v;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = b * BLOCK; i < end; i += LANES) sum = _mm512_add_ps(sum, weights(logits + i, top, bits));
        sums[b] = whole += _mm512_reduce_add_ps(sum);
    }
    int64_t block = 0;
    while (block + 1 < blocks && sums[block] <= share * whole) block++;
    double before = block ? sums[block - 1] : 0;
    int64_t drawn = -1;
    for (int64_t i = block * BLOCK; i < v; i += LANES) {
        float each[LANES];
        _mm512_storeu_ps(each, weights(logits + i, top, bits));
        for (int lane = 0; lane < LANES; lane++) {
            if (each[lane] > 0) drawn = i + lane; /* sums differ in their last bits: what weighs something is drawn */
            before += each[lane];
            if (each[lane] > 0 && before > share * whole) return drawn;
        }
    }
    return drawn;
}
