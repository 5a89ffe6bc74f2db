// One call of the fused HSTU attention; cpu.py mirrors these structures field by field.
#pragma once
#include "cpu/runtime.h"

namespace hstu {

enum Mode : int64_t { kCausal = 0, kCandidates = 1, kQueries = 2 };
enum BucketType : int64_t { kNoBuckets = 0, kUint8 = 1, kInt32 = 4, kInt64 = 8 };

// Rows [batch, rows, columns] of one tensor: strides count elements; columns are contiguous. With `starts` the users'
// rows stand one after the other, without padding: those of user b are starts[b] .. starts[b + 1], of which it may
// use fewer.
struct Rows {
    const void* data;
    int64_t row_stride, batch_stride;
    const int64_t* starts;  // [batch + 1], or null: user b's rows begin at b * batch_stride
};

// One call. User b sees the keys t = 0, 1, ...: first the prefix (prefix_lengths[b] rows of prefix_k, prefix_v),
// then, in mode kCausal, its own query rows. t is also the key's position.
//   kCausal: query row i < lengths[b] stands at p = prefix_lengths[b] + i and sees t <= p
//   kCandidates: query row c stands at p = positions[b, c], sees t < p of the prefix, and itself
//   kQueries: query row i stands at p = positions[b, i] and sees t <= p of the prefix, and of own_lengths[b] rows of
//   k and v after it; it has no k and v itself
struct Call {
    int64_t batch, queries, heads, qk_dim, v_dim, max_length;
    int64_t prefix_rows;  // rows that prefix_k and prefix_v have per user, at most (0: there is no prefix)
    Rows u, v, q, k;      // of the query rows, at most `queries` of a user, before SiLU; u and q have the same
                          // `starts`, and so have v and k: where query rows are keys, all of them
    Rows prefix_v, prefix_k;
    const int64_t* lengths;          // [batch], or null: every user has `queries` rows
    const int64_t* prefix_lengths;   // [batch], or null: 0
    const int64_t* own_lengths;      // [batch], or null: 0; in mode kQueries alone
    const int64_t* positions;        // not in mode kCausal
    int64_t position_row_stride, position_batch_stride;
    const float* position_bias;      // [2 max_length - 1], at t - p + max_length - 1
    const float* time_bias;          // [129]
    const void* buckets;             // [batch, queries or 1, keys]: element (i, t), own rows from own_bucket_column on
    int64_t bucket_row_stride, bucket_batch_stride;
    int64_t own_bucket_column;       // own rows after a prefix: -1 means that t counts on, own row 0 at the prefix length
    const void* own_buckets;         // kCandidates: [batch, queries or 1]; null: bucket 0
    int64_t own_bucket_row_stride, own_bucket_batch_stride;
    const uint8_t* mask;             // [batch, queries, keys], zero forbids; null: nothing more is forbidden
    int64_t mask_row_stride, mask_batch_stride;
    void* out;                       // [batch, queries, heads * v_dim], or as u.starts says; rows after the end become 0
    float* out_scales;               // out_type kInt8: one for each row of out, which is its scale times its int8 values
    double epsilon;
    int64_t mode, in_type, out_type, compute_type, prefix_type, prefix_activated, bucket_type, threaded;
};

}  // namespace hstu
