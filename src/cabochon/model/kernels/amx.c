/* The product of qmatmul.c on AMX, the matrix unit of Intel's server processors, bit for bit the same: the sums inside a
   group are integers either way, and groups are added in the same order with the same roundings.

   A tile product takes 16 output channels times 64 k and 64 k times 16 rows of activations; channels are the rows of the
   result, so the scales of the activations are a register. Weights are unpacked on the way, to signed bytes without
   their zero points, for as many rows as PANEL holds. What is unpacked and the activations beside it stay in the
   first-level cache for CHUNK times 64 k, and the float sums of a block, 16 channels by 16 rows, in registers. */

#include <stdlib.h>

#include "kernels.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxint8intrin.h>)
#define HAS_AMX
#endif
#endif

#ifdef HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma,amx-tile,amx-int8")))
#define STEP 64               /* k of a tile product */
#define TILE (LANES * STEP)   /* bytes of a tile */
#define CHUNK 4               /* steps whose operands stay in the first-level cache */
#define WIDE 4                /* tiles of channels that share a load of activations, at most */
#define PANEL 32              /* blocks of 16 rows */

/* Rows of activations, as tiles [blocks, K / 64, 16, 64]: quads of k, of 16 rows. */
typedef struct {
    const int8_t *tiles;
    const float *scale; /* [blocks, G, 16] */
    int64_t m, blocks;
} Rows;

/* What a thread works in. */
typedef struct {
    int8_t weight[WIDE][CHUNK][TILE];
    float scale[WIDE][CHUNK][LANES]; /* int4: of the chunk's group */
    int32_t sums[2][CHUNK][LANES * LANES];
    float totals[WIDE][PANEL][LANES * LANES];
} Scratch;

/* Sixteen rows of sixteen 32-bit numbers to columns. */
AMX INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) { /* t[4 j + i] holds, in part l, column 4 l + i of rows 4 j to 4 j + 3 */
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* Sixteen channels of one step, as signed bytes [16, 64] without their zero points. */
AMX INLINE void unpack(const int bits, const QWeight *w, int64_t tile, int64_t step, int8_t *to, float *scale) {
    const int64_t steps = w->k / STEP, groups = w->k / w->group, at = (tile * groups + step * STEP / w->group) * LANES;
    const uint8_t *from = w->weight + (tile * steps + step) * TILE * bits / 8;
    for (int i = 0; i < TILE * bits / 8; i += 64) /* of the next chunk */
        _mm_prefetch((const char *)from + CHUNK * TILE * bits / 8 + i, _MM_HINT_T1);
    __m512i quads[16];
    if (bits == 8) {
        const __m512i zero = _mm512_set1_epi8(-128);
        for (int i = 0; i < 16; i++) quads[i] = _mm512_xor_si512(_mm512_loadu_si512(from + 64 * i), zero);
    } else {
        const __m512i low_bits = _mm512_set1_epi8(15);
        const __m512i each = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(w->zero + at)));
        const __m512i zero = _mm512_mullo_epi32(each, _mm512_set1_epi32(0x01010101)); /* four times each */
        for (int i = 0; i < 8; i++) {
            const __m512i both = _mm512_loadu_si512(from + 64 * i);
            quads[2 * i] = _mm512_sub_epi8(_mm512_and_si512(both, low_bits), zero);
            quads[2 * i + 1] = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits), zero);
        }
        _mm512_storeu_ps(scale, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(w->half + at))));
    }
    transpose(quads);
    for (int i = 0; i < 16; i++) _mm512_store_si512((void *)(to + 64 * i), quads[i]);
}

/* The integer sums of the groups of a chunk for one block, each group of `parts` steps. */
#define PRODUCT(C)                                                           \
    if (C < groups) {                                                        \
        _tile_zero(C);                                                       \
        for (int64_t part = 0; part < parts; part++) {                       \
            _tile_loadd(4, weight + (C * parts + part) * TILE, STEP);        \
            _tile_loadd(5, rows + (C * parts + part) * TILE, STEP);          \
            _tile_dpbssd(C, 4, 5);                                           \
        }                                                                    \
        _tile_stored(C, sums[C], 64);                                        \
    }
