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

/* An array of float32 or bfloat16. */
typedef struct {
    void *data;
    int64_t is_bf16;
} Floats;

/* amx.c: the products of qmatmul.c for many rows, where the processor has AMX. Returns 1 when there is no memory. */
int amx_usable(void);
int amx_fits(const QWeight *w);
int amx_matmul(const QWeight *const *w, int64_t count, Floats x, int64_t m, const Floats *out);

AVX512 INLINE __m512 load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

AVX512 INLINE __m512 load(Floats x, int64_t i) {
    return x.is_bf16 ? load_bf16((const uint16_t *)x.data + i) : _mm512_loadu_ps((const float *)x.data + i);
}

/* Some lanes, zeros for the others. */
AVX512 INLINE __m512 load_some(Floats x, int64_t i, __mmask16 lanes) {
    if (!x.is_bf16) return _mm512_maskz_loadu_ps(lanes, (const float *)x.data + i);
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)x.data + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Round to nearest, ties to even, as torch does. Not for NaN, which no sound model produces. */
AVX512 INLINE __m256i to_bf16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

AVX512 INLINE void store(Floats x, int64_t i, __m512 value) {
    if (!x.is_bf16)
        _mm512_storeu_ps((float *)x.data + i, value);
    else
        _mm256_storeu_si256((void *)((uint16_t *)x.data + i), to_bf16(value));
}

AVX512 INLINE void store_some(Floats x, int64_t i, __m512 value, __mmask16 mask) {
    if (x.is_bf16)
        _mm256_mask_storeu_epi16((uint16_t *)x.data + i, mask, to_bf16(value));
    else
        _mm512_mask_storeu_ps((float *)x.data + i, mask, value);
}

/* The same for one number. */
INLINE uint16_t round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The largest magnitude of `count` numbers from i on; `count` is a multiple of 16. */
AVX512 INLINE float magnitude(Floats x, int64_t i, int64_t count) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += LANES) largest = _mm512_max_ps(largest, _mm512_abs_ps(load(x, i + j)));
    return _mm512_reduce_max_ps(largest);
}

/* What a group of activations is multiplied with to become int8. */
INLINE float to_int8(float magnitude) { return magnitude > 0 ? 127.0f / magnitude : 0.0f; }

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

/* 2^y, to 2e-7: a polynomial (minimax, relative) on the part of y above its floor. NaN stays NaN. */
AVX512 INLINE __m512 power_of_two(__m512 y) {
    y = _mm512_max_ps(_mm512_set1_ps(-126), y);
    const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF);
    const float terms[] = {8.98933969e-3f, 5.58263175e-2f, 0.240153611f, 0.693153083f, 0.99999994f};
    __m512 p = _mm512_set1_ps(1.87757669e-3f);
    for (int i = 0; i < 5; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(p, y);
}

/* 1 / x to float32: the processor's estimate and one step of Newton's method. */
AVX512 INLINE __m512 reciprocal(__m512 x) {
    const __m512 y = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2)));
}

#endif
