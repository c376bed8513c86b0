/* Attention over a paged cache: soft cap and window inside, no scores beyond those of a few queries at a time.

   Neighbouring queries of one sequence share the reading of their keys and values. Each query's own sums are made in
   order of position all the same, so an answer has the same bits alone, in any batch, and however its prompt was cut
   into pieces. The plain twin is attention.py on the gathered pages.

   Letters: N query heads, K key-value heads, H head size (a multiple of 16), P positions of a page. */

#include <math.h>
#include <stdlib.h>

#include "kernels.h"

#define SHARED 4 /* queries that read the same keys together */

typedef struct {
    Floats q;                /* [queries, N, H] */
    Floats out;              /* [queries, N, H] */
    Floats keys, values;     /* [pages, K, P, H] of one layer */
    const int32_t *pages;    /* [sequences, stride] the page of each block of P positions; -1 where it was let go */
    const int64_t *row;      /* [queries] the sequence of each; neighbours of one sequence follow each other */
    const int64_t *position; /* [queries]; position j is seen when position - window < j <= position */
    int64_t queries, heads, kv_heads, size, page, stride, window; /* window 0: everything */
    float scale, cap;        /* cap 0: none */
} Attend;

/* Up to SHARED queries of one sequence and head: the positions each sees, and room for its scores. */
typedef struct {
    int64_t first, count, head;
    int64_t low[SHARED], high[SHARED]; /* seen are low <= j < high; the first sees furthest back, the last furthest on */
    float *scores[SHARED];             /* [high of the last - low of the first], and padding to a whole register */
    float *q;                          /* [count, H] float32 */
} Task;

/* Near zero the quotient would lose digits; there the series is exact to the last bit. */
AVX512 INLINE __m512 hyperbolic_tangent(__m512 x) {
    const __m512 one = _mm512_set1_ps(1), y = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(20));
    const __m512 e = exponential(_mm512_add_ps(y, y));
    const __m512 large = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2), _mm512_add_ps(e, one)));
    const __m512 s = _mm512_mul_ps(y, y);
    __m512 p = _mm512_set1_ps(62.0f / 2835);
    const float terms[] = {-17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f};
    for (int i = 0; i < 4; i++) p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(terms[i]));
    const __mmask16 near = _mm512_cmp_ps_mask(y, _mm512_set1_ps(0.25f), _CMP_LT_OQ);
    const __m512 magnitude = _mm512_mask_mul_ps(large, near, p, y);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude), _mm512_castps_si512(x),
                                                         _mm512_set1_epi32(0x80000000), 0xd8)); /* x's sign */
}

/* Where the keys or values of a block of positions begin, for the head of a task. */
AVX512 INLINE int64_t page_of(const Attend *p, const Task *t, int64_t block) {
    const int64_t page = p->pages[p->row[t->first] * p->stride + block];
    return (page * p->kv_heads + t->head / (p->heads / p->kv_heads)) * p->page * p->size;
}

/* The sums of 16 registers as one. Each is added up in the same order, whatever its place. */
AVX512 INLINE __m512 sums(const __m512 x[16]) {
    __m512 two[8], four[4], eight[2];
    for (int i = 0; i < 8; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

/* scores[r][j] = q_r . k_j for j from low[0] to high[rows - 1], also where a query does not see: 16 products at once. */
AVX512 INLINE void products(const int rows, const Attend *p, const Task *t) {
    const int keys = 16 / rows; /* side by side */
    const int64_t low = t->low[0], high = t->high[rows - 1];
    for (int64_t j = low; j < high;) {
        const int64_t block = j / p->page, next = (block + 1) * p->page, end = next < high ? next : high;
        for (const int64_t first = page_of(p, t, block) - block * p->page * p->size; j < end; j += keys) {
            __m512 sum[16];
            int64_t key[16];
            const int count = end - j < keys ? (int)(end - j) : keys;
            for (int i = 0; i < keys; i++) key[i] = first + (j + (i < count ? i : 0)) * p->size;
            for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
            for (int64_t h = 0; h < p->size; h += LANES) {
                __m512 q[SHARED];
                for (int r = 0; r < rows; r++) q[r] = _mm512_loadu_ps(t->q + r * p->size + h);
                for (int i = 0; i < keys; i++) {
                    const __m512 k = load(p->keys, key[i] + h);
                    for (int r = 0; r < rows; r++) sum[r * keys + i] = _mm512_fmadd_ps(k, q[r], sum[r * keys + i]);
                }
            }
            float found[16];
            _mm512_storeu_ps(found, sums(sum));
            for (int r = 0; r < rows; r++) memcpy(t->scores[r] + j - low, found + r * keys, count * sizeof(float));
        }
        j = end;
    }
}

/* Scores to unnormalised weights, in place; returns their sum. The array is padded to whole registers. */
AVX512 static float weigh(const Attend *p, float *scores, int64_t count) {
    const int64_t end = (count + LANES - 1) / LANES * LANES;
    const float factor = p->cap > 0 ? p->scale / p->cap : p->scale;
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t j = count; j < end; j++) scores[j] = 0;
    for (int64_t j = 0; j < end; j += LANES) {
        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(factor));
        if (p->cap > 0) s = _mm512_mul_ps(hyperbolic_tangent(s), _mm512_set1_ps(p->cap));
        if (count - j < LANES) s = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (1 << (count - j)) - 1, s);
        top = _mm512_max_ps(top, s);
        _mm512_storeu_ps(scores + j, s);
    }
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t j = 0; j < end; j += LANES) {
        __m512 w = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + j), largest));
        if (count - j < LANES) w = _mm512_maskz_mov_ps((1 << (count - j)) - 1, w);
        sum = _mm512_add_ps(sum, w);
        _mm512_storeu_ps(scores + j, w);
    }
    return _mm512_reduce_add_ps(sum);
}

