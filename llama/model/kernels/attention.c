// Decode attention: one query of each sequence over all of its keys, read once, where they lie in the cache.
//
// llama/model/attention.py's `attend` is the definition. A query's context is cut into SPLITs of fixed length, each of
// which a thread computes by itself; then the parts are joined by their softmax sums (arXiv:2205.14135). So the result
// is the same bits whatever else is computed beside it, on however many threads.

#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels.h"
#include "vectors.h"

#define UNROLL _Pragma("GCC unroll 4")  // so that the sums stay in registers

enum { SPLIT = 256, AHEAD = 32 };  // slots: of a part; how far ahead they are fetched

// A part: for each head its largest score, the sum of exponentials, and the mix of values that they weigh.
static int64_t part_floats(const Attention *a) { return a->num_heads * (2 + a->head_dim); }
static int64_t splits(int64_t length) { return (length + SPLIT - 1) / SPLIT; }
static int64_t thread_floats(const Attention *a) { return a->num_heads * SPLIT; }

int64_t attention_scratch(const Attention *a) {
    int64_t parts = 0;
    for (int64_t i = 0; i < a->queries; i++) parts += splits(a->length[i]);
    return parts * part_floats(a) + a->threads * thread_floats(a);
}

// 16 elements of a head in a slot, without their scale.
INLINE __m512 cached(const void *cache, int64_t at, int kind) {
    if (kind == BF16) return from_bf16((const uint16_t *)cache + at);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)cache + at))));
}

// A head of up to `count` slots of the `left` ones from here, before they are needed: a few lines at a time, for a burst of
// them would wait for itself.
INLINE void fetch(const Attention *a, const void *cache, const int32_t *slots, int64_t left, int count, int64_t kv_head,
                  int kind) {
    int64_t bytes = a->head_dim * (kind == BF16 ? 2 : 1);
    for (int i = 0; i < count && i < left; i++)
        for (int64_t j = 0; j < bytes; j += 64)
            _mm_prefetch((const char *)cache + ((int64_t)slots[i] * a->num_kv_heads + kv_head) * bytes + j, _MM_HINT_T1);
}

// The sums of four vectors.
INLINE __m128 four_sums(const __m512 v[4]) {
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

// The scores of up to four heads for up to four slots of one key head, each where it belongs: scores[g * SPLIT + j].
INLINE void score_some(const Attention *a, const uint16_t *q, const int64_t place[4], int kind, int heads, float *scores) {
    __m512 sum[4][4];
    UNROLL for (int g = 0; g < heads; g++)
        UNROLL for (int j = 0; j < 4; j++) sum[g][j] = _mm512_setzero_ps();
    if (kind == BF16)  // 32 elements at a time, multiplied as they are
        for (int64_t d = 0; d < a->head_dim; d += 32) {
            __m512bh k[4];
            UNROLL for (int j = 0; j < 4; j++)
                k[j] = (__m512bh)_mm512_loadu_si512((const uint16_t *)a->keys + place[j] * a->head_dim + d);
            UNROLL for (int g = 0; g < heads; g++) {
                __m512bh part = (__m512bh)_mm512_loadu_si512(q + g * a->head_dim + d);
                UNROLL for (int j = 0; j < 4; j++) sum[g][j] = _mm512_dpbf16_ps(sum[g][j], part, k[j]);
            }
        }
    else
        for (int64_t d = 0; d < a->head_dim; d += LANES) {
            __m512 k[4];
            UNROLL for (int j = 0; j < 4; j++) k[j] = cached(a->keys, place[j] * a->head_dim + d, kind);
            UNROLL for (int g = 0; g < heads; g++) {
                __m512 part = from_bf16(q + g * a->head_dim + d);
                UNROLL for (int j = 0; j < 4; j++) sum[g][j] = _mm512_fmadd_ps(part, k[j], sum[g][j]);
            }
        }
    UNROLL for (int g = 0; g < heads; g++) {
        __m128 four = four_sums(sum[g]);
        if (kind == INT8)
            four = _mm_mul_ps(four, _mm_setr_ps(a->key_scale[place[0]], a->key_scale[place[1]], a->key_scale[place[2]],
                                                a->key_scale[place[3]]));
        _mm_storeu_ps(scores + g * SPLIT, four);
    }
}

// Those of a group of heads for up to four slots: scores[g * SPLIT + j].
INLINE void score(const Attention *a, const uint16_t *q, const int32_t *slots, int count, int64_t kv_head, int kind,
                  float *scores) {
    int group = a->num_heads / a->num_kv_heads;
    int64_t place[4];
    for (int j = 0; j < 4; j++)  // beyond the last, the last again
        place[j] = (int64_t)slots[j < count ? j : count - 1] * a->num_kv_heads + kv_head;
    for (int g = 0; g < group; g += 4)
        if (group - g >= 4)  // the usual number, as a constant
            score_some(a, q + g * a->head_dim, place, kind, 4, scores + g * SPLIT);
        else
            score_some(a, q + g * a->head_dim, place, kind, group - g, scores + g * SPLIT);
}

// Scores to weights of one head; its largest score and the sum of the weights.
INLINE void soften(float *scores, int64_t count, float factor, float *largest, float *total) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        __mmask16 mask = count - i < LANES ? (1 << (count - i)) - 1 : 0xffff;
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(factor));
        scaled = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, scaled);
        _mm512_storeu_ps(scores + i, scaled);
        most = _mm512_max_ps(most, scaled);
    }
    *largest = _mm512_reduce_max_ps(most);
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(*largest));
        // Less than e**-80 is nothing: what would come of it is too small to be a normal number, and those are slow.
        __m512 weight = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(below, _mm512_set1_ps(-80.0f), _CMP_GT_OQ),
                                            exponential(below));
        _mm512_storeu_ps(scores + i, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    *total = _mm512_reduce_add_ps(sum);
}

