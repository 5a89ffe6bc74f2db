// One layer of one step of the scheduler on paged keys and values; cpu.py mirrors this structure field by field.
#pragma once
#include <cstdint>

namespace hstu {

using ParallelRegion = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);  // GOMP_parallel

// The step has `rows` rows of `requests` requests; request r's new rows are first[r] .. first[r] + num_new[r] - 1 and
// stand after context[r] events whose keys and values are in the pages already. A page holds `block` events:
// [pages, heads, block, qk_dim + v_dim], key then value, after SiLU. Event t of request r is in page
// table[r * table_stride + t / block], row t % block.
struct PagedCall {
    int64_t rows, requests, heads, qk_dim, v_dim, max_length, block;
    const void* uvqk;              // [rows, row_stride]: u, v, q, k of all heads, before SiLU
    int64_t row_stride;
    void* pages;
    const int64_t* slots;          // [rows]: page * block + row of each new row; page 0 is nobody's
    const int64_t *first, *num_new, *context;
    const int32_t* table;
    int64_t table_stride;
    const float* position_bias;    // [2 max_length - 1], at j - i + max_length - 1
    const float* time_bias;        // [129]
    uint8_t* buckets;              // of request r from bucket_start[r] on: [num_new, context + num_new]
    const int64_t* bucket_start;
    const int64_t* times;          // [slots]: when the event of a slot was
    const int64_t* next_times;     // [rows]: when the event after a row was
    const int64_t* edges;          // [129]: bucket b is edges[b] <= dt < edges[b + 1]
    void* out;                     // [rows, heads * v_dim]
    double epsilon;
    int64_t bfloat16;              // uvqk, pages and out hold bf16, not float32
    int64_t gated;                 // out = u * LN(attended), else attended
    // A step of a beam search, when num_suffix > 0: the one request's rows are beams that share its `context` events and
    // see nothing of one another. Row r is at place context + num_suffix - 1; before it, and at last itself, it sees
    // the rows ancestors[r * num_suffix ..] of `suffix` [.., heads, qk_dim + v_dim], where its own key and value go;
    // their bucket is 0. All rows have the buckets of row 0. slots are not used.
    int64_t num_suffix;
    const int64_t* ancestors;
    void* suffix;
    int64_t threads;
    ParallelRegion parallel;       // null: on this thread alone
};

struct PagedKernels {
    const char* name;
    void (*attention)(const PagedCall&);
};
extern const PagedKernels kPagedAvx2, kPagedAvx512;

// f(i) for i in 0 .. count - 1 on the threads of the process's own OpenMP, which torch uses too.
void for_each(const PagedCall& call, int64_t count, void (*body)(void*, int64_t), void* context);
void* scratch(int64_t bytes);  // this thread's, until it asks again

}  // namespace hstu
