/* Integer matrix products for quantised weights: activations int8, weights int8 or int4, AVX512-VNNI.

   out[m, n] = sum over groups g of  a_scale[m, g] * w_scale[n, g] * sum over k in g of  a[m, k] * (w[n, k] - zero[n, g])

   Sums inside a group are integers, so they are exact in any order, and groups are always added first to last.
   A row of the result therefore has the same bits however many rows are computed together: what a user is
   answered does not depend on who else is in the batch. The plain twin is in quantized.py.

   Weights lie in tiles of 16 output channels. 64 bytes of a tile hold 16 channels times 4 consecutive k (int8,
   stored plus 128), or 16 channels times 8 (int4: the low half of a byte is k, the high half is k + 4). VNNI
   multiplies unsigned by signed bytes: weights are the unsigned side, activations the signed one.

   Letters: M rows, N output channels, K input channels, G = K / group. */

#include <stdlib.h>

#include "kernels.h"

typedef struct {
    const int8_t *a;      /* [M, K] activations */
    const float *a_scale; /* [M, G] */
    const int32_t *a_sum; /* [M, G] sums of a over a group */
    QWeight w;
    Floats out; /* [M, N] */
    int64_t m;
} QMatmul;

/* Four rows times four tiles: 16 integer accumulators and what feeds them fit the 32 registers, one row alone has
   enough sums under way to hide their latency, and a step loads 8 times for 16 products. */
#define ROWS 4
#define TILES 4

AVX512 INLINE __m512 widen_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }

AVX512 INLINE __m512i four_bytes(const int8_t *p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
}

/* The product of `rows` (a constant once inlined) activations with `tiles` tiles, all of K. Meanwhile `lines` cache
   lines for each step are fetched from `ahead`: weights that come next. */
AVX512 INLINE void block(const int rows, const int tiles, const int bits, const QMatmul *p, int64_t row, int64_t tile,
                         const uint8_t *ahead, const int lines) {
    const int64_t K = p->w.k, G = p->w.k / p->w.group, bytes = LANES * K * bits / 8;
    const uint8_t *w[TILES];
    __m512 total[ROWS][TILES];
    for (int t = 0; t < tiles; t++) w[t] = p->w.weight + (tile + t) * bytes;
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tiles; t++) total[r][t] = _mm512_setzero_ps();

    const int8_t *a = p->a + row * K;
    for (int64_t g = 0; g < G; g++, a += p->w.group) {
        __m512i sum[ROWS][TILES];
        for (int t = 0; t < tiles; t++) {
            const int64_t at = ((tile + t) * G + g) * LANES;
            const __m512i zero = bits == 8 ? _mm512_set1_epi32(128)
                                           : _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(p->w.zero + at)));
            for (int r = 0; r < rows; r++)
                sum[r][t] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(-p->a_sum[(row + r) * G + g]));
        }
        if (bits == 8) {
            for (int64_t k = 0; k < p->w.group; k += 4) {
                __m512i weights[TILES];
                for (int t = 0; t < tiles; t++, w[t - 1] += 64) weights[t] = _mm512_loadu_si512(w[t]);
                for (int l = 0; l < lines; l++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
                for (int r = 0; r < rows; r++) {
                    const __m512i quad = four_bytes(a + r * K + k);
                    for (int t = 0; t < tiles; t++) sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], weights[t], quad);
                }
            }
        } else {
            const __m512i low_bits = _mm512_set1_epi8(15);
            for (int64_t k = 0; k < p->w.group; k += 8) {
                __m512i low[TILES], high[TILES];
                for (int l = 0; l < lines; l++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
                for (int t = 0; t < tiles; t++, w[t - 1] += 64) {
                    const __m512i both = _mm512_loadu_si512(w[t]);
                    low[t] = _mm512_and_si512(both, low_bits);
                    high[t] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
                }
                for (int r = 0; r < rows; r++) {
                    const __m512i first = four_bytes(a + r * K + k), second = four_bytes(a + r * K + k + 4);
                    for (int t = 0; t < tiles; t++) {
                        sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], low[t], first);
                        sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], high[t], second);
                    }
                }
            }
        }
        for (int t = 0; t < tiles; t++) {
            const __m512 scale = bits == 8 ? _mm512_set1_ps(1) : widen_half(p->w.half + ((tile + t) * G + g) * LANES);
            for (int r = 0; r < rows; r++) {
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(p->a_scale[(row + r) * G + g]));
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][t]), both, total[r][t]);
            }
        }
    }
    for (int t = 0; t < tiles; t++) {
        const int64_t channel = (tile + t) * LANES;
        const int64_t left = p->w.n - channel;
        const __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
        for (int r = 0; r < rows; r++) {
            __m512 x = total[r][t];
            if (bits == 8) x = _mm512_mul_ps(x, _mm512_loadu_ps(p->w.scale + channel));
            store_some(p->out, (row + r) * p->w.n + channel, x, mask);
        }
    }
}

