/* Attention of few queries over a paged cache: one pass over the keys and values, soft cap and window inside.

   A query's answer is computed from its own keys, in order of position, by one thread: it has the same bits alone
   and in any batch. The plain twin is attention.py on the gathered pages.

   Letters: N query heads, K key-value heads, H head size (a multiple of 16), P positions of a page. */

#include <math.h>
#include <stdlib.h>

#include "kernels.h"

typedef struct {
    Floats q;              /* [queries, N, H] */
    Floats out;            /* [queries, N, H] */
    Floats keys, values;   /* [pages, K, P, H] of one layer */
    const int32_t *pages;  /* [queries, stride] the page of each block of P positions; -1 where it was let go */
    const int64_t *position; /* [queries]; position j is seen when position - window < j <= position */
    int64_t queries, heads, kv_heads, size, page, stride, window; /* window 0: everything */
    float scale, cap;      /* cap 0: none */
} Attend;

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

AVX512 INLINE int64_t at(const Attend *p, int64_t query, int64_t kv, int64_t position) {
    const int64_t page = p->pages[query * p->stride + position / p->page];
    return ((page * p->kv_heads + kv) * p->page + position % p->page) * p->size;
}

/* scores[j - low] = q . k_j for j in [low, high). */
AVX512 static void products(const Attend *p, int64_t query, int64_t kv, const float *q, int64_t low, int64_t high,
                            float *scores) {
    for (int64_t j = low; j < high; j++) {
        const int64_t key = at(p, query, kv, j);
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t h = 0; h < p->size; h += LANES)
            sum[h / LANES % 2] = _mm512_fmadd_ps(load(p->keys, key + h), _mm512_loadu_ps(q + h), sum[h / LANES % 2]);
        scores[j - low] = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
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

#define CHUNK 16 /* registers of accumulators: 256 numbers of a head at a time */

/* out = sum of weights[j - low] * v_j / total. */
AVX512 static void mix(const Attend *p, int64_t query, int64_t kv, const float *weights, int64_t low, int64_t high,
                       float total, int64_t out) {
    for (int64_t start = 0; start < p->size; start += CHUNK * LANES) {
        const int64_t parts = (p->size - start < CHUNK * LANES ? p->size - start : CHUNK * LANES) / LANES;
        __m512 sum[CHUNK];
        for (int64_t i = 0; i < CHUNK; i++) sum[i] = _mm512_setzero_ps();
        for (int64_t j = low; j < high; j++) {
            const int64_t value = at(p, query, kv, j) + start;
            const __m512 weight = _mm512_set1_ps(weights[j - low]);
            if (parts == CHUNK) /* a constant count keeps the sums in registers */
                for (int64_t i = 0; i < CHUNK; i++)
                    sum[i] = _mm512_fmadd_ps(load(p->values, value + i * LANES), weight, sum[i]);
            else
                for (int64_t i = 0; i < parts; i++)
                    sum[i] = _mm512_fmadd_ps(load(p->values, value + i * LANES), weight, sum[i]);
        }
        for (int64_t i = 0; i < parts; i++)
            store(p->out, out + start + i * LANES, _mm512_div_ps(sum[i], _mm512_set1_ps(total)));
    }
}

/* Returns 0, or 1 when there is no memory. */
AVX512 EXPORT int cabochon_attend(const Attend *p) {
    const int64_t group = p->heads / p->kv_heads;
    int64_t longest = 0;
    for (int64_t i = 0; i < p->queries; i++)
        if (p->position[i] + 1 > longest) longest = p->position[i] + 1;
    if (p->window && longest > p->window) longest = p->window;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *scratch = malloc((longest + LANES + p->size) * sizeof(float));
        failed = !scratch;
        /* Tasks with the same keys are neighbours: the second head finds them in the cache. */
#pragma omp for schedule(dynamic, group)
        for (int64_t task = 0; task < p->queries * p->heads; task++) {
            if (!scratch) continue;
            const int64_t query = task / p->heads, head = task % p->heads, kv = head / group;
            const int64_t high = p->position[query] + 1;
            const int64_t low = p->window && high > p->window ? high - p->window : 0;
            float *q = scratch + longest + LANES;
            for (int64_t h = 0; h < p->size; h += LANES) _mm512_storeu_ps(q + h, load(p->q, task * p->size + h));
            products(p, query, kv, q, low, high, scratch);
            const float total = weigh(p, scratch, high - low);
            mix(p, query, kv, scratch, low, high, total, task * p->size);
        }
        free(scratch);
    }
    return failed;
}
