/* What a head loss does to a chunk of logits [C, V] between its products: the log-normaliser of each row, and the
   gradient written where the logits were. Rows are walked several times, because one of 256,000 bfloat16 numbers
   stays in the cache of its core. Plain twins: train/losses/logits.py and divergences.py.

   z = cap * tanh(r / cap) * scale for raw logits r, with scale = 1 / temperature; cap 0 means none. Inside, all
   logits and logarithms are in bits (base 2): powers of two cost least. */

#include <math.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"

#define BLOCK 1024 /* numbers added up before they join the sum of the row, so that small ones are not lost in it */
#define LOG2_E 1.44269504f
#define LN_2 0.69314718f

typedef struct {
    float cap, scale;
} Transform;

enum { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, TOTAL_VARIATION };

/* Logarithm to base 2 of positive x: x = m 2^k with m from 0.75 to 1.5, ln m = 2 atanh((m - 1) / (m + 1)). */
AVX512 INLINE __m512 bits_of(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    __m512 k = _mm512_getexp_ps(x);
    k = _mm512_mask_add_ps(k, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), k, one);
    const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(s, s);
    __m512 p = _mm512_set1_ps(2.0f / 9 * LOG2_E);
    const float terms[] = {2.0f / 7 * LOG2_E, 2.0f / 5 * LOG2_E, 2.0f / 3 * LOG2_E, 2.0f * LOG2_E};
    for (int i = 0; i < 4; i++) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(terms[i]));
    return _mm512_fmadd_ps(p, s, k);
}

/* z in bits less `below`, and if asked for the slope dz/dr, z in nats.
   tanh(x) = (1 - t) / (1 + t) with t = exp(-2 |x|), and 1 - tanh(x)^2 = 4 t / (1 + t)^2. */
AVX512 INLINE __m512 transformed(__m512 raw, Transform f, __m512 below, __m512 *slope) {
    if (f.cap == 0) {
        if (slope) *slope = _mm512_set1_ps(f.scale);
        return _mm512_fmsub_ps(raw, _mm512_set1_ps(f.scale * LOG2_E), below);
    }
    const __m512 one = _mm512_set1_ps(1), sign = _mm512_set1_ps(-0.0f);
    const __m512 t = power_of_two(_mm512_mul_ps(_mm512_abs_ps(raw), _mm512_set1_ps(-2 * LOG2_E / f.cap)));
    const __m512 under = reciprocal(_mm512_add_ps(one, t));
    if (slope) *slope = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(t, _mm512_set1_ps(4 * f.scale)), under), under);
    const __m512 size = _mm512_mul_ps(_mm512_sub_ps(one, t), under);
    const __m512 tanh = _mm512_or_ps(size, _mm512_and_ps(raw, sign));
    return _mm512_fmsub_ps(tanh, _mm512_set1_ps(f.cap * f.scale * LOG2_E), below);
}

/* The largest z of a row in bits, or a bound that is not so far above that powers of two vanish. */
AVX512 INLINE __m512 ceiling_of_row(Floats raw, int64_t from, int64_t v, Transform f) {
    const float bound = f.cap * f.scale * LOG2_E;
    if (f.cap != 0 && bound < 50) return _mm512_set1_ps(bound); /* the least z is -bound */
    __m512 top[2] = {load(raw, from), load(raw, from)}; /* the transform rises: the largest stays the largest */
    for (int64_t i = 0; i < v; i += LANES) top[i / LANES % 2] = _mm512_max_ps(top[i / LANES % 2], load(raw, from + i));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(top[0], top[1])));
    return transformed(largest, f, _mm512_setzero_ps(), NULL);
}

/* In bits. */
AVX512 INLINE float normaliser_of_row(Floats raw, int64_t from, int64_t v, Transform f) {
    const __m512 z_max = ceiling_of_row(raw, from, v, f);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t block = 0; block < v; block += BLOCK) {
        const int64_t end = block + BLOCK < v ? block + BLOCK : v;
        __m512 part = _mm512_setzero_ps();
        for (int64_t i = block; i < end; i += LANES)
            part = _mm512_add_ps(part, power_of_two(transformed(load(raw, from + i), f, z_max, NULL)));
        sum = _mm512_add_ps(sum, part);
    }
    return _mm512_cvtss_f32(z_max) + log2f(_mm512_reduce_add_ps(sum));
}

/* out [C] = log of the sum of exp(z) over a row, in nats; V a multiple of 16. */
AVX512 EXPORT void cabochon_log_normaliser(Floats raw, float *out, int64_t c, int64_t v, float cap, float scale) {
#pragma omp parallel for schedule(dynamic) if (c > 1)
    for (int64_t row = 0; row < c; row++) out[row] = LN_2 * normaliser_of_row(raw, row * v, v, (Transform){cap, scale});
}