/* One specialised copy of `block` for each shape: the compiler then keeps every accumulator in a register. */
typedef void Shaped(int rows, const QMatmul *p, int64_t row, int64_t tile, const uint8_t *ahead);
#define SHAPES(NAME, WIDTH, BITS, LINES)                                                            \
    AVX512 static void NAME(int rows, const QMatmul *p, int64_t row, int64_t tile, const uint8_t *ahead) { \
        switch (rows) {                                                                             \
            case 1: return block(1, WIDTH, BITS, p, row, tile, ahead, LINES);                       \
            case 2: return block(2, WIDTH, BITS, p, row, tile, ahead, LINES);                       \
            case 3: return block(3, WIDTH, BITS, p, row, tile, ahead, LINES);                       \
            default: return block(4, WIDTH, BITS, p, row, tile, ahead, LINES);                      \
        }                                                                                           \
    }
SHAPES(block8, TILES, 8, 0)
SHAPES(block4, TILES, 4, 0)
SHAPES(fetch8, TILES, 8, 1)
SHAPES(fetch4, TILES, 4, 1)
SHAPES(tile8, 1, 8, 0)
SHAPES(tile4, 1, 4, 0)

/* Each thread takes a run of tiles and all rows: a group of tiles stays in its cache while the rows go by. The first
   pass over a group waits for memory and the others do not: they fetch the next group, a tile in each pass. */
AVX512 static void qmatmul(const QMatmul *p) {
    const int64_t count = (p->w.n + LANES - 1) / LANES, groups = (count + TILES - 1) / TILES;
    const int64_t bytes = LANES * p->w.k * p->w.bits / 8;
    const int eight = p->w.bits == 8;
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        const int64_t first = group * TILES, end = count - first < TILES ? count : first + TILES;
        const uint8_t *ahead = p->w.weight + end * bytes;
        for (int64_t row = 0, pass = 0; row < p->m; row += ROWS, pass++, ahead += bytes) {
            const int rows = p->m - row < ROWS ? (int)(p->m - row) : ROWS;
            const int fetch = p->m > ROWS && pass < TILES;
            Shaped *whole = eight ? (fetch ? fetch8 : block8) : (fetch ? fetch4 : block4);
            if (end - first == TILES)
                whole(rows, p, row, first, ahead);
            else
                for (int64_t tile = first; tile < end; tile++) (eight ? tile8 : tile4)(rows, p, row, tile, ahead);
        }
    }
}

/* x [M, K] to int8 with one scale per row and group; also the sums that zero points need. */
AVX512 static void quantize_rows(Floats x, int64_t m, int64_t k, int64_t group, int8_t *a, float *scale, int32_t *sum) {
#pragma omp parallel for schedule(static) if (m * k > 65536)
    for (int64_t i = 0; i < m * (k / group); i++) {
        const float top = magnitude(x, i * group, group);
        const __m512 factor = _mm512_set1_ps(to_int8(top));
        __m512i total = _mm512_setzero_si512();
        for (int64_t j = 0; j < group; j += LANES) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(x, i * group + j), factor));
            total = _mm512_add_epi32(total, q);
            _mm_storeu_si128((void *)(a + i * group + j), _mm512_cvtsepi32_epi8(q));
        }
        scale[i] = top / 127.0f;
        sum[i] = _mm512_reduce_add_epi32(total);
    }
}

#define AMX_ROWS 13 /* from here on, where there is one, the matrix unit is faster; the bits are the same */

/* out[i] [M, N_i] = x [M, K] times each of `count` transposed matrices of one K, group and width in bits. The activations
   are quantised on the way, once. Returns 0, or 1 when there is no memory. */
