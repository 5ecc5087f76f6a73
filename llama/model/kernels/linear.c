// y = x Wᵀ for packed weights, on x86-64 with AVX-512 and, where there is one, the matrix unit AMX.
//
// llama/model/formats.py defines the numbers and the layouts; this computes the same, fast. A block is 16 rows of W.
// In it, what is multiplied together lies together: 16 rows × 4 bytes (2 bfloat16, 4 int8) make a vector of 64 bytes,
// and 16 such vectors a tile of AMX. So one copy of W serves one row of x and a thousand.
//
// A row of y is the same bits whatever other rows are computed beside it, by either kernel for the integer formats:
// sums run in the order of the columns, and integer sums are exact.

#include <omp.h>
#include <string.h>

#include "kernels.h"
#include "vectors.h"

// How far ahead W is fetched, in bytes. AMD's processors, which alone have CLZERO, do better by themselves.
#ifdef __CLZERO__
#define AHEAD 0
#else
#define AHEAD 4096
#endif

enum {
    ROWS = 8,               // rows of x that share one reading of a block in vector registers
    GROUP = 32,             // columns of int4 weights that share a scale
    GROUP_BYTES = 320,      // 256 of nibbles, 16 scales and 16 lows in float16
    FEW = 8, MANY = 16,     // blocks that a thread takes at a time, when there are few rows of x or many
    DEPTH = 1024,           // bytes of each row of x that are worked through at a time when there are many
    PAD = 64,               // bytes between rows of x, so that they do not all fall into one set of the cache
};

// What is made of x in the scratch memory, and room for each thread.
typedef struct {
    const uint8_t *x;               // [tiles * LANES, stride] bytes: bfloat16 or int8
    int64_t stride, tiles;
    const float *scale;             // [tiles, groups, lanes]; a group is the whole row in INT8
    const float *sum;               // the same: sums of the int8, in INT4 times their scale
    int64_t groups, lanes;
    uint8_t *room;
    int64_t room_bytes;             // of one thread
} Input;

static int64_t groups_of(const Product *p) { return p->format == INT4 ? p->ins / GROUP : 1; }
static int64_t row_bytes(const Product *p) { return p->format == BF16 ? 2 * p->ins : p->ins; }

static Input lay_out(const Product *p) {
    Input in = {.x = p->scratch, .stride = row_bytes(p) + PAD, .groups = groups_of(p)};
    in.tiles = (p->rows + LANES - 1) / LANES;
    in.lanes = p->kernel == VECTORS && p->rows < LANES ? p->rows : LANES;  // close together, for the smallest cache
    int64_t scales = in.tiles * in.groups * in.lanes;
    in.scale = (const float *)(in.x + in.tiles * LANES * in.stride);
    in.sum = in.scale + scales;
    in.room = (uint8_t *)(in.sum + scales);
    in.room_bytes = p->kernel == VECTORS ? 0 : p->format == INT4 ? LANES * p->ins : MANY * in.tiles * 1024;
    return in;
}

int64_t scratch_bytes(const Product *p) {
    Input in = lay_out(&(Product){.format = p->format, .kernel = p->kernel, .rows = p->rows, .ins = p->ins});
    return (int64_t)in.room + p->threads * in.room_bytes;
}

// ---- x ---------------------------------------------------------------------------------------------------------

INLINE __m512 load16(const Product *p, int64_t at) {
    if (p->x_wide) return _mm512_loadu_ps((const float *)p->x + at);
    return from_bf16((const uint16_t *)p->x + at);
}

// A group of one row as int8 times a scale, so that its largest element is 127 or -127.
INLINE void quantise(const Product *p, const Input *in, int64_t row, int64_t group, int64_t length) {
    int64_t from = row * p->ins + group * length;
    int64_t at = (row / LANES * in->groups + group) * in->lanes + row % LANES;
    int8_t *to = (int8_t *)in->x + row * in->stride + group * length;
    __m512 largest = _mm512_setzero_ps();
    for (int64_t k = 0; k < length; k += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(load16(p, from + k)));
    float most = _mm512_reduce_max_ps(largest);
    __m512 factor = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < length; k += 16) {
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load16(p, from + k), factor));
        sum = _mm512_add_epi32(sum, rounded);
        _mm_storeu_si128((__m128i *)(to + k), _mm512_cvtsepi32_epi8(rounded));
    }
    float scale = most / 127.0f, total = (float)_mm512_reduce_add_epi32(sum);
    ((float *)in->scale)[at] = scale;
    ((float *)in->sum)[at] = p->format == INT4 ? scale * total : total;
}

