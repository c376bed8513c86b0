/* bfloat16 weights [N, K] in 12 bits each, without loss: products of few rows, packing and unpacking.

   The high byte of a bfloat16, its sign and most of its exponent, takes few values in a matrix of weights. The 15 most
   frequent ones and 0 make a table, and four bits choose from it; the low byte stays as it is. A weight whose high
   byte is not in the table is an exception: it is packed as 0, and its column and value stand in a list of its row.

   A row is blocks of 128 weights, K padded with zeros: 128 low bytes, then 64 bytes with the choice of weight j of the
   first half in their lower four bits and of the second half in their upper four. Within a half, bytes lie as the
   instruction that interleaves low and high bytes takes them.

   Products are sums of pairs in float32 (AVX512-BF16), each row's in the same order however many rows there are; the
   plain twin unpacks and multiplies. */

#include "kernels.h"

#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,popcnt")))
#define BLOCK 128
#define BYTES 192 /* of a packed block */
#define CHANNELS 32 /* output channels at a time: what they take stays in the second-level cache for more rows */
#define ROWS 4

typedef struct {
    const uint8_t *weight;  /* [N, K / 128, 192] */
    const uint8_t *table;   /* [16] high bytes; the first is 0 */
    const int32_t *start;   /* [N + 1] where the exceptions of a row begin */
    const int32_t *column;  /* [exceptions] */
    const uint16_t *value;  /* [exceptions] */
    int64_t n, k;           /* K padded */
} Lossless;

INLINE float widen(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

/* The four registers of bfloat16 that a block stands for, in order. */
BF16 INLINE void expand(const uint8_t *p, __m512i table, __m512i out[4]) {
    const __m512i four = _mm512_set1_epi8(15), choices = _mm512_loadu_si512(p + BLOCK);
    for (int half = 0; half < 2; half++) {
        const __m512i low = _mm512_loadu_si512(p + 64 * half);
        const __m512i chosen = _mm512_and_si512(half ? _mm512_srli_epi16(choices, 4) : choices, four);
        const __m512i high = _mm512_shuffle_epi8(table, chosen);
        out[2 * half] = _mm512_unpacklo_epi8(low, high);
        out[2 * half + 1] = _mm512_unpackhi_epi8(low, high);
    }
}

BF16 INLINE __m512i load_table(const uint8_t *table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
}

/* Products of `rows` rows (a constant once inlined) with one output channel, without its exceptions: `out` [rows]. */
BF16 INLINE void dots(const int rows, const Lossless *w, const uint16_t *x, __m512i table, int64_t n, float *out,
                      int64_t next) {
    const int64_t blocks = w->k / BLOCK;
    const uint8_t *p = w->weight + n * blocks * BYTES;
    __m512 sum[ROWS][4];
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[r][i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++, p += BYTES) {
        __m512i weights[4];
        expand(p, table, weights);
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512i a = _mm512_loadu_si512(x + r * w->k + b * BLOCK + i * 32);
                sum[r][i] = _mm512_dpbf16_ps(sum[r][i], (__m512bh)a, (__m512bh)weights[i]);
            }
    }
    for (int r = 0; r < rows; r++)
        out[r * next] = _mm512_reduce_add_ps(
            _mm512_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]), _mm512_add_ps(sum[r][2], sum[r][3])));
}

/* Some rows with `count` channels from `first` on. Channels are read one after the other, as they lie in memory, which
   is how a core reads fastest; the exceptions come afterwards, since a branch that is guessed wrong stops the reading. */
BF16 static void some_channels(const Lossless *w, const uint16_t *x, Floats out, int64_t row, int64_t rows,
                               int64_t first, int64_t count) {
    float sums[ROWS][CHANNELS];
    const __m512i table = load_table(w->table);
    x += row * w->k;
    for (int64_t c = 0; c < count; c++) switch (rows) {
            case 1: dots(1, w, x, table, first + c, &sums[0][c], CHANNELS); break;
            case 2: dots(2, w, x, table, first + c, &sums[0][c], CHANNELS); break;
            case 3: dots(3, w, x, table, first + c, &sums[0][c], CHANNELS); break;
            default: dots(4, w, x, table, first + c, &sums[0][c], CHANNELS);
        }
    for (int64_t r = 0; r < rows && r < ROWS; r++)
        for (int64_t c = 0, e = w->start[first]; c < count; c++) {
            for (; e < w->start[first + c + 1]; e++) sums[r][c] += widen(x[r * w->k + w->column[e]]) * widen(w->value[e]);
            const int64_t to = (row + r) * w->n + first + c;
            if (out.is_bf16)
                ((uint16_t *)out.data)[to] = round_bf16(sums[r][c]);
            else
                ((float *)out.data)[to] = sums[r][c];
        }
}