EXPORT int cabochon_qlinear(const QWeight *const *w, int64_t count, Floats x, int64_t m, const Floats *out) {
    if (m >= AMX_ROWS && amx_fits(w[0]) && amx_usable()) return amx_matmul(w, count, x, m, out);
    const int64_t k = w[0]->k, groups = m * (k / w[0]->group);
    int8_t *scratch = malloc(m * k + groups * 8);
    if (!scratch) return 1;
    float *scale = (float *)(scratch + m * k); /* aligned: k is a multiple of the group, which is one of 16 */
    int32_t *sum = (int32_t *)(scale + groups);
    quantize_rows(x, m, k, w[0]->group, scratch, scale, sum);
    for (int64_t i = 0; i < count; i++) {
        const QMatmul product = {scratch, scale, sum, *w[i], out[i], m};
        qmatmul(&product);
    }
    free(scratch);
    return 0;
}

/* 16 channels of 16 consecutive k: each of the four rows holds 4 of them for all channels, and gets, in its 128-bit
   part l, all 16 of channel 4 l + row. */
AVX512 INLINE void by_channel(__m512i row[4]) {
    const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i c = _mm512_unpacklo_epi32(row[2], row[3]), d = _mm512_unpackhi_epi32(row[2], row[3]);
    row[0] = _mm512_unpacklo_epi64(a, c);
    row[1] = _mm512_unpackhi_epi64(a, c);
    row[2] = _mm512_unpacklo_epi64(b, d);
    row[3] = _mm512_unpackhi_epi64(b, d);
}

/* 16 columns of one tile, from k on, as floats; `out` begins with channel `first`. The last columns may be padding. */
AVX512 INLINE void floats_of_tile(const QWeight *w, Floats out, int64_t columns, int64_t first, int64_t end, int64_t tile,
                                  int64_t k, __m512i row[4]) {
    const int64_t at = (tile * (w->k / w->group) + k / w->group) * LANES;
    float scale[LANES], zero[LANES], values[LANES];
    for (int c = 0; c < LANES; c++) zero[c] = w->bits == 8 ? 128 : w->zero[at + c];
    _mm512_storeu_ps(scale, w->bits == 8 ? _mm512_loadu_ps(w->scale + tile * LANES) : widen_half(w->half + at));
    by_channel(row);
    for (int j = 0; j < 4; j++) {
        __m128i part[4];
        _mm512_storeu_si512(part, row[j]);
        for (int l = 0; l < 4; l++) {
            const int64_t c = 4 * l + j, channel = tile * LANES + c, to = (channel - first) * columns + k;
            if (channel >= end) continue;
            const __m512 q = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part[l])), _mm512_set1_ps(zero[c]));
            const __m512 x = _mm512_mul_ps(q, _mm512_set1_ps(scale[c]));
            if (k + LANES <= columns) {
                store(out, to, x);
                continue;
            }
            _mm512_storeu_ps(values, x);
            for (int64_t i = 0; i < columns - k; i++) {
                if (out.is_bf16)
                    ((uint16_t *)out.data)[to + i] = round_bf16(values[i]);
                else
                    ((float *)out.data)[to + i] = values[i];
            }
        }
    }
}

/* out [end - first, columns] = channels of the matrix as floats, `first` being one of 16; `columns` of K are no padding. */
AVX512 EXPORT void cabochon_dequantize(const QWeight *w, Floats out, int64_t columns, int64_t first, int64_t end) {
    const __m512i low_bits = _mm512_set1_epi8(15);
#pragma omp parallel for schedule(static)
    for (int64_t tile = first / LANES; tile < (end + LANES - 1) / LANES; tile++) {
        const uint8_t *from = w->weight + tile * LANES * w->k * w->bits / 8;
        for (int64_t k = 0; k < columns; k += LANES) {
            __m512i row[4];
            for (int j = 0; j < 4; j++) {
                const __m512i values = _mm512_loadu_si512(from + 64 * (w->bits == 8 ? j : j / 2));
                row[j] = w->bits == 8 ? values : _mm512_and_si512(j % 2 ? _mm512_srli_epi16(values, 4) : values, low_bits);
            }
            from += 64 * w->bits / 2;
            floats_of_tile(w, out, columns, first, end, tile, k, row);
        }
    }
}
