// One call of the fused projection; cpu.py mirrors this structure field by field.
#pragma once
#include "cpu/runtime.h"

namespace hstu {

// out = residual + rows W + bias, where rows may first be normalised: LN(x) = (x - mean) / sqrt(variance + epsilon).
struct ProjectionCall {
    int64_t depth, columns;
    int64_t compute_type;     // of both operands; sums are float32, or int32 of int8
    const void* weight;       // read by pack alone: [depth, columns] float32, bf16, or int8 with scales
    int64_t weight_type;
    const float* scales;      // [columns], of an int8 weight
    const float* bias;        // [columns], or null
    void* packed;             // hstu_projection_bytes, aligned to 64
    int64_t rows;
    const void* in;           // [rows, depth]
    int64_t in_type;
    const float* in_scales;   // [rows]: in_type kInt8, and compute_type too
    int64_t normalize;
    double epsilon;
    const float* residual;    // [rows, columns], or null; with it, out is float32
    void* out;                // [rows, columns] float32 or bf16
    int64_t out_type, threaded;
};

}  // namespace hstu
