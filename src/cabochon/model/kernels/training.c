/* The steps between the matrix products of a layer while it is trained, forward where that differs from inference, and
   backward. Plain twins: what autograd makes of gemma2.py and attention.py; tests hold these to it.

   Nothing is kept for the way back but inputs: a row is in the cache when it is needed again, and a few more
   operations on it cost less than memory does. */

#include <math.h>
#include <omp.h>

#include "kernels.h"

#define LOG2_E 1.44269504f

AVX512 INLINE float inverse_rms(Floats x, int64_t from, int64_t d, float eps) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < d; i += LANES) {
        const __m512 value = load(x, from + i);
        sum[i / LANES % 2] = _mm512_fmadd_ps(value, value, sum[i / LANES % 2]);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / (float)d + eps);
}

/* out = base + x / sqrt(mean(x^2) + eps) * (1 + weight), rows of D (a multiple of 16); one rounding, at the store. */
AVX512 EXPORT void cabochon_add_norm(Floats base, Floats x, Floats weight, Floats out, int64_t rows, int64_t d,
                                     float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const __m512 factor = _mm512_set1_ps(inverse_rms(x, row * d, d, eps)), one = _mm512_set1_ps(1.0f);
        for (int64_t i = 0; i < d; i += LANES) {
            const __m512 normed = _mm512_mul_ps(load(x, row * d + i), factor);
            store(out, row * d + i,
                  _mm512_fmadd_ps(normed, _mm512_add_ps(one, load(weight, i)), load(base, row * d + i)));
        }
    }
}

/* With r = 1 / rms and h = grad (1 + weight): x_grad = r h - x r^3 mean(h x), and weight_grad += grad x r, summed for
   each thread in a row of its own: float32 [threads, D], zero before. */
AVX512 EXPORT void cabochon_norm_backward(Floats grad, Floats x, Floats weight, Floats x_grad, float *weight_grad,
                                          int64_t rows, int64_t d, float eps, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
    {
        float *mine = weight_grad + omp_get_thread_num() * d;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t from = row * d;
            const float inverse = inverse_rms(x, from, d, eps);
            const __m512 r = _mm512_set1_ps(inverse), one = _mm512_set1_ps(1.0f);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < d; i += LANES) {
                const __m512 g = load(grad, from + i), value = load(x, from + i);
                sum = _mm512_fmadd_ps(_mm512_mul_ps(g, _mm512_add_ps(one, load(weight, i))), value, sum);
                const __m512 part = _mm512_mul_ps(_mm512_mul_ps(g, value), r);
                _mm512_storeu_ps(mine + i, _mm512_add_ps(_mm512_loadu_ps(mine + i), part));
            }
            const __m512 pull = _mm512_set1_ps(inverse * inverse * inverse * _mm512_reduce_add_ps(sum) / (float)d);
            for (int64_t i = 0; i < d; i += LANES) {
                const __m512 h = _mm512_mul_ps(load(grad, from + i), _mm512_add_ps(one, load(weight, i)));
                const __m512 away = _mm512_mul_ps(load(x, from + i), pull);
                store(x_grad, from + i, _mm512_fmsub_ps(r, h, away));
            }
        }
    }
}

/* The gradients of gelu(gate) * up, the tanh form: gelu(x) = x s with s = sigmoid(2 u), 2 u = c (x + 0.044715 x^3), and
   gelu'(x) = s + x s (1 - s) c (1 + 3 * 0.044715 x^2). n a multiple of 16. */
AVX512 EXPORT void cabochon_gelu_times_backward(Floats grad, Floats gate, Floats up, Floats gate_grad, Floats up_grad,
                                                int64_t n) {
    const __m512 one = _mm512_set1_ps(1), cubic = _mm512_set1_ps(0.044715f), c = _mm512_set1_ps(1.59576912f);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512 x = load(gate, i), g = load(grad, i), square = _mm512_mul_ps(_mm512_mul_ps(x, x), cubic);
        const __m512 u = _mm512_mul_ps(_mm512_mul_ps(x, c), _mm512_add_ps(one, square));
        const __m512 s = _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), u))));
        const __m512 inner = _mm512_mul_ps(c, _mm512_fmadd_ps(_mm512_set1_ps(3), square, one)); /* 2 u' */
        const __m512 rest = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_sub_ps(one, s)), inner);
        const __m512 slope = _mm512_fmadd_ps(s, rest, s);
        store(gate_grad, i, _mm512_mul_ps(_mm512_mul_ps(g, slope), load(up, i)));
        store(up_grad, i, _mm512_mul_ps(g, _mm512_mul_ps(x, s)));
    }
}

/* Scores of a block of queries, [heads, queries, group, keys] of bfloat16 or float32, group query heads for each
   key-value head. Query i sees keys from `low` up to, but not, `high`, both counted from the first key of the block; the
   two are int32 [queries]. */
typedef struct {
    Floats scores; /* products q k; become probabilities */
    Floats grad;   /* of the probabilities; become that of the products. Not forward */
    const int32_t *low, *high;
    int64_t heads, queries, group, keys;
    float scale, cap;             /* cap 0: none */
} Scores;

/* Lanes of [i, i + 16) within [low, high). */
AVX512 INLINE __mmask16 within(int64_t i, int64_t low, int64_t high) {
    const int64_t skip = low > i ? low - i : 0, end = high - i < LANES ? high - i : LANES;
    return skip >= LANES || end <= 0 ? 0 : (__mmask16)((0xffffu >> (LANES - end)) & (0xffffu << skip));
}