// Weights to bfloat16, in place, for values in bfloat16: as in every fused attention, so that two slots are one product.
INLINE void narrow(float *weights, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) to_bf16((uint16_t *)weights + i, _mm512_loadu_ps(weights + i));
}

// Add the values of up to 16 slots from `at` on, weighed, of up to four heads and 64 elements of a value head.
INLINE void mix_bf16(const Attention *a, const int32_t *slots, int64_t at, int count, int64_t kv_head, int64_t from,
                     int heads, int width, const float *weights, float *mixed) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                           36, 4, 35, 3, 34, 2, 33, 1, 32, 0);  // the slots' elements by turns
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    __m512 sum[4][4];
    UNROLL for (int g = 0; g < heads; g++)
        UNROLL for (int d = 0; d < width; d++) sum[g][d] = _mm512_loadu_ps(mixed + g * a->head_dim + d * LANES);
    for (int i = 0; i < count; i += 2) {
        int64_t here = slots[at + i], next = slots[at + (i + 1 < count ? i + 1 : i)];  // after the last, again it, by 0
        const uint16_t *one = (const uint16_t *)a->values + (here * a->num_kv_heads + kv_head) * a->head_dim + from;
        const uint16_t *other = (const uint16_t *)a->values + (next * a->num_kv_heads + kv_head) * a->head_dim + from;
        __m512bh v[4];
        UNROLL for (int d = 0; d < width; d += 2) {
            __m512i ours = _mm512_loadu_si512(one + d * LANES), theirs = _mm512_loadu_si512(other + d * LANES);
            v[d] = (__m512bh)_mm512_permutex2var_epi16(ours, first, theirs);
            v[d + 1] = (__m512bh)_mm512_permutex2var_epi16(ours, second, theirs);
        }
        UNROLL for (int g = 0; g < heads; g++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t *)((const uint16_t *)(weights + g * SPLIT) + at + i));
            UNROLL for (int d = 0; d < width; d++) sum[g][d] = _mm512_dpbf16_ps(sum[g][d], v[d], pair);
        }
    }
    UNROLL for (int g = 0; g < heads; g++)
        UNROLL for (int d = 0; d < width; d++) _mm512_storeu_ps(mixed + g * a->head_dim + d * LANES, sum[g][d]);
}

// The same of values in int8, whose scales join the weights.
INLINE void mix_int8(const Attention *a, const int32_t *slots, int64_t at, int count, int64_t kv_head, int64_t from,
                     int heads, int width, const float *weights, float *mixed) {
    __m512 sum[4][4];
    UNROLL for (int g = 0; g < heads; g++)
        UNROLL for (int d = 0; d < width; d++) sum[g][d] = _mm512_loadu_ps(mixed + g * a->head_dim + d * LANES);
    for (int i = 0; i < count; i++) {
        int64_t place = (int64_t)slots[at + i] * a->num_kv_heads + kv_head;
        __m512 v[4];
        UNROLL for (int d = 0; d < width; d++) v[d] = cached(a->values, place * a->head_dim + from + d * LANES, INT8);
        UNROLL for (int g = 0; g < heads; g++) {
            __m512 weight = _mm512_set1_ps(weights[g * SPLIT + at + i] * a->value_scale[place]);
            UNROLL for (int d = 0; d < width; d++) sum[g][d] = _mm512_fmadd_ps(weight, v[d], sum[g][d]);
        }
    }
    UNROLL for (int g = 0; g < heads; g++)
        UNROLL for (int d = 0; d < width; d++) _mm512_storeu_ps(mixed + g * a->head_dim + d * LANES, sum[g][d]);
}

INLINE void mix_some(const Attention *a, const int32_t *slots, int64_t at, int count, int64_t kv_head, int64_t from, int kind,
                     int heads, int width, const float *weights, float *mixed) {
    if (kind == BF16)
        mix_bf16(a, slots, at, count, kv_head, from, heads, width, weights, mixed);
    else
        mix_int8(a, slots, at, count, kv_head, from, heads, width, weights, mixed);
}