AMX INLINE void multiply(const int8_t *weight, const int8_t *rows, int64_t parts, int64_t groups,
                         int32_t sums[CHUNK][LANES * LANES]) {
    PRODUCT(0)
    PRODUCT(1)
    PRODUCT(2)
    PRODUCT(3)
}

/* Add the groups of a chunk to the totals of one block [16 channels, 16 rows]. */
AMX INLINE void add(const int bits, int32_t sums[CHUNK][LANES * LANES], const float (*weight_scale)[LANES],
                    const float *scale, int64_t parts, int64_t groups, int fresh, float *totals) {
    __m512 total[LANES];
    for (int c = 0; c < LANES; c++) total[c] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(totals + c * LANES);
    for (int64_t g = 0; g < groups; g++) {
        const __m512 by_row = _mm512_loadu_ps(scale + g * LANES);
        for (int c = 0; c < LANES; c++) {
            const __m512 both = bits == 8 ? by_row : _mm512_mul_ps(_mm512_set1_ps(weight_scale[g * parts][c]), by_row);
            total[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[g] + c * LANES)), both, total[c]);
        }
    }
    for (int c = 0; c < LANES; c++) _mm512_store_ps(totals + c * LANES, total[c]);
}

/* The finished totals of a block to out [M, N]. */
AMX INLINE void finish(const QWeight *w, const float *totals, int64_t tile, int64_t row, int64_t m, Floats out) {
    const int64_t left = w->n - tile * LANES;
    const __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
    __m512i by_row[LANES];
    for (int c = 0; c < LANES; c++) {
        const __m512 x = _mm512_load_ps(totals + c * LANES);
        by_row[c] = _mm512_castps_si512(w->bits == 8 ? _mm512_mul_ps(x, _mm512_set1_ps(w->scale[tile * LANES + c])) : x);
    }
    transpose(by_row);
    for (int64_t r = 0; r < LANES && row + r < m; r++)
        store_some(out, (row + r) * w->n + tile * LANES, _mm512_castsi512_ps(by_row[r]), mask);
}

/* WIDE tiles of channels, from `tile` on, for the blocks of a panel. While the vector unit adds one block, the matrix
   unit multiplies the next. */
AMX INLINE void strip(const int bits, const QWeight *w, const Rows *x, int64_t tile, int64_t wide, int64_t first,
                      int64_t blocks, Floats out, Scratch *s) {
    const int64_t steps = w->k / STEP, groups = w->k / w->group, parts = w->group / STEP;
    for (int64_t step = 0; step < steps; step += CHUNK) {
        const int64_t count = steps - step < CHUNK ? steps - step : CHUNK, some = count / parts;
        const int8_t *rows = x->tiles + (first * steps + step) * TILE;
        const float *scale = x->scale + (first * groups + step / parts) * LANES;
        for (int64_t t = 0; t < wide; t++)
            for (int64_t i = 0; i < count; i++) unpack(bits, w, tile + t, step + i, s->weight[t][i], s->scale[t][i]);
        multiply(s->weight[0][0], rows, parts, some, s->sums[0]);
        for (int64_t b = 0, side = 0; b < blocks; b++, scale += groups * LANES)
            for (int64_t t = 0; t < wide; t++, side ^= 1) {
                const int64_t next = t + 1 < wide ? t + 1 : 0;
                if (!next) rows += steps * TILE;
                if (next || b + 1 < blocks) multiply(s->weight[next][0], rows, parts, some, s->sums[side ^ 1]);
                add(bits, s->sums[side], s->scale[t], scale, parts, some, !step, s->totals[t][b]);
            }
    }
    for (int64_t t = 0; t < wide; t++)
        for (int64_t b = 0; b < blocks; b++) finish(w, s->totals[t][b], tile + t, (first + b) * LANES, x->m, out);
}

AMX static void strip8(const QWeight *w, const Rows *x, int64_t tile, int64_t wide, int64_t first, int64_t blocks,
                       Floats out, Scratch *s) {
    strip(8, w, x, tile, wide, first, blocks, out, s);
}

AMX static void strip4(const QWeight *w, const Rows *x, int64_t tile, int64_t wide, int64_t first, int64_t blocks,
                       Floats out, Scratch *s) {
    strip(4, w, x, tile, wide, first, blocks, out, s);
}