/* In place: (multiple * exp(z - normaliser) + constant) dz/dr; the three are float32 [C]; V a multiple of 16. */
AVX512 EXPORT void cabochon_softmax_gradient(Floats raw, const float *normaliser, const float *multiple,
                                             const float *constant, int64_t c, int64_t v, float cap, float scale) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < c; row++) {
        const __m512 below = _mm512_set1_ps(normaliser[row] * LOG2_E), times = _mm512_set1_ps(multiple[row]);
        const __m512 plus = _mm512_set1_ps(constant[row]);
        for (int64_t i = row * v; i < (row + 1) * v; i += LANES) {
            __m512 slope;
            const __m512 share = power_of_two(transformed(load(raw, i), (Transform){cap, scale}, below, &slope));
            store(raw, i, _mm512_mul_ps(_mm512_fmadd_ps(share, times, plus), slope));
        }
    }
}

/* sum += part, n numbers, a multiple of 16. */
AVX512 EXPORT void cabochon_add(float *sum, Floats part, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += LANES)
        _mm512_storeu_ps(sum + i, _mm512_add_ps(_mm512_loadu_ps(sum + i), load(part, i)));
}

/* Ask for large pages for memory that is new: one page fault for 2 MB instead of 512. */
EXPORT void cabochon_large_pages(void *data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t from = ((uintptr_t)data + 4095) & ~(uintptr_t)4095, end = (uintptr_t)data + (uintptr_t)bytes;
    if (end > from) (void)madvise((void *)from, (end - from) & ~(uintptr_t)4095, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

typedef struct {
    Floats student, teacher; /* raw logits [C, V]; the student's become their gradient */
    const float *weight;     /* [C] */
    float *value;            /* [C], in nats, times weight */
    int64_t c, v;            /* V a multiple of 16 */
    int64_t kind;
    float beta, scale, student_cap, teacher_cap;
} Divergence;

/* One entry of P and Q, in bits: what it adds to two sums of its row, or with `mean` dL/dz. The sums are
       forward, reverse KL: the value
       Jensen-Shannon:      KL(Q | M), KL(P | M)
       total variation:     sum Q sign(Q - P) / 2, sum |P - Q| / 2 */
AVX512 INLINE __m512 entry(const int kind, __m512 log_p, __m512 log_q, float beta, const __m512 *mean, __m512 *second) {
    const __m512 p = power_of_two(log_p), q = power_of_two(log_q), zero = _mm512_setzero_ps();
    if (kind == FORWARD_KL) return mean ? _mm512_sub_ps(q, p) : _mm512_mul_ps(p, _mm512_sub_ps(log_p, log_q));
    if (kind == REVERSE_KL) {
        const __m512 ratio = _mm512_sub_ps(log_q, log_p);
        return _mm512_mul_ps(q, mean ? _mm512_mul_ps(_mm512_set1_ps(LN_2), _mm512_sub_ps(ratio, *mean)) : ratio);
    }
    if (kind == TOTAL_VARIATION) {
        const __m512 apart = _mm512_sub_ps(q, p), half = _mm512_set1_ps(0.5f);
        __m512 g = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(apart, zero, _CMP_GT_OQ), half);
        g = _mm512_mask_mov_ps(g, _mm512_cmp_ps_mask(apart, zero, _CMP_LT_OQ), _mm512_set1_ps(-0.5f));
        if (mean) return _mm512_mul_ps(q, _mm512_sub_ps(g, *mean));
        *second = _mm512_mul_ps(half, _mm512_abs_ps(apart));
        return _mm512_mul_ps(q, g);
    }
    /* log(M / Q) = log(1 - b + b P / Q), with the larger of the two taken out so that nothing overflows */
    const __m512 d = _mm512_sub_ps(log_p, log_q), b = _mm512_set1_ps(beta), a = _mm512_set1_ps(1 - beta);
    const __mmask16 more = _mm512_cmp_ps_mask(d, zero, _CMP_GT_OQ);
    const __m512 small = power_of_two(_mm512_sub_ps(zero, _mm512_abs_ps(d)));
    const __m512 mixed = _mm512_fmadd_ps(_mm512_mask_blend_ps(more, b, a), small, _mm512_mask_blend_ps(more, a, b));
    const __m512 m_to_q = _mm512_add_ps(bits_of(mixed), _mm512_max_ps(d, zero)), q_to_m = _mm512_sub_ps(zero, m_to_q);
    if (mean) return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps((1 - beta) * LN_2), q), _mm512_sub_ps(q_to_m, *mean));
    *second = _mm512_mul_ps(p, _mm512_sub_ps(d, m_to_q));
    return _mm512_mul_ps(q, q_to_m);
}