// The same of all of a group of heads.
INLINE void mix(const Attention *a, const int32_t *slots, int64_t at, int count, int64_t kv_head, int kind,
                const float *weights, float *mixed) {
    int64_t group = a->num_heads / a->num_kv_heads, dim = a->head_dim;
    for (int64_t d = 0; d < dim; d += 4 * LANES)
        for (int64_t g = 0; g < group; g += 4) {
            int heads = group - g < 4 ? group - g : 4, width = dim - d < 4 * LANES ? (dim - d) / LANES : 4;
            if (heads == 4 && width == 4)  // the usual numbers, as constants
                mix_some(a, slots, at, count, kv_head, d, kind, 4, 4, weights + g * SPLIT, mixed + g * dim + d);
            else
                mix_some(a, slots, at, count, kv_head, d, kind, heads, width, weights + g * SPLIT, mixed + g * dim + d);
        }
}

INLINE void split(const Attention *a, int64_t query, int64_t start, float *part, float *scores, int kind) {
    int64_t count = a->length[query] - start < SPLIT ? a->length[query] - start : SPLIT;
    int64_t group = a->num_heads / a->num_kv_heads, dim = a->head_dim;
    const int32_t *slots = a->slots + a->first[query] + start;
    const uint16_t *q = a->q + a->rows[query] * a->num_heads * dim;
    float *mixed = part + 2 * a->num_heads;
    for (int64_t i = 0; i < count; i += 4)
        for (int64_t h = 0; h < a->num_kv_heads; h++) {
            fetch(a, a->keys, slots + i + AHEAD, count - i - AHEAD, 4, h, kind);
            score(a, q + h * group * dim, slots + i, count - i < 4 ? count - i : 4, h, kind, scores + h * group * SPLIT + i);
        }
    for (int64_t h = 0; h < a->num_heads; h++) {
        soften(scores + h * SPLIT, count, 1 / sqrtf(dim), part + h, part + a->num_heads + h);
        if (kind == BF16) narrow(scores + h * SPLIT, count);
    }
    memset(mixed, 0, a->num_heads * dim * sizeof(float));
    for (int64_t i = 0; i < count; i += LANES) {
        for (int64_t h = 0; h < a->num_kv_heads; h++) {
            fetch(a, a->values, slots + i + AHEAD, count - i - AHEAD, LANES, h, kind);
            mix(a, slots, i, count - i < LANES ? count - i : LANES, h, kind, scores + h * group * SPLIT,
                mixed + h * group * dim);
        }
    }
}

// One split of one query.
static void any_split(const Attention *a, int64_t query, int64_t start, float *part, float *scores) {
    if (a->kind == BF16)
        split(a, query, start, part, scores, BF16);
    else
        split(a, query, start, part, scores, INT8);
}

// The parts of one query as one softmax, in the order of the context.
static void join(const Attention *a, int64_t query, const float *parts) {
    int64_t count = splits(a->length[query]);
    for (int64_t h = 0; h < a->num_heads; h++) {
        float largest = -INFINITY, total = 0;
        for (int64_t s = 0; s < count; s++) largest = fmaxf(largest, parts[s * part_floats(a) + h]);
        for (int64_t s = 0; s < count; s++) {
            const float *part = parts + s * part_floats(a);
            total += part[a->num_heads + h] * expf(part[h] - largest);
        }
        for (int64_t d = 0; d < a->head_dim; d += LANES) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t s = 0; s < count; s++) {
                const float *part = parts + s * part_floats(a);
                __m512 mixed = _mm512_loadu_ps(part + 2 * a->num_heads + h * a->head_dim + d);
                sum = _mm512_fmadd_ps(mixed, _mm512_set1_ps(expf(part[h] - largest) / total), sum);
            }
            uint16_t *out = a->out + (a->rows[query] * a->num_heads + h) * a->head_dim + d;
            to_bf16(out, sum);
        }
    }
}

void attention(const Attention *a) {
    int64_t most = 0;
    for (int64_t i = 0; i < a->queries; i++) most = a->length[i] > most ? a->length[i] : most;
    int64_t begins[a->queries];  // each query's first part
    for (int64_t i = 0, sum = 0; i < a->queries; sum += splits(a->length[i]), i++) begins[i] = sum;
    float *rooms = a->scratch + (begins[a->queries - 1] + splits(a->length[a->queries - 1])) * part_floats(a);
    _Pragma("omp parallel num_threads(a->threads)") {
        float *room = rooms + omp_get_thread_num() * thread_floats(a);
        _Pragma("omp for collapse(2) schedule(dynamic)")
        for (int64_t query = 0; query < a->queries; query++)
            for (int64_t s = 0; s < splits(most); s++)
                if (s * SPLIT < a->length[query])
                    any_split(a, query, s * SPLIT, a->scratch + (begins[query] + s) * part_floats(a), room);
        _Pragma("omp for schedule(dynamic)")
        for (int64_t query = 0; query < a->queries; query++)
            join(a, query, a->scratch + begins[query] * part_floats(a));
    }
}
