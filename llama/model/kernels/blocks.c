// All blocks of a step that only decodes, in one call: llama/model/transformer.py's Block, kernel by kernel.
//
// Between two products there is little to compute, and in Python there are many calls; the weights that went through the
// processor's caches since the last of these have taken everything else out of them, the interpreter too. What is called
// here is what Python would call, in the same order, so that the results are the same bits.

#include <string.h>

#include "kernels.h"
#include "vectors.h"

typedef struct {
    int64_t format, outs, ins;
    const uint8_t *weight;
    const float *scale;
} Matrix;

typedef struct {
    Matrix qkv, out, gate_up, down;
    const uint16_t *attention_norm, *feed_forward_norm;
} Block;

typedef struct {
    const Block *blocks;
    int64_t num_blocks, rows, hidden, intermediate;
    int32_t kernels[3];             // by format, for so many rows
    float eps;
    uint16_t *x;                    // [rows, hidden]: the residual stream, in and out
    const float *cos, *sin;         // [rows, head_dim / 2]
    const int64_t *slots;           // [rows]: where their keys and values are written
    Attention attention;            // of the first block, without q, out and scratch
    int64_t num_slots;              // from one block's keys to the next one's
    uint8_t *scratch;               // blocks_scratch()
} Blocks;

// Where everything lies in the scratch memory.
typedef struct {
    uint16_t *normed, *qkv, *q, *k, *heads, *added, *gate_up, *act;
    float *scale;
    uint8_t *product, *attention, *end;
} Rooms;

static int64_t q_size(const Blocks *b) { return b->attention.num_heads * b->attention.head_dim; }
static int64_t kv_size(const Blocks *b) { return b->attention.num_kv_heads * b->attention.head_dim; }

static Product as_product(const Blocks *b, const Matrix *m) {
    return (Product){.format = m->format, .kernel = b->kernels[m->format], .threads = b->attention.threads, .rows = b->rows,
                     .outs = m->outs, .ins = m->ins, .weight = m->weight, .scale = m->scale};
}

static void *take(uint8_t **end, int64_t bytes) {
    uint8_t *room = *end;
    *end += (bytes + 63) / 64 * 64;
    return room;
}

static Rooms lay_out(const Blocks *b) {
    int64_t row = 2 * b->rows, most = 0;
    for (int64_t i = 0; i < b->num_blocks; i++) {
        const Matrix *matrices[] = {&b->blocks[i].qkv, &b->blocks[i].out, &b->blocks[i].gate_up, &b->blocks[i].down};
        for (int j = 0; j < 4; j++) {
            Product p = as_product(b, matrices[j]);
            most = scratch_bytes(&p) > most ? scratch_bytes(&p) : most;
        }
    }
    Rooms r = {.end = b->scratch};
    r.normed = take(&r.end, row * b->hidden), r.added = take(&r.end, row * b->hidden);
    r.qkv = take(&r.end, row * (q_size(b) + 2 * kv_size(b)));
    r.q = take(&r.end, row * q_size(b)), r.k = take(&r.end, row * kv_size(b)), r.heads = take(&r.end, row * q_size(b));
    r.gate_up = take(&r.end, row * 2 * b->intermediate), r.act = take(&r.end, row * b->intermediate);
    r.scale = take(&r.end, 4 * b->rows);
    r.product = take(&r.end, most), r.attention = take(&r.end, 4 * attention_scratch(&b->attention));
    return r;
}

int64_t blocks_scratch(const Blocks *b) { return (int64_t)lay_out(b).end; }

static void multiply(const Blocks *b, const Matrix *m, const uint16_t *x, uint16_t *y, uint8_t *scratch) {
    Product p = as_product(b, m);
    p.x = x, p.y = y, p.scratch = scratch;
    product(&p);
}

static void norm(const Blocks *b, const uint16_t *weight, const Rooms *r) {
    norm_scale(b->x, r->scale, b->rows, b->hidden, b->eps, b->attention.threads);
    normalise(b->x, r->scale, weight, r->normed, b->rows, b->hidden, b->attention.threads);
}

static void add(const Blocks *b, const uint16_t *added) {
    for (int64_t k = 0; k < b->rows * b->hidden; k += LANES)
        to_bf16(b->x + k, _mm512_add_ps(from_bf16(b->x + k), from_bf16(added + k)));
}

// Keys or values of this step, whose rows are `stride` apart, into their slots.
static void write(const Blocks *b, const uint16_t *from, int64_t stride, void *cache, float *scale) {
    int64_t size = kv_size(b), dim = b->attention.head_dim;
    for (int64_t row = 0; row < b->rows; row++, from += stride) {
        int64_t at = b->slots[row] * size;
        if (scale == NULL)
            memcpy((uint16_t *)cache + at, from, 2 * size);
        else
            for (int64_t h = 0; h < size / dim; h++)
                scale[at / dim + h] = quantise_bf16(from + h * dim, dim, (int8_t *)cache + at + h * dim);
    }
}

void blocks(const Blocks *b) {
    Rooms r = lay_out(b);
    Attention a = b->attention;
    a.q = r.q, a.out = r.heads, a.scratch = (float *)r.attention;
    int64_t half = a.head_dim / 2, stride = q_size(b) + 2 * kv_size(b), layer = b->num_slots * kv_size(b);
    for (const Block *block = b->blocks; block < b->blocks + b->num_blocks; block++) {
        norm(b, block->attention_norm, &r);
        multiply(b, &block->qkv, r.normed, r.qkv, r.product);
        rotate(r.qkv, b->cos, b->sin, r.q, b->rows, a.num_heads, half, stride, a.threads);
        rotate(r.qkv + q_size(b), b->cos, b->sin, r.k, b->rows, a.num_kv_heads, half, stride, a.threads);
        write(b, r.k, kv_size(b), a.keys, a.key_scale);
        write(b, r.qkv + q_size(b) + kv_size(b), stride, a.values, a.value_scale);
        attention(&a);
        multiply(b, &block->out, r.heads, r.added, r.product);
        add(b, r.added);

        norm(b, block->feed_forward_norm, &r);
        multiply(b, &block->gate_up, r.normed, r.gate_up, r.product);
        swiglu(r.gate_up, r.gate_up + b->intermediate, r.act, b->rows, b->intermediate, 2 * b->intermediate, a.threads);
        multiply(b, &block->down, r.act, r.added, r.product);
        add(b, r.added);

        a.keys = (uint8_t *)a.keys + layer * (a.kind == BF16 ? 2 : 1);
        a.values = (uint8_t *)a.values + layer * (a.kind == BF16 ? 2 : 1);
        if (a.kind == INT8) a.key_scale += layer / a.head_dim, a.value_scale += layer / a.head_dim;
    }
}
