// Sixteen numbers at a time: what the kernels share.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 from_bf16(const uint16_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}

INLINE void to_bf16(void *at, __m512 values) { _mm256_storeu_si256(at, (__m256i)_mm512_cvtneps_pbh(values)); }

// e to the power of each from -87 to 88, to an ulp or two: 2 to the power of n + f, the latter by a polynomial.
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(t, 0), f = _mm512_mul_ps(_mm512_sub_ps(t, n), _mm512_set1_ps(0.693147181f));
    const float factors[] = {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
    __m512 sum = _mm512_set1_ps(factors[0]);
    for (int i = 1; i < 7; i++) sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(sum, n);
}

// Bfloat16 as int8 times a scale, which is returned, so that the largest of them is 127 or -127.
INLINE float quantise_bf16(const uint16_t *from, int64_t length, int8_t *to) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t k = 0; k < length; k += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(from_bf16(from + k)));
    float most = _mm512_reduce_max_ps(largest);
    __m512 factor = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    for (int64_t k = 0; k < length; k += 16) {
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(from_bf16(from + k), factor));
        _mm_storeu_si128((__m128i *)(to + k), _mm512_cvtsepi32_epi8(rounded));
    }
    return most / 127.0f;
}