/* out [M, N] = x [M, K] w^T, x bfloat16. */
EXPORT void cabochon_lossless_linear(const Lossless *w, const uint16_t *x, Floats out, int64_t m) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < w->n; first += CHANNELS)
        for (int64_t row = 0; row < m; row += ROWS)
            some_channels(w, x, out, row, m - row, first, w->n - first < CHANNELS ? w->n - first : CHANNELS);
}

BF16 static void unpack_row(const Lossless *w, int64_t row, uint16_t *out) {
    const __m512i table = load_table(w->table);
    for (int64_t b = 0; b < w->k / BLOCK; b++) {
        __m512i weights[4];
        expand(w->weight + (row * (w->k / BLOCK) + b) * BYTES, table, weights);
        for (int i = 0; i < 4; i++) _mm512_storeu_si512(out + b * BLOCK + i * 32, weights[i]);
    }
    for (int32_t e = w->start[row]; e < w->start[row + 1]; e++) out[w->column[e]] = w->value[e];
}

/* out [count, K]: the rows of these numbers. */
EXPORT void cabochon_lossless_unpack(const Lossless *w, const int64_t *rows, int64_t count, uint16_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) unpack_row(w, rows[i], out + i * w->k);
}

/* Pack 64 weights; gives which of them the table lacks. The instruction that packs words undoes the interleaving. */
BF16 INLINE __mmask64 pack_half(const uint16_t *from, const uint8_t *table, uint8_t *low, __m512i *choices) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32), byte = _mm512_set1_epi16(255);
    const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    __mmask64 found = 0;
    *choices = _mm512_setzero_si512();
    for (int c = 15; c >= 0; c--) { /* the first place of a byte that stands twice is the last to be written */
        const __mmask64 equal = _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8((char)table[c]));
        *choices = _mm512_mask_mov_epi8(*choices, equal, _mm512_set1_epi8((char)c));
        found |= equal;
    }
    const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
    _mm512_storeu_si512(low, _mm512_maskz_mov_epi8(found, lows));
    return ~found;
}

/* Pack rows [n, K]; `count` [n] exceptions. */
BF16 static void pack_row(const uint16_t *from, const uint8_t *table, uint8_t *to, int32_t *count, int64_t k) {
    *count = 0;
    for (int64_t b = 0; b < k / BLOCK; b++, from += BLOCK, to += BYTES) {
        __m512i choices[2];
        for (int half = 0; half < 2; half++)
            *count += (int32_t)_mm_popcnt_u64(pack_half(from + 64 * half, table, to + 64 * half, choices + half));
        _mm512_storeu_si512(to + BLOCK, _mm512_or_si512(choices[0], _mm512_slli_epi16(choices[1], 4)));
    }
}

EXPORT void cabochon_lossless_pack(const uint16_t *w, const uint8_t *table, uint8_t *out, int32_t *count, int64_t n,
                                   int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; row++)
        pack_row(w + row * k, table, out + row * (k / BLOCK) * BYTES, count + row, k);
}

/* The columns and values of the exceptions; `start` [n + 1] says where each row's begin, `choice` [256] is 255 for high
   bytes that the table lacks. */
EXPORT void cabochon_lossless_exceptions(const uint16_t *w, const uint8_t *choice, const int32_t *start, int32_t *column,
                                         uint16_t *value, int64_t n, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; row++)
        for (int64_t i = 0, e = start[row]; e < start[row + 1]; i++)
            if (choice[w[row * k + i] >> 8] == 255) {
                column[e] = (int32_t)i;
                value[e++] = w[row * k + i];
            }
}

EXPORT int cabochon_has_bf16(void) {
    return __builtin_cpu_supports("avx512bf16");
}