/* out = sum of weights[j] * v_j / total, `parts` registers of every query's head from `start` on. */
AVX512 INLINE void mix(const int rows, const int parts, const Attend *p, const Task *t, const float *total,
                       int64_t start) {
    const int64_t low = t->low[0], high = t->high[rows - 1];
    __m512 sum[SHARED][16];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < parts; i++) sum[r][i] = _mm512_setzero_ps();
    for (int64_t j = low; j < high;) {
        const int64_t block = j / p->page, next = (block + 1) * p->page, end = next < high ? next : high;
        for (const int64_t first = page_of(p, t, block) - block * p->page * p->size + start; j < end; j++) {
            __m512 weight[SHARED];
            for (int r = 0; r < rows; r++) weight[r] = _mm512_set1_ps(t->scores[r][j - low]);
            for (int i = 0; i < parts; i++) {
                const __m512 v = load(p->values, first + j * p->size + i * LANES);
                for (int r = 0; r < rows; r++) sum[r][i] = _mm512_fmadd_ps(v, weight[r], sum[r][i]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < parts; i++)
            store(p->out, ((t->first + r) * p->heads + t->head) * p->size + start + i * LANES,
                  _mm512_div_ps(sum[r][i], _mm512_set1_ps(total[r])));
}

/* As many registers of sums as there are: 16 for one query, 4 for each of four. */
AVX512 INLINE void attend(const int rows, const Attend *p, const Task *t) {
    const int parts = rows == 1 ? 16 : rows == 2 ? 8 : 4;
    const int64_t low = t->low[0], all = t->high[rows - 1] - low;
    float total[SHARED];
    products(rows, p, t);
    for (int r = 0; r < rows; r++) { /* what a query does not see weighs 0, which adds nothing, to the bit */
        const int64_t before = t->low[r] - low, end = t->high[r] - low;
        total[r] = weigh(p, t->scores[r] + before, end - before);
        memset(t->scores[r], 0, before * sizeof(float));
        if (all > end) memset(t->scores[r] + end, 0, (all - end) * sizeof(float));
    }
    int64_t start = 0;
    for (; start + parts * LANES <= p->size; start += parts * LANES) mix(rows, parts, p, t, total, start);
    for (; start < p->size; start += LANES) mix(rows, 1, p, t, total, start);
}

AVX512 static void run(const Attend *p, Task *t, float *scratch, int64_t longest) {
    for (int64_t r = 0; r < t->count; r++) {
        const int64_t query = t->first + r;
        t->high[r] = p->position[query] + 1;
        t->low[r] = p->window && t->high[r] > p->window ? t->high[r] - p->window : 0;
        t->scores[r] = scratch + r * (longest + SHARED + LANES);
    }
    t->q = scratch + SHARED * (longest + SHARED + LANES);
    for (int64_t r = 0; r < t->count; r++)
        for (int64_t h = 0; h < p->size; h += LANES)
            _mm512_storeu_ps(t->q + r * p->size + h,
                             load(p->q, ((t->first + r) * p->heads + t->head) * p->size + h));
    switch (t->count) {
        case 1: attend(1, p, t); break;
        case 2: attend(2, p, t); break;
        case 3: attend(3, p, t); break;
        default: attend(4, p, t);
    }
}

/* Returns 0, or 1 when there is no memory. */
EXPORT int cabochon_attend(const Attend *p) {
    int64_t *starts = malloc((p->queries + 1) * sizeof *starts), groups = 0, longest = 0;
    if (!starts) return 1;
    for (int64_t i = 0; i < p->queries; i++) {
        if (!groups || p->row[i] != p->row[i - 1] || i - starts[groups - 1] == SHARED) starts[groups++] = i;
        if (p->position[i] + 1 > longest) longest = p->position[i] + 1;
    }
    starts[groups] = p->queries;
    if (p->window && longest > p->window) longest = p->window;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *scratch = malloc(SHARED * (longest + SHARED + LANES + p->size) * sizeof *scratch);
        failed = !scratch;
        /* Heads with the same keys are neighbours: the second finds them in the cache. */
#pragma omp for schedule(dynamic, p->heads / p->kv_heads)
        for (int64_t task = 0; task < groups * p->heads; task++) {
            const int64_t group = task / p->heads;
            Task t = {.first = starts[group], .count = starts[group + 1] - starts[group], .head = task % p->heads};
            if (scratch) run(p, &t, scratch, longest);
        }
        free(scratch);
    }
    free(starts);
    return failed;
}