/* The value in nats times weight, from the two sums of a row. */
INLINE float value_of_row(const Divergence *d, float first, float second, float weight) {
    switch (d->kind) {
        case JENSEN_SHANNON: return LN_2 * weight * (d->beta * second + (1 - d->beta) * first);
        case TOTAL_VARIATION: return weight * second;
        default: return LN_2 * weight * first;
    }
}

AVX512 INLINE void divergence_of_row(const int kind, const Divergence *d, int64_t row) {
    const Transform of_q = {d->student_cap, d->scale}, of_p = {d->teacher_cap, d->scale};
    const int64_t from = row * d->v;
    const __m512 below_q = _mm512_set1_ps(normaliser_of_row(d->student, from, d->v, of_q));
    const __m512 below_p = _mm512_set1_ps(normaliser_of_row(d->teacher, from, d->v, of_p));
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t block = 0; block < d->v; block += BLOCK) {
        const int64_t end = block + BLOCK < d->v ? block + BLOCK : d->v;
        __m512 parts[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = block; i < end; i += LANES) {
            const __m512 log_q = transformed(load(d->student, from + i), of_q, below_q, NULL);
            const __m512 log_p = transformed(load(d->teacher, from + i), of_p, below_p, NULL);
            __m512 second = _mm512_setzero_ps();
            parts[0] = _mm512_add_ps(parts[0], entry(kind, log_p, log_q, d->beta, NULL, &second));
            parts[1] = _mm512_add_ps(parts[1], second);
        }
        for (int j = 0; j < 2; j++) sums[j] = _mm512_add_ps(sums[j], parts[j]);
    }
    const float first = _mm512_reduce_add_ps(sums[0]), weight = d->weight[row];
    d->value[row] = value_of_row(d, first, _mm512_reduce_add_ps(sums[1]), weight);
    const __m512 mean = _mm512_set1_ps(first);
    for (int64_t i = from; i < from + d->v; i += LANES) {
        __m512 slope;
        const __m512 log_q = transformed(load(d->student, i), of_q, below_q, &slope);
        const __m512 log_p = transformed(load(d->teacher, i), of_p, below_p, NULL);
        const __m512 towards_z = entry(kind, log_p, log_q, d->beta, &mean, NULL);
        store(d->student, i, _mm512_mul_ps(_mm512_mul_ps(towards_z, slope), _mm512_set1_ps(weight)));
    }
}

/* Values of a divergence of a student's distribution from a teacher's, row by row, and the gradient in place. */
AVX512 EXPORT void cabochon_divergence(const Divergence *d) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < d->c; row++) switch (d->kind) {
            case FORWARD_KL: divergence_of_row(FORWARD_KL, d, row); break;
            case REVERSE_KL: divergence_of_row(REVERSE_KL, d, row); break;
            case JENSEN_SHANNON: divergence_of_row(JENSEN_SHANNON, d, row); break;
            default: divergence_of_row(TOTAL_VARIATION, d, row);
        }
}

typedef struct {
    Floats ours, theirs;   /* raw logits [C, V] */
    const int64_t *target; /* [C] */
    float *out;            /* [4, C] in nats: log p and log q of the target, the entropy of p, KL(p | q) */
    int64_t c, v;          /* V a multiple of 16 */
    float cap, scale;
} Comparison;

AVX512 INLINE float logprob(Floats raw, int64_t i, Transform f, __m512 below) {
    const __m512 r = load_some(raw, i, 1);
    return LN_2 * _mm512_cvtss_f32(transformed(r, f, below, NULL));
}

AVX512 INLINE void compare_row(const Comparison *a, int64_t row) {
    const Transform f = {a->cap, a->scale};
    const int64_t from = row * a->v, at = from + a->target[row];
    const __m512 below_p = _mm512_set1_ps(normaliser_of_row(a->ours, from, a->v, f));
    const __m512 below_q = _mm512_set1_ps(normaliser_of_row(a->theirs, from, a->v, f));
    __m512 entropy = _mm512_setzero_ps(), kl = _mm512_setzero_ps();
    for (int64_t i = from; i < from + a->v; i += LANES) {
        const __m512 log_p = transformed(load(a->ours, i), f, below_p, NULL), p = power_of_two(log_p);
        const __m512 log_q = transformed(load(a->theirs, i), f, below_q, NULL);
        entropy = _mm512_fnmadd_ps(p, log_p, entropy);
        kl = _mm512_fmadd_ps(p, _mm512_sub_ps(log_p, log_q), kl);
    }
    a->out[row] = logprob(a->ours, at, f, below_p);
    a->out[a->c + row] = logprob(a->theirs, at, f, below_q);
    a->out[2 * a->c + row] = LN_2 * _mm512_reduce_add_ps(entropy);
    a->out[3 * a->c + row] = LN_2 * _mm512_reduce_add_ps(kl);
}

/* Two distributions beside each other, row by row. */
AVX512 EXPORT void cabochon_compare(const Comparison *a) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < a->c; row++) compare_row(a, row);
}
