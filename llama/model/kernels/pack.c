// Rows of W into blocks, as llama/model/formats.py defines them: rounding and layout in one pass, while a file is read.
//
// A block is 16 rows of W, and a vector has 16 lanes: what was read row by row is turned, so that each lane is a row.

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "vectors.h"

enum { FLOAT, BFLOAT, HALF };  // what is packed
enum { GROUP = 32, GROUP_BYTES = 320, SHRINKS = 5 };

static const float shrinks[SHRINKS] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};
static const float insets[SHRINKS] = {0.0f, 0.025f, 0.05f, 0.075f, 0.1f};  // half of what is left out

// Sixteen numbers of a tensor.
INLINE __m512 number16(const void *w, int64_t at, int kind) {
    if (kind == FLOAT) return _mm512_loadu_ps((const float *)w + at);
    if (kind == BFLOAT) return from_bf16((const uint16_t *)w + at);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)w + at)));
}

// Sixteen vectors of 32-bit numbers as a matrix, turned: halves, then quarters of the rows change places, and so on.
INLINE void turn(__m512i v[16]) {
    __m512i t[16];
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

INLINE void store_turned(__m512i v[16], uint8_t *block) {
    turn(v);
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) _mm512_storeu_si512(block + 64 * i, v[i]);
}

INLINE void bf16_block(const void *w, int64_t at, int64_t columns, uint8_t *block, int kind) {
    for (int64_t k = 0; k < columns; k += 32, block += 1024) {
        __m512i v[LANES];
        _Pragma("GCC unroll 16") for (int row = 0; row < LANES; row++) {
            int64_t from = at + row * columns + k;
            v[row] = kind == BFLOAT ? _mm512_loadu_si512((const uint16_t *)w + from)
                                    : (__m512i)_mm512_cvtne2ps_pbh(number16(w, from + 16, kind), number16(w, from, kind));
        }
        store_turned(v, block);
    }
}

INLINE void int8_block(const void *w, int64_t at, int64_t columns, uint8_t *block, float *scale, int kind) {
    float factor[LANES];
    for (int row = 0; row < LANES; row++) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t k = 0; k < columns; k += 16)
            most = _mm512_max_ps(most, _mm512_abs_ps(number16(w, at + row * columns + k, kind)));
        float largest = _mm512_reduce_max_ps(most);
        factor[row] = largest > 0 ? 127.0f / largest : 0.0f;
        scale[row] = largest / 127.0f;
    }
    for (int64_t k = 0; k < columns; k += 64, block += 1024) {
        __m512i v[LANES];
        for (int row = 0; row < LANES; row++) {
            __m128i part[4];
            for (int j = 0; j < 4; j++) {
                __m512 scaled = _mm512_mul_ps(number16(w, at + row * columns + k + 16 * j, kind), _mm512_set1_ps(factor[row]));
                part[j] = _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128)));
            }
            memcpy(&v[row], part, 64);
        }
        store_turned(v, block);
    }
}

INLINE __m512 through_half(__m512 value) { return _mm512_cvtph_ps(_mm512_cvtps_ph(value, 0)); }

