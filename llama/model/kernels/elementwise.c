// What lies between the products, row by row, on bfloat16: each computes what llama/model/elementwise.py defines, in one
// pass over the row instead of many. Rounded to bfloat16 where the definition is; a row's bits depend on the row alone.

#include <math.h>

#include "kernels.h"
#include "vectors.h"

#define EACH_ROW(rows) _Pragma("omp parallel for num_threads(threads) if (rows > 8)") for (int64_t row = 0; row < rows; row++)

INLINE __m512 rounded(__m512 values) {
    __m512i halves = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
}

// scale[row] = 1 / sqrt(mean(x²) + eps)
void norm_scale(const uint16_t *x, float *scale, int64_t rows, int64_t size, float eps, int threads) {
    EACH_ROW(rows) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < size; k += 16) {
            __m512 value = from_bf16(x + row * size + k);
            sum = _mm512_fmadd_ps(value, value, sum);
        }
        scale[row] = 1 / sqrtf(_mm512_reduce_add_ps(sum) / size + eps);
    }
}

// y = weight · (x · scale)
void normalise(const uint16_t *x, const float *scale, const uint16_t *weight, uint16_t *y, int64_t rows, int64_t size,
               int threads) {
    EACH_ROW(rows)
        for (int64_t k = 0; k < size; k += 16) {
            __m512 scaled = rounded(_mm512_mul_ps(from_bf16(x + row * size + k), _mm512_set1_ps(scale[row])));
            to_bf16(y + row * size + k, _mm512_mul_ps(from_bf16(weight + k), scaled));
        }
}

// y = silu(gate) · up, whose rows are `stride` apart
void swiglu(const uint16_t *gate, const uint16_t *up, uint16_t *y, int64_t rows, int64_t size, int64_t stride, int threads) {
    EACH_ROW(rows)
        for (int64_t k = 0; k < size; k += 16) {
            __m512 g = from_bf16(gate + row * stride + k);
            __m512 silu = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), g))));
            to_bf16(y + row * size + k, _mm512_mul_ps(rounded(silu), from_bf16(up + row * stride + k)));
        }
}

// Each head's halves turned by its token's angles. x: [rows, heads, 2 half], rows `stride` apart; cos, sin: [rows, half].
void rotate(const uint16_t *x, const float *cos, const float *sin, uint16_t *y, int64_t rows, int64_t heads, int64_t half,
            int64_t stride, int threads) {
    EACH_ROW(rows)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t k = 0; k < half; k += 16) {
                const uint16_t *from = x + row * stride + head * 2 * half + k;
                uint16_t *to = y + (row * heads + head) * 2 * half + k;
                __m512 first = from_bf16(from), second = from_bf16(from + half);
                __m512 c = _mm512_loadu_ps(cos + row * half + k), s = _mm512_loadu_ps(sin + row * half + k);
                to_bf16(to, _mm512_sub_ps(_mm512_mul_ps(first, c), _mm512_mul_ps(second, s)));
                to_bf16(to + half, _mm512_add_ps(_mm512_mul_ps(second, c), _mm512_mul_ps(first, s)));
            }
}
