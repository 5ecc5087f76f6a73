// What the kernels are asked, and by whom they call each other. llama/model/kernels/native.py has the same structures.

#pragma once

#include <stdint.h>

enum { BF16, INT8, INT4 };  // formats of W; what a cache holds is one of the first two
enum { VECTORS, TILES };    // kernels
enum { LANES = 16 };        // rows of W in a block; rows of x in a tile; numbers in a vector

// y = x Wᵀ: linear.c
typedef struct {
    int32_t format, kernel, threads;
    int32_t x_wide, y_wide;         // whether x and y are float32; otherwise bfloat16
    int64_t rows, outs, ins;        // of x; of W; columns of both
    const uint8_t *weight;          // [outs / LANES] blocks
    const float *scale;             // [outs], INT8
    const void *x;                  // [rows, ins]
    void *y;                        // [rows, outs]
    uint8_t *scratch;               // scratch_bytes()
} Product;

int64_t scratch_bytes(const Product *p);
void product(const Product *p);

// Decode attention: attention.c
typedef struct {
    int32_t kind, threads;
    int64_t queries, num_heads, num_kv_heads, head_dim;
    const uint16_t *q;              // [tokens, num_heads, head_dim], bfloat16
    uint16_t *out;                  // the same
    void *keys, *values;            // [slots, num_kv_heads, head_dim]
    float *key_scale, *value_scale; // [slots, num_kv_heads], INT8
    const int64_t *rows;            // [queries]: their tokens
    const int64_t *first, *length;  // [queries]: their context in `slots`
    const int32_t *slots;           // of all contexts
    float *scratch;                 // attention_scratch() floats
} Attention;

int64_t attention_scratch(const Attention *a);
void attention(const Attention *a);

// What lies between: elementwise.c
void norm_scale(const uint16_t *x, float *scale, int64_t rows, int64_t size, float eps, int threads);
void normalise(const uint16_t *x, const float *scale, const uint16_t *weight, uint16_t *y, int64_t rows, int64_t size,
               int threads);
void swiglu(const uint16_t *gate, const uint16_t *up, uint16_t *y, int64_t rows, int64_t size, int64_t stride, int threads);
void rotate(const uint16_t *x, const float *cos, const float *sin, uint16_t *y, int64_t rows, int64_t heads, int64_t half,
            int64_t stride, int threads);