// A group of each row: of several ranges, that with the least square error. w: [columns], a lane for each row; the numbers
// 0 to 15 take their place. The rows' scales and lows are returned.
static void best_ranges(__m512 w[GROUP], __m512 *best_scale, __m512 *best_low) {
    const __m512 top = _mm512_set1_ps(15), none = _mm512_setzero_ps();
    __m512 least = w[0], most = w[0], best_error = _mm512_set1_ps(INFINITY);
    for (int j = 1; j < GROUP; j++) least = _mm512_min_ps(least, w[j]), most = _mm512_max_ps(most, w[j]);
    __m512 width = _mm512_sub_ps(most, least), best[GROUP];
    for (int i = 0; i < SHRINKS; i++) {
        __m512 low = through_half(_mm512_add_ps(least, _mm512_mul_ps(_mm512_set1_ps(insets[i]), width)));
        __m512 scale = through_half(_mm512_div_ps(_mm512_mul_ps(width, _mm512_set1_ps(shrinks[i])), top));
        __mmask16 some = _mm512_cmp_ps_mask(scale, none, _CMP_GT_OQ);
        __m512 q[GROUP], error = none;
        for (int j = 0; j < GROUP; j++) {
            q[j] = _mm512_maskz_div_ps(some, _mm512_sub_ps(w[j], low), scale);
            q[j] = _mm512_min_ps(_mm512_max_ps(_mm512_roundscale_ps(q[j], 0), none), top);
            __m512 off = _mm512_fmadd_ps(q[j], scale, _mm512_sub_ps(low, w[j]));
            error = _mm512_fmadd_ps(off, off, error);
        }
        __mmask16 better = _mm512_cmp_ps_mask(error, best_error, _CMP_LT_OQ);
        best_error = _mm512_mask_mov_ps(best_error, better, error);
        *best_scale = i ? _mm512_mask_mov_ps(*best_scale, better, scale) : scale;
        *best_low = i ? _mm512_mask_mov_ps(*best_low, better, low) : low;
        for (int j = 0; j < GROUP; j++) best[j] = i ? _mm512_mask_mov_ps(best[j], better, q[j]) : q[j];
    }
    memcpy(w, best, sizeof best);
}

INLINE void int4_block(const void *w, int64_t at, int64_t columns, uint8_t *block, int kind) {
    for (int64_t k = 0; k < columns; k += GROUP, block += GROUP_BYTES) {
        __m512i v[GROUP];
        for (int row = 0; row < LANES; row++)
            for (int half = 0; half < 2; half++)
                v[half * 16 + row] = _mm512_castps_si512(number16(w, at + row * columns + k + 16 * half, kind));
        turn(v), turn(v + 16);
        __m512 scale, low;
        best_ranges((__m512 *)v, &scale, &low);
        for (int quad = 0; quad < 4; quad++) {
            __m512i bytes = _mm512_setzero_si512();
            for (int j = 0; j < 4; j++) {
                __m512i first = _mm512_cvtps_epi32((__m512)v[4 * quad + j]), second = _mm512_cvtps_epi32((__m512)v[16 + 4 * quad + j]);
                __m512i both = _mm512_or_si512(first, _mm512_slli_epi32(second, 4));
                bytes = _mm512_or_si512(bytes, _mm512_sllv_epi32(both, _mm512_set1_epi32(8 * j)));
            }
            _mm512_storeu_si512(block + 64 * quad, bytes);
        }
        _mm256_storeu_si256((__m256i *)(block + 256), _mm512_cvtps_ph(scale, 0));
        _mm256_storeu_si256((__m256i *)(block + 288), _mm512_cvtps_ph(low, 0));
    }
}

INLINE void some_blocks(int32_t format, const void *w, int64_t rows, int64_t columns, int64_t block_bytes, uint8_t *blocks,
                        float *scale, int kind) {
    for (int64_t row = 0; row < rows; row += LANES, blocks += block_bytes)
        if (format == BF16)
            bf16_block(w, row * columns, columns, blocks, kind);
        else if (format == INT8)
            int8_block(w, row * columns, columns, blocks, scale + row, kind);
        else
            int4_block(w, row * columns, columns, blocks, kind);
}

// w: [rows, columns] of FLOAT, BFLOAT or HALF, rows a multiple of 16. blocks: [rows / 16, block_bytes]. scale: [rows], INT8
// only.
void pack(int32_t format, int32_t kind, const void *w, int64_t rows, int64_t columns, int64_t block_bytes, uint8_t *blocks,
          float *scale) {
    if (kind == FLOAT) some_blocks(format, w, rows, columns, block_bytes, blocks, scale, FLOAT);
    if (kind == BFLOAT) some_blocks(format, w, rows, columns, block_bytes, blocks, scale, BFLOAT);
    if (kind == HALF) some_blocks(format, w, rows, columns, block_bytes, blocks, scale, HALF);
}