/* cap tanh(s scale / cap) in bits, and if asked for its slope by s, in nats. */
AVX512 INLINE __m512 capped(__m512 s, float scale, float cap, __m512 *slope) {
    if (cap == 0) {
        if (slope) *slope = _mm512_set1_ps(scale);
        return _mm512_mul_ps(s, _mm512_set1_ps(scale * LOG2_E));
    }
    const __m512 one = _mm512_set1_ps(1);
    const __m512 t = power_of_two(_mm512_mul_ps(_mm512_abs_ps(s), _mm512_set1_ps(-2 * LOG2_E * scale / cap)));
    const __m512 under = reciprocal(_mm512_add_ps(one, t));
    if (slope) *slope = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(t, _mm512_set1_ps(4 * scale)), under), under);
    const __m512 size = _mm512_mul_ps(_mm512_sub_ps(one, t), under);
    const __m512 tanh = _mm512_or_ps(size, _mm512_and_ps(s, _mm512_set1_ps(-0.0f)));
    return _mm512_mul_ps(tanh, _mm512_set1_ps(cap * LOG2_E));
}

/* A row, the keys it sees, and its softmax: probability = 2^(score - top) * share, scores in bits. */
typedef struct {
    int64_t from, low, high, first, last; /* first, last: the seen keys' ends, in whole registers */
    __m512 top, share;
} Row;

AVX512 INLINE __m512 score(const Scores *s, const Row *row, int64_t i, __m512 *slope) {
    const __m512 raw = load_some(s->scores, row->from + i, within(i, row->low, row->high));
    return _mm512_sub_ps(capped(raw, s->scale, s->cap, slope), row->top);
}

AVX512 INLINE __m512 probability(const Row *row, int64_t i, __m512 z) {
    return _mm512_maskz_mul_ps(within(i, row->low, row->high), power_of_two(z), row->share);
}

AVX512 INLINE Row row_of(const Scores *s, int64_t number) {
    const int64_t query = number / s->group % s->queries, low = s->low[query], high = s->high[query];
    Row row = {number * s->keys, low, high, low & -LANES, (high + LANES - 1) & -LANES, _mm512_setzero_ps(),
               _mm512_setzero_ps()};
    if (low >= high) row.first = row.last = 0;
    __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t i = row.first; i < row.last; i += LANES) {
        const __mmask16 seen = within(i, low, high);
        largest = _mm512_mask_max_ps(largest, seen, largest, load_some(s->scores, row.from + i, seen));
    }
    /* the cap rises: the largest stays the largest */
    row.top = capped(_mm512_set1_ps(_mm512_reduce_max_ps(largest)), s->scale, s->cap, NULL);
    for (int64_t i = row.first; i < row.last; i += LANES)
        sum = _mm512_mask_add_ps(sum, within(i, low, high), sum, power_of_two(score(s, &row, i, NULL)));
    row.share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    return row;
}

/* Zeros where a row sees nothing. */
AVX512 INLINE void clear(Floats x, const Row *row, int64_t keys) {
    for (int64_t i = 0; i < row->first; i += LANES) store(x, row->from + i, _mm512_setzero_ps());
    for (int64_t i = row->last; i < keys; i += LANES)
        store_some(x, row->from + i, _mm512_setzero_ps(), within(i, 0, keys));
}

/* In place: soft-capped, masked softmax; a query that sees nothing gets zeros. */
AVX512 EXPORT void cabochon_scores(const Scores *s) {
#pragma omp parallel for schedule(static)
    for (int64_t number = 0; number < s->heads * s->queries * s->group; number++) {
        const Row row = row_of(s, number);
        for (int64_t i = row.first; i < row.last; i += LANES)
            store_some(s->scores, row.from + i, probability(&row, i, score(s, &row, i, NULL)), within(i, 0, s->keys));
        clear(s->scores, &row, s->keys);
    }
}

/* In place: the products become probabilities p, as forward, and the gradient g of these becomes that of the products:
   p (g - sum(p g)) slope. */
AVX512 EXPORT void cabochon_scores_backward(const Scores *s) {
#pragma omp parallel for schedule(static)
    for (int64_t number = 0; number < s->heads * s->queries * s->group; number++) {
        const Row row = row_of(s, number);
        __m512 mean = _mm512_setzero_ps();
        for (int64_t i = row.first; i < row.last; i += LANES) {
            const __m512 g = load_some(s->grad, row.from + i, within(i, row.low, row.high));
            mean = _mm512_fmadd_ps(probability(&row, i, score(s, &row, i, NULL)), g, mean);
        }
        mean = _mm512_set1_ps(_mm512_reduce_add_ps(mean));
        for (int64_t i = row.first; i < row.last; i += LANES) {
            const __mmask16 seen = within(i, row.low, row.high), lanes = within(i, 0, s->keys);
            __m512 slope;
            const __m512 p = probability(&row, i, score(s, &row, i, &slope));
            const __m512 g = _mm512_sub_ps(load_some(s->grad, row.from + i, seen), mean);
            store_some(s->scores, row.from + i, p, lanes);
            store_some(s->grad, row.from + i, _mm512_mul_ps(_mm512_mul_ps(p, g), slope), lanes);
        }
        clear(s->scores, &row, s->keys);
        clear(s->grad, &row, s->keys);
    }
}