static void prepare_row(const Product *p, const Input *in, int64_t row) {
    if (p->format == BF16)
        for (int64_t k = 0; k < p->ins; k += 16)
            to_bf16((uint8_t *)in->x + row * in->stride + 2 * k, load16(p, row * p->ins + k));
    else if (p->format == INT8)
        quantise(p, in, row, 0, p->ins);
    else
        for (int64_t group = 0; group < in->groups; group++) quantise(p, in, row, group, GROUP);
}

// ---- parts of both kernels -------------------------------------------------------------------------------------

INLINE void put(const Product *p, int64_t row, int64_t block, __m512 values) {
    int64_t at = row * p->outs + block * LANES;
    if (p->y_wide)
        _mm512_storeu_ps((float *)p->y + at, values);
    else
        to_bf16((uint16_t *)p->y + at, values);
}

INLINE void ahead(const uint8_t *from) {
    if (AHEAD) _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
}

INLINE __m512 halves(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE __m512i broadcast(const uint8_t *from) { return _mm512_set1_epi32(*(const int32_t *)from); }

// Sums over a row's int8 and W's, which are stored plus 128, as y.
INLINE __m512 int8_result(const Product *p, const Input *in, int64_t row, int64_t block, __m512i sum) {
    __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(128 * (int32_t)in->sum[row]));
    __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(in->scale[row]));
    return _mm512_mul_ps(scaled, _mm512_loadu_ps(p->scale + block * LANES));
}

// A group of 16 rows × 32 columns as 8 vectors of 16 rows × 4 columns.
INLINE void unpack_int4(const uint8_t *group, __m512i w[8]) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int j = 0; j < 4; j++) {
        __m512i both = _mm512_loadu_si512(group + 64 * j);
        w[j] = _mm512_and_si512(both, low);
        w[j + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

// What one group adds to a row of y: dot · scale · x_scale + low · x_sum.
INLINE __m512 int4_add(__m512 sum, __m512i dot, __m512 scale, __m512 low, float x_scale, float x_sum) {
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, _mm512_set1_ps(x_scale)), sum);
    return _mm512_fmadd_ps(low, _mm512_set1_ps(x_sum), sum);
}

// ---- few rows: vectors -----------------------------------------------------------------------------------------

INLINE void bf16_block(const Product *p, const Input *in, int64_t block, int64_t first, int rows) {
    const uint8_t *w = p->weight + block * LANES * 2 * p->ins;
    __m512 even[ROWS], odd[ROWS];
    for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < 2 * p->ins; k += 8, w += 128) {
        ahead(w), ahead(w + 64);
        __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 64);
        for (int r = 0; r < rows; r++) {
            const uint8_t *x = in->x + (first + r) * in->stride + k;
            even[r] = _mm512_dpbf16_ps(even[r], w0, (__m512bh)broadcast(x));
            odd[r] = _mm512_dpbf16_ps(odd[r], w1, (__m512bh)broadcast(x + 4));
        }
    }
    for (int r = 0; r < rows; r++) put(p, first + r, block, _mm512_add_ps(even[r], odd[r]));
}

INLINE void int8_block(const Product *p, const Input *in, int64_t block, int64_t first, int rows) {
    const uint8_t *w = p->weight + block * LANES * p->ins;
    __m512i even[ROWS], odd[ROWS];
    for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < p->ins; k += 8, w += 128) {
        ahead(w), ahead(w + 64);
        __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
        for (int r = 0; r < rows; r++) {
            const uint8_t *x = in->x + (first + r) * in->stride + k;
            even[r] = _mm512_dpbusd_epi32(even[r], w0, broadcast(x));
            odd[r] = _mm512_dpbusd_epi32(odd[r], w1, broadcast(x + 4));
        }
    }
    for (int r = 0; r < rows; r++)
        put(p, first + r, block, int8_result(p, in, first + r, block, _mm512_add_epi32(even[r], odd[r])));
}

