/* What the kernels share. Every function is compiled for its instruction set by attribute, so that one library
   runs anywhere; cabochon_supports says what this processor has, and Python asks it first. */

#ifndef CABOCHON_KERNELS_H
#define CABOCHON_KERNELS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* float32 numbers in a register, and output channels in a tile */
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))

/* A quantised matrix [N, K] in tiles of 16 channels, described in qmatmul.c. G = K / group. */
typedef struct {
    const uint8_t *weight; /* [N / 16, 16 * K * bits / 8], N rounded up to a whole tile */
    const float *scale;    /* int8: [N / 16, 16] */
    const uint16_t *half;  /* int4: float16 scales [N / 16, G, 16] */
    const uint8_t *zero;   /* int4: [N / 16, G, 16] */
    int64_t n, k, group, bits;
} QWeight;

typedef struct {
    const int8_t *a;      /* [M, K] activations */
    const float *a_scale; /* [M, G] */
    const int32_t *a_sum; /* [M, G] sums of a over a group */
    QWeight w;
    float *out; /* [M, N] */
    int64_t m;
} QMatmul;

/* An array of float32 or bfloat16. */
typedef struct {
    void *data;
    int64_t is_bf16;
} Floats;

AVX512 INLINE __m512 load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

AVX512 INLINE __m512 load(Floats x, int64_t i) {
    return x.is_bf16 ? load_bf16((const uint16_t *)x.data + i) : _mm512_loadu_ps((const float *)x.data + i);
}

/* Round to nearest, ties to even, as torch does. Not for NaN, which no sound model produces. */
AVX512 INLINE void store(Floats x, int64_t i, __m512 value) {
    if (!x.is_bf16) {
        _mm512_storeu_ps((float *)x.data + i, value);
        return;
    }
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((void *)((uint16_t *)x.data + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

/* The same for one number. */
INLINE uint16_t round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

AVX512 INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x); /* ln 2 in two parts: exact for any n here */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 7; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(p, n);
}

#endif