/* x [M, K] to int8 as in qmatmul.c, in tiles. Rows that fill up the last block are zeros. */
AMX static void quantize_tiles(Floats x, int64_t m, int64_t k, int64_t group, int8_t *tiles, float *scales) {
    const int64_t blocks = (m + LANES - 1) / LANES, groups = k / group;
#pragma omp parallel for schedule(static) if (m * k > 65536)
    for (int64_t i = 0; i < blocks * groups; i++) {
        const int64_t row = i / groups * LANES, from = i % groups * group;
        float *scale = scales + i * LANES;
        __m512 factor[LANES];
        for (int r = 0; r < LANES; r++) {
            const float top = row + r < m ? magnitude(x, (row + r) * k + from, group) : 0;
            factor[r] = _mm512_set1_ps(to_int8(top));
            scale[r] = top / 127.0f;
        }
        for (int64_t j = 0; j < group; j += STEP) {
            __m512i rows[LANES];
            for (int r = 0; r < LANES; r++) {
                __m128i part[STEP / LANES];
                for (int l = 0; l < STEP / LANES; l++) {
                    const int64_t at = (row + r) * k + from + j + l * LANES;
                    part[l] = row + r < m ? _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(load(x, at), factor[r])))
                                          : _mm_setzero_si128();
                }
                rows[r] = _mm512_loadu_si512(part);
            }
            transpose(rows);
            for (int r = 0; r < LANES; r++) _mm512_store_si512((void *)(tiles + i * LANES * group + j * LANES + 64 * r), rows[r]);
        }
    }
}

/* The unit's registers as the products above use them: 16 rows of 64 bytes. */
AMX static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 6; t++) config.bytes[t] = 64, config.rows[t] = LANES;
    _tile_loadconfig(&config);
}

/* One matrix, all rows. */
AMX static int matmul(const QWeight *w, const Rows *x, Floats out) {
    const int64_t tiles = (w->n + LANES - 1) / LANES;
    const int64_t wide = x->blocks > WIDE ? WIDE : 2; /* few rows wait for memory: it is read in fewer streams */
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Scratch *s = aligned_alloc(64, sizeof(Scratch));
        failed = !s;
        if (s) configure();
        for (int64_t first = 0; first < x->blocks; first += PANEL) {
            const int64_t blocks = x->blocks - first < PANEL ? x->blocks - first : PANEL;
#pragma omp for schedule(static) nowait
            for (int64_t tile = 0; tile < tiles; tile += wide) {
                const int64_t here = tiles - tile < wide ? tiles - tile : wide;
                if (s) (w->bits == 8 ? strip8 : strip4)(w, x, tile, here, first, blocks, out, s);
            }
        }
        if (s) _tile_release();
        free(s);
    }
    return failed;
}

int amx_matmul(const QWeight *const *w, int64_t count, Floats x, int64_t m, const Floats *out) {
    const int64_t k = w[0]->k, groups = k / w[0]->group, blocks = (m + LANES - 1) / LANES;
    int8_t *tiles = aligned_alloc(64, blocks * LANES * (k + 4 * groups));
    if (!tiles) return 1;
    float *scale = (float *)(tiles + blocks * LANES * k);
    quantize_tiles(x, m, k, w[0]->group, tiles, scale);
    const Rows rows = {tiles, scale, m, blocks};
    int failed = 0;
    for (int64_t i = 0; i < count; i++) failed |= matmul(w[i], &rows, out[i]);
    free(tiles);
    return failed;
}

/* Does the processor have the unit, and does the system let this process use it? Asked once: threads inherit it. */
int amx_usable(void) {
    static int known = -1;
    if (known < 0) {
        const int tile_data = 18, request = 0x1023; /* ARCH_REQ_XCOMP_PERM */
        uint32_t a = 7, b, c = 0, d;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        known = (d >> 24 & 3) == 3 && !syscall(SYS_arch_prctl, request, tile_data);
    }
    return known;
}

/* Groups are whole steps, and a chunk is whole groups. */
int amx_fits(const QWeight *w) { return w->group % STEP == 0 && CHUNK * STEP % w->group == 0; }

#else
int amx_fits(const QWeight *w) { return (void)w, 0; }
int amx_usable(void) { return 0; }
int amx_matmul(const QWeight *const *w, int64_t count, Floats x, int64_t m, const Floats *out) {
    return (void)w, (void)count, (void)x, (void)m, (void)out, 1;
}
#endif