INLINE void int4_block(const Product *p, const Input *in, int64_t block, int64_t first, int rows) {
    const uint8_t *w = p->weight + block * in->groups * GROUP_BYTES;
    __m512 sum[ROWS];
    for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < in->groups; g++, w += GROUP_BYTES) {
        for (int j = 0; j < GROUP_BYTES; j += 64) ahead(w + j);
        __m512i v[8];
        unpack_int4(w, v);
        __m512 scale = halves(w + 256), low = halves(w + 288);
        int64_t at = (first / LANES * in->groups + g) * in->lanes + first % LANES;
        for (int r = 0; r < rows; r++) {
            const uint8_t *x = in->x + (first + r) * in->stride + g * GROUP;
            __m512i even = _mm512_setzero_si512(), odd = even;
            for (int j = 0; j < 8; j += 2) {
                even = _mm512_dpbusd_epi32(even, v[j], broadcast(x + 4 * j));
                odd = _mm512_dpbusd_epi32(odd, v[j + 1], broadcast(x + 4 * j + 4));
            }
            sum[r] = int4_add(sum[r], _mm512_add_epi32(even, odd), scale, low, in->scale[at + r], in->sum[at + r]);
        }
    }
    for (int r = 0; r < rows; r++) put(p, first + r, block, sum[r]);
}

INLINE void some_rows(const Product *p, const Input *in, int64_t block, int64_t first, int rows) {
    if (p->format == BF16) bf16_block(p, in, block, first, rows);
    if (p->format == INT8) int8_block(p, in, block, first, rows);
    if (p->format == INT4) int4_block(p, in, block, first, rows);
}

// One block for all rows; how many at a time is a constant in each branch, so that their sums stay in registers.
static void by_vectors(const Product *p, const Input *in, int64_t block) {
    for (int64_t first = 0; first < p->rows; first += ROWS)
        switch (p->rows - first) {
            case 1: some_rows(p, in, block, first, 1); break;
            case 2: some_rows(p, in, block, first, 2); break;
            case 3: some_rows(p, in, block, first, 3); break;
            case 4: some_rows(p, in, block, first, 4); break;
            case 5: some_rows(p, in, block, first, 5); break;
            case 6: some_rows(p, in, block, first, 6); break;
            case 7: some_rows(p, in, block, first, 7); break;
            default: some_rows(p, in, block, first, ROWS);
        }
}

// ---- any number of rows: tiles ---------------------------------------------------------------------------------

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

// Ask Linux for the tile registers, which it saves only for those who do (Documentation/arch/x86/xstate.rst).
int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

// Registers 0 to 3 are sums of 16 rows of x by 16 rows of W; 4 and 5 are pieces of x, 6 and 7 of W.
static void configure(const Product *p) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        int is_x = t == 4 || t == 5, is_w = t > 5;
        tiles.bytes[t] = is_x && p->format == INT4 ? GROUP : 64;
        tiles.rows[t] = is_w ? (p->format == INT4 ? GROUP / 4 : 16) : p->rows < LANES ? p->rows : LANES;
    }
    _tile_loadconfig(&tiles);
}

// Add to the sums of two blocks with one tile of x, or with two, what `depth` bytes of each row bring.
INLINE void add_tiles(const uint8_t *w, int64_t next_block, const uint8_t *x, int64_t stride, int64_t depth,
                      uint8_t *sums, int64_t next_sums, int two, int format) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 1024, 64);
    if (two) {
        _tile_loadd(2, sums + next_sums, 64);
        _tile_loadd(3, sums + next_sums + 1024, 64);
    }
    for (int64_t k = 0; k < depth; k += 64, w += 1024) {
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + next_block, 64);
        _tile_loadd(4, x + k, stride);
        if (two) _tile_loadd(5, x + LANES * stride + k, stride);
        if (format == BF16) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (two) { _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
        } else {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            if (two) { _tile_dpbsud(2, 5, 6); _tile_dpbsud(3, 5, 7); }
        }
        if (!two)
            for (int j = 0; j < 1024; j += 64) ahead(w + j), ahead(w + next_block + j);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 1024, 64);
    if (two) {
        _tile_stored(2, sums + next_sums, 64);
        _tile_stored(3, sums + next_sums + 1024, 64);
    }
}

