// Rows of W into blocks, as llama/model/formats.py defines them: rounding and layout in one pass, while a file is read.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BF16, INT8, INT4, LANES = 16, GROUP = 32, GROUP_BYTES = 320, SHRINKS = 5 };

static const float shrinks[SHRINKS] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};
static const float insets[SHRINKS] = {0.0f, 0.025f, 0.05f, 0.075f, 0.1f};  // half of what is left out

static float through_half(float value) { return _cvtsh_ss(_cvtss_sh(value, 0)); }

static void bf16_row(const float *w, int64_t columns, uint8_t *block, int lane) {
    for (int64_t k = 0; k < columns; k += 16) {
        uint32_t pairs[8];
        _mm256_storeu_si256((__m256i *)pairs, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(w + k)));
        for (int j = 0; j < 8; j++) ((uint32_t *)block)[(k / 2 + j) * LANES + lane] = pairs[j];
    }
}

static float int8_row(const float *w, int64_t columns, uint8_t *block, int lane) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < columns; k += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(w + k)));
    float largest = _mm512_reduce_max_ps(most);
    float factor = largest > 0 ? 127.0f / largest : 0.0f;
    for (int64_t k = 0; k < columns; k += 16) {
        uint32_t quads[4];
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + k), _mm512_set1_ps(factor)));
        __m128i plus_128 = _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(128)));
        _mm_storeu_si128((__m128i *)quads, plus_128);
        for (int j = 0; j < 4; j++) ((uint32_t *)block)[(k / 4 + j) * LANES + lane] = quads[j];
    }
    return largest / 127.0f;
}

// Of several ranges for a group, that with the least square error: its scale and low, and the numbers 0 to 15.
static void best_range(const float *w, float *best_scale, float *best_low, uint8_t q[GROUP]) {
    __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
    float least = _mm512_reduce_min_ps(_mm512_min_ps(w0, w1)), most = _mm512_reduce_max_ps(_mm512_max_ps(w0, w1));
    float best_error = INFINITY;
    for (int i = 0; i < SHRINKS; i++) {
        float low = through_half(least + insets[i] * (most - least));
        float scale = through_half((most - least) * shrinks[i] / 15);
        const __m512 lows = _mm512_set1_ps(low), scales = _mm512_set1_ps(scale), top = _mm512_set1_ps(15);
        __m512 q0 = _mm512_setzero_ps(), q1 = q0;
        if (scale > 0) {
            q0 = _mm512_div_ps(_mm512_sub_ps(w0, lows), scales), q1 = _mm512_div_ps(_mm512_sub_ps(w1, lows), scales);
            q0 = _mm512_min_ps(_mm512_max_ps(_mm512_roundscale_ps(q0, 0), _mm512_setzero_ps()), top);
            q1 = _mm512_min_ps(_mm512_max_ps(_mm512_roundscale_ps(q1, 0), _mm512_setzero_ps()), top);
        }
        __m512 e0 = _mm512_fmadd_ps(q0, scales, _mm512_sub_ps(lows, w0));
        __m512 e1 = _mm512_fmadd_ps(q1, scales, _mm512_sub_ps(lows, w1));
        float error = _mm512_reduce_add_ps(_mm512_fmadd_ps(e0, e0, _mm512_mul_ps(e1, e1)));
        if (error < best_error) {
            best_error = error, *best_scale = scale, *best_low = low;
            _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q0)));
            _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q1)));
        }
    }
}

static void int4_row(const float *w, int64_t columns, uint8_t *block, int lane) {
    for (int64_t k = 0; k < columns; k += GROUP, block += GROUP_BYTES) {
        uint8_t q[GROUP];
        float scale, low;
        best_range(w + k, &scale, &low, q);
        for (int j = 0; j < 16; j++) block[j / 4 * 64 + lane * 4 + j % 4] = q[j] | q[j + 16] << 4;
        uint16_t ends[2] = {_cvtss_sh(scale, 0), _cvtss_sh(low, 0)};
        memcpy(block + 256 + 2 * lane, ends, 2);
        memcpy(block + 288 + 2 * lane, ends + 1, 2);
    }
}

// w: [rows, columns], rows a multiple of 16. blocks: [rows / 16, block_bytes]. scale: [rows], INT8 only.
void pack(int32_t format, const float *w, int64_t rows, int64_t columns, int64_t block_bytes, uint8_t *blocks, float *scale) {
    for (int64_t row = 0; row < rows; row++, w += columns) {
        uint8_t *block = blocks + row / LANES * block_bytes;
        if (format == BF16)
            bf16_row(w, columns, block, row % LANES);
        else if (format == INT8)
            scale[row] = int8_row(w, columns, block, row % LANES);
        else
            int4_row(w, columns, block, row % LANES);
    }
}