// An even number of blocks, BF16 or INT8. sums: [tiles of x, blocks, 16, 16].
static void by_tiles(const Product *p, const Input *in, int64_t block, int64_t blocks, uint8_t *sums) {
    int64_t length = row_bytes(p), depth = in->tiles > 4 ? DEPTH : length;
    memset(sums, 0, in->tiles * blocks * 1024);
    for (int64_t k = 0; k < length; k += depth) {
        int64_t left = length - k < depth ? length - k : depth;
        for (int64_t b = 0; b < blocks; b += 2) {
            const uint8_t *w = p->weight + ((block + b) * length + k) * LANES;
            for (int64_t t = 0; t < in->tiles; t += 2) {
                const uint8_t *x = in->x + t * LANES * in->stride + k;
                uint8_t *at = sums + (t * blocks + b) * 1024;
                int two = t + 1 < in->tiles;
                if (p->format == BF16 && two) add_tiles(w, LANES * length, x, in->stride, left, at, blocks * 1024, 1, BF16);
                else if (p->format == BF16) add_tiles(w, LANES * length, x, in->stride, left, at, blocks * 1024, 0, BF16);
                else if (two) add_tiles(w, LANES * length, x, in->stride, left, at, blocks * 1024, 1, INT8);
                else add_tiles(w, LANES * length, x, in->stride, left, at, blocks * 1024, 0, INT8);
            }
        }
    }
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t *sum = sums + ((row / LANES * blocks + b) * LANES + row % LANES) * 64;
            if (p->format == BF16)
                put(p, row, block + b, _mm512_loadu_ps(sum));
            else
                put(p, row, block + b, int8_result(p, in, row, block + b, _mm512_loadu_si512(sum)));
        }
}

// One block, INT4: its nibbles are made bytes in `panel`, once for all tiles of x, and every group's sums are scaled.
static void int4_by_tiles(const Product *p, const Input *in, int64_t block, uint8_t *panel) {
    const uint8_t *w = p->weight + block * in->groups * GROUP_BYTES;
    for (int64_t g = 0; g < in->groups; g++) {
        __m512i v[8];
        for (int j = 0; j < GROUP_BYTES; j += 64) ahead(w + g * GROUP_BYTES + j);
        unpack_int4(w + g * GROUP_BYTES, v);
        for (int j = 0; j < 8; j++) _mm512_storeu_si512(panel + g * 512 + 64 * j, v[j]);
    }
    int32_t dots[4][LANES * LANES];  // several, so that one group's need not wait for another's
    for (int64_t first = 0; first < p->rows; first += LANES) {
        __m512 sum[LANES];
        _Pragma("GCC unroll 16") for (int r = 0; r < LANES; r++) sum[r] = _mm512_setzero_ps();
        for (int64_t g = 0; g < in->groups; g++) {
            int32_t *dot = dots[g % 4];
            _tile_loadd(4, in->x + first * in->stride + g * GROUP, in->stride);
            _tile_loadd(6, panel + g * 512, 64);
            _tile_zero(0);
            _tile_dpbsud(0, 4, 6);
            _tile_stored(0, dot, 64);
            __m512 scale = halves(w + g * GROUP_BYTES + 256), low = halves(w + g * GROUP_BYTES + 288);
            const float *x_scale = in->scale + first * in->groups + g * LANES;
            const float *x_sum = in->sum + first * in->groups + g * LANES;
            _Pragma("GCC unroll 16") for (int r = 0; r < LANES; r++)
                sum[r] = int4_add(sum[r], _mm512_loadu_si512(dot + r * LANES), scale, low, x_scale[r], x_sum[r]);
        }
        _Pragma("GCC unroll 16") for (int r = 0; r < LANES; r++)
            if (first + r < p->rows) put(p, first + r, block, sum[r]);
    }
}
#else
int tiles_allowed(void) { return 0; }
static void configure(const Product *p) {}
static void by_tiles(const Product *p, const Input *in, int64_t block, int64_t blocks, uint8_t *sums) {}
static void int4_by_tiles(const Product *p, const Input *in, int64_t block, uint8_t *panel) {}
#define _tile_release()
#endif

// ---- all of it -------------------------------------------------------------------------------------------------

void product(const Product *p) {
    Input in = lay_out(p);
    int64_t blocks = p->outs / LANES, chunk = p->kernel == TILES && in.tiles > 4 && p->format != INT4 ? MANY : FEW;
    _Pragma("omp parallel num_threads(p->threads)") {
        uint8_t *room = in.room + omp_get_thread_num() * in.room_bytes;
        _Pragma("omp for")
        for (int64_t row = 0; row < p->rows; row++) prepare_row(p, &in, row);
        if (p->kernel == TILES) configure(p);
        _Pragma("omp for schedule(guided)")  // long ways through memory first
        for (int64_t block = 0; block < blocks; block += chunk) {
            int64_t count = blocks - block < chunk ? blocks - block : chunk;
            if (p->kernel == TILES && p->format != INT4)
                by_tiles(p, &in, block, count, room);
            else
                for (int64_t b = block; b < block + count; b++)
                    p->kernel == TILES ? int4_by_tiles(p, &in, b, room) : by_vectors(p, &in, b);
        }
        if (p->kernel == TILES) _tile_release();
    }
}
